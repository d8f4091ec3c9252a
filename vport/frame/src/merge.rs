//! Putting TCP packets together again that were segments of one: the opposite of [`segment`](crate::segment).
//!
//! # Contract
//! Only packets that follow one another, in the list as in the stream, with checksums that are right, and
//! that differ in nothing but what segmentation makes different; so that segmenting the result gives the
//! same packets (but for IPv4's identification). Nothing changes its order.

use crate::buffer::Frame;
use crate::checksum::{add, checksum, fold, pseudo_v4, pseudo_v6, sum};
use crate::offload::{Gso, GsoKind, PartialChecksum};
use crate::pool::Pool;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
/// Offsets in TCP's header.
const SEQUENCE: usize = 4;
const FLAGS: usize = 13;
const CHECKSUM: usize = 16;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
/// What IP's length fields can say.
const MAX_IP: usize = 65_535;
const FRAGMENT: u8 = 0x3f;

/// A packet that may be a segment.
#[derive(Clone, Copy)]
struct Segment {
    v6: bool,
    /// Where TCP's header is, and where its payload.
    transport: usize,
    payload: usize,
    /// Where the packet ends.
    end: usize,
    sequence: u32,
    /// It ends what it belongs to.
    pushed: bool,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*word))
}

impl Segment {
    /// None: it is none, or isn't sound.
    fn of(frame: &Frame) -> Option<Self> {
        let offload = &frame.offload;
        if frame.vlan.is_some() || offload.csum.is_some() || offload.gso.is_some() {
            return None;
        }
        let bytes = frame.bytes();
        let (v6, transport, length) = match u16_at(bytes, 12)? {
            0x0800 => {
                let header = bytes.get(ETHERNET..)?.first_chunk::<IPV4>()?;
                let fragment = header[6] & FRAGMENT != 0 || header[7] != 0;
                if header[0] != 0x45 || fragment || header[9] != TCP || checksum(header) != 0 {
                    return None;
                }
                (false, ETHERNET + IPV4, usize::from(u16_at(header, 2)?))
            }
            0x86dd => {
                let header = bytes.get(ETHERNET..)?.first_chunk::<IPV6>()?;
                if header[0] >> 4 != 6 || header[6] != TCP {
                    return None;
                }
                (
                    true,
                    ETHERNET + IPV6,
                    IPV6 + usize::from(u16_at(header, 4)?),
                )
            }
            _ => return None,
        };
        // Padding of the link would come between.
        let end = ETHERNET + length;
        if end != bytes.len() {
            return None;
        }
        let tcp = bytes.get(transport..end)?;
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        let flags = tcp.get(FLAGS)?;
        if header < TCP_HEADER || flags & !PSH != ACK || header >= tcp.len() {
            return None;
        }
        let pseudo = pseudo(bytes, v6, tcp.len())?;
        if fold(add(pseudo, sum(tcp))) != 0xffff {
            return None;
        }
        let sequence = tcp.get(SEQUENCE..)?.first_chunk()?;
        Some(Self {
            v6,
            transport,
            payload: transport + header,
            end,
            sequence: u32::from_be_bytes(*sequence),
            pushed: flags & PSH != 0,
        })
    }

    fn len(&self) -> usize {
        self.end - self.payload
    }
}

fn pseudo(bytes: &[u8], v6: bool, length: usize) -> Option<u64> {
    let ip = bytes.get(ETHERNET..)?;
    Some(if v6 {
        let (src, dst) = (ip.get(8..)?.first_chunk()?, ip.get(24..)?.first_chunk()?);
        pseudo_v6(src, dst, TCP, length)
    } else {
        let (src, dst) = (ip.get(12..)?.first_chunk()?, ip.get(16..)?.first_chunk()?);
        pseudo_v4(*src, *dst, TCP, length)
    })
}

/// Packets that have come together.
struct Run {
    frame: Frame,
    first: Segment,
    /// Payload of each packet but the last.
    size: usize,
    count: usize,
    next: u32,
    closed: bool,
}

impl Run {
    fn new(frame: Frame, first: Segment) -> Self {
        let size = first.len();
        Self {
            frame,
            first,
            size,
            count: 1,
            next: first.sequence.wrapping_add(size as u32),
            closed: first.pushed,
        }
    }

