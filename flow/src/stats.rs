//! A flow's statistics: exact, without a write that two executors share.
//!
//! Every source of packets (an executor; later also a reader of a kernel's eBPF map) has a number and
//! writes only its own slot. The first source to use a flow takes the slot inside the flow; any other
//! gets one of its own at its first packet. Reading sums them. [`Stats`] does the same for what isn't a
//! flow, as a meter.
//!
//! # Thread safety
//! A slot has one writer: two threads must not record as the same source at once (counts would be lost,
//! nothing worse). Reading and clearing is for any thread.
//!
//! # Synchronization
//! Clearing can't write into other writers' slots without losing either side's update. So it only
//! raises the flow's generation; a writer that sees the new generation empties its own slot first, and
//! a slot of an older generation doesn't count. The slot's generation is stored with Release after the
//! emptying and loaded with Acquire before its counters are read.

use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use crossbeam_utils::CachePadded;

/// Who counts: a number below `of`, and how many sources there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    index: u16,
    of: u16,
}

impl Source {
    /// Source `index` of `of`. None unless `index < of` and `index < u16::MAX`.
    #[must_use]
    pub const fn new(index: u16, of: u16) -> Option<Self> {
        if index < of {
            Some(Self { index, of })
        } else {
            None
        }
    }

    /// Its number.
    #[must_use]
    pub const fn index(self) -> u16 {
        self.index
    }
}

/// What a flow has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Packets.
    pub packets: u64,
    /// Bytes of those packets.
    pub bytes: u64,
    /// When the newest of them came: milliseconds of the monotonic clock; 0: never.
    pub used_ms: u64,
    /// TCP flags seen, or'ed; host order.
    pub tcp_flags: u16,
}

#[derive(Default)]
struct Slot {
    packets: AtomicU64,
    bytes: AtomicU64,
    used_ms: AtomicU64,
    generation: AtomicU32,
    tcp_flags: AtomicU16,
}

impl Slot {
    /// For the slot's only writer.
    #[inline]
    fn add(&self, generation: u32, more: &Totals) {
        if self.generation.load(Relaxed) != generation {
            self.packets.store(0, Relaxed);
            self.bytes.store(0, Relaxed);
            self.used_ms.store(0, Relaxed);
            self.tcp_flags.store(0, Relaxed);
            self.generation.store(generation, Release);
        }
        self.packets.store(
            self.packets.load(Relaxed).wrapping_add(more.packets),
            Relaxed,
        );
        self.bytes
            .store(self.bytes.load(Relaxed).wrapping_add(more.bytes), Relaxed);
        if self.used_ms.load(Relaxed) < more.used_ms {
            self.used_ms.store(more.used_ms, Relaxed);
        }
        let flags = self.tcp_flags.load(Relaxed);
        if flags | more.tcp_flags != flags {
            self.tcp_flags.store(flags | more.tcp_flags, Relaxed);
        }
    }

    fn sum_into(&self, generation: u32, totals: &mut Totals) {
        if self.generation.load(Acquire) == generation {
            totals.packets = totals.packets.wrapping_add(self.packets.load(Relaxed));
            totals.bytes = totals.bytes.wrapping_add(self.bytes.load(Relaxed));
            totals.used_ms = totals.used_ms.max(self.used_ms.load(Relaxed));
            totals.tcp_flags |= self.tcp_flags.load(Relaxed);
        }
    }
}

type Others = Box<[OnceLock<Box<CachePadded<Slot>>>]>;

/// What every packet reads and nobody writes twice. Lies beside the flow's key.
#[derive(Default)]
pub(crate) struct StatsHead {
    /// Slots of those that came later, by number.
    others: OnceLock<Box<Others>>,
    /// Raised by clearing.
    generation: AtomicU32,
    /// The source that owns the slot inside the flow, plus one; 0: none yet.
    owner: AtomicU16,
}

/// The slot inside the flow: written at every packet, so in another cache line than [`StatsHead`].
#[derive(Default)]
pub(crate) struct InlineSlot(Slot);

impl StatsHead {
    #[inline]
    pub(crate) fn record(&self, inline: &InlineSlot, source: Source, more: &Totals) {
        let me = source.index + 1;
        let owner = self.owner.load(Relaxed);
        let generation = self.generation.load(Relaxed);
        if owner == me {
            inline.0.add(generation, more);
        } else {
            self.record_elsewhere(inline, source, generation, more);
        }
    }

    #[cold]
    fn record_elsewhere(
        &self,
        inline: &InlineSlot,
        source: Source,
        generation: u32,
        more: &Totals,
    ) {
        let me = source.index + 1;
        if self.owner.compare_exchange(0, me, Relaxed, Relaxed).is_ok() {
            return inline.0.add(generation, more);
        }
        let others = self
            .others
            .get_or_init(|| Box::new((0..source.of).map(|_| OnceLock::new()).collect::<Others>()));
        // A source numbered beyond what the flow's first sharers knew of has no slot here; the last one
        // then serves. Sources of one table agree on their number, so this isn't met in practice.
        let at = usize::from(source.index).min(others.len().saturating_sub(1));
        if let Some(slot) = others.get(at) {
            slot.get_or_init(Box::default).add(generation, more);
        }
    }

    pub(crate) fn totals(&self, inline: &InlineSlot) -> Totals {
        let generation = self.generation.load(Acquire);
        let mut totals = Totals::default();
        inline.0.sum_into(generation, &mut totals);
        if let Some(others) = self.others.get() {
            for slot in others.iter().filter_map(OnceLock::get) {
                slot.sum_into(generation, &mut totals);
            }
        }
        totals
    }

    pub(crate) fn clear(&self) {
        self.generation.fetch_add(1, Release);
    }
}

/// Statistics by themselves: counted by source as a flow's, and read as their sum.
#[derive(Default)]
pub struct Stats {
    head: StatsHead,
    inline: InlineSlot,
}

impl Stats {
    /// Adds `more` on behalf of `source`, which only one thread may be.
    #[inline]
    pub fn record(&self, source: Source, more: &Totals) {
        self.head.record(&self.inline, source, more);
    }

    /// The sum over the sources.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.head.totals(&self.inline)
    }
}

impl std::fmt::Debug for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.totals().fmt(f)
    }
}
