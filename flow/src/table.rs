//! The flow table: which flow a packet belongs to, and which flows there are.
//!
//! Packets look flows up by key; clients name them by unique id, or by their exact unmasked key. Masks
//! may overlap: any match is right then, all flows stay visible to dumps, and when one goes another
//! that matches takes over.
//!
//! # Thread safety
//! - **Packets, GET and dumps** need a pin of the table's [`Reclaimer`], nothing else; they never wait.
//!   What they find lives as long as the pin. They don't unpin between packets, but repin once a batch.
//! - **Changes** go through a [`Writer`], which holds the table's mutex; take it once for a batch of
//!   operations, with flows prepared before ([`FlowTable::prepare`]). Nobody may be pinned while
//!   waiting for it. Nothing is freed under it: garbage goes through the epoch to a reaper thread.
//! - A table that is unlinked from its datapath goes on working for those who still have it.
//!
//! # Structure
//! Flows lie in numbered slots that don't move (`slots`); two kinds of hash index name them by
//! number: one over all ids, and one for each mask (a subtable), searched with the packet's key under
//! that mask. Which masks are worth searching for a packet a tree tells (`tree`, `masks`). A flush puts
//! a new, empty set of all this in place at once (`Contents`).
//!
//! Each change does a bounded amount of work, however many flows and masks there are: what grows does so
//! little by little, with each change that follows, or by [`FlowTable::maintain`] when none does.

use std::cmp::Reverse;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};

use crossbeam_epoch::{Guard, LocalHandle};

use crate::cache::{LookupCounters, MASK_CACHE_DEFAULT, MASK_CACHE_MAX, MaskCache};
use crate::flow::{Flow, FlowId, NewFlow, Ufid};
use crate::key::Key;

pub use dump::{DumpCursor, DumpPart, StaleCursor};
pub use reclaim::Reclaimer;
pub use writer::{InsertError, Writer};

use index::Index;
use masks::Masks;
use protected::{Protected, Root};
use seed::Seed;
use slots::Slots;
use subtable::Row;
use tree::Forest;

mod atomic;
mod batch;
mod dump;
mod index;
mod masks;
pub mod oracle;
pub(crate) mod prefetch;
pub(crate) mod protected;
mod reclaim;
mod seed;
mod slots;
mod subtable;
mod tree;
mod writer;
mod zeroed;

/// Packets that are looked up side by side, at most: enough to wait for memory together, few enough for
/// their keys to stay in a first-level cache.
pub const LANES: usize = 16;

/// What packets and readers see, as a whole.
struct Contents {
    slots: Arc<Slots>,
    /// By [`FlowId`].
    ids: Index,
    /// All masks.
    subtables: Row,
    /// Which of them a packet can match, and those that aren't in the tree.
    forest: Protected<Forest>,
    wide: Protected<Row>,
}

impl Contents {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            slots: Arc::new(Slots::new()),
            ids: Index::new(),
            subtables: Row::new(),
            forest: Protected::new(Forest::new()),
            wide: Protected::new(Arc::new(Row::new())),
        })
    }

    fn find_id(&self, hash: u32, is: impl Fn(&FlowId) -> bool) -> Option<&Flow> {
        self.ids.find(hash, |slot| {
            let (_, flow) = self.slots.get(slot)?;
            is(&flow.id).then_some(flow)
        })
    }

    fn find_ufid(&self, seed: &Seed, ufid: &Ufid) -> Option<&Flow> {
        self.find_id(
            seed.bytes(ufid.as_bytes()),
            |id| matches!(id, FlowId::Ufid(of) if of == ufid),
        )
    }

    fn find_key(&self, seed: &Seed, key: &Key) -> Option<&Flow> {
        self.find_id(
            seed.key(key),
            |id| matches!(id, FlowId::Key(of) if **of == *key),
        )
    }

    /// Search the masks that the key can match: the flow and its mask's place.
    #[inline]
    fn search(&self, seed: &Seed, key: &Key) -> Option<(u32, &Flow)> {
        let found = self.forest.load().find(&self.slots, seed, key, &mut 0);
        found.or_else(|| self.search_wide(seed, key, &mut 0))
    }

    /// Search the masks outside of the tree in turn.
    fn search_wide(&self, seed: &Seed, key: &Key, looked_at: &mut u64) -> Option<(u32, &Flow)> {
        self.wide.load().iter().find_map(|subtable| {
            *looked_at += 1;
            let flow = subtable.find(&self.slots, seed, key)?;
            Some((subtable.place, flow))
        })
    }

    /// Search all masks in turn.
    fn scan(&self, seed: &Seed, key: &Key) -> Option<&Flow> {
        self.subtables
            .iter()
            .find_map(|subtable| subtable.find(&self.slots, seed, key))
    }

    /// A packet matched a flow of the mask at this place.
    #[inline]
    fn sample(&self, cache: &mut MaskCache, place: u32) {
        if cache.is_sample()
            && let Some(subtable) = self.subtables.get(place)
        {
            subtable.count();
        }
    }
}

