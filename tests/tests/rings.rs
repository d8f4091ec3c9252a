//! Rings in front of ports whose devices may have no room: policies, sizes, counts, and that a slow port stops
//! nobody else. The slow device is one with a shaper.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::Lab;
use tests::endpoint::Endpoint;
use tests::lab;
use tests::traffic::raw::{Wire, udp4};
use tests::traffic::{ping, ping_ok};
use tests::wait::{SOON, soon, until};

/// Bytes of a datagram's payload.
const PAYLOAD: usize = 1400;

fn set(lab: &Lab, port: &str, words: &str) -> Result<()> {
    let run_dir = lab.run_dir().display().to_string();
    lab.ovs_dpd(format!("port set {port} {words} --run-dir {run_dir}"))?
        .ok()
        .map(drop)
}

fn port(lab: &Lab, name: &str) -> Result<Value> {
    let status = lab.status_json()?;
    let ports = status["datapaths"][0]["ports"]
        .as_array()
        .context("ports")?;
    let port = ports.iter().find(|port| port["name"] == name);
    port.cloned()
        .with_context(|| format!("no {name} in {status}"))
}

fn count(of: &Value, what: &str) -> Result<u64> {
    let value = what.split('.').fold(of, |of, part| &of[part]);
    // Drops that never happened aren't listed.
    Ok(value.as_u64().unwrap_or(0))
}

/// Lets a port's device send that many bits a second, with nearly no queue.
fn shape(lab: &Lab, port: &str, rate: &str) -> Result<()> {
    lab.host().exec(format!(
        "tc qdisc replace dev {port} root tbf rate {rate} burst 3200 limit 3200"
    ))?;
    Ok(())
}

/// Endpoints a, b, c on a bridge, b's port slow; datagrams for port 9 go to b alone.
fn bed(work: impl FnOnce(&Lab, [&Endpoint; 3]) -> Result<()>) -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let c = lab.host_on("br0", "c", "10.1.1.3/24")?;
        for end in [&b, &c] {
            // All are known, so nothing is flooded.
            ping_ok(
                a.namespace(),
                if end.port() == b.port() {
                    "10.1.1.2"
                } else {
                    "10.1.1.3"
                },
            )?;
        }
        let rule = format!(
            "priority=100,udp,tp_dst=9,actions=output:{}",
            lab.ofport(b.port())?
        );
        lab.ofctl(["add-flow", "br0", &rule])?;
        // The flow is there before what counts: what a handler executes can't be paused.
        warm_up(lab, &a, &b)?;
        work(lab, [&a, &b, &c])
    })
}

fn datagrams(from: &Endpoint, to: &Endpoint, count: u64) -> Result<()> {
    let wire = Wire::open(from)?;
    let source = (from.mac(), [10, 1, 1, 1], 1);
    let frame = udp4(source, (to.mac(), [10, 1, 1, 2], 9), &[0; PAYLOAD])?;
    for _ in 0..count {
        wire.send(&frame)?;
    }
    Ok(())
}

fn warm_up(lab: &Lab, a: &Endpoint, b: &Endpoint) -> Result<()> {
    until("the flow for port 9", SOON, || {
        datagrams(a, b, 1)?;
        let flows = lab.dp_flows()?;
        Ok(flows
            .iter()
            .any(|flow| flow.contains("dst=9"))
            .then_some(()))
    })
}

/// The ring is empty, and its accounts agree; gives the port then.
fn at_rest(lab: &Lab, name: &str) -> Result<Value> {
    until("the ring is empty", SOON, || {
        let port = port(lab, name)?;
        let ring = &port["ring"];
        let rest = count(ring, "len")? == 0
            && count(ring, "produced")? == count(ring, "consumed")?
            && count(ring, "stops")? == count(ring, "wakes")?;
        Ok(rest.then_some(port))
    })
}

/// `received = transmitted + ...` over the datapath.
fn balanced(lab: &Lab) -> Result<()> {
    until("every packet ended once", SOON, || {
        let status = lab.status_json()?;
        let packets = &status["datapaths"][0]["packets"];
        let sum = |names: &[&str]| {
            names
                .iter()
                .map(|name| count(packets, name))
                .sum::<Result<u64>>()
        };
        let dropped: u64 = packets["dropped"]
            .as_object()
            .context("drops")?
            .values()
            .filter_map(Value::as_u64)
            .sum();
        let came = sum(&["received", "executed", "copied"])?;
        Ok((came == sum(&["transmitted", "to_user", "held"])? + dropped).then_some(()))
    })
}

