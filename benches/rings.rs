//! TCP through a port that is slower than what feeds it, by the size of the ring in front of it, with `tail-drop`
//! beside `backpressure`: the tables of the design that the rings follow (Gebauer et al., VTC-Fall 2025).
//!
//! `ns a: eth0 --veth-- v-a [ovs-dpd] ring -> v-b (a shaper: the bottleneck) --veth-- eth0 -- delay -- tcp0 :ns b`
//!
//! The sender has no segmentation offload, so that a place in the ring is a packet. The bottleneck's own queue
//! holds two packets, a millisecond of its rate: what waits does so in the ring or, while the worker pauses, in
//! v-a's receive ring (2048 packets).

use std::time::Duration;

use ::tests::endpoint::{DEVICE, Endpoint};
use ::tests::lab::{Lab, Switch};
use ::tests::traffic::iperf::{Throughput, iperf3};
use anyhow::{Context, Result};
use benches::cpu;
use benches::delay::DelayLine;
use benches::plot::{Axis, Chart};
use benches::report::Report;
use clap::Parser;
use serde_json::Value;

/// TCP by the size of a port's ring, tail-drop beside backpressure.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each case has its turn.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// What the bottleneck lets through, as tc takes it.
    #[arg(long, default_value = "20mbit")]
    rate: String,
    /// Sizes of the ring.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,10,50,100,500,1000,5000"
    )]
    sizes: Vec<u32>,
    /// Round-trip times in milliseconds.
    #[arg(long, value_delimiter = ',', default_value = "20,60,120")]
    times: Vec<u64>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

const POLICIES: [&str; 2] = ["tail-drop", "backpressure"];
const ADDRESS: &str = "10.99.0.2";

struct Bench {
    lab: Lab,
    a: std::sync::Arc<Endpoint>,
    b: std::sync::Arc<Endpoint>,
}

/// Counts that tell which queue held, and which dropped.
#[derive(Clone, Copy, Debug)]
struct Told {
    dropped_full: u64,
    stops: u64,
    receive_ring: u64,
}

impl Bench {
    fn new(rate: &str) -> Result<Self> {
        let lab = Lab::new(Switch::OvsDpd)?;
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.99.0.1/24")?;
        let b = lab.endpoint("b")?;
        lab.port("br0", &b, "")?;
        a.offloads_off()?;
        b.offloads_off()?;
        lab.host().exec(format!(
            "tc qdisc replace dev {} root tbf rate {rate} burst 3200 limit 3200",
            b.port()
        ))?;
        Ok(Self { lab, a, b })
    }

    /// Runs TCP from a to b with half of that round-trip time on each way.
    fn with_delay<T>(&self, rtt: Duration, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let b = self.b.namespace();
        let line = if rtt.is_zero() {
            b.ip(format!("addr replace {ADDRESS}/24 dev {DEVICE}"))?;
            None
        } else {
            let line = DelayLine::start(b, DEVICE, "tcp0", rtt / 2)?;
            b.ip(format!("link set tcp0 address {} up", self.b.mac_text()))?;
            b.ip(format!("addr add {ADDRESS}/24 dev tcp0"))?;
            Some(line)
        };
        let done = work();
        drop(line);
        if rtt.is_zero() {
            b.ip(format!("addr del {ADDRESS}/24 dev {DEVICE}"))?;
        }
        done
    }

    fn set(&self, policy: &str, size: u32) -> Result<()> {
        let run_dir = self.lab.run_dir().display().to_string();
        let port = self.b.port();
        self.lab
            .ovs_dpd(format!(
                "port set {port} --policy {policy} --ring {size} --run-dir {run_dir}"
            ))?
            .ok()
            .map(drop)
    }

    fn told(&self) -> Result<Told> {
        let status = self.lab.status_json()?;
        let ports = status["datapaths"][0]["ports"]
            .as_array()
            .context("ports")?;
        let find = |name: &str| {
            ports
                .iter()
                .find(|port| port["name"] == name)
                .context("port")
        };
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        let (a, b) = (find(self.a.port())?, find(self.b.port())?);
        Ok(Told {
            dropped_full: count(&b["packets"]["dropped"]["output_full"]),
            stops: count(&b["ring"]["stops"]),
            receive_ring: count(&a["host_queue_full"]),
        })
    }

