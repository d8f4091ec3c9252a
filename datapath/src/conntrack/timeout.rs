//! How long a connection lives without packets: nf_conntrack's defaults, or a policy's.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::tuple::{Family, Tuple};
use super::{sctp, tcp};

const SECOND: u64 = 1_000_000_000;

/// Nanoseconds by protocol and state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// By [`tcp::State`]'s number.
    pub tcp: [u64; 10],
    /// A TCP end repeats itself.
    pub tcp_retransmitted: u64,
    /// A TCP end has sent what the other hasn't acknowledged.
    pub tcp_unacknowledged: u64,
    /// By [`sctp::State`]'s number.
    pub sctp: [u64; 9],
    /// UDP without an answer.
    pub udp_single: u64,
    /// UDP with answers over more than two seconds.
    pub udp_stream: u64,
    /// GRE without an answer.
    pub gre_single: u64,
    /// GRE with answers.
    pub gre_stream: u64,
    /// ICMP queries.
    pub icmp: u64,
    /// ICMPv6 queries.
    pub icmpv6: u64,
    /// Other protocols.
    pub generic: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            // None, SynSent, SynRecv, Established, FinWait, CloseWait, LastAck, TimeWait, Close, SynSent2
            tcp: [0, 120, 60, 5 * 86_400, 120, 60, 30, 120, 10, 120].map(|s| s * SECOND),
            tcp_retransmitted: 300 * SECOND,
            tcp_unacknowledged: 300 * SECOND,
            // None, Closed, CookieWait, CookieEchoed, Established, ShutdownSent, ShutdownReceived,
            // ShutdownAckSent, HeartbeatSent
            sctp: [0, 10, 3, 3, 210, 3, 3, 3, 30].map(|s| s * SECOND),
            udp_single: 30 * SECOND,
            udp_stream: 120 * SECOND,
            gre_single: 30 * SECOND,
            gre_stream: 180 * SECOND,
            icmp: 30 * SECOND,
            icmpv6: 30 * SECOND,
            generic: 600 * SECOND,
        }
    }
}

/// A policy that a client made under a name: for connections of one family and one protocol.
///
/// Connections that began with it follow its changes, also when it has lost its name.
#[derive(Debug)]
pub struct Policy {
    /// IPv4 or IPv6.
    pub family: Family,
    /// IP protocol.
    pub proto: u8,
    timeouts: ArcSwap<Timeouts>,
}

impl Policy {
    /// Only the protocol's own timeouts count.
    pub fn new(family: Family, proto: u8, timeouts: Timeouts) -> Self {
        Self {
            family,
            proto,
            timeouts: ArcSwap::from_pointee(timeouts),
        }
    }

    /// Those in force.
    pub fn timeouts(&self) -> Arc<Timeouts> {
        self.timeouts.load_full()
    }

    /// Others from now on.
    pub fn replace(&self, timeouts: Timeouts) {
        self.timeouts.store(Arc::new(timeouts));
    }

    /// Whether it is meant for such connections.
    pub fn applies(&self, tuple: &Tuple) -> bool {
        self.family == tuple.family && self.proto == tuple.proto
    }
}

impl Timeouts {
    /// Of a TCP connection in that state.
    pub fn tcp(&self, state: tcp::State) -> u64 {
        let of = self.tcp.get(usize::from(state.number()));
        of.copied().unwrap_or(0)
    }

    /// Of an SCTP association in that state.
    pub fn sctp(&self, state: sctp::State) -> u64 {
        let of = self.sctp.get(usize::from(state.number()));
        of.copied().unwrap_or(0)
    }
}
