//! Forwarding between two endpoints on veth: ovs-dpd, its peers and the floors, in turns.
//!
//! `cargo xtask bench forward [-- --rounds N --subjects ovs-dpd,...]`. Per round and subject: CPU when
//! idle, 64-byte packets a second (one flow; 10,000 flows with a megaflow each), iperf3 with 1 and 8
//! streams, ping.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use benches::bed::{ADDRESS_B, Bed, Rules, Subject};
use benches::cpu;
use benches::latency::Latencies;
use benches::report::Report;
use benches::sender::{Flood, SHORTEST};
use clap::Parser;
use tests::traffic::iperf3;

const ALL: [Subject; 8] = [
    Subject::OvsDpd,
    Subject::OvsDpdXdp,
    Subject::Netdev,
    Subject::NetdevXdp,
    Subject::FloorRing,
    Subject::FloorVirtioNet,
    Subject::FloorFrameRing,
    Subject::FloorXdp,
];

/// Packets and bits per second, round trips, idle CPU: ovs-dpd beside its peers.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each subject has its turn.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Only subjects whose name contains one of these (`XDP`: all with AF_XDP).
    #[arg(long, value_delimiter = ',')]
    subjects: Vec<String>,
    /// Only these parts: idle, packets, tcp, ping.
    #[arg(long, value_delimiter = ',')]
    parts: Vec<String>,
    /// Seconds of each measurement of a rate.
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// Numbers of flows to measure packets per second with, one megaflow each; 1 is one wildcarded.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10_000])]
    flows: Vec<u32>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn does(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|p| p == part)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let named = |subject: &Subject| {
        let name = subject.name();
        arguments.subjects.is_empty()
            || arguments.subjects.iter().any(|s| name.contains(s.as_str()))
    };
    let subjects: Vec<Subject> = ALL.into_iter().filter(named).collect();
    let mut report = Report::new("forward");
    for round in 1..=arguments.rounds {
        for subject in &subjects {
            eprintln!("round {round}: {}", subject.name());
            measure(*subject, &arguments, &mut report).with_context(|| subject.name())?;
        }
    }
    // Where only AF_XDP is measured, that is the one to compare with.
    let ours = [Subject::OvsDpd, Subject::OvsDpdXdp];
    let ours = ours.into_iter().find(|subject| subjects.contains(subject));
    report.finish(ours.unwrap_or(Subject::OvsDpd).name())
}

fn measure(subject: Subject, arguments: &Arguments, report: &mut Report) -> Result<()> {
    let bed = Bed::new(subject)?;
    let name = subject.name();
    if arguments.does("idle") {
        std::thread::sleep(Duration::from_millis(500));
        let (before, start) = (bed.cpu_time()?, Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let used = bed.cpu_time()?.saturating_sub(before);
        let percent = 100.0 * used.as_secs_f64() / start.elapsed().as_secs_f64();
        report.add("idle, % of a CPU", name, Some(percent));
    }
    if arguments.does("packets") {
        bed.pin(true)?;
        bed.many_flows()?;
        for flows in &arguments.flows {
            let rules = match flows {
                1 => Rules::Wildcard,
                _ => Rules::PerConnection,
            };
            bed.rules(rules)?;
            packets(&bed, *flows, arguments.seconds, name, report)?;
        }
        bed.pin(false)?;
        bed.forget_flows()?;
        bed.rules(Rules::Wildcard)?;
    }
    // The receive ring without virtio-net headers cuts GSO packets; a block's timeout is its ping.
    let carries_tcp = subject != Subject::FloorRing;
    if arguments.does("tcp") && carries_tcp {
        for streams in [1, 8] {
            let options = format!("-P {streams}");
            let (a, b) = (bed.a.namespace(), bed.b.namespace());
            let gbits = iperf3(&bed.lab, a, b, ADDRESS_B, arguments.seconds, &options)
                .map(|t| t.bits_per_second / 1e9);
            let metric = format!("TCP, {streams} stream(s), Gbit/s");
            report.add(&metric, name, Some(gbits?));
        }
    }
    if arguments.does("ping") && carries_tcp {
        let times = ping(&bed)?;
        report.add("ping, p50, us", name, Some(times.us(50.0)));
        report.add("ping, average, us", name, Some(times.mean_us()));
        report.add("ping, p99, us", name, Some(times.us(99.0)));
    }
    bed.stop()
}

/// Packets per second at 64 bytes.
fn packets(bed: &Bed, flows: u32, seconds: u32, name: &str, report: &mut Report) -> Result<()> {
    let flood = Flood::start(&bed.a, SHORTEST, flows);
    std::thread::sleep(Duration::from_millis(if flows == 1 { 300 } else { 1500 }));
    // The more flows the longer it takes until all are installed.
    let end = Instant::now() + Duration::from_millis(u64::from(flows) / 2);
    while flows > 1 && bed.has_flows() {
        let installed = bed.flow_count()?;
        if installed >= u64::from(flows) * 9 / 10 {
            break;
        }
        if Instant::now() > end {
            bail!("only {installed} of {flows} flows are installed");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    let start = Instant::now();
    let before = (flood.sent(), bed.received()?, bed.cpu_time()?);
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let after = (flood.sent(), bed.received()?, bed.cpu_time()?);
    let elapsed = start.elapsed().as_secs_f64();
    flood.stop()?;
    let mpps = |packets: u64| packets as f64 / elapsed / 1e6;
    let received = after.1 - before.1;
    if received == 0 {
        bail!("nothing arrived");
    }
    let cpu = (after.2 - before.2).as_secs_f64();
    let of = format!("{flows} flow(s)");
    report.add(&format!("64 B, {of}, Mpps"), name, Some(mpps(received)));
    report.add(
        &format!("64 B, {of}, offered, Mpps"),
        name,
        Some(mpps(after.0 - before.0)),
    );
    report.add(
        &format!("64 B, {of}, CPU ns a packet"),
        name,
        Some(cpu * 1e9 / received as f64),
    );
    Ok(())
}

/// 500 round trips, 2 ms apart.
fn ping(bed: &Bed) -> Result<Latencies> {
    let ran = bed.a.namespace().try_exec(
        [
            "ping", "-n", "-c", "500", "-i", "0.002", "-W", "1", ADDRESS_B,
        ],
        Duration::from_secs(30),
    )?;
    let mut times = Latencies::new()?;
    for line in ran.stdout.lines() {
        let time = line.split_once("time=").map(|(_, rest)| rest);
        if let Some(millis) = time.and_then(|t| t.split(' ').next()?.parse::<f64>().ok()) {
            times.add((millis * 1e6) as i64);
        }
    }
    if times.count() == 0 {
        bail!("no answer to ping: {}{}", ran.stdout, ran.stderr);
    }
    Ok(times)
}
