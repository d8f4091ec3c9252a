//! One place of a ring. The only unsafe code of rings.

#![allow(unsafe_code)] // an item is handed over without a lock that both sides take

use super::atomic::{Acquire, AtomicBool, Release, SharedCell};

/// Room for one item. `taken` is set by the producer once the item is in, and cleared by the consumer once
/// it is out: it says whose the cell is.
#[derive(Debug)]
pub(super) struct Slot<T> {
    taken: AtomicBool,
    item: SharedCell<Option<T>>,
}

// SAFETY: the cell is only touched by the one of two parties that `taken` names, each of which is alone by a
// lock of its own (see `put` and `take`), and the flag hands it over with Release and Acquire; so items move
// between threads (Send), and are never looked at by two of them.
unsafe impl<T: Send> Sync for Slot<T> {}

impl<T> Slot<T> {
    pub(super) fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            item: SharedCell::new(None),
        }
    }

    /// Whether there is an item.
    #[inline]
    pub(super) fn is_taken(&self) -> bool {
        self.taken.load(Acquire)
    }

    /// Puts an item in; gives it back if there is one already.
    ///
    /// # Safety
    /// No other `put` on this slot runs at the same time.
    #[inline]
    pub(super) unsafe fn put(&self, item: T) -> Result<(), T> {
        if self.is_taken() {
            return Err(item);
        }
        // SAFETY: the flag is clear, so no consumer touches the cell; the caller is the only producer; what
        // the last consumer did there happened before the Release by which it cleared the flag.
        self.item.with_mut(|cell| unsafe { *cell = Some(item) });
        self.taken.store(true, Release);
        Ok(())
    }

    /// Takes the item out, if there is one.
    ///
    /// # Safety
    /// No other `take` on this slot runs at the same time.
    #[inline]
    pub(super) unsafe fn take(&self) -> Option<T> {
        if !self.is_taken() {
            return None;
        }
        // SAFETY: the flag is set, so no producer touches the cell; the caller is the only consumer; the item
        // was written before the Release by which the flag was set.
        let item = self.item.with_mut(|cell| unsafe { (*cell).take() });
        self.taken.store(false, Release);
        item
    }
}
