//! What else a netlink socket is, besides requests and answers.
#![allow(unsafe_code)] // The C library's functions are the very subject.
#![allow(clippy::unwrap_used)] // in helpers of tests

mod common;

use common::client::{self, ours, raw, recv_now, send};
use common::scenario;
use transport::{Control, ControlOp};

#[test]
fn its_names_and_options_are_those_of_netlink() {
    scenario(
        "its_names_and_options_are_those_of_netlink",
        |daemon| {
            let connection = daemon.accept();
            for op in [ControlOp::CapAck, ControlOp::ExtAck] {
                let control = Control { op, value: 1 };
                assert_eq!(Control::parse(&connection.datagram()), Some(control));
            }
            connection.until_closed();
        },
        || {
            let fd = raw();
            let (family, port_id) = client::name(fd);
            assert_eq!(family, 16);
            assert!((transport::PORT_ID_FIRST..=transport::PORT_ID_LAST).contains(&port_id));
            client::bind(fd, 0, 0).unwrap();
            // SAFETY: integers only; the room is there.
            let (peer, length) = unsafe {
                let mut peer: libc::sockaddr_nl = std::mem::zeroed();
                peer.nl_family = 16;
                assert_eq!(libc::connect(fd, (&raw const peer).cast(), 12), 0);
                peer.nl_pid = 99;
                let mut length = 12;
                assert_eq!(
                    libc::getpeername(fd, (&raw mut peer).cast(), &raw mut length),
                    0
                );
                (peer, length)
            };
            assert_eq!((peer.nl_family, peer.nl_pid, length), (16, 0, 12));
            let socket = |name| client::getsockopt(fd, libc::SOL_SOCKET, name).unwrap();
            assert_eq!(socket(libc::SO_DOMAIN), 16);
            assert_eq!(socket(libc::SO_TYPE), libc::SOCK_RAW as u32);
            assert_eq!(socket(libc::SO_PROTOCOL), 16);
            assert!(socket(libc::SO_RCVBUF) > 0);
            // Needs CAP_NET_ADMIN in the initial namespace, like the real one.
            let forced = client::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 4 << 20);
            assert!(matches!(forced, Ok(0) | Err(libc::EPERM)));
            for name in [libc::NETLINK_CAP_ACK, libc::NETLINK_EXT_ACK] {
                assert_eq!(client::getsockopt(fd, libc::SOL_NETLINK, name), Ok(0));
                client::setsockopt(fd, libc::SOL_NETLINK, name, 1).unwrap();
                assert_eq!(client::getsockopt(fd, libc::SOL_NETLINK, name), Ok(1));
            }
            assert_eq!(
                client::setsockopt(fd, libc::SOL_NETLINK, 99, 1),
                Err(libc::ENOPROTOOPT)
            );
            assert_eq!(client::bind(fd, 5, 0), Ok(0));
            assert_eq!(client::bind(fd, 6, 0), Err(libc::EINVAL));
        },
    );
}

#[test]
fn an_overrun_is_one_enobufs() {
    scenario(
        "an_overrun_is_one_enobufs",
        |daemon| {
            let connection = daemon.accept();
            connection.send(&ours(1));
            connection.send(&transport::overrun());
            connection.send(&ours(2));
            connection.until_closed();
        },
        || {
            let fd = raw();
            assert_eq!(client::recv(fd, 0), Ok(ours(1)));
            assert_eq!(client::recv(fd, 0), Err(libc::ENOBUFS));
            assert_eq!(client::recv(fd, 0), Ok(ours(2)));
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
        },
    );
}

#[test]
fn an_overrun_behind_other_messages_is_told_at_the_next_receive() {
    scenario(
        "an_overrun_behind_other_messages_is_told_at_the_next_receive",
        |daemon| {
            let connection = daemon.accept();
            connection.send(&ours(1));
            connection.send(&transport::overrun());
            connection.send(&ours(2));
            connection.until_closed();
        },
        || {
            let fd = raw();
            common::late();
            let mut rooms = [[0u8; 100]; 4];
            let mut parts = rooms.each_mut().map(|room| libc::iovec {
                iov_base: room.as_mut_ptr().cast(),
                iov_len: room.len(),
            });
            // SAFETY: integers and pointers only.
            let mut messages: [libc::mmsghdr; 4] = unsafe { std::mem::zeroed() };
            for (message, part) in messages.iter_mut().zip(&mut parts) {
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
            }
            let mut receive = || {
                let flags = libc::MSG_WAITFORONE;
                // SAFETY: the structures and their room are there.
                client::check(unsafe {
                    libc::recvmmsg(fd, messages.as_mut_ptr(), 4, flags, std::ptr::null_mut())
                } as isize)
            };
            assert_eq!(
                [receive(), receive(), receive()],
                [Ok(1), Err(libc::ENOBUFS), Ok(1)]
            );
        },
    );
}

