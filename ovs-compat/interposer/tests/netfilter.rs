//! Sockets of NETLINK_NETFILTER: ctnetlink's messages are the daemon's, all others the kernel's.
#![allow(unsafe_code)] // The C library's functions are the very subject.
#![allow(clippy::unwrap_used)] // in helpers of tests

mod common;

use common::client::{self, error_of, is_real, recv_now, send};
use common::scenario;
use transport::{Header, NETLINK_NETFILTER};

const CTNETLINK: u16 = 1 << 8;
const CTNETLINK_EXP: u16 = 2 << 8;
const CTNETLINK_TIMEOUT: u16 = 8 << 8;
/// `NFNL_SUBSYS_NFTABLES`, `NFT_MSG_GETGEN`.
const NFTABLES: u16 = 10 << 8 | 16;

/// A request with its `struct nfgenmsg`.
fn request(kind: u16, seq: u32) -> Vec<u8> {
    let header = Header {
        len: 20,
        kind,
        flags: 1 | 4,
        seq,
        pid: 0,
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes
}

fn netfilter() -> i32 {
    client::speaking(libc::NETLINK_NETFILTER, libc::SOCK_RAW)
}

#[test]
fn ctnetlinks_subsystems_are_the_daemons() {
    const ALL: [u16; 3] = [CTNETLINK, CTNETLINK_EXP, CTNETLINK_TIMEOUT];
    scenario(
        "ctnetlinks_subsystems_are_the_daemons",
        |daemon| {
            for kind in ALL {
                let connection = daemon.accept_speaking(NETLINK_NETFILTER);
                let reply = request(kind, 7);
                assert_eq!(connection.answer_late(&reply), request(kind | 1, 7));
            }
        },
        || {
            for kind in ALL {
                let fd = netfilter();
                send(fd, &request(kind | 1, 7)).unwrap();
                assert!(!is_real(fd));
                assert_eq!(recv_now(fd).unwrap(), request(kind, 7));
            }
        },
    );
}

#[test]
fn nftables_are_the_kernels() {
    scenario(
        "nftables_are_the_kernels",
        |daemon| {
            daemon.accept_speaking(NETLINK_NETFILTER).until_closed();
            let second = daemon.accept_speaking(NETLINK_NETFILTER);
            second.answer_late(&request(CTNETLINK, 1));
            // What the kernel said comes by way of the daemon, in its place.
            while let Some(said) = transport::reflected(&second.datagram()) {
                assert!(error_of(said).is_some() || Header::parse(said).unwrap().seq == 2);
                second.send(said);
            }
        },
        || {
            let fd = netfilter();
            send(fd, &request(NFTABLES, 2)).unwrap();
            assert!(is_real(fd), "the first message decides");
            let answer = recv_now(fd).unwrap();
            assert_eq!(Header::parse(&answer).unwrap().seq, 2);
            // On a socket that is the daemon's already: beside it.
            let fd = netfilter();
            send(fd, &request(CTNETLINK | 1, 1)).unwrap();
            assert_eq!(recv_now(fd).unwrap(), request(CTNETLINK, 1));
            send(fd, &request(NFTABLES, 2)).unwrap();
            assert!(!is_real(fd));
            assert!(client::poll(fd, 5000));
            let answer = client::recv(fd, 0).unwrap();
            assert_eq!(Header::parse(&answer).unwrap().seq, 2);
        },
    );
}
