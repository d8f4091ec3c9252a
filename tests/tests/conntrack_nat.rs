//! Address translation with the real ovs-vswitchd: ranges of addresses and of ports, what happens when
//! they are exhausted, two clients that would be one, a server that is its own client, and IPv6.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::lab::{self, Lab};
use tests::traffic::{ping_ok, tcp, whoami};

/// How long an answer may take where one is expected.
const SOON: Duration = Duration::from_secs(5);
/// How long is waited where none is.
const NEVER: Duration = Duration::from_millis(400);

/// Replaces the bridge's rules.
fn rules(lab: &Lab, rules: &[&str]) -> Result<()> {
    lab.ofctl("del-flows br0")?;
    for rule in rules {
        lab.ofctl(["add-flow", "br0", rule])?;
    }
    Ok(())
}

fn address(text: &str) -> Result<SocketAddr> {
    text.parse().with_context(|| text.to_owned())
}

/// Packets that the datapath dropped in conntrack, for that reason as `status` counts it.
fn refused(lab: &Lab, reason: &str) -> Result<u64> {
    let status = lab.status_json()?;
    status["conntrack"][reason]
        .as_u64()
        .with_context(|| format!("no {reason} in {}", status["conntrack"]))
}

/// Sources of a get the translation `nat` to b, whose answers find their way back.
fn source_rules(lab: &Lab, nat: &str) -> Result<()> {
    let commit = format!("table=0,priority=5,in_port=1,ip,actions=ct(commit,zone=1,nat({nat})),2");
    rules(
        lab,
        &[
            "table=0,priority=10,arp,actions=normal",
            &commit,
            "table=0,priority=5,in_port=2,ip,actions=ct(table=1,zone=1,nat)",
            "table=1,priority=10,ct_state=+trk+est,ip,actions=1",
        ],
    )
}

#[test]
fn clients_are_spread_over_a_range_of_addresses() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        for last in 100..104 {
            b.neighbour(&format!("10.1.1.{last}"), &a)?;
        }
        for last in 11..31 {
            a.address(&format!("10.1.1.{last}/24"))?;
        }
        source_rules(lab, "src=10.1.1.100-10.1.1.103")?;
        let server = address("10.1.1.2:7000")?;
        let _server = whoami::Server::start(b.namespace(), server)?;
        let mut used = BTreeSet::new();
        for last in 11..31 {
            let client = address(&format!("10.1.1.{last}:{}", 5000 + last))?;
            let first = whoami::tcp(a.namespace(), client, server, SOON)?;
            let (_stream, first) = first.with_context(|| format!("{client}: no answer"))?;
            let IpAddr::V4(seen) = first.ip() else {
                anyhow::bail!("{first}");
            };
            ensure!(
                (100..104).contains(&seen.octets()[3]),
                "{client} as {first}"
            );
            ensure!(
                first.port() == client.port(),
                "nobody had that port: {first}"
            );
            // Whoever speaks to a server twice is the same to it.
            let other = address(&format!("10.1.1.{last}:{}", 6000 + last))?;
            let (_, second) = whoami::udp(a.namespace(), other, server, SOON)?;
            let second = second.with_context(|| format!("{other}: no answer"))?;
            ensure!(second.ip() == first.ip(), "{client}: {first} and {second}");
            used.insert(seen);
        }
        ensure!(used.len() > 1, "twenty clients on one address: {used:?}");
        Ok(())
    })
}

#[test]
fn a_range_of_ports_is_used_up_and_no_further() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        b.neighbour("10.1.1.100", &a)?;
        source_rules(lab, "src=10.1.1.100:5000-5003")?;
        let server = address("10.1.1.2:7000")?;
        let _server = whoami::Server::start(b.namespace(), server)?;
        let before = refused(lab, "insert_failed")?;
        let mut seen = BTreeSet::new();
        let mut sockets = Vec::new();
        for port in 6000..6004 {
            let client = address(&format!("10.1.1.1:{port}"))?;
            let (socket, answer) = whoami::udp(a.namespace(), client, server, SOON)?;
            let answer = answer.with_context(|| format!("{client}: no answer"))?;
            ensure!(answer.ip() == "10.1.1.100".parse::<IpAddr>()?, "{answer}");
            seen.insert(answer.port());
            sockets.push((socket, answer));
        }
        ensure!(seen == BTreeSet::from([5000, 5001, 5002, 5003]), "{seen:?}");
        ensure!(
            refused(lab, "insert_failed")? == before,
            "there was a port for each"
        );
        // A fifth finds none: it is dropped, and that is counted, packet by packet.
        let fifth = address("10.1.1.1:6004")?;
        let (socket, answer) = whoami::udp(a.namespace(), fifth, server, NEVER)?;
        ensure!(answer.is_none(), "{answer:?}");
        ensure!(whoami::again(&socket, NEVER)?.is_none());
        let now = refused(lab, "insert_failed")?;
        ensure!(now == before + 2, "{before} {now}");
        // Nobody else has lost his.
        for (socket, answer) in &sockets {
            ensure!(whoami::again(socket, SOON)? == Some(*answer), "{answer}");
        }
        // Other destinations have ports of their own.
        let other = address("10.1.1.2:7001")?;
        let _other = whoami::Server::start(b.namespace(), other)?;
        let client = address("10.1.1.1:6005")?;
        let (_, answer) = whoami::udp(a.namespace(), client, other, SOON)?;
        ensure!(answer.is_some_and(|seen| (5000..=5003).contains(&seen.port())));
        Ok(())
    })
}

