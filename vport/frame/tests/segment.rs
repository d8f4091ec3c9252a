//! Segmentation: the segments' payloads are the original's, and each segment is right by etherparse.
// Helpers outside of the test functions may fail like those.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use etherparse::{IpNumber, Ipv4Header, Ipv6Header, TcpHeader, UdpHeader};
use frame::{
    Frame, Gso, GsoKind, MAX_SEGMENTS, PartialChecksum, Pool, SegmentError, Segments, VlanTag,
};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// A packet to be cut, with where its headers are.
struct Big {
    frame: Frame,
    network: usize,
    transport: usize,
    payload: Vec<u8>,
}

fn random_bytes(rng: &mut SmallRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// Ethernet, tags, labels, IP with options or extension headers, TCP with options or UDP. Lengths and
/// checksums of the headers are those of a sender who leaves them to be done.
fn big(rng: &mut SmallRng, kind: GsoKind) -> Big {
    let v6 = match kind {
        GsoKind::TcpV4 => false,
        GsoKind::TcpV6 => true,
        _ => rng.random(),
    };
    let tcp = matches!(kind, GsoKind::TcpV4 | GsoKind::TcpV6);
    let mut bytes = random_bytes(rng, 12);
    for _ in 0..rng.random_range(0..=2) {
        bytes.extend_from_slice(&[0x81, 0, rng.random(), rng.random()]);
    }
    let labels = rng.random_range(0..=3usize).saturating_sub(1);
    if labels > 0 {
        bytes.extend_from_slice(&[0x88, 0x47]);
        for left in (0..labels).rev() {
            bytes.extend_from_slice(&[rng.random(), rng.random(), u8::from(left == 0), 64]);
        }
    } else {
        bytes.extend_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
    }
    let network = bytes.len();
    let proto = if tcp { 6 } else { 17 };
    if v6 {
        let chain: &[u8] = match rng.random_range(0..4) {
            0 => &[0],
            1 => &[60],
            2 => &[0, 60, 43, 60],
            _ => &[],
        };
        let first = chain.first().copied().unwrap_or(proto);
        bytes.extend_from_slice(&[0x60, 1, 2, 3, 0, 0, first, 64]);
        bytes.extend_from_slice(&random_bytes(rng, 32));
        for index in 0..chain.len() {
            let eights = rng.random_range(0..3usize);
            bytes.push(chain.get(index + 1).copied().unwrap_or(proto));
            bytes.push(eights as u8);
            // No segments left, so that the header's destination is the one that is summed.
            bytes.extend_from_slice(&vec![0; eights * 8 + 6]);
        }
    } else {
        let options = rng.random_range(0..=10usize);
        bytes.extend_from_slice(&[
            0x45 + options as u8,
            3,
            0,
            0,
            rng.random(),
            rng.random(),
            0x40,
            0,
        ]);
        bytes.extend_from_slice(&[64, proto, 0xde, 0xad]);
        bytes.extend_from_slice(&random_bytes(rng, 8));
        bytes.extend_from_slice(&vec![1; options * 4]);
    }
    let transport = bytes.len();
    if tcp {
        let options = rng.random_range(0..=10usize);
        bytes.extend_from_slice(&random_bytes(rng, 12));
        // All flags.
        bytes.extend_from_slice(&[(5 + options as u8) << 4, 0xff, 1, 2, 0xbe, 0xef, 0, 0]);
        bytes.extend_from_slice(&vec![1; options * 4]);
    } else {
        bytes.extend_from_slice(&random_bytes(rng, 8));
    }
    let payload = match rng.random_range(0..4) {
        0 => rng.random_range(0..50),
        1 => rng.random_range(0..60_000),
        _ => rng.random_range(0..6000),
    };
    let payload = random_bytes(rng, payload);
    bytes.extend_from_slice(&payload);
    let mut frame = Frame::from_bytes(&bytes);
    if rng.random() {
        frame.vlan = Some(VlanTag {
            tpid: 0x88a8,
            tci: rng.random(),
        });
    }
    let offset = if tcp { 16 } else { 6 };
    frame.offload.csum = Some(PartialChecksum {
        start: transport as u16,
        offset,
    });
    let size = if rng.random() {
        1448
    } else {
        rng.random_range(8..3000)
    };
    frame.offload.gso = Some(Gso {
        kind,
        ecn: rng.random(),
        size,
        header_len: rng.random(),
    });
    Big {
        frame,
        network,
        transport,
        payload,
    }
}

/// Checks IP's lengths, ids and header checksum; gives what is behind the IP header and its extensions.
fn behind_ip<'a>(bytes: &'a [u8], big: &Big, index: usize) -> &'a [u8] {
    let network = big.network;
    let original = &big.frame.bytes()[network..];
    let ip = &bytes[network..];
    if ip[0] >> 4 == 4 {
        let (header, rest) = Ipv4Header::from_slice(ip).unwrap();
        let (first, _) = Ipv4Header::from_slice(original).unwrap();
        assert_eq!(usize::from(header.total_len), ip.len());
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(
            header.identification,
            first.identification.wrapping_add(index as u16)
        );
        assert_eq!(
            (header.source, header.destination),
            (first.source, first.destination)
        );
        assert_eq!(
            (header.options.clone(), header.dont_fragment),
            (first.options, true)
        );
        rest
    } else {
        let (header, _) = Ipv6Header::from_slice(ip).unwrap();
        assert_eq!(usize::from(header.payload_length), ip.len() - 40);
        assert_eq!(ip[..4], original[..4]);
        assert_eq!(
            ip[6..big.transport - network],
            original[6..big.transport - network]
        );
        &ip[big.transport - network..]
    }
}

