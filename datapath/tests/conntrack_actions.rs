//! What recordings don't show: forced commits, all-zero sources, ICMPv6 errors through a translation,
//! partial checksums, mappings without ports, reset and reopened connections, timeout policies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod conntrack_common;

use conntrack_common::*;
use datapath::conntrack::timeout::{Policy, Timeouts};
use datapath::conntrack::tuple::Family;
use etherparse::{Icmpv6Header, NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
use flow::action::{Conntrack, Masked, Nat};
use frame::{PartialChecksum, complete_checksum};

const ENDS: Ends = Ends {
    src: [10, 0, 0, 1],
    src_port: 1000,
    dst: [10, 0, 0, 2],
    dst_port: 80,
};

#[test]
fn a_forced_commit_turns_a_connection_round() {
    let tracker = tracker(100);
    run(&tracker, &udp(ENDS, b""), &commit(1), SECOND).unwrap();
    let forced = Conntrack {
        force: true,
        ..commit(1)
    };
    // In its own direction it stays what it is.
    let packet = run(&tracker, &udp(ENDS, b""), &forced, SECOND).unwrap();
    assert_eq!(bits(&packet), "new trk");
    let packet = run(&tracker, &udp(ENDS.back(), b""), &forced, SECOND).unwrap();
    assert_eq!(bits(&packet), "new trk");
    assert_eq!(packet.key.ct_orig_tp_src.get(), 80);
    let packet = run(&tracker, &udp(ENDS, b""), &ct(1), SECOND).unwrap();
    assert_eq!(bits(&packet), "est rpl trk");
    assert_eq!((tracker.table.len(), tracker.limits.count(1)), (1, 1));
}

#[test]
fn an_all_zero_source_changes_a_port_only_where_one_is_taken() {
    let tracker = tracker(100);
    let zero = commit_nat(1, true, ([0; 4], [0; 4]), None);
    let packet = run(&tracker, &udp(ENDS, b""), &zero, SECOND).unwrap();
    let (seen, _) = look(&packet);
    assert_eq!((seen.src, seen.src_port), (ENDS.src, ENDS.src_port));
    // Another client is translated to the address and port of one that speaks for itself.
    let other = Ends {
        src: [10, 0, 0, 9],
        ..ENDS
    };
    let to_first = commit_nat(1, true, (ENDS.src, ENDS.src), Some((4000, 4000)));
    run(&tracker, &udp(other, b""), &to_first, SECOND).unwrap();
    let taken = Ends {
        src_port: 4000,
        ..ENDS
    };
    let packet = run(&tracker, &udp(taken, b""), &zero, SECOND).unwrap();
    let (seen, right) = look(&packet);
    assert!(right && seen.src == ENDS.src && seen.src_port != 4000);
}

#[test]
fn an_icmpv6_error_is_about_what_its_receiver_sent() {
    let tracker = tracker(100);
    let (a, b, public) = ([0xa; 16], [0xb; 16], [0xc; 16]);
    let nat = Conntrack {
        nat: Some(Nat {
            source: Some(true),
            min_addr: Some(public),
            max_addr: Some(public),
            min_port: Some(7000),
            max_port: Some(7000),
            ipv6: true,
            ..Nat::default()
        }),
        ..commit(1)
    };
    let question = udp6(a, 1000, b, 53, b"question");
    let packet = run(&tracker, &question, &nat, SECOND).unwrap();
    let quoted = packet.frame.bytes()[14..].to_vec();
    let mut error = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv6([0xd; 16], public, 64)
        .icmpv6_raw(1, 4, [0; 4])
        .write(&mut error, &quoted)
        .unwrap();
    let packet = run(&tracker, &error, &ct_nat(1), SECOND).unwrap();
    assert_eq!(bits(&packet), "rel rpl trk dnat");
    let headers = PacketHeaders::from_ethernet_slice(packet.frame.bytes()).unwrap();
    let Some(NetHeaders::Ipv6(ip, _)) = headers.net else {
        panic!("not IPv6");
    };
    assert_eq!(ip.destination, a);
    let Some(TransportHeader::Icmpv6(Icmpv6Header {
        icmp_type,
        checksum,
    })) = headers.transport
    else {
        panic!("not ICMPv6");
    };
    let payload = headers.payload.slice();
    let right = icmp_type.calc_checksum(ip.source, ip.destination, payload);
    assert_eq!(checksum, right.unwrap());
    assert_eq!(
        payload,
        &question[14..],
        "as it was sent, down to its checksum"
    );
}

#[test]
fn a_checksum_that_is_still_to_be_completed_becomes_right() {
    let tracker = tracker(100);
    let nat = commit_nat(1, true, ([9, 9, 9, 9], [9, 9, 9, 9]), Some((4000, 5000)));
    let bytes = tcp(ENDS, SYN, 1, 0, b"");
    let mut partial = packet(&bytes);
    // The field has the pseudo header's sum.
    let pseudo = frame::checksum::pseudo_v4(ENDS.src, ENDS.dst, 6, bytes.len() - 34);
    let field = frame::checksum::fold(pseudo).to_be_bytes();
    partial.frame.bytes_mut()[50..52].copy_from_slice(&field);
    partial.frame.offload.csum = Some(PartialChecksum {
        start: 34,
        offset: 16,
    });
    tracker.execute(&mut partial, &nat, SECOND).unwrap();
    complete_checksum(&mut partial.frame).unwrap();
    let (seen, right) = look(&partial);
    assert!(right && seen.src == [9; 4] && (4000..=5000).contains(&seen.src_port));
}

#[test]
fn a_closed_connection_is_reopened_by_the_next_syn_and_a_refused_one_is_forgotten() {
    let tracker = tracker(100);
    let see = |ends, flags, seq, ack| {
        let packet = run(
            &tracker,
            &tcp(ends, flags, seq, ack, b""),
            &commit(1),
            SECOND,
        )
        .unwrap();
        bits(&packet)
    };
    let back = ENDS.back();
    see(ENDS, SYN, 100, 0);
    see(back, SYN | ACK, 500, 101);
    see(ENDS, ACK, 101, 501);
    see(ENDS, FIN | ACK, 101, 501);
    see(back, FIN | ACK, 501, 102);
    assert_eq!(see(ENDS, ACK, 102, 502), "est trk");
    assert_eq!(see(ENDS, SYN, 90_000, 0), "new trk", "in TIME_WAIT");
    assert_eq!(see(back, RST | ACK, 0, 90_001), "est rpl trk");
    assert_eq!(tracker.table.len(), 0, "refused: nothing to remember");
    assert_eq!(tracker.limits.count(1), 0);
}

#[test]
fn a_policy_says_how_long_and_one_that_does_not_exist_nothing() {
    let tracker = tracker(100);
    tracker.set_policy(
        "short",
        Policy::new(
            Family::V4,
            17,
            Timeouts {
                udp_single: 2 * SECOND,
                ..Timeouts::default()
            },
        ),
    );
    for (name, port, lives) in [("short", 1, 2), ("unknown", 2, 30)] {
        let ends = Ends {
            src_port: port,
            ..ENDS
        };
        let what = Conntrack {
            timeout: Some(name.into()),
            ..commit(1)
        };
        let packet = run(&tracker, &udp(ends, b""), &what, SECOND).unwrap();
        let connection = packet.conntrack.unwrap().connection;
        assert_eq!(connection.deadline(), (1 + lives) * SECOND, "{name}");
    }
}

#[test]
fn a_packet_that_went_through_user_space_finds_its_connection_again() {
    let tracker = tracker(100);
    let nat = commit_nat(1, true, ([9, 9, 9, 9], [9, 9, 9, 9]), None);
    let mut through = run(&tracker, &udp(ENDS, b""), &nat, SECOND).unwrap();
    assert_eq!(bits(&through), "new trk snat");
    // Its key comes back, its connection doesn't.
    through.conntrack = None;
    let marked = Conntrack {
        mark: Some(Masked {
            value: 7,
            mask: 0xff,
        }),
        ..commit(1)
    };
    tracker.execute(&mut through, &marked, SECOND).unwrap();
    assert_eq!(
        (bits(&through).as_str(), through.key.ct_mark),
        ("new trk snat", 7)
    );
    assert_eq!(tracker.table.len(), 1);
    let packet = run(&tracker, &udp(ENDS, b""), &ct(1), SECOND).unwrap();
    assert_eq!(packet.key.ct_mark, 7);
}

fn gre(ends: Ends, header: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(ends.src, ends.dst, 64);
    let mut bytes = Vec::new();
    builder
        .write(&mut bytes, etherparse::IpNumber::GRE, header)
        .unwrap();
    bytes
}

/// GRE by address; calls of its version 1 apart, each way by itself, as no helper knows which call answers
/// which.
#[test]
fn gre_is_told_apart_by_address_and_calls() {
    let tracker = tracker(100);
    let see = |ends: Ends, header: &[u8], what: &Conntrack| {
        let packet = run(&tracker, &gre(ends, header), what, SECOND).unwrap();
        bits(&packet)
    };
    let plain = [0, 0, 8, 0, 1, 2, 3, 4];
    let keyed = [0x20, 0, 8, 0, 0, 0, 0, 7];
    assert_eq!(see(ENDS, &plain, &commit(1)), "new trk");
    // A key is none of a connection's.
    assert_eq!(see(ENDS.back(), &keyed, &ct(1)), "est rpl trk");
    assert_eq!(tracker.table.len(), 1);
    let call = |id: u8| [0x30, 1, 0x88, 0x0b, 0, 0, 0, id, 0, 0, 0, 1];
    assert_eq!(see(ENDS, &call(1), &commit(1)), "new trk");
    assert_eq!(see(ENDS, &call(2), &commit(1)), "new trk");
    assert_eq!(see(ENDS.back(), &call(1), &commit(1)), "new trk");
    assert_eq!(tracker.table.len(), 4);
    // Version 1 carries PPP and nothing else.
    let mut other = call(1);
    other[2] = 8;
    assert_eq!(see(ENDS, &other, &ct(1)), "inv trk");
}

/// An ICMP error is related to its connection in the direction of what it is about, the other way round.
#[test]
fn an_error_goes_the_way_of_answers_or_of_questions() {
    let tracker = tracker(100);
    let error = |about: &[u8], from: [u8; 4], to: [u8; 4]| {
        let mut message = vec![3, 1, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&about[14..]);
        let sum = frame::checksum::checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(from, to, 64);
        let mut bytes = Vec::new();
        builder
            .write(&mut bytes, etherparse::IpNumber::ICMP, &message)
            .unwrap();
        bytes
    };
    let (there, back) = (udp(ENDS, b"x"), udp(ENDS.back(), b"y"));
    run(&tracker, &there, &commit(1), SECOND).unwrap();
    run(&tracker, &back, &ct(1), SECOND).unwrap();
    let router = [192, 0, 2, 1];
    for (about, to, expected) in [
        (&there, ENDS.src, "rel rpl trk"),
        (&back, ENDS.dst, "rel trk"),
        // To somebody who hasn't sent the packet.
        (&there, ENDS.dst, "inv trk"),
    ] {
        let bytes = error(about, router, to);
        let packet = run(&tracker, &bytes, &ct(1), SECOND).unwrap();
        assert_eq!(bits(&packet), expected);
        assert_eq!(tracker.table.len(), 1, "an error is no connection");
    }
}
