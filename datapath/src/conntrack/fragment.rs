//! Fragments come together before they are tracked (RFC 791, RFC 8200 4.5).
//!
//! What overlaps is dropped with everything that belongs to it, except a piece that is there already
//! (RFC 5722, RFC 8200). Memory is bounded, and so is the time that pieces wait; each zone has packets of
//! its own.
//!
//! # Thread safety
//! One lock: fragments are few. Held for one piece.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use flow::extract;
use flow::key::FRAG_NONE;
use frame::checksum::checksum;
use frame::{Frame, VlanTag};

use super::tuple::Family;
use super::wire::{self, array, array_mut};
use crate::packet::Packet;

/// How long a packet's pieces wait for the others: nanoseconds (`ipfrag_time`).
const PATIENCE_V4: u64 = 30_000_000_000;
/// The same for IPv6 (`nf_conntrack_frag6_timeout`, RFC 8200 4.5).
const PATIENCE_V6: u64 = 60_000_000_000;
/// How often those that have waited too long are looked for at most: nanoseconds.
const CLEANING: u64 = 100_000_000;
/// Bytes of all the pieces that wait (`ipfrag_high_thresh`).
const MOST_BYTES: usize = 4 << 20;
/// What a piece costs beyond its bytes.
const OVERHEAD: usize = 128;
/// What IP's length fields can say.
const LONGEST: usize = 65_535;

/// Counts, over all threads.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct Counters {
    pub reassembled: AtomicU64,
    pub timed_out: AtomicU64,
    pub overlapped: AtomicU64,
    pub duplicates: AtomicU64,
    pub malformed: AtomicU64,
    pub no_memory: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Which packet a piece belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Whole {
    src: [u8; 16],
    dst: [u8; 16],
    id: u32,
    zone: u16,
    proto: u8,
    family: Family,
}

#[derive(Debug)]
struct Piece {
    start: usize,
    bytes: Vec<u8>,
}

/// What stands in front of the payload in the first fragment.
#[derive(Debug)]
struct Head {
    /// From the frame's first byte to where the fragment's payload (IPv6: its fragment header) begins.
    bytes: Vec<u8>,
    vlan: Option<VlanTag>,
    network: usize,
    /// IPv6: the byte that names the fragment header, and what that names.
    next: Option<(usize, u8)>,
}

#[derive(Debug, Default)]
struct Pieces {
    /// In order, without overlaps.
    pieces: Vec<Piece>,
    /// The payload's length, once the last fragment has come.
    length: Option<usize>,
    head: Option<Head>,
    /// Longest fragment, from the IP header on; longest among those that must not be fragmented.
    longest: usize,
    longest_df: usize,
    /// Bytes of the payload that are there.
    gathered: usize,
    deadline: u64,
    cost: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    packets: HashMap<Whole, Pieces>,
    bytes: usize,
    /// Before that time nothing is looked for: no deadline is earlier, or a look was only just taken.
    next_look: u64,
}

impl Waiting {
    /// Forgets what has waited too long; gives how many that were. Looks through all of them only when
    /// there may be one, and not again soon: a flood of first fragments mustn't cost a walk each, also where
    /// each lets another one's time run out.
    fn clean(&mut self, now: u64) -> u64 {
        if now < self.next_look {
            return 0;
        }
        let (mut earliest, mut gone) = (u64::MAX, 0);
        let bytes = &mut self.bytes;
        self.packets.retain(|_, pieces| {
            let stays = pieces.deadline > now;
            if stays {
                earliest = earliest.min(pieces.deadline);
            } else {
                *bytes -= pieces.cost;
                gone += 1;
            }
            stays
        });
        self.next_look = earliest.max(now.saturating_add(CLEANING));
        gone
    }
}

/// Pieces that wait for others.
#[derive(Debug, Default)]
pub struct Fragments {
    waiting: Mutex<Waiting>,
    /// What happened.
    pub counters: Counters,
}

/// What became of a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gathered {
    /// The packet is whole now, its key that of the whole one, its `mru` set.
    Whole,
    /// It waits; the packet has no bytes any more.
    Waits,
    /// It is to be dropped.
    Dropped,
}

struct Fragment {
    whole: Whole,
    /// Offset of its payload in the whole one.
    start: usize,
    more: bool,
    dont_fragment: bool,
    network: usize,
    /// Where its payload begins and ends in the frame.
    payload: std::ops::Range<usize>,
    /// Where [`Head::bytes`] end.
    head_end: usize,
    next: Option<(usize, u8)>,
}

