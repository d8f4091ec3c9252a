//! Clients that mean harm, or are just broken: none of them delays another, and each is bounded.

// Clippy knows only #[test] functions as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Client, Fixture, RunDir, dial, header, receive, receive_within, request};
use netlink::family::command;
use netlink::message::{control, flags};
use netlink::transport::{self, Control, ControlOp, Status, Welcome};
use netlink::{BindError, Config, Family, Group, Server};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::net::SendFlags;

fn send(socket: &std::os::fd::OwnedFd, bytes: &[u8]) -> rustix::io::Result<usize> {
    rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)
}

/// A datagram that is nearly one, or not at all.
fn mutant(rng: &mut SmallRng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rng.random_range(0..4) {
        let family = Family::ALL[rng.random_range(0..6)];
        let flags = [
            flags::REQUEST,
            flags::REQUEST | flags::ACK,
            flags::REQUEST | flags::DUMP,
        ];
        let flags = flags[rng.random_range(0..3)];
        let dp_ifindex = rng.random_range(-20..20);
        let command = rng.random_range(0..6);
        let mut message = request(family, command, flags, rng.random(), dp_ifindex);
        for _ in 0..rng.random_range(0..4) {
            let len = rng.random_range(0..40u16);
            message.extend_from_slice(&(len + 4).to_ne_bytes());
            message.extend_from_slice(&rng.random_range(0..14u16).to_ne_bytes());
            message.resize(
                message.len() + usize::from(len.next_multiple_of(4)),
                rng.random(),
            );
        }
        let len = message.len() as u32;
        message[..4].copy_from_slice(&len.to_ne_bytes());
        bytes.extend_from_slice(&message);
    }
    match rng.random_range(0..10) {
        0 => bytes.extend_from_slice(&transport::barrier(rng.random())),
        1 => bytes.extend_from_slice(&transport::reflect_header(4).unwrap()),
        2 => {
            let value = transport::GROUP_BASE + rng.random_range(0..8);
            let op = ControlOp::from_number(rng.random_range(1..3)).unwrap();
            bytes.extend_from_slice(&Control { op, value }.to_bytes());
        }
        3 => bytes.extend((0..rng.random_range(0..200)).map(|_| rng.random::<u8>())),
        _ => {}
    }
    for _ in 0..rng.random_range(0..6) {
        if !bytes.is_empty() {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = if rng.random() {
                rng.random()
            } else {
                bytes[at] ^ 1 << (at % 8)
            };
        }
    }
    bytes.truncate(
        rng.random_range(0..=bytes.len().max(1))
            .max(bytes.len() / 2),
    );
    bytes
}

/// 100,000 datagrams, from clients that read now and then, while another is served.
#[test]
fn mutated_datagrams_harm_nobody() {
    let fixture = Fixture::new();
    let done = AtomicBool::new(false);
    let slowest = std::thread::scope(|scope| {
        let attackers: Vec<_> = (0..4)
            .map(|seed| {
                let fixture = &fixture;
                scope.spawn(move || {
                    let mut rng = SmallRng::seed_from_u64(seed);
                    let mut client = fixture.client();
                    for number in 0..25_000 {
                        let bytes = mutant(&mut rng);
                        // One that isn't whole may say anything, also a VPORT_NEW that naps 800 ms:
                        // who waits for it is its own client.
                        if bytes
                            .windows(2)
                            .any(|id| id == Family::Vport.id().to_ne_bytes())
                            && rng.random_bool(0.98)
                        {
                            continue;
                        }
                        if send(&client.socket, &bytes).is_err() || number % 2000 == 1999 {
                            client = fixture.client();
                        }
                        if number % 7 == 0 {
                            while receive_within(&client.socket, Duration::ZERO).is_some() {}
                        }
                    }
                })
            })
            .collect();
        let good = scope.spawn(|| {
            let mut client = fixture.client();
            let mut slowest = Duration::ZERO;
            while !done.load(Ordering::SeqCst) {
                let asked = Instant::now();
                let flow = request(
                    Family::Flow,
                    command::NEW,
                    flags::REQUEST | flags::ACK,
                    1,
                    1,
                );
                let answers = client.converse(&[flow]);
                assert_eq!(answers.len(), 1);
                assert_eq!(common::error_of(&answers[0]), 0);
                slowest = slowest.max(asked.elapsed());
                std::thread::sleep(Duration::from_millis(1));
            }
            slowest
        });
        for attacker in attackers {
            attacker.join().unwrap();
        }
        done.store(true, Ordering::SeqCst);
        good.join().unwrap()
    });
    // Two busy CPUs, seven busy threads: far above what it takes, far below a client's wait for
    // another's sleep.
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    fixture.until("all gone", || fixture.hub.clients().is_empty());
}

