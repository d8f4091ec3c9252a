//! How long FLOW_NEW takes while someone holds the configuration lock for a second, as a VPORT_NEW that
//! waits for a device does; beside the same with nobody holding it, and beside a server that has one
//! lock for everything.
//!
//! The datapath's own server answers over its own socket, in this process; only two things are put in
//! front of it. A port request for a port of the name [`SLOW`] takes the configuration lock and sleeps.
//! And for the comparison all requests can be sent the way of the configuration, so that one at a time
//! is answered: a datapath with one lock.
//!
//! Requests come on a schedule and not when the last one is answered, and times count from when each was
//! due: else a second's wait would be one slow request instead of a thousand.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::tests::{Namespace, namespace};
use anyhow::{Context, Result, anyhow, bail};
use benches::client::Client;
use benches::cpu;
use benches::latency::Latencies;
use benches::report::Report;
use clap::Parser;
use datapath::daemon::{Daemon, Options};
use datapath::devices::{self, Devices, Notice};
use datapath::families;
use datapath::mailbox::mailbox;
use netlink::family::command;
use netlink::message::{Messages, control};
use netlink::{
    Answer, Config, Dump, Errno, Failure, Family, Handler, Lane, Request, Server, transport,
};
use vport::{DriverChoice, LinkMonitor};

/// FLOW_NEW while the configuration lock is held: ovs-dpd beside one lock for everything.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each case has its turn.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// FLOW_NEWs per second.
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    /// How long the lock is held, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    held: u64,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The port whose making is slow.
const SLOW: &str = "slow";

/// The datapath's server, with what this bench puts in front of it.
struct Fronted {
    server: families::Server,
    daemon: Arc<Daemon>,
    one_lock: AtomicBool,
    held: Duration,
}

impl Fronted {
    fn is_slow(request: &Request<'_>) -> bool {
        request.family == Family::Vport
            && request.command == command::NEW
            && request.table::<11>().get(3).and_then(|a| a.name(15).ok()) == Some(SLOW)
    }
}

impl Handler for Fronted {
    fn lane(&self, request: &Request<'_>) -> Lane {
        match self.one_lock.load(Ordering::Relaxed) {
            true => Lane::MaySleep,
            false => self.server.lane(request),
        }
    }

    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<(), Failure> {
        if Self::is_slow(request) {
            let _configuration = self.daemon.configure();
            std::thread::sleep(self.held);
            return Err(Errno::ENODEV.into());
        }
        self.server.handle(request, answer)
    }

    fn dump(&self, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        self.server.dump(request)
    }

    fn gone(&self, port_id: u32) {
        self.server.gone(port_id);
    }

