//! TAP devices: /dev/net/tun and its ioctls.
//!
//! Source: uapi `linux/if_tun.h`; Documentation/networking/tuntap.rst.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;

use super::{check, ifreq, ioctl};

/// What the kernel may hand over unfinished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TunOffloads {
    /// Partial checksums, TSO for IPv4 and IPv6 with ECN.
    pub(crate) tcp: bool,
    /// USO (Linux 6.2).
    pub(crate) udp: bool,
}

/// A descriptor of /dev/net/tun, not yet a queue of a device. Non-blocking, closed on exec.
pub(crate) fn open() -> Result<OwnedFd, Errno> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map(OwnedFd::from)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// The device that the descriptor will make shall have that index. `EINVAL`: it can't be one.
pub(crate) fn set_index(fd: &OwnedFd, index: u32) -> Result<(), Errno> {
    let mut index = libc::c_int::try_from(index).map_err(|_| Errno::INVAL)?;
    // SAFETY: TUNSETIFINDEX takes an int.
    unsafe { ioctl(fd.as_fd(), libc::TUNSETIFINDEX, &mut index) }.map(|_| ())
}

/// TUNSETCARRIER (Linux 5.0), which libc doesn't have: `_IOW('T', 226, int)`.
const TUNSETCARRIER: libc::Ioctl = 0x4004_54e2;

/// Whether the device shall say that it has a carrier.
pub(crate) fn set_carrier(fd: &OwnedFd, on: bool) -> Result<(), Errno> {
    let mut on = libc::c_int::from(on);
    // SAFETY: TUNSETCARRIER takes an int.
    unsafe { ioctl(fd.as_fd(), TUNSETCARRIER, &mut on) }.map(|_| ())
}

/// Makes the descriptor the (next) queue of the TAP device `name`; `create`: a new device, refused
/// with `EBUSY` if there is one of that name or of the index that was set. Gives the name, which the kernel makes from a template.
pub(crate) fn attach(
    fd: &OwnedFd,
    name: &str,
    create: bool,
    multi_queue: bool,
) -> Result<String, Errno> {
    let mut request = ifreq(name).ok_or(Errno::INVAL)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if create {
        flags |= libc::IFF_TUN_EXCL;
    }
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = (flags & 0xffff) as u16 as libc::c_short;
    // SAFETY: TUNSETIFF takes an ifreq without pointers.
    unsafe { ioctl(fd.as_fd(), libc::TUNSETIFF, &mut request)? };
    Ok(name_in(&request))
}

/// The device's name, wherever it is and whatever it was renamed to.
pub(crate) fn name(fd: &OwnedFd) -> Result<String, Errno> {
    let mut request = ifreq("").ok_or(Errno::INVAL)?;
    // SAFETY: TUNGETIFF fills an ifreq without pointers.
    unsafe { ioctl(fd.as_fd(), libc::TUNGETIFF, &mut request)? };
    Ok(name_in(&request))
}

fn name_in(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|byte| **byte != 0);
    String::from_utf8_lossy(&bytes.map(|byte| *byte as u8).collect::<Vec<_>>()).into_owned()
}

/// The virtio-net header is `bytes` long.
pub(crate) fn set_header_size(fd: &OwnedFd, bytes: usize) -> Result<(), Errno> {
    let mut bytes = bytes as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ takes an int.
    unsafe { ioctl(fd.as_fd(), libc::TUNSETVNETHDRSZ, &mut bytes) }.map(|_| ())
}

/// Lets the host leave checksums and segmentation to us: as much as the kernel knows.
pub(crate) fn set_offloads(fd: &OwnedFd) -> Result<TunOffloads, Errno> {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let set = |flags: libc::c_uint| {
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe {
            libc::ioctl(
                fd.as_raw_fd(),
                libc::TUNSETOFFLOAD as _,
                libc::c_ulong::from(flags),
            )
        })
    };
    match set(tcp | udp) {
        Ok(_) => Ok(TunOffloads {
            tcp: true,
            udp: true,
        }),
        Err(Errno::INVAL) => set(tcp).map(|_| TunOffloads {
            tcp: true,
            udp: false,
        }),
        Err(errno) => Err(errno),
    }
}

/// The network namespace in which the device now is. Needs CAP_NET_ADMIN there.
pub(crate) fn namespace(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    // SAFETY: TUNGETDEVNETNS takes no argument.
    let netns = check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETDEVNETNS as _, 0) })?;
    // SAFETY: the kernel made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(netns) })
}
