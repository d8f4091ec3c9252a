//! The next definition of each function that we replace: the C library's, or that of another
//! preloaded library. Resolved by the constructor, or on first use by a hook that comes before it:
//! `dlsym` takes a lock, which a hook must not meet later (after a fork in mid-dlopen).

use core::ffi::{CStr, c_void};
use core::marker::PhantomData;
use core::sync::atomic::{
    AtomicPtr,
    Ordering::{Acquire, Release},
};

/// A function of type `F` (an `extern` function pointer), by name.
pub struct Next<F> {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
    function: PhantomData<F>,
}

impl<F: Copy> Next<F> {
    /// # Safety
    /// `F` is the type of the C function with this name.
    pub const unsafe fn new(name: &'static CStr) -> Self {
        const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
        Self {
            name,
            address: AtomicPtr::new(core::ptr::null_mut()),
            function: PhantomData,
        }
    }

    /// None if nobody defines it.
    #[inline]
    pub fn get(&self) -> Option<F> {
        let mut address = self.address.load(Acquire);
        if address.is_null() {
            // SAFETY: a C string.
            address = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
            if address.is_null() {
                return None;
            }
            self.address.store(address, Release);
        }
        // SAFETY: the function's address, and `F` its type (`new`); sizes are equal.
        Some(unsafe { core::mem::transmute_copy::<*mut c_void, F>(&address) })
    }
}
