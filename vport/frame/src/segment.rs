//! Cutting a frame that stands for several into packets.
//!
//! # Contract
//! [`Segments::new`] looks at all headers and refuses what can't be cut; after that nothing can fail.
//! Each packet is complete: lengths, ids, flags, checksums. Everything in front of the IP header (tags,
//! labels, NSH) and the tag that is out of band is repeated in front of each. The headers' length that
//! the sender gave isn't looked at.

use crate::buffer::Frame;
use crate::checksum::{add, checksum, fold, nonzero, pseudo_v4, sum};
use crate::layout::{Layout, NoLayout, TCP, UDP};
use crate::offload::{Gso, GsoKind, Offload};
use crate::pool::Pool;

const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const FRAGMENT_HEADER: usize = 8;
const IPV6_HEADER: usize = 40;
/// What IP's length fields can say.
const MAX_IP: usize = 65_535;
const NEXT_FRAGMENT: u8 = 44;
/// Most packets that a frame may stand for. Linux makes no TCP segments below 8 bytes (its `TCP_MIN_GSO_SIZE`),
/// and at most 128 datagrams of one; but whoever writes virtio-net headers could ask for a packet a byte, each
/// with headers of its own, from one frame: fifty times the work and the bytes.
pub const MAX_SEGMENTS: usize = 65_536 / 8;

/// Offset of the flags in the TCP header, and the flags that aren't repeated.
const TCP_FLAGS: usize = 13;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Why a frame can't be cut: drop and count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentError {
    /// [`Offload::gso`] is absent.
    NotGso,
    /// Segments of no bytes, or of more than IP's length fields can say, or more than [`MAX_SEGMENTS`].
    Size,
    /// A header is cut short.
    Short,
    /// The headers aren't those that the kind of segmentation is for.
    Protocol,
}

impl std::fmt::Display for SegmentError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotGso => "not a packet to be segmented",
            Self::Size => "segments of no bytes, of too many, or too many segments",
            Self::Short => "a header is cut short",
            Self::Protocol => "headers don't fit the kind of segmentation",
        })
    }
}

impl std::error::Error for SegmentError {}

impl From<NoLayout> for SegmentError {
    fn from(reason: NoLayout) -> Self {
        match reason {
            NoLayout::Short => Self::Short,
            NoLayout::Protocol => Self::Protocol,
        }
    }
}

/// The packets that a frame stands for, one after the other.
#[derive(Debug)]
pub struct Segments<'a> {
    frame: &'a Frame,
    gso: Gso,
    layout: Layout,
    /// Bytes in front of what is cut: repeated.
    headers: usize,
    /// Bytes of what is cut in each packet but the last.
    size: usize,
    /// Bytes done of what is cut.
    done: usize,
    /// Packets done.
    index: usize,
    /// Packets in all.
    count: usize,
    /// UDP fragments: the datagram's length and checksum, and IPv6's identification.
    datagram: [u8; 4],
    ident: Option<u32>,
}