fn tcp_checksum(ip: &[u8], tcp: &TcpHeader, payload: &[u8]) -> u16 {
    if ip[0] >> 4 == 4 {
        let (ip, _) = Ipv4Header::from_slice(ip).unwrap();
        tcp.calc_checksum_ipv4(&ip, payload).unwrap()
    } else {
        let (ip, _) = Ipv6Header::from_slice(ip).unwrap();
        tcp.calc_checksum_ipv6(&ip, payload).unwrap()
    }
}

fn udp_checksum(ip: &[u8], udp: &UdpHeader, payload: &[u8]) -> u16 {
    if ip[0] >> 4 == 4 {
        let (ip, _) = Ipv4Header::from_slice(ip).unwrap();
        udp.calc_checksum_ipv4(&ip, payload).unwrap()
    } else {
        let (ip, _) = Ipv6Header::from_slice(ip).unwrap();
        udp.calc_checksum_ipv6(&ip, payload).unwrap()
    }
}

fn check_common(packet: &Frame, big: &Big) {
    assert_eq!(packet.vlan, big.frame.vlan);
    assert_eq!((packet.offload.csum, packet.offload.gso), (None, None));
    assert_eq!(
        packet.bytes()[..big.network],
        big.frame.bytes()[..big.network]
    );
}

#[test]
fn tcp_segments_make_the_stream() {
    let mut rng = SmallRng::seed_from_u64(2);
    let mut pool = Pool::new(64);
    for round in 0..600 {
        let big = big(&mut rng, [GsoKind::TcpV4, GsoKind::TcpV6][round % 2]);
        let size = usize::from(big.frame.offload.gso.unwrap().size);
        let (first, _) = TcpHeader::from_slice(&big.frame.bytes()[big.transport..]).unwrap();
        let mut segments = Segments::new(&big.frame).unwrap();
        let count = segments.remaining();
        assert_eq!(count, big.payload.len().div_ceil(size).max(1));
        let mut stream = Vec::new();
        for index in 0..count {
            let packet = segments.next(&mut pool).unwrap();
            check_common(&packet, &big);
            let bytes = packet.bytes();
            let (tcp, payload) = TcpHeader::from_slice(behind_ip(bytes, &big, index)).unwrap();
            let last = index + 1 == count;
            assert_eq!(
                payload.len(),
                if last {
                    big.payload.len() - stream.len()
                } else {
                    size
                }
            );
            assert_eq!(
                tcp.checksum,
                tcp_checksum(&bytes[big.network..], &tcp, payload)
            );
            let sequence = first.sequence_number.wrapping_add(stream.len() as u32);
            assert_eq!(tcp.sequence_number, sequence);
            assert_eq!((tcp.fin, tcp.psh, tcp.cwr), (last, last, index == 0));
            assert!(tcp.ack && tcp.ece && tcp.syn && tcp.urg && tcp.rst);
            assert_eq!(tcp.options, first.options);
            stream.extend_from_slice(payload);
            pool.put(packet);
        }
        assert!(segments.next(&mut pool).is_none());
        assert!(stream == big.payload);
    }
}

#[test]
fn udp_segments_are_datagrams() {
    let mut rng = SmallRng::seed_from_u64(3);
    let mut pool = Pool::new(64);
    for _ in 0..600 {
        let big = big(&mut rng, GsoKind::UdpL4);
        let size = usize::from(big.frame.offload.gso.unwrap().size);
        let mut segments = Segments::new(&big.frame).unwrap();
        let mut data = Vec::new();
        let packets: Vec<Frame> = segments.frames(&mut pool).collect();
        assert_eq!(packets.len(), big.payload.len().div_ceil(size).max(1));
        for (index, packet) in packets.iter().enumerate() {
            check_common(packet, &big);
            let bytes = packet.bytes();
            let (udp, payload) = UdpHeader::from_slice(behind_ip(bytes, &big, index)).unwrap();
            assert_eq!(usize::from(udp.length), payload.len() + 8);
            assert_eq!(
                udp.checksum,
                udp_checksum(&bytes[big.network..], &udp, payload)
            );
            assert_eq!(
                bytes[big.transport..][..4],
                big.frame.bytes()[big.transport..][..4]
            );
            data.extend_from_slice(payload);
        }
        assert!(data == big.payload);
    }
}

