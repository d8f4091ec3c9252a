//! Where a frame's headers are, and their constants.

/// Where a frame's headers are, as offsets from its first byte, and whether its key still says what the
/// bytes say. Kept right by [`crate::rewrite`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layers {
    /// The header behind the Ethernet header and the tags (MPLS, IP, ARP, NSH, ...). 0 in an L3 packet.
    pub network: u16,
    /// The L4 header, if it was reached and the packet isn't a later fragment.
    pub transport: Option<u16>,
    /// The type of the first byte behind the addresses and the out-of-band tag: a tag's if there is a
    /// second one, else the key's `eth_type` (the kernel's `skb->protocol`).
    pub protocol: u16,
    /// Whether the key is that of the bytes. Pushing and popping MPLS, NSH and second tags leave the key
    /// stale; [`crate::extract::update`] makes it anew where it is needed (before a recirculation's lookup).
    pub key_valid: bool,
}