fn nothing_is_lost(ring: usize) -> Result<()> {
    bed(|lab, [a, b, _]| {
        set(
            lab,
            b.port(),
            &format!("--policy backpressure --ring {ring}"),
        )?;
        shape(lab, b.port(), "20mbit")?;
        let arrives = Wire::open(b)?;
        let before = port(lab, b.port())?;
        datagrams(a, b, 500)?;
        let after = until("all are sent", SOON, || {
            let now = at_rest(lab, b.port())?;
            let sent = count(&now, "packets.transmitted")? - count(&before, "packets.transmitted")?;
            Ok((sent >= 500).then_some(now))
        })?;
        let ring = &after["ring"];
        ensure!(count(ring, "stops")? > 0, "it was never stopped: {ring}");
        ensure!(
            count(&after, "packets.dropped.output_full")? == 0,
            "{after}"
        );
        ensure!(count(&port(lab, a.port())?, "host_queue_full")? == 0);
        let came = arrives.capture_for(Duration::from_millis(500))?;
        let came = came.iter().filter(|f| f.len() == PAYLOAD + 42).count();
        ensure!(came == 500, "{came} of 500 arrived");
        balanced(lab)
    })
}

#[test]
fn with_backpressure_a_ring_of_one_loses_nothing() -> Result<()> {
    nothing_is_lost(1)
}

#[test]
fn with_backpressure_a_ring_of_fifty_loses_nothing() -> Result<()> {
    nothing_is_lost(50)
}

#[test]
fn with_tail_drop_what_finds_no_room_is_dropped_and_counted() -> Result<()> {
    bed(|lab, [a, b, _]| {
        set(lab, b.port(), "--policy tail-drop --ring 5")?;
        shape(lab, b.port(), "20mbit")?;
        let before = port(lab, b.port())?;
        datagrams(a, b, 500)?;
        let after = until("all have ended", SOON, || {
            let now = at_rest(lab, b.port())?;
            let ended = |port: &Value| -> Result<u64> {
                Ok(count(port, "packets.transmitted")?
                    + count(port, "packets.dropped.output_full")?)
            };
            Ok((ended(&now)? - ended(&before)? >= 500).then_some(now))
        })?;
        ensure!(
            count(&after, "packets.dropped.output_full")? > 100,
            "{after}"
        );
        ensure!(count(&after["ring"], "stops")? == 0, "{after}");
        balanced(lab)
    })
}

#[test]
fn what_a_filter_drops_on_the_way_out_stops_a_port_for_a_while_only() -> Result<()> {
    bed(|lab, [a, b, _]| {
        set(lab, b.port(), "--policy backpressure --ring 4")?;
        for line in [
            String::from("add table netdev filter_out"),
            format!(
                "add chain netdev filter_out egress {{ type filter hook egress device {} priority 0; }}",
                b.port()
            ),
            String::from("add rule netdev filter_out egress udp dport 9 drop"),
        ] {
            lab.host().exec(format!("nft {line}"))?;
        }
        let dropped = |port: &Value| count(port, "packets.dropped.output_full");
        let before = dropped(&port(lab, b.port())?)?;
        datagrams(a, b, 3)?;
        until("they are given up", SOON, || {
            let now = at_rest(lab, b.port())?;
            Ok((dropped(&now)? - before == 3).then_some(()))
        })?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        lab.host().exec("nft delete table netdev filter_out")?;
        balanced(lab)
    })
}

