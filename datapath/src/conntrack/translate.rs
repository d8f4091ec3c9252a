//! Writing translated addresses into packets, checksums kept right.

use flow::action::{Ipv4Fields, Ipv6Fields, Masked, PortFields, SetField};
use flow::rewrite;
use frame::checksum::{checksum, nonzero, pseudo_v6, sum, update};
use frame::{Frame, checksum as sums};
use zerocopy::network_endian::{U16, U32};

use super::connection::{Connection, status};
use super::tuple::{Direction, Family, Tuple, narrow, proto};
use super::wire::{Headers, array, array_mut};
use super::{Attached, Relation};
use crate::packet::Packet;

/// The packet couldn't be changed: a header isn't there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutShort;

/// Whether packets of a direction have their source (or their destination) translated.
fn translates(connection: &Connection, direction: Direction, source: bool) -> bool {
    let bit = match (direction, source) {
        (Direction::Original, true) | (Direction::Reply, false) => status::SRC_NAT,
        (Direction::Original, false) | (Direction::Reply, true) => status::DST_NAT,
    };
    connection.is(bit)
}

/// Translates the source (or the destination) of a packet, as its connection says.
pub(super) fn translate(
    packet: &mut Packet,
    headers: &Headers,
    attached: &Attached,
    source: bool,
) -> Result<(), CutShort> {
    let Attached {
        connection,
        relation,
        direction,
    } = attached;
    if !translates(connection, *direction, source) {
        return Ok(());
    }
    let other = connection
        .lock()
        .tuple(&connection.original, direction.other());
    let target = other.inverse().ok_or(CutShort)?;
    let error = *relation == Relation::Related && is_error(packet.frame.bytes(), headers);
    if error {
        translate_quoted(&mut packet.frame, headers, &other, !source).ok_or(CutShort)?;
        return set_address(packet, headers.family, &target, source);
    }
    set_address(packet, headers.family, &target, source)?;
    set_port(packet, headers, &target, source)
}

fn is_error(bytes: &[u8], headers: &Headers) -> bool {
    matches!(
        (headers.proto, super::lookup::icmp_kind(bytes, headers)),
        (proto::ICMP, Some(3 | 4 | 5 | 11 | 12)) | (proto::ICMPV6, Some(0..=127))
    )
}

fn set(packet: &mut Packet, field: &SetField) -> Result<(), CutShort> {
    rewrite::set(&mut packet.frame, &mut packet.key, &packet.layers, field).map_err(|_| CutShort)
}

fn set_address(
    packet: &mut Packet,
    family: Family,
    target: &Tuple,
    source: bool,
) -> Result<(), CutShort> {
    let address = if source { target.src } else { target.dst };
    let field = match family {
        Family::V4 => {
            let none = Ipv4Fields {
                src: [0; 4],
                dst: [0; 4],
                proto: 0,
                tos: 0,
                ttl: 0,
                frag: 0,
            };
            let (mut value, mut mask) = (none, none);
            match source {
                true => (value.src, mask.src) = (narrow(address), [0xff; 4]),
                false => (value.dst, mask.dst) = (narrow(address), [0xff; 4]),
            }
            SetField::Ipv4(Masked { value, mask })
        }
        Family::V6 => {
            let none = Ipv6Fields {
                src: [0; 16],
                dst: [0; 16],
                label: U32::ZERO,
                proto: 0,
                tclass: 0,
                hlimit: 0,
                frag: 0,
            };
            let (mut value, mut mask) = (none, none);
            match source {
                true => (value.src, mask.src) = (address, [0xff; 16]),
                false => (value.dst, mask.dst) = (address, [0xff; 16]),
            }
            SetField::Ipv6(Masked { value, mask })
        }
    };
    set(packet, &field)
}

fn set_port(
    packet: &mut Packet,
    headers: &Headers,
    target: &Tuple,
    source: bool,
) -> Result<(), CutShort> {
    if matches!(headers.proto, proto::ICMP | proto::ICMPV6) {
        return set_identifier(&mut packet.frame, headers.transport, target.src_port)
            .ok_or(CutShort);
    }
    let none = PortFields {
        src: U16::ZERO,
        dst: U16::ZERO,
    };
    let (mut value, mut mask) = (none, none);
    match source {
        true => (value.src, mask.src) = (target.src_port.into(), U16::MAX_VALUE),
        false => (value.dst, mask.dst) = (target.dst_port.into(), U16::MAX_VALUE),
    }
    let masked = Masked { value, mask };
    let field = match headers.proto {
        proto::TCP => SetField::Tcp(masked),
        proto::UDP => SetField::Udp(masked),
        proto::SCTP => SetField::Sctp(masked),
        _ => return Ok(()),
    };
    set(packet, &field)
}

