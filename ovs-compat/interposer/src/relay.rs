//! A message for another family on a socket that is the daemon's already: it is put to the kernel
//! on a socket of its own, with the caller's rights, and the answers go through the daemon
//! (`transport::REFLECT`), so that they come in order with its own and `poll` sees them. Netlink
//! answers inside `send`, so nothing has to be waited for.

use core::ffi::c_int;
use core::sync::atomic::Ordering::Relaxed;

use crate::Outcome;
use crate::send;
use crate::sys::{self, Errno};
use crate::table::Slot;

/// The kernel's dump datagrams are no longer.
const ANSWER_LEN: usize = 32768;

#[inline(never)] // Its buffer is on the stack only while it is needed.
pub fn exchange(fd: c_int, slot: &Slot, vectors: &[libc::iovec], total: usize) -> Outcome {
    let protocol = slot.protocol.load(Relaxed);
    let side = match sys::socket(
        libc::AF_NETLINK,
        libc::SOCK_RAW | libc::SOCK_CLOEXEC,
        protocol,
    ) {
        Ok(side) => side,
        Err(error) => return Outcome::Fail(error),
    };
    let result = converse(fd, slot, side, vectors);
    sys::close(side);
    match result {
        Ok(()) => Outcome::Done(total as isize),
        Err(error) => send::failed(fd, slot, error),
    }
}

fn converse(fd: c_int, slot: &Slot, side: c_int, vectors: &[libc::iovec]) -> Result<(), Errno> {
    let options = slot.options.load(Relaxed);
    for number in [
        libc::NETLINK_CAP_ACK,
        libc::NETLINK_EXT_ACK,
        libc::NETLINK_GET_STRICT_CHK,
    ] {
        if options & (1 << number) != 0 {
            let _ = sys::setsockopt(side, libc::SOL_NETLINK, number, 1i32);
        }
    }
    // SAFETY: a structure of integers and pointers, for which zeros are a value.
    let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
    message.msg_iov = vectors.as_ptr().cast_mut();
    message.msg_iovlen = vectors.len() as _;
    // SAFETY: the caller of send(2) vouches for its vectors.
    unsafe { sys::sendmsg(side, &message, 0) }?;
    let mut answer = [0u8; ANSWER_LEN];
    loop {
        match sys::recv(side, &mut answer, libc::MSG_DONTWAIT) {
            Ok(length) => {
                let Some(bytes) = answer.get_mut(..length) else {
                    break;
                };
                address(bytes, slot.port_id.load(Relaxed));
                let Some(header) = transport::reflect_header(length) else {
                    break;
                };
                // SAFETY: both live until the send is over.
                let parts = unsafe {
                    [
                        send::vector(header.as_ptr().cast(), header.len()),
                        send::vector(bytes.as_ptr().cast(), bytes.len()),
                    ]
                };
                send::all(fd, &parts)?;
            }
            Err(libc::ENOBUFS) => {
                let overrun = transport::overrun();
                let Some(header) = transport::reflect_header(overrun.len()) else {
                    break;
                };
                // SAFETY: as above.
                let parts = unsafe {
                    [
                        send::vector(header.as_ptr().cast(), header.len()),
                        send::vector(overrun.as_ptr().cast(), overrun.len()),
                    ]
                };
                send::all(fd, &parts)?;
            }
            Err(_) => break,
        }
    }
    send::barrier(fd, slot)
}

/// Writes the port id that the caller knows as its own into each message's header.
pub fn address(datagram: &mut [u8], port_id: u32) {
    let mut rest = datagram;
    while let Some(header) = transport::Header::parse(rest) {
        if let Some(field) = rest.get_mut(12..16) {
            field.copy_from_slice(&port_id.to_ne_bytes());
        }
        let length = (header.len as usize).max(transport::NLMSGHDR_LEN);
        let Some(next) = rest.get_mut(length.next_multiple_of(4)..) else {
            return;
        };
        rest = next;
    }
}
