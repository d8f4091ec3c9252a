//! The C library's ways to send on a socket of NETLINK_ROUTE.

use core::ffi::{c_int, c_uint, c_void};

use crate::Outcome;
use crate::hooks::vectors;
use crate::{send, sys};

/// `send(2)`. None: it's the kernel's, as it is; so below.
///
/// # Safety
/// `bytes` holds `length` bytes.
pub unsafe fn buffer(
    fd: c_int,
    bytes: *const c_void,
    length: usize,
    flags: c_int,
) -> Option<Outcome> {
    // SAFETY: the caller's contract.
    let vector = unsafe { send::vector(bytes, length) };
    super::datagram(fd, &[vector], flags)
}

/// Whether what is sent to this address is the kernel's: none says so too.
///
/// # Safety
/// `address` points to `length` bytes, or is null.
pub unsafe fn is_to_kernel(address: *const c_void, length: libc::socklen_t) -> bool {
    if address.is_null() || (length as usize) < size_of::<libc::sockaddr_nl>() {
        return address.is_null();
    }
    // SAFETY: as many bytes as are read are there; alignment isn't asked for.
    let address = unsafe { address.cast::<libc::sockaddr_nl>().read_unaligned() };
    address.nl_pid == 0 && address.nl_groups == 0
}

/// # Safety
/// As `sendmsg(2)`.
pub unsafe fn message(fd: c_int, message: *const libc::msghdr, flags: c_int) -> Option<Outcome> {
    // SAFETY: the caller's contract.
    unsafe {
        let message = message.as_ref()?;
        if !is_to_kernel(message.msg_name, message.msg_namelen) {
            return None;
        }
        super::datagram(fd, vectors(message.msg_iov, message.msg_iovlen), flags)
    }
}

/// One by one: each may be the daemon's or the kernel's.
///
/// # Safety
/// As `sendmmsg(2)`.
pub unsafe fn messages(
    fd: c_int,
    messages: *mut libc::mmsghdr,
    count: c_uint,
    flags: c_int,
) -> Option<Outcome> {
    let mut sent = 0usize;
    while sent < (count as usize).min(1024) {
        // SAFETY: the caller's contract; `sent` is below its count.
        let outcome = unsafe {
            let next = messages.add(sent);
            let header = &raw const (*next).msg_hdr;
            let outcome = match message(fd, header, flags) {
                Some(outcome) => outcome,
                None => match sys::sendmsg(fd, &*header, flags) {
                    Ok(length) => Outcome::Done(length as isize),
                    Err(error) => Outcome::Fail(error),
                },
            };
            if let Outcome::Done(length) = outcome {
                (*next).msg_len = length as c_uint;
            }
            outcome
        };
        match outcome {
            Outcome::Done(_) => sent = sent.wrapping_add(1),
            // What was sent before counts; the rest is for the next call.
            _ if sent > 0 => break,
            other => return Some(other),
        }
    }
    Some(Outcome::Done(sent as isize))
}

/// # Safety
/// A receive has just filled `message`.
pub unsafe fn fix_message(message: *mut libc::msghdr) {
    // SAFETY: the caller's contract.
    unsafe {
        if let Some(message) = message.as_ref() {
            super::fix_sender(message.msg_name.cast(), message.msg_namelen as usize);
        }
    }
}
