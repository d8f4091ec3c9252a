//! The contract between the interposer (`libovs_compat.so`) and the daemon: how netlink travels
//! over a UNIX socket. Constants and byte layouts only; no dependency, no allocation, no panic,
//! so that code which runs inside other people's programs can use it.
//!
//! # The connection
//! `RUNDIR/ovs-dpd.sock`, `AF_UNIX`, `SOCK_SEQPACKET`. One connection stands for one netlink
//! socket of the client. The client sends a [`Hello`], the daemon answers with a [`Welcome`]; if
//! its status is not [`Status::Ok`] the daemon closes. From then on each datagram, in either
//! direction, holds one or more netlink messages, as a datagram of a netlink socket would, in
//! host byte order.
//!
//! A connection of another protocol than [`NETLINK_GENERIC`] ([`NETLINK_NETFILTER`],
//! [`NETLINK_ROUTE`]) carries that protocol's messages. Of NETLINK_ROUTE it carries single requests only,
//! those that may be about the daemon's links; to one that isn't it says so ([`not_ours`]).
//!
//! # From the client, besides requests
//! Every datagram ends with a **barrier** ([`barrier`]): `NLMSG_NOOP | REQUEST | ACK`, aligned to
//! 4, with a cookie in `nlmsg_seq` and [`BARRIER_PID`] in `nlmsg_pid`. A datagram can also be a
//! barrier alone (the client asks again), or a barrier can be in the datagram behind.
//! A **control** message ([`Control`]) says what a netlink client says by `setsockopt`; it has no
//! answer. A **reflect** message ([`REFLECT`]) comes back. Both come in datagrams of their own,
//! without a barrier.
//!
//! # From the daemon
//! - A barrier's ack ([`barrier_ack`]) is a **datagram of its own**, never behind other messages.
//!   It leaves when everything that the connection sent before it has been answered in full: also
//!   a dump, to its `NLMSG_DONE`, and a request that sleeps. Acks go out in the order of their
//!   barriers. An ack with a newer one behind it and nothing between may be left out; the newest
//!   may never be.
//! - The daemon **never stops reading** a connection because its client doesn't read: answers that
//!   find no room within the daemon's own bound are dropped, as netlink drops them, and
//!   [`overrun`] tells once. (Else a client that pipelines requests would block for ever in
//!   `send`, which netlink never does.)
//! - [`overrun`], a datagram of its own, becomes `ENOBUFS` at the receive that meets it.
//! - A datagram of length 0 is never sent: to the client it is the end of file. Nor are file
//!   descriptors.
//! - The end of file is the death of the daemon, or its refusal to go on with this client.
//!
//! # Numbers that can't be mistaken for the kernel's
//! A client that outlives the daemon keeps its numbers and may show them to the real kernel.
//! So none of them can mean anything there:
//! - family ids are [`family_id`]: above `GENL_MAX_ID` (1023), where the kernel answers ENOENT;
//! - multicast groups are [`GROUP_BASE`] and up, where a membership gives EINVAL;
//! - port ids are in [`PORT_ID_FIRST`]..=[`PORT_ID_LAST`]: the kernel's own choices are process
//!   ids (below 2^22) and negative numbers, so that a socket moved back to the kernel can keep
//!   its id. The daemon starts at a random one and never uses one twice in its life.

/// Name of the socket inside the run directory.
pub const SOCKET_NAME: &str = "ovs-dpd.sock";
/// Directory inside the run directory with the marks of the daemon's links: an empty file `NAME` and one
/// `:IFINDEX` for each.
pub const LINKS_NAME: &str = "links";
/// The run directory when neither an option nor [`RUNDIR_ENV`] names one.
pub const DEFAULT_RUNDIR: &str = "/run/ovs-dpd";
/// Environment variable with the run directory.
pub const RUNDIR_ENV: &str = "OVS_DPD_RUNDIR";

/// First four bytes of [`Hello`] and [`Welcome`], "ovsd" in host byte order.
pub const MAGIC: u32 = u32::from_ne_bytes(*b"ovsd");
/// Version of this contract: only equal versions talk.
pub const VERSION: u32 = 1;

/// `NETLINK_ROUTE` (linux/netlink.h).
pub const NETLINK_ROUTE: u32 = 0;
/// `NETLINK_NETFILTER` (linux/netlink.h).
pub const NETLINK_NETFILTER: u32 = 12;
/// `NETLINK_GENERIC` (linux/netlink.h).
pub const NETLINK_GENERIC: u32 = 16;