#[test]
fn a_slow_port_stops_no_queue_that_feeds_others() -> Result<()> {
    bed(|lab, [a, b, _]| {
        set(lab, b.port(), "--policy backpressure --ring 10")?;
        shape(lab, b.port(), "2mbit")?;
        ping_ok(a.namespace(), "10.1.1.3")?;
        let ping = std::thread::scope(|scope| -> Result<_> {
            let flood = scope.spawn(|| -> Result<()> {
                let begin = Instant::now();
                while begin.elapsed() < Duration::from_secs(2) {
                    datagrams(a, b, 20)?;
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(())
            });
            // The same device of a: its queue feeds b and c.
            let ping = ping(a.namespace(), "10.1.1.3", 150, "-i 0.01")?;
            flood.join().map_err(|_| anyhow::anyhow!("the flood"))??;
            Ok(ping)
        })?;
        ensure!(ping.received == ping.sent, "{ping:?}");
        let average = ping.average_us.context("average")?;
        // A stop would last until half of the ring is sent: 30 ms.
        ensure!(average < 10_000.0, "{ping:?}");
        // What it fed beside c was dropped on b's count.
        let told = port(lab, b.port())?;
        ensure!(count(&told, "packets.dropped.output_full")? > 0, "{told}");
        Ok(())
    })
}

#[test]
fn whoever_pauses_goes_on_when_policy_size_or_port_change() -> Result<()> {
    bed(|lab, [a, b, _]| {
        // What is slow is as good as stuck.
        shape(lab, b.port(), "50kbit")?;
        let stuck = || -> Result<()> {
            set(lab, b.port(), "--policy backpressure --ring 2")?;
            // Nothing else was fed lately.
            std::thread::sleep(Duration::from_millis(50));
            until("it stops", SOON, || {
                datagrams(a, b, 5)?;
                let port = port(lab, b.port())?;
                let ring = &port["ring"];
                Ok((count(ring, "stops")? > count(ring, "wakes")?).then_some(()))
            })
        };
        stuck()?;
        set(lab, b.port(), "--policy tail-drop")?;
        ping_ok(a.namespace(), "10.1.1.3")?;
        stuck()?;
        set(lab, b.port(), "--ring 60000")?;
        ping_ok(a.namespace(), "10.1.1.3")?;
        set(lab, b.port(), "--policy tail-drop --ring 1")?;
        ensure!(count(&port(lab, b.port())?["ring"], "size")? == 1);
        stuck()?;
        lab.vsctl(format!("del-port {}", b.port()))?;
        soon("the port goes", || Ok(lab.dp_port(b.port()).is_err()))?;
        ping_ok(a.namespace(), "10.1.1.3")?;
        balanced(lab)?;
        // What can't be, and a port without a ring.
        ensure!(set(lab, "nobody", "--ring 5").is_err());
        ensure!(set(lab, "br0", "--ring 5").is_err_and(|e| e.to_string().contains("no ring")));
        ensure!(set(lab, a.port(), "--ring 0").is_err());
        Ok(())
    })
}

#[test]
fn a_stream_stops_what_feeds_it() -> Result<()> {
    bed(|lab, [a, b, _]| {
        let listener = lab
            .host()
            .inside(|| std::net::TcpListener::bind("127.0.0.1:7000"))??;
        let run_dir = lab.run_dir().display().to_string();
        lab.ovs_dpd(format!(
            "stream add s0 --connect 127.0.0.1:7000 --ring 8 --policy backpressure --run-dir {run_dir}"
        ))?
        .ok()?;
        lab.device("br0", "s0", "")?;
        let (mut peer, _) = listener.accept()?;
        peer.set_read_timeout(Some(SOON))?;
        soon("a peer", || {
            Ok(lab.vsctl("get interface s0 link_state")?.trim() == "up")
        })?;
        let rule = format!(
            "priority=200,udp,tp_dst=9,actions=output:{}",
            lab.ofport("s0")?
        );
        lab.ofctl(["add-flow", "br0", &rule])?;
        lab.appctl("revalidator/wait")?;
        warm_up(lab, a, b)?;
        let before = count(&port(lab, "s0")?, "packets.transmitted")?;
        // Fewer than the ring of a's packet socket holds.
        let total = 1500 + before;
        let received = std::thread::scope(|scope| -> Result<u64> {
            let reading = scope.spawn(move || -> Result<u64> {
                // It begins to read late, when sockets and ring are full.
                std::thread::sleep(Duration::from_millis(500));
                let mut frames = 0;
                while frames < total - before {
                    let mut length = [0; 2];
                    std::io::Read::read_exact(&mut peer, &mut length)?;
                    let mut frame = vec![0; usize::from(u16::from_be_bytes(length))];
                    std::io::Read::read_exact(&mut peer, &mut frame)?;
                    frames += u64::from(frame.len() == PAYLOAD + 42);
                }
                Ok(frames)
            });
            for _ in 0..15 {
                datagrams(a, b, 100)?;
                std::thread::sleep(Duration::from_millis(5));
            }
            reading.join().map_err(|_| anyhow::anyhow!("the reader"))?
        })?;
        ensure!(received >= total - before, "{received} of {total}");
        ensure!(count(&port(lab, a.port())?, "host_queue_full")? == 0);
        let told = at_rest(lab, "s0")?;
        ensure!(count(&told["ring"], "stops")? > 0, "{told}");
        ensure!(count(&told, "packets.dropped.output_full")? == 0, "{told}");
        Ok(())
    })
}
