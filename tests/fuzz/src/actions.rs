//! Random action lists as attributes, such as the codec accepts for the packets that they are meant for.
//!
//! Source of numbers and structures: uapi `linux/openvswitch.h`.

use netlink::attr::Writer;
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

/// `OVS_ACTION_ATTR_*`.
#[allow(missing_docs)]
pub mod kind {
    pub const OUTPUT: u16 = 1;
    pub const USERSPACE: u16 = 2;
    pub const SET: u16 = 3;
    pub const PUSH_VLAN: u16 = 4;
    pub const POP_VLAN: u16 = 5;
    pub const SAMPLE: u16 = 6;
    pub const RECIRC: u16 = 7;
    pub const HASH: u16 = 8;
    pub const PUSH_MPLS: u16 = 9;
    pub const POP_MPLS: u16 = 10;
    pub const SET_MASKED: u16 = 11;
    pub const CT: u16 = 12;
    pub const TRUNC: u16 = 13;
    pub const PUSH_ETH: u16 = 14;
    pub const POP_ETH: u16 = 15;
    pub const CT_CLEAR: u16 = 16;
    pub const PUSH_NSH: u16 = 17;
    pub const POP_NSH: u16 = 18;
    pub const METER: u16 = 19;
    pub const CLONE: u16 = 20;
    pub const CHECK_PKT_LEN: u16 = 21;
    pub const ADD_MPLS: u16 = 22;
    pub const DEC_TTL: u16 = 23;
    pub const DROP: u16 = 24;
}

/// `OVS_KEY_ATTR_*`, as far as they can be set.
#[allow(missing_docs)]
pub mod field {
    pub const PRIORITY: u16 = 2;
    pub const ETHERNET: u16 = 4;
    pub const IPV4: u16 = 7;
    pub const IPV6: u16 = 8;
    pub const TCP: u16 = 9;
    pub const UDP: u16 = 10;
    pub const SKB_MARK: u16 = 15;
    pub const SCTP: u16 = 17;
    pub const MPLS: u16 = 21;
}

/// What a list may hold.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Ports to send to.
    pub ports: Vec<u32>,
    /// Recirculation ids to go to.
    pub recirc: Vec<u32>,
    /// Fields that can be set (`OVS_KEY_ATTR_*`).
    pub fields: Vec<u16>,
    /// Of the flow: `set` (not masked) must repeat protocol and fragment type.
    pub proto: u8,
    /// See `proto`.
    pub frag: u8,
    /// Lists within it.
    pub depth: u32,
    /// Also what only a fuzzer wants: labels, L3 packets, upcalls, meters.
    pub wild: bool,
    /// Cutting.
    pub trunc: bool,
    /// Readers of upcalls.
    pub pids: Vec<u32>,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            ports: (0..8).collect(),
            recirc: (0..6).collect(),
            fields: vec![
                field::PRIORITY,
                field::ETHERNET,
                field::IPV4,
                field::IPV6,
                field::TCP,
                field::UDP,
                field::SKB_MARK,
                field::SCTP,
                field::MPLS,
            ],
            proto: 6,
            frag: 0,
            depth: 3,
            wild: true,
            trunc: true,
            pids: vec![0, 0x4000_0001],
        }
    }
}

/// A list of one to six actions.
pub fn list(random: &mut SmallRng, wish: &Wish) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.random_range(1..=6) {
        action(&mut bytes, random, wish);
    }
    if random.random_ratio(2, 3) {
        output(&mut bytes, random, wish);
    }
    bytes
}

fn output(bytes: &mut Vec<u8>, random: &mut SmallRng, wish: &Wish) {
    let port = wish.ports.choose(random).copied().unwrap_or(1);
    Writer::new(bytes).u32(kind::OUTPUT, port);
}

fn inner(random: &mut SmallRng, wish: &Wish) -> Vec<u8> {
    let mut wish = wish.clone();
    wish.depth -= 1;
    let mut bytes = Vec::new();
    for _ in 0..random.random_range(0..=3) {
        action(&mut bytes, random, &wish);
    }
    if random.random_ratio(3, 4) {
        output(&mut bytes, random, &wish);
    }
    bytes
}

