//! The table's masks, and how the flows of each lie in the tree. Behind the table's mutex.
//!
//! A mask lies in the tree by one of these, the first that is small enough:
//! - its flows, one by one;
//! - what its flows have in common, as one pattern, when there are many, or many places for them;
//! - not at all: it is searched for each packet, after the tree, when its flows allow both outcomes of
//!   so many tests that they would lie nearly everywhere.
//!
//! When it changes from one to another, it lies by both for a moment: readers always find it.

use std::sync::Arc;

use hashbrown::HashTable;

use super::Contents;
use super::reclaim::Garbage;
use super::slots::Slots;
use super::subtable::Subtable;
use super::tree::branch::{Change, Tree};
use super::tree::{Common, Member, Pattern};
use crate::flow::Flow;
use crate::mask::Mask;

/// More flows than this of one mask: what they have in common stands for them.
const FEW_FLOWS: usize = 32;
/// A pattern that would lie in more leaves than this makes its mask one that is always searched.
const MANY_LEAVES: usize = 32;
/// The flows of a mask in more places than this: what they have in common stands for them.
const MANY_PLACES: usize = 64;
/// Leaves that a change takes over from the old tree to the new.
const STEP: usize = 2;

/// A mask in use.
struct MaskEntry {
    subtable: Arc<Subtable>,
    hash: u32,
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

/// All masks, by their places in the row of subtables.
#[derive(Default)]
pub(super) struct Entries(Vec<Option<Box<MaskEntry>>>);

impl Entries {
    fn get(&self, place: u32) -> Option<&MaskEntry> {
        self.0.get(place as usize)?.as_deref()
    }

    fn get_mut(&mut self, place: u32) -> Option<&mut MaskEntry> {
        self.0.get_mut(place as usize)?.as_deref_mut()
    }

    /// What a member of a leaf stands for, now. None if it has gone.
    pub(super) fn pattern<'a>(
        &'a self,
        slots: &'a Slots,
        subtable: &'a Subtable,
        member: Member,
    ) -> Option<Pattern<'a>> {
        match member {
            Member::Flow(slot) => Some(Pattern::flow(slots.get(slot)?.1)),
            Member::Common => match &self.get(subtable.place)?.lying {
                Lying::Common(common) => Some(common.pattern(&subtable.mask)),
                Lying::Flows(_) | Lying::Wide => None,
            },
        }
    }
}

/// See the module's head.
#[derive(Default)]
pub(super) struct Masks {
    entries: Entries,
    /// Each mask once: its hash, its place.
    by_mask: HashTable<(u32, u32)>,
    /// Holes in the row of all subtables, and in that of the wide ones.
    holes: Vec<u32>,
    wide_holes: Vec<u32>,
    /// Rises when the row of wide ones changes.
    pub(super) wide_changes: u64,
    tree: Tree,
}

impl Masks {
    /// Different masks.
    pub(super) fn len(&self) -> usize {
        self.by_mask.len()
    }

    fn place(&self, hash: u32, mask: &Mask) -> Option<u32> {
        let is = |&(_, place): &(u32, u32)| {
            self.entries
                .get(place)
                .is_some_and(|entry| *entry.subtable.mask == *mask)
        };
        self.by_mask.find(hash.into(), is).map(|(_, place)| *place)
    }

    /// The subtable of a mask that is known.
    pub(super) fn get(&self, hash: u32, mask: &Mask) -> Option<&Arc<Subtable>> {
        Some(&self.entries.get(self.place(hash, mask)?)?.subtable)
    }

    /// A new mask, without a flow yet.
    pub(super) fn add(
        &mut self,
        hash: u32,
        mask: &Arc<Mask>,
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) -> Arc<Subtable> {
        let row = &contents.subtables;
        let place = self.holes.pop().unwrap_or(row.len());
        let subtable = Subtable::new(Arc::clone(mask), place);
        garbage.extend(row.put(place, Arc::clone(&subtable)));
        let entry = MaskEntry {
            subtable: Arc::clone(&subtable),
            hash,
            flows: 0,
            lying: Lying::Flows(Vec::new()),
        };
        let at = place as usize;
        if self.entries.0.len() <= at {
            self.entries.0.resize_with(at + 1, || None);
        }
        self.entries.0[at] = Some(Box::new(entry));
        self.by_mask
            .insert_unique(hash.into(), (hash, place), |(hash, _)| (*hash).into());
        subtable
    }

    /// A mask whose last flow went.
    fn forget(&mut self, place: u32, contents: &Contents, garbage: &mut Vec<Garbage>) {
        let entry = self
            .entries
            .0
            .get_mut(place as usize)
            .and_then(Option::take);
        let Some(entry) = entry else { return };
        let known = self
            .by_mask
            .find_entry(entry.hash.into(), |(_, at)| *at == place);
        if let Ok(known) = known {
            known.remove();
        }
        garbage.extend(contents.subtables.clear(place));
        self.holes.push(place);
    }

