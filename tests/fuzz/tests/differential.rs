//! Random packets through random action lists, beside a slow implementation of the actions that shares
//! nothing with the daemon's: what comes out of each port is the same, byte for byte.
//!
//! Packets: none to three tags, in band and out; IPv4 and IPv6 with options, extension headers and
//! fragments; TCP, UDP, SCTP, ICMP; ARP and unknown types; Ethernet padding; checksums complete, left to be
//! made, and packets that stand for several. Actions: output (several, to ports that are there and aren't),
//! set and set_masked of each field, VLAN tags, trunc, clone, sample, check_pkt_len, dec_ttl, hash, recirc
//! and what recirculated packets meet, nested.
//!
//! What it can't see: order between nested lists (those that are put off come later, as in the module);
//! lists beyond the limits of depth, and headers set behind three tags, which are counted and left out;
//! what the slow one doesn't know.
#![allow(clippy::expect_used, clippy::panic)]

use datapath::codec;
use datapath::drop_reason::DropReason;
use datapath::executor::Executor;
use flow::extract::{self, Metadata};
use flow::key::Key;
use frame::{Frame, Gso, GsoKind, PartialChecksum, VlanTag};
use fuzz::actions::{self, Wish, field};
use fuzz::campaign::Campaign;
use fuzz::device::PLAIN;
use fuzz::packet::{self, ethertype, find, find_l4, is_tag};
use fuzz::slow::{Class, Flows, Slow, State};
use fuzz::wire;
use fuzz::world::World;
use netlink::Family;
use netlink::attr::Writer;
use rand::Rng;
use rand::rngs::SmallRng;

const IN_PORT: u32 = 1;
const PORTS: [u32; 7] = [0, 1, 2, 3, 4, 5, 6];
/// What recirculated packets can be.
const KINDS: [(u16, u8); 7] = [
    (ethertype::IPV4, 6),
    (ethertype::IPV4, 17),
    (ethertype::IPV4, 132),
    (ethertype::IPV6, 6),
    (ethertype::IPV6, 17),
    (ethertype::IPV6, 58),
    (ethertype::ARP, 0),
];
const MARKS: u32 = 3;
const RECIRC_IDS: u32 = 3;

struct Bed {
    world: World,
    dp: i32,
    executor: Executor,
    flows: Flows,
    /// Packets are cut off, also recirculated ones. What is left then of a checksum to be made, and of a
    /// packet that stands for several, is the module's business (see the recordings): there are none.
    trunc: bool,
    skipped: u64,
}

/// A packet, as it goes in and as it is.
struct Case {
    frame: Frame,
    states: Vec<State>,
    padding: usize,
}

#[test]
fn what_comes_out_is_what_a_slow_implementation_says() {
    let mut skipped = 0;
    let mut all = 0;
    let campaign = Campaign {
        test: "differential",
        per_episode: 2000,
    };
    campaign.run(|random, count| {
        let mut bed = Bed::new(random);
        for _ in 0..count {
            bed.case(random);
        }
        skipped += bed.skipped;
        all += count;
        count
    });
    println!("left out: {skipped} of {all}");
    assert!(skipped * 20 < all, "too many left out");
}

fn fields(ethertype: u16, proto: u8) -> Vec<u16> {
    let mut fields = vec![field::PRIORITY, field::SKB_MARK, field::ETHERNET];
    match ethertype {
        ethertype::IPV4 => fields.extend([field::IPV4; 3]),
        ethertype::IPV6 => fields.extend([field::IPV6; 3]),
        _ => return fields,
    }
    match proto {
        6 => fields.extend([field::TCP; 2]),
        17 => fields.extend([field::UDP; 2]),
        132 => fields.extend([field::SCTP; 2]),
        _ => {}
    }
    fields
}

