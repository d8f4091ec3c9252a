//! VLANs: access and trunk ports, two tags.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::traffic::raw::{Wire, ethernet};
use tests::traffic::{ping, ping_ok, tcp};
use tests::{Lab, lab};

const SOON: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(300);

/// A port of a provider's edge: what the customer sends, tag and all, gets tag 100 around it.
const TUNNEL: &str = "vlan_mode=dot1q-tunnel tag=100 other_config:qinq-ethtype=802.1ad";

/// A trunk says so when it drops what isn't of its VLANs; each of these tests sends such a frame,
/// or an endpoint's own stack does.
fn expect_drops(lab: &Lab) {
    lab.expect_log(
        "not configured for trunking VLAN",
        "a trunk's report of a frame it drops",
    );
}

/// `frame` with tags put in: (type, tag control), the outer first.
fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let mut with = frame[..12].to_vec();
    for (tpid, tci) in tags {
        with.extend_from_slice(&tpid.to_be_bytes());
        with.extend_from_slice(&tci.to_be_bytes());
    }
    with.extend_from_slice(&frame[12..]);
    with
}

#[test]
fn access_ports_meet_inside_their_vlan_across_a_trunk_between_two_bridges() -> Result<()> {
    lab::test(|lab| {
        expect_drops(lab);
        lab.bridge("br0")?;
        lab.bridge("br1")?;
        let (x, y) = lab.cable("trunk")?;
        lab.device("br0", &x, "trunks=10,20")?;
        lab.device("br1", &y, "trunks=10,20")?;
        let mut ends = Vec::new();
        for (label, bridge, tag, address) in [
            ("a", "br0", 10, "10.1.1.1/24"),
            ("b", "br0", 10, "10.1.1.2/24"),
            ("c", "br0", 20, "10.1.1.3/24"),
            ("d", "br1", 10, "10.1.1.4/24"),
            ("e", "br1", 20, "10.1.1.5/24"),
        ] {
            let end = lab.endpoint(label)?;
            end.address(address)?;
            lab.port(bridge, &end, &format!("tag={tag}"))?;
            ends.push(end);
        }
        let (a, c, d) = (&ends[0], &ends[2], &ends[3]);
        ping_ok(a.namespace(), "10.1.1.2")?;
        ping_ok(a.namespace(), "10.1.1.4")?;
        ping_ok(c.namespace(), "10.1.1.5")?;
        for other in ["10.1.1.3", "10.1.1.5"] {
            let apart = ping(a.namespace(), other, 2, "-W 0.3")?;
            ensure!(apart.received == 0, "VLAN 10 reached VLAN 20: {apart:?}");
        }
        // Tag and offloads together: segments of many with a tag.
        tcp::echo(
            a.namespace(),
            d.namespace(),
            "10.1.1.4:7000".parse()?,
            4 << 20,
        )?;
        tcp::echo(
            d.namespace(),
            a.namespace(),
            "10.1.1.1:7000".parse()?,
            4 << 20,
        )
    })
}

#[test]
fn a_trunk_carries_the_tag_on_the_wire_and_only_its_own_vlans() -> Result<()> {
    lab::test(|lab| {
        expect_drops(lab);
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let t = lab.endpoint("t")?;
        lab.port("br0", &a, "tag=10")?;
        lab.port("br0", &t, "trunks=10")?;
        let (wa, wt) = (Wire::open(&a)?, Wire::open(&t)?);
        let frame = ethernet(a.mac(), t.mac(), 0x88b5, b"untagged at the access port");
        wa.send(&frame)?;
        let at_trunk = tagged(&frame, &[(0x8100, 10)]);
        wt.expect("the tagged frame", SOON, |f| (f == at_trunk).then_some(()))?;
        let back = ethernet(t.mac(), a.mac(), 0x88b5, b"back");
        // The priority bits don't decide where it goes.
        wt.send(&tagged(&back, &[(0x8100, 5 << 13 | 10)]))?;
        wa.expect("the untagged frame", SOON, |f| {
            (f[..20] == back[..20]).then_some(())
        })?;
        for vlan in [20, 0] {
            wt.send(&tagged(&back, &[(0x8100, vlan)]))?;
        }
        wt.send(&back)?;
        let strays = wa.capture_for(QUIET)?;
        ensure!(
            strays.iter().all(|f| f[..12] != back[..12]),
            "not of VLAN 10: {strays:x?}"
        );
        Ok(())
    })
}