/// What a table is made from.
#[derive(Clone, Copy, Debug)]
pub struct TableConfig {
    /// Key of the hashes: random, and told to nobody.
    pub seed: u64,
    /// Sets this table apart from others: a cursor of one isn't used on another. Never used twice.
    pub generation: u64,
    /// Entries of each executor's mask cache: 0, or a power of two up to [`MASK_CACHE_MAX`].
    pub masks_cache_size: u32,
}

impl TableConfig {
    /// With a mask cache of the usual size.
    #[must_use]
    pub const fn new(seed: u64, generation: u64) -> Self {
        Self {
            seed,
            generation,
            masks_cache_size: MASK_CACHE_DEFAULT,
        }
    }
}

/// The size asked for isn't 0 or a power of two up to [`MASK_CACHE_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a mask cache has 0 entries or a power of two up to {MASK_CACHE_MAX}, not {0}")]
pub struct BadCacheSize(pub u32);

/// A datapath's flows. See the module's head for who may do what.
pub struct FlowTable {
    contents: Root<Contents>,
    seed: Seed,
    generation: u64,
    reclaimer: Arc<Reclaimer>,
    masks_cache_size: AtomicU32,
    n_flows: AtomicU64,
    n_masks: AtomicU64,
    /// Flows that were ever inserted; each one's birth is its number.
    births: AtomicU64,
    /// The table's mutex; it guards what only writers know.
    writing: Mutex<Masks>,
}

/// A flow made ready for [`Writer::insert`], with everything that can be done before the mutex.
pub struct PreparedFlow {
    flow: Flow,
    id_hash: u32,
    mask_hash: u32,
}

impl PreparedFlow {
    /// The flow that isn't installed yet.
    #[must_use]
    pub fn flow(&self) -> &Flow {
        &self.flow
    }
}

impl std::fmt::Debug for PreparedFlow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PreparedFlow").field(&self.flow).finish()
    }
}

impl FlowTable {
    /// An empty table, whose garbage goes to `reclaimer`.
    ///
    /// # Errors
    /// If the mask cache can't have that size.
    pub fn new(config: TableConfig, reclaimer: &Arc<Reclaimer>) -> Result<Self, BadCacheSize> {
        let table = Self {
            contents: Root::new(Contents::new()),
            seed: Seed::new(config.seed),
            generation: config.generation,
            reclaimer: Arc::clone(reclaimer),
            masks_cache_size: AtomicU32::new(0),
            n_flows: AtomicU64::new(0),
            n_masks: AtomicU64::new(0),
            births: AtomicU64::new(0),
            writing: Mutex::default(),
        };
        table.set_masks_cache_size(config.masks_cache_size)?;
        Ok(table)
    }

    /// Where its garbage goes.
    #[must_use]
    pub fn reclaimer(&self) -> &Arc<Reclaimer> {
        &self.reclaimer
    }

    /// What sets it apart from other tables.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Installed flows.
    #[must_use]
    pub fn n_flows(&self) -> u64 {
        self.n_flows.load(Relaxed)
    }

    /// Different masks among them.
    #[must_use]
    pub fn n_masks(&self) -> u64 {
        self.n_masks.load(Relaxed)
    }

    /// Entries of each executor's mask cache.
    #[must_use]
    pub fn masks_cache_size(&self) -> u32 {
        self.masks_cache_size.load(Relaxed)
    }

    /// Change it: executors follow at their next packet.
    ///
    /// # Errors
    /// Unless it is 0 or a power of two up to [`MASK_CACHE_MAX`].
    pub fn set_masks_cache_size(&self, size: u32) -> Result<(), BadCacheSize> {
        if size > MASK_CACHE_MAX || (size != 0 && !size.is_power_of_two()) {
            return Err(BadCacheSize(size));
        }
        self.masks_cache_size.store(size, Relaxed);
        Ok(())
    }

    #[inline]
    fn contents<'g>(&'g self, guard: &'g Guard) -> &'g Contents {
        assert!(self.reclaimer.protects(guard), "a pin of another collector");
        self.contents.load(guard)
    }

