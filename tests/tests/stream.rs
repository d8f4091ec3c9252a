//! Stream ports: two daemons connected by TCP, peers that go, read nothing, or send nonsense.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::Lab;
use tests::lab;
use tests::namespace::ip;
use tests::traffic::iperf::iperf3;
use tests::traffic::raw::{Wire, ethernet, udp4};
use tests::traffic::{ping, ping_ok};
use tests::wait::{SOON, soon, until};

const EXPERIMENTAL: u16 = 0x88b5;

/// `ovs-dpd stream ...` or `port ...` against a laboratory's daemon.
fn dpd(lab: &Lab, words: &str) -> Result<String> {
    let words = format!("{words} --run-dir {}", lab.run_dir().display());
    lab.ovs_dpd(&words)?.ok()
}

/// What `stream list --json` says of a stream.
fn stream(lab: &Lab, name: &str) -> Result<Value> {
    let text = dpd(lab, "stream list --json")?;
    let all: Vec<Value> = serde_json::from_str(&text)?;
    let found = all.into_iter().find(|stream| stream["name"] == name);
    found.with_context(|| format!("no {name} in {text}"))
}

fn count(of: &Value, what: &str) -> Result<u64> {
    let value = what.split('.').fold(of, |of, part| &of[part]);
    value.as_u64().with_context(|| format!("no {what} in {of}"))
}

fn connected(lab: &Lab, name: &str) -> Result<()> {
    soon(&format!("a peer of {name}"), || {
        Ok(stream(lab, name)?["state"] == "connected")
    })
}

/// What is in flight has arrived or was dropped, and the accounts agree.
fn balanced(of: &Value) -> Result<bool> {
    let ends = count(of, "sent")? + count(of, "dropped_full")? + count(of, "dropped_close")?;
    let rings = ["ring", "inbox"].into_iter().map(|ring| {
        let ring = &of[ring];
        Ok(count(ring, "produced")? == count(ring, "consumed")?
            && count(ring, "stops")? == count(ring, "wakes")?)
    });
    Ok(count(of, "enqueued")? == ends && rings.collect::<Result<Vec<_>>>()? == [true, true])
}

/// An underlay between the hosts of two laboratories.
fn underlay(a: &Lab, b: &Lab) -> Result<()> {
    let (a, b) = (a.host(), b.host());
    ip(format!(
        "link add t-under netns {} type veth peer name t-under netns {}",
        a.name(),
        b.name()
    ))?;
    for (host, v4, v6) in [
        (a, "192.0.2.1/24", "2001:db8::1/64"),
        (b, "192.0.2.2/24", "2001:db8::2/64"),
    ] {
        host.inside(|| std::fs::write("/proc/sys/net/ipv6/conf/t-under/disable_ipv6", "0"))??;
        host.ip(format!("addr add {v4} dev t-under"))?;
        host.ip(format!("addr add {v6} dev t-under nodad"))?;
        host.ip("link set t-under up")?;
    }
    Ok(())
}

fn two_labs(work: impl FnOnce(&Lab, &Lab) -> Result<()>) -> Result<()> {
    lab::test_ovs_dpd(|a| {
        lab::test_ovs_dpd(|b| {
            underlay(a, b)?;
            // Addresses are counted from the same number in each: let them differ.
            for n in 0..8 {
                b.endpoint(&format!("u{n}"))?;
            }
            work(a, b)
        })
    })
}

