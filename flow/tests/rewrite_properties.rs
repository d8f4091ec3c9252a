//! Rewriting: checksums made anew (by etherparse) are those that were kept up, whole or still to be
//! completed, and the key is that of the new bytes.
// Helpers outside of the test functions may fail like those.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use etherparse::{Icmpv6Type, Ipv4Header, Ipv6Header, PacketBuilder, SlicedPacket, TransportSlice};
use flow::action::{EthernetFields, Ipv4Fields, Ipv6Fields, Masked, PortFields, SetField};
use flow::extract::{Metadata, extract};
use flow::headers::Layers;
use flow::key::Key;
use flow::rewrite::{self, Ttl};
use frame::checksum::{fold, nonzero, pseudo_v4, pseudo_v6, sctp};
use frame::{Frame, Gso, GsoKind, PartialChecksum, Pool, Segments, complete_checksum};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Protocol {
    Tcp,
    Udp,
    Icmpv6,
    Sctp,
}

/// A packet whose checksums are right.
fn packet(rng: &mut SmallRng, v6: bool, protocol: Protocol, payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; payload];
    rng.fill_bytes(&mut bytes);
    let builder = PacketBuilder::ethernet2(rng.random(), rng.random());
    let builder = match v6 {
        true => builder.ipv6(rng.random(), rng.random(), 64),
        false => builder.ipv4(rng.random(), rng.random(), 64),
    };
    let mut out = Vec::new();
    match protocol {
        Protocol::Tcp => {
            let tcp = builder.tcp(rng.random(), rng.random(), rng.random(), 1000);
            tcp.write(&mut out, &bytes).unwrap();
        }
        Protocol::Udp => {
            builder
                .udp(rng.random(), rng.random())
                .write(&mut out, &bytes)
                .unwrap();
        }
        Protocol::Icmpv6 => {
            let kind = Icmpv6Type::Unknown {
                type_u8: 1,
                code_u8: 2,
                bytes5to8: [0; 4],
            };
            builder.icmpv6(kind).write(&mut out, &bytes).unwrap();
        }
        Protocol::Sctp => {
            bytes.splice(0..0, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]);
            let crc = sctp(&bytes).unwrap();
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
            let sctp = etherparse::IpNumber::SCTP;
            builder.write(&mut out, sctp, &bytes).unwrap();
        }
    }
    out
}

/// All checksums of a packet are right.
fn check(bytes: &[u8], partial: bool) {
    let sliced = SlicedPacket::from_ethernet(bytes).unwrap();
    let ip = &bytes[14..];
    let v4 = (ip[0] >> 4 == 4).then(|| Ipv4Header::from_slice(ip).unwrap().0);
    let v6 = (ip[0] >> 4 == 6).then(|| Ipv6Header::from_slice(ip).unwrap().0);
    if let Some(v4) = &v4 {
        assert_eq!(v4.header_checksum, v4.calc_header_checksum());
    }
    let (got, expected) = match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let (header, payload) = (tcp.to_header(), tcp.payload());
            let expected = match (&v4, &v6) {
                (Some(ip), _) => header.calc_checksum_ipv4(ip, payload),
                (_, Some(ip)) => header.calc_checksum_ipv6(ip, payload),
                _ => panic!("no IP"),
            };
            // What is completed late is never zero; both say the same.
            let same = |sum| if partial { nonzero(sum) } else { sum };
            (same(header.checksum), same(expected.unwrap()))
        }
        Some(TransportSlice::Udp(udp)) => {
            let (header, payload) = (udp.to_header(), udp.payload());
            let expected = match (&v4, &v6) {
                (Some(ip), _) => header.calc_checksum_ipv4(ip, payload),
                (_, Some(ip)) => header.calc_checksum_ipv6(ip, payload),
                _ => panic!("no IP"),
            };
            (header.checksum, expected.unwrap())
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            let ip = v6.unwrap();
            assert!(icmp.is_checksum_valid(ip.source, ip.destination));
            (0, 0)
        }
        _ => {
            let at = if v4.is_some() { 34 } else { 54 };
            let crc = sctp(&bytes[at..]).unwrap();
            assert_eq!(bytes[at + 8..at + 12], crc.to_le_bytes());
            (0, 0)
        }
    };
    assert_eq!(got, expected);
}

