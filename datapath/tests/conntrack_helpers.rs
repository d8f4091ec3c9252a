//! FTP and TFTP, with and without translation: the connections that they announce are related, and find
//! their way; a control connection whose messages change in length stays one stream to both ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod conntrack_common;

use conntrack_common::*;
use datapath::conntrack::Tracker;
use datapath::conntrack::connection::Protocol;
use datapath::conntrack::tcp::State;
use datapath::packet::Packet;
use etherparse::PacketHeaders;
use flow::action::Conntrack;

const CONTROL: Ends = Ends {
    src: [10, 0, 0, 1],
    src_port: 40_000,
    dst: [20, 0, 0, 2],
    dst_port: 21,
};

fn with_helper(mut what: Conntrack, name: &str) -> Conntrack {
    what.helper = Some(name.into());
    what
}

/// Ends, sequence number, acknowledgement, payload; checksums are right.
fn segment(packet: &Packet) -> (Ends, u32, u32, Vec<u8>) {
    let (ends, right) = look(packet);
    assert!(right);
    let headers = PacketHeaders::from_ethernet_slice(packet.frame.bytes()).unwrap();
    let tcp = headers.transport.unwrap().tcp().unwrap();
    let payload = headers.payload.slice().to_vec();
    (
        ends,
        tcp.sequence_number,
        tcp.acknowledgment_number,
        payload,
    )
}

/// A control connection, set up; the client's next number is 101, the server's 501. Gives the ends as
/// the server sees them.
fn set_up(tracker: &Tracker, begin: &Conntrack) -> Ends {
    let packet = run(tracker, &tcp(CONTROL, SYN, 100, 0, b""), begin, SECOND).unwrap();
    let (seen, _) = look(&packet);
    let again = ct_nat(begin.zone);
    run(
        tracker,
        &tcp(seen.back(), SYN | ACK, 500, 101, b""),
        &again,
        SECOND,
    )
    .unwrap();
    run(tracker, &tcp(CONTROL, ACK, 101, 501, b""), &again, SECOND).unwrap();
    seen
}

#[test]
fn an_active_transfer_is_related_to_its_control_connection() {
    let tracker = tracker(100);
    let begin = with_helper(commit(4), "ftp");
    let seen = set_up(&tracker, &begin);
    let port = tcp(CONTROL, ACK, 101, 501, b"PORT 10,0,0,1,4,210\r\n");
    run(&tracker, &port, &ct(4), SECOND).unwrap();
    assert_eq!(tracker.expectations.len(), 1);
    let data = Ends {
        src: seen.dst,
        src_port: 20,
        dst: CONTROL.src,
        dst_port: 4 * 256 + 210,
    };
    let packet = run(&tracker, &tcp(data, SYN, 7, 0, b""), &ct(4), SECOND).unwrap();
    assert_eq!(bits(&packet), "new rel trk");
    assert_eq!(packet.key.ct_orig_tp_dst.get(), 21, "its master's tuple");
    let packet = run(&tracker, &tcp(data, SYN, 7, 0, b""), &commit(4), SECOND).unwrap();
    assert_eq!(bits(&packet), "new rel trk");
    assert_eq!(tracker.expectations.len(), 0, "fulfilled");
    let answer = tcp(data.back(), SYN | ACK, 9, 8, b"");
    let packet = run(&tracker, &answer, &ct(4), SECOND).unwrap();
    assert_eq!(bits(&packet), "est rel rpl trk");
}

#[test]
fn who_announces_a_third_ones_address_is_not_believed() {
    let tracker = tracker(100);
    set_up(&tracker, &with_helper(commit(4), "ftp"));
    let port = tcp(CONTROL, ACK, 101, 501, b"PORT 10,0,0,9,4,210\r\n");
    run(&tracker, &port, &ct(4), SECOND).unwrap();
    assert_eq!(tracker.expectations.len(), 0);
}

