//! What goes back for what comes in, over the real socket: acks, errors, order, dumps, lanes,
//! notifications, privilege.

// Clippy knows only #[test] functions as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::{Client, Fixture, error_of, header, receive, request};
use netlink::family::command;
use netlink::message::{Messages, control, flags};
use netlink::transport::{self, ControlOp};
use netlink::{Errno, Family, Group};

const ASK: u16 = flags::REQUEST;

#[test]
fn an_ack_comes_only_when_asked_for_and_errors_always() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let flow = |flags, seq, dp| request(Family::Flow, command::NEW, ASK | flags, seq, dp);
    let answers = client.converse(&[
        flow(0, 1, 5),
        flow(flags::ACK, 2, 5),
        flow(0, 3, -Errno::ENODEV.0),
        flow(flags::ECHO | flags::ACK, 4, 5),
        flow(0, 5, 5),
    ]);
    let seqs: Vec<_> = answers.iter().map(|answer| header(answer).seq).collect();
    assert_eq!(seqs, [2, 3, 4, 4]);

    let ack = header(&answers[0]);
    assert_eq!(
        (ack.len, ack.kind, ack.flags),
        (36, control::ERROR, flags::CAPPED)
    );
    assert_eq!((ack.pid, error_of(&answers[0])), (client.port_id(), 0));
    assert_eq!(answers[0][20..], flow(flags::ACK, 2, 5)[..16]);

    let error = header(&answers[1]);
    assert_eq!(
        (error.len, error.kind, error.flags),
        (44, control::ERROR, 0)
    );
    assert_eq!(error_of(&answers[1]), -Errno::ENODEV.0);
    assert_eq!(answers[1][20..], flow(0, 3, -Errno::ENODEV.0)[..]);

    let echo = header(&answers[2]);
    assert_eq!(
        (echo.kind, echo.flags, echo.pid),
        (Family::Flow.id(), 0, client.port_id())
    );
    assert_eq!(error_of(&answers[3]), 0);
}

#[test]
fn cap_ack_and_ext_ack_change_errors() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.control(ControlOp::CapAck, 1);
    client.control(ControlOp::ExtAck, 1);
    // OVS_DP_ATTR_NAME of 16 characters: the recorded extended ack of the module.
    let mut message = request(Family::Datapath, command::GET, ASK, 9, 0);
    message.extend_from_slice(&[20, 0, 1, 0]);
    message.extend_from_slice(b"abcdefghijklmnop");
    message[0] = message.len() as u8;
    let answers = client.converse(&[message.clone()]);
    assert_eq!(answers.len(), 1);
    let head = header(&answers[0]);
    assert_eq!(head.flags, flags::CAPPED | flags::ACK_TLVS);
    assert_eq!(error_of(&answers[0]), -Errno::EINVAL.0);
    let mut expected = vec![0x27, 0, 1, 0];
    expected.extend_from_slice(b"Attribute failed policy validation\0\0");
    expected.extend_from_slice(&[8, 0, 2, 0, 24, 0, 0, 0, 20, 0, 4, 0x80]);
    expected.extend_from_slice(&[8, 0, 7, 0, 15, 0, 0, 0, 8, 0, 1, 0, 12, 0, 0, 0]);
    assert_eq!(answers[0][36..], expected[..]);
    client.control(ControlOp::CapAck, 0);
    let answers = client.converse(&[message.clone()]);
    assert_eq!(header(&answers[0]).flags, flags::ACK_TLVS);
    assert_eq!(answers[0][20..20 + message.len()], message[..]);
    assert_eq!(answers[0][20 + message.len()..], expected[..]);
}

#[test]
fn a_barrier_is_answered_even_behind_messages_that_are_none() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for junk in [&b"abcdefgh"[..], &[0; 40], &[0xff; 64], &[]] {
        assert!(client.converse(&[junk.to_vec()]).is_empty());
    }
    // A plain NOOP is acked as netlink does it, one without ACK not at all.
    let mut noop = vec![16, 0, 0, 0, 1, 0, 5, 0, 77, 0, 0, 0, 1, 2, 3, 4];
    let answers = client.converse(std::slice::from_ref(&noop));
    assert_eq!(answers.len(), 1);
    assert_eq!(
        (header(&answers[0]).seq, header(&answers[0]).pid),
        (77, client.port_id())
    );
    noop[6] = 1;
    assert!(client.converse(&[noop]).is_empty());
}

