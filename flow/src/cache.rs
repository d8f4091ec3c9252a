//! What an executor keeps for itself between lookups: which mask a packet's hash matched last, and its
//! counters.
//!
//! An entry is a hint: of the masks that aren't in the table's tree the one it names is searched first,
//! and what is found there matches, since any match is right. So nothing needs to be told to executors
//! when masks come, go or change places. Where the tree names a packet's mask the hint isn't needed (to
//! follow it took longer than the tree); it is kept all the same, as the protocol counts how often it is
//! right.

/// Most entries that a mask cache can have (the protocol's `MASKS_CACHE_SIZE` is at most this here).
pub const MASK_CACHE_MAX: u32 = 4096;
/// Entries of a mask cache unless set otherwise, as in the kernel module.
pub const MASK_CACHE_DEFAULT: u32 = 256;

/// Counters of lookups, an executor's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupCounters {
    /// Packets that matched a flow.
    pub hit: u64,
    /// Packets that matched none.
    pub missed: u64,
    /// Masks that were looked at.
    pub mask_hit: u64,
    /// Packets whose flow has the mask that the cache remembered for their hash.
    pub cache_hit: u64,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    /// Of the packet; 0: the entry is empty.
    hash: u32,
    /// Where the subtable stood when it matched.
    subtable: u32,
}

/// An executor's mask cache. Its size follows the table's setting by itself.
#[derive(Default)]
pub struct MaskCache {
    /// None, or a power of two.
    entries: Box<[Entry]>,
    /// Hits since the last that told its subtable of its use.
    tick: u32,
    /// All packets of the last group belonged to one flow: perhaps those of the next do too.
    pub(crate) alike: bool,
}

impl MaskCache {
    /// Hits from one sample to the next of use, since all executors write the same word then. Prime, so
    /// that no rhythm of the traffic hides a mask.
    const SAMPLE: u32 = 1021;

    /// An empty cache.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A packet matched: is it one that is to be counted as its mask's use?
    #[inline]
    pub(crate) fn is_sample(&mut self) -> bool {
        self.tick += 1;
        let is = self.tick == Self::SAMPLE;
        if is {
            self.tick = 0;
        }
        is
    }

    /// Make the cache have `size` entries, which is 0 or a power of two.
    #[inline]
    pub(crate) fn fit(&mut self, size: u32) {
        if self.entries.len() != size as usize {
            self.resize(size);
        }
    }

    #[cold]
    fn resize(&mut self, size: u32) {
        self.entries = vec![Entry::default(); size as usize].into_boxed_slice();
    }

    /// The two places where `hash` may be.
    #[inline]
    fn places(&self, hash: u32) -> Option<[usize; 2]> {
        if hash == 0 {
            return None;
        }
        let mask = self.entries.len().checked_sub(1)?;
        Some([hash as usize & mask, (hash >> 16) as usize & mask])
    }

    /// Where the subtable stood that matched `hash` last.
    #[inline]
    pub(crate) fn get(&self, hash: u32) -> Option<u32> {
        let places = self.places(hash)?;
        places
            .iter()
            .map(|&at| self.entries[at])
            .find(|entry| entry.hash == hash)
            .map(|e| e.subtable)
    }

    /// Remember that `subtable` matched `hash`.
    pub(crate) fn put(&mut self, hash: u32, subtable: u32) {
        let Some([first, second]) = self.places(hash) else {
            return;
        };
        let taken = |at: usize| self.entries[at].hash != hash && self.entries[at].hash != 0;
        // Two rivals: the newer one gets its first place.
        let at = if taken(first) && !taken(second) {
            second
        } else {
            first
        };
        self.entries[at] = Entry { hash, subtable };
    }
}

impl std::fmt::Debug for MaskCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MaskCache")
            .field("entries", &self.entries.len())
            .finish_non_exhaustive()
    }
}
