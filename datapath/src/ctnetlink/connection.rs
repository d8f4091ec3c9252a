//! Requests about connections: get, delete, flush, update.

use std::sync::Arc;

use netlink::attr::{Attr, Table};
use netlink::message::flags;
use netlink::service::Answer;
use netlink::{Errno, Failure};

use super::entry::{HELP_NAME, attribute, protoinfo};
use super::filter::Filter;
use super::{Asked, DUMP, SECOND, entry, family, message, statistics, tuple};
use crate::conntrack::Tracker;
use crate::conntrack::connection::{Connection, Protocol, State, status};
use crate::conntrack::tcp;
use crate::conntrack::tuple::Direction;

/// Bits of a status that only the tracker sets, once and for all; asking for another value is EBUSY.
const FIXED: u32 = status::EXPECTED | status::CONFIRMED | status::DYING;
/// Bits that can be set by a client, and not be taken back.
const SETTABLE: u32 = status::SEEN_REPLY | status::ASSURED;

type Attributes<'a> = Table<'a, { attribute::COUNT }>;

pub(super) fn handle(
    tracker: &Tracker,
    asked: &Asked<'_>,
    now: u64,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let table = Table::new(asked.attributes);
    match asked.message {
        message::GET | message::GET_CTRZERO => {
            let found = find(tracker, asked, &table, now)?;
            let mut told = entry::Counts::default();
            answer.reply(entry::KIND, &entry::fixed(&found), |writer| {
                told = entry::write(writer, &found, now)?;
                Ok(())
            })?;
            if asked.message == message::GET_CTRZERO {
                entry::forget(&found, &told);
            }
            Ok(())
        }
        message::DELETE if is_flush(asked) => Ok(flush(tracker, asked)?),
        message::DELETE => {
            let found = find(tracker, asked, &table, now)?;
            if let Some(id) = table.get(attribute::ID)
                && id.be32()? != found.id
            {
                return Err(Errno::ENOENT.into());
            }
            // Someone else may have been faster: gone it is.
            tracker.remove(&found);
            Ok(())
        }
        message::NEW => match find(tracker, asked, &table, now) {
            Ok(_) if asked.has(flags::EXCL) => Err(Errno::EEXIST.into()),
            Ok(found) => change(&found, &table, now),
            Err(Errno::ENOENT) if asked.has(flags::CREATE) => Err(Failure::from(Errno::EOPNOTSUPP)
                .message("Connections begin with a packet: they can't be made by request")),
            Err(errno) => Err(errno.into()),
        },
        message::GET_STATS => Ok(statistics::global(tracker, answer)?),
        // As the kernel: only a dump has an answer.
        message::GET_STATS_CPU | message::GET_DYING | message::GET_UNCONFIRMED
            if !asked.has(DUMP) =>
        {
            Ok(())
        }
        _ => Err(Errno::EINVAL.into()),
    }
}

/// Whether a DELETE names no connection.
pub(super) fn is_flush(asked: &Asked<'_>) -> bool {
    let tuple = asked.names(attribute::TUPLE_ORIG) || asked.names(attribute::TUPLE_REPLY);
    !tuple || asked.names(attribute::FILTER)
}

/// The connection that has the tuple, original or reply, in the zone.
fn find(
    tracker: &Tracker,
    asked: &Asked<'_>,
    table: &Attributes<'_>,
    now: u64,
) -> Result<Arc<Connection>, Errno> {
    let zone = table.get(attribute::ZONE);
    let zone = zone.map_or(Ok(0), |zone| zone.be16())?;
    let attr = table
        .get(attribute::TUPLE_ORIG)
        .or_else(|| table.get(attribute::TUPLE_REPLY))
        .ok_or(Errno::EINVAL)?;
    let tuple = tuple::read(attr, family(asked.af), zone)?;
    tracker.find(&tuple, now).ok_or(Errno::ENOENT)
}

fn flush(tracker: &Tracker, asked: &Asked<'_>) -> Result<(), Errno> {
    if asked.names(attribute::FILTER) {
        return Err(Errno::EOPNOTSUPP);
    }
    // Before version 1 of the header its family was whatever it was, and all were meant.
    let af = if asked.version == 0 { 0 } else { asked.af };
    let filter = Filter::parse(af, asked)?;
    tracker.remove_all(filter.zone, |connection| {
        filter.wants(&connection.original) && filter.admits(connection)
    });
    Ok(())
}

