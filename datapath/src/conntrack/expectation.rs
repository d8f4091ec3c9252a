//! Connections that a helper has seen being agreed upon, before their first packet.
//!
//! # Work
//! Whoever sends requests to a helper makes expectations, so none of what a packet causes grows with how many
//! there are: they are found by target, and those of a connection by their master. Only [`Expectations::expire`]
//! looks at all.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::connection::{Connection, status};
use super::tuple::{Direction, Tuple};

/// Expectations of one connection at a time; a new one takes the oldest's place.
const PER_CONNECTION: usize = 8;
/// Expectations in all.
const MOST: usize = 16_384;

/// A connection to come.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// Where it comes from and goes to. The port that it comes from doesn't count.
    pub tuple: Tuple,
    /// Whose helper expects it.
    pub master: Arc<Connection>,
    /// The direction of the master's packet that told of it.
    pub direction: Direction,
    /// The port that it was said to go to, if address translation chose another one.
    pub told_port: u16,
    /// When it is forgotten, in nanoseconds.
    pub deadline: u64,
}

impl Expectation {
    fn lives(&self, now: u64) -> bool {
        self.deadline > now && !self.master.is(status::DYING)
    }
}

/// What an expectation is found by: a tuple without the port that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Target(Tuple);

impl Target {
    fn of(tuple: &Tuple) -> Self {
        Self(Tuple {
            src_port: 0,
            ..*tuple
        })
    }
}

/// What a master is known by while one of its expectations is there, and so itself.
fn address(master: &Arc<Connection>) -> usize {
    Arc::as_ptr(master) as usize
}

#[derive(Debug, Default)]
struct All {
    targets: HashMap<Target, Expectation>,
    /// By the master's address: the oldest in front, [`PER_CONNECTION`] at most.
    masters: HashMap<usize, VecDeque<Target>>,
}

impl All {
    fn put(&mut self, target: Target, one: Expectation) {
        self.take(&target);
        let master = address(&one.master);
        let own = self.masters.entry(master).or_default();
        own.push_back(target);
        let surplus = match own.len() > PER_CONNECTION {
            true => own.front().copied(),
            false => None,
        };
        self.targets.insert(target, one);
        if let Some(oldest) = surplus {
            self.take(&oldest);
        }
    }

    fn take(&mut self, target: &Target) -> Option<Expectation> {
        let taken = self.targets.remove(target)?;
        if let Entry::Occupied(mut own) = self.masters.entry(address(&taken.master)) {
            own.get_mut().retain(|other| other != target);
            if own.get().is_empty() {
                own.remove();
            }
        }
        Some(taken)
    }
}

/// All expectations. Few, so one lock; while there are none nobody takes it.
#[derive(Debug, Default)]
pub struct Expectations {
    count: AtomicUsize,
    all: Mutex<All>,
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
        let target = Target::of(&expectation.tuple);
        self.change(|all| {
            let there = all.targets.get(&target);
            let clash = there.is_some_and(|other| {
                !Arc::ptr_eq(&other.master, &expectation.master) && other.lives(now)
            });
            if clash || there.is_none() && all.targets.len() >= MOST {
                return false;
            }
            all.put(target, expectation);
            true
        })
    }

    /// The expectation that a connection of this tuple fulfils, which stays.
    pub fn find(&self, tuple: &Tuple, now: u64) -> Option<Expectation> {
        if self.is_empty() {
            return None;
        }
        let all = self.lock();
        let found = all.targets.get(&Target::of(tuple))?;
        found.lives(now).then(|| found.clone())
    }

    /// The same, and takes it out.
    pub fn take(&self, tuple: &Tuple, now: u64) -> Option<Expectation> {
        if self.is_empty() {
            return None;
        }
        let taken = self.change(|all| all.take(&Target::of(tuple)));
        taken.filter(|one| one.lives(now))
    }

    /// Forgets those of a connection that is no more.
    pub fn forget(&self, master: &Arc<Connection>) {
        // Without a helper it has none.
        if self.is_empty() || !master.is(status::HELPER) {
            return;
        }
        self.change(|all| {
            let own = all.masters.get(&address(master)).cloned();
            for target in own.unwrap_or_default() {
                all.take(&target);
            }
        });
    }

    /// Forgets those that nobody came for, and those of connections that are no more.
    pub fn expire(&self, now: u64) {
        if self.is_empty() {
            return;
        }
        self.change(|all| {
            let dead = all.targets.iter().filter(|(_, one)| !one.lives(now));
            let dead: Vec<Target> = dead.map(|(target, _)| *target).collect();
            for target in dead {
                all.take(&target);
            }
        });
    }

    /// All, as of now.
    pub fn snapshot(&self) -> Vec<Expectation> {
        self.lock().targets.values().cloned().collect()
    }

    /// Forgets all.
    pub fn clear(&self) {
        self.change(|all| *all = All::default());
    }

    fn change<R>(&self, change: impl FnOnce(&mut All) -> R) -> R {
        let mut all = self.lock();
        let result = change(&mut all);
        self.count.store(all.targets.len(), Ordering::Release);
        result
    }

    fn lock(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
