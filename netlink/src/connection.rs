//! The daemon's end of one client's connection: what goes out.
//!
//! # Loss, order, recovery
//! Replies, acks, notifications and parts of dumps go out in the order in which they were given;
//! upcalls in order for each source, fairly between sources. What the socket has no room for waits
//! here, within bounds; what finds no room here is lost, counted, and told to the client once
//! (NLMSG_OVERRUN, ENOBUFS at its reader) until it has caught up. The ack of the newest barrier is
//! never lost.
//!
//! # Thread safety
//! Any thread may send. One mutex guards the queues *and* the send itself, so that nothing overtakes
//! what waits: without it a worker could find the queue empty while the prompt thread is between
//! taking the last message and sending it. It is held for at most one batch of non-blocking sends,
//! no other lock is taken under it, and no handler runs under it. EPOLLOUT is asked for under it
//! (`armed`), after the send failed and the message is queued, and asking for it looks at the
//! socket once more: so a peer that reads in between is noticed.
//!
//! A worker whose port floods a full queue doesn't take the lock: `refusing` holds the port that was
//! refused last, until something leaves the queue. It is a hint, written under the lock and read
//! without it (relaxed): stale, it costs a message of that port, which is lost anyway, or a lock.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use crate::fair::{FairQueue, Full};
use crate::handler::Outgoing;
use crate::hub::{Delivery, UpcallError};
use crate::service::Protocol;
use crate::session::Peer;
use crate::sys::{self, Credentials};
use crate::transport;

/// `SO_SNDBUF` of a connection, which the kernel doubles: room for the longest upcall, and not much
/// more, since what waits in the kernel can't be reordered.
pub(crate) const SEND_BUFFER: usize = 64 * 1024;

/// What a privileged client may have waiting here, in bytes: as much as Open vSwitch asks of a
/// netlink socket.
const PRIVILEGED_LIMIT: usize = 4 << 20;
/// The same for others.
const UNPRIVILEGED_LIMIT: usize = 256 << 10;
/// What a queued message costs beyond its bytes.
const OVERHEAD: usize = 64;
/// Bits of [`Connection::options`].
pub(crate) const EXT_ACK: u32 = 1;
pub(crate) const CAP_ACK: u32 = 2;
const NO_ENOBUFS: u32 = 4;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) port_id: u32,
    pub(crate) credentials: Credentials,
    pub(crate) privileged: bool,
    pub(crate) protocol: Protocol,
    fd: OwnedFd,
    /// The epoll set of its prompt thread.
    poll: Arc<OwnedFd>,
    /// `EXT_ACK`, ...
    options: AtomicU32,
    /// Multicast groups, a bit each.
    groups: AtomicU32,
    outbox: Mutex<Outbox>,
    limit: usize,
    /// Requests received.
    pub(crate) received: AtomicU64,
    /// 1 + the source that the full queue refused last; 0: none since something left it.
    refusing: AtomicU64,
    /// Messages of any kind that were lost for want of room.
    lost: AtomicU64,
}

#[derive(Debug)]
struct Outbox {
    direct: VecDeque<Box<[u8]>>,
    direct_cost: usize,
    /// The last of `direct` is the ack of a barrier.
    ack_last: bool,
    upcalls: FairQueue,
    /// Upcalls whose turn has come.
    staged: VecDeque<Box<[u8]>>,
    /// An NLMSG_OVERRUN is owed.
    overrun: bool,
    /// Something was lost since the queues were last empty.
    congested: bool,
    /// EPOLLOUT is asked for.
    armed: bool,
    closed: bool,
    /// The peer has read nothing since a dump was sent: what was unread then, and after each send.
    dump_unread: Option<u32>,
}

/// How far a flush came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing waits.
    Idle,
    /// The socket is full; EPOLLOUT will tell.
    Blocked,
    /// The budget is used up; call again.
    More,
}

/// What waits for a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
}

impl Outbox {
    fn is_idle(&self) -> bool {
        self.direct.is_empty() && self.staged.is_empty() && self.upcalls.is_empty() && !self.overrun
    }

    fn close(&mut self) {
        self.closed = true;
        self.direct.clear();
        self.direct_cost = 0;
        self.staged.clear();
        self.upcalls.clear();
        self.overrun = false;
    }
}

