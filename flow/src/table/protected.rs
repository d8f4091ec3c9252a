//! Pointers whose targets outlive their readers' pins.
//!
//! Unsafe because a pointer shared with readers can't be expressed otherwise without a count that
//! every packet would write to. All of it is here and in [`super::slots`] and [`super::zeroed`].
//!
//! # The rule that makes it sound
//! The root of a table ([`Root`]) is read only under a pin of the table's own collector, and lends
//! what it points to for as long as that pin. A [`Protected`] lies only inside of what is reached from
//! a root, so whoever holds a reference to it is pinned, and what it lends lasts as long as that
//! reference. What a pointer is replaced by, or taken out, is given back as an [`Arc`] as
//! [`Retired`], which must go to the [`Reclaimer`](super::reclaim::Reclaimer).
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use crossbeam_epoch::Guard;

use super::atomic::{AcqRel, Acquire, AtomicPtr, Relaxed};
use super::reclaim::Garbage;

/// A pointer to a shared `T`, always there.
pub(crate) struct Protected<T> {
    to: AtomicPtr<T>,
    owns: PhantomData<Arc<T>>,
}

impl<T: Send + Sync + 'static> Protected<T> {
    pub(crate) fn new(to: Arc<T>) -> Self {
        Self {
            to: AtomicPtr::new(Arc::into_raw(to).cast_mut()),
            owns: PhantomData,
        }
    }

    #[inline]
    pub(crate) fn load(&self) -> &T {
        // SAFETY: never null, and from Arc::into_raw. The target isn't dropped before the pin ends
        // under which `self` was reached (module head), which outlasts `&self`.
        unsafe { &*self.to.load(Acquire) }
    }

    /// Another owner of the target.
    pub(crate) fn share(&self) -> Arc<T> {
        let to = self.to.load(Acquire);
        // SAFETY: from Arc::into_raw. Not dropped before the pin ends under which `self` was reached,
        // whoever replaces it meanwhile, so there is a count while we add one.
        unsafe {
            Arc::increment_strong_count(to);
            Arc::from_raw(to)
        }
    }

    /// Put another target in place. The old one goes to the reclaimer.
    pub(crate) fn replace(&self, by: Arc<T>) -> Garbage {
        let old = self.to.swap(Arc::into_raw(by).cast_mut(), AcqRel);
        // SAFETY: `old` is from Arc::into_raw; its count passes from the pointer to this Arc.
        Garbage::new(unsafe { Arc::from_raw(old) })
    }
}

impl<T> Drop for Protected<T> {
    fn drop(&mut self) {
        // SAFETY: as in `replace`; nobody else can reach the pointer any more.
        drop(unsafe { Arc::from_raw(self.to.load(Relaxed)) });
    }
}

/// A pointer to a shared `T`, or null.
pub(crate) struct ProtectedOption<T> {
    to: AtomicPtr<T>,
    owns: PhantomData<Arc<T>>,
}

impl<T: Send + Sync + 'static> ProtectedOption<T> {
    pub(crate) fn new(to: Option<Arc<T>>) -> Self {
        let to = to.map_or(ptr::null_mut(), |to| Arc::into_raw(to).cast_mut());
        Self {
            to: AtomicPtr::new(to),
            owns: PhantomData,
        }
    }

    #[inline]
    pub(crate) fn load(&self) -> Option<&T> {
        // SAFETY: as for Protected; null is seen as None.
        unsafe { self.to.load(Acquire).as_ref() }
    }

    /// Another owner of the target, if there is one.
    pub(crate) fn share(&self) -> Option<Arc<T>> {
        let to = self.to.load(Acquire);
        // SAFETY: as for Protected, if it isn't null.
        (!to.is_null()).then(|| unsafe {
            Arc::increment_strong_count(to);
            Arc::from_raw(to)
        })
    }

    /// Put another target, or none, in place. The old one goes to the reclaimer.
    pub(crate) fn replace(&self, by: Option<Arc<T>>) -> Option<Garbage> {
        let by = by.map_or(ptr::null_mut(), |to| Arc::into_raw(to).cast_mut());
        let old = self.to.swap(by, AcqRel);
        // SAFETY: if not null, `old` is from Arc::into_raw; its count passes to this Arc.
        (!old.is_null()).then(|| Garbage::new(unsafe { Arc::from_raw(old) }))
    }
}

