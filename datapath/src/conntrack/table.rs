//! The table of connections: shards of tuples, each with its timers and its candidates for eviction.
//!
//! # Thread safety
//! A shard is locked for one look or one change, never across packets. A connection's two tuples may be
//! in two shards: to put it in both are locked, the lower number first; to take it out one after the
//! other. A connection's own lock is never taken under a shard's.
//!
//! # Memory
//! There are so many connections at most, over all shards. When the table is full a new one takes the
//! place of one that hasn't proved itself (isn't assured), the oldest ones of its shard first, or of a few
//! others; if all of those are assured the new one is refused: a flood of first packets can't push out
//! what is established.
//!
//! Timers and candidates name places, not connections: a place that a connection has left is taken by the
//! next one, timer and all, so that there never are more of them than connections at one time.
//!
//! # Expiry
//! A connection that has expired isn't found from that moment on. It is taken out when its timer's turn
//! comes: every connection is looked at once in [`HORIZON`], also if its lifetime has become shorter. A
//! look that comes too early does no harm.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_utils::CachePadded;
use hashbrown::HashTable;

use super::connection::{Connection, status};
use super::tuple::{Direction, HashKey, Tuple};
use super::wheel::Wheel;

/// A connection gets a look at least so often: nanoseconds.
pub const HORIZON: u64 = 30_000_000_000;

/// Candidates for eviction looked at on each call of [`Table::expire`].
const TIDY: usize = 16;

/// Power of two.
const SHARDS: usize = 256;

/// Shards in which somebody to make room is looked for.
const EVICTING: usize = 8;

/// How often room is made for one connection: others may take it.
const TURNS: usize = 16;

/// Why a connection can't go into the table.
#[derive(Debug)]
pub enum Refused {
    /// Another connection has one of its tuples.
    Clash(Arc<Connection>),
    /// There is no room.
    Full,
}

struct Entry {
    tuple: Tuple,
    connection: Arc<Connection>,
    direction: Direction,
}

struct Shard {
    entries: HashTable<Entry>,
    /// Connections whose original tuple is here.
    connections: usize,
    places: Vec<Place>,
    /// Places without a connection.
    free: Vec<u32>,
    /// Places, by the time of their next look.
    wheel: Wheel<u32>,
    /// Places whose connections weren't assured when they were last looked at, roughly by age.
    young: VecDeque<u32>,
}

#[derive(Default)]
struct Place {
    connection: Option<Arc<Connection>>,
    /// It is in the wheel.
    timed: bool,
    /// It is among the young.
    queued: bool,
}

/// The table.
pub struct Table {
    key: HashKey,
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    /// Connections at most.
    most: usize,
    /// Connections there are, and those for which a place is taken already.
    count: CachePadded<AtomicUsize>,
}

/// What a removal is about, for whoever keeps count.
pub type Removed = Arc<Connection>;

impl Table {
    /// For up to `most` connections. `key` is secret.
    pub fn new(key: HashKey, most: usize, now: u64) -> Self {
        let shard = || {
            CachePadded::new(Mutex::new(Shard {
                entries: HashTable::new(),
                connections: 0,
                places: Vec::new(),
                free: Vec::new(),
                wheel: Wheel::new(now),
                young: VecDeque::new(),
            }))
        };
        Self {
            key,
            shards: std::iter::repeat_with(shard).take(SHARDS).collect(),
            most,
            count: CachePadded::default(),
        }
    }

    /// How many connections there can be.
    pub fn most(&self) -> usize {
        self.most
    }

