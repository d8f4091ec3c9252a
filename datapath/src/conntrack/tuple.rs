//! What names one direction of a connection: addresses, ports, protocol, zone.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

/// Protocol numbers (IANA).
pub mod proto {
    #![allow(missing_docs)]
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const GRE: u8 = 47;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Family {
    /// Addresses are in the first four bytes, the rest is zero.
    V4 = 4,
    /// All sixteen bytes.
    V6 = 6,
}

/// One direction of a connection.
///
/// For ICMP and ICMPv6 `src_port` is the identifier and `dst_port` type (high byte) and code. Protocols
/// without ports have zero there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// Zone.
    pub zone: u16,
    /// IP protocol.
    pub proto: u8,
    /// Of both addresses.
    pub family: Family,
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// As the first packet did.
    Original,
    /// The other way.
    Reply,
}

impl Direction {
    /// 0 or 1.
    #[inline]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The other one.
    #[inline]
    pub const fn other(self) -> Self {
        match self {
            Self::Original => Self::Reply,
            Self::Reply => Self::Original,
        }
    }
}

impl Tuple {
    /// The tuple of the answers. None: there are no answers to such a packet (an ICMP message that is
    /// no query, or no reply to one).
    pub fn inverse(&self) -> Option<Self> {
        let (src_port, dst_port) = match self.proto {
            proto::ICMP => (self.src_port, opposite_icmp(self.dst_port)?),
            proto::ICMPV6 => (self.src_port, opposite_icmpv6(self.dst_port)?),
            _ => (self.dst_port, self.src_port),
        };
        Some(Self {
            src: self.dst,
            dst: self.src,
            src_port,
            dst_port,
            ..*self
        })
    }

    /// A hash that who doesn't know `key` can't make collide.
    pub fn hash(&self, key: HashKey) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(key.0, key.1);
        hasher.write(&self.src);
        hasher.write(&self.dst);
        hasher.write_u64(
            u64::from(self.src_port) << 48
                | u64::from(self.dst_port) << 32
                | u64::from(self.zone) << 16
                | u64::from(self.proto) << 8
                | self.family as u64,
        );
        hasher.finish()
    }

    /// Whether the protocol has an identifier or ports that address translation can change.
    pub fn has_ports(&self) -> bool {
        matches!(
            self.proto,
            proto::TCP | proto::UDP | proto::SCTP | proto::ICMP | proto::ICMPV6
        )
    }
}

/// The secret of a table's hash.
#[derive(Clone, Copy, Debug)]
pub struct HashKey(pub u64, pub u64);

fn opposite_icmp(kind: u16) -> Option<u16> {
    let kind_of = |kind: u16| kind << 8;
    let code = kind & 0xff;
    Some(
        code | match kind >> 8 {
            0 => kind_of(8),
            8 => kind_of(0),
            13 => kind_of(14),
            14 => kind_of(13),
            15 => kind_of(16),
            16 => kind_of(15),
            17 => kind_of(18),
            18 => kind_of(17),
            _ => return None,
        },
    )
}

fn opposite_icmpv6(kind: u16) -> Option<u16> {
    let code = kind & 0xff;
    Some(
        code | match kind >> 8 {
            128 => 129 << 8,
            129 => 128 << 8,
            139 => 140 << 8,
            140 => 139 << 8,
            _ => return None,
        },
    )
}

/// An address widened to sixteen bytes.
#[inline]
pub fn wide([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// The first four bytes.
#[inline]
pub fn narrow([a, b, c, d, ..]: [u8; 16]) -> [u8; 4] {
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_inverse_of_the_inverse_is_the_tuple(
            src: [u8; 16], dst: [u8; 16], src_port: u16, dst_port: u16, zone: u16, proto: u8, v6: bool,
        ) {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let tuple = Tuple { src, dst, src_port, dst_port, zone, proto, family };
            if let Some(inverse) = tuple.inverse() {
                prop_assert_eq!(inverse.inverse(), Some(tuple));
            }
        }
    }

    #[test]
    fn only_queries_and_replies_have_an_inverse() {
        let with = |proto, dst_port| Tuple {
            src: [1; 16],
            dst: [2; 16],
            src_port: 7,
            dst_port,
            zone: 0,
            proto,
            family: Family::V4,
        };
        let reply = with(proto::ICMP, 8 << 8).inverse().unwrap();
        assert_eq!((reply.src_port, reply.dst_port), (7, 0));
        assert!(with(proto::ICMP, 3 << 8).inverse().is_none());
        assert!(with(proto::ICMPV6, 135 << 8).inverse().is_none());
    }
}
