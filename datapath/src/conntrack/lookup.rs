//! Which connection a packet belongs to.

use std::sync::Arc;

use super::connection::{Connection, Protocol, State, status};
use super::protocol::{self, Sort, Verdict};
use super::timeout::Policy;
use super::tuple::{Direction, Tuple, proto};
use super::wire::{Headers, array};
use super::{Attached, Counters, Relation, Tracker};
use crate::packet::Packet;

impl Tracker {
    /// The packet's connection in `zone`: one of the table, or a new one that isn't committed. None: the
    /// packet is invalid, or of a kind that has no connections.
    pub(super) fn look_up(
        &self,
        packet: &Packet,
        headers: &Headers,
        zone: u16,
        policy: Option<&Arc<Policy>>,
        now: u64,
    ) -> Option<Attached> {
        let found = match protocol::sort(packet, headers) {
            Sort::Tracked => self.track(packet, headers, zone, policy, now),
            Sort::Error => self.concerned(packet, headers, zone, now),
            Sort::Untracked => return None,
            Sort::Invalid => None,
        };
        if found.is_none() {
            Counters::add(&self.counters.invalid);
        }
        found
    }

    fn track(
        &self,
        packet: &Packet,
        headers: &Headers,
        zone: u16,
        policy: Option<&Arc<Policy>>,
        now: u64,
    ) -> Option<Attached> {
        let tuple = headers.tuple(packet.frame.bytes(), zone)?;
        // Twice: where a connection has ended another may begin.
        for _ in 0..2 {
            let (connection, direction) = match self.table.find(&tuple, now) {
                Some(found) => found,
                None => {
                    let new = self.begin(packet, headers, tuple, policy, now)?;
                    (Arc::new(new), Direction::Original)
                }
            };
            let verdict = {
                let mut state = connection.lock();
                let defaults = &self.timeouts.load();
                protocol::handle(
                    &connection,
                    &mut state,
                    direction,
                    packet,
                    headers,
                    defaults,
                    now,
                )
            };
            match verdict {
                Verdict::Accept => {}
                Verdict::Forget => {
                    self.remove(&connection);
                }
                Verdict::Reopen => {
                    self.remove(&connection);
                    continue;
                }
                Verdict::Invalid => return None,
            }
            if direction == Direction::Reply {
                connection.set(status::SEEN_REPLY);
            }
            let relation = relation(&connection, direction);
            return Some(Attached {
                connection,
                relation,
                direction,
            });
        }
        None
    }

    /// A connection that begins with this packet.
    fn begin(
        &self,
        packet: &Packet,
        headers: &Headers,
        tuple: Tuple,
        policy: Option<&Arc<Policy>>,
        now: u64,
    ) -> Option<Connection> {
        let reply = tuple.inverse()?;
        let remembers = protocol::begin(packet, headers, now)?;
        let expected = self.expectations.take(&tuple, now);
        let master = expected.as_ref().map(|one| Arc::clone(&one.master));
        let mark = master.as_ref().map_or(0, |master| master.lock().mark);
        let state = State {
            reply,
            protocol: remembers,
            mark,
            labels: [0; 16],
            helper: None,
            counts: [(0, 0); 2],
            timeouts: policy.filter(|of| of.applies(&tuple)).map(Arc::clone),
            lifetime: 0,
        };
        let connection = Connection::new(self.next_id(), tuple, master, state);
        // It begins, so it can't have expired.
        connection.set_deadline(u64::MAX);
        if let Some(expected) = expected {
            self.follow_master(&connection, &expected, now);
        }
        Some(connection)
    }

    /// The connection that an ICMP or ICMPv6 error is about.
    fn concerned(
        &self,
        packet: &Packet,
        headers: &Headers,
        zone: u16,
        now: u64,
    ) -> Option<Attached> {
        let bytes = packet.frame.bytes();
        let quoted = Headers::quoted(bytes, headers.transport + 8, headers.family)?;
        let tuple = quoted.tuple(bytes, zone)?.inverse()?;
        let (connection, direction) = self.table.find(&tuple, now)?;
        // Whom the error goes to must be who sent the packet.
        let goes_to = headers.tuple(bytes, zone)?.dst;
        let expected = connection.lock().tuple(&connection.original, direction).dst;
        (goes_to == expected).then_some(Attached {
            connection,
            relation: Relation::Related,
            direction,
        })
    }

    /// The committed connection that the packet belongs to, without looking at its state. `translated`:
    /// the packet's addresses are what they became.
    pub(super) fn existing(
        &self,
        packet: &Packet,
        headers: &Headers,
        zone: u16,
        translated: bool,
        now: u64,
    ) -> Option<Attached> {
        let mut tuple = headers.tuple(packet.frame.bytes(), zone)?;
        if translated {
            tuple = tuple.inverse()?;
        }
        let (connection, mut direction) = self.table.find(&tuple, now)?;
        if translated {
            direction = direction.other();
        }
        let relation = relation(&connection, direction);
        Some(Attached {
            connection,
            relation,
            direction,
        })
    }
}

fn relation(connection: &Connection, direction: Direction) -> Relation {
    if direction == Direction::Reply || connection.is(status::SEEN_REPLY) {
        Relation::Established
    } else if connection.is(status::EXPECTED) {
        Relation::Related
    } else {
        Relation::New
    }
}

impl Attached {
    /// Whether it is a TCP connection that is established.
    pub(super) fn is_established_tcp(&self) -> bool {
        self.connection.original.proto == proto::TCP
            && match &self.connection.lock().protocol {
                Protocol::Tcp(tcp) => tcp.state == super::tcp::State::Established,
                _ => false,
            }
    }
}

/// Type and code of an ICMP message.
pub(super) fn icmp_kind(bytes: &[u8], headers: &Headers) -> Option<u8> {
    array::<1>(bytes, headers.transport).map(|[kind]| *kind)
}
