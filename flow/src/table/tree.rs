//! Which few masks a packet can match: a tree of tests over its key.
//!
//! Searching every mask in turn makes a table as slow as it has masks, and whoever sends packets can
//! make masks (Tuple Space Explosion, CVE-2019-25076). So the masks are the leaves of a tree. A test
//! compares some bits of one 64-bit chunk of the key with a value; a flow that needs one outcome lies
//! on that side only, one that allows both lies on both. A leaf names the subtables of the flows that
//! lie there, two or three if flows don't overlap. It is a filter and no more: what matches is found
//! and checked in the subtable, so the tree may name too many, never too few.
//!
//! Each mask lies in the tree by one of these, the first that is small enough:
//! - its flows, one by one;
//! - what its flows have in common, as one pattern, when there are many;
//! - not at all: it is searched for each packet, after the leaf, when its flows allow both outcomes of
//!   so many tests that they would lie nearly everywhere.
//!
//! A part that has grown to twice its size since it was built is built anew, so that depth stays
//! logarithmic whatever the order in which flows come. Readers see leaves and parts replaced whole.

use std::sync::Arc;

use super::protected::Protected;
use super::reclaim::Garbage;
use super::slots::Slots;
use super::subtable::Subtable;
use crate::key::Key;
use crate::mask::{Mask, chunk, chunks};

/// More masks than this in a leaf: it is split, if a test can be found.
const LEAF_MASKS: usize = 2;
/// More flows than this of one mask: what they have in common stands for them.
pub(super) const FEW_FLOWS: usize = 32;
/// A flow that would lie in more leaves than this makes its mask one that is always searched.
const MANY_LEAVES: usize = 32;
/// Parts deeper than this aren't split further.
const DEPTH: usize = 96;
/// Patterns by which a test is chosen, and pairs of them that suggest one.
const SAMPLE: usize = 16;

/// A test: `chunk` of the key, under `bits`, equals `value`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Test {
    bits: u64,
    value: u64,
    chunk: u8,
}

/// The tree as readers see it.
pub(super) enum Node {
    Test(Test, [Protected<Node>; 2]),
    /// The first two here, as more are rare and each step to other memory counts.
    Leaf([Option<Arc<Subtable>>; 2], Box<[Arc<Subtable>]>),
}

impl Node {
    pub(super) fn empty() -> Arc<Self> {
        Self::leaf_of(&[])
    }

    /// A leaf of these.
    pub(super) fn leaf_of(subtables: &[Arc<Subtable>]) -> Arc<Self> {
        let mut all = subtables.iter().cloned();
        let first = [all.next(), all.next()];
        Arc::new(Self::Leaf(first, all.collect()))
    }

    /// The subtables that may have a flow for this key.
    #[inline]
    pub(super) fn leaf(&self, key: &Key) -> impl Iterator<Item = &Subtable> {
        let chunks = chunks(key);
        let mut node = self;
        loop {
            match node {
                Self::Leaf(first, rest) => {
                    return first.iter().flatten().chain(rest).map(Arc::as_ref);
                }
                Self::Test(test, sides) => {
                    let yes = chunk(chunks, test.chunk) & test.bits == test.value;
                    node = sides[usize::from(yes)].load();
                }
            }
        }
    }
}

#[cfg(test)]
impl Node {
    /// Tests that the key passes, and masks in its leaf.
    pub(super) fn depth(&self, key: &Key) -> (usize, usize) {
        match self {
            Self::Leaf(first, rest) => (0, first.iter().flatten().count() + rest.len()),
            Self::Test(test, sides) => {
                let yes = chunk(chunks(key), test.chunk) & test.bits == test.value;
                let (tests, masks) = sides[usize::from(yes)].load().depth(key);
                (tests + 1, masks)
            }
        }
    }
}

/// The bits that a flow, or all flows of a mask, need: chunks as the mask has them.
#[derive(Clone, Copy)]
pub(super) struct Pattern<'a> {
    pub(super) mask: &'a Mask,
    pub(super) bits: &'a [u64],
    pub(super) values: &'a [u64],
}

impl<'a> Pattern<'a> {
    /// Of one flow, whose masked key is `values`.
    pub(super) fn flow(mask: &'a Mask, values: &'a [u64]) -> Self {
        Self {
            mask,
            bits: mask.bits(),
            values,
        }
    }

    /// Bits needed of this chunk, and their values.
    fn at(&self, chunk: u8) -> (u64, u64) {
        let place = self.mask.place(chunk);
        let need = place.and_then(|at| Some((*self.bits.get(at)?, *self.values.get(at)?)));
        need.unwrap_or((0, 0))
    }

