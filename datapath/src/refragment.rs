//! What came in fragments leaves in fragments: no longer ones than came (`OVS_PACKET_ATTR_MRU`).
//!
//! Source: RFC 791 (3.2), RFC 8200 (4.5).

use flow::key::Key;
use frame::checksum::checksum;
use frame::{Frame, Pool};

use crate::drop_reason::DropReason;
use crate::packet::Packet;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// L2 headers that can be repeated at most (the module's `MAX_L2_LEN`).
const MAX_L2: usize = 14 + 4 + 12;
const FRAGMENT_HEADER: usize = 8;

/// Whether the packet is to be cut again before it goes to a port that takes frames of `max_frame`
/// bytes.
///
/// # Errors
/// It came in longer pieces than the port takes.
pub fn is_due(packet: &Packet, max_frame: usize) -> Result<bool, DropReason> {
    let mru = usize::from(packet.mru);
    if mru == 0 || packet.frame.len() <= mru + ETHERNET {
        return Ok(false);
    }
    if mru + ETHERNET > max_frame {
        return Err(DropReason::OutputTooLong);
    }
    Ok(true)
}

/// Cuts the packet into fragments of up to its `mru`, and gives each to `each`. `id` names the fragments
/// of an IPv6 packet.
///
/// # Errors
/// It can't be cut.
pub fn refragment(
    packet: &Packet,
    id: u32,
    pool: &mut Pool,
    mut each: impl FnMut(Frame),
) -> Result<(), DropReason> {
    let network = usize::from(packet.layers.network);
    if network > MAX_L2 {
        return Err(DropReason::FragL2TooLong);
    }
    let bytes = packet.frame.bytes();
    let cut = Cut::of(bytes, network, &packet.key).ok_or(DropReason::FragInvalidProto)?;
    let mru = usize::from(packet.mru);
    let payload = bytes.get(cut.payload..).unwrap_or_default();
    let overhead = cut.payload - network + if cut.v6 { FRAGMENT_HEADER } else { 0 };
    let size = mru.saturating_sub(overhead) & !7;
    if size == 0 {
        return Err(DropReason::OutputTooLong);
    }
    let head = bytes.get(..cut.payload).unwrap_or_default();
    for (index, piece) in payload.chunks(size).enumerate() {
        let (start, more) = (index * size, (index + 1) * size < payload.len());
        let made = match cut.v6 {
            false => cut.v4(head, network, start, more, piece, pool),
            true => cut.v6(head, network, start, more, piece, id, pool),
        };
        let mut made = made.ok_or(DropReason::FragInvalidProto)?;
        made.vlan = packet.frame.vlan;
        made.tunnel.clone_from(&packet.frame.tunnel);
        each(made);
    }
    Ok(())
}

/// Where a packet can be cut.
struct Cut {
    v6: bool,
    /// Where what is cut begins.
    payload: usize,
    /// IPv6: the byte that names what is there.
    named_at: usize,
}

impl Cut {
    fn of(bytes: &[u8], network: usize, key: &Key) -> Option<Self> {
        let byte = |at: usize| bytes.get(at).copied();
        match key.eth_type.get() {
            0x0800 => {
                let payload = network + usize::from(byte(network)? & 0xf) * 4;
                (payload >= network + 20 && payload <= bytes.len()).then_some(Self {
                    v6: false,
                    payload,
                    named_at: network + 9,
                })
            }
            0x86dd => {
                // Behind the headers that every node on the way looks at.
                let (mut named_at, mut at) = (network + 6, network + 40);
                let (mut cut_named_at, mut cut) = (named_at, at);
                loop {
                    let next = byte(named_at)?;
                    if !matches!(next, 0 | 43 | 60) {
                        break;
                    }
                    named_at = at;
                    at += (usize::from(byte(at + 1)?) + 1) * 8;
                    if next != 60 {
                        (cut_named_at, cut) = (named_at, at);
                    }
                }
                (cut <= bytes.len()).then_some(Self {
                    v6: true,
                    payload: cut,
                    named_at: cut_named_at,
                })
            }
            _ => None,
        }
    }

    fn v4(
        &self,
        head: &[u8],
        network: usize,
        start: usize,
        more: bool,
        piece: &[u8],
        pool: &mut Pool,
    ) -> Option<Frame> {
        let mut frame = fill(pool, &[head, piece])?;
        let bytes = frame.bytes_mut();
        let length = u16::try_from(self.payload - network + piece.len()).ok()?;
        let header = bytes.get_mut(network..self.payload)?;
        header.get_mut(2..4)?.copy_from_slice(&length.to_be_bytes());
        let dont_fragment = header.get(6)? & 0x40 != 0;
        let field =
            u16::try_from(start / 8).ok()? | u16::from(more) << 13 | u16::from(dont_fragment) << 14;
        header.get_mut(6..8)?.copy_from_slice(&field.to_be_bytes());
        if start != 0 {
            blank_options(header.get_mut(20..)?);
        }
        header.get_mut(10..12)?.fill(0);
        let sum = checksum(header);
        header.get_mut(10..12)?.copy_from_slice(&sum.to_be_bytes());
        Some(frame)
    }

    #[allow(clippy::too_many_arguments)]
    fn v6(
        &self,
        head: &[u8],
        network: usize,
        start: usize,
        more: bool,
        piece: &[u8],
        id: u32,
        pool: &mut Pool,
    ) -> Option<Frame> {
        let proto = *head.get(self.named_at)?;
        let field = u16::try_from(start).ok()? | u16::from(more);
        let [o0, o1] = field.to_be_bytes();
        let [i0, i1, i2, i3] = id.to_be_bytes();
        let header = [proto, 0, o0, o1, i0, i1, i2, i3];
        let mut frame = fill(pool, &[head, &header, piece])?;
        let bytes = frame.bytes_mut();
        *bytes.get_mut(self.named_at)? = 44;
        let length = u16::try_from(bytes.len() - network - 40).ok()?;
        bytes
            .get_mut(network + 4..network + 6)?
            .copy_from_slice(&length.to_be_bytes());
        Some(frame)
    }
}

fn fill(pool: &mut Pool, parts: &[&[u8]]) -> Option<Frame> {
    let length = parts.iter().map(|part| part.len()).sum();
    let mut frame = pool.take(length);
    let mut space = frame.space_mut().get_mut(..length)?;
    for part in parts {
        let (into, rest) = space.split_at_mut_checked(part.len())?;
        into.copy_from_slice(part);
        space = rest;
    }
    frame.set_len(length);
    Some(frame)
}

/// Options that aren't to be copied into later fragments become no operations.
fn blank_options(mut options: &mut [u8]) {
    const COPIED: u8 = 0x80;
    loop {
        let length = match *options {
            [] | [0, ..] => return,
            [1, ..] => 1,
            [_, length, ..] => usize::from(length).max(2).min(options.len()),
            [_] => 1,
        };
        let (option, rest) = options.split_at_mut(length);
        if option.first().is_some_and(|kind| kind & COPIED == 0) {
            option.fill(1);
        }
        options = rest;
    }
}
