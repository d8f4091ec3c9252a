//! `set_field` of each field that a packet has, `move`, and tags. Nothing but the field and its checksums changes.

use std::net::Ipv6Addr;

use anyhow::Result;
use tests::lab;

use crate::Bed;
use crate::frames::{ETHERNET, IPV4, IPV6, Ip4, Ip6, arp, ethernet, sctp, tagged, with_header};

#[test]
fn ethernet_addresses_and_tags() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let packet = Ip4::default().udp(1000, 2000);
        let plain = ethernet(IPV4, &packet);
        let other = |at: usize| {
            let mut addresses = ETHERNET;
            addresses[at..at + 6].copy_from_slice(&[2, 0x11, 0x22, 0x33, 0x44, 0x55]);
            with_header(addresses, IPV4, &packet)
        };
        let set = "set_field:02:11:22:33:44:55->eth";
        let rule = |actions: &str| format!("in_port=1,actions={actions},output:2");
        bed.rule(
            &rule(&format!("{set}_dst")),
            &plain,
            &other(0),
            &["set(eth(dst="],
        )?;
        bed.rule(
            &rule(&format!("{set}_src")),
            &plain,
            &other(6),
            &["set(eth(src="],
        )?;
        let mut masked = plain.clone();
        masked[0..3].copy_from_slice(&[0xaa, 0xbb, 0]);
        bed.rule(
            &rule("set_field:aa:bb:00:00:00:00/ff:ff:00:00:00:00->eth_dst"),
            &plain,
            &masked,
            &["set(eth(dst="],
        )?;
        let tagged_5 = tagged(&plain, &[(0x8100, 0x6005)]);
        let with = |tags: &[(u16, u16)]| tagged(&plain, tags);
        for (actions, frame, out, part) in [
            (
                "push_vlan:0x8100,set_field:4129->vlan_vid",
                &plain,
                with(&[(0x8100, 33)]),
                "push_vlan(vid=33,pcp=0)",
            ),
            (
                "push_vlan:0x88a8,set_field:4129->vlan_vid,set_field:7->vlan_pcp",
                &plain,
                with(&[(0x88a8, 0xe021)]),
                "push_vlan(tpid=0x88a8,vid=33,pcp=7)",
            ),
            (
                "set_field:4102->vlan_vid",
                &tagged_5,
                with(&[(0x8100, 0x6006)]),
                "pop_vlan,push_vlan(vid=6,pcp=3)",
            ),
            (
                "set_field:1->vlan_pcp",
                &tagged_5,
                with(&[(0x8100, 0x2005)]),
                "pop_vlan,push_vlan(vid=5,pcp=1)",
            ),
            ("pop_vlan", &tagged_5, plain.clone(), "pop_vlan"),
            (
                "push_vlan:0x88a8,set_field:4196->vlan_vid",
                &tagged_5,
                with(&[(0x88a8, 0x0064), (0x8100, 0x6005)]),
                "push_vlan(tpid=0x88a8,vid=100",
            ),
            (
                "push_vlan:0x8100,set_field:4106->vlan_vid,push_vlan:0x88a8,set_field:4107->vlan_vid",
                &plain,
                with(&[(0x88a8, 11), (0x8100, 10)]),
                "push_vlan(vid=10,pcp=0),push_vlan(tpid=0x88a8,vid=11",
            ),
            (
                "pop_vlan",
                &with(&[(0x88a8, 9), (0x8100, 0x6005)]),
                tagged_5.clone(),
                "pop_vlan",
            ),
        ] {
            // Setting a tag wants one in the match.
            let tag = if frame[12] == 8 {
                ""
            } else {
                ",vlan_tci=0x1000/0x1000"
            };
            let rule = format!("in_port=1{tag},actions={actions},output:2");
            bed.rule(&rule, frame, &out, &[part])?;
        }
        // ovs-ofctl takes one pop a rule, and ovs-vswitchd looks at one tag, unless told otherwise.
        lab.vsctl("set Open_vSwitch . other_config:vlan-limit=0")?;
        bed.rules(&[
            "table=0,vlan_tci=0x1000/0x1000,actions=pop_vlan,resubmit(,1)",
            "table=1,vlan_tci=0x1000/0x1000,actions=pop_vlan,output:2",
        ])?;
        let two = with(&[(0x88a8, 9), (0x8100, 0x6005)]);
        bed.expect("two tags", &two, &[&plain], &[])?;
        bed.uses(&["pop_vlan,pop_vlan"])?;
        Ok(())
    })
}

