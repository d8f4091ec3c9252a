//! Tunnels between two daemons, each with its own ovs-vswitchd, in namespaces joined by a cable; and with
//! other peers.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::lab;
use tests::replay::laboratory;
use tests::replay::packets::attribute;
use tests::replay::session::{errno, request};
use tests::replay::translate::family;
use tests::traffic::iperf::iperf3;
use tests::traffic::{ping, ping_ok};
use tests::{Lab, Switch};

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

/// Made as over the module, and gone with the port: no device, no link, no complaint (which the end of
/// every test looks for).
#[test]
fn vxlan_carries_pings_and_goes_without_a_trace() -> Result<()> {
    between("vxlan", "options:key=7", false, |left, right, a, b| {
        both_ways(a, b)?;
        ensure!(left.host().ip("-o link")?.find("vxlan_sys").is_none());
        let shown = left.dpctl("show")?;
        ensure!(shown.contains("vxlan_sys_4789 (vxlan"), "{shown}");
        for lab in [left, right] {
            lab.expect_log(
                "receive tunnel port not found",
                "a revalidator looks at flows of a port that went a moment ago, over the module too",
            );
            lab.vsctl("del-port tun0")?;
        }
        let shown = left.dpctl("show")?;
        ensure!(!shown.contains("vxlan_sys_4789"), "{shown}");
        ensure!(ping(a.namespace(), "10.9.0.2", 1, "-W 1")?.received == 0);
        // And it comes again.
        tunnel(left, "vxlan", RIGHT, "options:key=7")?;
        tunnel(right, "vxlan", LEFT, "options:key=7")?;
        both_ways(a, b)
    })
}

#[test]
fn gre_carries_pings() -> Result<()> {
    between("gre", "options:key=7", false, |_, _, a, b| both_ways(a, b))
}

#[test]
fn gre_with_checksums_carries_pings() -> Result<()> {
    between(
        "gre",
        "options:key=7 options:csum=true",
        false,
        |_, _, a, b| both_ways(a, b),
    )
}

#[test]
fn vxlan_over_ipv6_carries_pings() -> Result<()> {
    between("vxlan", "options:key=7", true, |_, _, a, b| both_ways(a, b))
}

#[test]
fn geneve_over_ipv6_with_checksums_carries_pings() -> Result<()> {
    between(
        "geneve",
        "options:key=7 options:csum=true",
        true,
        |_, _, a, b| both_ways(a, b),
    )
}

#[test]
fn gre_over_ipv6_carries_pings() -> Result<()> {
    between("ip6gre", "options:key=7", true, |_, _, a, b| {
        both_ways(a, b)
    })
}

#[test]
fn erspan_of_both_versions_carries_pings() -> Result<()> {
    for options in [
        "options:key=7 options:erspan_ver=1 options:erspan_idx=3",
        "options:key=7 options:erspan_ver=2 options:erspan_dir=1 options:erspan_hwid=4",
    ] {
        between("erspan", options, false, |_, _, a, b| both_ways(a, b))?;
    }
    Ok(())
}

#[test]
fn erspan_over_ipv6_carries_pings() -> Result<()> {
    let options = "options:key=7 options:erspan_ver=1 options:erspan_idx=3";
    between("ip6erspan", options, true, |_, _, a, b| both_ways(a, b))
}

/// Two kinds over GRE side by side: each gets its own.
#[test]
fn gre_and_erspan_share_a_protocol() -> Result<()> {
    between("gre", "options:key=7", false, |left, right, a, b| {
        for (lab, remote) in [(left, RIGHT), (right, LEFT)] {
            lab.vsctl(format!(
                "add-port br0 tun1 -- set interface tun1 type=erspan options:remote_ip={remote} \
                 options:key=9 options:erspan_ver=1 options:erspan_idx=3"
            ))?;
            lab.port_works("tun1")?;
            lab.ofctl("add-flow br0 in_port=tun1,actions=drop")?;
        }
        both_ways(a, b)?;
        let dropped = |lab: &Lab| -> Result<bool> { Ok(lab.status()?.contains("tunnel_header")) };
        ensure!(!dropped(left)? && !dropped(right)?);
        Ok(())
    })
}

