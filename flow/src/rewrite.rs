//! From a set action to changed bytes, checksums kept right; pushing and popping headers.
//!
//! What can be changed in place updates the key too, as the kernel does; what changes the structure
//! (MPLS, NSH, a second tag) leaves the key stale and says so in [`Layers::key_valid`].
//!
//! # Checksums
//! Incremental (RFC 1624), so that an error that came in goes out again. A UDP checksum of zero over
//! IPv4 stays zero. Where the L4 checksum is still to be completed by somebody else, its field holds the
//! pseudo header's sum: addresses change it, ports don't.

use frame::checksum::{nonzero, sctp, update, update_partial};
use frame::{Frame, FrameError};
use zerocopy::network_endian::{U16, U32};

use crate::action::{
    EthernetFields, Ipv4Fields, Ipv6Fields, Masked, NshFields, PortFields, SetField,
};
use crate::headers::{Layers, array_at, ip_proto, is_mpls, u16_at};
use crate::ipv6;
use crate::key::Key;

pub use crate::surgery::{
    Ttl, add_mpls, dec_ttl, pop_eth, pop_mpls, pop_nsh, pop_vlan, push_eth, push_mpls, push_nsh,
    push_vlan,
};

/// Why a header can't be changed: the packet is to be dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RewriteError {
    /// The frame has no such header, or it is cut short.
    #[error("no such header in the frame, or cut short")]
    NoHeader,
    /// The frame would become too long.
    #[error("the frame would become too long")]
    TooLong,
    /// [`SetField::Unsettable`]: dropped, as the kernel does.
    #[error("a field that drops the packet when it is set")]
    Unsettable,
    /// [`SetField::Tunnel`] isn't in the frame nor in its key: the caller keeps it for the output.
    #[error("egress tunnel metadata aren't part of the frame")]
    Egress,
}

impl From<FrameError> for RewriteError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::TooLong => Self::TooLong,
            FrameError::TooShort => Self::NoHeader,
        }
    }
}

/// Overwrites a field in the frame and in its key.
///
/// # Errors
/// [`RewriteError`]. [`SetField::Tunnel`] is the caller's.
pub fn set(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    field: &SetField,
) -> Result<(), RewriteError> {
    match field {
        SetField::Priority(masked) => {
            key.priority = key.priority & !masked.mask | masked.value;
            Ok(())
        }
        SetField::SkbMark(masked) => {
            key.skb_mark = key.skb_mark & !masked.mask | masked.value;
            Ok(())
        }
        SetField::Tunnel(_) => Err(RewriteError::Egress),
        SetField::Unsettable => Err(RewriteError::Unsettable),
        SetField::Ethernet(masked) => set_ethernet(frame, key, masked),
        SetField::Ipv4(masked) => set_ipv4(frame, key, layers, masked),
        SetField::Ipv6(masked) => set_ipv6(frame, key, layers, masked),
        SetField::Tcp(masked) => set_ports(frame, key, layers, masked, ip_proto::TCP),
        SetField::Udp(masked) => set_ports(frame, key, layers, masked, ip_proto::UDP),
        SetField::Sctp(masked) => set_sctp(frame, key, layers, masked),
        SetField::Mpls(masked) => set_mpls(frame, key, layers, *masked),
        SetField::Nsh(masked) => set_nsh(frame, key, layers, masked),
    }
}

/// The `N` bytes at `at`, to be changed.
pub(crate) fn header_mut<const N: usize>(
    frame: &mut Frame,
    at: usize,
) -> Result<&mut [u8; N], RewriteError> {
    let header = frame
        .bytes_mut()
        .get_mut(at..)
        .and_then(|rest| rest.first_chunk_mut());
    header.ok_or(RewriteError::NoHeader)
}

#[inline]
fn blend<const N: usize>(old: &[u8; N], value: &[u8; N], mask: &[u8; N]) -> [u8; N] {
    let mut new = *old;
    for ((byte, value), mask) in new.iter_mut().zip(value).zip(mask) {
        *byte = *byte & !mask | value & mask;
    }
    new
}