/// The six generic-netlink families, in the order of their ids.
pub const FAMILIES: [&str; 6] = [
    "ovs_datapath",
    "ovs_vport",
    "ovs_flow",
    "ovs_packet",
    "ovs_meter",
    "ovs_ct_limit",
];
/// Id of the first family ("Op"): see the module's head for why it is so high.
pub const FAMILY_ID_BASE: u16 = 0x4f70;
/// First multicast group id. `GROUP_BASE + i` for i in 0..64 may be used.
pub const GROUP_BASE: u32 = 0x4f70;
/// How many multicast group ids there are from [`GROUP_BASE`] on.
pub const GROUP_COUNT: u32 = 64;
/// Lowest port id that the daemon gives.
pub const PORT_ID_FIRST: u32 = 0x4000_0000;
/// Highest port id that the daemon gives.
pub const PORT_ID_LAST: u32 = 0x7fff_ffff;

/// Id of the family at `index` in [`FAMILIES`].
#[must_use]
pub const fn family_id(index: u16) -> u16 {
    FAMILY_ID_BASE + index
}

/// Index in [`FAMILIES`] of the family with this `nlmsg_type`, if it is one of ours.
#[must_use]
pub fn family_of(nlmsg_type: u16) -> Option<usize> {
    let index = usize::from(nlmsg_type.checked_sub(FAMILY_ID_BASE)?);
    (index < FAMILIES.len()).then_some(index)
}

/// Whether a multicast group id is one of the daemon's.
#[must_use]
pub fn is_group(group: u32) -> bool {
    group
        .checked_sub(GROUP_BASE)
        .is_some_and(|bit| bit < GROUP_COUNT)
}

/// `NLMSG_NOOP`.
pub const NLMSG_NOOP: u16 = 1;
/// `NLMSG_ERROR`.
pub const NLMSG_ERROR: u16 = 2;
/// `NLMSG_OVERRUN`.
pub const NLMSG_OVERRUN: u16 = 4;
/// `nlmsg_type` of a [`Control`] message: reserved by netlink (below `NLMSG_MIN_TYPE`), and
/// meant only beside [`BARRIER_PID`] in `nlmsg_pid`.
pub const CONTROL: u16 = 0x0f;
/// `nlmsg_type` of a reflect message (with [`BARRIER_PID`] in `nlmsg_pid`): what follows its
/// 16-byte header, up to the datagram's end, is sent back to the client as one datagram, in order with the
/// answers to what came before. So an answer that the client got elsewhere (from the real kernel)
/// takes its place in the stream, where `poll` sees it. An empty one is ignored.
pub const REFLECT: u16 = 0x0e;
/// `nlmsg_type` of a [`not_ours`] message.
pub const NOT_OURS: u16 = 0x0d;
/// `NLM_F_REQUEST`.
pub const NLM_F_REQUEST: u16 = 1;
/// `NLM_F_ACK`.
pub const NLM_F_ACK: u16 = 4;
/// `NLM_F_CAPPED`: set in the ack of a success.
pub const NLM_F_CAPPED: u16 = 0x100;

/// `nlmsg_pid` of barriers, their acks, control and reflect messages. No port id.
pub const BARRIER_PID: u32 = 0xba77_1e75;
/// Length of `struct nlmsghdr`.
pub const NLMSGHDR_LEN: usize = 16;
/// Length of a barrier.
pub const BARRIER_LEN: usize = NLMSGHDR_LEN;
/// Length of a barrier's ack: header, `s32` error, the barrier.
pub const BARRIER_ACK_LEN: usize = NLMSGHDR_LEN + 4 + NLMSGHDR_LEN;
/// Length of a [`Control`] message.
pub const CONTROL_LEN: usize = NLMSGHDR_LEN + 8;

/// `struct nlmsghdr` (linux/netlink.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Length with this header, in bytes.
    pub len: u32,
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub seq: u32,
    /// `nlmsg_pid`.
    pub pid: u32,
}

impl Header {
    /// As bytes, host byte order.
    #[must_use]
    pub fn to_bytes(self) -> [u8; NLMSGHDR_LEN] {
        let mut out = Writer::<NLMSGHDR_LEN>::new();
        out.u32(self.len);
        out.u16(self.kind);
        out.u16(self.flags);
        out.u32(self.seq);
        out.u32(self.pid);
        out.bytes
    }

