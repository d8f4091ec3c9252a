//! The `ct` action, as the module carries it out.
//!
//! Without `commit` a packet is looked up, and the key says what was found. With it the connection goes
//! into the table too. A packet that was looked up in the zone before (and recirculated, or came back
//! from user space) isn't looked at again: its protocol sees each packet once.

use std::sync::Arc;

use flow::action::Conntrack;
use flow::key::{FRAG_NONE, Key};

use super::connection::{Connection, Protocol, status};
use super::fragment::Gathered;
use super::helper::{Helper, HelperState};
use super::nat::Range;
use super::table;
use super::translate::translate;
use super::tuple::{Direction, Family, Tuple, proto};
use super::wire::{self, Headers};
use super::{Attached, Counters, Relation, Tracker};
use crate::packet::Packet;

/// `OVS_CS_F_*`: bits of `ct_state`.
pub mod state {
    #![allow(missing_docs)]
    pub const NEW: u8 = 0x01;
    pub const ESTABLISHED: u8 = 0x02;
    pub const RELATED: u8 = 0x04;
    pub const REPLY: u8 = 0x08;
    pub const INVALID: u8 = 0x10;
    pub const TRACKED: u8 = 0x20;
    pub const SRC_NAT: u8 = 0x40;
    pub const DST_NAT: u8 = 0x80;
    pub const NAT: u8 = SRC_NAT | DST_NAT;
}

/// Why a packet is to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The zone has as many connections as it may.
    Limit,
    /// The table is full of connections that have proved themselves.
    Full,
    /// Another connection has one of its tuples: the range of addresses and ports is exhausted.
    Clash,
    /// A header can't be translated.
    Translation,
    /// A helper couldn't do its part.
    Helper,
    /// A fragment that overlaps others, is malformed, is there already, or finds no room.
    Fragment,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// It goes on.
    On,
    /// It is a fragment, and waits for the others: the caller's packet has no bytes any more.
    Held,
}

impl Tracker {
    /// Carries out a `ct` on a packet whose key is that of its bytes.
    ///
    /// # Errors
    /// [`Refusal`]: the packet is to be dropped.
    pub fn execute(
        &self,
        packet: &mut Packet,
        ct: &Conntrack,
        now: u64,
    ) -> Result<Passage, Refusal> {
        if packet.key.ip_frag == FRAG_NONE {
            wire::trim(packet);
        } else {
            match self.fragments.gather(packet, ct.zone, now) {
                Gathered::Whole => {}
                Gathered::Waits => return Ok(Passage::Held),
                Gathered::Dropped => return Err(Refusal::Fragment),
            }
        }
        self.execute_whole(packet, ct, now)?;
        Ok(Passage::On)
    }

    fn execute_whole(&self, packet: &mut Packet, ct: &Conntrack, now: u64) -> Result<(), Refusal> {
        if ct.commit {
            self.look_up_and_help(packet, ct, now)?;
            return self.commit(packet, ct, now);
        }
        let headers = Headers::of(packet);
        let expected = headers.and_then(|headers| {
            let tuple = headers.tuple(packet.frame.bytes(), ct.zone)?;
            self.expected(&tuple, now)
        });
        if let Some(master) = expected {
            // It becomes a connection when it is committed; until then it is its master's.
            let state = state::TRACKED | state::NEW | state::RELATED;
            write_key(&mut packet.key, state, ct.zone, Some(&master));
            packet.conntrack = None;
            return Ok(());
        }
        self.look_up_and_help(packet, ct, now)
    }

    /// The connection whose helper expects one of this tuple.
    fn expected(&self, tuple: &Tuple, now: u64) -> Option<Arc<Connection>> {
        let expectation = self.expectations.find(tuple, now)?;
        // Helpers don't look whether there is such a connection already.
        if let Some((clash, _)) = self.table.find(tuple, now) {
            self.remove(&clash);
        }
        Some(expectation.master)
    }

    fn look_up_and_help(
        &self,
        packet: &mut Packet,
        ct: &Conntrack,
        now: u64,
    ) -> Result<(), Refusal> {
        let headers = Headers::of(packet);
        let policy = ct.timeout.as_deref().and_then(|name| self.policy(name));
        let cached = headers
            .as_ref()
            .is_some_and(|headers| self.is_looked_up(packet, headers, ct, now));
        if !cached {
            packet.conntrack = headers
                .as_ref()
                .and_then(|headers| self.look_up(packet, headers, ct.zone, policy.as_ref(), now));
            packet.key.ct_state = 0;
            update_key(packet, ct.zone);
        }
        let (Some(headers), Some(attached)) = (headers, packet.conntrack.clone()) else {
            return Ok(());
        };
        let connection = &attached.connection;
        let confirmed = connection.is(status::CONFIRMED);
        if let Some(nat) = &ct.nat
            && packet.key.ct_state & state::NAT == 0
            && (confirmed || ct.commit)
        {
            let (range, wants) = (Range::of(nat), nat.source);
            self.translate_as(packet, &headers, &attached, wants, range, ct.commit, now)?;
        }
        let mut assigned = false;
        if !confirmed
            && ct.commit
            && let Some(helper) = ct.helper.as_deref().and_then(Helper::named)
        {
            let mut inner = connection.lock();
            if inner.helper.is_none() {
                inner.helper = Some(Box::new(HelperState::new(helper)));
                assigned = true;
                connection.set(status::HELPER);
            }
        }
        let helps = match confirmed {
            true => !cached || assigned,
            false => ct.commit,
        };
        if helps && connection.is(status::HELPER) {
            // Nothing in front of the payload has moved, but its length may have.
            self.help(packet, &headers, &attached, now)
                .map_err(|_| Refusal::Helper)?;
        }
        if confirmed
            && attached.is_established_tcp()
            && let Protocol::Tcp(tcp) = &mut connection.lock().protocol
        {
            tcp.liberal = true;
        }
        Ok(())
    }

