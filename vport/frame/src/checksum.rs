//! Internet checksums (RFC 1071, RFC 1624) and SCTP's CRC32c (RFC 9260, appendix A).
//!
//! Sums are unfolded `u64` of big-endian words: sums of data of even length can be added. [`fold`] makes
//! 16 bits of one; a complete checksum field holds the complement of that, a partial one the sum itself.

use crate::buffer::Frame;
use crate::layout::{Layout, SCTP};

/// Offset of SCTP's CRC32c in its header; no other protocol keeps a checksum there.
const SCTP_CHECKSUM: u16 = 8;

/// The sum of `bytes`, an odd last byte padded with zero. At most 2^16 - 1.
pub fn sum(bytes: &[u8]) -> u64 {
    // In the machine's order and in four lanes that the compiler makes vectors of; the sum of swapped
    // words is the swapped sum (RFC 1071, 2.B). 32-bit words in 64-bit lanes don't overflow.
    let mut lanes = [0u64; 4];
    let mut blocks = bytes.chunks_exact(32);
    for block in blocks.by_ref() {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            *lane += halves(word.first_chunk().unwrap_or(&[0; 8]));
        }
    }
    let mut total = lanes.iter().sum::<u64>();
    let mut rest = blocks.remainder();
    while let Some((word, behind)) = rest.split_first_chunk::<8>() {
        total += halves(word);
        rest = behind;
    }
    if let Some((word, behind)) = rest.split_first_chunk::<4>() {
        total += u64::from(u32::from_ne_bytes(*word));
        rest = behind;
    }
    if let Some((word, behind)) = rest.split_first_chunk::<2>() {
        total += u64::from(u16::from_ne_bytes(*word));
        rest = behind;
    }
    if let [last] = rest {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    u64::from(u16::from_be(fold(total)))
}

/// The two 32-bit halves of eight bytes, added, in the machine's order.
#[inline]
fn halves(word: &[u8; 8]) -> u64 {
    let word = u64::from_ne_bytes(*word);
    (word & 0xffff_ffff) + (word >> 32)
}

/// Adds two sums, end around.
#[inline]
pub const fn add(a: u64, b: u64) -> u64 {
    let (added, carry) = a.overflowing_add(b);
    added + carry as u64
}

/// 16 bits of a sum, not complemented: what a partial checksum's field holds.
#[inline]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The complement of the folded sum of `bytes`: what a header's field holds if it was zero among them.
#[inline]
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// What goes into the field for a sum of 0xffff: zero there would mean "no checksum" for UDP (RFC 768),
/// and means the same as 0xffff everywhere else.
#[inline]
pub const fn nonzero(field: u16) -> u16 {
    if field == 0 { 0xffff } else { field }
}

/// The sum of an IPv4 pseudo header (RFC 9293, 3.1). `len`: bytes of the L4 header and its payload.
#[inline]
pub fn pseudo_v4(src: [u8; 4], dst: [u8; 4], proto: u8, len: usize) -> u64 {
    let addresses = u64::from(u32::from_be_bytes(src)) + u64::from(u32::from_be_bytes(dst));
    add(addresses, add(u64::from(proto), len as u64))
}

/// The sum of an IPv6 pseudo header (RFC 8200, 8.1). `len`: bytes of the L4 header and its payload.
#[inline]
pub fn pseudo_v6(src: &[u8; 16], dst: &[u8; 16], proto: u8, len: usize) -> u64 {
    add(add(sum(src), sum(dst)), add(u64::from(proto), len as u64))
}

/// A complete checksum's field after `old` bytes that it covers became `new` (RFC 1624, equation 3).
/// Both have the same even length and begin at an even offset of what is summed.
#[inline]
pub fn update(field: u16, old: &[u8], new: &[u8]) -> u16 {
    !update_partial(!field, old, new)
}

/// The same for a field that holds the sum itself, as a partial checksum's does.
#[inline]
pub fn update_partial(field: u16, old: &[u8], new: &[u8]) -> u16 {
    // Word by word: the complement of a whole sum would make a zero of a sum that isn't.
    let (mut total, mut old, mut new) = (u64::from(field), old, new);
    while let (Some((gone, old_rest)), Some((come, new_rest))) =
        (old.split_first_chunk::<4>(), new.split_first_chunk::<4>())
    {
        total += u64::from(!u32::from_be_bytes(*gone)) + u64::from(u32::from_be_bytes(*come));
        (old, new) = (old_rest, new_rest);
    }
    if let (Some(gone), Some(come)) = (old.first_chunk::<2>(), new.first_chunk::<2>()) {
        total += u64::from(!u16::from_be_bytes(*gone)) + u64::from(u16::from_be_bytes(*come));
    }
    fold(total)
}

/// SCTP's CRC32c over a packet from its common header on, the field taken as zero. The field holds it
/// in little-endian order. `None` if the header is cut short.
pub fn sctp(packet: &[u8]) -> Option<u32> {
    let (ports, rest) = packet.split_at_checked(usize::from(SCTP_CHECKSUM))?;
    let (_, chunks) = rest.split_at_checked(4)?;
    Some(crc32c::crc32c_append(
        crc32c::crc32c_append(crc32c::crc32c(ports), &[0; 4]),
        chunks,
    ))
}

/// A checksum is to be completed whose start or field is outside the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfFrame;

impl std::fmt::Display for OutOfFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a checksum is to be completed outside the frame")
    }
}

impl std::error::Error for OutOfFrame {}

/// Finishes the frame's partial checksum, if there is one, in place: [`Offload::csum`] is `None` then.
///
/// The sum covers all from `start` to the frame's end, so that a frame to be segmented is to be
/// segmented instead. A checksum at offset 8 is SCTP's CRC32c, unless the headers say otherwise.
///
/// [`Offload::csum`]: crate::Offload
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
    if csum.offset == SCTP_CHECKSUM && is_sctp(frame.bytes(), usize::from(csum.start)) {
        let crc = sctp(summed).ok_or(OutOfFrame)?;
        *field(frame, csum.field())? = crc.to_le_bytes();
    } else {
        let value = nonzero(!fold(sum(summed)));
        *field(frame, csum.field())? = value.to_be_bytes();
    }
    frame.offload.csum = None;
    Ok(())
}

fn field<const N: usize>(frame: &mut Frame, at: usize) -> Result<&mut [u8; N], OutOfFrame> {
    let field = frame
        .bytes_mut()
        .get_mut(at..)
        .and_then(|rest| rest.first_chunk_mut());
    field.ok_or(OutOfFrame)
}

/// Whether the header at `start` is SCTP's, as far as can be told: headers that say nothing about it
/// leave the checksum's offset as the only witness.
fn is_sctp(bytes: &[u8], start: usize) -> bool {
    match Layout::of_ethernet(bytes).or_else(|_| Layout::of_ip(bytes)) {
        Ok(layout) if layout.transport == start => layout.proto == SCTP,
        _ => true,
    }
}
