//! Joins two ports, and nothing else: the floor under the datapath's figures.
//!
//! `forward SECONDS PORT PORT`, where PORT is the name of a device that is there, `tap:NAME` or
//! `veth:NAME` for an internal port that is made; `xdp:NAME`, `xdp-generic:NAME` for a device by AF_XDP. Prints each port's mode, then what went through.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use frame::Pool;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vport::{
    AttachOptions, DriverChoice, Error, InternalOptions, Port, RxQueue, RxStatus, TxOutcome,
    XdpMode, attach, create_internal,
};

fn open(name: &str) -> Result<Box<dyn Port>, Error> {
    let internal = |name: &str, force_veth| {
        create_internal(
            name,
            &InternalOptions {
                force_veth,
                ..InternalOptions::default()
            },
        )
    };
    let afxdp = |name: &str, xdp| {
        attach(
            name,
            &AttachOptions {
                driver: DriverChoice::AfXdp,
                xdp,
                ..AttachOptions::default()
            },
        )
    };
    match name.split_once(':') {
        Some(("tap", name)) => internal(name, false),
        Some(("veth", name)) => internal(name, true),
        Some(("xdp", name)) => afxdp(name, XdpMode::Auto),
        Some(("xdp-generic", name)) => afxdp(name, XdpMode::Generic),
        _ => attach(
            name,
            &AttachOptions {
                qdisc_bypass: std::env::var_os("QDISC_BYPASS").is_some(),
                ..AttachOptions::default()
            },
        ),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [seconds, a, b] = &arguments[..] else {
        return Err("usage: forward SECONDS PORT PORT".into());
    };
    let ports = [open(a)?, open(b)?];
    let mut queues: Vec<(&dyn Port, TxOutcome, Box<dyn RxQueue>)> = Vec::new();
    for (port, to) in [(&ports[0], &ports[1]), (&ports[1], &ports[0])] {
        println!("{}: {}", port.name(), port.mode());
        for queue in port.open_queues()? {
            queues.push((&**to, TxOutcome::default(), queue));
        }
    }
    let end = Instant::now() + Duration::from_secs_f64(seconds.parse()?);
    let mut pool = Pool::default();
    let mut frames = Vec::with_capacity(32);
    let (mut batches, mut sleeps) = (0u64, 0u64);
    while Instant::now() < end {
        let mut idle = true;
        for (to, outcome, queue) in &mut queues {
            if queue.receive(&mut pool, &mut frames, 32)? == RxStatus::Gone {
                return Err(format!("a device is gone; sent to {} by then", to.name()).into());
            }
            if !frames.is_empty() {
                idle = false;
                batches += 1;
                to.transmit(&mut frames, &mut pool, outcome);
            }
        }
        if idle {
            sleeps += 1;
            let mut fds: Vec<_> = queues
                .iter()
                .map(|(_, _, queue)| PollFd::from_borrowed_fd(queue.as_fd(), PollFlags::IN))
                .collect();
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            poll(&mut fds, Some(&timeout))?;
        }
    }
    for ((to, outcome, _), from) in queues.iter().zip(&ports) {
        println!(
            "{} -> {}: {outcome:?}; {:?}",
            from.name(),
            to.name(),
            from.host_counters()
        );
    }
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let cpu = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
    let packets: u64 = queues.iter().map(|(_, outcome, _)| outcome.packets).sum();
    println!(
        "{batches} batches, {sleeps} sleeps, {cpu:.2} s of CPU: {:.0} ns a packet",
        cpu * 1e9 / packets.max(1) as f64
    );
    Ok(())
}