    /// From the first 16 bytes of `bytes`; None if there are fewer. `len` is not checked.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            len: u32_at(bytes, 0)?,
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            seq: u32_at(bytes, 8)?,
            pid: u32_at(bytes, 12)?,
        })
    }
}

/// The barrier that ends each datagram of a client.
#[must_use]
pub fn barrier(cookie: u32) -> [u8; BARRIER_LEN] {
    barrier_header(cookie).to_bytes()
}

fn barrier_header(cookie: u32) -> Header {
    Header {
        len: BARRIER_LEN as u32,
        kind: NLMSG_NOOP,
        flags: NLM_F_REQUEST | NLM_F_ACK,
        seq: cookie,
        pid: BARRIER_PID,
    }
}

/// The cookie, if this message's header is that of a barrier.
#[must_use]
pub fn barrier_cookie(header: Header) -> Option<u32> {
    (header == barrier_header(header.seq)).then_some(header.seq)
}

/// The datagram that answers a barrier: what netlink answers to a NOOP that asks for an ack.
#[must_use]
pub fn barrier_ack(cookie: u32) -> [u8; BARRIER_ACK_LEN] {
    let mut out = Writer::<BARRIER_ACK_LEN>::new();
    out.put(
        &Header {
            len: BARRIER_ACK_LEN as u32,
            kind: NLMSG_ERROR,
            flags: NLM_F_CAPPED,
            seq: cookie,
            pid: BARRIER_PID,
        }
        .to_bytes(),
    );
    out.u32(0);
    out.put(&barrier(cookie));
    out.bytes
}

/// The cookie, if this whole datagram is a barrier's ack.
#[must_use]
pub fn ack_cookie(datagram: &[u8]) -> Option<u32> {
    let header = Header::parse(datagram)?;
    (datagram == barrier_ack(header.seq)).then_some(header.seq)
}

/// The datagram that says "messages for you were lost".
#[must_use]
pub fn overrun() -> [u8; NLMSGHDR_LEN] {
    Header {
        len: NLMSGHDR_LEN as u32,
        kind: NLMSG_OVERRUN,
        flags: 0,
        seq: 0,
        pid: 0,
    }
    .to_bytes()
}

/// Whether this whole datagram is an [`overrun`].
#[must_use]
pub fn is_overrun(datagram: &[u8]) -> bool {
    datagram == overrun()
}

/// What a client says by other means than messages: `setsockopt(SOL_NETLINK)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// What to do.
    pub op: ControlOp,
    /// A group id, or 0 and 1 for off and on.
    pub value: u32,
}

/// The options of `SOL_NETLINK` that reach the daemon, with their numbers of linux/netlink.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ControlOp {
    /// `NETLINK_ADD_MEMBERSHIP`: value is a group id.
    AddMembership = 1,
    /// `NETLINK_DROP_MEMBERSHIP`: value is a group id.
    DropMembership = 2,
    /// `NETLINK_BROADCAST_ERROR`.
    BroadcastError = 4,
    /// `NETLINK_NO_ENOBUFS`: lose silently.
    NoEnobufs = 5,
    /// `NETLINK_LISTEN_ALL_NSID`.
    ListenAllNsid = 8,
    /// `NETLINK_CAP_ACK`: errors carry the request's header only.
    CapAck = 10,
    /// `NETLINK_EXT_ACK`: errors carry attributes.
    ExtAck = 11,
    /// `NETLINK_GET_STRICT_CHK`.
    GetStrictChk = 12,
}

impl ControlOp {
    /// By the number of linux/netlink.h.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::AddMembership,
            2 => Self::DropMembership,
            4 => Self::BroadcastError,
            5 => Self::NoEnobufs,
            8 => Self::ListenAllNsid,
            10 => Self::CapAck,
            11 => Self::ExtAck,
            12 => Self::GetStrictChk,
            _ => return None,
        })
    }
}