#[test]
fn who_never_reads_is_bounded_and_told_once_and_gets_the_newest_barrier() {
    let fixture = Fixture::new();
    let mut glutton = fixture.client();
    let mut good = fixture.client();
    // 120 MB of answers.
    for _ in 0..2000 {
        glutton.ask(&[request(
            Family::Datapath,
            command::GET,
            flags::REQUEST,
            1,
            60_000,
        )]);
    }
    good.settle();
    let port_id = glutton.port_id();
    fixture.until("all read", || {
        let clients = fixture.hub.clients();
        clients
            .iter()
            .any(|client| client.port_id == port_id && client.requests == 2000)
    });
    let info = fixture
        .hub
        .clients()
        .into_iter()
        .find(|client| client.port_id == port_id)
        .unwrap();
    assert!(info.queued_bytes < 5 << 20, "{info:?}");
    let (mut answers, mut overruns) = (0, 0);
    for answer in glutton.answers() {
        if transport::is_overrun(&answer) {
            overruns += 1;
        } else {
            answers += 1;
        }
    }
    assert_eq!(overruns, 1);
    assert_eq!(info.lost, 2000 - answers);
    // And it goes on as if nothing had been.
    let get = request(Family::Datapath, command::GET, flags::REQUEST, 1, 100);
    assert_eq!(glutton.converse(&[get]).len(), 1);
}

#[test]
fn a_member_that_never_reads_loses_its_own_notifications() {
    let fixture = Fixture::new();
    let (mut deaf, mut member) = (fixture.client(), fixture.client());
    deaf.join(Group::Flow);
    member.join(Group::Flow);
    for number in 0..30_000u32 {
        fixture
            .hub
            .announce(Group::Flow, Family::Flow, command::NEW, 1, |writer| {
                writer.u32(1, number);
                writer.bytes(2, &[0; 400])
            })
            .unwrap();
        let copy = receive(&member.socket).unwrap();
        assert_eq!(copy[28..32], number.to_ne_bytes());
    }
    let mut overruns = 0;
    let mut next = 0;
    while let Some(datagram) = receive_within(&deaf.socket, Duration::from_millis(200)) {
        let datagram = datagram.unwrap();
        if transport::is_overrun(&datagram) {
            overruns += 1;
        } else {
            assert_eq!(datagram[28..32], u32::to_ne_bytes(next));
            next += 1;
        }
    }
    assert_eq!(overruns, 1);
    assert!(next > 1000 && next < 30_000, "{next}");
    deaf.settle();
}

#[test]
fn a_datagram_full_of_messages_takes_turns_with_others() {
    let fixture = Fixture::with(|config| config.threads = 1);
    let flooder = fixture.client();
    let mut good = fixture.client();
    let noop = [16, 0, 0, 0, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let flood = noop.repeat(10_000);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                send(&flooder.socket, &flood).unwrap();
            }
        });
        let mut times: Vec<_> = (0..200)
            .map(|_| {
                let asked = Instant::now();
                good.settle();
                asked.elapsed()
            })
            .collect();
        stop.store(true, Ordering::SeqCst);
        times.sort_unstable();
        // A datagram takes many milliseconds; a turn of it doesn't.
        assert!(times[100] < Duration::from_millis(20), "{:?}", times[100]);
    });
}

#[test]
fn no_hello_no_service() {
    let fixture = Fixture::new();
    let silent = dial(&fixture.dir.0).unwrap();
    for garbage in [&b"x"[..], &[0; 32], &[0xff; 4000]] {
        let socket = dial(&fixture.dir.0).unwrap();
        send(&socket, garbage).unwrap();
        assert_eq!(receive(&socket), None);
    }
    let half = dial(&fixture.dir.0).unwrap();
    rustix::net::shutdown(&half, rustix::net::Shutdown::Write).unwrap();
    assert_eq!(receive(&half), None);
    assert!(fixture.hub.clients().is_empty());
    // The silent one's time is up some day.
    assert_eq!(receive(&silent), None);
}

#[test]
fn empty_datagrams_are_nothing_and_a_half_closed_client_has_left() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for _ in 0..40 {
        send(&client.socket, &[]).unwrap();
    }
    client.settle();
    client.ask(&[request(
        Family::Flow,
        command::NEW,
        flags::REQUEST | flags::ACK,
        1,
        1,
    )]);
    rustix::net::shutdown(&client.socket, rustix::net::Shutdown::Write).unwrap();
    assert_eq!(client.answers().len(), 1);
    assert_eq!(receive(&client.socket), None);
    fixture.until("gone", || fixture.script.gone.lock().unwrap().len() == 1);
}

