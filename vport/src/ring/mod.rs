//! Bounded rings between what produces frames and what consumes them, which stop their producers instead of
//! dropping at the tail, and wake them again.
//!
//! # Contract
//! - Bounded: as many places as asked for, one at least. Items leave in the order in which they came.
//! - Producers share a lock; so do consumers, of whom there is one at a time. Nobody spins, and nobody
//!   waits longer than the other's batch of the same side.
//! - What finds no room is handed back and counted ([`Counters::dropped_full`]).
//! - With back-pressure a ring that is full says so ([`Ring::is_stopped`]): what feeds it shall pause. It
//!   goes on ([`Notify::resume`]) when half of the ring has been consumed since, or the ring is empty, and
//!   at once when the ring is resized or closed, when back-pressure is turned off, or when the consumer is
//!   about to sleep. Half: a wake for every place would cost a stop for every place, a wake of the empty
//!   ring only would leave the consumer without work.
//! - At rest `produced = consumed + len` and `stops = wakes` (plus one while it is stopped).
//!
//! # Synchronization
//! Three pairs of threads could each miss what the other just did; each pair writes, makes a *full* fence,
//! and looks again, since release and acquire let both miss it:
//!
//! | one side | other side |
//! |---|---|
//! | producer: sets `stopped`, looks at the next place again | consumer: frees places, looks at `stopped` |
//! | producer: fills a place, looks at `asleep` | consumer: sets `asleep`, looks at the next place again |
//! | [`Feeder`]: says that it pauses, looks at all its rings again | ring: clears `stopped`, looks at the feeders |
//!
//! `tests/loom_ring.rs` tries the interleavings, and that each of these fences and looks is needed.
//!
//! - [`bounded`]: the ring; `slot`: one place of it; [`feeder`]: who pauses;
//! - [`deferred`]: a ring in front of something whose sends may not fit, and who flushes it;
//! - `atomic`: what a model checker stands in for; [`place`]: where it breaks things.

mod atomic;
pub mod bounded;
pub mod deferred;
pub mod feeder;
pub mod place;
mod slot;

pub use bounded::{Counters, Notify, Pushed, Ring, Sleep};
pub use deferred::{Deferred, Flushed, Sent, Sink};
pub use feeder::Feeder;
