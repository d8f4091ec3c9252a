//! What feeds rings, and pauses while all that it feeds is stopped.

use super::atomic::{AcqRel, AtomicBool, Relaxed, full_fence, looks_again};
use super::place::Place;

/// One receiver of frames (a worker, a thread that reads a socket) that pauses on rings.
///
/// # Synchronization
/// It may pause on several rings at once, and any of them that goes on must wake it. So it announces
/// itself, fences, and looks at *all* of them again, jointly; a ring clears its stop, fences (in
/// [`Ring`](super::bounded::Ring)), and looks at the announcement: one of the two sees the other.
#[derive(Debug)]
pub struct Feeder {
    paused: AtomicBool,
}

impl Default for Feeder {
    fn default() -> Self {
        Self::new()
    }
}

impl Feeder {
    /// One that goes on.
    pub fn new() -> Self {
        Self {
            paused: AtomicBool::new(false),
        }
    }

    /// Announces a pause and looks again: true if all that it feeds is still stopped, so that it may pause
    /// until it is woken; false if it has to go on.
    pub fn pause(&self, all_stopped: impl FnOnce() -> bool) -> bool {
        self.paused.store(true, Relaxed);
        full_fence(Place::Feeder);
        if looks_again(Place::Feeder) && !all_stopped() {
            self.paused.store(false, Relaxed);
            return false;
        }
        true
    }

    /// For [`Notify::resume`](super::bounded::Notify::resume): whether it pauses, and is now to be woken. True for one
    /// caller only.
    pub fn wakes(&self) -> bool {
        let paused = &self.paused;
        paused.load(Relaxed)
            && paused
                .compare_exchange(true, false, AcqRel, Relaxed)
                .is_ok()
    }

    /// It goes on by itself.
    pub fn go_on(&self) {
        if self.paused.load(Relaxed) {
            self.paused.store(false, Relaxed);
        }
    }
}
