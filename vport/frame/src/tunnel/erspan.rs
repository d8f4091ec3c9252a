//! ERSPAN types II and III (draft-foschiano-erspan), which Open vSwitch calls versions 1 and 2: a mirrored
//! Ethernet frame behind a GRE header with a sequence number.
//!
//! ```text
//! |  Ver  |          VLAN         | COS |En/BSO|T|    Session ID     |
//! |      Reserved         |                  Index                |    type II
//! |                          Timestamp                            |    type III
//! |             SGT               |P|    FT   |   Hw ID   |D|Gra|O|    type III
//! ```

use super::{Inner, Payload, Refused, TunnelKey, ecn, gre, tunnel_flags, u16_at};
use crate::buffer::{Frame, FrameError};

/// `ETH_P_ERSPAN`: type II.
pub const ETH_P_ERSPAN: u16 = 0x88be;
/// `ETH_P_ERSPAN2`: type III.
pub const ETH_P_ERSPAN2: u16 = 0x22eb;

/// GRE's header with a sequence number.
const GRE: usize = 8;
const GRE_SEQUENCE: u16 = 0x1000;
const BASE: usize = 4;
const INDEX_MASK: u32 = 0xf_ffff;
const SESSION_MASK: u32 = 0x3ff;
/// `enum erspan_encap_type`: the tag is in the frame.
const IN_FRAME: u32 = 3;
/// `enum erspan_bso`: shorter or longer than an Ethernet frame may be.
const SHORT: u32 = 1;
const OVERSIZED: u32 = 2;
const ETH_ZLEN: usize = 60;
const ETH_FRAME_LEN: usize = 1514;
/// Type III: the frame's type is told (Ethernet), timestamps count in 100 us, there is no subheader.
const MD2_P: u8 = 0x80;
const MD2_DIRECTION: u8 = 0x08;
/// Of the hardware id: two bits in the first byte, four in the second.
const HWID_UPPER: u8 = 0x03;
const HWID_LOWER: u8 = 0xf0;

/// Bytes of `struct erspan_metadata`: the version in host order, then what is behind the base header as on the
/// wire, with zeros behind.
const METADATA: usize = 12;

/// What a header has that changes from frame to frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// GRE's sequence number.
    pub sequence: u32,
    /// In units of 100 us.
    pub time: u32,
}

/// Bytes behind the base header of a version.
const fn metadata(version: u32) -> Option<usize> {
    match version {
        1 => Some(4),
        2 => Some(8),
        _ => None,
    }
}

/// Reads the headers of a packet that begins with GRE's. `vouched` as in [`gre::header`].
///
/// # Errors
/// [`Refused`].
pub fn parse(packet: &[u8], vouched: bool, key: &mut TunnelKey) -> Result<Inner, Refused> {
    let gre = gre::header(packet, vouched)?;
    let rest = packet.get(gre.length..).ok_or(Refused::Short)?;
    let (first, session) = (u16_at(rest, 0)?, u16_at(rest, 2)?);
    let version = u32::from(first >> 12);
    match (gre.protocol, version) {
        (ETH_P_ERSPAN, 1) | (ETH_P_ERSPAN2, 2) => {}
        (ETH_P_ERSPAN | ETH_P_ERSPAN2, _) => return Err(Refused::Header),
        _ => return Err(Refused::Protocol),
    }
    let length = metadata(version).ok_or(Refused::Header)?;
    let data = rest.get(BASE..BASE + length).ok_or(Refused::Short)?;
    let mut options = [0; METADATA];
    options[..4].copy_from_slice(&version.to_ne_bytes());
    options[4..4 + length].copy_from_slice(data);
    key.set_options(tunnel_flags::ERSPAN_OPT, &options);
    key.id = (u64::from(session) & u64::from(SESSION_MASK)).into();
    key.flags |= tunnel_flags::KEY;
    if gre.checksum {
        key.flags |= tunnel_flags::CSUM;
    }
    Ok(Inner {
        header: gre.length + BASE + length,
        payload: Payload::Ethernet,
    })
}

/// The version that a key asks for, and what follows it; None: it isn't a key for ERSPAN.
fn wanted(key: &TunnelKey) -> Option<(u32, [u8; 8])> {
    let options = key.options();
    let version = u32::from_ne_bytes(*options.first_chunk()?);
    let data = options.get(4..)?.first_chunk()?;
    (key.has(tunnel_flags::ERSPAN_OPT) && metadata(version).is_some()).then_some((version, *data))
}

/// How many bytes [`push`] puts in front.
pub fn length(key: &TunnelKey) -> usize {
    let version = wanted(key).map(|(version, _)| version);
    GRE + BASE + version.and_then(metadata).unwrap_or(0)
}

