//! The pointer from a datapath to its flow table: flow operations never wait for the configuration lock.
//!
//! | operation | configuration lock | pointer | reference | table mutex |
//! |---|---|---|---|---|
//! | lookup, upcall, GET, part of a dump, counts | no | [`TableCell::load`] under a pin | no | no |
//! | flow NEW, SET, DEL, flush, maintenance | no | [`TableCell::acquire`] | yes | yes |
//! | DP_DEL | yes | [`TableCell::orphan`] | puts the datapath's own | no |
//!
//! A null pointer, or a table whose count has reached zero: there is no datapath any more (ENODEV). A
//! writer that got its reference before the datapath was deleted finishes on the orphaned table.
//!
//! # Thread safety
//! Readers hold an epoch pin, never a reference; writers hold a reference, never a pin (a pin that
//! lived across the table's mutex would stop all reclamation). Whoever puts the last reference retires
//! the table through the epoch, since readers may still be walking it, to the reclaimer's reaper: no
//! worker is held up by the death of 100,000 flows.
//!
//! # Synchronization
//! The pointer is published with Release and loaded with Acquire. The count is taken by
//! compare-and-swap, never from zero; the last put is a Release decrement followed by an Acquire fence,
//! so that all writers' work is done before the table is retired.

#![allow(unsafe_code)] // Dereferences the epoch-protected pointer.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use crossbeam_epoch::{Atomic, Guard, LocalHandle, Owned, Shared};
use flow::table::FlowTable;

struct Counted {
    references: AtomicUsize,
    table: FlowTable,
}

/// A datapath's place for its table.
pub struct TableCell {
    pointer: Atomic<Counted>,
}

impl TableCell {
    /// With a table, to which the datapath holds the first reference.
    pub fn new(table: FlowTable) -> Self {
        Self {
            pointer: Atomic::new(Counted {
                references: AtomicUsize::new(1),
                table,
            }),
        }
    }

    /// The table, for as long as the pin lasts. None: the datapath has been deleted.
    pub fn load<'g>(&self, guard: &'g Guard) -> Option<&'g FlowTable> {
        let shared = self.pointer.load(Ordering::Acquire, guard);
        // SAFETY: a `Counted` is only freed through the epoch after the pointer was set to null, and the
        // guard was pinned before the load.
        unsafe { shared.as_ref() }.map(|counted| &counted.table)
    }

    /// A reference to the table, for a writer. None: the datapath has been deleted, or is being.
    /// The pin that it takes ends before it returns.
    pub fn acquire(&self, handle: &LocalHandle) -> Option<TableRef> {
        let guard = handle.pin();
        let shared = self.pointer.load(Ordering::Acquire, &guard);
        // SAFETY: as in `load`.
        let counted = unsafe { shared.as_ref() }?;
        counted
            .references
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |count| match count {
                0 => None,
                count => count.checked_add(1),
            })
            .ok()?;
        Some(TableRef {
            counted: NonNull::from(counted),
        })
    }

    /// Takes the table away from the datapath and puts the datapath's reference.
    pub fn orphan(&self, handle: &LocalHandle) {
        let guard = handle.pin();
        let shared = self.pointer.swap(Shared::null(), Ordering::AcqRel, &guard);
        // SAFETY: as in `load`.
        if let Some(counted) = unsafe { shared.as_ref() } {
            // The reference that the pointer stood for.
            drop(TableRef {
                counted: NonNull::from(counted),
            });
        }
    }
}

impl Drop for TableCell {
    fn drop(&mut self) {
        // SAFETY: nobody else has the cell any more, so a plain load is enough.
        let shared = unsafe {
            self.pointer
                .load(Ordering::Acquire, crossbeam_epoch::unprotected())
        };
        // SAFETY: as in `load`: not null, so not retired.
        if let Some(counted) = unsafe { shared.as_ref() } {
            drop(TableRef {
                counted: NonNull::from(counted),
            });
        }
    }
}

/// A counted reference to a table.
pub struct TableRef {
    counted: NonNull<Counted>,
}

// SAFETY: it is a counted reference to a `Counted`, which is Sync as `FlowTable` is.
unsafe impl Send for TableRef {}
// SAFETY: it gives out shared references only.
unsafe impl Sync for TableRef {}

impl Deref for TableRef {
    type Target = FlowTable;

    fn deref(&self) -> &FlowTable {
        // SAFETY: the reference that we hold keeps the `Counted` from being retired.
        &unsafe { self.counted.as_ref() }.table
    }
}

impl Drop for TableRef {
    fn drop(&mut self) {
        // SAFETY: our reference is put only here.
        let counted = unsafe { self.counted.as_ref() };
        if counted.references.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        fence(Ordering::Acquire);
        let reclaimer = Arc::clone(counted.table.reclaimer());
        // SAFETY: the count was zero, so no reference is left nor can one be taken; the pointer is null,
        // as the datapath's own reference is put after it was made so. Readers that still walk the table
        // are waited for by the reclaimer. The memory came from `Atomic::new`.
        let owned = unsafe { Owned::from_raw(self.counted.as_ptr()) };
        // Once in a datapath's life: a handle of its own costs nothing that matters.
        let handle = reclaimer.register();
        reclaimer.retire(&handle.pin(), Box::new(owned));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flow::table::{Reclaimer, TableConfig};

    fn cell() -> (TableCell, LocalHandle) {
        let reclaimer = Arc::new(Reclaimer::new());
        let handle = reclaimer.register();
        let table = FlowTable::new(TableConfig::new(1, 1), &reclaimer).unwrap();
        (TableCell::new(table), handle)
    }

    #[test]
    fn a_deleted_datapath_has_no_table_for_anyone() {
        let (cell, handle) = cell();
        cell.orphan(&handle);
        assert!(cell.acquire(&handle).is_none());
        assert!(cell.load(&handle.pin()).is_none());
    }

    #[test]
    fn a_writer_that_came_first_finishes_on_the_orphaned_table() {
        let (cell, handle) = cell();
        let writer = cell.acquire(&handle).unwrap();
        cell.orphan(&handle);
        assert_eq!(writer.n_flows(), 0);
        assert!(cell.acquire(&handle).is_none());
    }

    #[test]
    fn a_reader_keeps_its_table_while_it_is_pinned() {
        let (cell, handle) = cell();
        let guard = handle.pin();
        let table = cell.load(&guard).unwrap();
        cell.orphan(&handle);
        assert_eq!(table.n_flows(), 0);
    }
}