#[test]
fn ipv4_and_its_transport() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let from = Ip4 {
            tos: 0x11,
            ..Ip4::default()
        };
        let with = |change: &dyn Fn(&mut Ip4)| {
            let mut ip = from.clone();
            change(&mut ip);
            ip
        };
        for (actions, ip, part) in [
            (
                "set_field:192.168.7.8->ip_src",
                with(&|ip| ip.src = [192, 168, 7, 8]),
                "set(ipv4(src=192.168.7.8",
            ),
            (
                "set_field:192.168.7.9->ip_dst",
                with(&|ip| ip.dst = [192, 168, 7, 9]),
                "set(ipv4(dst=192.168.7.9",
            ),
            (
                "set_field:0.0.5.0/0.0.255.0->ip_dst",
                with(&|ip| ip.dst = [10, 1, 5, 2]),
                "set(ipv4(dst=",
            ),
            (
                "set_field:46->ip_dscp",
                with(&|ip| ip.tos = 0xb9),
                "set(ipv4(tos=0xb8/0xfc",
            ),
            (
                "set_field:2->ip_ecn",
                with(&|ip| ip.tos = 0x12),
                "set(ipv4(tos=0x2/0x3",
            ),
            (
                "set_field:7->nw_ttl",
                with(&|ip| ip.ttl = 7),
                "set(ipv4(ttl=7",
            ),
            ("dec_ttl", with(&|ip| ip.ttl = 63), "set(ipv4(ttl=63"),
        ] {
            for proto in ["udp", "tcp", "sctp"] {
                let packet = |ip: &Ip4| match proto {
                    "udp" => ip.udp(1000, 2000),
                    "tcp" => ip.tcp(1000, 2000),
                    _ => Ip4 {
                        proto: 132,
                        ..ip.clone()
                    }
                    .around(&sctp(1000, 2000)),
                };
                bed.rule(
                    &format!("{proto},actions={actions},output:2"),
                    &ethernet(IPV4, &packet(&from)),
                    &ethernet(IPV4, &packet(&ip)),
                    &[part],
                )?;
            }
        }
        let of = |proto: &str, src: u16, dst: u16| {
            let packet = match proto {
                "udp" => from.udp(src, dst),
                "tcp" => from.tcp(src, dst),
                _ => Ip4 {
                    proto: 132,
                    ..from.clone()
                }
                .around(&sctp(src, dst)),
            };
            ethernet(IPV4, &packet)
        };
        for proto in ["udp", "tcp", "sctp"] {
            let rule = |actions: &str| format!("{proto},actions={actions},output:2");
            bed.rule(
                &rule(&format!("set_field:4660->{proto}_src")),
                &of(proto, 1000, 2000),
                &of(proto, 4660, 2000),
                &[&format!("set({proto}(src=4660")],
            )?;
            bed.rule(
                &rule(&format!("set_field:4660->{proto}_dst")),
                &of(proto, 1000, 2000),
                &of(proto, 1000, 4660),
                &[&format!("set({proto}(dst=4660")],
            )?;
            bed.rule(
                &rule(&format!("set_field:0x1200/0xff00->{proto}_dst")),
                &of(proto, 1000, 2000),
                &of(proto, 1000, 0x12d0),
                &[&format!("set({proto}(dst=")],
            )?;
        }
        Ok(())
    })
}

