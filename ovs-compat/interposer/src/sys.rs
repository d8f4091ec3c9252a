//! Raw system calls: not hooked by us or others, no cancellation points; `errno` is left alone.

use core::ffi::{c_int, c_long, c_void};
use core::mem::size_of;

/// The error number of a system call.
pub type Errno = i32;

macro_rules! call {
    ($number:expr $(, $arg:expr)*) => {{
        // SAFETY: the caller's wrapper passes arguments valid for this system call; errno's
        // location is this thread's, and is put back so that success leaves it untouched.
        unsafe {
            let errno = libc::__errno_location();
            let saved = *errno;
            let result = libc::syscall($number $(, $arg as c_long)*);
            let error = *errno;
            *errno = saved;
            if result == -1 { Err(error) } else { Ok(result as isize) }
        }
    }};
}

/// Sets `errno`; returns -1.
pub fn fail(error: Errno) -> isize {
    // SAFETY: this thread's errno.
    unsafe { *libc::__errno_location() = error };
    -1
}

pub fn socket(domain: c_int, kind: c_int, protocol: c_int) -> Result<c_int, Errno> {
    call!(libc::SYS_socket, domain, kind, protocol).map(|fd| fd as c_int)
}

pub fn close(fd: c_int) {
    // Nothing can be done about a failure, and Linux closes in any case.
    let _ = call!(libc::SYS_close, fd);
}

pub fn dup3(old: c_int, new: c_int, flags: c_int) -> Result<isize, Errno> {
    call!(libc::SYS_dup3, old, new, flags)
}

pub fn shutdown(fd: c_int) {
    // Fails only if the peer is gone already, which is what it is for.
    let _ = call!(libc::SYS_shutdown, fd, libc::SHUT_RDWR);
}

pub fn fcntl(fd: c_int, command: c_int, argument: c_int) -> Result<c_int, Errno> {
    call!(libc::SYS_fcntl, fd, command, argument).map(|value| value as c_int)
}

pub fn connect(fd: c_int, address: &libc::sockaddr_un, length: usize) -> Result<isize, Errno> {
    call!(libc::SYS_connect, fd, &raw const *address, length)
}

pub fn bind<T>(fd: c_int, address: &T, length: usize) -> Result<isize, Errno> {
    debug_assert!(length <= size_of::<T>());
    call!(libc::SYS_bind, fd, &raw const *address, length)
}

/// The socket's own address, if it is a UNIX socket: its name (`sun_path`) with its length.
pub fn unix_name(fd: c_int) -> Option<([u8; 108], usize)> {
    let mut name = libc::sockaddr_un {
        sun_family: 0,
        sun_path: [0; 108],
    };
    let mut length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    call!(libc::SYS_getsockname, fd, &raw mut name, &raw mut length).ok()?;
    if c_int::from(name.sun_family) != libc::AF_UNIX {
        return None;
    }
    let length = (length as usize)
        .saturating_sub(size_of::<libc::sa_family_t>())
        .min(108);
    Some((name.sun_path.map(|byte| byte as u8), length))
}

/// The port id of a netlink socket; None if it is none.
pub fn netlink_port(fd: c_int) -> Option<u32> {
    // SAFETY: a structure of integers, for which zeros are a value.
    let mut name: libc::sockaddr_nl = unsafe { core::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    call!(libc::SYS_getsockname, fd, &raw mut name, &raw mut length).ok()?;
    (c_int::from(name.nl_family) == libc::AF_NETLINK).then_some(name.nl_pid)
}

/// Whether it is a netlink socket of this protocol.
pub fn is_netlink(fd: c_int, protocol: c_int) -> bool {
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, 0i32) == Ok(libc::AF_NETLINK)
        && getsockopt(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL, -1i32) == Ok(protocol)
}

/// Sends to another netlink socket.
pub fn send_to_port(fd: c_int, bytes: &[u8], port: u32, flags: c_int) -> Result<usize, Errno> {
    // SAFETY: a structure of integers, for which zeros are a value.
    let mut to: libc::sockaddr_nl = unsafe { core::mem::zeroed() };
    to.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    to.nl_pid = port;
    call!(
        libc::SYS_sendto,
        fd,
        bytes.as_ptr(),
        bytes.len(),
        flags,
        &raw const to,
        size_of::<libc::sockaddr_nl>()
    )
    .map(|length| length as usize)
}

/// Whether there is such a file.
pub fn exists(path: &core::ffi::CStr) -> bool {
    call!(
        libc::SYS_faccessat,
        libc::AT_FDCWD,
        path.as_ptr(),
        libc::F_OK
    )
    .is_ok()
}

