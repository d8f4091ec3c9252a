//! What an executor has ready for the ports: frames wait here until the batch ends, so that a port gets
//! many with one call.

use ::vport::{Capabilities, TxOutcome, TxRefusal};
use frame::segment::Segments;
use frame::{Class, Frame, GsoKind, Offload, Pool, complete_checksum};

use crate::capture::Tap;
use crate::counters::Cell;
use crate::drop_reason::DropReason;
use crate::executor::Batch;
use crate::packet::Packet;
use crate::refragment;
use crate::vport::Vport;

/// Frames to a port that make a batch of their own: beyond it the port gets them at once.
const FULL: usize = 64;
/// Bytes of an Ethernet header: what a truncation leaves at least.
const ETHERNET: usize = 14;

/// Frames by port number, in order.
#[derive(Default)]
pub struct TransmitQueues {
    queues: Vec<Vec<Frame>>,
    waiting: Vec<u32>,
    /// Ports that got frames.
    fed: Vec<u32>,
    /// Names the fragments of the last IPv6 packet that was cut.
    ident: u32,
}

impl TransmitQueues {
    /// Empty. Fragments of IPv6 packets are named from `ident` on.
    pub fn new(ident: u32) -> Self {
        Self {
            ident,
            ..Self::default()
        }
    }

    /// Queues a packet's frame for `port`, as the port can take it: truncated, completed, segmented. It
    /// counts as transmitted or dropped when the port has said so.
    ///
    /// # Errors
    /// The packet keeps its frame; the reason why it can't go there.
    pub fn push(
        &mut self,
        batch: &Batch<'_>,
        executor: usize,
        pool: &mut Pool,
        tap: &mut Tap,
        packet: &mut Packet,
        port: u32,
    ) -> Result<(), DropReason> {
        let vport = batch.ports.get(port).ok_or(DropReason::OutputNoPort)?;
        if packet.key.mac_proto == 0 {
            return Err(DropReason::OutputNotEthernet);
        }
        if vport.tunnel.is_some() {
            let mut outer = packet.egress.take().ok_or(DropReason::OutputNoTunnel)?;
            // A key's own source port isn't used: a connection's is chosen for it.
            outer.tp_src = source_port_entropy(packet.hash).into();
            packet.frame.tunnel = Some(outer);
        }
        if let Some(limit) = packet.limit {
            truncate(&mut packet.frame, limit as usize);
        }
        packet.frame.class = Class {
            priority: packet.key.priority,
            mark: packet.key.skb_mark,
        };
        let takes = vport.device.capabilities();
        if refragment::is_due(packet, takes.max_frame as usize)? {
            self.ident = self.ident.wrapping_add(1);
            let (ident, mut pieces) = (self.ident, Vec::new());
            refragment::refragment(packet, ident, pool, |piece| pieces.push(piece))?;
            let copied = (pieces.len() as u64).saturating_sub(1);
            batch.cell(packet.ingress, executor).copied.add(copied);
            for piece in pieces {
                self.enqueue(port, piece);
            }
            self.flush_if_full(batch, executor, pool, tap, port);
            return Ok(());
        }
        if packet.frame.offload.gso.is_none() && packet.frame.len() > takes.max_frame as usize {
            return Err(DropReason::OutputTooLong);
        }
        match plan(&packet.frame, &takes) {
            Plan::AsItIs => {}
            Plan::Complete => {
                complete_checksum(&mut packet.frame).map_err(|_| DropReason::Malformed)?;
            }
            Plan::Segment => {
                let mut segments =
                    Segments::new(&packet.frame).map_err(|_| DropReason::Malformed)?;
                let (mut made, mut too_long) = (0, 0);
                while let Some(segment) = segments.next(pool) {
                    made += 1;
                    // The sender's segments may be those of a larger MTU.
                    if segment.len() > takes.max_frame as usize {
                        too_long += 1;
                        if tap.is_on() {
                            tap.dropped_part(batch, packet, &segment, DropReason::OutputTooLong);
                        }
                        pool.put(segment);
                    } else {
                        self.enqueue(port, segment);
                    }
                }
                if made == 0 {
                    return Err(DropReason::Malformed);
                }
                let cell = batch.cell(packet.ingress, executor);
                cell.copied.add(made - 1);
                cell.drop(DropReason::OutputTooLong, too_long);
                self.flush_if_full(batch, executor, pool, tap, port);
                return Ok(());
            }
        }
        self.enqueue(port, std::mem::take(&mut packet.frame));
        self.flush_if_full(batch, executor, pool, tap, port);
        Ok(())
    }

