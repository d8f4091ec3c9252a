//! Frames in: the receive ring, and the fill ring by which the kernel gets chunks to receive into.

use std::sync::Arc;

use super::ring::{Consumer, Producer};
use super::umem::{CHUNK, Umem};

/// `XDP_PKT_CONTD`: the frame goes on in the next chunk. Never set unless asked for (XDP_USE_SG).
const CONTINUED: u32 = 1;

/// The receiving half of a socket. One owner.
#[derive(Debug)]
pub(crate) struct Receiver {
    umem: Arc<Umem>,
    received: Consumer<libc::xdp_desc>,
    fill: Producer<u64>,
    /// Chunks of ours that the fill ring had no room for: a received frame can be seen before the
    /// place of its chunk in the fill ring is.
    waiting: Vec<u64>,
}

/// A received frame, in a chunk that is ours until [`Receiver::put_back`].
#[derive(Debug)]
pub(crate) struct Received {
    address: u64,
    /// Bytes.
    pub(crate) length: usize,
    /// It isn't the whole frame.
    pub(crate) damaged: bool,
}

impl Receiver {
    /// The kernel gets the first `chunks` chunks.
    pub(super) fn new(
        umem: Arc<Umem>,
        received: Consumer<libc::xdp_desc>,
        fill: Producer<u64>,
        chunks: u32,
    ) -> Self {
        let mut receiver = Self {
            umem,
            received,
            fill,
            waiting: (0..u64::from(chunks))
                .rev()
                .map(|n| n * CHUNK as u64)
                .collect(),
        };
        receiver.refill();
        receiver
    }

    /// The next frame.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<Received> {
        let descriptor = self.received.pop()?;
        Some(Received {
            address: descriptor.addr,
            length: descriptor.len as usize,
            damaged: descriptor.options & CONTINUED != 0,
        })
    }

    /// Copies the frame's bytes, as many as `to` has. False: the kernel's address makes no sense.
    #[inline]
    pub(crate) fn copy(&self, frame: &Received, to: &mut [u8]) -> bool {
        self.umem.read(frame.address, to)
    }

    /// The kernel may receive into this chunk again, from the next [`Receiver::refill`] on.
    #[inline]
    pub(crate) fn put_back(&mut self, frame: Received) {
        let chunk = frame.address - frame.address % CHUNK as u64;
        if self.fill.push(chunk).is_err() {
            self.waiting.push(chunk);
        }
    }

    /// Lets the kernel have what was put back, and the places of the frames taken.
    #[inline]
    pub(crate) fn refill(&mut self) {
        self.received.release();
        while let Some(chunk) = self.waiting.pop() {
            if self.fill.push(chunk).is_err() {
                self.waiting.push(chunk);
                break;
            }
        }
        self.fill.publish();
    }

    /// Whether the driver waits to be told that there are chunks again.
    #[inline]
    pub(crate) fn needs_wakeup(&self) -> bool {
        self.fill.needs_wakeup()
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
        let umem = Arc::new(Umem::new(8).unwrap());
        let mut receiver = Receiver::new(Arc::clone(&umem), received, fill, 8);
        let mut taken = Vec::new();
        for round in 0..1000u64 {
            taken.extend(std::iter::from_fn(|| kernel_takes.pop()));
            if round % 3 != 0 {
                kernel_takes.release();
            }
            for address in std::mem::take(&mut taken) {
                let address = address + 256;
                umem.write(address, &[&round.to_ne_bytes()]);
                let descriptor = libc::xdp_desc {
                    addr: address,
                    len: 8,
                    options: 0,
                };
                kernel_gives.push(descriptor).ok().unwrap();
            }
            kernel_gives.publish();
            let mut frames = Vec::new();
            while let Some(frame) = receiver.next() {
                let mut bytes = [0; 8];
                assert!(receiver.copy(&frame, &mut bytes));
                assert_eq!((frame.length, u64::from_ne_bytes(bytes)), (8, round));
                frames.push(frame);
            }
            frames
                .into_iter()
                .for_each(|frame| receiver.put_back(frame));
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
        let expected: Vec<u64> = (0..8).map(|n| n * CHUNK as u64).collect();
        assert_eq!(all, expected);
    }
}
