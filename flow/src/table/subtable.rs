//! Flows that share a mask, and the row of all subtables as packets search it.
//!
//! The row is ordered by use. A mask's subtable keeps its place until it goes, which leaves a hole, or
//! until the row is built anew (grown, compacted or sorted). A reader who walks the old row finds there
//! all that was in it.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};

use crossbeam_utils::CachePadded;

use super::index::Index;
use super::protected::ProtectedOption;
use super::reclaim::Garbage;
use super::seed::Seed;
use super::slots::Slots;
use crate::flow::Flow;
use crate::key::Key;
use crate::mask::Mask;

pub(crate) struct Subtable {
    pub(crate) mask: Arc<Mask>,
    pub(crate) index: Index,
    /// Where it stands in the row; a hint to readers.
    pub(crate) place: AtomicU32,
    /// Packets that matched, sampled. Executors write here, seldom; so not beside the mask.
    pub(crate) used: CachePadded<AtomicU64>,
}

impl Subtable {
    pub(crate) fn new(mask: Arc<Mask>) -> Arc<Self> {
        Arc::new(Self {
            mask,
            index: Index::new(),
            place: AtomicU32::new(0),
            used: CachePadded::default(),
        })
    }

    /// Packets that matched, sampled.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Where it stands in the row: what a mask cache remembers.
    #[inline]
    pub(crate) fn place(&self) -> u32 {
        self.place.load(Relaxed)
    }

    /// The flow of this mask that matches.
    #[inline]
    pub(crate) fn find<'a>(&self, slots: &'a Slots, seed: &Seed, key: &Key) -> Option<&'a Flow> {
        self.index.find(seed.masked(&self.mask, key), |slot| {
            let (_, flow) = slots.get(slot)?;
            let ours = Arc::ptr_eq(&flow.mask, &self.mask);
            (ours && self.mask.matches(key, &flow.key)).then_some(flow)
        })
    }
}

/// The row of subtables: places, some of them empty.
pub(crate) struct Row {
    places: Box<[ProtectedOption<Subtable>]>,
    /// Places in use so far, holes included.
    len: AtomicUsize,
}

impl Row {
    /// A row of these, with room for as many more.
    pub(crate) fn new(subtables: impl ExactSizeIterator<Item = Arc<Subtable>>) -> Arc<Self> {
        let len = subtables.len();
        let room = (len * 2).max(4);
        let places = subtables
            .map(Some)
            .chain(std::iter::repeat(None))
            .take(room)
            .map(ProtectedOption::new);
        Arc::new(Self {
            places: places.collect(),
            len: AtomicUsize::new(len),
        })
    }

    #[inline]
    pub(crate) fn get(&self, place: u32) -> Option<&Subtable> {
        self.places.get(place as usize)?.load()
    }

    #[inline]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Subtable> {
        self.places
            .iter()
            .take(self.len.load(Acquire))
            .filter_map(ProtectedOption::load)
    }

    /// For the writer: the place where it now stands. None if there is no room.
    pub(crate) fn push(&self, subtable: &Arc<Subtable>) -> Option<u32> {
        let place = self.len.load(Relaxed);
        // The place was empty since the row was built, so nothing comes out.
        let none = self.places.get(place)?.replace(Some(Arc::clone(subtable)));
        debug_assert!(none.is_none());
        self.len.store(place + 1, Release);
        u32::try_from(place).ok()
    }

    /// For the writer: leave a hole.
    pub(crate) fn clear(&self, place: u32) -> Option<Garbage> {
        self.places.get(place as usize)?.replace(None)
    }

    pub(crate) fn len(&self) -> usize {
        self.len.load(Relaxed)
    }
}