/// TCP over default MTUs: the first segments are too long for the tunnel, and their sender is told.
fn tcp(kind: &str, options: &str, v6: bool) -> Result<()> {
    between(kind, options, v6, |left, _, a, b| {
        ping_ok(a.namespace(), "10.9.0.2")?;
        let through = iperf3(left, a.namespace(), b.namespace(), "10.9.0.2", 3, "")?;
        let megabits = through.bits_per_second / 1e6;
        eprintln!(
            "{kind} {options}: {megabits:.0} Mbit/s, {} sent again",
            through.retransmits
        );
        ensure!(megabits > 20.0, "{through:?}");
        Ok(())
    })
}

#[test]
fn geneve_carries_tcp_over_default_mtus() -> Result<()> {
    tcp("geneve", "options:key=7", false)
}

#[test]
fn vxlan_carries_tcp_over_default_mtus() -> Result<()> {
    tcp("vxlan", "options:key=7", false)
}

#[test]
fn vxlan_with_checksums_carries_tcp_over_default_mtus() -> Result<()> {
    tcp("vxlan", "options:key=7 options:csum=true", false)
}

/// The kernel takes no datagrams together for a device that can't make checksums (nor under IPsec): they go
/// one by one.
#[test]
fn checksums_that_the_wire_cannot_make_are_made_before() -> Result<()> {
    between(
        "vxlan",
        "options:key=7 options:csum=true",
        false,
        |left, right, a, b| {
            for lab in [left, right] {
                lab.host().exec("ethtool -K t-under tx off")?;
            }
            ping_ok(a.namespace(), "10.9.0.2")?;
            let through = iperf3(left, a.namespace(), b.namespace(), "10.9.0.2", 2, "")?;
            ensure!(through.bits_per_second > 20e6, "{through:?}");
            let status = left.status()?;
            ensure!(!status.contains("output_error"), "{status}");
            Ok(())
        },
    )
}

/// Loss on the wire is TCP's to make good, and costs nobody else.
#[test]
fn loss_on_the_wire_is_made_good() -> Result<()> {
    between(
        "geneve",
        "options:key=7 options:csum=true",
        false,
        |left, right, a, b| {
            both_ways(a, b)?;
            // One datagram in a hundred, on its way in.
            for lab in [left, right] {
                let rules = "add table ip t; add chain ip t c { type filter hook output priority 0; }; add rule ip t c udp dport 6081 numgen random mod 100 < 1 drop";
                lab.host().exec(["nft", rules])?;
            }
            let through = iperf3(left, a.namespace(), b.namespace(), "10.9.0.2", 2, "")?;
            ensure!(through.bits_per_second > 5e6, "{through:?}");
            for lab in [left, right] {
                lab.host().exec("nft delete table ip t")?;
            }
            both_ways(a, b)
        },
    )
}

#[test]
fn vxlan_over_ipv6_carries_tcp_over_default_mtus() -> Result<()> {
    tcp("vxlan", "options:key=7 options:csum=true", true)
}

#[test]
fn gre_carries_tcp_over_default_mtus() -> Result<()> {
    tcp("gre", "options:key=7", false)
}

/// What may be cut is cut by the kernel below, and put together by the one at the other end.
#[test]
fn packets_longer_than_the_wire_go_in_fragments() -> Result<()> {
    between(
        "vxlan",
        "options:key=7 options:df_default=false",
        false,
        |left, right, a, b| {
            ping_ok(a.namespace(), "10.9.0.2")?;
            for (lab, end) in [(left, a), (right, b)] {
                end.namespace().ip("link set eth0 mtu 4000")?;
                lab.host().ip(["link", "set", end.port(), "mtu", "4000"])?;
            }
            let long = ping(a.namespace(), "10.9.0.2", 3, "-s 3000 -M dont")?;
            ensure!(long.received == 3, "{long:?}");
            Ok(())
        },
    )
}

