//! A flood of SYNs, each from another source, through the zone of an open TCP connection, with the real
//! ovs-vswitchd: the connection goes on, memory stays within its bound, and whoever made room is counted.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use tests::lab;
use tests::traffic::raw::Wire;
use tests::traffic::tcp;

/// Connections that the daemon may hold.
const MOST: u64 = 50_000;
/// How long the flood lasts.
const FLOOD: Duration = Duration::from_secs(6);
const SILENCE: Duration = Duration::from_secs(15);
/// Kilobytes that so many connections may take at most: twice what is written in benches/README.md, and what
/// a busy daemon's allocator keeps besides.
const MEMORY: u64 = MOST + 32 * 1024;

/// A SYN from one of many sources to an address of nobody's.
fn syn(number: u32, to: [u8; 6]) -> Result<Vec<u8>> {
    let [a, b, c, d] = number.to_be_bytes();
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 9, 9, 9], to)
        .ipv4([64 | a, b, c, d], [10, 9, 9, 9], 64)
        .tcp(1024 + (number % 60_000) as u16, 80, number, 1024)
        .syn();
    let mut frame = Vec::with_capacity(60);
    builder.write(&mut frame, &[])?;
    frame.resize(60, 0);
    Ok(frame)
}

/// Blocks that came back unchanged over one connection until `stop`.
fn talk(mut stream: TcpStream, stop: &AtomicBool) -> Result<u64> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let (mut sent, mut back) = (vec![0; 32 << 10], vec![0; 32 << 10]);
    let mut blocks = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        for (at, byte) in sent.iter_mut().enumerate() {
            *byte = (at as u64 + blocks * 7) as u8;
        }
        stream.write_all(&sent).context("the client's writing")?;
        stream
            .read_exact(&mut back)
            .context("the client's reading")?;
        ensure!(sent == back, "block {blocks} came back changed");
        blocks += 1;
    }
    Ok(blocks)
}

#[test]
fn a_transfer_survives_a_flood_of_syns_through_its_zone() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.stop_vswitchd()?;
        lab.stop_daemon()?;
        lab.start_daemon_with(&["--max-connections", &MOST.to_string()])?;
        lab.start_vswitchd()?;
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let flooder = lab.host_on("br0", "c", "10.1.1.3/24")?;
        lab.ofctl("del-flows br0")?;
        for rule in [
            "table=0,priority=10,arp,actions=normal",
            "table=0,priority=5,ip,actions=ct(table=1,zone=7)",
            "table=1,priority=5,ct_state=+trk+new,ip,actions=ct(commit,zone=7),normal",
            "table=1,priority=5,ct_state=+trk+est,ip,actions=normal",
        ] {
            lab.ofctl(["add-flow", "br0", rule])?;
        }
        let conntrack =
            || -> Result<serde_json::Value> { Ok(lab.status_json()?["conntrack"].clone()) };
        let resident = || lab.with_daemon(|daemon| daemon.process().status_kb("VmRSS"));
        tcp::echo(
            a.namespace(),
            b.namespace(),
            "10.1.1.2:7001".parse()?,
            4 << 20,
        )?;

        let address: SocketAddr = "10.1.1.2:7000".parse()?;
        let listener = b.namespace().inside(|| TcpListener::bind(address))??;
        let client = a
            .namespace()
            .inside(|| TcpStream::connect_timeout(&address, SILENCE))??;
        let (mut server, _) = listener.accept()?;
        let echo = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(count @ 1..) = server.read(&mut buffer) {
                if server.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
        });
        let before = resident()?;
        let stop = AtomicBool::new(false);
        let (sent, blocks) = std::thread::scope(|scope| -> Result<_> {
            let talking = scope.spawn(|| talk(client, &stop));
            let wire = Wire::open(&flooder)?;
            let mut frame = syn(0, b.mac())?;
            let began = Instant::now();
            let mut sent = 0_u32;
            while began.elapsed() < FLOOD {
                for _ in 0..64 {
                    // Only what differs is written, and the checksum: a flood has no time.
                    if sent.is_multiple_of(64) {
                        frame = syn(sent, b.mac())?;
                    } else {
                        another(&mut frame);
                    }
                    // A full queue loses it: a flood doesn't mind.
                    let _ = wire.send(&frame);
                    sent += 1;
                }
            }
            stop.store(true, Ordering::Relaxed);
            let blocks = talking
                .join()
                .map_err(|_| anyhow!("the client panicked"))??;
            Ok((sent, blocks))
        })?;
        let after = resident()?;
        let conntrack = conntrack()?;
        let count = |name: &str| {
            conntrack[name]
                .as_u64()
                .with_context(|| format!("no {name} in {conntrack}"))
        };
        eprintln!(
            "{sent} SYNs in {FLOOD:?}; {} connections made, {} evicted; {blocks} blocks of 32 KiB there and \
             back; resident {before} kB before, {after} kB after",
            count("inserted")?,
            count("early_drop")?,
        );
        ensure!(u64::from(sent) > 4 * MOST, "that was no flood: {sent}");
        ensure!(count("connections")? == MOST);
        let gone = count("early_drop")? + count("expired")? + count("deleted")?;
        ensure!(count("inserted")? == MOST + gone, "{conntrack}");
        ensure!(count("early_drop")? > MOST, "{conntrack}");
        ensure!(count("full")? == 0, "somebody was refused: {conntrack}");
        ensure!(blocks > 20, "the transfer stood still: {blocks} blocks");
        ensure!(
            after < before + MEMORY,
            "{before} kB before, {after} kB after"
        );
        // The connection that was open all the time wasn't made anew, and others find room.
        tcp::echo(
            a.namespace(),
            b.namespace(),
            "10.1.1.2:7002".parse()?,
            1 << 20,
        )?;
        echo.join().map_err(|_| anyhow!("the server panicked"))?;
        Ok(())
    })
}

/// The next source: the address's last 32 bits count on, both checksums with them (RFC 1624).
fn another(frame: &mut [u8]) {
    const SOURCE: usize = 14 + 12;
    for (at, sum) in [(SOURCE + 2, 14 + 10), (SOURCE + 2, 14 + 20 + 16)] {
        let word = u16::from_be_bytes([frame[at], frame[at + 1]]);
        let field = u16::from_be_bytes([frame[sum], frame[sum + 1]]);
        let folded = u32::from(!field) + u32::from(!word) + u32::from(word.wrapping_add(1));
        let folded = (folded & 0xffff) + (folded >> 16);
        let folded = (folded & 0xffff) + (folded >> 16);
        frame[sum..sum + 2].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    }
    let word = u16::from_be_bytes([frame[SOURCE + 2], frame[SOURCE + 3]]).wrapping_add(1);
    frame[SOURCE + 2..SOURCE + 4].copy_from_slice(&word.to_be_bytes());
}
