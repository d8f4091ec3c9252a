//! Changes to a table, one batch at a time.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::num::NonZeroU64;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::{Arc, MutexGuard, PoisonError};

use crossbeam_epoch::{Guard, LocalHandle};
use hashbrown::HashTable;

use super::reclaim::{Garbage, Reclaimer};
use super::subtable::{Row, Subtable};
use super::tree::{Change, Common, FEW_FLOWS, Member, Node, Pattern, Tree};
use super::{Contents, FlowTable, PreparedFlow};
use crate::action::ActionList;
use crate::flow::{Flow, FlowId, Ufid};
use crate::key::Key;
use crate::mask::Mask;

/// A mask in use.
struct MaskEntry {
    hash: u32,
    subtable: Arc<Subtable>,
    flows: u32,
    lying: Lying,
}

/// By what a mask lies in the tree.
enum Lying {
    /// Its flows, by their slots.
    Flows(Vec<u32>),
    /// What they have in common.
    Common(Common),
    /// Not at all; every packet searches it.
    Wide,
}

/// The table's masks, each once. Behind the table's mutex.
#[derive(Default)]
pub(super) struct Masks {
    all: HashTable<MaskEntry>,
    /// Empty places in the row.
    holes: usize,
    tree: Tree,
    /// Those that aren't in the tree.
    wide: Vec<Arc<Subtable>>,
}

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
            .0
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
        let entry = masks.entry_mut(prepared.mask_hash, &prepared.flow.mask);
        let known = entry.map(|entry| Arc::clone(&entry.subtable));
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
        let fresh = known.is_none();
        let subtable = known.unwrap_or_else(|| Subtable::new(Arc::clone(&flow.mask)));
        subtable
            .index
            .insert(flow.hash, flow.slot, hash_of(contents), &mut garbage);
        if fresh {
            masks.add(mask_hash, subtable, contents, &mut garbage);
            table.n_masks.store(masks.all.len() as u64, Relaxed);
        }
        // Packets see a subtable with its flow inside.
        masks.lay(mask_hash, flow, contents, &mut garbage);
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
        if let Some(entry) = masks.entry_mut(mask_hash, &flow.mask) {
            entry
                .subtable
                .index
                .remove(flow.hash, flow.slot, hash_of(contents), &mut garbage);
        }
        if masks.unlay(mask_hash, flow, contents, &mut garbage) {
            masks.remove(mask_hash, &flow.mask, contents, &mut garbage);
            self.table.n_masks.store(masks.all.len() as u64, Relaxed);
        }
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
        self.bin.garbage.borrow_mut().push(old);
        **self.masks.borrow_mut() = Masks::default();
        self.table.n_masks.store(0, Relaxed);
        self.table.n_flows.swap(0, Relaxed)
    }

    /// Order the masks by use, so that those in use are looked at first. Now and then, from outside.
    pub fn rebalance(&self) {
        let (mut garbage, contents) = (self.bin.garbage.borrow_mut(), self.contents());
        let masks = &mut **self.masks.borrow_mut();
        masks.tree.order(&contents.tree, &mut garbage);
        masks
            .wide
            .sort_by_cached_key(|subtable| Reverse(subtable.used()));
        garbage.push(contents.wide.replace(Node::leaf_of(&masks.wide)));
        masks.rebuild(contents, Order::Use, &mut garbage);
    }

    /// Masks in the tree by their flows, by what these have in common, and those outside.
    #[cfg(test)]
    pub(super) fn lying(&self) -> [usize; 3] {
        let mut count = [0; 3];
        for entry in self.masks.borrow().all.iter() {
            count[match entry.lying {
                Lying::Flows(_) => 0,
                Lying::Common(_) => 1,
                Lying::Wide => 2,
            }] += 1;
        }
        count
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

/// How a row is built anew.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// As it was, without holes.
    Kept,
    /// The most used first.
    Use,
}

impl Masks {
    fn entry_mut(&mut self, hash: u32, mask: &Mask) -> Option<&mut MaskEntry> {
        self.all
            .find_mut(hash.into(), |entry| *entry.subtable.mask == *mask)
    }

    /// A new mask, without a flow yet.
    fn add(
        &mut self,
        hash: u32,
        subtable: Arc<Subtable>,
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) {
        let place = contents.subtables.load().push(&subtable);
        // Without a place: behind all others, until the row is built anew.
        subtable.place.store(place.unwrap_or(u32::MAX), Relaxed);
        let entry = MaskEntry {
            hash,
            subtable,
            flows: 0,
            lying: Lying::Flows(Vec::new()),
        };
        self.all
            .insert_unique(hash.into(), entry, |entry| entry.hash.into());
        if place.is_none() {
            self.rebuild(contents, Order::Kept, garbage);
        }
    }

