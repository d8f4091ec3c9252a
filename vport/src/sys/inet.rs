//! UDP and raw IP sockets: what socket2 has no name for, and sendmmsg(2) with addresses, types of
//! service and segments.
//!
//! Source: ip(7), ipv6(7), udp(7); uapi `linux/udp.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use frame::Frame;
use rustix::io::Errno;

use super::{check, last, set_option};

/// Messages in one call.
pub(crate) const BATCH: usize = 32;
/// Datagrams of one message to be cut (`UDP_MAX_SEGMENTS` before Linux 6.9).
pub(crate) const SEGMENTS: usize = 64;

const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;
const UDP_NO_CHECK6_TX: libc::c_int = 101;
const UDP_NO_CHECK6_RX: libc::c_int = 102;
const IPV6_AUTOFLOWLABEL: libc::c_int = 70;
const IP_MTU: libc::c_int = 14;
const IPV6_MTU: libc::c_int = 24;

/// May the kernel cut what is sent.
pub(crate) fn set_dont_fragment(fd: BorrowedFd<'_>, v6: bool, dont: bool) -> Result<(), Errno> {
    let (level, option) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        true => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    // The values of both families are the same.
    let value = match dont {
        true => libc::IP_PMTUDISC_DO,
        false => libc::IP_PMTUDISC_DONT,
    };
    set_option(fd, level, option, value)
}

/// Sends without UDP checksums.
pub(crate) fn set_no_checksum(fd: BorrowedFd<'_>, v6: bool) -> Result<(), Errno> {
    let one: libc::c_int = 1;
    match v6 {
        false => set_option(fd, libc::SOL_SOCKET, libc::SO_NO_CHECK, one),
        true => set_option(fd, libc::IPPROTO_UDP, UDP_NO_CHECK6_TX, one),
    }
}

/// IPv6 packets have no flow label unless one is asked for.
pub(crate) fn set_no_flow_label(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let none: libc::c_int = 0;
    set_option(fd, libc::IPPROTO_IPV6, IPV6_AUTOFLOWLABEL, none)
}

/// Takes IPv6 datagrams without checksums.
pub(crate) fn take_no_checksum6(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let one: libc::c_int = 1;
    set_option(fd, libc::IPPROTO_UDP, UDP_NO_CHECK6_RX, one)
}

/// The kernel may put datagrams for this socket's port together.
pub(crate) fn set_gro(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let one: libc::c_int = 1;
    set_option(fd, libc::IPPROTO_UDP, UDP_GRO, one)
}

/// A classic BPF program that lets nothing in.
pub(crate) fn receive_nothing(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let program = [libc::sock_filter {
        code: 0x06, // BPF_RET | BPF_K
        jt: 0,
        jf: 0,
        k: 0,
    }];
    super::set_filter(fd, &program)
}

/// The path's MTU from a connected socket to its peer.
pub(crate) fn path_mtu(fd: BorrowedFd<'_>, v6: bool) -> Result<u32, Errno> {
    let (level, option) = match v6 {
        false => (libc::IPPROTO_IP, IP_MTU),
        true => (libc::IPPROTO_IPV6, IPV6_MTU),
    };
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both point at locals of the lengths given.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_mut(&mut value).cast(),
            &mut length,
        )
    })?;
    u32::try_from(value).map_err(|_| Errno::INVAL)
}

/// How a message is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    /// To whom.
    pub(crate) to: IpAddr,
    /// The UDP port; 0 for a raw socket.
    pub(crate) port: u16,
    /// From which address; None: the route's.
    pub(crate) from: Option<IpAddr>,
    /// Type of service, or traffic class.
    pub(crate) tos: u8,
    /// Time to live; 0: the kernel's default.
    pub(crate) ttl: u8,
    /// What routes, rules and policies may go by; 0: none.
    pub(crate) mark: u32,
}

/// One message: a datagram, or several of one length (the last may be shorter) that the kernel cuts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) envelope: Envelope,
    /// A datagram each.
    pub(crate) frames: &'a [Frame],
}

/// Control messages, laid out as cmsg(3) says.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control {
    bytes: [u8; 160],
    used: usize,
}

impl Control {
    fn new() -> Self {
        Self {
            bytes: [0; 160],
            used: 0,
        }
    }

    fn push(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        let header = size_of::<libc::cmsghdr>();
        let length = header + data.len();
        let Some(place) = self.bytes.get_mut(self.used..self.used + length) else {
            return;
        };
        let (head, body) = place.split_at_mut(header);
        let fields = length
            .to_ne_bytes()
            .into_iter()
            .chain(level.to_ne_bytes())
            .chain(kind.to_ne_bytes());
        head.iter_mut()
            .zip(fields)
            .for_each(|(to, from)| *to = from);
        body.copy_from_slice(data);
        self.used += length.next_multiple_of(align_of::<libc::cmsghdr>());
    }

