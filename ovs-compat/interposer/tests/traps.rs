//! What Open vSwitch takes for granted of netlink, and a prototype fell over: one test a trap.
#![allow(unsafe_code)] // The C library's functions are the very subject.
#![allow(clippy::unwrap_used)] // in helpers of tests

mod common;

use std::ffi::c_int;
use std::process::Command;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, Ordering};

use common::client::{self, error_of, get_family, ours, raw, recv_now, send};
use common::{late, scenario};
use transport::{CONTROL_LEN, Header, NLMSG_ERROR};

fn error(errno: i32, seq: u32) -> Vec<u8> {
    let header = Header {
        len: 36,
        kind: NLMSG_ERROR,
        flags: 0,
        seq,
        pid: 0,
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend((-errno).to_ne_bytes());
    bytes.extend([0; 16]);
    bytes
}

// 1

#[test]
fn only_the_newest_ack_ends_a_wait() {
    scenario(
        "only_the_newest_ack_ends_a_wait",
        |daemon| {
            let connection = daemon.accept();
            let (_, first) = connection.request();
            let (_, second) = connection.request();
            connection.ack(first);
            late();
            connection.send(&error(libc::EEXIST, 2));
            connection.ack(second);
            connection.until_closed();
        },
        || {
            let fd = raw();
            send(fd, &ours(1)).unwrap();
            send(fd, &ours(2)).unwrap();
            assert_eq!(error_of(&recv_now(fd).unwrap()), Some(-libc::EEXIST));
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
        },
    );
}

#[test]
fn an_ack_that_nobody_read_doesnt_end_the_next_wait() {
    scenario(
        "an_ack_that_nobody_read_doesnt_end_the_next_wait",
        |daemon| {
            let connection = daemon.accept();
            let (request, cookie) = connection.request();
            connection.send(&request);
            connection.ack(cookie);
            connection.answer_late(&error(libc::ENOENT, 2));
            connection.until_closed();
        },
        || {
            let fd = raw();
            send(fd, &ours(1)).unwrap();
            assert_eq!(recv_now(fd).unwrap(), ours(1)); // and leaves the ack
            send(fd, &ours(2)).unwrap();
            assert_eq!(error_of(&recv_now(fd).unwrap()), Some(-libc::ENOENT));
        },
    );
}

#[test]
fn nothing_sent_is_an_ordinary_eagain() {
    scenario(
        "nothing_sent_is_an_ordinary_eagain",
        |daemon| {
            let connection = daemon.accept();
            assert_eq!(connection.datagram().len(), CONTROL_LEN);
            connection.until_closed();
        },
        || {
            let fd = raw();
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
            client::setsockopt(fd, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1).unwrap();
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
        },
    );
}

#[test]
fn a_dump_is_read_to_its_end_by_threads_that_share_it() {
    const PARTS: u32 = 300;
    scenario(
        "a_dump_is_read_to_its_end_by_threads_that_share_it",
        |daemon| {
            let connection = daemon.accept();
            let (_, cookie) = connection.request();
            for part in 0..PARTS {
                if part % 50 == 0 {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                connection.send(&ours(part));
            }
            late();
            connection.ack(cookie);
            connection.until_closed();
        },
        || {
            let fd = raw();
            send(fd, &ours(1)).unwrap();
            let readers: Vec<_> = (0..4)
                .map(|_| {
                    std::thread::spawn(move || {
                        let mut count = 0;
                        while recv_now(fd).is_ok() {
                            count += 1;
                        }
                        count
                    })
                })
                .collect();
            let total: u32 = readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .sum();
            assert_eq!(total, PARTS);
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
        },
    );
}

// 2

#[test]
fn every_way_to_send_is_a_send() {
    fn vector(bytes: &[u8]) -> libc::iovec {
        libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        }
    }
    fn message(parts: &mut [libc::iovec]) -> libc::msghdr {
        // SAFETY: integers and pointers only.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_mut_ptr();
        message.msg_iovlen = parts.len();
        message
    }
    type Way = fn(c_int, &[u8]) -> isize;
    // SAFETY (all): the bytes are there while each call lasts.
    let ways: [Way; 7] = [
        // SAFETY: as above.
        |fd, bytes| unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), 0) },
        |fd, bytes| {
            // SAFETY: integers only.
            let mut to: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
            to.nl_family = libc::AF_NETLINK as u16;
            // SAFETY: as above.
            unsafe {
                libc::sendto(
                    fd,
                    bytes.as_ptr().cast(),
                    bytes.len(),
                    0,
                    (&raw const to).cast(),
                    12,
                )
            }
        },
        |fd, bytes| {
            let (a, b) = bytes.split_at(7);
            let mut parts = [vector(a), vector(b)];
            // SAFETY: as above.
            unsafe { libc::sendmsg(fd, &message(&mut parts), 0) }
        },
        |fd, bytes| {
            let mut parts = [vector(bytes)];
            let mut one = libc::mmsghdr {
                msg_hdr: message(&mut parts),
                msg_len: 0,
            };
            // SAFETY: as above.
            assert_eq!(unsafe { libc::sendmmsg(fd, &raw mut one, 1, 0) }, 1);
            one.msg_len as isize
        },
        // SAFETY: as above.
        |fd, bytes| unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) },
        |fd, bytes| {
            let (a, b) = bytes.split_at(5);
            let parts = [vector(a), vector(b)];
            // SAFETY: as above.
            unsafe { libc::writev(fd, parts.as_ptr(), 2) }
        },
        |fd, bytes| {
            // As many vectors as a system call takes: none is left for the barrier.
            let mut parts = vec![vector(&[]); 1023];
            parts.push(vector(bytes));
            // SAFETY: as above.
            unsafe { libc::sendmsg(fd, &message(&mut parts), 0) }
        },
    ];
    scenario(
        "every_way_to_send_is_a_send",
        |daemon| {
            let connection = daemon.accept();
            for seq in 0..6 {
                assert_eq!(connection.answer_late(&error(libc::EBUSY, seq)), ours(seq));
            }
            assert_eq!(connection.datagram(), ours(6));
            assert_eq!(connection.answer_late(&error(libc::EBUSY, 6)), []);
            connection.until_closed();
        },
        || {
            let fd = raw();
            for (seq, way) in ways.into_iter().enumerate() {
                let bytes = ours(seq as u32);
                assert_eq!(way(fd, &bytes), bytes.len() as isize, "way {seq}");
                assert_eq!(
                    error_of(&recv_now(fd).unwrap()),
                    Some(-libc::EBUSY),
                    "way {seq}"
                );
                assert_eq!(recv_now(fd), Err(libc::EAGAIN), "way {seq}");
            }
        },
    );
}