/// Puts IP fragments together: what is in front of them, the protocol, and their payloads in order.
fn reassemble(packets: &[Frame], network: usize) -> (Vec<u8>, u8, Vec<u8>) {
    let (mut front, mut proto, mut data) = (Vec::new(), 0, Vec::new());
    let mut ident = None;
    for (index, packet) in packets.iter().enumerate() {
        let ip = &packet.bytes()[network..];
        let last = index + 1 == packets.len();
        if ip[0] >> 4 == 4 {
            let (header, rest) = Ipv4Header::from_slice(ip).unwrap();
            assert_eq!(usize::from(header.total_len), ip.len());
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(usize::from(header.fragment_offset.value()) * 8, data.len());
            assert_eq!(header.more_fragments, !last);
            assert_eq!(
                *ident.get_or_insert(u32::from(header.identification)),
                u32::from(header.identification)
            );
            proto = header.protocol.0;
            data.extend_from_slice(rest);
        } else {
            let (header, _) = Ipv6Header::from_slice(ip).unwrap();
            assert_eq!(usize::from(header.payload_length), ip.len() - 40);
            // Along the chain to the fragment header.
            let (mut next, mut at) = (header.next_header, 40);
            while next != IpNumber::IPV6_FRAGMENTATION_HEADER {
                assert!(
                    matches!(next.0, 0 | 43 | 60),
                    "no fragment header: {next:?}"
                );
                next = IpNumber(ip[at]);
                at += 8 + 8 * usize::from(ip[at + 1]);
            }
            let offset = u16::from_be_bytes([ip[at + 2], ip[at + 3]]);
            assert_eq!(usize::from(offset & !7), data.len());
            assert_eq!(offset & 7, u16::from(!last));
            let id = u32::from_be_bytes(ip[at + 4..at + 8].try_into().unwrap());
            assert_eq!(*ident.get_or_insert(id), id);
            proto = ip[at];
            front = ip[40..at].to_vec();
            data.extend_from_slice(&ip[at + 8..]);
        }
    }
    (front, proto, data)
}

#[test]
fn udp_fragments_make_the_datagram() {
    let mut rng = SmallRng::seed_from_u64(4);
    let mut pool = Pool::new(64);
    let (mut cut, mut whole) = (0, 0);
    for _ in 0..600 {
        let big = big(&mut rng, GsoKind::UdpFragments);
        let packets: Vec<Frame> = Segments::new(&big.frame)
            .unwrap()
            .frames(&mut pool)
            .collect();
        packets.iter().for_each(|packet| check_common(packet, &big));
        let ip = &big.frame.bytes()[big.network..];
        let (mut proto, udp) = if packets.len() == 1 {
            whole += 1;
            (17, packets[0].bytes()[big.transport..].to_vec())
        } else {
            cut += 1;
            let (front, proto, data) = reassemble(&packets, big.network);
            assert_eq!(
                front.len() + data.len(),
                ip.len()
                    - if ip[0] >> 4 == 4 {
                        usize::from(ip[0] & 15) * 4
                    } else {
                        40
                    }
            );
            (proto, data)
        };
        // Destination options in front of UDP are cut with it.
        let mut udp = &udp[..];
        while proto == 60 {
            proto = udp[0];
            udp = &udp[8 + 8 * usize::from(udp[1])..];
        }
        assert_eq!(proto, 17);
        let (header, payload) = UdpHeader::from_slice(udp).unwrap();
        assert!(payload == big.payload);
        assert_eq!(header.checksum, udp_checksum(ip, &header, payload));
    }
    assert!(cut > 200 && whole > 50, "{cut} {whole}");
}

#[test]
fn fragments_of_two_datagrams_have_two_identifications() {
    let mut rng = SmallRng::seed_from_u64(5);
    let mut pool = Pool::new(64);
    let mut frame = loop {
        let big = big(&mut rng, GsoKind::UdpFragments);
        if big.frame.bytes()[big.network] >> 4 == 6 && big.payload.len() > 5000 {
            break big.frame;
        }
    };
    frame.offload.gso.as_mut().unwrap().size = 1400;
    let first = |pool: &mut Pool| Segments::new(&frame).unwrap().next(pool).unwrap();
    assert_ne!(first(&mut pool).bytes(), first(&mut pool).bytes());
}

