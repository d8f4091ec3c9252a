//! Where a packet's headers are, and what tuple they make. Nothing is believed that isn't there.

use frame::checksum::{add, fold, pseudo_v4, pseudo_v6, sctp, sum};
use frame::{Frame, PartialChecksum};

use super::tuple::{Family, Tuple, proto, wide};
use crate::packet::Packet;

/// Ethernet types.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// Where an IP packet's headers are, in bytes from the frame's first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// IPv4 or IPv6.
    pub family: Family,
    /// Of the L4 header.
    pub proto: u8,
    /// The IP header.
    pub network: usize,
    /// The L4 header.
    pub transport: usize,
}

/// The family of a packet; None: neither.
pub fn family(packet: &Packet) -> Option<Family> {
    match packet.key.eth_type.get() {
        IPV4 => Some(Family::V4),
        IPV6 => Some(Family::V6),
        _ => None,
    }
}

impl Headers {
    /// Of a packet whose key is that of its bytes, and which is no fragment. None: its L4 header can't
    /// be found.
    pub fn of(packet: &Packet) -> Option<Self> {
        let transport = usize::from(packet.layers.transport?);
        (transport <= packet.frame.len()).then_some(Self {
            family: family(packet)?,
            proto: packet.key.ip_proto,
            network: usize::from(packet.layers.network),
            transport,
        })
    }

    /// Of the IP packet at `network`, which may be cut short behind its L4 header's first bytes (the
    /// packet that an ICMP error is about).
    pub fn quoted(bytes: &[u8], network: usize, family: Family) -> Option<Self> {
        let (proto, transport) = match family {
            Family::V4 => {
                let header = array::<20>(bytes, network)?;
                let length = usize::from(header[0] & 0xf) * 4;
                let fragment = u16::from_be_bytes([header[6], header[7]]);
                if header[0] >> 4 != 4 || length < 20 || fragment & 0x1fff != 0 {
                    return None;
                }
                (header[9], network + length)
            }
            Family::V6 => {
                let header = array::<40>(bytes, network)?;
                if header[0] >> 4 != 6 {
                    return None;
                }
                let (mut next, mut at) = (header[6], network + 40);
                loop {
                    let length = match next {
                        0 | 43 | 60 => (usize::from(array::<2>(bytes, at)?[1]) + 1) * 8,
                        51 => (usize::from(array::<2>(bytes, at)?[1]) + 2) * 4,
                        44 => {
                            let [_, _, o0, o1] = *array::<4>(bytes, at)?;
                            if u16::from_be_bytes([o0, o1]) & !7 != 0 {
                                return None;
                            }
                            8
                        }
                        _ => break,
                    };
                    next = array::<1>(bytes, at)?[0];
                    at += length;
                }
                (next, at)
            }
        };
        (transport <= bytes.len()).then_some(Self {
            family,
            proto,
            network,
            transport,
        })
    }