impl Control {
    /// As a netlink message.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CONTROL_LEN] {
        let mut out = Writer::<CONTROL_LEN>::new();
        out.put(
            &Header {
                len: CONTROL_LEN as u32,
                kind: CONTROL,
                flags: NLM_F_REQUEST,
                seq: 0,
                pid: BARRIER_PID,
            }
            .to_bytes(),
        );
        out.u32(self.op as u32);
        out.u32(self.value);
        out.bytes
    }

    /// From a whole message, header included; None if it isn't one (or an operation of another
    /// version).
    #[must_use]
    pub fn parse(message: &[u8]) -> Option<Self> {
        let header = Header::parse(message)?;
        if header.kind != CONTROL || header.pid != BARRIER_PID {
            return None;
        }
        Some(Self {
            op: ControlOp::from_number(u32_at(message, 16)?)?,
            value: u32_at(message, 20)?,
        })
    }
}

/// The daemon's answer to a request (with this `nlmsg_seq`) that is about nothing of its own, on a
/// connection of another protocol than [`NETLINK_GENERIC`]: it was not done, and is the kernel's. In place
/// of all other answers, an ack included; a datagram of its own.
#[must_use]
pub fn not_ours(seq: u32) -> [u8; NLMSGHDR_LEN] {
    Header {
        len: NLMSGHDR_LEN as u32,
        kind: NOT_OURS,
        flags: 0,
        seq,
        pid: BARRIER_PID,
    }
    .to_bytes()
}

/// Whether this datagram is a [`not_ours`] message.
#[must_use]
pub fn is_not_ours(datagram: &[u8]) -> bool {
    datagram.len() == NLMSGHDR_LEN
        && Header::parse(datagram)
            .is_some_and(|header| header.kind == NOT_OURS && header.pid == BARRIER_PID)
}

/// The header of a reflect message in front of `payload` bytes; None if they are too many.
#[must_use]
pub fn reflect_header(payload: usize) -> Option<[u8; NLMSGHDR_LEN]> {
    let len = u32::try_from(payload.checked_add(NLMSGHDR_LEN)?).ok()?;
    let flags = NLM_F_REQUEST;
    Some(
        Header {
            len,
            kind: REFLECT,
            flags,
            seq: 0,
            pid: BARRIER_PID,
        }
        .to_bytes(),
    )
}

/// What is to be sent back, if this whole datagram is a reflect message.
#[must_use]
pub fn reflected(datagram: &[u8]) -> Option<&[u8]> {
    let header = Header::parse(datagram)?;
    let ours = header.kind == REFLECT && header.pid == BARRIER_PID;
    if ours {
        datagram.get(NLMSGHDR_LEN..)
    } else {
        None
    }
}

/// A network namespace: device and inode of `/proc/thread-self/ns/net` (0, 0 if unknown, which
/// equals no other).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Netns {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

/// Length of a [`Hello`].
pub const HELLO_LEN: usize = 32;

/// The client's first datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// [`VERSION`] of the client.
    pub version: u32,
    /// [`NETLINK_GENERIC`], ...
    pub protocol: u32,
    /// That of the thread which opened the socket.
    pub netns: Netns,
}

impl Hello {
    /// As bytes: magic, version, protocol, 0 (u32 each), device, inode (u64 each).
    #[must_use]
    pub fn to_bytes(self) -> [u8; HELLO_LEN] {
        let mut out = Writer::<HELLO_LEN>::new();
        out.u32(MAGIC);
        out.u32(self.version);
        out.u32(self.protocol);
        out.u32(0);
        out.u64(self.netns.dev);
        out.u64(self.netns.ino);
        out.bytes
    }

    /// None if this is no hello. One of another version is returned, so that it can be told so:
    /// magic and version keep their place for ever.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < HELLO_LEN || u32_at(bytes, 0)? != MAGIC {
            return None;
        }
        Some(Self {
            version: u32_at(bytes, 4)?,
            protocol: u32_at(bytes, 8)?,
            netns: Netns {
                dev: u64_at(bytes, 16)?,
                ino: u64_at(bytes, 24)?,
            },
        })
    }
}

/// How the daemon receives a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Netlink follows.
    Ok = 0,
    /// Another [`VERSION`].
    OtherVersion = 1,
    /// The client is in another network namespace.
    OtherNetns = 2,
    /// This netlink protocol isn't served.
    OtherProtocol = 3,
    /// No room for another connection.
    Full = 4,
}

impl Status {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Ok,
            1 => Self::OtherVersion,
            2 => Self::OtherNetns,
            3 => Self::OtherProtocol,
            4 => Self::Full,
            _ => return None,
        })
    }
}