/// The kernel's own device at the other end, in a namespace of its own: unfinished checksums and
/// unsegmented TCP come over the wire in its packets.
#[test]
fn the_kernels_vxlan_device_is_a_peer() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let peer = tests::Namespace::new("peer")?;
        let cable = format!(
            "link add t-under type veth peer name under netns {}",
            peer.name()
        );
        lab.host().ip(cable.as_str())?;
        underlay(lab, LEFT, LEFT6)?;
        for words in [
            format!("addr add {RIGHT}/24 dev under"),
            "link set under up".to_owned(),
            format!("link add vx0 type vxlan id 7 remote {LEFT} dstport 4789"),
            "addr add 10.9.0.2/24 dev vx0".to_owned(),
            "link set vx0 up".to_owned(),
        ] {
            peer.ip(words.as_str())?;
        }
        lab.bridge("br0")?;
        tunnel(lab, "vxlan", RIGHT, "options:key=7")?;
        let a = lab.host_on("br0", "a", "10.9.0.1/24")?;
        ping_ok(a.namespace(), "10.9.0.2")?;
        ping_ok(&peer, "10.9.0.1")?;
        for (from, to, address) in [
            (a.namespace(), &peer, "10.9.0.2"),
            (&peer, a.namespace(), "10.9.0.1"),
        ] {
            let through = iperf3(lab, from, to, address, 2, "")?;
            let megabits = through.bits_per_second / 1e6;
            eprintln!("kernel's vxlan, to {address}: {megabits:.0} Mbit/s");
            ensure!(megabits > 20.0, "{through:?}");
        }
        Ok(())
    })
}

/// Open vSwitch's own datapath in user space at the other end, with its native tunnels.
#[test]
fn open_vswitch_in_user_space_is_a_peer() -> Result<()> {
    for (kind, options) in [
        ("geneve", "options:key=7"),
        ("geneve", "options:key=7 options:csum=true"),
        ("gre", "options:key=7"),
        ("gre", "options:key=7 options:csum=true"),
        (
            "erspan",
            "options:key=7 options:erspan_ver=2 options:erspan_dir=1 options:erspan_hwid=4",
        ),
        ("vxlan", "options:key=7"),
    ] {
        with_netdev(kind, options).with_context(|| format!("{kind} {options}"))?;
    }
    Ok(())
}

fn with_netdev(kind: &str, options: &str) -> Result<()> {
    lab::test_ovs_dpd(|left| {
        lab::test_over(Switch::Netdev, |right| {
            let cable = format!(
                "link add t-under type veth peer name t-under netns {}",
                right.host().name()
            );
            left.host().ip(cable.as_str())?;
            underlay(left, LEFT, LEFT6)?;
            // It sends its checksums half done over a veth, and takes none that are.
            left.host().exec("ethtool -K t-under tx off")?;
            right.host().ip("link set t-under up")?;
            right.host().exec("ethtool -K t-under tx off")?;
            right.bridge("br-under")?;
            right.device("br-under", "t-under", "")?;
            right.vsctl([
                "set",
                "bridge",
                "br-under",
                "other_config:hwaddr=02:00:00:31:00:02",
            ])?;
            right
                .host()
                .ip(format!("addr add {RIGHT}/24 dev br-under").as_str())?;
            right.host().ip("link set br-under up")?;
            left.bridge("br0")?;
            right.bridge("br0")?;
            tunnel(left, kind, RIGHT, options)?;
            tunnel(right, kind, LEFT, options)?;
            let a = left.host_on("br0", "a", "10.9.0.1/24")?;
            let b = right.host_on("br0", "b", "10.9.0.2/24")?;
            b.namespace()
                .ip("link set eth0 address 02:00:00:00:02:02")?;
            // It learns where its peer is by what its own host asks.
            tests::wait::soon("the peer's neighbour", || {
                Ok(ping(right.host(), LEFT, 1, "-W 1")?.received == 1
                    && ping(b.namespace(), "10.9.0.1", 1, "-W 1")?.received == 1)
            })?;
            both_ways(&a, &b)
        })
    })
}