impl Fragments {
    /// Takes a fragment (a packet whose key says that it is one), and gives the whole packet in its place
    /// if it was the last that was missing.
    pub fn gather(&self, packet: &mut Packet, zone: u16, now: u64) -> Gathered {
        wire::trim(packet);
        let Some(fragment) = parse(packet, zone) else {
            count(&self.counters.malformed);
            return Gathered::Dropped;
        };
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let cost = fragment.payload.len() + OVERHEAD;
        if waiting.bytes + cost > MOST_BYTES {
            self.timed_out(waiting.clean(now));
            if waiting.bytes + cost > MOST_BYTES {
                count(&self.counters.no_memory);
                return Gathered::Dropped;
            }
        }
        let patience = match fragment.whole.family {
            Family::V4 => PATIENCE_V4,
            Family::V6 => PATIENCE_V6,
        };
        let deadline = now.saturating_add(patience);
        let Waiting {
            packets,
            bytes,
            next_look,
        } = &mut *waiting;
        let pieces = packets.entry(fragment.whole).or_default();
        if pieces.deadline == 0 {
            pieces.deadline = deadline;
            *next_look = deadline.min(*next_look);
        } else if pieces.deadline <= now {
            // The identification is another packet's now.
            count(&self.counters.timed_out);
            *bytes -= pieces.cost;
            *pieces = Pieces {
                deadline,
                ..Pieces::default()
            };
        }
        let added = pieces.add(packet, &fragment);
        let result = match added {
            Added::Yes => {
                pieces.cost += cost;
                *bytes += cost;
                match pieces.is_whole() {
                    true => None,
                    false => Some(Gathered::Waits),
                }
            }
            Added::Duplicate => {
                count(&self.counters.duplicates);
                return Gathered::Dropped;
            }
            Added::Malformed => {
                count(&self.counters.malformed);
                Some(Gathered::Dropped)
            }
            Added::Overlaps => {
                count(&self.counters.overlapped);
                Some(Gathered::Dropped)
            }
        };
        if result == Some(Gathered::Waits) {
            packet.frame = Frame::default();
            return Gathered::Waits;
        }
        let Some(pieces) = packets.remove(&fragment.whole) else {
            return Gathered::Dropped;
        };
        *bytes -= pieces.cost;
        drop(waiting);
        if let Some(dropped) = result {
            return dropped;
        }
        if pieces.put_together(packet, fragment.whole.family).is_none() {
            count(&self.counters.malformed);
            return Gathered::Dropped;
        }
        count(&self.counters.reassembled);
        Gathered::Whole
    }

    /// Forgets what has waited too long.
    pub fn expire(&self, now: u64) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.timed_out(waiting.clean(now));
    }

    /// Packets that wait for pieces, and the bytes that they cost.
    pub fn waiting(&self) -> (usize, usize) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        (waiting.packets.len(), waiting.bytes)
    }

    fn timed_out(&self, packets: u64) {
        self.counters
            .timed_out
            .fetch_add(packets, Ordering::Relaxed);
    }
}

fn parse(packet: &Packet, zone: u16) -> Option<Fragment> {
    let bytes = packet.frame.bytes();
    let network = usize::from(packet.layers.network);
    let family = wire::family(packet)?;
    let (whole, start, more, dont_fragment, payload, next);
    match family {
        Family::V4 => {
            let header = array::<20>(bytes, network)?;
            let begin = network + usize::from(header[0] & 0xf) * 4;
            let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
            let field = u16::from_be_bytes([header[6], header[7]]);
            whole = Whole {
                src: wire_address(bytes, network + 12)?,
                dst: wire_address(bytes, network + 16)?,
                id: u32::from(u16::from_be_bytes([header[4], header[5]])),
                zone,
                proto: header[9],
                family,
            };
            start = usize::from(field & 0x1fff) * 8;
            more = field & 0x2000 != 0;
            dont_fragment = field & 0x4000 != 0;
            payload = begin..network + length;
            next = None;
        }
        Family::V6 => {
            let header = array::<40>(bytes, network)?;
            let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
            let (mut named_at, mut at) = (network + 6, network + 40);
            // Only the headers of RFC 8200 may stand in front of a fragment header.
            loop {
                match array::<1>(bytes, named_at)?[0] {
                    44 => break,
                    0 | 43 | 60 => {
                        named_at = at;
                        at += (usize::from(array::<2>(bytes, at)?[1]) + 1) * 8;
                    }
                    _ => return None,
                }
            }
            let [proto, _, o0, o1, i0, i1, i2, i3] = *array(bytes, at)?;
            let field = u16::from_be_bytes([o0, o1]);
            whole = Whole {
                src: *array(bytes, network + 8)?,
                dst: *array(bytes, network + 24)?,
                id: u32::from_be_bytes([i0, i1, i2, i3]),
                zone,
                proto: 0,
                family,
            };
            start = usize::from(field & !7);
            more = field & 1 != 0;
            dont_fragment = false;
            payload = at + 8..network + 40 + length;
            next = Some((named_at, proto));
        }
    }
    if payload.end > bytes.len() || payload.start > payload.end {
        return None;
    }
    let head_end = match family {
        Family::V4 => payload.start,
        Family::V6 => payload.start - 8,
    };
    let fragment = Fragment {
        whole,
        start,
        more,
        dont_fragment,
        network,
        payload,
        head_end,
        next,
    };
    let length = fragment.payload.len();
    let odd = more && !length.is_multiple_of(8);
    let empty = length == 0 && (more || start != 0);
    (!odd && !empty && start + length <= LONGEST).then_some(fragment)
}

