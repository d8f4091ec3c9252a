//! Which few masks a packet can match: a tree of tests over its key.
//!
//! Searching every mask in turn makes a table as slow as it has masks, and whoever sends packets can
//! make masks (Tuple Space Explosion, CVE-2019-25076). So the masks are the leaves of a tree. A test
//! compares some bits of one 64-bit chunk of the key with a value; a flow that needs one outcome lies
//! on that side only, one that allows both lies on both. A leaf names the flows that lie there, one or
//! two if flows don't overlap. It is a filter and no more: whether a flow matches is checked with the
//! flow itself, so the tree may name too many, or ones that have gone; never too few.
//!
//! Here is what readers see; how writers change it is in [`branch`], what lies where in
//! [`masks`](super::masks).
//!
//! # Synchronization
//! Leaves and small parts are replaced whole. When a whole tree has become too deep, another takes over
//! little by little: a member is published there before it leaves the first. Readers take `previous`
//! *before* they search the tree: if it is gone already, all that it held is in the tree that they see.

use std::sync::Arc;

use super::LANES;
use super::prefetch::prefetch;
use super::protected::{Either, Tagged};
use super::reclaim::Garbage;
use super::seed::Seed;
use super::slots::Slots;
use super::subtable::Subtable;
use crate::flow::Flow;
use crate::key::Key;
use crate::mask::{Chunks, Mask, chunk, chunks};

pub(super) mod branch;
mod choose;

/// A test: `chunk` of the key, under `bits`, equals `value`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Test {
    bits: u64,
    value: u64,
    chunk: u8,
}

impl Test {
    #[inline]
    fn passes(&self, chunks: &Chunks) -> bool {
        chunk(chunks, self.chunk) & self.bits == self.value
    }
}

/// What a leaf names.
pub(super) enum Candidate {
    /// The only flow of its mask there, by its slot; and the mask's place in the row.
    Flow { slot: u32, place: u32 },
    /// A mask with several flows there.
    Mask(Arc<Subtable>),
}

impl Candidate {
    /// The flow that matches, and its mask's place.
    #[inline]
    fn find<'a>(&self, slots: &'a Slots, seed: &Seed, key: &Key) -> Option<(u32, &'a Flow)> {
        match self {
            Self::Flow { slot, place } => find_flow(slots, *slot, *place, key),
            Self::Mask(subtable) => Some((subtable.place, subtable.find(slots, seed, key)?)),
        }
    }
}

/// A part of a tree.
pub(super) enum Node {
    Test(Test, [Link; 2]),
    /// A leaf with one mask that has several flows there.
    Mask(Arc<Subtable>),
    Leaf(Box<[Candidate]>),
}

/// What the way through a tree ends in, for readers.
#[derive(Clone, Copy)]
pub(super) enum Leaf<'a> {
    None,
    /// As [`Candidate::Flow`].
    Flow {
        slot: u32,
        place: u32,
    },
    Mask(&'a Subtable),
    Many(&'a [Candidate]),
}

impl<'a> Leaf<'a> {
    /// The flow that matches and its mask's place, if there is one here. Adds up the masks looked at.
    #[inline]
    pub(super) fn find<'s>(
        self,
        slots: &'s Slots,
        seed: &Seed,
        key: &Key,
        looked_at: &mut u64,
    ) -> Option<(u32, &'s Flow)> {
        match self {
            Self::None => None,
            Self::Flow { slot, place } => {
                *looked_at += 1;
                find_flow(slots, slot, place, key)
            }
            Self::Mask(subtable) => {
                *looked_at += 1;
                Some((subtable.place, subtable.find(slots, seed, key)?))
            }
            Self::Many(all) => all.iter().find_map(|candidate| {
                *looked_at += 1;
                candidate.find(slots, seed, key)
            }),
        }
    }
}

/// Another flow may be in the slot meanwhile: if it matches, it is as right.
#[inline]
fn find_flow<'s>(slots: &'s Slots, slot: u32, place: u32, key: &Key) -> Option<(u32, &'s Flow)> {
    let (_, flow) = slots.get(slot)?;
    flow.matches(key).then_some((place, flow))
}