    /// How many shards there are.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// How many connections there are.
    pub fn len(&self) -> usize {
        (0..SHARDS).map(|shard| self.lock(shard).connections).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The connection that has this tuple, and in which direction.
    pub fn find(&self, tuple: &Tuple, now: u64) -> Option<(Arc<Connection>, Direction)> {
        let hash = tuple.hash(self.key);
        let shard = self.lock(shard_of(hash));
        let entry = shard.entries.find(hash, |entry| entry.tuple == *tuple)?;
        (!entry.connection.expired(now) && !entry.connection.is(status::DYING))
            .then(|| (Arc::clone(&entry.connection), entry.direction))
    }

    /// Whether a connection other than `except` has this tuple.
    pub fn taken(&self, tuple: &Tuple, except: &Connection, now: u64) -> bool {
        self.find(tuple, now)
            .is_some_and(|(found, _)| !std::ptr::eq(&*found, except))
    }

    /// Puts a connection in, under its original and its reply tuple. Its deadline is set already. What
    /// had to go for it is given to `removed`.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn insert(
        &self,
        connection: &Arc<Connection>,
        reply: &Tuple,
        now: u64,
        mut removed: impl FnMut(Removed, bool),
    ) -> Result<(), Refused> {
        let original = &connection.original;
        let (hash, reply_hash) = (original.hash(self.key), reply.hash(self.key));
        let (home, other) = (shard_of(hash), shard_of(reply_hash));
        self.take_place(home, now, &mut removed)?;
        let crowded = self.count.load(Ordering::Relaxed) >= self.most - self.most / 8;
        // Each turn takes one out that has expired.
        for _ in 0..TURNS {
            let rival = {
                let (mut first, mut second) = self.lock_both(home, other);
                let (home_shard, reply_shard): (&mut Shard, Option<&mut Shard>) =
                    match (&mut second, home <= other) {
                        (None, _) => (&mut first, None),
                        (Some(second), true) => (&mut first, Some(second)),
                        (Some(second), false) => (second, Some(&mut first)),
                    };
                let reply_entries = match &reply_shard {
                    Some(shard) => &shard.entries,
                    None => &home_shard.entries,
                };
                let rival = home_shard
                    .entries
                    .find(hash, |entry| entry.tuple == *original)
                    .or_else(|| reply_entries.find(reply_hash, |entry| entry.tuple == *reply))
                    .map(|entry| Arc::clone(&entry.connection));
                let Some(rival) = rival else {
                    let key = self.key;
                    let rehash = |entry: &Entry| entry.tuple.hash(key);
                    home_shard.connections += 1;
                    home_shard.entries.insert_unique(
                        hash,
                        Entry {
                            tuple: *original,
                            connection: Arc::clone(connection),
                            direction: Direction::Original,
                        },
                        rehash,
                    );
                    home_shard.settle(connection, now, crowded);
                    if reply != original {
                        let entries = match reply_shard {
                            Some(shard) => &mut shard.entries,
                            None => &mut home_shard.entries,
                        };
                        let entry = Entry {
                            tuple: *reply,
                            connection: Arc::clone(connection),
                            direction: Direction::Reply,
                        };
                        entries.insert_unique(reply_hash, entry, rehash);
                    }
                    connection.set(status::CONFIRMED);
                    return Ok(());
                };
                rival
            };
            if !rival.expired(now) {
                self.give_place();
                return Err(Refused::Clash(rival));
            }
            if self.remove(&rival) {
                removed(rival, false);
            }
        }
        self.give_place();
        Err(Refused::Full)
    }

    /// Takes a place for a connection whose home is that shard; somebody may have to go for it.
    fn take_place(
        &self,
        home: usize,
        now: u64,
        removed: &mut impl FnMut(Removed, bool),
    ) -> Result<(), Refused> {
        let place = |count: usize| (count < self.most).then_some(count + 1);
        for _ in 0..TURNS {
            let taken = self
                .count
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, place);
            if taken.is_ok() {
                return Ok(());
            }
            let victim = (home..home + EVICTING).find_map(|shard| self.lock(shard).victim());
            let Some(victim) = victim else {
                break;
            };
            let early = !victim.expired(now);
            if self.remove(&victim) {
                removed(victim, early);
            }
        }
        Err(Refused::Full)
    }

    fn give_place(&self) {
        self.count.fetch_sub(1, Ordering::AcqRel);
    }

    /// Takes a connection out. False: it was out, or on its way out, already.
    pub fn remove(&self, connection: &Arc<Connection>) -> bool {
        if !connection.is(status::CONFIRMED) || connection.set(status::DYING) != 0 {
            return false;
        }
        let reply = connection.lock().reply;
        let is_it = |entry: &Entry| Arc::ptr_eq(&entry.connection, connection);
        let hash = connection.original.hash(self.key);
        {
            let mut shard = self.lock(shard_of(hash));
            if let Ok(entry) = shard.entries.find_entry(hash, is_it) {
                entry.remove();
                shard.connections -= 1;
                self.give_place();
            }
            shard.vacate(connection);
        }
        if reply != connection.original {
            let hash = reply.hash(self.key);
            let mut shard = self.lock(shard_of(hash));
            if let Ok(entry) = shard.entries.find_entry(hash, is_it) {
                entry.remove();
            }
        }
        true
    }

    /// Looks at up to `budget` connections of a shard whose turn it is, and takes out those that have
    /// expired. True: all whose turn it is were looked at.
    pub fn expire(
        &self,
        shard: usize,
        now: u64,
        budget: usize,
        mut removed: impl FnMut(Removed),
    ) -> bool {
        let mut expired = Vec::new();
        let done = {
            let mut shard = self.lock(shard);
            shard.tidy(TIDY);
            let Shard { wheel, places, .. } = &mut *shard;
            wheel.step(now, budget, |place| {
                let place = places.get_mut(*place as usize)?;
                match &place.connection {
                    Some(connection) if connection.expired(now) => {
                        expired.push(Arc::clone(connection));
                        // Until it is out, which is now: a look in any case.
                        Some(now + HORIZON)
                    }
                    Some(connection) => Some(connection.deadline().min(now + HORIZON)),
                    None => {
                        place.timed = false;
                        None
                    }
                }
            })
        };
        for connection in expired {
            if self.remove(&connection) {
                removed(connection);
            }
        }
        done
    }

    /// The connections of one shard at this moment.
    pub fn snapshot(&self, shard: usize, now: u64) -> Vec<Arc<Connection>> {
        self.select(shard, now, |_| true)
    }

    /// Those of them whose original tuple `of` wants. It runs under the shard's lock.
    pub fn select(
        &self,
        shard: usize,
        now: u64,
        of: impl Fn(&Tuple) -> bool,
    ) -> Vec<Arc<Connection>> {
        let shard = self.lock(shard);
        let originals = shard
            .entries
            .iter()
            .filter(|entry| entry.direction == Direction::Original && of(&entry.tuple));
        originals
            .filter(|entry| !entry.connection.expired(now))
            .map(|entry| Arc::clone(&entry.connection))
            .collect()
    }

    /// What there is memory for, over all shards: connections, places, timers, candidates.
    pub fn held(&self) -> [usize; 4] {
        let mut sum = [0; 4];
        for shard in 0..SHARDS {
            let shard = self.lock(shard);
            let of = [
                shard.connections,
                shard.places.len(),
                shard.wheel.len(),
                shard.young.len(),
            ];
            sum.iter_mut().zip(of).for_each(|(sum, of)| *sum += of);
        }
        sum
    }

    fn lock(&self, shard: usize) -> MutexGuard<'_, Shard> {
        // The number is that of a hash, or below SHARDS.
        let shard = &self.shards[shard % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lower number first; None if they are the same.
    fn lock_both(
        &self,
        a: usize,
        b: usize,
    ) -> (MutexGuard<'_, Shard>, Option<MutexGuard<'_, Shard>>) {
        let first = self.lock(a.min(b));
        let second = (a != b).then(|| self.lock(a.max(b)));
        (first, second)
    }
}