    fn of(message: &Message<'_>) -> Self {
        let mut control = Self::new();
        let Envelope {
            to,
            from,
            tos,
            ttl,
            mark,
            ..
        } = message.envelope;
        let word = |value: u8| libc::c_int::from(value).to_ne_bytes();
        let (level, tos_kind, ttl_kind) = match to {
            IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS, libc::IP_TTL),
            IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, libc::IPV6_HOPLIMIT),
        };
        control.push(level, tos_kind, &word(tos));
        if ttl != 0 {
            control.push(level, ttl_kind, &word(ttl));
        }
        if mark != 0 {
            control.push(libc::SOL_SOCKET, libc::SO_MARK, &mark.to_ne_bytes());
        }
        match from {
            Some(IpAddr::V4(address)) => {
                // `struct in_pktinfo`: index, the address to send from, (that of the header).
                let mut info = [0; 12];
                info[4..8].copy_from_slice(&address.octets());
                control.push(level, libc::IP_PKTINFO, &info);
            }
            Some(IpAddr::V6(address)) => {
                // `struct in6_pktinfo`: the address, index.
                let mut info = [0; 20];
                info[..16].copy_from_slice(&address.octets());
                control.push(level, libc::IPV6_PKTINFO, &info);
            }
            None => {}
        }
        if let [first, _, ..] = message.frames {
            let size = u16::try_from(first.len()).unwrap_or(u16::MAX);
            control.push(libc::IPPROTO_UDP, UDP_SEGMENT, &size.to_ne_bytes());
        }
        control
    }
}

/// Sends up to [`BATCH`] messages of the front of `messages` without blocking. Gives how many the kernel
/// took; an error is about the first.
pub(crate) fn send(fd: BorrowedFd<'_>, messages: &[Message<'_>]) -> Result<usize, Errno> {
    let messages = messages.get(..BATCH).unwrap_or(messages);
    let mut controls: Vec<Control> = messages.iter().map(Control::of).collect();
    let mut addresses: Vec<Address> = messages
        .iter()
        .map(|message| Address::new(message.envelope.to, message.envelope.port))
        .collect();
    let mut vectors: Vec<libc::iovec> = messages
        .iter()
        .flat_map(|message| message.frames)
        .map(|frame| libc::iovec {
            iov_base: frame.bytes().as_ptr().cast_mut().cast(),
            iov_len: frame.len(),
        })
        .collect();
    let mut headers = Vec::with_capacity(messages.len());
    let mut rest = vectors.as_mut_slice();
    for ((message, control), address) in messages.iter().zip(&mut controls).zip(&mut addresses) {
        let Some((own, others)) = rest.split_at_mut_checked(message.frames.len()) else {
            return Err(Errno::INVAL);
        };
        rest = others;
        // SAFETY: all-zero is valid for mmsghdr: null pointers and zero lengths.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        (header.msg_hdr.msg_name, header.msg_hdr.msg_namelen) = address.raw();
        header.msg_hdr.msg_iov = own.as_mut_ptr();
        header.msg_hdr.msg_iovlen = own.len() as _;
        header.msg_hdr.msg_control = control.bytes.as_mut_ptr().cast();
        header.msg_hdr.msg_controllen = control.used as _;
        headers.push(header);
    }
    // SAFETY: the headers point at addresses, vectors and controls (locals, not moved since) and at the
    // bytes of the messages' frames, borrowed until the call returns; the kernel only reads them.
    let sent = unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr(),
            headers.len() as libc::c_uint,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(sent)
        .map(|n| n.min(messages.len()))
        .map_err(|_| last())
}

/// A socket address of either family.
enum Address {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl Address {
    fn new(address: IpAddr, port: u16) -> Self {
        match address {
            IpAddr::V4(address) => Self::V4(v4(address, port)),
            IpAddr::V6(address) => Self::V6(v6(address, port)),
        }
    }

    fn raw(&mut self) -> (*mut libc::c_void, libc::socklen_t) {
        match self {
            Self::V4(address) => (
                std::ptr::from_mut(address).cast(),
                size_of::<libc::sockaddr_in>() as libc::socklen_t,
            ),
            Self::V6(address) => (
                std::ptr::from_mut(address).cast(),
                size_of::<libc::sockaddr_in6>() as libc::socklen_t,
            ),
        }
    }
}

fn v4(address: Ipv4Addr, port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.octets()),
        },
        sin_zero: [0; 8],
    }
}

fn v6(address: Ipv6Addr, port: u16) -> libc::sockaddr_in6 {
    libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: port.to_be(),
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr {
            s6_addr: address.octets(),
        },
        sin6_scope_id: 0,
    }
}

/// The size of the buffers of a socket: of what it receives, or of what it sends.
pub(crate) fn set_buffer(fd: impl AsFd, bytes: usize, receive: bool) -> Result<(), Errno> {
    use rustix::net::sockopt;
    // Beyond the system's limit only with CAP_NET_ADMIN in the initial user namespace.
    match receive {
        true => sockopt::set_socket_recv_buffer_size_force(&fd, bytes)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(&fd, bytes)),
        false => sockopt::set_socket_send_buffer_size_force(&fd, bytes)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&fd, bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_lie_as_the_kernel_reads_them() {
        let frames = [Frame::from_bytes(&[7; 100]), Frame::from_bytes(&[7; 10])];
        let message = Message {
            envelope: Envelope {
                to: IpAddr::V4(Ipv4Addr::LOCALHOST),
                port: 4789,
                from: Some(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1))),
                tos: 0xb8,
                ttl: 64,
                mark: 9,
            },
            frames: &frames,
        };
        let control = Control::of(&message);
        assert_eq!(control.used, 24 + 24 + 24 + 32 + 24);
        assert_eq!(control.bytes[..8], 20_usize.to_ne_bytes());
        assert_eq!(control.bytes[16..20], 0xb8_u32.to_ne_bytes());
        assert_eq!(control.bytes[64..68], 9_u32.to_ne_bytes());
        assert_eq!(control.bytes[92..96], [10, 0, 0, 1]);
        assert_eq!(control.bytes[120..122], 100_u16.to_ne_bytes());
    }
}