#[test]
fn every_way_to_receive_waits_for_the_answer() {
    type Way = fn(c_int, &mut [u8]) -> isize;
    // SAFETY (all): the room is there while each call lasts.
    let ways: [Way; 6] = [
        // SAFETY: as above.
        |fd, room| unsafe {
            libc::recv(fd, room.as_mut_ptr().cast(), room.len(), libc::MSG_DONTWAIT)
        },
        |fd, room| {
            // SAFETY: integers only.
            let mut from: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
            let mut length = 12;
            from.nl_pid = 5;
            // SAFETY: as above.
            let result = unsafe {
                libc::recvfrom(
                    fd,
                    room.as_mut_ptr().cast(),
                    room.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &raw mut length,
                )
            };
            assert_eq!((length, from.nl_family, from.nl_pid), (12, 16, 0));
            result
        },
        |fd, room| {
            let (a, b) = room.split_at_mut(7);
            let mut parts = [a, b].map(|part| libc::iovec {
                iov_base: part.as_mut_ptr().cast(),
                iov_len: part.len(),
            });
            // SAFETY: integers and pointers only.
            let (mut message, mut from) =
                unsafe { std::mem::zeroed::<(libc::msghdr, libc::sockaddr_nl)>() };
            from.nl_pid = 5;
            message.msg_iov = parts.as_mut_ptr();
            message.msg_iovlen = 2;
            message.msg_name = (&raw mut from).cast();
            message.msg_namelen = 128;
            // SAFETY: as above.
            let result = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) };
            assert_eq!(
                (message.msg_namelen, from.nl_family, from.nl_pid),
                (12, 16, 0)
            );
            result
        },
        |fd, room| {
            let mut part = libc::iovec {
                iov_base: room.as_mut_ptr().cast(),
                iov_len: room.len(),
            };
            // SAFETY: integers and pointers only.
            let mut two: [libc::mmsghdr; 2] = unsafe { std::mem::zeroed() };
            two[0].msg_hdr.msg_iov = &raw mut part;
            two[0].msg_hdr.msg_iovlen = 1;
            // SAFETY: as above.
            let count =
                unsafe { libc::recvmmsg(fd, two.as_mut_ptr(), 2, libc::MSG_DONTWAIT, null_mut()) };
            assert_eq!(count, 1);
            two[0].msg_len as isize
        },
        // SAFETY: as above.
        |fd, room| unsafe { libc::read(fd, room.as_mut_ptr().cast(), room.len()) },
        |fd, room| {
            let part = libc::iovec {
                iov_base: room.as_mut_ptr().cast(),
                iov_len: room.len(),
            };
            // SAFETY: as above.
            unsafe { libc::readv(fd, &raw const part, 1) }
        },
    ];
    scenario(
        "every_way_to_receive_waits_for_the_answer",
        |daemon| {
            let connection = daemon.accept();
            for seq in 0..6 {
                connection.answer_late(&error(libc::EBUSY, seq));
            }
            connection.until_closed();
        },
        || {
            let fd = client::socket(libc::SOCK_RAW | libc::SOCK_NONBLOCK);
            for (seq, way) in ways.into_iter().enumerate() {
                send(fd, &ours(seq as u32)).unwrap();
                let mut room = [0; 100];
                assert_eq!(way(fd, &mut room), 36, "way {seq}");
                assert_eq!(room[..36], error(libc::EBUSY, seq as u32));
            }
        },
    );
}