/// The way to a part of a tree. Most leaves are a single flow, or empty: these are in the link itself,
/// as each step to other memory counts.
pub(super) struct Link(Tagged<Node>);

/// What a link shall lead to.
type Target = Either<Arc<Node>>;

/// The number that says: no candidates.
const NOTHING: u64 = u64::MAX >> 1;
/// Places from here on have no room in a link.
const PLACES: u32 = u32::MAX >> 1;

fn leaf_of(candidates: impl Iterator<Item = Candidate>) -> Target {
    let all: Box<[Candidate]> = candidates.collect();
    match *all {
        [] => Either::Number(NOTHING),
        [Candidate::Flow { slot, place }] if place < PLACES => {
            Either::Number(u64::from(place) << 32 | u64::from(slot))
        }
        [Candidate::Mask(ref subtable)] => Either::To(Arc::new(Node::Mask(Arc::clone(subtable)))),
        _ => Either::To(Arc::new(Node::Leaf(all))),
    }
}

impl Link {
    fn new(to: Target) -> Self {
        Self(Tagged::new(to))
    }

    fn replace(&self, by: Target) -> Option<Garbage> {
        self.0.replace(by)
    }

    /// Where the way through the tree from here ends for this key.
    #[inline]
    fn leaf(&self, key: &Key) -> Leaf<'_> {
        Leaf::from(way(self.0.load(), key))
    }
}

/// The way of a key, to what isn't a test.
#[inline]
fn way<'a>(mut at: Either<&'a Node>, key: &Key) -> Either<&'a Node> {
    let chunks = chunks(key);
    while let Either::To(Node::Test(test, sides)) = at {
        at = sides[usize::from(test.passes(chunks))].0.load();
    }
    at
}

/// Where the ways of several keys end that begin here.
#[inline]
pub(super) fn leaves_from<'a>(root: Either<&'a Node>, keys: &[&Key]) -> [Leaf<'a>; LANES] {
    let mut leaves = [Leaf::None; LANES];
    let root = match root {
        Either::To(root) => root,
        number => return [Leaf::from(number); LANES],
    };
    let mut ways = [(root, chunks(&Key::ZERO), 0); LANES];
    for ((lane, key), way) in keys.iter().enumerate().zip(&mut ways) {
        *way = (root, chunks(key), lane);
    }
    // Those that aren't at their end yet are the first ones.
    let mut count = keys.len().min(LANES);
    while count != 0 {
        let mut nth = 0;
        while nth < count {
            let (at, chunks, lane) = &mut ways[nth];
            let next = match at {
                Node::Test(test, sides) => sides[usize::from(test.passes(chunks))].0.load(),
                _ => Either::To(*at),
            };
            match next {
                Either::To(node) if !std::ptr::eq(node, *at) => {
                    prefetch(node);
                    *at = node;
                    nth += 1;
                }
                end => {
                    leaves[*lane] = Leaf::from(end);
                    count -= 1;
                    ways[nth] = ways[count];
                }
            }
        }
    }
    leaves
}

impl<'a> From<Either<&'a Node>> for Leaf<'a> {
    #[inline]
    fn from(at: Either<&'a Node>) -> Self {
        match at {
            // A way doesn't end in a test.
            Either::Number(NOTHING) | Either::To(Node::Test(..)) => Self::None,
            Either::Number(number) => Self::Flow {
                slot: number as u32,
                place: (number >> 32) as u32,
            },
            Either::To(Node::Mask(subtable)) => Self::Mask(subtable),
            Either::To(Node::Leaf(all)) => Self::Many(all),
        }
    }
}

#[cfg(test)]
impl Link {
    /// Tests that the key passes, and candidates in its leaf.
    pub(super) fn depth(&self, key: &Key) -> (usize, usize) {
        match self.0.load() {
            Either::Number(NOTHING) => (0, 0),
            Either::Number(_) => (0, 1),
            Either::To(Node::Mask(_)) => (0, 1),
            Either::To(Node::Leaf(all)) => (0, all.len()),
            Either::To(Node::Test(test, sides)) => {
                let yes = test.passes(chunks(key));
                let (tests, masks) = sides[usize::from(yes)].depth(key);
                (tests + 1, masks)
            }
        }
    }
}

