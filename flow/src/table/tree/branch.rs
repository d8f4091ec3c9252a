//! The tree as its writer knows it, behind the table's mutex.
//!
//! Each change is bounded: it replaces leaves and parts of up to [`SMALL`] masks. That keeps small parts
//! well divided whatever the order in which masks come, not the tree as a whole. When that has become
//! too deep a new one takes over: each change that follows draws some leaves of the old one, at random,
//! and puts what was there into the new. Masks that come in random order make a tree that is about as
//! deep as the best one.

use std::cmp::Reverse;
use std::sync::Arc;

use super::choose::choose;
use super::{Candidate, Forest, Link, Member, Node, Pattern, Target, Test, leaf_of};
use crate::table::masks::Entries;
use crate::table::protected::Either;
use crate::table::reclaim::Garbage;
use crate::table::slots::Slots;
use crate::table::subtable::Subtable;

/// More masks than this in a leaf: it is split, if a test can be found.
const LEAF_MASKS: usize = 1;
/// More masks than this in a leaf: the newest is turned away.
const LEAF_FULL: usize = 16;
/// A part is built anew, at once, when it has grown to twice its size since, up to this many masks.
const SMALL: usize = 8;
/// A tree is too deep if its leaves lie, on average, this many tests deeper than they would at best.
const TOO_DEEP: usize = 3;
/// A tree of fewer masks is never too deep.
const FEW_MASKS: usize = 32;
/// Parts deeper than this aren't split further.
const DEPTH: usize = 256;
/// Patterns by which a test is chosen.
const SAMPLE: usize = 16;

/// A mask in a leaf, by these members.
pub(in crate::table) struct LeafMask {
    pub(in crate::table) subtable: Arc<Subtable>,
    pub(in crate::table) flows: Vec<u32>,
    pub(in crate::table) common: bool,
}

impl LeafMask {
    fn new(subtable: &Arc<Subtable>) -> Self {
        Self {
            subtable: Arc::clone(subtable),
            flows: Vec::new(),
            common: false,
        }
    }

    fn is(&self, subtable: &Arc<Subtable>) -> bool {
        Arc::ptr_eq(&self.subtable, subtable)
    }

    fn members(&self) -> impl Iterator<Item = Member> {
        let common = self.common.then_some(Member::Common);
        self.flows.iter().copied().map(Member::Flow).chain(common)
    }

    fn is_empty(&self) -> bool {
        self.members().next().is_none()
    }

    /// False if it is there already.
    fn add(&mut self, member: Member) -> bool {
        match member {
            Member::Flow(slot) if self.flows.contains(&slot) => return false,
            Member::Flow(slot) => self.flows.push(slot),
            Member::Common if self.common => return false,
            Member::Common => self.common = true,
        }
        true
    }

    fn remove(&mut self, member: Member) {
        match member {
            Member::Flow(slot) => self.flows.retain(|have| *have != slot),
            Member::Common => self.common = false,
        }
    }

    fn candidate(&self) -> Candidate {
        match (&*self.flows, self.common) {
            ([slot], false) => Candidate::Flow {
                slot: *slot,
                place: self.subtable.place,
            },
            _ => Candidate::Mask(Arc::clone(&self.subtable)),
        }
    }
}

#[derive(Default)]
struct Leaf {
    masks: Vec<LeafMask>,
    /// No test was found when there were half as many masks.
    patience: usize,
}

impl Leaf {
    fn publish(&mut self) -> Target {
        if self.masks.len() > LEAF_MASKS {
            self.masks
                .sort_by_cached_key(|mask| Reverse(mask.subtable.used()));
        }
        leaf_of(self.masks.iter().map(LeafMask::candidate))
    }

    /// The members of all these, which may name a mask or a member more than once.
    fn of(masks: Vec<LeafMask>) -> Self {
        let mut leaf = Self::default();
        for mask in masks {
            for member in mask.members() {
                leaf.add(&mask.subtable, member);
            }
        }
        leaf
    }

