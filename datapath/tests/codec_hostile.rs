//! Bytes from anywhere: no panic, and what is taken is consistent. Keys made up at random come back
//! from the wire as they were.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use datapath::codec::{Limits, action, key, tunnel};
use flow::key::{ETH_P_802_2, FRAG_LATER, Key, PORT_NONE, tunnel_flags};
use netlink::attr::{Table, Writer};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tests::corpus;
use zerocopy::{FromBytes, IntoBytes};

const LIMITS: Limits = Limits { conntrack: true };

/// `OVS_FLOW_ATTR_KEY`, `_ACTIONS`, `_MASK`.
const KEY: u16 = 1;
const ACTIONS: u16 = 2;
const MASK: u16 = 7;

fn written(key: &Key) -> Vec<u8> {
    let mut bytes = Vec::new();
    key::write_key(&mut Writer::new(&mut bytes), key).unwrap();
    bytes
}

/// One change as a hostile or broken client would make it.
fn mutate(bytes: &mut Vec<u8>, rng: &mut SmallRng) {
    if bytes.is_empty() {
        bytes.push(rng.random());
        return;
    }
    let at = rng.random_range(0..bytes.len());
    match rng.random_range(0..8) {
        0 => bytes[at] = rng.random(),
        1 => bytes[at] ^= 1 << rng.random_range(0..8),
        2 => bytes[at] = [0, 1, 4, 0x7f, 0x80, 0xff][rng.random_range(0..6)],
        3 => bytes.truncate(at),
        // Lengths and types of attributes lie at multiples of four.
        4 => bytes[at & !3] = rng.random_range(0..48),
        5 => {
            let kind = ((at & !3) + 2).min(bytes.len() - 1);
            bytes[kind] = rng.random_range(0..34);
        }
        6 => {
            let piece = bytes[at & !3..].to_vec();
            bytes.extend_from_slice(&piece[..piece.len().min(64)]);
        }
        _ => {
            let end = (at + 4 * rng.random_range(1..8)).min(bytes.len());
            bytes.drain(at & !3..end);
        }
    }
}

/// What a flow request goes through. True if all of it was taken.
fn take(key_attrs: &[u8], mask_attrs: Option<&[u8]>, actions: &[u8]) -> bool {
    if let Ok(metadata) = key::parse_metadata(key_attrs, LIMITS) {
        let _ = metadata.check(&metadata.key);
    }
    let Ok((key, mask)) = key::parse_match(key_attrs, mask_attrs, LIMITS) else {
        return false;
    };
    assert!(key::parse_key(key_attrs, LIMITS).is_ok());
    let mut masked = key;
    masked
        .as_mut_bytes()
        .iter_mut()
        .zip(mask.as_bytes())
        .for_each(|(byte, mask)| *byte &= mask);
    let mut bytes = written(&masked);
    bytes.clear();
    key::write_mask(&mut Writer::new(&mut bytes), &masked, &mask).unwrap();
    // What is given back is what would be taken again, with the same meaning.
    let Ok(list) = action::parse(actions, &key, &mask, LIMITS) else {
        return false;
    };
    let again = action::parse(&list.wire, &key, &mask, LIMITS).unwrap();
    assert_eq!(list.wire, again.wire);
    assert_eq!(
        format!("{:?}", list.program),
        format!("{:?}", again.program)
    );
    true
}

#[test]
fn mutated_requests_are_taken_or_refused() {
    let mut seeds = Vec::new();
    for group in [
        "flow_keys",
        "flow_key_bad",
        "flow_actions",
        "flow_action_bad",
        "flow_basic",
    ] {
        for case in corpus::read(group).unwrap() {
            let request = case.request_attributes();
            let attrs = Table::<12>::new(&request);
            let part = |kind| attrs.get(kind).map(|attr| attr.payload.to_vec());
            // Long lists are slow to change and say nothing new.
            if let Some(key) = part(KEY).filter(|_| request.len() < 2000) {
                seeds.push((key, part(MASK), part(ACTIONS).unwrap_or_default()));
            }
        }
    }
    let rounds = if cfg!(debug_assertions) {
        50_000
    } else {
        1_000_000
    };
    let mut rng = SmallRng::seed_from_u64(0x0005_d9d0);
    let mut taken = 0;
    for _ in 0..rounds {
        let (mut key, mut mask, mut actions) = seeds[rng.random_range(0..seeds.len())].clone();
        for _ in 0..rng.random_range(1..4) {
            match rng.random_range(0..4) {
                0 => mutate(&mut key, &mut rng),
                1 => mask.iter_mut().for_each(|mask| mutate(mask, &mut rng)),
                2 => mutate(&mut actions, &mut rng),
                // An action that another seed has, among the others.
                _ => actions.extend_from_slice(&seeds[rng.random_range(0..seeds.len())].2),
            }
        }
        taken += usize::from(take(&key, mask.as_deref(), &actions));
    }
    // Neither of the two is rare.
    assert!(
        (rounds / 20..rounds * 19 / 20).contains(&taken),
        "{taken} of {rounds} taken"
    );
}

