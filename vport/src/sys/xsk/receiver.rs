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
