//! Asking for memory before it is needed.
//!
//! A lookup is a chain of loads, each of which names the next one's address. One packet waits for all of
//! them in turn; several packets that ask first and look later wait together (`batch`).
#![allow(unsafe_code)] // one instruction

/// Have the cache line in which `it` begins brought near. Nothing else happens, on some machines not even
/// that.
#[inline(always)]
pub(crate) fn prefetch<T: ?Sized>(it: &T) {
    prefetch_at(std::ptr::from_ref(it));
}

/// As [`prefetch`], at any address.
#[inline(always)]
pub(super) fn prefetch_at<T: ?Sized>(at: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is part of x86-64; it reads and writes nothing and faults for no
        // address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}