    /// What is new: the mask, the member.
    fn add(&mut self, subtable: &Arc<Subtable>, member: Member) -> (bool, bool) {
        match self.masks.iter_mut().find(|mask| mask.is(subtable)) {
            Some(mask) => (false, mask.add(member)),
            None => {
                let mut mask = LeafMask::new(subtable);
                mask.add(member);
                self.masks.push(mask);
                (true, true)
            }
        }
    }

    /// False if it wasn't there.
    fn remove(&mut self, subtable: &Arc<Subtable>, member: Member) -> bool {
        let Some(at) = self.masks.iter().position(|mask| mask.is(subtable)) else {
            return false;
        };
        self.masks[at].remove(member);
        if self.masks[at].is_empty() {
            self.masks.swap_remove(at);
        }
        true
    }
}

/// What a change needs to know, and what it leaves to do.
pub(in crate::table) struct Change<'a> {
    pub(in crate::table) slots: &'a Slots,
    pub(in crate::table) entries: &'a Entries,
    pub(in crate::table) garbage: &'a mut Vec<Garbage>,
    /// Masks that came to lie on both sides of a test: perhaps in too many leaves now.
    pub(in crate::table) spread: Vec<Arc<Subtable>>,
    /// Masks for which there was no room in a leaf. They lie there nevertheless.
    pub(in crate::table) turned_away: Vec<Arc<Subtable>>,
}

impl Change<'_> {
    fn pattern<'s>(&'s self, subtable: &'s Subtable, member: Member) -> Option<Pattern<'s>> {
        self.entries.pattern(self.slots, subtable, member)
    }
}

/// A test and what lies on its sides.
struct Fork {
    test: Test,
    sides: [Branch; 2],
    /// What readers see; the pointers to both sides are in it.
    node: Arc<Node>,
    /// Masks in the leaves below, and all tests on the ways to them, counted for each.
    masks: usize,
    ways: usize,
    /// Masks when this was built.
    built: usize,
}

impl Fork {
    fn count(&mut self) {
        self.masks = self.sides[0].masks() + self.sides[1].masks();
        self.ways = self.sides[0].ways() + self.sides[1].ways() + self.masks;
    }
}

enum Branch {
    Fork(Box<Fork>),
    Leaf(Leaf),
}

impl Default for Branch {
    fn default() -> Self {
        Self::Leaf(Leaf::default())
    }
}

/// The writer's side of a [`Forest`].
#[derive(Default)]
pub(in crate::table) struct Tree {
    current: Branch,
    /// What isn't taken over yet. Readers see all that it ever held.
    old: Option<Branch>,
    /// Masks that came since this tree began to take over.
    fresh: usize,
    random: u64,
}

impl Tree {
    /// Leaves in which this lies, or would lie; counted up to `limit`.
    pub(in crate::table) fn leaves(&self, pattern: &Pattern<'_>, limit: usize) -> usize {
        self.current.leaves(pattern, limit)
    }

    /// Put a member of a mask where its pattern lies; readers see it when this returns. A member that
    /// is there already in part is put in the other places.
    pub(in crate::table) fn insert(
        &mut self,
        forest: &Forest,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        change: &mut Change<'_>,
    ) {
        let before = self.current.masks();
        self.current
            .insert(&forest.tree, subtable, pattern, member, 0, change);
        self.fresh += self.current.masks().saturating_sub(before);
    }

    /// Take it out again.
    pub(in crate::table) fn remove(
        &mut self,
        forest: &Forest,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        garbage: &mut Vec<Garbage>,
    ) {
        self.current
            .remove(Some(&forest.tree), subtable, pattern, member, garbage);
        if let Some(old) = &mut self.old {
            old.remove(None, subtable, pattern, member, garbage);
        }
    }

    /// Should another tree take over?
    pub(in crate::table) fn is_too_deep(&self) -> bool {
        let masks = self.current.masks();
        self.old.is_none()
            && masks > FEW_MASKS
            && self.fresh > masks / 2
            && self.current.ways() > masks * (masks.ilog2() as usize + TOO_DEEP)
    }

