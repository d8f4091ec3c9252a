//! ctnetlink: the tracker's connections, expectations and timeout policies for programs that speak
//! NETLINK_NETFILTER. What they see and change is this table, not the host's.
//!
//! - [`entry`]: a connection as attributes; [`tuple`]: its tuples;
//! - [`filter`]: which connections are meant; [`dump`]: all of those, by a cursor;
//! - [`connection`]: get, delete, flush, update;
//! - [`expectation`], [`policy`], [`statistics`].
//!
//! As in the kernel nobody without privileges gets an answer, not even to a GET. Changes by a filter look at
//! every connection of the table (or of the zone): they have a thread where they may take their time.
//!
//! Source: uapi `linux/netfilter/nfnetlink.h`, `nfnetlink_conntrack.h`, `nfnetlink_cttimeout.h`.

use std::sync::Arc;

use netlink::attr::Attrs;
use netlink::service::{Answer, Request, Served};
use netlink::{Dump, Errno, Failure, Lane, Service};

use crate::conntrack::Tracker;
use crate::conntrack::tuple::Family;

pub mod connection;
pub mod dump;
pub mod entry;
pub mod expectation;
pub mod filter;
pub mod policy;
pub mod statistics;
pub mod tuple;

/// `NFNL_SUBSYS_*`: the high byte of `nlmsg_type`.
pub mod subsystem {
    #![allow(missing_docs)]
    pub const CTNETLINK: u8 = 1;
    pub const CTNETLINK_EXP: u8 = 2;
    pub const CTNETLINK_TIMEOUT: u8 = 8;
}

/// `IPCTNL_MSG_CT_*`: the low byte.
pub mod message {
    #![allow(missing_docs)]
    pub const NEW: u8 = 0;
    pub const GET: u8 = 1;
    pub const DELETE: u8 = 2;
    pub const GET_CTRZERO: u8 = 3;
    pub const GET_STATS_CPU: u8 = 4;
    pub const GET_STATS: u8 = 5;
    pub const GET_DYING: u8 = 6;
    pub const GET_UNCONFIRMED: u8 = 7;
}

/// Of these any makes a request a dump (`NLM_F_ROOT | NLM_F_MATCH`).
const DUMP: u16 = 0x300;
/// `NLA_F_NESTED`, which ctnetlink sets.
const NESTED: u16 = 0x8000;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const SECOND: u64 = 1_000_000_000;

/// `nlmsg_type` of a message of a subsystem.
const fn kind(subsystem: u8, message: u8) -> u16 {
    (subsystem as u16) << 8 | message as u16
}

/// `struct nfgenmsg`: family, version 0, `res_id` in network order.
const fn nfgenmsg(family: u8, res_id: u16) -> [u8; 4] {
    let [high, low] = res_id.to_be_bytes();
    [family, 0, high, low]
}

/// The address family of a family.
const fn af(family: Family) -> u8 {
    match family {
        Family::V4 => AF_INET,
        Family::V6 => AF_INET6,
    }
}

/// And back.
const fn family(af: u8) -> Option<Family> {
    match af {
        AF_INET => Some(Family::V4),
        AF_INET6 => Some(Family::V6),
        _ => None,
    }
}

/// A request after its headers: what the modules here get.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    subsystem: u8,
    message: u8,
    /// `nfgen_family`
    af: u8,
    /// Of `struct nfgenmsg`.
    version: u8,
    /// `NLM_F_*`
    flags: u16,
    attributes: &'a [u8],
}

impl<'a> Asked<'a> {
    /// None: not even the headers are there, which is no request at all, and no mistake either.
    fn of(request: &Request<'a>) -> Option<Self> {
        let (&[af, version, ..], attributes) = request.split::<4>().ok()?;
        let [subsystem, message] = request.kind.to_be_bytes();
        Some(Self {
            subsystem,
            message,
            af,
            version,
            flags: request.flags,
            attributes,
        })
    }

    fn has(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }

    /// Whether this attribute is among them.
    fn names(&self, kind: u16) -> bool {
        Attrs::new(self.attributes).any(|attr| attr.kind == kind)
    }
}

/// The service for [`netlink::Protocol::Netfilter`].
pub struct Ctnetlink {
    tracker: Arc<Tracker>,
    /// Nanoseconds of the tracker's clock.
    clock: fn() -> u64,
}

impl Ctnetlink {
    /// Over this tracker, whose time `clock` tells.
    pub fn new(tracker: Arc<Tracker>, clock: fn() -> u64) -> Self {
        Self { tracker, clock }
    }
}

impl Service for Ctnetlink {
    fn lane(&self, request: &Request<'_>) -> Lane {
        let long = Asked::of(request).is_some_and(|asked| {
            asked.subsystem == subsystem::CTNETLINK
                && asked.message == message::DELETE
                && connection::is_flush(&asked)
        });
        if long { Lane::Long } else { Lane::Prompt }
    }

    fn needs_privilege(&self, _request: &Request<'_>) -> bool {
        true
    }

    fn is_dump(&self, request: &Request<'_>) -> bool {
        let Some(asked) = Asked::of(request) else {
            return false;
        };
        asked.has(DUMP)
            && match asked.subsystem {
                subsystem::CTNETLINK => !matches!(
                    asked.message,
                    message::NEW | message::DELETE | message::GET_STATS
                ),
                subsystem::CTNETLINK_EXP => {
                    matches!(asked.message, message::GET | expectation::GET_STATS_CPU)
                }
                subsystem::CTNETLINK_TIMEOUT => asked.message == message::GET,
                _ => false,
            }
    }

    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<Served, Failure> {
        let Some(asked) = Asked::of(request) else {
            return Ok(Served::Done);
        };
        let tracker = &*self.tracker;
        match asked.subsystem {
            subsystem::CTNETLINK => {
                connection::handle(tracker, &asked, (self.clock)(), answer)?;
            }
            subsystem::CTNETLINK_EXP => expectation::handle(tracker, &asked)?,
            subsystem::CTNETLINK_TIMEOUT => policy::handle(tracker, &asked, answer)?,
            _ => return Err(Errno::EINVAL.into()),
        }
        Ok(Served::Done)
    }

    fn dump(&self, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        let asked = Asked::of(request).ok_or(Errno::EINVAL)?;
        let tracker = &self.tracker;
        Ok(match (asked.subsystem, asked.message) {
            (subsystem::CTNETLINK, message::GET | message::GET_CTRZERO) => Box::new(
                dump::Connections::new(Arc::clone(tracker), self.clock, &asked)?,
            ),
            (subsystem::CTNETLINK, message::GET_STATS_CPU) => {
                Box::new(statistics::dump(tracker.statistics()))
            }
            // Connections leave the table at once, and those that aren't in it are their packets'.
            (subsystem::CTNETLINK, message::GET_DYING | message::GET_UNCONFIRMED) => {
                Box::new(statistics::Nothing)
            }
            (subsystem::CTNETLINK_EXP, message::GET) => {
                Box::new(expectation::dump(tracker, (self.clock)()))
            }
            (subsystem::CTNETLINK_EXP, expectation::GET_STATS_CPU) => Box::new(statistics::Nothing),
            (subsystem::CTNETLINK_TIMEOUT, message::GET) => Box::new(policy::dump(tracker)),
            _ => return Err(Errno::EINVAL.into()),
        })
    }
}
