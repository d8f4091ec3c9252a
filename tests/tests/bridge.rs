//! Bridges: ports, learning, flooding, ports that come and go under traffic.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::Lab;
use tests::lab;
use tests::traffic::raw::{Wire, ethernet};
use tests::traffic::udp::Stream;
use tests::traffic::{ping, ping_ok};

/// Long enough for a frame that should not come to come.
const QUIET: Duration = Duration::from_millis(300);
const SOON: Duration = Duration::from_secs(5);
const EXPERIMENTAL: u16 = 0x88b5;

fn has_type(frame: &[u8], ethertype: u16) -> bool {
    frame.get(12..14) == Some(&ethertype.to_be_bytes())
}

#[test]
fn a_bridge_with_one_port_answers_on_its_internal_port() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        ping_ok(a.namespace(), "10.1.1.254")?;
        ping_ok(lab.host(), "10.1.1.1")
    })
}

#[test]
fn two_ports_ping_each_other() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        ping_ok(b.namespace(), "10.1.1.1")
    })
}

#[test]
fn fifty_ports_all_reach_each_other() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let ends: Vec<_> = (1..=50)
            .map(|n| lab.endpoint(&format!("e{n}")))
            .collect::<Result<_>>()?;
        let add: Vec<_> = ends
            .iter()
            .map(|e| format!("add-port br0 {}", e.port()))
            .collect();
        lab.vsctl(add.join(" -- "))?;
        let wires: Vec<_> = ends.iter().map(|e| Wire::open(e)).collect::<Result<_>>()?;
        // A broadcast of each, which teaches the bridge where it is, reaches each of the others.
        for (i, (end, wire)) in ends.iter().zip(&wires).enumerate() {
            lab.port_works(end.port())?;
            wire.send(&ethernet(end.mac(), [0xff; 6], EXPERIMENTAL, &[i as u8]))?;
            for (j, other) in wires.iter().enumerate().filter(|(j, _)| *j != i) {
                other.expect(&format!("broadcast of {i} at {j}"), SOON, |f| {
                    (has_type(f, EXPERIMENTAL) && f[14] == i as u8).then_some(())
                })?;
            }
        }
        // Then a frame to a neighbour reaches it and nobody else.
        for i in 0..50 {
            let j = (i + 1) % 50;
            wires[i].send(&ethernet(
                ends[i].mac(),
                ends[j].mac(),
                EXPERIMENTAL,
                &[i as u8],
            ))?;
        }
        for (j, wire) in wires.iter().enumerate() {
            let i = (j + 49) % 50;
            wire.expect(&format!("frame of {i} at {j}"), SOON, |f| {
                (has_type(f, EXPERIMENTAL) && f[..6] == ends[j].mac()).then_some(())
            })?;
        }
        for (j, wire) in wires.iter().enumerate() {
            let late = wire.capture_for(Duration::from_millis(10))?;
            ensure!(
                late.iter().all(|f| !has_type(f, EXPERIMENTAL)),
                "{j} got {late:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn an_unknown_address_floods_and_a_learned_one_does_not() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let ends = ["a", "b", "c"].map(|n| lab.endpoint(n));
        let [a, b, c] = ends.map(|e| e.and_then(|e| lab.port("br0", &e, "").map(|()| e)));
        let (a, b, c) = (a?, b?, c?);
        let (wa, wb, wc) = (Wire::open(&a)?, Wire::open(&b)?, Wire::open(&c)?);

        wa.send(&ethernet(a.mac(), b.mac(), EXPERIMENTAL, &[1]))?;
        for (name, wire) in [("b", &wb), ("c", &wc)] {
            wire.expect(&format!("flooded to {name}"), SOON, |f| {
                (has_type(f, EXPERIMENTAL) && f[14] == 1).then_some(())
            })?;
        }
        wb.send(&ethernet(b.mac(), a.mac(), EXPERIMENTAL, &[2]))?;
        wa.expect("the answer", SOON, |f| {
            (has_type(f, EXPERIMENTAL) && f[14] == 2).then_some(())
        })?;
        let table = lab.appctl("fdb/show br0")?;
        for end in [&a, &b] {
            ensure!(
                table.contains(&end.mac_text()),
                "{} not learned:\n{table}",
                end.port()
            );
        }
        // The flood's megaflow is revalidated once the address is learned.
        lab.appctl("revalidator/wait")?;
        wa.send(&ethernet(a.mac(), b.mac(), EXPERIMENTAL, &[3]))?;
        wb.expect("to b alone", SOON, |f| {
            (has_type(f, EXPERIMENTAL) && f[14] == 3).then_some(())
        })?;
        let others = wc.capture_for(QUIET)?;
        ensure!(
            others.iter().all(|f| !has_type(f, EXPERIMENTAL)),
            "c got what was for a or b: {others:?}"
        );
        Ok(())
    })
}

