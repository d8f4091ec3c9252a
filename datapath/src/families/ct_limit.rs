//! `ovs_ct_limit`: how many connections a zone may have.
//!
//! As in the module the datapath doesn't count (connections are the daemon's), a zone out of range is
//! passed over with a warning, and so are bytes behind the last whole entry. All commands answer, with or
//! without NLM_F_ECHO, and none notifies.
//!
//! Source: uapi `linux/openvswitch.h`, `enum ovs_ct_limit_cmd`, `struct ovs_zone_limit`.

use std::sync::Arc;

use netlink::attr::{Table, Writer};
use netlink::quiet::Quiet;
use netlink::{Answer, Errno, Failure, Request};

use crate::conntrack::limit::Limits;
use crate::daemon::Daemon;

mod command {
    pub const SET: u8 = 1;
    pub const DEL: u8 = 2;
    pub const GET: u8 = 3;
}

mod attribute {
    pub const ZONE_LIMIT: u16 = 1;
    pub const COUNT: usize = 2;
}

/// Bytes of `struct ovs_zone_limit`: zone (s32), limit, count (u32), host order.
const ENTRY: usize = 12;
/// `OVS_ZONE_LIMIT_DEFAULT_ZONE`: zones without a limit of their own.
const DEFAULT: i32 = -1;

/// Which zones an entry is about.
#[derive(Clone, Copy)]
enum Zone {
    Default,
    One(u16),
}

pub(super) fn handle(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let attrs: Table<'_, { attribute::COUNT }> = request.table();
    let list = attrs.get(attribute::ZONE_LIMIT).map(|attr| attr.payload);
    let limits = &daemon.conntrack.limits;
    let (command, dp_ifindex) = (request.command, request.dp_ifindex);
    match command {
        command::SET => {
            for (zone, limit) in entries(list.ok_or(Errno::EINVAL)?) {
                match zone {
                    Zone::Default => limits.set_fallback(limit),
                    Zone::One(zone) => limits.set(zone, limit),
                }
            }
            answer.reply(command, dp_ifindex, |_writer| Ok(()))?;
        }
        command::DEL => {
            for (zone, _) in entries(list.ok_or(Errno::EINVAL)?) {
                match zone {
                    Zone::Default => limits.set_fallback(0),
                    Zone::One(zone) => limits.unset(zone),
                }
            }
            answer.reply(command, dp_ifindex, |_writer| Ok(()))?;
        }
        command::GET => {
            let zones: Vec<Zone> = match list {
                Some(list) => entries(list).map(|(zone, _)| zone).collect(),
                None => std::iter::once(Zone::Default)
                    .chain(limits.own().into_iter().map(|(zone, _)| Zone::One(zone)))
                    .collect(),
            };
            answer.reply(command, dp_ifindex, |writer| write(writer, limits, &zones))?;
        }
        _ => return Err(Errno::EOPNOTSUPP.into()),
    }
    Ok(())
}

fn write(writer: &mut Writer<'_>, limits: &Limits, zones: &[Zone]) -> Result<(), Errno> {
    let mut bytes = Vec::with_capacity(zones.len() * ENTRY);
    for zone in zones {
        let (number, limit, count) = match *zone {
            Zone::Default => (DEFAULT, limits.fallback(), 0),
            Zone::One(zone) => (i32::from(zone), limits.get(zone), limits.count(zone)),
        };
        bytes.extend(number.to_ne_bytes());
        bytes.extend(limit.to_ne_bytes());
        bytes.extend(count.to_ne_bytes());
    }
    writer.bytes(attribute::ZONE_LIMIT, &bytes)
}

/// Zone and limit of each whole entry that names a zone.
fn entries(list: &[u8]) -> impl Iterator<Item = (Zone, u32)> {
    // Anybody may ask for thousands of zones that can't be.
    static WARNINGS: Quiet = Quiet::new();
    let whole = list.chunks_exact(ENTRY);
    if !whole.remainder().is_empty() {
        let bytes = whole.remainder().len();
        WARNINGS.say(|| tracing::warn!("ct_limit: {bytes} unknown bytes"));
    }
    whole.filter_map(|entry| {
        let &[z0, z1, z2, z3, l0, l1, l2, l3, ..] = entry else {
            return None;
        };
        let limit = u32::from_ne_bytes([l0, l1, l2, l3]);
        match i32::from_ne_bytes([z0, z1, z2, z3]) {
            DEFAULT => Some((Zone::Default, limit)),
            number => match u16::try_from(number) {
                Ok(zone) => Some((Zone::One(zone), limit)),
                Err(_) => {
                    WARNINGS.say(|| tracing::warn!("ct_limit: zone {number} is out of range"));
                    None
                }
            },
        }
    })
}
