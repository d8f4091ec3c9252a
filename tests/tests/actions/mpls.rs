//! Labels: push, set and pop, one to three deep, and what lies below.

use anyhow::{Result, ensure};
use tests::lab;

use crate::Bed;
use crate::frames::{IPV4, IPV6, Ip4, Ip6, MPLS, ethernet, lse, tagged};

fn stack(labels: &[[u8; 4]], below: &[u8]) -> Vec<u8> {
    ethernet(MPLS, &[&labels.concat(), below].concat())
}

#[test]
fn labels_are_pushed_one_to_three_deep() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let ip = Ip4 {
            ttl: 33,
            ..Ip4::default()
        };
        let below = ip.udp(1000, 2000);
        let frame = ethernet(IPV4, &below);
        // What isn't said comes from the packet: its TTL, label 0 (IPv4 explicit null).
        bed.rule(
            "ip,actions=push_mpls:0x8847,output:2",
            &frame,
            &stack(&[lse(0, 0, true, 33)], &below),
            &["push_mpls(label=0,tc=0,ttl=33,bos=1,eth_type=0x8847)"],
        )?;
        let one = "push_mpls:0x8847,set_field:100->mpls_label,set_field:5->mpls_tc,set_mpls_ttl(7)";
        bed.rule(
            &format!("ip,actions={one},output:2"),
            &frame,
            &stack(&[lse(100, 5, true, 7)], &below),
            &["push_mpls(label=100,tc=5,ttl=7,bos=1,eth_type=0x8847)"],
        )?;
        let two = format!("{one},push_mpls:0x8847,set_field:200->mpls_label");
        bed.rule(
            &format!("ip,actions={two},output:2"),
            &frame,
            &stack(&[lse(200, 5, false, 7), lse(100, 5, true, 7)], &below),
            &["bos=1,eth_type=0x8847),push_mpls(label=200,tc=5,ttl=7,bos=0"],
        )?;
        let three = format!("{two},push_mpls:0x8847,set_field:1048575->mpls_label,set_mpls_ttl(1)");
        bed.rule(
            &format!("ip,actions={three},output:2"),
            &frame,
            &stack(
                &[
                    lse(0xf_ffff, 5, false, 1),
                    lse(200, 5, false, 7),
                    lse(100, 5, true, 7),
                ],
                &below,
            ),
            &["push_mpls(label=1048575,tc=5,ttl=1,bos=0"],
        )?;
        // IPv6's explicit null is 2; the other ethertype of labels is RFC 5332's.
        let six = Ip6::default().udp(1, 2);
        let out = ethernet(0x8848, &[&lse(2, 0, true, 64)[..], &six].concat());
        bed.rule(
            "ipv6,actions=push_mpls:0x8848,output:2",
            &ethernet(IPV6, &six),
            &out,
            &["push_mpls(label=2,tc=0,ttl=64,bos=1,eth_type=0x8848)"],
        )
    })
}

/// ovs-vswitchd asks the datapath to push a label onto a tagged packet, which the module refuses.
#[test]
fn a_label_and_a_tag() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        for part in [
            "failed to put[create] (Invalid argument)",
            "execute push_mpls(",
        ] {
            lab.expect_log(part, "the flow is refused");
        }
        let below = Ip4::default().udp(1000, 2000);
        let plain = ethernet(IPV4, &below);
        let frame = tagged(&plain, &[(0x8100, 0x6005)]);
        bed.rules(&["ip,dl_vlan=5,actions=push_mpls:0x8847,output:2"])?;
        bed.send(1, &frame)?;
        ensure!(bed.gather(2, 0)?.is_empty(), "it passed");
        tests::wait::soon("the refusal in the log", || {
            Ok(lab
                .log()
                .contains("failed to put[create] (Invalid argument)"))
        })?;
        let labelled = stack(&[lse(9, 0, true, 64)], &below);
        bed.rule(
            "ip,dl_vlan=5,actions=pop_vlan,push_mpls:0x8847,set_field:9->mpls_label,output:2",
            &frame,
            &labelled,
            &["pop_vlan,push_mpls("],
        )?;
        bed.rule(
            "ip,vlan_tci=0,actions=push_mpls:0x8847,set_field:9->mpls_label,push_vlan:0x8100,\
             set_field:4101->vlan_vid,output:2",
            &plain,
            &tagged(&labelled, &[(0x8100, 5)]),
            &["push_mpls(label=9", "push_vlan(vid=5,pcp=0)"],
        )
    })
}