#[inline]
fn blend_u8(old: u8, value: u8, mask: u8) -> u8 {
    old & !mask | value & mask
}

fn set_ethernet(
    frame: &mut Frame,
    key: &mut Key,
    masked: &Masked<EthernetFields>,
) -> Result<(), RewriteError> {
    if key.mac_proto == 0 || frame.len() < crate::headers::ETHERNET {
        return Err(RewriteError::NoHeader);
    }
    let dst = header_mut::<6>(frame, 0)?;
    *dst = blend(dst, &masked.value.dst, &masked.mask.dst);
    key.eth_dst = *dst;
    let src = header_mut::<6>(frame, 6)?;
    *src = blend(src, &masked.value.src, &masked.mask.src);
    key.eth_src = *src;
    Ok(())
}

/// After `old` bytes of the pseudo header became `new`.
fn update_l4(frame: &mut Frame, layers: &Layers, proto: u8, old: &[u8], new: &[u8]) {
    let Some(transport) = layers.transport.map(usize::from) else {
        return;
    };
    let (offset, header) = match proto {
        ip_proto::TCP => (16, 20),
        ip_proto::UDP => (6, 8),
        ip_proto::ICMPV6 => (2, 8),
        _ => return,
    };
    if frame.len() < transport + header {
        return;
    }
    let at = transport + offset;
    // Some other checksum may be the one to be completed: that of an inner packet.
    let partial = frame.offload.csum.is_some_and(|csum| csum.field() == at);
    let Ok(field) = header_mut::<2>(frame, at) else {
        return;
    };
    let sum = u16::from_be_bytes(*field);
    let sum = match (partial, proto) {
        (true, _) => update_partial(sum, old, new),
        (false, ip_proto::UDP) if sum == 0 => return,
        (false, _) => update(sum, old, new),
    };
    let sum = if proto == ip_proto::UDP {
        nonzero(sum)
    } else {
        sum
    };
    *field = sum.to_be_bytes();
}

fn set_ipv4(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    masked: &Masked<Ipv4Fields>,
) -> Result<(), RewriteError> {
    let network = usize::from(layers.network);
    let (value, mask) = (&masked.value, &masked.mask);
    let header = header_mut::<20>(frame, network)?;
    let mut sum = u16::from_be_bytes([header[10], header[11]]);
    // Behind a later fragment's header is payload. ICMPv6 has its pseudo header's sum over IPv6 only.
    let proto = match u16::from_be_bytes([header[6], header[7]]) & 0x1fff {
        0 => Some(header[9]).filter(|proto| *proto != ip_proto::ICMPV6),
        _ => None,
    };
    if mask.tos != 0 {
        let old = [header[0], header[1]];
        header[1] = blend_u8(header[1], value.tos, mask.tos);
        key.ip_tos = header[1];
        sum = update(sum, &old, &[old[0], key.ip_tos]);
    }
    if mask.ttl != 0 {
        let old = [header[8], header[9]];
        header[8] = blend_u8(header[8], value.ttl, mask.ttl);
        key.ip_ttl = header[8];
        sum = update(sum, &old, &[key.ip_ttl, old[1]]);
    }
    for (at, value, mask, field) in [
        (12, &value.src, &mask.src, &mut key.ip_src),
        (16, &value.dst, &mask.dst, &mut key.ip_dst),
    ] {
        if *mask == [0; 4] {
            continue;
        }
        let address = header_mut::<4>(frame, network + at)?;
        let old = *address;
        let new = blend(&old, value, mask);
        if new == old {
            continue;
        }
        *address = new;
        if let Some(field) = field.first_chunk_mut() {
            *field = new;
        }
        sum = update(sum, &old, &new);
        if let Some(proto) = proto {
            update_l4(frame, layers, proto, &old, &new);
        }
    }
    *header_mut(frame, network + 10)? = sum.to_be_bytes();
    Ok(())
}

