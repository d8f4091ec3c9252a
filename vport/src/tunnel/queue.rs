//! One receive queue of a tunnel: packets of one IP version, out of their headers.
//!
//! A packet is one of these: a datagram; a datagram whose inner packet is still to be segmented or
//! completed (a neighbour's tunnel device), which stays so; several datagrams that were put together, by
//! their sender or on the way, which are taken apart.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use frame::tunnel::{Payload, Refused, TunnelKey, ecn, outer};
use frame::{Frame, GsoKind, Pool, merge, virtio};
use rustix::io::Errno;

use super::path::{Own, address};
use super::{Shared, wire};
use crate::error::Error;
use crate::port::{RxErrors, RxQueue, RxStatus};
use crate::sys::mmsg::{BATCH, ReceiveBatch, Received, Slot};
use crate::sys::packet_socket::PacketSocket;

const SMALLEST_BATCH: usize = 4;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

pub(super) struct Queue {
    shared: Arc<Shared>,
    socket: Arc<PacketSocket>,
    batch: ReceiveBatch,
    slots: Vec<Slot>,
    /// How many packets to ask for.
    ask: usize,
    own: Own,
}

impl Queue {
    pub(super) fn new(shared: Arc<Shared>, socket: Arc<PacketSocket>) -> Self {
        Self {
            shared,
            socket,
            batch: ReceiveBatch::new(),
            slots: Vec::with_capacity(BATCH),
            ask: SMALLEST_BATCH,
            own: Own::default(),
        }
    }

    /// What came, out of its headers.
    #[allow(clippy::too_many_arguments)] // A batch's.
    fn open(
        &mut self,
        packet: Frame,
        network: usize,
        now: Instant,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        errors: &mut RxErrors,
    ) -> Result<(), Refused> {
        let mut key = TunnelKey::none();
        let bytes = packet.bytes().get(network..).unwrap_or_default();
        let ip = outer::ip(bytes, &mut key)?;
        if !self.own.is_own(address(key.family, &key.dst), now) {
            // It is for somebody else, and will be forwarded by the host: not ours to count.
            pool.put(packet);
            return Ok(());
        }
        let transport = network + ip.header;
        let together = packet.offload.gso.filter(|gso| {
            let at_transport = |csum: frame::PartialChecksum| usize::from(csum.start) == transport;
            gso.kind == GsoKind::UdpL4 && packet.offload.csum.is_some_and(at_transport)
        });
        match together {
            Some(gso) => {
                let bytes = packet.bytes().get(transport..).unwrap_or_default();
                outer::udp(bytes, true, &mut key)?;
                let payload = bytes.get(outer::UDP_HEADER..).unwrap_or_default();
                for datagram in payload.chunks(usize::from(gso.size).max(1)) {
                    match self.copy_out(datagram, key, pool) {
                        Ok(frame) => out.push(frame),
                        Err(refused) => count(refused, errors),
                    }
                }
                pool.put(packet);
            }
            None => {
                let end = (network + ip.length).min(packet.len());
                out.push(self.decapsulate(packet, transport, end, key)?);
            }
        }
        Ok(())
    }

    /// One datagram.
    fn decapsulate(
        &self,
        mut packet: Frame,
        transport: usize,
        end: usize,
        mut key: TunnelKey,
    ) -> Result<Frame, Refused> {
        if packet.offload.gso.is_none() {
            // What is behind is padding of the link.
            packet.truncate(end);
        }
        let offload = packet.offload;
        // A checksum that is left to be made, the outer or the inner one, can't be checked yet.
        let vouched = offload.csum_valid || offload.csum.is_some();
        let bytes = packet.bytes().get(transport..).unwrap_or_default();
        let inner = wire::parse(&self.shared.config, bytes, vouched, &mut key)?;
        if inner.payload != Payload::Ethernet {
            return Err(Refused::Protocol);
        }
        // Taking off what it was for forgets the outer header's checksum.
        let header = transport + inner.header;
        if offload
            .csum
            .is_some_and(|csum| usize::from(csum.start) < header)
        {
            packet.offload.csum = None;
        }
        packet.pull_front(header).map_err(|_| Refused::Short)?;
        // It was the outer header's.
        packet.offload.csum_valid = false;
        finish(&mut packet, key)?;
        Ok(packet)
    }

