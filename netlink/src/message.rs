//! Messages: `struct nlmsghdr`, `struct genlmsghdr`, `struct ovs_header` (uapi `linux/netlink.h`,
//! `linux/genetlink.h`, `linux/openvswitch.h`), all in host order.
//!
//! [`Messages`] walks a datagram without trust; [`begin`] and [`finish`] write. What stands behind a
//! header that [`Messages`] gave is exactly `nlmsg_len` bytes.

use crate::attr::{self, Writer};
use crate::errno::Errno;
use crate::family::Family;
use crate::policy::Rule;

/// Bytes of `struct nlmsghdr`.
pub const NLMSG_HEADER: usize = 16;
/// Bytes of `struct genlmsghdr`.
pub const GENL_HEADER: usize = 4;
/// Bytes of `struct ovs_header`.
pub const OVS_HEADER: usize = 4;
/// Where the attributes of a message of our families begin.
pub const ATTRIBUTES: usize = NLMSG_HEADER + GENL_HEADER + OVS_HEADER;

/// `nlmsg_type` below `NLMSG_MIN_TYPE`: control.
pub mod control {
    /// `NLMSG_NOOP`
    pub const NOOP: u16 = 1;
    /// `NLMSG_ERROR`
    pub const ERROR: u16 = 2;
    /// `NLMSG_DONE`
    pub const DONE: u16 = 3;
    /// `NLMSG_OVERRUN`
    pub const OVERRUN: u16 = 4;
    /// `NLMSG_MIN_TYPE`
    pub const MIN_TYPE: u16 = 16;
}

/// `NLM_F_*`
pub mod flags {
    /// It is a request.
    pub const REQUEST: u16 = 0x1;
    /// One of several, ended by DONE.
    pub const MULTI: u16 = 0x2;
    /// Answer, also when it succeeded.
    pub const ACK: u16 = 0x4;
    /// The requester wants the notification.
    pub const ECHO: u16 = 0x8;
    /// Return the whole table (`NLM_F_ROOT | NLM_F_MATCH`).
    pub const DUMP: u16 = 0x300;
    /// On a NEW: replace what is there.
    pub const REPLACE: u16 = 0x100;
    /// On a NEW: fail if it is there.
    pub const EXCL: u16 = 0x200;
    /// On a NEW: create.
    pub const CREATE: u16 = 0x400;
    /// On an error: the request's payload was left out.
    pub const CAPPED: u16 = 0x100;
    /// On an error: extended-ack attributes follow.
    pub const ACK_TLVS: u16 = 0x200;
}

/// `struct nlmsghdr` as meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the message, this header included, padding not.
    pub len: u32,
    /// Family id, or [`control`].
    pub kind: u16,
    /// [`flags`]
    pub flags: u16,
    /// Chosen by the requester.
    pub seq: u32,
    /// Port id; in requests whatever the client wrote there.
    pub pid: u32,
}

impl Header {
    /// The first 16 bytes.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (len, rest) = bytes.split_first_chunk()?;
        let (kind, rest) = rest.split_first_chunk()?;
        let (flags, rest) = rest.split_first_chunk()?;
        let (seq, rest) = rest.split_first_chunk()?;
        let (pid, _) = rest.split_first_chunk()?;
        Some(Self {
            len: u32::from_ne_bytes(*len),
            kind: u16::from_ne_bytes(*kind),
            flags: u16::from_ne_bytes(*flags),
            seq: u32::from_ne_bytes(*seq),
            pid: u32::from_ne_bytes(*pid),
        })
    }

    /// As bytes.
    pub fn emit(&self, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&self.len.to_ne_bytes());
        buffer.extend_from_slice(&self.kind.to_ne_bytes());
        buffer.extend_from_slice(&self.flags.to_ne_bytes());
        buffer.extend_from_slice(&self.seq.to_ne_bytes());
        buffer.extend_from_slice(&self.pid.to_ne_bytes());
    }

    /// Whether all of these flags are set.
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }
}

/// Walks the messages of a datagram: each with its header and its bytes (header included, padding
/// not). A header that is short or lies about its length ends the walk, as in the kernel.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    /// Over one datagram.
    pub fn new(datagram: &'a [u8]) -> Self {
        Self { rest: datagram }
    }

    /// What hasn't been walked.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = (Header, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let header = Header::parse(self.rest)?;
        let len = usize::try_from(header.len).ok()?;
        if len < NLMSG_HEADER {
            return None;
        }
        let message = self.rest.get(..len)?;
        self.rest = self.rest.get(attr::align(len)..).unwrap_or_default();
        Some((header, message))
    }
}

/// Where a message began. See [`begin`].
#[derive(Debug)]
#[must_use]
pub struct Begun(usize);

