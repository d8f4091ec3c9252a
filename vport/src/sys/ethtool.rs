//! The few ethtool settings that concern a port: offloads that change packets before we see them, and
//! how many queues there are.
//!
//! Source: uapi `linux/ethtool.h` (ETHTOOL_GFLAGS, ETHTOOL_SFLAGS, ETHTOOL_GCHANNELS).

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::{ifreq, ioctl};

const GET_FLAGS: u32 = 0x25;
const SET_FLAGS: u32 = 0x26;
const GET_CHANNELS: u32 = 0x3c;

/// An offload that is one of ethtool's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offload {
    /// Large receive: merges packets so that they can't be forwarded as they were.
    Lro,
    /// Takes the outermost tag out of a packet received, to tell it beside the packet.
    RxVlan,
}

impl Offload {
    fn flag(self) -> u32 {
        match self {
            Self::RxVlan => 1 << 8,
            Self::Lro => 1 << 15,
        }
    }
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// # Safety
/// `T` is the structure of the command that its first field holds.
unsafe fn ethtool<T>(socket: BorrowedFd<'_>, name: &str, value: &mut T) -> Result<(), Errno> {
    let mut request = ifreq(name).ok_or(Errno::INVAL)?;
    request.ifr_ifru.ifru_data = std::ptr::from_mut(value).cast();
    // SAFETY: SIOCETHTOOL takes an ifreq that points at the structure of its command: the caller's
    // promise; it is borrowed for the call.
    unsafe { ioctl(socket, libc::SIOCETHTOOL, &mut request) }.map(|_| ())
}

/// `socket`: any socket of the device's namespace.
fn flags(socket: BorrowedFd<'_>, name: &str, command: u32, data: u32) -> Result<u32, Errno> {
    let mut value = Value { command, data };
    // SAFETY: both commands take an ethtool_value.
    unsafe { ethtool(socket, name, &mut value)? };
    Ok(value.data)
}

/// Whether the device does that.
pub(crate) fn offload(socket: BorrowedFd<'_>, name: &str, offload: Offload) -> Result<bool, Errno> {
    Ok(flags(socket, name, GET_FLAGS, 0)? & offload.flag() != 0)
}

/// Switches that. `EOPNOTSUPP`, `EINVAL`: the device can't switch it.
pub(crate) fn set_offload(
    socket: BorrowedFd<'_>,
    name: &str,
    offload: Offload,
    on: bool,
) -> Result<(), Errno> {
    let now = flags(socket, name, GET_FLAGS, 0)?;
    let then = if on {
        now | offload.flag()
    } else {
        now & !offload.flag()
    };
    flags(socket, name, SET_FLAGS, then).map(|_| ())
}

/// The present name of a device of the socket's namespace. `ENODEV`: there is none of that index.
pub(crate) fn current_name(socket: BorrowedFd<'_>, ifindex: u32) -> Result<String, Errno> {
    let mut request = ifreq("").ok_or(Errno::INVAL)?;
    request.ifr_ifru.ifru_ifindex = ifindex as libc::c_int;
    // SAFETY: SIOCGIFNAME takes an ifreq without pointers.
    unsafe { ioctl(socket, libc::SIOCGIFNAME, &mut request)? };
    Ok(request
        .ifr_name
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| char::from(*byte as u8))
        .collect())
}

/// How many queues the device receives on now. `EOPNOTSUPP`: it doesn't say.
pub(crate) fn receive_queues(socket: BorrowedFd<'_>, name: &str) -> Result<u32, Errno> {
    let mut channels = Channels {
        command: GET_CHANNELS,
        ..Channels::default()
    };
    // SAFETY: the command takes an ethtool_channels.
    unsafe { ethtool(socket, name, &mut channels)? };
    Ok(channels.rx.saturating_add(channels.combined))
}
