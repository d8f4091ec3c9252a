//! How many connections a zone may have (`ovs_ct_limit`), and how many it has.
//!
//! Counts are exact: a place is taken before a connection goes into the table and given back when it
//! leaves. A limit of zero is none.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock};

/// Limits and counts by zone.
#[derive(Debug)]
pub struct Limits {
    counts: Box<[AtomicU32]>,
    /// For zones without one of their own.
    default: AtomicU32,
    own: RwLock<BTreeMap<u16, u32>>,
    /// How many `own` has: the packet path needn't look when there are none.
    owners: AtomicU32,
}

const ZONES: usize = 1 << 16;

impl Default for Limits {
    fn default() -> Self {
        Self {
            counts: std::iter::repeat_with(AtomicU32::default)
                .take(ZONES)
                .collect(),
            default: AtomicU32::new(0),
            own: RwLock::default(),
            owners: AtomicU32::new(0),
        }
    }
}

impl Limits {
    /// Takes a place in a zone. False: it is full.
    pub fn take(&self, zone: u16) -> bool {
        let Some(count) = self.counts.get(usize::from(zone)) else {
            return false;
        };
        let limit = self.get(zone);
        count
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |count| {
                (limit == 0 || count < limit).then_some(count + 1)
            })
            .is_ok()
    }

    /// Gives a place back.
    pub fn give(&self, zone: u16) {
        if let Some(count) = self.counts.get(usize::from(zone)) {
            count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Whether the zone is full.
    pub fn is_full(&self, zone: u16) -> bool {
        let limit = self.get(zone);
        limit != 0 && self.count(zone) >= limit
    }

    /// How many connections a zone has.
    pub fn count(&self, zone: u16) -> u32 {
        let count = self.counts.get(usize::from(zone));
        count.map_or(0, |count| count.load(Ordering::Acquire))
    }

    /// The limit in force for a zone; 0: none.
    pub fn get(&self, zone: u16) -> u32 {
        if self.owners.load(Ordering::Acquire) != 0 {
            let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(limit) = own.get(&zone) {
                return *limit;
            }
        }
        self.fallback()
    }

    /// The limit of zones without one of their own; 0: none.
    pub fn fallback(&self) -> u32 {
        self.default.load(Ordering::Acquire)
    }

    /// Sets the limit of zones without one of their own.
    pub fn set_fallback(&self, limit: u32) {
        self.default.store(limit, Ordering::Release);
    }

    /// Gives a zone a limit of its own; 0: it has none, whatever the default.
    pub fn set(&self, zone: u16, limit: u32) {
        let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
        own.insert(zone, limit);
        self.owners.store(own.len() as u32, Ordering::Release);
    }

    /// The default is the zone's again.
    pub fn unset(&self, zone: u16) {
        let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
        own.remove(&zone);
        self.owners.store(own.len() as u32, Ordering::Release);
    }

    /// Zones with a limit of their own, in order.
    pub fn own(&self) -> Vec<(u16, u32)> {
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        own.iter().map(|(zone, limit)| (*zone, *limit)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_zone_takes_no_more_until_one_leaves() {
        let limits = Limits::default();
        limits.set(9, 2);
        assert!(limits.take(9) && limits.take(9));
        assert!(limits.is_full(9) && !limits.take(9));
        limits.give(9);
        assert!(limits.take(9));
        assert_eq!(limits.count(9), 2);
        assert!(limits.take(8), "other zones aren't concerned");
    }

    #[test]
    fn the_default_is_for_zones_without_their_own() {
        let limits = Limits::default();
        limits.set_fallback(1);
        limits.set(5, 0);
        assert!(limits.take(4) && !limits.take(4));
        assert!(limits.take(5) && limits.take(5), "0 is no limit");
        limits.unset(5);
        assert!(!limits.take(5));
        assert_eq!(limits.own(), []);
    }
}