impl Connection {
    pub(crate) fn new(
        port_id: u32,
        fd: OwnedFd,
        poll: Arc<OwnedFd>,
        credentials: Credentials,
        privileged: bool,
        protocol: Protocol,
    ) -> Self {
        let limit = if privileged {
            PRIVILEGED_LIMIT
        } else {
            UNPRIVILEGED_LIMIT
        };
        Self {
            port_id,
            credentials,
            privileged,
            protocol,
            fd,
            poll,
            options: AtomicU32::new(0),
            groups: AtomicU32::new(0),
            outbox: Mutex::new(Outbox {
                direct: VecDeque::new(),
                direct_cost: 0,
                ack_last: false,
                upcalls: FairQueue::new(limit),
                staged: VecDeque::new(),
                overrun: false,
                congested: false,
                armed: false,
                closed: false,
                dump_unread: None,
            }),
            limit,
            received: AtomicU64::new(0),
            refusing: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Puts it into its thread's epoll set.
    pub(crate) fn watch(&self) -> io::Result<()> {
        Ok(epoll::add(
            &*self.poll,
            &self.fd,
            self.event_data(),
            interest(false),
        )?)
    }

    fn event_data(&self) -> epoll::EventData {
        epoll::EventData::new_u64(self.port_id.into())
    }

    pub(crate) fn options(&self) -> u32 {
        self.options.load(Ordering::Relaxed)
    }

    pub(crate) fn set_option(&self, option: transport::ControlOp, on: bool) {
        let bit = match option {
            transport::ControlOp::ExtAck => EXT_ACK,
            transport::ControlOp::CapAck => CAP_ACK,
            transport::ControlOp::NoEnobufs => NO_ENOBUFS,
            _ => return,
        };
        if on {
            self.options.fetch_or(bit, Ordering::Relaxed);
        } else {
            self.options.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    pub(crate) fn groups(&self) -> u32 {
        self.groups.load(Ordering::Relaxed)
    }

    /// What the protocol has to know of it, now.
    pub(crate) fn peer(&self) -> Peer {
        Peer {
            port_id: self.port_id,
            privileged: self.privileged,
            options: self.options(),
            groups: self.groups(),
            protocol: self.protocol,
        }
    }

    /// Returns whether that changed anything. Only its own prompt thread calls this.
    pub(crate) fn set_group(&self, index: usize, member: bool) -> bool {
        let bit = 1 << index;
        let before = if member {
            self.groups.fetch_or(bit, Ordering::Relaxed)
        } else {
            self.groups.fetch_and(!bit, Ordering::Relaxed)
        };
        (before & bit != 0) != member
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn waiting(&self) -> Waiting {
        let outbox = self.lock();
        Waiting {
            messages: outbox.direct.len() + outbox.staged.len() + outbox.upcalls.len(),
            bytes: outbox.direct_cost
                + outbox.upcalls.cost()
                + outbox
                    .staged
                    .iter()
                    .map(|message| message.len())
                    .sum::<usize>(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Outbox> {
        // A panic elsewhere can't leave the queues inconsistent in a way that matters more than
        // going on.
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends or queues these datagrams.
    pub(crate) fn send(&self, out: &Outgoing) {
        if out.ends.is_empty() {
            return;
        }
        let mut outbox = self.lock();
        if outbox.closed {
            return;
        }
        let mut sent = 0;
        if outbox.is_idle() {
            while sent < out.ends.len() {
                match self.transmit(&mut outbox, out.datagrams().skip(sent)) {
                    Ok(0) => break,
                    Ok(count) => sent += count,
                    Err(()) => return,
                }
            }
        }
        for datagram in out.datagrams().skip(sent) {
            self.enqueue(&mut outbox, datagram);
        }
        self.settle(&mut outbox);
    }

    /// Sends or queues one datagram.
    pub(crate) fn send_one(&self, datagram: &[u8]) {
        let mut outbox = self.lock();
        if outbox.closed {
            return;
        }
        if outbox.is_idle() {
            match self.transmit(&mut outbox, std::iter::once(datagram)) {
                Ok(0) => {}
                _ => return,
            }
        }
        self.enqueue(&mut outbox, datagram);
        self.settle(&mut outbox);
    }

    /// An upcall: `head`, `packet` and `padding` zero bytes are one datagram. Never waits.
    pub(crate) fn upcall(
        &self,
        source: u32,
        head: &[u8],
        packet: &[u8],
        padding: usize,
    ) -> Result<Delivery, UpcallError> {
        const ZEROS: [u8; 4] = [0; 4];
        let padding = ZEROS.get(..padding).unwrap_or_default();
        if self.refusing.load(Ordering::Relaxed) == u64::from(source) + 1 {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return Err(UpcallError::Full);
        }
        let mut outbox = self.lock();
        if outbox.closed {
            return Err(UpcallError::NoPeer);
        }
        if outbox.is_idle() {
            let parts = [
                IoSlice::new(head),
                IoSlice::new(packet),
                IoSlice::new(padding),
            ];
            self.before_send(&mut outbox);
            let result = self.send_parts(&parts);
            if result.is_ok() {
                self.after_send(&mut outbox, Some(parts.iter().map(|part| part.len()).sum()));
            }
            match result {
                Ok(()) => return Ok(Delivery { displaced: 0 }),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    self.lose(&mut outbox, 1);
                    self.settle(&mut outbox);
                    return Err(UpcallError::TooLong);
                }
                Err(_) => {
                    outbox.close();
                    return Err(UpcallError::NoPeer);
                }
            }
        }
        let len = head.len() + packet.len() + padding.len();
        let result = if outbox.upcalls.admits(source, len) {
            let mut message = Vec::with_capacity(len);
            message.extend_from_slice(head);
            message.extend_from_slice(packet);
            message.extend_from_slice(padding);
            outbox.upcalls.push(source, message.into())
        } else {
            self.refusing
                .store(u64::from(source) + 1, Ordering::Relaxed);
            Err(Full)
        };
        self.lose(&mut outbox, *result.as_ref().unwrap_or(&1));
        self.settle(&mut outbox);
        match result {
            Ok(displaced) => Ok(Delivery { displaced }),
            Err(Full) => Err(UpcallError::Full),
        }
    }

    /// Goes on sending what waits: at most `budget` messages.
    pub(crate) fn flush(&self, mut budget: usize) -> Flushed {
        let mut outbox = self.lock();
        if outbox.closed {
            return Flushed::Idle;
        }
        while !outbox.is_idle() {
            if budget == 0 {
                return Flushed::More;
            }
            let Some(count) = self.flush_batch(&mut outbox) else {
                return Flushed::Idle;
            };
            if count == 0 {
                self.settle(&mut outbox);
                return Flushed::Blocked;
            }
            budget = budget.saturating_sub(count);
        }
        self.settle(&mut outbox);
        Flushed::Idle
    }

    /// None: the connection is dead.
    fn flush_batch(&self, outbox: &mut Outbox) -> Option<usize> {
        if outbox.overrun {
            let datagram = transport::overrun();
            let count = self.transmit(outbox, std::iter::once(&datagram[..])).ok()?;
            outbox.overrun = count == 0;
            return Some(count);
        }
        if !outbox.direct.is_empty() {
            let direct = std::mem::take(&mut outbox.direct);
            let result = self.transmit(outbox, direct.iter().map(|datagram| &**datagram));
            if outbox.closed {
                return None;
            }
            outbox.direct = direct;
            let count = result.ok()?;
            for datagram in outbox.direct.drain(..count) {
                outbox.direct_cost = outbox.direct_cost.saturating_sub(datagram.len() + OVERHEAD);
            }
            outbox.ack_last &= !outbox.direct.is_empty();
            return Some(count);
        }
        while outbox.staged.len() < sys::SEND_BATCH {
            let Some(upcall) = outbox.upcalls.pop() else {
                break;
            };
            outbox.staged.push_back(upcall);
            self.refusing.store(0, Ordering::Relaxed);
        }
        let staged = std::mem::take(&mut outbox.staged);
        let result = self.transmit(outbox, staged.iter().map(|datagram| &**datagram));
        if outbox.closed {
            return None;
        }
        outbox.staged = staged;
        let count = result.ok()?;
        outbox.staged.drain(..count);
        Some(count)
    }

    /// Whether nothing waits here, so that more can be sent.
    pub(crate) fn is_idle(&self) -> bool {
        let outbox = self.lock();
        !outbox.closed && outbox.is_idle()
    }

    /// A dump has been sent to its end.
    pub(crate) fn dump_sent(&self) {
        let mut outbox = self.lock();
        outbox.dump_unread = sys::unread(self.fd()).ok().filter(|unread| *unread > 0);
    }

    /// Whether a dump was sent and the peer has read nothing since.
    pub(crate) fn dump_unread(&self) -> bool {
        let mut outbox = self.lock();
        self.before_send(&mut outbox);
        outbox.dump_unread.is_some()
    }

    /// Nothing more goes out; what waits is thrown away.
    pub(crate) fn close(&self) {
        self.lock().close();
        self.refusing.store(0, Ordering::Relaxed);
        let _ = epoll::delete(&*self.poll, &self.fd);
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Wakes its prompt thread with an end of file.
    pub(crate) fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    fn enqueue(&self, outbox: &mut Outbox, datagram: &[u8]) {
        let cost = datagram.len() + OVERHEAD;
        // For the ack of a barrier there is always room: one right behind another takes its place.
        let ack = transport::ack_cookie(datagram).is_some();
        if ack
            && outbox.ack_last
            && let Some(last) = outbox.direct.back_mut()
        {
            *last = datagram.into();
            return;
        }
        if !ack && outbox.direct_cost + cost > self.limit {
            self.lose(outbox, 1);
            return;
        }
        outbox.direct_cost += cost;
        outbox.direct.push_back(datagram.into());
        outbox.ack_last = ack;
    }

    fn lose(&self, outbox: &mut Outbox, messages: u32) {
        if messages == 0 {
            return;
        }
        self.lost.fetch_add(messages.into(), Ordering::Relaxed);
        if !outbox.congested {
            outbox.congested = true;
            outbox.overrun = self.options() & NO_ENOBUFS == 0;
        }
    }

    /// Asks for EPOLLOUT while something waits, and only then: every read of the peer would wake
    /// the thread otherwise.
    fn settle(&self, outbox: &mut Outbox) {
        let waits = !outbox.closed && !outbox.is_idle();
        if !waits {
            outbox.congested = false;
        }
        if waits != outbox.armed {
            let asked = epoll::modify(&*self.poll, &self.fd, self.event_data(), interest(waits));
            if asked.is_ok() {
                outbox.armed = waits;
            }
        }
    }

    fn before_send(&self, outbox: &mut Outbox) {
        if let Some(then) = outbox.dump_unread
            && sys::unread(self.fd()).is_ok_and(|now| now < then)
        {
            outbox.dump_unread = None;
        }
    }

    /// A datagram of so many bytes has been sent; None: several, or none.
    ///
    /// The peer may have read meanwhile. What it hasn't read costs more than its bytes, and the
    /// least that a datagram costs is about what a short one does: so if it read one, less is
    /// unread than before with the new one's bytes. Mistaking an unread dump for a read one does no
    /// harm; the other way round a client would get an EBUSY that it hasn't earned.
    fn after_send(&self, outbox: &mut Outbox, sent: Option<usize>) {
        if let Some(then) = outbox.dump_unread {
            outbox.dump_unread = sent.and_then(|bytes| {
                let least = then.saturating_add(u32::try_from(bytes).ok()?);
                sys::unread(self.fd()).ok().filter(|now| *now >= least)
            });
        }
    }

    /// Sends as many as there is room for. Err: the peer is gone.
    fn transmit<'a>(
        &self,
        outbox: &mut Outbox,
        datagrams: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<usize, ()> {
        self.before_send(outbox);
        let result = sys::send_batch(self.fd(), datagrams.clone());
        if outbox.dump_unread.is_some()
            && let Ok(count) = &result
        {
            let first = datagrams.clone().next().filter(|_| *count == 1);
            self.after_send(outbox, first.map(<[u8]>::len));
        }
        match result {
            Ok(count) => Ok(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                // Longer than the send buffer: an error that echoes a long request, a long dump
                // message.
                let Some(datagram) = datagrams.clone().next() else {
                    return Ok(0);
                };
                match self.send_parts(&[IoSlice::new(datagram)]) {
                    Ok(()) => Ok(1),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                    Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                        self.lose(outbox, 1);
                        Ok(1)
                    }
                    Err(_) => {
                        outbox.close();
                        Err(())
                    }
                }
            }
            Err(_) => {
                outbox.close();
                Err(())
            }
        }
    }

    /// One datagram; one that is longer than the send buffer gets a longer buffer for itself.
    fn send_parts(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut control = SendAncillaryBuffer::default();
        match rustix::net::sendmsg(&self.fd, parts, &mut control, flags) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::MSGSIZE) => {
                let len: usize = parts.iter().map(|part| part.len()).sum();
                rustix::net::sockopt::set_socket_send_buffer_size(&self.fd, len + 4096)?;
                let result = rustix::net::sendmsg(&self.fd, parts, &mut control, flags);
                rustix::net::sockopt::set_socket_send_buffer_size(&self.fd, SEND_BUFFER)?;
                result.map(|_| ()).map_err(io::Error::from)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn interest(out: bool) -> epoll::EventFlags {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    if out {
        flags | epoll::EventFlags::OUT
    } else {
        flags
    }
}
