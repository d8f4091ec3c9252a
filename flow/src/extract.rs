//! From a frame to a key.
//!
//! The kernel's semantics (`key_extract`): a header that is cut short or malformed doesn't drop the
//! packet, its fields are zero; only a truncated VLAN tag and a bad NSH header do. The outermost tag
//! among the bytes is moved out of band on the way.
//!
//! Runs per packet: nothing is allocated, the key is written in the caller's place.

use std::mem::offset_of;

use frame::{Frame, GsoKind, VlanTag};
use zerocopy::IntoBytes;
use zerocopy::network_endian::{U16, U32};

use crate::headers::{Layers, array_at, eth_type, ip_proto, is_mpls, u16_at};
use crate::ipv6;
use crate::key::{ETH_P_802_2, FRAG_FIRST, FRAG_LATER, Key, TunnelKey, VLAN_CFI, VlanKey};

/// Where the packet's part of a key begins; in front of it are the metadata.
const PACKET: usize = offset_of!(Key, eth_src);
/// Where the metadata behind the tunnel begin.
const METADATA: usize = offset_of!(Key, recirc_id);

/// Bytes of the headers that are looked at.
const IPV4: usize = 20;
const ARP: usize = 28;
const TCP: usize = 20;
const SCTP: usize = 12;
const ND: usize = 24;
const NSH: usize = 8;

/// What a packet begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PacketType {
    /// An Ethernet header.
    #[default]
    Ethernet,
    /// The header of this Ethernet type (a packet out of an L3 tunnel).
    L3(u16),
}

/// What is known of a packet besides its bytes. Host byte order.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// Datapath port number, or [`PORT_NONE`](crate::key::PORT_NONE).
    pub in_port: u32,
    /// Packet mark.
    pub skb_mark: u32,
    /// Queueing priority.
    pub priority: u32,
    /// Recirculation context.
    pub recirc_id: u32,
    /// Hash computed by the `hash` action.
    pub dp_hash: u32,
    /// What the packet begins with.
    pub packet_type: PacketType,
    /// Outer header, if it came through a tunnel.
    pub tunnel: Option<Box<TunnelKey>>,
    /// What conntrack said.
    pub ct: Option<Box<ConntrackMetadata>>,
}

/// What conntrack said of a packet.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConntrackMetadata {
    /// `OVS_CS_F_*`.
    pub state: u8,
    /// Zone.
    pub zone: u16,
    /// Mark.
    pub mark: u32,
    /// Label.
    pub labels: [u8; 16],
    /// Source of the original direction's tuple (IPv4 in the first four bytes).
    pub orig_src: [u8; 16],
    /// Destination of the original direction's tuple.
    pub orig_dst: [u8; 16],
    /// Source port of the original direction's tuple.
    pub orig_tp_src: u16,
    /// Destination port of the original direction's tuple.
    pub orig_tp_dst: u16,
    /// Protocol of the original direction's tuple.
    pub orig_proto: u8,
}

/// Why a packet has no key: drop and count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtractError {
    /// Shorter than an Ethernet header.
    #[error("shorter than an Ethernet header")]
    Runt,
    /// A VLAN tag is cut short, or where no tag can be.
    #[error("a VLAN tag is cut short or misplaced")]
    Vlan,
    /// An NSH header is cut short or malformed.
    #[error("an NSH header is cut short or malformed")]
    Nsh,
}

/// Extracts `key` and where the headers are. `key` may hold anything that an earlier call left there
/// (or [`Key::ZERO`]); all of it is written.
///
/// # Errors
/// [`ExtractError`]: the packet is to be dropped; `key` is then unspecified.
#[inline]
pub fn extract(frame: &mut Frame, meta: &Metadata, key: &mut Key) -> Result<Layers, ExtractError> {
    match &meta.tunnel {
        Some(tunnel) => key.tunnel = **tunnel,
        None => clear_tunnel(&mut key.tunnel),
    }
    if let Some(rest) = key.as_mut_bytes().get_mut(METADATA..) {
        rest.fill(0);
    }
    key.in_port = meta.in_port;
    key.skb_mark = meta.skb_mark;
    key.priority = meta.priority;
    key.recirc_id = meta.recirc_id;
    key.dp_hash = meta.dp_hash;
    if let Some(ct) = &meta.ct {
        key.ct_state = ct.state;
        key.ct_zone = ct.zone;
        key.ct_mark = ct.mark;
        key.ct_labels = ct.labels;
        key.ct_orig_src = ct.orig_src;
        key.ct_orig_dst = ct.orig_dst;
        key.ct_orig_tp_src = U16::new(ct.orig_tp_src);
        key.ct_orig_tp_dst = U16::new(ct.orig_tp_dst);
        key.ct_orig_proto = ct.orig_proto;
    }
    // A port's receive path takes the tag out of band and wants the two bytes behind the type that
    // follows it; the kernel drops what hasn't got them.
    if meta.packet_type == PacketType::Ethernet
        && frame.vlan.is_none()
        && frame.len() < 20
        && u16_at(frame.bytes(), 12).is_some_and(VlanTag::is_tpid)
    {
        return Err(ExtractError::Vlan);
    }
    packet(frame, meta.packet_type, key)
}