    fn continues(&self, frame: &Frame, segment: &Segment) -> bool {
        let first = &self.first;
        !self.closed
            && segment.v6 == first.v6
            && segment.payload == first.payload
            && segment.sequence == self.next
            && segment.len() <= self.size
            && self.frame.len() - ETHERNET + segment.len() <= MAX_IP
            && self.frame.tunnel == frame.tunnel
            && same_headers(self.frame.bytes(), frame.bytes(), first)
    }

    fn append(&mut self, frame: &Frame, segment: &Segment, pool: &mut Pool) {
        let payload = frame.bytes().get(segment.payload..).unwrap_or_default();
        let before = self.frame.len();
        if self.frame.tailroom() < payload.len() {
            let mut large = pool.large();
            if let Some(space) = large.space_mut().get_mut(..before) {
                space.copy_from_slice(self.frame.bytes());
            }
            large.set_len(before);
            large.class = self.frame.class;
            large.tunnel = self.frame.tunnel.take();
            pool.put(std::mem::replace(&mut self.frame, large));
        }
        if let Some(space) = self
            .frame
            .space_mut()
            .get_mut(before..before + payload.len())
        {
            space.copy_from_slice(payload);
        }
        self.frame.set_len(before + payload.len());
        self.count += 1;
        self.next = self.next.wrapping_add(payload.len() as u32);
        self.closed = segment.pushed || payload.len() < self.size;
        if segment.pushed
            && let Some(flags) = self.frame.bytes_mut().get_mut(self.first.transport + FLAGS)
        {
            *flags |= PSH;
        }
    }

    /// The packet that they are segments of.
    fn finish(mut self) -> Frame {
        if self.count > 1 {
            let _ = self.complete();
        }
        self.frame
    }