#[test]
fn nested_lists_end_at_sixteen_levels() {
    let mut list = Vec::new();
    // As deep as a netlink message can be, far beyond the limit.
    for _ in 0..16_000 {
        let mut outer = Vec::new();
        Writer::new(&mut outer).bytes(20, &list).unwrap();
        list = outer;
    }
    let key = Key::ZERO;
    let deep = action::parse_exact(&list, &key, LIMITS).map(|_| ());
    assert_eq!(deep, Err(netlink::Errno::EOVERFLOW));
}

/// A key as extraction may give it: fields of the layers that are there, nothing elsewhere.
fn consistent(seed: u64) -> Key {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut noise = [0u8; size_of::<Key>()];
    rng.fill(&mut noise[..]);
    let noise = Key::read_from_bytes(&noise).unwrap();
    let mut key = Key::ZERO;
    key.recirc_id = noise.recirc_id;
    key.dp_hash = noise.dp_hash;
    key.in_port = if rng.random() {
        noise.in_port % PORT_NONE
    } else {
        PORT_NONE
    };
    key.skb_mark = noise.skb_mark;
    key.priority = noise.priority;
    if rng.random() {
        key.ct_state = noise.ct_state;
        key.ct_zone = noise.ct_zone;
        key.ct_mark = noise.ct_mark;
        key.ct_labels = noise.ct_labels;
    }
    if rng.random() {
        tunnel_of(&mut key, &noise, &mut rng);
    }
    key.mac_proto = rng.random_range(0..2);
    let types = [
        0x0800, 0x86dd, 0x0806, 0x8035, 0x8847, 0x8848, 0x894f, 0x88cc, 0x8100,
    ];
    key.eth_type = types[rng.random_range(0..types.len())].into();
    if key.mac_proto == 1 {
        key.eth_src = noise.eth_src;
        key.eth_dst = noise.eth_dst;
        let tags = if key.eth_type == 0x8100 {
            2
        } else {
            rng.random_range(0..3)
        };
        for (index, tag) in [&mut key.vlan, &mut key.cvlan].into_iter().enumerate() {
            if index < tags {
                tag.tpid = [0x8100, 0x88a8][rng.random_range(0..2)].into();
                tag.tci = (noise.vlan.tci.get() | 0x1000).into();
            }
        }
        if rng.random_ratio(1, 10) {
            key.eth_type = ETH_P_802_2.into();
        }
    } else if key.eth_type == 0x8100 {
        key.eth_type = 0x0800.into();
    }
    layer3_of(&mut key, &noise, &mut rng);
    key
}

fn tunnel_of(key: &mut Key, noise: &Key, rng: &mut SmallRng) {
    let tunnel = &mut key.tunnel;
    *tunnel = noise.tunnel;
    tunnel.zero = [0; 6];
    tunnel.flags &=
        tunnel_flags::KEY | tunnel_flags::CSUM | tunnel_flags::DONT_FRAGMENT | tunnel_flags::OAM;
    if tunnel.flags & tunnel_flags::KEY == 0 {
        tunnel.id = 0.into();
    }
    tunnel.family = if rng.random() { 4 } else { 6 };
    if tunnel.family == 4 {
        tunnel.src[4..].fill(0);
        tunnel.dst[4..].fill(0);
    }
    let (flag, len) = match rng.random_range(0..4) {
        0 => (tunnel_flags::GENEVE_OPT, 4 * rng.random_range(1..64)),
        1 => (tunnel_flags::VXLAN_OPT, 4),
        2 => (tunnel_flags::ERSPAN_OPT, 12),
        _ => (0, 0),
    };
    tunnel.flags |= flag;
    tunnel.opts_len = len as u8;
    tunnel.opts[len..].fill(0);
}