/// Puts the headers in front of a frame. False: the key isn't one for ERSPAN.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn push(frame: &mut Frame, key: &TunnelKey, stamp: Stamp) -> Result<bool, FrameError> {
    let Some((version, data)) = wanted(key) else {
        return Ok(false);
    };
    let bytes = frame.bytes();
    let (mut tag, mut encapsulation) = (0, 0);
    if u16_at(bytes, 12) == Ok(0x8100) {
        tag = u32::from(u16_at(bytes, 14).unwrap_or(0)) & 0xfff;
        encapsulation = IN_FRAME;
    }
    if version == 2 {
        encapsulation = match frame.len() {
            ..ETH_ZLEN => SHORT,
            ETH_ZLEN..=ETH_FRAME_LEN => 0,
            _ => OVERSIZED,
        };
    }
    let class = u32::from(ecn::of_frame(bytes) >> 5);
    let session = key.id.get() as u32 & SESSION_MASK;
    let base = version << 28 | tag << 16 | class << 13 | encapsulation << 11 | session;
    let protocol = match version {
        1 => ETH_P_ERSPAN,
        _ => ETH_P_ERSPAN2,
    };
    let mut header = Vec::with_capacity(GRE + BASE + 8);
    header.extend_from_slice(&GRE_SEQUENCE.to_be_bytes());
    header.extend_from_slice(&protocol.to_be_bytes());
    header.extend_from_slice(&stamp.sequence.to_be_bytes());
    header.extend_from_slice(&base.to_be_bytes());
    match (version, data) {
        (1, [i0, i1, i2, i3, ..]) => {
            let index = u32::from_be_bytes([i0, i1, i2, i3]) & INDEX_MASK;
            header.extend_from_slice(&index.to_be_bytes());
        }
        (_, [_, _, _, _, _, _, upper, lower]) => {
            header.extend_from_slice(&stamp.time.to_be_bytes());
            let upper = MD2_P | upper & HWID_UPPER;
            let lower = lower & (HWID_LOWER | MD2_DIRECTION);
            header.extend_from_slice(&[0, 0, upper, lower]);
        }
    }
    frame.push_front(header.len())?.copy_from_slice(&header);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(version: u32, data: [u8; 8]) -> TunnelKey {
        let mut key = TunnelKey::none();
        key.id = 0x123.into();
        let mut options = [0; METADATA];
        options[..4].copy_from_slice(&version.to_ne_bytes());
        options[4..].copy_from_slice(&data);
        key.set_options(tunnel_flags::ERSPAN_OPT, &options);
        key
    }

    const STAMP: Stamp = Stamp {
        sequence: 7,
        time: 0x0102_0304,
    };

    #[test]
    fn type_two_is_written_and_read() {
        let key = key(1, [0, 0x0f, 0x12, 0x34, 0, 0, 0, 0]);
        let mut bytes = vec![0; 64];
        bytes[12..18].copy_from_slice(&[0x81, 0, 0x60, 0x64, 8, 0]);
        let mut frame = Frame::from_bytes(&bytes);
        assert_eq!(push(&mut frame, &key, STAMP), Ok(true));
        let header = [
            0x10, 0, 0x88, 0xbe, 0, 0, 0, 7, 0x10, 0x64, 0x19, 0x23, 0, 0x0f, 0x12, 0x34,
        ];
        assert_eq!(&frame.bytes()[..16], &header);
        assert_eq!(length(&key), 16);
        let mut read = TunnelKey::none();
        let inner = parse(frame.bytes(), false, &mut read).unwrap();
        assert_eq!((inner.header, read.id.get()), (16, 0x123));
        assert_eq!(read.options(), key.options());
    }

    #[test]
    fn type_three_is_written_and_read() {
        let key = key(2, [0, 0, 0, 0, 0, 0, 0x02, 0x58]);
        let mut frame = Frame::from_bytes(&[0; 64]);
        assert_eq!(push(&mut frame, &key, STAMP), Ok(true));
        let header = [
            0x10, 0, 0x22, 0xeb, 0, 0, 0, 7, 0x20, 0, 0x01, 0x23, 1, 2, 3, 4, 0, 0, 0x82, 0x58,
        ];
        assert_eq!(&frame.bytes()[..20], &header);
        let mut read = TunnelKey::none();
        let inner = parse(frame.bytes(), false, &mut read).unwrap();
        assert_eq!((inner.header, read.id.get()), (20, 0x123));
        assert_eq!(read.options()[4..], [1, 2, 3, 4, 0, 0, 0x82, 0x58]);
    }

    #[test]
    fn what_is_not_erspan_is_refused() {
        let refused = |packet: &[u8]| parse(packet, false, &mut TunnelKey::none());
        let gre = [0, 0, 0x65, 0x58, 1, 2, 3, 4];
        assert_eq!(refused(&gre), Err(Refused::Protocol));
        let version = [0x10, 0, 0x88, 0xbe, 0, 0, 0, 7, 0x20, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(refused(&version), Err(Refused::Header));
        let cut = [0x10, 0, 0x88, 0xbe, 0, 0, 0, 7, 0x10, 0, 0, 0, 0, 0];
        assert_eq!(refused(&cut), Err(Refused::Short));
        let mut frame = Frame::from_bytes(&[0; 64]);
        assert_eq!(push(&mut frame, &TunnelKey::none(), STAMP), Ok(false));
        assert_eq!(push(&mut frame, &key(3, [0; 8]), STAMP), Ok(false));
        assert_eq!(frame.len(), 64);
    }
}
