//! An executor's part in captures: takes the copies of a batch, and offers them at its end.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use frame::Frame;

use super::{Captures, Event, PortLabel, Record, Session};
use crate::drop_reason::DropReason;
use crate::executor::Batch;
use crate::packet::Packet;

/// Bytes of two Ethernet addresses: where a tag goes.
const ADDRESSES: usize = 12;

/// Captures by their places in the batch's list: a bit each.
type Mask = u8;
const _: () = assert!(super::MOST <= Mask::BITS as usize);

/// What captures want of a port.
#[derive(Clone, Debug)]
struct Watch {
    number: u32,
    label: Arc<PortLabel>,
    received: Mask,
    transmitted: Mask,
    dropped: Mask,
}

/// Copies of one batch.
#[derive(Debug, Default)]
pub struct Tap {
    captures: Arc<Captures>,
    /// Somebody captures, as of the batch's beginning.
    on: bool,
    sessions: Vec<Arc<Session>>,
    /// Those whose reader has let their queue fill up.
    full: Mask,
    watches: Vec<Watch>,
    taken: Vec<(Mask, Record)>,
    time_ns: u64,
}

impl Tap {
    /// For those captures.
    pub fn new(captures: Arc<Captures>) -> Self {
        Self {
            captures,
            ..Self::default()
        }
    }

    /// Whether somebody captures, as of the batch's beginning.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// At a batch's beginning, and before a packet that joins it.
    #[inline]
    pub fn begin(&mut self) {
        if self.captures.active.load(Relaxed) {
            self.look();
        }
    }

    #[cold]
    fn look(&mut self) {
        if self.on {
            return;
        }
        self.sessions.clone_from(&self.captures.sessions.load());
        self.on = !self.sessions.is_empty();
        self.full = self.mask(|session| session.is_full());
        self.time_ns = now_ns();
    }

    /// The frame just came out of the port. Gives the number by which [`Tap::dropped`] finds it again,
    /// 0 if nobody wants it.
    pub fn received(&mut self, batch: &Batch<'_>, port: u32, frame: &Frame) -> u32 {
        let watch = self.watch(batch, port);
        self.take(Event::Received, &watch, watch.received, frame, None, None)
    }

    /// The packet ends here, for that reason.
    pub fn dropped(&mut self, batch: &Batch<'_>, packet: &Packet, reason: DropReason) {
        let index = (packet.captured as usize).checked_sub(1);
        if let Some((_, record)) = index.and_then(|index| self.taken.get_mut(index)) {
            record.reason = Some(reason);
        }
        let watch = self.watch(batch, packet.ingress);
        // What couldn't be parsed has no key to say what it is: it came from a port.
        let headless = packet.key.mac_proto == 0 && reason != DropReason::Malformed;
        let eth_type = headless.then(|| packet.key.eth_type.get());
        self.take(
            Event::Dropped,
            &watch,
            watch.dropped,
            &packet.frame,
            Some(reason),
            eth_type,
        );
    }

    /// A part of the packet ends here: a segment, as `frame`.
    pub fn dropped_part(
        &mut self,
        batch: &Batch<'_>,
        packet: &Packet,
        frame: &Frame,
        reason: DropReason,
    ) {
        let watch = self.watch(batch, packet.ingress);
        let mask = watch.dropped;
        self.take(Event::Dropped, &watch, mask, frame, Some(reason), None);
    }

    /// Whether the port's frames are to be given to it one by one, between [`Tap::transmitting`] and
    /// [`Tap::transmitted`].
    pub fn wants_transmitted(&mut self, batch: &Batch<'_>, port: u32) -> bool {
        let watch = self.watch(batch, port);
        watch.transmitted | watch.dropped != 0
    }

    /// The frame is about to be given to the port. The number is for [`Tap::transmitted`].
    pub fn transmitting(&mut self, batch: &Batch<'_>, port: u32, frame: &Frame) -> u32 {
        let watch = self.watch(batch, port);
        let mask = watch.transmitted | watch.dropped;
        self.take(Event::Transmitted, &watch, mask, frame, None, None)
    }

    /// What became of the frame of that number, which was taken last.
    pub fn transmitted(
        &mut self,
        batch: &Batch<'_>,
        port: u32,
        number: u32,
        refused: Option<DropReason>,
    ) {
        let watch = self.watch(batch, port);
        let Some(index) = (number as usize).checked_sub(1) else {
            return;
        };
        let mut wanted = watch.transmitted;
        if refused.is_some() {
            wanted |= watch.dropped;
        }
        match self.taken.get_mut(index) {
            Some((mask, record)) => {
                *mask &= wanted;
                record.reason = refused;
            }
            None => return,
        }
        if wanted & !self.full == 0 {
            self.taken.truncate(index);
        }
    }

    /// At the batch's end.
    #[inline]
    pub fn publish(&mut self) {
        if self.on {
            self.offer();
        }
    }