/// Two connections that are two only by the address that translation takes away: the second gets another
/// source port, by `nat(src=0.0.0.0)` where the rule doesn't translate the source at all.
#[test]
fn an_all_zero_source_keeps_connections_apart() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        a.neighbour("10.1.1.50", &b)?;
        rules(
            lab,
            &[
                "table=0,priority=30,arp,actions=normal",
                "table=0,priority=20,ip,ct_state=-trk,actions=ct(table=0,zone=1)",
                "table=0,priority=10,ip,ct_state=+trk-rpl,nw_dst=10.1.1.2,actions=ct(commit,zone=1,nat(src=0.0.0.0)),2",
                "table=0,priority=10,ip,ct_state=+trk-rpl,nw_dst=10.1.1.50,actions=ct(commit,zone=1,nat(dst=10.1.1.2)),2",
                "table=0,priority=10,ip,ct_state=+trk+rpl,actions=ct(table=1,zone=1,nat)",
                "table=1,actions=1",
            ],
        )?;
        let server = address("10.1.1.2:7000")?;
        let _server = whoami::Server::start(b.namespace(), server)?;
        let client = address("10.1.1.1:30000")?;
        let by_name = address("10.1.1.50:7000")?;
        let translated = whoami::tcp(a.namespace(), client, by_name, SOON)?;
        let direct = whoami::tcp(a.namespace(), client, server, SOON)?;
        let (_one, translated) = translated.context("no answer by the service's address")?;
        let (_two, direct) = direct.context("no answer by the server's own")?;
        ensure!(
            translated == client,
            "the first one keeps its port: {translated}"
        );
        ensure!(direct.ip() == client.ip(), "the address stays: {direct}");
        ensure!(direct.port() != client.port(), "both are {direct}");
        // The other way round the destination's translation has to make way.
        let client = address("10.1.1.1:30001")?;
        let direct = whoami::tcp(a.namespace(), client, server, SOON)?;
        let translated = whoami::tcp(a.namespace(), client, by_name, SOON)?;
        let (_three, direct) = direct.context("no answer by the server's own")?;
        let (_four, translated) = translated.context("no answer by the service's address")?;
        ensure!(direct == client, "the first one keeps its port: {direct}");
        ensure!(
            translated.ip() == client.ip() && translated != client,
            "both are {direct}"
        );
        Ok(())
    })
}

/// A server asks for the service that it itself provides: there and back through one port.
#[test]
fn a_hairpin_comes_back_to_its_own_port() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        // Neither address is anybody's.
        a.neighbour("10.1.1.50", &b)?;
        a.neighbour("10.1.1.60", &b)?;
        let back = format!(
            "mod_dl_src:{},mod_dl_dst:{},in_port",
            b.mac_text(),
            a.mac_text()
        );
        rules(
            lab,
            &[
                "table=0,priority=10,arp,actions=normal",
                "table=0,priority=9,in_port=1,ip,nw_dst=10.1.1.50,actions=ct(table=1,zone=1,nat)",
                "table=0,priority=9,in_port=1,ip,nw_dst=10.1.1.60,actions=ct(table=3,zone=2,nat)",
                // There: the destination first, then the source.
                "table=1,priority=9,ct_state=+new,ip,actions=ct(commit,table=2,zone=1,nat(dst=10.1.1.1))",
                "table=1,priority=8,ct_state=+est,ip,actions=resubmit(,2)",
                &format!(
                    "table=2,ip,nw_src=10.1.1.1,nw_dst=10.1.1.1,actions=ct(commit,zone=2,nat(src=10.1.1.60)),{back}"
                ),
                // Back: the source's translation is undone first.
                "table=3,ct_state=+est+rpl,ip,actions=ct(table=4,zone=1,nat)",
                &format!("table=4,ct_state=+est+rpl,ip,actions={back}"),
            ],
        )?;
        let server = address("10.1.1.1:7000")?;
        let _server = whoami::Server::start(a.namespace(), server)?;
        let service = address("10.1.1.50:7000")?;
        let masquerade: IpAddr = "10.1.1.60".parse()?;
        for port in [40_000, 40_001] {
            let client = address(&format!("10.1.1.1:{port}"))?;
            let asked = whoami::tcp(a.namespace(), client, service, SOON)?;
            let (_stream, seen) = asked.context("TCP: no answer")?;
            ensure!(seen == address(&format!("10.1.1.60:{port}"))?, "{seen}");
            let (_, seen) = whoami::udp(a.namespace(), client, service, SOON)?;
            ensure!(
                seen.is_some_and(|seen| seen.ip() == masquerade),
                "UDP: {seen:?}"
            );
        }
        drop(_server);
        tcp::echo_at(a.namespace(), a.namespace(), service, server, 4 << 20)
    })
}

