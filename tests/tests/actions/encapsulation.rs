//! Headers around packets: NSH (RFC 8300), Ethernet, and labels under an Ethernet header of their own.

use anyhow::{Result, ensure};
use tests::lab;

use crate::Bed;
use crate::frames::{ETHERNET, IPV4, Ip4, MPLS, NSH, ethernet, lse, with_header};

/// Of the outer header.
const OUTER: [u8; 12] = [2, 0, 0, 0, 9, 2, 2, 0, 0, 0, 9, 1];
const OUTER_ACTIONS: &str =
    "encap(ethernet),set_field:02:00:00:00:09:02->eth_dst,set_field:02:00:00:00:09:01->eth_src";

/// NSH of metadata type 1.
fn md1(ttl: u8, next: u8, path: u32, index: u8, contexts: [u32; 4]) -> Vec<u8> {
    let first: u16 = u16::from(ttl) << 6 | 6;
    let mut bytes = first.to_be_bytes().to_vec();
    bytes.extend([1, next]);
    bytes.extend((path << 8 | u32::from(index)).to_be_bytes());
    for context in contexts {
        bytes.extend(context.to_be_bytes());
    }
    bytes
}

/// NSH of metadata type 2 around an Ethernet frame, with these variable-length headers.
fn md2(ttl: u8, path: u32, index: u8, headers: &[u8]) -> Vec<u8> {
    let words = 2 + headers.len() as u16 / 4;
    let mut bytes = (u16::from(ttl) << 6 | words).to_be_bytes().to_vec();
    bytes.extend([2, 3]);
    bytes.extend((path << 8 | u32::from(index)).to_be_bytes());
    bytes.extend(headers);
    bytes
}

#[test]
fn nsh_md1_goes_around_a_frame_is_changed_and_comes_off() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let inner = ethernet(IPV4, &Ip4::default().udp(1000, 2000));
        let around = |header: Vec<u8>| with_header(OUTER, NSH, &[&header, &inner[..]].concat());
        bed.rule(
            &format!(
                "in_port=1,ip,actions=encap(nsh(md_type=1)),set_field:0x123456->nsh_spi,\
                 set_field:254->nsh_si,set_field:0x11223344->nsh_c1,set_field:4->nsh_c4,{OUTER_ACTIONS},output:2"
            ),
            &inner,
            &around(md1(63, 3, 0x12_3456, 254, [0x1122_3344, 0, 0, 4])),
            &["push_nsh(flags=0,ttl=63,mdtype=1,np=3,spi=0x123456,si=254,c1=0x11223344", "push_eth("],
        )?;
        let before = around(md1(63, 3, 0x12_3456, 254, [1, 2, 3, 4]));
        bed.rules(&[
            "in_port=1,dl_type=0x894f,nsh_mdtype=1,nsh_spi=0x123456,nsh_c1=1,actions=decap(),decap(),output:2",
        ])?;
        bed.expect("decap", &before, &[&inner], &[])?;
        bed.uses(&["pop_eth,pop_nsh()"])
    })
}

/// The module has refused to set NSH fields in all its versions (EINVAL): so do we, and ovs-vswitchd says so.
#[test]
fn the_fields_of_nsh_cant_be_set() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        for part in [
            "failed to put[create] (Invalid argument)",
            "execute set(nsh(",
        ] {
            lab.expect_log(part, "the flow is refused");
        }
        let inner = ethernet(IPV4, &Ip4::default().udp(1000, 2000));
        let header = md1(63, 3, 0x12_3456, 254, [1, 2, 3, 4]);
        let frame = with_header(OUTER, NSH, &[&header, &inner[..]].concat());
        bed.rules(&["in_port=1,dl_type=0x894f,actions=set_field:0x77->nsh_spi,output:2"])?;
        bed.send(1, &frame)?;
        ensure!(bed.gather(2, 0)?.is_empty(), "it passed");
        tests::wait::soon("the refusal in the log", || {
            Ok(lab
                .log()
                .contains("failed to put[create] (Invalid argument)"))
        })?;
        // Read, they can be.
        bed.rules(&[
            "in_port=1,dl_type=0x894f,nsh_spi=0x123456,nsh_si=254,nsh_c4=4,actions=output:2",
        ])?;
        bed.expect("a match on NSH", &frame, &[&frame], &[])
    })
}

