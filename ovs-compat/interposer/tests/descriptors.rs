//! Descriptors: duplicated, closed, inherited, shared, and those that are somebody else's.
#![allow(unsafe_code)] // The C library's functions are the very subject.
#![allow(clippy::unwrap_used)] // in helpers of tests

mod common;

use std::ffi::c_int;
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::client::{self, error_of, ours, raw, recv_now, send};
use common::{late, scenario};
use transport::{Header, NLMSG_ERROR};

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

/// The answer is waited for: only a descriptor that is known can do that.
fn converses(fd: c_int) {
    send(fd, &ours(9)).unwrap();
    assert_eq!(error_of(&recv_now(fd).unwrap()), Some(-libc::EBUSY));
    assert_eq!(recv_now(fd), Err(libc::EAGAIN));
}

#[test]
fn duplicates_are_the_same_socket() {
    scenario(
        "duplicates_are_the_same_socket",
        |daemon| {
            let connection = daemon.accept();
            for _ in 0..7 {
                connection.answer_late(&error(libc::EBUSY, 9));
            }
            connection.until_closed();
        },
        || {
            let fd = raw();
            // SAFETY: numbers only, in all.
            let copies = unsafe {
                [
                    libc::dup(fd),
                    libc::dup2(fd, 100),
                    libc::dup3(fd, 101, libc::O_CLOEXEC),
                    libc::fcntl(fd, libc::F_DUPFD, 150),
                    libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 160),
                ]
            };
            for copy in copies {
                assert_eq!(client::name(copy), client::name(fd));
                converses(copy);
            }
            // What is sent through one is waited for through another.
            send(fd, &ours(9)).unwrap();
            assert_eq!(error_of(&recv_now(copies[0]).unwrap()), Some(-libc::EBUSY));
            // The last to go takes the connection with it.
            client::close(fd);
            for copy in &copies[1..] {
                client::close(*copy);
            }
            converses(copies[0]);
            client::close(copies[0]);
        },
    );
}

#[test]
fn a_number_used_again_is_somebody_elses() {
    scenario(
        "a_number_used_again_is_somebody_elses",
        |daemon| {
            for _ in 0..4 {
                daemon.accept().until_closed();
            }
        },
        || {
            let mut pipe = [0; 2];
            // SAFETY: room for two numbers.
            assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
            let plain = |fd: c_int, byte: u8| {
                send_bytes(pipe[1], &[byte]);
                let mut room = [0];
                // SAFETY: room for one byte.
                assert_eq!(unsafe { libc::read(fd, room.as_mut_ptr().cast(), 1) }, 1);
                assert_eq!(room, [byte]);
            };
            // By close.
            let fd = raw();
            client::close(fd);
            // SAFETY: numbers only.
            assert_eq!(unsafe { libc::dup(pipe[0]) }, fd);
            plain(fd, 1);
            client::close(fd);
            // By dup2 over it.
            let fd = raw();
            // SAFETY: numbers only.
            assert_eq!(unsafe { libc::dup2(pipe[0], fd) }, fd);
            plain(fd, 2);
            client::close(fd);
            // By a range.
            let fd = raw();
            // SAFETY: numbers only.
            assert_eq!(unsafe { libc::close_range(fd as u32, fd as u32, 0) }, 0);
            // SAFETY: numbers only.
            assert_eq!(unsafe { libc::dup(pipe[0]) }, fd);
            plain(fd, 3);
            client::close(fd);
            // Behind our back.
            let fd = raw();
            // SAFETY: numbers only.
            unsafe {
                assert_eq!(libc::syscall(libc::SYS_close, fd), 0);
                assert_eq!(libc::syscall(libc::SYS_dup, pipe[0]), i64::from(fd));
            }
            plain(fd, 4);
            assert_eq!(
                client::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE),
                Err(libc::ENOTSOCK)
            );
        },
    );
}

fn send_bytes(fd: c_int, bytes: &[u8]) {
    // SAFETY: the bytes are there.
    let length = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    assert_eq!(length, bytes.len() as isize);
}

#[test]
fn a_range_marked_close_on_exec_stays() {
    scenario(
        "a_range_marked_close_on_exec_stays",
        |daemon| {
            let connection = daemon.accept();
            connection.answer_late(&error(libc::EBUSY, 9));
            connection.until_closed();
        },
        || {
            let fd = raw();
            let flag = libc::CLOSE_RANGE_CLOEXEC as c_int;
            // SAFETY: numbers only.
            assert_eq!(unsafe { libc::close_range(fd as u32, fd as u32, flag) }, 0);
            converses(fd);
        },
    );
}

#[test]
fn a_forked_child_goes_on_with_the_socket() {
    scenario(
        "a_forked_child_goes_on_with_the_socket",
        |daemon| {
            let connection = daemon.accept();
            for _ in 0..2 {
                connection.answer_late(&error(libc::EBUSY, 9));
            }
            connection.until_closed();
        },
        || {
            let fd = raw();
            // SAFETY: the child calls only what may be called between fork and _exit (or fails).
            let child = unsafe { libc::fork() };
            if child == 0 {
                converses(fd);
                client::close(fd);
                // SAFETY: ends the child.
                unsafe { libc::_exit(0) };
            }
            let mut status = 0;
            // SAFETY: room for the status.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0);
            // What the child closed is open here.
            converses(fd);
        },
    );
}

