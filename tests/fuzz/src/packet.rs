//! Random well-formed packets, as a good sender makes them, and parts of them.
//!
//! Checksums are made from scratch, by code that is as plain as the RFCs' text and shares nothing with
//! the daemon's.

use rand::Rng;
use rand::rngs::SmallRng;

/// A packet as a sender makes it.
#[derive(Clone, Debug)]
pub struct Packet {
    /// The frame, tags among the bytes.
    pub bytes: Vec<u8>,
    /// Of a first fragment: the bytes that come in later ones, which the L4 checksum covers.
    pub hidden: Vec<u8>,
    /// Bytes of Ethernet padding at the end.
    pub padding: usize,
}

/// `ETH_P_*` and the like.
#[allow(missing_docs)]
pub mod ethertype {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const VLAN: u16 = 0x8100;
    pub const QINQ: u16 = 0x88a8;
    pub const IPV6: u16 = 0x86dd;
    /// For experiments.
    pub const LOCAL: u16 = 0x88b5;
}

/// What there is in a frame, as far as Open vSwitch looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Tags in front of the network header, at most two.
    pub tags: usize,
    /// Type of the network header.
    pub ethertype: u16,
    /// Where it begins.
    pub l3: usize,
}

/// Whether that is a tag's type.
pub fn is_tag(ethertype: u16) -> bool {
    ethertype == ethertype::VLAN || ethertype == ethertype::QINQ
}

/// The big-endian word at `at`.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Looks for tags and the network header.
pub fn find(bytes: &[u8]) -> Found {
    let mut l3 = 14;
    let mut tags = 0;
    while tags < 2 && is_tag(be16(bytes, l3 - 2)) {
        l3 += 4;
        tags += 1;
    }
    Found {
        tags,
        ethertype: be16(bytes, l3 - 2),
        l3,
    }
}

/// The L4 header of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L4 {
    /// Its protocol.
    pub proto: u8,
    /// Where it begins.
    pub at: usize,
    /// Where the IP packet ends; padding may follow.
    pub end: usize,
    /// `OVS_FRAG_TYPE_*`
    pub frag: u8,
    /// The destination that the checksum covers, if it isn't the IP header's.
    pub last_destination: Option<[u8; 16]>,
}

/// Finds the L4 header of the IP packet at `l3`; None in later fragments of IPv6.
pub fn find_l4(bytes: &[u8], l3: usize, ethertype: u16) -> Option<L4> {
    match ethertype {
        ethertype::IPV4 => {
            let word = be16(bytes, l3 + 6);
            let frag = match (word & 0x1fff, word & 0x2000) {
                (0, 0) => 0,
                (0, _) => 1,
                _ => 2,
            };
            Some(L4 {
                proto: bytes[l3 + 9],
                at: l3 + usize::from(bytes[l3] & 15) * 4,
                end: l3 + usize::from(be16(bytes, l3 + 2)),
                frag,
                last_destination: None,
            })
        }
        ethertype::IPV6 => {
            let mut next = bytes[l3 + 6];
            let mut at = l3 + 40;
            let end = at + usize::from(be16(bytes, l3 + 4));
            let (mut frag, mut last_destination) = (0, None);
            loop {
                match next {
                    0 | 60 => {}
                    43 => {
                        if bytes[at + 3] != 0 && last_destination.is_none() {
                            let len = (usize::from(bytes[at + 1]) + 1) * 8;
                            last_destination = bytes[at + len - 16..at + len].try_into().ok();
                        }
                    }
                    44 => {
                        let word = be16(bytes, at + 2);
                        if word >> 3 != 0 {
                            return None;
                        }
                        frag = 1;
                    }
                    proto => {
                        return Some(L4 {
                            proto,
                            at,
                            end,
                            frag,
                            last_destination,
                        });
                    }
                }
                let len = if next == 44 {
                    8
                } else {
                    (usize::from(bytes[at + 1]) + 1) * 8
                };
                next = bytes[at];
                at += len;
            }
        }
        _ => None,
    }
}

/// The ones' complement sum of RFC 1071 over big-endian words, not yet complemented.
pub fn ones_sum(parts: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            if sum > 0xffff {
                sum -= 0xffff;
            }
        }
    }
    sum as u16
}

/// CRC32c, bit by bit (RFC 9260, appendix A).
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

