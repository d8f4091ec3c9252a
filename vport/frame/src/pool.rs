//! Buffers to be used again.
//!
//! A pool belongs to one worker: no locks, no atomics. A frame goes back by hand ([`Pool::put`]) into
//! whichever pool its worker has; a frame that is dropped instead gives its memory to the allocator,
//! which is slow but right.

use crate::buffer::{Frame, HEADROOM, MAX_LEN};

/// Bytes of a buffer for a packet of the usual MTU, headroom included.
pub const SMALL: usize = 2048;
/// Bytes of a buffer for a packet that stands for several, headroom included.
pub const LARGE: usize = HEADROOM + MAX_LEN;
/// What a frame of [`SMALL`] can hold.
pub const SMALL_SPACE: usize = SMALL - HEADROOM;

/// Free buffers in two sizes.
#[derive(Debug)]
pub struct Pool {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
    keep: usize,
    ident: u32,
}

impl Default for Pool {
    fn default() -> Self {
        Self::new(1024)
    }
}

impl Pool {
    /// A pool that keeps up to `keep` free small buffers, and an eighth of that of large ones.
    pub fn new(keep: usize) -> Self {
        Self {
            small: Vec::new(),
            large: Vec::new(),
            keep,
            ident: 0,
        }
    }

    /// Where the identifications of IPv6 fragments begin to be counted: let workers begin apart.
    pub fn seed_idents(&mut self, seed: u32) {
        self.ident = seed;
    }

    /// An empty frame with [`SMALL_SPACE`] bytes of space, [`HEADROOM`] in front.
    #[inline]
    pub fn small(&mut self) -> Frame {
        Frame::in_buffer(self.small.pop().unwrap_or_else(|| allocate(SMALL)))
    }

    /// An empty frame with [`MAX_LEN`] bytes of space, [`HEADROOM`] in front.
    #[inline]
    pub fn large(&mut self) -> Frame {
        Frame::in_buffer(self.large.pop().unwrap_or_else(|| allocate(LARGE)))
    }

    /// An empty frame with space for `len` bytes at least ([`MAX_LEN`] at most).
    #[inline]
    pub fn take(&mut self, len: usize) -> Frame {
        if len <= SMALL_SPACE {
            self.small()
        } else {
            self.large()
        }
    }

    /// Takes a frame's buffer back; one that was lent goes to its lender.
    #[inline]
    pub fn put(&mut self, frame: Frame) {
        let Some(storage) = frame.into_buffer() else {
            return;
        };
        // Buffers of other sizes (grown, or exactly measured copies) aren't worth a list of their own.
        match storage.len() {
            SMALL if self.small.len() < self.keep => self.small.push(storage),
            LARGE if self.large.len() < self.keep.div_ceil(8) => self.large.push(storage),
            _ => {}
        }
    }

    /// A deep copy: the frame's bytes, tag and offloads, with [`HEADROOM`] in front.
    pub fn copy(&mut self, frame: &Frame) -> Frame {
        let mut copy = self.take(frame.len());
        if let Some(space) = copy.space_mut().get_mut(..frame.len()) {
            space.copy_from_slice(frame.bytes());
        }
        copy.set_len(frame.len());
        copy.vlan = frame.vlan;
        copy.class = frame.class;
        copy.offload = frame.offload;
        copy.tunnel.clone_from(&frame.tunnel);
        copy
    }

    /// An identification for the fragments of the next IPv6 packet that is cut: not the last one's.
    pub(crate) fn next_ident(&mut self) -> u32 {
        self.ident = self.ident.wrapping_add(1);
        self.ident
    }

    /// How many free buffers are kept now: small, large.
    pub fn free(&self) -> (usize, usize) {
        (self.small.len(), self.large.len())
    }
}

/// Zeroed by the allocator: for large ones pages that cost nothing until they are touched.
#[cold]
fn allocate(bytes: usize) -> Box<[u8]> {
    vec![0; bytes].into_boxed_slice()
}