/// Any option of fixed size.
pub fn getsockopt<T: Copy>(fd: c_int, level: c_int, name: c_int, value: T) -> Result<T, Errno> {
    let mut value = value;
    let mut length = size_of::<T>() as libc::socklen_t;
    call!(
        libc::SYS_getsockopt,
        fd,
        level,
        name,
        &raw mut value,
        &raw mut length
    )?;
    Ok(value)
}

/// Any option of fixed size.
pub fn setsockopt<T: Copy>(fd: c_int, level: c_int, name: c_int, value: T) -> Result<isize, Errno> {
    call!(
        libc::SYS_setsockopt,
        fd,
        level,
        name,
        &raw const value,
        size_of::<T>()
    )
}

/// The kernel's number of this very socket: unique while the machine runs. None if `fd` is none.
pub fn socket_cookie(fd: c_int) -> Option<u64> {
    getsockopt(fd, libc::SOL_SOCKET, libc::SO_COOKIE, 0u64).ok()
}

/// # Safety
/// `message` is valid for `sendmsg(2)`.
pub unsafe fn sendmsg(fd: c_int, message: &libc::msghdr, flags: c_int) -> Result<usize, Errno> {
    call!(libc::SYS_sendmsg, fd, &raw const *message, flags).map(|length| length as usize)
}

/// # Safety
/// `message` is valid for `recvmsg(2)`.
pub unsafe fn recvmsg(fd: c_int, message: &mut libc::msghdr, flags: c_int) -> Result<usize, Errno> {
    call!(libc::SYS_recvmsg, fd, &raw mut *message, flags).map(|length| length as usize)
}

pub fn send(fd: c_int, bytes: &[u8], flags: c_int) -> Result<usize, Errno> {
    call!(
        libc::SYS_sendto,
        fd,
        bytes.as_ptr(),
        bytes.len(),
        flags,
        0,
        0
    )
    .map(|length| length as usize)
}

pub fn recv(fd: c_int, bytes: &mut [u8], flags: c_int) -> Result<usize, Errno> {
    call!(
        libc::SYS_recvfrom,
        fd,
        bytes.as_mut_ptr(),
        bytes.len(),
        flags,
        0,
        0
    )
    .map(|length| length as usize)
}

/// Waits for `events` or the end of the connection; true if something is there. Interruptions
/// count as nothing there.
pub fn wait(fd: c_int, events: i16, milliseconds: i64) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    let mut time = libc::timespec {
        tv_sec: milliseconds / 1000,
        tv_nsec: (milliseconds % 1000) * 1_000_000,
    };
    matches!(
        call!(libc::SYS_ppoll, &raw mut poll, 1, &raw mut time, 0, 8),
        Ok(1)
    )
}

pub fn pause(milliseconds: i64) {
    wait(-1, 0, milliseconds);
}

pub fn epoll_add(epoll: c_int, fd: c_int, event: libc::epoll_event) -> Result<isize, Errno> {
    call!(
        libc::SYS_epoll_ctl,
        epoll,
        libc::EPOLL_CTL_ADD,
        fd,
        &raw const event
    )
}

/// Opens a directory to name things in it.
pub fn open_directory(path: &core::ffi::CStr) -> Result<c_int, Errno> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    call!(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0).map(|fd| fd as c_int)
}

/// Device and inode of a file; None if it can't be seen.
pub fn stat(path: &core::ffi::CStr) -> Option<(u64, u64)> {
    // SAFETY: a structure of integers, for which zeros are a value.
    let mut stat: libc::stat = unsafe { core::mem::zeroed() };
    call!(
        libc::SYS_newfstatat,
        libc::AT_FDCWD,
        path.as_ptr(),
        &raw mut stat,
        0
    )
    .ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// A page that reads as zeros again in a forked child, but is shared with a vforked one.
pub fn page_wiped_on_fork() -> Option<*mut c_void> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let page = call!(libc::SYS_mmap, 0, 4096, protection, flags, -1, 0).ok()?;
    call!(libc::SYS_madvise, page, 4096, libc::MADV_WIPEONFORK).ok()?;
    Some(page as *mut c_void)
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> i128 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Can't fail with this clock and a valid address.
    let _ = call!(
        libc::SYS_clock_gettime,
        libc::CLOCK_MONOTONIC,
        &raw mut time
    );
    i128::from(time.tv_sec)
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec.into())
}
