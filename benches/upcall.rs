//! What it takes for a packet that no flow knows.
//!
//! 1. *Scripted*: a handler of this bench's own at the daemon's socket, so that the datapath alone is
//!    measured: from before the sender's send to the MISS in the handler's hands, and from before its
//!    EXECUTE to the kernel's time of arrival on the receiver's device. (The veth's part, a send and a
//!    softirq of some 3 us, is within both.)
//! 2. *End to end*: from before the send to the arrival at the receiver, each packet the first of its
//!    flow, through ovs-vswitchd over ovs-dpd, and through dpif-netdev; and packets of a known flow.
//! 3. *Set-up rate*: the highest rate of new flows at which no packet is lost.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ::tests::endpoint::DEVICE;
use ::tests::lab::{Lab, Switch};
use anyhow::{Context, Result, anyhow, ensure};
use benches::bed::{Bed, Rules, Subject};
use benches::client::{self, Client};
use benches::cpu;
use benches::latency::Latencies;
use benches::report::Report;
use benches::sender;
use benches::wire::{Wire, Wish, realtime};
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Packets that no flow knows: latency and rate, beside dpif-netdev.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each subject has its turn.
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Only these parts: scripted, end, rate.
    #[arg(long, value_delimiter = ',')]
    parts: Vec<String>,
    /// Packets per second of the latency measurements.
    #[arg(long, value_delimiter = ',', default_values_t = [500, 5000])]
    rates: Vec<u32>,
    /// Seconds of each step of the search for the highest rate without loss.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn does(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|p| p == part)
    }
}

const SUBJECTS: [Subject; 3] = [Subject::OvsDpd, Subject::Netdev, Subject::NetdevXdp];

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let mut report = Report::new("upcall");
    for round in 1..=arguments.rounds {
        eprintln!("round {round}");
        if arguments.does("scripted") {
            scripted(&arguments, &mut report)?;
        }
        for subject in SUBJECTS {
            if arguments.does("end") || arguments.does("rate") {
                let bed = Bed::new(subject)?;
                bed.many_flows()?;
                bed.rules(Rules::PerConnection)?;
                let mut flows = Flows(0);
                if arguments.does("end") {
                    end_to_end(&bed, subject, &arguments, &mut flows, &mut report)?;
                }
                if arguments.does("rate") {
                    highest_rate(&bed, subject, &arguments, &mut flows, &mut report)?;
                }
                bed.stop()?;
            }
        }
    }
    report.finish(Subject::OvsDpd.name())
}

/// Numbers of flows that haven't been used yet on this bed.
struct Flows(u32);

impl Flows {
    fn take(&mut self, count: u32) -> u32 {
        let first = self.0;
        self.0 += count;
        first
    }
}

fn percentiles(report: &mut Report, what: &str, subject: &str, times: &Latencies) {
    for percentile in [50.0, 99.0, 99.9] {
        let metric = format!("{what}, p{percentile}, us");
        report.add(&metric, subject, Some(times.us(percentile)));
    }
}

/// A thread that takes frames of ours at an endpoint's device with the kernel's time, until told to stop
/// and `linger` has passed without a frame.
struct Receiver<'s> {
    thread: std::thread::ScopedJoinHandle<'s, Result<Latencies>>,
}

impl<'s> Receiver<'s> {
    fn start<'e>(
        scope: &'s std::thread::Scope<'s, 'e>,
        endpoint: &'e ::tests::Endpoint,
        stop: &'e AtomicBool,
    ) -> Result<Self> {
        let wish = Wish {
            receives: true,
            timestamps: true,
            ..Wish::default()
        };
        let wire = endpoint.namespace().inside(|| Wire::open(DEVICE, wish))??;
        let thread = scope.spawn(move || {
            let mut times = Latencies::new()?;
            let mut buffer = vec![0; 2048];
            loop {
                match wire.receive_stamped(&mut buffer) {
                    Ok((length, arrived)) => {
                        if let Some((sent, _)) = sender::stamp(&buffer[..length]) {
                            times.add(arrived - sent);
                        }
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        if !wait(&wire, Duration::from_millis(200))? && stop.load(Ordering::Relaxed)
                        {
                            return Ok(times);
                        }
                    }
                    Err(error) => return Err(error).context("the receiver"),
                }
            }
        });
        Ok(Self { thread })
    }

    fn times(self) -> Result<Latencies> {
        self.thread
            .join()
            .map_err(|_| anyhow!("the receiver panicked"))?
    }
}

/// False: nothing to read within `limit`.
fn wait(on: &impl std::os::fd::AsFd, limit: Duration) -> Result<bool> {
    let limit = Timespec::try_from(limit)?;
    match poll(&mut [PollFd::new(on, PollFlags::IN)], Some(&limit)) {
        Ok(ready) => Ok(ready != 0),
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(error) => Err(error).context("poll"),
    }
}

