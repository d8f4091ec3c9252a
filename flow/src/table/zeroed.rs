//! Big slices of zeros, straight from the system: their pages cost nothing until they are touched, so
//! that a table grows without a pause. (What an allocator has used before it has to fill with zeros.)
#![allow(unsafe_code)] // the allocation itself, and the promise that zeros are a value

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Deref;
use std::ptr::{NonNull, null_mut};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// All bytes zero is a value, the default one, which needs no drop.
///
/// # Safety
/// Just that.
pub(crate) unsafe trait Zeroed: Default + Send + Sync {}

// SAFETY: atomic integers and nothing else.
unsafe impl Zeroed for super::index::Bucket {}

/// Slices of more bytes than this are mapped, on pages of their own.
const MAPPED: usize = 1 << 16;
/// No more than a page's, so that what is mapped is aligned.
const MOST_ALIGNED: usize = 4096;

/// `len` times zero, at the alignment of `T`.
pub(crate) struct ZeroedSlice<T> {
    start: NonNull<T>,
    len: usize,
    allocation: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its elements, and gives shared references only.
unsafe impl<T: Zeroed> Send for ZeroedSlice<T> {}
// SAFETY: as above; `T: Zeroed` implies `T: Sync`.
unsafe impl<T: Zeroed> Sync for ZeroedSlice<T> {}

impl<T: Zeroed> ZeroedSlice<T> {
    /// Panics if `len` elements can't be addressed; aborts if memory is exhausted.
    pub(crate) fn new(len: usize) -> Self {
        const {
            assert!(size_of::<T>() > 0 && align_of::<T>() <= MOST_ALIGNED);
        }
        // Asked for with the allocator's natural alignment and aligned here: of memory with a greater
        // alignment the allocator writes all zeros itself, touching each page.
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|n| n.checked_add(align_of::<T>()));
        let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 8).ok());
        let Some(layout) = layout else {
            unreachable!("more flows than memory has addresses")
        };
        let allocation = if layout.size() > MAPPED {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: new pages, anywhere; nobody else has them.
            unsafe { mmap_anonymous(null_mut(), layout.size(), access, MapFlags::PRIVATE) }
                .map_or(null_mut(), |start| start.cast())
        } else {
            // SAFETY: the size isn't zero: the alignment at least.
            unsafe { alloc_zeroed(layout) }
        };
        let Some(allocation) = NonNull::new(allocation) else {
            handle_alloc_error(layout)
        };
        let skip = allocation.align_offset(align_of::<T>());
        assert!(skip < align_of::<T>() || skip == 0);
        // SAFETY: `skip` is less than the alignment, by which the allocation is longer.
        let start = unsafe { allocation.add(skip) }.cast();
        Self {
            start,
            len,
            allocation,
            layout,
        }
    }
}

impl<T> Deref for ZeroedSlice<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements lie from `start`, aligned, and zeros are values of T (`new`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for ZeroedSlice<T> {
    fn drop(&mut self) {
        if self.layout.size() > MAPPED {
            let start = self.allocation.as_ptr().cast();
            // SAFETY: mapped in `new` with this length. The elements need no drop.
            let unmapped = unsafe { munmap(start, self.layout.size()) };
            debug_assert!(unmapped.is_ok());
        } else {
            // SAFETY: allocated in `new` with this layout. The elements need no drop.
            unsafe { dealloc(self.allocation.as_ptr(), self.layout) };
        }
    }
}
