//! A dump of connections: shard by shard, those of one shard held at a time.

use std::sync::Arc;

use netlink::handler::{DumpPart, Fit};
use netlink::{Dump, Errno};

use super::filter::Filter;
use super::{Asked, entry, message};
use crate::conntrack::Tracker;
use crate::conntrack::connection::Connection;

/// Shards looked at in one go: where little is wanted others' turns come in between.
const SHARDS: usize = 16;

/// The cursor.
pub struct Connections {
    tracker: Arc<Tracker>,
    clock: fn() -> u64,
    filter: Filter,
    /// Counts begin anew when they have been told.
    zero: bool,
    /// The next one to look at.
    shard: usize,
    /// What is left of the one before.
    rest: std::vec::IntoIter<Arc<Connection>>,
    /// One that found no room.
    kept: Option<Arc<Connection>>,
}

impl Connections {
    /// # Errors
    /// Those of [`Filter::parse`].
    pub fn new(
        tracker: Arc<Tracker>,
        clock: fn() -> u64,
        asked: &Asked<'_>,
    ) -> Result<Self, Errno> {
        Ok(Self {
            tracker,
            clock,
            filter: Filter::parse(asked.af, asked)?,
            zero: asked.message == message::GET_CTRZERO,
            shard: 0,
            rest: Vec::new().into_iter(),
            kept: None,
        })
    }

    /// The next one that is wanted. None: look into another shard.
    fn next(&mut self) -> Option<Arc<Connection>> {
        let filter = &self.filter;
        self.kept
            .take()
            .or_else(|| self.rest.find(|connection| filter.admits(connection)))
    }
}

impl Dump for Connections {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        let now = (self.clock)();
        let mut looked = 0;
        loop {
            while let Some(connection) = self.next() {
                let mut told = entry::Counts::default();
                let fit = part.record(entry::KIND, &entry::fixed(&connection), |writer| {
                    told = entry::write(writer, &connection, now)?;
                    Ok(())
                })?;
                if fit == Fit::Full {
                    self.kept = Some(connection);
                    return Ok(false);
                }
                if self.zero {
                    entry::forget(&connection, &told);
                }
            }
            let none_left = self
                .filter
                .zone
                .is_some_and(|zone| self.tracker.limits.count(zone) == 0);
            if none_left || self.shard >= self.tracker.table.shards() {
                return Ok(true);
            }
            if looked == SHARDS {
                part.pause();
                return Ok(false);
            }
            let filter = &self.filter;
            let wanted = self
                .tracker
                .table
                .select(self.shard, now, |original| filter.wants(original));
            self.rest = wanted.into_iter();
            self.shard += 1;
            looked += 1;
        }
    }
}
