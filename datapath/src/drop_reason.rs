//! Why a packet was dropped: one name for each cause, and a counter behind each name.

/// Why a packet was dropped.
///
/// The first group has the names and the meaning of the kernel's `net/openvswitch/drop.h`; the
/// second is ours, for what in the kernel happens elsewhere (the socket, the device).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// The action list ended without handing the packet on; an empty list says "drop".
    LastAction,
    /// An action could not be carried out on this packet.
    ActionError,
    /// The `drop` action with no error.
    Explicit,
    /// The `drop` action with an error of the translation.
    ExplicitWithError,
    /// A meter's band.
    Meter,
    /// More than five action lists within each other.
    RecursionLimit,
    /// More than nine deferred action lists.
    DeferredLimit,
    /// A frame to be fragmented whose L2 header is too long.
    FragL2TooLong,
    /// A frame to be fragmented that is neither IPv4 nor IPv6.
    FragInvalidProto,
    /// Conntrack refused it.
    Conntrack,
    /// The time to live ran out.
    IpTtl,

    /// A frame whose tags, NSH header or offload fields contradict its length, or one that is to be cut into
    /// more packets than any sender makes of one (`frame::segment::MAX_SEGMENTS`).
    Malformed,
    /// An upcall, and nobody reads this port's upcalls.
    UpcallNoReader,
    /// An upcall, and the reader's queue is full.
    UpcallQueueFull,
    /// An upcall that netlink can't carry.
    UpcallTooBig,
    /// Output to a port number that no port has.
    OutputNoPort,
    /// Output of a packet without an Ethernet header to an Ethernet port.
    OutputNotEthernet,
    /// Longer than the port's MTU.
    OutputTooLong,
    /// The port's queue is full.
    OutputFull,
    /// The port's device is down.
    OutputDown,
    /// The port's device is gone.
    OutputGone,
    /// The port's device refused the frame for another reason.
    OutputError,
    /// Output to a tunnel of a packet that no `set(tunnel(...))` has told where to go.
    OutputNoTunnel,
    /// Output to a tunnel, and there is no route to where the packet is to go.
    OutputUnreachable,
    /// Came to a tunnel with a header that isn't the tunnel's.
    TunnelHeader,
    /// Came to a tunnel with a wrong checksum in front of the inner frame.
    TunnelChecksum,
    /// Came through a tunnel on which it met congestion that it can't tell of (RFC 6040).
    TunnelCongestion,
}

impl DropReason {
    /// All of them, in order of their numbers.
    pub const ALL: [Self; 27] = [
        Self::LastAction,
        Self::ActionError,
        Self::Explicit,
        Self::ExplicitWithError,
        Self::Meter,
        Self::RecursionLimit,
        Self::DeferredLimit,
        Self::FragL2TooLong,
        Self::FragInvalidProto,
        Self::Conntrack,
        Self::IpTtl,
        Self::Malformed,
        Self::UpcallNoReader,
        Self::UpcallQueueFull,
        Self::UpcallTooBig,
        Self::OutputNoPort,
        Self::OutputNotEthernet,
        Self::OutputTooLong,
        Self::OutputFull,
        Self::OutputDown,
        Self::OutputGone,
        Self::OutputError,
        Self::OutputNoTunnel,
        Self::OutputUnreachable,
        Self::TunnelHeader,
        Self::TunnelChecksum,
        Self::TunnelCongestion,
    ];

    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The name that people see: the kernel's, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LastAction => "last_action",
            Self::ActionError => "action_error",
            Self::Explicit => "explicit",
            Self::ExplicitWithError => "explicit_with_error",
            Self::Meter => "meter",
            Self::RecursionLimit => "recursion_limit",
            Self::DeferredLimit => "deferred_limit",
            Self::FragL2TooLong => "frag_l2_too_long",
            Self::FragInvalidProto => "frag_invalid_proto",
            Self::Conntrack => "conntrack",
            Self::IpTtl => "ip_ttl",
            Self::Malformed => "malformed",
            Self::UpcallNoReader => "upcall_no_reader",
            Self::UpcallQueueFull => "upcall_queue_full",
            Self::UpcallTooBig => "upcall_too_big",
            Self::OutputNoPort => "output_no_port",
            Self::OutputNotEthernet => "output_not_ethernet",
            Self::OutputTooLong => "output_too_long",
            Self::OutputFull => "output_full",
            Self::OutputDown => "output_down",
            Self::OutputGone => "output_gone",
            Self::OutputError => "output_error",
            Self::OutputNoTunnel => "output_no_tunnel",
            Self::OutputUnreachable => "output_unreachable",
            Self::TunnelHeader => "tunnel_header",
            Self::TunnelChecksum => "tunnel_checksum",
            Self::TunnelCongestion => "tunnel_congestion",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_in_order_of_the_numbers() {
        for (number, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, number);
        }
    }

    #[test]
    fn no_name_stands_for_two_reasons() {
        let names: std::collections::HashSet<_> =
            DropReason::ALL.iter().map(|r| r.name()).collect();
        assert_eq!(names.len(), DropReason::COUNT);
    }
}
