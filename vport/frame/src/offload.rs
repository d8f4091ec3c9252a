//! What a frame leaves to be done: a checksum to complete, a packet to segment.
//!
//! The meaning is that of virtio-net headers (uapi `linux/virtio_net.h`), which every port that
//! carries offloads speaks.

/// What a frame leaves to be done by whoever needs it done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The L4 checksum holds only the pseudo header's sum; the rest is to be added.
    pub csum: Option<PartialChecksum>,
    /// The frame stands for several.
    pub gso: Option<Gso>,
    /// The sender (a NIC, a peer on this host) vouches for the checksum.
    pub csum_valid: bool,
}

/// Where a checksum is to be completed (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// First byte summed, counted from the frame's first byte (the tag that is out of band not counted).
    pub start: u16,
    /// Where the sum goes, counted from `start`.
    pub offset: u16,
}

impl PartialChecksum {
    /// Where the sum goes, counted from the frame's first byte.
    #[inline]
    pub const fn field(self) -> usize {
        self.start as usize + self.offset as usize
    }
}

/// How to cut a frame into packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// Of which protocol.
    pub kind: GsoKind,
    /// TCP: CWR is set on the first segment only.
    pub ecn: bool,
    /// Payload bytes of each segment but the last.
    pub size: u16,
    /// Headers' length as the sender gave it: a hint, never trusted.
    pub header_len: u16,
}

/// `VIRTIO_NET_HDR_GSO_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP to be cut into datagrams (USO), IPv4 or IPv6.
    UdpL4,
    /// UDP to be cut into IP fragments (UFO): old senders only.
    UdpFragments,
}