fn masked<T>(rng: &mut SmallRng) -> Masked<T>
where
    T: FromBytes + IntoBytes + KnownLayout + Immutable,
{
    let (mut value, mut mask) = (vec![0; size_of::<T>()], vec![0; size_of::<T>()]);
    rng.fill_bytes(&mut value);
    match rng.random_range(0..4) {
        0 => rng.fill_bytes(&mut mask),
        1 => {}
        _ => mask.fill(0xff),
    }
    value
        .iter_mut()
        .zip(&mask)
        .for_each(|(value, mask)| *value &= mask);
    Masked {
        value: T::read_from_bytes(&value).unwrap(),
        mask: T::read_from_bytes(&mask).unwrap(),
    }
}

fn field(rng: &mut SmallRng, v6: bool, protocol: Protocol) -> SetField {
    match (rng.random_range(0..3), protocol) {
        (0, Protocol::Tcp) => SetField::Tcp(masked::<PortFields>(rng)),
        (0, Protocol::Udp) => SetField::Udp(masked::<PortFields>(rng)),
        (0, Protocol::Sctp) => SetField::Sctp(masked::<PortFields>(rng)),
        (1, _) => SetField::Ethernet(masked::<EthernetFields>(rng)),
        _ if v6 => {
            let mut masked = masked::<Ipv6Fields>(rng);
            // As validation has it: 20 bits.
            masked.value.label &= 0xf_ffff_u32;
            masked.mask.label &= 0xf_ffff_u32;
            SetField::Ipv6(masked)
        }
        _ => SetField::Ipv4(masked::<Ipv4Fields>(rng)),
    }
}

fn extracted(frame: &mut Frame) -> (Key, Layers) {
    let mut key = Key::ZERO;
    let layers = extract(frame, &Metadata::default(), &mut key).unwrap();
    (key, layers)
}

/// Protocols with the offset of their checksum.
fn protocols(v6: bool) -> &'static [(Protocol, u16)] {
    let all: &[(Protocol, u16)] = &[
        (Protocol::Tcp, 16),
        (Protocol::Udp, 6),
        (Protocol::Sctp, 8),
        // Over IPv4 it isn't what it says.
        (Protocol::Icmpv6, 2),
    ];
    if v6 { all } else { &all[..3] }
}

#[test]
fn kept_up_checksums_are_new_ones() {
    let mut rng = SmallRng::seed_from_u64(11);
    for round in 0..40_000 {
        let v6 = rng.random();
        let (protocol, offset) = protocols(v6)[round % protocols(v6).len()];
        let payload = rng.random_range(0..120);
        let mut frame = Frame::from_bytes(&packet(&mut rng, v6, protocol, payload));
        check(frame.bytes(), false);
        let (mut key, layers) = extracted(&mut frame);
        let partial = rng.random();
        let start = layers.transport.unwrap();
        if partial {
            frame.offload.csum = Some(PartialChecksum { start, offset });
            if protocol != Protocol::Sctp {
                let len = frame.len() - usize::from(start);
                let ip = &frame.bytes()[14..];
                let sum = match v6 {
                    true => {
                        let (src, dst) = (ip[8..24].try_into().unwrap(), ip[24..40].try_into());
                        pseudo_v6(src, dst.unwrap(), key.ip_proto, len)
                    }
                    false => {
                        let (src, dst) = (ip[12..16].try_into().unwrap(), ip[16..20].try_into());
                        pseudo_v4(src, dst.unwrap(), key.ip_proto, len)
                    }
                };
                let at = usize::from(start + offset);
                frame.bytes_mut()[at..at + 2].copy_from_slice(&fold(sum).to_be_bytes());
            }
        }
        for _ in 0..rng.random_range(1..4) {
            let field = field(&mut rng, v6, protocol);
            rewrite::set(&mut frame, &mut key, &layers, &field).unwrap();
        }
        if rng.random() {
            let ttl = key.ip_ttl;
            match rewrite::dec_ttl(&mut frame, &mut key, &layers).unwrap() {
                Ttl::Alive => assert_eq!(key.ip_ttl, ttl - 1),
                Ttl::Exceeded => assert!(key.ip_ttl == ttl && ttl <= 1),
            }
        }
        // Neither a request forgotten nor one more.
        assert_eq!(frame.offload.csum.is_some(), partial);
        complete_checksum(&mut frame).unwrap();
        check(frame.bytes(), partial);
        let (fresh, fresh_layers) = extracted(&mut frame);
        assert_eq!((key, layers), (fresh, fresh_layers));
    }
}

