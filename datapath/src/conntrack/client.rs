//! What ctnetlink asks for: dumps, deletions, counts, timeout policies.
//!
//! # Contract
//! A dump goes shard by shard: what is put in or taken out meanwhile may be in it or not, everything else
//! is in it once.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};

use super::connection::Connection;
use super::timeout::{Policy, Timeouts};
use super::tuple::Tuple;
use super::{Counters, Tracker};

/// Counts, as `conntrack -S` has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Statistics {
    pub connections: u64,
    pub expectations: u64,
    pub inserted: u64,
    pub insert_failed: u64,
    pub invalid: u64,
    pub early_drop: u64,
    pub full: u64,
    pub expired: u64,
    pub deleted: u64,
    pub clash_resolved: u64,
    pub limited: u64,
    pub fragments_waiting: u64,
    pub reassembled: u64,
    pub fragments_timed_out: u64,
    pub fragments_overlapped: u64,
    pub fragments_duplicate: u64,
    pub fragments_malformed: u64,
    pub fragments_no_memory: u64,
}

impl Tracker {
    /// The connection that has this tuple, in either direction.
    pub fn find(&self, tuple: &Tuple, now: u64) -> Option<Arc<Connection>> {
        self.table.find(tuple, now).map(|(found, _)| found)
    }

    /// Everything, shard by shard; ends when `each` says so by false.
    pub fn for_each(&self, now: u64, mut each: impl FnMut(&Arc<Connection>) -> bool) {
        for shard in 0..self.table.shards() {
            for connection in self.table.snapshot(shard, now) {
                if !each(&connection) {
                    return;
                }
            }
        }
    }

    /// Deletes the connections that `of` says of, with what their helpers expect; tells how many. With
    /// a zone only that zone's are looked at, and what it has none of isn't looked for.
    pub fn remove_all(&self, zone: Option<u16>, of: impl Fn(&Connection) -> bool) -> usize {
        let mut removed = 0;
        for shard in 0..self.table.shards() {
            if zone.is_some_and(|zone| self.limits.count(zone) == 0) {
                break;
            }
            // As of the beginning of time: those that have expired and not gone yet go, too.
            let those = self.table.select(shard, 0, |original| {
                zone.is_none_or(|zone| original.zone == zone)
            });
            for connection in those {
                if of(&connection) && self.remove(&connection) {
                    removed += 1;
                }
            }
        }
        removed
    }

    /// Puts a policy in the place of the one that has the name now, if any. Connections that began with
    /// that one keep it.
    pub fn set_policy(&self, name: &str, policy: Policy) {
        let mut policies = self
            .policies
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        policies.insert(name.into(), Arc::new(policy));
    }

    /// How long connections without a policy live.
    pub fn default_timeouts(&self) -> Arc<Timeouts> {
        self.timeouts.load_full()
    }

    /// Others from the connections' next packets on.
    pub fn set_default_timeouts(&self, timeouts: Timeouts) {
        self.timeouts.store(Arc::new(timeouts));
    }

    /// False: there is none of that name.
    pub fn remove_policy(&self, name: &str) -> bool {
        let mut policies = self
            .policies
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        policies.remove(name).is_some()
    }

    /// All timeout policies by name.
    pub fn policies(&self) -> HashMap<Box<str>, Arc<Policy>> {
        let policies = self.policies.read().unwrap_or_else(PoisonError::into_inner);
        policies.clone()
    }

    /// The policy of that name.
    pub fn policy(&self, name: &str) -> Option<Arc<Policy>> {
        let policies = self.policies.read().unwrap_or_else(PoisonError::into_inner);
        policies.get(name).map(Arc::clone)
    }

    /// How many sources have a mapping of their own.
    pub fn mapped_sources(&self) -> usize {
        self.sources.len()
    }

    /// How many connections there can be.
    pub fn max_connections(&self) -> usize {
        self.table.most()
    }

    /// What has been counted.
    pub fn statistics(&self) -> Statistics {
        let Counters {
            inserted,
            insert_failed,
            invalid,
            early_drop,
            full,
            expired,
            deleted,
            clash_resolved,
            limited,
        } = &self.counters;
        let fragments = &self.fragments.counters;
        Statistics {
            connections: self.table.len() as u64,
            expectations: self.expectations.len() as u64,
            inserted: inserted.load(Ordering::Relaxed),
            insert_failed: insert_failed.load(Ordering::Relaxed),
            invalid: invalid.load(Ordering::Relaxed),
            early_drop: early_drop.load(Ordering::Relaxed),
            full: full.load(Ordering::Relaxed),
            expired: expired.load(Ordering::Relaxed),
            deleted: deleted.load(Ordering::Relaxed),
            clash_resolved: clash_resolved.load(Ordering::Relaxed),
            limited: limited.load(Ordering::Relaxed),
            fragments_waiting: self.fragments.waiting().0 as u64,
            reassembled: fragments.reassembled.load(Ordering::Relaxed),
            fragments_timed_out: fragments.timed_out.load(Ordering::Relaxed),
            fragments_overlapped: fragments.overlapped.load(Ordering::Relaxed),
            fragments_duplicate: fragments.duplicates.load(Ordering::Relaxed),
            fragments_malformed: fragments.malformed.load(Ordering::Relaxed),
            fragments_no_memory: fragments.no_memory.load(Ordering::Relaxed),
        }
    }
}