impl Bed {
    fn new(random: &mut SmallRng) -> Self {
        let mut world = World::new(random.random());
        world.devices.set_capabilities("", PLAIN);
        world.devices.keep();
        let dp = world.add_datapath("dpa");
        for number in 1..=6 {
            world.add_port(dp, number, &format!("p{number}"));
        }
        let mut flows = Flows::new();
        let trunc = random.random();
        for id in 1..=RECIRC_IDS {
            for mark in 0..MARKS {
                for (ethertype, proto) in KINDS {
                    let class: Class = (id, mark, ethertype, proto);
                    let wish = Wish {
                        ports: (0..8).collect(),
                        recirc: (id + 1..=RECIRC_IDS + 1).collect(),
                        fields: fields(ethertype, proto),
                        proto,
                        frag: 0,
                        depth: 1,
                        wild: false,
                        trunc,
                        pids: Vec::new(),
                    };
                    let list = actions::list(random, &wish);
                    install(&mut world, dp, class, &list);
                    flows.insert(class, list);
                }
            }
        }
        let executor = world.daemon.new_executor().expect("one of few");
        Self {
            world,
            dp,
            executor,
            flows,
            trunc,
            skipped: 0,
        }
    }

    fn case(&mut self, random: &mut SmallRng) {
        let mut case = match random.random_range(0..4) {
            0 if !self.trunc => segmented(random),
            1 if !self.trunc => partial(random),
            _ => whole(random),
        };
        let state = &case.states[0];
        let found = find(&state.bytes);
        let l4 = find_l4(&state.bytes, found.l3, found.ethertype);
        let (proto, frag) = l4.map_or((44, 2), |l4| (l4.proto, l4.frag));
        let mut fields = fields(found.ethertype, if frag == 2 { 0 } else { proto });
        if frag == 2 && found.ethertype == ethertype::IPV4 {
            // The key has the protocol, but there are no ports.
            fields.retain(|field| !matches!(*field, field::TCP | field::UDP | field::SCTP));
        }
        let wish = Wish {
            ports: (0..8).collect(),
            recirc: (1..=RECIRC_IDS + 1).collect(),
            fields,
            proto,
            frag,
            depth: 2,
            wild: false,
            trunc: self.trunc,
            pids: Vec::new(),
        };
        let list = actions::list(random, &wish);
        let again = format!(
            "packet {:02x?}\npadding {}\nlist {list:02x?}",
            state.bytes, case.padding
        );
        if !self.install_exact(&case.frame, &list) {
            panic!("refused: {again}");
        }
        let datapath = self.world.datapath("dpa").expect("there");
        let limits = |datapath: &datapath::datapath::Datapath| {
            let totals = datapath.totals();
            totals.dropped_by(DropReason::RecursionLimit)
                + totals.dropped_by(DropReason::DeferredLimit)
        };
        let before = limits(&datapath);
        let mut frames = vec![std::mem::take(&mut case.frame)];
        self.world
            .receive(&mut self.executor, &datapath, IN_PORT, &mut frames);
        let mut real: Vec<(u32, Vec<u8>)> = self
            .world
            .devices
            .take_sent()
            .into_iter()
            .map(|(name, frame)| (number(&name), in_band(frame)))
            .collect();
        self.remove_exact();
        if limits(&datapath) != before {
            self.skipped += 1;
            return;
        }
        let mut slow = Slow {
            ports: &PORTS,
            flows: &self.flows,
            output: Vec::new(),
            astray: false,
        };
        for mut state in case.states {
            slow.run(&mut state, &list);
        }
        if slow.astray {
            self.skipped += 1;
            return;
        }
        let mut expected = slow.output;
        // Within a port what is put off comes later.
        real.sort();
        expected.sort();
        if real != expected {
            let flows = &self.flows;
            let differs = real.iter().zip(&expected).find(|(a, b)| a != b);
            panic!(
                "{again}\nfirst difference (real, slow): {differs:02x?}\n{} and {} frames\nall: {real:02x?}\nand: {expected:02x?}\nflows {flows:02x?}",
                real.len(),
                expected.len()
            );
        }
    }