    /// Which outcomes of the test it allows: no, yes.
    fn allows(&self, test: &Test) -> [bool; 2] {
        let (bits, value) = self.at(test.chunk);
        let contradicts = (value ^ test.value) & bits & test.bits != 0;
        let needs = bits & test.bits == test.bits;
        [contradicts || !needs, !contradicts]
    }
}

/// What stands for flows in a leaf.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Member {
    /// The flow in this slot.
    Flow(u32),
    /// All flows of the mask, by what they have in common.
    Common,
}

/// What the flows of a mask have in common.
#[derive(Clone)]
pub(super) struct Common {
    bits: Box<[u64]>,
    values: Box<[u64]>,
}

impl Common {
    /// Of one flow.
    pub(super) fn of(mask: &Mask, values: &[u64]) -> Self {
        Self {
            bits: mask.bits().into(),
            values: values.into(),
        }
    }

    /// Of one more. True if there is less in common than before.
    pub(super) fn narrow(&mut self, values: &[u64]) -> bool {
        let mut less = false;
        for ((bits, have), value) in self.bits.iter_mut().zip(&mut self.values).zip(values) {
            let differ = (*have ^ value) & *bits;
            less |= differ != 0;
            *bits &= !differ;
            *have &= *bits;
        }
        less
    }

    pub(super) fn pattern<'a>(&'a self, mask: &'a Mask) -> Pattern<'a> {
        Pattern {
            mask,
            bits: &self.bits,
            values: &self.values,
        }
    }
}

/// A mask in a leaf, by these members.
#[derive(Clone)]
struct LeafMask {
    subtable: Arc<Subtable>,
    flows: Vec<u32>,
    common: Option<Common>,
}

impl LeafMask {
    fn patterns<'a>(&'a self, slots: &'a Slots) -> impl Iterator<Item = (Member, Pattern<'a>)> {
        let mask = &*self.subtable.mask;
        let flows = self.flows.iter().filter_map(move |&slot| {
            let (_, flow) = slots.get(slot)?;
            Some((Member::Flow(slot), Pattern::flow(mask, &flow.key)))
        });
        let common = self
            .common
            .iter()
            .map(move |all| (Member::Common, all.pattern(mask)));
        flows.chain(common)
    }

    fn len(&self) -> usize {
        self.flows.len() + usize::from(self.common.is_some())
    }

    fn like(&self) -> Self {
        Self {
            subtable: Arc::clone(&self.subtable),
            flows: Vec::new(),
            common: None,
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
    fn publish(&self) -> Arc<Node> {
        let subtables: Vec<_> = self
            .masks
            .iter()
            .map(|mask| Arc::clone(&mask.subtable))
            .collect();
        Node::leaf_of(&subtables)
    }

    /// Each mask once, with all its members; masks that lay in several leaves come several times.
    fn of(mut masks: Vec<LeafMask>) -> Self {
        masks.sort_unstable_by_key(|mask| Arc::as_ptr(&mask.subtable));
        let mut all: Vec<LeafMask> = Vec::with_capacity(masks.len());
        for mask in masks {
            match all.last_mut() {
                Some(last) if Arc::ptr_eq(&last.subtable, &mask.subtable) => {
                    last.flows.extend(mask.flows);
                    last.common = last.common.take().or(mask.common);
                }
                _ => all.push(mask),
            }
        }
        for mask in &mut all {
            mask.flows.sort_unstable();
            mask.flows.dedup();
        }
        Self {
            masks: all,
            patience: 0,
        }
    }
}

/// The tree as the writer knows it.
enum Branch {
    Test {
        test: Test,
        sides: Box<[Branch; 2]>,
        /// What readers see; the pointers to both sides are in it.
        node: Arc<Node>,
        /// Masks in the leaves below, and how many when this was built.
        masks: usize,
        built: usize,
    },
    Leaf(Leaf),
}

impl Default for Branch {
    fn default() -> Self {
        Self::Leaf(Leaf::default())
    }
}

/// The writer's side of the tree. Behind the table's mutex.
#[derive(Default)]
pub(super) struct Tree(Branch);

/// What every step of a change needs.
pub(super) struct Change<'a> {
    pub(super) slots: &'a Slots,
    pub(super) garbage: &'a mut Vec<Garbage>,
}

impl Tree {
    /// Would this lie in too many leaves?
    pub(super) fn is_wide(&self, pattern: &Pattern<'_>) -> bool {
        self.0.leaves(pattern, MANY_LEAVES + 1) > MANY_LEAVES
    }

    /// Put a member of a mask where its pattern lies; readers see it when this returns. `root` is
    /// where readers begin. A member that is there already in part is put in the other places.
    pub(super) fn insert(
        &mut self,
        root: &Protected<Node>,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        change: &mut Change<'_>,
    ) {
        self.0.insert(root, subtable, pattern, member, 0, change);
    }