#[test]
fn what_cannot_be_cut_is_refused() {
    let mut rng = SmallRng::seed_from_u64(6);
    let big = big(&mut rng, GsoKind::TcpV4);
    let with = |change: &dyn Fn(&mut Frame)| {
        let mut frame = big.frame.clone();
        change(&mut frame);
        Segments::new(&frame).map(|_| ())
    };
    let gso = |frame: &mut Frame, change: &dyn Fn(&mut Gso)| {
        change(frame.offload.gso.as_mut().unwrap());
    };
    assert_eq!(with(&|_| {}), Ok(()));
    assert_eq!(
        with(&|frame| frame.offload.gso = None),
        Err(SegmentError::NotGso)
    );
    assert_eq!(
        with(&|frame| gso(frame, &|gso| gso.size = 0)),
        Err(SegmentError::Size)
    );
    // A packet a byte is allowed, of a few bytes.
    for (bytes, allowed) in [(100, true), (MAX_SEGMENTS, true), (MAX_SEGMENTS + 1, false)] {
        let headers = big.frame.bytes()[..big.transport].to_vec();
        let mut tcp = vec![0; 20 + bytes];
        tcp[12] = 0x50;
        let mut frame = Frame::from_bytes(&[headers, tcp].concat());
        frame.offload = big.frame.offload;
        frame.offload.gso.as_mut().unwrap().size = 1;
        let count = Segments::new(&frame).map(|segments| segments.remaining());
        let wanted = if allowed {
            Ok(bytes)
        } else {
            Err(SegmentError::Size)
        };
        assert_eq!(count, wanted, "{bytes}");
    }
    let kind = |kind| with(&|frame| gso(frame, &|gso| gso.kind = kind));
    assert_eq!(kind(GsoKind::TcpV6), Err(SegmentError::Protocol));
    assert_eq!(kind(GsoKind::UdpL4), Err(SegmentError::Protocol));
    // A fragment.
    assert_eq!(
        with(&|f| f.bytes_mut()[big.network + 6] = 0x20),
        Err(SegmentError::Protocol)
    );
    assert_eq!(
        with(&|f| f.bytes_mut()[big.network] = 0x44),
        Err(SegmentError::Protocol)
    );
    assert_eq!(
        with(&|f| f.bytes_mut()[big.transport + 12] = 0x40),
        Err(SegmentError::Protocol)
    );
    for len in 0..big.transport + 20 {
        assert_eq!(
            with(&|frame| frame.truncate(len)),
            Err(SegmentError::Short),
            "{len}"
        );
    }
}

#[test]
fn mutated_frames_neither_panic_nor_explode() {
    let mut rng = SmallRng::seed_from_u64(7);
    let mut pool = Pool::new(64);
    let kinds = [
        GsoKind::TcpV4,
        GsoKind::TcpV6,
        GsoKind::UdpL4,
        GsoKind::UdpFragments,
    ];
    let (mut cut, mut refused) = (0u32, 0u32);
    let originals: Vec<Big> = (0..200).map(|i| big(&mut rng, kinds[i % 4])).collect();
    for round in 0..120_000 {
        let original = &originals[round % originals.len()];
        let mut frame = pool.copy(&original.frame);
        frame.truncate(rng.random_range(0..2000));
        for _ in 0..rng.random_range(0..6) {
            let at = rng.random_range(0..original.transport + 24);
            if let Some(byte) = frame.bytes_mut().get_mut(at) {
                *byte = rng.random();
            }
        }
        let gso = frame.offload.gso.as_mut().unwrap();
        gso.kind = kinds[rng.random_range(0..4)];
        gso.size = [0, 1, 7, 8, 100, 1448, u16::MAX][rng.random_range(0..7)];
        if rng.random_range(0..8) == 0 {
            frame.offload.csum = Some(PartialChecksum {
                start: rng.random(),
                offset: rng.random(),
            });
        }
        let segments = if rng.random_range(0..10) == 0 {
            Segments::of_ip(&frame)
        } else {
            Segments::new(&frame)
        };
        match segments {
            Ok(mut segments) => {
                cut += 1;
                let (count, mut bytes) = (segments.remaining(), 0);
                assert!(count <= frame.len());
                for _ in 0..count {
                    let packet = segments.next(&mut pool).expect("as many as were announced");
                    bytes += packet.len();
                    pool.put(packet);
                }
                assert!(segments.next(&mut pool).is_none());
                assert!(bytes >= frame.len());
            }
            Err(_) => refused += 1,
        }
        let _ = frame::complete_checksum(&mut frame);
        pool.put(frame);
    }
    assert!(
        cut > 10_000 && refused > 10_000,
        "{cut} cut, {refused} refused"
    );
}