    /// A flow for exactly this packet.
    fn install_exact(&mut self, frame: &Frame, list: &[u8]) -> bool {
        let mut copy = frame.clone();
        let mut key = Key::ZERO;
        let meta = Metadata {
            in_port: IN_PORT,
            ..Metadata::default()
        };
        extract::extract(&mut copy, &meta, &mut key).expect("a good packet");
        let mut bytes = Vec::new();
        codec::key::write_key(&mut Writer::new(&mut bytes), &key).expect("a key");
        self.world
            .request(Family::Flow, 1, self.dp, 0x400, |writer| {
                writer.bytes(1, &bytes).expect("short");
                writer.bytes(2, list).expect("short");
                writer.bytes(9, &[7; 16]).expect("short");
            })
            .is_ok()
    }

    fn remove_exact(&mut self) {
        self.world
            .request(Family::Flow, 2, self.dp, 0, |writer| {
                writer.bytes(9, &[7; 16]).expect("short");
            })
            .expect("it was there");
        self.world.reap();
    }
}

/// A flow for recirculated packets of a class, whatever else they are.
fn install(world: &mut World, dp: i32, class: Class, list: &[u8]) {
    let (id, mark, ethertype, proto) = class;
    let build = |writer: &mut Writer<'_>, mask: bool| {
        let all = |value: u32| if mask { u32::MAX } else { value };
        writer.u32(20, all(id));
        writer.u32(15, all(mark));
        writer.bytes(4, &[0; 12]).expect("short");
        writer.be16(6, if mask { 0xffff } else { ethertype });
        match ethertype {
            ethertype::IPV4 => {
                let mut ip = [0; 12];
                (ip[8], ip[11]) = if mask { (0xff, 0xff) } else { (proto, 0) };
                writer.bytes(7, &ip).expect("short");
            }
            ethertype::IPV6 => {
                let mut ip = [0; 40];
                (ip[36], ip[39]) = if mask { (0xff, 0xff) } else { (proto, 0) };
                writer.bytes(8, &ip).expect("short");
            }
            _ => writer.bytes(13, &[0; 24]).expect("short"),
        }
        // What belongs to a protocol has to be there, whatever it holds.
        match proto {
            6 => {
                writer.bytes(field::TCP, &[0; 4]).expect("short");
                writer.be16(18, 0);
            }
            17 => writer.bytes(field::UDP, &[0; 4]).expect("short"),
            132 => writer.bytes(field::SCTP, &[0; 4]).expect("short"),
            58 => writer.bytes(12, &[0; 2]).expect("short"),
            _ => {}
        }
    };
    let (mut key, mut mask) = (Vec::new(), Vec::new());
    build(&mut Writer::new(&mut key), false);
    build(&mut Writer::new(&mut mask), true);
    let made = world.request(Family::Flow, 1, dp, 0x400, |writer| {
        writer.bytes(1, &key).expect("short");
        writer.bytes(7, &mask).expect("short");
        writer.bytes(2, list).expect("short");
    });
    if let Err(errno) = made {
        let parsed = codec::key::parse_match(&key, Some(&mask), datapath::families::flow::LIMITS);
        panic!(
            "{errno:?}: key {:?}: {class:02x?}: {list:02x?}",
            parsed.err()
        );
    }
}

fn number(name: &str) -> u32 {
    name.strip_prefix('p')
        .map_or(0, |number| number.parse().expect("a number"))
}

fn in_band(mut frame: Frame) -> Vec<u8> {
    assert_eq!(frame.offload.csum, None);
    assert_eq!(frame.offload.gso, None);
    frame.push_tag_inband().expect("room");
    frame.bytes().to_vec()
}

/// As a port receives it: the outermost tag in band or out of it.
fn received(random: &mut SmallRng, bytes: &[u8]) -> Frame {
    let tpid = packet::be16(bytes, 12);
    if !is_tag(tpid) || random.random() {
        return Frame::from_bytes(bytes);
    }
    let mut frame = Frame::from_bytes(&[&bytes[..12], &bytes[16..]].concat());
    frame.vlan = Some(VlanTag {
        tpid,
        tci: packet::be16(bytes, 14),
    });
    frame
}

