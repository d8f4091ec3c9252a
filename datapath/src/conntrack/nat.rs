//! Which addresses and ports a connection gets.
//!
//! A mapping is chosen when the connection is committed: the original source if it is in the range and
//! free, else the one that the same source has to another destination (so that who speaks to several is
//! seen as one), else an address by a keyed hash and a port that makes the answers' tuple unique.

use std::sync::{Mutex, PoisonError};

use crossbeam_utils::CachePadded;
use flow::action::Nat;
use hashbrown::HashTable;

use super::Tracker;
use super::connection::{Connection, status};
use super::expectation::Expectation;
use super::tuple::{Family, HashKey, Tuple, narrow, proto, wide};

/// Ports tried at most in a first round; each further round tries half as many from elsewhere.
const ATTEMPTS: u32 = 128;
/// When a round has fewer, it was the last.
const FEWEST: u32 = 16;

/// What a mapping is chosen from.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Addresses, both ends included.
    pub addresses: ([u8; 16], [u8; 16]),
    /// Ports or identifiers, both ends included.
    pub ports: Option<(u16, u16)>,
    /// The address depends on the client alone.
    pub persistent: bool,
    /// The port isn't to be the original one, even if it could.
    pub shuffle: Option<Shuffle>,
}

/// How a port is chosen that isn't to be the original one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    /// By a keyed hash of the tuple.
    Hash,
    /// At random.
    Random,
}

impl Range {
    /// What an action asks for. None: no addresses, or all zero: the addresses stay, only what is taken
    /// gets another port.
    pub fn of(nat: &Nat) -> Option<Self> {
        let min = nat.min_addr?;
        let max = nat.max_addr.unwrap_or(min);
        if min == [0; 16] && max == [0; 16] {
            return None;
        }
        let shuffle = match (nat.random, nat.hash) {
            (true, _) => Some(Shuffle::Random),
            (false, true) => Some(Shuffle::Hash),
            (false, false) => None,
        };
        Some(Self {
            addresses: (min, max),
            ports: nat
                .min_port
                .map(|min| (min, nat.max_port.unwrap_or(min)))
                .map(|(a, b)| (a.min(b), a.max(b))),
            persistent: nat.persistent,
            shuffle,
        })
    }

    fn only(address: [u8; 16], port: Option<u16>) -> Self {
        Self {
            addresses: (address, address),
            ports: port.map(|port| (port, port)),
            persistent: false,
            shuffle: None,
        }
    }

    fn has(&self, address: &[u8; 16], port: u16) -> bool {
        (self.addresses.0..=self.addresses.1).contains(address)
            && self
                .ports
                .is_none_or(|(low, high)| (low..=high).contains(&port))
    }
}

/// The end of a tuple that is translated.
fn end(tuple: &mut Tuple, source: bool) -> (&mut [u8; 16], &mut u16) {
    match (source, tuple.proto) {
        (true, _) => (&mut tuple.src, &mut tuple.src_port),
        // An ICMP query has one identifier for both ends.
        (false, proto::ICMP | proto::ICMPV6) => (&mut tuple.dst, &mut tuple.src_port),
        (false, _) => (&mut tuple.dst, &mut tuple.dst_port),
    }
}

impl Tracker {
    /// Decides how the source (or the destination) of a connection that isn't committed yet is
    /// translated. Without a range its address stays.
    pub(super) fn decide(
        &self,
        connection: &Connection,
        range: Option<&Range>,
        source: bool,
        now: u64,
    ) {
        let (bit, done) = match source {
            true => (status::SRC_NAT, status::SRC_NAT_DONE),
            false => (status::DST_NAT, status::DST_NAT_DONE),
        };
        if connection.is(status::CONFIRMED) || connection.set(done) != 0 {
            return;
        }
        let reply = connection.lock().reply;
        // What packets of the original direction have become by what was decided before.
        let Some(mut current) = reply.inverse() else {
            return;
        };
        let before = current;
        let stays = Range::only(*end(&mut current, source).0, None);
        let chosen = self.choose_tuple(connection, before, range.unwrap_or(&stays), source, now);
        if chosen != before
            && let Some(reply) = chosen.inverse()
        {
            connection.lock().reply = reply;
            connection.set(bit);
        }
    }

