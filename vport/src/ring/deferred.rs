//! Deferred transmission: what sends on something that may be slow appends to a bounded ring and goes on; one
//! flusher at a time carries the ring's messages out.
//!
//! # Contract
//! - [`Deferred::enqueue`] takes a time that doesn't depend on the far end. What finds no room is handed
//!   back and counted.
//! - One flusher at a time has the role. It finishes what it has begun before it takes more: order is kept,
//!   messages never interleave. A flush ends after [`FLUSH_MESSAGES`] or [`FLUSH_BYTES`], so that whoever
//!   flushes has time for others.
//! - No lock that an enqueuer takes is held while something is sent.
//! - After [`Deferred::close`] nothing is sent any more and nobody flushes: it waits for the flusher.
//! - `enqueued = sent + dropped_full + dropped_close`, once closed; before, plus what waits.
//!
//! # The flusher's role
//! | state | who goes on |
//! |---|---|
//! | idle | the next enqueuer makes it *scheduled*, and says so ([`Notify::work`]) |
//! | scheduled | whoever begins a flush |
//! | flushing | the flusher |
//! | waiting | whoever learns that the far end takes something again ([`Deferred::writable`]) |
//! | closed | nobody |
//!
//! # Synchronization
//! The flusher that finds the ring empty gives up the role *before* its last look at the ring, with a full
//! fence between; an enqueuer fills the ring, fences, and looks at the role. So a message is seen by one of
//! them at least; should both see it, the role goes to the one whose compare-and-swap succeeds. Likewise the
//! closer says that it closes, fences and looks at the role, while the flusher gives up the role, fences and
//! looks whether somebody closes.

use std::collections::VecDeque;
use std::sync::PoisonError;

use super::atomic::{
    AcqRel, Acquire, AtomicU8, AtomicU64, Condvar, Mutex, MutexGuard, Relaxed, Release, full_fence,
    looks_again,
};
use super::bounded::{Notify, Pushed, Ring};
use super::place::Place;

/// Messages that a flush carries at most.
pub const FLUSH_MESSAGES: usize = 64;
/// Bytes after which a flush ends.
pub const FLUSH_BYTES: usize = 65_536;

const IDLE: u8 = 0;
const SCHEDULED: u8 = 1;
const FLUSHING: u8 = 2;
const WAITING: u8 = 3;
const CLOSED: u8 = 4;

/// Where messages go.
pub trait Sink<T> {
    /// The bytes that a message takes there, framing included. Not zero.
    fn size(&self, message: &T) -> usize;

    /// Sends what is taken at once of `messages`, in order, the first from the byte `offset` on.
    fn send(&mut self, messages: &VecDeque<T>, offset: usize) -> Sent;

    /// Takes back a message that was sent, or never will be.
    fn recycle(&mut self, message: T);
}

/// What a sink took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// That many bytes.
    Bytes(usize),
    /// Nothing for now.
    Blocked,
    /// Nothing ever again.
    Broken,
}

/// How a flush ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// All is sent; an enqueuer will schedule the next flush.
    Empty,
    /// The flush had its share; flush again.
    More,
    /// The far end takes nothing: call [`Deferred::writable`] when it does.
    Blocked,
    /// The far end is no more: close.
    Broken,
    /// Somebody else has the role, or it is closed: nothing was done.
    NotOurs,
}

/// What the flusher has taken out of the ring and not yet sent. Touched by who has the role only.
struct Hand<T> {
    messages: VecDeque<T>,
    /// Bytes of the first that are sent.
    offset: usize,
}

/// What it has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages that were to be sent.
    pub enqueued: u64,
    /// Messages that the far end took whole.
    pub sent: u64,
    /// Messages that found no room.
    pub dropped_full: u64,
    /// Messages that came, or were left, when it was closed; one that was sent in part is among them.
    pub dropped_close: u64,
}