#[inline]
fn shard_of(hash: u64) -> usize {
    // The low bits and the top seven choose the place within a shard.
    (hash >> 40) as usize % SHARDS
}

impl Shard {
    /// Gives a connection a place. While there is room nobody looks for candidates: they are elsewhere in
    /// memory, and cost as much as the rest.
    fn settle(&mut self, connection: &Arc<Connection>, now: u64, crowded: bool) {
        if crowded {
            self.tidy(2);
        }
        let number = self.free.pop().unwrap_or(self.places.len() as u32);
        if self.places.len() <= number as usize {
            self.places.push(Place::default());
        }
        connection.set_place(number);
        let Some(place) = self.places.get_mut(number as usize) else {
            return;
        };
        place.connection = Some(Arc::clone(connection));
        if !std::mem::replace(&mut place.timed, true) {
            let turn = connection.deadline().min(now + HORIZON);
            self.wheel.insert(turn, number);
        }
        if !std::mem::replace(&mut place.queued, true) {
            self.young.push_back(number);
        }
    }

    /// Its place is free.
    fn vacate(&mut self, connection: &Arc<Connection>) {
        let number = connection.place();
        if let Some(place) = self.places.get_mut(number as usize)
            && let Some(settled) = &place.connection
            && Arc::ptr_eq(settled, connection)
        {
            place.connection = None;
            self.free.push(number);
        }
    }

    /// The next candidate for eviction, taken out of the queue.
    fn pop_young(&mut self) -> Option<(u32, Option<Arc<Connection>>)> {
        let number = self.young.pop_front()?;
        let place = self.places.get_mut(number as usize)?;
        place.queued = false;
        let candidate = place.connection.as_ref();
        let candidate = candidate.filter(|of| !of.is(status::DYING | status::ASSURED));
        Some((number, candidate.map(Arc::clone)))
    }

    /// Somebody to make room: the oldest that isn't assured.
    fn victim(&mut self) -> Option<Arc<Connection>> {
        while let Some((_, candidate)) = self.pop_young() {
            if candidate.is_some() {
                return candidate;
            }
        }
        None
    }

    /// Looks at up to `most` candidates for eviction: those that are no more, or no longer candidates,
    /// are forgotten.
    fn tidy(&mut self, most: usize) {
        for _ in 0..most.min(self.young.len()) {
            if let Some((number, Some(_))) = self.pop_young() {
                self.young.push_back(number);
                if let Some(place) = self.places.get_mut(number as usize) {
                    place.queued = true;
                }
            }
        }
    }
}
