//! What a datapath gives to the server, and what it gets.
//!
//! # Contexts
//! A connection belongs to one of the server's *prompt* threads, which reads its requests in order
//! and hands each to [`Handler::handle`] or [`Handler::dump`]. A request in [`Lane::MaySleep`] runs
//! on the *configuration* thread instead, one in [`Lane::Long`] on a thread beside that; the
//! connection's further input waits for it, other connections don't. So each method below is called from several threads at once, but for one
//! connection never by two.

use std::sync::Arc;

use crate::attr::Writer;
use crate::errno::Errno;
use crate::family::{Family, Group};
use crate::hub::Hub;
use crate::message::{self, Failure, Header, Request, flags};
use crate::service::{self, Protocol, Service};

/// Where a request runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// On the prompt thread, at once: never sleeps, never waits for one that does.
    Prompt,
    /// On the configuration thread: may take the configuration lock, make devices, wait.
    MaySleep,
    /// On a thread for what takes seconds without waiting for anybody: nobody shall wait for it.
    Long,
}

/// The datapath, as the server sees it.
///
/// Before a handler sees a request, the server has done what generic netlink does: unknown
/// operations, missing headers, missing privilege and attributes against their policy are refused.
pub trait Handler: Send + Sync + 'static {
    /// Where `request` runs; for a dump, where [`Handler::dump`] runs. Never sleeps.
    fn lane(&self, request: &Request<'_>) -> Lane;

    /// Does what `request` says. What it owes goes into `answer`; acks and errors are the server's.
    ///
    /// # Errors
    /// What the client gets as NLMSG_ERROR, after whatever `answer` holds already.
    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<(), Failure>;

    /// Begins a dump.
    ///
    /// # Errors
    /// What the client gets in its NLMSG_DONE.
    fn dump(&self, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure>;

    /// The client's socket is closed: its port id will never be used again. Called once for each
    /// client, after its last request.
    fn gone(&self, port_id: u32);

    /// Called on a thread of the server each time before it sleeps.
    fn before_sleep(&self);

    /// Who answers another protocol than generic netlink. None: clients that want to speak it are
    /// refused, and so get the kernel.
    fn service(&self, _protocol: Protocol) -> Option<&dyn Service> {
        None
    }
}

/// A running dump: a cursor, no snapshot that the reader's slowness would keep alive.
pub trait Dump: Send {
    /// Appends messages to `part` until one doesn't fit (`Fit::Full`; keep the cursor before it), or
    /// until it [pauses](DumpPart::pause), or until all have been: `Ok(true)`. Runs on the prompt thread: must not sleep.
    ///
    /// # Errors
    /// Ends the dump: the client gets it in NLMSG_DONE. What `part` holds is sent before.
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno>;
}

/// Whether a message went into a part of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fit {
    /// It did.
    Written,
    /// No room: nothing of it is left, it belongs into the next part.
    Full,
}

/// Bytes of a dump's datagram that it doesn't exceed, unless a single message does: what Linux fills.
pub const PART: usize = 32 * 1024 - 320;

/// One datagram of a dump.
#[derive(Debug)]
pub struct DumpPart<'b> {
    pub(crate) buffer: &'b mut Vec<u8>,
    /// Where in it this part begins.
    pub(crate) begin: usize,
    pub(crate) seq: u32,
    pub(crate) port_id: u32,
    pub(crate) paused: bool,
}

impl DumpPart<'_> {
    /// For a dump that has looked at a lot and found little: it goes on when it's the client's turn
    /// again, although this part isn't full (or is empty).
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Appends a message of `family` whose attributes `build` writes. `build` may run and its work be
    /// thrown away: it has no effects.
    ///
    /// # Errors
    /// Those of `build`; the message is taken back.
    pub fn message(
        &mut self,
        family: Family,
        command: u8,
        dp_ifindex: i32,
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<Fit, Errno> {
        let [a, b, c, d] = dp_ifindex.to_ne_bytes();
        let fixed = [command, family.version(), 0, 0, a, b, c, d];
        self.record(family.id(), &fixed, build)
    }

    /// The same for a message of any protocol: its kind, the fixed header of that, attributes.
    ///
    /// # Errors
    /// Those of `build`; the message is taken back.
    pub fn record(
        &mut self,
        kind: u16,
        fixed: &[u8],
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<Fit, Errno> {
        let start = self.buffer.len();
        let header = Header {
            len: 0,
            kind,
            flags: flags::MULTI,
            seq: self.seq,
            pid: self.port_id,
        };
        if let Err(errno) = service::append(self.buffer, header, fixed, build) {
            self.buffer.truncate(start);
            return Err(errno);
        }
        if start > self.begin && self.buffer.len() - self.begin > PART {
            self.buffer.truncate(start);
            return Ok(Fit::Full);
        }
        Ok(Fit::Written)
    }

    /// Whether nothing has been written yet.
    pub fn is_empty(&self) -> bool {
        self.buffer.len() == self.begin
    }
}

/// Datagrams for one client, in order, in one buffer.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    pub(crate) buffer: Vec<u8>,
    /// Where each datagram ends.
    pub(crate) ends: Vec<usize>,
}

