//! Tunnels between two daemons, each with its own ovs-vswitchd, in namespaces joined by a cable; and with
//! other peers.

use anyhow::{Result, ensure};
use tests::Lab;
use tests::lab;
use tests::traffic::iperf::iperf3;
use tests::traffic::ping_ok;

/// The ends of the cable between the two hosts.
const LEFT: &str = "172.31.0.1";
const RIGHT: &str = "172.31.0.2";
const LEFT6: &str = "fd31::1";
const RIGHT6: &str = "fd31::2";

/// Two laboratories whose hosts are joined by a veth pair `t-under`, with addresses of both families.
fn two(work: impl FnOnce(&Lab, &Lab) -> Result<()>) -> Result<()> {
    lab::test_ovs_dpd(|left| {
        lab::test_ovs_dpd(|right| {
            let cable = format!(
                "link add t-under type veth peer name t-under netns {}",
                right.host().name()
            );
            left.host().ip(cable.as_str())?;
            for (lab, v4, v6) in [(left, LEFT, LEFT6), (right, RIGHT, RIGHT6)] {
                underlay(lab, v4, v6)?;
            }
            work(left, right)
        })
    })
}

fn underlay(lab: &Lab, v4: &str, v6: &str) -> Result<()> {
    let host = lab.host();
    host.inside(|| std::fs::write("/proc/sys/net/ipv6/conf/t-under/disable_ipv6", "0"))??;
    for words in [
        format!("addr add {v4}/24 dev t-under"),
        format!("addr add {v6}/64 dev t-under nodad"),
        "link set t-under up".to_owned(),
    ] {
        host.ip(words.as_str())?;
    }
    Ok(())
}

/// Adds a tunnel port to `br0`.
fn tunnel(lab: &Lab, kind: &str, remote: &str, options: &str) -> Result<()> {
    lab.vsctl(format!(
        "add-port br0 tun0 -- set interface tun0 type={kind} options:remote_ip={remote} {options}"
    ))?;
    lab.port_works("tun0")
}

/// A tunnel of a kind on both sides, `br0` and an endpoint on each; then `work` with both endpoints.
fn between(
    kind: &str,
    options: &str,
    v6: bool,
    work: impl FnOnce(&Lab, &Lab, &tests::Endpoint, &tests::Endpoint) -> Result<()>,
) -> Result<()> {
    two(|left, right| {
        let (l, r) = if v6 { (LEFT6, RIGHT6) } else { (LEFT, RIGHT) };
        let mut ends = Vec::new();
        for (lab, remote, label, address) in [
            (left, r, "a", "10.9.0.1/24"),
            (right, l, "b", "10.9.0.2/24"),
        ] {
            lab.bridge("br0")?;
            tunnel(lab, kind, remote, options)?;
            ends.push(lab.host_on("br0", label, address)?);
        }
        // Laboratories count addresses each from the beginning.
        let mac = "link set eth0 address 02:00:00:00:02:02";
        ends[1].namespace().ip(mac)?;

        work(left, right, &ends[0], &ends[1])
    })
}

fn both_ways(a: &tests::Endpoint, b: &tests::Endpoint) -> Result<()> {
    ping_ok(a.namespace(), "10.9.0.2")?;
    ping_ok(b.namespace(), "10.9.0.1")
}

#[test]
fn geneve_carries_pings() -> Result<()> {
    between("geneve", "options:key=7", false, |_, _, a, b| {
        both_ways(a, b)
    })
}

#[test]
fn geneve_carries_tcp_over_default_mtus() -> Result<()> {
    between("geneve", "options:key=7", false, |left, _, a, b| {
        ping_ok(a.namespace(), "10.9.0.2")?;
        let through = iperf3(left, a.namespace(), b.namespace(), "10.9.0.2", 3, "")?;
        eprintln!("geneve: {:.0} Mbit/s", through.bits_per_second / 1e6);
        ensure!(through.bits_per_second > 20e6, "{through:?}");
        Ok(())
    })
}
