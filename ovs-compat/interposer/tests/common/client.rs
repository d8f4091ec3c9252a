//! What a client does, by the C library's own functions (which are what is replaced).
#![allow(unsafe_code)] // The C library's functions are the very subject.

use std::ffi::c_int;
use std::io;
use std::mem::zeroed;

pub type Result<T> = std::result::Result<T, i32>;

pub fn check(value: isize) -> Result<usize> {
    usize::try_from(value).map_err(|_| io::Error::last_os_error().raw_os_error().unwrap())
}

/// `socket(AF_NETLINK, kind, NETLINK_GENERIC)`.
pub fn socket(kind: c_int) -> c_int {
    speaking(libc::NETLINK_GENERIC, kind)
}

/// `socket(AF_NETLINK, kind, protocol)`.
pub fn speaking(protocol: c_int, kind: c_int) -> c_int {
    // SAFETY: no memory.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, protocol) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    fd
}

pub fn raw() -> c_int {
    socket(libc::SOCK_RAW)
}

pub fn close(fd: c_int) {
    // SAFETY: no memory.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

/// A generic-netlink request.
pub fn request(family: u16, command: u8, seq: u32, attributes: &[u8]) -> Vec<u8> {
    request_with(family, 1 | 4, command, seq, attributes)
}

pub fn request_with(family: u16, flags: u16, command: u8, seq: u32, attributes: &[u8]) -> Vec<u8> {
    let len = (20 + attributes.len()) as u32;
    let header = transport::Header {
        len,
        kind: family,
        flags,
        seq,
        pid: 0,
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(attributes);
    bytes
}

/// CTRL_CMD_GETFAMILY by name.
pub fn get_family(name: &str, seq: u32) -> Vec<u8> {
    let mut attribute = ((name.len() + 5) as u16).to_ne_bytes().to_vec();
    attribute.extend(2u16.to_ne_bytes());
    attribute.extend(name.as_bytes());
    attribute.push(0);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    request(0x10, 3, seq, &attribute)
}

/// A request that is the daemon's.
pub fn ours(seq: u32) -> Vec<u8> {
    request(transport::family_id(0), 3, seq, &[])
}

pub fn send(fd: c_int, bytes: &[u8]) -> Result<usize> {
    // SAFETY: the bytes are there.
    check(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), 0) })
}

pub fn recv(fd: c_int, flags: c_int) -> Result<Vec<u8>> {
    let mut buffer = vec![0; 65536];
    // SAFETY: the room is there.
    let length = check(unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), flags) })?;
    buffer.truncate(length);
    Ok(buffer)
}

/// A receive that doesn't wait, as far as it knows.
pub fn recv_now(fd: c_int) -> Result<Vec<u8>> {
    recv(fd, libc::MSG_DONTWAIT)
}

pub fn setsockopt(fd: c_int, level: c_int, name: c_int, value: u32) -> Result<usize> {
    // SAFETY: four bytes are there.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), 4) as isize })
}

pub fn getsockopt(fd: c_int, level: c_int, name: c_int) -> Result<u32> {
    let (mut value, mut length) = (0u32, 4);
    // SAFETY: four bytes of room are there.
    check(unsafe {
        libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut length) as isize
    })?;
    Ok(value)
}

pub fn bind(fd: c_int, pid: u32, groups: u32) -> Result<usize> {
    // SAFETY: integers only.
    let mut address: libc::sockaddr_nl = unsafe { zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    address.nl_pid = pid;
    address.nl_groups = groups;
    // SAFETY: the address is there.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), 12) as isize })
}

/// Family and port id that getsockname gives.
pub fn name(fd: c_int) -> (u16, u32) {
    // SAFETY: integers only.
    let mut address: libc::sockaddr_nl = unsafe { zeroed() };
    let mut length = 12;
    // SAFETY: the room is there.
    let result = unsafe { libc::getsockname(fd, (&raw mut address).cast(), &raw mut length) };
    assert_eq!((result, length), (0, 12));
    (address.nl_family, address.nl_pid)
}

/// What the kernel itself says a socket is: not replaced.
pub fn real_domain(fd: c_int) -> i32 {
    let (mut value, mut length) = (0i32, 4u32);
    // SAFETY: four bytes of room are there.
    let result = unsafe {
        libc::syscall(
            libc::SYS_getsockopt,
            fd,
            libc::SOL_SOCKET,
            libc::SO_DOMAIN,
            &raw mut value,
            &raw mut length,
        )
    };
    assert_eq!(result, 0);
    value
}

pub fn is_real(fd: c_int) -> bool {
    real_domain(fd) == libc::AF_NETLINK
}

/// Whether something can be read (or the end has come) within this time.
pub fn poll(fd: c_int, milliseconds: c_int) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure is there.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) == 1 }
}

/// Error number in an NLMSG_ERROR.
pub fn error_of(datagram: &[u8]) -> Option<i32> {
    let header = transport::Header::parse(datagram)?;
    (header.kind == transport::NLMSG_ERROR)
        .then(|| i32::from_ne_bytes(datagram[16..20].try_into().unwrap()))
}

/// The real kernel answers this one: the family id of nlctrl is 0x10.
pub fn ask_the_kernel(fd: c_int) {
    send(fd, &get_family("nlctrl", 5)).unwrap();
    let answer = recv_now(fd).unwrap();
    let header = transport::Header::parse(&answer).unwrap();
    assert_eq!((header.kind, header.seq), (0x10, 5), "{answer:x?}");
    assert!(answer.windows(7).any(|part| part == b"nlctrl\0"));
    assert_eq!(error_of(&recv_now(fd).unwrap()), Some(0));
    assert_eq!(recv_now(fd), Err(libc::EAGAIN));
}
