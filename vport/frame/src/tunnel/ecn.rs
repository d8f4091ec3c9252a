//! Congestion notification through tunnels (RFC 6040), and the bits that it is about.

use super::Refused;
use crate::buffer::Frame;
use crate::checksum::fold;

/// The two bits of a type of service or traffic class.
pub const MASK: u8 = 0x03;
const NOT_CAPABLE: u8 = 0;
const ECT_0: u8 = 2;
const EXPERIENCED: u8 = 3;

/// The outer type of service for a packet: the bits above are `tos`'s, those of congestion the inner
/// packet's, except that what has met congestion already starts anew (normal mode of RFC 3168, as the
/// kernel does it).
pub const fn encapsulate(tos: u8, inner: u8) -> u8 {
    let bits = match inner & MASK {
        EXPERIENCED => ECT_0,
        bits => bits,
    };
    tos & !MASK | bits
}

/// The type of service or traffic class of the IP packet in an Ethernet frame, behind tags; 0 where there
/// is none.
pub fn of_frame(bytes: &[u8]) -> u8 {
    match locate(bytes) {
        Some((at, false)) => bytes.get(at + 1).copied().unwrap_or(0),
        Some((at, true)) => match bytes.get(at..at + 2) {
            Some([a, b]) => a << 4 | b >> 4,
            _ => 0,
        },
        None => 0,
    }
}

/// What the outer header of a packet met on the way is told to the inner one.
///
/// # Errors
/// [`Refused::Congestion`].
pub fn decapsulate(outer: u8, frame: &mut Frame) -> Result<(), Refused> {
    if outer & MASK != EXPERIENCED {
        return Ok(());
    }
    let Some((at, v6)) = locate(frame.bytes()) else {
        return Ok(());
    };
    let inner = of_frame(frame.bytes()) & MASK;
    match inner {
        NOT_CAPABLE => return Err(Refused::Congestion),
        EXPERIENCED => return Ok(()),
        _ => {}
    }
    let bytes = frame.bytes_mut().get_mut(at..).unwrap_or_default();
    if v6 {
        if let Some(byte) = bytes.get_mut(1) {
            *byte |= EXPERIENCED << 4;
        }
    } else if let Some(header) = bytes.first_chunk_mut::<20>() {
        header[1] |= EXPERIENCED;
        // The sum grows by what the byte grew (RFC 1624).
        let sum = !u16::from_be_bytes([header[10], header[11]]);
        let grown = u64::from(sum) + u64::from(EXPERIENCED - inner);
        [header[10], header[11]] = (!fold(grown)).to_be_bytes();
    }
    Ok(())
}

/// Where the IP header of an Ethernet frame is, and whether it is IPv6's.
pub(super) fn locate(bytes: &[u8]) -> Option<(usize, bool)> {
    let mut at = 12;
    loop {
        let kind = bytes.get(at..)?.first_chunk()?;
        at += 2;
        match u16::from_be_bytes(*kind) {
            0x8100 | 0x88a8 => at += 2,
            0x0800 => return Some((at, false)).filter(|_| bytes.len() >= at + 20),
            0x86dd => return Some((at, true)).filter(|_| bytes.len() >= at + 40),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::checksum;

    fn v4(tos: u8) -> Frame {
        let mut bytes = vec![0; 34];
        bytes[12..16].copy_from_slice(&[8, 0, 0x45, tos]);
        bytes[18..22].copy_from_slice(&[0x12, 0x34, 0xff, 0xff]);
        let sum = checksum(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        Frame::from_bytes(&bytes)
    }

    fn v6(class: u8) -> Frame {
        let mut bytes = vec![0; 58];
        bytes[12..16].copy_from_slice(&[0x86, 0xdd, 0x60 | class >> 4, class << 4 | 5]);
        Frame::from_bytes(&bytes)
    }

    /// RFC 6040, figure 4, with the kernel's choice for ECT(1).
    #[test]
    fn every_pair_of_marks_gives_what_the_rfc_says() {
        for outer in 0..4_u8 {
            for inner in 0..4_u8 {
                for mut frame in [v4(inner | 0x40), v6(inner | 0x40)] {
                    let told = decapsulate(outer | 0xb8, &mut frame);
                    let expected = match (outer, inner) {
                        (3, 0) => Err(Refused::Congestion),
                        (3, _) => Ok(3),
                        (_, inner) => Ok(inner),
                    };
                    let seen = of_frame(frame.bytes());
                    assert_eq!(told.map(|()| seen & MASK), expected, "{outer} {inner}");
                    assert_eq!(seen & !MASK, 0x40);
                    if frame.bytes()[12] == 8 {
                        assert_eq!(checksum(&frame.bytes()[14..34]), 0);
                    }
                }
            }
        }
    }

    #[test]
    fn marks_go_out_with_the_packet_but_congestion_starts_anew() {
        assert_eq!(encapsulate(0xff, 0), 0xfc);
        assert_eq!(encapsulate(0, 1), 1);
        assert_eq!(encapsulate(0xb8, 3), 0xba);
    }

    #[test]
    fn what_is_no_ip_packet_passes() {
        let mut arp = Frame::from_bytes(&[8; 60]);
        assert_eq!(decapsulate(3, &mut arp), Ok(()));
        let mut cut = Frame::from_bytes(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0x45]);
        assert_eq!(decapsulate(3, &mut cut), Ok(()));
    }
}