/// Length of a [`Welcome`].
pub const WELCOME_LEN: usize = 40;

/// The daemon's first datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// [`VERSION`] of the daemon.
    pub version: u32,
    /// Anything but `Ok` is the last word.
    pub status: Status,
    /// Port id (`nl_pid`) of this socket; 0 if refused.
    pub port_id: u32,
    /// The daemon's own.
    pub netns: Netns,
    /// A random number of this daemon's life.
    pub instance: u64,
}

impl Welcome {
    /// As bytes: magic, version, status, port id (u32 each), device, inode, instance (u64 each).
    #[must_use]
    pub fn to_bytes(self) -> [u8; WELCOME_LEN] {
        let mut out = Writer::<WELCOME_LEN>::new();
        out.u32(MAGIC);
        out.u32(self.version);
        out.u32(self.status as u32);
        out.u32(self.port_id);
        out.u64(self.netns.dev);
        out.u64(self.netns.ino);
        out.u64(self.instance);
        out.bytes
    }

    /// None if this is no welcome. The status of another version reads as `OtherVersion`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < WELCOME_LEN || u32_at(bytes, 0)? != MAGIC {
            return None;
        }
        let version = u32_at(bytes, 4)?;
        let status = if version == VERSION {
            Status::from_number(u32_at(bytes, 8)?)?
        } else {
            Status::OtherVersion
        };
        Some(Self {
            version,
            status,
            port_id: u32_at(bytes, 12)?,
            netns: Netns {
                dev: u64_at(bytes, 16)?,
                ino: u64_at(bytes, 24)?,
            },
            instance: u64_at(bytes, 32)?,
        })
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_ne_bytes)
}

/// Fills an array from its start; what doesn't fit is left out (the tests below show that all
/// does).
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    fn new() -> Self {
        Self {
            bytes: [0; N],
            at: 0,
        }
    }

    fn put(&mut self, value: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.at).zip(value) {
            *to = *from;
        }
        self.at = self.at.saturating_add(value.len());
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_ne_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_ne_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_and_welcome_survive_the_wire() {
        let netns = Netns {
            dev: 4,
            ino: 4_026_531_840,
        };
        let hello = Hello {
            version: VERSION,
            protocol: NETLINK_GENERIC,
            netns,
        };
        assert_eq!(Hello::parse(&hello.to_bytes()), Some(hello));
        let welcome = Welcome {
            version: VERSION,
            status: Status::OtherNetns,
            port_id: PORT_ID_LAST,
            netns,
            instance: u64::MAX - 1,
        };
        assert_eq!(Welcome::parse(&welcome.to_bytes()), Some(welcome));
        assert_eq!(Hello::parse(&welcome.to_bytes()[..31]), None);
        assert_eq!(Welcome::parse(&[]), None);
    }

    #[test]
    fn a_barrier_is_known_by_its_ack_and_by_nothing_else() {
        let header = Header::parse(&barrier(7)).unwrap();
        assert_eq!(barrier_cookie(header), Some(7));
        assert_eq!(barrier_cookie(Header { pid: 7, ..header }), None);
        let ack = barrier_ack(u32::MAX);
        assert_eq!(ack_cookie(&ack), Some(u32::MAX));
        assert_eq!(ack_cookie(&ack[..35]), None);
        let mut other = ack;
        other[12] ^= 1;
        assert_eq!(ack_cookie(&other), None);
    }

    #[test]
    fn control_overrun_and_reflect_survive_the_wire() {
        let control = Control {
            op: ControlOp::AddMembership,
            value: GROUP_BASE + 1,
        };
        assert_eq!(Control::parse(&control.to_bytes()), Some(control));
        assert!(is_overrun(&overrun()));
        let mut datagram = reflect_header(3).unwrap().to_vec();
        datagram.extend(b"abc");
        assert_eq!(reflected(&datagram), Some(&b"abc"[..]));
        assert_eq!(reflected(&overrun()), None);
    }

    #[test]
    fn family_ids_are_beyond_the_kernels() {
        assert_eq!(family_of(FAMILY_ID_BASE), Some(0));
        assert_eq!(family_of(family_id(5)), Some(5));
        assert_eq!(family_of(family_id(6)), None);
        assert_eq!(family_of(0x10), None);
        const { assert!(FAMILY_ID_BASE > 1023) };
    }
}