#[test]
fn messages_of_a_socket_are_answered_in_order() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    // Some sleep, some don't, some fail; more than a turn's worth of them.
    let messages: Vec<_> = (0..1000)
        .map(|seq| match seq % 50 {
            7 => request(Family::Vport, command::NEW, ASK | flags::ACK, seq, 1),
            8 => request(Family::Flow, command::NEW, ASK, seq, -3),
            _ => request(Family::Flow, command::NEW, ASK | flags::ACK, seq, 1),
        })
        .collect();
    for batch in messages.chunks(100) {
        client.ask(batch);
    }
    let seqs: Vec<_> = client
        .answers()
        .iter()
        .map(|answer| header(answer).seq)
        .collect();
    assert_eq!(seqs, (0..1000).collect::<Vec<_>>());
    let seen: Vec<_> = fixture
        .script
        .seen
        .lock()
        .unwrap()
        .iter()
        .map(|seen| seen.1)
        .collect();
    assert!(seen.is_sorted());
}

#[test]
fn a_request_that_takes_long_delays_none_that_sleeps_and_ends_in_its_own_time() {
    let fixture = Fixture::new();
    let mut flushes = fixture.client();
    let mut other = fixture.client();
    flushes.ask(&[
        request(Family::Vport, command::SET, ASK | flags::ACK, 1, 700),
        request(Family::Flow, command::NEW, ASK | flags::ACK, 2, 1),
    ]);
    let asked = Instant::now();
    let adds = request(Family::Vport, command::NEW, ASK | flags::ACK, 1, 1);
    assert_eq!(other.converse(&[adds]).len(), 1);
    assert!(asked.elapsed() < Duration::from_millis(300));
    let answers = flushes.answers();
    let seqs: Vec<_> = answers.iter().map(|answer| header(answer).seq).collect();
    assert_eq!(seqs, [1, 2]);
}

#[test]
fn a_request_that_sleeps_delays_its_own_socket_and_no_other() {
    let fixture = Fixture::new();
    let mut sleeper = fixture.client();
    let mut others: Vec<_> = (0..8).map(|_| fixture.client()).collect();
    let began = Instant::now();
    sleeper.ask(&[
        request(Family::Vport, command::NEW, ASK | flags::ACK, 1, 700),
        request(Family::Flow, command::NEW, ASK | flags::ACK, 2, 1),
    ]);
    let mut slowest = Duration::ZERO;
    for round in 0..20 {
        for client in &mut others {
            let asked = Instant::now();
            let flow = request(Family::Flow, command::NEW, ASK | flags::ACK, round, 1);
            assert_eq!(client.converse(&[flow]).len(), 1);
            slowest = slowest.max(asked.elapsed());
        }
    }
    assert_eq!(
        fixture
            .script
            .sleeps
            .load(std::sync::atomic::Ordering::SeqCst),
        0
    );
    assert!(slowest < Duration::from_millis(300), "{slowest:?}");
    let seqs: Vec<_> = sleeper
        .answers()
        .iter()
        .map(|answer| header(answer).seq)
        .collect();
    assert_eq!(seqs, [1, 2]);
    assert!(began.elapsed() >= Duration::from_millis(700));
    let port_id = sleeper.port_id();
    let seen = fixture.script.seen.lock().unwrap().clone();
    let own: Vec<_> = seen
        .iter()
        .filter(|seen| seen.0 == port_id)
        .map(|seen| seen.1)
        .collect();
    assert_eq!(own, [1, 2]);
}

fn dump(seq: u32, messages: i32) -> Vec<u8> {
    request(
        Family::Flow,
        command::GET,
        ASK | flags::ACK | flags::DUMP,
        seq,
        messages,
    )
}

