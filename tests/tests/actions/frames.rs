//! Frames as these tests send and expect them. Checksums are made here from scratch.

use std::net::Ipv6Addr;

/// From the first endpoint's side to the second's; the addresses are nobody's.
pub const ETHERNET: [u8; 12] = [2, 0, 0, 0, 1, 2, 2, 0, 0, 0, 1, 1];
/// Easy to find, and an even number of bytes.
pub const PAYLOAD: &[u8] = b"the quick brown fox jumps over the lazy dogs";

pub const IPV4: u16 = 0x0800;
pub const IPV6: u16 = 0x86dd;
pub const MPLS: u16 = 0x8847;
pub const NSH: u16 = 0x894f;

/// An Ethernet frame between [`ETHERNET`]'s addresses.
pub fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    with_header(ETHERNET, ethertype, payload)
}

pub fn with_header(addresses: [u8; 12], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&addresses[..], &ethertype.to_be_bytes(), payload].concat()
}

/// `frame` with tags put in: (type, tag control), the outer first.
pub fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    for (tpid, tci) in tags {
        bytes.extend(tpid.to_be_bytes());
        bytes.extend(tci.to_be_bytes());
    }
    bytes.extend(&frame[12..]);
    bytes
}

/// An entry of a label stack (RFC 3032 section 2.1).
pub fn lse(label: u32, class: u32, bottom: bool, ttl: u32) -> [u8; 4] {
    (label << 12 | class << 9 | u32::from(bottom) << 8 | ttl).to_be_bytes()
}

/// The ones' complement sum of big-endian words (RFC 1071), complemented.
pub fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IPv4 packet's fields that the tests change.
#[derive(Clone, Debug)]
pub struct Ip4 {
    pub src: [u8; 4],
    pub dst: [u8; 4],
    pub tos: u8,
    pub ttl: u8,
    pub proto: u8,
    /// Flags and fragment offset.
    pub frag: u16,
}

impl Default for Ip4 {
    fn default() -> Self {
        Self {
            src: [10, 1, 1, 1],
            dst: [10, 1, 1, 2],
            tos: 0,
            ttl: 64,
            proto: 17,
            frag: 0,
        }
    }
}

impl Ip4 {
    /// The packet around `payload`, whose own checksum is left alone.
    pub fn around(&self, payload: &[u8]) -> Vec<u8> {
        let len = (20 + payload.len()) as u16;
        let mut header = vec![0x45, self.tos];
        header.extend(len.to_be_bytes());
        header.extend([0x12, 0x34]);
        header.extend(self.frag.to_be_bytes());
        header.extend([self.ttl, self.proto, 0, 0]);
        header.extend(self.src);
        header.extend(self.dst);
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum);
        [&header, payload].concat()
    }

    fn pseudo(&self, len: usize) -> Vec<u8> {
        let len = (len as u16).to_be_bytes();
        [&self.src[..], &self.dst, &[0, self.proto], &len].concat()
    }

    /// A UDP datagram with [`PAYLOAD`].
    pub fn udp(&self, src: u16, dst: u16) -> Vec<u8> {
        self.udp_with(src, dst, PAYLOAD)
    }

    pub fn udp_with(&self, src: u16, dst: u16, payload: &[u8]) -> Vec<u8> {
        let datagram = udp(src, dst, payload, |len| self.pseudo(len));
        let with_proto = Self {
            proto: 17,
            ..self.clone()
        };
        with_proto.around(&datagram)
    }

    /// A TCP segment with ACK and [`PAYLOAD`].
    pub fn tcp(&self, src: u16, dst: u16) -> Vec<u8> {
        let it = Self {
            proto: 6,
            ..self.clone()
        };
        let segment = tcp(src, dst, PAYLOAD, |len| it.pseudo(len));
        it.around(&segment)
    }
}

