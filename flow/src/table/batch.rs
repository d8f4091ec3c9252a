//! Looking several packets up side by side.
//!
//! What a lookup costs is waiting for memory: the tree's nodes, the index' bucket, the flow, its key and
//! mask, each of which names the next one's address. Here all packets of a group take one step each
//! before any takes the next, and ask for what the next step needs. The result is that of
//! [`Contents::search`] for each packet, and what isn't the usual case (several candidates, a tree that
//! is being taken over, hashes that collide) is left to that.

use std::array::from_fn;

use super::seed::Seed;
use super::tree::{self, Leaf};
use super::{Contents, LANES};
use crate::flow::Flow;
use crate::key::Key;

/// A flow, and its mask's place.
pub(super) type Found<'a> = Option<(u32, &'a Flow)>;

impl Contents {
    /// [`Contents::search`] in the tree for each of up to [`LANES`] keys. Adds up the masks looked at.
    pub(super) fn search_tree<'a>(
        &'a self,
        seed: &Seed,
        keys: &[&Key],
        looked_at: &mut u64,
    ) -> [Found<'a>; LANES] {
        let forest = self.forest.load();
        // In this order; see `tree`.
        let previous = forest.before();
        let mut found = self.search_leaves(seed, keys, forest.leaves(keys), looked_at);
        let Some(previous) = previous else {
            return found;
        };
        // Side by side too: all of those that the new tree doesn't have yet.
        let mut left = [const { &Key::ZERO }; LANES];
        let mut lanes = [0; LANES];
        let mut count = 0;
        for (lane, (key, found)) in keys.iter().zip(&found).enumerate() {
            if found.is_none() {
                (left[count], lanes[count]) = (*key, lane);
                count += 1;
            }
        }
        let left = left.get(..count).unwrap_or_default();
        let leaves = tree::leaves_from(previous, left);
        let more = self.search_leaves(seed, left, leaves, looked_at);
        for (lane, more) in lanes.into_iter().zip(more).take(count) {
            found[lane] = more;
        }
        found
    }

    /// What matches of the leaf that each key's way has led to.
    #[inline]
    fn search_leaves<'a>(
        &'a self,
        seed: &Seed,
        keys: &[&Key],
        leaves: [Leaf<'a>; LANES],
        looked_at: &mut u64,
    ) -> [Found<'a>; LANES] {
        let leaves = leaves.get(..keys.len()).unwrap_or(&leaves);

        // Of masks with many flows: their parts, the hash and its bucket, the slot in that.
        for leaf in leaves {
            if let Leaf::Mask(subtable) = leaf {
                subtable.prefetch();
            }
        }
        let mut hashes = [0; LANES];
        for ((leaf, key), hash) in leaves.iter().zip(keys).zip(&mut hashes) {
            if let Leaf::Mask(subtable) = leaf {
                *hash = seed.masked(&subtable.mask, key);
                subtable.index.prefetch(*hash);
            }
        }
        let mut guesses: [Option<(u32, u32)>; LANES] = [None; LANES];
        for ((leaf, hash), guess) in leaves.iter().zip(hashes).zip(&mut guesses) {
            *guess = match leaf {
                Leaf::None | Leaf::Many(_) => None,
                Leaf::Flow { slot, place } => Some((*slot, *place)),
                Leaf::Mask(subtable) => {
                    let slot = subtable.index.guess(hash);
                    slot.map(|slot| (slot, subtable.place))
                }
            };
            if let Some((slot, _)) = guess {
                self.slots.prefetch(*slot);
            }
        }
        // The flow, and what it is compared with.
        let flows: [Found<'a>; LANES] = from_fn(|lane| {
            let (slot, place) = guesses[lane]?;
            let (_, flow) = self.slots.get(slot)?;
            flow.prefetch();
            flow.prefetch_actions();
            Some((place, flow))
        });
        let mut found = [None; LANES];
        for (lane, (key, leaf)) in keys.iter().zip(leaves).enumerate() {
            found[lane] = match (flows[lane], leaf) {
                (Some((place, flow)), _) if flow.matches(key) => {
                    *looked_at += 1;
                    Some((place, flow))
                }
                (Some(_), Leaf::Flow { .. }) => {
                    *looked_at += 1;
                    None
                }
                // Taken out since the leaf was read: another may have come in its place.
                (None, Leaf::Flow { .. }) => {
                    let forest = self.forest.load();
                    forest.find(&self.slots, seed, key, looked_at)
                }
                (_, leaf) => leaf.find(&self.slots, seed, key, looked_at),
            };
        }
        found
    }
}