/// Makes the IPv4 header's checksum.
pub fn make_ipv4_checksum(bytes: &mut [u8], l3: usize) {
    let header = l3 + usize::from(bytes[l3] & 15) * 4;
    bytes[l3 + 10..l3 + 12].fill(0);
    let sum = !ones_sum(&[&bytes[l3..header]]);
    bytes[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
}

/// Where the L4 checksum is, if the protocol has one, and whether it is a sum over a pseudo header.
pub fn checksum_at(l4: &L4, ethertype: u16) -> Option<(usize, bool)> {
    match l4.proto {
        6 => Some((l4.at + 16, true)),
        17 => Some((l4.at + 6, true)),
        58 if ethertype == ethertype::IPV6 => Some((l4.at + 2, true)),
        132 => Some((l4.at + 8, false)),
        _ => None,
    }
}

/// Makes the L4 checksum over what there is and what is `hidden`. A UDP checksum of zero stays. Nothing
/// in later fragments.
pub fn make_l4_checksum(bytes: &mut [u8], l3: usize, ethertype: u16, hidden: &[u8]) {
    let Some(l4) = find_l4(bytes, l3, ethertype).filter(|l4| l4.frag != 2) else {
        return;
    };
    let Some((field, is_sum)) = checksum_at(&l4, ethertype) else {
        return;
    };
    if l4.proto == 17 && bytes[field..field + 2] == [0, 0] {
        return;
    }
    if !is_sum {
        bytes[field..field + 4].fill(0);
        let whole = [&bytes[l4.at..l4.end], hidden].concat();
        let crc = crc32c(&whole);
        bytes[field..field + 4].copy_from_slice(&crc.to_le_bytes());
        return;
    }
    bytes[field..field + 2].fill(0);
    let pseudo = pseudo_header(bytes, l3, ethertype, &l4, hidden.len());
    let whole = [&bytes[l4.at..l4.end], hidden].concat();
    let mut sum = !ones_sum(&[&pseudo, &whole]);
    if l4.proto == 17 && sum == 0 {
        sum = 0xffff;
    }
    bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// RFC 9293, 3.1; RFC 8200, 8.1.
pub fn pseudo_header(bytes: &[u8], l3: usize, ethertype: u16, l4: &L4, hidden: usize) -> Vec<u8> {
    let len = (l4.end - l4.at + hidden) as u32;
    let mut pseudo = Vec::new();
    if ethertype == ethertype::IPV4 {
        pseudo.extend_from_slice(&bytes[l3 + 12..l3 + 20]);
    } else {
        pseudo.extend_from_slice(&bytes[l3 + 8..l3 + 24]);
        match l4.last_destination {
            Some(last) => pseudo.extend_from_slice(&last),
            None => pseudo.extend_from_slice(&bytes[l3 + 24..l3 + 40]),
        }
    }
    pseudo.extend_from_slice(&len.to_be_bytes());
    pseudo.extend_from_slice(&[0, 0, 0, l4.proto]);
    pseudo
}

/// Header of an L4 protocol, with room for its checksum not zero.
fn l4_header(random: &mut SmallRng, proto: u8, payload: usize, v4: bool) -> Vec<u8> {
    let mut header: Vec<u8> = match proto {
        6 => {
            let options = random.random_range(0..=3_usize) * 4;
            let mut header: Vec<u8> = (0..20 + options).map(|_| random.random()).collect();
            header[12] = ((20 + options) / 4) as u8 * 16;
            (header[16], header[17]) = (0, 1);
            header
        }
        17 => {
            let mut header: Vec<u8> = (0..8).map(|_| random.random()).collect();
            header[4..6].copy_from_slice(&(payload as u16 + 8).to_be_bytes());
            let none = v4 && random.random_ratio(1, 4);
            (header[6], header[7]) = (0, u8::from(!none));
            header
        }
        132 => (0..12).map(|_| random.random()).collect(),
        58 => vec![128, 0, 0, 0, 1, 2, 3, 4],
        1 => vec![8, 0, 0, 0, 1, 2, 3, 4],
        _ => Vec::new(),
    };
    // Ports that are often equal, and often of one bit.
    if matches!(proto, 6 | 17 | 132) && random.random_ratio(1, 3) {
        header[0..4].copy_from_slice(&[0, 80, 0, 80]);
    }
    header
}

fn addresses(random: &mut SmallRng) -> (Vec<u8>, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..32).map(|_| random.random()).collect();
    if random.random_ratio(1, 4) {
        bytes.fill(if random.random() { 0xff } else { 0 });
    }
    (bytes[..16].to_vec(), bytes[16..].to_vec())
}

/// A random packet. `whole`: no fragments.
pub fn random(random: &mut SmallRng, whole: bool) -> Packet {
    let mut bytes: Vec<u8> = (0..12).map(|_| random.random()).collect();
    let tags = [0, 0, 0, 1, 1, 2, 2, 3][random.random_range(0..8)];
    for _ in 0..tags {
        let tpid = if random.random() {
            ethertype::VLAN
        } else {
            ethertype::QINQ
        };
        bytes.extend_from_slice(&tpid.to_be_bytes());
        // The bit that the key uses for "present" is the DEI in a frame.
        let tci: u16 = random.random::<u16>() & 0xefff;
        bytes.extend_from_slice(&tci.to_be_bytes());
    }
    let payload = match random.random_range(0..8) {
        0 => 0,
        1..=5 => random.random_range(1..100),
        _ => random.random_range(100..1400),
    };
    let payload: Vec<u8> = match random.random_ratio(1, 8) {
        true => vec![0xff; payload],
        false => (0..payload).map(|_| random.random()).collect(),
    };
    match random.random_range(0..10) {
        0..=4 => ip(random, bytes, true, payload, whole),
        5..=7 => ip(random, bytes, false, payload, whole),
        8 => {
            bytes.extend_from_slice(&ethertype::ARP.to_be_bytes());
            bytes.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, random.random_range(1..3)]);
            bytes.extend((0..20).map(|_| random.random::<u8>()));
            pad(random, bytes, Vec::new())
        }
        _ => {
            bytes.extend_from_slice(&ethertype::LOCAL.to_be_bytes());
            bytes.extend_from_slice(&payload);
            bytes.extend_from_slice(&[0; 8]);
            pad(random, bytes, Vec::new())
        }
    }
}

