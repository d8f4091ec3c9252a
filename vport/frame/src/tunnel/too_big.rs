//! What a sender is told whose packet doesn't fit through a tunnel: ICMP "fragmentation needed" (RFC 792,
//! RFC 1191) or ICMPv6 "packet too big" (RFC 4443, 3.2), as if from the packet's destination, as the
//! kernel does it for tunnels on a bridge.

use super::ecn::locate;
use crate::buffer::Frame;
use crate::checksum::{add, checksum, fold, pseudo_v6, sum};
use crate::layout::{Layout, TCP};
use crate::offload::GsoKind;
use crate::pool::Pool;

const IPV4: usize = 20;
const IPV6: usize = 40;
const ICMP_HEADER: usize = 8;
const ADDRESSES: usize = 12;
/// What every host takes whole, so what an answer may have (RFC 1812, 4.3.2.3; RFC 8200, 5).
const MIN_MTU_V4: usize = 576;
const MIN_MTU_V6: usize = 1280;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const DONT_FRAGMENT: u16 = 0x4000;
const TTL: u8 = 64;

/// Bytes of the longest IP packet that a frame stands for: itself, or one of its segments. 0: it is no IP
/// packet.
pub fn longest_packet(frame: &Frame) -> usize {
    let bytes = frame.bytes();
    let Some((network, _)) = locate(bytes) else {
        return 0;
    };
    let whole = bytes.len() - network;
    let (Some(gso), Ok(layout)) = (frame.offload.gso, Layout::of_ethernet(bytes)) else {
        return whole;
    };
    let l4 = match gso.kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 if layout.proto == TCP => {
            let offset = bytes.get(layout.transport + 12).copied().unwrap_or(0x50);
            usize::from(offset >> 4) * 4
        }
        GsoKind::UdpFragments => 0,
        _ => 8,
    };
    (layout.transport - network + l4 + usize::from(gso.size)).min(whole)
}

/// Bytes in front of the IP header of a frame; 0: it has none.
pub fn network(frame: &Frame) -> usize {
    locate(frame.bytes()).map_or(0, |(network, _)| network)
}

/// The answer to the sender of a packet that may not be cut and is longer than `mtu`; None where nobody
/// is to be told.
pub fn answer(frame: &Frame, mtu: usize, pool: &mut Pool) -> Option<Frame> {
    let bytes = frame.bytes();
    let (network, v6) = locate(bytes)?;
    let (link, packet) = bytes.split_at_checked(network)?;
    // Nobody answers to a group.
    if link.first()? & 1 != 0 || link.get(6)? & 1 != 0 {
        return None;
    }
    let made = if v6 {
        answer_v6(packet, mtu)
    } else {
        answer_v4(packet, mtu)
    }?;
    let mut reply = pool.take(network + made.len());
    reply.set_len(network + made.len());
    let (head, body) = reply.bytes_mut().split_at_mut_checked(network)?;
    head.copy_from_slice(link);
    if let Some((to, from)) = head.get_mut(..ADDRESSES)?.split_at_mut_checked(6) {
        to.swap_with_slice(from);
    }
    body.copy_from_slice(&made);
    reply.vlan = frame.vlan;
    Some(reply)
}

fn answer_v4(packet: &[u8], mtu: usize) -> Option<Vec<u8>> {
    let header = packet.first_chunk::<IPV4>()?;
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let [src, dst] = [[12, 13, 14, 15], [16, 17, 18, 19]].map(|at| at.map(|at: usize| header[at]));
    let l4 = packet.get(usize::from(header[0] & 0xf) * 4..)?;
    let nobody = |address: [u8; 4]| matches!(address[0], 0 | 127 | 224..);
    if mtu < MIN_MTU_V4
        || fragment != DONT_FRAGMENT
        || nobody(src)
        || nobody(dst)
        || header[9] == ICMP && is_icmp_error(*l4.first()?)
    {
        return None;
    }
    let quoted = packet
        .get(..MIN_MTU_V4 - IPV4 - ICMP_HEADER)
        .unwrap_or(packet);
    let length = u16::try_from(IPV4 + ICMP_HEADER + quoted.len()).ok()?;
    let [l0, l1] = length.to_be_bytes();
    let mut out = vec![0x45, 0, l0, l1, 0, 0, 0x40, 0, TTL, ICMP, 0, 0];
    out.extend_from_slice(&dst);
    out.extend_from_slice(&src);
    let sum = checksum(&out);
    out.get_mut(10..12)?.copy_from_slice(&sum.to_be_bytes());
    let [m0, m1] = u16::try_from(mtu).unwrap_or(u16::MAX).to_be_bytes();
    out.extend_from_slice(&[3, 4, 0, 0, 0, 0, m0, m1]);
    out.extend_from_slice(quoted);
    let sum = checksum(out.get(IPV4..)?);
    out.get_mut(IPV4 + 2..IPV4 + 4)?
        .copy_from_slice(&sum.to_be_bytes());
    Some(out)
}

/// Destination unreachable, source quench, redirect, time exceeded, parameter problem.
fn is_icmp_error(kind: u8) -> bool {
    matches!(kind, 3 | 4 | 5 | 11 | 12)
}