    /// The flow that a packet with this key belongs to.
    ///
    /// `hash` is the packet's: equal for packets of one connection, or 0 if unknown. It only finds the
    /// mask faster, where the tree doesn't name it. `cache` is the executor's own.
    ///
    /// # Panics
    /// If `guard` isn't a pin of the table's reclaimer.
    #[inline]
    pub fn lookup<'g>(
        &'g self,
        key: &Key,
        hash: u32,
        guard: &'g Guard,
        cache: &mut MaskCache,
        counters: &mut LookupCounters,
    ) -> Option<&'g Flow> {
        let contents = self.contents(guard);
        cache.fit(self.masks_cache_size.load(Relaxed));
        let mut looked_at = 0;
        let forest = contents.forest.load();
        let found = forest.find(&contents.slots, &self.seed, key, &mut looked_at);
        counters.mask_hit += looked_at;
        self.settle(contents, found, key, hash, cache, counters)
    }

    /// As [`FlowTable::lookup`] for each of some packets, of which `of` tells key and hash; but they wait
    /// for memory together. Of more than [`LANES`] packets the rest isn't looked up.
    ///
    /// # Panics
    /// If `guard` isn't a pin of the table's reclaimer.
    pub fn lookup_batch<'g, P>(
        &'g self,
        packets: &[P],
        of: impl Fn(&P) -> (&Key, u32),
        guard: &'g Guard,
        cache: &mut MaskCache,
        counters: &mut LookupCounters,
    ) -> [Option<&'g Flow>; LANES] {
        let contents = self.contents(guard);
        cache.fit(self.masks_cache_size.load(Relaxed));
        let packets = packets.get(..LANES).unwrap_or(packets);
        let mut found = [None; LANES];
        let alike = if cache.alike {
            self.lookup_alike(contents, packets, &of, cache, counters, &mut found)
        } else {
            0
        };
        let packets_left = packets.get(alike..).unwrap_or_default();
        if !packets_left.is_empty() {
            let mut keys = [const { &Key::ZERO }; LANES];
            for (key, packet) in keys.iter_mut().zip(packets_left) {
                *key = of(packet).0;
            }
            let keys = keys.get(..packets_left.len()).unwrap_or_default();
            let in_tree = contents.search_tree(&self.seed, keys, &mut counters.mask_hit);
            let found = found.iter_mut().skip(alike);
            for ((found, in_tree), packet) in found.zip(in_tree).zip(packets_left) {
                let (key, hash) = of(packet);
                *found = self.settle(contents, in_tree, key, hash, cache, counters);
            }
        }
        let all = found.get(..packets.len()).unwrap_or_default();
        cache.alike = all.windows(2).all(|two| match *two {
            [Some(one), Some(other)] => std::ptr::eq(one, other),
            _ => false,
        });
        found
    }

    /// The first packets, as many as belong to one flow; for traffic of which that can be expected: each
    /// that does is found by a comparison.
    #[inline]
    fn lookup_alike<'g, P>(
        &'g self,
        contents: &'g Contents,
        packets: &[P],
        of: impl Fn(&P) -> (&Key, u32),
        cache: &mut MaskCache,
        counters: &mut LookupCounters,
        found: &mut [Option<&'g Flow>; LANES],
    ) -> usize {
        let Some(first) = packets.first() else {
            return 0;
        };
        let (key, mut looked_at) = (of(first).0, 0);
        let forest = contents.forest.load();
        let Some(hit) = forest.find(&contents.slots, &self.seed, key, &mut looked_at) else {
            return 0;
        };
        let mut alike = 0;
        for (found, packet) in found.iter_mut().zip(packets) {
            let (key, hash) = of(packet);
            if !hit.1.matches(key) {
                break;
            }
            // Of each but the first the flow's own mask is the only one that is looked at.
            counters.mask_hit += std::mem::replace(&mut looked_at, 1);
            *found = self.settle(contents, Some(hit), key, hash, cache, counters);
            alike += 1;
        }
        alike
    }

    /// What there is to do when the tree was searched.
    #[inline]
    fn settle<'g>(
        &'g self,
        contents: &'g Contents,
        found: Option<(u32, &'g Flow)>,
        key: &Key,
        hash: u32,
        cache: &mut MaskCache,
        counters: &mut LookupCounters,
    ) -> Option<&'g Flow> {
        // A connection's packets match another mask after each recirculation.
        let hash = if key.recirc_id == 0 || hash == 0 {
            hash
        } else {
            (hash ^ key.recirc_id.wrapping_mul(0x9e37_79b1)).max(1)
        };
        let remembered = cache.get(hash);
        let found = match found {
            None if !contents.wide.load().is_empty() => {
                self.lookup_wide(contents, key, remembered, &mut counters.mask_hit)
            }
            found => found,
        };
        let Some((place, flow)) = found else {
            counters.missed += 1;
            return None;
        };
        if remembered == Some(place) {
            counters.cache_hit += 1;
        } else {
            cache.put(hash, place);
        }
        counters.hit += 1;
        contents.sample(cache, place);
        Some(flow)
    }

    /// A packet that the tree has no flow for: the mask that its hash matched last, else all those
    /// outside of the tree.
    #[cold]
    fn lookup_wide<'g>(
        &self,
        contents: &'g Contents,
        key: &Key,
        remembered: Option<u32>,
        looked_at: &mut u64,
    ) -> Option<(u32, &'g Flow)> {
        if let Some(place) = remembered
            && let Some(subtable) = contents.subtables.get(place)
        {
            *looked_at += 1;
            if let Some(flow) = subtable.find(&contents.slots, &self.seed, key) {
                return Some((place, flow));
            }
        }
        contents.search_wide(&self.seed, key, looked_at)
    }

    /// What [`FlowTable::lookup`] finds, or another flow that matches as well: by searching all masks in
    /// turn. The oracle of the faster search, and what it is measured against.
    ///
    /// # Panics
    /// If `guard` isn't a pin of the table's reclaimer.
    #[must_use]
    pub fn scan<'g>(&'g self, key: &Key, guard: &'g Guard) -> Option<&'g Flow> {
        self.contents(guard).scan(&self.seed, key)
    }

    /// The flow named by this id.
    ///
    /// # Panics
    /// If `guard` isn't a pin of the table's reclaimer.
    #[must_use]
    pub fn find_ufid<'g>(&'g self, ufid: &Ufid, guard: &'g Guard) -> Option<&'g Flow> {
        self.contents(guard).find_ufid(&self.seed, ufid)
    }

    /// The flow named by this exact, unmasked key. Flows with a unique id aren't found by key.
    ///
    /// # Panics
    /// If `guard` isn't a pin of the table's reclaimer.
    #[must_use]
    pub fn find_key<'g>(&'g self, key: &Key, guard: &'g Guard) -> Option<&'g Flow> {
        self.contents(guard).find_key(&self.seed, key)
    }

    /// Make a flow ready to be inserted: all that needs no mutex.
    #[must_use]
    pub fn prepare(&self, new: NewFlow) -> PreparedFlow {
        let id_hash = self.seed.id(&new.id);
        let mask_hash = self.seed.mask(&new.mask);
        let hash = self.seed.masked(&new.mask, &new.key);
        PreparedFlow {
            flow: Flow::new(new, hash),
            id_hash,
            mask_hash,
        }
    }

    /// Go on with what changes have begun, for at most so many steps; when that is finished, put the
    /// masks that every packet searches in the order of their use. True if there is more to do.
    ///
    /// For a thread that has time, now and then, also when nothing changes any more. A step holds the
    /// mutex about as long as a change does; between two, `pause` is called without it.
    ///
    /// # Panics
    /// As [`FlowTable::write`].
    pub fn maintain(&self, handle: &LocalHandle, steps: usize, mut pause: impl FnMut()) -> bool {
        let nothing_to_do = {
            let guard = handle.pin();
            let contents = self.contents(&guard);
            !contents.forest.load().is_taking_over() && contents.wide.load().len() < 2
        };
        if nothing_to_do {
            return false;
        }
        for _ in 0..steps {
            if !self.write(handle).advance() {
                self.order_wide(handle);
                return false;
            }
            pause();
        }
        true
    }

    /// The row is sorted beside the old one, then put in its place unless that has changed meanwhile.
    fn order_wide(&self, handle: &LocalHandle) {
        let changes = self.write(handle).wide_changes();
        let row = {
            let guard = handle.pin();
            let mut wide: Vec<_> = self.contents(&guard).wide.load().share().collect();
            wide.sort_by_cached_key(|subtable| Reverse(subtable.used()));
            let row = Row::new();
            for (place, subtable) in (0..).zip(wide) {
                subtable.age();
                // Nothing was there.
                drop(row.put(place, subtable));
            }
            row
        };
        self.write(handle).put_wide(changes, row);
    }

    /// Begin a batch of changes: waits for the table's mutex.
    ///
    /// # Panics
    /// If `handle` belongs to another reclaimer, or its thread is pinned.
    pub fn write<'t>(&'t self, handle: &LocalHandle) -> Writer<'t> {
        Writer::new(self, handle)
    }
}

impl std::fmt::Debug for FlowTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowTable")
            .field("generation", &self.generation)
            .field("flows", &self.n_flows())
            .field("masks", &self.n_masks())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
