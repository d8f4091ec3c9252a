//! Checksums against a dull sum of 16-bit words, and against etherparse.

use frame::checksum::{add, checksum, fold, nonzero, pseudo_v4, pseudo_v6, sctp, sum, update};
use frame::checksum::{complete_checksum, update_partial};
use frame::{Frame, PartialChecksum};
use proptest::prelude::*;

/// RFC 1071, a word at a time.
fn dull(bytes: &[u8]) -> u16 {
    let mut total = 0u32;
    for pair in bytes.chunks(2) {
        total += u32::from(u16::from_be_bytes([
            pair[0],
            pair.get(1).copied().unwrap_or(0),
        ]));
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

proptest! {
    #[test]
    fn sums_are_those_of_words(bytes in prop::collection::vec(any::<u8>(), 0..3000), cut in 0usize..1500) {
        // 0 and 0xffff are the same sum, but only zeros have the first.
        prop_assert_eq!(fold(sum(&bytes)), dull(&bytes));
        let (front, back) = bytes.split_at(2 * (cut.min(bytes.len() / 2)));
        prop_assert_eq!(fold(add(sum(front), sum(back))), dull(&bytes));
    }

    #[test]
    fn an_update_is_a_new_sum(
        mut bytes in prop::collection::vec(any::<u8>(), 32..200),
        at in 0usize..8,
        new in any::<[u8; 16]>(),
    ) {
        let field = checksum(&bytes);
        let at = 2 * at;
        let old: [u8; 16] = bytes[at..at + 16].try_into().unwrap();
        bytes[at..at + 16].copy_from_slice(&new);
        prop_assert_eq!(nonzero(update(field, &old, &new)), nonzero(checksum(&bytes)));
        prop_assert_eq!(nonzero(!update_partial(!field, &old, &new)), nonzero(checksum(&bytes)));
    }

    #[test]
    fn udp_is_etherparses(
        src in any::<[u8; 4]>(), dst in any::<[u8; 4]>(),
        src6 in any::<[u8; 16]>(), dst6 in any::<[u8; 16]>(),
        sport in any::<u16>(), dport in any::<u16>(),
        payload in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let ip = etherparse::Ipv4Header::new(0, 64, etherparse::IpNumber::UDP, src, dst).unwrap();
        let udp = etherparse::UdpHeader::with_ipv4_checksum(sport, dport, &ip, &payload).unwrap();
        let mut bytes = udp.to_bytes().to_vec();
        bytes[6..8].fill(0);
        bytes.extend_from_slice(&payload);
        let ours = nonzero(!fold(add(pseudo_v4(src, dst, 17, bytes.len()), sum(&bytes))));
        prop_assert_eq!(ours, udp.checksum);

        let ip = etherparse::Ipv6Header { source: src6, destination: dst6, ..Default::default() };
        let udp = etherparse::UdpHeader::with_ipv6_checksum(sport, dport, &ip, &payload).unwrap();
        let ours = nonzero(!fold(add(pseudo_v6(&src6, &dst6, 17, bytes.len()), sum(&bytes))));
        prop_assert_eq!(ours, udp.checksum);

        // What a sender leaves to be done, done: the field holds the pseudo header's sum.
        let pseudo = fold(pseudo_v6(&src6, &dst6, 17, bytes.len()));
        bytes[6..8].copy_from_slice(&pseudo.to_be_bytes());
        let mut frame = Frame::from_bytes(&[&[0xee; 54], &bytes[..]].concat());
        frame.offload.csum = Some(PartialChecksum { start: 54, offset: 6 });
        complete_checksum(&mut frame).unwrap();
        prop_assert_eq!(&frame.bytes()[60..62], &udp.checksum.to_be_bytes());
        prop_assert_eq!(frame.offload.csum, None);
    }
}

#[test]
fn crc32c_is_the_published_one() {
    // RFC 3720, B.4: 32 bytes of zeros, least significant byte first.
    assert_eq!(
        sctp(&[0; 32]).unwrap().to_le_bytes(),
        [0xaa, 0x36, 0x91, 0x8a]
    );
    // The field isn't part of it.
    let mut packet = [0; 32];
    packet[8..12].fill(0x55);
    assert_eq!(sctp(&packet), sctp(&[0; 32]));
    assert_eq!(sctp(&[0; 11]), None);
}

/// Ethernet, IPv4 and an L4 packet of `proto`, whose checksum at `offset` is to be completed.
fn partial(proto: u8, offset: u16) -> Frame {
    let mut bytes = vec![0; 14 + 20 + 40];
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14] = 0x45;
    bytes[23] = proto;
    let mut frame = Frame::from_bytes(&bytes);
    frame.offload.csum = Some(PartialChecksum { start: 34, offset });
    frame
}

#[test]
fn a_partial_sctp_checksum_is_a_crc() {
    let mut frame = partial(132, 8);
    complete_checksum(&mut frame).unwrap();
    let crc = sctp(&frame.bytes()[34..]).unwrap();
    assert_eq!(frame.bytes()[42..46], crc.to_le_bytes());
    // Another protocol's at the same offset isn't.
    let mut frame = partial(33, 8);
    complete_checksum(&mut frame).unwrap();
    assert_eq!(frame.bytes()[42..46], [0xff, 0xff, 0, 0]);
}

#[test]
fn a_checksum_outside_the_frame_is_an_error() {
    for (start, offset) in [
        (74, 0),
        (73, 0),
        (72, 1),
        (75, 0),
        (u16::MAX, u16::MAX),
        (34, 39),
    ] {
        let mut frame = partial(17, 6);
        frame.offload.csum = Some(PartialChecksum { start, offset });
        let before = frame.clone();
        assert!(complete_checksum(&mut frame).is_err(), "{start} {offset}");
        assert_eq!(frame, before);
    }
}