/// Extracts the packet's part of `key` again after its bytes changed; the metadata stay. Needed only if
/// [`Layers::key_valid`] is false.
///
/// # Errors
/// [`ExtractError`]: the packet is to be dropped; `key` and `layers` are then unspecified.
pub fn update(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), ExtractError> {
    let packet_type = match key.mac_proto {
        0 => PacketType::L3(layers.protocol),
        _ => PacketType::Ethernet,
    };
    if let Some(rest) = key.as_mut_bytes().get_mut(PACKET..) {
        rest.fill(0);
    }
    *layers = packet(frame, packet_type, key)?;
    Ok(())
}

/// The options are most of a key's bytes and nearly always zero already: behind `opts_len` they are.
#[inline]
fn clear_tunnel(tunnel: &mut TunnelKey) {
    const HEAD: usize = offset_of!(TunnelKey, opts);
    if tunnel.opts_len != 0 {
        tunnel.opts.fill(0);
    }
    if let Some(head) = tunnel.as_mut_bytes().get_mut(..HEAD) {
        head.fill(0);
    }
}

/// The packet's part of the key, which is zero.
fn packet(frame: &mut Frame, kind: PacketType, key: &mut Key) -> Result<Layers, ExtractError> {
    let (network, protocol) = match kind {
        PacketType::Ethernet | PacketType::L3(eth_type::BRIDGED) => ethernet(frame, key)?,
        PacketType::L3(protocol) if VlanTag::is_tpid(protocol) => return Err(ExtractError::Vlan),
        PacketType::L3(protocol) => {
            key.eth_type = U16::new(protocol);
            (0, protocol)
        }
    };
    let bytes = frame.bytes();
    let ufo = frame
        .offload
        .gso
        .is_some_and(|gso| gso.kind == GsoKind::UdpFragments);
    let transport = match key.eth_type.get() {
        eth_type::IPV4 => ipv4(bytes, network, ufo, key),
        eth_type::IPV6 => ipv6(bytes, network, ufo, key),
        eth_type::ARP | eth_type::RARP => {
            arp(bytes, network, key);
            None
        }
        eth_type::NSH => {
            nsh(bytes, network, key).ok_or(ExtractError::Nsh)?;
            None
        }
        other if is_mpls(other) => {
            mpls(bytes, network, key);
            None
        }
        _ => None,
    };
    // Nothing in front of a network header is longer than a few dozen bytes; an L4 header beyond 64 KiB
    // doesn't exist.
    Ok(Layers {
        network: u16::try_from(network).unwrap_or(u16::MAX),
        transport: transport.and_then(|at| u16::try_from(at).ok()),
        protocol,
        key_valid: true,
    })
}

/// Addresses, tags and type; gives where the next header is, and [`Layers::protocol`].
#[inline]
fn ethernet(frame: &mut Frame, key: &mut Key) -> Result<(usize, u16), ExtractError> {
    let Some(&[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1]) =
        frame.bytes().first_chunk()
    else {
        return Err(ExtractError::Runt);
    };
    key.eth_dst = [d0, d1, d2, d3, d4, d5];
    key.eth_src = [s0, s1, s2, s3, s4, s5];
    key.mac_proto = 1;
    let mut ethertype = u16::from_be_bytes([t0, t1]);
    if VlanTag::is_tpid(ethertype) && frame.pop_tag_outofband() {
        ethertype = u16_at(frame.bytes(), 12).ok_or(ExtractError::Runt)?;
    }
    let bytes = frame.bytes();
    let mut behind = 14;
    let mut second = None;
    if let Some(tag) = frame.vlan {
        key.vlan = VlanKey {
            tpid: U16::new(tag.tpid),
            tci: U16::new(tag.tci | VLAN_CFI),
        };
        let inner = if VlanTag::is_tpid(ethertype) {
            array_at(bytes, behind)
        } else {
            None
        };
        if let Some(&[c0, c1, t0, t1]) = inner {
            let tci = U16::new(u16::from_be_bytes([c0, c1]) | VLAN_CFI);
            key.cvlan = VlanKey {
                tpid: U16::new(ethertype),
                tci,
            };
            second = Some(ethertype);
            ethertype = u16::from_be_bytes([t0, t1]);
            behind += 4;
        }
    }
    if ethertype < eth_type::FIRST {
        // IEEE 802.2: only SNAP with the organisation 0 names a type.
        ethertype = match array_at(bytes, behind) {
            Some(&[0xaa, 0xaa, _, 0, 0, 0, t0, t1]) => {
                behind += 8;
                u16::from_be_bytes([t0, t1])
            }
            _ => 0,
        };
        if ethertype < eth_type::FIRST {
            ethertype = ETH_P_802_2;
        }
    }
    key.eth_type = U16::new(ethertype);
    Ok((behind, second.unwrap_or(ethertype)))
}