    /// Whether the packet was looked up in this zone before, so that it needn't be again. If it has lost
    /// its connection on the way through user space it gets it back.
    fn is_looked_up(
        &self,
        packet: &mut Packet,
        headers: &Headers,
        ct: &Conntrack,
        now: u64,
    ) -> bool {
        let mut looked_up = true;
        if packet.conntrack.is_none() {
            let key = &packet.key;
            looked_up = key.ct_state & (state::TRACKED | state::INVALID) == state::TRACKED
                && key.ct_zone == ct.zone;
            if looked_up || key.ct_state == 0 && ct.force {
                let translated = key.ct_state & state::NAT != 0;
                packet.conntrack = self.existing(packet, headers, ct.zone, translated, now);
            }
        }
        let Some(attached) = &packet.conntrack else {
            return false;
        };
        let connection = &attached.connection;
        if connection.original.zone != ct.zone {
            return false;
        }
        if let Some(wanted) = ct.helper.as_deref().and_then(Helper::named)
            && let Some(has) = &connection.lock().helper
            && has.helper != wanted
        {
            return false;
        }
        if ct.force && attached.direction == Direction::Reply {
            // It is to begin anew, in the packet's direction.
            self.remove(&Arc::clone(connection));
            packet.conntrack = None;
            return false;
        }
        looked_up
    }

    /// Translates a packet, once decided how: one end, and then the other if both are.
    #[allow(clippy::too_many_arguments)]
    fn translate_as(
        &self,
        packet: &mut Packet,
        headers: &Headers,
        attached: &Attached,
        wants: Option<bool>,
        range: Option<Range>,
        commit: bool,
        now: u64,
    ) -> Result<(), Refusal> {
        let connection = &attached.connection;
        let translated = connection.is(status::NAT);
        let before = match (attached.relation, attached.direction) {
            (Relation::New, _) => false,
            // What is related is translated by a commit only.
            (Relation::Related, Direction::Original) => commit,
            _ => true,
        };
        let source = if translated && before {
            // As before; answers the other way round.
            connection.is(status::SRC_NAT) == (attached.direction == Direction::Original)
        } else if let Some(source) = wants {
            source
        } else {
            return Ok(());
        };
        self.translate_end(packet, headers, attached, range.as_ref(), source, now)?;
        if connection.is(status::DST_NAT) {
            if connection.is(status::SRC_NAT) {
                self.translate_end(packet, headers, attached, range.as_ref(), !source, now)?;
            } else if attached.direction == Direction::Original {
                // The new destination may have made the answers' tuple one that is taken.
                self.translate_end(packet, headers, attached, None, true, now)?;
            }
        }
        Ok(())
    }

    fn translate_end(
        &self,
        packet: &mut Packet,
        headers: &Headers,
        attached: &Attached,
        range: Option<&Range>,
        source: bool,
        now: u64,
    ) -> Result<(), Refusal> {
        let error = attached.relation == Relation::Related && is_icmp(headers);
        if attached.relation != Relation::Established && !error {
            self.decide(&attached.connection, range, source, now);
        }
        translate(packet, headers, attached, source).map_err(|_| Refusal::Translation)?;
        packet.key.ct_state |= match source {
            true => state::SRC_NAT,
            false => state::DST_NAT,
        };
        Ok(())
    }

