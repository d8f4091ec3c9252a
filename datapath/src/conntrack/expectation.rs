//! Connections that a helper has seen being agreed upon, before their first packet.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::connection::{Connection, status};
use super::tuple::{Direction, Family, Tuple};

/// Expectations of one connection at a time; a new one takes the oldest's place.
const PER_CONNECTION: usize = 8;
/// Expectations in all.
const MOST: usize = 16_384;

/// A connection to come.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// Where it comes from; None: from anywhere.
    pub src: Option<[u8; 16]>,
    /// What it goes to: address, port, protocol, zone, family. Its source's fields don't count.
    pub tuple: Tuple,
    /// Whose helper expects it.
    pub master: Arc<Connection>,
    /// The direction of the master's packet that told of it.
    pub direction: Direction,
    /// The port that it was said to go to, if address translation chose another one.
    pub told_port: u16,
    /// Its packets need the same helper (TFTP's don't).
    pub deadline: u64,
}

/// What an expectation is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Target {
    dst: [u8; 16],
    dst_port: u16,
    zone: u16,
    proto: u8,
    family: Family,
}

impl Target {
    fn of(tuple: &Tuple) -> Self {
        Self {
            dst: tuple.dst,
            dst_port: tuple.dst_port,
            zone: tuple.zone,
            proto: tuple.proto,
            family: tuple.family,
        }
    }
}

/// All expectations. Few, so one lock; while there are none nobody takes it.
#[derive(Debug, Default)]
pub struct Expectations {
    count: AtomicUsize,
    targets: Mutex<HashMap<Target, Vec<Expectation>>>,
}

impl Expectations {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds one. False: another connection's has the same target, or there is no room.
    pub fn add(&self, expectation: Expectation, now: u64) -> bool {
        let mut targets = self.lock();
        self.clean(&mut targets, now);
        let target = Target::of(&expectation.tuple);
        let clash = targets.get(&target).is_some_and(|same| {
            same.iter().any(|other| {
                !Arc::ptr_eq(&other.master, &expectation.master)
                    && (other.src.is_none()
                        || expectation.src.is_none()
                        || other.src == expectation.src)
            })
        });
        if clash || self.len() >= MOST {
            return false;
        }
        let master = Arc::clone(&expectation.master);
        let same = targets.entry(target).or_default();
        same.retain(|other| !Arc::ptr_eq(&other.master, &master));
        same.push(expectation);
        let mut own: Vec<(u64, Target)> = targets
            .iter()
            .flat_map(|(target, all)| all.iter().map(move |one| (target, one)))
            .filter(|(_, one)| Arc::ptr_eq(&one.master, &master))
            .map(|(target, one)| (one.deadline, *target))
            .collect();
        own.sort_by_key(|(deadline, _)| *deadline);
        let surplus = own.len().saturating_sub(PER_CONNECTION);
        for (_, target) in own.into_iter().take(surplus) {
            if let Some(all) = targets.get_mut(&target) {
                all.retain(|one| !Arc::ptr_eq(&one.master, &master));
            }
        }
        self.recount(&mut targets);
        true
    }

    /// The expectation that a connection of this tuple fulfils, which stays.
    pub fn find(&self, tuple: &Tuple, now: u64) -> Option<Expectation> {
        if self.is_empty() {
            return None;
        }
        let targets = self.lock();
        let all = targets.get(&Target::of(tuple))?;
        all.iter().find(|one| fits(one, tuple, now)).cloned()
    }

    /// The same, and takes it out.
    pub fn take(&self, tuple: &Tuple, now: u64) -> Option<Expectation> {
        if self.is_empty() {
            return None;
        }
        let mut targets = self.lock();
        let all = targets.get_mut(&Target::of(tuple))?;
        let at = all.iter().position(|one| fits(one, tuple, now))?;
        let taken = all.swap_remove(at);
        self.recount(&mut targets);
        Some(taken)
    }

    /// Forgets those that nobody came for, and those of connections that are no more.
    pub fn expire(&self, now: u64) {
        if !self.is_empty() {
            let mut targets = self.lock();
            self.clean(&mut targets, now);
        }
    }

    /// All, as of now.
    pub fn snapshot(&self) -> Vec<Expectation> {
        self.lock().values().flatten().cloned().collect()
    }

    /// Forgets all.
    pub fn clear(&self) {
        let mut targets = self.lock();
        targets.clear();
        self.recount(&mut targets);
    }

    fn clean(&self, targets: &mut HashMap<Target, Vec<Expectation>>, now: u64) {
        for all in targets.values_mut() {
            all.retain(|one| one.deadline > now && !one.master.is(status::DYING));
        }
        self.recount(targets);
    }

    fn recount(&self, targets: &mut HashMap<Target, Vec<Expectation>>) {
        targets.retain(|_, all| !all.is_empty());
        self.count
            .store(targets.values().map(Vec::len).sum(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Target, Vec<Expectation>>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn fits(one: &Expectation, tuple: &Tuple, now: u64) -> bool {
    one.deadline > now
        && !one.master.is(status::DYING)
        && one.src.is_none_or(|src| src == tuple.src)
}