/// Gives where the L4 header is.
#[inline]
fn ipv4(bytes: &[u8], network: usize, ufo: bool, key: &mut Key) -> Option<usize> {
    let header: &[u8; IPV4] = array_at(bytes, network)?;
    let length = usize::from(header[0] & 0xf) * 4;
    let transport = network + length;
    if length < IPV4 || transport > bytes.len() {
        return None;
    }
    put_v4(
        &mut key.ip_src,
        [header[12], header[13], header[14], header[15]],
    );
    put_v4(
        &mut key.ip_dst,
        [header[16], header[17], header[18], header[19]],
    );
    key.ip_proto = header[9];
    key.ip_tos = header[1];
    key.ip_ttl = header[8];
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    if fragment & 0x1fff != 0 {
        key.ip_frag = FRAG_LATER;
        return Some(transport);
    }
    if fragment & 0x2000 != 0 || ufo {
        key.ip_frag = FRAG_FIRST;
    }
    match key.ip_proto {
        ip_proto::ICMP => icmp(bytes, transport, key),
        _ => ports(bytes, transport, key),
    }
    Some(transport)
}

/// Gives where the L4 header is, if the chain of headers leads to it.
fn ipv6(bytes: &[u8], network: usize, ufo: bool, key: &mut Key) -> Option<usize> {
    let header: &[u8; ipv6::HEADER] = array_at(bytes, network)?;
    let (next, first) = (header[6], network + ipv6::HEADER);
    key.ip_proto = ip_proto::NONE;
    key.ip_tos = header[0] << 4 | header[1] >> 4;
    key.ip_ttl = header[7];
    key.ipv6_label = U32::from_bytes([0, header[1] & 0xf, header[2], header[3]]);
    if let Some(addresses) = header.get(8..) {
        key.ip_src = *addresses.first_chunk()?;
        key.ip_dst = *addresses.last_chunk()?;
    }
    key.ipv6_exthdrs = ipv6::extensions(bytes, next, first);
    let chain = ipv6::walk(bytes, next, first);
    if chain.later {
        key.ip_frag = FRAG_LATER;
        key.ip_proto = ip_proto::FRAGMENT;
        return None;
    }
    if chain.fragment {
        key.ip_frag = FRAG_FIRST;
    }
    let (proto, transport) = chain.end?;
    key.ip_proto = proto;
    if ufo {
        key.ip_frag = FRAG_FIRST;
    }
    match proto {
        ip_proto::ICMPV6 => icmpv6(bytes, transport, key),
        _ => ports(bytes, transport, key),
    }
    Some(transport)
}

