//! The real daemon under edited datagrams from several clients at once, who read as it pleases them,
//! while a good client asks.
//!
//! What must hold: the good client is answered, soon; afterwards the daemon serves as before, its
//! descriptors are those of the start, its memory is bounded, and it ends in time.
#![allow(clippy::expect_used, clippy::panic)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fuzz::campaign::number;
use fuzz::reader::connect;
use fuzz::seeds::{self, Seed};
use fuzz::{edit, wire};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rustix::fd::OwnedFd;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tests::{lab, wait};

const ATTACKERS: u64 = 4;
/// Longer than this no answer may take, on whatever machine.
const LATE: Duration = Duration::from_secs(2);
/// How much larger the daemon may be afterwards.
const GROWTH_KB: u64 = 96 << 10;

#[test]
fn hostile_clients_disturb_neither_the_daemon_nor_a_good_client() -> Result<()> {
    let datagrams = number("OVS_DPD_FUZZ").unwrap_or(50_000) / 10;
    let seeds = seeds::requests();
    lab::test_bare(|lab| {
        let pid = lab.with_daemon(|daemon| Ok(daemon.process().id()))?;
        let netns = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let run_dir = lab.run_dir();
        lab.dpctl("add-dp warm")?;
        lab.dpctl("del-dp warm")?;
        let descriptors =
            || -> Result<usize> { Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count()) };
        let resident = || lab.with_daemon(|daemon| daemon.process().status_kb("VmRSS"));
        let (fds, rss) = (descriptors()?, resident()?);

        let over = AtomicBool::new(false);
        let sent = AtomicU64::new(0);
        let begun = Instant::now();
        let latencies = std::thread::scope(|scope| -> Result<Vec<Duration>> {
            let attackers: Vec<_> = (0..ATTACKERS)
                .map(|number| {
                    let (seeds, netns, run_dir, sent) = (&seeds, &netns, &run_dir, &sent);
                    scope.spawn(move || {
                        attack(
                            number,
                            datagrams / ATTACKERS,
                            seeds,
                            || Ok(connect(run_dir, netns)?.0),
                            sent,
                        )
                    })
                })
                .collect();
            let good = scope.spawn(|| -> Result<Vec<Duration>> {
                let (socket, _) = connect(&run_dir, &netns)?;
                let mut latencies = Vec::new();
                while !over.load(Relaxed) {
                    latencies.push(ask(&socket)?);
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(latencies)
            });
            for attacker in attackers {
                attacker
                    .join()
                    .map_err(|_| anyhow::anyhow!("an attacker panicked"))??;
            }
            over.store(true, Relaxed);
            good.join()
                .map_err(|_| anyhow::anyhow!("the good client panicked"))?
        })?;
        let took = begun.elapsed();
        let mut sorted = latencies;
        sorted.sort();
        let at = |part: usize| {
            sorted
                .get(sorted.len() * part / 1000)
                .copied()
                .unwrap_or_default()
        };
        println!(
            "sockets: {} datagrams in {:.1} s; a good client's {} answers: p50 {:?}, p99 {:?}, max {:?}",
            sent.load(Relaxed),
            took.as_secs_f64(),
            sorted.len(),
            at(500),
            at(990),
            sorted.last()
        );
        ensure!(
            !sorted.is_empty() && at(1000).max(at(999)) < LATE,
            "answers came late"
        );

        // What an attacker asked for before it closed is still done, behind its back.
        wait::until("the attackers gone", Duration::from_secs(60), || {
            let status = lab.status_json()?;
            let clients = status["clients"].as_array().map_or(0, Vec::len);
            Ok((clients == 0).then_some(()))
        })?;
        // What the attackers made goes, and nothing else is there.
        for datapath in lab.dpctl("dump-dps")?.lines() {
            lab.dpctl(["del-dp", datapath])?;
        }
        lab.dpctl("add-dp after")?;
        ensure!(lab.dpctl("show")?.contains("after"));
        lab.dpctl("del-dp after")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while descriptors()? > fds && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        ensure!(
            descriptors()? <= fds,
            "{} descriptors, {fds} before",
            descriptors()?
        );
        let now = resident()?;
        println!("sockets: {rss} kB before, {now} kB after, {fds} descriptors");
        ensure!(now < rss + GROWTH_KB, "{now} kB, {rss} kB before");
        let output = lab.with_daemon(|daemon| Ok(daemon.output()))?;
        ensure!(!output.contains("panicked"), "{output}");
        // That it ends within two seconds is looked at by the laboratory.
        Ok(())
    })
}

/// Asks for a family, waits for the answer.
fn ask(socket: &OwnedFd) -> Result<Duration> {
    let mut request = Vec::new();
    request.extend_from_slice(&36_u32.to_ne_bytes());
    request.extend_from_slice(&16_u16.to_ne_bytes());
    request.extend_from_slice(&5_u16.to_ne_bytes());
    request.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0]);
    request.extend_from_slice(&[13, 0, 2, 0]);
    request.extend_from_slice(b"ovs_flow\0\0\0\0");
    let begun = Instant::now();
    send(socket, &request, SendFlags::NOSIGNAL)?;
    let mut room = vec![0; 1 << 16];
    let (mut told, mut acknowledged) = (false, false);
    while !acknowledged {
        let (len, _) = recv(socket, &mut room, RecvFlags::empty())?;
        ensure!(len != 0, "the daemon closed");
        for message in wire::messages(&room[..len]) {
            match message.error() {
                Some(0) => acknowledged = true,
                Some(errno) => bail!("errno {errno}"),
                None => told = true,
            }
        }
    }
    ensure!(told, "no answer before the acknowledgement");
    Ok(begun.elapsed())
}

fn attack(
    number: u64,
    count: u64,
    seeds: &[Seed],
    connect: impl Fn() -> Result<OwnedFd>,
    sent: &AtomicU64,
) -> Result<()> {
    let mut random = SmallRng::seed_from_u64(0x0a77_ac4e + number);
    let random = &mut random;
    let mut socket = connect().context("an attacker's first connection")?;
    let mut room = vec![0; 1 << 18];
    let mut done = 0;
    while done < count {
        let seed = seeds.choose(random).context("seeds")?;
        let other = seeds.choose(random).context("seeds")?;
        let mut message = seed.message.clone();
        if random.random_ratio(7, 8) {
            edit::message(&mut message, &other.message, random);
        }
        if message.len() >= 24 {
            let ifindex: u32 = random.random_range(1..24);
            message[20..24].copy_from_slice(&ifindex.to_ne_bytes());
        }
        if random.random_ratio(1, 8) {
            edit::bytes(&mut message, random);
        }
        if message.is_empty() {
            continue;
        }
        match send(&socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) => {
                done += 1;
                sent.fetch_add(1, Relaxed);
            }
            Err(rustix::io::Errno::AGAIN) => {
                std::thread::sleep(Duration::from_micros(50));
            }
            // The daemon may close on whom it can't serve.
            Err(_) => socket = connect()?,
        }
        // One reads all, the others some of it, or nothing for a while.
        if number == 0 || random.random_ratio(1, 4) {
            loop {
                match recv(&socket, &mut room, RecvFlags::DONTWAIT) {
                    Ok((0, _)) => {
                        socket = connect()?;
                        break;
                    }
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
        }
        if random.random_ratio(1, 500) {
            // Leaves in the middle of whatever is going on.
            socket = connect()?;
        }
    }
    Ok(())
}
