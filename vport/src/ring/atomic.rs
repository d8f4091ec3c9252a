//! Atomics, locks, cells and full fences of rings, from one place, so that a model checker's can stand in
//! for them, and leave one out to see that it is missed (`vport/tests/loom_ring.rs`).

use std::cell::UnsafeCell;

pub(crate) use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::place::Place;

/// A full fence. Each is one half of a store-buffering pair: both sides write, fence, and look at what the
/// other writes; then at least one of them sees the other. Release and acquire don't give that.
#[inline]
pub(crate) fn full_fence(_place: Place) {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// Whether the second look is taken there: always, but in models that show what becomes of it.
#[inline]
pub(crate) const fn looks_again(_place: Place) -> bool {
    true
}

/// An [`UnsafeCell`] whose uses a model checker can follow.
#[derive(Debug)]
pub(crate) struct SharedCell<T>(UnsafeCell<T>);

impl<T> SharedCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    #[inline]
    pub(crate) fn with_mut<R>(&self, change: impl FnOnce(*mut T) -> R) -> R {
        change(self.0.get())
    }
}