/// IPv6: a source in a range, a destination, ping, and an error about a translated datagram.
#[test]
fn ipv6_is_translated_as_ipv4_is() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let b = lab.endpoint("b")?;
        a.address("fd00::1/64")?;
        b.address("fd00::2/64")?;
        lab.port("br0", &a, "")?;
        lab.port("br0", &b, "")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        for last in ["f0", "f1", "f2", "f3"] {
            b.neighbour(&format!("fd00::{last}"), &a)?;
        }
        a.neighbour("fd00::50", &b)?;
        a.neighbour("fd00::2", &b)?;
        rules(
            lab,
            &[
                "table=0,priority=10,icmp6,icmp_type=135,actions=normal",
                "table=0,priority=10,icmp6,icmp_type=136,actions=normal",
                "table=0,priority=6,in_port=1,ipv6,ipv6_dst=fd00::50,actions=ct(commit,table=1,zone=2,nat(dst=fd00::2))",
                "table=0,priority=5,in_port=1,ipv6,actions=resubmit(,1)",
                "table=0,priority=5,in_port=2,ipv6,actions=ct(table=2,zone=1,nat)",
                "table=1,ipv6,actions=ct(commit,zone=1,nat(src=fd00::f0-fd00::f3)),2",
                "table=2,ct_state=+trk+est,ipv6,actions=ct(table=3,zone=2,nat)",
                "table=2,ct_state=+trk+rel,ipv6,actions=ct(table=3,zone=2,nat)",
                "table=3,ipv6,actions=1",
            ],
        )?;
        ping_ok(a.namespace(), "fd00::2")?;
        ping_ok(a.namespace(), "fd00::50")?;
        let server = address("[fd00::2]:7000")?;
        {
            let _server = whoami::Server::start(b.namespace(), server)?;
            let client = address("[fd00::1]:5000")?;
            for to in [server, address("[fd00::50]:7000")?] {
                let (_, seen) = whoami::udp(a.namespace(), client, to, SOON)?;
                let seen = seen.with_context(|| format!("{to}: no answer"))?;
                ensure!(seen.ip().to_string().starts_with("fd00::f"), "{to}: {seen}");
            }
        }
        tcp::echo_at(
            a.namespace(),
            b.namespace(),
            address("[fd00::50]:7000")?,
            server,
            4 << 20,
        )?;
        // Nobody listens any more: the error says what a sent.
        let client = address("[fd00::1]:5009")?;
        for to in ["[fd00::2]:7999", "[fd00::50]:7999"] {
            let asked = whoami::udp(a.namespace(), client, address(to)?, SOON);
            let said = format!(
                "{:?}",
                asked.err().with_context(|| format!("{to} answered"))?
            );
            ensure!(said.contains("refused"), "{to}: {said}");
        }
        Ok(())
    })
}

/// ICMP errors of a router behind the translation: "fragmentation needed" reaches the client, about the
/// packet that it sent, and TCP gets smaller by it.
#[test]
fn path_mtu_discovery_passes_a_translation() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        b.neighbour("10.1.1.100", &a)?;
        source_rules(lab, "src=10.1.1.100")?;
        lab.ofctl([
            "add-flow",
            "br0",
            "table=1,priority=10,ct_state=+trk+rel,ip,actions=1",
        ])?;
        // Behind b a network with a small MTU, whose other end is a server.
        a.namespace().ip("route add 192.0.2.0/24 via 10.1.1.2")?;
        let c = lab.endpoint("c")?;
        let host = lab.host();
        host.ip(["link", "set", c.port(), "netns", b.namespace().name()])?;
        b.namespace()
            .ip(["addr", "add", "192.0.2.1/24", "dev", c.port()])?;
        b.namespace()
            .ip(["link", "set", c.port(), "mtu", "1200", "up"])?;
        b.namespace().exec("sysctl -q -w net.ipv4.ip_forward=1")?;
        c.address("192.0.2.2/24")?;
        c.namespace().ip("route add default via 192.0.2.1")?;
        tcp::echo(
            a.namespace(),
            c.namespace(),
            address("192.0.2.2:7000")?,
            1 << 20,
        )?;
        let route = a.namespace().ip("route get 192.0.2.2")?;
        ensure!(
            route.contains("mtu 1200"),
            "a hasn't learnt of the MTU: {route}"
        );
        Ok(())
    })
}