#[test]
fn a_native_vlan_goes_untagged_on_its_trunk() -> Result<()> {
    lab::test(|lab| {
        expect_drops(lab);
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let t = lab.endpoint("t")?;
        a.address("10.1.1.1/24")?;
        t.address("10.1.1.2/24")?;
        lab.port("br0", &a, "tag=10")?;
        lab.port("br0", &t, "vlan_mode=native-untagged tag=10 trunks=10,20")?;
        ping_ok(a.namespace(), "10.1.1.2")
    })
}

#[test]
fn a_customer_tag_travels_inside_a_service_tag_on_the_wire() -> Result<()> {
    lab::test(|lab| {
        expect_drops(lab);
        // Two tags are matched only when asked for.
        lab.vsctl("set Open_vSwitch . other_config:vlan-limit=2")?;
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let t = lab.endpoint("t")?;
        lab.port("br0", &a, TUNNEL)?;
        lab.port("br0", &t, "trunks=100")?;
        let (wa, wt) = (Wire::open(&a)?, Wire::open(&t)?);
        let frame = ethernet(a.mac(), t.mac(), 0x88b5, b"customer");
        wa.send(&tagged(&frame, &[(0x8100, 10)]))?;
        let both = tagged(&frame, &[(0x88a8, 100), (0x8100, 10)]);
        wt.expect("both tags", SOON, |f| (f == both).then_some(()))?;
        let back = ethernet(t.mac(), a.mac(), 0x88b5, b"service");
        wt.send(&tagged(&back, &[(0x88a8, 100), (0x8100, 10)]))?;
        let inner = tagged(&back, &[(0x8100, 10)]);
        wa.expect("the customer's tag alone", SOON, |f| {
            (f == inner).then_some(())
        })?;
        Ok(())
    })
}

#[test]
fn two_sites_of_a_customer_meet_through_a_service_vlan() -> Result<()> {
    lab::test(|lab| {
        expect_drops(lab);
        lab.vsctl("set Open_vSwitch . other_config:vlan-limit=2")?;
        lab.bridge("br0")?;
        lab.bridge("br1")?;
        // site -- trunk of customer VLANs -- provider's edge -- service VLAN 100 -- the same back.
        let (core0, core1) = lab.cable("core")?;
        for end in [&core0, &core1] {
            // Sent by a packet socket, both tags count once the outer is 802.1ad.
            lab.host().ip(["link", "set", end, "mtu", "1508"])?;
        }
        lab.device("br0", &core0, "trunks=100")?;
        lab.device("br1", &core1, "trunks=100")?;
        let mut ends = Vec::new();
        for (edge, site, label, address) in [
            ("br0", "site0", "a", "10.1.1.1/24"),
            ("br1", "site1", "b", "10.1.1.2/24"),
        ] {
            lab.bridge(site)?;
            let (up, down) = lab.cable(site)?;
            lab.device(edge, &up, TUNNEL)?;
            lab.device(site, &down, "trunks=10,20")?;
            let end = lab.endpoint(label)?;
            end.address(address)?;
            lab.port(site, &end, "tag=10")?;
            ends.push(end);
        }
        ping_ok(ends[0].namespace(), "10.1.1.2")?;
        let to = "10.1.1.2:7000".parse()?;
        tcp::echo(ends[0].namespace(), ends[1].namespace(), to, 2 << 20)
    })
}
