//! Namespaces that vanish with the test, and a forwarder of nothing but ports.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::panic)] // each test program uses a part

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use frame::{Frame, Pool};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use vport::{AttachOptions, InternalOptions, Port, RxQueue, RxStatus, TxOutcome, create_internal};

/// A network namespace without a name: it goes with its last thread, device and descriptor.
pub struct Netns {
    fd: Arc<OwnedFd>,
}

impl Netns {
    pub fn new() -> Self {
        let fd = thread::spawn(|| {
            #[expect(deprecated)] // the flag that makes it unsafe isn't used
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net").unwrap())
        })
        .join()
        .unwrap();
        let netns = Self { fd: Arc::new(fd) };
        netns.ip("link set lo up");
        netns
    }

    /// Runs `what` on a thread of its own inside.
    pub fn run<T: Send + 'static>(&self, what: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(what).join().unwrap()
    }

    pub fn spawn<T: Send + 'static>(
        &self,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let fd = Arc::clone(&self.fd);
        thread::spawn(move || {
            move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            what()
        })
    }

    /// `ip ARGS`, which must succeed; gives its output.
    pub fn ip(&self, args: &str) -> String {
        self.command(&format!("ip {args}"))
    }

    pub fn command(&self, line: &str) -> String {
        let line = line.to_owned();
        self.run(move || {
            let mut words = line.split_whitespace();
            let output = Command::new(words.next().unwrap())
                .args(words)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{line}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
    }

    /// How `ip link set X netns` is told of it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }

    pub fn attach(&self, name: &str, options: AttachOptions) -> Box<dyn Port> {
        let name = name.to_owned();
        self.run(move || vport::attach(&name, &options).unwrap())
    }

    pub fn link(&self, name: &str) -> vport::Link {
        let name = name.to_owned();
        self.run(move || vport::link::by_name(&name).unwrap())
    }
}

/// Two hosts on veths to a switch: `a:eth0 - pa:switch:pb - eth0:b`, addresses 10.9.0.1 and .2.
pub struct Lab {
    pub a: Netns,
    pub b: Netns,
    pub switch: Netns,
}

impl Lab {
    pub fn new(mtu: u32) -> Self {
        let lab = Self {
            a: Netns::new(),
            b: Netns::new(),
            switch: Netns::new(),
        };
        for (port, host, address) in [("pa", &lab.a, "10.9.0.1"), ("pb", &lab.b, "10.9.0.2")] {
            lab.switch.ip(&format!(
                "link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu}"
            ));
            lab.switch
                .ip(&format!("link set eth0 netns {}", host.path()));
            // Nothing of its own on the wire: tests count frames.
            host.ip("link set eth0 addrgenmode none");
            lab.switch.ip(&format!("link set {port} addrgenmode none"));
            lab.switch.ip(&format!("link set {port} up"));
            host.ip(&format!("addr add {address}/24 dev eth0"));
            host.ip("link set eth0 up");
        }
        lab
    }

    /// Joins pa and pb.
    pub fn forward(&self) -> Forwarder {
        Forwarder::new(
            self.switch.attach("pa", AttachOptions::default()),
            self.switch.attach("pb", AttachOptions::default()),
        )
    }
}

/// What went through a forwarder.
#[derive(Default, Debug)]
pub struct Seen {
    pub frames: AtomicU64,
    pub longest: AtomicU64,
    pub gso: AtomicU64,
    pub partial: AtomicU64,
    pub refused: AtomicU64,
    pub rx_errors: AtomicU64,
}

/// Two ports, joined by a thread until dropped.
pub struct Forwarder {
    pub ports: [Arc<dyn Port>; 2],
    pub seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    pub fn new(a: Box<dyn Port>, b: Box<dyn Port>) -> Self {
        Self::with(a, b, |_, _| {})
    }

    /// `edit` gets each frame, and which of the two ports it goes to.
    pub fn with(
        a: Box<dyn Port>,
        b: Box<dyn Port>,
        edit: impl Fn(usize, &mut Frame) + Send + 'static,
    ) -> Self {
        let ports: [Arc<dyn Port>; 2] = [a.into(), b.into()];
        let seen = Arc::new(Seen::default());
        let stop = Arc::new(AtomicBool::new(false));
        let mut queues: Vec<(usize, Box<dyn RxQueue>)> = Vec::new();
        for (n, port) in ports.iter().enumerate() {
            queues.extend(
                port.open_queues()
                    .unwrap()
                    .into_iter()
                    .map(|queue| (1 - n, queue)),
            );
        }
        let thread = thread::spawn({
            let (ports, seen, stop) = (ports.clone(), Arc::clone(&seen), Arc::clone(&stop));
            move || forward(&ports, queues, &seen, &stop, &edit)
        });
        Self {
            ports,
            seen,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            assert!(
                result.is_ok() || thread::panicking(),
                "the forwarder panicked"
            );
        }
    }
}

fn forward(
    ports: &[Arc<dyn Port>; 2],
    mut queues: Vec<(usize, Box<dyn RxQueue>)>,
    seen: &Seen,
    stop: &AtomicBool,
    edit: &dyn Fn(usize, &mut Frame),
) {
    let mut pool = Pool::default();
    let mut frames = Vec::new();
    while !stop.load(SeqCst) {
        if queues.is_empty() {
            thread::sleep(Duration::from_millis(10));
            continue;
        }
        let ready = wait(queues.iter().map(|(_, queue)| queue.as_fd()), 100);
        let mut gone = Vec::new();
        for (n, ((to, queue), ready)) in queues.iter_mut().zip(ready).enumerate() {
            // One that is down may be gone, and nobody tells.
            if !ready && stop.load(SeqCst) {
                continue;
            }
            match queue.receive(&mut pool, &mut frames, 32).unwrap() {
                RxStatus::Gone => gone.push(n),
                RxStatus::Open { errors, .. } => {
                    seen.rx_errors.fetch_add(errors.total(), SeqCst);
                }
            }
            for frame in &mut frames {
                edit(*to, frame);
                seen.frames.fetch_add(1, SeqCst);
                seen.longest.fetch_max(frame.len() as u64, SeqCst);
                seen.gso
                    .fetch_add(u64::from(frame.offload.gso.is_some()), SeqCst);
                seen.partial
                    .fetch_add(u64::from(frame.offload.csum.is_some()), SeqCst);
            }
            let mut outcome = TxOutcome::default();
            ports[*to].transmit(&mut frames, &mut pool, &mut outcome);
            seen.refused.fetch_add(outcome.refused_total(), SeqCst);
        }
        for n in gone.into_iter().rev() {
            drop(queues.swap_remove(n));
        }
    }
}

/// Which of the descriptors are readable (or broken) within `millis`.
pub fn wait<'a>(fds: impl Iterator<Item = BorrowedFd<'a>>, millis: i64) -> Vec<bool> {
    let mut fds: Vec<_> = fds
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    let timeout = Timespec {
        tv_sec: millis / 1000,
        tv_nsec: millis % 1000 * 1_000_000,
    };
    poll(&mut fds, Some(&timeout)).unwrap();
    fds.iter().map(|fd| !fd.revents().is_empty()).collect()
}

