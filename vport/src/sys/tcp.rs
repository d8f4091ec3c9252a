//! TCP's options that rustix doesn't have.
//!
//! Source: uapi `linux/tcp.h`.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::set_option;

/// Lets the socket take no more while that many bytes wait in it that weren't sent even once: what is
/// queued waits where its length is chosen, not in the kernel's buffer.
pub(crate) fn set_notsent_lowat(fd: BorrowedFd<'_>, bytes: u32) -> Result<(), Errno> {
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, bytes)
}