    fn run(&self, seconds: u32, streams: u32) -> Result<(Throughput, Told)> {
        let before = self.told()?;
        let (from, to) = (self.a.namespace(), self.b.namespace());
        let options = format!("-P {streams}");
        let run = iperf3(&self.lab, from, to, ADDRESS, seconds, &options)?;
        let after = self.told()?;
        let told = Told {
            dropped_full: after.dropped_full - before.dropped_full,
            stops: after.stops - before.stops,
            receive_ring: after.receive_ring - before.receive_ring,
        };
        Ok((run, told))
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let bench = Bench::new(&arguments.rate)?;
    let mut report = Report::new("rings");
    for round in 1..=arguments.rounds {
        eprintln!("round {round} of {}", arguments.rounds);
        bench.with_delay(Duration::ZERO, || {
            for size in &arguments.sizes {
                measure(&bench, &arguments, &mut report, (*size, 0, 1))?;
            }
            // The first and the last that the others are compared by.
            for size in [1, 10, 100, 1000] {
                measure(&bench, &arguments, &mut report, (size, 0, 8))?;
            }
            Ok(())
        })?;
        for time in &arguments.times {
            bench.with_delay(Duration::from_millis(*time), || {
                for size in [10, 100, 1000] {
                    measure(&bench, &arguments, &mut report, (size, *time, 1))?;
                }
                Ok(())
            })?;
        }
    }
    plots(&arguments, &report)?;
    report.finish("backpressure")?;
    bench.lab.finish()
}

fn label(size: u32, time: u64, streams: u32) -> String {
    let streams = if streams == 1 {
        String::new()
    } else {
        format!(", {streams} streams")
    };
    format!("ring {size}, RTT +{time} ms{streams}")
}

fn measure(
    bench: &Bench,
    arguments: &Arguments,
    report: &mut Report,
    (size, time, streams): (u32, u64, u32),
) -> Result<()> {
    let what = label(size, time, streams);
    for policy in POLICIES {
        bench.set(policy, size)?;
        let (run, told) = bench.run(arguments.seconds, streams)?;
        report.add(
            &format!("{what}: Mbit/s"),
            policy,
            Some(run.bits_per_second / 1e6),
        );
        let held = [
            ("dropped at the ring", told.dropped_full),
            ("dropped at v-a's receive ring", told.receive_ring),
            ("stops", told.stops),
            ("retransmits", run.retransmits),
        ];
        for (name, count) in held {
            report.add(&format!("{what}: {name}"), policy, Some(count as f64));
        }
    }
    Ok(())
}

fn plots(arguments: &Arguments, report: &Report) -> Result<()> {
    let throughput = || Axis::linear("Mbit/s");
    let mut sizes = Chart::new(
        "TCP by the size of the ring",
        Axis::log("places"),
        throughput(),
    );
    for size in &arguments.sizes {
        for policy in POLICIES {
            let metric = format!("{}: Mbit/s", label(*size, 0, 1));
            if let Some(spread) = report.spread(&metric, policy) {
                sizes.spread(policy, f64::from(*size), spread);
            }
        }
    }
    sizes.write("rings_size")?;
    let mut times = Chart::new(
        "TCP by added round-trip time",
        Axis::linear("ms added"),
        throughput(),
    );
    for size in [10, 100, 1000] {
        for policy in POLICIES {
            for time in std::iter::once(&0).chain(&arguments.times) {
                let metric = format!("{}: Mbit/s", label(size, *time, 1));
                if let Some(spread) = report.spread(&metric, policy) {
                    times.spread(&format!("{policy}, {size}"), *time as f64, spread);
                }
            }
        }
    }
    times.write("rings_rtt")?;
    Ok(())
}