fn wire_address(bytes: &[u8], at: usize) -> Option<[u8; 16]> {
    Some(super::tuple::wide(*array(bytes, at)?))
}

enum Added {
    Yes,
    Duplicate,
    Overlaps,
    Malformed,
}

impl Pieces {
    fn add(&mut self, packet: &Packet, fragment: &Fragment) -> Added {
        let Some(bytes) = packet.frame.bytes().get(fragment.payload.clone()) else {
            return Added::Malformed;
        };
        let end = fragment.start + bytes.len();
        let at = self
            .pieces
            .partition_point(|piece| piece.start < fragment.start);
        let overlaps_before = at
            .checked_sub(1)
            .and_then(|before| self.pieces.get(before))
            .is_some_and(|before| before.start + before.bytes.len() > fragment.start);
        if let Some(same) = self.pieces.get(at)
            && same.start == fragment.start
            && same.bytes.len() == bytes.len()
        {
            return Added::Duplicate;
        }
        let overlaps_after = self.pieces.get(at).is_some_and(|after| after.start < end);
        if overlaps_before || overlaps_after {
            return Added::Overlaps;
        }
        let furthest = self
            .pieces
            .last()
            .map_or(0, |last| last.start + last.bytes.len());
        match (self.length, fragment.more) {
            (None, false) if furthest > end => return Added::Malformed,
            (None, false) => self.length = Some(end),
            (Some(length), false) if length != end => return Added::Malformed,
            (Some(length), true) if end > length => return Added::Malformed,
            _ => {}
        }
        if fragment.start == 0 {
            let Some(head) = packet.frame.bytes().get(..fragment.head_end) else {
                return Added::Malformed;
            };
            self.head = Some(Head {
                bytes: head.to_vec(),
                vlan: packet.frame.vlan,
                network: fragment.network,
                next: fragment.next,
            });
        }
        let whole_length = fragment.payload.end - fragment.network;
        self.longest = self.longest.max(whole_length);
        if fragment.dont_fragment {
            self.longest_df = self.longest_df.max(whole_length);
        }
        let piece = Piece {
            start: fragment.start,
            bytes: bytes.to_vec(),
        };
        self.gathered += bytes.len();
        self.pieces.insert(at, piece);
        Added::Yes
    }

    fn is_whole(&self) -> bool {
        self.length == Some(self.gathered) && self.head.is_some()
    }

    /// Makes the packet the whole one.
    fn put_together(self, packet: &mut Packet, family: Family) -> Option<()> {
        let head = self.head?;
        let mut bytes = head.bytes;
        for piece in &self.pieces {
            bytes.extend_from_slice(&piece.bytes);
        }
        let length = bytes.len() - head.network;
        match family {
            Family::V4 => {
                let header = usize::from(array::<1>(&bytes, head.network)?[0] & 0xf) * 4;
                let length = u16::try_from(length).ok()?;
                *array_mut(&mut bytes, head.network + 2)? = length.to_be_bytes();
                let keep = self.longest_df != 0 && self.longest_df == self.longest;
                *array_mut(&mut bytes, head.network + 6)? = [if keep { 0x40 } else { 0 }, 0];
                *array_mut(&mut bytes, head.network + 10)? = [0, 0];
                let sum = checksum(bytes.get(head.network..head.network + header)?);
                *array_mut(&mut bytes, head.network + 10)? = sum.to_be_bytes();
            }
            Family::V6 => {
                let length = u16::try_from(length.checked_sub(40)?).ok()?;
                *array_mut(&mut bytes, head.network + 4)? = length.to_be_bytes();
                let (named_at, proto) = head.next?;
                *array_mut(&mut bytes, named_at)? = [proto];
            }
        }
        packet.frame = Frame::from_bytes(&bytes);
        packet.frame.vlan = head.vlan;
        packet.mru = u16::try_from(self.longest).unwrap_or(u16::MAX);
        extract::update(&mut packet.frame, &mut packet.key, &mut packet.layers).ok()?;
        packet.key.ip_frag = FRAG_NONE;
        Some(())
    }
}