    /// Take it out again.
    pub(super) fn remove(
        &mut self,
        root: &Protected<Node>,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        change: &mut Change<'_>,
    ) {
        self.0.remove(root, subtable, pattern, member, change);
    }

    /// In each leaf, the most used first.
    pub(super) fn order(&mut self, root: &Protected<Node>, garbage: &mut Vec<Garbage>) {
        self.0.order(root, garbage);
    }
}

impl Branch {
    fn masks(&self) -> usize {
        match self {
            Self::Test { masks, .. } => *masks,
            Self::Leaf(leaf) => leaf.masks.len(),
        }
    }

    /// Leaves in which a pattern lies; counted up to `limit`.
    fn leaves(&self, pattern: &Pattern<'_>, limit: usize) -> usize {
        match self {
            Self::Leaf(_) => 1,
            Self::Test { test, sides, .. } => {
                let [no, yes] = pattern.allows(test);
                let found = if no {
                    sides[0].leaves(pattern, limit)
                } else {
                    0
                };
                if yes && found < limit {
                    found + sides[1].leaves(pattern, limit - found)
                } else {
                    found
                }
            }
        }
    }

    fn insert(
        &mut self,
        cell: &Protected<Node>,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        depth: usize,
        change: &mut Change<'_>,
    ) {
        match self {
            Self::Leaf(leaf) => {
                let same = |mask: &&mut LeafMask| Arc::ptr_eq(&mask.subtable, subtable);
                let known = leaf.masks.iter_mut().find(same);
                let fresh = known.is_none();
                let mut new = LeafMask {
                    subtable: Arc::clone(subtable),
                    flows: Vec::new(),
                    common: None,
                };
                let mask = known.unwrap_or(&mut new);
                match member {
                    Member::Flow(slot) => mask.flows.push(slot),
                    Member::Common => {
                        mask.common = Some(Common {
                            bits: pattern.bits.into(),
                            values: pattern.values.into(),
                        });
                    }
                }
                if fresh {
                    leaf.masks.push(new);
                    let (branch, node) = Self::grow(std::mem::take(leaf), depth, change.slots);
                    *self = branch;
                    change.garbage.push(cell.replace(node));
                }
            }
            Self::Test {
                test,
                sides,
                node,
                masks,
                built,
            } => {
                let allows = pattern.allows(test);
                let Node::Test(_, cells) = &**node else {
                    return;
                };
                for ((side, cell), allowed) in sides.iter_mut().zip(cells).zip(allows) {
                    if allowed {
                        side.insert(cell, subtable, pattern, member, depth + 1, change);
                    }
                }
                *masks = sides[0].masks() + sides[1].masks();
                if *masks > *built * 2 {
                    let mut all = Vec::new();
                    std::mem::take(self).collect(&mut all);
                    let (branch, node) = Self::grow(Leaf::of(all), depth, change.slots);
                    *self = branch;
                    change.garbage.push(cell.replace(node));
                }
            }
        }
    }

    fn remove(
        &mut self,
        cell: &Protected<Node>,
        subtable: &Arc<Subtable>,
        pattern: &Pattern<'_>,
        member: Member,
        change: &mut Change<'_>,
    ) {
        match self {
            Self::Leaf(leaf) => {
                let same = |mask: &LeafMask| Arc::ptr_eq(&mask.subtable, subtable);
                let Some(at) = leaf.masks.iter().position(same) else {
                    return;
                };
                let mask = &mut leaf.masks[at];
                match member {
                    Member::Flow(slot) => mask.flows.retain(|have| *have != slot),
                    Member::Common => mask.common = None,
                }
                if mask.len() == 0 {
                    leaf.masks.remove(at);
                    change.garbage.push(cell.replace(leaf.publish()));
                }
            }
            Self::Test {
                test,
                sides,
                node,
                masks,
                ..
            } => {
                let allows = pattern.allows(test);
                let Node::Test(_, cells) = &**node else {
                    return;
                };
                for ((side, cell), allowed) in sides.iter_mut().zip(cells).zip(allows) {
                    if allowed {
                        side.remove(cell, subtable, pattern, member, change);
                    }
                }
                *masks = sides[0].masks() + sides[1].masks();
                if *masks <= LEAF_MASKS / 2 {
                    let mut all = Vec::new();
                    std::mem::take(self).collect(&mut all);
                    let all = Leaf::of(all);
                    change.garbage.push(cell.replace(all.publish()));
                    *self = Self::Leaf(all);
                }
            }
        }
    }

    fn order(&mut self, cell: &Protected<Node>, garbage: &mut Vec<Garbage>) {
        match self {
            Self::Leaf(leaf) if leaf.masks.len() > 1 => {
                leaf.masks
                    .sort_by_cached_key(|mask| std::cmp::Reverse(mask.subtable.used()));
                garbage.push(cell.replace(leaf.publish()));
            }
            Self::Leaf(_) => {}
            Self::Test { sides, node, .. } => {
                let Node::Test(_, cells) = &**node else {
                    return;
                };
                for (side, cell) in sides.iter_mut().zip(cells) {
                    side.order(cell, garbage);
                }
            }
        }
    }

