//! Frames in: the receive ring, and the fill ring by which the kernel gets chunks to receive into.

use std::sync::Arc;

use frame::Frame;

use super::ring::{Consumer, Producer};
use super::socket::Descriptor;
use super::umem::{CHUNK, Chunk, Given, Umem};

/// `XDP_PKT_CONTD`: the frame goes on in the next chunk. Never set unless asked for (XDP_USE_SG).
pub(super) const CONTINUED: u32 = 1;
/// Chunks fetched at a time, in place of those that frames keep.
const FETCH: usize = 64;

/// The receiving half of a socket. One owner. It always has as many chunks as in the beginning: a frame
/// that keeps its chunk is replaced, or else copied.
#[derive(Debug)]
pub(crate) struct Receiver {
    umem: &'static Umem,
    received: Consumer<libc::xdp_desc>,
    fill: Producer<u64>,
    /// The kernel's chunks.
    given: Given,
    /// Chunks of ours that the fill ring had no room for: a received frame can be seen before the
    /// place of its chunk in the fill ring is.
    waiting: Vec<Chunk>,
    /// To replace those that frames keep.
    stash: Vec<Chunk>,
    // Last: the rings are unmapped by then.
    descriptor: Option<Arc<Descriptor>>,
}

/// What came in one chunk, ours until [`Receiver::put_back`] or [`Receiver::lend`].
#[derive(Debug)]
pub(crate) struct Received {
    /// `None`: the kernel named one that it hadn't got.
    chunk: Option<Chunk>,
    offset: usize,
    /// Bytes.
    pub(crate) length: usize,
    /// The frame goes on in the next one.
    pub(crate) continued: bool,
}

impl Receiver {
    /// The kernel gets `chunks` chunks.
    pub(super) fn new(
        umem: &'static Umem,
        received: Consumer<libc::xdp_desc>,
        fill: Producer<u64>,
        chunks: u32,
        descriptor: Option<Arc<Descriptor>>,
    ) -> Self {
        let mut waiting = Vec::new();
        umem.draw(chunks as usize, false, &mut waiting);
        let mut receiver = Self {
            umem,
            received,
            fill,
            given: Given::new(umem),
            waiting,
            stash: Vec::new(),
            descriptor,
        };
        receiver.refill();
        receiver
    }

