//! What the other ports feel of a stream port whose peer reads nothing: latency and throughput between two of
//! them while a third floods the stream, beside the same with a peer that reads, and with no stream traffic.

use std::io::Read;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::tests::endpoint::Endpoint;
use ::tests::lab::{Lab, Switch};
use ::tests::traffic::iperf::iperf3;
use ::tests::traffic::raw::{Wire, udp4};
use ::tests::wait;
use anyhow::{Context, Result, anyhow, bail};
use benches::cpu;
use benches::latency::Latencies;
use benches::plot::{Axis, Chart};
use benches::report::Report;
use clap::Parser;

/// Other ports beside a stream port whose peer reads nothing.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each case has its turn.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each measurement of throughput.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Frames a second towards the stream.
    #[arg(long, default_value_t = 5000)]
    rate: u32,
    /// Round trips of each measurement of latency.
    #[arg(long, default_value_t = 1000)]
    pings: u32,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the stream's peer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Quiet,
    Reads,
    ReadsNothing,
}

impl Case {
    const ALL: [Self; 3] = [Self::Quiet, Self::Reads, Self::ReadsNothing];

    fn name(self) -> &'static str {
        match self {
            Self::Quiet => "no stream traffic",
            Self::Reads => "the peer reads",
            Self::ReadsNothing => "the peer reads nothing",
        }
    }
}

/// A thread that runs until this is dropped.
struct Beside {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Beside {
    fn start(work: impl FnOnce(&AtomicBool, &AtomicU64) -> Result<()> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let thread = {
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
            Some(std::thread::spawn(move || work(&stop, &count)))
        };
        Self {
            stop,
            count,
            thread,
        }
    }

    fn finish(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(self.count.load(Ordering::Relaxed))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn flood(c: &Endpoint, rate: u32) -> Result<Beside> {
    let wire = Wire::open(c)?;
    let source = (c.mac(), [10, 99, 0, 3], 1);
    let frame = udp4(source, ([2, 0, 0, 0, 9, 9], [10, 99, 0, 9], 9), &[0; 1400])?;
    Ok(Beside::start(move |stop, count| {
        let begin = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let due = begin.elapsed().as_secs_f64() * f64::from(rate);
            while (count.load(Ordering::Relaxed) as f64) < due {
                wire.send(&frame)?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let lab = Lab::new(Switch::OvsDpd)?;
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.99.0.1/24")?;
    let b = lab.host_on("br0", "b", "10.99.0.2/24")?;
    let c = lab.host_on("br0", "c", "10.99.0.3/24")?;
    let listener = lab
        .host()
        .inside(|| TcpListener::bind("127.0.0.1:7000"))??;
    let run_dir = lab.run_dir().display().to_string();
    lab.ovs_dpd(format!(
        "stream add s0 --connect 127.0.0.1:7000 --run-dir {run_dir}"
    ))?
    .ok()?;
    lab.device("br0", "s0", "")?;
    let rule = format!(
        "priority=100,udp,tp_dst=9,actions=output:{}",
        lab.ofport("s0")?
    );
    lab.ofctl(["add-flow", "br0", &rule])?;
    let mut report = Report::new("stream");
    for round in 1..=arguments.rounds {
        eprintln!("round {round} of {}", arguments.rounds);
        for case in Case::ALL {
            measure(&lab, [&a, &b, &c], &listener, case, &arguments, &mut report)
                .with_context(|| case.name())?;
        }
    }
    let mut chart = Chart::new(
        "Other ports beside a stream: round trips, by percentile",
        Axis::linear("percentile"),
        Axis::log("us"),
    );
    for case in Case::ALL {
        for percentile in [50.0, 90.0, 99.0] {
            let metric = format!("ping, p{percentile}, us");
            if let Some(spread) = report.spread(&metric, case.name()) {
                chart.spread(case.name(), percentile, spread);
            }
        }
    }
    chart.write("stream_latency")?;
    report.finish(Case::ReadsNothing.name())?;
    lab.finish()
}

fn measure(
    lab: &Lab,
    [a, b, c]: [&Endpoint; 3],
    listener: &TcpListener,
    case: Case,
    arguments: &Arguments,
    report: &mut Report,
) -> Result<()> {
    // A new peer each time; the last one's end makes the stream connect again.
    let (peer, _) = listener.accept()?;
    wait::soon("the stream's peer", || {
        Ok(lab.vsctl("get interface s0 link_state")?.trim() == "up")
    })?;
    let reading = match case {
        Case::Reads => {
            let mut peer = peer.try_clone()?;
            peer.set_read_timeout(Some(Duration::from_millis(20)))?;
            Some(Beside::start(move |stop, _| {
                let mut bytes = vec![0; 1 << 16];
                while !stop.load(Ordering::Relaxed) {
                    // Nothing for now.
                    let _ = peer.read(&mut bytes);
                }
                Ok(())
            }))
        }
        _ => None,
    };
    let flooding = match case {
        Case::Quiet => None,
        _ => Some(flood(c, arguments.rate)?),
    };
    // Sockets and ring are full by then, if they are to be.
    std::thread::sleep(Duration::from_millis(1500));
    let name = case.name();
    let times = ping(a, arguments.pings)?;
    for percentile in [50.0, 90.0, 99.0] {
        report.add(
            &format!("ping, p{percentile}, us"),
            name,
            Some(times.us(percentile)),
        );
    }
    let run = iperf3(
        lab,
        a.namespace(),
        b.namespace(),
        "10.99.0.2",
        arguments.seconds,
        "",
    )?;
    report.add("TCP, Gbit/s", name, Some(run.bits_per_second / 1e9));
    let sent = flooding.map(Beside::finish).transpose()?.unwrap_or(0);
    reading.map(Beside::finish).transpose()?;
    // The peer goes, and what waits for it with it; what is told is of the time before.
    let status = lab.status_json()?;
    let stream = &status["streams"][0];
    let held = stream["ring"]["len"].as_u64().unwrap_or(0);
    report.add("frames for the stream", name, Some(sent as f64));
    report.add("frames that wait at the end", name, Some(held as f64));
    drop(peer);
    if held == 0 && case == Case::ReadsNothing {
        bail!("nothing waited: the peer did read, or there was no flood");
    }
    Ok(())
}

/// Round trips, 1 ms apart.
fn ping(a: &Endpoint, count: u32) -> Result<Latencies> {
    let count = count.to_string();
    let ran = a.namespace().try_exec(
        [
            "ping",
            "-n",
            "-c",
            &count,
            "-i",
            "0.001",
            "-W",
            "1",
            "10.99.0.2",
        ],
        Duration::from_secs(60),
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
