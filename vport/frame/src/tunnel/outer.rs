//! The IP and UDP headers in front of a tunnel's, on the way in.

use super::{Refused, TunnelKey, V4, V6, tunnel_flags, u16_at};
use crate::checksum::{add, fold, pseudo_v4, sum};

const UDP: u8 = 17;
const IPV6: usize = 40;
/// Bytes of a UDP header.
pub const UDP_HEADER: usize = 8;
const MORE_OR_OFFSET: u16 = 0x3fff;

/// What an IP header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Bytes of it.
    pub header: usize,
    /// Bytes of the packet, header included: what a frame has beyond is padding.
    pub length: usize,
    /// What is behind it.
    pub protocol: u8,
}

/// Reads the IP header that `packet` begins with: addresses, type of service, time to live. Fragments are
/// refused, and so are IPv6 extension headers.
///
/// # Errors
/// [`Refused`].
pub fn ip(packet: &[u8], key: &mut TunnelKey) -> Result<Ip, Refused> {
    match packet.first().ok_or(Refused::Short)? >> 4 {
        4 => ipv4(packet, key),
        6 => ipv6(packet, key),
        _ => Err(Refused::Header),
    }
}

fn ipv4(packet: &[u8], key: &mut TunnelKey) -> Result<Ip, Refused> {
    let fixed = packet.first_chunk::<20>().ok_or(Refused::Short)?;
    let header = usize::from(fixed[0] & 0xf) * 4;
    let length = usize::from(u16_at(fixed, 2)?);
    if header < fixed.len() || length < header || header > packet.len() {
        return Err(Refused::Header);
    }
    if u16_at(fixed, 6)? & MORE_OR_OFFSET != 0 {
        return Err(Refused::Header);
    }
    let [
        _,
        tos,
        _,
        _,
        _,
        _,
        _,
        _,
        ttl,
        protocol,
        _,
        _,
        addresses @ ..,
    ] = *fixed;
    let [s0, s1, s2, s3, d0, d1, d2, d3] = addresses;
    key.family = V4;
    key.src[..4].copy_from_slice(&[s0, s1, s2, s3]);
    key.dst[..4].copy_from_slice(&[d0, d1, d2, d3]);
    (key.tos, key.ttl) = (tos, ttl);
    Ok(Ip {
        header,
        length,
        protocol,
    })
}

fn ipv6(packet: &[u8], key: &mut TunnelKey) -> Result<Ip, Refused> {
    let header = packet.first_chunk::<IPV6>().ok_or(Refused::Short)?;
    let [a, b, ..] = *header;
    key.family = V6;
    let (_, addresses) = header.split_at(8);
    let (src, dst) = addresses.split_at(16);
    key.src.copy_from_slice(src);
    key.dst.copy_from_slice(dst);
    (key.tos, key.ttl) = (a << 4 | b >> 4, header[7]);
    Ok(Ip {
        header: IPV6,
        length: IPV6 + usize::from(u16_at(header, 4)?),
        protocol: header[6],
    })
}

/// Reads the UDP header that `datagram` begins with: ports, and that there is a checksum, which is
/// checked unless `vouched` says that somebody else has (or that it isn't complete yet).
///
/// # Errors
/// [`Refused`].
pub fn udp(datagram: &[u8], vouched: bool, key: &mut TunnelKey) -> Result<(), Refused> {
    if datagram.len() < UDP_HEADER {
        return Err(Refused::Short);
    }
    let length = usize::from(u16_at(datagram, 4)?);
    key.tp_src = u16_at(datagram, 0)?.into();
    key.tp_dst = u16_at(datagram, 2)?.into();
    if u16_at(datagram, 6)? == 0 {
        return Ok(());
    }
    key.flags |= tunnel_flags::CSUM;
    if vouched {
        return Ok(());
    }
    let covered = datagram.get(..length).ok_or(Refused::Short)?;
    let pseudo = match key.family {
        V4 => pseudo_v4(first4(&key.src), first4(&key.dst), UDP, length),
        _ => add(
            add(sum(&key.src), sum(&key.dst)),
            add(u64::from(UDP), length as u64),
        ),
    };
    match fold(add(pseudo, sum(covered))) {
        0xffff => Ok(()),
        _ => Err(Refused::Checksum),
    }
}

/// An IPv4 address in its place.
pub fn first4(place: &[u8; 16]) -> [u8; 4] {
    let [a, b, c, d, ..] = *place;
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: &[u8] = &[
        0x45, 0xb8, 0x00, 0x20, 0x00, 0x05, 0x40, 0x00, 0x07, 0x11, 0, 0, 172, 16, 0, 2, 172, 16,
        0, 1, 0x15, 0xb3, 0x12, 0xb5, 0, 12, 0, 0, 1, 2, 3, 4,
    ];

    #[test]
    fn a_header_becomes_a_key() {
        let mut key = TunnelKey::none();
        let ip = ip(PACKET, &mut key).unwrap();
        assert_eq!((ip.header, ip.length, ip.protocol), (20, 32, 17));
        udp(&PACKET[20..], false, &mut key).unwrap();
        assert_eq!((key.tos, key.ttl, key.flags), (0xb8, 7, 0));
        assert_eq!((key.tp_src.get(), key.tp_dst.get()), (5555, 4789));
        assert_eq!(first4(&key.src), [172, 16, 0, 2]);
        assert_eq!(first4(&key.dst), [172, 16, 0, 1]);
    }

    #[test]
    fn a_wrong_checksum_is_refused_unless_somebody_vouches() {
        let mut packet = PACKET.to_vec();
        packet[27] = 1;
        let mut key = TunnelKey::none();
        ip(&packet, &mut key).unwrap();
        assert_eq!(udp(&packet[20..], false, &mut key), Err(Refused::Checksum));
        assert_eq!(udp(&packet[20..], true, &mut key), Ok(()));
        assert_eq!(key.flags, tunnel_flags::CSUM);
        let good = pseudo_v4([172, 16, 0, 2], [172, 16, 0, 1], UDP, 12);
        packet[26..28].fill(0);
        let good = !fold(add(good, sum(&packet[20..])));
        packet[26..28].copy_from_slice(&good.to_be_bytes());
        assert_eq!(udp(&packet[20..], false, &mut key), Ok(()));
    }

    #[test]
    fn fragments_and_nonsense_are_refused() {
        let mut fragment = PACKET.to_vec();
        fragment[6] = 0x20;
        assert_eq!(ip(&fragment, &mut TunnelKey::none()), Err(Refused::Header));
        assert_eq!(ip(&[], &mut TunnelKey::none()), Err(Refused::Short));
        assert_eq!(ip(&[0x45; 10], &mut TunnelKey::none()), Err(Refused::Short));
        assert_eq!(ip(&[0x60; 39], &mut TunnelKey::none()), Err(Refused::Short));
        assert_eq!(ip(&[0; 40], &mut TunnelKey::none()), Err(Refused::Header));
    }
}