    fn choose_tuple(
        &self,
        connection: &Connection,
        current: Tuple,
        range: &Range,
        source: bool,
        now: u64,
    ) -> Tuple {
        let taken = |tuple: &Tuple| {
            let reply = tuple.inverse();
            reply.is_none_or(|reply| self.table.taken(&reply, connection, now))
        };
        if source && range.shuffle.is_none() {
            if range.has(&current.src, current.src_port) {
                if !taken(&current) {
                    return current;
                }
            } else if let Some((src, src_port)) = self.sources.find(&connection.original) {
                let same = Tuple {
                    src,
                    src_port,
                    ..current
                };
                if range.has(&src, src_port) && !taken(&same) {
                    return same;
                }
            }
        }
        let mut tuple = current;
        let address = self.choose_address(&current, range);
        *end(&mut tuple, source).0 = address;
        let port = *end(&mut tuple, source).1;
        if range.shuffle.is_none() {
            match range.ports {
                Some((low, high))
                    if (low..=high).contains(&port) && (low == high || !taken(&tuple)) =>
                {
                    return tuple;
                }
                Some(_) => {}
                None if !taken(&tuple) => return tuple,
                None => {}
            }
        }
        let Some((low, high)) = ports(&tuple, range, source) else {
            return tuple;
        };
        let size = u32::from(high) - u32::from(low) + 1;
        let mut offset = match range.shuffle {
            Some(Shuffle::Hash) => tuple.hash(self.key) as u32,
            _ => self.choose() as u32,
        };
        let mut attempts = size.min(ATTEMPTS);
        loop {
            for step in 0..attempts {
                let port = u32::from(low) + offset.wrapping_add(step) % size;
                *end(&mut tuple, source).1 = port as u16;
                if !taken(&tuple) {
                    return tuple;
                }
            }
            if attempts >= size || attempts < FEWEST {
                // Taken: the commit will say so.
                return tuple;
            }
            attempts /= 2;
            offset = self.choose() as u32;
        }
    }

    /// By a hash, so that a client is always seen as the same, whatever protocols it speaks.
    fn choose_address(&self, current: &Tuple, range: &Range) -> [u8; 16] {
        let (min, max) = range.addresses;
        if min == max {
            return min;
        }
        let client = Tuple {
            dst: if range.persistent {
                [0; 16]
            } else {
                current.dst
            },
            src_port: 0,
            dst_port: 0,
            proto: 0,
            ..*current
        };
        let hash = client.hash(self.key);
        match current.family {
            Family::V4 => {
                let (min, max) = (
                    u32::from_be_bytes(narrow(min)),
                    u32::from_be_bytes(narrow(max)),
                );
                let size = u64::from(max.saturating_sub(min)) + 1;
                // Scaled: the high bits choose.
                let step = (u128::from(hash) * u128::from(size)) >> 64;
                wide(min.wrapping_add(step as u32).to_be_bytes())
            }
            Family::V6 => {
                let (min, max) = (u128::from_be_bytes(min), u128::from_be_bytes(max));
                let more = hash.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let wide = u128::from(hash) << 64 | u128::from(more);
                let step = match max.saturating_sub(min).checked_add(1) {
                    Some(size) => wide % size,
                    None => wide,
                };
                min.wrapping_add(step).to_be_bytes()
            }
        }
    }

    /// Translates an expected connection as the one that it was agreed upon in.
    pub(super) fn follow_master(&self, connection: &Connection, expected: &Expectation, now: u64) {
        let master = &expected.master;
        if !master.is(status::NAT) {
            return;
        }
        // The packet that told of it went that way: its tuple has the addresses as its sender knows them.
        let told = master.lock().tuple(&master.original, expected.direction);
        let source = Range::only(told.dst, None);
        self.decide(connection, Some(&source), true, now);
        let destination = Range::only(told.src, Some(expected.told_port));
        self.decide(connection, Some(&destination), false, now);
    }
}

