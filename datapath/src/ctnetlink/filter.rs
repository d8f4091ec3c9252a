//! Which connections a dump or a flush is about.

use flow::action::Masked;
use netlink::Errno;
use netlink::attr::Table;

use super::entry::attribute;
use super::tuple::Parts;
use super::{Asked, family};
use crate::conntrack::connection::Connection;
use crate::conntrack::tuple::{Family, Tuple};

/// `enum ctattr_filter`
const FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;

/// Bits of those flags: which parts of a tuple count.
mod part {
    pub const IP_SRC: u32 = 1 << 0;
    pub const IP_DST: u32 = 1 << 1;
    pub const TUPLE_ZONE: u32 = 1 << 2;
    pub const PROTO_NUM: u32 = 1 << 3;
    pub const SRC_PORT: u32 = 1 << 4;
    pub const DST_PORT: u32 = 1 << 5;
    pub const ICMP_TYPE: u32 = 1 << 6;
    pub const ICMP_CODE: u32 = 1 << 7;
    pub const ICMP_ID: u32 = 1 << 8;
    pub const ICMPV6_TYPE: u32 = 1 << 9;
    pub const ICMPV6_CODE: u32 = 1 << 10;
    pub const ICMPV6_ID: u32 = 1 << 11;
    pub const ALL: u32 = (1 << 12) - 1;
}

/// All conditions must hold; none is no condition.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    family: Option<Family>,
    /// Of a family without connections: nothing is meant.
    nothing: bool,
    /// Its zone.
    pub zone: Option<u16>,
    mark: Option<Masked<u32>>,
    status: Option<Masked<u32>>,
    original: Option<TupleFilter>,
    reply: Option<TupleFilter>,
}

/// Some fields of a tuple.
#[derive(Clone, Copy, Debug)]
struct TupleFilter {
    flags: u32,
    parts: Parts,
}

impl Filter {
    /// As a request says it, for the address family `af` (0: all).
    ///
    /// # Errors
    /// EINVAL for a mask without its value and for a tuple that is asked for and not there; EOPNOTSUPP for
    /// conditions that aren't known.
    pub fn parse(af: u8, asked: &Asked<'_>) -> Result<Self, Errno> {
        let table = Table::<{ attribute::COUNT }>::new(asked.attributes);
        let masked = |value: u16, mask: u16| -> Result<Option<Masked<u32>>, Errno> {
            let mask = table.get(mask).map(|mask| mask.be32()).transpose()?;
            match table.get(value) {
                Some(value) => {
                    let mask = mask.unwrap_or(u32::MAX);
                    Ok(Some(Masked {
                        value: value.be32()?,
                        mask,
                    }))
                }
                None if mask.is_some() => Err(Errno::EINVAL),
                None => Ok(None),
            }
        };
        let family = family(af);
        let mut filter = Self {
            family,
            nothing: af != 0 && family.is_none(),
            zone: table
                .get(attribute::ZONE)
                .map(|zone| zone.be16())
                .transpose()?,
            mark: masked(attribute::MARK, attribute::MARK_MASK)?,
            status: None,
            original: None,
            reply: None,
        };
        if let Some(status) = table.get(attribute::STATUS) {
            let mask = table.get(attribute::STATUS_MASK);
            // Without a mask: all of the bits that are set.
            let value = status.be32()?;
            let mask = mask.map_or(Ok(value), |mask| mask.be32())?;
            filter.status = Some(Masked { value, mask });
        } else if table.get(attribute::STATUS_MASK).is_some() {
            return Err(Errno::EINVAL);
        }
        if let Some(parts) = table.get(attribute::FILTER) {
            let flags = Table::<3>::new(parts.payload);
            let tuple = |flag: u16, tuple: u16| -> Result<Option<TupleFilter>, Errno> {
                let Some(flags) = flags.get(flag) else {
                    return Ok(None);
                };
                let flags = flags.u32()?;
                if flags & !part::ALL != 0 {
                    return Err(Errno::EOPNOTSUPP);
                }
                let family = family.ok_or(Errno::EOPNOTSUPP)?;
                let parts = Parts::read(table.require(tuple)?, family)?;
                Ok(Some(TupleFilter { flags, parts }))
            };
            filter.original = tuple(FILTER_ORIG_FLAGS, attribute::TUPLE_ORIG)?;
            filter.reply = tuple(FILTER_REPLY_FLAGS, attribute::TUPLE_REPLY)?;
        }
        Ok(filter)
    }

    /// Whether the original tuple is one of those meant: what can be told without a look at the rest.
    pub fn wants(&self, original: &Tuple) -> bool {
        !self.nothing
            && self.family.is_none_or(|family| family == original.family)
            && self.zone.is_none_or(|zone| zone == original.zone)
            && self.original.is_none_or(|filter| filter.fits(original))
    }

    /// Whether the connection, whose original tuple is wanted, is one of those meant.
    pub fn admits(&self, connection: &Connection) -> bool {
        if let Some(status) = self.status
            && connection.status() & status.mask != status.value & status.mask
        {
            return false;
        }
        if self.mark.is_none() && self.reply.is_none() {
            return true;
        }
        let state = connection.lock();
        self.mark
            .is_none_or(|mark| state.mark & mark.mask == mark.value)
            && self.reply.is_none_or(|filter| filter.fits(&state.reply))
    }
}

impl TupleFilter {
    fn fits(&self, tuple: &Tuple) -> bool {
        let Parts {
            src,
            dst,
            proto,
            src_port,
            dst_port,
            zone,
        } = self.parts;
        let counts = |bits: u32| self.flags & bits != 0;
        let high = |port: u16| port >> 8;
        let low = |port: u16| port & 0xff;
        let types = part::ICMP_TYPE | part::ICMPV6_TYPE;
        let codes = part::ICMP_CODE | part::ICMPV6_CODE;
        let ids = part::ICMP_ID | part::ICMPV6_ID;
        (!counts(part::IP_SRC) || src == Some(tuple.src))
            && (!counts(part::IP_DST) || dst == Some(tuple.dst))
            && (!counts(part::TUPLE_ZONE) || zone == Some(tuple.zone))
            && (!counts(part::PROTO_NUM) || proto == Some(tuple.proto))
            && (!counts(part::SRC_PORT | ids) || src_port == Some(tuple.src_port))
            && (!counts(part::DST_PORT) || dst_port == Some(tuple.dst_port))
            && (!counts(types) || dst_port.map(high) == Some(high(tuple.dst_port)))
            && (!counts(codes) || dst_port.map(low) == Some(low(tuple.dst_port)))
    }
}
