//! A scripted daemon, and clients under the interposer.
//!
//! A scenario is one test with two halves. The parent plays the daemon; the client half is the
//! same test of the same binary, run again in a child process with `LD_PRELOAD` set.

#![allow(dead_code)] // each test program uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // these are tests

pub mod client;

use std::env;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with,
    bind, listen, recv, send, socket_with,
};
use transport::{
    BARRIER_LEN, HELLO_LEN, Header, Hello, Netns, PORT_ID_FIRST, SOCKET_NAME, Status, VERSION,
    Welcome, barrier_ack, barrier_cookie,
};

/// How long anything may take before it counts as hanging.
pub const LIMIT: Duration = Duration::from_secs(20);
const CLIENT_ENV: &str = "INTERPOSER_CLIENT";

/// The interposer: $OVS_COMPAT_SO, or built for these tests.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(told) = env::var_os("OVS_COMPAT_SO") {
            return PathBuf::from(told);
        }
        // target/PROFILE/deps/this-test
        let profile = env::current_exe()
            .unwrap()
            .ancestors()
            .nth(2)
            .unwrap()
            .to_owned();
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.args(["build", "--quiet", "--package", "ovs-compat-interposer"]);
        cargo
            .arg("--manifest-path")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
        cargo.arg("--target-dir").arg(profile.parent().unwrap());
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(
            cargo.status().unwrap().success(),
            "can't build the interposer"
        );
        profile.join("libovs_compat.so")
    })
}

/// Runs the two halves of the test called `name`; panics if either fails or takes too long.
pub fn scenario(name: &str, daemon: impl FnOnce(&Daemon), client: impl FnOnce()) {
    if env::var(CLIENT_ENV).is_ok_and(|own| own == name) {
        return client();
    }
    let mock = Daemon::start(name);
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CLIENT_ENV, name);
    let child = mock.spawn(&mut command);
    // A daemon whose client has failed would wait for it in vain, for a while: then both are
    // told of.
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| daemon(&mock)));
    let (status, output) = child.finish();
    assert!(status.success(), "the client failed: {status}\n{output}");
    assert!(
        output.contains("1 passed"),
        "no test is called {name}:\n{output}"
    );
    if let Err(panic) = played {
        std::panic::resume_unwind(panic);
    }
}

/// A program under the interposer.
pub struct Program(std::process::Child);

impl Program {
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Its status and what it has written; kills and panics if it hangs.
    pub fn finish(mut self) -> (ExitStatus, String) {
        let mut readers = Vec::new();
        let mut out = self.0.stdout.take().unwrap();
        let mut err = self.0.stderr.take().unwrap();
        readers.push(thread::spawn(move || {
            let mut text = Vec::new();
            out.read_to_end(&mut text).map(|_| text)
        }));
        readers.push(thread::spawn(move || {
            let mut text = Vec::new();
            err.read_to_end(&mut text).map(|_| text)
        }));
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break Some(status);
            }
            if start.elapsed() > LIMIT {
                self.0.kill().unwrap();
                self.0.wait().unwrap();
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let text: Vec<u8> = readers
            .into_iter()
            .flat_map(|reader| reader.join().unwrap().unwrap())
            .collect();
        let text = String::from_utf8_lossy(&text).into_owned();
        match status {
            Some(status) => (status, text),
            None => panic!("the client hangs\n{text}"),
        }
    }
}

/// The daemon's listening socket in a run directory of its own, removed at the end.
pub struct Daemon {
    pub run_dir: PathBuf,
    listener: OwnedFd,
    next_port_id: AtomicU32,
}

impl Daemon {
    pub fn start(name: &str) -> Self {
        let run_dir = env::temp_dir().join(format!("interposer-{}-{name}", std::process::id()));
        Self::start_in(run_dir)
    }