fn both_ways(listen: &str, connect: &str) -> Result<()> {
    two_labs(|a, b| {
        for lab in [a, b] {
            lab.bridge("br0")?;
        }
        let left = a.host_on("br0", "l", "10.1.1.1/24")?;
        let right = b.host_on("br0", "r", "10.1.1.2/24")?;
        dpd(b, &format!("stream add s0 --listen {listen}"))?;
        dpd(a, &format!("stream add s0 --connect {connect}"))?;
        for lab in [a, b] {
            lab.device("br0", "s0", "")?;
            connected(lab, "s0")?;
            soon("the carrier", || {
                Ok(lab.vsctl("get interface s0 link_state")?.trim() == "up")
            })?;
        }
        ping_ok(left.namespace(), "10.1.1.2")?;
        ping_ok(right.namespace(), "10.1.1.1")?;
        // Offloads at their defaults: what is to be segmented and summed is, before it goes out.
        let run = iperf3(a, left.namespace(), right.namespace(), "10.1.1.2", 2, "")?;
        ensure!(run.bits_per_second > 1e6, "{run:?}");
        let run = iperf3(a, left.namespace(), right.namespace(), "10.1.1.2", 2, "-R")?;
        ensure!(run.bits_per_second > 1e6, "{run:?}");
        // A restart of ovs-vswitchd leaves the connection alone.
        let before = count(&stream(a, "s0")?, "connections")?;
        a.restart_vswitchd()?;
        ping_ok(left.namespace(), "10.1.1.2")?;
        ensure!(count(&stream(a, "s0")?, "connections")? == before);
        // Frame by frame, what one side has sent the other has received.
        for (from, to) in [(a, b), (b, a)] {
            until("the accounts agree", SOON, || {
                let (from, to) = (stream(from, "s0")?, stream(to, "s0")?);
                let exact = balanced(&from)?
                    && count(&from, "sent")?
                        == count(&to, "inbox.produced")? + count(&to, "unattached")?;
                Ok(exact.then_some(()))
            })?;
        }
        Ok(())
    })
}

#[test]
fn two_daemons_exchange_traffic_over_ipv4() -> Result<()> {
    both_ways("192.0.2.2:7000", "192.0.2.2:7000")
}

#[test]
fn two_daemons_exchange_traffic_over_ipv6() -> Result<()> {
    both_ways("[::]:7000", "[2001:db8::2]:7000")
}

#[test]
fn a_stream_connects_again_and_the_carrier_follows() -> Result<()> {
    two_labs(|a, b| {
        for lab in [a, b] {
            lab.bridge("br0")?;
        }
        let left = a.host_on("br0", "l", "10.1.1.1/24")?;
        b.host_on("br0", "r", "10.1.1.2/24")?;
        dpd(a, "stream add s0 --connect 192.0.2.2:7000")?;
        a.device("br0", "s0", "")?;
        ensure!(stream(a, "s0")?["state"] != "connected");
        soon("no carrier", || {
            Ok(a.vsctl("get interface s0 link_state")?.trim() == "down")
        })?;
        for round in 0..3 {
            dpd(b, "stream add s0 --listen 192.0.2.2:7000")?;
            b.device("br0", "s0", "")?;
            connected(a, "s0")?;
            soon("the carrier", || {
                Ok(a.vsctl("get interface s0 link_state")?.trim() == "up")
            })?;
            ping_ok(left.namespace(), "10.1.1.2")?;
            b.vsctl("del-port s0")?;
            dpd(b, "stream del s0")?;
            ensure!(!b.host().links()?.contains(&"s0".to_owned()));
            soon(&format!("no carrier after round {round}"), || {
                Ok(a.vsctl("get interface s0 link_state")?.trim() == "down")
            })?;
        }
        ensure!(count(&stream(a, "s0")?, "connections")? == 3);
        Ok(())
    })
}

#[test]
fn a_stream_that_is_deleted_takes_its_port_along() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.expect_log("s0", "the device of a port is deleted");
        lab.bridge("br0")?;
        dpd(lab, "stream add s0 --listen 127.0.0.1:7000")?;
        lab.device("br0", "s0", "")?;
        let exists = lab.ovs_dpd(format!(
            "stream add s0 --listen 127.0.0.1:7001 --run-dir {}",
            lab.run_dir().display()
        ))?;
        ensure!(
            !exists.status.success() && exists.stderr.contains("exists"),
            "{exists:?}"
        );
        dpd(lab, "stream del s0")?;
        soon("the port goes", || Ok(lab.dp_port("s0").is_err()))?;
        let none = dpd(lab, "stream del s0").err().context("deleted twice")?;
        ensure!(none.to_string().contains("s0"), "{none:#}");
        // Deleted behind the daemon's back, it says so, and can be made again.
        dpd(lab, "stream add s0 --listen 127.0.0.1:7000")?;
        lab.host().ip("link del s0")?;
        soon("the stream knows", || {
            Ok(stream(lab, "s0")?["state"] == "gone")
        })?;
        dpd(lab, "stream add s0 --listen 127.0.0.1:7000")?;
        ensure!(stream(lab, "s0")?["state"] == "waiting");
        lab.vsctl("del-port s0")?;
        Ok(())
    })
}

fn message(frame: &[u8]) -> Vec<u8> {
    let mut message = u16::try_from(frame.len())
        .unwrap_or(u16::MAX)
        .to_be_bytes()
        .to_vec();
    message.extend_from_slice(frame);
    message
}