    /// Puts the packet's connection into the table, and writes mark and labels. An invalid packet has
    /// none: nothing happens.
    fn commit(&self, packet: &mut Packet, ct: &Conntrack, now: u64) -> Result<(), Refusal> {
        let Some(attached) = packet.conntrack.clone() else {
            return Ok(());
        };
        let connection = &attached.connection;
        let confirmed = connection.is(status::CONFIRMED);
        let zone = connection.original.zone;
        if !confirmed && self.limits.is_full(zone) {
            Counters::add(&self.counters.limited);
            return Err(Refusal::Limit);
        }
        let inherited = match &connection.master {
            Some(master) if !confirmed => Some(master.lock().labels),
            _ => None,
        };
        let (reply, lifetime) = {
            let mut state = connection.lock();
            if let Some(mark) = ct.mark {
                state.mark = state.mark & !mark.mask | mark.value;
                packet.key.ct_mark = state.mark;
            }
            if let Some(labels) = inherited {
                state.labels = labels;
            }
            if let Some(labels) = ct.labels {
                let bits = labels.value.iter().zip(&labels.mask);
                for (byte, (value, mask)) in state.labels.iter_mut().zip(bits) {
                    *byte = *byte & !mask | value & mask;
                }
            }
            if ct.labels.is_some() || inherited.is_some() {
                packet.key.ct_labels = state.labels;
            }
            (state.reply, state.lifetime)
        };
        if confirmed {
            return Ok(());
        }
        if !self.limits.take(zone) {
            Counters::add(&self.counters.limited);
            return Err(Refusal::Limit);
        }
        connection.set_deadline(now.saturating_add(lifetime));
        // Before others can see it, and take it out again.
        self.sources.remember(connection);
        let inserted = self
            .table
            .insert(connection, &reply, now, |removed, early| {
                self.gone(&removed);
                Counters::add(match early {
                    true => &self.counters.early_drop,
                    false => &self.counters.expired,
                });
            });
        match inserted {
            Ok(()) => {
                Counters::add(&self.counters.inserted);
                Ok(())
            }
            Err(refused) => {
                self.limits.give(zone);
                self.sources.forget(connection);
                self.settle(packet, &attached, reply, refused)
            }
        }
    }

    /// The connection can't go into the table. If another thread has just put the same one there the
    /// packet is that one's.
    fn settle(
        &self,
        packet: &mut Packet,
        attached: &Attached,
        reply: Tuple,
        refused: table::Refused,
    ) -> Result<(), Refusal> {
        Counters::add(&self.counters.insert_failed);
        let rival = match refused {
            table::Refused::Full => {
                Counters::add(&self.counters.full);
                return Err(Refusal::Full);
            }
            table::Refused::Clash(rival) => rival,
        };
        let original = &attached.connection.original;
        // A repeated SYN brings TCP together again by itself.
        if original.proto == proto::TCP
            || rival.original != *original
            || rival.lock().reply != reply
        {
            return Err(Refusal::Clash);
        }
        Counters::add(&self.counters.clash_resolved);
        packet.conntrack = Some(Attached {
            connection: rival,
            ..attached.clone()
        });
        Ok(())
    }
}

fn is_icmp(headers: &Headers) -> bool {
    matches!(headers.proto, proto::ICMP | proto::ICMPV6)
}

/// The key as its connection says; the bits of translation stay.
fn update_key(packet: &mut Packet, zone: u16) {
    let Some(attached) = &packet.conntrack else {
        write_key(&mut packet.key, state::TRACKED | state::INVALID, zone, None);
        return;
    };
    let connection = Arc::clone(&attached.connection);
    let mut bits = state::TRACKED;
    bits |= match (attached.relation, attached.direction) {
        (Relation::New, _) => state::NEW,
        (Relation::Established, Direction::Original) => state::ESTABLISHED,
        (Relation::Established, Direction::Reply) => state::ESTABLISHED | state::REPLY,
        (Relation::Related, Direction::Original) => state::RELATED,
        (Relation::Related, Direction::Reply) => state::RELATED | state::REPLY,
    };
    if !connection.is(status::CONFIRMED) {
        bits |= state::NEW;
    }
    if connection.master.is_some() {
        bits |= state::RELATED;
    }
    bits |= packet.key.ct_state & state::NAT;
    write_key(&mut packet.key, bits, zone, Some(&connection));
}

fn write_key(key: &mut Key, state: u8, zone: u16, connection: Option<&Connection>) {
    forget(key);
    key.ct_state = state;
    key.ct_zone = zone;
    let Some(connection) = connection else {
        return;
    };
    {
        let inner = connection.lock();
        key.ct_mark = inner.mark;
        key.ct_labels = inner.labels;
    }
    let original = match &connection.master {
        Some(master) => &master.original,
        None => &connection.original,
    };
    let family = match key.eth_type.get() {
        0x0800 => Some(Family::V4),
        0x86dd => Some(Family::V6),
        _ => None,
    };
    if family != Some(original.family) {
        return;
    }
    key.ct_orig_src = original.src;
    key.ct_orig_dst = original.dst;
    key.ct_orig_proto = original.proto;
    let (src, dst) = match original.proto {
        proto::ICMP | proto::ICMPV6 => (original.dst_port >> 8, original.dst_port & 0xff),
        _ => (original.src_port, original.dst_port),
    };
    key.ct_orig_tp_src = src.into();
    key.ct_orig_tp_dst = dst.into();
}

/// A packet forgets its connection (`ct_clear`).
pub fn clear(packet: &mut Packet) {
    packet.conntrack = None;
    forget(&mut packet.key);
}

fn forget(key: &mut Key) {
    key.ct_state = 0;
    key.ct_zone = 0;
    key.ct_mark = 0;
    key.ct_labels = [0; 16];
    key.ct_orig_src = [0; 16];
    key.ct_orig_dst = [0; 16];
    key.ct_orig_tp_src = 0.into();
    key.ct_orig_tp_dst = 0.into();
    key.ct_orig_proto = 0;
}