/// Checks the parts of a dump; returns how many messages they hold.
fn check_dump(answers: &[Vec<u8>], seq: u32, errno: i32) -> u32 {
    let (last, parts) = answers.split_last().unwrap();
    let done = header(last);
    assert_eq!(
        (done.len, done.kind, done.flags, done.seq),
        (20, control::DONE, flags::MULTI, seq)
    );
    assert_eq!(error_of(last), errno);
    let mut next = 0u32;
    for part in parts {
        assert!(part.len() <= netlink::handler::PART);
        let mut messages = Messages::new(part);
        for (head, bytes) in messages.by_ref() {
            assert_eq!(
                (head.kind, head.flags, head.seq),
                (Family::Flow.id(), flags::MULTI, seq)
            );
            assert_eq!(bytes[28..32], next.to_ne_bytes());
            next += 1;
        }
        assert!(messages.rest().is_empty());
    }
    // Parts are filled.
    for part in parts.iter().rev().skip(1) {
        assert!(part.len() > netlink::handler::PART - 400);
    }
    next
}

#[test]
fn dumps_come_whole_in_parts_and_end_with_done() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for (seq, messages) in [(1, 0), (2, 1), (3, 500), (4, 998)] {
        let answers = client.converse(&[dump(seq, messages)]);
        assert_eq!(check_dump(&answers, seq, 0), messages as u32);
    }
    // An error on the way, and one at the beginning.
    assert_eq!(
        check_dump(&client.converse(&[dump(5, 5000)]), 5, -Errno::EIO.0),
        999
    );
    assert_eq!(check_dump(&client.converse(&[dump(6, -19)]), 6, -19), 0);
    // A dump flag where there is no dump.
    let refused = request(Family::Flow, command::NEW, ASK | flags::DUMP, 7, 1);
    let answers = client.converse(&[refused]);
    assert_eq!(header(&answers[0]).kind, control::ERROR);
    assert_eq!(error_of(&answers[0]), -Errno::EOPNOTSUPP.0);
}

#[test]
fn a_second_dump_beside_an_unread_one_is_busy() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    // Too long for the socket, so that it waits half done; and one that is sent whole but unread.
    for messages in [950, 3] {
        client.ask(&[dump(1, messages)]);
        fixture.until("a dump begins", || {
            fixture
                .script
                .dumps
                .swap(0, std::sync::atomic::Ordering::SeqCst)
                == 1
        });
        client.ask(&[
            dump(2, 1),
            request(Family::Flow, command::NEW, ASK | flags::ACK, 3, 1),
        ]);
        // Before it reads anything.
        fixture.until("the flow", || {
            fixture.script.seen.lock().unwrap().pop().is_some()
        });
        let mut answers = client.answers();
        let at = answers
            .iter()
            .position(|answer| header(answer).seq == 2)
            .unwrap();
        assert_eq!(error_of(&answers.remove(at)), -Errno::EBUSY.0);
        assert_eq!(header(&answers.remove(at)).seq, 3);
        assert_eq!(check_dump(&answers, 1, 0), messages as u32);
        // Now that it is read, there is room for another.
        assert_eq!(check_dump(&client.converse(&[dump(4, 2)]), 4, 0), 2);
        fixture
            .script
            .dumps
            .store(0, std::sync::atomic::Ordering::SeqCst);
    }
}

#[test]
fn the_barrier_behind_a_dump_waits_for_its_end() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.ask(&[dump(1, 900)]);
    client.ask(&[]);
    client.ask(&[]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(check_dump(&client.answers(), 1, 0), 900);
}

#[test]
fn a_client_that_leaves_cancels_its_dump() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let port_id = client.port_id();
    client.ask(&[dump(1, 950)]);
    receive(&client.socket).unwrap();
    drop(client);
    fixture.until("gone", || {
        fixture.script.gone.lock().unwrap().contains(&port_id)
    });
    assert!(fixture.hub.clients().is_empty());
}

