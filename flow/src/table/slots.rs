//! Where flows live: numbered slots that never move, so that a flow is named by its slot from one
//! part of a dump to the next, and lies beside its neighbours when the table is walked.
//!
//! A slot is empty, or holds a flow and its birth (a number that rises with every flow). A flow that
//! is taken out stays readable for those who are pinned; the slot is used again when they are gone.
//! Memory is given back with the table, or with a flush.
//!
//! # Synchronization
//! A flow is written, then its birth stored with Release; readers load the birth with Acquire and read
//! the flow only if it isn't zero. Taking out swaps the birth to zero, so that one caller wins.
#![allow(unsafe_code)] // flows are written and dropped in place; see each argument

use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::atomic::{AcqRel, Acquire, AtomicU32, AtomicU64, Release, SharedCell};
use super::prefetch::{prefetch, prefetch_at};
use super::zeroed::{Zeroed, ZeroedSlice};
use crate::flow::Flow;

/// Slots of the first segment; each segment has twice those of the one before.
const FIRST: u32 = if cfg!(loom) { 2 } else { 64 };
/// All segments together number every slot below [`SLOTS_MAX`].
const SEGMENTS: usize = 26;
/// As many slots as there can be.
const SLOTS_MAX: u32 = u32::MAX - FIRST;

#[repr(C, align(64))]
struct Slot {
    /// 0: empty, or its flow is on its way out.
    birth: AtomicU64,
    flow: SharedCell<MaybeUninit<Flow>>,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            birth: AtomicU64::new(0),
            flow: SharedCell::new(MaybeUninit::zeroed()),
        }
    }
}

// The layout that `flow` speaks of: two cache lines.
const _: () = assert!(size_of::<Slot>() == 128 || cfg!(loom));

// SAFETY: its default is zeros: a birth of "empty", and a flow that isn't there. Slots needs the drop of
// flows, and does it itself; Slot has none.
unsafe impl Zeroed for Slot {}
// SAFETY: the cell is written only by the owner of an empty slot (`insert`) and by the one who drops a
// flow that nobody sees any more (`Vacated`); in between it is shared, and Flow is Sync.
unsafe impl Sync for Slot {}

/// Numbers of empty slots, in blocks: the list grows without being copied, while a writer may wait.
#[derive(Default)]
struct Free(Vec<Vec<u32>>);

impl Free {
    const BLOCK: usize = 1024;

    fn push(&mut self, slot: u32) {
        match self.0.last_mut() {
            Some(block) if block.len() < Self::BLOCK => block.push(slot),
            _ => {
                let mut block = Vec::with_capacity(Self::BLOCK);
                block.push(slot);
                self.0.push(block);
            }
        }
    }

    fn pop(&mut self) -> Option<u32> {
        let block = self.0.last_mut()?;
        let slot = block.pop();
        if block.is_empty() {
            self.0.pop();
        }
        slot
    }
}

pub(crate) struct Slots {
    segments: [OnceLock<ZeroedSlice<Slot>>; SEGMENTS],
    /// One past the highest slot that was ever in use.
    high: AtomicU32,
    /// Slots below `high` that are empty. Held to take or give back a number, nothing else.
    free: Mutex<Free>,
}

impl Slots {
    pub(crate) fn new() -> Self {
        Self {
            segments: [const { OnceLock::new() }; SEGMENTS],
            high: AtomicU32::new(0),
            free: Mutex::new(Free::default()),
        }
    }

    /// Segment, and place within.
    #[inline]
    const fn locate(slot: u32) -> (usize, usize) {
        let nth = slot as u64 + FIRST as u64;
        let segment = nth.ilog2() - FIRST.ilog2();
        (
            segment as usize,
            (nth - ((FIRST as u64) << segment)) as usize,
        )
    }

    #[inline]
    fn slot(&self, slot: u32) -> Option<&Slot> {
        let (segment, at) = Self::locate(slot);
        self.segments.get(segment)?.get()?.get(at)
    }

