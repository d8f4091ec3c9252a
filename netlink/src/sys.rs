//! System calls that no crate of ours wraps: batches of datagrams, a peer's credentials.

// Unsafe: these calls take raw structures; each is built here from slices that outlive the call.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Who is at the other end of a UNIX connection, at the time of its `connect`, in the ids of our own
/// user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id, 0 if it isn't in our pid namespace or beyond.
    pub pid: i32,
    /// Effective user id; the overflow id if it has none here.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

fn option<T>(fd: BorrowedFd<'_>, name: libc::c_int, value: &mut [T]) -> io::Result<usize> {
    let mut len = mem::size_of_val(value) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `value`; every caller's T
    // is plain integers, for which any bytes are valid.
    let status = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if status == 0 {
        Ok(len as usize)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `SO_PEERCRED`
pub fn peer_credentials(fd: BorrowedFd<'_>) -> io::Result<Credentials> {
    // struct ucred: pid, uid, gid, four bytes each.
    let mut fields = [0u32; 3];
    option(fd, libc::SO_PEERCRED, &mut fields)?;
    let [pid, uid, gid] = fields;
    Ok(Credentials {
        pid: pid as i32,
        uid,
        gid,
    })
}

/// `SO_PEERGROUPS`: the peer's supplementary groups.
pub fn peer_groups(fd: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    // ERANGE gives the size that it wants; NGROUPS_MAX is 65536.
    let mut groups = vec![0u32; 64];
    loop {
        match option(fd, libc::SO_PEERGROUPS, &mut groups) {
            Ok(bytes) => {
                groups.truncate(bytes / 4);
                return Ok(groups);
            }
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) && groups.len() < 65536 => {
                groups.resize(groups.len() * 4, 0);
            }
            Err(error) => return Err(error),
        }
    }
}

/// `SIOCOUTQ`: what the peer hasn't read, in bytes as the kernel accounts for them.
pub fn unread(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ writes one int, which `bytes` is.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if status == 0 {
        Ok(bytes as u32)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Most datagrams in one call of [`send_batch`].
pub const SEND_BATCH: usize = 32;

/// Sends datagrams until one fails; never blocks, never raises SIGPIPE.
///
/// # Errors
/// That of the first datagram; else the number that were sent.
pub fn send_batch<'a>(
    fd: BorrowedFd<'_>,
    datagrams: impl Iterator<Item = &'a [u8]>,
) -> io::Result<usize> {
    let mut slices = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; SEND_BATCH];
    let mut count = 0;
    for (slot, datagram) in slices.iter_mut().zip(datagrams) {
        // The kernel only reads through it.
        slot.iov_base = datagram.as_ptr().cast_mut().cast();
        slot.iov_len = datagram.len();
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    // SAFETY: all-zero is a valid mmsghdr (null pointers and zero lengths).
    let mut headers: [libc::mmsghdr; SEND_BATCH] = unsafe { mem::zeroed() };
    for (header, slice) in headers.iter_mut().zip(&mut slices) {
        header.msg_hdr.msg_iov = slice;
        header.msg_hdr.msg_iovlen = 1;
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the first `count` headers point to `slices`, whose datagrams are borrowed for 'a.
    let sent = unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr(),
            count as libc::c_uint,
            flags,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Most datagrams that one [`Receiver::receive`] takes.
pub const RECEIVE_BATCH: usize = 16;
/// Longest datagram that is read whole. A request's longest part is a packet of 64 KiB.
pub const LONGEST: usize = 256 * 1024;

/// Room for a batch of received datagrams. Pages that no datagram reached are never touched.
#[derive(Debug)]
pub struct Receiver {
    room: Vec<u8>,
    lens: [(usize, bool); RECEIVE_BATCH],
}

impl Default for Receiver {
    fn default() -> Self {
        Self {
            room: vec![0; RECEIVE_BATCH * LONGEST],
            lens: [(0, false); RECEIVE_BATCH],
        }
    }
}

impl Receiver {
    /// Receives up to [`RECEIVE_BATCH`] datagrams, without waiting. Fewer than that: there were no
    /// more.
    pub fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let mut slices = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; RECEIVE_BATCH];
        for (slice, room) in slices.iter_mut().zip(self.room.chunks_exact_mut(LONGEST)) {
            slice.iov_base = room.as_mut_ptr().cast();
            slice.iov_len = LONGEST;
        }
        // SAFETY: all-zero is a valid mmsghdr (null pointers and zero lengths).
        let mut headers: [libc::mmsghdr; RECEIVE_BATCH] = unsafe { mem::zeroed() };
        for (header, slice) in headers.iter_mut().zip(&mut slices) {
            header.msg_hdr.msg_iov = slice;
            header.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: each header has one slice of its own part of `room`, which is borrowed mutably; no
        // room for control data, so that descriptors sent to us are closed by the kernel.
        let received = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                headers.as_mut_ptr(),
                RECEIVE_BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (len, header) in self.lens.iter_mut().zip(&headers) {
            let cut = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
            *len = ((header.msg_len as usize).min(LONGEST), cut);
        }
        Ok(received)
    }

    /// The datagram at `index` of the last batch, and whether it was longer than [`LONGEST`].
    pub fn datagram(&self, index: usize) -> (&[u8], bool) {
        let (len, cut) = self.lens.get(index).copied().unwrap_or_default();
        let start = index * LONGEST;
        (self.room.get(start..start + len).unwrap_or_default(), cut)
    }
}