#[test]
fn an_absent_udp_checksum_stays_absent() {
    let mut rng = SmallRng::seed_from_u64(12);
    for _ in 0..2000 {
        let mut frame = Frame::from_bytes(&packet(&mut rng, false, Protocol::Udp, 20));
        frame.bytes_mut()[40..42].fill(0);
        let (mut key, layers) = extracted(&mut frame);
        let field = field(&mut rng, false, Protocol::Udp);
        rewrite::set(&mut frame, &mut key, &layers, &field).unwrap();
        assert_eq!(frame.bytes()[40..42], [0, 0]);
    }
}

#[test]
fn a_wrong_checksum_stays_as_wrong() {
    let mut rng = SmallRng::seed_from_u64(13);
    for (protocol, offset) in [(Protocol::Tcp, 16), (Protocol::Udp, 6), (Protocol::Sctp, 8)] {
        for _ in 0..500 {
            let right = packet(&mut rng, false, protocol, 20);
            let mut wrong = right.clone();
            wrong[34 + offset] ^= 0x40;
            let field = field(&mut rng, false, protocol);
            let [right, wrong] = [right, wrong].map(|bytes| {
                let mut frame = Frame::from_bytes(&bytes);
                let (mut key, layers) = extracted(&mut frame);
                rewrite::set(&mut frame, &mut key, &layers, &field).unwrap();
                frame.bytes().to_vec()
            });
            assert_ne!(right, wrong, "the error was repaired");
            check(&right, true);
        }
    }
}

#[test]
fn a_rewritten_big_packet_is_cut_into_right_ones() {
    let mut rng = SmallRng::seed_from_u64(14);
    let mut pool = Pool::new(64);
    for round in 0..300 {
        let v6 = round % 2 == 1;
        let (protocol, offset, kind) = match (round / 2 % 2, v6) {
            (0, true) => (Protocol::Tcp, 16, GsoKind::TcpV6),
            (0, false) => (Protocol::Tcp, 16, GsoKind::TcpV4),
            _ => (Protocol::Udp, 6, GsoKind::UdpL4),
        };
        let mut frame = Frame::from_bytes(&packet(&mut rng, v6, protocol, 9000));
        let (mut key, mut layers) = extracted(&mut frame);
        let start = layers.transport.unwrap();
        frame.offload.csum = Some(PartialChecksum { start, offset });
        frame.offload.gso = Some(Gso {
            kind,
            ecn: false,
            size: 1400,
            header_len: 0,
        });
        let field = field(&mut rng, v6, protocol);
        let tags = rng.random_range(0..3);
        for tag in 0..tags {
            let tci = 0x1000 + tag;
            rewrite::push_vlan(&mut frame, &mut key, &mut layers, 0x8100, tci).unwrap();
        }
        rewrite::set(&mut frame, &mut key, &layers, &field).unwrap();
        let in_band = 4 * tags.saturating_sub(1);
        let csum = PartialChecksum {
            start: start + in_band,
            offset,
        };
        assert_eq!(frame.offload.csum, Some(csum));
        let segments: Vec<Frame> = Segments::new(&frame).unwrap().frames(&mut pool).collect();
        assert_eq!(segments.len(), 7);
        for mut segment in segments {
            assert_eq!(segment.vlan, frame.vlan);
            for _ in 0..tags {
                let (mut key, mut layers) = extracted(&mut segment);
                rewrite::pop_vlan(&mut segment, &mut key, &mut layers).unwrap();
            }
            check(segment.bytes(), true);
        }
    }
}
