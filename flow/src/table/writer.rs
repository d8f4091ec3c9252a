//! Changes to a table, one batch at a time.

use std::cell::RefCell;
use std::num::NonZeroU64;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::{Arc, MutexGuard, PoisonError};

use crossbeam_epoch::{Guard, LocalHandle};

use super::masks::Masks;
use super::reclaim::{Garbage, Reclaimer};
use super::subtable::Row;
use super::{Contents, FlowTable, PreparedFlow};
use crate::action::ActionList;
use crate::flow::{Flow, FlowId, Ufid};
use crate::key::Key;

/// Why a flow couldn't be inserted. It is given back.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    /// Another flow has its id.
    #[error("another flow has this id")]
    IdInUse(Box<PreparedFlow>),
    /// Another flow has the same mask and the same key under it.
    #[error("another flow has this mask and masked key")]
    KeyInUse(Box<PreparedFlow>),
    /// The table has as many flows as can be numbered.
    #[error("the table is full")]
    Full,
}

/// The right to change a table: holds its mutex, and a pin.
///
/// What it finds lives until it is dropped, removed or not. Dropping it unlocks, then hands over the
/// garbage.
pub struct Writer<'t> {
    table: &'t FlowTable,
    // Dropped in this order: unlocked first, then what readers may still see is handed over.
    masks: RefCell<MutexGuard<'t, Masks>>,
    bin: Bin<'t>,
}

/// Garbage of one batch; handed over when dropped.
struct Bin<'t> {
    reclaimer: &'t Arc<Reclaimer>,
    garbage: RefCell<Vec<Garbage>>,
    guard: Guard,
}

impl Drop for Bin<'_> {
    fn drop(&mut self) {
        self.reclaimer.retire_all(&self.guard, self.garbage.take());
    }
}

impl<'t> Writer<'t> {
    pub(super) fn new(table: &'t FlowTable, handle: &LocalHandle) -> Self {
        assert!(
            !handle.is_pinned(),
            "pinned while waiting for a table's mutex"
        );
        // A writer that panicked left nothing that readers can't live with: each step is whole.
        let masks = table.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let guard = handle.pin();
        assert!(
            table.reclaimer.protects(&guard),
            "a pin of another collector"
        );
        let bin = Bin {
            reclaimer: &table.reclaimer,
            garbage: RefCell::default(),
            guard,
        };
        Self {
            table,
            masks: RefCell::new(masks),
            bin,
        }
    }

    fn contents(&self) -> &Contents {
        self.table.contents.load(&self.bin.guard)
    }

    /// The flow named by this unique id.
    #[must_use]
    pub fn find_ufid(&self, ufid: &Ufid) -> Option<&Flow> {
        self.contents().find_ufid(&self.table.seed, ufid)
    }

    /// The flow named by this exact, unmasked key.
    #[must_use]
    pub fn find_key(&self, key: &Key) -> Option<&Flow> {
        self.contents().find_key(&self.table.seed, key)
    }

    /// The flow named so.
    #[must_use]
    pub fn find(&self, id: &FlowId) -> Option<&Flow> {
        match id {
            FlowId::Ufid(ufid) => self.find_ufid(ufid),
            FlowId::Key(key) => self.find_key(key),
        }
    }

    /// Any installed flow that matches this unmasked key.
    #[must_use]
    pub fn find_overlap(&self, key: &Key) -> Option<&Flow> {
        self.contents()
            .search(&self.table.seed, key)
            .map(|(_, flow)| flow)
    }

    /// Install a flow: packets see it when this returns.
    ///
    /// Flows of other masks that overlap are none of its business; see [`Writer::find_overlap`].
    ///
    /// # Errors
    /// If the id, or the mask with the masked key, is taken; or the table is full.
    pub fn insert(&self, prepared: PreparedFlow) -> Result<&Flow, InsertError> {
        let contents = self.contents();
        let (table, slots) = (self.table, &contents.slots);
        if self.find(&prepared.flow.id).is_some() {
            return Err(InsertError::IdInUse(Box::new(prepared)));
        }
        let mut masks = self.masks.borrow_mut();
        let known = masks
            .get(prepared.mask_hash, &prepared.flow.mask)
            .map(Arc::clone);
        let taken = known.as_ref().and_then(|subtable| {
            subtable.index.find(prepared.flow.hash, |slot| {
                let (_, other) = slots.get(slot)?;
                (Arc::ptr_eq(&other.mask, &subtable.mask) && other.key == prepared.flow.key)
                    .then_some(())
            })
        });
        if taken.is_some() {
            return Err(InsertError::KeyInUse(Box::new(prepared)));
        }

        let PreparedFlow {
            mut flow,
            id_hash,
            mask_hash,
        } = prepared;
        if let Some(subtable) = &known {
            flow.mask = Arc::clone(&subtable.mask);
        }
        // Counted up before the flow can be seen, so that a dump that begins later includes it.
        let birth = NonZeroU64::MIN.saturating_add(table.births.fetch_add(1, AcqRel));
        let flow = slots.insert(flow, birth).map_err(|_| InsertError::Full)?;
        let mut garbage = self.bin.garbage.borrow_mut();
        contents
            .ids
            .insert(id_hash, flow.slot, self.id_hash_of(contents), &mut garbage);
        let subtable =
            known.unwrap_or_else(|| masks.add(mask_hash, &flow.mask, contents, &mut garbage));
        subtable
            .index
            .insert(flow.hash, flow.slot, hash_of(contents), &mut garbage);
        // Packets that come by the mask find the flow in its subtable.
        masks.lay(&subtable, flow, contents, &mut garbage);
        table.n_masks.store(masks.len() as u64, Relaxed);
        table.n_flows.fetch_add(1, Relaxed);
        Ok(flow)
    }