    /// Begin anew, with a forest that is the present one's successor.
    pub(in crate::table) fn begin(&mut self) {
        self.old = Some(std::mem::take(&mut self.current));
        self.fresh = 0;
    }

    /// Is there an old tree?
    pub(in crate::table) fn is_taking_over(&self) -> bool {
        self.old.is_some()
    }

    /// A leaf of the old tree, to be put into the new. None once all have been.
    pub(in crate::table) fn draw(&mut self) -> Option<Vec<LeafMask>> {
        let old = self.old.as_mut()?;
        if old.masks() == 0 {
            self.old = None;
            self.fresh = 0;
            return None;
        }
        // Any sequence will do that has nothing to do with the order in which masks come.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        Some(old.draw((self.random >> 33) as usize % old.masks()))
    }
}

impl Branch {
    fn masks(&self) -> usize {
        match self {
            Self::Fork(fork) => fork.masks,
            Self::Leaf(leaf) => leaf.masks.len(),
        }
    }

    fn ways(&self) -> usize {
        match self {
            Self::Fork(fork) => fork.ways,
            Self::Leaf(_) => 0,
        }
    }

    fn leaves(&self, pattern: &Pattern<'_>, limit: usize) -> usize {
        let Self::Fork(fork) = self else { return 1 };
        let mut found = 0;
        for (side, allowed) in fork.sides.iter().zip(pattern.allows(&fork.test)) {
            if allowed && found < limit {
                found += side.leaves(pattern, limit - found);
            }
        }
        found
    }

    fn insert(
        &mut self,
        cell: &Link,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        depth: usize,
        change: &mut Change<'_>,
    ) {
        match self {
            Self::Leaf(leaf) => {
                let (fresh, new) = leaf.add(subtable, member);
                if fresh && leaf.masks.len() > LEAF_MASKS {
                    let (branch, node) = Self::grow(std::mem::take(leaf), depth, change);
                    *self = branch;
                    change.garbage.extend(cell.replace(node));
                    if matches!(self, Self::Leaf(leaf) if leaf.masks.len() > LEAF_FULL) {
                        change.turned_away.push(Arc::clone(subtable));
                    }
                } else if new {
                    change.garbage.extend(cell.replace(leaf.publish()));
                }
            }
            Self::Fork(fork) => {
                let allows = pattern.allows(&fork.test);
                let Node::Test(_, cells) = &*fork.node else {
                    return;
                };
                for ((side, cell), allowed) in fork.sides.iter_mut().zip(cells).zip(allows) {
                    if allowed {
                        side.insert(cell, subtable, pattern, member, depth + 1, change);
                    }
                }
                fork.count();
                if fork.masks > fork.built * 2 && fork.masks <= SMALL {
                    let (branch, node) = Self::grow(self.take(), depth, change);
                    *self = branch;
                    change.garbage.extend(cell.replace(node));
                }
            }
        }
    }

    /// Without a cell: readers go on seeing what is removed.
    fn remove(
        &mut self,
        cell: Option<&Link>,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        garbage: &mut Vec<Garbage>,
    ) {
        match self {
            Self::Leaf(leaf) => {
                if leaf.remove(subtable, member)
                    && let Some(cell) = cell
                {
                    garbage.extend(cell.replace(leaf.publish()));
                }
            }
            Self::Fork(fork) => {
                let allows = pattern.allows(&fork.test);
                let Node::Test(_, cells) = &*fork.node else {
                    return;
                };
                for ((side, of), allowed) in fork.sides.iter_mut().zip(cells).zip(allows) {
                    if allowed {
                        side.remove(cell.map(|_| of), subtable, pattern, member, garbage);
                    }
                }
                fork.count();
                if fork.masks <= LEAF_MASKS {
                    let mut leaf = self.take();
                    if let Some(cell) = cell {
                        garbage.extend(cell.replace(leaf.publish()));
                    }
                    *self = Self::Leaf(leaf);
                }
            }
        }
    }