#[test]
fn what_a_client_sent_before_it_left_is_done() {
    let fixture = Fixture::new();
    for round in 0..50 {
        let mut client = fixture.client();
        let port_id = client.port_id();
        // Leaves an ack unread, so that its end is a reset.
        client.ask(&[request(Family::Flow, command::NEW, ASK | flags::ACK, 1, 1)]);
        for seq in 2..40 {
            client.ask(&[request(
                Family::Flow,
                command::NEW,
                ASK | flags::ACK,
                seq,
                1,
            )]);
        }
        client.ask(&[request(Family::Vport, command::NEW, ASK, 40, 0)]);
        drop(client);
        fixture.until("gone", || {
            fixture.script.gone.lock().unwrap().contains(&port_id)
        });
        let mut seen = fixture.script.seen.lock().unwrap();
        let own = seen.iter().filter(|seen| seen.0 == port_id).count();
        assert_eq!(own, 40, "round {round}");
        seen.clear();
    }
}

/// Oracle fact 3.
#[test]
fn notifications_go_to_members_and_echoes_to_the_requester() {
    let fixture = Fixture::new();
    let (mut member, mut asker, mut outsider) =
        (fixture.client(), fixture.client(), fixture.client());
    member.join(Group::Vport);
    asker.join(Group::Vport);
    let vport = |flags, seq| request(Family::Vport, command::NEW, ASK | flags, seq, 0);

    // With ECHO: once, and the same bytes to the other member.
    let echo = asker.converse(&[vport(flags::ECHO | flags::ACK, 1)]);
    assert_eq!(echo.len(), 2);
    assert_eq!(
        (header(&echo[0]).seq, header(&echo[0]).pid),
        (1, asker.port_id())
    );
    assert_eq!(receive(&member.socket).unwrap(), echo[0]);
    // Without: it gets the notification as a member.
    let copy = asker.converse(&[vport(0, 2)]);
    assert_eq!(copy.len(), 1);
    assert_eq!(receive(&member.socket).unwrap(), copy[0]);
    // An outsider gets its own echo only.
    assert_eq!(outsider.converse(&[vport(flags::ECHO, 3)]).len(), 1);
    assert!(outsider.converse(&[vport(0, 4)]).is_empty());
    for client in [&member, &asker] {
        assert_eq!(header(&receive(&client.socket).unwrap()).seq, 3);
        assert_eq!(header(&receive(&client.socket).unwrap()).seq, 4);
    }
    // What no request caused has neither pid nor seq.
    fixture
        .hub
        .announce(Group::Vport, Family::Vport, command::DEL, 5, |writer| {
            writer.u32(1, 1);
            Ok(())
        })
        .unwrap();
    let sudden = header(&receive(&member.socket).unwrap());
    assert_eq!(
        (sudden.seq, sudden.pid, sudden.kind),
        (0, 0, Family::Vport.id())
    );
    receive(&asker.socket).unwrap();
    // Who has left the group gets nothing; another group's neither.
    member.control(ControlOp::DropMembership, Group::Vport.id());
    member.settle();
    outsider.join(Group::Flow);
    asker.converse(&[vport(flags::ECHO, 5)]);
    member.settle();
    outsider.settle();
    let unwanted = fixture
        .hub
        .announce(Group::Meter, Family::Meter, 1, 0, |_| panic!("unwanted"));
    unwanted.unwrap();
}

#[test]
fn what_is_reflected_comes_back_in_order() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.send(&request(
        Family::Vport,
        command::NEW,
        ASK | flags::ACK,
        1,
        30,
    ));
    let mut reflect = transport::reflect_header(5).unwrap().to_vec();
    reflect.extend_from_slice(b"12345");
    client.send(&reflect);
    client.send(&transport::reflect_header(0).unwrap());
    let answers = client.converse(&[request(Family::Flow, command::NEW, ASK | flags::ACK, 2, 1)]);
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[1], b"12345");
    assert_eq!((header(&answers[0]).seq, header(&answers[2]).seq), (1, 2));
}

