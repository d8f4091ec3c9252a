//! Which bits of a [`Key`] a flow compares.
//!
//! A mask is kept as the list of its non-zero 64-bit chunks, so that hashing and comparing touch those
//! only: a megaflow of Open vSwitch uses about ten of a key's eighty-one.

use crate::key::{KEY_BYTES, Key};
use crate::table::prefetch::prefetch;

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

/// As many chunks as a mask has without memory of its own: enough for a connection over IPv6.
const INLINE: usize = 16;

/// A mask: the bits that are compared. Immutable; one object for all flows of a table that share it.
///
/// Lookups among thousands of masks wait for each one's memory, so it is all in one place.
#[derive(Clone, PartialEq, Eq)]
#[repr(C)]
pub struct Mask {
    len: usize,
    /// Index and bits of all chunks, if there are more than [`INLINE`].
    many: Option<Box<Many>>,
    /// Which chunks are non-zero, ascending.
    index: [u8; INLINE],
    /// Their bits, in the same order; native byte order, as all chunks in this crate.
    bits: [u64; INLINE],
}

/// As in [`Mask`].
#[derive(Clone, PartialEq, Eq)]
struct Many {
    index: Box<[u8]>,
    bits: Box<[u64]>,
}

impl Mask {
    /// The mask with the ones of `key`.
    #[must_use]
    pub fn new(key: &Key) -> Self {
        let chunks = chunks(key);
        let used = || (0..KEY_CHUNKS).filter(|&at| chunks[at] != [0; 8]);
        let len = used().count();
        let mut mask = Self {
            len,
            many: None,
            index: [0; INLINE],
            bits: [0; INLINE],
        };
        // The assertion at the head: every chunk's index fits into a byte.
        if len > INLINE {
            let index = used().map(|at| at as u8).collect();
            let bits = used().map(|at| u64::from_ne_bytes(chunks[at])).collect();
            mask.many = Some(Box::new(Many { index, bits }));
        } else {
            for ((index, bits), at) in mask.index.iter_mut().zip(&mut mask.bits).zip(used()) {
                (*index, *bits) = (at as u8, u64::from_ne_bytes(chunks[at]));
            }
        }
        mask
    }

    /// Ask for what is compared, most of it.
    #[inline]
    pub(crate) fn prefetch(&self) {
        prefetch(self);
        prefetch(&self.bits[INLINE / 4]);
    }

    /// Indices of the chunks in use.
    #[inline]
    fn index(&self) -> &[u8] {
        match &self.many {
            None => &self.index[..self.len],
            Some(many) => &many.index,
        }
    }

    /// The bits of the chunks in use.
    #[inline]
    pub(crate) fn bits(&self) -> &[u64] {
        match &self.many {
            None => &self.bits[..self.len],
            Some(many) => &many.bits,
        }
    }

    /// The mask in the layout of a key, ones where a bit is compared.
    #[must_use]
    pub fn to_key(&self) -> Key {
        self.expand(self.bits())
    }

    /// How many 64-bit chunks are compared.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is compared: every packet matches.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The range of chunks in use: first, and one past the last. `(0, 0)` if there are none.
    #[must_use]
    pub fn range(&self) -> (usize, usize) {
        match (self.index().first(), self.index().last()) {
            (Some(&first), Some(&last)) => (usize::from(first), usize::from(last) + 1),
            _ => (0, 0),
        }
    }

    /// How many bits are compared.
    #[must_use]
    pub fn count_ones(&self) -> u32 {
        self.bits().iter().map(|bits| bits.count_ones()).sum()
    }

    /// The masked chunks of `key`, in ascending order.
    #[inline]
    pub(crate) fn masked<'a>(&'a self, key: &'a Key) -> impl Iterator<Item = u64> + 'a {
        let chunks = chunks(key);
        self.index()
            .iter()
            .zip(self.bits())
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
        for (&at, value) in self.index().iter().zip(compact) {
            out[usize::from(at)] = value.to_ne_bytes();
        }
        zerocopy::transmute!(out)
    }

    /// Where among the chunks in use the chunk with this index is.
    pub(crate) fn place(&self, index: u8) -> Option<usize> {
        self.index().binary_search(&index).ok()
    }

    /// The chunks in use: index and bits.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u8, u64)> + '_ {
        self.index()
            .iter()
            .copied()
            .zip(self.bits().iter().copied())
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mask").field(&self.to_key()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_of_any_length_compares_its_bits_and_no_others() {
        // From none to all chunks, on both sides of the bound between the two ways to keep them.
        for len in 0..=KEY_CHUNKS {
            let mut ones: Chunks = [[0; 8]; KEY_CHUNKS];
            ones[KEY_CHUNKS - len..].fill([0, 0, 0xf0, 0, 0, 0, 0, 1]);
            let ones: Key = zerocopy::transmute!(ones);
            let mask = Mask::new(&ones);
            assert_eq!((mask.len(), mask.to_key()), (len, ones));
            assert_eq!(mask.count_ones() as usize, len * 5);
            let full: Key = zerocopy::transmute!([[0xffu8; 8]; KEY_CHUNKS]);
            let compact = mask.compact(&full);
            assert_eq!(mask.expand(&compact), ones);
            assert!(mask.matches(&ones, &compact));
            assert_eq!(mask.matches(&Key::ZERO, &compact), len == 0);
        }
    }
}