fn action(bytes: &mut Vec<u8>, random: &mut SmallRng, wish: &Wish) {
    let nests = if wish.depth > 0 { 5 } else { 0 };
    let wild = if wish.wild { 8 } else { 0 };
    match random.random_range(0..14 + nests + wild) {
        0..=2 => output(bytes, random, wish),
        3..=6 => set(bytes, random, wish),
        7 | 8 => {
            let tpid: u16 = if random.random() { 0x8100 } else { 0x88a8 };
            let tci = 0x1000 | random.random::<u16>() & 0xefff;
            let mut payload = tpid.to_be_bytes().to_vec();
            payload.extend_from_slice(&tci.to_be_bytes());
            put(bytes, kind::PUSH_VLAN, &payload);
        }
        9 => put(bytes, kind::POP_VLAN, &[]),
        10 if wish.trunc => {
            let limit = random.random_range(14..200_u32);
            put(bytes, kind::TRUNC, &limit.to_ne_bytes());
        }
        11 => {
            let mut payload = 0_u32.to_ne_bytes().to_vec();
            payload.extend_from_slice(&random.random::<u32>().to_ne_bytes());
            put(bytes, kind::HASH, &payload);
            recirculate(bytes, random, wish);
        }
        12 | 13 => recirculate(bytes, random, wish),
        14..=18 if nests != 0 => nested(bytes, random, wish),
        _ if wish.wild => unusual(bytes, random, wish),
        _ => output(bytes, random, wish),
    }
}

fn recirculate(bytes: &mut Vec<u8>, random: &mut SmallRng, wish: &Wish) {
    if let Some(id) = wish.recirc.choose(random) {
        put(bytes, kind::RECIRC, &id.to_ne_bytes());
    }
}

fn nested(bytes: &mut Vec<u8>, random: &mut SmallRng, wish: &Wish) {
    let mut writer_bytes = Vec::new();
    let mut writer = Writer::new(&mut writer_bytes);
    match random.random_range(0..5) {
        0 | 1 => {
            let list = inner(random, wish);
            put(bytes, kind::CLONE, &list);
        }
        2 => {
            let probability = match random.random_range(0..3) {
                0 => 0,
                1 if wish.wild => random.random(),
                _ => u32::MAX,
            };
            writer.u32(1, probability);
            writer.bytes(2, &inner(random, wish)).expect("short");
            put(bytes, kind::SAMPLE, &writer_bytes);
        }
        3 => {
            writer.u16(1, random.random_range(20..300));
            writer.bytes(2, &inner(random, wish)).expect("short");
            writer.bytes(3, &inner(random, wish)).expect("short");
            put(bytes, kind::CHECK_PKT_LEN, &writer_bytes);
        }
        _ => {
            writer.bytes(1, &inner(random, wish)).expect("short");
            put(bytes, kind::DEC_TTL, &writer_bytes);
        }
    }
}

