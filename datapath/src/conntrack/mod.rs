//! Connection tracking: what `ct` and `ct_clear` do, with the semantics of `openvswitch.ko` over
//! nf_conntrack, in a table of our own.
//!
//! - [`action`]: the `ct` action: look up, translate, help, commit; the key's `ct_*` fields;
//! - [`lookup`]: which connection a packet belongs to; ICMP errors;
//! - [`protocol`]: what a packet means to its protocol, with [`tcp`] and [`sctp`];
//! - [`table`]: the connections by tuple, eviction, expiry ([`wheel`]);
//! - [`connection`], [`tuple`], [`timeout`], [`limit`], [`expectation`]: the nouns;
//! - [`wire`]: where a packet's headers are;
//! - [`nat`], [`translate`]: which addresses a connection gets; writing them into packets;
//! - [`helper`]: FTP and TFTP;
//! - [`fragment`]: what comes in pieces is tracked whole;
//! - [`client`]: what ctnetlink asks for: dumps, deletions, counts.
//!
//! # Time and randomness
//! There is no clock in here: every call says what time it is, in nanoseconds of one monotonic clock.
//! The hash's secret and the choices of ports come from the seed.
//!
//! # Thread safety
//! A [`Tracker`] is shared by all threads and all datapaths (nf_conntrack is one a network namespace).
//! Locks are held for one look: never across packets, never two of one kind but the two shards of a
//! connection that is put in (see [`table`]). Order: shard or connection or expectations, under each of
//! which no other is taken.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use arc_swap::ArcSwap;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::connection::Connection;
use self::expectation::Expectations;
use self::fragment::Fragments;
use self::limit::Limits;
use self::nat::Sources;
use self::table::Table;
use self::timeout::{Policy, Timeouts};
use self::tuple::{Direction, HashKey};

pub mod action;
pub mod client;
pub mod connection;
pub mod expectation;
pub mod fragment;
pub mod helper;
pub mod limit;
pub mod lookup;
pub mod nat;
pub mod protocol;
pub mod sctp;
pub mod table;
pub mod tcp;
pub mod timeout;
pub mod translate;
pub mod tuple;
pub mod wheel;
pub mod wire;

/// Connections by default: what issue-sized hosts have as `nf_conntrack_max`, and more than a million.
pub const MAX_CONNECTIONS: usize = 1 << 20;

/// What a tracker is made with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Connections at most.
    pub max_connections: usize,
    /// Secret of this run.
    pub seed: u64,
    /// How long connections live.
    pub timeouts: Timeouts,
}

impl Config {
    /// The usual limits, with that secret.
    pub fn new(seed: u64) -> Self {
        Self {
            max_connections: MAX_CONNECTIONS,
            seed,
            timeouts: Timeouts::default(),
        }
    }
}

/// How a packet stands to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// In the original direction, no answer seen yet.
    New,
    /// Packets have gone both ways.
    Established,
    /// An ICMP error about it, or the first packet of an expected connection.
    Related,
}

/// A packet's connection, in the zone in which it was last looked up.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The connection; perhaps not committed yet.
    pub connection: Arc<Connection>,
    /// How the packet stands to it.
    pub relation: Relation,
    /// Which way it goes.
    pub direction: Direction,
}

/// Counts of what happened, over all threads. Rare events only.
#[derive(Debug, Default)]
#[allow(missing_docs)] // The names are those of `conntrack -S`.
pub struct Counters {
    pub inserted: AtomicU64,
    pub insert_failed: AtomicU64,
    pub invalid: AtomicU64,
    pub early_drop: AtomicU64,
    pub full: AtomicU64,
    pub expired: AtomicU64,
    pub deleted: AtomicU64,
    pub clash_resolved: AtomicU64,
    pub limited: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// All connections of the daemon.
pub struct Tracker {
    /// By tuple.
    pub table: Table,
    /// By zone.
    pub limits: Limits,
    /// To come.
    pub expectations: Expectations,
    /// What happened.
    pub counters: Counters,
    /// Waiting for their other parts.
    pub fragments: Fragments,
    sources: Sources,
    timeouts: ArcSwap<Timeouts>,
    policies: RwLock<HashMap<Box<str>, Arc<Policy>>>,
    key: HashKey,
    ids: AtomicU32,
    choices: AtomicU64,
}

impl Tracker {
    /// Empty, at the time `now`.
    pub fn new(config: Config, now: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(config.seed);
        let key = HashKey(random.random(), random.random());
        Self {
            table: Table::new(key, config.max_connections, now),
            limits: Limits::default(),
            expectations: Expectations::default(),
            counters: Counters::default(),
            fragments: Fragments::default(),
            sources: Sources::new(key),
            timeouts: ArcSwap::from_pointee(config.timeouts),
            policies: RwLock::default(),
            key,
            ids: AtomicU32::new(random.random()),
            choices: AtomicU64::new(random.random()),
        }
    }

    /// A number that nobody can foresee who doesn't know the seed.
    pub(crate) fn choose(&self) -> u64 {
        let next = self.choices.fetch_add(1, Ordering::Relaxed);
        let mut hasher = siphasher::sip::SipHasher13::new_with_keys(self.key.1, self.key.0);
        std::hash::Hasher::write_u64(&mut hasher, next);
        std::hash::Hasher::finish(&hasher)
    }

    pub(crate) fn next_id(&self) -> u32 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Does what is due: at most `budget` looks a shard. True: nothing is left to do by `now`.
    pub fn expire(&self, now: u64, budget: usize) -> bool {
        let mut done = true;
        for shard in 0..self.table.shards() {
            done &= self.table.expire(shard, now, budget, |connection| {
                self.gone(&connection);
                Counters::add(&self.counters.expired);
            });
        }
        self.expectations.expire(now);
        self.fragments.expire(now);
        done
    }

    /// Deletes a connection. False: it was gone already.
    pub fn remove(&self, connection: &Arc<Connection>) -> bool {
        let removed = self.table.remove(connection);
        if removed {
            self.gone(connection);
            Counters::add(&self.counters.deleted);
        }
        removed
    }

    /// It has left the table: what it held is given back.
    fn gone(&self, connection: &Arc<Connection>) {
        self.limits.give(connection.original.zone);
        self.sources.forget(connection);
        self.expectations.forget(connection);
    }
}