fn pad(random: &mut SmallRng, mut bytes: Vec<u8>, hidden: Vec<u8>) -> Packet {
    let padding = match random.random_range(0..4) {
        0 => 60_usize.saturating_sub(bytes.len()),
        1 => random.random_range(0..12),
        _ => 0,
    };
    bytes.extend((0..padding).map(|_| random.random::<u8>()));
    Packet {
        bytes,
        hidden,
        padding,
    }
}

fn ip(
    random: &mut SmallRng,
    mut bytes: Vec<u8>,
    v4: bool,
    payload: Vec<u8>,
    whole: bool,
) -> Packet {
    let protocols = [6, 6, 6, 17, 17, 17, 132, 58, 1, 200];
    let proto: u8 = protocols[random.random_range(0..protocols.len())];
    let header = l4_header(random, proto, payload.len(), v4);
    let headers = header.len();
    let mut datagram = [header, payload].concat();
    // A first fragment shows the L4 header and eight bytes' worth of payload.
    let shown = headers.max(8).next_multiple_of(8);
    let fragment = !whole && proto != 132 && random.random_ratio(1, 6) && datagram.len() > shown;
    let hidden = if fragment {
        datagram.split_off(shown)
    } else {
        Vec::new()
    };
    let later = fragment && random.random_ratio(1, 3);
    let (src, dst) = addresses(random);
    let l3 = bytes.len() + 2;
    if v4 {
        let options = random.random_range(0..=10_usize).saturating_sub(7) * 4;
        bytes.extend_from_slice(&ethertype::IPV4.to_be_bytes());
        let len = (20 + options + datagram.len()) as u16;
        let mut ip = vec![0x45 + (options / 4) as u8, random.random()];
        ip.extend_from_slice(&len.to_be_bytes());
        ip.extend_from_slice(&random.random::<[u8; 2]>());
        let offset: u16 = match (fragment, later) {
            (false, _) => random.random_range(0..2) << 14,
            (true, false) => 0x2000,
            (true, true) => 0x2000 | random.random_range(1..100),
        };
        ip.extend_from_slice(&offset.to_be_bytes());
        ip.extend_from_slice(&[
            random.random_range(0..4) * random.random_range(0..64),
            proto,
            0,
            0,
        ]);
        ip.extend_from_slice(&src[..4]);
        ip.extend_from_slice(&dst[..4]);
        ip.extend((0..options).map(|_| 1));
        bytes.extend_from_slice(&ip);
    } else {
        bytes.extend_from_slice(&ethertype::IPV6.to_be_bytes());
        let mut chain: Vec<(u8, Vec<u8>)> = Vec::new();
        if random.random_ratio(1, 6) {
            chain.push((0, vec![0, 0, 1, 4, 0, 0, 0, 0]));
        }
        if random.random_ratio(1, 6) {
            let mut routing = vec![0, 2, 0, random.random_range(0..2), 0, 0, 0, 0];
            routing.extend((0..16).map(|_| random.random::<u8>()));
            chain.push((43, routing));
        }
        if fragment {
            let offset: u16 = if later {
                random.random_range(1..100) << 3 | 1
            } else {
                1
            };
            let [a, b] = offset.to_be_bytes();
            chain.push((44, vec![0, 0, a, b, 1, 2, 3, 4]));
        }
        if random.random_ratio(1, 6) && !later {
            chain.push((60, vec![0, 0, 1, 4, 0, 0, 0, 0]));
        }
        let mut extensions = Vec::new();
        let mut next = proto;
        for (kind, mut header) in chain.into_iter().rev() {
            header[0] = next;
            next = kind;
            extensions = [header, extensions].concat();
        }
        let class: u32 = random.random::<u32>() & 0x0fff_ffff | 0x6000_0000;
        bytes.extend_from_slice(&class.to_be_bytes());
        bytes.extend_from_slice(&((extensions.len() + datagram.len()) as u16).to_be_bytes());
        bytes.extend_from_slice(&[next, random.random_range(0..4) * random.random_range(0..64)]);
        bytes.extend_from_slice(&src);
        bytes.extend_from_slice(&dst);
        bytes.extend_from_slice(&extensions);
    }
    bytes.extend_from_slice(&datagram);
    let kind = if v4 { ethertype::IPV4 } else { ethertype::IPV6 };
    if v4 {
        make_ipv4_checksum(&mut bytes, l3);
    }
    make_l4_checksum(&mut bytes, l3, kind, &hidden);
    // A CRC over the padding, too, is what the module makes of SCTP: as here no sender pads it.
    if proto == 132 {
        return Packet {
            bytes,
            hidden,
            padding: 0,
        };
    }
    pad(random, bytes, hidden)
}