/// Opens a message of one of our families at the end of `buffer`, whose length is a multiple of 4:
/// its three headers, with the length still open.
pub fn begin(
    buffer: &mut Vec<u8>,
    family: Family,
    command: u8,
    dp_ifindex: i32,
    flags: u16,
    seq: u32,
    pid: u32,
) -> Begun {
    let start = buffer.len();
    Header {
        len: 0,
        kind: family.id(),
        flags,
        seq,
        pid,
    }
    .emit(buffer);
    buffer.extend_from_slice(&[command, family.version(), 0, 0]);
    buffer.extend_from_slice(&dp_ifindex.to_ne_bytes());
    Begun(start)
}

/// Closes a message: its length is what was appended since [`begin`].
pub fn finish(buffer: &mut [u8], begun: Begun) {
    let len = buffer.len().saturating_sub(begun.0) as u32;
    if let Some(field) = buffer.get_mut(begun.0..begun.0 + 4) {
        field.copy_from_slice(&len.to_ne_bytes());
    }
}

/// Writes all of an upcall but the packet into `head` (which is cleared): headers with pid, seq and
/// flags 0, the attributes that `build` writes, and the header of `OVS_PACKET_ATTR_PACKET`, the last
/// attribute. `nlmsg_len` covers the `packet_len` bytes to come and, unless `unaligned`
/// (`OVS_DP_F_UNALIGNED`), padding to 4, which [`Hub::upcall`](crate::hub::Hub::upcall) adds.
///
/// # Errors
/// EMSGSIZE for a packet of more than 65,531 bytes, and what `build` says.
pub fn upcall_head(
    head: &mut Vec<u8>,
    command: u8,
    dp_ifindex: i32,
    packet_len: usize,
    unaligned: bool,
    build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
) -> Result<(), Errno> {
    const ATTR_PACKET: u16 = 1;
    head.clear();
    let attr_len = u16::try_from(packet_len + attr::HEADER).map_err(|_| Errno::EMSGSIZE)?;
    let _ = begin(head, Family::Packet, command, dp_ifindex, 0, 0, 0);
    build(&mut Writer::new(head))?;
    head.extend_from_slice(&attr_len.to_ne_bytes());
    head.extend_from_slice(&ATTR_PACKET.to_ne_bytes());
    let len = head.len()
        + if unaligned {
            packet_len
        } else {
            attr::align(packet_len)
        };
    if let Some(field) = head.get_mut(..4) {
        field.copy_from_slice(&(len as u32).to_ne_bytes());
    }
    Ok(())
}

/// A request to one of our families, after generic netlink's own checks: the operation exists, the
/// peer may ask for it, and (but for dumps) each top-level attribute has the form of its
/// [policy](crate::policy).
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its family.
    pub family: Family,
    /// Its command, which is one of [`Family::ops`].
    pub command: u8,
    /// The family version that the client wrote (which changes the meaning of one DP_NEW).
    pub version: u8,
    /// [`flags`]
    pub flags: u16,
    /// `nlmsg_seq`
    pub seq: u32,
    /// From the `ovs_header`.
    pub dp_ifindex: i32,
    /// Attributes and whatever trails them.
    pub attrs: &'a [u8],
    /// The true id of the client's socket, unique for the daemon's life, never 0.
    pub port_id: u32,
    /// Whether the peer may change state. Requests that need it are refused before the handler.
    pub privileged: bool,
}

impl<'a> Request<'a> {
    /// Whether all of these flags are set.
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// Its attributes with a type below `N`.
    pub fn table<const N: usize>(&self) -> attr::Table<'a, N> {
        attr::Table::new(self.attrs)
    }

    /// Where in the message a part of [`Request::attrs`] (an attribute's payload) has its attribute:
    /// for [`Failure::offset`].
    pub fn offset_of(&self, payload: &[u8]) -> u32 {
        let inside = (payload.as_ptr() as usize).saturating_sub(self.attrs.as_ptr() as usize);
        let header = (ATTRIBUTES + inside.min(self.attrs.len())).saturating_sub(attr::HEADER);
        header as u32
    }
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the client gets, negated.
    pub errno: Errno,
    /// Extended ack: what went wrong.
    pub message: Option<&'static str>,
    /// Extended ack: offset in the message of the attribute that did it.
    pub offset: Option<u32>,
    /// Extended ack: the rule that was broken.
    pub(crate) rule: Option<&'static Rule>,
}

impl Failure {
    /// With words for the extended ack.
    pub const fn message(mut self, message: &'static str) -> Self {
        self.message = Some(message);
        self
    }

    /// With the place of the attribute that did it; see [`Request::offset_of`].
    pub const fn offset(mut self, offset: u32) -> Self {
        self.offset = Some(offset);
        self
    }

    pub(crate) const fn rule(mut self, rule: &'static Rule) -> Self {
        self.rule = Some(rule);
        self
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            message: None,
            offset: None,
            rule: None,
        }
    }
}