#[test]
fn nsh_md2_carries_its_headers() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let inner = ethernet(IPV4, &Ip4::default().udp(1000, 2000));
        // Class, type, length, and the value padded to words.
        let one = [0x10, 0, 10, 4, 0x12, 0x34, 0x56, 0x78];
        let two = [0x20, 0, 20, 6, 0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0, 0];
        let out = with_header(
            OUTER,
            NSH,
            &[
                &md2(63, 0x1234, 255, &[&one[..], &two].concat()),
                &inner[..],
            ]
            .concat(),
        );
        bed.rule(
            &format!(
                "in_port=1,ip,actions=encap(nsh(md_type=2,tlv(0x1000,10,0x12345678),tlv(0x2000,20,0xfedcba987654))),\
                 set_field:0x1234->nsh_spi,{OUTER_ACTIONS},output:2"
            ),
            &inner,
            &out,
            &["push_nsh(flags=0,ttl=63,mdtype=2,np=3,spi=0x1234,si=255,md2=0x10000a04123456782000"],
        )?;
        bed.rules(&[
            "in_port=1,dl_type=0x894f,nsh_mdtype=2,nsh_spi=0x1234,actions=decap(),decap(),output:2",
        ])?;
        bed.expect("decap of md2", &out, &[&inner], &[])?;
        bed.uses(&["pop_eth,pop_nsh()"])
    })
}

#[test]
fn an_ethernet_header_is_taken_off_and_another_put_on() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let packet = Ip4::default().udp(1000, 2000);
        bed.rule(
            &format!("in_port=1,ip,actions=decap(),{OUTER_ACTIONS},output:2"),
            &ethernet(IPV4, &packet),
            &with_header(OUTER, IPV4, &packet),
            &["pop_eth,push_eth("],
        )?;
        // A packet that is no frame doesn't leave through an Ethernet port.
        bed.rules(&["in_port=1,ip,actions=output:3,decap(),output:2"])?;
        let frame = ethernet(IPV4, &packet);
        bed.expect("a bare packet", &frame, &[], &[&frame])
    })
}

#[test]
fn labels_go_around_a_whole_frame() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let bed = Bed::new(lab)?;
        let inner = ethernet(IPV4, &Ip4::default().udp(1000, 2000));
        let labels = |entries: &[[u8; 4]]| {
            with_header(OUTER, MPLS, &[&entries.concat(), &inner[..]].concat())
        };
        bed.rule(
            &format!(
                "in_port=1,ip,actions=encap(mpls),set_field:1234->mpls_label,{OUTER_ACTIONS},output:2"
            ),
            &inner,
            &labels(&[lse(1234, 0, true, 64)]),
            &["add_mpls(label=1234", "push_eth("],
        )?;
        bed.rules(&[
            "in_port=1,mpls,mpls_label=1234,actions=decap(),decap(packet_type(ns=0,type=0)),output:2",
        ])?;
        bed.expect(
            "decap of labels",
            &labels(&[lse(1234, 0, true, 64)]),
            &[&inner],
            &[],
        )?;
        bed.uses(&["pop_eth,pop_mpls(eth_type=0x6558)"])?;
        // That it was a frame is seen: it goes on by its own addresses.
        bed.rules(&[
            "table=0,in_port=1,mpls,actions=decap(),decap(packet_type(ns=0,type=0)),resubmit(,1)",
            &format!(
                "table=1,udp,dl_dst={},actions=set_field:9->udp_dst,output:2",
                ETHERNET[..6]
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect::<Vec<_>>()
                    .join(":")
            ),
        ])?;
        let out = ethernet(IPV4, &Ip4::default().udp(1000, 9));
        bed.expect(
            "the frame below",
            &labels(&[lse(1234, 0, true, 64)]),
            &[&out],
            &[],
        )
    })
}
