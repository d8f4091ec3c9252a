//! AF_PACKET sockets: their options, and whom they are bound to.
//!
//! Source: uapi `linux/if_packet.h`; packet(7).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::{check, set_option};

const PACKET_ADD_MEMBERSHIP: libc::c_int = 1;
const PACKET_STATISTICS: libc::c_int = 6;
const PACKET_AUXDATA: libc::c_int = 8;
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_FANOUT: libc::c_int = 18;
const PACKET_QDISC_BYPASS: libc::c_int = 20;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const PACKET_MR_PROMISC: u16 = 1;
const FANOUT_HASH: u32 = 0;
const FANOUT_FLAG_UNIQUEID: u32 = 0x2000;
const FANOUT_FLAG_IGNORE_OUTGOING: u32 = 0x4000;
const FANOUT_FLAG_DEFRAG: u32 = 0x8000;

/// `struct tpacket_stats`.
#[repr(C)]
struct Stats {
    packets: libc::c_uint,
    drops: libc::c_uint,
}

/// `struct packet_mreq`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Membership {
    ifindex: libc::c_int,
    kind: u16,
    address_length: u16,
    address: [u8; 8],
}

/// A SOCK_RAW packet socket: whole Ethernet frames. Non-blocking, closed on exec.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    fd: OwnedFd,
}

/// Where a socket is bound now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Binding {
    /// To this ifindex.
    Device(u32),
    /// The device is no more.
    Gone,
}

impl PacketSocket {
    /// Receives nothing until it is bound to a protocol.
    pub(crate) fn new() -> Result<Self, Errno> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no pointers.
        let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: the descriptor is new, so nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    fn set(&self, option: libc::c_int, value: libc::c_int) -> Result<(), Errno> {
        set_option(self.as_fd(), libc::SOL_PACKET, option, value)
    }

    /// A virtio-net header in front of each frame, both ways.
    pub(crate) fn set_vnet_header(&self) -> Result<(), Errno> {
        self.set(PACKET_VNET_HDR, 1)
    }

    /// The tag that the kernel took out of each frame, as a control message.
    pub(crate) fn set_auxdata(&self) -> Result<(), Errno> {
        self.set(PACKET_AUXDATA, 1)
    }

    /// Not what this host transmits on the device.
    pub(crate) fn set_ignore_outgoing(&self) -> Result<(), Errno> {
        self.set(PACKET_IGNORE_OUTGOING, 1)
    }

    /// Transmissions go to the driver, not to the queueing discipline.
    pub(crate) fn set_qdisc_bypass(&self) -> Result<(), Errno> {
        self.set(PACKET_QDISC_BYPASS, 1)
    }

    /// Only what a program of [`super::bpf::sayable`] lets through.
    pub(crate) fn set_filter(&self, program: BorrowedFd<'_>) -> Result<(), Errno> {
        set_option(
            self.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_BPF,
            program.as_raw_fd(),
        )
    }

    /// Everything again.
    pub(crate) fn remove_filter(&self) -> Result<(), Errno> {
        set_option(
            self.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            0 as libc::c_int,
        )
    }

    /// All frames on the wire, whomever they are for, while this socket lives.
    pub(crate) fn add_promiscuous(&self, ifindex: u32) -> Result<(), Errno> {
        let request = Membership {
            ifindex: ifindex as libc::c_int,
            kind: PACKET_MR_PROMISC,
            address_length: 0,
            address: [0; 8],
        };
        set_option(
            self.as_fd(),
            libc::SOL_PACKET,
            PACKET_ADD_MEMBERSHIP,
            request,
        )
    }

    /// Receives IPv4 fragments as the packets that they are of. Of a bound socket; before Linux 6.7 only if
    /// its device is up.
    pub(crate) fn defragment(&self) -> Result<(), Errno> {
        let flags =
            FANOUT_HASH | FANOUT_FLAG_UNIQUEID | FANOUT_FLAG_IGNORE_OUTGOING | FANOUT_FLAG_DEFRAG;
        self.set(PACKET_FANOUT, (flags << 16) as libc::c_int)
    }

    /// Receives only what this program (classic BPF) gives a length for.
    pub(crate) fn set_classic_filter(&self, program: &[libc::sock_filter]) -> Result<(), Errno> {
        super::set_filter(self.as_fd(), program)
    }

    /// To all devices; receives packets of one Ethernet type, as the host's own stack does: behind
    /// bridges, bonds, tags and traffic control.
    pub(crate) fn bind_protocol(&self, ethertype: u16) -> Result<(), Errno> {
        self.bind_to(0, ethertype)
    }

    /// Starts a group of sockets among which flows are spread by hash; gives the group's id.
    pub(crate) fn start_fanout(&self) -> Result<u16, Errno> {
        let flags = FANOUT_HASH | FANOUT_FLAG_UNIQUEID | FANOUT_FLAG_IGNORE_OUTGOING;
        self.set(PACKET_FANOUT, (flags << 16) as libc::c_int)?;
        let mut value: libc::c_int = 0;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: both point at locals of the lengths given.
        check(unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_FANOUT,
                std::ptr::from_mut(&mut value).cast(),
                &mut length,
            )
        })?;
        Ok((value & 0xffff) as u16)
    }

    /// Joins a group of [`start_fanout`](Self::start_fanout).
    pub(crate) fn join_fanout(&self, group: u16) -> Result<(), Errno> {
        let flags = FANOUT_HASH | FANOUT_FLAG_IGNORE_OUTGOING;
        self.set(
            PACKET_FANOUT,
            ((flags << 16) | u32::from(group)) as libc::c_int,
        )
    }

    /// To one device; `receive`: frames of all protocols, else none (a socket to send on).
    pub(crate) fn bind(&self, ifindex: u32, receive: bool) -> Result<(), Errno> {
        self.bind_to(ifindex, if receive { libc::ETH_P_ALL as u16 } else { 0 })
    }

    fn bind_to(&self, ifindex: u32, protocol: u16) -> Result<(), Errno> {
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = ifindex as libc::c_int;
        address.sll_protocol = protocol.to_be();
        // SAFETY: `address` is a local of the length given.
        check(unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        })
        .map(|_| ())
    }

    /// The kernel unbinds a socket when its device is unregistered or leaves the namespace.
    pub(crate) fn binding(&self) -> Result<Binding, Errno> {
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: both point at locals of the lengths given.
        check(unsafe {
            libc::getsockname(
                self.fd.as_raw_fd(),
                std::ptr::from_mut(&mut address).cast(),
                &mut length,
            )
        })?;
        Ok(match u32::try_from(address.sll_ifindex) {
            Ok(index) if index > 0 => Binding::Device(index),
            _ => Binding::Gone,
        })
    }

    /// Frames dropped for want of room since the last call (`tp_drops`; reading clears it).
    pub(crate) fn take_drops(&self) -> Result<u32, Errno> {
        let mut stats = Stats {
            packets: 0,
            drops: 0,
        };
        let mut length = size_of::<Stats>() as libc::socklen_t;
        // SAFETY: both point at locals of the lengths given.
        check(unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_STATISTICS,
                std::ptr::from_mut(&mut stats).cast(),
                &mut length,
            )
        })?;
        let _ = stats.packets; // frames received, drops included
        Ok(stats.drops)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