// 3

#[test]
fn the_death_of_the_daemon_ends_a_wait_with_an_error_once() {
    scenario(
        "the_death_of_the_daemon_ends_a_wait_with_an_error_once",
        |daemon| {
            let connection = daemon.accept();
            connection.request();
            late();
        },
        || {
            let fd = raw();
            let port_id = client::name(fd).1;
            send(fd, &ours(1)).unwrap();
            assert_eq!(recv_now(fd), Err(libc::ECONNRESET));
            // From then on a real one: quiet, and without our families.
            assert!(client::is_real(fd));
            assert_eq!(client::name(fd).1, port_id);
            assert!(!client::poll(fd, 50));
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
            send(fd, &ours(2)).unwrap();
            assert_eq!(error_of(&recv_now(fd).unwrap()), Some(-libc::ENOENT));
        },
    );
}

#[test]
fn the_death_of_the_daemon_ends_a_blocking_receive_and_a_poll() {
    scenario(
        "the_death_of_the_daemon_ends_a_blocking_receive_and_a_poll",
        |daemon| {
            let (first, second) = (daemon.accept(), daemon.accept());
            first.request();
            late();
            drop(first);
            late();
            drop(second);
        },
        || {
            let (fd, other) = (raw(), raw());
            send(fd, &ours(1)).unwrap();
            assert_eq!(client::recv(fd, 0), Err(libc::ECONNRESET));
            assert!(client::poll(other, 10_000));
            assert_eq!(client::recv(other, 0), Err(libc::ECONNRESET));
            assert!(!client::poll(other, 50));
        },
    );
}

#[test]
fn the_death_of_the_daemon_ends_a_send_that_waits_for_room() {
    scenario(
        "the_death_of_the_daemon_ends_a_send_that_waits_for_room",
        |daemon| {
            let connection = daemon.accept();
            connection.request();
            late();
        },
        || {
            let fd = raw();
            let big = client::request(transport::family_id(2), 1, 1, &[0; 4000]);
            let error = loop {
                if let Err(error) = send(fd, &big) {
                    break error;
                }
            };
            assert_eq!(error, libc::ECONNRESET);
            assert!(client::is_real(fd));
        },
    );
}