/// Sends `bytes` over TCP from one namespace to `address` in the other; both must end well.
pub fn tcp_transfer(from: &Netns, to: &Netns, address: &str, bytes: usize) {
    let bind = format!("{address}:0");
    let listener = to.run(move || TcpListener::bind(bind).unwrap());
    let target = listener.local_addr().unwrap();
    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let (mut buffer, mut sum, mut total) = (vec![0; 1 << 16], 0u64, 0);
        loop {
            let n = stream.read(&mut buffer).unwrap();
            if n == 0 {
                return (total, sum);
            }
            total += n;
            sum += buffer[..n].iter().map(|byte| u64::from(*byte)).sum::<u64>();
        }
    });
    let sent = from.run(move || {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5)).unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let data: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
        stream.write_all(&data).unwrap();
        data.iter().map(|byte| u64::from(*byte)).sum::<u64>()
    });
    assert_eq!(receiver.join().unwrap(), (bytes, sent));
}

/// `count` pings of `size` bytes of payload, all answered.
pub fn ping(from: &Netns, address: &str, count: u32, size: u32) {
    from.command(&format!(
        "ping -n -q -c {count} -i 0.05 -W 2 -M do -s {size} {address}"
    ));
}

/// Tries until it is so, or the time is up.
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !check() {
        assert!(Instant::now() < end, "not within 5 s: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An Ethernet frame of `len` bytes of an experimental type, to a MAC that is nobody's.
pub fn test_frame(len: usize, mark: u8) -> Frame {
    let mut bytes = vec![mark; len];
    bytes[..12].copy_from_slice(&[2, 0xde, 0xad, 0, 0, 1, 2, 0xbe, 0xef, 0, 0, 2]);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    Frame::from_bytes(&bytes)
}

/// Whether a frame is one of [`test_frame`], tagged or not.
pub fn is_test_frame(frame: &Frame) -> bool {
    frame.bytes().starts_with(&[2, 0xde, 0xad, 0, 0, 1])
}

/// A port with its only queue and a pool: an end to send from and receive at.
pub struct End {
    pub port: Box<dyn Port>,
    pub queue: Box<dyn RxQueue>,
    pub pool: Pool,
}

impl End {
    pub fn new(port: Box<dyn Port>) -> Self {
        let queue = port.open_queues().unwrap().pop().unwrap();
        Self {
            port,
            queue,
            pool: Pool::default(),
        }
    }

    pub fn send(&mut self, frame: Frame) -> TxOutcome {
        let mut outcome = TxOutcome::default();
        self.port
            .transmit(&mut vec![frame], &mut self.pool, &mut outcome);
        outcome
    }

    /// The next test frame within `millis`.
    pub fn next(&mut self, millis: u64) -> Option<Frame> {
        let end = Instant::now() + Duration::from_millis(millis);
        let mut frames = Vec::new();
        while Instant::now() < end {
            wait([self.queue.as_fd()].into_iter(), 20);
            self.queue.receive(&mut self.pool, &mut frames, 1).unwrap();
            if let Some(frame) = frames.drain(..).find(is_test_frame) {
                return Some(frame);
            }
        }
        None
    }
}

/// Both directions with default offloads; tells that packets were carried whole.
pub fn both_ways(lab: &Lab, forwarder: &Forwarder, mtu: u64) {
    ping(&lab.a, "10.9.0.2", 3, 56);
    ping(&lab.a, "10.9.0.2", 3, mtu as u32 - 28);
    tcp_transfer(&lab.a, &lab.b, "10.9.0.2", 32 << 20);
    let first = forwarder.seen.gso.load(SeqCst);
    tcp_transfer(&lab.b, &lab.a, "10.9.0.1", 32 << 20);
    let seen = &forwarder.seen;
    assert!(first > 0, "no GSO packet from a to b: {seen:?}");
    assert!(
        seen.gso.load(SeqCst) > first,
        "no GSO packet from b to a: {seen:?}"
    );
    assert!(
        seen.longest.load(SeqCst) > mtu + 18,
        "nothing was longer than the MTU: {seen:?}"
    );
    assert!(
        seen.partial.load(SeqCst) > 0,
        "no partial checksum: {seen:?}"
    );
    assert_eq!(seen.rx_errors.load(SeqCst), 0, "{seen:?}");
}

/// An internal port in the switch, its device given to `host`.
pub fn internal(
    lab: &Lab,
    host: &Netns,
    name: &'static str,
    address: &str,
    veth: bool,
) -> Box<dyn Port> {
    let options = InternalOptions {
        force_veth: veth,
        ..InternalOptions::default()
    };
    let port = lab
        .switch
        .run(move || create_internal(name, &options).unwrap());
    lab.switch
        .ip(&format!("link set {name} netns {}", host.path()));
    host.ip(&format!("link set {name} addrgenmode none"));
    host.ip(&format!("addr add {address}/24 dev {name}"));
    host.ip(&format!("link set {name} up"));
    port
}
