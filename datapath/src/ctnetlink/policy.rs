//! Timeout policies (`nfct timeout`, Open vSwitch's zone policies), and the timeouts of connections that
//! have none.

use std::sync::Arc;

use netlink::attr::{Attr, Table, Writer};
use netlink::handler::{DumpPart, Fit};
use netlink::message::flags;
use netlink::service::Answer;
use netlink::{Dump, Errno, Failure};

use super::{Asked, NESTED, SECOND, af, family, kind, message, nfgenmsg, subsystem};
use crate::conntrack::Tracker;
use crate::conntrack::timeout::{Policy, Timeouts};
use crate::conntrack::tuple::{Family, proto};

/// `IPCTNL_MSG_TIMEOUT_DEFAULT_SET`, `..._GET`; the others are as [`message`]'s.
const DEFAULT_SET: u8 = 3;
const DEFAULT_GET: u8 = 4;

/// `enum ctattr_timeout`
mod attribute {
    pub const NAME: u16 = 1;
    pub const L3PROTO: u16 = 2;
    pub const L4PROTO: u16 = 3;
    pub const DATA: u16 = 4;
    pub const USE: u16 = 5;
    pub const COUNT: usize = 6;
}

/// Longest name, without its NUL: `CTNL_TIMEOUT_NAME_MAX - 1`.
const LONGEST: usize = 31;
/// Any IP protocol that isn't tracked by itself (`CTA_TIMEOUT_GENERIC_*` is meant).
const GENERIC: u8 = 255;

pub(super) fn handle(
    tracker: &Tracker,
    asked: &Asked<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let table = Table::<{ attribute::COUNT }>::new(asked.attributes);
    let name = || {
        let name = table.get(attribute::NAME);
        name.map(|name| name.name(LONGEST)).transpose()
    };
    let sort = || -> Result<(Option<Family>, u8), Errno> {
        let l3 = table.require(attribute::L3PROTO)?.be16()?;
        let l4 = table.require(attribute::L4PROTO)?.u8()?;
        Ok((u8::try_from(l3).ok().and_then(family), l4))
    };
    match asked.message {
        message::NEW => {
            let name = name()?.ok_or(Errno::EINVAL)?;
            let (family, l4) = sort()?;
            let data = table.require(attribute::DATA)?;
            put(tracker, asked, name, (family, l4), data)
        }
        message::GET => {
            let name = name()?.ok_or(Errno::EINVAL)?;
            let policy = tracker.policy(name).ok_or(Errno::ENOENT)?;
            let kind = kind(subsystem::CTNETLINK_TIMEOUT, message::NEW);
            answer.reply(kind, &nfgenmsg(0, 0), |writer| write(writer, name, &policy))?;
            Ok(())
        }
        message::DELETE => match name()? {
            Some(name) => {
                let there = tracker.remove_policy(name);
                there.then_some(()).ok_or(Errno::ENOENT.into())
            }
            None => {
                for name in tracker.policies().keys() {
                    tracker.remove_policy(name);
                }
                Ok(())
            }
        },
        DEFAULT_SET => {
            let (_, l4) = sort()?;
            let data = table.require(attribute::DATA)?;
            let mut timeouts = (*tracker.default_timeouts()).clone();
            read_data(&mut timeouts, l4, data)?;
            tracker.set_default_timeouts(timeouts);
            Ok(())
        }
        DEFAULT_GET => {
            let (family, l4) = sort()?;
            let timeouts = tracker.default_timeouts();
            if slots(l4).is_none() {
                return Err(Errno::EOPNOTSUPP.into());
            }
            let kind = kind(subsystem::CTNETLINK_TIMEOUT, DEFAULT_SET);
            answer.reply(kind, &nfgenmsg(0, 0), |writer| {
                let l3 = family.map_or(0, |family| u16::from(af(family)));
                writer.be16(attribute::L3PROTO, l3);
                writer.u8(attribute::L4PROTO, l4);
                write_data(writer, &timeouts, l4)
            })?;
            Ok(())
        }
        _ => Err(Errno::EINVAL.into()),
    }
}

fn put(
    tracker: &Tracker,
    asked: &Asked<'_>,
    name: &str,
    (family, l4): (Option<Family>, u8),
    data: Attr<'_>,
) -> Result<(), Failure> {
    let there = tracker.policy(name);
    if there.is_some() && asked.has(flags::EXCL) {
        return Err(Errno::EEXIST.into());
    }
    let mut timeouts = (*tracker.default_timeouts()).clone();
    match there {
        Some(policy) if asked.has(flags::REPLACE) => {
            if Some(policy.family) != family || policy.proto != l4 {
                return Err(Errno::EINVAL.into());
            }
            read_data(&mut timeouts, l4, data)?;
            policy.replace(timeouts);
        }
        Some(_) => return Err(Errno::EBUSY.into()),
        None => {
            let family = family.ok_or(Errno::EOPNOTSUPP)?;
            read_data(&mut timeouts, l4, data)?;
            tracker.set_policy(name, Policy::new(family, l4, timeouts));
        }
    }
    Ok(())
}