/// An IPv6 packet's fields that the tests change.
#[derive(Clone, Debug)]
pub struct Ip6 {
    pub src: Ipv6Addr,
    pub dst: Ipv6Addr,
    pub class: u8,
    pub label: u32,
    pub hops: u8,
}

impl Default for Ip6 {
    fn default() -> Self {
        Self {
            src: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
            dst: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
            class: 0,
            label: 0,
            hops: 64,
        }
    }
}

impl Ip6 {
    fn around(&self, proto: u8, payload: &[u8]) -> Vec<u8> {
        let word = 6 << 28 | u32::from(self.class) << 20 | self.label;
        let mut header = word.to_be_bytes().to_vec();
        header.extend((payload.len() as u16).to_be_bytes());
        header.extend([proto, self.hops]);
        header.extend(self.src.octets());
        header.extend(self.dst.octets());
        [&header, payload].concat()
    }

    fn pseudo(&self, proto: u8, len: usize) -> Vec<u8> {
        let mut bytes = self.src.octets().to_vec();
        bytes.extend(self.dst.octets());
        bytes.extend((len as u32).to_be_bytes());
        bytes.extend([0, 0, 0, proto]);
        bytes
    }

    pub fn udp(&self, src: u16, dst: u16) -> Vec<u8> {
        self.around(17, &udp(src, dst, PAYLOAD, |len| self.pseudo(17, len)))
    }

    pub fn tcp(&self, src: u16, dst: u16) -> Vec<u8> {
        self.around(6, &tcp(src, dst, PAYLOAD, |len| self.pseudo(6, len)))
    }

    /// An ICMPv6 message, its checksum made.
    pub fn icmp(&self, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
        let mut message = [&[kind, code, 0, 0], body].concat();
        let sum = checksum(&[&self.pseudo(58, message.len()), &message]);
        message[2..4].copy_from_slice(&sum);
        self.around(58, &message)
    }
}

fn udp(src: u16, dst: u16, payload: &[u8], pseudo: impl Fn(usize) -> Vec<u8>) -> Vec<u8> {
    let len = 8 + payload.len();
    let mut bytes = src.to_be_bytes().to_vec();
    bytes.extend(dst.to_be_bytes());
    bytes.extend((len as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    let sum = checksum(&[&pseudo(len), &bytes]);
    // RFC 768: a sum of zero is sent as all ones.
    let sum = if sum == [0, 0] { [0xff, 0xff] } else { sum };
    bytes[6..8].copy_from_slice(&sum);
    bytes
}

fn tcp(src: u16, dst: u16, payload: &[u8], pseudo: impl Fn(usize) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = src.to_be_bytes().to_vec();
    bytes.extend(dst.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
    bytes.extend(payload);
    let sum = checksum(&[&pseudo(bytes.len()), &bytes]);
    bytes[16..18].copy_from_slice(&sum);
    bytes
}

/// An SCTP packet with a DATA chunk; its CRC-32C (RFC 9260 appendix A) bit by bit.
pub fn sctp(src: u16, dst: u16) -> Vec<u8> {
    let mut bytes = src.to_be_bytes().to_vec();
    bytes.extend(dst.to_be_bytes());
    bytes.extend([0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0]);
    bytes.extend([0, 3, 0, 20, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(b"data");
    let mut crc = u32::MAX;
    for byte in &bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
        }
    }
    bytes[8..12].copy_from_slice(&(!crc).to_le_bytes());
    bytes
}

/// An ARP packet for IPv4 over Ethernet (RFC 826), padded to the shortest frame.
pub fn arp(op: u16, sender: ([u8; 6], [u8; 4]), target: ([u8; 6], [u8; 4])) -> Vec<u8> {
    let mut bytes = vec![0, 1, 8, 0, 6, 4];
    bytes.extend(op.to_be_bytes());
    bytes.extend(sender.0);
    bytes.extend(sender.1);
    bytes.extend(target.0);
    bytes.extend(target.1);
    bytes.resize(46, 0);
    ethernet(0x0806, &bytes)
}