/// Changes what is given, all or nothing.
fn change(connection: &Arc<Connection>, table: &Attributes<'_>, now: u64) -> Result<(), Failure> {
    const REFUSED: [(u16, &str); 6] = [
        (
            attribute::NAT_SRC,
            "A connection's translation can't change",
        ),
        (
            attribute::NAT_DST,
            "A connection's translation can't change",
        ),
        (
            attribute::TUPLE_MASTER,
            "A connection's master can't change",
        ),
        (attribute::SEQ_ADJ_ORIG, "Sequence numbers are the helper's"),
        (
            attribute::SEQ_ADJ_REPLY,
            "Sequence numbers are the helper's",
        ),
        (attribute::SYNPROXY, "There are no SYN proxies"),
    ];
    for (kind, message) in REFUSED {
        if table.get(kind).is_some() {
            return Err(Failure::from(Errno::EOPNOTSUPP).message(message));
        }
    }
    let mut state = connection.lock();
    if let Some(help) = table.get(attribute::HELP) {
        check_helper(&state, help)?;
    }
    let lifetime = table
        .get(attribute::TIMEOUT)
        .map(|t| t.be32())
        .transpose()?;
    let bits = match table.get(attribute::STATUS) {
        Some(bits) => new_status(connection.status(), bits.be32()?)?,
        None => 0,
    };
    let tcp = match table.get(attribute::PROTOINFO) {
        Some(attr) => changed_tcp(&state, attr)?,
        None => None,
    };
    let mark = match table.get(attribute::MARK) {
        Some(mark) => {
            let mask = table.get(attribute::MARK_MASK);
            let mask = mask.map_or(Ok(u32::MAX), |mask| mask.be32())?;
            // As ever: bits outside the mask are flipped by the value's.
            (state.mark & !mask) ^ mark.be32()?
        }
        None => state.mark,
    };
    let labels = changed_labels(&state.labels, table)?;
    if let Some(seconds) = lifetime {
        state.lifetime = u64::from(seconds) * SECOND;
        connection.set_deadline(now.saturating_add(state.lifetime));
    }
    connection.set(bits);
    if let Some(tcp) = tcp {
        state.protocol = Protocol::Tcp(tcp);
    }
    (state.mark, state.labels) = (mark, labels);
    Ok(())
}

/// A helper stays what it is.
fn check_helper(state: &State, help: Attr<'_>) -> Result<(), Failure> {
    let wanted = Table::<2>::new(help.payload).require(HELP_NAME)?.name(15)?;
    let has = state.helper.as_ref().map_or("", |of| of.helper.name());
    if wanted == has {
        Ok(())
    } else {
        Err(Failure::from(Errno::EOPNOTSUPP)
            .message("A connection gets its helper when it is committed"))
    }
}

/// The bits to be set.
fn new_status(now: u32, wanted: u32) -> Result<u32, Errno> {
    let differs = now ^ wanted;
    let taken_back = now & !wanted & SETTABLE;
    if differs & FIXED != 0 || taken_back != 0 {
        return Err(Errno::EBUSY);
    }
    Ok(wanted & SETTABLE)
}

fn changed_labels(now: &[u8; 16], table: &Attributes<'_>) -> Result<[u8; 16], Errno> {
    let Some(labels) = table.get(attribute::LABELS) else {
        return Ok(*now);
    };
    let value = labels.payload;
    let fits = |bytes: &[u8]| bytes.len().is_multiple_of(4) && (4..=16).contains(&bytes.len());
    let mask = match table.get(attribute::LABELS_MASK) {
        Some(mask) if mask.payload.len() != value.len() => return Err(Errno::EINVAL),
        Some(mask) => Some(mask.payload),
        None => None,
    };
    if !fits(value) {
        return Err(Errno::EINVAL);
    }
    let byte = |bytes: &[u8], at: usize| bytes.get(at).copied().unwrap_or(0);
    let mut new = [0; 16];
    for (at, (to, from)) in new.iter_mut().zip(now).enumerate() {
        let kept = match mask {
            // What the client doesn't name stays.
            Some(mask) => from & !byte(mask, at),
            None => 0,
        };
        *to = kept ^ byte(value, at);
    }
    Ok(new)
}

/// A TCP connection in another state; None: nothing of it was given.
fn changed_tcp(state: &State, attr: Attr<'_>) -> Result<Option<Box<tcp::Tcp>>, Failure> {
    let table = Table::<4>::new(attr.payload);
    let Protocol::Tcp(tcp) = &state.protocol else {
        return Err(Failure::from(Errno::EOPNOTSUPP)
            .message("Of protocols only TCP's state can be changed"));
    };
    // As in the kernel: another protocol's are no change.
    let Some(info) = table.get(protoinfo::TCP) else {
        return Ok(None);
    };
    let info = Table::<6>::new(info.payload);
    let mut tcp = tcp.clone();
    if let Some(number) = info.get(protoinfo::STATE) {
        tcp.state = tcp::State::from_number(number.u8()?).ok_or(Errno::EINVAL)?;
    }
    for (direction, flags, scale) in [
        (
            Direction::Original,
            protoinfo::TCP_FLAGS_ORIGINAL,
            protoinfo::TCP_WSCALE_ORIGINAL,
        ),
        (
            Direction::Reply,
            protoinfo::TCP_FLAGS_REPLY,
            protoinfo::TCP_WSCALE_REPLY,
        ),
    ] {
        if let Some(flags) = info.get(flags) {
            let [flags, mask] = flags.array()?;
            tcp.set_flags(direction, flags, mask);
        }
        if let Some(scale) = info.get(scale) {
            tcp.set_scale(direction, scale.u8()?);
        }
    }
    Ok(Some(tcp))
}
