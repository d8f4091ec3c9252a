//! A worker and queues whose system refuses, or says no more.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // these are tests

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use datapath::daemon::{Daemon, Options, PortWish};
use datapath::datapath::Settings;
use datapath::device_source::DeviceSource;
use datapath::devices::{Devices, Notice};
use datapath::mailbox::{Mailbox, mailbox};
use datapath::vport::VportType;
use frame::{Frame, Pool};
use netlink::Hub;
use rustix::event::{EventfdFlags, eventfd};
use vport::{
    Capabilities, Driver, DriverChoice, Error, HostCounters, Link, Port, RxErrors, RxQueue,
    RxStatus, TunnelConfig, TxOutcome,
};

/// What a queue answers, and how often it was asked. Its descriptor is readable all the time, as one is
/// whose device is in trouble.
struct Source {
    readable: OwnedFd,
    errno: Mutex<Option<i32>>,
    asked: AtomicU64,
    frames: AtomicU64,
}

impl Source {
    fn new(errno: Option<i32>) -> Arc<Self> {
        Arc::new(Self {
            readable: eventfd(1, EventfdFlags::CLOEXEC).unwrap(),
            errno: Mutex::new(errno),
            asked: AtomicU64::new(0),
            frames: AtomicU64::new(0),
        })
    }
}

struct Queue(Arc<Source>);

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.readable.as_fd()
    }
}

impl RxQueue for Queue {
    fn receive(&mut self, _: &mut Pool, out: &mut Vec<Frame>, _: usize) -> Result<RxStatus, Error> {
        self.0.asked.fetch_add(1, SeqCst);
        if let Some(errno) = *self.0.errno.lock().unwrap() {
            return Err(Error::new(errno, "receive in a test"));
        }
        self.0.frames.fetch_add(1, SeqCst);
        out.push(Frame::from_bytes(&[0; 60]));
        let errors = RxErrors::default();
        Ok(RxStatus::Open { more: true, errors })
    }
}

struct Device {
    name: String,
    ifindex: u32,
    queue: Option<Arc<Source>>,
}

impl Port for Device {
    fn driver(&self) -> Driver {
        Driver::Tap
    }
    fn mode(&self) -> String {
        String::from("in a test")
    }
    fn ifindex(&self) -> u32 {
        self.ifindex
    }
    fn name(&self) -> &str {
        &self.name
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            csum: false,
            tso4: false,
            tso6: false,
            uso: false,
            ufo: false,
            vlan: true,
            max_frame: 1514,
            max_gso_frame: 1514,
        }
    }
    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        let queue = self.queue.iter();
        Ok(queue
            .map(|of| Box::new(Queue(Arc::clone(of))) as _)
            .collect())
    }
    fn transmit(&self, frames: &mut Vec<Frame>, _: &mut Pool, _: &mut TxOutcome) {
        frames.clear();
    }
    fn host_counters(&self) -> HostCounters {
        HostCounters::default()
    }
    fn link_changed(&self, _: &Link) {}
}

/// Device `vN` has the N-th queue.
struct All(Vec<Arc<Source>>);

impl DeviceSource for All {
    fn attach(&self, name: &str) -> Result<Box<dyn Port>, Error> {
        let number: usize = name.strip_prefix('v').unwrap().parse().unwrap();
        Ok(Box::new(Device {
            name: name.to_owned(),
            ifindex: 100 + number as u32,
            queue: self.0.get(number).cloned(),
        }))
    }
    fn create_internal(&self, name: &str, _: Option<u32>) -> Result<Box<dyn Port>, Error> {
        Ok(Box::new(Device {
            name: name.to_owned(),
            ifindex: 1,
            queue: None,
        }))
    }
    fn create_tunnel(&self, name: &str, _: TunnelConfig, _: u32) -> Result<Box<dyn Port>, Error> {
        Err(Error::new(libc::EOPNOTSUPP, name))
    }
}

/// One after the other: the time that a worker takes is told by its thread's name.
static ALONE: Mutex<()> = Mutex::new(());