impl<T> Drop for ProtectedOption<T> {
    fn drop(&mut self) {
        let old = self.to.load(Relaxed);
        if !old.is_null() {
            // SAFETY: as in `replace`; nobody else can reach the pointer any more.
            drop(unsafe { Arc::from_raw(old) });
        }
    }
}

/// One or the other.
#[derive(Clone, Copy)]
pub(crate) enum Either<P> {
    To(P),
    /// Any 63 bits.
    Number(u64),
}

/// A pointer to a shared `T`, or a number in its place: an odd address.
pub(crate) struct Tagged<T> {
    to: AtomicPtr<T>,
    owns: PhantomData<Arc<T>>,
}

const _: () = assert!(usize::BITS == u64::BITS);

impl<T: Send + Sync + 'static> Tagged<T> {
    pub(crate) fn new(to: Either<Arc<T>>) -> Self {
        Self {
            to: AtomicPtr::new(Self::pack(to)),
            owns: PhantomData,
        }
    }

    fn pack(to: Either<Arc<T>>) -> *mut T {
        const { assert!(align_of::<T>() > 1) };
        match to {
            Either::To(to) => Arc::into_raw(to).cast_mut(),
            Either::Number(number) => ptr::without_provenance_mut((number << 1 | 1) as usize),
        }
    }

    fn number(to: *mut T) -> Option<u64> {
        let address = to.addr() as u64;
        (address & 1 != 0).then_some(address >> 1)
    }

    #[inline]
    pub(crate) fn load(&self) -> Either<&T> {
        let to = self.to.load(Acquire);
        match Self::number(to) {
            Some(number) => Either::Number(number),
            // SAFETY: as for Protected: what isn't odd is from Arc::into_raw.
            None => Either::To(unsafe { &*to }),
        }
    }

    /// Another owner of the target.
    pub(crate) fn share(&self) -> Either<Arc<T>> {
        let to = self.to.load(Acquire);
        match Self::number(to) {
            Some(number) => Either::Number(number),
            // SAFETY: as for Protected: what isn't odd is from Arc::into_raw, and has a count.
            None => Either::To(unsafe {
                Arc::increment_strong_count(to);
                Arc::from_raw(to)
            }),
        }
    }

    /// Put something else in place. An old target goes to the reclaimer.
    pub(crate) fn replace(&self, by: Either<Arc<T>>) -> Option<Garbage> {
        let old = self.to.swap(Self::pack(by), AcqRel);
        // SAFETY: what isn't odd is from Arc::into_raw; its count passes to this Arc.
        let old = Self::number(old)
            .is_none()
            .then(|| unsafe { Arc::from_raw(old) });
        old.map(Garbage::new)
    }
}

impl<T> Drop for Tagged<T> {
    fn drop(&mut self) {
        let old = self.to.load(Relaxed);
        if old.addr() & 1 == 0 {
            // SAFETY: as in `replace`; nobody else can reach the pointer any more.
            drop(unsafe { Arc::from_raw(old) });
        }
    }
}

/// A pointer that readers reach without being pinned yet: reading it asks for the pin.
pub(crate) struct Root<T>(Protected<T>);

impl<T: Send + Sync + 'static> Root<T> {
    pub(crate) fn new(to: Arc<T>) -> Self {
        Self(Protected::new(to))
    }

    /// The target, for as long as the pin. The caller has checked that `guard` belongs to the
    /// collector to which the target will be retired.
    #[inline]
    pub(crate) fn load<'g>(&'g self, _guard: &'g Guard) -> &'g T {
        self.0.load()
    }

    pub(crate) fn replace(&self, by: Arc<T>) -> Garbage {
        self.0.replace(by)
    }
}
