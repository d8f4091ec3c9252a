//! Which bits of a [`Key`] a flow compares.
//!
//! A mask is kept as the list of its non-zero 64-bit chunks, so that hashing and comparing touch those
//! only: a megaflow of Open vSwitch uses about ten of a key's eighty-one.

use crate::key::{KEY_BYTES, Key};

/// 64-bit chunks of a [`Key`].
pub const KEY_CHUNKS: usize = KEY_BYTES / 8;
const _: () = assert!(KEY_CHUNKS <= u8::MAX as usize);

/// A key as chunks of eight bytes (the key's own alignment is four).
pub(crate) type Chunks = [[u8; 8]; KEY_CHUNKS];

#[inline]
pub(crate) fn chunks(key: &Key) -> &Chunks {
    zerocopy::transmute_ref!(key)
}

#[inline]
pub(crate) fn chunk(chunks: &Chunks, index: u8) -> u64 {
    u64::from_ne_bytes(chunks[usize::from(index)])
}

/// A mask: the bits that are compared. Immutable; one object for all flows of a table that share it.
#[derive(Clone, PartialEq, Eq)]
pub struct Mask {
    /// Which chunks are non-zero, ascending.
    index: Box<[u8]>,
    /// Their bits, in the same order; native byte order, as all chunks in this crate.
    bits: Box<[u64]>,
}

impl Mask {
    /// The mask with the ones of `key`.
    #[must_use]
    pub fn new(key: &Key) -> Self {
        let chunks = chunks(key);
        let used = || (0..KEY_CHUNKS).filter(|&at| chunks[at] != [0; 8]);
        Self {
            // The assertion at the head: every chunk's index fits into a byte.
            index: used().map(|at| at as u8).collect(),
            bits: used().map(|at| u64::from_ne_bytes(chunks[at])).collect(),
        }
    }

    /// The mask in the layout of a key, ones where a bit is compared.
    #[must_use]
    pub fn to_key(&self) -> Key {
        self.expand(&self.bits)
    }

    /// How many 64-bit chunks are compared.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Nothing is compared: every packet matches.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The range of chunks in use: first, and one past the last. `(0, 0)` if there are none.
    #[must_use]
    pub fn range(&self) -> (usize, usize) {
        match (self.index.first(), self.index.last()) {
            (Some(&first), Some(&last)) => (usize::from(first), usize::from(last) + 1),
            _ => (0, 0),
        }
    }

    /// How many bits are compared.
    #[must_use]
    pub fn count_ones(&self) -> u32 {
        self.bits.iter().map(|bits| bits.count_ones()).sum()
    }

    /// The masked chunks of `key`, in ascending order.
    #[inline]
    pub(crate) fn masked<'a>(&'a self, key: &'a Key) -> impl Iterator<Item = u64> + 'a {
        let chunks = chunks(key);
        self.index
            .iter()
            .zip(&*self.bits)
            .map(|(&at, &bits)| chunk(chunks, at) & bits)
    }

    /// `key` under this mask, as a flow stores it.
    pub(crate) fn compact(&self, key: &Key) -> Box<[u64]> {
        self.masked(key).collect()
    }

    /// Does `key` under this mask equal `compact`?
    #[inline]
    pub(crate) fn matches(&self, key: &Key, compact: &[u64]) -> bool {
        // No early exit: a candidate of the right hash nearly always matches.
        let difference = self
            .masked(key)
            .zip(compact)
            .fold(0, |all, (have, want)| all | (have ^ want));
        difference == 0
    }

    /// The reverse of [`Mask::compact`]: zero where nothing is compared.
    pub(crate) fn expand(&self, compact: &[u64]) -> Key {
        let mut out: Chunks = [[0; 8]; KEY_CHUNKS];
        for (&at, value) in self.index.iter().zip(compact) {
            out[usize::from(at)] = value.to_ne_bytes();
        }
        zerocopy::transmute!(out)
    }

    /// Where among the chunks in use the chunk with this index is.
    pub(crate) fn place(&self, index: u8) -> Option<usize> {
        self.index.binary_search(&index).ok()
    }

    /// The bits of the chunks in use.
    pub(crate) fn bits(&self) -> &[u64] {
        &self.bits
    }

    /// The chunks in use: index and bits.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u8, u64)> + '_ {
        self.index.iter().copied().zip(self.bits.iter().copied())
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mask").field(&self.to_key()).finish()
    }
}