fn whole(random: &mut SmallRng) -> Case {
    let packet = packet::random(random, false);
    Case {
        frame: received(random, &packet.bytes),
        states: vec![State::new(packet.bytes, packet.hidden)],
        padding: packet.padding,
    }
}

/// The L4 checksum is left to be made.
fn partial(random: &mut SmallRng) -> Case {
    loop {
        let packet = packet::random(random, true);
        let found = find(&packet.bytes);
        let l4 = find_l4(&packet.bytes, found.l3, found.ethertype);
        let Some(l4) = l4.filter(|l4| matches!(l4.proto, 6 | 17 | 132)) else {
            continue;
        };
        // A routed packet's sender sums what the last hop will see; padding is in nobody's sum.
        if l4.last_destination.is_some() || packet.padding != 0 || found.tags > 1 {
            continue;
        }
        let (field, is_sum) = packet::checksum_at(&l4, found.ethertype).expect("it has one");
        let mut state = State::new(packet.bytes, Vec::new());
        let mut bytes = state.bytes.clone();
        if is_sum {
            if state.bytes[field..field + 2] == [0, 0] {
                if l4.proto == 17 {
                    continue;
                }
                state.bytes[field..field + 2].fill(0xff);
            }
            let pseudo = packet::pseudo_header(&bytes, found.l3, found.ethertype, &l4, 0);
            let sum = packet::ones_sum(&[&pseudo]);
            bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        } else {
            bytes[field..field + 4].fill(0);
        }
        state.nonzero = is_sum;
        let mut frame = received(random, &bytes);
        let moved = if frame.vlan.is_some() { 4 } else { 0 };
        frame.offload.csum = Some(PartialChecksum {
            start: (l4.at - moved) as u16,
            offset: (field - l4.at) as u16,
        });
        return Case {
            frame,
            states: vec![state],
            padding: 0,
        };
    }
}

/// Stands for several.
fn segmented(random: &mut SmallRng) -> Case {
    let (mut bytes, segments, size) = packet::segmented(random);
    let found = find(&bytes);
    let l4 = find_l4(&bytes, found.l3, found.ethertype).expect("it has one");
    let (field, _) = packet::checksum_at(&l4, found.ethertype).expect("it has one");
    let pseudo = packet::pseudo_header(&bytes, found.l3, found.ethertype, &l4, 0);
    let sum = packet::ones_sum(&[&pseudo]);
    bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    let mut frame = received(random, &bytes);
    let moved = if frame.vlan.is_some() { 4 } else { 0 };
    frame.offload.csum = Some(PartialChecksum {
        start: (l4.at - moved) as u16,
        offset: (field - l4.at) as u16,
    });
    let kind = match (l4.proto, found.ethertype) {
        (17, _) => GsoKind::UdpL4,
        (_, ethertype::IPV4) => GsoKind::TcpV4,
        _ => GsoKind::TcpV6,
    };
    frame.offload.gso = Some(Gso {
        kind,
        ecn: false,
        size: size as u16,
        header_len: random.random(),
    });
    Case {
        frame,
        states: segments
            .into_iter()
            .map(|bytes| State::new(bytes, Vec::new()))
            .collect(),
        padding: 0,
    }
}

/// The reader of attributes reads what is written.
#[test]
fn lists_are_read_as_they_are_written() {
    let mut random = <SmallRng as rand::SeedableRng>::seed_from_u64(1);
    for _ in 0..1000 {
        let list = actions::list(&mut random, &Wish::default());
        let attributes = wire::attributes(&list);
        let mut again = Vec::new();
        for (kind, payload) in attributes {
            Writer::new(&mut again)
                .bytes(kind, &payload)
                .expect("short");
        }
        assert_eq!(list, again);
    }
}