#[test]
fn a_send_waits_for_room_whatever_its_flags() {
    const COUNT: u32 = 2000;
    scenario(
        "a_send_waits_for_room_whatever_its_flags",
        |daemon| {
            let connection = daemon.accept();
            late();
            for seq in 0..COUNT {
                assert_eq!(connection.request().0, ours(seq));
            }
            connection.until_closed();
        },
        || {
            let fd = client::socket(libc::SOCK_RAW | libc::SOCK_NONBLOCK);
            for seq in 0..COUNT {
                assert_eq!(send(fd, &ours(seq)), Ok(20));
            }
        },
    );
}

// 4

/// 0 not run, 1 ran; set before any library's constructor.
static BEFORE: AtomicI32 = AtomicI32::new(0);

#[used]
#[unsafe(link_section = ".preinit_array")]
static PREINIT: extern "C" fn() = {
    extern "C" fn before() {
        // SAFETY: no descriptor has these numbers; no memory is touched.
        unsafe {
            let closed = libc::close(12345);
            let read = libc::read(12345, null_mut(), 0);
            let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
            let done = closed == -1 && read == -1 && fd >= 0 && libc::close(fd) == 0;
            BEFORE.store(if done { 1 } else { 2 }, Ordering::Relaxed);
        }
    }
    before
};

#[test]
fn hooks_work_before_the_librarys_constructor() {
    scenario(
        "hooks_work_before_the_librarys_constructor",
        |_| {},
        || assert_eq!(BEFORE.load(Ordering::Relaxed), 1),
    );
}

// 5

#[test]
fn a_message_of_odd_length_is_padded_and_its_own_length_returned() {
    scenario(
        "a_message_of_odd_length_is_padded_and_its_own_length_returned",
        |daemon| {
            let connection = daemon.accept();
            for extra in 0..4 {
                let (request, cookie) = connection.request();
                let mut expected = client::request(transport::family_id(0), 3, 1, &[7; 4][..extra]);
                expected.resize(expected.len().next_multiple_of(4), 0);
                assert_eq!(request, expected);
                connection.ack(cookie);
            }
            connection.until_closed();
        },
        || {
            let fd = raw();
            for extra in 0..4 {
                let request = client::request(transport::family_id(0), 3, 1, &[7; 4][..extra]);
                assert_eq!(send(fd, &request), Ok(20 + extra));
                assert_eq!(recv_now(fd), Err(libc::EAGAIN));
            }
        },
    );
}

// 6 is in descriptors.rs, 7 in families.rs.

#[test]
fn an_ack_that_another_process_took_is_asked_for_again() {
    scenario(
        "an_ack_that_another_process_took_is_asked_for_again",
        |daemon| {
            let connection = daemon.accept();
            connection.request(); // and no ack comes
            let (request, cookie) = connection.request();
            assert_eq!(request, []);
            connection.ack(cookie);
            connection.until_closed();
        },
        || {
            let fd = raw();
            send(fd, &ours(1)).unwrap();
            assert_eq!(recv_now(fd), Err(libc::EAGAIN));
        },
    );
}

#[test]
fn without_a_daemon_a_socket_is_real() {
    // The parent's run directory has no daemon after this.
    let name = "without_a_daemon_a_socket_is_real";
    scenario(
        name,
        |daemon| {
            // In the way of each kind of refusal, then let in.
            daemon.receive_as(transport::Status::OtherNetns, transport::VERSION);
            daemon.receive_as(transport::Status::Ok, transport::VERSION + 1);
            daemon.accept().until_closed();
            let mut command = Command::new("true");
            let nowhere = daemon.run_dir.join("nowhere");
            assert!(common::spawn(&mut command, &nowhere).finish().0.success());
        },
        || {
            for _ in 0..2 {
                let fd = raw();
                assert!(client::is_real(fd));
                send(fd, &get_family("ovs_datapath", 1)).unwrap();
                assert_eq!(error_of(&recv_now(fd).unwrap()), Some(-libc::ENOENT));
                client::close(fd);
            }
            assert!(!client::is_real(raw()));
        },
    );
}
