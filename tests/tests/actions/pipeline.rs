//! What ovs-vswitchd's tables make of packets on the way: many tables, learnt rules, conjunctions,
//! fragments, the controller, conntrack's forgetting.

use anyhow::{Context, Result, ensure};
use tests::{lab, wait};

use crate::Bed;
use crate::frames::{IPV4, IPV6, Ip4, Ip6, arp, ethernet};

fn frame() -> Vec<u8> {
    ethernet(IPV4, &Ip4::default().udp(1000, 2000))
}

#[test]
fn a_packet_through_thirty_tables() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let mut rules: Vec<String> = (0..30)
            .map(|table| {
                let next = table + 1;
                // Each table decrements once and counts in a register.
                format!(
                    "table={table},udp,actions=dec_ttl,set_field:{next}->reg{},resubmit(,{next})",
                    table % 8
                )
            })
            .collect();
        rules.push("table=30,udp,reg5=30,actions=output:2".to_owned());
        rules.push("table=30,priority=1,actions=output:3".to_owned());
        bed.rules(&rules.iter().map(String::as_str).collect::<Vec<_>>())?;
        let out = ethernet(
            IPV4,
            &Ip4 {
                ttl: 34,
                ..Ip4::default()
            }
            .udp(1000, 2000),
        );
        bed.expect("thirty tables", &frame(), &[&out], &[])?;
        bed.uses(&["set(ipv4(ttl=34))"])?;
        // And through a recirculation in every fifth: six looks in the datapath.
        let rules: Vec<String> = (0..30)
            .map(|table| {
                let next = table + 1;
                let on = if table % 5 == 4 {
                    format!("ct(table={next})")
                } else {
                    format!("resubmit(,{next})")
                };
                format!("table={table},udp,actions=dec_ttl,{on}")
            })
            .chain(["table=30,udp,actions=output:2".to_owned()])
            .collect();
        bed.rules(&rules.iter().map(String::as_str).collect::<Vec<_>>())?;
        bed.expect("six looks", &frame(), &[&out], &[])?;
        let looks = bed
            .actions()?
            .iter()
            .filter(|a| a.contains("recirc("))
            .count();
        ensure!(
            looks == 6,
            "{looks} recirculations: {:#?}",
            bed.lab.dp_flows()?
        );
        Ok(())
    })
}

#[test]
fn a_ttl_that_ends_goes_to_the_controller_and_no_further() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.rules(&[
            "ip,actions=dec_ttl,output:2",
            "ipv6,actions=dec_ttl,output:2",
        ])?;
        for ttl in [0, 1] {
            let four = Ip4 {
                ttl,
                ..Ip4::default()
            };
            bed.expect(
                "IPv4 at its end",
                &ethernet(IPV4, &four.udp(1, 2)),
                &[],
                &[],
            )?;
            let six = Ip6 {
                hops: ttl,
                ..Ip6::default()
            };
            bed.expect("IPv6 at its end", &ethernet(IPV6, &six.udp(1, 2)), &[], &[])?;
        }
        let two = Ip4 {
            ttl: 2,
            ..Ip4::default()
        };
        let one = Ip4 {
            ttl: 1,
            ..Ip4::default()
        };
        bed.expect(
            "two left",
            &ethernet(IPV4, &two.udp(1, 2)),
            &[&ethernet(IPV4, &one.udp(1, 2))],
            &[],
        )
    })
}

#[test]
fn a_rule_is_learnt_from_a_packet() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        // Who asks by ARP is known from then on: packets to it go to where it was heard.
        bed.rules(&[
            "table=0,arp,actions=learn(table=1,hard_timeout=60,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],\
             load:NXM_OF_IN_PORT[]->NXM_NX_REG0[0..15],output:NXM_OF_IN_PORT[])",
            "table=0,priority=1,actions=resubmit(,1)",
            "table=1,priority=0,actions=output:3",
        ])?;
        let to = [2, 0, 0, 0, 1, 2];
        bed.expect("before", &frame(), &[], &[&frame()])?;
        let hello = arp(1, (to, [10, 1, 1, 2]), ([0; 6], [10, 1, 1, 1]));
        let mut hello = hello;
        hello[..6].fill(0xff);
        hello[6..12].copy_from_slice(&to);
        bed.send(2, &hello)?;
        wait::soon("the learnt rule", || {
            Ok(bed
                .openflow(&["dump-flows", "br0", "table=1"])?
                .contains("02:00:00:00:01:02"))
        })?;
        bed.lab.appctl("revalidator/wait")?;
        bed.expect("after", &frame(), &[&frame()], &[])
    })
}