#[test]
fn ipv6_and_its_transport() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let from = Ip6 {
            class: 0x11,
            label: 0x54321,
            ..Ip6::default()
        };
        let address: Ipv6Addr = "fd00:1:2:3:4:5:6:7".parse()?;
        let with = |change: &dyn Fn(&mut Ip6)| {
            let mut ip = from.clone();
            change(&mut ip);
            ip
        };
        for (actions, ip, part) in [
            (
                "set_field:fd00:1:2:3:4:5:6:7->ipv6_src",
                with(&|ip| ip.src = address),
                "set(ipv6(src=fd00:1:2:3:4:5:6:7",
            ),
            (
                "set_field:fd00:1:2:3:4:5:6:7->ipv6_dst",
                with(&|ip| ip.dst = address),
                "set(ipv6(dst=fd00:1:2:3:4:5:6:7",
            ),
            (
                "set_field:0x12345->ipv6_label",
                with(&|ip| ip.label = 0x12345),
                "set(ipv6(label=0x12345",
            ),
            (
                "set_field:46->ip_dscp",
                with(&|ip| ip.class = 0xb9),
                "set(ipv6(tclass=0xb8/0xfc",
            ),
            (
                "set_field:3->ip_ecn",
                with(&|ip| ip.class = 0x13),
                "set(ipv6(tclass=0x3/0x3",
            ),
            (
                "set_field:7->nw_ttl",
                with(&|ip| ip.hops = 7),
                "set(ipv6(hlimit=7",
            ),
            ("dec_ttl", with(&|ip| ip.hops = 63), "set(ipv6(hlimit=63"),
        ] {
            bed.rule(
                &format!("udp6,actions={actions},output:2"),
                &ethernet(IPV6, &from.udp(1, 2)),
                &ethernet(IPV6, &ip.udp(1, 2)),
                &[part],
            )?;
            bed.rule(
                &format!("tcp6,actions={actions},output:2"),
                &ethernet(IPV6, &from.tcp(1, 2)),
                &ethernet(IPV6, &ip.tcp(1, 2)),
                &[part],
            )?;
        }
        bed.rule(
            "udp6,actions=set_field:53->udp_dst,set_field:54->udp_src,output:2",
            &ethernet(IPV6, &from.udp(1, 2)),
            &ethernet(IPV6, &from.udp(54, 53)),
            &["set(udp(src=54,dst=53))"],
        )?;
        bed.rule(
            "tcp6,actions=set_field:53->tcp_dst,output:2",
            &ethernet(IPV6, &from.tcp(1, 2)),
            &ethernet(IPV6, &from.tcp(1, 53)),
            &["set(tcp(dst=53))"],
        )
    })
}

/// What the module can't set: ovs-vswitchd asks for the packets and changes them itself ("slow path"),
/// and sends them with EXECUTE.
#[test]
fn fields_that_ovs_vswitchd_sets_itself() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let (sha, spa) = ([2, 0, 0, 0, 1, 1], [10, 1, 1, 1]);
        let (tha, tpa) = ([0; 6], [10, 1, 1, 2]);
        let request = arp(1, (sha, spa), (tha, tpa));
        let other = [2, 0x11, 0x22, 0x33, 0x44, 0x55];
        let slow: &[&str] = &["userspace(pid=", "slow_path(action)"];
        for (actions, out) in [
            ("set_field:2->arp_op", arp(2, (sha, spa), (tha, tpa))),
            (
                "set_field:10.9.9.9->arp_spa",
                arp(1, (sha, [10, 9, 9, 9]), (tha, tpa)),
            ),
            (
                "set_field:10.9.9.8->arp_tpa",
                arp(1, (sha, spa), (tha, [10, 9, 9, 8])),
            ),
            (
                "set_field:02:11:22:33:44:55->arp_sha",
                arp(1, (other, spa), (tha, tpa)),
            ),
            (
                "set_field:02:11:22:33:44:55->arp_tha",
                arp(1, (sha, spa), (other, tpa)),
            ),
            (
                "move:NXM_NX_ARP_SHA[]->NXM_NX_ARP_THA[]",
                arp(1, (sha, spa), (sha, tpa)),
            ),
        ] {
            bed.rule(
                &format!("arp,actions={actions},output:2"),
                &request,
                &out,
                slow,
            )?;
        }
        let icmp = |kind: u8, code: u8| {
            let mut message = vec![kind, code, 0, 0, 0, 7, 0, 1, 1, 2, 3, 4];
            let sum = crate::frames::checksum(&[&message]);
            message[2..4].copy_from_slice(&sum);
            ethernet(
                IPV4,
                &Ip4 {
                    proto: 1,
                    ..Ip4::default()
                }
                .around(&message),
            )
        };
        bed.rule(
            "icmp,actions=set_field:13->icmp_type,output:2",
            &icmp(8, 0),
            &icmp(13, 0),
            slow,
        )?;
        bed.rule(
            "icmp,actions=set_field:3->icmp_code,output:2",
            &icmp(8, 0),
            &icmp(8, 3),
            slow,
        )?;
        let icmp6 =
            |kind: u8, code: u8| ethernet(IPV6, &Ip6::default().icmp(kind, code, &[0, 7, 0, 1]));
        bed.rule(
            "icmp6,actions=set_field:129->icmpv6_type,output:2",
            &icmp6(128, 0),
            &icmp6(129, 0),
            slow,
        )?;
        bed.rule(
            "icmp6,actions=set_field:3->icmpv6_code,output:2",
            &icmp6(128, 0),
            &icmp6(128, 3),
            slow,
        )?;
        let target: Ipv6Addr = "fd00::2".parse()?;
        let elsewhere: Ipv6Addr = "fd00::77".parse()?;
        let ip = Ip6 {
            hops: 255,
            ..Ip6::default()
        };
        // Type 135: a neighbour solicitation with a source link-layer address; 136 has a target's.
        let neighbour = |kind: u8, target: Ipv6Addr, option: u8, mac: [u8; 6]| {
            let body = [&[0; 4][..], &target.octets(), &[option, 1], &mac].concat();
            ethernet(IPV6, &ip.icmp(kind, 0, &body))
        };
        bed.rule(
            "icmp6,icmp_type=135,actions=set_field:fd00::77->nd_target,output:2",
            &neighbour(135, target, 1, sha),
            &neighbour(135, elsewhere, 1, sha),
            slow,
        )?;
        bed.rule(
            "icmp6,icmp_type=135,actions=set_field:02:11:22:33:44:55->nd_sll,output:2",
            &neighbour(135, target, 1, sha),
            &neighbour(135, target, 1, other),
            slow,
        )?;
        bed.rule(
            "icmp6,icmp_type=136,actions=set_field:02:11:22:33:44:55->nd_tll,output:2",
            &neighbour(136, target, 2, sha),
            &neighbour(136, target, 2, other),
            slow,
        )
    })
}