fn in_host(lab: &Lab, address: &str) -> Result<TcpStream> {
    let address: SocketAddr = address.parse()?;
    let socket = lab.host().inside(|| TcpStream::connect(address))??;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(socket)
}

#[test]
fn a_hostile_peer_harms_nobody_and_is_accounted_for() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        dpd(lab, "stream add s0 --listen 127.0.0.1:7000")?;
        lab.device("br0", "s0", "")?;
        let wire = Wire::open(&a)?;
        let mut peer = in_host(lab, "127.0.0.1:7000")?;
        connected(lab, "s0")?;
        // A second one is turned away.
        let mut second = in_host(lab, "127.0.0.1:7000")?;
        ensure!(
            matches!(second.read(&mut [0; 1]), Ok(0) | Err(_)),
            "it was kept"
        );
        soon("turned away", || {
            Ok(count(&stream(lab, "s0")?, "turned_away")? == 1)
        })?;
        // Runts, giants, and between them frames, in pieces of all sizes.
        let good = ethernet([2, 0, 0, 0, 9, 9], a.mac(), EXPERIMENTAL, &[7; 46]);
        let mut bytes = Vec::new();
        for length in [0, 1, 13, 9000, 65_535] {
            bytes.extend(message(&vec![0xff; length]));
            bytes.extend(message(&good));
        }
        let (mut rest, mut piece) = (bytes.as_slice(), 1);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(piece.min(rest.len()));
            peer.write_all(now)?;
            (rest, piece) = (later, piece * 3 % 1999 + 1);
        }
        for _ in 0..5 {
            wire.expect("a frame between nonsense", SOON, |f| {
                (*f == *good).then_some(())
            })?;
        }
        let told = stream(lab, "s0")?;
        ensure!(
            count(&told, "runt")? == 3 && count(&told, "oversized")? == 2,
            "{told}"
        );
        // Noise, and a reset in the middle of a frame; again and again.
        drop(peer);
        let mut noise = 12345_u64;
        for round in 0..30 {
            let mut peer = loop {
                let mut peer = in_host(lab, "127.0.0.1:7000")?;
                // The last one may still be its peer: then this one is closed at once.
                peer.set_read_timeout(Some(Duration::from_millis(50)))?;
                match peer.read(&mut [0; 1]) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break peer,
                    Ok(n) if n != 0 => break peer,
                    _ => std::thread::sleep(Duration::from_millis(5)),
                }
            };
            let mut bytes = Vec::new();
            for _ in 0..20_000 {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                bytes.push((noise >> 33) as u8);
            }
            // The daemon may be through with it before all is sent.
            let _ = peer.write_all(&bytes);
            let _ = round;
        }
        ping_ok(a.namespace(), "10.1.1.2")?;
        drop(b);
        soon("the peer is gone", || {
            Ok(stream(lab, "s0")?["state"] == "waiting")
        })?;
        let told = until("the accounts agree", SOON, || {
            let told = stream(lab, "s0")?;
            Ok(balanced(&told)?.then_some(told))
        })?;
        // Each of the peer's frames that could be used was received by the port.
        let status = lab.status_json()?;
        let ports = status["datapaths"][0]["ports"]
            .as_array()
            .context("ports")?;
        let port = ports.iter().find(|p| p["name"] == "s0").context("s0")?;
        ensure!(
            port["packets"]["received"] == told["inbox"]["consumed"],
            "{port}\n{told}"
        );
        Ok(())
    })
}