#[test]
fn a_look_doesnt_take_and_a_small_room_cuts() {
    scenario(
        "a_look_doesnt_take_and_a_small_room_cuts",
        |daemon| {
            let connection = daemon.accept();
            for seq in 0..3 {
                let (request, cookie) = connection.request();
                assert_eq!(request, ours(seq));
                common::late();
                connection.send(&request);
                connection.ack(cookie);
            }
            connection.until_closed();
        },
        || {
            let fd = raw();
            let now = libc::MSG_DONTWAIT;
            let recv_into = |room: &mut [u8], flags| {
                // SAFETY: the room is there.
                client::check(unsafe {
                    libc::recv(fd, room.as_mut_ptr().cast(), room.len(), flags)
                })
            };
            send(fd, &ours(0)).unwrap();
            // How long is it? As libmnl and iproute2 ask.
            assert_eq!(
                recv_into(&mut [], now | libc::MSG_PEEK | libc::MSG_TRUNC),
                Ok(20)
            );
            assert_eq!(client::recv(fd, now | libc::MSG_PEEK), Ok(ours(0)));
            assert_eq!(recv_now(fd), Ok(ours(0)));
            // The ack that is left is swallowed by a look, too.
            assert_eq!(client::recv(fd, now | libc::MSG_PEEK), Err(libc::EAGAIN));
            send(fd, &ours(1)).unwrap();
            let mut room = [0; 6];
            assert_eq!(recv_into(&mut room, now), Ok(6));
            assert_eq!(room, ours(1)[..6]);
            assert_eq!(recv_into(&mut room, now), Err(libc::EAGAIN));
            send(fd, &ours(2)).unwrap();
            assert_eq!(recv_into(&mut room, now | libc::MSG_TRUNC), Ok(20));
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
        },
    );
}

#[test]
fn a_run_directory_may_have_a_long_path() {
    let name = "a_run_directory_may_have_a_long_path";
    let long = std::env::temp_dir()
        .join(format!("interposer-{}", std::process::id()))
        .join("x".repeat(60))
        .join("y".repeat(60));
    if std::env::var_os("LONG").is_some() {
        assert!(!client::is_real(raw()));
        return;
    }
    let daemon = common::Daemon::start_in(long.clone());
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name]).env("LONG", "1");
    let client = daemon.spawn(&mut command);
    daemon.accept().until_closed();
    let (status, output) = client.finish();
    std::fs::remove_dir_all(long.ancestors().nth(2).unwrap()).unwrap();
    assert!(status.success(), "{output}");
}

#[test]
fn a_probe_for_a_tunnel_kind_of_another_tree_is_the_kernels_to_refuse() {
    // Open vSwitch asks at its start for a link of kind "ovs_geneve", and looks for this errno.
    scenario(
        "a_probe_for_a_tunnel_kind_of_another_tree_is_the_kernels_to_refuse",
        |_| {},
        || {
            // A network namespace of its own: without privileges, inside a user namespace.
            // SAFETY: numbers only.
            let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(unshared, 0, "needs CAP_SYS_ADMIN");
            // SAFETY: numbers only.
            let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0) };
            let attribute = |kind: u16, payload: &[u8]| {
                let mut bytes = ((payload.len() + 4) as u16).to_ne_bytes().to_vec();
                bytes.extend(kind.to_ne_bytes());
                bytes.extend(payload);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                bytes
            };
            let mut body = vec![0; 16]; // struct ifinfomsg
            body.extend(attribute(3, b"ovs-probe\0"));
            body.extend(attribute(18, &attribute(1, b"ovs_geneve\0")));
            // RTM_NEWLINK; REQUEST, ACK, EXCL, CREATE
            let header = transport::Header {
                len: (16 + body.len()) as u32,
                kind: 16,
                flags: 0x605,
                seq: 1,
                pid: 0,
            };
            send(fd, &[&header.to_bytes()[..], &body].concat()).unwrap();
            assert_eq!(
                client::error_of(&recv_now(fd).unwrap()),
                Some(-libc::EOPNOTSUPP)
            );
        },
    );
}
