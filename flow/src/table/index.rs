//! A hash table from 32-bit hashes to slot numbers: read without a lock, written by one.
//!
//! A bucket is a cache line: twelve slot numbers, a byte of each one's hash to skip most that differ,
//! and a count of those that had no room here and went on to a later bucket. An entry never moves
//! within its array, so one that stays is always found. Readers check what a slot holds; the index may
//! name a wrong one, when entries change under the reader.
//!
//! Growth and shrinking are gradual: a new array takes all new entries, and with each change one
//! bucket of the old array is copied over. Nothing is taken from the old array by that, so a reader
//! who searches both misses nothing; when all is copied the old one is retired.
//!
//! # Synchronization
//! - Insert: slot number, then tag with Release. Overflow counts along the way come before both.
//! - Readers load tags with Acquire, and `previous` *before* they search the current array: if it is
//!   gone already, then all that it held was copied before, and the current array shows it.
//! - Writers hold the table's mutex; the writer's own counts are atomics only for being shared.

use std::sync::Arc;

use super::atomic::{Acquire, AtomicU32, AtomicU64, AtomicUsize, Relaxed, Release};
use super::prefetch::prefetch;
use super::protected::{Protected, ProtectedOption};
use super::reclaim::Garbage;
use super::zeroed::ZeroedSlice;

/// Entries of a bucket.
const ENTRIES: usize = 12;
/// Entries that a bucket has on average when the table grows.
const FULL: usize = if cfg!(loom) { 1 } else { 9 };
const LOW_BITS: u64 = 0x0101_0101_0101_0101;
const HIGH_BITS: u64 = 0x8080_8080_8080_8080;
/// Tags of the entries from the ninth on are the low half of their word; the overflow count the other.
const OVERFLOW: u64 = 1 << 32;

#[derive(Default)]
#[repr(C, align(64))]
pub(super) struct Bucket {
    /// Tags of the first eight entries, then those of the last four and the overflow count.
    meta: [AtomicU64; 2],
    slots: [AtomicU32; ENTRIES],
}

/// The byte of a hash that a bucket keeps; never 0, which says "empty".
#[inline]
fn tag(hash: u32) -> u64 {
    u64::from((hash >> 24).max(1))
}

/// The highest bit of each byte that is zero. A byte above one that is zero may be named by mistake.
#[inline]
fn zero_bytes(word: u64) -> u64 {
    word.wrapping_sub(LOW_BITS) & !word & HIGH_BITS
}

impl Bucket {
    #[inline]
    fn overflow(&self) -> u64 {
        self.meta[1].load(Acquire) >> 32
    }

    /// Entries whose tag is `tag` (or not: readers check), as bits 8n+7 of two words.
    #[inline]
    fn candidates(&self, tag: u64) -> ([u64; 2], bool) {
        let wanted = tag * LOW_BITS;
        let (first, last) = (self.meta[0].load(Acquire), self.meta[1].load(Acquire));
        let found = [
            zero_bytes(first ^ wanted),
            zero_bytes(last ^ wanted) & (OVERFLOW - 1),
        ];
        (found, last >= OVERFLOW)
    }

    fn tag_at(&self, entry: usize) -> u64 {
        self.meta[entry / 8].load(Relaxed) >> (entry % 8 * 8) & 0xff
    }

    fn set_tag(&self, entry: usize, tag: u64) {
        let (word, shift) = (&self.meta[entry / 8], entry % 8 * 8);
        word.store(
            word.load(Relaxed) & !(0xff << shift) | tag << shift,
            Release,
        );
    }

    /// For the writer: room found, or not.
    fn put(&self, tag: u64, slot: u32) -> bool {
        let Some(entry) = (0..ENTRIES).find(|&entry| self.tag_at(entry) == 0) else {
            return false;
        };
        self.slots[entry].store(slot, Relaxed);
        self.set_tag(entry, tag);
        true
    }

    fn position(&self, tag: u64, slot: u32) -> Option<usize> {
        (0..ENTRIES).find(|&at| self.tag_at(at) == tag && self.slots[at].load(Relaxed) == slot)
    }
}

/// One array of buckets, and while it takes over, the one before.
struct Array {
    buckets: ZeroedSlice<Bucket>,
    previous: ProtectedOption<Array>,
}

impl Array {
    fn new(buckets: usize, previous: Option<Arc<Array>>) -> Arc<Self> {
        let previous = ProtectedOption::new(previous);
        Arc::new(Self {
            buckets: ZeroedSlice::new(buckets.next_power_of_two()),
            previous,
        })
    }

    /// The first bucket that may have `hash`.
    #[inline]
    fn home(&self, hash: u32) -> &Bucket {
        &self.buckets[hash as usize & (self.buckets.len() - 1)]
    }

    /// Buckets that may have `hash`, in order: its own, then its neighbours, around and around.
    #[inline]
    fn walk(&self, hash: u32) -> impl Iterator<Item = &Bucket> {
        let mask = self.buckets.len() - 1;
        let home = hash as usize;
        (0..=mask).map(move |step| &self.buckets[(home + step) & mask])
    }

    #[inline]
    fn find<R>(&self, hash: u32, accept: &mut impl FnMut(u32) -> Option<R>) -> Option<R> {
        let tag = tag(hash);
        for bucket in self.walk(hash) {
            let (words, more) = bucket.candidates(tag);
            for (word, mut found) in words.into_iter().enumerate() {
                while found != 0 {
                    let entry = word * 8 + found.trailing_zeros() as usize / 8;
                    let accepted = bucket
                        .slots
                        .get(entry)
                        .and_then(|s| accept(s.load(Relaxed)));
                    if accepted.is_some() {
                        return accepted;
                    }
                    found &= found - 1;
                }
            }
            if !more {
                break;
            }
        }
        None
    }

