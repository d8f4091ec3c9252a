//! Who pauses while all that it feeds is stopped: the workers, and how a port's ring wakes them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use ::vport::ring::Feeder;
use arc_swap::ArcSwap;
use rustix::event::{EventfdFlags, eventfd};

/// A worker, as the rings see it.
#[derive(Debug)]
pub struct Pausing {
    /// Says that it pauses.
    pub feeder: Feeder,
    wake: OwnedFd,
}

impl Pausing {
    /// It has seen that it was woken.
    pub fn acknowledge(&self) {
        // EAGAIN: it wasn't.
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
    }
}

impl AsFd for Pausing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// All workers.
#[derive(Debug, Default)]
pub struct Feeders {
    all: ArcSwap<Vec<Arc<Pausing>>>,
    /// Some port may stop: until then no worker looks whether one has.
    in_use: AtomicBool,
}

impl Feeders {
    /// One more.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn add(&self) -> std::io::Result<Arc<Pausing>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let pausing = Arc::new(Pausing {
            feeder: Feeder::new(),
            wake,
        });
        let mut all = Vec::clone(&self.all.load());
        all.push(Arc::clone(&pausing));
        self.all.store(Arc::new(all));
        Ok(pausing)
    }

    /// A ring goes on: wakes who pauses.
    pub fn resume(&self) {
        for pausing in self.all.load().iter() {
            if pausing.feeder.wakes() {
                // An eventfd refuses only at 2^64 - 1 unread wakes, and is readable then.
                let _ = rustix::io::write(&pausing.wake, &1_u64.to_ne_bytes());
            }
        }
    }

    /// From now on a port may stop.
    pub fn use_them(&self) {
        self.in_use.store(true, Relaxed);
    }

    /// Whether a port may stop.
    #[inline]
    pub fn in_use(&self) -> bool {
        self.in_use.load(Relaxed)
    }
}
