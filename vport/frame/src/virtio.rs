//! The 10-byte `struct virtio_net_hdr` in front of a frame on a TAP (`IFF_VNET_HDR`) or a packet socket
//! (`PACKET_VNET_HDR`), in the machine's byte order, as both have it by default.
//!
//! Source: uapi `linux/virtio_net.h`.

use crate::offload::{Gso, GsoKind, Offload, PartialChecksum};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 10;

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Why a header can't be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioError {
    /// A `gso_type` that isn't known.
    GsoType(u8),
    /// Segments of no bytes.
    GsoSize,
    /// The checksum lies outside the frame.
    Checksum,
}

impl std::fmt::Display for VirtioError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::GsoType(kind) => write!(f, "unknown gso_type {kind:#x}"),
            Self::GsoSize => f.write_str("gso_size is zero"),
            Self::Checksum => f.write_str("checksum outside the frame"),
        }
    }
}

impl std::error::Error for VirtioError {}

/// What the header asks for, of a frame of `len` bytes behind it.
///
/// # Errors
/// [`VirtioError`]: the frame is to be dropped and counted.
pub fn decode(header: &[u8; HEADER_BYTES], len: usize) -> Result<Offload, VirtioError> {
    let [
        flags,
        gso_type,
        hl0,
        hl1,
        size0,
        size1,
        start0,
        start1,
        offset0,
        offset1,
    ] = *header;
    let mut offload = Offload {
        csum_valid: flags & F_DATA_VALID != 0,
        ..Offload::default()
    };
    if flags & F_NEEDS_CSUM != 0 {
        let csum = PartialChecksum {
            start: u16::from_ne_bytes([start0, start1]),
            offset: u16::from_ne_bytes([offset0, offset1]),
        };
        if csum.field() + 2 > len {
            return Err(VirtioError::Checksum);
        }
        offload.csum = Some(csum);
    }
    let kind = match gso_type & !GSO_ECN {
        GSO_NONE => return Ok(offload),
        GSO_TCPV4 => GsoKind::TcpV4,
        GSO_TCPV6 => GsoKind::TcpV6,
        GSO_UDP => GsoKind::UdpFragments,
        GSO_UDP_L4 => GsoKind::UdpL4,
        _ => return Err(VirtioError::GsoType(gso_type)),
    };
    let size = u16::from_ne_bytes([size0, size1]);
    if size == 0 {
        return Err(VirtioError::GsoSize);
    }
    let header_len = u16::from_ne_bytes([hl0, hl1]);
    offload.gso = Some(Gso {
        kind,
        ecn: gso_type & GSO_ECN != 0,
        size,
        header_len,
    });
    Ok(offload)
}

/// The header that goes in front of a frame with these offloads (the tag among the bytes, if the
/// receiver takes none out of band).
///
/// [`Gso::header_len`] goes out as it is. Kernels refuse one that is longer than the frame (`EINVAL`),
/// so that who sends it clips it first.
pub fn encode(offload: &Offload) -> [u8; HEADER_BYTES] {
    let mut flags = if offload.csum_valid { F_DATA_VALID } else { 0 };
    let (mut start, mut offset) = ([0; 2], [0; 2]);
    if let Some(csum) = offload.csum {
        flags = F_NEEDS_CSUM;
        start = csum.start.to_ne_bytes();
        offset = csum.offset.to_ne_bytes();
    }
    let (mut gso_type, mut header_len, mut size) = (GSO_NONE, [0; 2], [0; 2]);
    if let Some(gso) = offload.gso {
        gso_type = match gso.kind {
            GsoKind::TcpV4 => GSO_TCPV4,
            GsoKind::TcpV6 => GSO_TCPV6,
            GsoKind::UdpL4 => GSO_UDP_L4,
            GsoKind::UdpFragments => GSO_UDP,
        } | if gso.ecn { GSO_ECN } else { 0 };
        header_len = gso.header_len.to_ne_bytes();
        size = gso.size.to_ne_bytes();
    }
    let ([hl0, hl1], [size0, size1]) = (header_len, size);
    let ([start0, start1], [offset0, offset1]) = (start, offset);
    [
        flags, gso_type, hl0, hl1, size0, size1, start0, start1, offset0, offset1,
    ]
}