struct Bed {
    _alone: MutexGuard<'static, ()>,
    daemon: Arc<Daemon>,
    sources: Vec<Arc<Source>>,
    notices: Mailbox<Notice>,
}

impl Bed {
    /// A worker, and a datapath with a port for each of these sources.
    fn new(sources: &[Arc<Source>]) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (sending, notices) = mailbox().unwrap();
        let options = Options {
            workers: 1,
            cpus: None,
            busy_poll: Duration::ZERO,
            prompt_threads: 1,
            seed: 1,
            max_connections: 16,
            driver: DriverChoice::Auto,
            run_prefix: String::from("test"),
            force_veth: false,
            rings: datapath::outlet::RingDefaults::default(),
            notes: Vec::new(),
        };
        let daemon = Arc::new(Daemon::with_devices(
            options,
            Hub::default(),
            Devices::new(sending),
            Box::new(All(sources.to_vec())),
        ));
        daemon.workers.start(&daemon).unwrap();
        let configuration = daemon.configure();
        let handle = daemon.reclaimer.register();
        let datapath = configuration
            .add_datapath(&handle, "br", None, Settings::default(), Vec::new())
            .unwrap();
        for number in 0..sources.len() {
            let wish = PortWish {
                name: &format!("v{number}"),
                kind: VportType::Netdev,
                number: None,
                ifindex: None,
                tunnel: None,
                upcall_pids: Vec::new(),
            };
            configuration.add_port(&datapath, &wish).unwrap();
        }
        drop(configuration);
        Self {
            _alone: alone,
            daemon,
            sources: sources.to_vec(),
            notices,
        }
    }

    fn asked(&self, number: usize) -> u64 {
        self.sources[number].asked.load(SeqCst)
    }

    fn until(&self, what: &str, true_now: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !true_now() {
            assert!(Instant::now() < end, "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(self) {
        self.daemon.workers.stop();
        self.daemon.remove_all();
    }
}

#[test]
fn a_queue_whose_system_refuses_is_tried_again_ever_more_rarely_and_goes_on() {
    let bed = Bed::new(&[Source::new(Some(libc::ENOMEM))]);
    bed.until("the first failures", || bed.asked(0) >= 3);
    std::thread::sleep(Duration::from_millis(300));
    // 1, 2, 4, ... ms: nine or ten by now.
    let asked = bed.asked(0);
    assert!(asked <= 20, "{asked}");
    *bed.sources[0].errno.lock().unwrap() = None;
    bed.until("a frame", || bed.sources[0].frames.load(SeqCst) > 100);
    bed.end();
}

#[test]
fn others_have_their_turns_beside_one_that_fails_and_one_that_is_busy() {
    let sources = [
        Source::new(Some(libc::ENOMEM)),
        Source::new(None),
        Source::new(None),
    ];
    let bed = Bed::new(&sources);
    bed.until("many turns", || bed.asked(1) > 1000);
    let (first, second) = (bed.asked(1), bed.asked(2));
    // A turn each, so they differ by how long a look takes.
    assert!(first.abs_diff(second) < first / 2, "{first} {second}");
    bed.end();
}

#[test]
fn a_queue_that_is_gone_is_told_of_once_and_keeps_nobody_awake() {
    let sources = [Source::new(Some(libc::ENODEV))];
    let bed = Bed::new(&sources);
    let told = || matches!(bed.notices.next(), Some(Notice::Gone { .. }));
    bed.until("the notice", told);
    // The descriptor is the port's still, and readable.
    let before = thread_time("worker-0");
    std::thread::sleep(Duration::from_millis(300));
    let spent = thread_time("worker-0") - before;
    assert!(spent <= 5, "{spent} ticks of 10 ms");
    assert_eq!(bed.asked(0), 1);
    bed.end();
}

/// Ticks of a hundredth of a second that threads of that name have run for.
fn thread_time(name: &str) -> u64 {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let Ok(stat) = std::fs::read_to_string(task.unwrap().path().join("stat")) else {
            continue;
        };
        let (head, rest) = stat.rsplit_once(')').unwrap();
        if head.ends_with(&format!("({name}")) {
            let fields: Vec<&str> = rest.split_whitespace().collect();
            ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    ticks
}