/// A tree, and while it takes over, the one before.
pub(super) struct Forest {
    pub(super) tree: Link,
    pub(super) previous: Link,
}

impl Forest {
    /// Without flows.
    pub(super) fn new() -> Arc<Self> {
        Self::after(Either::Number(NOTHING))
    }

    fn after(previous: Target) -> Arc<Self> {
        Arc::new(Self {
            tree: Link::new(Either::Number(NOTHING)),
            previous: Link::new(previous),
        })
    }

    /// As [`Leaf::find`], in both trees.
    #[inline]
    pub(super) fn find<'a>(
        &self,
        slots: &'a Slots,
        seed: &Seed,
        key: &Key,
        looked_at: &mut u64,
    ) -> Option<(u32, &'a Flow)> {
        // The order of these two loads matters; see the module's head.
        let previous = self.previous.0.load();
        let found = self.tree.leaf(key).find(slots, seed, key, looked_at);
        match previous {
            Either::Number(NOTHING) => found,
            _ if found.is_some() => found,
            _ => Leaf::from(way(previous, key)).find(slots, seed, key, looked_at),
        }
    }

    /// Where the ways of several keys through the tree end; not in the previous one.
    #[inline]
    pub(super) fn leaves(&self, keys: &[&Key]) -> [Leaf<'_>; LANES] {
        leaves_from(self.tree.0.load(), keys)
    }

    /// Where the previous tree begins, if there is one. To be taken before the tree is searched.
    #[inline]
    pub(super) fn before(&self) -> Option<Either<&Node>> {
        match self.previous.0.load() {
            Either::Number(NOTHING) => None,
            before => Some(before),
        }
    }

    /// Is there a previous tree?
    pub(super) fn is_taking_over(&self) -> bool {
        !matches!(self.previous.0.load(), Either::Number(NOTHING))
    }

    /// For the writer: where a tree begins that takes over from this one.
    pub(super) fn successor(&self) -> Arc<Self> {
        Self::after(self.tree.0.share())
    }

    /// For the writer: all has been taken over.
    pub(super) fn forget_previous(&self) -> Option<Garbage> {
        self.previous.replace(Either::Number(NOTHING))
    }
}

/// The bits that a flow, or all flows of a mask, need: chunks as the mask has them.
#[derive(Clone, Copy)]
pub(super) struct Pattern<'a> {
    mask: &'a Mask,
    bits: &'a [u64],
    values: &'a [u64],
}

impl<'a> Pattern<'a> {
    /// Of one flow.
    pub(super) fn flow(flow: &'a Flow) -> Self {
        Self {
            mask: &flow.mask,
            bits: flow.mask.bits(),
            values: &flow.key,
        }
    }

    /// Bits needed of this chunk, and their values.
    #[inline]
    fn at(&self, chunk: u8) -> (u64, u64) {
        let place = self.mask.place(chunk);
        let need = place.and_then(|at| Some((*self.bits.get(at)?, *self.values.get(at)?)));
        need.unwrap_or((0, 0))
    }

    /// Which outcomes of the test it allows: no, yes.
    #[inline]
    fn allows(&self, test: &Test) -> [bool; 2] {
        #[cfg(test)]
        WORK.with(|work| work.set(work.get() + 1));
        let (bits, value) = self.at(test.chunk);
        let contradicts = (value ^ test.value) & bits & test.bits != 0;
        let needs = bits & test.bits == test.bits;
        [contradicts || !needs, !contradicts]
    }
}

// How often this thread asked whether a pattern allows a test: most of what a change of the tree costs.
#[cfg(test)]
thread_local!(pub(super) static WORK: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });

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
    pub(super) fn of(flow: &Flow) -> Self {
        Self {
            bits: flow.mask.bits().into(),
            values: flow.key.clone(),
        }
    }

    /// Of one more. True if there is less in common than before.
    pub(super) fn narrow(&mut self, flow: &Flow) -> bool {
        let mut less = false;
        for ((bits, have), value) in self.bits.iter_mut().zip(&mut self.values).zip(&flow.key) {
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
