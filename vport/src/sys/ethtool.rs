//! The one ethtool setting that a bridge's port must change: large receive offload, which merges
//! packets so that they can't be forwarded as they were.
//!
//! Source: uapi `linux/ethtool.h` (ETHTOOL_GFLAGS, ETHTOOL_SFLAGS).

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::{ifreq, ioctl};

const GET_FLAGS: u32 = 0x25;
const SET_FLAGS: u32 = 0x26;
const FLAG_LRO: u32 = 1 << 15;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `socket`: any socket of the device's namespace.
fn flags(socket: BorrowedFd<'_>, name: &str, command: u32, data: u32) -> Result<u32, Errno> {
    let mut value = Value { command, data };
    let mut request = ifreq(name).ok_or(Errno::INVAL)?;
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut value).cast();
    // SAFETY: SIOCETHTOOL takes an ifreq that points at the structure of its command, here an
    // ethtool_value, a local that outlives the call.
    unsafe { ioctl(socket, libc::SIOCETHTOOL, &mut request)? };
    Ok(value.data)
}

/// Whether the device merges what it receives.
pub(crate) fn lro(socket: BorrowedFd<'_>, name: &str) -> Result<bool, Errno> {
    Ok(flags(socket, name, GET_FLAGS, 0)? & FLAG_LRO != 0)
}

/// Switches that.
pub(crate) fn set_lro(socket: BorrowedFd<'_>, name: &str, on: bool) -> Result<(), Errno> {
    let now = flags(socket, name, GET_FLAGS, 0)?;
    let then = if on { now | FLAG_LRO } else { now & !FLAG_LRO };
    flags(socket, name, SET_FLAGS, then).map(|_| ())
}