    /// Give a flow other actions. False if it isn't installed here (any more).
    pub fn replace_actions(&self, flow: &Flow, actions: Arc<ActionList>) -> bool {
        let there = self.contents().slots.holds(flow);
        if there {
            self.bin
                .garbage
                .borrow_mut()
                .push(flow.actions.replace(actions));
        }
        there
    }

    /// Take a flow out. Its reference stays good for reading the final statistics; packets that found
    /// it before may still be counted. False if it isn't installed here (any more).
    pub fn remove(&self, flow: &Flow) -> bool {
        let contents = self.contents();
        if !contents.slots.holds(flow) {
            return false;
        }
        let mask_hash = self.table.seed.mask(&flow.mask);
        let mut masks = self.masks.borrow_mut();
        let mut garbage = self.bin.garbage.borrow_mut();
        if let Some(subtable) = masks.get(mask_hash, &flow.mask) {
            subtable
                .index
                .remove(flow.hash, flow.slot, hash_of(contents), &mut garbage);
        }
        masks.unlay(mask_hash, flow, contents, &mut garbage);
        self.table.n_masks.store(masks.len() as u64, Relaxed);
        let id_hash = self.table.seed.id(&flow.id);
        contents
            .ids
            .remove(id_hash, flow.slot, self.id_hash_of(contents), &mut garbage);
        garbage.extend(contents.slots.take(flow).map(Garbage::Slot));
        self.table.n_flows.fetch_sub(1, Relaxed);
        true
    }

    /// Take all flows out, at once. Returns how many there were.
    pub fn flush(&self) -> u64 {
        let old = self.table.contents.replace(Contents::new());
        let masks = &mut **self.masks.borrow_mut();
        let fresh = masks.successor();
        let masks = std::mem::replace(masks, fresh);
        let mut garbage = self.bin.garbage.borrow_mut();
        garbage.extend([old, Garbage::Foreign(Box::new(masks))]);
        self.table.n_masks.store(0, Relaxed);
        self.table.n_flows.swap(0, Relaxed)
    }

    /// A step of what is done little by little. True if there is more to do.
    pub(super) fn advance(&self) -> bool {
        let masks = &mut **self.masks.borrow_mut();
        masks.advance(self.contents(), &mut self.bin.garbage.borrow_mut());
        masks.is_taking_over()
    }

    /// Put another row of wide masks in place, unless it has changed meanwhile.
    pub(super) fn put_wide(&self, changes: u64, row: Row) {
        let masks = &mut **self.masks.borrow_mut();
        if masks.wide_changes == changes {
            masks.wide_rebuilt();
            let old = self.contents().wide.replace(Arc::new(row));
            self.bin.garbage.borrow_mut().push(old);
        }
    }

    pub(super) fn wide_changes(&self) -> u64 {
        self.masks.borrow().wide_changes
    }

    /// Masks in the tree by their flows, by what these have in common, and those outside.
    #[cfg(test)]
    pub(super) fn lying(&self) -> [usize; 3] {
        self.masks.borrow().lying()
    }

    fn id_hash_of<'a>(&'a self, contents: &'a Contents) -> impl Fn(u32) -> Option<u32> + 'a {
        |slot| {
            contents
                .slots
                .get(slot)
                .map(|(_, flow)| self.table.seed.id(&flow.id))
        }
    }
}

fn hash_of(contents: &Contents) -> impl Fn(u32) -> Option<u32> + '_ {
    |slot| contents.slots.get(slot).map(|(_, flow)| flow.hash)
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer")
            .field("table", self.table)
            .finish_non_exhaustive()
    }
}