#[test]
fn a_vforked_child_leaves_its_parents_table_alone() {
    scenario(
        "a_vforked_child_leaves_its_parents_table_alone",
        |daemon| {
            let connection = daemon.accept();
            connection.answer_late(&error(libc::EBUSY, 9));
            connection.until_closed();
        },
        || {
            // CLONE_VM and no CLONE_VFORK: the same memory, other descriptors, and a stack of its
            // own, since Rust can't call vfork.
            extern "C" fn child(fd: *mut std::ffi::c_void) -> c_int {
                // SAFETY: numbers only; runs on its own stack.
                unsafe {
                    libc::dup2(0, fd as c_int);
                    libc::close(fd as c_int)
                }
            }
            let fd = raw();
            send(fd, &ours(9)).unwrap(); // outstanding, which the child must not forget
            let mut stack = vec![0u8; 256 << 10];
            let mut status = 0;
            // SAFETY: the stack outlives the child, which is waited for; it grows down from its
            // aligned end.
            unsafe {
                let end = stack.as_mut_ptr().add(stack.len() - 64);
                let end = end.sub(end as usize % 16);
                let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
                let pid = libc::clone(child, end.cast(), flags, fd as usize as *mut _);
                assert!(pid > 0);
                assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
            }
            assert_eq!(status, 0);
            assert_eq!(error_of(&recv_now(fd).unwrap()), Some(-libc::EBUSY));
        },
    );
}

#[test]
fn a_descriptor_inherited_over_exec_is_known_again() {
    let name = "a_descriptor_inherited_over_exec_is_known_again";
    scenario(
        name,
        |daemon| {
            let connection = daemon.accept();
            connection.answer_late(&error(libc::EBUSY, 9));
            connection.until_closed();
        },
        || {
            if let Ok(number) = std::env::var("INHERITED") {
                let (fd, port_id) = number.split_once(' ').unwrap();
                let fd = fd.parse().unwrap();
                assert_eq!(client::name(fd), (16, port_id.parse().unwrap()));
                assert_eq!(
                    client::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE),
                    Ok(libc::SOCK_DGRAM as u32)
                );
                return converses(fd);
            }
            let fd = client::socket(libc::SOCK_DGRAM);
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(std::env::args_os().skip(1));
            command.env("INHERITED", format!("{fd} {}", client::name(fd).1));
            panic!("{}", command.exec());
        },
    );
}

#[test]
fn close_on_exec_is_as_asked() {
    scenario(
        "close_on_exec_is_as_asked",
        |daemon| {
            let kept = daemon.accept();
            daemon.accept().until_closed();
            late();
            drop(kept);
        },
        || {
            for (kind, flag) in [(0, 0), (libc::SOCK_CLOEXEC, libc::FD_CLOEXEC)] {
                let fd = client::socket(libc::SOCK_RAW | kind);
                // SAFETY: numbers only.
                assert_eq!(unsafe { libc::fcntl(fd, libc::F_GETFD) }, flag);
                if flag != 0 {
                    client::close(fd);
                }
            }
        },
    );
}

#[test]
fn a_program_that_starts_others_is_not_disturbed() {
    scenario(
        "a_program_that_starts_others_is_not_disturbed",
        |_| {},
        || {
            let script = "import subprocess, os, threading\n\
                def run(i):\n\
                \x20 for n in range(20):\n\
                \x20   out = subprocess.run(['sh', '-c', f'echo {i} {n} | cat'], capture_output=True)\n\
                \x20   assert out.stdout == f'{i} {n}\\n'.encode(), out\n\
                threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]\n\
                [t.start() for t in threads]\n\
                [t.join() for t in threads]\n\
                assert all(not t.is_alive() for t in threads)\n";
            let status = Command::new("python3")
                .arg("-c")
                .arg(script)
                .status()
                .unwrap();
            assert!(status.success());
        },
    );
}

#[test]
fn a_thread_is_cancelled_in_a_blocking_call() {
    scenario(
        "a_thread_is_cancelled_in_a_blocking_call",
        |_| {},
        || {
            extern "C" fn reads(fd: *mut std::ffi::c_void) -> *mut std::ffi::c_void {
                let mut byte = 0u8;
                // SAFETY: room for one byte.
                unsafe { libc::read(fd as c_int, (&raw mut byte).cast(), 1) };
                std::ptr::null_mut()
            }
            let mut pipe = [0; 2];
            // SAFETY: room for two numbers; the thread's function touches its own stack only.
            unsafe {
                assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
                let mut thread = 0;
                let argument = pipe[0] as usize as *mut _;
                let created =
                    libc::pthread_create(&raw mut thread, std::ptr::null(), reads, argument);
                assert_eq!(created, 0);
                late();
                assert_eq!(libc::pthread_cancel(thread), 0);
                let mut result = std::ptr::null_mut();
                assert_eq!(libc::pthread_join(thread, &raw mut result), 0);
                assert_eq!(result as isize, -1); // PTHREAD_CANCELED
            }
        },
    );
}
