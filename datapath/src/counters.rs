//! What a port (or a datapath, for packets that came through none) has counted.
//!
//! # Thread safety
//! Each executor has a cell of its own and is its only writer, so that counting is a plain load and
//! store and no cache line is shared on the packet path. Readers add the cells up: at rest the sum is
//! exact.
//!
//! # Invariant
//! Over all the cells of a datapath, at rest:
//! `received + executed + copied = transmitted + to_user + held + dropped (by reason)`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crossbeam_utils::CachePadded;

use crate::drop_reason::DropReason;

/// Counts one writer's events.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// By the cell's owner only.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// By anybody.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// One executor's counts.
#[derive(Debug, Default)]
pub struct Cell {
    /// Frames that came out of the port, and their bytes.
    pub received: Count,
    /// See [`Cell::received`].
    pub received_bytes: Count,
    /// Packets given by user space, on behalf of this port.
    pub executed: Count,
    /// Packets that became one more: a clone, an output that isn't the last action, a segment.
    pub copied: Count,
    /// Frames that the port took, and their bytes.
    pub transmitted: Count,
    /// See [`Cell::transmitted`].
    pub transmitted_bytes: Count,
    /// Packets that ended in user space.
    pub to_user: Count,
    /// Fragments that became part of another packet, or wait to.
    pub held: Count,
    /// Upcalls that reached a reader: also those of which the packet went on.
    pub upcalls: Count,
    /// Upcalls that didn't.
    pub upcalls_lost: Count,
    /// Lookups that found a flow.
    pub hit: Count,
    /// Lookups that found none.
    pub missed: Count,
    /// Masks that lookups looked at.
    pub mask_hit: Count,
    /// Lookups that found their flow through the mask cache.
    pub cache_hit: Count,
    dropped: [Count; DropReason::COUNT],
}

impl Cell {
    /// One packet dropped.
    #[inline]
    pub fn drop(&self, reason: DropReason, n: u64) {
        if let Some(count) = self.dropped.get(reason as usize) {
            count.add(n);
        }
    }
}

/// One port's cells.
#[derive(Debug)]
pub struct Counters {
    cells: Box<[CachePadded<Cell>]>,
    /// For an executor number beyond the cells: a bug, but one that must not lose a count silently.
    spare: CachePadded<Cell>,
}

/// The sum over the cells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of `Cell`
pub struct Totals {
    pub received: u64,
    pub received_bytes: u64,
    pub executed: u64,
    pub copied: u64,
    pub transmitted: u64,
    pub transmitted_bytes: u64,
    pub to_user: u64,
    pub held: u64,
    pub upcalls: u64,
    pub upcalls_lost: u64,
    pub hit: u64,
    pub missed: u64,
    pub mask_hit: u64,
    pub cache_hit: u64,
    pub dropped: [u64; DropReason::COUNT],
}

impl Counters {
    /// Cells for that many executors.
    pub fn new(executors: usize) -> Self {
        Self {
            cells: (0..executors).map(|_| CachePadded::default()).collect(),
            spare: CachePadded::default(),
        }
    }

    /// The cell of that executor, which alone may write it.
    #[inline]
    pub fn cell(&self, executor: usize) -> &Cell {
        self.cells.get(executor).unwrap_or(&self.spare)
    }

    /// What all the executors have counted.
    pub fn totals(&self) -> Totals {
        let mut sum = Totals::default();
        for cell in self.cells.iter().chain([&self.spare]) {
            sum.received += cell.received.get();
            sum.received_bytes += cell.received_bytes.get();
            sum.executed += cell.executed.get();
            sum.copied += cell.copied.get();
            sum.transmitted += cell.transmitted.get();
            sum.transmitted_bytes += cell.transmitted_bytes.get();
            sum.to_user += cell.to_user.get();
            sum.held += cell.held.get();
            sum.upcalls += cell.upcalls.get();
            sum.upcalls_lost += cell.upcalls_lost.get();
            sum.hit += cell.hit.get();
            sum.missed += cell.missed.get();
            sum.mask_hit += cell.mask_hit.get();
            sum.cache_hit += cell.cache_hit.get();
            for (total, count) in sum.dropped.iter_mut().zip(&cell.dropped) {
                *total += count.get();
            }
        }
        sum
    }
}

impl Totals {
    /// Adds another port's sums.
    pub fn add(&mut self, other: &Self) {
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.executed += other.executed;
        self.copied += other.copied;
        self.transmitted += other.transmitted;
        self.transmitted_bytes += other.transmitted_bytes;
        self.to_user += other.to_user;
        self.held += other.held;
        self.upcalls += other.upcalls;
        self.upcalls_lost += other.upcalls_lost;
        self.hit += other.hit;
        self.missed += other.missed;
        self.mask_hit += other.mask_hit;
        self.cache_hit += other.cache_hit;
        for (total, count) in self.dropped.iter_mut().zip(&other.dropped) {
            *total += count;
        }
    }

    /// Dropped for one reason.
    pub fn dropped_by(&self, reason: DropReason) -> u64 {
        self.dropped
            .get(reason as usize)
            .copied()
            .unwrap_or_default()
    }

    /// Dropped for any reason.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_add_up() {
        let counters = Counters::new(2);
        counters.cell(0).received.add(2);
        counters.cell(1).received.add(3);
        counters.cell(9).drop(DropReason::Meter, 4);
        let totals = counters.totals();
        assert_eq!(totals.received, 5);
        assert_eq!(totals.dropped_by(DropReason::Meter), 4);
        assert_eq!(totals.dropped_total(), 4);
    }
}