impl<'a> Segments<'a> {
    /// Of a frame that begins with an Ethernet header.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn new(frame: &'a Frame) -> Result<Self, SegmentError> {
        Self::with_layout(frame, Layout::of_ethernet(frame.bytes()))
    }

    /// Of a frame that begins with an IP header.
    ///
    /// # Errors
    /// [`SegmentError`].
    pub fn of_ip(frame: &'a Frame) -> Result<Self, SegmentError> {
        Self::with_layout(frame, Layout::of_ip(frame.bytes()))
    }

    fn with_layout(
        frame: &'a Frame,
        layout: Result<Layout, NoLayout>,
    ) -> Result<Self, SegmentError> {
        let gso = frame.offload.gso.ok_or(SegmentError::NotGso)?;
        let layout = layout?;
        // Whoever left the checksum to be done knew where the L4 header is; if that isn't where it was
        // found, something else was taken for IP (an Ethernet frame behind labels).
        if frame
            .offload
            .csum
            .is_some_and(|csum| usize::from(csum.start) != layout.transport)
        {
            return Err(SegmentError::Protocol);
        }
        let transport = frame.bytes().get(layout.transport..).unwrap_or_default();
        let headers = match (gso.kind, layout.proto) {
            (GsoKind::TcpV4, TCP) if !layout.v6 => layout.transport + tcp_header(transport)?,
            (GsoKind::TcpV6, TCP) if layout.v6 => layout.transport + tcp_header(transport)?,
            (GsoKind::UdpL4 | GsoKind::UdpFragments, UDP) if transport.len() < UDP_HEADER => {
                return Err(SegmentError::Short);
            }
            (GsoKind::UdpL4, UDP) => layout.transport + UDP_HEADER,
            (GsoKind::UdpFragments, UDP) => layout.fragmentable,
            _ => return Err(SegmentError::Protocol),
        };
        let size = usize::from(gso.size);
        // Offsets of fragments count in eights.
        let size = if gso.kind == GsoKind::UdpFragments {
            size & !7
        } else {
            size
        };
        if size == 0 {
            return Err(SegmentError::Size);
        }
        let cut = frame.len() - headers;
        let longest = headers - layout.network + cut.min(size) + FRAGMENT_HEADER;
        // A fragment's offset is that of a datagram of at most 64 KiB.
        if longest > MAX_IP || gso.kind == GsoKind::UdpFragments && cut > MAX_IP {
            return Err(SegmentError::Size);
        }
        let count = cut.div_ceil(size).max(1);
        if count > MAX_SEGMENTS {
            return Err(SegmentError::Size);
        }
        let mut segments = Self {
            frame,
            gso,
            layout,
            headers,
            size,
            done: 0,
            index: 0,
            count,
            datagram: [0; 4],
            ident: None,
        };
        if gso.kind == GsoKind::UdpFragments {
            segments.datagram = segments.length_and_checksum(transport);
        }
        Ok(segments)
    }

    /// How many packets are still to come.
    pub fn remaining(&self) -> usize {
        self.count - self.index
    }

    /// The next packet, in a buffer of `pool`.
    #[allow(clippy::should_implement_trait)] // The pool is needed in between for other things.
    pub fn next(&mut self, pool: &mut Pool) -> Option<Frame> {
        if self.index >= self.count {
            return None;
        }
        let bytes = self.frame.bytes();
        let fragment = self.gso.kind == GsoKind::UdpFragments && self.count > 1;
        let inserted = if fragment && self.layout.v6 {
            FRAGMENT_HEADER
        } else {
            0
        };
        let header = bytes.get(..self.headers)?;
        let payload = bytes.get(self.headers + self.done..)?;
        let payload = payload.get(..self.size).unwrap_or(payload);

        let start = self.headers + inserted;
        let mut packet = pool.take(start + payload.len());
        packet.set_len(start + payload.len());
        packet.vlan = self.frame.vlan;
        packet.class = self.frame.class;
        packet.tunnel.clone_from(&self.frame.tunnel);
        packet.offload = Offload {
            csum_valid: self.frame.offload.csum_valid,
            ..Offload::default()
        };
        let out = packet.bytes_mut();
        out.get_mut(..self.headers)?.copy_from_slice(header);
        out.get_mut(start..)?.copy_from_slice(payload);
        match self.gso.kind {
            GsoKind::TcpV4 | GsoKind::TcpV6 => self.finish_tcp(out)?,
            GsoKind::UdpL4 => self.finish_udp(out)?,
            GsoKind::UdpFragments => {
                if fragment && self.layout.v6 {
                    let ident = *self.ident.get_or_insert_with(|| pool.next_ident());
                    self.put_fragment_header(out, payload.len(), ident)?;
                }
                self.finish_fragment(out, start, payload.len(), fragment)?;
            }
        }
        self.finish_ip(out)?;
        self.done += payload.len();
        self.index += 1;
        Some(packet)
    }

    /// All that are still to come.
    pub fn frames<'s>(&'s mut self, pool: &'s mut Pool) -> impl Iterator<Item = Frame> + 's {
        std::iter::from_fn(move || self.next(pool))
    }

    fn is_last(&self) -> bool {
        self.index + 1 == self.count
    }

    /// The pseudo header's sum for `len` bytes of L4.
    fn pseudo(&self, len: usize) -> u64 {
        let header = self
            .frame
            .bytes()
            .get(self.layout.network..)
            .unwrap_or_default();
        if self.layout.v6 {
            let Some([_, _, _, _, _, _, _, _, addresses @ ..]) =
                header.first_chunk::<IPV6_HEADER>()
            else {
                return 0;
            };
            add(
                sum(addresses),
                add(u64::from(self.layout.proto), len as u64),
            )
        } else {
            let Some([_, _, _, _, _, _, _, _, _, _, _, _, a, b, c, d, e, f, g, h]) =
                header.first_chunk::<20>()
            else {
                return 0;
            };
            pseudo_v4([*a, *b, *c, *d], [*e, *f, *g, *h], self.layout.proto, len)
        }
    }

    fn finish_tcp(&self, out: &mut [u8]) -> Option<()> {
        let tcp = out.get_mut(self.layout.transport..)?;
        let pseudo = self.pseudo(tcp.len());
        let seq = tcp.get_mut(4..)?.first_chunk_mut::<4>()?;
        *seq = u32::from_be_bytes(*seq)
            .wrapping_add(self.done as u32)
            .to_be_bytes();
        let flags = tcp.get_mut(TCP_FLAGS)?;
        if !self.is_last() {
            *flags &= !FIN_PSH;
        }
        if self.index > 0 {
            *flags &= !CWR;
        }
        put_u16(tcp, 16, 0)?;
        let value = !fold(add(pseudo, sum(tcp)));
        put_u16(tcp, 16, value)
    }

    fn finish_udp(&self, out: &mut [u8]) -> Option<()> {
        let udp = out.get_mut(self.layout.transport..)?;
        put_u16(udp, 4, u16::try_from(udp.len()).ok()?)?;
        if self.has_no_checksum(udp) {
            return Some(());
        }
        put_u16(udp, 6, 0)?;
        let value = nonzero(!fold(add(self.pseudo(udp.len()), sum(udp))));
        put_u16(udp, 6, value)
    }

    /// A sender over IPv4 who wants no checksum (RFC 768): zero, and none is to be completed.
    fn has_no_checksum(&self, udp: &[u8]) -> bool {
        !self.layout.v6 && self.frame.offload.csum.is_none() && udp.get(6..8) == Some(&[0, 0])
    }

    fn length_and_checksum(&self, udp: &[u8]) -> [u8; 4] {
        let length = udp.len();
        let [l0, l1] = (length as u16).to_be_bytes();
        let (Some(ports), Some(data)) = (udp.get(..4), udp.get(8..)) else {
            return [0; 4];
        };
        let value = if self.has_no_checksum(udp) {
            0
        } else {
            let header = add(sum(ports), length as u64);
            nonzero(!fold(add(self.pseudo(length), add(header, sum(data)))))
        };
        let [c0, c1] = value.to_be_bytes();
        [l0, l1, c0, c1]
    }

    fn finish_fragment(
        &self,
        out: &mut [u8],
        start: usize,
        len: usize,
        fragment: bool,
    ) -> Option<()> {
        // The datagram's header may lie behind destination options, which are cut with the rest.
        let fields = self.layout.transport - self.headers + 4;
        for (at, byte) in (fields..).zip(self.datagram) {
            if let Some(at) = at.checked_sub(self.done).filter(|at| *at < len) {
                *out.get_mut(start + at)? = byte;
            }
        }
        if fragment && !self.layout.v6 {
            let more = if self.is_last() { 0 } else { 0x2000 };
            put_u16(out, self.layout.network + 6, (self.done / 8) as u16 | more)?;
        }
        Some(())
    }

    fn put_fragment_header(&self, out: &mut [u8], len: usize, ident: u32) -> Option<()> {
        debug_assert!(
            self.is_last() || len.is_multiple_of(8),
            "fragments are cut at eights"
        );
        let named = std::mem::replace(out.get_mut(self.layout.next_header_at)?, NEXT_FRAGMENT);
        let more = u16::from(!self.is_last());
        let [o0, o1] = (self.done as u16 & !7 | more).to_be_bytes();
        let [i0, i1, i2, i3] = ident.to_be_bytes();
        let header = out
            .get_mut(self.headers..)?
            .first_chunk_mut::<FRAGMENT_HEADER>()?;
        *header = [named, 0, o0, o1, i0, i1, i2, i3];
        Some(())
    }

    /// Lengths; IPv4's id and header checksum.
    fn finish_ip(&self, out: &mut [u8]) -> Option<()> {
        let ip = out.get_mut(self.layout.network..)?;
        let len = u16::try_from(ip.len()).ok()?;
        if self.layout.v6 {
            return put_u16(ip, 4, len.checked_sub(IPV6_HEADER as u16)?);
        }
        put_u16(ip, 2, len)?;
        if self.gso.kind != GsoKind::UdpFragments {
            let id = ip.get_mut(4..)?.first_chunk_mut::<2>()?;
            *id = u16::from_be_bytes(*id)
                .wrapping_add(self.index as u16)
                .to_be_bytes();
        }
        put_u16(ip, 10, 0)?;
        let value = checksum(ip.get(..self.layout.transport - self.layout.network)?);
        put_u16(ip, 10, value)
    }
}

fn put_u16(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

fn tcp_header(tcp: &[u8]) -> Result<usize, SegmentError> {
    let length = usize::from(*tcp.get(12).ok_or(SegmentError::Short)? >> 4) * 4;
    if length < TCP_HEADER {
        return Err(SegmentError::Protocol);
    }
    if length > tcp.len() {
        return Err(SegmentError::Short);
    }
    Ok(length)
}