#[test]
fn metadata_is_set_and_fields_move() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let ip = Ip4::default();
        let frame = ethernet(IPV4, &ip.udp(1000, 2000));
        bed.rule(
            "udp,actions=set_field:0x1234->pkt_mark,output:2",
            &frame,
            &frame,
            &["set(skb_mark(0x1234))"],
        )?;
        // A queue is a class of traffic control on the port; without one the priority has no effect.
        bed.rule(
            "udp,actions=set_queue:5,output:2",
            &frame,
            &frame,
            &["set(skb_priority(0x10006))"],
        )?;
        let swapped = ethernet(
            IPV4,
            &Ip4 {
                src: ip.dst,
                dst: ip.src,
                ..ip.clone()
            }
            .udp(2000, 1000),
        );
        bed.rule(
            "udp,actions=move:NXM_OF_IP_SRC[]->NXM_NX_REG0[],move:NXM_OF_IP_DST[]->NXM_OF_IP_SRC[],\
             move:NXM_NX_REG0[]->NXM_OF_IP_DST[],move:NXM_OF_UDP_SRC[]->NXM_NX_REG1[0..15],\
             move:NXM_OF_UDP_DST[]->NXM_OF_UDP_SRC[],move:NXM_NX_REG1[0..15]->NXM_OF_UDP_DST[],output:2",
            &frame,
            &swapped,
            &["set(ipv4(src=10.1.1.2,dst=10.1.1.1))", "set(udp(src=2000,dst=1000))"],
        )?;
        let mut moved = frame.clone();
        moved[4..6].copy_from_slice(&2000_u16.to_be_bytes());
        bed.rule(
            "udp,actions=move:NXM_OF_UDP_DST[]->NXM_OF_ETH_DST[0..15],output:2",
            &frame,
            &moved,
            &["set(eth(dst="],
        )?;
        bed.rule(
            "udp,actions=push:NXM_OF_UDP_SRC[],pop:NXM_OF_UDP_DST[],output:2",
            &frame,
            &ethernet(IPV4, &ip.udp(1000, 1000)),
            &["set(udp(dst=1000))"],
        )
    })
}