/// The tunnel's own address is on a bridge of the same daemon, to which the underlay's wire belongs.
#[test]
fn an_endpoint_on_the_daemons_own_bridge_works() -> Result<()> {
    two(|left, right| {
        let mut ends = Vec::new();
        for (lab, own, own6, remote, label, address) in [
            (left, LEFT, LEFT6, RIGHT, "a", "10.9.0.1/24"),
            (right, RIGHT, RIGHT6, LEFT, "b", "10.9.0.2/24"),
        ] {
            let host = lab.host();
            host.ip("addr flush dev t-under")?;
            host.ip(["link", "set", "t-under", "address", &mac(own)])?;
            lab.bridge("br-under")?;
            lab.device("br-under", "t-under", "")?;
            lab.vsctl([
                "set",
                "bridge",
                "br-under",
                &format!("other_config:hwaddr={}", mac(own6)),
            ])?;
            host.ip(format!("addr add {own}/24 dev br-under").as_str())?;
            host.ip("link set br-under up")?;
            lab.bridge("br0")?;
            tunnel(lab, "vxlan", remote, "options:key=7")?;
            ends.push(lab.host_on("br0", label, address)?);
        }
        ends[1]
            .namespace()
            .ip("link set eth0 address 02:00:00:00:02:02")?;
        both_ways(&ends[0], &ends[1])?;
        let (a, b) = (ends[0].namespace(), ends[1].namespace());
        let through = iperf3(left, a, b, "10.9.0.2", 2, "")?;
        ensure!(through.bits_per_second > 20e6, "{through:?}");
        Ok(())
    })
}

/// A hardware address for an address.
fn mac(address: &str) -> String {
    let last = address.bytes().last().unwrap_or(0);
    let family = u8::from(address.contains(':'));
    format!("02:00:00:31:{family:02x}:{last:02x}")
}

/// ovs-vswitchd comes and goes; what passes through the tunnel doesn't notice.
#[test]
fn a_restart_of_vswitchd_loses_nothing() -> Result<()> {
    between("geneve", "options:key=7", false, |left, right, a, b| {
        both_ways(a, b)?;
        for lab in [left, right] {
            lab.stop_vswitchd()?;
        }
        let without = ping(a.namespace(), "10.9.0.2", 20, "-i 0.05")?;
        ensure!(without.received == 20, "{without:?}");
        for lab in [left, right] {
            lab.start_vswitchd()?;
        }
        // It begins without flows, and without knowing who is where.
        tests::wait::soon("pings after the restart", || {
            Ok(ping(a.namespace(), "10.9.0.2", 1, "-W 1")?.received == 1)
        })?;
        both_ways(a, b)
    })
}