    /// What came next.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<Received> {
        let descriptor = self.received.pop()?;
        Some(Received {
            chunk: self.given.take(descriptor.addr),
            offset: (descriptor.addr % CHUNK as u64) as usize,
            length: descriptor.len as usize,
            continued: descriptor.options & CONTINUED != 0,
        })
    }

    /// A frame of what came, which keeps the chunk.
    ///
    /// # Errors
    /// What came, if there is no other chunk to be had for this one, or it makes no sense: to be copied.
    #[inline]
    pub(crate) fn lend(&mut self, mut came: Received) -> Result<Frame, Received> {
        if came.offset.saturating_add(came.length) > CHUNK {
            return Err(came);
        }
        if self.stash.is_empty() {
            self.umem.draw(FETCH, true, &mut self.stash);
        }
        let Some(other) = self.stash.pop() else {
            return Err(came);
        };
        match came.chunk.take() {
            Some(chunk) => {
                self.give(other);
                Ok(self.umem.lend(chunk, came.offset, came.length))
            }
            None => {
                self.stash.push(other);
                Err(came)
            }
        }
    }

    /// Copies the bytes, as many as `to` has. False: what the kernel said makes no sense.
    #[inline]
    pub(crate) fn copy(&self, came: &Received, to: &mut [u8]) -> bool {
        let chunk = came.chunk.as_ref();
        chunk.is_some_and(|chunk| self.umem.read(chunk, came.offset, to))
    }

    /// The kernel may receive into this chunk again, from the next [`Receiver::refill`] on.
    #[inline]
    pub(crate) fn put_back(&mut self, came: Received) {
        if let Some(chunk) = came.chunk {
            self.give(chunk);
        }
    }

    #[inline]
    fn give(&mut self, chunk: Chunk) {
        match self.fill.push(chunk.address()) {
            Ok(()) => self.given.give(chunk),
            Err(_) => self.waiting.push(chunk),
        }
    }

    /// Lets the kernel have what was put back, and the places of the frames taken.
    #[inline]
    pub(crate) fn refill(&mut self) {
        self.received.release();
        while let Some(chunk) = self.waiting.pop() {
            if self.fill.push(chunk.address()).is_err() {
                self.waiting.push(chunk);
                break;
            }
            self.given.give(chunk);
        }
        self.fill.publish();
    }

    /// Whether the driver waits to be told that there are chunks again.
    #[inline]
    pub(crate) fn needs_wakeup(&self) -> bool {
        self.fill.needs_wakeup()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(descriptor) = &self.descriptor {
            self.waiting.append(&mut self.stash);
            descriptor.leave(&mut self.waiting, &mut self.given);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::pair;
    use super::*;

    #[test]
    fn every_chunk_is_with_the_kernel_or_waits_also_when_the_fill_ring_lags() {
        let (mut kernel_gives, received) = pair(8, u32::MAX - 2);
        // Half as large as it is in fact, so that it is full before the kernel has moved.
        let (fill, mut kernel_takes) = pair(4, 7);
        // Four more than the receiver has, for frames that keep theirs.
        let umem = Umem::alone(12);
        let mut receiver = Receiver::new(umem, received, fill, 8, None);
        let mut taken = Vec::new();
        for round in 0..1000u64 {
            taken.extend(std::iter::from_fn(|| kernel_takes.pop()));
            if round % 3 != 0 {
                kernel_takes.release();
            }
            for address in std::mem::take(&mut taken) {
                umem.poke(address, &round.to_ne_bytes());
                let descriptor = libc::xdp_desc {
                    addr: address + 256,
                    len: 8,
                    options: 0,
                };
                kernel_gives.push(descriptor).ok().unwrap();
            }
            kernel_gives.publish();
            let (mut came, mut frames) = (Vec::new(), Vec::new());
            while let Some(one) = receiver.next() {
                let mut bytes = [0; 8];
                assert!(receiver.copy(&one, &mut bytes));
                assert_eq!((one.length, u64::from_ne_bytes(bytes)), (8, round));
                match receiver.lend(one) {
                    Ok(frame) => frames.push(frame),
                    Err(one) => came.push(one),
                }
            }
            // As many as there are to replace them.
            assert!(frames.len() == 4 || came.is_empty(), "{}", frames.len());
            for frame in frames {
                assert_eq!(
                    (frame.bytes(), frame.headroom()),
                    (&round.to_ne_bytes()[..], 256)
                );
            }
            came.into_iter().for_each(|one| receiver.put_back(one));
            receiver.refill();
        }
        kernel_takes.release();
        // All eight, each once.
        let mut all = Vec::new();
        for _ in 0..3 {
            all.extend(std::iter::from_fn(|| kernel_takes.pop()));
            kernel_takes.release();
            receiver.refill();
        }
        all.sort_unstable();
        all.dedup();
        assert_eq!((all.len(), umem.spare() + receiver.stash.len()), (8, 4));
    }

    #[test]
    fn what_the_kernel_never_had_is_no_frame() {
        let (mut kernel_gives, received) = pair(8, 0);
        let (fill, _kernel_takes) = pair(8, 0);
        let umem = Umem::alone(12);
        let mut receiver = Receiver::new(umem, received, fill, 4, None);
        let mut random = 7u64;
        for _ in 0..1000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let address = match random >> 62 {
                0 => random,
                // A chunk that is there, but never given; a length beyond it.
                1 => 11 * CHUNK as u64,
                _ => random >> 40,
            };
            let descriptor = libc::xdp_desc {
                addr: address,
                len: (random >> 8) as u32,
                options: 0,
            };
            kernel_gives.push(descriptor).ok().unwrap();
            kernel_gives.publish();
            let came = receiver.next().unwrap();
            match receiver.lend(came) {
                Ok(frame) => assert!(frame.len() <= CHUNK),
                Err(came) => receiver.put_back(came),
            }
            receiver.refill();
        }
        assert_eq!(receiver.waiting.len() + receiver.given.count(), 4);
        assert_eq!(umem.spare() + receiver.stash.len(), 8);
    }
}