/// Of a query, whose checksum field is two bytes in front of it.
fn set_identifier(frame: &mut Frame, at: usize, id: u16) -> Option<()> {
    let partial = frame
        .offload
        .csum
        .is_some_and(|csum| csum.field() == at + 2);
    let [_, _, c0, c1, i0, i1] = array_mut::<6>(frame.bytes_mut(), at)?;
    let [n0, n1] = id.to_be_bytes();
    if !partial {
        let field = update(u16::from_be_bytes([*c0, *c1]), &[*i0, *i1], &[n0, n1]);
        [*c0, *c1] = field.to_be_bytes();
    }
    (*i0, *i1) = (n0, n1);
    Some(())
}

/// Translates the packet that an ICMP error quotes, back to what its sender sent: its source (or its
/// destination) becomes that of `tuple`. The error's own checksum is made anew.
fn translate_quoted(
    frame: &mut Frame,
    headers: &Headers,
    tuple: &Tuple,
    source: bool,
) -> Option<()> {
    let quoted = Headers::quoted(frame.bytes(), headers.transport + 8, headers.family)?;
    let (address, port) = match source {
        true => (tuple.src, tuple.src_port),
        false => (tuple.dst, tuple.dst_port),
    };
    let bytes = frame.bytes_mut();
    let (at, length) = match (headers.family, source) {
        (Family::V4, true) => (quoted.network + 12, 4),
        (Family::V4, false) => (quoted.network + 16, 4),
        (Family::V6, true) => (quoted.network + 8, 16),
        (Family::V6, false) => (quoted.network + 24, 16),
    };
    let old: [u8; 16] = {
        let mut old = [0; 16];
        let there = bytes.get_mut(at..at + length)?;
        old.get_mut(..length)?.copy_from_slice(there);
        there.copy_from_slice(address.get(..length)?);
        old
    };
    let (old, new) = (old.get(..length)?, address.get(..length)?);
    if headers.family == Family::V4 {
        patch_sum(bytes, quoted.network + 10, old, new)?;
    }
    // Of the L4 header at least the first eight bytes are quoted, perhaps no more.
    let l4 = quoted.transport;
    let (port_at, sum_at) = match (quoted.proto, source) {
        (proto::TCP, true) => (Some(l4), Some(l4 + 16)),
        (proto::TCP, false) => (Some(l4 + 2), Some(l4 + 16)),
        (proto::UDP, true) => (Some(l4), Some(l4 + 6)),
        (proto::UDP, false) => (Some(l4 + 2), Some(l4 + 6)),
        (proto::SCTP, true) => (Some(l4), None),
        (proto::SCTP, false) => (Some(l4 + 2), None),
        (proto::ICMP | proto::ICMPV6, _) => (Some(l4 + 4), Some(l4 + 2)),
        _ => (None, None),
    };
    let port = match quoted.proto {
        proto::ICMP | proto::ICMPV6 => tuple.src_port,
        _ => port,
    };
    let sum_at = sum_at.filter(|at| {
        let absent = quoted.proto == proto::UDP && array::<2>(bytes, *at) == Some(&[0, 0]);
        at + 2 <= bytes.len() && !absent
    });
    if let Some(sum_at) = sum_at
        && quoted.proto != proto::ICMP
    {
        patch_sum(bytes, sum_at, old, new)?;
    }
    if let Some(port_at) = port_at {
        let there = array_mut::<2>(bytes, port_at)?;
        let old = *there;
        *there = port.to_be_bytes();
        let new = *there;
        if let Some(sum_at) = sum_at {
            patch_sum(bytes, sum_at, &old, &new)?;
        }
    }
    if let Some(sum_at) = sum_at
        && quoted.proto == proto::UDP
    {
        let field = array_mut::<2>(bytes, sum_at)?;
        *field = nonzero(u16::from_be_bytes(*field)).to_be_bytes();
    }
    renew_error_sum(frame, headers)
}

fn patch_sum(bytes: &mut [u8], at: usize, old: &[u8], new: &[u8]) -> Option<()> {
    let field = array_mut::<2>(bytes, at)?;
    *field = update(u16::from_be_bytes(*field), old, new).to_be_bytes();
    Some(())
}

/// The checksum of an ICMP or ICMPv6 message, over all of it.
fn renew_error_sum(frame: &mut Frame, headers: &Headers) -> Option<()> {
    let at = headers.transport;
    if frame
        .offload
        .csum
        .is_some_and(|csum| csum.field() == at + 2)
    {
        return Some(());
    }
    *array_mut::<2>(frame.bytes_mut(), at + 2)? = [0, 0];
    let bytes = frame.bytes();
    let message = headers.l4(bytes);
    let field = match headers.family {
        Family::V4 => checksum(message),
        Family::V6 => {
            let src = array(bytes, headers.network + 8)?;
            let dst = array(bytes, headers.network + 24)?;
            let pseudo = pseudo_v6(src, dst, proto::ICMPV6, message.len());
            !sums::fold(sums::add(pseudo, sum(message)))
        }
    };
    *array_mut::<2>(frame.bytes_mut(), at + 2)? = field.to_be_bytes();
    Some(())
}