/// What the differential test has no slow twin of.
fn unusual(bytes: &mut Vec<u8>, random: &mut SmallRng, wish: &Wish) {
    let label = |random: &mut SmallRng| {
        let mut payload = random.random::<u32>().to_be_bytes().to_vec();
        let ethertype: u16 = if random.random() { 0x8847 } else { 0x8848 };
        payload.extend_from_slice(&ethertype.to_be_bytes());
        payload
    };
    match random.random_range(0..14) {
        0 => {
            let mut payload = label(random);
            payload.extend_from_slice(&[0, 0]);
            put(bytes, kind::PUSH_MPLS, &payload);
        }
        1 => {
            let mut payload = label(random);
            payload.extend_from_slice(&random.random_range(0..2_u16).to_ne_bytes());
            payload.extend_from_slice(&[0, 0]);
            put(bytes, kind::ADD_MPLS, &payload);
        }
        2 => {
            let types: [u16; 6] = [0x8847, 0x8848, 0x0800, 0x86dd, 0x6558, 0x0806];
            let ethertype = types.choose(random).copied().unwrap_or(0x0800);
            put(bytes, kind::POP_MPLS, &ethertype.to_be_bytes());
        }
        3 => put(bytes, kind::PUSH_ETH, &random.random::<[u8; 12]>()),
        4 => put(bytes, kind::POP_ETH, &[]),
        5 => {
            let mut base = vec![0, 63, 1, 3];
            base.extend_from_slice(&random.random::<[u8; 4]>());
            let mut nsh = Vec::new();
            let mut writer = Writer::new(&mut nsh);
            writer.bytes(1, &base).expect("short");
            writer
                .bytes(2, &random.random::<[u8; 16]>())
                .expect("short");
            let mut outer = Vec::new();
            Writer::new(&mut outer).bytes(28, &nsh).expect("short");
            put(bytes, kind::PUSH_NSH, &outer);
        }
        6 => put(bytes, kind::POP_NSH, &[]),
        11 => put(bytes, kind::CT_CLEAR, &[]),
        12 | 13 => {
            let mut payload = Vec::new();
            let mut writer = Writer::new(&mut payload);
            if random.random() {
                writer.flag(1);
            }
            writer.u16(2, random.random_range(0..3));
            if random.random_ratio(1, 4) {
                let nest = writer.begin(6);
                if random.random() {
                    writer.flag(if random.random() { 1 } else { 2 });
                    writer.bytes(3, &[10, 0, 0, 9]).expect("short");
                }
                writer.end(nest).expect("short");
            }
            put(bytes, kind::CT, &payload);
            recirculate(bytes, random, wish);
        }
        7 => put(
            bytes,
            kind::METER,
            &random.random_range(0..4_u32).to_ne_bytes(),
        ),
        8 => put(
            bytes,
            kind::DROP,
            &random.random_range(0..2_u32).to_ne_bytes(),
        ),
        _ => {
            let mut payload = Vec::new();
            let mut writer = Writer::new(&mut payload);
            writer.u32(1, wish.pids.choose(random).copied().unwrap_or(0));
            if random.random() {
                writer
                    .bytes(2, &random.random::<[u8; 16]>())
                    .expect("short");
            }
            if random.random_ratio(1, 4) {
                writer.flag(4);
            }
            put(bytes, kind::USERSPACE, &payload);
        }
    }
}

/// Appends a `set` or `set_masked` of one of the wish's fields.
pub fn set(bytes: &mut Vec<u8>, random: &mut SmallRng, wish: &Wish) {
    let Some(chosen) = wish.fields.choose(random).copied() else {
        return output(bytes, random, wish);
    };
    let len = match chosen {
        field::ETHERNET | field::IPV4 => 12,
        field::IPV6 => 40,
        _ => 4,
    };
    let mut value: Vec<u8> = (0..len).map(|_| random.random()).collect();
    // Numbers that carry in sums.
    if random.random_ratio(1, 4) {
        let byte = if random.random() { 0xff } else { 0 };
        value.fill(byte);
    }
    // Few marks and priorities, so that flows meet them.
    if matches!(chosen, field::PRIORITY | field::SKB_MARK) {
        value = random.random_range(0..3_u32).to_ne_bytes().to_vec();
    }
    let mut mask: Vec<u8> = (0..len)
        .map(|_| match random.random_range(0..3) {
            0 => 0,
            1 => 0xff,
            _ => random.random(),
        })
        .collect();
    let masked = random.random();
    match chosen {
        field::IPV4 if masked => (mask[8], mask[11]) = (0, 0),
        field::IPV4 => (value[8], value[11]) = (wish.proto, wish.frag),
        field::IPV6 => {
            // A label has 20 bits.
            (value[32], mask[32]) = (0, 0);
            value[33] &= 0x0f;
            mask[33] &= 0x0f;
            if masked {
                (mask[36], mask[39]) = (0, 0);
            } else {
                (value[36], value[39]) = (wish.proto, wish.frag);
            }
        }
        _ => {}
    }
    let mut payload = Vec::new();
    if masked {
        for (value, mask) in value.iter_mut().zip(&mask) {
            *value &= mask;
        }
        value.extend_from_slice(&mask);
    }
    put(&mut payload, chosen, &value);
    put(
        bytes,
        if masked { kind::SET_MASKED } else { kind::SET },
        &payload,
    );
}

/// Appends an attribute.
pub fn put(bytes: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    Writer::new(bytes).bytes(kind, payload).expect("short");
}