/// A bounded queue of messages to something slow.
pub struct Deferred<T, N> {
    ring: Ring<T, N>,
    role: AtomicU8,
    /// The role makes it exclusive; the lock makes that safe.
    hand: Mutex<Hand<T>>,
    sent: AtomicU64,
    /// Of what was left when it was closed or abandoned.
    abandoned: AtomicU64,
    /// The closer waits here for the flusher.
    closing: Mutex<()>,
    left: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Send, N: Notify> Deferred<T, N> {
    /// In front of it a ring, from which nobody else pops.
    pub fn new(ring: Ring<T, N>) -> Self {
        Self {
            ring,
            role: AtomicU8::new(IDLE),
            hand: Mutex::new(Hand {
                messages: VecDeque::new(),
                offset: 0,
            }),
            sent: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            closing: Mutex::new(()),
            left: Condvar::new(),
        }
    }

    /// The ring, for its size, policy, counters.
    pub fn ring(&self) -> &Ring<T, N> {
        &self.ring
    }

    /// Queues messages, in order; those for which there is no room are given to `refuse`. Schedules a flush
    /// if none is due.
    pub fn enqueue(&self, messages: impl IntoIterator<Item = T>, refuse: impl FnMut(T)) -> Pushed {
        let pushed = self.ring.push(messages, refuse);
        // The push ended with a full fence (`Place::Producer`).
        if pushed.taken != 0 && self.role.load(Relaxed) == IDLE && self.becomes(IDLE, SCHEDULED) {
            self.ring.notify().work();
        }
        pushed
    }

    /// The far end may take something again: true if a flush is due now, and the caller shall see to it.
    pub fn writable(&self) -> bool {
        self.becomes(WAITING, SCHEDULED)
    }

    /// Whether nothing is queued, in hand or on its way: what is sent past it now doesn't overtake anything
    /// that this thread queued before.
    #[inline]
    pub fn is_idle(&self) -> bool {
        // The role alone doesn't tell: the flusher gives it up before its last look at the ring. And the ring
        // first: what has left it was taken by who had the role, which is seen then.
        self.ring.is_drained() && self.role.load(Acquire) == IDLE
    }

    /// Carries messages out, if a flush is scheduled.
    pub fn flush(&self, sink: &mut impl Sink<T>) -> Flushed {
        if !self.becomes(SCHEDULED, FLUSHING) {
            return Flushed::NotOurs;
        }
        let mut hand = lock(&self.hand);
        let hand = &mut *hand;
        let (mut messages, mut bytes) = (0, 0);
        loop {
            if self.ring.is_closed() {
                return self.leave(SCHEDULED, Flushed::NotOurs);
            }
            if hand.messages.is_empty() {
                if messages >= FLUSH_MESSAGES || bytes >= FLUSH_BYTES {
                    return self.leave(SCHEDULED, Flushed::More);
                }
                let mut room = FLUSH_BYTES;
                self.ring.pop(FLUSH_MESSAGES, |message| {
                    room = room.saturating_sub(sink.size(&message));
                    hand.messages.push_back(message);
                    room != 0
                });
            }
            if hand.messages.is_empty() {
                self.leave(IDLE, Flushed::Empty);
                // `leave` fenced. Whoever queued something meanwhile may have found the role taken.
                let work = looks_again(Place::Flusher) && !self.ring.is_empty();
                if work && self.becomes(IDLE, FLUSHING) {
                    continue;
                }
                return Flushed::Empty;
            }
            match sink.send(&hand.messages, hand.offset) {
                Sent::Bytes(taken) => {
                    bytes += taken;
                    messages += self.advance(hand, taken, sink);
                    if messages >= FLUSH_MESSAGES || bytes >= FLUSH_BYTES {
                        return self.leave(SCHEDULED, Flushed::More);
                    }
                }
                Sent::Blocked => return self.leave(WAITING, Flushed::Blocked),
                Sent::Broken => return self.leave(WAITING, Flushed::Broken),
            }
        }
    }

    /// Counts `taken` bytes more as sent; gives how many messages that completed.
    fn advance(&self, hand: &mut Hand<T>, taken: usize, sink: &mut impl Sink<T>) -> usize {
        hand.offset += taken;
        let mut complete = 0;
        while let Some(size) = hand.messages.front().map(|first| sink.size(first))
            && hand.offset >= size
        {
            hand.offset -= size;
            complete += 1;
            if let Some(message) = hand.messages.pop_front() {
                sink.recycle(message);
            }
        }
        self.sent
            .store(self.sent.load(Relaxed) + complete as u64, Release);
        complete
    }

    /// Takes nothing any more, and waits until nobody flushes. What is left counts as dropped and is given to
    /// `take`.
    pub fn close(&self, mut take: impl FnMut(T)) {
        self.ring.close();
        full_fence(Place::Closer);
        let mut gate = lock(&self.closing);
        loop {
            let role = self.role.load(Acquire);
            if role == CLOSED {
                return;
            }
            if role == FLUSHING {
                gate = self.left.wait(gate).unwrap_or_else(PoisonError::into_inner);
            } else if self.becomes(role, CLOSED) {
                break;
            }
        }
        drop(gate);
        self.drop_all(&mut take);
    }

    /// Drops what is queued and in hand, since where it was to go is no more; it counts as
    /// [`dropped_close`](Counters::dropped_close). The queue stays open. Does nothing while somebody else
    /// flushes.
    pub fn abandon(&self, mut take: impl FnMut(T)) {
        let free = [SCHEDULED, WAITING, IDLE];
        if !free.into_iter().any(|role| self.becomes(role, FLUSHING)) {
            return;
        }
        self.drop_all(&mut take);
        self.leave(IDLE, Flushed::Empty);
        if !self.ring.is_empty() && self.becomes(IDLE, SCHEDULED) {
            self.ring.notify().work();
        }
    }

    /// By who has the role.
    fn drop_all(&self, take: &mut impl FnMut(T)) {
        let mut count = 0;
        let mut hand = lock(&self.hand);
        hand.offset = 0;
        for message in hand.messages.drain(..) {
            count += 1;
            take(message);
        }
        self.ring.pop(usize::MAX, |message| {
            count += 1;
            take(message);
            true
        });
        self.abandoned.fetch_add(count, Release);
    }

    /// What it has counted.
    pub fn counters(&self) -> Counters {
        let ring = self.ring.counters();
        Counters {
            enqueued: ring.produced + ring.dropped_full + ring.dropped_close,
            sent: self.sent.load(Acquire),
            dropped_full: ring.dropped_full,
            dropped_close: ring.dropped_close + self.abandoned.load(Acquire),
        }
    }

    fn becomes(&self, from: u8, to: u8) -> bool {
        self.role
            .compare_exchange(from, to, AcqRel, Relaxed)
            .is_ok()
    }

    /// Gives the role up, and lets a closer go on that waits for it.
    fn leave(&self, to: u8, flushed: Flushed) -> Flushed {
        self.role.store(to, Release);
        full_fence(Place::Flusher);
        if self.ring.is_closed() {
            drop(lock(&self.closing));
            self.left.notify_all();
        }
        flushed
    }
}

impl<T, N> std::fmt::Debug for Deferred<T, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deferred").finish_non_exhaustive()
    }
}
