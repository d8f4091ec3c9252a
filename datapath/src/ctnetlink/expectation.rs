//! Connections that helpers expect: `conntrack -L expect`. They can be looked at; they are the helpers' to
//! make, and go with their masters.

use netlink::handler::{DumpPart, Fit};
use netlink::{Dump, Errno, Failure};

use super::{Asked, DUMP, SECOND, af, kind, message, nfgenmsg, subsystem, tuple};
use crate::conntrack::Tracker;
use crate::conntrack::expectation::Expectation;
use crate::conntrack::tuple::{Family, Tuple};

/// `IPCTNL_MSG_EXP_GET_STATS_CPU`
pub(super) const GET_STATS_CPU: u8 = 3;

/// `enum ctattr_expect`
mod attribute {
    pub const MASTER: u16 = 1;
    pub const TUPLE: u16 = 2;
    pub const MASK: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const ID: u16 = 5;
    pub const HELP_NAME: u16 = 6;
    pub const ZONE: u16 = 7;
    pub const FLAGS: u16 = 8;
    pub const CLASS: u16 = 9;
}

pub(super) fn handle(tracker: &Tracker, asked: &Asked<'_>) -> Result<(), Failure> {
    match asked.message {
        // All of them, and of a helper that isn't named.
        message::DELETE if asked.attributes.is_empty() => {
            tracker.expectations.clear();
            Ok(())
        }
        message::NEW | message::GET | message::DELETE => Err(Failure::from(Errno::EOPNOTSUPP)
            .message("Expectations are the helpers': they can be listed and flushed")),
        GET_STATS_CPU if !asked.has(DUMP) => Ok(()),
        _ => Err(Errno::EINVAL.into()),
    }
}

/// All, as of now: there are few.
pub(super) fn dump(tracker: &Tracker, now: u64) -> impl Dump + use<> {
    Expectations {
        now,
        rest: tracker.expectations.snapshot().into_iter(),
        kept: None,
    }
}

struct Expectations {
    now: u64,
    rest: std::vec::IntoIter<Expectation>,
    kept: Option<Expectation>,
}

impl Dump for Expectations {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        while let Some(one) = self.kept.take().or_else(|| self.rest.next()) {
            if one.deadline <= self.now {
                continue;
            }
            let kind = kind(subsystem::CTNETLINK_EXP, message::NEW);
            let fixed = nfgenmsg(af(one.tuple.family), 0);
            let fit = part.record(kind, &fixed, |writer| write(writer, &one, self.now))?;
            if fit == Fit::Full {
                self.kept = Some(one);
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn write(writer: &mut netlink::attr::Writer<'_>, one: &Expectation, now: u64) -> Result<(), Errno> {
    let expected = Tuple {
        src_port: 0,
        ..one.tuple
    };
    // Which bits of the source count; the destination's all do.
    let width = match expected.family {
        Family::V4 => 4,
        Family::V6 => 16,
    };
    let mut src = [0; 16];
    src.iter_mut().take(width).for_each(|byte| *byte = 0xff);
    let mask = Tuple {
        src,
        dst: [0; 16],
        src_port: 0,
        dst_port: 0,
        ..expected
    };
    tuple::write(writer, attribute::TUPLE, &expected)?;
    tuple::write(writer, attribute::MASK, &mask)?;
    tuple::write(writer, attribute::MASTER, &one.master.original)?;
    let left = one.deadline.saturating_sub(now) / SECOND;
    writer.be32(attribute::TIMEOUT, u32::try_from(left).unwrap_or(u32::MAX));
    // What it goes to tells it from all others of its master.
    let port = u32::from(expected.dst_port) << 16;
    writer.be32(attribute::ID, one.master.id ^ port);
    writer.be32(attribute::FLAGS, 0);
    writer.be32(attribute::CLASS, 0);
    if let Some(helper) = &one.master.lock().helper {
        writer.name(attribute::HELP_NAME, helper.helper.name())?;
    }
    if expected.zone != 0 {
        writer.be16(attribute::ZONE, expected.zone);
    }
    Ok(())
}