fn set_ipv6(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    masked: &Masked<Ipv6Fields>,
) -> Result<(), RewriteError> {
    let network = usize::from(layers.network);
    let (value, mask) = (&masked.value, &masked.mask);
    let mut ip = *header_mut::<{ ipv6::HEADER }>(frame, network)?;
    for (at, value, mask, field) in [
        (8, &value.src, &mask.src, &mut key.ip_src),
        (24, &value.dst, &mask.dst, &mut key.ip_dst),
    ] {
        let Some(address) = ip
            .get_mut(at..)
            .and_then(|rest| rest.first_chunk_mut::<16>())
        else {
            return Err(RewriteError::NoHeader);
        };
        let new = blend(address, value, mask);
        if new == *address {
            continue;
        }
        let old = std::mem::replace(address, new);
        *field = new;
        // With segments left the final destination, in the routing header, is what the sum covers.
        let first = network + ipv6::HEADER;
        if at != 24 || !ipv6::has_active_routing(frame.bytes(), ip[6], first) {
            update_l4(frame, layers, key.ip_proto, &old, &new);
        }
    }
    let tclass = blend_u8(ip[0] << 4 | ip[1] >> 4, value.tclass, mask.tclass);
    let label = u32::from_be_bytes([0, ip[1] & 0x0f, ip[2], ip[3]]);
    let label = label & !mask.label.get() | value.label.get() & mask.label.get();
    let [_, l1, l2, l3] = (label & 0x000f_ffff).to_be_bytes();
    [ip[0], ip[1], ip[2], ip[3]] = [ip[0] & 0xf0 | tclass >> 4, tclass << 4 | l1, l2, l3];
    ip[7] = blend_u8(ip[7], value.hlimit, mask.hlimit);
    *header_mut(frame, network)? = ip;
    if mask.tclass != 0 {
        key.ip_tos = tclass;
    }
    if mask.label.get() != 0 {
        key.ipv6_label = U32::from_bytes([0, l1, l2, l3]);
    }
    if mask.hlimit != 0 {
        key.ip_ttl = ip[7];
    }
    Ok(())
}

fn transport(layers: &Layers) -> Result<usize, RewriteError> {
    layers
        .transport
        .map(usize::from)
        .ok_or(RewriteError::NoHeader)
}

/// New ports of `masked` over the old ones.
fn blend_ports([s0, s1, d0, d1]: [u8; 4], masked: &Masked<PortFields>) -> [u8; 4] {
    let [s0, s1] = blend(
        &[s0, s1],
        &masked.value.src.to_bytes(),
        &masked.mask.src.to_bytes(),
    );
    let [d0, d1] = blend(
        &[d0, d1],
        &masked.value.dst.to_bytes(),
        &masked.mask.dst.to_bytes(),
    );
    [s0, s1, d0, d1]
}

fn put_key_ports(key: &mut Key, [s0, s1, d0, d1]: [u8; 4]) {
    key.tp_src = U16::from_bytes([s0, s1]);
    key.tp_dst = U16::from_bytes([d0, d1]);
}

/// TCP and UDP. As in the kernel, also over the payload of a later IPv4 fragment.
fn set_ports(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    masked: &Masked<PortFields>,
    proto: u8,
) -> Result<(), RewriteError> {
    let at = transport(layers)?;
    let udp = proto == ip_proto::UDP;
    let (header, offset) = if udp { (8, 6) } else { (20, 16) };
    if frame.len() < at + header {
        return Err(RewriteError::NoHeader);
    }
    let partial = frame
        .offload
        .csum
        .is_some_and(|csum| csum.field() == at + offset);
    let ports = header_mut::<4>(frame, at)?;
    let old = *ports;
    let new = blend_ports(old, masked);
    *ports = new;
    put_key_ports(key, new);
    let field = header_mut::<2>(frame, at + offset)?;
    let sum = u16::from_be_bytes(*field);
    // While it is still to be completed the ports aren't in it.
    if new != old && !partial && !(udp && sum == 0) {
        let sum = update(sum, &old, &new);
        *field = if udp { nonzero(sum) } else { sum }.to_be_bytes();
    }
    Ok(())
}

