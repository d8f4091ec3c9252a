//! IP over a bridge: ARP, neighbour discovery, jumbo frames, fragments, and TCP with the
//! offloads that devices have by default.

use anyhow::{Result, ensure};
use tests::lab;
use tests::traffic::{iperf3, ping, ping_ok, tcp};

#[test]
fn arp_resolves_and_is_matched_by_its_fields() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        lab.ofctl("del-flows br0")?;
        for rule in [
            "arp,arp_tpa=10.1.1.2,arp_op=1",
            "arp,arp_spa=10.1.1.2,arp_op=2",
            "icmp",
        ] {
            lab.ofctl(["add-flow", "br0", &format!("{rule},actions=normal")])?;
        }
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        let neighbours = a.namespace().ip("neigh show 10.1.1.2")?;
        ensure!(neighbours.contains(&b.mac_text()), "{neighbours}");
        let flows = lab.dp_flows()?;
        ensure!(
            flows
                .iter()
                .any(|f| f.contains("arp(") && f.contains("tip=10.1.1.2")),
            "{flows:#?}"
        );
        // Nobody answers for an address that the rules don't let through.
        b.address("10.1.1.3/24")?;
        ensure!(ping(a.namespace(), "10.1.1.3", 1, "-W 0.3")?.received == 0);
        Ok(())
    })
}

#[test]
fn ipv6_finds_its_neighbour_and_nd_is_matched_by_its_fields() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        lab.ofctl("del-flows br0")?;
        for rule in [
            "icmp6,icmp_type=135,nd_target=fd00::2",
            "icmp6,icmp_type=136,nd_target=fd00::2",
            "icmp6,icmp_type=135,nd_target=fd00::1",
            "icmp6,icmp_type=136,nd_target=fd00::1",
            "icmp6,icmp_type=128",
            "icmp6,icmp_type=129",
            "tcp6",
        ] {
            lab.ofctl(["add-flow", "br0", &format!("{rule},actions=normal")])?;
        }
        let a = lab.host_on("br0", "a", "fd00::1/64")?;
        let b = lab.host_on("br0", "b", "fd00::2/64")?;
        ping_ok(a.namespace(), "fd00::2")?;
        let neighbours = a.namespace().ip("-6 neigh show fd00::2")?;
        ensure!(neighbours.contains(&b.mac_text()), "{neighbours}");
        // The rules for solicitations and advertisements were needed: neither end knew.
        let rules = lab.ofctl("dump-flows br0")?;
        let used = |l: &&str| l.contains("nd_target") && !l.contains("n_packets=0,");
        ensure!(rules.lines().filter(used).count() >= 2, "{rules}");
        b.address("fd00::3/64")?;
        ensure!(ping(a.namespace(), "fd00::3", 1, "-W 0.3")?.received == 0);
        tcp::echo(
            a.namespace(),
            b.namespace(),
            "[fd00::2]:7000".parse()?,
            4 << 20,
        )
    })
}

#[test]
fn jumbo_frames_pass_whole() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let b = lab.endpoint("b")?;
        for (end, address) in [(&a, "10.1.1.1/24"), (&b, "10.1.1.2/24")] {
            end.namespace().ip("link set eth0 mtu 9000")?;
            lab.host().ip(["link", "set", end.port(), "mtu", "9000"])?;
            end.address(address)?;
            lab.port("br0", end, "")?;
        }
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        lab.vsctl("set interface int0 mtu_request=9000")?;
        for to in ["10.1.1.2", "10.1.1.254"] {
            ping_ok(a.namespace(), to)?;
            let whole = ping(a.namespace(), to, 5, "-M do -s 8972")?;
            ensure!(whole.received == 5, "9000 bytes to {to}: {whole:?}");
        }
        tcp::echo(
            a.namespace(),
            b.namespace(),
            "10.1.1.2:7000".parse()?,
            4 << 20,
        )?;
        tcp::echo(
            a.namespace(),
            lab.host(),
            "10.1.1.254:7000".parse()?,
            4 << 20,
        )
    })
}

#[test]
fn fragments_of_a_large_datagram_pass() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        a.address("fd00::1/64")?;
        b.address("fd00::2/64")?;
        for to in ["10.1.1.2", "fd00::2"] {
            ping_ok(a.namespace(), to)?;
            let large = ping(a.namespace(), to, 5, "-s 20000")?;
            ensure!(large.received == 5, "20000 bytes to {to}: {large:?}");
        }
        let flows = lab.dp_flows()?;
        ensure!(flows.iter().any(|f| f.contains("frag=later")), "{flows:#?}");
        Ok(())
    })
}

#[test]
fn tcp_passes_between_endpoints_and_the_host_with_default_offloads() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        let (an, bn, host) = (a.namespace(), b.namespace(), lab.host());
        tcp::echo(an, bn, "10.1.1.2:7000".parse()?, 8 << 20)?;
        tcp::echo(bn, an, "10.1.1.1:7000".parse()?, 8 << 20)?;
        tcp::echo(an, host, "10.1.1.254:7000".parse()?, 8 << 20)?;
        tcp::echo(host, an, "10.1.1.1:7000".parse()?, 8 << 20)
    })
}

#[test]
fn tcp_passes_to_an_endpoint_that_can_do_no_offload() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        // The veth's end on the bridge can't send what isn't complete: it must be finished first.
        let off = "tx off sg off tso off gso off gro off";
        lab.host().exec(format!("ethtool -K {} {off}", b.port()))?;
        b.namespace()
            .exec(format!("ethtool -K eth0 {off} rx off"))?;
        tcp::echo(
            a.namespace(),
            b.namespace(),
            "10.1.1.2:7000".parse()?,
            4 << 20,
        )?;
        tcp::echo(
            b.namespace(),
            a.namespace(),
            "10.1.1.1:7000".parse()?,
            4 << 20,
        )
    })
}

#[test]
fn iperf3_runs_in_both_directions() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        for options in ["", "-R", "-P 4", "-u -b 50M -l 1400"] {
            let run = iperf3(lab, a.namespace(), b.namespace(), "10.1.1.2", 1, options)?;
            ensure!(run.bits_per_second > 10e6, "iperf3 {options}: {run:?}");
        }
        Ok(())
    })
}