    /// Gives every port what waits for it.
    pub fn flush(&mut self, batch: &Batch<'_>, executor: usize, pool: &mut Pool, tap: &mut Tap) {
        while let Some(port) = self.waiting.pop() {
            self.flush_port(batch, executor, pool, tap, port);
        }
    }

    fn enqueue(&mut self, port: u32, frame: Frame) {
        let index = port as usize;
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, Vec::new);
        }
        if let Some(queue) = self.queues.get_mut(index) {
            if queue.is_empty() {
                self.waiting.push(port);
            }
            queue.push(frame);
        }
    }

    fn flush_if_full(
        &mut self,
        batch: &Batch<'_>,
        executor: usize,
        pool: &mut Pool,
        tap: &mut Tap,
        port: u32,
    ) {
        if self
            .queues
            .get(port as usize)
            .is_some_and(|queue| queue.len() >= FULL)
        {
            self.waiting.retain(|waiting| *waiting != port);
            self.flush_port(batch, executor, pool, tap, port);
        }
    }

    fn flush_port(
        &mut self,
        batch: &Batch<'_>,
        executor: usize,
        pool: &mut Pool,
        tap: &mut Tap,
        port: u32,
    ) {
        let Some(queue) = self.queues.get_mut(port as usize) else {
            return;
        };
        let Some(vport) = batch.ports.get(port) else {
            // The set of ports is the same for the whole batch, so this can't be; still, no frame goes
            // uncounted.
            let cell = batch.datapath.counters.cell(executor);
            cell.drop(DropReason::OutputNoPort, queue.len() as u64);
            queue.clear();
            return;
        };
        let mut outcome = TxOutcome::default();
        if tap.is_on() && tap.wants_transmitted(batch, port) {
            transmit_seen(batch, vport, queue, pool, tap, &mut outcome);
        } else {
            vport.transmit(queue, pool, &mut outcome);
        }
        account(vport.counters.cell(executor), &outcome);
        if self.fed.len() < FULL && !self.fed.contains(&port) {
            self.fed.push(port);
        }
    }

    /// The ports that got frames since it was asked last; the first [`FULL`] of them.
    pub fn take_fed(&mut self) -> std::vec::Drain<'_, u32> {
        self.fed.drain(..)
    }
}

/// What a tunnel chooses a packet's source port by.
pub fn source_port_entropy(hash: u32) -> u16 {
    (hash >> 16) as u16 ^ hash as u16
}

/// Frames of a port that somebody captures: one by one, so that each is known to be taken or refused.
fn transmit_seen(
    batch: &Batch<'_>,
    vport: &Vport,
    frames: &mut Vec<Frame>,
    pool: &mut Pool,
    tap: &mut Tap,
    outcome: &mut TxOutcome,
) {
    let mut one = Vec::with_capacity(1);
    for frame in frames.drain(..) {
        let number = tap.transmitting(batch, vport.number, &frame);
        one.push(frame);
        let before = *outcome;
        vport.transmit(&mut one, pool, outcome);
        let refused = TxRefusal::ALL
            .into_iter()
            .find(|why| outcome.refused_for(*why) != before.refused_for(*why));
        tap.transmitted(batch, vport.number, number, refused.map(reason));
    }
}