#[test]
fn multicast_and_broadcast_reach_every_port_once() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let c = lab.host_on("br0", "c", "10.1.1.3/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        let wa = Wire::open(&a)?;
        let others = [
            Wire::open(&b)?,
            Wire::open(&c)?,
            Wire::on(lab.host(), "int0")?,
        ];
        for (number, destination) in [[0xff; 6], [1, 0, 0x5e, 1, 2, 3], [0x33, 0x33, 0, 0, 0, 5]]
            .iter()
            .enumerate()
        {
            for count in 0..3_u8 {
                wa.send(&ethernet(
                    a.mac(),
                    *destination,
                    EXPERIMENTAL,
                    &[number as u8, count],
                ))?;
            }
            for wire in &others {
                // In any order: the first may pass ovs-vswitchd while the last finds the flow.
                let mut seen = [false; 3];
                wire.expect(&format!("three frames to {destination:x?}"), SOON, |f| {
                    if has_type(f, EXPERIMENTAL) && f[14] == number as u8 {
                        seen[usize::from(f[15] % 3)] = true;
                    }
                    (seen == [true; 3]).then_some(())
                })?;
            }
        }
        for wire in others.iter().chain([&wa]) {
            let again = wire.capture_for(QUIET)?;
            ensure!(
                again.iter().all(|f| !has_type(f, EXPERIMENTAL)),
                "twice: {again:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_snooped_group_reaches_only_its_members() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        lab.vsctl("set bridge br0 mcast_snooping_enable=true other_config:mcast-snooping-disable-flood-unregistered=true")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let c = lab.host_on("br0", "c", "10.1.1.3/24")?;
        let (wa, wb, wc) = (Wire::open(&a)?, Wire::open(&b)?, Wire::open(&c)?);
        // An IGMPv2 report for 239.1.2.3 from b.
        let mut report = vec![0x16, 0, 0, 0, 239, 1, 2, 3];
        let sum = etherparse::checksum::Sum16BitWords::new()
            .add_slice(&report)
            .ones_complement();
        report[2..4].copy_from_slice(&sum.to_ne_bytes());
        let ip = etherparse::PacketBuilder::ethernet2(b.mac(), [1, 0, 0x5e, 1, 2, 3]).ipv4(
            [10, 1, 1, 2],
            [239, 1, 2, 3],
            1,
        );
        let mut frame = Vec::new();
        ip.write(&mut frame, etherparse::IpNumber::IGMP, &report)?;
        frame.resize(60, 0);
        wb.send(&frame)?;
        tests::wait::soon("the group being learned", || {
            Ok(lab.appctl("mdb/show br0")?.contains("239.1.2.3"))
        })?;
        let datagram = tests::traffic::raw::udp4(
            (a.mac(), [10, 1, 1, 1], 1000),
            ([1, 0, 0x5e, 1, 2, 3], [239, 1, 2, 3], 2000),
            b"to the group",
        )?;
        wa.send(&datagram)?;
        wb.expect("the datagram", SOON, |f| (f == datagram).then_some(()))?;
        let others = wc.capture_for(QUIET)?;
        ensure!(others.iter().all(|f| *f != datagram), "c is no member");
        Ok(())
    })
}

#[test]
fn ports_come_and_go_under_traffic() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let (a, b) = steady_pair(lab)?;
        let c = lab.endpoint("c")?;
        c.address("10.1.1.3/24")?;
        let stream = Stream::start(a.namespace(), b.namespace(), "10.1.1.2:7000".parse()?, 1000)?;
        stream.wait_more(100)?;
        for _ in 0..10 {
            lab.port("br0", &c, "")?;
            ping_ok(c.namespace(), "10.1.1.1")?;
            lab.vsctl(["del-port", "br0", c.port()])?;
            let gone = ping(c.namespace(), "10.1.1.1", 2, "-W 0.2")?;
            ensure!(
                gone.received == 0,
                "a port that was deleted forwards: {gone:?}"
            );
        }
        let counts = stream.stop()?;
        ensure!(counts.sent > 1000 && counts.lost() == 0, "{counts:?}");
        Ok(())
    })
}

#[test]
fn a_port_deleted_while_its_traffic_runs_takes_nothing_with_it() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let (a, b) = steady_pair(lab)?;
        let to: std::net::SocketAddr = "10.1.1.2:7000".parse()?;
        for round in 0..5 {
            let stream = Stream::start(a.namespace(), b.namespace(), to, 5000)?;
            stream.wait_more(100)?;
            lab.vsctl(["del-port", "br0", b.port()])?;
            let before = stream.so_far().received;
            lab.port("br0", &b, "")?;
            stream.wait_more(100)?;
            let counts = stream.stop()?;
            ensure!(counts.received > before, "round {round}: {counts:?}");
        }
        ping_ok(a.namespace(), "10.1.1.2")
    })
}

#[test]
fn a_deleted_bridge_forwards_nothing_and_takes_its_devices_along() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let _b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        lab.vsctl("del-br br0")?;
        let gone = ping(a.namespace(), "10.1.1.2", 2, "-W 0.3")?;
        ensure!(gone.received == 0, "{gone:?}");
        let links = lab.host().links()?;
        ensure!(
            !links.iter().any(|l| l == "br0" || l == "int0"),
            "left: {links:?}"
        );
        ensure!(
            links.iter().any(|l| l == a.port()),
            "a system device must stay: {links:?}"
        );
        // And the devices are free for another.
        lab.bridge("br1")?;
        lab.port("br1", &a, "")?;
        lab.internal("br1", "int1", "10.1.1.253/24")?;
        ping_ok(a.namespace(), "10.1.1.253")
    })
}

/// Two endpoints on br0 that know each other's address, so that nothing but their traffic passes.
fn steady_pair(
    lab: &Lab,
) -> Result<(
    std::sync::Arc<tests::Endpoint>,
    std::sync::Arc<tests::Endpoint>,
)> {
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
    a.neighbour("10.1.1.2", &b)?;
    b.neighbour("10.1.1.1", &a)?;
    ping_ok(a.namespace(), "10.1.1.2")?;
    Ok((a, b))
}