    /// Take out the leaf that has the `nth` mask.
    fn draw(&mut self, nth: usize) -> Vec<LeafMask> {
        match self {
            Self::Leaf(leaf) => std::mem::take(&mut leaf.masks),
            Self::Fork(fork) => {
                let left = fork.sides[0].masks();
                let drawn = if nth < left {
                    fork.sides[0].draw(nth)
                } else {
                    fork.sides[1].draw(nth - left)
                };
                fork.count();
                if let Some(empty) = fork.sides.iter().position(|side| side.masks() == 0) {
                    *self = std::mem::take(&mut fork.sides[1 - empty]);
                }
                drawn
            }
        }
    }

    /// All that lies here, as one leaf. To be used on small parts.
    fn take(&mut self) -> Leaf {
        fn collect(branch: Branch, all: &mut Vec<LeafMask>) {
            match branch {
                Branch::Leaf(leaf) => all.extend(leaf.masks),
                Branch::Fork(fork) => fork.sides.into_iter().for_each(|side| collect(side, all)),
            }
        }
        let mut all = Vec::new();
        collect(std::mem::take(self), &mut all);
        Leaf::of(all)
    }

    /// Build a part of the tree from all that lies there.
    fn grow(mut leaf: Leaf, depth: usize, change: &mut Change<'_>) -> (Self, Target) {
        let masks = leaf.masks.len();
        let worth_trying = masks > leaf.patience || masks > LEAF_FULL;
        if masks > LEAF_MASKS && worth_trying && depth < DEPTH {
            if let Some((test, [no, yes])) = split(&leaf, change) {
                let (no, no_node) = Self::grow(no, depth + 1, change);
                let (yes, yes_node) = Self::grow(yes, depth + 1, change);
                let cells = [Link::new(no_node), Link::new(yes_node)];
                let node = Arc::new(Node::Test(test, cells));
                let mut fork = Box::new(Fork {
                    test,
                    sides: [no, yes],
                    node: Arc::clone(&node),
                    masks: 0,
                    ways: 0,
                    built: 0,
                });
                fork.count();
                fork.built = fork.masks;
                return (Self::Fork(fork), Either::To(node));
            }
            leaf.patience = masks * 2;
        }
        let node = leaf.publish();
        (Self::Leaf(leaf), node)
    }
}

/// The best test that is found, and what lies on its sides.
fn split(leaf: &Leaf, change: &mut Change<'_>) -> Option<(Test, [Leaf; 2])> {
    let each = (SAMPLE / leaf.masks.len()).max(1);
    let stride = leaf.masks.len().div_ceil(SAMPLE);
    let masks = leaf.masks.iter().step_by(stride);
    let sample: Vec<Pattern<'_>> = masks
        .flat_map(|mask| mask.members().take(each).map(move |m| (mask, m)))
        .filter_map(|(mask, member)| change.entries.pattern(change.slots, &mask.subtable, member))
        .collect();
    let test = choose(&sample)?;
    let mut sides = [Leaf::default(), Leaf::default()];
    let mut spread = Vec::new();
    let (mut before, mut after) = (0, 0);
    for mask in &leaf.masks {
        let mut parts = [LeafMask::new(&mask.subtable), LeafMask::new(&mask.subtable)];
        for member in mask.members() {
            let Some(pattern) = change.pattern(&mask.subtable, member) else {
                continue;
            };
            before += 1;
            let allows = pattern.allows(&test);
            for (part, allowed) in parts.iter_mut().zip(allows) {
                if allowed {
                    after += 1;
                    part.add(member);
                }
            }
            if allows == [true, true] {
                spread.push(Arc::clone(&mask.subtable));
            }
        }
        for (side, part) in sides.iter_mut().zip(parts) {
            if !part.is_empty() {
                side.masks.push(part);
            }
        }
    }
    let largest = sides[0].masks.len().max(sides[1].masks.len());
    let divides = largest < leaf.masks.len() && after * 2 <= before * 3;
    divides.then(|| {
        change.spread.extend(spread);
        (test, sides)
    })
}
