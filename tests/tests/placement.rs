//! Workers: the CPUs that they are kept on, what they do when idle, and who serves which queue.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity};
use tests::endpoint::Endpoint;
use tests::lab::{self, Lab};
use tests::traffic::{ping, ping_ok};
use tests::wait;

/// The CPUs on which this process may run.
fn allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(*cpu))
        .collect())
}

/// Starts it anew, with arguments.
fn restart(lab: &Lab, arguments: &[&str]) -> Result<()> {
    lab.stop_daemon()?;
    lab.start_daemon_with(arguments)
}

/// Where the daemon's worker of that number may run, as the kernel writes it.
fn place(lab: &Lab, worker: usize) -> Result<String> {
    let pid = lab.with_daemon(|daemon| Ok(daemon.process().id()))?;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        let name = std::fs::read_to_string(path.join("comm"))?;
        if name.trim() == format!("worker-{worker}") {
            let status = std::fs::read_to_string(path.join("status"))?;
            let mut lines = status.lines();
            let list = lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            return Ok(list.context("no list")?.trim().to_owned());
        }
    }
    anyhow::bail!("no worker {worker}")
}

#[test]
fn workers_keep_to_the_cpus_they_are_given() -> Result<()> {
    lab::test_bare(|lab| {
        let cpus = allowed()?;
        let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
        let list = match first == last {
            true => first.to_string(),
            false => format!("{last},{first}"),
        };
        restart(lab, &["--workers", "3", "--cpus", &list])?;
        let expected = match first == last {
            true => [first; 3],
            false => [last, first, last],
        };
        let status = lab.status_json()?;
        for (worker, cpu) in expected.into_iter().enumerate() {
            ensure!(place(lab, worker)? == cpu.to_string(), "worker {worker}");
            ensure!(status["workers"][worker]["cpu"] == cpu, "{status}");
        }
        let text = lab.status()?;
        ensure!(
            text.contains(&format!("worker 2 on CPU {}: ", expected[2])),
            "{text}"
        );
        // Without --workers: one a CPU.
        restart(lab, &["--cpus", &list])?;
        let count = lab.status_json()?["workers"].as_array().map(Vec::len);
        ensure!(count == Some(list.split(',').count()), "{count:?}");
        Ok(())
    })
}

#[test]
fn cpus_that_are_not_there_or_not_allowed_are_told() -> Result<()> {
    lab::test_bare(|lab| {
        let run_dir = lab.directory().join("other").display().to_string();
        let program = lab.programs()?.ovs_dpd();
        let fails = |before: &[&str], list: &str, says: &str| -> Result<()> {
            let words = [&program, "run", "--run-dir", &run_dir, "--cpus", list];
            let ran = lab
                .host()
                .try_exec([before, &words].concat().as_slice(), wait::SOON)?;
            ensure!(
                !ran.status.success() && ran.stderr.contains(says),
                "{ran:?}"
            );
            Ok(())
        };
        fails(&[], "1000", "this machine has no CPU 1000 that is online")?;
        fails(&[], "0-x", "a list is like 0-3,8")?;
        fails(&[], "3-1", "ends before it begins")?;
        let cpus = allowed()?;
        let [here, .., there] = cpus.as_slice() else {
            eprintln!("only one CPU: nothing to forbid");
            return Ok(());
        };
        let says = format!("may not run on CPU {there}, only on {here}:");
        fails(
            &["taskset", "-c", &here.to_string()],
            &there.to_string(),
            &says,
        )
    })
}

#[test]
fn busy_polling_ends_when_packets_do() -> Result<()> {
    lab::test_bare(|lab| {
        restart(lab, &["--busy-poll", "300000"])?;
        lab.dpctl("add-dp dp1")?;
        let (a, b) = (lab.endpoint("a")?, lab.endpoint("b")?);
        a.address("10.1.1.1/24")?;
        b.address("10.1.1.2/24")?;
        lab.dpctl(["add-if", "dp1", a.port(), b.port()])?;
        for (from, to) in [(1, 2), (2, 1)] {
            for eth in ["eth_type(0x0806),arp()", "eth_type(0x0800),ipv4()"] {
                lab.dpctl([
                    "add-flow",
                    "dp1",
                    &format!("in_port({from}),eth(),{eth}"),
                    &format!("{to}"),
                ])?;
            }
        }
        let used = || lab.with_daemon(|daemon| daemon.process().cpu_time());
        // It spins between packets that come every 20 ms ...
        let before = used()?;
        let seen = ping(a.namespace(), "10.1.1.2", 50, "")?;
        ensure!(seen.received == 50, "{seen:?}");
        let spun = used()? - before;
        ensure!(spun.as_millis() >= 300, "{spun:?} in a second of packets");
        // ... and sleeps when there have been none for 0.3 s. Devices that are new say something for a while.
        wait::soon("an idle second", || {
            let before = used()?;
            std::thread::sleep(Duration::from_secs(1));
            Ok((used()? - before).as_millis() <= 30)
        })
    })
}