#[test]
fn behind_a_translated_source_the_server_is_told_an_address_that_it_can_reach() {
    let tracker = tracker(100);
    let nat = commit_nat(4, true, ([198, 51, 100, 200], [198, 51, 100, 200]), None);
    let seen = set_up(&tracker, &with_helper(nat, "ftp"));
    assert_eq!(seen.src, [198, 51, 100, 200]);
    let told = b"PORT 10,0,0,1,4,210\r\n";
    let port = tcp(CONTROL, ACK, 101, 501, told);
    let packet = run(&tracker, &port, &ct_nat(4), SECOND).unwrap();
    let (_, seq, ack, payload) = segment(&packet);
    assert_eq!((seq, ack), (101, 501));
    assert_eq!(payload, b"PORT 198,51,100,200,4,210\r\n");
    let (sent, became) = (told.len() as u32, payload.len() as u32);

    // The server acknowledges what it got; the client learns that all it sent has arrived.
    let answer = tcp(seen.back(), ACK, 501, 101 + became, b"200 ok\r\n");
    let packet = run(&tracker, &answer, &ct_nat(4), SECOND).unwrap();
    let (ends, seq, ack, payload) = segment(&packet);
    assert_eq!((ends.dst, seq, ack), (CONTROL.src, 501, 101 + sent));
    assert_eq!(payload, b"200 ok\r\n");
    // The first one repeated changes again, and only once.
    let packet = run(&tracker, &port, &ct_nat(4), SECOND).unwrap();
    let (_, seq, _, payload) = segment(&packet);
    assert_eq!((seq, payload.len() as u32), (101, became));
    // And what the client sends next is the server's next.
    let next = tcp(CONTROL, ACK, 101 + sent, 509, b"STOR x\r\n");
    let packet = run(&tracker, &next, &ct_nat(4), SECOND).unwrap();
    assert_eq!(segment(&packet).1, 101 + became);

    // The server's data connection reaches the client, and its answers come from the address told.
    let data = Ends {
        src: seen.dst,
        src_port: 20,
        dst: seen.src,
        dst_port: 4 * 256 + 210,
    };
    let mut related = ct_nat(4);
    related.commit = true;
    let packet = run(&tracker, &tcp(data, SYN, 7, 0, b""), &related, SECOND).unwrap();
    assert!(bits(&packet).contains("rel"), "{}", bits(&packet));
    let (ends, ..) = segment(&packet);
    assert_eq!((ends.dst, ends.dst_port), (CONTROL.src, 1234));
    let answer = tcp(ends.back(), SYN | ACK, 9, 8, b"");
    let packet = run(&tracker, &answer, &ct_nat(4), SECOND).unwrap();
    let (ends, ..) = segment(&packet);
    assert_eq!((ends.src, ends.src_port), (seen.src, 1234));
}

/// The windows are kept in each end's own numbers: with 26 bytes more on the server's side of the helper its
/// acknowledgements are ahead of what the client sent, and the client's reset is where it should be.
#[test]
fn windows_know_of_shifted_numbers() {
    let status = |tracker: &Tracker| {
        let mut found = None;
        tracker.for_each(SECOND, |connection| {
            if let Protocol::Tcp(tcp) = &connection.lock().protocol {
                found = Some(tcp.state);
            }
            true
        });
        found
    };
    for announcements in [0, 1, 5] {
        let tracker = tracker(100);
        let nat = commit_nat(4, true, ([198, 51, 100, 200], [198, 51, 100, 200]), None);
        let seen = set_up(&tracker, &with_helper(nat, "ftp"));
        let (mut client, mut shifted, mut server) = (101, 101, 501);
        for number in 0..announcements {
            let told = format!("PORT 10,0,0,1,4,{}\r\n", 100 + number);
            let port = tcp(CONTROL, ACK, client, server, told.as_bytes());
            let packet = run(&tracker, &port, &ct_nat(4), SECOND).unwrap();
            let (_, seq, _, payload) = segment(&packet);
            assert_eq!(seq, shifted);
            assert!(payload.len() > told.len(), "{payload:?}");
            client += told.len() as u32;
            shifted += payload.len() as u32;
            let answer = tcp(seen.back(), ACK, server, shifted, b"200 ok\r\n");
            let packet = run(&tracker, &answer, &ct_nat(4), SECOND).unwrap();
            assert_eq!(segment(&packet).2, client);
            server += 8;
            let ack = tcp(CONTROL, ACK, client, server, b"");
            let packet = run(&tracker, &ack, &ct_nat(4), SECOND).unwrap();
            assert_eq!(segment(&packet).1, shifted);
        }
        // An old one: what the server has acknowledged already. It would pass if windows were kept in
        // the server's numbers of another direction.
        let old = tcp(CONTROL, RST, client - 10, 0, b"");
        let packet = run(&tracker, &old, &ct_nat(4), SECOND).unwrap();
        if announcements > 0 {
            assert_eq!(bits(&packet), "inv trk", "{announcements}");
        }
        assert_eq!(status(&tracker), Some(State::Established));
        // The one that is due.
        let reset = tcp(CONTROL, RST, client, 0, b"");
        let packet = run(&tracker, &reset, &ct_nat(4), SECOND).unwrap();
        assert!(
            bits(&packet).starts_with("est"),
            "{announcements}: {}",
            bits(&packet)
        );
        assert_eq!(segment(&packet).1, shifted);
        assert_eq!(status(&tracker), Some(State::Close), "{announcements}");
    }
}

