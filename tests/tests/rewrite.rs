//! OpenFlow rules that change headers: each field, its checksum, and TCP through a translation.

use std::time::Duration;

use anyhow::{Result, ensure};
use etherparse::SlicedPacket;
use tests::lab;
use tests::traffic::raw::{Wire, checksums_right, udp4};
use tests::traffic::tcp;

const SOON: Duration = Duration::from_secs(5);

#[test]
fn each_field_of_a_udp_datagram_can_be_set_and_checksums_stay_right() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let b = lab.endpoint("b")?;
        lab.port("br0", &a, "")?;
        lab.port("br0", &b, "")?;
        let out = lab.ofport(b.port())?;
        let (wa, wb) = (Wire::open(&a)?, Wire::open(&b)?);
        let from = (a.mac(), [10, 1, 1, 1], 1000);
        let to = (b.mac(), [10, 1, 1, 2], 2000);
        let sent = udp4(from, to, b"the quick brown fox jumps over the lazy dog")?;
        // What is set, where in the frame it must show, and as what.
        let cases: &[(&str, usize, &[u8])] = &[
            (
                "mod_dl_dst:02:11:22:33:44:55",
                0,
                &[2, 0x11, 0x22, 0x33, 0x44, 0x55],
            ),
            (
                "mod_dl_src:02:11:22:33:44:66",
                6,
                &[2, 0x11, 0x22, 0x33, 0x44, 0x66],
            ),
            ("mod_nw_tos:184", 15, &[184]),
            ("dec_ttl", 22, &[63]),
            ("mod_nw_ttl:7", 22, &[7]),
            ("mod_nw_src:192.168.7.8", 26, &[192, 168, 7, 8]),
            ("mod_nw_dst:192.168.7.9", 30, &[192, 168, 7, 9]),
            ("set_field:0.0.5.0/0.0.255.0->ip_dst", 30, &[10, 1, 5, 2]),
            ("mod_tp_src:4660", 34, &[0x12, 0x34]),
            ("mod_tp_dst:22136", 36, &[0x56, 0x78]),
            ("mod_vlan_vid:33", 12, &[0x81, 0, 0, 33]),
            (
                "push_vlan:0x88a8,set_field:4140->vlan_vid",
                12,
                &[0x88, 0xa8, 0, 44],
            ),
        ];
        for (actions, at, bytes) in cases {
            lab.ofctl("del-flows br0")?;
            let rule = format!("udp,actions={actions},output:{out}");
            // OpenFlow 1.0 has no masked set_field: ovs-ofctl drops the mask.
            lab.ofctl(["-O", "OpenFlow15", "add-flow", "br0", &rule])?;
            // Until the revalidators have seen the change the old megaflow may answer.
            lab.appctl("revalidator/wait")?;
            wa.send(&sent)?;
            let got = wb.expect(actions, SOON, |f| {
                f.windows(15)
                    .any(|w| w == b"the quick brown")
                    .then(|| f.to_vec())
            })?;
            ensure!(
                got.get(*at..at + bytes.len()) == Some(*bytes),
                "{actions}: {got:02x?}"
            );
            ensure!(
                checksums_right(&got),
                "{actions}: a wrong checksum: {got:02x?}"
            );
            // And nothing else but the two checksums has changed.
            if got.len() == sent.len() {
                let changed = (0..sent.len()).filter(|i| got[*i] != sent[*i]);
                let strays: Vec<_> = changed
                    .filter(|i| {
                        !(*at..at + bytes.len()).contains(i) && ![24, 25, 40, 41].contains(i)
                    })
                    .collect();
                ensure!(strays.is_empty(), "{actions}: bytes {strays:?} changed too");
            }
        }
        Ok(())
    })
}

