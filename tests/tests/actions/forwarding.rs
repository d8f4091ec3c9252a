//! Where packets go: copies, cuts, choices by length, hashes, mirrors, nowhere.

use anyhow::{Context, Result, ensure};
use tests::{lab, wait};

use crate::Bed;
use crate::frames::{IPV4, Ip4, ethernet, tagged};

fn frame() -> Vec<u8> {
    ethernet(IPV4, &Ip4::default().udp(1000, 2000))
}

#[test]
fn a_clones_changes_stay_in_it() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let changed = |dst: u16, ttl: u8| {
            ethernet(
                IPV4,
                &Ip4 {
                    ttl,
                    ..Ip4::default()
                }
                .udp(1000, dst),
            )
        };
        bed.rules(&[
            "udp,actions=clone(set_field:9->udp_dst,clone(dec_ttl,output:2),output:2),output:3",
        ])?;
        bed.expect(
            "clones",
            &frame(),
            &[&changed(9, 63), &changed(9, 64)],
            &[&frame()],
        )?;
        // ovs-vswitchd undoes by itself what it can, and asks for a clone where it can't.
        bed.rules(&["udp,actions=clone(push_mpls:0x8847,output:2),output:3"])?;
        let labelled = crate::frames::ethernet(
            crate::frames::MPLS,
            &[&crate::frames::lse(0, 0, true, 64)[..], &frame()[14..]].concat(),
        );
        bed.expect("a clone", &frame(), &[&labelled], &[&frame()])?;
        bed.rules(&[
            "udp,actions=clone(ct_clear,ct(table=1)),output:3",
            "table=1,actions=output:2",
        ])?;
        bed.expect(
            "a clone through conntrack",
            &frame(),
            &[&frame()],
            &[&frame()],
        )?;
        bed.uses(&["clone("])
    })
}

#[test]
fn an_output_cuts_to_its_length() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let frame = frame();
        bed.rules(&["udp,actions=output(port=2,max_len=64),output:3"])?;
        bed.expect("cut", &frame, &[&frame[..64]], &[&frame])?;
        bed.uses(&["trunc(64)"])?;
        bed.rules(&["udp,actions=output(port=2,max_len=14),output(port=3,max_len=9000)"])?;
        bed.expect("cut to the header", &frame, &[&frame[..14]], &[&frame])
    })
}

#[test]
fn check_pkt_larger_chooses_by_length() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.rules(&[
            "table=0,udp,actions=check_pkt_larger(200)->reg0[0],resubmit(,1)",
            "table=1,udp,reg0=0,actions=set_field:1->udp_dst,output:2",
            "table=1,udp,reg0=1,actions=set_field:2->udp_dst,output:3",
        ])?;
        let of = |len: usize, dst: u16| {
            // Ethernet, IPv4, UDP: 42 bytes.
            ethernet(
                IPV4,
                &Ip4::default().udp_with(1000, dst, &vec![7; len - 42]),
            )
        };
        bed.expect("short", &of(199, 9), &[&of(199, 1)], &[])?;
        bed.expect("just as long", &of(200, 9), &[&of(200, 1)], &[])?;
        bed.expect("longer", &of(201, 9), &[], &[&of(201, 2)])?;
        // The module doesn't count the tag that it holds beside the packet.
        let tag = |frame: &[u8]| tagged(frame, &[(0x8100, 7)]);
        bed.expect("a tag", &tag(&of(200, 9)), &[&tag(&of(200, 1))], &[])?;
        bed.uses(&["check_pkt_len(size=200,gt(set(udp(dst=2)),v-c),le(set(udp(dst=1)),v-b))"])
    })
}

#[test]
fn a_hash_of_fields_chooses_a_port() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.rules(&[
            "table=0,udp,actions=multipath(symmetric_l3l4+udp,1024,modulo_n,2,0,NXM_NX_REG0[0..7]),resubmit(,1)",
            "table=1,reg0=0,actions=output:2",
            "table=1,reg0=1,actions=output:3",
        ])?;
        let mut counts = [0, 0];
        for port in 0..16 {
            let frame = ethernet(IPV4, &Ip4::default().udp(1000 + port, 2000));
            let mut before = None;
            for _ in 0..2 {
                bed.send(1, &frame)?;
                let came = [bed.gather(2, 0)?, bed.gather(3, 0)?];
                let at = came.iter().position(|frames| *frames == [frame.clone()]);
                let at = at.with_context(|| format!("{port}: {came:02x?}"))?;
                ensure!(came[1 - at].is_empty(), "{port} at both");
                ensure!(before.is_none_or(|before| before == at), "{port} wandered");
                before = Some(at);
            }
            counts[before.context("sent")?] += 1;
        }
        ensure!(
            counts.iter().all(|count| *count > 0),
            "one-sided: {counts:?}"
        );
        // A select group by the datapath's hash: hash(), then another look.
        bed.openflow(&[
            "add-group",
            "br0",
            "group_id=1,type=select,selection_method=dp_hash,bucket=output:2,bucket=output:2",
        ])?;
        bed.rules(&["udp,actions=group:1"])?;
        bed.expect("a group", &frame(), &[&frame()], &[])?;
        bed.uses(&["hash(l4(0)),recirc("])?;
        bed.openflow(&[
            "add-group",
            "br0",
            "group_id=2,type=all,bucket=set_field:9->udp_dst,output:2,bucket=output:3",
        ])?;
        bed.rules(&["udp,actions=group:2"])?;
        let changed = ethernet(IPV4, &Ip4::default().udp(1000, 9));
        bed.expect("all buckets", &frame(), &[&changed], &[&frame()])
    })
}