    /// The flow in this slot, and its birth. Whoever holds the slots themselves by a pin may use it.
    #[inline]
    pub(crate) fn get(&self, slot: u32) -> Option<(NonZeroU64, &Flow)> {
        let slot = self.slot(slot)?;
        let birth = NonZeroU64::new(slot.birth.load(Acquire))?;
        // SAFETY: a birth was stored after the flow was written. The flow is dropped only by the
        // Vacated that `take` gives, which goes through the epoch under which `self` was reached.
        let flow = slot.flow.with(|flow| unsafe { (*flow).assume_init_ref() });
        Some((birth, flow))
    }

    /// Ask for the flow in this slot, and where its first executor counts.
    #[inline]
    pub(crate) fn prefetch(&self, slot: u32) {
        if let Some(slot) = self.slot(slot) {
            prefetch(slot);
            // The second cache line.
            prefetch_at(std::ptr::from_ref(slot).wrapping_byte_add(64));
        }
    }

    /// One past the highest slot that was ever in use.
    pub(crate) fn high(&self) -> u32 {
        self.high.load(Acquire)
    }

    /// Install a flow. Gives it back if all slots are in use.
    pub(crate) fn insert(&self, mut flow: Flow, birth: NonZeroU64) -> Result<&Flow, Box<Flow>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let number = match free.pop() {
            Some(number) => number,
            None => {
                let number = self.high.load(Acquire);
                if number >= SLOTS_MAX {
                    return Err(Box::new(flow));
                }
                let (segment, _) = Self::locate(number);
                if let Some(segment_slots) = self.segments.get(segment) {
                    segment_slots.get_or_init(|| ZeroedSlice::new((FIRST as usize) << segment));
                }
                self.high.store(number + 1, Release);
                number
            }
        };
        drop(free);
        let Some(slot) = self.slot(number) else {
            return Err(Box::new(flow));
        };
        flow.slot = number;
        // SAFETY: the slot is empty (fresh, or given back by a Vacated after its flow was dropped),
        // and its number is ours alone: taken from the list, or counted up, under the lock.
        let flow = slot.flow.with_mut(|to| unsafe { (*to).write(flow) });
        slot.birth.store(birth.get(), Release);
        Ok(flow)
    }

    /// Is this very flow installed here?
    pub(crate) fn holds(&self, flow: &Flow) -> bool {
        self.get(flow.slot)
            .is_some_and(|(_, there)| std::ptr::eq(there, flow))
    }

    /// Take a flow out. It stays readable for those who are pinned; dropping what is returned drops it
    /// and frees the slot. None if the slot doesn't hold this very flow.
    pub(crate) fn take(self: &Arc<Self>, flow: &Flow) -> Option<Vacated> {
        if !self.holds(flow) {
            return None;
        }
        let birth = self.slot(flow.slot)?.birth.swap(0, AcqRel);
        (birth != 0).then(|| Vacated {
            slots: Arc::clone(self),
            slot: flow.slot,
        })
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        for number in 0..self.high() {
            let Some(slot) = self.slot(number) else {
                continue;
            };
            if slot.birth.load(Acquire) != 0 {
                // SAFETY: there is a flow, and `&mut self` says that nobody else sees it. A slot whose
                // flow is on its way out has birth 0; its Vacated drops it (and keeps us alive).
                slot.flow
                    .with_mut(|flow| unsafe { (*flow).assume_init_drop() });
            }
        }
    }
}

/// A flow taken out of its slot. Belongs to the reclaimer.
#[must_use = "readers may still see the flow: it belongs to the reclaimer"]
pub(crate) struct Vacated {
    slots: Arc<Slots>,
    slot: u32,
}

impl Drop for Vacated {
    fn drop(&mut self) {
        let Some(slot) = self.slots.slot(self.slot) else {
            return;
        };
        // SAFETY: `take` gave us alone the right to this flow, and its readers are gone: the reclaimer
        // drops us after their pins.
        slot.flow
            .with_mut(|flow| unsafe { (*flow).assume_init_drop() });
        self.slots
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(self.slot);
    }
}
