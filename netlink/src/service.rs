//! Netlink protocols beside generic netlink: NETLINK_NETFILTER for connections, NETLINK_ROUTE for the
//! links of tunnels.
//!
//! There a message is `struct nlmsghdr`, a fixed header of its kind (`struct nfgenmsg`, `struct
//! ifinfomsg`) and attributes. Unlike generic netlink nobody has looked at it before its [`Service`]
//! does: a payload may have any length. Acks, errors, dumps and lanes are as for
//! [`Handler`](crate::handler::Handler); what the client hands over at all is the interposer's choice.

use crate::attr::{self, Writer};
use crate::errno::Errno;
use crate::handler::{Dump, Lane, Outgoing};
use crate::message::{Failure, Header, NLMSG_HEADER};
use crate::transport;

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `NETLINK_GENERIC`: the Open vSwitch families, a [`Handler`](crate::handler::Handler)'s.
    Generic,
    /// `NETLINK_NETFILTER`: ctnetlink and its timeout policies.
    Netfilter,
    /// `NETLINK_ROUTE`: single requests about links of tunnels.
    Route,
}

impl Protocol {
    /// By the number that `socket(2)` takes (uapi `linux/netlink.h`).
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            transport::NETLINK_GENERIC => Some(Self::Generic),
            transport::NETLINK_NETFILTER => Some(Self::Netfilter),
            transport::NETLINK_ROUTE => Some(Self::Route),
            _ => None,
        }
    }
}

/// Who answers requests of one protocol. Called as [`Handler`](crate::handler::Handler) is: from several
/// threads at once, but for one connection never by two.
pub trait Service: Send + Sync {
    /// Where `request` runs. Never sleeps.
    fn lane(&self, request: &Request<'_>) -> Lane;

    /// Whether only those may ask who may change state; others get EPERM.
    fn needs_privilege(&self, request: &Request<'_>) -> bool;

    /// Whether it begins a dump: the flags mean different things in different requests.
    fn is_dump(&self, request: &Request<'_>) -> bool;

    /// Does what `request` says. What it owes goes into `answer`; acks and errors are the server's.
    ///
    /// # Errors
    /// What the client gets as NLMSG_ERROR, after whatever `answer` holds already.
    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<Served, Failure>;

    /// Begins a dump. Its messages go in by [`DumpPart::record`](crate::handler::DumpPart::record).
    ///
    /// # Errors
    /// What the client gets in its NLMSG_DONE.
    fn dump(&self, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure>;
}

/// What became of a request that didn't fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is answered.
    Done,
    /// It is about nothing of the daemon's: the client is told to ask the kernel.
    NotOurs,
}

/// A message to a [`Service`].
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// `nlmsg_type`, never one of [`control`](crate::message::control).
    pub kind: u16,
    /// [`flags`](crate::message::flags)
    pub flags: u16,
    /// `nlmsg_seq`
    pub seq: u32,
    /// What follows `struct nlmsghdr`: perhaps less than the fixed header of its kind.
    pub payload: &'a [u8],
    /// The true id of the client's socket, unique for the daemon's life, never 0.
    pub port_id: u32,
    /// Whether the peer may change state.
    pub privileged: bool,
}

impl<'a> Request<'a> {
    /// Whether all of these flags are set.
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags == flags
    }

    /// The fixed header, and the attributes behind it.
    ///
    /// # Errors
    /// EINVAL: too short.
    pub fn split<const N: usize>(&self) -> Result<(&'a [u8; N], &'a [u8]), Errno> {
        let fixed = self.payload.first_chunk().ok_or(Errno::EINVAL)?;
        let attributes = self.payload.get(attr::align(N)..).unwrap_or_default();
        Ok((fixed, attributes))
    }
}

/// What a service has to say besides success or failure.
#[derive(Debug)]
pub struct Answer<'a> {
    pub(crate) out: &'a mut Outgoing,
    pub(crate) seq: u32,
    pub(crate) port_id: u32,
}

impl Answer<'_> {
    /// A message to the requester, before its ack: `nlmsg_seq` of the request, its port id, no flags.
    /// `fixed` is the header of its kind; `build` writes the attributes.
    ///
    /// # Errors
    /// Those of `build`; nothing is sent then.
    pub fn reply(
        &mut self,
        kind: u16,
        fixed: &[u8],
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.out.rewind();
        let start = self.out.buffer.len();
        let header = Header {
            len: 0,
            kind,
            flags: 0,
            seq: self.seq,
            pid: self.port_id,
        };
        append(&mut self.out.buffer, header, fixed, build)
            .inspect_err(|_| self.out.buffer.truncate(start))?;
        self.out.seal();
        Ok(())
    }
}

/// Appends one message, with its length. On error `buffer` holds a part of it.
pub(crate) fn append(
    buffer: &mut Vec<u8>,
    header: Header,
    fixed: &[u8],
    build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let start = buffer.len();
    header.emit(buffer);
    buffer.extend_from_slice(fixed);
    buffer.resize(start + NLMSG_HEADER + attr::align(fixed.len()), 0);
    build(&mut Writer::new(buffer))?;
    let len = ((buffer.len() - start) as u32).to_ne_bytes();
    if let Some(field) = buffer.get_mut(start..start + 4) {
        field.copy_from_slice(&len);
    }
    Ok(())
}
