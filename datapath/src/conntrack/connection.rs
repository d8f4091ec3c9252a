//! One connection: its two tuples, what its protocol remembers, what the datapath wrote on it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::helper::HelperState;
use super::sctp::Sctp;
use super::tcp::Tcp;
use super::timeout::Policy;
use super::tuple::{Direction, Tuple};

/// Bits of [`Connection::status`]: `enum ip_conntrack_status` of uapi
/// `linux/netfilter/nf_conntrack_common.h`.
pub mod status {
    /// It was expected by another connection's helper.
    pub const EXPECTED: u32 = 1 << 0;
    /// Packets went both ways.
    pub const SEEN_REPLY: u32 = 1 << 1;
    /// Not to be evicted early.
    pub const ASSURED: u32 = 1 << 2;
    /// It is in the table.
    pub const CONFIRMED: u32 = 1 << 3;
    /// Its source is translated.
    pub const SRC_NAT: u32 = 1 << 4;
    /// Its destination is translated.
    pub const DST_NAT: u32 = 1 << 5;
    /// Either.
    pub const NAT: u32 = SRC_NAT | DST_NAT;
    /// Sequence numbers are shifted, as a helper changed the payload's length.
    pub const SEQ_ADJUST: u32 = 1 << 6;
    /// The source's translation has been decided.
    pub const SRC_NAT_DONE: u32 = 1 << 7;
    /// The destination's translation has been decided.
    pub const DST_NAT_DONE: u32 = 1 << 8;
    /// It is out of the table, or on its way out.
    pub const DYING: u32 = 1 << 9;
    /// A helper was assigned.
    pub const HELPER: u32 = 1 << 13;
}

/// What a protocol remembers.
#[derive(Clone, Debug)]
pub enum Protocol {
    /// UDP: when it becomes a stream, in nanoseconds.
    Udp {
        /// Two seconds after the first packet.
        stream_from: u64,
    },
    /// TCP. In a box: a connection of another protocol is small.
    Tcp(Box<Tcp>),
    /// SCTP.
    Sctp(Sctp),
    /// GRE.
    Gre,
    /// ICMP and ICMPv6 queries.
    Icmp,
    /// Anything else.
    Generic,
}

/// What changes while a connection lives.
#[derive(Debug)]
pub struct State {
    /// The tuple of answers. Fixed once the connection is confirmed.
    pub reply: Tuple,
    /// What the protocol remembers.
    pub protocol: Protocol,
    /// `ct_mark`.
    pub mark: u32,
    /// `ct_label`.
    pub labels: [u8; 16],
    /// The helper and what it keeps, if there is one.
    pub helper: Option<Box<HelperState>>,
    /// Packets and bytes by direction, as on the wire from the IP header on.
    pub counts: [(u64, u64); 2],
    /// The policy that says how long it lives; None: the defaults.
    pub timeouts: Option<Arc<Policy>>,
    /// How long it lives from its commit on, in nanoseconds.
    pub lifetime: u64,
}

/// A connection.
///
/// # Thread safety
/// Shared. `state` is locked for the time in which one packet is looked at, under no other lock, and no
/// other is taken under it.
#[derive(Debug)]
pub struct Connection {
    /// Names it towards clients.
    pub id: u32,
    status: AtomicU32,
    /// When it expires, on the caller's clock, in nanoseconds.
    deadline: AtomicU64,
    /// Where it is in its shard; the table's.
    place: AtomicU32,
    /// The tuple of its first packet.
    pub original: Tuple,
    /// The connection whose helper expected this one.
    pub master: Option<Arc<Connection>>,
    state: Mutex<State>,
}

impl Connection {
    /// A connection that isn't in the table yet.
    pub fn new(id: u32, original: Tuple, master: Option<Arc<Self>>, state: State) -> Self {
        Self {
            id,
            status: AtomicU32::new(if master.is_some() {
                status::EXPECTED
            } else {
                0
            }),
            deadline: AtomicU64::new(0),
            place: AtomicU32::new(u32::MAX),
            original,
            master,
            state: Mutex::new(state),
        }
    }

    /// What changes.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`status`].
    #[inline]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// Whether one of these bits of [`status`] is set.
    #[inline]
    pub fn is(&self, bits: u32) -> bool {
        self.status() & bits != 0
    }

    /// How many hold it besides the table, the caller among them: packets, expected connections.
    pub fn users(self: &Arc<Self>) -> usize {
        // The table's: two entries and a place.
        Arc::strong_count(self).saturating_sub(3)
    }

    /// Sets bits; tells which of them were set before.
    #[inline]
    pub fn set(&self, bits: u32) -> u32 {
        self.status.fetch_or(bits, Ordering::AcqRel) & bits
    }

    /// When it expires, in nanoseconds.
    #[inline]
    pub fn deadline(&self) -> u64 {
        self.deadline.load(Ordering::Relaxed)
    }

    /// It expires then.
    #[inline]
    pub fn set_deadline(&self, at: u64) {
        self.deadline.store(at, Ordering::Relaxed);
    }

    /// Its place; under its shard's lock.
    pub(super) fn place(&self) -> u32 {
        self.place.load(Ordering::Relaxed)
    }

    /// Under its shard's lock.
    pub(super) fn set_place(&self, place: u32) {
        self.place.store(place, Ordering::Relaxed);
    }

    /// Whether it has expired by then.
    #[inline]
    pub fn expired(&self, now: u64) -> bool {
        self.deadline() <= now
    }
}

impl State {
    /// The tuple that packets of that direction have when they come.
    pub fn tuple(&self, original: &Tuple, direction: Direction) -> Tuple {
        match direction {
            Direction::Original => *original,
            Direction::Reply => self.reply,
        }
    }
}
