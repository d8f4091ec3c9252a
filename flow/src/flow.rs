//! One entry of the flow table: what it matches, what it does, what it has seen.
//!
//! # Thread safety
//! Key, mask and id never change. Actions are replaced as a whole and read without a lock or a count;
//! the list read belongs to the same pin as the flow. Statistics: see [`crate::stats`].
//!
//! # Layout
//! With the slot's header (birth, see `table::slots`) a flow fills two cache lines. The first is what
//! packets read; the second is written by the flow's first executor and read by control operations.

use std::sync::Arc;

use crate::action::ActionList;
use crate::key::Key;
use crate::mask::Mask;
use crate::stats::{InlineSlot, Source, StatsHead, Totals};
use crate::table::prefetch::prefetch;
use crate::table::protected::Protected;

/// A unique flow id, chosen by the client: 1 to 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ufid {
    len: u8,
    bytes: [u8; 16],
}

impl Ufid {
    /// The id with these bytes; None unless there are 1 to 16.
    #[must_use]
    pub fn new(id: &[u8]) -> Option<Self> {
        let mut bytes = [0; 16];
        bytes
            .get_mut(..id.len())
            .filter(|to| !to.is_empty())?
            .copy_from_slice(id);
        Some(Self {
            len: id.len() as u8,
            bytes,
        })
    }

    /// Its bytes, as many as were given.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes
            .get(..usize::from(self.len))
            .unwrap_or(&self.bytes)
    }
}

impl std::fmt::Debug for Ufid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ufid:")?;
        self.as_bytes()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// How clients name a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowId {
    /// By an id of their choice.
    Ufid(Ufid),
    /// By its exact key as it was given, before masking.
    Key(Box<Key>),
}

/// What a flow is made from.
#[derive(Debug)]
pub struct NewFlow {
    /// How it is named. For [`FlowId::Key`] the key within is the same as `key`.
    pub id: FlowId,
    /// The key, unmasked.
    pub key: Key,
    /// Which of the key's bits are compared.
    pub mask: Mask,
    /// What it does. May be shared with other flows.
    pub actions: Arc<ActionList>,
}

impl NewFlow {
    /// A flow named by `ufid`, or, without one, by its unmasked key.
    #[must_use]
    pub fn new(ufid: Option<Ufid>, key: &Key, mask: &Key, actions: Arc<ActionList>) -> Self {
        let id = ufid.map_or_else(|| FlowId::Key(Box::new(*key)), FlowId::Ufid);
        Self {
            id,
            key: *key,
            mask: Mask::new(mask),
            actions,
        }
    }
}

/// An installed flow. Lives as long as the pin under which it was found.
#[repr(C)]
pub struct Flow {
    pub(crate) mask: Arc<Mask>,
    pub(crate) key: Box<[u64]>,
    pub(crate) actions: Protected<ActionList>,
    stats: StatsHead,

    slot_stats: InlineSlot,
    pub(crate) id: FlowId,
    /// Hash of the masked key; where the subtable has it.
    pub(crate) hash: u32,
    /// Where the table has it.
    pub(crate) slot: u32,
}

impl Flow {
    pub(crate) fn new(new: NewFlow, hash: u32) -> Self {
        Self {
            key: new.mask.compact(&new.key),
            mask: Arc::new(new.mask),
            actions: Protected::new(new.actions),
            stats: StatsHead::default(),
            slot_stats: InlineSlot::default(),
            id: new.id,
            hash,
            slot: 0,
        }
    }

    /// How clients name it.
    #[must_use]
    pub fn id(&self) -> &FlowId {
        &self.id
    }

    /// Its unique id, if it is named by one.
    #[must_use]
    pub fn ufid(&self) -> Option<&Ufid> {
        match &self.id {
            FlowId::Ufid(ufid) => Some(ufid),
            FlowId::Key(_) => None,
        }
    }

    /// The key as the client gave it, if the flow is named by it.
    #[must_use]
    pub fn unmasked_key(&self) -> Option<&Key> {
        match &self.id {
            FlowId::Ufid(_) => None,
            FlowId::Key(key) => Some(key),
        }
    }

    /// The key, zero where the mask is.
    #[must_use]
    pub fn masked_key(&self) -> Key {
        self.mask.expand(&self.key)
    }

    /// What it compares.
    #[must_use]
    pub fn mask(&self) -> &Mask {
        &self.mask
    }

    /// Does a packet with this key belong to the flow?
    #[inline]
    #[must_use]
    pub fn matches(&self, key: &Key) -> bool {
        self.mask.matches(key, &self.key)
    }

    /// What it does, as of now. Stays valid as long as the flow's own reference.
    #[inline]
    #[must_use]
    pub fn actions(&self) -> &ActionList {
        self.actions.load()
    }

    /// Ask for what [`Flow::matches`] compares.
    #[inline]
    pub(crate) fn prefetch(&self) {
        self.mask.prefetch();
        prefetch(&*self.key);
    }

    /// Ask for what it does.
    #[inline]
    pub(crate) fn prefetch_actions(&self) {
        prefetch(self.actions.load());
    }

    /// Count packets as `source`, which no other thread does at the same time.
    #[inline]
    pub fn record(&self, source: Source, more: &Totals) {
        self.stats.record(&self.slot_stats, source, more);
    }

    /// What it has seen since it was installed or cleared.
    #[must_use]
    pub fn stats(&self) -> Totals {
        self.stats.totals(&self.slot_stats)
    }

    /// Statistics start anew.
    pub fn clear_stats(&self) {
        self.stats.clear();
    }
}

impl std::fmt::Debug for Flow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flow")
            .field("id", &self.id)
            .field("key", &self.masked_key())
            .field("mask", &self.mask)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
