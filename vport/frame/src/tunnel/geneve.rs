//! Geneve (RFC 8926).
//!
//! ```text
//! |Ver|  Opt Len  |O|C|    Rsvd.  |          Protocol Type        |
//! |        Virtual Network Identifier (VNI)       |    Reserved   |
//! |                    Variable-Length Options                    |
//! ```

use super::{ETH_P_TEB, Inner, Payload, Refused, TunnelKey, tunnel_flags};
use crate::buffer::{Frame, FrameError};

/// Bytes of the header without options.
pub const HEADER: usize = 8;
/// Bytes of options at most: 63 words.
pub const MAX_OPTIONS: usize = 63 * 4;

const VERSION: u8 = 0xc0;
const OAM: u8 = 0x80;
const CRITICAL: u8 = 0x40;

/// Reads the header that `bytes` begin with. Options are given as they are: a critical one too, which is
/// for the flow table to know.
///
/// # Errors
/// [`Refused`].
pub fn parse(bytes: &[u8], key: &mut TunnelKey) -> Result<Inner, Refused> {
    let header = bytes.first_chunk::<HEADER>().ok_or(Refused::Short)?;
    let [first, flags, t0, t1, v0, v1, v2, _reserved] = *header;
    if first & VERSION != 0 {
        return Err(Refused::Header);
    }
    if u16::from_be_bytes([t0, t1]) != ETH_P_TEB {
        return Err(Refused::Protocol);
    }
    let options = usize::from(first & !VERSION) * 4;
    let end = HEADER + options;
    let options = bytes.get(HEADER..end).ok_or(Refused::Short)?;
    key.id = u64::from(u32::from_be_bytes([0, v0, v1, v2])).into();
    key.flags |= tunnel_flags::KEY;
    if flags & OAM != 0 {
        key.flags |= tunnel_flags::OAM;
    }
    if flags & CRITICAL != 0 {
        key.flags |= tunnel_flags::CRIT_OPT;
    }
    if !options.is_empty() {
        key.set_options(tunnel_flags::GENEVE_OPT, options);
    }
    Ok(Inner {
        header: end,
        payload: Payload::Ethernet,
    })
}

/// How many bytes [`push`] puts in front.
pub fn length(key: &TunnelKey) -> usize {
    HEADER + options(key).len()
}

/// Puts the header in front of a frame.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn push(frame: &mut Frame, key: &TunnelKey) -> Result<(), FrameError> {
    let options = options(key);
    let [.., v0, v1, v2] = key.id.to_bytes();
    let [t0, t1] = ETH_P_TEB.to_be_bytes();
    let mut flags = 0;
    if key.has(tunnel_flags::OAM) {
        flags |= OAM;
    }
    if key.has(tunnel_flags::CRIT_OPT) {
        flags |= CRITICAL;
    }
    let place = frame.push_front(HEADER + options.len())?;
    if let Some((header, rest)) = place.split_first_chunk_mut::<HEADER>() {
        // At most 63 words.
        *header = [(options.len() / 4) as u8, flags, t0, t1, v0, v1, v2, 0];
        rest.copy_from_slice(options);
    }
    Ok(())
}

/// A key's Geneve options: whole words, as many as a header can say.
fn options(key: &TunnelKey) -> &[u8] {
    let options = match key.has(tunnel_flags::GENEVE_OPT) {
        true => key.options(),
        false => &[],
    };
    let len = (options.len() & !3).min(MAX_OPTIONS);
    options.get(..len).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(bytes: &[u8]) -> Result<(TunnelKey, Inner), Refused> {
        let mut key = TunnelKey::none();
        parse(bytes, &mut key).map(|inner| (key, inner))
    }

    #[test]
    fn a_header_is_read_and_written_again() {
        let mut longest = vec![0x3f, 0, 0x65, 0x58, 0, 1, 0x23, 0];
        longest.extend((0..MAX_OPTIONS).map(|n| n as u8));
        for bytes in [
            &[0, 0, 0x65, 0x58, 0, 1, 0x23, 0][..],
            &[0, 0x80, 0x65, 0x58, 0xff, 1, 0x23, 0],
            &[1, 0x40, 0x65, 0x58, 0, 1, 0x23, 0, 0xff, 0xff, 0x80, 0],
            &longest,
        ] {
            let (key, inner) = parsed(bytes).unwrap();
            assert_eq!((inner.header, length(&key)), (bytes.len(), bytes.len()));
            let mut frame = Frame::from_bytes(&[7; 20]);
            push(&mut frame, &key).unwrap();
            assert_eq!(&frame.bytes()[..bytes.len()], bytes);
            assert_eq!(frame.len(), bytes.len() + 20);
        }
    }

    #[test]
    fn what_is_not_geneve_is_refused() {
        let ip = [0, 0, 8, 0, 0, 1, 0x23, 0];
        assert_eq!(parsed(&ip), Err(Refused::Protocol));
        let version = [0x40, 0, 0x65, 0x58, 0, 1, 0x23, 0];
        assert_eq!(parsed(&version), Err(Refused::Header));
        let cut = [2, 0, 0x65, 0x58, 0, 1, 0x23, 0, 1, 2, 3, 4];
        assert_eq!(parsed(&cut), Err(Refused::Short));
    }
}