    /// One of several datagrams that came together.
    fn copy_out(
        &self,
        datagram: &[u8],
        mut key: TunnelKey,
        pool: &mut Pool,
    ) -> Result<Frame, Refused> {
        let inner = wire::parse_datagram(&self.shared.config, datagram, &mut key)?;
        if inner.payload != Payload::Ethernet {
            return Err(Refused::Protocol);
        }
        let bytes = datagram.get(inner.header..).unwrap_or_default();
        let mut frame = pool.take(bytes.len());
        if let Some(space) = frame.space_mut().get_mut(..bytes.len()) {
            space.copy_from_slice(bytes);
        }
        frame.set_len(bytes.len());
        finish(&mut frame, key)?;
        Ok(frame)
    }
}

fn finish(frame: &mut Frame, key: TunnelKey) -> Result<(), Refused> {
    if frame.len() < ETHERNET {
        return Err(Refused::Short);
    }
    ecn::decapsulate(key.tos, frame)?;
    frame.vlan = None;
    frame.tunnel = Some(Box::new(key));
    Ok(())
}

/// The packet in a slot that was received into, and its buffers that aren't needed back to the pool.
fn take(slot: Slot, received: &Received, pool: &mut Pool, errors: &mut RxErrors) -> Option<Frame> {
    let Slot {
        mut small,
        mut large,
    } = slot;
    let split = small.space_mut().len();
    let mut frame = if received.length <= split {
        pool.put(large);
        small
    } else {
        if let Some(front) = large.space_mut().get_mut(..split) {
            front.copy_from_slice(small.space_mut());
        }
        pool.put(small);
        large
    };
    frame.set_len(received.length);
    if received.damaged {
        errors.truncated += 1;
    } else {
        match virtio::decode(&received.header, received.length) {
            Ok(offload) => {
                frame.offload = offload;
                return Some(frame);
            }
            Err(_) => errors.malformed += 1,
        }
    }
    pool.put(frame);
    None
}

fn count(refused: Refused, errors: &mut RxErrors) {
    match refused {
        Refused::Short | Refused::Header | Refused::Protocol => errors.tunnel_header += 1,
        Refused::Checksum => errors.tunnel_checksum += 1,
        Refused::Congestion => errors.tunnel_congestion += 1,
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl RxQueue for Queue {
    fn receive(
        &mut self,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Result<RxStatus, Error> {
        let mut errors = RxErrors::default();
        let (before, ask) = (out.len(), self.ask.min(max));
        self.slots.clear();
        self.slots.extend((0..ask).map(|_| Slot {
            small: pool.small(),
            large: pool.large(),
        }));
        let result = self.batch.receive(self.socket.as_fd(), &mut self.slots);
        let came = *result.as_ref().unwrap_or(&0);
        let now = Instant::now();
        let mut slots = std::mem::take(&mut self.slots);
        for (n, slot) in slots.drain(..).enumerate() {
            let Some(received) = self.batch.received(n).filter(|_| n < came) else {
                pool.put(slot.large);
                pool.put(slot.small);
                continue;
            };
            if let Some(packet) = take(slot, &received, pool, &mut errors)
                && let Err(refused) =
                    self.open(packet, received.network, now, pool, out, &mut errors)
            {
                count(refused, &mut errors);
            }
        }
        self.slots = slots;
        // As the kernel does for its tunnels: a stream's segments cost the ports behind as one packet.
        merge::merge(out, before, pool);
        let more = match result {
            Ok(came) => {
                self.ask = if came == ask {
                    (ask * 2).min(BATCH)
                } else {
                    (came + 1).clamp(SMALLEST_BATCH, BATCH)
                };
                came == ask
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            // A kind of GSO that a virtio-net header can't say: that packet is lost.
            Err(Errno::INVAL) => {
                errors.unsayable += 1;
                true
            }
            // All devices at once aren't gone or down: the notice of one that is.
            Err(Errno::NETDOWN | Errno::NXIO) => true,
            Err(errno) => {
                return Err(Error::os(
                    errno,
                    format!("receiving on {}", self.shared.name),
                ));
            }
        };
        self.shared.received.count(&errors);
        Ok(RxStatus::Open { more, errors })
    }
}
