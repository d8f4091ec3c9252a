//! Sockets that turn out to be for another family, or for several.
#![allow(unsafe_code)] // The C library's functions are the very subject.
#![allow(clippy::unwrap_used)] // in helpers of tests

mod common;

use std::process::Command;

use common::client::{
    self, ask_the_kernel, error_of, get_family, is_real, ours, raw, recv_now, request_with, send,
};
use common::scenario;
use transport::{Control, ControlOp, GROUP_BASE, Header};

#[test]
fn a_first_message_for_another_family_moves_the_descriptor_to_the_kernel() {
    scenario(
        "a_first_message_for_another_family_moves_the_descriptor_to_the_kernel",
        |daemon| {
            let connection = daemon.accept();
            let ext_ack = Control {
                op: ControlOp::ExtAck,
                value: 1,
            };
            assert_eq!(Control::parse(&connection.datagram()), Some(ext_ack));
            assert_eq!(connection.datagram(), []);
        },
        || {
            let fd = client::socket(libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
            // SAFETY: numbers only.
            let copy = unsafe { libc::dup(fd) };
            client::setsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1).unwrap();
            client::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 50_000).unwrap();
            client::bind(fd, 0, 0).unwrap();
            let port_id = client::name(fd).1;
            assert_ne!(port_id, 0);
            assert!(!is_real(fd));
            ask_the_kernel(fd);
            for fd in [fd, copy] {
                assert!(is_real(fd));
                assert_eq!(client::name(fd), (16, port_id));
                assert_eq!(
                    client::getsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK),
                    Ok(1)
                );
                assert_eq!(
                    client::getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUF),
                    Ok(100_000)
                );
                // SAFETY: numbers only.
                let (flags, state) = unsafe {
                    (
                        libc::fcntl(fd, libc::F_GETFD),
                        libc::fcntl(fd, libc::F_GETFL),
                    )
                };
                assert_eq!(flags & libc::FD_CLOEXEC != 0, fd != copy);
                assert_ne!(state & libc::O_NONBLOCK, 0);
            }
        },
    );
}

#[test]
fn a_port_id_of_the_callers_choice_is_kept() {
    scenario(
        "a_port_id_of_the_callers_choice_is_kept",
        |daemon| daemon.accept().until_closed(),
        || {
            let fd = raw();
            client::bind(fd, 0x7654_3210, 0).unwrap();
            assert_eq!(client::name(fd).1, 0x7654_3210);
            ask_the_kernel(fd);
            assert_eq!(client::name(fd).1, 0x7654_3210);
        },
    );
}

#[test]
fn a_dump_of_all_families_is_the_kernels() {
    scenario(
        "a_dump_of_all_families_is_the_kernels",
        |daemon| daemon.accept().until_closed(),
        || {
            let fd = raw();
            send(fd, &request_with(0x10, 1 | 0x300, 3, 3, &[])).unwrap();
            assert!(is_real(fd));
            let answer = recv_now(fd).unwrap();
            assert_eq!(Header::parse(&answer).unwrap().kind, 0x10);
        },
    );
}

#[test]
fn an_epoll_set_follows_the_move() {
    scenario(
        "an_epoll_set_follows_the_move",
        |daemon| daemon.accept().until_closed(),
        || {
            let fd = raw();
            let mut event = libc::epoll_event {
                events: libc::EPOLLIN as u32,
                u64: 0xabc,
            };
            // SAFETY: one event is there.
            let set = unsafe {
                let set = libc::epoll_create1(0);
                assert_eq!(
                    libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, fd, &raw mut event),
                    0
                );
                set
            };
            send(fd, &get_family("nlctrl", 5)).unwrap();
            event.u64 = 0;
            // SAFETY: room for one event.
            assert_eq!(unsafe { libc::epoll_wait(set, &raw mut event, 1, 5000) }, 1);
            assert_eq!({ event.u64 }, 0xabc);
            assert!(is_real(fd));
        },
    );
}

#[test]
fn a_receiver_in_another_thread_follows_the_move() {
    scenario(
        "a_receiver_in_another_thread_follows_the_move",
        |daemon| daemon.accept().until_closed(),
        || {
            let fd = raw();
            let reader = std::thread::spawn(move || client::recv(fd, 0));
            common::late();
            send(fd, &get_family("nlctrl", 5)).unwrap();
            let answer = reader.join().unwrap().unwrap();
            assert_eq!(Header::parse(&answer).unwrap().kind, 0x10);
        },
    );
}

#[test]
fn memberships_in_the_kernels_groups_are_the_kernels() {
    scenario(
        "memberships_in_the_kernels_groups_are_the_kernels",
        |daemon| {
            let both = [daemon.accept(), daemon.accept()];
            both.iter().for_each(common::Connection::until_closed);
        },
        || {
            let (fd, other) = (raw(), raw());
            // Group 16 is nlctrl's "notify".
            client::setsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, 16).unwrap();
            client::bind(other, 0, 1 << 15).unwrap();
            for fd in [fd, other] {
                assert!(is_real(fd));
                let groups =
                    client::getsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_LIST_MEMBERSHIPS);
                assert_eq!(groups, Ok(1 << 15));
            }
        },
    );
}