#[test]
fn labels_are_set() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let below = Ip4::default().udp(1000, 2000);
        let under = lse(77, 1, true, 9);
        let frame = stack(&[lse(20, 3, false, 64), under], &below);
        for (actions, wanted) in [
            ("set_field:21->mpls_label", lse(21, 3, false, 64)),
            ("set_field:6->mpls_tc", lse(20, 6, false, 64)),
            ("set_mpls_ttl(3)", lse(20, 3, false, 3)),
            ("dec_mpls_ttl", lse(20, 3, false, 63)),
            (
                "dec_mpls_ttl,set_field:0->mpls_label,set_field:0->mpls_tc",
                lse(0, 0, false, 63),
            ),
        ] {
            bed.rule(
                &format!("mpls,actions={actions},output:2"),
                &frame,
                &stack(&[wanted, under], &below),
                &["set(mpls("],
            )?;
        }
        Ok(())
    })
}

#[test]
fn labels_are_popped_down_to_the_packet_and_that_is_changed() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let below = Ip4::default().udp(1000, 2000);
        let labels = [
            lse(1, 0, false, 11),
            lse(2, 0, false, 12),
            lse(3, 0, true, 13),
        ];
        bed.rule(
            "mpls,actions=pop_mpls:0x8847,output:2",
            &stack(&labels, &below),
            &stack(&labels[1..], &below),
            &["pop_mpls(eth_type=0x8847)"],
        )?;
        bed.rule(
            "mpls,actions=pop_mpls:0x8847,pop_mpls:0x8847,output:2",
            &stack(&labels, &below),
            &stack(&labels[2..], &below),
            &["pop_mpls(eth_type=0x8847),pop_mpls(eth_type=0x8847)"],
        )?;
        bed.rule(
            "mpls,actions=pop_mpls:0x8847,pop_mpls:0x8847,pop_mpls:0x800,output:2",
            &stack(&labels, &below),
            &ethernet(IPV4, &below),
            &["pop_mpls(eth_type=0x8847),pop_mpls(eth_type=0x800)"],
        )?;
        bed.rule(
            "mpls,actions=pop_mpls:0x800,output:2",
            &stack(&labels[2..], &below),
            &ethernet(IPV4, &below),
            &["pop_mpls(eth_type=0x800)"],
        )?;
        // What is below is only known after another look: a recirculation.
        let changed = Ip4 {
            dst: [192, 168, 3, 4],
            ttl: 63,
            ..Ip4::default()
        };
        let rule = "mpls,actions=pop_mpls:0x800,dec_ttl,set_field:192.168.3.4->ip_dst,output:2";
        bed.rules(&[rule])?;
        bed.expect(
            rule,
            &stack(&labels[2..], &below),
            &[&ethernet(IPV4, &changed.udp(1000, 2000))],
            &[],
        )?;
        bed.uses(&["pop_mpls(eth_type=0x800),recirc("])?;
        bed.uses(&["ipv4(dst=192.168.3.4,ttl=63)"])?;
        // From one label to another.
        bed.rule(
            "mpls,actions=pop_mpls:0x800,push_mpls:0x8847,set_field:55->mpls_label,output:2",
            &stack(&labels[2..], &below),
            &stack(&[lse(55, 0, true, 64)], &below),
            &["push_mpls(label=55"],
        )
    })
}