/// Numbered datagrams, as fast as they go, from one to the other until `stop`; how many came in order.
fn flood(
    from: &Endpoint,
    to: &Endpoint,
    address: &str,
    stop: &AtomicBool,
    came: &AtomicU64,
) -> Result<()> {
    let receiver = to.namespace().inside(|| UdpSocket::bind((address, 9)))??;
    let sender = from.namespace().inside(|| UdpSocket::bind("0.0.0.0:0"))??;
    receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
    sender.connect((address, 9))?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                // A full queue loses it: it isn't about losses.
                let _ = sender.send(&number.to_be_bytes());
            }
        });
        let mut last = 0;
        let mut bytes = [0; 8];
        while !stop.load(Ordering::Relaxed) {
            if receiver.recv(&mut bytes).is_err() {
                continue;
            }
            let number = u64::from_be_bytes(bytes);
            if number <= last {
                stop.store(true, Ordering::Relaxed);
                anyhow::bail!("{number} came behind {last}");
            }
            last = number;
            came.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })
}

#[test]
fn a_busy_worker_gives_a_queue_to_an_idle_one_and_packets_keep_their_order() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.stop_vswitchd()?;
        restart(lab, &["--workers", "2"])?;
        lab.start_vswitchd()?;
        lab.bridge("br0")?;
        let hosts = (1..=4)
            .map(|n| lab.host_on("br0", &format!("h{n}"), &format!("10.1.1.{n}/24")))
            .collect::<Result<Vec<_>>>()?;
        ping_ok(hosts[0].namespace(), "10.1.1.2")?;
        ping_ok(hosts[2].namespace(), "10.1.1.4")?;
        // The two senders' queues, first at one worker: queues are given in turns.
        let served = || -> Result<[usize; 2]> {
            let status = lab.status_json()?;
            let workers = status["workers"].as_array().context("no workers")?;
            let who = |port: &str| {
                let has = |worker: &&serde_json::Value| {
                    let queues = worker["queues"].as_array();
                    queues.is_some_and(|all| all.iter().any(|queue| queue["port"] == port))
                };
                workers.iter().position(|worker| has(&worker))
            };
            let of = |host: &Endpoint| who(host.port()).context("a queue of nobody");
            Ok([of(&hosts[0])?, of(&hosts[2])?])
        };
        let [one, other] = served()?;
        ensure!(one == other, "not at one worker from the beginning");
        let (stop, came) = (AtomicBool::new(false), AtomicU64::new(0));
        let (result, floods) = std::thread::scope(|scope| {
            let first = scope.spawn(|| flood(&hosts[0], &hosts[1], "10.1.1.2", &stop, &came));
            let second = scope.spawn(|| flood(&hosts[2], &hosts[3], "10.1.1.4", &stop, &came));
            let result = wait::soon("a queue that moves", || {
                let [one, other] = served()?;
                let moves = lab.status_json()?["queue_moves"].as_u64();
                Ok((one != other && moves >= Some(1)) || stop.load(Ordering::Relaxed))
            });
            // In the new place packets go on to come, in order.
            let before = came.load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(500));
            let more = came.load(Ordering::Relaxed) - before;
            stop.store(true, Ordering::Relaxed);
            let result = result.and_then(|()| {
                ensure!(more > 100, "{more} packets in half a second");
                Ok(())
            });
            (result, [first.join(), second.join()])
        });
        for flood in floods {
            flood.map_err(|_| anyhow::anyhow!("a flood panicked"))??;
        }
        result?;
        // Ports whose queues have moved go as others do.
        for host in &hosts {
            lab.vsctl(format!("del-port br0 {}", host.port()))?;
        }
        wait::soon("queues that are closed", || {
            let text = lab.status_json()?["workers"].to_string();
            Ok(hosts.iter().all(|host| !text.contains(host.port())))
        })
    })
}
