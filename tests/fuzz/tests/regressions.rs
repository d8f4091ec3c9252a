//! What the fuzzers found, each as a case of its own.
#![allow(clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use datapath::datapath::Datapath;
use datapath::drop_reason::DropReason;
use datapath::executor::Executor;
use frame::{Frame, Gso, GsoKind, PartialChecksum};
use fuzz::actions::{field, kind};
use fuzz::device::PLAIN;
use fuzz::packet;
use fuzz::world::World;
use netlink::Family;
use netlink::attr::Writer;

struct Bed {
    world: World,
    dp: i32,
    datapath: Arc<Datapath>,
    executor: Executor,
}

impl Bed {
    fn new(max_frame: u32) -> Self {
        let mut world = World::new(5);
        let mut plain = PLAIN;
        plain.max_frame = max_frame;
        world.devices.set_capabilities("", plain);
        world.devices.keep();
        let dp = world.add_datapath("dpa");
        world.add_port(dp, 1, "p1");
        world.add_port(dp, 2, "p2");
        let executor = world.daemon.new_executor().expect("one of few");
        let datapath = world.datapath("dpa").expect("made");
        Self {
            world,
            dp,
            datapath,
            executor,
        }
    }

    /// A flow for all untagged packets of a type, in any recirculation if `everywhere`.
    fn install(&mut self, ethertype: u16, everywhere: bool, build: impl FnOnce(&mut Writer<'_>)) {
        let mut list = Vec::new();
        build(&mut Writer::new(&mut list));
        let proto = 0;
        let key = |writer: &mut Writer<'_>, mask: bool| {
            writer.u32(20, if mask && !everywhere { u32::MAX } else { 0 });
            writer.bytes(4, &[0; 12]).expect("short");
            writer.be16(6, if mask { 0xffff } else { ethertype });
            if ethertype == 0x0800 {
                let mut ip = [0; 12];
                ip[8] = proto;
                writer.bytes(7, &ip).expect("short");
            }
        };
        let (mut bytes, mut mask) = (Vec::new(), Vec::new());
        key(&mut Writer::new(&mut bytes), false);
        key(&mut Writer::new(&mut mask), true);
        self.world
            .request(Family::Flow, 1, self.dp, 0x400, |writer| {
                writer.bytes(1, &bytes).expect("short");
                writer.bytes(7, &mask).expect("short");
                writer.bytes(2, &list).expect("short");
            })
            .expect("a flow");
    }

    fn receive(&mut self, frame: Frame) -> Vec<(String, Frame)> {
        let datapath = Arc::clone(&self.datapath);
        self.world
            .receive(&mut self.executor, &datapath, 1, &mut vec![frame]);
        let totals = datapath.totals();
        assert_eq!(
            totals.received + totals.executed + totals.copied,
            totals.transmitted + totals.to_user + totals.held + totals.dropped_total()
        );
        self.world.devices.take_sent()
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.datapath.totals().dropped_by(reason)
    }
}

fn bytes(text: &str) -> Vec<u8> {
    tests::corpus::unhex(text)
}

/// Found by `packets.rs`: what was put off could be put off anew without end.
#[test]
fn a_loop_of_recirculations_ends() {
    let mut bed = Bed::new(1514);
    bed.install(0x88b5, true, |writer| writer.u32(kind::RECIRC, 1));
    let frame = [&[2; 12][..], &[0x88, 0xb5], &[0; 46]].concat();
    assert!(bed.receive(Frame::from_bytes(&frame)).is_empty());
    assert_eq!(bed.dropped(DropReason::DeferredLimit), 1);
}

/// Found by `differential.rs`: the checksum was changed as if its pseudo header were IPv4's.
#[test]
fn icmpv6_in_ipv4_keeps_its_checksum_when_an_address_is_set() {
    let mut bed = Bed::new(1514);
    bed.install(0x0800, false, |writer| {
        let mut set = Vec::new();
        let mut value = [0; 24];
        value[..4].copy_from_slice(&[192, 0, 2, 1]);
        value[12..16].fill(0xff);
        Writer::new(&mut set)
            .bytes(field::IPV4, &value)
            .expect("short");
        writer.bytes(kind::SET_MASKED, &set).expect("short");
        writer.u32(kind::OUTPUT, 2);
    });
    let frame = bytes(concat!(
        "ba931f408c2e4f40bd0d6fff0800",
        "4599001c05d80000403aa6ddfe648a4123b820fc",
        "8000123401020304"
    ));
    let sent = bed.receive(Frame::from_bytes(&frame));
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].1.bytes()[26..30], [192, 0, 2, 1]);
    assert_eq!(sent[0].1.bytes()[36..38], [0x12, 0x34]);
}

fn tcp_to_be_cut(payload: usize, size: u16) -> Frame {
    let mut frame = bytes(concat!(
        "0200000000020200000000010800",
        "450000281234000040060000c0000201c0000202",
        "03e807d000000001000000025018200000000000"
    ));
    frame.resize(frame.len() + payload, 0x5a);
    let len = (frame.len() - 14) as u16;
    frame[16..18].copy_from_slice(&len.to_be_bytes());
    packet::make_ipv4_checksum(&mut frame, 14);
    let mut frame = Frame::from_bytes(&frame);
    frame.offload.csum = Some(PartialChecksum {
        start: 34,
        offset: 16,
    });
    frame.offload.gso = Some(Gso {
        kind: GsoKind::TcpV4,
        ecn: false,
        size,
        header_len: 54,
    });
    frame
}

/// Found by `packets.rs`: a port was given segments longer than its MTU.
#[test]
fn segments_longer_than_the_port_takes_are_dropped_and_counted() {
    let mut bed = Bed::new(574);
    bed.install(0x0800, false, |writer| writer.u32(kind::OUTPUT, 2));
    // 1000 bytes, 1000 bytes, 100 bytes.
    let sent = bed.receive(tcp_to_be_cut(2100, 1000));
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].1.len(), 154);
    assert_eq!(bed.dropped(DropReason::OutputTooLong), 2);
}

/// Found by `differential.rs`: behind three tags, looked at again, the whole length was compared.
#[test]
fn the_length_of_segments_counts_behind_three_tags() {
    let mut bed = Bed::new(1514);
    bed.install(0x0800, false, |writer| {
        for _ in 0..3 {
            writer
                .bytes(kind::PUSH_VLAN, &[0x81, 0x00, 0x10, 0x01])
                .expect("short");
        }
        // Nothing is found there, but the packet is looked at again.
        writer.u32(kind::RECIRC, 9);
        let mut check = Vec::new();
        let mut inner = Writer::new(&mut check);
        inner.u16(1, 200);
        let mut yes = Vec::new();
        Writer::new(&mut yes).u32(kind::OUTPUT, 2);
        inner.bytes(2, &[]).expect("short");
        inner.bytes(3, &yes).expect("short");
        writer.bytes(kind::CHECK_PKT_LEN, &check).expect("short");
    });
    // Segments of 100 bytes, 154 with headers, 8 more of tags.
    let sent = bed.receive(tcp_to_be_cut(1000, 100));
    assert_eq!(sent.len(), 10);
}

/// Found by `packets.rs`: a thread's context of a daemon that was gone served one at the same address.
#[test]
fn a_daemon_at_the_address_of_a_dead_one_is_another() {
    for seed in 0..64 {
        let mut world = World::new(seed);
        let dp = world.add_datapath("dpa");
        world
            .request(Family::Flow, 2, dp, 0, |_| {})
            .expect("flushed");
        drop(world);
    }
}