    fn before_sleep(&self) {
        self.server.before_sleep();
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let host = Namespace::new("flow")?;
    let directory = Directory(std::env::temp_dir().join(namespace::unique("flow")));
    std::fs::create_dir(&directory.0)?;
    host.inside(|| run(&arguments, &directory.0))?
}

/// A directory that goes when dropped.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

/// As `ovs-dpd run`, in this process.
fn run(arguments: &Arguments, directory: &Path) -> Result<()> {
    let threads = 2;
    let server = Server::bind(Config {
        threads,
        ..Config::new(directory)
    })
    .map_err(|error| anyhow!("{error}"))?;
    let (notices, mail) = mailbox()?;
    let daemon = Arc::new(Daemon::new(
        Options {
            workers: 2,
            cpus: None,
            busy_poll: std::time::Duration::ZERO,
            rings: datapath::outlet::RingDefaults::default(),
            prompt_threads: threads,
            seed: 0x5eed,
            max_connections: datapath::conntrack::MAX_CONNECTIONS,
            driver: DriverChoice::Auto,
            run_prefix: namespace::unique("flow"),
            force_veth: false,
            notes: Vec::new(),
        },
        server.hub(),
        Devices::new(notices),
    ));
    daemon.workers.start(&daemon)?;
    let monitor = LinkMonitor::new().map_err(|error| anyhow!("{error}"))?;
    let follower = {
        let daemon = Arc::clone(&daemon);
        std::thread::spawn(move || devices::follow(&daemon, &mail, monitor))
    };
    let stop = Arc::new(AtomicBool::new(false));
    let reaper = {
        let (daemon, stop) = (Arc::clone(&daemon), Arc::clone(&stop));
        std::thread::spawn(move || daemon.reap(&|| stop.load(Ordering::Relaxed)))
    };
    let fronted = Arc::new(Fronted {
        server: families::Server::new(Arc::clone(&daemon)),
        daemon: Arc::clone(&daemon),
        one_lock: AtomicBool::new(false),
        held: Duration::from_millis(arguments.held),
    });
    let running = server.serve(Arc::clone(&fronted) as Arc<dyn Handler>)?;
    let measured = measure(arguments, directory, &fronted);

    running.stop();
    daemon.remove_all();
    daemon.devices.notify(Notice::Stop);
    daemon.workers.stop();
    stop.store(true, Ordering::Relaxed);
    for thread in [follower, reaper] {
        thread.join().map_err(|_| anyhow!("a thread panicked"))?;
    }
    measured
}

const OURS: &str = "ovs-dpd, lock held";

/// Name, whether there is one lock for all, whether it is held.
const CASES: [(&str, bool, bool); 4] = [
    ("ovs-dpd, idle", false, false),
    (OURS, false, true),
    ("one lock, idle", true, false),
    ("one lock, held", true, true),
];

fn measure(arguments: &Arguments, directory: &Path, fronted: &Arc<Fronted>) -> Result<()> {
    let mut client = Client::connect(directory)?;
    let mut other = Client::connect(directory)?;
    let dp = client.new_datapath("flow-bench")?;
    let mut report = Report::new("flow_new");
    let mut next = 0;
    for round in 1..=arguments.rounds {
        eprintln!("round {round}");
        // Each case comes after each other one in turn: a table grows, a machine warms up.
        let mut cases = CASES;
        cases.rotate_left(round as usize % CASES.len());
        for (subject, one_lock, held) in cases {
            fronted.one_lock.store(one_lock, Ordering::Relaxed);
            let times = window(&mut client, &mut other, dp, arguments, held, &mut next)?;
            for percentile in [50.0, 99.0, 99.9] {
                let metric = format!("FLOW_NEW, p{percentile}, us");
                report.add(&metric, subject, Some(times.us(percentile)));
            }
        }
    }
    report.finish(OURS)
}

/// FLOW_NEWs on schedule for as long as the lock is, or would be, held.
fn window(
    client: &mut Client,
    other: &mut Client,
    dp: i32,
    arguments: &Arguments,
    held: bool,
    next: &mut u32,
) -> Result<Latencies> {
    let mut slow = None;
    if held {
        let pid = other.port_id;
        let (seq, bytes) = other.request(Family::Vport, command::NEW, dp, 0, |w| {
            w.u32(2, 2);
            w.name(3, SLOW)?;
            w.u32(5, pid);
            Ok(())
        })?;
        if !other.try_send(&bytes)? {
            bail!("no room for a port request");
        }
        slow = Some(seq);
        // It is asleep by then.
        std::thread::sleep(Duration::from_millis(20));
    }
    let span = Duration::from_millis(arguments.held.saturating_sub(100));
    let gap = Duration::from_secs(1) / arguments.rate;
    let count = (span.as_secs_f64() * f64::from(arguments.rate)) as u32;
    let start = Instant::now();
    let (mut sent, mut answered) = (0, 0);
    let mut first_seq = None;
    let mut waiting: Option<Vec<u8>> = None;
    let mut times = Latencies::new()?;
    while answered < count {
        if sent < count && start.elapsed() >= gap * sent {
            let bytes = match waiting.take() {
                Some(bytes) => bytes,
                None => {
                    let (seq, bytes) = client.flow_new(dp, *next, 1)?;
                    *next += 1;
                    first_seq.get_or_insert(seq);
                    bytes
                }
            };
            match client.try_send(&bytes)? {
                true => sent += 1,
                // As a caller that blocks in send: still due when it was due.
                false => waiting = Some(bytes),
            }
        }
        let first = first_seq.unwrap_or(u32::MAX);
        if let Some(datagram) = client.try_receive()? {
            let now = start.elapsed();
            if transport::is_overrun(datagram) {
                bail!("answers were lost");
            }
            for (header, message) in Messages::new(datagram) {
                let is_ack = header.kind == control::ERROR && header.pid != transport::BARRIER_PID;
                if !is_ack || transport::ack_cookie(datagram).is_some() {
                    continue;
                }
                let error = message.get(16..20).and_then(|b| b.first_chunk());
                let error = error.map_or(-1, |b| i32::from_ne_bytes(*b));
                if error != 0 {
                    bail!("FLOW_NEW: errno {}", -error);
                }
                let due = gap * header.seq.wrapping_sub(first);
                times.add(i64::try_from(now.saturating_sub(due).as_nanos())?);
                answered += 1;
            }
        }
        if start.elapsed() > span + Duration::from_secs(20) {
            bail!("{answered} of {count} answered");
        }
    }
    if let Some(seq) = slow {
        // Its own answer: the lock is free again.
        let limit = Instant::now() + Duration::from_secs(10);
        loop {
            let datagram = other.try_receive()?;
            if datagram.and_then(transport::ack_cookie) == Some(seq) {
                break;
            }
            if Instant::now() > limit {
                return Err(anyhow!("the slow request is never answered")).context("VPORT_NEW");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(times)
}