#[test]
fn a_conjunction_of_sets() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.rules(&[
            "udp,nw_src=10.1.1.1,actions=conjunction(7,1/2)",
            "udp,nw_src=10.1.1.3,actions=conjunction(7,1/2)",
            "udp,tp_dst=2000,actions=conjunction(7,2/2)",
            "udp,tp_dst=3000,actions=conjunction(7,2/2)",
            "conj_id=7,udp,actions=output:2",
            "priority=1,actions=output:3",
        ])?;
        let of = |src: u8, dst: u16| {
            let ip = Ip4 {
                src: [10, 1, 1, src],
                ..Ip4::default()
            };
            ethernet(IPV4, &ip.udp(1000, dst))
        };
        for (src, dst, both) in [
            (1, 2000, true),
            (3, 3000, true),
            (1, 9, false),
            (2, 2000, false),
            (3, 2000, true),
        ] {
            let frame = of(src, dst);
            let (at2, at3): (&[&[u8]], &[&[u8]]) = if both {
                (&[&frame], &[])
            } else {
                (&[], &[&frame])
            };
            bed.expect(&format!("{src} {dst}"), &frame, at2, at3)?;
        }
        Ok(())
    })
}

#[test]
fn fragments_by_the_switchs_mode() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let whole = Ip4::default().udp(1000, 2000);
        // 24 bytes behind the header are in the first fragment, "more fragments" set.
        let first = Ip4 {
            frag: 0x2000,
            ..Ip4::default()
        }
        .around(&whole[20..44]);
        let later = Ip4 {
            frag: 3,
            ..Ip4::default()
        }
        .around(&whole[44..]);
        let (whole, first, later) = (
            ethernet(IPV4, &whole),
            ethernet(IPV4, &first),
            ethernet(IPV4, &later),
        );
        let rules = [
            "priority=9,udp,tp_dst=2000,actions=output:2",
            "priority=1,udp,actions=output:3",
        ];
        // normal: a fragment has no ports, also the first.
        bed.openflow(&["set-frags", "br0", "normal"])?;
        bed.rules(&rules)?;
        bed.expect("whole", &whole, &[&whole], &[])?;
        bed.expect("normal, first", &first, &[], &[&first])?;
        bed.expect("normal, later", &later, &[], &[&later])?;
        // nx-match: the first has them, and rules see which is which.
        bed.openflow(&["set-frags", "br0", "nx-match"])?;
        bed.rules(&rules)?;
        bed.expect("nx-match, first", &first, &[&first], &[])?;
        bed.expect("nx-match, later", &later, &[], &[&later])?;
        bed.rules(&[
            "priority=9,ip,ip_frag=later,actions=output:2",
            "priority=1,ip,actions=output:3",
        ])?;
        bed.expect("ip_frag=later", &later, &[&later], &[])?;
        bed.expect("not later", &first, &[], &[&first])?;
        bed.openflow(&["set-frags", "br0", "drop"])?;
        bed.rules(&rules)?;
        bed.expect("drop, first", &first, &[], &[])?;
        bed.expect("drop, later", &later, &[], &[])?;
        bed.expect("drop, whole", &whole, &[&whole], &[])
    })
}

#[test]
fn a_controller_sees_a_packet_and_lets_it_go_on() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.rules(&["udp,actions=set_field:9->udp_dst,controller(pause,userdata=01.02),output:2"])?;
        // An `ovs-ofctl monitor` that resumes what it is shown.
        let output = bed.lab.directory().join("monitor.out");
        let bridge = format!("unix:{}", bed.lab.directory().join("br0.mgmt").display());
        let monitor = bed.lab.spawn_ofctl(
            [
                "-O",
                "OpenFlow15",
                "monitor",
                &bridge,
                "resume",
                "-P",
                "nxt_packet_in2",
            ],
            &output,
        )?;
        let out = ethernet(IPV4, &Ip4::default().udp(1000, 9));
        let mut came = Vec::new();
        // The monitor may not be listening yet.
        wait::soon("a packet that goes on", || {
            bed.send(1, &frame())?;
            came = bed.gather(2, 0)?;
            Ok(!came.is_empty())
        })
        .with_context(|| monitor.output())?;
        ensure!(came.iter().all(|f| *f == out), "{came:02x?}");
        let seen = monitor.output();
        ensure!(
            seen.contains("userdata=01.02") && seen.contains("tp_dst=9"),
            "{seen}"
        );
        // Once more, now by the flow.
        bed.send(1, &frame())?;
        ensure!(bed.gather(2, 1)? == [out], "by the flow");
        // The continuation is ovs-vswitchd's: the datapath has the upcall and the EXECUTE.
        bed.uses(&["userspace(pid=", "controller(reason="])
    })
}

#[test]
fn conntracks_verdict_is_forgotten() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.rules(&[
            "table=0,udp,actions=ct(table=1,zone=7)",
            "table=1,ct_state=+trk+new,ct_zone=7,udp,actions=ct_clear,resubmit(,2)",
            "table=2,ct_state=-trk,ct_zone=0,actions=output:2",
            "table=2,priority=1,actions=output:3",
        ])?;
        bed.expect("forgotten", &frame(), &[&frame()], &[])?;
        bed.uses(&["ct_clear"])
    })
}