/// All, by name, as of now: there are few.
pub(super) fn dump(tracker: &Tracker) -> impl Dump + use<> {
    let mut all: Vec<_> = tracker.policies().into_iter().collect();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    Policies {
        rest: all.into_iter(),
        kept: None,
    }
}

struct Policies {
    rest: std::vec::IntoIter<(Box<str>, Arc<Policy>)>,
    kept: Option<(Box<str>, Arc<Policy>)>,
}

impl Dump for Policies {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        while let Some(one) = self.kept.take().or_else(|| self.rest.next()) {
            let kind = kind(subsystem::CTNETLINK_TIMEOUT, message::NEW);
            let fit = part.record(kind, &nfgenmsg(0, 0), |writer| {
                write(writer, &one.0, &one.1)
            })?;
            if fit == Fit::Full {
                self.kept = Some(one);
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn write(writer: &mut Writer<'_>, name: &str, policy: &Arc<Policy>) -> Result<(), Errno> {
    writer.name(attribute::NAME, name)?;
    writer.be16(attribute::L3PROTO, af(policy.family).into());
    writer.u8(attribute::L4PROTO, policy.proto);
    // Beside the name's own and the caller's.
    let users = Arc::strong_count(policy).saturating_sub(1);
    writer.be32(attribute::USE, u32::try_from(users).unwrap_or(u32::MAX));
    write_data(writer, &policy.timeouts(), policy.proto)
}

/// Where a protocol's timeouts are: attributes 1, 2, ... of `CTA_TIMEOUT_DATA` in order. None: no such
/// protocol is tracked by itself.
fn slots(l4: u8) -> Option<fn(&mut Timeouts) -> Vec<&mut u64>> {
    Some(match l4 {
        proto::TCP => |of| {
            // From SYN_SENT on: there is none for NONE.
            let states = of.tcp.iter_mut().skip(1);
            states
                .chain([&mut of.tcp_retransmitted, &mut of.tcp_unacknowledged])
                .collect()
        },
        proto::UDP => |of| vec![&mut of.udp_single, &mut of.udp_stream],
        proto::SCTP => |of| of.sctp.iter_mut().skip(1).collect(),
        proto::GRE => |of| vec![&mut of.gre_single, &mut of.gre_stream],
        proto::ICMP => |of| vec![&mut of.icmp],
        proto::ICMPV6 => |of| vec![&mut of.icmpv6],
        GENERIC => |of| vec![&mut of.generic],
        _ => return None,
    })
}

/// What isn't given stays.
fn read_data(timeouts: &mut Timeouts, l4: u8, data: Attr<'_>) -> Result<(), Failure> {
    let slots = slots(l4)
        .ok_or(Failure::from(Errno::EOPNOTSUPP).message("No such protocol is tracked by itself"))?;
    let given = Table::<16>::new(data.payload);
    for (kind, slot) in (1..).zip(slots(timeouts)) {
        if let Some(seconds) = given.get(kind) {
            *slot = u64::from(seconds.be32()?) * SECOND;
        }
    }
    Ok(())
}

fn write_data(writer: &mut Writer<'_>, timeouts: &Timeouts, l4: u8) -> Result<(), Errno> {
    let slots = slots(l4).ok_or(Errno::EOPNOTSUPP)?;
    let mut timeouts = timeouts.clone();
    let nest = writer.begin(attribute::DATA | NESTED);
    for (kind, slot) in (1..).zip(slots(&mut timeouts)) {
        let seconds = *slot / SECOND;
        writer.be32(kind, u32::try_from(seconds).unwrap_or(u32::MAX));
    }
    writer.end(nest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink::attr::Attrs;

    #[test]
    fn data_that_are_written_are_read() {
        for l4 in [
            proto::TCP,
            proto::UDP,
            proto::SCTP,
            proto::GRE,
            proto::ICMP,
            proto::ICMPV6,
            GENERIC,
        ] {
            let mut timeouts = Timeouts::default();
            for (index, slot) in (1..).zip(slots(l4).unwrap()(&mut timeouts)) {
                *slot = index * 7 * SECOND;
            }
            let mut buffer = Vec::new();
            write_data(&mut Writer::new(&mut buffer), &timeouts, l4).unwrap();
            let data = Attrs::new(&buffer).next().unwrap();
            let mut back = Timeouts::default();
            read_data(&mut back, l4, data).unwrap();
            assert_eq!(back, timeouts, "{l4}");
        }
        assert!(slots(89).is_none());
    }
}
