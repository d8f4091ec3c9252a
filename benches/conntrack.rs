//! Connection tracking between two endpoints on veth: ovs-dpd and dpif-netdev, in turns.
//!
//! `cargo xtask bench conntrack [-- --rounds N --subjects ovs-dpd,...]`. Per round and subject: packets a
//! second without conntrack, through `ct()` and a second lookup, and through `ct(commit)`, all of
//! established connections; then connections a second, each by its first packet.
//!
//! Rules are few and wildcarded, so there is a megaflow for each state and none for each connection: what
//! differs from `forward` is conntrack.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use benches::bed::{Bed, Subject};
use benches::cpu;
use benches::report::Report;
use benches::sender::{Flood, SHORTEST, answer};
use clap::Parser;

const ALL: [Subject; 3] = [Subject::OvsDpd, Subject::Netdev, Subject::NetdevXdp];

/// Packets and connections per second through conntrack: ovs-dpd beside its peers.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each subject has its turn.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Only subjects whose name contains one of these.
    #[arg(long, value_delimiter = ',')]
    subjects: Vec<String>,
    /// Only these parts: none, ct, commit, new.
    #[arg(long, value_delimiter = ',')]
    parts: Vec<String>,
    /// Seconds of each measurement of a rate.
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// Numbers of established connections to measure packets per second with.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10_000, 100_000])]
    connections: Vec<u32>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What packets from a to b go through.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// No conntrack.
    None,
    /// `ct`, then a table that looks at what it found.
    Look,
    /// `ct(commit)`, then out.
    Commit,
}

impl Way {
    const ALL: [Self; 3] = [Self::None, Self::Look, Self::Commit];

    fn part(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Look => "ct",
            Self::Commit => "commit",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "no conntrack",
            Self::Look => "ct()",
            Self::Commit => "ct(commit)",
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let wanted = |of: &[String], name: &str| of.is_empty() || of.iter().any(|s| name.contains(s));
    let mut report = Report::new("conntrack");
    for round in 1..=arguments.rounds {
        for subject in ALL {
            let name = subject.name();
            if wanted(&arguments.subjects, name) {
                eprintln!("round {round}: {name}");
                measure(subject, &arguments, &mut report).context(name)?;
            }
        }
    }
    report.finish(Subject::OvsDpd.name())
}

fn measure(subject: Subject, arguments: &Arguments, report: &mut Report) -> Result<()> {
    let does = |part: &str| {
        arguments.parts.is_empty() || arguments.parts.iter().any(|wanted| wanted == part)
    };
    let bed = Bed::new(subject)?;
    let name = subject.name();
    bed.pin(true)?;
    for connections in &arguments.connections {
        establish(&bed, subject, *connections)?;
        for way in Way::ALL.into_iter().filter(|way| does(way.part())) {
            rules(&bed, way)?;
            let of = match way {
                Way::None if *connections != 1 => continue,
                Way::None => way.name().to_owned(),
                _ => format!("{}, {connections} connection(s)", way.name()),
            };
            let rates = flood(&bed, *connections, arguments.seconds)?;
            report.add(&format!("{of}, Mpps"), name, Some(rates.packets / 1e6));
            report.add(&format!("{of}, CPU ns a packet"), name, Some(rates.cpu));
        }
    }
    if does("new") {
        // As many as there can be packets in the time, each of another connection.
        rules(&bed, Way::Commit)?;
        let before = connections(&bed, subject)?;
        let rates = flood(&bed, 1 << 30, arguments.seconds)?;
        let made = connections(&bed, subject)? - before;
        ensure!(
            made as f64 > rates.packets * f64::from(arguments.seconds) * 0.9,
            "{made} connections of {rates:?}: packets passed that made none"
        );
        report.add("new connections, M/s", name, Some(rates.packets / 1e6));
        report.add("new connections, CPU ns each", name, Some(rates.cpu));
    }
    bed.stop()
}

/// Sets the rules; what was installed for others goes.
fn rules(bed: &Bed, way: Way) -> Result<()> {
    let a = bed.lab.ofport(bed.a.port())?;
    let b = bed.lab.ofport(bed.b.port())?;
    bed.lab.ofctl("del-flows br0")?;
    let there = match way {
        Way::None => vec![format!("table=0,in_port={a},ip,actions=output:{b}")],
        Way::Look => vec![
            format!("table=0,in_port={a},ip,actions=ct(table=1,zone=1)"),
            format!("table=1,in_port={a},ct_state=+trk+est,ip,actions=output:{b}"),
        ],
        Way::Commit => vec![format!(
            "table=0,in_port={a},ip,actions=ct(commit,zone=1),output:{b}"
        )],
    };
    let back = [
        format!("table=0,in_port={b},ip,actions=ct(table=1,zone=1)"),
        format!("table=1,in_port={b},ct_state=+trk+est,ip,actions=output:{a}"),
    ];
    for rule in there.iter().chain(&back) {
        bed.lab.ofctl(["add-flow", "br0", rule.as_str()])?;
    }
    bed.forget_flows()
}

/// Makes connections, and lets each be answered.
fn establish(bed: &Bed, subject: Subject, count: u32) -> Result<()> {
    rules(bed, Way::Commit)?;
    // A few rounds of all: what is lost in the first comes again. One that is always lost is no matter.
    let flood = Flood::start(&bed.a, SHORTEST, count);
    let wanted = u64::from(count - count / 100);
    let deadline = Instant::now() + Duration::from_secs(20);
    while flood.sent() < u64::from(count) * 4 || connections(bed, subject)? < wanted {
        if Instant::now() > deadline {
            bail!("{} of {count} connections", connections(bed, subject)?);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    flood.stop()?;
    for _ in 0..3 {
        answer(&bed.b, count)?;
    }
    Ok(())
}

/// How many connections the datapath has.
fn connections(bed: &Bed, subject: Subject) -> Result<u64> {
    match subject {
        Subject::OvsDpd => {
            let status = bed.lab.status_json()?;
            let count = status["conntrack"]["connections"].as_u64();
            count.context("no connections in the status")
        }
        _ => {
            let text = bed.lab.appctl("dpctl/ct-get-nconns netdev@ovs-netdev")?;
            text.trim().parse().with_context(|| text)
        }
    }
}

#[derive(Debug)]
struct Rates {
    /// That arrived, a second.
    packets: f64,
    /// Nanoseconds of the datapath's processor for each that arrived.
    cpu: f64,
}

fn flood(bed: &Bed, flows: u32, seconds: u32) -> Result<Rates> {
    let flood = Flood::start(&bed.a, SHORTEST, flows);
    // The megaflows are installed by then.
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    let before = (bed.received()?, bed.cpu_time()?);
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let after = (bed.received()?, bed.cpu_time()?);
    let elapsed = start.elapsed().as_secs_f64();
    flood.stop()?;
    let received = (after.0 - before.0) as f64;
    if received == 0.0 {
        bail!("nothing arrived");
    }
    Ok(Rates {
        packets: received / elapsed,
        cpu: (after.1 - before.1).as_nanos() as f64 / received,
    })
}
