//! The kernel's nouns, one a file, each with a safe face. The only unsafe code of this crate.
//!
//! Rules: a structure handed to the kernel is plain old data, lives in a local variable or a `Vec`
//! that isn't touched during the call, and its length is computed from its type; pointers in it
//! point at borrowed slices that outlive the call; nothing that the kernel reports as a length is
//! used without a bound.

#![allow(unsafe_code)] // socket options, ioctls, bpf(2), recvmmsg, sendmmsg have no safe wrapper

pub(crate) mod bpf;
pub(crate) mod ethtool;
pub(crate) mod inet;
mod mapping;
pub(crate) mod mmsg;
pub(crate) mod packet_socket;
pub(crate) mod rx_ring;
pub(crate) mod tcp;
pub(crate) mod tun;
pub(crate) mod tx_ring;
pub(crate) mod xdp;
pub(crate) mod xsk;

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// What a call that returns -1 on failure left in errno.
fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result < 0 { Err(last()) } else { Ok(result) }
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// `setsockopt` of a plain value.
///
/// Private to `sys`: `T` must be plain old data, of the type that the option takes.
fn set_option<T: Copy>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: T,
) -> Result<(), Errno> {
    // SAFETY: `value` lives until the call returns, and the length is its type's.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    })
    .map(|_| ())
}

/// A classic BPF program in front of a socket.
fn set_filter(fd: BorrowedFd<'_>, program: &[libc::sock_filter]) -> Result<(), Errno> {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno::INVAL)?,
        // The kernel only reads it.
        filter: program.as_ptr().cast_mut(),
    };
    set_option(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, filter)
}

/// `ioctl` with a pointer to a structure that the kernel reads and may write.
///
/// # Safety
/// `T` is the structure that `request` takes, and any pointer in it is valid for what the request
/// does with it.
unsafe fn ioctl<T>(
    fd: BorrowedFd<'_>,
    request: libc::Ioctl,
    argument: &mut T,
) -> Result<i32, Errno> {
    // SAFETY: the caller's promise; `argument` is borrowed for the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// An `ifreq` for the device `name`, zero behind it. `None` if the name is too long.
fn ifreq(name: &str) -> Option<libc::ifreq> {
    // SAFETY: all-zero is a valid ifreq: an array of characters and a union of plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Some(request)
}