/// The datapath with a handler of our own.
fn scripted(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let lab = Lab::bare(Switch::OvsDpd)?;
    let (a, b) = (lab.endpoint("a")?, lab.endpoint("b")?);
    let mut client = lab.host().inside(|| Client::connect(&lab.run_dir()))??;
    let dp = client.new_datapath("upcall-bench")?;
    client.new_port(dp, a.port(), 1, false)?;
    client.new_port(dp, b.port(), 2, false)?;
    std::thread::sleep(Duration::from_millis(300));
    for rate in &arguments.rates {
        let (stop, upcalls) = (AtomicBool::new(false), AtomicU32::new(0));
        let count = (*rate * 2).clamp(1000, 10_000);
        let (sent, misses, executes) = std::thread::scope(|scope| -> Result<_> {
            let receiver = Receiver::start(scope, &b, &stop)?;
            let (client, ended, seen) = (&mut client, &stop, &upcalls);
            let handler = scope.spawn(move || handle(client, dp, ended, seen));
            let sent = sender::paced(&a, f64::from(*rate), count, |_| 7)?;
            let limit = Instant::now() + Duration::from_secs(2);
            while upcalls.load(Ordering::Relaxed) < sent && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(10));
            }
            stop.store(true, Ordering::Relaxed);
            let misses = handler
                .join()
                .map_err(|_| anyhow!("the handler panicked"))??;
            Ok((sent, misses, receiver.times()?))
        })?;
        ensure!(misses.count() != 0, "no upcall came");
        let subject = Subject::OvsDpd.name();
        let what = |part: &str| format!("scripted, {rate}/s: {part}");
        percentiles(report, &what("MISS"), subject, &misses);
        percentiles(report, &what("EXECUTE"), subject, &executes);
        let lost = 100.0 * (1.0 - executes.count() as f64 / f64::from(sent));
        report.add(&what("lost, %"), subject, Some(lost));
    }
    lab.stop_daemon()
}

/// Sends each packet that comes up on to port 2, with the time of that in place of the sender's.
fn handle(client: &mut Client, dp: i32, stop: &AtomicBool, seen: &AtomicU32) -> Result<Latencies> {
    /// Where a frame of the sender's has its time.
    const STAMP: std::ops::Range<usize> = 42..50;
    let mut times = Latencies::new()?;
    loop {
        let now_or = client.try_receive()?;
        let Some(datagram) = now_or else {
            if !wait(client, Duration::from_millis(100))? && stop.load(Ordering::Relaxed) {
                return Ok(times);
            }
            continue;
        };
        let now = realtime();
        let Some(upcall) = client::upcall(datagram) else {
            continue;
        };
        let Some((sent, _)) = sender::stamp(upcall.packet) else {
            continue;
        };
        times.add(now - sent);
        seen.fetch_add(1, Ordering::Relaxed);
        let (mut packet, key) = (upcall.packet.to_vec(), upcall.key.to_vec());
        packet[STAMP].copy_from_slice(&realtime().to_be_bytes());
        let (_, request) = client.execute(dp, &packet, &key, 2)?;
        while !client.try_send(&request)? {
            std::thread::yield_now();
        }
    }
}

/// One way through the real ovs-vswitchd.
fn end_to_end(
    bed: &Bed,
    subject: Subject,
    arguments: &Arguments,
    flows: &mut Flows,
    report: &mut Report,
) -> Result<()> {
    for rate in &arguments.rates {
        let count = (*rate * 2).clamp(1000, 10_000);
        for new in [true, false] {
            let first = if new { flows.take(count) } else { 0 };
            let stop = AtomicBool::new(false);
            let (sent, times) = std::thread::scope(|scope| -> Result<_> {
                let receiver = Receiver::start(scope, &bed.b, &stop)?;
                let flow_of = move |n| if new { first + n } else { first };
                let sent = sender::paced(&bed.a, f64::from(*rate), count, flow_of)?;
                stop.store(true, Ordering::Relaxed);
                Ok((sent, receiver.times()?))
            })?;
            let kind = if new { "first packets" } else { "a known flow" };
            let what = format!("end to end, {rate}/s, {kind}");
            percentiles(report, &what, subject.name(), &times);
            let lost = 100.0 * (1.0 - times.count() as f64 / f64::from(sent));
            report.add(&format!("{what}, lost, %"), subject.name(), Some(lost));
            let installed = bed.flow_count()?;
            ensure!(
                installed > u64::from(flows.0) * 9 / 10,
                "{installed} of {} flows are installed: the packets weren't the first of theirs",
                flows.0
            );
        }
    }
    Ok(())
}

/// Rates of new flows per second that are tried in turn until packets are lost.
const RATES: [u32; 10] = [
    5000, 10_000, 15_000, 20_000, 30_000, 40_000, 60_000, 80_000, 120_000, 160_000,
];

fn highest_rate(
    bed: &Bed,
    subject: Subject,
    arguments: &Arguments,
    flows: &mut Flows,
    report: &mut Report,
) -> Result<()> {
    let mut highest = 0;
    for rate in RATES {
        let count = (f64::from(rate) * arguments.seconds) as u32;
        let first = flows.take(count);
        let before = bed.received()?;
        let sent = sender::paced(&bed.a, f64::from(rate), count, move |n| first + n)?;
        std::thread::sleep(Duration::from_millis(500));
        let received = bed.received()? - before;
        eprintln!(
            "    {}: {rate}/s: {received} of {sent} arrived",
            subject.name()
        );
        if received < u64::from(sent) {
            break;
        }
        // The revalidators may have cut the limit; an installation must not have been spared.
        let installed = bed.flow_count()?;
        if installed < u64::from(flows.0) * 9 / 10 {
            eprintln!(
                "    only {installed} of {} flows are installed: not counted as set up",
                flows.0
            );
            break;
        }
        highest = rate;
    }
    report.add(
        "new flows without loss, 1000/s",
        subject.name(),
        Some(f64::from(highest) / 1000.0),
    );
    Ok(())
}
