//! A client that speaks the transport, and a datapath that does what its requests' dp_ifindex says.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs
)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use netlink::family::command;
use netlink::handler::{Answer, Dump, DumpPart, Fit, Handler, Lane};
use netlink::message::{Failure, Header, Request};
use netlink::transport::{self, Control, ControlOp, Hello, Netns, Status, Welcome};
use netlink::{Config, Errno, Family, Group, Hub, Running, Server};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

/// Long enough that only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The longest that VPORT_NEW sleeps, in ms.
pub const LONGEST_NAP: u64 = 800;

/// A run directory that goes when the test does.
pub struct RunDir(pub PathBuf);

impl RunDir {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("netlink-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a test's server is.
pub struct Fixture {
    pub running: Option<Running>,
    pub hub: Hub,
    pub script: Arc<Script>,
    pub dir: RunDir,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = RunDir::new();
        let mut config = Config::new(&dir.0);
        config.threads = 2;
        change(&mut config);
        let server = Server::bind(config).unwrap();
        let hub = server.hub();
        let script = Arc::new(Script::default());
        let running = Some(
            server
                .serve(Arc::clone(&script) as Arc<dyn Handler>)
                .unwrap(),
        );
        Self {
            running,
            hub,
            script,
            dir,
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.dir.0).unwrap()
    }

    /// Waits until `true_now`.
    pub fn until(&self, what: &str, true_now: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !true_now() {
            assert!(Instant::now() < end, "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// See [`Handler`] below for what it does with which request.
#[derive(Default)]
pub struct Script {
    /// (port id, seq) of FLOW_NEW, in the order of their coming.
    pub seen: Mutex<Vec<(u32, u32)>>,
    pub gone: Mutex<Vec<u32>>,
    pub sleeps: AtomicUsize,
    pub dumps: AtomicUsize,
    pub naps: AtomicUsize,
}

impl Handler for Script {
    fn lane(&self, request: &Request<'_>) -> Lane {
        match (request.family, request.command) {
            (Family::Vport, command::SET) => Lane::Long,
            (Family::Vport, command) if command != command::GET => Lane::MaySleep,
            _ => Lane::Prompt,
        }
    }

    /// FLOW_NEW: ECHO to its group; a negative dp_ifindex is the errno. VPORT_NEW, VPORT_SET: sleeps dp_ifindex
    /// ms, then the same. DP_GET: a reply of dp_ifindex bytes. EXECUTE: panics if dp_ifindex is 13.
    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<(), Failure> {
        let group = request.family.group();
        if request.dp_ifindex < 0 {
            return Err(Errno(-request.dp_ifindex).into());
        }
        match (request.family, request.command) {
            (Family::Vport, command::NEW | command::SET) => {
                let nap = (request.dp_ifindex as u64).min(LONGEST_NAP);
                std::thread::sleep(Duration::from_millis(nap));
                self.sleeps.fetch_add(1, Ordering::SeqCst);
            }
            (Family::Datapath, command::GET) => {
                let len = (request.dp_ifindex as usize).min(60_000);
                return Ok(answer.reply(command::NEW, request.dp_ifindex, |writer| {
                    writer.bytes(1, &vec![7; len])
                })?);
            }
            (Family::Packet, _) if request.dp_ifindex == 13 => panic!("as asked"),
            _ => {}
        }
        self.seen
            .lock()
            .unwrap()
            .push((request.port_id, request.seq));
        if let Some(group) = group {
            answer.announce(group, request.command, request.dp_ifindex, |writer| {
                writer.u32(1, request.seq);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// dp_ifindex messages of about 350 bytes; after 999 of 1000 an error.
    fn dump(&self, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        if request.dp_ifindex < 0 {
            return Err(Errno(-request.dp_ifindex).into());
        }
        self.dumps.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Numbers {
            next: 0,
            end: request.dp_ifindex as u32,
        }))
    }

    fn gone(&self, port_id: u32) {
        self.gone.lock().unwrap().push(port_id);
    }

    fn before_sleep(&self) {
        self.naps.fetch_add(1, Ordering::Relaxed);
    }
}

struct Numbers {
    next: u32,
    end: u32,
}

impl Dump for Numbers {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        while self.next < self.end {
            let number = self.next;
            let fit = part.message(Family::Flow, command::NEW, 1, |writer| {
                writer.u32(1, number);
                writer.bytes(2, &[0; 300])
            })?;
            if fit == Fit::Full {
                return Ok(false);
            }
            self.next += 1;
            if self.next == 999 {
                return Err(Errno::EIO);
            }
        }
        Ok(true)
    }
}

/// A request; its headers and attributes.
pub fn request(family: Family, command: u8, flags: u16, seq: u32, dp_ifindex: i32) -> Vec<u8> {
    let mut bytes = Vec::new();
    Header {
        len: 24,
        kind: family.id(),
        flags,
        seq,
        pid: 0,
    }
    .emit(&mut bytes);
    bytes.extend_from_slice(&[command, 1, 0, 0]);
    bytes.extend_from_slice(&dp_ifindex.to_ne_bytes());
    bytes
}

/// The s32 of NLMSG_ERROR or NLMSG_DONE.
pub fn error_of(datagram: &[u8]) -> i32 {
    i32::from_ne_bytes(datagram[16..20].try_into().unwrap())
}

pub fn header(datagram: &[u8]) -> Header {
    Header::parse(datagram).unwrap()
}

pub struct Client {
    pub socket: OwnedFd,
    pub welcome: Welcome,
    pub cookie: u32,
}

pub fn netns() -> Netns {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata("/proc/thread-self/ns/net").unwrap();
    Netns {
        dev: metadata.dev(),
        ino: metadata.ino(),
    }
}

pub fn hello() -> Hello {
    Hello {
        version: transport::VERSION,
        protocol: transport::NETLINK_GENERIC,
        netns: netns(),
    }
}

/// A connected socket, silent so far.
pub fn dial(dir: &Path) -> io::Result<OwnedFd> {
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(
        &socket,
        &SocketAddrUnix::new(dir.join(transport::SOCKET_NAME))?,
    )?;
    Ok(socket)
}

/// One datagram, within [`PATIENCE`]. None: end of file.
pub fn receive(socket: impl AsFd) -> Option<Vec<u8>> {
    receive_within(&socket, PATIENCE).expect("nothing came")
}

/// None: nothing came in time. Some(None): end of file.
pub fn receive_within(socket: impl AsFd, time: Duration) -> Option<Option<Vec<u8>>> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let time = Timespec::try_from(time).unwrap();
    let mut polled = [PollFd::new(&socket, PollFlags::IN)];
    if poll(&mut polled, Some(&time)).unwrap() == 0 {
        return None;
    }
    let mut bytes = vec![0; 1 << 18];
    match rustix::net::recv(&socket, &mut bytes, RecvFlags::empty()) {
        Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => Some(None),
        Ok((len, _)) => {
            bytes.truncate(len);
            Some(Some(bytes))
        }
        Err(error) => panic!("recv: {error}"),
    }
}

impl Client {
    pub fn connect(dir: &Path) -> io::Result<Self> {
        let socket = dial(dir)?;
        let hello = hello().to_bytes();
        rustix::net::send(&socket, &hello, SendFlags::NOSIGNAL)?;
        let Some(bytes) = receive(&socket) else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let welcome = Welcome::parse(&bytes).unwrap();
        if welcome.status != Status::Ok {
            return Err(io::Error::other(format!("{:?}", welcome.status)));
        }
        Ok(Self {
            socket,
            welcome,
            cookie: 0,
        })
    }

    pub fn port_id(&self) -> u32 {
        self.welcome.port_id
    }

    pub fn send(&self, datagram: &[u8]) {
        rustix::net::send(&self.socket, datagram, SendFlags::NOSIGNAL).unwrap();
    }

    pub fn control(&self, op: ControlOp, value: u32) {
        self.send(&Control { op, value }.to_bytes());
    }

    pub fn join(&mut self, group: Group) {
        self.control(ControlOp::AddMembership, group.id());
        self.settle();
    }

    /// Sends messages as one datagram with a barrier behind them.
    pub fn ask(&mut self, messages: &[Vec<u8>]) {
        let mut datagram = messages.concat();
        self.cookie += 1;
        datagram.extend_from_slice(&transport::barrier(self.cookie));
        self.send(&datagram);
    }

    /// What comes until the ack of the newest barrier.
    pub fn answers(&self) -> Vec<Vec<u8>> {
        let mut answers = Vec::new();
        loop {
            let datagram = receive(&self.socket).expect("end of file");
            match transport::ack_cookie(&datagram) {
                Some(cookie) if cookie == self.cookie => return answers,
                Some(_) => {}
                None => answers.push(datagram),
            }
        }
    }

    pub fn converse(&mut self, messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
        self.ask(messages);
        self.answers()
    }

    /// All that was sent has been seen.
    pub fn settle(&mut self) {
        assert_eq!(self.converse(&[]), Vec::<Vec<u8>>::new());
    }
}