#[test]
fn ipv6_fields_can_be_set_and_checksums_stay_right() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let b = lab.endpoint("b")?;
        lab.port("br0", &a, "")?;
        lab.port("br0", &b, "")?;
        let out = lab.ofport(b.port())?;
        let (wa, wb) = (Wire::open(&a)?, Wire::open(&b)?);
        let address = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        let builder = etherparse::PacketBuilder::ethernet2(a.mac(), b.mac())
            .ipv6(address(1), address(2), 64)
            .tcp(1000, 2000, 1, 1024);
        let mut sent = Vec::new();
        builder.write(&mut sent, b"the quick brown fox")?;
        for (actions, at, bytes) in [
            ("set_field:fd00::77->ipv6_src", 22, &address(0x77)[..]),
            ("set_field:fd00::88->ipv6_dst", 38, &address(0x88)[..]),
            ("set_field:0x12345->ipv6_label", 15, &[0x01, 0x23, 0x45][..]),
            ("dec_ttl", 21, &[63][..]),
            ("set_field:80->tcp_dst", 56, &[0, 80][..]),
        ] {
            lab.ofctl("del-flows br0")?;
            lab.ofctl([
                "add-flow",
                "br0",
                &format!("tcp6,actions={actions},output:{out}"),
            ])?;
            lab.appctl("revalidator/wait")?;
            wa.send(&sent)?;
            let got = wb.expect(actions, SOON, |f| {
                f.windows(15)
                    .any(|w| w == b"the quick brown")
                    .then(|| f.to_vec())
            })?;
            let place = got.get(at..at + bytes.len());
            if actions.contains("label") {
                ensure!(
                    place.is_some_and(|p| p[0] & 15 == 1 && p[1..] == bytes[1..]),
                    "{got:02x?}"
                );
            } else {
                ensure!(place == Some(bytes), "{actions}: {got:02x?}");
            }
            let packet = SlicedPacket::from_ethernet(&got)?;
            let (Some(etherparse::NetSlice::Ipv6(ip)), Some(etherparse::TransportSlice::Tcp(tcp))) =
                (&packet.net, &packet.transport)
            else {
                anyhow::bail!("{actions}: {got:02x?}");
            };
            let (source, destination) = (ip.header().source(), ip.header().destination());
            let sum = tcp
                .to_header()
                .calc_checksum_ipv6_raw(source, destination, tcp.payload());
            ensure!(
                sum == Ok(tcp.checksum()),
                "{actions}: a wrong checksum: {got:02x?}"
            );
        }
        Ok(())
    })
}

#[test]
fn tcp_passes_through_translated_addresses_with_default_offloads() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let (pa, pb) = (lab.ofport(a.port())?, lab.ofport(b.port())?);
        // a speaks to 10.1.1.100:80, which is b's 10.1.1.2:7000: partial checksums are kept right.
        a.neighbour("10.1.1.100", &b)?;
        b.neighbour("10.1.1.1", &a)?;
        lab.ofctl("del-flows br0")?;
        lab.ofctl(["add-flow", "br0", &format!(
            "tcp,in_port={pa},nw_dst=10.1.1.100,tp_dst=80,actions=mod_nw_dst:10.1.1.2,mod_tp_dst:7000,dec_ttl,output:{pb}"
        )])?;
        lab.ofctl(["add-flow", "br0", &format!(
            "tcp,in_port={pb},nw_src=10.1.1.2,tp_src=7000,actions=mod_nw_src:10.1.1.100,mod_tp_src:80,output:{pa}"
        )])?;
        let seen: std::net::SocketAddr = "10.1.1.100:80".parse()?;
        tcp::echo_at(
            a.namespace(),
            b.namespace(),
            seen,
            "10.1.1.2:7000".parse()?,
            8 << 20,
        )
    })
}

#[test]
fn a_rule_counts_what_it_forwarded_and_its_flow_idles_out() -> Result<()> {
    lab::test(|lab| {
        lab.vsctl("set Open_vSwitch . other_config:max-idle=1000")?;
        lab.bridge("br0")?;
        let a = lab.endpoint("a")?;
        let b = lab.endpoint("b")?;
        lab.port("br0", &a, "")?;
        lab.port("br0", &b, "")?;
        let out = lab.ofport(b.port())?;
        lab.ofctl("del-flows br0")?;
        lab.ofctl(["add-flow", "br0", &format!("udp,actions=output:{out}")])?;
        let (wa, wb) = (Wire::open(&a)?, Wire::open(&b)?);
        let frame = udp4(
            (a.mac(), [10, 1, 1, 1], 1),
            (b.mac(), [10, 1, 1, 2], 2),
            &[0; 58],
        )?;
        let frames = 500;
        // In small lots, so that no queue on the way overflows, least of all the upcalls'.
        for lot in 0..frames / 10 {
            for _ in 0..10 {
                wa.send(&frame)?;
            }
            for _ in 0..10 {
                wb.expect(&format!("lot {lot}"), SOON, |f| (f == frame).then_some(()))?;
            }
        }
        tests::wait::soon("the flow in the datapath", || {
            Ok(lab
                .dp_flows()?
                .iter()
                .any(|f| f.contains("udp") || f.contains("proto=17")))
        })?;
        tests::wait::soon("the flow idling out", || {
            Ok(!lab
                .dp_flows()?
                .iter()
                .any(|f| f.contains("eth_type(0x0800)")))
        })?;
        // Its last packets were added to the rule before it went.
        let rules = lab.ofctl("dump-flows br0")?;
        let bytes = frames * frame.len();
        ensure!(
            rules.contains(&format!("n_packets={frames}, n_bytes={bytes}")),
            "not {frames} packets, {bytes} bytes:\n{rules}"
        );
        Ok(())
    })
}