#[test]
fn behind_a_translated_destination_the_client_is_told_the_address_that_it_knows() {
    for (answer, expected) in [
        (
            &b"227 Entering Passive Mode (30,0,0,7,8,1).\r\n"[..],
            &b"227 Entering Passive Mode (20,0,0,2,8,1).\r\n"[..],
        ),
        (
            b"229 Entering Extended Passive Mode (|||2049|)\r\n",
            b"229 Entering Extended Passive Mode (|||2049|)\r\n",
        ),
    ] {
        let tracker = tracker(100);
        let nat = commit_nat(4, false, ([30, 0, 0, 7], [30, 0, 0, 7]), None);
        let seen = set_up(&tracker, &with_helper(nat, "ftp"));
        assert_eq!(seen.dst, [30, 0, 0, 7]);
        let reply = tcp(seen.back(), ACK, 501, 101, answer);
        let packet = run(&tracker, &reply, &ct_nat(4), SECOND).unwrap();
        let (_, _, _, payload) = segment(&packet);
        assert_eq!(payload, expected);
        let data = Ends {
            src: CONTROL.src,
            src_port: 40_001,
            dst: CONTROL.dst,
            dst_port: 2049,
        };
        let mut related = ct_nat(4);
        related.commit = true;
        let packet = run(&tracker, &tcp(data, SYN, 7, 0, b""), &related, SECOND).unwrap();
        let (ends, ..) = segment(&packet);
        assert_eq!((ends.dst, ends.dst_port), ([30, 0, 0, 7], 2049));
        assert!(bits(&packet).contains("rel"));
    }
}

#[test]
fn a_tftp_transfer_comes_from_another_port_of_the_server() {
    let tracker = tracker(100);
    let ends = Ends {
        dst_port: 69,
        ..CONTROL
    };
    let nat = commit_nat(4, true, ([198, 51, 100, 200], [198, 51, 100, 200]), None);
    let request = udp(ends, b"\x00\x01file\x00octet\x00");
    let packet = run(&tracker, &request, &with_helper(nat, "tftp"), SECOND).unwrap();
    let (seen, _) = look(&packet);
    let transfer = Ends {
        src_port: 5555,
        ..seen.back()
    };
    let mut related = ct_nat(4);
    related.commit = true;
    let packet = run(&tracker, &udp(transfer, b"\x00\x03data"), &related, SECOND).unwrap();
    let (ends, right) = look(&packet);
    assert!(right && bits(&packet).contains("rel"), "{}", bits(&packet));
    assert_eq!((ends.dst, ends.dst_port), (CONTROL.src, CONTROL.src_port));
}

#[test]
fn expectations_go_with_time_and_with_their_master() {
    let tracker = tracker(100);
    set_up(&tracker, &with_helper(commit(4), "ftp"));
    for port in 0..20 {
        let text = format!("PORT 10,0,0,1,4,{port}\r\n");
        let seq = 101 + port * 50;
        // Each at the beginning of a line, as far as has been seen.
        let bytes = tcp(CONTROL, ACK, seq, 501, text.as_bytes());
        run(&tracker, &bytes, &ct(4), SECOND).unwrap();
    }
    let count = tracker.expectations.len();
    assert!((1..=8).contains(&count), "{count}");
    tracker.expire(400 * SECOND, 100);
    assert_eq!(tracker.expectations.len(), 0);
}
