//! Sockets of NETLINK_ROUTE: real ones, but for messages about tunnels' links.
#![allow(unsafe_code)] // The C library's functions are the very subject.
#![allow(clippy::unwrap_used)] // in helpers of tests

mod common;

use std::ffi::c_int;
use std::mem::zeroed;

use common::client::{self, check, error_of, is_real, recv_now, send};
use common::{Connection, Daemon, scenario};
use transport::{BARRIER_PID, Control, ControlOp, Header, NETLINK_ROUTE};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const TUNNEL: &str = "vxlan_sys_4789";
const INDEX: u32 = 0x7654_3210;

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = ((payload.len() + 4) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn link(kind: u16, flags: u16, seq: u32, index: u32, attributes: &[u8]) -> Vec<u8> {
    let header = Header {
        len: (32 + attributes.len()) as u32,
        kind,
        flags: 1 | flags,
        seq,
        pid: 0,
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(index.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(attributes);
    bytes
}

fn name(text: &str) -> Vec<u8> {
    attribute(3, format!("{text}\0").as_bytes())
}

/// RTM_NEWLINK as Open vSwitch sends it: NLM_F_CREATE, NLM_F_ACK.
fn new_tunnel(seq: u32, kind: &str, data: &[u8]) -> Vec<u8> {
    new_link(TUNNEL, seq, kind, data)
}

fn new_link(called: &str, seq: u32, kind: &str, data: &[u8]) -> Vec<u8> {
    let info = [attribute(1, kind.as_bytes()), attribute(2 | 0x8000, data)].concat();
    let attributes = [name(called), attribute(18 | 0x8000, &info)].concat();
    link(RTM_NEWLINK, 0x404, seq, 0, &attributes)
}

/// NLMSG_ERROR to a request.
fn ack(seq: u32, error: i32) -> Vec<u8> {
    let header = Header {
        len: 36,
        kind: 2,
        flags: 0,
        seq,
        pid: 1,
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend(error.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes
}

/// As Open vSwitch opens it.
fn route() -> c_int {
    let fd = client::speaking(libc::NETLINK_ROUTE, libc::SOCK_RAW);
    // SAFETY: integers only.
    let mut kernel: libc::sockaddr_nl = unsafe { zeroed() };
    kernel.nl_family = libc::AF_NETLINK as u16;
    // SAFETY: the address is there.
    check(unsafe { libc::connect(fd, (&raw const kernel).cast(), 12) as isize }).unwrap();
    assert_ne!(client::name(fd).1, 0, "connecting gives a port id");
    fd
}

/// A receive that doesn't wait: who sent, and what.
fn receive_from(fd: c_int, flags: c_int) -> client::Result<(u32, Vec<u8>)> {
    // SAFETY: structures of integers and pointers.
    let (mut message, mut from): (libc::msghdr, libc::sockaddr_nl) = unsafe { zeroed() };
    let mut buffer = vec![0u8; 65536];
    let mut vector = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    from.nl_pid = 99;
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = 12;
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    // SAFETY: the room is there.
    let length = check(unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT | flags) })?;
    buffer.truncate(length);
    Ok((from.nl_pid, buffer))
}

/// One request, on a connection of its own: the message, and the cookie of the barrier behind it.
fn request(connection: &Connection) -> (Vec<u8>, u32) {
    let message = connection.datagram();
    let barrier = Header::parse(&connection.datagram()).unwrap();
    assert_eq!(barrier.pid, BARRIER_PID);
    (message, barrier.seq)
}

/// Answers the next request with these datagrams, late.
fn answer(daemon: &Daemon, datagrams: &[Vec<u8>]) -> Vec<u8> {
    let connection = daemon.accept_speaking(NETLINK_ROUTE);
    let (message, cookie) = request(&connection);
    common::late();
    datagrams
        .iter()
        .for_each(|datagram| connection.send(datagram));
    connection.ack(cookie);
    connection.until_closed();
    message
}

fn mark(daemon: &Daemon) {
    let links = daemon.run_dir.join(transport::LINKS_NAME);
    std::fs::create_dir_all(&links).unwrap();
    for mark in [TUNNEL.to_owned(), format!(":{INDEX}")] {
        std::fs::write(links.join(mark), "").unwrap();
    }
}

/// Answers can be given only by those who may send to others' sockets.
fn skip(name: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: {name} needs root");
    }
    !root
}

fn seq_of(datagram: &[u8]) -> u32 {
    Header::parse(datagram).unwrap().seq
}

#[test]
fn tunnels_links_are_made_by_the_daemon() {
    const NAME: &str = "tunnels_links_are_made_by_the_daemon";
    if skip(NAME) {
        return;
    }
    let made = || {
        [
            new_tunnel(4, "vxlan", &attribute(25, &[1])),
            new_tunnel(4, "geneve", &attribute(6, &[])),
            new_tunnel(4, "ip6gretap\0", &attribute(18, &[])),
            new_tunnel(4, "bareudp", &attribute(1, &[0, 1])),
        ]
    };
    scenario(
        NAME,
        |daemon| {
            for request in made() {
                assert_eq!(answer(daemon, &[ack(4, -17)]), request);
            }
        },
        || {
            let fd = route();
            for request in made() {
                assert_eq!(send(fd, &request), Ok(request.len()));
                assert!(is_real(fd));
                assert!(
                    client::poll(fd, 0),
                    "the answer is there when the send returns"
                );
                // Looked at, then taken.
                let peeked = receive_from(fd, libc::MSG_PEEK | libc::MSG_TRUNC).unwrap();
                let (from, said) = receive_from(fd, 0).unwrap();
                assert_eq!((from, &said), (0, &peeked.1), "as the kernel's");
                assert_eq!(error_of(&said), Some(-17));
                let header = Header::parse(&said).unwrap();
                assert_eq!((header.seq, header.pid), (4, client::name(fd).1));
                assert_eq!(recv_now(fd), Err(libc::EAGAIN));
            }
        },
    );
}

#[test]
fn other_links_are_the_kernels() {
    const NAME: &str = "other_links_are_the_kernels";
    scenario(
        NAME,
        |daemon| {
            mark(daemon);
            // The client sees nobody else: this one says that it's through.
            daemon.accept().until_closed();
        },
        || {
            while !std::fs::exists(format!(
                "{}/links/:{INDEX}",
                std::env::var(transport::RUNDIR_ENV).unwrap()
            ))
            .unwrap()
            {
                common::late();
            }
            let fd = route();
            // A kind that doesn't exist, as Open vSwitch tries first; one that isn't
            // there (without privileges: EPERM before all).
            let requests = [
                new_link("genev_sys_6081", 1, "ovs_geneve", &attribute(6, &[])),
                link(RTM_GETLINK, 4, 2, 0, &name("genev_sys_6081")),
                link(RTM_DELLINK, 4, 3, 0, &name("nosuch0")),
                link(RTM_DELLINK, 4, 4, 0x7654_0000, &[]),
            ];
            for request in &requests {
                send(fd, request).unwrap();
                let said = recv_now(fd).unwrap();
                let error = error_of(&said).unwrap();
                let expected = match seq_of(&said) {
                    1 => libc::EOPNOTSUPP,
                    _ => libc::ENODEV,
                };
                assert!(
                    error == -expected || error == -libc::EPERM,
                    "{} {error}",
                    seq_of(&said)
                );
            }
            send(fd, &link(RTM_GETLINK, 0, 5, 0, &name("lo"))).unwrap();
            let (from, said) = receive_from(fd, 0).unwrap();
            assert_eq!((from, Header::parse(&said).unwrap().kind), (0, RTM_NEWLINK));
            // A dump shows what there is.
            send(fd, &link(RTM_GETLINK, 0x300, 6, 0, &name(TUNNEL))).unwrap();
            assert_eq!(Header::parse(&recv_now(fd).unwrap()).unwrap().seq, 6);
            client::close(client::raw());
        },
    );
}

#[test]
fn answers_come_in_the_order_of_a_batchs_messages() {
    const NAME: &str = "answers_come_in_the_order_of_a_batchs_messages";
    if skip(NAME) {
        return;
    }
    let mine = || link(RTM_GETLINK, 4, 2, 0, &name(TUNNEL));
    let by_index = || link(RTM_DELLINK, 4, 4, INDEX, &[]);
    scenario(
        NAME,
        |daemon| {
            mark(daemon);
            drop(daemon.accept());
            let described = link(RTM_NEWLINK, 0, 2, 9, &name(TUNNEL));
            assert_eq!(answer(daemon, &[described, ack(2, 0)]), mine());
            let not_ours = transport::not_ours(4).to_vec();
            assert_eq!(answer(daemon, &[not_ours]), by_index());
        },
        || {
            // When it is let in the marks are there.
            client::close(client::raw());
            let fd = route();
            client::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 200_000).unwrap();
            let batch = [
                link(RTM_GETLINK, 0, 1, 0, &name("lo")),
                mine(),
                link(RTM_GETLINK, 0, 3, 1, &[]),
                // The daemon knows nothing of it, nor does the kernel.
                by_index(),
                link(RTM_GETLINK, 0, 5, 0, &name("lo")),
            ];
            let vectors: Vec<libc::iovec> = batch
                .iter()
                .map(|message| libc::iovec {
                    iov_base: message.as_ptr().cast_mut().cast(),
                    iov_len: message.len(),
                })
                .collect();
            // SAFETY: the vectors are there.
            let sent = check(unsafe { libc::writev(fd, vectors.as_ptr(), vectors.len() as c_int) });
            assert_eq!(sent, Ok(batch.concat().len()));
            let mut said = Vec::new();
            while let Ok((from, datagram)) = receive_from(fd, 0) {
                assert_eq!(from, 0);
                said.push((seq_of(&datagram), error_of(&datagram)));
            }
            let gone = Some(-libc::ENODEV);
            let expected = [
                (1, None),
                (2, None),
                (2, Some(0)),
                (3, None),
                (4, gone),
                (5, None),
            ];
            assert_eq!(said, expected);
        },
    );
}

#[test]
fn options_of_acks_are_told() {
    const NAME: &str = "options_of_acks_are_told";
    if skip(NAME) {
        return;
    }
    scenario(
        NAME,
        |daemon| {
            let connection = daemon.accept_speaking(NETLINK_ROUTE);
            let option = Control::parse(&connection.datagram()).unwrap();
            assert_eq!((option.op, option.value), (ControlOp::ExtAck, 1));
            let (_, cookie) = request(&connection);
            connection.send(&ack(1, 0));
            connection.ack(cookie);
        },
        || {
            let fd = route();
            client::setsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1).unwrap();
            send(fd, &new_tunnel(1, "bareudp", &[])).unwrap();
            assert_eq!(error_of(&recv_now(fd).unwrap()), Some(0));
        },
    );
}

#[test]
fn the_daemons_end_in_the_middle_is_an_error() {
    const NAME: &str = "the_daemons_end_in_the_middle_is_an_error";
    if skip(NAME) {
        return;
    }
    scenario(
        NAME,
        |daemon| drop(request(&daemon.accept_speaking(NETLINK_ROUTE))),
        || {
            let fd = route();
            let sent = send(fd, &new_tunnel(1, "bareudp", &[]));
            assert_eq!(sent, Err(libc::ECONNRESET));
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
        },
    );
}
