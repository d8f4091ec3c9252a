//! Flows that share a mask, and rows of such subtables.
//!
//! A subtable keeps its place in a row as long as it is there; the hole that it leaves is filled by one
//! that comes later. So a row never moves what is in it, and grows without a copy.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};

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
    /// Where it stands in the row of all subtables.
    pub(crate) place: u32,
    /// Packets that matched, sampled. Executors write here, seldom; so not beside the mask.
    used: CachePadded<AtomicU64>,
}

impl Subtable {
    /// Without a flow yet. Its place is the caller's to keep.
    pub(crate) fn new(mask: Arc<Mask>, place: u32) -> Arc<Self> {
        Arc::new(Self {
            mask,
            index: Index::new(),
            place,
            used: CachePadded::default(),
        })
    }

    /// Packets that matched, sampled.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// A sampled packet matched.
    pub(crate) fn count(&self) {
        self.used.fetch_add(1, Relaxed);
    }

    /// What was used long ago counts less and less.
    pub(crate) fn age(&self) {
        self.used.fetch_sub(self.used() / 2, Relaxed);
    }

    /// Ask for what [`Subtable::find`] reads first.
    #[inline]
    pub(crate) fn prefetch(&self) {
        self.mask.prefetch();
        self.index.prefetch_array();
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

/// Places of the first segment; each has twice those of the one before.
const FIRST: u32 = 16;
/// All together number every place that a `u32` can, but the last few.
const SEGMENTS: usize = 28;

type Segment = Box<[ProtectedOption<Subtable>]>;

/// Places, some of them empty.
pub(crate) struct Row {
    segments: [OnceLock<Segment>; SEGMENTS],
    /// Places that were ever in use.
    len: AtomicU32,
}

impl Row {
    pub(crate) fn new() -> Self {
        Self {
            segments: [const { OnceLock::new() }; SEGMENTS],
            len: AtomicU32::new(0),
        }
    }

    /// Segment, and place within.
    #[inline]
    const fn locate(place: u32) -> (usize, usize) {
        let nth = place as u64 + FIRST as u64;
        let segment = nth.ilog2() - FIRST.ilog2();
        let at = nth - ((FIRST as u64) << segment);
        (segment as usize, at as usize)
    }

    #[inline]
    pub(crate) fn get(&self, place: u32) -> Option<&Subtable> {
        let (segment, at) = Self::locate(place);
        self.segments.get(segment)?.get()?.get(at)?.load()
    }

    #[inline]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Subtable> {
        self.places().filter_map(ProtectedOption::load)
    }

    /// Others own what this yields.
    pub(crate) fn share(&self) -> impl Iterator<Item = Arc<Subtable>> {
        self.places().filter_map(ProtectedOption::share)
    }

    #[inline]
    fn places(&self) -> impl Iterator<Item = &ProtectedOption<Subtable>> {
        self.segments
            .iter()
            .map_while(OnceLock::get)
            .flatten()
            .take(self.len() as usize)
    }

    /// Was no place ever in use?
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Places that were ever in use.
    #[inline]
    pub(crate) fn len(&self) -> u32 {
        self.len.load(Acquire)
    }

    /// For the writer: fill a place that is empty, be it the one after the last.
    pub(crate) fn put(&self, place: u32, subtable: Arc<Subtable>) -> Option<Garbage> {
        let (segment, at) = Self::locate(place);
        let places = self.segments.get(segment)?.get_or_init(|| {
            (0..(FIRST as usize) << segment)
                .map(|_| ProtectedOption::new(None))
                .collect()
        });
        let before = places.get(at)?.replace(Some(subtable));
        if place >= self.len.load(Relaxed) {
            self.len.store(place + 1, Release);
        }
        before
    }

    /// For the writer: leave a hole.
    pub(crate) fn clear(&self, place: u32) -> Option<Garbage> {
        let (segment, at) = Self::locate(place);
        self.segments.get(segment)?.get()?.get(at)?.replace(None)
    }

    /// For the writer: leave a hole where `subtable` is.
    pub(crate) fn remove(&self, subtable: &Arc<Subtable>) -> Option<(u32, Garbage)> {
        let is = |there: &Subtable| std::ptr::eq(there, Arc::as_ptr(subtable));
        let at = self
            .places()
            .position(|place| place.load().is_some_and(is))?;
        let place = u32::try_from(at).ok()?;
        Some((place, self.clear(place)?))
    }
}
