//! Mapped memory that is unmapped when dropped.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Pages, readable and writable. What is in them is shared with the kernel: whoever uses the pointer
/// says who may touch what, and when.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: plain memory, not tied to a thread; all access goes through raw pointers, whose users argue
// theirs.
unsafe impl Send for Mapping {}
// SAFETY: as above: a shared Mapping only gives its address and length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed memory of our own. A child after fork hasn't got it: copying on write could else give
    /// us a new page, while the kernel keeps to the old one.
    pub(super) fn anonymous(length: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        let mapping = Self { start, length };
        // SAFETY: advice on the mapping just made, that changes nothing in this process.
        unsafe { madvise(start.as_ptr().cast(), length, Advice::LinuxDontFork)? };
        Ok(mapping)
    }

    /// What `fd` has at `offset`, its pages in place already.
    pub(super) fn of(fd: BorrowedFd<'_>, length: usize, offset: u64) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel checks the length
        // against what is there.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                fd,
                offset,
            )?
        };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, length })
    }

    /// Gives the pages up, of memory of our own: zeroed ones are there when it is used again.
    pub(super) fn forget(&self) -> Result<(), Errno> {
        // SAFETY: within the mapping. Whoever reads there finds zeroes, as at the beginning: still
        // initialised memory. The callers know that nobody has a reference into it.
        unsafe {
            madvise(
                self.start.as_ptr().cast(),
                self.length,
                Advice::LinuxDontNeed,
            )
        }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length; whoever had pointers into it held this value too.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert!(result.is_ok());
    }
}