fn layer3_of(key: &mut Key, noise: &Key, rng: &mut SmallRng) {
    match key.eth_type.get() {
        kind @ (0x0800 | 0x86dd) => {
            key.ip_src = noise.ip_src;
            key.ip_dst = noise.ip_dst;
            key.ip_tos = noise.ip_tos;
            key.ip_ttl = noise.ip_ttl;
            key.ip_frag = rng.random_range(0..3);
            let icmp = if kind == 0x0800 { 1 } else { 58 };
            key.ip_proto = [6, 17, 132, icmp, 47][rng.random_range(0..5)];
            if kind == 0x0800 {
                key.ip_src[4..].fill(0);
                key.ip_dst[4..].fill(0);
            } else {
                key.ipv6_label = (noise.ipv6_label.get() & 0xf_ffff).into();
                key.ipv6_exthdrs = noise.ipv6_exthdrs;
            }
            if key.ip_frag == FRAG_LATER || key.ip_proto == 47 {
                return;
            }
            key.tp_src = noise.tp_src;
            key.tp_dst = noise.tp_dst;
            if key.ip_proto == 6 {
                key.tcp_flags = noise.tcp_flags;
            }
            if key.ip_proto == icmp {
                key.tp_src = (noise.tp_src.get() & 0xff).into();
                key.tp_dst = (noise.tp_dst.get() & 0xff).into();
            }
            if key.ip_proto == 58 && rng.random() {
                key.tp_src = rng.random_range(135..137).into();
            }
            if key.ip_proto == 58 && matches!(key.tp_src.get(), 135 | 136) {
                key.nd_target = noise.nd_target;
                key.nd_sll = noise.nd_sll;
                key.nd_tll = noise.nd_tll;
            } else if rng.random() {
                key.ct_orig_proto = noise.ct_orig_proto | 1;
                key.ct_orig_tp_src = noise.ct_orig_tp_src;
                key.ct_orig_tp_dst = noise.ct_orig_tp_dst;
                let len = if kind == 0x0800 { 4 } else { 16 };
                key.ct_orig_src[..len].copy_from_slice(&noise.ct_orig_src[..len]);
                key.ct_orig_dst[..len].copy_from_slice(&noise.ct_orig_dst[..len]);
            }
        }
        0x0806 | 0x8035 => {
            key.ip_proto = noise.ip_proto;
            key.ip_src[..4].copy_from_slice(&noise.ip_src[..4]);
            key.ip_dst[..4].copy_from_slice(&noise.ip_dst[..4]);
            key.arp_sha = noise.arp_sha;
            key.arp_tha = noise.arp_tha;
        }
        0x8847 | 0x8848 => {
            let labels = rng.random_range(1..4);
            key.mpls[..labels].copy_from_slice(&noise.mpls[..labels]);
            key.mpls_labels = (1 << labels) - 1;
        }
        0x894f => {
            key.nsh_base = noise.nsh_base;
            if rng.random() {
                key.nsh_base[2] = 1;
            }
            if key.nsh_base[2] == 1 {
                key.nsh_context = noise.nsh_context;
            }
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        if cfg!(debug_assertions) { 4_000 } else { 100_000 }
    ))]

    #[test]
    fn a_key_comes_back_from_the_wire(seed in any::<u64>()) {
        let key = consistent(seed);
        let bytes = written(&key);
        prop_assert_eq!(key::parse_key(&bytes, LIMITS), Ok(key));
        // Exact over everything: under its own mask it is still the same key. Except where nothing
        // is said, which nothing can be exact about: no port, no type.
        let exact = key::parse_match(&bytes, None, LIMITS);
        if key.eth_type == ETH_P_802_2 {
            prop_assert_eq!(exact.is_ok(), key.vlan.tci == 0);
        } else {
            let (again, mask) = exact.unwrap();
            prop_assert_eq!(again, key);
            let mut masked = key;
            let bits = mask.as_bytes();
            masked.as_mut_bytes().iter_mut().zip(bits).for_each(|(byte, mask)| *byte &= mask);
            if key.in_port == PORT_NONE {
                masked.in_port = PORT_NONE;
            }
            prop_assert_eq!(masked, key);
        }
    }

    #[test]
    fn a_tunnel_to_send_through_comes_back_from_the_wire(seed in any::<u64>()) {
        let key = consistent(seed);
        let mut inside = Vec::new();
        tunnel::write(&mut Writer::new(&mut inside), &key.tunnel).unwrap();
        match tunnel::parse_set(&inside) {
            Ok(tunnel) => {
                let ignored = tunnel_flags::CRIT_OPT;
                prop_assert_eq!(tunnel.flags & !ignored, key.tunnel.flags);
                prop_assert_eq!(tunnel.as_bytes().len(), key.tunnel.as_bytes().len());
                let mut plain = tunnel;
                plain.flags &= !ignored;
                prop_assert_eq!(plain, key.tunnel);
            }
            // No tunnel at all, or random bytes that are no Geneve options.
            Err(errno) => {
                prop_assert_eq!(errno, netlink::Errno::EINVAL);
                let geneve = key.tunnel.flags & tunnel_flags::GENEVE_OPT != 0;
                prop_assert!(key.tunnel.family == 0 || geneve);
            }
        }
    }
}
