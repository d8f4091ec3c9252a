//! The chain of IPv6 extension headers, as the kernel walks it.

use crate::headers::{array_at, ip_proto, is_ipv6_extension};

/// Bytes of the fixed header.
pub(crate) const HEADER: usize = 40;

/// `OFPIEH12_*` (OpenFlow 1.2, ofp_ipv6exthdr_flags): bits of [`crate::key::Key::ipv6_exthdrs`].
pub mod exthdr {
    /// No next header.
    pub const NONEXT: u16 = 1 << 0;
    /// Encapsulating security payload; never set, as nothing is walked behind or into it.
    pub const ESP: u16 = 1 << 1;
    /// Authentication header.
    pub const AUTH: u16 = 1 << 2;
    /// One or two destination options headers.
    pub const DEST: u16 = 1 << 3;
    /// Fragment header.
    pub const FRAG: u16 = 1 << 4;
    /// Routing header.
    pub const ROUTER: u16 = 1 << 5;
    /// Hop-by-hop options, first.
    pub const HOP: u16 = 1 << 6;
    /// One more often than it may be.
    pub const UNREP: u16 = 1 << 7;
    /// Not in the recommended order.
    pub const UNSEQ: u16 = 1 << 8;
}

/// What a walk over the chain found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// There is a fragment header.
    pub fragment: bool,
    /// Its offset isn't zero.
    pub later: bool,
    /// The L4 protocol and where it begins, if the chain is whole.
    pub end: Option<(u8, usize)>,
}

/// Walks the chain that begins with a header of type `next` at `at`.
pub(crate) fn walk(bytes: &[u8], mut next: u8, mut at: usize) -> Chain {
    let mut chain = Chain {
        fragment: false,
        later: false,
        end: None,
    };
    // Each turn goes eight bytes forward at least.
    while is_ipv6_extension(next) && next != ip_proto::NONE {
        let Some(&[following, length]) = array_at(bytes, at) else {
            return chain;
        };
        at += match next {
            ip_proto::FRAGMENT => {
                chain.fragment = true;
                let Some(offset) = array_at(bytes, at + 2) else {
                    return chain;
                };
                if u16::from_be_bytes(*offset) & !7 != 0 {
                    // What stands behind is payload; a chain that would go on there is an error.
                    chain.later = !is_ipv6_extension(following) || following == ip_proto::NONE;
                    return chain;
                }
                8
            }
            ip_proto::AUTHENTICATION => (usize::from(length) + 2) * 4,
            ip_proto::ROUTING if array_at::<4>(bytes, at).is_none() => return chain,
            _ => (usize::from(length) + 1) * 8,
        };
        next = following;
    }
    if at <= bytes.len() {
        chain.end = Some((next, at));
    }
    chain
}

/// Whether the first routing header of the chain that hasn't been worked off (segments left) exists: the
/// destination address in the IP header isn't then the one that the L4 checksum covers.
pub(crate) fn has_active_routing(bytes: &[u8], mut next: u8, mut at: usize) -> bool {
    while is_ipv6_extension(next) && next != ip_proto::NONE {
        let Some(&[following, length]) = array_at(bytes, at) else {
            return false;
        };
        at += match next {
            ip_proto::ROUTING => {
                let Some(&[_, _, _, segments_left]) = array_at(bytes, at) else {
                    return false;
                };
                if segments_left != 0 {
                    return true;
                }
                (usize::from(length) + 1) * 8
            }
            ip_proto::FRAGMENT => match array_at(bytes, at + 2) {
                Some(offset) if u16::from_be_bytes(*offset) & !7 == 0 => 8,
                _ => return false,
            },
            ip_proto::AUTHENTICATION => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        next = following;
    }
    false
}

/// The `OFPIEH12_*` bits of the chain that begins with a header of type `next` at `at`.
///
/// The kernel's reading, with two peculiarities that keys have to share: an authentication header's
/// length is taken as if it counted in eights, and a fragment header before one is "out of order" while
/// another authentication header isn't.
pub(crate) fn extensions(bytes: &[u8], mut next: u8, mut at: usize) -> u16 {
    use exthdr::*;
    let mut seen = 0;
    let mut destinations = 0u8;
    while is_ipv6_extension(next) {
        let (bit, may_precede) = match next {
            ip_proto::NONE => return seen | NONEXT,
            ip_proto::AUTHENTICATION => (AUTH, HOP | DEST | ROUTER | AUTH | UNREP),
            ip_proto::FRAGMENT => (FRAG, HOP | DEST | ROUTER | UNREP),
            ip_proto::ROUTING => (ROUTER, HOP | DEST | UNREP),
            ip_proto::HOP_BY_HOP => (HOP, 0),
            _ if destinations == 0 => (DEST, HOP | UNREP),
            _ => (DEST, HOP | DEST | ROUTER | FRAG | AUTH | ESP | UNREP),
        };
        if bit == DEST {
            if destinations >= 2 {
                seen |= UNREP;
            } else if seen & !may_precede != 0 {
                seen |= UNSEQ;
            }
            seen |= DEST;
            destinations = destinations.saturating_add(1);
        } else {
            if seen & bit != 0 {
                seen |= UNREP;
            }
            if bit == HOP {
                // The bit says that it is the first one.
                seen |= if seen == 0 { HOP } else { UNSEQ };
            } else {
                if seen & !may_precede != 0 || destinations >= 2 {
                    seen |= UNSEQ;
                }
                seen |= bit;
            }
        }
        let Some(&[following, length]) = array_at(bytes, at) else {
            return seen;
        };
        next = following;
        at += (usize::from(length) + 1) * 8;
    }
    seen
}
