//! What the kernel module answered: recordings, and a writer of `OVS_KEY_ATTR_*` that knows nothing of
//! the datapath's own, so that keys can be compared byte by byte.
#![allow(dead_code)]

use flow::key::{ETH_P_802_2, FRAG_LATER, Key, PORT_NONE};
use serde_json::Value;
use zerocopy::IntoBytes;

/// The recorded cases of one group.
pub fn cases(group: &str) -> Vec<Value> {
    let path = format!(
        "{}/../tests/corpus/{group}.jsonl",
        env!("CARGO_MANIFEST_DIR")
    );
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let all: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(all.len() > 50, "{path} is not the whole recording");
    all.into_iter()
        .filter(|case| case.get("packet_in_hex").is_some_and(Value::is_string))
        .collect()
}

/// A hexadecimal member of a case; `None` if it is null or missing.
pub fn hex(case: &Value, member: &str) -> Option<Vec<u8>> {
    case.get(member)?.as_str().map(unhex)
}

pub fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The attributes in `bytes`: type without its flags, payload.
pub fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut all = Vec::new();
    while bytes.len() >= 4 {
        let len = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        let kind = u16::from_le_bytes([bytes[2], bytes[3]]) & 0x3fff;
        all.push((kind, &bytes[4..len]));
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    all
}

/// The payload of the first attribute of this type.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .into_iter()
        .find(|(found, _)| *found == kind)
        .map(|(_, payload)| payload)
}

fn put(out: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u16 + 4).to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The key as the kernel tells it in an upcall.
pub fn key_attributes(key: &Key) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, value) in [(20, key.recirc_id), (19, key.dp_hash), (2, key.priority)] {
        put(&mut out, kind, &value.to_le_bytes());
    }
    assert_eq!(key.tunnel.family, 0, "no recording here has a tunnel");
    if key.in_port != PORT_NONE {
        put(&mut out, 3, &key.in_port.to_le_bytes());
    }
    put(&mut out, 15, &key.skb_mark.to_le_bytes());
    put(&mut out, 22, &u32::from(key.ct_state).to_le_bytes());
    put(&mut out, 23, &key.ct_zone.to_le_bytes());
    put(&mut out, 24, &key.ct_mark.to_le_bytes());
    put(&mut out, 25, &key.ct_labels);
    if key.mac_proto == 0 {
        put_network(&mut out, key);
        return out;
    }
    put(&mut out, 4, &[key.eth_src, key.eth_dst].concat());
    let mut tags = vec![key.vlan, key.cvlan];
    tags.retain(|tag| tag.tci.get() != 0);
    put_tagged(&mut out, key, &tags);
    out
}

fn put_tagged(out: &mut Vec<u8>, key: &Key, tags: &[flow::key::VlanKey]) {
    let Some((tag, rest)) = tags.split_first() else {
        return put_network(out, key);
    };
    put(out, 6, tag.tpid.as_bytes());
    put(out, 5, tag.tci.as_bytes());
    let mut inner = Vec::new();
    put_tagged(&mut inner, key, rest);
    put(out, 1, &inner);
}

fn put_network(out: &mut Vec<u8>, key: &Key) {
    let eth_type = key.eth_type.get();
    if eth_type == ETH_P_802_2 {
        return;
    }
    put(out, 6, key.eth_type.as_bytes());
    let common = [key.ip_proto, key.ip_tos, key.ip_ttl, key.ip_frag];
    match eth_type {
        0x0800 => put(
            out,
            7,
            &[&key.ip_src[..4], &key.ip_dst[..4], &common].concat(),
        ),
        0x86dd => {
            let label = key.ipv6_label.as_bytes();
            put(
                out,
                8,
                &[&key.ip_src[..], &key.ip_dst, label, &common].concat(),
            );
            put(out, 32, &key.ipv6_exthdrs.to_le_bytes());
        }
        0x0806 | 0x8035 => {
            let (sip, tip) = (&key.ip_src[..4], &key.ip_dst[..4]);
            let op = [0, key.ip_proto];
            put(
                out,
                13,
                &[sip, tip, &op, &key.arp_sha, &key.arp_tha, &[0, 0]].concat(),
            );
        }
        0x8847 | 0x8848 => {
            let labels = key.mpls_labels.count_ones() as usize;
            put(out, 21, &key.mpls.as_bytes()[..4 * labels]);
        }
        0x894f => {
            let mut nsh = Vec::new();
            put(&mut nsh, 1, &key.nsh_base);
            if key.nsh_base[2] == 1 {
                put(&mut nsh, 2, key.nsh_context.as_bytes());
            }
            put(out, 28, &nsh);
        }
        _ => {}
    }
    if matches!(eth_type, 0x0800 | 0x86dd) && key.ip_frag != FRAG_LATER {
        put_transport(out, key, eth_type == 0x0800);
    }
}

fn put_transport(out: &mut Vec<u8>, key: &Key, v4: bool) {
    let ports = [key.tp_src.to_bytes(), key.tp_dst.to_bytes()].concat();
    let icmp = [ports[1], ports[3]];
    match (key.ip_proto, v4) {
        (6, _) => {
            put(out, 9, &ports);
            put(out, 18, key.tcp_flags.as_bytes());
        }
        (17, _) => put(out, 10, &ports),
        (132, _) => put(out, 17, &ports),
        (1, true) => put(out, 11, &icmp),
        (58, false) => {
            put(out, 12, &icmp);
            if matches!(key.tp_src.get(), 135 | 136) {
                put(
                    out,
                    14,
                    &[&key.nd_target[..], &key.nd_sll, &key.nd_tll].concat(),
                );
            }
        }
        _ => {}
    }
}