/// The wire goes down and comes up, gets shorter, changes its address.
#[test]
fn changes_below_are_followed() -> Result<()> {
    between("vxlan", "options:key=7", false, |left, right, a, b| {
        both_ways(a, b)?;
        left.host().ip("link set t-under down")?;
        ensure!(ping(a.namespace(), "10.9.0.2", 1, "-W 1")?.received == 0);
        left.host().ip("link set t-under up")?;
        both_ways(a, b)?;
        // A shorter wire: the next packet that is too long is answered.
        for lab in [left, right] {
            lab.host().ip("link set t-under mtu 1300")?;
        }
        std::thread::sleep(Duration::from_millis(1100));
        let long = ping(a.namespace(), "10.9.0.2", 3, "-s 1400 -M do -i 0.3")?;
        ensure!(long.received == 0, "{long:?}");
        let route = a.namespace().ip("route get 10.9.0.2")?;
        ensure!(route.contains("mtu 1250"), "{route}");
        let fits = ping(a.namespace(), "10.9.0.2", 3, "-s 1222 -M do -i 0.1")?;
        ensure!(fits.received == 3, "{fits:?}");
        // Another way: by an address on another device.
        for (lab, own, other, ours, theirs) in [
            (left, LEFT, RIGHT, "192.0.2.1", "192.0.2.2"),
            (right, RIGHT, LEFT, "192.0.2.2", "192.0.2.1"),
        ] {
            let host = lab.host();
            host.ip(format!("addr add {own}/32 dev lo").as_str())?;
            host.ip(format!("addr del {own}/24 dev t-under").as_str())?;
            host.ip(format!("addr add {ours}/24 dev t-under").as_str())?;
            host.ip(format!("route add {other} via {theirs} src {own}").as_str())?;
        }
        both_ways(a, b)?;
        // The device goes, with all that led over it.
        left.host().ip("link del t-under")?;
        ensure!(ping(a.namespace(), "10.9.0.2", 1, "-W 1")?.received == 0);
        let status = left.status()?;
        ensure!(status.contains("output_unreachable"), "{status}");
        Ok(())
    })
}

/// `OVS_VPORT_CMD_NEW` of type NETDEV on `dp0`, as ovs-vswitchd asks for a tunnel's link. (ovs-dpctl opens the
/// device itself before it asks.)
fn bind(lab: &Lab, name: &str) -> Result<()> {
    const NEW: u8 = 1;
    const TYPE: u16 = 2;
    const NAME: u16 = 3;
    const UPCALL_PID: u16 = 5;
    let mut body = Vec::new();
    attribute(&mut body, TYPE, &1_u32.to_ne_bytes());
    attribute(&mut body, NAME, format!("{name}\0").as_bytes());
    attribute(&mut body, UPCALL_PID, &0_u32.to_ne_bytes());
    let ifindex = laboratory::ifindex(lab, "dp0")?;
    let answers =
        laboratory::client(lab)?.converse(&request(family::VPORT, NEW, ifindex, &body))?;
    let errno = answers.last().and_then(|answer| errno(answer));
    ensure!(errno == Some(0), "port of {name}: {errno:?}");
    Ok(())
}

/// What Open vSwitch 4.0 does, which knows no other way: a link, a look at it, a port of type NETDEV by its
/// name; at the end the port goes, then the link.
#[test]
fn a_tunnel_is_made_as_open_vswitch_4_makes_it() -> Result<()> {
    lab::test_bare(|lab| {
        let exec = |words: &str| lab.under_exec(words)?.ok();
        lab.dpctl("add-dp dp0")?;
        for (name, kind, shown) in [
            (
                "vxlan_sys_4789",
                "vxlan external dstport 4789 nolearning udp6zerocsumrx",
                "vxlan external",
            ),
            (
                "genev_sys_6081",
                "geneve external dstport 6081 udp6zerocsumrx",
                "geneve external",
            ),
            ("gre_sys", "gretap external", "gretap external"),
            ("ip6gre_sys", "ip6gretap external", "ip6gretap external"),
        ] {
            let add = format!("ip link add {name} mtu 65000 type {kind}");
            exec(&add)?;
            ensure!(
                !lab.under_exec(add.as_str())?.status.success(),
                "{name} twice"
            );
            exec(&format!("ip link set {name} up"))?;
            let link = exec(&format!("ip -d link show dev {name}"))?;
            ensure!(link.contains(shown) && link.contains("mtu 65000"), "{link}");
            bind(lab, name)?;
            let ports = lab.dpctl("show dp0")?;
            ensure!(ports.contains(name), "{ports}");
            ensure!(
                lab.host()
                    .try_exec(["ip", "link", "show", name], Duration::from_secs(5))?
                    .status
                    .code()
                    == Some(1)
            );
            // Which deletes the link too.
            lab.dpctl(["del-if", "dp0", name])?;
            let gone = lab.under_exec(format!("ip link show dev {name}"))?;
            ensure!(!gone.status.success(), "{}", gone.stdout);
        }
        // A link that goes takes its port with it.
        exec("ip link add vxlan_sys_4789 type vxlan external dstport 4789")?;
        bind(lab, "vxlan_sys_4789")?;
        exec("ip link del vxlan_sys_4789")?;
        let ports = lab.dpctl("show dp0")?;
        ensure!(!ports.contains("vxlan_sys"), "{ports}");
        lab.dpctl("del-dp dp0")?;
        Ok(())
    })
}