    /// Put a new flow of a known mask into the tree.
    pub(super) fn lay(
        &mut self,
        subtable: &Arc<Subtable>,
        flow: &Flow,
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) {
        let place = subtable.place;
        let Some(entry) = self.entries.get_mut(place) else {
            return;
        };
        entry.flows += 1;
        match &mut entry.lying {
            Lying::Wide => {}
            Lying::Flows(few) if few.len() < FEW_FLOWS => {
                few.push(flow.slot);
                self.put(subtable, Member::Flow(flow.slot), contents, garbage);
            }
            Lying::Flows(_) => self.lie_in_common(place, Some(flow), contents, garbage),
            Lying::Common(common) => {
                let before = common.clone();
                if common.narrow(flow) {
                    let pattern = common.pattern(&subtable.mask);
                    if self.tree.leaves(&pattern, MANY_LEAVES + 1) > MANY_LEAVES {
                        // It lies where it did before.
                        *common = before;
                        self.lie_wide(place, contents, garbage);
                    } else {
                        self.put(subtable, Member::Common, contents, garbage);
                    }
                }
            }
        }
        self.advance(contents, garbage);
    }

    /// Take a flow out of the tree again; and its mask, if it was the last.
    pub(super) fn unlay(
        &mut self,
        hash: u32,
        flow: &Flow,
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) {
        let place = self.place(hash, &flow.mask);
        let entry = place.and_then(|place| self.entries.get_mut(place));
        let Some(MaskEntry {
            subtable,
            flows,
            lying,
            ..
        }) = entry
        else {
            return;
        };
        let forest = contents.forest.load();
        *flows -= 1;
        match lying {
            Lying::Flows(few) => {
                few.retain(|slot| *slot != flow.slot);
                let (pattern, member) = (Pattern::flow(flow), Member::Flow(flow.slot));
                self.tree
                    .remove(forest, subtable, &pattern, member, garbage);
            }
            Lying::Common(common) if *flows == 0 => {
                let pattern = common.pattern(&subtable.mask);
                self.tree
                    .remove(forest, subtable, &pattern, Member::Common, garbage);
            }
            Lying::Wide if *flows == 0 => {
                if let Some((hole, gone)) = contents.wide.load().remove(subtable) {
                    self.wide_holes.push(hole);
                    self.wide_changes += 1;
                    garbage.push(gone);
                }
            }
            Lying::Common(_) | Lying::Wide => {}
        }
        if *flows == 0 {
            let place = subtable.place;
            self.forget(place, contents, garbage);
        }
        self.advance(contents, garbage);
    }

    /// Is a tree taking over from another?
    pub(super) fn is_taking_over(&self) -> bool {
        self.tree.is_taking_over()
    }

    /// A step further in taking over, if there is something to take over or it is time to begin.
    pub(super) fn advance(&mut self, contents: &Contents, garbage: &mut Vec<Garbage>) {
        if self.tree.is_too_deep() {
            self.tree.begin();
            garbage.push(contents.forest.replace(contents.forest.load().successor()));
        }
        if !self.tree.is_taking_over() {
            return;
        }
        for _ in 0..STEP {
            let Some(drawn) = self.tree.draw() else {
                garbage.extend(contents.forest.load().forget_previous());
                return;
            };
            for mask in drawn {
                for slot in mask.flows {
                    self.put(&mask.subtable, Member::Flow(slot), contents, garbage);
                }
                if mask.common {
                    self.put(&mask.subtable, Member::Common, contents, garbage);
                }
            }
        }
    }

    /// Put a member where its pattern lies, and do what follows from it.
    fn put(
        &mut self,
        subtable: &Arc<Subtable>,
        member: Member,
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) {
        let Some(pattern) = self.entries.pattern(&contents.slots, subtable, member) else {
            // Its mask lies otherwise by now.
            return;
        };
        if self.tree.leaves(&pattern, MANY_LEAVES + 1) > MANY_LEAVES {
            return self.lie_elsewhere(subtable.place, contents, garbage);
        }
        let mut change = Change {
            slots: &contents.slots,
            entries: &self.entries,
            garbage,
            spread: Vec::new(),
            turned_away: Vec::new(),
        };
        self.tree.insert(
            contents.forest.load(),
            subtable,
            &pattern,
            member,
            &mut change,
        );
        let Change {
            spread,
            turned_away,
            ..
        } = change;
        for subtable in spread {
            if self.is_everywhere(&subtable, contents) {
                self.lie_elsewhere(subtable.place, contents, garbage);
            }
        }
        for subtable in turned_away {
            self.lie_wide(subtable.place, contents, garbage);
        }
    }