/// Counts what became of frames.
pub(crate) fn account(cell: &Cell, outcome: &TxOutcome) {
    cell.transmitted.add(outcome.packets);
    cell.transmitted_bytes.add(outcome.bytes);
    if outcome.refused_total() != 0 {
        for why in TxRefusal::ALL {
            cell.drop(reason(why), outcome.refused_for(why));
        }
    }
}

fn reason(why: TxRefusal) -> DropReason {
    match why {
        TxRefusal::Full => DropReason::OutputFull,
        TxRefusal::TooLong => DropReason::OutputTooLong,
        TxRefusal::Down => DropReason::OutputDown,
        TxRefusal::Gone => DropReason::OutputGone,
        TxRefusal::Error => DropReason::OutputError,
        TxRefusal::Unreachable => DropReason::OutputUnreachable,
    }
}

/// What has to be done to a frame before a port takes it.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    AsItIs,
    Complete,
    Segment,
}

fn plan(frame: &Frame, takes: &Capabilities) -> Plan {
    let Offload { csum, gso, .. } = frame.offload;
    if let Some(gso) = gso {
        let taken = match gso.kind {
            GsoKind::TcpV4 => takes.tso4,
            GsoKind::TcpV6 => takes.tso6,
            GsoKind::UdpL4 => takes.uso,
            GsoKind::UdpFragments => takes.ufo,
        };
        let whole = taken && takes.csum && frame.len() <= takes.max_gso_frame as usize;
        return if whole { Plan::AsItIs } else { Plan::Segment };
    }
    match csum {
        // A CRC32c (SCTP's field is at 8) is none of the sums that virtio-net headers can ask for.
        Some(partial) if !takes.csum || partial.offset == 8 => Plan::Complete,
        _ => Plan::AsItIs,
    }
}

/// Cuts a frame to `len` bytes. What was left to be done is done over what remains, or given up where
/// its field is no more, as nobody could do it later.
fn truncate(frame: &mut Frame, len: usize) {
    if frame.len() <= len.max(ETHERNET) {
        return;
    }
    frame.truncate(len.max(ETHERNET));
    frame.offload.gso = None;
    if frame.offload.csum.is_some() && complete_checksum(frame).is_err() {
        frame.offload.csum = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use frame::{Gso, PartialChecksum};

    const TAKES: Capabilities = Capabilities {
        csum: true,
        tso4: true,
        tso6: false,
        uso: false,
        ufo: false,
        vlan: true,
        max_frame: 1514,
        max_gso_frame: 65_550,
    };

    fn frame(gso: Option<GsoKind>, offset: u16) -> Frame {
        let mut frame = Frame::from_bytes(&[0; 100]);
        frame.offload.csum = Some(PartialChecksum { start: 34, offset });
        frame.offload.gso = gso.map(|kind| Gso {
            kind,
            ecn: false,
            size: 10,
            header_len: 54,
        });
        frame
    }

    #[test]
    fn what_the_port_takes_stays_whole() {
        assert_eq!(plan(&frame(Some(GsoKind::TcpV4), 16), &TAKES), Plan::AsItIs);
        assert_eq!(plan(&frame(None, 16), &TAKES), Plan::AsItIs);
    }

    #[test]
    fn what_it_does_not_take_is_done_before() {
        assert_eq!(
            plan(&frame(Some(GsoKind::TcpV6), 16), &TAKES),
            Plan::Segment
        );
        assert_eq!(plan(&frame(None, 8), &TAKES), Plan::Complete);
        let plain = Capabilities {
            csum: false,
            ..TAKES
        };
        assert_eq!(plan(&frame(None, 16), &plain), Plan::Complete);
        assert_eq!(
            plan(&frame(Some(GsoKind::TcpV4), 16), &plain),
            Plan::Segment
        );
    }

    #[test]
    fn a_truncated_frame_keeps_its_ethernet_header_and_owes_nothing() {
        let mut cut = frame(Some(GsoKind::TcpV4), 16);
        truncate(&mut cut, 3);
        assert_eq!(cut.len(), ETHERNET);
        assert_eq!(cut.offload.gso, None);
        assert_eq!(cut.offload.csum, None);
    }
}
