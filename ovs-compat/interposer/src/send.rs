//! Every way to send, as one: the caller's datagram and a barrier behind it.
//!
//! A send to the kernel never waits and never fails for want of room. So one that meets a full
//! connection waits for room, whatever the caller's flags say; the daemon never stops reading,
//! so this ends.

use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::sync::atomic::Ordering::Relaxed;

use crate::Outcome;
use crate::leave;
use crate::message::{HEAD_LEN, Verdict, verdict};
use crate::relay;
use crate::sys::{self, Errno};
use crate::table::{Slot, State};

/// Vectors that one system call takes.
const IOV_MAX: usize = 1024;
/// Vectors of an ordinary send, for which less stack will do.
const FEW: usize = 32;

/// Sends what `vectors` hold as one datagram. `flags` as for `send(2)`.
pub fn datagram(fd: c_int, slot: &Slot, vectors: &[libc::iovec], flags: c_int) -> Outcome {
    if vectors.len() > IOV_MAX {
        return Outcome::Fail(libc::EMSGSIZE);
    }
    if flags & libc::MSG_OOB != 0 {
        return Outcome::Fail(libc::EOPNOTSUPP);
    }
    let Some(total) = length(vectors) else {
        return Outcome::Fail(libc::EMSGSIZE);
    };
    if total == 0 {
        return Outcome::Fail(libc::ENODATA);
    }
    let mut head = [0; HEAD_LEN];
    let head = gather(vectors, &mut head);
    let protocol = slot.protocol.load(Relaxed);
    match (verdict(protocol, head), slot.state()) {
        (Verdict::Kernels, State::Ours) => return relay::exchange(fd, slot, vectors, total),
        (Verdict::Kernels, _) => return leave::to_kernel(fd, slot),
        (Verdict::Ours, State::Undecided) => {
            slot.change(State::Undecided, State::Ours);
        }
        _ => {}
    }
    let sent = match vectors.len() {
        0..FEW => with_barrier::<FEW>(fd, slot, vectors, total),
        FEW..IOV_MAX => with_barrier::<IOV_MAX>(fd, slot, vectors, total),
        // No vector left: in the datagram behind.
        _ => all(fd, vectors).and_then(|()| barrier(fd, slot)),
    };
    match sent {
        Ok(()) => Outcome::Done(total as isize),
        Err(error) => failed(fd, slot, error),
    }
}

/// What a failed send comes to: the connection's end, or the caller's own fault.
pub fn failed(fd: c_int, slot: &Slot, error: Errno) -> Outcome {
    match error {
        libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN | libc::ECONNREFUSED => {
            leave::lost(fd, slot, slot.state())
        }
        _ => Outcome::Fail(error),
    }
}

/// Asks the daemon to say when it is done with everything before.
pub fn barrier(fd: c_int, slot: &Slot) -> Result<(), Errno> {
    let cookie = Slot::next_cookie();
    bytes(fd, &transport::barrier(cookie))?;
    slot.sent(cookie);
    Ok(())
}

/// Like [`barrier`], unless there is no room: for those who ask again.
pub fn barrier_if_room(fd: c_int, slot: &Slot) {
    let cookie = Slot::next_cookie();
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // A dead connection shows at the receive that follows.
    if sys::send(fd, &transport::barrier(cookie), flags).is_ok() {
        slot.sent(cookie);
    }
}

/// Sends a datagram of our own.
pub fn bytes(fd: c_int, bytes: &[u8]) -> Result<(), Errno> {
    let vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    all(fd, &[vector])
}

#[inline(never)] // Its array is on the stack only while it is needed.
fn with_barrier<const N: usize>(
    fd: c_int,
    slot: &Slot,
    vectors: &[libc::iovec],
    total: usize,
) -> Result<(), Errno> {
    let cookie = Slot::next_cookie();
    // Padding and barrier: a message that isn't a multiple of 4 long would hide what follows.
    let mut tail = [0u8; 3 + transport::BARRIER_LEN];
    let padding = total.wrapping_neg() % 4;
    let barrier = transport::barrier(cookie);
    for (to, from) in tail.iter_mut().skip(padding).zip(barrier) {
        *to = from;
    }
    let last = libc::iovec {
        iov_base: tail.as_ptr().cast_mut().cast(),
        iov_len: padding.wrapping_add(barrier.len()),
    };
    let mut all_vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; N];
    let mut count = 0usize;
    for (to, from) in all_vectors.iter_mut().zip(vectors.iter().chain([&last])) {
        to.write(*from);
        count = count.wrapping_add(1);
    }
    // SAFETY: the first `count` elements (at most N, by zip) have been written.
    let filled = unsafe { core::slice::from_raw_parts(all_vectors.as_ptr().cast(), count) };
    all(fd, filled)?;
    slot.sent(cookie);
    Ok(())
}

/// Sends one datagram; waits for room.
pub fn all(fd: c_int, vectors: &[libc::iovec]) -> Result<(), Errno> {
    // SAFETY: a structure of integers and pointers, for which zeros are a value.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = vectors.as_ptr().cast_mut();
    message.msg_iovlen = vectors.len() as _;
    loop {
        // SAFETY: the vectors are the caller's of send(2), or ours; nothing is written.
        match unsafe { sys::sendmsg(fd, &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) } {
            Ok(_) => return Ok(()),
            Err(libc::EAGAIN) => {
                sys::wait(fd, libc::POLLOUT, 1000);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Bytes in all vectors; None if that is more than a datagram can be.
fn length(vectors: &[libc::iovec]) -> Option<usize> {
    vectors
        .iter()
        .try_fold(0usize, |sum, vector| sum.checked_add(vector.iov_len))
        .filter(|sum| *sum <= i32::MAX as usize)
}

/// Copies the first bytes of `vectors` into `buffer`; gives what was filled.
pub fn gather<'a>(vectors: &[libc::iovec], buffer: &'a mut [u8]) -> &'a [u8] {
    let mut at = 0usize;
    for vector in vectors {
        let Some(room) = buffer.get_mut(at..) else {
            break;
        };
        let count = room.len().min(vector.iov_len);
        if count == 0 {
            continue;
        }
        // SAFETY: the caller of send(2) vouches for its vectors; `room` has `count` bytes, and is
        // ours alone.
        unsafe {
            core::ptr::copy_nonoverlapping(vector.iov_base.cast::<u8>(), room.as_mut_ptr(), count);
        }
        at = at.wrapping_add(count);
    }
    buffer.get(..at).unwrap_or_default()
}

/// # Safety
/// `buffer` holds `length` bytes, or `length` is 0.
pub unsafe fn vector(buffer: *const c_void, length: usize) -> libc::iovec {
    libc::iovec {
        iov_base: buffer.cast_mut(),
        iov_len: length,
    }
}
