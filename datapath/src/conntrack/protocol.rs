//! What a packet means to its protocol: whether it may begin a connection, and how long that lives.

use super::connection::{Connection, Protocol, State, status};
use super::sctp::{self, Sctp};
use super::tcp::{self, Segment, Tcp};
use super::timeout::Timeouts;
use super::tuple::{Direction, proto};
use super::wire::{Headers, array};
use crate::packet::Packet;

/// How long UDP must go on to be a stream: nanoseconds.
const STREAM_AFTER: u64 = 2_000_000_000;

/// What a packet is, before any connection is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// It may belong to a connection.
    Tracked,
    /// An ICMP or ICMPv6 error: it is about another packet.
    Error,
    /// Neighbour discovery and the like: no connections there.
    Untracked,
    /// Malformed, or its checksum is wrong.
    Invalid,
}

/// Looks at the L4 header by itself.
pub fn sort(packet: &Packet, headers: &Headers) -> Sort {
    let l4 = headers.l4(packet.frame.bytes());
    let (right, optional) = match headers.proto {
        proto::TCP => (Segment::parse(l4).is_some(), None),
        proto::UDP => {
            let length = array::<2>(l4, 4).map_or(0, |l| usize::from(u16::from_be_bytes(*l)));
            let fits = (8..=l4.len()).contains(&length) || packet.frame.offload.gso.is_some();
            (l4.len() >= 8 && fits, Some(6))
        }
        proto::SCTP => (l4.len() >= 12, None),
        proto::ICMP | proto::ICMPV6 => (l4.len() >= 8, None),
        _ => return Sort::Tracked,
    };
    if !right || !headers.checksum_is_right(&packet.frame, optional) {
        return Sort::Invalid;
    }
    let kind = l4.first().copied().unwrap_or(0);
    match (headers.proto, kind) {
        (proto::ICMP, 3 | 4 | 5 | 11 | 12) => Sort::Error,
        (proto::ICMP, 19..) => Sort::Invalid,
        (proto::ICMPV6, 0..=127) => Sort::Error,
        // Multicast listeners, router and neighbour discovery (RFC 2710, RFC 4861, RFC 3810).
        (proto::ICMPV6, 130..=136 | 143) => Sort::Untracked,
        _ => Sort::Tracked,
    }
}

/// What a connection that begins with this packet remembers. None: none does.
pub fn begin(packet: &Packet, headers: &Headers, now: u64) -> Option<Protocol> {
    let l4 = headers.l4(packet.frame.bytes());
    Some(match headers.proto {
        proto::TCP => Protocol::Tcp(Box::new(Tcp::new(&Segment::parse(l4)?)?)),
        proto::SCTP => Protocol::Sctp(Sctp::new(l4)?),
        proto::UDP => Protocol::Udp {
            stream_from: now + STREAM_AFTER,
        },
        // Echo, timestamp, information and address mask requests; echo and node information queries.
        proto::ICMP if matches!(l4.first(), Some(8 | 13 | 15 | 17)) => Protocol::Icmp,
        proto::ICMPV6 if matches!(l4.first(), Some(128 | 139)) => Protocol::Icmp,
        proto::ICMP | proto::ICMPV6 => return None,
        proto::GRE => Protocol::Gre,
        _ => Protocol::Generic,
    })
}

/// What becomes of a packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It belongs to it.
    Accept,
    /// It belongs to none.
    Invalid,
    /// It begins a new connection where this one has ended.
    Reopen,
    /// It belongs to it, and ends it.
    Forget,
}

/// Shows a packet to its connection's protocol. Moves the connection's deadline, or its lifetime if it
/// isn't committed yet.
pub fn handle(
    connection: &Connection,
    state: &mut State,
    direction: Direction,
    packet: &Packet,
    headers: &Headers,
    defaults: &Timeouts,
    now: u64,
) -> Verdict {
    let l4 = headers.l4(packet.frame.bytes());
    let seen_reply = connection.is(status::SEEN_REPLY);
    let assured = connection.is(status::ASSURED);
    let policy = state.timeouts.clone();
    let own = policy.map(|policy| policy.timeouts());
    let timeouts = own.as_deref().unwrap_or(defaults);
    let (timeout, sure) = match &mut state.protocol {
        Protocol::Tcp(tcp) => {
            let Some(mut segment) = Segment::parse(l4) else {
                return Verdict::Invalid;
            };
            // Windows are kept in the numbers that each end itself sends: its segments are seen before
            // they are shifted, and what acknowledges them after.
            if connection.is(status::SEQ_ADJUST)
                && let Some(helper) = &state.helper
            {
                segment = segment.unshifted(helper.shift_acknowledged(direction, segment.ack));
            }
            match tcp.handle(direction, &segment, seen_reply, assured, timeouts) {
                tcp::Verdict::Accept { timeout, assured } => (timeout, assured),
                tcp::Verdict::Invalid => return Verdict::Invalid,
                tcp::Verdict::Reopen => return Verdict::Reopen,
                tcp::Verdict::Forget => return Verdict::Forget,
            }
        }
        Protocol::Sctp(sctp) => match sctp.handle(direction, l4, assured, timeouts) {
            sctp::Verdict::Accept { timeout, assured } => (Some(timeout), assured),
            sctp::Verdict::Invalid => return Verdict::Invalid,
        },
        Protocol::Udp { stream_from } => match (seen_reply, now > *stream_from) {
            (true, true) => (Some(timeouts.udp_stream), true),
            _ => (Some(timeouts.udp_single), false),
        },
        Protocol::Gre if seen_reply => (Some(timeouts.gre_stream), true),
        Protocol::Gre => (Some(timeouts.gre_single), false),
        Protocol::Icmp if headers.proto == proto::ICMPV6 => (Some(timeouts.icmpv6), false),
        Protocol::Icmp => (Some(timeouts.icmp), false),
        Protocol::Generic => (Some(timeouts.generic), false),
    };
    if sure {
        connection.set(status::ASSURED);
    }
    if let Some(timeout) = timeout {
        state.lifetime = timeout;
        if connection.is(status::CONFIRMED) {
            connection.set_deadline(now.saturating_add(timeout));
        }
    }
    let bytes = packet.frame.len().saturating_sub(headers.network) as u64;
    if let Some((packets, sum)) = state.counts.get_mut(direction.index()) {
        *packets += 1;
        *sum += bytes;
    }
    Verdict::Accept
}