impl Outgoing {
    pub(crate) fn seal(&mut self) {
        self.ends.push(self.buffer.len());
    }

    pub(crate) fn push(&mut self, datagram: &[u8]) {
        self.buffer.extend_from_slice(datagram);
        self.seal();
    }

    pub(crate) fn clear(&mut self) {
        self.buffer.clear();
        self.ends.clear();
    }

    /// Takes back what isn't sealed.
    pub(crate) fn rewind(&mut self) {
        self.buffer.truncate(self.open());
    }

    /// Where the datagram that is being written begins.
    fn open(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub(crate) fn datagrams(&self) -> impl Iterator<Item = &[u8]> + Clone {
        let mut start = 0;
        self.ends.iter().map(move |end| {
            let datagram = self.buffer.get(start..*end).unwrap_or_default();
            start = *end;
            datagram
        })
    }
}

/// What a request's handler has to say besides success or failure.
#[derive(Debug)]
pub struct Answer<'a> {
    pub(crate) hub: &'a Hub,
    pub(crate) out: &'a mut Outgoing,
    pub(crate) family: Family,
    pub(crate) flags: u16,
    pub(crate) seq: u32,
    pub(crate) port_id: u32,
    /// Groups that the requester belongs to, a bit each.
    pub(crate) member_of: u32,
}

impl Answer<'_> {
    /// A message to the requester, before its ack: `nlmsg_seq` of the request, its port id, no flags.
    ///
    /// # Errors
    /// Those of `build`; nothing is sent then.
    pub fn reply(
        &mut self,
        command: u8,
        dp_ifindex: i32,
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.write(command, dp_ifindex, build)?;
        self.out.seal();
        Ok(())
    }

    /// Notifies `group` of a change that this request made. With NLM_F_ECHO the requester gets it,
    /// and the members other than the requester get the same bytes; without it only the members
    /// (the requester too, if it is one). `build` isn't called when nobody wants it.
    ///
    /// # Errors
    /// Those of `build`; nothing is sent then.
    pub fn announce(
        &mut self,
        group: Group,
        command: u8,
        dp_ifindex: i32,
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if !self.wanted(group) {
            return Ok(());
        }
        let start = self.write(command, dp_ifindex, build)?;
        let bytes = self.out.buffer.get(start..).unwrap_or_default();
        self.hub.multicast(group, bytes, self.port_id);
        if self.flags & flags::ECHO != 0 || self.member_of & (1 << group.index()) != 0 {
            self.out.seal();
        } else {
            self.out.buffer.truncate(start);
        }
        Ok(())
    }

    /// Whether anyone would get an announcement to `group`: the requester by NLM_F_ECHO, or a
    /// member.
    pub fn wanted(&self, group: Group) -> bool {
        self.flags & flags::ECHO != 0
            || self.member_of & (1 << group.index()) != 0
            || self.hub.has_members(group)
    }

    /// For announcements that this request causes but that aren't its own: see [`Hub::announce`].
    pub fn hub(&self) -> &Hub {
        self.hub
    }

    fn write(
        &mut self,
        command: u8,
        dp_ifindex: i32,
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<usize, Errno> {
        self.out.rewind();
        let start = self.out.open();
        let begun = message::begin(
            &mut self.out.buffer,
            self.family,
            command,
            dp_ifindex,
            0,
            self.seq,
            self.port_id,
        );
        if let Err(errno) = build(&mut Writer::new(&mut self.out.buffer)) {
            self.out.buffer.truncate(start);
            return Err(errno);
        }
        message::finish(&mut self.out.buffer, begun);
        Ok(start)
    }
}

impl<H: Handler> Handler for Arc<H> {
    fn lane(&self, request: &Request<'_>) -> Lane {
        (**self).lane(request)
    }

    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<(), Failure> {
        (**self).handle(request, answer)
    }

    fn dump(&self, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        (**self).dump(request)
    }

    fn gone(&self, port_id: u32) {
        (**self).gone(port_id);
    }

    fn before_sleep(&self) {
        (**self).before_sleep();
    }

    fn service(&self, protocol: Protocol) -> Option<&dyn Service> {
        (**self).service(protocol)
    }
}