    /// Put a new flow of a known mask into the tree.
    fn lay(&mut self, hash: u32, flow: &Flow, contents: &Contents, garbage: &mut Vec<Garbage>) {
        let entry = self
            .all
            .find_mut(hash.into(), |entry| *entry.subtable.mask == *flow.mask);
        let Some(MaskEntry {
            subtable,
            flows,
            lying,
            ..
        }) = entry
        else {
            return;
        };
        let (tree, root, slots) = (&mut self.tree, &contents.tree, &*contents.slots);
        let mut change = Change { slots, garbage };
        *flows += 1;
        let wide = match lying {
            Lying::Wide => return,
            Lying::Flows(few) if few.len() < FEW_FLOWS => {
                few.push(flow.slot);
                let pattern = Pattern::flow(&flow.mask, &flow.key);
                let wide = tree.is_wide(&pattern);
                if !wide {
                    tree.insert(
                        root,
                        subtable,
                        &pattern,
                        Member::Flow(flow.slot),
                        &mut change,
                    );
                }
                wide
            }
            Lying::Flows(few) => {
                let few = std::mem::take(few);
                let mut common = Common::of(&flow.mask, &flow.key);
                for (_, other) in few.iter().filter_map(|slot| slots.get(*slot)) {
                    common.narrow(&other.key);
                }
                let pattern = common.pattern(&flow.mask);
                let wide = tree.is_wide(&pattern);
                // Readers find the mask by one or the other at any time.
                if wide {
                    self.wide.push(Arc::clone(subtable));
                    change
                        .garbage
                        .push(contents.wide.replace(Node::leaf_of(&self.wide)));
                } else {
                    tree.insert(root, subtable, &pattern, Member::Common, &mut change);
                }
                unlay_flows(tree, subtable, &few, contents, &mut change);
                *lying = if wide {
                    Lying::Wide
                } else {
                    Lying::Common(common)
                };
                return;
            }
            Lying::Common(common) => {
                let before = common.clone();
                if !common.narrow(&flow.key) {
                    return;
                }
                let pattern = common.pattern(&flow.mask);
                let wide = tree.is_wide(&pattern);
                if !wide {
                    tree.insert(root, subtable, &pattern, Member::Common, &mut change);
                } else {
                    // It lies where it did before.
                    *common = before;
                }
                wide
            }
        };
        if wide {
            self.wide.push(Arc::clone(subtable));
            change
                .garbage
                .push(contents.wide.replace(Node::leaf_of(&self.wide)));
            match std::mem::replace(lying, Lying::Wide) {
                Lying::Flows(few) => unlay_flows(tree, subtable, &few, contents, &mut change),
                Lying::Common(common) => {
                    let pattern = common.pattern(&flow.mask);
                    tree.remove(root, subtable, &pattern, Member::Common, &mut change);
                }
                Lying::Wide => {}
            }
        }
    }

    /// Take a flow out of the tree again. True if it was its mask's last.
    fn unlay(
        &mut self,
        hash: u32,
        flow: &Flow,
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) -> bool {
        let entry = self
            .all
            .find_mut(hash.into(), |entry| *entry.subtable.mask == *flow.mask);
        let Some(MaskEntry {
            subtable,
            flows,
            lying,
            ..
        }) = entry
        else {
            return false;
        };
        let mut change = Change {
            slots: &contents.slots,
            garbage,
        };
        *flows -= 1;
        match lying {
            Lying::Flows(few) => {
                few.retain(|slot| *slot != flow.slot);
                unlay_flows(
                    &mut self.tree,
                    subtable,
                    &[flow.slot],
                    contents,
                    &mut change,
                );
            }
            Lying::Common(common) if *flows == 0 => {
                let pattern = common.pattern(&flow.mask);
                let root = &contents.tree;
                self.tree
                    .remove(root, subtable, &pattern, Member::Common, &mut change);
            }
            Lying::Wide if *flows == 0 => {
                self.wide.retain(|other| !Arc::ptr_eq(other, subtable));
                change
                    .garbage
                    .push(contents.wide.replace(Node::leaf_of(&self.wide)));
            }
            Lying::Common(_) | Lying::Wide => {}
        }
        *flows == 0
    }

    /// A mask whose last flow went.
    fn remove(&mut self, hash: u32, mask: &Mask, contents: &Contents, garbage: &mut Vec<Garbage>) {
        let entry = self
            .all
            .find_entry(hash.into(), |entry| *entry.subtable.mask == *mask);
        let Ok(entry) = entry else { return };
        let (gone, _) = entry.remove();
        let row = contents.subtables.load();
        garbage.extend(row.clear(gone.subtable.place()));
        self.holes += 1;
        if self.holes > row.len() / 2 {
            self.rebuild(contents, Order::Kept, garbage);
        }
    }

    fn rebuild(&mut self, contents: &Contents, order: Order, garbage: &mut Vec<Garbage>) {
        let mut entries: Vec<&mut MaskEntry> = self.all.iter_mut().collect();
        match order {
            Order::Kept => entries.sort_unstable_by_key(|entry| entry.subtable.place()),
            Order::Use => entries.sort_by_cached_key(|entry| {
                // Halved each time: what was used long ago counts less and less.
                let used = entry.subtable.used();
                entry.subtable.used.fetch_sub(used / 2, Relaxed);
                (Reverse(used), entry.subtable.place())
            }),
        }
        let row = Row::new(entries.iter().map(|entry| Arc::clone(&entry.subtable)));
        for (place, entry) in (0..).zip(entries) {
            entry.subtable.place.store(place, Relaxed);
        }
        garbage.push(contents.subtables.replace(row));
        self.holes = 0;
    }
}

fn unlay_flows(
    tree: &mut Tree,
    subtable: &Arc<Subtable>,
    flows: &[u32],
    contents: &Contents,
    change: &mut Change<'_>,
) {
    for (slot, (_, flow)) in flows
        .iter()
        .filter_map(|&slot| Some((slot, contents.slots.get(slot)?)))
    {
        let pattern = Pattern::flow(&flow.mask, &flow.key);
        tree.remove(
            &contents.tree,
            subtable,
            &pattern,
            Member::Flow(slot),
            change,
        );
    }
}
