//! Atomics, orderings and cells of what readers and writers share, from one place, so that a model
//! checker's can stand in for them (`tests/loom_table.rs`).

use std::cell::UnsafeCell;

pub(super) use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
pub(super) use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize};

/// An [`UnsafeCell`] whose uses say whether they write.
pub(super) struct SharedCell<T>(UnsafeCell<T>);

impl<T> SharedCell<T> {
    pub(super) const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    #[inline]
    pub(super) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    #[inline]
    pub(super) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}