    fn complete(&mut self) -> Option<()> {
        let Segment {
            v6,
            transport,
            payload,
            ..
        } = self.first;
        let length = self.frame.len() - transport;
        let pseudo = pseudo(self.frame.bytes(), v6, length)?;
        let bytes = self.frame.bytes_mut();
        if v6 {
            put(bytes, ETHERNET + 4, u16::try_from(length).ok()?)?;
        } else {
            put(bytes, ETHERNET + 2, u16::try_from(length + IPV4).ok()?)?;
            put(bytes, ETHERNET + 10, 0)?;
            let value = checksum(bytes.get(ETHERNET..ETHERNET + IPV4)?);
            put(bytes, ETHERNET + 10, value)?;
        }
        put(bytes, transport + CHECKSUM, fold(pseudo))?;
        self.frame.offload.csum = Some(PartialChecksum {
            start: transport as u16,
            offset: CHECKSUM as u16,
        });
        self.frame.offload.gso = Some(Gso {
            kind: if v6 { GsoKind::TcpV6 } else { GsoKind::TcpV4 },
            ecn: false,
            size: u16::try_from(self.size).ok()?,
            header_len: payload as u16,
        });
        Some(())
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// All that isn't a length, an identification, a sequence number, a flag or a checksum.
fn same_headers(a: &[u8], b: &[u8], of: &Segment) -> bool {
    let same = |from: usize, to: usize| a.get(from..to) == b.get(from..to);
    let (ip, tcp) = (ETHERNET, of.transport);
    let network = match of.v6 {
        true => same(0, ip + 4) && same(ip + 6, tcp),
        false => same(0, ip + 2) && same(ip + 6, ip + 10) && same(ip + 12, tcp),
    };
    network
        && same(tcp, tcp + SEQUENCE)
        && same(tcp + 8, tcp + FLAGS)
        && same(tcp + FLAGS + 1, tcp + CHECKSUM)
        && same(tcp + CHECKSUM + 2, of.payload)
}

/// Puts together what belongs together among the frames from `from` on.
pub fn merge(frames: &mut Vec<Frame>, from: usize, pool: &mut Pool) {
    if frames.len() < from + 2 {
        return;
    }
    let mut run: Option<Run> = None;
    let came = frames.split_off(from);
    for frame in came {
        let segment = Segment::of(&frame);
        if let (Some(run), Some(segment)) = (&mut run, &segment)
            && run.continues(&frame, segment)
        {
            run.append(&frame, segment, pool);
            pool.put(frame);
            continue;
        }
        frames.extend(run.take().map(Run::finish));
        match segment {
            Some(segment) => run = Some(Run::new(frame, segment)),
            None => frames.push(frame),
        }
    }
    frames.extend(run.map(Run::finish));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::Segments;
    use proptest::prelude::*;

    /// A TCP packet to be segmented, as a sender leaves it.
    fn packet(v6: bool, payload: usize, size: u16, options: usize, flags: u8) -> Frame {
        let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        let length = TCP_HEADER + options + payload;
        if v6 {
            bytes.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend_from_slice(&(length as u16).to_be_bytes());
            bytes.extend_from_slice(&[TCP, 64]);
            bytes.extend_from_slice(&[0xfd; 32]);
        } else {
            bytes.extend_from_slice(&[8, 0, 0x45, 0]);
            bytes.extend_from_slice(&((length + IPV4) as u16).to_be_bytes());
            bytes.extend_from_slice(&[0, 1, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = checksum(&bytes[14..34]);
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        let transport = bytes.len();
        let offset = (((TCP_HEADER + options) / 4) << 4) as u8;
        bytes.extend_from_slice(&[1, 2, 3, 4, 0xff, 0xff, 0xff, 0, 0, 0, 0, 9, offset, flags]);
        bytes.extend_from_slice(&[0x10, 0, 0, 0, 0, 0]);
        bytes.extend(std::iter::repeat_n(1, options));
        bytes.extend((0..payload).map(|n| n as u8));
        let sum = fold(pseudo(&bytes, v6, length).unwrap());
        put(&mut bytes, transport + CHECKSUM, sum).unwrap();
        let mut frame = Frame::from_bytes(&bytes);
        frame.offload.csum = Some(PartialChecksum {
            start: transport as u16,
            offset: 16,
        });
        frame.offload.gso = Some(Gso {
            kind: if v6 { GsoKind::TcpV6 } else { GsoKind::TcpV4 },
            ecn: false,
            size,
            header_len: (transport + TCP_HEADER + options) as u16,
        });
        frame
    }

    fn segments(frame: &Frame, pool: &mut Pool) -> Vec<Frame> {
        Segments::new(frame).unwrap().frames(pool).collect()
    }

    proptest! {
        #[test]
        fn segments_become_the_packet_that_they_were(
            v6: bool, payload in 1..60_000_usize, size in 200..9000_u16, words in 0..=10_usize, push: bool,
        ) {
            let mut pool = Pool::default();
            let flags = if push { ACK | PSH } else { ACK };
            let mut frame = packet(v6, payload, size, words * 4, flags);
            let mut list = segments(&frame, &mut pool);
            if list.len() == 1 {
                frame = list[0].clone();
            }
            merge(&mut list, 0, &mut pool);
            prop_assert_eq!(list, vec![frame]);
        }

        #[test]
        fn two_packets_stay_two(payload in 2000..9000_usize, byte in 0..120_usize, lost in any::<bool>()) {
            let mut pool = Pool::default();
            let first = packet(false, payload, 1000, 12, ACK | PSH);
            let mut list = segments(&first, &mut pool);
            let before = list.clone();
            if lost {
                // A hole in the stream.
                list.remove(1);
                merge(&mut list, 0, &mut pool);
                prop_assert!(list.len() >= 2 || before.len() <= 2);
            } else {
                // Whatever is damaged isn't taken in.
                list[1].bytes_mut()[byte] ^= 0x10;
                let damaged = list[1].clone();
                merge(&mut list, 0, &mut pool);
                prop_assert!(list.len() >= 2);
                prop_assert!(list.contains(&damaged));
            }
        }
    }

    #[test]
    fn what_follows_in_the_stream_but_not_in_the_list_stays_apart() {
        let mut pool = Pool::default();
        let frame = packet(true, 3000, 1000, 0, ACK);
        let mut list = segments(&frame, &mut pool);
        let other = Frame::from_bytes(&[9; 60]);
        list.insert(1, other.clone());
        merge(&mut list, 0, &mut pool);
        assert_eq!(list.len(), 3);
        assert_eq!(list[1], other);
        // What was in the list before isn't looked at.
        let mut list = segments(&frame, &mut pool);
        merge(&mut list, 1, &mut pool);
        assert_eq!(list.len(), 2);
    }
}