#[test]
fn a_mirror_sees_what_comes_and_what_leaves() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.lab.vsctl(format!(
            "-- --id=@a get port {} -- --id=@c get port {} -- --id=@m create mirror name=m0 \
             select-src-port=@a output-port=@c -- set bridge br0 mirrors=@m",
            bed.device(1),
            bed.device(3)
        ))?;
        bed.rules(&["in_port=1,udp,actions=set_field:9->udp_dst,output:2"])?;
        let changed = ethernet(IPV4, &Ip4::default().udp(1000, 9));
        bed.expect("a mirror of what comes", &frame(), &[&changed], &[&frame()])?;
        bed.lab.vsctl(format!(
            "-- --id=@b get port {} -- set mirror m0 select-src-port=[] select-dst-port=@b",
            bed.device(2)
        ))?;
        bed.rules(&["in_port=1,udp,actions=set_field:9->udp_dst,output:2"])?;
        bed.expect(
            "a mirror of what leaves",
            &frame(),
            &[&changed],
            &[&changed],
        )?;
        bed.lab.vsctl("set mirror m0 snaplen=64")?;
        bed.rules(&["in_port=1,udp,actions=set_field:9->udp_dst,output:2"])?;
        bed.expect(
            "a mirror that cuts",
            &frame(),
            &[&changed],
            &[&changed[..64]],
        )?;
        bed.uses(&["trunc(64)"])?;
        bed.lab.vsctl("clear bridge br0 mirrors")?;
        bed.rules(&["in_port=1,udp,actions=output:2"])?;
        bed.expect("no mirror", &frame(), &[&frame()], &[])
    })
}

#[test]
fn what_goes_nowhere_and_what_goes_back() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        bed.rules(&["udp,actions=drop"])?;
        bed.expect("drop", &frame(), &[], &[])?;
        ensure!(bed.actions()? == ["drop"], "{:?}", bed.actions()?);
        bed.rules(&["udp,actions=in_port,output:2"])?;
        bed.expect("in_port", &frame(), &[&frame()], &[])?;
        let back = bed.gather(1, 2)?;
        ensure!(back == [frame(), frame()], "back: {back:02x?}");
        bed.rules(&["udp,actions=all"])?;
        bed.expect("all", &frame(), &[&frame()], &[&frame()])?;
        bed.rules(&["udp,actions=normal"])?;
        bed.expect("normal", &frame(), &[&frame()], &[&frame()])?;
        bed.rules(&["udp,actions=note:00.11.22,output:2"])?;
        bed.expect("note", &frame(), &[&frame()], &[])?;
        let rules = bed.openflow(&["dump-flows", "br0"])?;
        ensure!(rules.contains("note:00.11.22"), "{rules}");
        Ok(())
    })
}

#[test]
fn a_meter_is_asked_and_shuts() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        // One packet an hour would be too few to say; a burst of 3 packets, one a second.
        bed.openflow(&[
            "add-meter",
            "br0",
            "meter=1,pktps,burst,stats,bands=type=drop,rate=1,burst_size=3",
        ])?;
        bed.rules(&["udp,actions=meter:1,output:2"])?;
        bed.send(1, &frame())?;
        bed.installed()?;
        for _ in 0..20 {
            bed.send(1, &frame())?;
        }
        let came = bed.gather(2, 3)?;
        ensure!((3..=6).contains(&came.len()), "{} of 21 passed", came.len());
        ensure!(came.iter().all(|f| *f == frame()), "{came:02x?}");
        bed.uses(&["meter("])?;
        wait::soon("the meter's counts", || {
            Ok(bed
                .openflow(&["meter-stats", "br0"])?
                .contains("packet_in_count:21"))
        })
    })
}