    fn is_everywhere(&self, subtable: &Subtable, contents: &Contents) -> bool {
        let Some(entry) = self.entries.get(subtable.place) else {
            return false;
        };
        match &entry.lying {
            Lying::Flows(few) => {
                let flows = few.iter().filter_map(|slot| contents.slots.get(*slot));
                let mut places = 0;
                for (_, flow) in flows {
                    places += self.tree.leaves(&Pattern::flow(flow), MANY_LEAVES + 1);
                    if places > MANY_PLACES {
                        return true;
                    }
                }
                false
            }
            Lying::Common(common) => {
                let pattern = common.pattern(&subtable.mask);
                self.tree.leaves(&pattern, MANY_LEAVES + 1) > MANY_LEAVES
            }
            Lying::Wide => false,
        }
    }

    /// The mask lies in too many places: by what its flows have in common, if that is less.
    fn lie_elsewhere(&mut self, place: u32, contents: &Contents, garbage: &mut Vec<Garbage>) {
        match self.entries.get(place).map(|entry| &entry.lying) {
            Some(Lying::Flows(few)) if few.len() > 1 => {
                self.lie_in_common(place, None, contents, garbage);
            }
            Some(_) => self.lie_wide(place, contents, garbage),
            None => {}
        }
    }

    /// A mask that lies by its flows: from now on by what they have in common, if that is possible.
    /// `another` is one that isn't among them yet.
    fn lie_in_common(
        &mut self,
        place: u32,
        another: Option<&Flow>,
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) {
        let Some(entry) = self.entries.get_mut(place) else {
            return;
        };
        let Lying::Flows(few) = &entry.lying else {
            return;
        };
        let mut flows = few
            .iter()
            .filter_map(|slot| contents.slots.get(*slot).map(|(_, flow)| flow))
            .chain(another);
        let Some(mut common) = flows.next().map(Common::of) else {
            return;
        };
        for flow in flows {
            common.narrow(flow);
        }
        let pattern = common.pattern(&entry.subtable.mask);
        if self.tree.leaves(&pattern, MANY_LEAVES + 1) > MANY_LEAVES {
            return self.lie_wide(place, contents, garbage);
        }
        let (few, subtable) = (few.clone(), Arc::clone(&entry.subtable));
        entry.lying = Lying::Common(common);
        // This may come back here for this mask, and make it wide.
        self.put(&subtable, Member::Common, contents, garbage);
        self.unlay_flows(&subtable, &few, contents, garbage);
    }

    /// A mask is searched for every packet from now on.
    fn lie_wide(&mut self, place: u32, contents: &Contents, garbage: &mut Vec<Garbage>) {
        let Some(entry) = self.entries.get_mut(place) else {
            return;
        };
        if matches!(entry.lying, Lying::Wide) {
            return;
        }
        let row = contents.wide.load();
        let hole = self.wide_holes.pop().unwrap_or(row.len());
        garbage.extend(row.put(hole, Arc::clone(&entry.subtable)));
        self.wide_changes += 1;
        let subtable = Arc::clone(&entry.subtable);
        match std::mem::replace(&mut entry.lying, Lying::Wide) {
            Lying::Flows(few) => self.unlay_flows(&subtable, &few, contents, garbage),
            Lying::Common(common) => {
                let pattern = common.pattern(&subtable.mask);
                let forest = contents.forest.load();
                self.tree
                    .remove(forest, &subtable, &pattern, Member::Common, garbage);
            }
            Lying::Wide => {}
        }
    }

    fn unlay_flows(
        &mut self,
        subtable: &Arc<Subtable>,
        flows: &[u32],
        contents: &Contents,
        garbage: &mut Vec<Garbage>,
    ) {
        for &slot in flows {
            if let Some((_, flow)) = contents.slots.get(slot) {
                let (pattern, member) = (Pattern::flow(flow), Member::Flow(slot));
                let forest = contents.forest.load();
                self.tree
                    .remove(forest, subtable, &pattern, member, garbage);
            }
        }
    }

    /// The row of wide ones was built anew, without holes.
    pub(super) fn wide_rebuilt(&mut self) {
        self.wide_holes.clear();
        self.wide_changes += 1;
    }

    /// What is left of these masks when all are taken away: none of them, but still the same table's.
    pub(super) fn successor(&self) -> Self {
        Self {
            wide_changes: self.wide_changes + 1,
            ..Self::default()
        }
    }

    /// Masks in the tree by their flows, by what these have in common, and those outside.
    #[cfg(test)]
    pub(super) fn lying(&self) -> [usize; 3] {
        let mut count = [0; 3];
        for entry in self.entries.0.iter().flatten() {
            count[match entry.lying {
                Lying::Flows(_) => 0,
                Lying::Common(_) => 1,
                Lying::Wide => 2,
            }] += 1;
        }
        count
    }
}