/// Options of Geneve are set on one side and matched on the other.
#[test]
fn geneve_options_arrive() -> Result<()> {
    between("geneve", "options:key=flow", false, |left, right, a, b| {
        for lab in [left, right] {
            lab.ofctl([
                "add-tlv-map",
                "br0",
                "{class=0x102,type=0x80,len=8}->tun_metadata0",
            ])?;
        }
        let out = |label: &str| {
            format!(
                "in_port=v-{label},actions=set_field:0x77->tun_id,set_field:0x1122334455667788->tun_metadata0,tun0"
            )
        };
        let back = |label: &str| {
            format!("in_port=tun0,tun_id=0x77,tun_metadata0=0x1122334455667788,actions=v-{label}")
        };
        for (lab, label) in [(left, "a"), (right, "b")] {
            lab.ofctl("del-flows br0")?;
            lab.ofctl(["add-flow", "br0", &out(label)])?;
            lab.ofctl(["add-flow", "br0", &back(label)])?;
        }
        both_ways(a, b)?;
        let flows = left.dp_flows()?.join("\n");
        ensure!(
            flows.contains("geneve({class=0x102,type=0x80,len=8,0x1122334455667788"),
            "{flows}"
        );
        Ok(())
    })
}

/// A group policy goes along.
#[test]
fn a_group_policy_arrives() -> Result<()> {
    between(
        "vxlan",
        "options:key=7 options:exts=gbp",
        false,
        |left, right, a, b| {
            for (lab, label) in [(left, "a"), (right, "b")] {
                lab.ofctl("del-flows br0")?;
                lab.ofctl([
                    "add-flow",
                    "br0",
                    &format!("in_port=v-{label},actions=set_field:0x123->tun_gbp_id,tun0"),
                ])?;
                lab.ofctl([
                    "add-flow",
                    "br0",
                    &format!("in_port=tun0,tun_gbp_id=0x123,actions=v-{label}"),
                ])?;
            }
            both_ways(a, b)
        },
    )
}

/// What tcpdump sees on the wire: checksums as asked for, marks and types of service carried over.
#[test]
fn outer_headers_are_as_asked_for() -> Result<()> {
    for (options, expected) in [
        ("options:key=7", &["[no cksum]"][..]),
        ("options:key=7 options:csum=true", &["udp sum ok"]),
        (
            "options:key=7 options:tos=inherit options:ttl=9",
            &["tos 0xb9", "ttl 9"],
        ),
    ] {
        between("vxlan", options, false, |left, right, a, _| {
            ping_ok(a.namespace(), "10.9.0.2")?;
            // tcpdump is to see the checksum that goes over a wire, not what is left to a device.
            left.host().exec("ethtool -K t-under tx off")?;
            let output = right.directory().join("tcpdump.out");
            let mut dump = right.host().spawn(
                [
                    "tcpdump", "-c", "1", "-nvvi", "t-under", "udp", "dst", "port", "4789", "and",
                    "dst", "host", RIGHT,
                ],
                &output,
            )?;
            dump.wait_output("listening on", Duration::from_secs(10))?;
            ping(a.namespace(), "10.9.0.2", 5, "-i 0.1 -Q 0xb9")?;
            dump.wait(Duration::from_secs(10))?;
            let text = std::fs::read_to_string(&output)?;
            for part in expected {
                ensure!(text.contains(part), "{options}: no {part:?} in\n{text}");
            }
            Ok(())
        })?;
    }
    Ok(())
}