#[test]
fn a_panic_in_a_handler_is_one_requests_eio() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    // EXECUTE with a packet, so that it reaches the handler.
    let answers = client.converse(&[
        request(Family::Packet, command::packet::EXECUTE, ASK, 1, 13),
        request(Family::Flow, command::NEW, ASK | flags::ACK, 2, 1),
    ]);
    assert_eq!(error_of(&answers[0]), -Errno::EIO.0);
    assert_eq!(error_of(&answers[1]), 0);
}

/// Only asking is free: with another user's id, from a thread that has it.
#[test]
fn an_unprivileged_peer_may_only_ask() {
    let fixture = Fixture::new();
    let dir = fixture.dir.0.clone();
    let nobody = std::thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody)
            .expect("this test needs root, to become another user");
        let mut client = Client::connect(&dir).unwrap();
        let mut errors = Vec::new();
        for family in Family::ALL {
            for op in family.ops() {
                let asked = request(family, op.command, ASK | flags::ACK, 1, 0);
                let answers = client.converse(&[asked]);
                let error = answers
                    .iter()
                    .find(|answer| header(answer).kind == control::ERROR);
                errors.push((family, op.command, error_of(error.unwrap())));
            }
        }
        let dumped = check_dump(&client.converse(&[dump(1, 20)]), 1, 0);
        (errors, dumped)
    });
    let (errors, dumped) = nobody.join().unwrap();
    assert_eq!(dumped, 20);
    assert_eq!(errors.len(), 20);
    for (family, command, errno) in errors {
        let asks = match family {
            Family::Meter => [1, 4].contains(&command),
            Family::Packet => false,
            _ => command == 3,
        };
        let expected = if asks { 0 } else { -Errno::EPERM.0 };
        assert_eq!(errno, expected, "{family:?} {command}");
    }
}

#[test]
fn other_versions_namespaces_and_protocols_are_told_so() {
    use netlink::transport::{Netns, Status, Welcome};
    let fixture = Fixture::new();
    let hello = common::hello();
    let netns = Netns {
        ino: hello.netns.ino + 1,
        ..hello.netns
    };
    for (hello, status) in [
        (
            transport::Hello {
                version: 2,
                ..hello
            },
            Status::OtherVersion,
        ),
        (transport::Hello { netns, ..hello }, Status::OtherNetns),
        (
            transport::Hello {
                protocol: 0,
                ..hello
            },
            Status::OtherProtocol,
        ),
    ] {
        let socket = common::dial(&fixture.dir.0).unwrap();
        let flags = rustix::net::SendFlags::NOSIGNAL;
        rustix::net::send(&socket, &hello.to_bytes(), flags).unwrap();
        let welcome = Welcome::parse(&receive(&socket).unwrap()).unwrap();
        assert_eq!((welcome.status, welcome.port_id), (status, 0));
        assert_eq!(receive(&socket), None);
    }
    assert!(fixture.hub.clients().is_empty());
}

/// The group that `--group` names: as a peer's supplementary group it is enough, another isn't.
#[test]
fn a_member_of_the_group_may_change_state() {
    const GROUP: u32 = 54_321;
    let fixture = Fixture::with(|config| config.group = Some(GROUP));
    for (group, expected) in [(GROUP, 0), (GROUP + 1, -Errno::EPERM.0)] {
        let dir = fixture.dir.0.clone();
        // Credentials belong to a thread: this one's go with it.
        let peer = std::thread::spawn(move || {
            let nobody = rustix::process::Uid::from_raw(65534);
            let gid = rustix::process::Gid::from_raw(65534);
            rustix::thread::set_thread_groups(&[rustix::process::Gid::from_raw(group)])
                .expect("this test needs root, to change groups");
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let mut client = Client::connect(&dir).unwrap();
            let asked = request(Family::Flow, command::DEL, ASK | flags::ACK, 1, 1);
            error_of(&client.converse(&[asked])[0])
        });
        assert_eq!(peer.join().unwrap(), expected, "group {group}");
    }
}