#[test]
fn memberships_in_the_daemons_groups_are_told_to_it() {
    scenario(
        "memberships_in_the_daemons_groups_are_told_to_it",
        |daemon| {
            let connection = daemon.accept();
            for op in [ControlOp::AddMembership, ControlOp::DropMembership] {
                let control = Control {
                    op,
                    value: GROUP_BASE + 1,
                };
                assert_eq!(Control::parse(&connection.datagram()), Some(control));
                connection.send(&ours(77)); // a notification
            }
            connection.until_closed();
        },
        || {
            let fd = raw();
            for name in [libc::NETLINK_ADD_MEMBERSHIP, libc::NETLINK_DROP_MEMBERSHIP] {
                client::setsockopt(fd, libc::SOL_NETLINK, name, GROUP_BASE + 1).unwrap();
                assert!(client::poll(fd, 10_000));
                assert_eq!(recv_now(fd).unwrap(), ours(77));
            }
            let bad = client::setsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, 16);
            assert_eq!(bad, Err(libc::EINVAL));
        },
    );
}

#[test]
fn a_later_message_for_another_family_is_answered_by_the_kernel() {
    scenario(
        "a_later_message_for_another_family_is_answered_by_the_kernel",
        |daemon| {
            let connection = daemon.accept();
            let (request, cookie) = connection.request();
            assert_eq!(request, get_family("ovs_flow", 1));
            connection.send(&request);
            connection.ack(cookie);
            for _ in 0..2 {
                let datagram = connection.datagram();
                connection.send(transport::reflected(&datagram).unwrap());
            }
            let (request, cookie) = connection.request();
            assert_eq!(request, []);
            connection.ack(cookie);
            connection.until_closed();
        },
        || {
            let fd = raw();
            send(fd, &get_family("ovs_flow", 1)).unwrap();
            assert_eq!(recv_now(fd).unwrap(), get_family("ovs_flow", 1));
            send(fd, &get_family("nlctrl", 5)).unwrap();
            let answer = recv_now(fd).unwrap();
            let header = Header::parse(&answer).unwrap();
            assert_eq!(
                (header.kind, header.seq, header.pid),
                (0x10, 5, client::name(fd).1)
            );
            assert_eq!(error_of(&recv_now(fd).unwrap()), Some(0));
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
            assert!(!is_real(fd));
        },
    );
}

#[test]
fn a_dead_daemon_leaves_an_unused_socket_to_the_kernel() {
    scenario(
        "a_dead_daemon_leaves_an_unused_socket_to_the_kernel",
        |daemon| drop(daemon.accept()),
        || {
            let fd = raw();
            assert!(client::poll(fd, 10_000));
            ask_the_kernel(fd);
        },
    );
}

/// A program speaks to the kernel under the interposer as it does without, though a daemon is
/// there.
fn speaks_to_the_kernel(name: &str, command: &str) {
    let daemon = common::Daemon::start(name);
    let run_dir = daemon.run_dir.clone();
    // Whoever comes is let in, and kept until it goes.
    std::thread::spawn(move || {
        loop {
            let connection = daemon.accept();
            std::thread::spawn(move || connection.until_closed());
        }
    });
    let run = |preload: bool| {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]);
        if preload {
            let (status, output) = common::spawn(&mut shell, &run_dir).finish();
            return (status.code(), output);
        }
        let output = shell.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let without = run(false);
    assert_ne!(without.0, Some(127), "{command}: not installed");
    assert_eq!(run(true), without);
    let _ = std::fs::remove_dir_all(&run_dir);
}

#[test]
fn ethtool_speaks_to_the_kernel() {
    speaks_to_the_kernel("ethtool", "ethtool lo; ethtool -i lo; ethtool -k lo");
}

#[test]
fn iproute2_speaks_to_the_kernel() {
    speaks_to_the_kernel(
        "iproute2",
        "ip link show lo; genl ctrl get name nlctrl; devlink dev; tipc node list",
    );
}

#[test]
fn python_speaks_to_the_kernel() {
    let script = "import socket, struct, select, asyncio
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
s.bind((0, 0))
pid = s.getsockname()[0]
name = b'nlctrl' + bytes(2)
attr = struct.pack('=HH', 11, 2) + name
s.send(struct.pack('=IHHII', 20 + len(attr), 16, 1, 9, pid) + struct.pack('=BBH', 3, 1, 0) + attr)
assert select.select([s], [], [], 5)[0]
data, (peer, groups) = s.recvfrom(65536)
length, kind, flags, seq, to = struct.unpack_from('=IHHII', data)
assert (kind, seq, to, peer) == (16, 9, pid, 0), (kind, seq, to, peer)
print(s.family, s.type, s.proto)";
    speaks_to_the_kernel("python", &format!("python3 -c \"{script}\""));
}
