//! GRE (RFC 2784) with key and sequence number (RFC 2890), carrying Ethernet frames.
//!
//! ```text
//! |C| |K|S| Reserved0       | Ver |         Protocol Type         |
//! |      Checksum (optional)      |       Reserved1 (Optional)    |
//! |                         Key (optional)                        |
//! |                 Sequence Number (Optional)                    |
//! ```

use super::{ETH_P_TEB, Inner, Payload, Refused, TunnelKey, tunnel_flags, u16_at};
use crate::buffer::{Frame, FrameError};
use crate::checksum::checksum;

/// Bytes of the header without options.
pub const HEADER: usize = 4;
const WORD: usize = 4;

const CHECKSUM: u16 = 0x8000;
const KEY: u16 = 0x2000;
const SEQUENCE: u16 = 0x1000;

/// What a GRE header says, whatever it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of it.
    pub length: usize,
    /// Ethernet type of what it carries.
    pub protocol: u16,
    /// The key, if there is one.
    pub key: Option<u32>,
    /// There was a checksum.
    pub checksum: bool,
}

/// Reads the header that `packet` begins with, and checks the checksum over all of `packet` if there
/// is one, unless `vouched` says that somebody else has.
///
/// # Errors
/// [`Refused`].
pub fn header(packet: &[u8], vouched: bool) -> Result<Header, Refused> {
    let flags = u16_at(packet, 0)?;
    if flags & !(CHECKSUM | KEY | SEQUENCE) != 0 {
        return Err(Refused::Header);
    }
    let mut length = HEADER;
    let has_checksum = flags & CHECKSUM != 0;
    if has_checksum {
        length += WORD;
        if !vouched && checksum(packet) != 0 {
            return Err(Refused::Checksum);
        }
    }
    let mut key = None;
    if flags & KEY != 0 {
        let word = packet.get(length..).and_then(|rest| rest.first_chunk());
        key = Some(u32::from_be_bytes(*word.ok_or(Refused::Short)?));
        length += WORD;
    }
    if flags & SEQUENCE != 0 {
        length += WORD;
    }
    if length > packet.len() {
        return Err(Refused::Short);
    }
    Ok(Header {
        length,
        protocol: u16_at(packet, 2)?,
        key,
        checksum: has_checksum,
    })
}

/// Reads the header of a packet that carries an Ethernet frame. `vouched` as in [`header`].
///
/// # Errors
/// [`Refused`].
pub fn parse(packet: &[u8], vouched: bool, key: &mut TunnelKey) -> Result<Inner, Refused> {
    let header = header(packet, vouched)?;
    if header.protocol != ETH_P_TEB {
        return Err(Refused::Protocol);
    }
    if let Some(id) = header.key {
        key.id = u64::from(id).into();
        key.flags |= tunnel_flags::KEY;
    }
    if header.checksum {
        key.flags |= tunnel_flags::CSUM;
    }
    Ok(Inner {
        header: header.length,
        payload: Payload::Ethernet,
    })
}

/// How many bytes [`push`] puts in front.
pub fn length(key: &TunnelKey) -> usize {
    HEADER
        + if key.has(tunnel_flags::CSUM) { WORD } else { 0 }
        + if key.has(tunnel_flags::KEY) { WORD } else { 0 }
}

/// Puts the header in front of a frame that is complete: its checksum, if there is one, is over all of it.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn push(frame: &mut Frame, key: &TunnelKey) -> Result<(), FrameError> {
    let place = frame.push_front(length(key))?;
    let mut flags = 0;
    let mut words = place.chunks_exact_mut(WORD);
    let first = words.next();
    if key.has(tunnel_flags::CSUM) {
        flags |= CHECKSUM;
        words.next();
    }
    if key.has(tunnel_flags::KEY) {
        flags |= KEY;
        if let Some(word) = words.next() {
            let [_, _, _, _, id @ ..] = key.id.to_bytes();
            word.copy_from_slice(&id);
        }
    }
    if let Some(first) = first {
        let ([f0, f1], [t0, t1]) = (flags.to_be_bytes(), ETH_P_TEB.to_be_bytes());
        first.copy_from_slice(&[f0, f1, t0, t1]);
    }
    if flags & CHECKSUM != 0 {
        let sum = checksum(frame.bytes());
        if let Some(field) = frame.bytes_mut().get_mut(4..6) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(flags: u16) -> TunnelKey {
        TunnelKey {
            id: 0x1122_3344_5566_7788.into(),
            flags,
            ..TunnelKey::none()
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for flags in [
            0,
            tunnel_flags::KEY,
            tunnel_flags::CSUM,
            tunnel_flags::KEY | tunnel_flags::CSUM,
        ] {
            let mut frame = Frame::from_bytes(&[7; 21]);
            push(&mut frame, &key(flags)).unwrap();
            let mut read = TunnelKey::none();
            let inner = parse(frame.bytes(), false, &mut read).unwrap();
            assert_eq!(inner.header, length(&key(flags)));
            assert_eq!(read.flags, flags);
            let id = if flags & tunnel_flags::KEY == 0 {
                0
            } else {
                0x5566_7788
            };
            assert_eq!(read.id.get(), id);
            if flags & tunnel_flags::CSUM != 0 {
                frame.bytes_mut()[20] ^= 1;
                assert_eq!(
                    parse(frame.bytes(), false, &mut read),
                    Err(Refused::Checksum)
                );
            }
        }
    }

    #[test]
    fn a_sequence_number_is_passed_over() {
        let packet = [0x30, 0, 0x65, 0x58, 0, 0, 1, 0x23, 0, 0, 0, 5, 9];
        let mut read = TunnelKey::none();
        let inner = parse(&packet, false, &mut read).unwrap();
        assert_eq!((inner.header, read.id.get()), (12, 0x123));
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let refused = |packet: &[u8]| parse(packet, false, &mut TunnelKey::none());
        assert_eq!(refused(&[0, 0, 8, 0, 1, 2, 3, 4]), Err(Refused::Protocol));
        assert_eq!(refused(&[0, 1, 0x65, 0x58]), Err(Refused::Header));
        assert_eq!(refused(&[0x20, 0, 0x65, 0x58, 0]), Err(Refused::Short));
        assert_eq!(refused(&[0]), Err(Refused::Short));
    }
}
