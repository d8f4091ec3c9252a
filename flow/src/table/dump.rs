//! Walking all flows, part by part, while the table changes.
//!
//! A flow keeps its slot for life, so the cursor is a slot number. Flows born after the dump began
//! aren't shown: so none is shown twice, not even one that was removed and inserted again, and every
//! dump ends. A flow that is there from before the beginning to after the end is shown.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Acquire;

use crossbeam_epoch::Guard;

use super::FlowTable;
use crate::flow::Flow;

/// How far a dump has come. Holds nothing of the table: it may be kept, and forgotten, for any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpCursor {
    generation: u64,
    /// The next slot to look at.
    next: u32,
    /// Flows of a later birth aren't shown.
    newest: u64,
}

/// What became of one part of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DumpPart {
    /// The visitor stopped: go on later, with the flow that it refused.
    More,
    /// All flows were shown.
    Done,
}

/// The cursor belongs to another table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cursor belongs to another table")]
pub struct StaleCursor;

impl FlowTable {
    /// A cursor before the first flow.
    #[must_use]
    pub fn dump_start(&self) -> DumpCursor {
        DumpCursor {
            generation: self.generation,
            next: 0,
            newest: self.births.load(Acquire),
        }
    }

    /// Show flows from the cursor on, until `visit` breaks. The flow at which it breaks counts as not
    /// shown: it comes first in the next part. Pinned only for this part.
    ///
    /// # Errors
    /// If the cursor is another table's.
    ///
    /// # Panics
    /// If `guard` isn't a pin of the table's reclaimer.
    pub fn dump<'g>(
        &'g self,
        cursor: &mut DumpCursor,
        guard: &'g Guard,
        mut visit: impl FnMut(&'g Flow) -> ControlFlow<()>,
    ) -> Result<DumpPart, StaleCursor> {
        if cursor.generation != self.generation {
            return Err(StaleCursor);
        }
        let slots = &self.contents(guard).slots;
        // Slots that come into use from now on hold only flows that are too young.
        let high = slots.high();
        while cursor.next < high {
            if let Some((birth, flow)) = slots.get(cursor.next)
                && birth.get() <= cursor.newest
                && visit(flow).is_break()
            {
                return Ok(DumpPart::More);
            }
            cursor.next += 1;
        }
        Ok(DumpPart::Done)
    }
}
