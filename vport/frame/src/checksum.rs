//! Internet checksums (RFC 1071, RFC 1624) and SCTP's CRC32c (RFC 9260, appendix A).
//!
//! Sums are kept as `u64` of big-endian 16-bit words, not yet folded: adding two sums adds their data
//! (of even length). [`fold`] makes 16 bits of it; the field holds the complement.

use crate::buffer::Frame;

/// The unfolded sum of `bytes`, an odd last byte padded with zero.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(8);
    let mut total: u64 = 0;
    for word in words.by_ref() {
        if let Some(word) = word.first_chunk::<8>() {
            let (added, carry) = total.overflowing_add(u64::from_be_bytes(*word));
            total = added + u64::from(carry);
        }
    }
    let mut last = [0; 8];
    for (into, byte) in last.iter_mut().zip(words.remainder()) {
        *into = *byte;
    }
    add(total, u64::from_be_bytes(last))
}

/// Adds two unfolded sums, end around.
#[inline]
pub const fn add(a: u64, b: u64) -> u64 {
    let (added, carry) = a.overflowing_add(b);
    added + carry as u64
}

/// 16 bits of an unfolded sum. Not complemented: this is what a partial checksum's field holds.
#[inline]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The field's value over `bytes`: complement of the folded sum.
#[inline]
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// The unfolded sum of an IPv4 pseudo header (RFC 9293, 3.1). `len`: of the L4 header and payload.
pub fn pseudo_v4(src: [u8; 4], dst: [u8; 4], proto: u8, len: usize) -> u64 {
    let addresses = u64::from(u32::from_be_bytes(src)) + u64::from(u32::from_be_bytes(dst));
    add(addresses, u64::from(proto) + len as u64)
}

/// The unfolded sum of an IPv6 pseudo header (RFC 8200, 8.1). `len`: of the L4 header and payload.
pub fn pseudo_v6(src: &[u8; 16], dst: &[u8; 16], proto: u8, len: usize) -> u64 {
    add(add(sum(src), sum(dst)), u64::from(proto) + len as u64)
}

/// A checksum field after `old` bytes that it covers became `new` (RFC 1624, equation 3). Both begin at
/// an even offset of what is summed and have the same, even, length.
pub fn update(field: u16, old: &[u8], new: &[u8]) -> u16 {
    !fold(add(
        add(u64::from(!field), !fold(sum(old)) as u64),
        sum(new),
    ))
}

/// The same for a field that holds an uncomplemented sum, as a partial checksum's does.
pub fn update_partial(field: u16, old: &[u8], new: &[u8]) -> u16 {
    fold(add(add(u64::from(field), !fold(sum(old)) as u64), sum(new)))
}

/// Why a checksum couldn't be completed: its start or its field is outside the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfFrame;

impl std::fmt::Display for OutOfFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a checksum to be completed outside the frame")
    }
}

impl std::error::Error for OutOfFrame {}

/// Finishes a partial checksum, if the frame has one, in place. SCTP's (told by the IP header) is a CRC32c.
///
/// A computed zero is written as 0xffff (RFC 768: zero means none; for TCP both mean the same).
///
/// # Errors
/// [`OutOfFrame`]; the frame isn't changed.
pub fn complete_checksum(frame: &mut Frame) -> Result<(), OutOfFrame> {
    let Some(csum) = frame.offload.csum else {
        return Ok(());
    };
    let summed = frame
        .bytes()
        .get(usize::from(csum.start)..)
        .ok_or(OutOfFrame)?;
    let value = match !fold(sum(summed)) {
        0 => 0xffff,
        value => value,
    };
    let field = frame
        .bytes_mut()
        .get_mut(csum.field()..)
        .and_then(|rest| rest.first_chunk_mut());
    *field.ok_or(OutOfFrame)? = value.to_be_bytes();
    frame.offload.csum = None;
    Ok(())
}