    #[cold]
    fn offer(&mut self) {
        let taken: Vec<(Mask, Arc<Record>)> = self
            .taken
            .drain(..)
            .map(|(mask, record)| (mask, Arc::new(record)))
            .collect();
        for (index, session) in self.sessions.iter().enumerate() {
            let mine = taken.iter().filter(|(mask, _)| mask & (1 << index) != 0);
            session.offer(mine.map(|(_, record)| Arc::clone(record)).collect());
        }
        self.sessions.clear();
        self.watches.clear();
        self.on = false;
    }

    fn mask(&self, of: impl Fn(&Session) -> bool) -> Mask {
        let bits = self.sessions.iter().enumerate();
        bits.filter(|(_, session)| of(session))
            .fold(0, |mask, (index, _)| mask | (1 << index))
    }

    fn watch(&mut self, batch: &Batch<'_>, port: u32) -> Watch {
        if let Some(known) = self.watches.iter().find(|watch| watch.number == port) {
            return known.clone();
        }
        let (name, driver) = match batch.ports.get(port) {
            Some(vport) => (vport.current_name(), vport.device.driver().name()),
            None => ("-".to_owned(), "none"),
        };
        let is_it = |session: &Session| session.wish.port.as_ref().is_none_or(|port| *port == name);
        let watch = Watch {
            number: port,
            received: self.mask(|session| session.wish.received && is_it(session)),
            transmitted: self.mask(|session| session.wish.transmitted && is_it(session)),
            dropped: self.mask(|session| session.wish.dropped && is_it(session)),
            label: Arc::new(PortLabel {
                datapath: batch.datapath.name.to_string(),
                name,
                number: port,
                driver,
            }),
        };
        self.watches.push(watch.clone());
        watch
    }

    /// Copies the frame for the captures of `mask`; counts it as lost for those that are full. An
    /// Ethernet header with that type is put in front if there is none. Gives its number, 0 if there is
    /// no copy.
    fn take(
        &mut self,
        event: Event,
        watch: &Watch,
        mask: Mask,
        frame: &Frame,
        reason: Option<DropReason>,
        eth_type: Option<u16>,
    ) -> u32 {
        let (mut taken_by, mut snaplen) = (0, 0);
        for (index, session) in self.sessions.iter().enumerate() {
            let bit = 1 << index;
            if mask & bit == 0 {
                continue;
            }
            if self.full & bit != 0 {
                session.lost.fetch_add(1, Relaxed);
                continue;
            }
            taken_by |= bit;
            snaplen = snaplen.max(session.wish.snaplen as usize);
        }
        if taken_by == 0 {
            return 0;
        }
        let (length, bytes) = copy(frame, eth_type, snaplen);
        let record = Record {
            event,
            port: Arc::clone(&watch.label),
            time_ns: self.time_ns,
            reason,
            length,
            bytes,
            headless: eth_type.is_some(),
            partial_checksum: frame.offload.csum.is_some(),
            gso: frame.offload.gso.map(|gso| (gso.kind, gso.size)),
        };
        self.taken.push((taken_by, record));
        self.taken.len() as u32
    }
}

/// The frame's whole length and its first bytes, its tag in band.
fn copy(frame: &Frame, eth_type: Option<u16>, snaplen: usize) -> (usize, Box<[u8]>) {
    let whole = frame.bytes();
    let mut header = Vec::new();
    let mut rest = whole;
    if let Some(eth_type) = eth_type {
        header.extend_from_slice(&[0; ADDRESSES]);
        header.extend_from_slice(&eth_type.to_be_bytes());
    } else if let (Some(tag), Some((addresses, behind))) =
        (frame.vlan, whole.split_at_checked(ADDRESSES))
    {
        header.extend_from_slice(addresses);
        header.extend_from_slice(&tag.to_bytes());
        rest = behind;
    }
    let length = header.len() + rest.len();
    let mut bytes = Vec::with_capacity(length.min(snaplen));
    bytes.extend(header.iter().chain(rest).take(snaplen));
    (length, bytes.into())
}

/// Nanoseconds since 1970.
fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use frame::VlanTag;

    use super::*;

    #[test]
    fn a_tag_goes_back_among_the_bytes_and_lengths_count_it() {
        let mut frame = Frame::from_bytes(&[7; 60]);
        frame.vlan = Some(VlanTag {
            tpid: 0x8100,
            tci: 0x1005,
        });
        let (length, bytes) = copy(&frame, None, 1000);
        assert_eq!((length, bytes.len()), (64, 64));
        assert_eq!(bytes[10..18], [7, 7, 0x81, 0, 0x10, 5, 7, 7]);
        let (length, bytes) = copy(&frame, None, 14);
        assert_eq!((length, &bytes[12..]), (64, &[0x81, 0][..]));
    }

    #[test]
    fn a_packet_without_ethernet_header_gets_one_of_zeros() {
        let (length, bytes) = copy(&Frame::from_bytes(&[0x45; 20]), Some(0x0800), 1000);
        assert_eq!(length, 34);
        assert_eq!(
            bytes[..15],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0x45]
        );
    }
}
