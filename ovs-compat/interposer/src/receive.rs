//! Every way to receive, as one.
//!
//! Open vSwitch sends, then receives with `MSG_DONTWAIT`, and takes `EAGAIN` for "all that remains
//! succeeded" or "the dump is over": over the kernel, the answers are in the socket's queue before
//! the send returns. So while the newest barrier's ack is outstanding, a receive that finds
//! nothing waits. Older acks are left overs of exchanges that nobody read to their end: they are
//! swallowed and end nothing.
//!
//! What can be seen of it: an ack that is left makes `poll` say "readable" once too often, as a
//! datagram with a bad checksum does elsewhere. Who then receives with `MSG_DONTWAIT` (or
//! O_NONBLOCK), as Open vSwitch does, gets EAGAIN; who blocks, blocks until something comes. It
//! can't be taken away early: between a look and a take another thread may be faster.

use core::ffi::c_int;

use transport::{BARRIER_ACK_LEN, ack_cookie, is_overrun};

use crate::Outcome;
use crate::leave;
use crate::send::{self, gather};
use crate::sys::{self, Errno};
use crate::table::{Slot, State};

/// How often a wait looks whether another thread has met the ack.
const LOOK_MS: i64 = 50;
/// Looks in vain before the daemon is asked again: another process may have met the ack, one
/// that was forked with this socket.
const LOOKS: u32 = 20;

/// Receives one datagram into `vectors`. `flags` as for `recv(2)`; `message_flags` receives what
/// `recvmsg(2)` says in `msg_flags`.
pub fn datagram(
    fd: c_int,
    slot: &Slot,
    vectors: &[libc::iovec],
    flags: c_int,
    message_flags: &mut c_int,
) -> Outcome {
    let room = vectors
        .iter()
        .fold(0usize, |sum, vector| sum.saturating_add(vector.iov_len));
    let before = slot.state();
    let mut looks = 0u32;
    loop {
        let pending = slot.pending.swap(0, core::sync::atomic::Ordering::AcqRel);
        if pending != 0 {
            return Outcome::Fail(pending);
        }
        // What is too small for an ack can't show one: look first.
        let peeked = room < BARRIER_ACK_LEN;
        let met = if peeked {
            peek(fd, flags)
        } else {
            take(fd, vectors, flags, message_flags)
        };
        match met {
            Ok(Met::Ack(cookie)) => {
                if peeked || flags & libc::MSG_PEEK != 0 {
                    drop_peeked(fd, slot);
                }
                slot.acknowledge(cookie);
            }
            Ok(Met::Overrun) => {
                if peeked || flags & libc::MSG_PEEK != 0 {
                    drop_peeked(fd, slot);
                }
                if slot.options.load(core::sync::atomic::Ordering::Relaxed)
                    & (1 << libc::NETLINK_NO_ENOBUFS)
                    == 0
                {
                    return Outcome::Fail(libc::ENOBUFS);
                }
            }
            Ok(Met::End) | Err(libc::ECONNRESET) => return leave::lost(fd, slot, before),
            Ok(Met::Data(length)) if !peeked => {
                let kept = if flags & libc::MSG_TRUNC != 0 {
                    length
                } else {
                    length.min(room)
                };
                return Outcome::Done(kept as isize);
            }
            Ok(Met::Data(_)) => {
                // Another thread may have been faster: then there is nothing, and we look again.
                match take(fd, vectors, flags | libc::MSG_DONTWAIT, message_flags) {
                    Ok(Met::End) => return leave::lost(fd, slot, before),
                    Ok(Met::Data(length)) => {
                        let kept = if flags & libc::MSG_TRUNC != 0 {
                            length
                        } else {
                            length.min(room)
                        };
                        return Outcome::Done(kept as isize);
                    }
                    Ok(Met::Ack(cookie)) => slot.acknowledge(cookie),
                    Ok(Met::Overrun) => return Outcome::Fail(libc::ENOBUFS),
                    Err(libc::EAGAIN) => {}
                    Err(error) => return Outcome::Fail(error),
                }
            }
            Err(libc::EAGAIN) if slot.is_outstanding() => {
                if sys::wait(fd, libc::POLLIN, LOOK_MS) {
                    looks = 0;
                } else if looks < LOOKS {
                    looks = looks.wrapping_add(1);
                } else {
                    looks = 0;
                    send::barrier_if_room(fd, slot);
                }
            }
            Err(error) => return Outcome::Fail(error),
        }
        if slot.state() == State::Leaving {
            return leave::wait_until_moved(fd, slot, before);
        }
    }
}

/// What a receive met.
enum Met {
    /// A datagram of this many bytes, however many of them found room.
    Data(usize),
    Ack(u32),
    Overrun,
    /// The connection's end.
    End,
}

fn take(
    fd: c_int,
    vectors: &[libc::iovec],
    flags: c_int,
    message_flags: &mut c_int,
) -> Result<Met, Errno> {
    // SAFETY: a structure of integers and pointers, for which zeros are a value.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = vectors.as_ptr().cast_mut();
    message.msg_iovlen = vectors.len() as _;
    // SAFETY: the caller of recv(2) vouches for its vectors.
    let length = unsafe { sys::recvmsg(fd, &mut message, flags | libc::MSG_TRUNC) }?;
    *message_flags = message.msg_flags & libc::MSG_TRUNC;
    let mut head = [0; BARRIER_ACK_LEN];
    Ok(kind(
        length,
        gather(
            vectors,
            if length < BARRIER_ACK_LEN {
                head.get_mut(..length).unwrap_or_default()
            } else {
                &mut head
            },
        ),
    ))
}

fn peek(fd: c_int, flags: c_int) -> Result<Met, Errno> {
    let mut head = [0; BARRIER_ACK_LEN];
    let length = sys::recv(fd, &mut head, flags | libc::MSG_PEEK | libc::MSG_TRUNC)?;
    Ok(kind(length, head.get(..length).unwrap_or(&head)))
}

/// `head`: as much of the datagram as an ack is long.
fn kind(length: usize, head: &[u8]) -> Met {
    if length == 0 {
        return Met::End;
    }
    if length == head.len() {
        if let Some(cookie) = ack_cookie(head) {
            return Met::Ack(cookie);
        }
        if is_overrun(head) {
            return Met::Overrun;
        }
    }
    Met::Data(length)
}

/// Takes a datagram out that was only looked at. If another thread was faster, this took the one
/// behind: say that something was lost, since it was.
fn drop_peeked(fd: c_int, slot: &Slot) {
    let mut head = [0; BARRIER_ACK_LEN];
    let Ok(length) = sys::recv(fd, &mut head, libc::MSG_DONTWAIT | libc::MSG_TRUNC) else {
        return;
    };
    match kind(length, head.get(..length).unwrap_or(&head)) {
        Met::Ack(cookie) => slot.acknowledge(cookie),
        Met::Overrun | Met::Data(_) => {
            slot.pending
                .store(libc::ENOBUFS, core::sync::atomic::Ordering::Release);
        }
        Met::End => {}
    }
}