#[test]
fn an_oversized_datagram_ends_its_client() {
    let fixture = Fixture::new();
    let mut good = fixture.client();
    let client = fixture.client();
    rustix::net::sockopt::set_socket_send_buffer_size(&client.socket, 400_000).unwrap();
    let mut bytes = request(
        Family::Flow,
        command::NEW,
        flags::REQUEST | flags::ACK,
        1,
        1,
    );
    bytes.resize(300_000, 0);
    send(&client.socket, &bytes).unwrap();
    assert_eq!(receive(&client.socket), None);
    good.settle();
}

/// Another user can neither take the silent places nor the connections.
#[test]
fn an_unprivileged_crowd_keeps_nobody_out() {
    let fixture = Fixture::new();
    let dir = fixture.dir.0.clone();
    let crowd = std::thread::spawn(move || {
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody)
            .expect("this test needs root, to become another user");
        let clients: Vec<_> = (0..100).map(|_| Client::connect(&dir)).collect();
        let (inside, refused): (Vec<_>, Vec<_>) = clients.into_iter().partition(Result::is_ok);
        for error in refused.iter().filter_map(|client| client.as_ref().err()) {
            assert_eq!(error.to_string(), "Full");
        }
        let silent: Vec<_> = (0..100).map(|_| dial(&dir).unwrap()).collect();
        (
            inside.into_iter().map(Result::unwrap).collect::<Vec<_>>(),
            silent,
        )
    });
    let (inside, silent) = crowd.join().unwrap();
    assert_eq!(inside.len(), 64);
    let mut good = fixture.client();
    good.settle();
    let refused = silent
        .iter()
        .filter(
            |socket| match receive_within(socket, Duration::from_millis(10)) {
                Some(Some(bytes)) => Welcome::parse(&bytes).unwrap().status == Status::Full,
                _ => false,
            },
        )
        .count();
    assert_eq!(refused, 100 - 16);
    drop((inside, silent));
    fixture.until("gone", || fixture.hub.clients().len() == 1);
}

#[test]
fn a_second_daemon_is_refused_and_a_dead_ones_socket_replaced() {
    let dir = RunDir::new();
    let first = Server::bind(Config::new(&dir.0)).unwrap();
    match Server::bind(Config::new(&dir.0)) {
        Err(error @ BindError::Occupied { .. }) => {
            let text = error.to_string();
            assert!(text.contains(&std::process::id().to_string()), "{text}");
        }
        other => panic!("{other:?}"),
    }
    // Dropped without serving, as if killed: its socket stays.
    drop(first);
    assert!(dir.0.join(transport::SOCKET_NAME).exists());
    drop(Server::bind(Config::new(&dir.0)).unwrap());
    // A directory that others may write to isn't the daemon's own.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&dir.0, std::fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(
        Server::bind(Config::new(&dir.0)),
        Err(BindError::Insecure { .. })
    ));
}

#[test]
fn stop_ends_all_in_bounded_time_and_each_client_is_gone_once() {
    let mut fixture = Fixture::new();
    let mut clients: Vec<_> = (0..20).map(|_| fixture.client()).collect();
    let mut ids: Vec<_> = clients.iter().map(Client::port_id).collect();
    let dump = request(
        Family::Flow,
        command::GET,
        flags::REQUEST | flags::DUMP,
        1,
        950,
    );
    clients[0].ask(&[dump]);
    // Two that sleep: the first ends, the second isn't begun.
    let nap = request(
        Family::Vport,
        command::NEW,
        flags::REQUEST | flags::ACK,
        1,
        300,
    );
    clients[1].ask(std::slice::from_ref(&nap));
    std::thread::sleep(Duration::from_millis(50));
    clients[2].ask(&[nap]);
    let silent = dial(&fixture.dir.0).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    fixture.running.take().unwrap().stop();
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(fixture.script.sleeps.load(Ordering::SeqCst), 1);
    let answer = receive(&clients[1].socket).unwrap();
    assert_eq!(header(&answer).kind, control::ERROR);
    for client in &clients {
        while receive(&client.socket).is_some() {}
    }
    assert_eq!(receive(&silent), None);
    let mut gone = fixture.script.gone.lock().unwrap().clone();
    gone.sort_unstable();
    ids.sort_unstable();
    assert_eq!(gone, ids);
    assert!(fixture.script.naps.load(Ordering::SeqCst) > 0);
    assert!(!fixture.dir.0.join(transport::SOCKET_NAME).exists());
    assert!(Client::connect(&fixture.dir.0).is_err());
}