/// A TCP or UDP packet that stands for several, and those: `(whole, segments)`. The whole one's lengths
/// and checksum are the sender's, who leaves them to be made; all segments are of the same length.
pub fn segmented(random: &mut SmallRng) -> (Vec<u8>, Vec<Vec<u8>>, usize) {
    loop {
        let packet = self::random(random, true);
        let found = find(&packet.bytes);
        let Some(l4) = find_l4(&packet.bytes, found.l3, found.ethertype) else {
            continue;
        };
        if !matches!(l4.proto, 6 | 17) || found.tags > 1 || l4.last_destination.is_some() {
            continue;
        }
        let udp = l4.proto == 17;
        let header = if udp {
            8
        } else {
            usize::from(packet.bytes[l4.at + 12] >> 4) * 4
        };
        let size = random.random_range(1..300);
        let count = random.random_range(2..6);
        let head = &packet.bytes[..l4.at + header];
        let data: Vec<u8> = (0..size * count).map(|_| random.random()).collect();
        let lengths = |bytes: &mut Vec<u8>| {
            let (l3, l4_len) = (found.l3, (bytes.len() - l4.at) as u16);
            let whole = (bytes.len() - l3) as u16;
            match found.ethertype {
                ethertype::IPV4 => bytes[l3 + 2..l3 + 4].copy_from_slice(&whole.to_be_bytes()),
                _ => bytes[l3 + 4..l3 + 6].copy_from_slice(&(whole - 40).to_be_bytes()),
            }
            if udp {
                bytes[l4.at + 4..l4.at + 6].copy_from_slice(&l4_len.to_be_bytes());
                (bytes[l4.at + 6], bytes[l4.at + 7]) = (0, 1);
            }
        };
        let mut whole = [head, &data].concat();
        lengths(&mut whole);
        let mut segments = Vec::new();
        for (index, part) in data.chunks(size).enumerate() {
            let mut bytes = [head, part].concat();
            lengths(&mut bytes);
            if found.ethertype == ethertype::IPV4 {
                let id = be16(&bytes, found.l3 + 4).wrapping_add(index as u16);
                bytes[found.l3 + 4..found.l3 + 6].copy_from_slice(&id.to_be_bytes());
                make_ipv4_checksum(&mut bytes, found.l3);
            }
            if !udp {
                let seq = u32::from_be_bytes([
                    bytes[l4.at + 4],
                    bytes[l4.at + 5],
                    bytes[l4.at + 6],
                    bytes[l4.at + 7],
                ]);
                let seq = seq.wrapping_add((index * size) as u32);
                bytes[l4.at + 4..l4.at + 8].copy_from_slice(&seq.to_be_bytes());
                // FIN and PSH belong to the last, CWR to the first.
                if index + 1 < count {
                    bytes[l4.at + 13] &= !0x09;
                }
                if index > 0 {
                    bytes[l4.at + 13] &= !0x80;
                }
            }
            make_l4_checksum(&mut bytes, found.l3, found.ethertype, &[]);
            segments.push(bytes);
        }
        if found.ethertype == ethertype::IPV4 {
            make_ipv4_checksum(&mut whole, found.l3);
        }
        return (whole, segments, size);
    }
}