    /// There is always room: tables grow long before they are full.
    fn insert(&self, hash: u32, slot: u32) {
        for bucket in self.walk(hash) {
            if bucket.put(tag(hash), slot) {
                return;
            }
            bucket.meta[1].store(bucket.meta[1].load(Relaxed) + OVERFLOW, Release);
        }
        debug_assert!(false, "a table without room");
    }

    fn remove(&self, hash: u32, slot: u32) -> bool {
        for (passed, bucket) in self.walk(hash).enumerate() {
            if let Some(entry) = bucket.position(tag(hash), slot) {
                bucket.set_tag(entry, 0);
                for before in self.walk(hash).take(passed) {
                    before.meta[1].store(before.meta[1].load(Relaxed) - OVERFLOW, Release);
                }
                return true;
            }
            if bucket.overflow() == 0 {
                return false;
            }
        }
        false
    }
}

pub(crate) struct Index {
    current: Protected<Array>,
    /// The writer's: entries, and how many buckets of the previous array are copied.
    len: AtomicUsize,
    copied: AtomicUsize,
}

impl Index {
    pub(crate) fn new() -> Self {
        Self {
            current: Protected::new(Array::new(1, None)),
            len: AtomicUsize::new(0),
            copied: AtomicUsize::new(0),
        }
    }

    /// The first slot entered under `hash` that is accepted. Slots of other hashes may be offered, and
    /// one slot more than once.
    #[inline]
    pub(crate) fn find<R>(&self, hash: u32, mut accept: impl FnMut(u32) -> Option<R>) -> Option<R> {
        let current = self.current.load();
        let previous = current.previous.load();
        let found = current.find(hash, &mut accept);
        match previous {
            Some(previous) if found.is_none() => previous.find(hash, &mut accept),
            _ => found,
        }
    }

    /// Ask for the array in use.
    #[inline]
    pub(super) fn prefetch_array(&self) {
        prefetch(self.current.load());
    }

    /// Ask for the bucket of this hash.
    #[inline]
    pub(super) fn prefetch(&self, hash: u32) {
        prefetch(self.current.load().home(hash));
    }

    /// A slot that [`Index::find`] offers for this hash, from the bucket asked for. There may be others.
    #[inline]
    pub(super) fn guess(&self, hash: u32) -> Option<u32> {
        let bucket = self.current.load().home(hash);
        let ([first, last], _) = bucket.candidates(tag(hash));
        let entry = match (first, last) {
            (0, 0) => return None,
            (0, _) => 8 + last.trailing_zeros() / 8,
            _ => first.trailing_zeros() / 8,
        };
        let slot = bucket.slots.get(entry as usize)?;
        Some(slot.load(Relaxed))
    }

    /// Enter `slot`, which isn't there yet. `hash_of` tells the hash of any slot that is.
    pub(crate) fn insert(
        &self,
        hash: u32,
        slot: u32,
        hash_of: impl Fn(u32) -> Option<u32>,
        garbage: &mut Vec<Garbage>,
    ) {
        let len = self.len.load(Relaxed) + 1;
        self.len.store(len, Relaxed);
        self.copy_some(1, &hash_of, garbage);
        let buckets = self.current.load().buckets.len();
        if len > buckets * FULL {
            self.resize(buckets * 2, &hash_of, garbage);
        }
        self.current.load().insert(hash, slot);
    }

    /// Remove `slot`, entered under `hash`.
    pub(crate) fn remove(
        &self,
        hash: u32,
        slot: u32,
        hash_of: impl Fn(u32) -> Option<u32>,
        garbage: &mut Vec<Garbage>,
    ) -> bool {
        let current = self.current.load();
        let in_current = current.remove(hash, slot);
        let in_previous = current
            .previous
            .load()
            .is_some_and(|old| old.remove(hash, slot));
        if !in_current && !in_previous {
            return false;
        }
        let len = self.len.load(Relaxed).saturating_sub(1);
        self.len.store(len, Relaxed);
        // Two, since a shrunk array may soon shrink again: after fewer removals than there are buckets.
        self.copy_some(2, &hash_of, garbage);
        let buckets = self.current.load().buckets.len();
        if buckets >= 8 && len < buckets * FULL / 8 {
            self.resize(buckets / 4, &hash_of, garbage);
        }
        true
    }

    /// Begin to fill another array.
    fn resize(
        &self,
        buckets: usize,
        hash_of: &impl Fn(u32) -> Option<u32>,
        garbage: &mut Vec<Garbage>,
    ) {
        // Only two arrays at a time. The sizes are such that the copy is always done by then.
        self.copy_some(usize::MAX, hash_of, garbage);
        self.copied.store(0, Relaxed);
        let next = Array::new(buckets, Some(self.current.share()));
        garbage.push(self.current.replace(next));
        self.copy_some(1, hash_of, garbage);
    }

    /// Copy up to `most` buckets of the previous array, if there is one.
    fn copy_some(
        &self,
        most: usize,
        hash_of: &impl Fn(u32) -> Option<u32>,
        garbage: &mut Vec<Garbage>,
    ) {
        let current = self.current.load();
        let Some(previous) = current.previous.load() else {
            return;
        };
        let from = self.copied.load(Relaxed);
        let to = from.saturating_add(most).min(previous.buckets.len());
        for bucket in &previous.buckets[from..to] {
            for entry in (0..ENTRIES).filter(|&entry| bucket.tag_at(entry) != 0) {
                let slot = bucket.slots[entry].load(Relaxed);
                if let Some(hash) = hash_of(slot) {
                    current.insert(hash, slot);
                }
            }
        }
        self.copied.store(to, Relaxed);
        if to == previous.buckets.len() {
            garbage.extend(current.previous.replace(None));
        }
    }
}