#[inline]
fn put_v4(into: &mut [u8; 16], [a, b, c, d]: [u8; 4]) {
    *into = [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
}

/// TCP, UDP, SCTP: nothing if the header isn't all there.
#[inline]
fn ports(bytes: &[u8], transport: usize, key: &mut Key) {
    let Some(rest) = bytes.get(transport..) else {
        return;
    };
    match key.ip_proto {
        ip_proto::TCP => {
            let Some(header) = rest.first_chunk::<TCP>() else {
                return;
            };
            let length = usize::from(header[12] >> 4) * 4;
            if length < TCP || length > rest.len() {
                return;
            }
            key.tcp_flags = U16::from_bytes([header[12] & 0x0f, header[13]]);
        }
        ip_proto::UDP if rest.len() >= 8 => {}
        ip_proto::SCTP if rest.len() >= SCTP => {}
        _ => return,
    }
    if let Some(&[s0, s1, d0, d1]) = rest.first_chunk() {
        key.tp_src = U16::from_bytes([s0, s1]);
        key.tp_dst = U16::from_bytes([d0, d1]);
    }
}

/// Type and code, if the eight bytes of the header are there.
fn icmp(bytes: &[u8], transport: usize, key: &mut Key) {
    if let Some(&[kind, code, ..]) = array_at::<8>(bytes, transport) {
        key.tp_src = U16::new(u16::from(kind));
        key.tp_dst = U16::new(u16::from(code));
    }
}

/// Also neighbour solicitations and advertisements (RFC 4861, 4.3, 4.4, 4.6.1).
fn icmpv6(bytes: &[u8], transport: usize, key: &mut Key) {
    icmp(bytes, transport, key);
    let Some(message) = bytes.get(transport..) else {
        return;
    };
    let Some(header) = message.first_chunk::<ND>() else {
        return;
    };
    if !matches!(header, [135 | 136, 0, ..]) {
        return;
    }
    if let Some(target) = header.last_chunk() {
        key.nd_target = *target;
    }
    let mut options = message.get(ND..).unwrap_or_default();
    while let Some(&[kind, eights, a, b, c, d, e, f]) = options.first_chunk() {
        let Some(rest) = options.get(usize::from(eights) * 8..) else {
            return;
        };
        if eights == 0 {
            return;
        }
        let field = match (kind, eights) {
            (1, 1) => Some(&mut key.nd_sll),
            (2, 1) => Some(&mut key.nd_tll),
            _ => None,
        };
        if let Some(field) = field {
            if *field != [0; 6] {
                // The same option twice: nothing of the message is believed.
                (key.nd_target, key.nd_sll, key.nd_tll) = ([0; 16], [0; 6], [0; 6]);
                return;
            }
            *field = [a, b, c, d, e, f];
        }
        options = rest;
    }
}

/// ARP and RARP for IPv4 over Ethernet.
fn arp(bytes: &[u8], network: usize, key: &mut Key) {
    let Some(header) = array_at::<ARP>(bytes, network) else {
        return;
    };
    let Some((&[0, 1, 8, 0, 6, 4, op0, op1], addresses)) = header.split_first_chunk() else {
        return;
    };
    let Some(
        &[
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            s0,
            s1,
            s2,
            s3,
            b0,
            b1,
            b2,
            b3,
            b4,
            b5,
            t0,
            t1,
            t2,
            t3,
        ],
    ) = addresses.first_chunk()
    else {
        return;
    };
    key.ip_proto = if op0 == 0 { op1 } else { 0 };
    key.arp_sha = [a0, a1, a2, a3, a4, a5];
    key.arp_tha = [b0, b1, b2, b3, b4, b5];
    put_v4(&mut key.ip_src, [s0, s1, s2, s3]);
    put_v4(&mut key.ip_dst, [t0, t1, t2, t3]);
}

/// The first three labels; a stack without a bottom has none, though its labels are kept.
fn mpls(bytes: &[u8], network: usize, key: &mut Key) {
    let stack = bytes.get(network..).unwrap_or_default();
    for (index, entry) in stack.chunks_exact(4).enumerate() {
        let Some(&entry) = entry.first_chunk::<4>() else {
            return;
        };
        if let Some(label) = key.mpls.get_mut(index) {
            *label = U32::from_bytes(entry);
        }
        if entry[2] & 1 != 0 {
            key.mpls_labels = match index {
                0 => 0b001,
                1 => 0b011,
                _ => 0b111,
            };
            return;
        }
    }
}

/// RFC 8300, 2.2 to 2.5.
fn nsh(bytes: &[u8], network: usize, key: &mut Key) -> Option<()> {
    let &[b0, b1, mdtype, np, p0, p1, p2, p3] = array_at::<NSH>(bytes, network)?;
    let first = u16::from_be_bytes([b0, b1]);
    let length = usize::from(first & 0x3f) * 4;
    bytes.get(network..)?.get(..length)?;
    let (version, flags, ttl) = (first >> 14, first >> 12 & 3, first >> 6 & 0x3f);
    match (version, mdtype, length) {
        (0, 1, 24) => {
            let context: &[u8; 16] = array_at(bytes, network + NSH)?;
            for (word, bytes) in key.nsh_context.iter_mut().zip(context.chunks_exact(4)) {
                *word = U32::from_bytes(*bytes.first_chunk()?);
            }
        }
        (0, 2, _) => {}
        _ => return None,
    }
    key.nsh_base = [flags as u8, ttl as u8, mdtype, np, p0, p1, p2, p3];
    Some(())
}