/// Which ports there are to choose from.
fn ports(tuple: &Tuple, range: &Range, source: bool) -> Option<(u16, u16)> {
    if !tuple.has_ports() {
        return None;
    }
    if let Some(ports) = range.ports {
        return Some(ports);
    }
    match tuple.proto {
        proto::ICMP | proto::ICMPV6 => Some((0, u16::MAX)),
        // A destination's port says which service is meant.
        _ if !source => None,
        _ => Some(match tuple.src_port {
            0..512 => (1, 511),
            512..1024 => (600, 1023),
            _ => (1024, u16::MAX),
        }),
    }
}

/// What a connection's source became; None if it isn't translated.
fn translated_source(connection: &Connection) -> Option<([u8; 16], u16)> {
    if !connection.is(status::SRC_NAT) {
        return None;
    }
    let chosen = connection.lock().reply.inverse()?;
    Some((chosen.src, chosen.src_port))
}

const SHARDS: usize = 64;

struct Mapping {
    /// Only the source's fields count.
    from: Tuple,
    to: ([u8; 16], u16),
    connections: u32,
}

/// How sources are translated at present.
///
/// # Thread safety
/// A shard is locked for one look.
pub struct Sources {
    key: HashKey,
    shards: Box<[CachePadded<Mutex<HashTable<Mapping>>>]>,
}

impl Sources {
    /// None.
    pub fn new(key: HashKey) -> Self {
        Self {
            key,
            shards: std::iter::repeat_with(CachePadded::default)
                .take(SHARDS)
                .collect(),
        }
    }

    fn with<R>(
        &self,
        original: &Tuple,
        look: impl FnOnce(&mut HashTable<Mapping>, u64, Tuple) -> R,
    ) -> R {
        let from = Tuple {
            dst: [0; 16],
            dst_port: 0,
            ..*original
        };
        let hash = from.hash(self.key);
        let shard = &self.shards[(hash >> 40) as usize % SHARDS];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        look(&mut shard, hash, from)
    }

    fn find(&self, original: &Tuple) -> Option<([u8; 16], u16)> {
        self.with(original, |shard, hash, from| {
            shard
                .find(hash, |mapping| mapping.from == from)
                .map(|mapping| mapping.to)
        })
    }

    /// The connection is being committed.
    pub fn remember(&self, connection: &Connection) {
        let Some(to) = translated_source(connection) else {
            return;
        };
        self.with(&connection.original, |shard, hash, from| {
            if let Some(mapping) = shard.find_mut(hash, |mapping| mapping.from == from) {
                // Another mapping of the same source stays what others get.
                mapping.connections += u32::from(mapping.to == to);
                return;
            }
            let key = self.key;
            let mapping = Mapping {
                from,
                to,
                connections: 1,
            };
            shard.insert_unique(hash, mapping, |mapping| mapping.from.hash(key));
        });
    }

    /// The connection is no more, or couldn't be committed.
    pub fn forget(&self, connection: &Connection) {
        let Some(to) = translated_source(connection) else {
            return;
        };
        self.with(&connection.original, |shard, hash, from| {
            if let Ok(mut entry) =
                shard.find_entry(hash, |mapping| mapping.from == from && mapping.to == to)
            {
                let left = entry.get_mut();
                left.connections = left.connections.saturating_sub(1);
                if left.connections == 0 {
                    entry.remove();
                }
            }
        });
    }

    /// How many sources have a mapping.
    pub fn len(&self) -> usize {
        let len = |shard: &CachePadded<Mutex<HashTable<Mapping>>>| {
            shard.lock().unwrap_or_else(PoisonError::into_inner).len()
        };
        self.shards.iter().map(len).sum()
    }

    /// Whether none has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