    pub fn start_in(run_dir: PathBuf) -> Self {
        std::fs::create_dir_all(&run_dir).unwrap();
        let flags = SocketFlags::CLOEXEC;
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        // A path may be longer than an address.
        let directory = std::fs::File::open(&run_dir).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&directory);
        let path = format!("/proc/self/fd/{fd}/{SOCKET_NAME}");
        bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&listener, 16).unwrap();
        Self {
            run_dir,
            listener,
            next_port_id: AtomicU32::new(PORT_ID_FIRST + 77),
        }
    }

    /// Starts a program under the interposer.
    pub fn spawn(&self, command: &mut Command) -> Program {
        spawn(command, &self.run_dir)
    }

    /// A client of generic netlink, received with this status.
    pub fn receive_as(&self, status: Status, version: u32) -> Connection {
        self.receive(status, version, transport::NETLINK_GENERIC)
    }

    /// A client of this protocol, received with this status.
    fn receive(&self, status: Status, version: u32, protocol: u32) -> Connection {
        wait(&self.listener, "no client has come");
        let socket = accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap();
        let mut connection = Connection { socket, port_id: 0 };
        let hello = connection.datagram();
        assert_eq!(hello.len(), HELLO_LEN);
        let hello = Hello::parse(&hello).unwrap();
        assert_eq!((hello.version, hello.protocol), (VERSION, protocol));
        assert_eq!(hello.netns, netns());
        let port_id = self.next_port_id.fetch_add(1, Ordering::Relaxed);
        let welcome = Welcome {
            version,
            status,
            port_id,
            netns: netns(),
            instance: 0xfeed,
        };
        connection.send(&welcome.to_bytes());
        connection.port_id = port_id;
        connection
    }

    /// A client of generic netlink, let in.
    pub fn accept(&self) -> Connection {
        self.receive_as(Status::Ok, VERSION)
    }

    /// A client of this protocol, let in.
    pub fn accept_speaking(&self, protocol: u32) -> Connection {
        self.receive(Status::Ok, VERSION, protocol)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // What can't be removed is in the temporary directory.
        let _ = std::fs::remove_dir_all(&self.run_dir);
    }
}

/// Starts a program under the interposer, pointed at a run directory.
pub fn spawn(command: &mut Command, run_dir: &Path) -> Program {
    command
        .env("LD_PRELOAD", library())
        .env(transport::RUNDIR_ENV, run_dir);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Program(command.spawn().unwrap())
}

fn netns() -> Netns {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata("/proc/thread-self/ns/net").unwrap();
    Netns {
        dev: meta.dev(),
        ino: meta.ino(),
    }
}

fn wait(fd: impl AsFd, otherwise: &str) {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: LIMIT.as_secs() as i64,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "{otherwise}");
}

/// The daemon's side of one netlink socket.
pub struct Connection {
    socket: OwnedFd,
    pub port_id: u32,
}

impl Connection {
    /// The next datagram; empty at the client's end.
    pub fn datagram(&self) -> Vec<u8> {
        wait(&self.socket, "nothing has come from the client");
        let mut buffer = vec![0; 1 << 18];
        match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
            Ok((length, _)) => buffer.truncate(length),
            // It has closed without having read all, as clients do.
            Err(rustix::io::Errno::CONNRESET) => buffer.clear(),
            Err(error) => panic!("{error}"),
        }
        buffer
    }

    /// The next request: what is before the barrier, as it was sent; and the barrier's cookie.
    pub fn request(&self) -> (Vec<u8>, u32) {
        let mut datagram = self.datagram();
        let at = datagram
            .len()
            .checked_sub(BARRIER_LEN)
            .expect("no barrier: too short");
        let header = Header::parse(&datagram[at..]).unwrap();
        let cookie = barrier_cookie(header).expect("no barrier");
        datagram.truncate(at);
        (datagram, cookie)
    }

    pub fn send(&self, datagram: &[u8]) {
        assert_eq!(
            send(&self.socket, datagram, SendFlags::NOSIGNAL),
            Ok(datagram.len())
        );
    }

    pub fn ack(&self, cookie: u32) {
        self.send(&barrier_ack(cookie));
    }

    /// Takes a request, and answers with `reply` long after a client that doesn't wait has gone.
    pub fn answer_late(&self, reply: &[u8]) -> Vec<u8> {
        let (request, cookie) = self.request();
        late();
        self.send(reply);
        self.ack(cookie);
        request
    }

    /// Until the client has closed.
    pub fn until_closed(&self) {
        while !self.datagram().is_empty() {}
    }
}

/// Long enough for a client that doesn't wait to be wrong.
pub fn late() {
    thread::sleep(Duration::from_millis(150));
}