    /// All that lies here.
    fn collect(self, all: &mut Vec<LeafMask>) {
        match self {
            Self::Leaf(leaf) => all.extend(leaf.masks),
            Self::Test { sides, .. } => sides.into_iter().for_each(|side| side.collect(all)),
        }
    }

    /// Build a part of the tree from all that lies there.
    fn grow(mut leaf: Leaf, depth: usize, slots: &Slots) -> (Self, Arc<Node>) {
        let masks = leaf.masks.len();
        if masks > LEAF_MASKS && masks > leaf.patience && depth < DEPTH {
            if let Some((test, [no, yes])) = split(&leaf, slots) {
                let (no, no_node) = Self::grow(no, depth + 1, slots);
                let (yes, yes_node) = Self::grow(yes, depth + 1, slots);
                let masks = no.masks() + yes.masks();
                let sides = [Protected::new(no_node), Protected::new(yes_node)];
                let node = Arc::new(Node::Test(test, sides));
                let sides = Box::new([no, yes]);
                let branch = Self::Test {
                    test,
                    sides,
                    node: Arc::clone(&node),
                    masks,
                    built: masks,
                };
                return (branch, node);
            }
            leaf.patience = masks * 2;
        }
        let node = leaf.publish();
        (Self::Leaf(leaf), node)
    }
}

/// The best test that is found, and what lies on its sides.
fn split(leaf: &Leaf, slots: &Slots) -> Option<(Test, [Leaf; 2])> {
    let test = choose(leaf, slots)?;
    let mut sides = [Leaf::default(), Leaf::default()];
    let (mut before, mut after) = (0, 0);
    for mask in &leaf.masks {
        let mut parts = [mask.like(), mask.like()];
        for (member, pattern) in mask.patterns(slots) {
            before += 1;
            for (part, allowed) in parts.iter_mut().zip(pattern.allows(&test)) {
                if allowed {
                    after += 1;
                    match member {
                        Member::Flow(slot) => part.flows.push(slot),
                        Member::Common => part.common.clone_from(&mask.common),
                    }
                }
            }
        }
        for (side, part) in sides.iter_mut().zip(parts) {
            if part.len() > 0 {
                side.masks.push(part);
            }
        }
    }
    let largest = sides[0].masks.len().max(sides[1].masks.len());
    (largest < leaf.masks.len() && after * 2 <= before * 3).then_some((test, sides))
}

/// A test that sends about half of the patterns to either side and few to both, by a sample.
fn choose(leaf: &Leaf, slots: &Slots) -> Option<Test> {
    let each = (SAMPLE / leaf.masks.len()).max(1);
    let stride = leaf.masks.len().div_ceil(SAMPLE);
    let masks = leaf.masks.iter().step_by(stride);
    let sample: Vec<Pattern<'_>> = masks
        .flat_map(|m| m.patterns(slots).take(each))
        .map(|(_, pattern)| pattern)
        .collect();
    let mut best = None;
    let mut consider = |test: Test| {
        let mut count = [0usize; 2];
        for pattern in &sample {
            for (count, allowed) in count.iter_mut().zip(pattern.allows(&test)) {
                *count += usize::from(allowed);
            }
        }
        let largest = count[0].max(count[1]);
        // What lies on both sides counts once more.
        let cost = largest + (count[0] + count[1] - sample.len());
        if largest < sample.len() && best.is_none_or(|(least, _)| cost < least) {
            best = Some((cost, test));
        }
    };
    // Neighbours at two distances: what two patterns both need, or where they differ, is a test.
    for distance in [1, sample.len() / 3 + 1] {
        for (nth, one) in sample.iter().enumerate() {
            let other = &sample[(nth + distance) % sample.len()];
            for (chunk, bits) in one.mask.iter() {
                let (have, value) = one.at(chunk);
                let (other_have, other_value) = other.at(chunk);
                let both = have & other_have;
                if both == 0 || (have == other_have && value == other_value) {
                    continue;
                }
                debug_assert!(have & !bits == 0);
                consider(Test {
                    bits: both,
                    value: value & both,
                    chunk,
                });
                consider(Test {
                    bits: both,
                    value: other_value & both,
                    chunk,
                });
                let differ = (value ^ other_value) & both;
                if differ != 0 {
                    let bit = 1 << differ.trailing_zeros();
                    consider(Test {
                        bits: bit,
                        value: bit,
                        chunk,
                    });
                }
            }
        }
    }
    best.map(|(_, test)| test)
}