/// A CRC isn't incremental like a sum, but an error of the old one can be carried over.
fn set_sctp(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    masked: &Masked<PortFields>,
) -> Result<(), RewriteError> {
    let at = transport(layers)?;
    let crc = |frame: &Frame| {
        frame
            .bytes()
            .get(at..)
            .and_then(sctp)
            .ok_or(RewriteError::NoHeader)
    };
    let partial = frame
        .offload
        .csum
        .is_some_and(|csum| csum.field() == at + 8);
    let before = if partial { 0 } else { crc(frame)? };
    if frame.len() < at + 12 {
        return Err(RewriteError::NoHeader);
    }
    let ports = header_mut::<4>(frame, at)?;
    *ports = blend_ports(*ports, masked);
    put_key_ports(key, *ports);
    if !partial {
        let after = crc(frame)?;
        let field = header_mut::<4>(frame, at + 8)?;
        *field = (u32::from_le_bytes(*field) ^ before ^ after).to_le_bytes();
    }
    Ok(())
}

fn set_mpls(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    masked: Masked<U32>,
) -> Result<(), RewriteError> {
    if !is_mpls(layers.protocol) {
        return Err(RewriteError::NoHeader);
    }
    let entry = header_mut::<4>(frame, usize::from(layers.network))?;
    *entry = blend(entry, &masked.value.to_bytes(), &masked.mask.to_bytes());
    key.mpls[0] = U32::from_bytes(*entry);
    Ok(())
}

/// Flags, TTL, service path header; for MD type 1 also the context.
fn set_nsh(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    masked: &Masked<NshFields>,
) -> Result<(), RewriteError> {
    let at = usize::from(layers.network);
    let (value, mask) = (&masked.value, &masked.mask);
    let first = u16_at(frame.bytes(), at).ok_or(RewriteError::NoHeader)?;
    let &[_, _, mdtype, _] = array_at(frame.bytes(), at).ok_or(RewriteError::NoHeader)?;
    if frame.len() < at + usize::from(first & 0x3f).max(2) * 4 {
        return Err(RewriteError::NoHeader);
    }
    if mdtype == 1 {
        let context = header_mut::<16>(frame, at + 8)?;
        let words = value
            .context
            .iter()
            .zip(&mask.context)
            .zip(&mut key.nsh_context);
        for (bytes, ((value, mask), field)) in context.chunks_exact_mut(4).zip(words) {
            let Some(bytes) = bytes.first_chunk_mut::<4>() else {
                continue;
            };
            *bytes = blend(bytes, &value.to_bytes(), &mask.to_bytes());
            *field = U32::from_bytes(*bytes);
        }
    }
    let base = header_mut::<8>(frame, at)?;
    let flags = blend_u8((first >> 12 & 3) as u8, value.base[0], mask.base[0]) & 3;
    let ttl = blend_u8((first >> 6 & 0x3f) as u8, value.base[1], mask.base[1]) & 0x3f;
    let first = first & 0xc03f | u16::from(flags) << 12 | u16::from(ttl) << 6;
    [base[0], base[1]] = first.to_be_bytes();
    let (key_base, path) = (&mut key.nsh_base, [base[4], base[5], base[6], base[7]]);
    let [_, _, _, _, path_value @ ..] = &value.base;
    let [_, _, _, _, path_mask @ ..] = &mask.base;
    let [p0, p1, p2, p3] = blend(&path, path_value, path_mask);
    [base[4], base[5], base[6], base[7]] = [p0, p1, p2, p3];
    *key_base = [flags, ttl, base[2], base[3], p0, p1, p2, p3];
    Ok(())
}