    /// The tuple of these headers in a zone. None: cut short.
    pub fn tuple(&self, bytes: &[u8], zone: u16) -> Option<Tuple> {
        let (src, dst) = match self.family {
            Family::V4 => (
                wide(*array(bytes, self.network + 12)?),
                wide(*array(bytes, self.network + 16)?),
            ),
            Family::V6 => (
                *array(bytes, self.network + 8)?,
                *array(bytes, self.network + 24)?,
            ),
        };
        let (src_port, dst_port) = match self.proto {
            proto::TCP | proto::UDP | proto::SCTP => {
                let [s0, s1, d0, d1] = *array(bytes, self.transport)?;
                (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]))
            }
            proto::ICMP | proto::ICMPV6 => {
                let [kind, code, _, _, i0, i1, _, _] = *array(bytes, self.transport)?;
                (
                    u16::from_be_bytes([i0, i1]),
                    u16::from_be_bytes([kind, code]),
                )
            }
            proto::GRE => (0, gre_key(bytes.get(self.transport..)?)?),
            _ => (0, 0),
        };
        Some(Tuple {
            src,
            dst,
            src_port,
            dst_port,
            zone,
            proto: self.proto,
            family: self.family,
        })
    }

    /// From the L4 header to the packet's end.
    pub fn l4<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        bytes.get(self.transport..).unwrap_or_default()
    }

    /// Whether the L4 checksum is right, or nobody needs to look: it is still to be completed, the
    /// sender vouches for it, or there is none. `optional`: zero means none.
    pub fn checksum_is_right(&self, frame: &Frame, optional: Option<usize>) -> bool {
        let offload = &frame.offload;
        if offload.csum_valid || offload.gso.is_some() {
            return true;
        }
        let start = self.transport;
        if offload
            .csum
            .is_some_and(|PartialChecksum { start: at, .. }| usize::from(at) == start)
        {
            return true;
        }
        let l4 = self.l4(frame.bytes());
        if let Some(at) = optional
            && array::<2>(l4, at) == Some(&[0, 0])
        {
            return true;
        }
        if self.proto == proto::SCTP {
            let told = array::<4>(l4, 8).map(|crc| u32::from_le_bytes(*crc));
            return told.is_some() && told == sctp(l4);
        }
        let pseudo = match (self.family, self.proto) {
            (_, proto::ICMP) => Some(0),
            (Family::V4, _) => {
                let src = array(frame.bytes(), self.network + 12);
                let dst = array(frame.bytes(), self.network + 16);
                src.zip(dst)
                    .map(|(src, dst)| pseudo_v4(*src, *dst, self.proto, l4.len()))
            }
            (Family::V6, _) => {
                let src = array(frame.bytes(), self.network + 8);
                let dst = array(frame.bytes(), self.network + 24);
                src.zip(dst)
                    .map(|(src, dst)| pseudo_v6(src, dst, self.proto, l4.len()))
            }
        };
        pseudo.is_some_and(|pseudo| fold(add(pseudo, sum(l4))) == 0xffff)
    }
}

/// What is known of a GRE packet besides its addresses: nothing, but the call that an enhanced header
/// (version 1, RFC 2637) belongs to. As no helper says which call answers which, each way is a connection
/// of its own. None: version 1, and no PPP in it.
fn gre_key(gre: &[u8]) -> Option<u16> {
    /// PPP, the only protocol that version 1 carries.
    const PPP: [u8; 2] = [0x88, 0x0b];
    let Some(&[_, flags, p0, p1]) = gre.first_chunk() else {
        return Some(0);
    };
    if flags & 7 != 1 {
        return Some(0);
    }
    let call = array::<2>(gre, 6).filter(|_| [p0, p1] == PPP)?;
    Some(u16::from_be_bytes(*call))
}

/// Cuts off what is behind the IP packet (padding), as its header says. A length that says nothing
/// sensible changes nothing.
pub fn trim(packet: &mut Packet) {
    let network = usize::from(packet.layers.network);
    let bytes = packet.frame.bytes();
    let length = match family(packet) {
        Some(Family::V4) => array::<2>(bytes, network + 2)
            .map_or(0, |length| usize::from(u16::from_be_bytes(*length))),
        Some(Family::V6) => array::<2>(bytes, network + 4)
            .map(|length| usize::from(u16::from_be_bytes(*length)))
            .filter(|length| *length != 0 || packet.frame.offload.gso.is_none())
            .map_or(0, |length| length + 40),
        None => 0,
    };
    if length >= 20 && packet.frame.offload.gso.is_none() {
        packet.frame.truncate(network + length);
    }
}

/// The `N` bytes at `at`, if they are there.
#[inline]
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..).and_then(|rest| rest.first_chunk())
}

/// The same, to be changed.
#[inline]
pub fn array_mut<const N: usize>(bytes: &mut [u8], at: usize) -> Option<&mut [u8; N]> {
    bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut())
}
