//! Where a frame's headers are, and the numbers that name them.
//!
//! Sources: uapi `linux/if_ether.h`, `linux/in.h`, `linux/in6.h`, `linux/openvswitch.h`.

/// Where a frame's headers are, as offsets from its first byte, and whether its key still says what the
/// bytes say. Kept right by [`crate::rewrite`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layers {
    /// The header behind the Ethernet header and the tags (MPLS, IP, ARP, NSH, ...). 0 in an L3 packet.
    pub network: u16,
    /// Where the L4 header begins, if the IP header says so: in a later IPv4 fragment payload is there,
    /// and the frame may end before the L4 header does.
    pub transport: Option<u16>,
    /// The type of what follows the addresses (the tag that is out of band not counted): a second tag's,
    /// else the key's `eth_type` (the kernel's `skb->protocol`).
    pub protocol: u16,
    /// Whether the key is that of the bytes. Pushing and popping MPLS, NSH and second tags leave the key
    /// stale; [`crate::extract::update`] makes it anew where it is needed (before a recirculation's lookup).
    pub key_valid: bool,
}

impl Layers {
    /// `n` bytes were put in front of the network header.
    pub(crate) fn moved_back(&mut self, n: u16) {
        self.network = self.network.saturating_add(n);
        self.transport = self.transport.and_then(|at| at.checked_add(n));
    }

    /// `n` bytes were taken away in front of the network header.
    pub(crate) fn moved_forward(&mut self, n: u16) {
        self.network = self.network.saturating_sub(n);
        self.transport = self.transport.and_then(|at| at.checked_sub(n));
    }
}

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;

/// Ethernet types.
pub(crate) mod eth_type {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    /// An Ethernet frame inside something else.
    pub const BRIDGED: u16 = 0x6558;
    pub const RARP: u16 = 0x8035;
    pub const IPV6: u16 = 0x86dd;
    pub const MPLS: u16 = 0x8847;
    pub const MPLS_MULTICAST: u16 = 0x8848;
    pub const NSH: u16 = 0x894f;
    /// Below this it is a length.
    pub const FIRST: u16 = 0x0600;
}

/// IP protocols and IPv6 extension headers.
pub(crate) mod ip_proto {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const NONE: u8 = 59;
    pub const DESTINATION: u8 = 60;
    pub const SCTP: u8 = 132;
}

/// Whether this next header value names a header that another may follow (or `NONE`), by which the
/// kernel's walk over the chain goes. ESP isn't among them: nothing behind it can be read.
#[inline]
pub(crate) const fn is_ipv6_extension(next: u8) -> bool {
    matches!(
        next,
        ip_proto::HOP_BY_HOP
            | ip_proto::ROUTING
            | ip_proto::FRAGMENT
            | ip_proto::AUTHENTICATION
            | ip_proto::NONE
            | ip_proto::DESTINATION
    )
}

/// Whether it is one of the two types of MPLS.
#[inline]
pub(crate) const fn is_mpls(ethertype: u16) -> bool {
    matches!(ethertype, eth_type::MPLS | eth_type::MPLS_MULTICAST)
}

/// The `N` bytes at `at`, if they are there.
#[inline]
pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..).and_then(|rest| rest.first_chunk())
}

/// The big-endian 16 bits at `at`, if they are there.
#[inline]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(|word| u16::from_be_bytes(*word))
}