#[test]
fn a_peer_that_reads_nothing_delays_nobody() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let listener = lab
            .host()
            .inside(|| TcpListener::bind("127.0.0.1:7000"))??;
        dpd(lab, "stream add s0 --connect 127.0.0.1:7000 --ring 50")?;
        lab.device("br0", "s0", "")?;
        let (peer, _) = listener.accept()?;
        connected(lab, "s0")?;
        let rule = format!(
            "priority=100,udp,tp_dst=9,actions=output:{}",
            lab.ofport("s0")?
        );
        lab.ofctl(["add-flow", "br0", &rule])?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        // Far more than sockets hold.
        let wire = Wire::open(&a)?;
        let from = (a.mac(), [10, 1, 1, 1], 1);
        let frame = udp4(from, (b.mac(), [10, 1, 1, 2], 9), &[0; 1400])?;
        let flood = || -> Result<()> {
            for _ in 0..10_000 {
                wire.send(&frame)?;
            }
            Ok(())
        };
        flood()?;
        soon("the ring is full", || {
            Ok(count(&stream(lab, "s0")?, "dropped_full")? > 1000)
        })?;
        let flooding = std::thread::scope(|scope| -> Result<_> {
            let flooding = scope.spawn(flood);
            let through = ping(a.namespace(), "10.1.1.2", 100, "-i 0.01")?;
            flooding
                .join()
                .map_err(|_| anyhow::anyhow!("the flood"))??;
            Ok(through)
        })?;
        ensure!(flooding.received == flooding.sent, "{flooding:?}");
        let held = stream(lab, "s0")?;
        ensure!(count(&held, "ring.len")? <= 50, "{held}");
        // The port's count is the ring's.
        let dropped = until("the port's count", SOON, || {
            let (told, status) = (stream(lab, "s0")?, lab.status_json()?);
            let ports = status["datapaths"][0]["ports"]
                .as_array()
                .context("ports")?;
            let port = ports.iter().find(|p| p["name"] == "s0").context("s0")?;
            let packets = &port["packets"];
            let same = packets["dropped"]["output_full"] == told["dropped_full"]
                && packets["transmitted"] == told["ring"]["produced"];
            Ok(same.then_some(told))
        })?;
        // Some may have been lost in front of us: two floods at full speed on a busy machine.
        ensure!(count(&dropped, "enqueued")? > 10_000, "{dropped}");
        // With the peer, all that waits goes, and the accounts are closed.
        drop(peer);
        drop(listener);
        until("the accounts agree", SOON, || {
            let told = stream(lab, "s0")?;
            let waits = count(&told, "ring.len")? != 0 || told["state"] == "connected";
            Ok((!waits && balanced(&told)? && count(&told, "dropped_close")? != 0).then_some(()))
        })?;
        ping_ok(a.namespace(), "10.1.1.2")
    })
}

#[test]
fn what_a_busy_datapath_does_not_take_waits_with_the_peer() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        dpd(lab, "stream add s0 --listen 127.0.0.1:7000")?;
        lab.device("br0", "s0", "")?;
        let mut peer = in_host(lab, "127.0.0.1:7000")?;
        connected(lab, "s0")?;
        let good = ethernet([2, 0, 0, 0, 9, 9], a.mac(), EXPERIMENTAL, &[7; 46]);
        let many = message(&good).repeat(20_000);
        peer.write_all(&many)?;
        until("all are received, none dropped on the way", SOON, || {
            let told = stream(lab, "s0")?;
            let done = count(&told, "inbox.consumed")? == 20_000;
            Ok(done.then_some(()))
        })?;
        let told = stream(lab, "s0")?;
        ensure!(count(&told, "inbox.dropped_full")? == 0, "{told}");
        soon("at rest", || balanced(&stream(lab, "s0")?))
    })
}

#[test]
fn only_who_may_change_the_datapath_may_give_commands() -> Result<()> {
    lab::test_bare(|lab| {
        let words = format!(
            "setpriv --reuid 65534 --regid 65534 --clear-groups {} stream add s0 --listen 127.0.0.1:7000 --run-dir {}",
            lab.programs()?.ovs_dpd(),
            lab.run_dir().display()
        );
        let ran = lab.host().try_exec(&words, Duration::from_secs(10))?;
        ensure!(
            !ran.status.success() && ran.stderr.contains("not permitted"),
            "{ran:?}"
        );
        // Nor does nonsense from one who may harm the daemon.
        for bytes in [&b"\n"[..], b"{}\n", b"\xff\xff\n", &[b'x'; 5000]] {
            let mut socket =
                std::os::unix::net::UnixStream::connect(lab.run_dir().join("control.sock"))?;
            // It may have given up reading by then.
            let _ = socket.write_all(bytes);
            let mut answer = String::new();
            let _ = socket.read_to_string(&mut answer);
            ensure!(answer.is_empty() || answer.contains("Err"), "{answer}");
        }
        for words in [
            "s/0 --listen 127.0.0.1:1",
            "s0 --listen 192.0.2.77:1",
            "s0 --connect 127.0.0.1:1 --ring 0",
        ] {
            ensure!(dpd(lab, &format!("stream add {words}")).is_err(), "{words}");
        }
        ensure!(dpd(lab, "stream list")?.contains("endpoint"));
        Ok(())
    })
}