fn answer_v6(packet: &[u8], mtu: usize) -> Option<Vec<u8>> {
    let header = packet.first_chunk::<IPV6>()?;
    let (_, addresses) = header.split_at(8);
    let (src, dst) = addresses.split_at(16);
    let nobody = |address: &[u8]| address.first() == Some(&0xff) || address == [0; 16];
    if mtu < MIN_MTU_V6
        || nobody(src)
        || nobody(dst)
        || header[6] == ICMPV6 && *packet.get(IPV6)? < 128
    {
        return None;
    }
    let quoted = packet
        .get(..MIN_MTU_V6 - IPV6 - ICMP_HEADER)
        .unwrap_or(packet);
    let length = ICMP_HEADER + quoted.len();
    let [l0, l1] = u16::try_from(length).ok()?.to_be_bytes();
    let mut out = vec![0x60, 0, 0, 0, l0, l1, ICMPV6, TTL];
    out.extend_from_slice(dst);
    out.extend_from_slice(src);
    let [m0, m1, m2, m3] = u32::try_from(mtu).unwrap_or(u32::MAX).to_be_bytes();
    out.extend_from_slice(&[2, 0, 0, 0, m0, m1, m2, m3]);
    out.extend_from_slice(quoted);
    let pseudo = pseudo_v6(src.first_chunk()?, dst.first_chunk()?, ICMPV6, length);
    let sum = !fold(add(pseudo, sum(out.get(IPV6..)?)));
    out.get_mut(IPV6 + 2..IPV6 + 4)?
        .copy_from_slice(&sum.to_be_bytes());
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: [u8; 12] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];

    fn v4(len: usize, fragment: u16) -> Frame {
        let mut bytes = LINK.to_vec();
        bytes.extend_from_slice(&[8, 0, 0x45, 0]);
        bytes.extend_from_slice(&(len as u16).to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        bytes.extend_from_slice(&fragment.to_be_bytes());
        bytes.extend_from_slice(&[64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        bytes.resize(14 + len, 7);
        Frame::from_bytes(&bytes)
    }

    fn v6(len: usize, proto: u8, first: u8) -> Frame {
        let mut bytes = LINK.to_vec();
        bytes.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend_from_slice(&(len as u16 - 40).to_be_bytes());
        bytes.extend_from_slice(&[proto, 64]);
        bytes.extend_from_slice(&[0xfd; 15]);
        bytes.push(1);
        bytes.extend_from_slice(&[0xfd; 15]);
        bytes.push(2);
        bytes.push(first);
        bytes.resize(14 + len, 7);
        Frame::from_bytes(&bytes)
    }

    #[test]
    fn an_answer_goes_back_with_the_mtu_and_the_packet() {
        let mut pool = Pool::default();
        let frame = v4(1500, DONT_FRAGMENT);
        assert_eq!(longest_packet(&frame), 1500);
        let answer = answer(&frame, 1450, &mut pool).unwrap();
        let bytes = answer.bytes();
        assert_eq!(bytes[..12], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        assert_eq!(bytes.len(), 14 + MIN_MTU_V4);
        assert_eq!(checksum(&bytes[14..34]), 0);
        assert_eq!(checksum(&bytes[34..]), 0);
        assert_eq!(bytes[26..34], [10, 0, 0, 2, 10, 0, 0, 1]);
        assert_eq!(bytes[34..42], [3, 4, bytes[36], bytes[37], 0, 0, 5, 0xaa]);
        assert_eq!(bytes[42..], frame.bytes()[14..14 + MIN_MTU_V4 - 28]);
    }

    #[test]
    fn the_same_for_ipv6() {
        let mut pool = Pool::default();
        let frame = v6(1500, 17, 7);
        let answer = answer(&frame, 1430, &mut pool).unwrap();
        let bytes = answer.bytes();
        assert_eq!(bytes.len(), 14 + MIN_MTU_V6);
        assert_eq!((bytes[54], bytes[55]), (2, 0));
        assert_eq!(bytes[58..62], [0, 0, 5, 0x96]);
        let (src, dst) = (&bytes[22..38], &bytes[38..54]);
        let pseudo = pseudo_v6(
            src.first_chunk().unwrap(),
            dst.first_chunk().unwrap(),
            ICMPV6,
            bytes.len() - 54,
        );
        assert_eq!(fold(add(pseudo, sum(&bytes[54..]))), 0xffff);
    }

    #[test]
    fn nobody_is_told_who_did_not_ask() {
        let mut pool = Pool::default();
        // It may be cut; is a fragment; an answer would be nonsense.
        for (frame, mtu) in [
            (v4(1500, 0), 1450),
            (v4(1500, 0x4001), 1450),
            (v4(1500, DONT_FRAGMENT), 100),
            (v6(1500, ICMPV6, 1), 1450),
            (v6(1500, 17, 7), 1200),
        ] {
            assert_eq!(answer(&frame, mtu, &mut pool), None);
        }
        let mut group = v4(1500, DONT_FRAGMENT);
        group.bytes_mut()[0] = 1;
        assert_eq!(answer(&group, 1450, &mut pool), None);
    }
}
