//! Where garbage goes: to a reaper thread, once no reader can see it any more.
//!
//! A collector runs what was deferred on whichever thread happens to advance the epoch, often a
//! reader; freeing a big table there would stall packets for milliseconds. So what is deferred only
//! hands a batch over to a queue, and the reaper's [`Reclaimer::reap`] frees it.
//!
//! A thread that sleeps while pinned stops all reclamation: unpin before blocking.

use std::any::Any;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_epoch::{Collector, Guard, LocalHandle};

use super::slots::Vacated;

/// How often the reaper tries in vain. The epoch's own garbage queues with ours, a few at a time are
/// taken, and there may be many of its own in a row.
const PATIENCE: usize = 64;

/// Something that readers may still see. To be handed to the reclaimer, never just dropped.
#[must_use = "readers may still see it: it belongs to the reclaimer"]
#[expect(dead_code, reason = "held to be dropped, never looked at")]
pub(crate) enum Garbage {
    /// The last owner of a value.
    Shared(Arc<dyn Any + Send + Sync>),
    /// A flow whose slot is to be emptied and reused.
    Slot(Vacated),
    /// What the table's user retired.
    Foreign(Box<dyn Any + Send>),
}

impl Garbage {
    pub(crate) fn new<T: Send + Sync + 'static>(last: Arc<T>) -> Self {
        Self::Shared(last)
    }
}

/// The epoch of a datapath's tables, and the queue of what is to be freed.
///
/// One for the process will do; a table keeps to the one that it was made with.
pub struct Reclaimer {
    collector: Collector,
    expired: Sender<Vec<Garbage>>,
    /// Held by the reaper while it works.
    reaper: Mutex<Receiver<Vec<Garbage>>>,
    /// Batches retired and not yet freed.
    pending: AtomicUsize,
    asleep: Mutex<()>,
    retired: Condvar,
}

impl Default for Reclaimer {
    fn default() -> Self {
        Self::new()
    }
}

impl Reclaimer {
    /// A collector of its own, without garbage.
    #[must_use]
    pub fn new() -> Self {
        let (expired, reaper) = channel();
        Self {
            collector: Collector::new(),
            expired,
            reaper: Mutex::new(reaper),
            pending: AtomicUsize::new(0),
            asleep: Mutex::new(()),
            retired: Condvar::new(),
        }
    }

    /// Take part in the epoch: each thread that reads or writes tables has a handle of its own.
    #[must_use]
    pub fn register(&self) -> LocalHandle {
        self.collector.register()
    }

    /// Does this pin protect what is retired here?
    #[inline]
    #[must_use]
    pub fn protects(&self, guard: &Guard) -> bool {
        guard.collector() == Some(&self.collector)
    }

    /// Have `garbage` dropped by the reaper once all that are pinned now have unpinned.
    ///
    /// For what the datapath unlinks itself, such as a whole table.
    ///
    /// # Panics
    /// If `guard` is a pin of another collector.
    pub fn retire(self: &Arc<Self>, guard: &Guard, garbage: Box<dyn Any + Send>) {
        self.retire_all(guard, vec![Garbage::Foreign(garbage)]);
    }

    pub(crate) fn retire_all(self: &Arc<Self>, guard: &Guard, garbage: Vec<Garbage>) {
        assert!(self.protects(guard), "a pin of another collector");
        if garbage.is_empty() {
            return;
        }
        self.pending.fetch_add(1, Relaxed);
        let expired = self.expired.clone();
        // Boxed, so that the closure is small enough for the epoch's bag not to box it anew. If the
        // queue is gone so is the reclaimer, and with it all of its readers: dropping is right.
        let garbage = Box::new(garbage);
        guard.defer(move || drop(expired.send(*garbage)));
        // Out of this thread's own bag: the thread may sleep for long.
        guard.flush();
        // Through the lock: the reaper has seen it pending, or sleeps already.
        drop(self.asleep.lock());
        self.retired.notify_one();
    }

    /// Free what no reader sees any more. Returns how many batches were freed.
    ///
    /// For the reaper thread, again and again while [`Reclaimer::pending`] isn't zero: the epoch only
    /// advances when somebody asks.
    pub fn reap(&self, handle: &LocalHandle) -> usize {
        let queue = self.reaper.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut freed, mut in_vain) = (0, 0);
        while self.pending() != 0 && in_vain < PATIENCE {
            // Each advance needs a pin of its own; three see garbage through from retired to expired.
            for _ in 0..3 {
                handle.pin().flush();
            }
            in_vain += 1;
            while let Ok(batch) = queue.try_recv() {
                in_vain = 0;
                freed += 1;
                drop(batch);
                self.pending.fetch_sub(1, Release);
            }
        }
        freed
    }

    /// Batches that were retired and aren't freed yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.load(Acquire)
    }

    /// Sleep until something is pending, or for `at_most`. May return early. Call it unpinned.
    pub fn wait(&self, at_most: Duration) {
        let asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        if self.pending() == 0 {
            drop(self.retired.wait_timeout(asleep, at_most));
        }
    }
}

impl std::fmt::Debug for Reclaimer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reclaimer")
            .field("pending", &self.pending())
            .finish_non_exhaustive()
    }
}
