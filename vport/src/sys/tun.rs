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

/// A TAP that stops the host's queueing discipline when its own queue is full, instead of dropping (Linux 7.2 or
/// so), which libc doesn't have.
const IFF_BACKPRESSURE: libc::c_int = 0x0080;

/// Whether this kernel's TAPs do that.
pub(crate) fn stops_when_full(fd: &OwnedFd) -> bool {
    let mut features: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES fills an unsigned int.
    let told = unsafe { ioctl(fd.as_fd(), libc::TUNGETFEATURES, &mut features) };
    told.is_ok() && features & IFF_BACKPRESSURE as libc::c_uint != 0
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
    if stops_when_full(fd) {
        flags |= IFF_BACKPRESSURE;
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

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use frame::{Frame, Pool};

    use super::*;
    use crate::{AttachOptions, TxOutcome};

    const HEADER: usize = 10;

    fn test_frame(number: u8) -> Vec<u8> {
        let mut bytes = vec![number; 60];
        bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
        bytes
    }

    fn is_test_frame(bytes: &[u8]) -> bool {
        bytes.get(12..14) == Some(&[0x88, 0xb5])
    }

    /// As QEMU has it with `queues=2`: the device is that of whoever holds its queues, and we only attach
    /// to it.
    #[test]
    fn a_tap_whose_queues_another_has_is_a_system_port() {
        let run = || {
            #[expect(deprecated)] // the flag that makes it unsafe isn't used
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            let queues = [open().unwrap(), open().unwrap()];
            attach(&queues[0], "vm0", true, true).unwrap();
            attach(&queues[1], "vm0", false, true).unwrap();
            for words in ["link set vm0 addrgenmode none", "link set vm0 up"] {
                let mut ip = Command::new("ip");
                assert!(ip.args(words.split(' ')).status().unwrap().success());
            }
            let port = crate::attach("vm0", &AttachOptions::default()).unwrap();
            assert!(port.mode().starts_with("af_packet"), "{}", port.mode());
            let mut rx = port.open_queues().unwrap().remove(0);
            let (mut pool, mut out) = (Pool::default(), Vec::new());
            let end = Instant::now() + Duration::from_secs(5);
            // The guest sends, by either queue.
            let mut came = Vec::new();
            for (number, queue) in (1..).zip(&queues) {
                let bytes = [vec![0; HEADER], test_frame(number)].concat();
                assert_eq!(rustix::io::write(queue, &bytes), Ok(bytes.len()));
            }
            while came.len() < 2 && Instant::now() < end {
                rx.receive(&mut pool, &mut out, 32).unwrap();
                let ours = out.drain(..).filter(|frame| is_test_frame(frame.bytes()));
                came.extend(ours.map(|frame| frame.bytes().to_vec()));
            }
            came.sort();
            assert_eq!(came, [test_frame(1), test_frame(2)]);
            // It gets each frame once, by one of them.
            let mut outcome = TxOutcome::default();
            for number in 10..20 {
                let mut frames = vec![Frame::from_bytes(&test_frame(number))];
                port.transmit(&mut frames, &mut pool, &mut outcome);
            }
            assert_eq!((outcome.packets, outcome.refused_total()), (10, 0));
            let mut got = Vec::new();
            while got.len() < 10 && Instant::now() < end {
                for queue in &queues {
                    let mut bytes = [0; 2048];
                    if let Ok(length) = rustix::io::read(queue, &mut bytes) {
                        let bytes = &bytes[HEADER..length];
                        got.extend(is_test_frame(bytes).then(|| bytes[20]));
                    }
                }
            }
            got.sort_unstable();
            assert_eq!(got, (10..20).collect::<Vec<_>>());
            // The guest ends, and its device with it.
            drop(queues);
            while rx.receive(&mut pool, &mut out, 32).unwrap() != crate::RxStatus::Gone {
                assert!(Instant::now() < end, "the port isn't gone");
            }
        };
        std::thread::spawn(run).join().unwrap();
    }
}
