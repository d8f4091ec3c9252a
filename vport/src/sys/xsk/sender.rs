//! Frames out: the transmit ring, and the completion ring by which their chunks come back.

use std::sync::Arc;

use frame::Frame;

use super::receiver::CONTINUED;
use super::ring::{Consumer, Producer};
use super::socket::Descriptor;
use super::umem::{CHUNK, Chunk, Given, Umem};

/// Where no chunk is: the kernel skips a descriptor that says this.
const NOWHERE: u64 = u64::MAX;
/// Chunks fetched, and given back, at a time.
const FETCH: usize = 64;

/// The sending half of a socket. One owner at a time. It has no chunks but those under way: it fetches
/// what it copies frames into, and frames bring their own.
#[derive(Debug)]
pub(crate) struct Sender {
    umem: &'static Umem,
    transmit: Producer<libc::xdp_desc>,
    completed: Consumer<u64>,
    /// Chunks that are free, a few.
    stash: Vec<Chunk>,
    /// The kernel's chunks.
    given: Given,
    /// Frames sent from the chunk that they came in, and by a copy.
    pub(crate) counts: (u64, u64),
    // Last: the rings are unmapped by then.
    descriptor: Option<Arc<Descriptor>>,
}

/// There is no free chunk, or no room in the ring: [`Sender::reclaim`], kick, or give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Sender {
    pub(super) fn new(
        umem: &'static Umem,
        transmit: Producer<libc::xdp_desc>,
        completed: Consumer<u64>,
        descriptor: Option<Arc<Descriptor>>,
    ) -> Self {
        Self {
            umem,
            transmit,
            completed,
            stash: Vec::new(),
            given: Given::new(umem),
            counts: (0, 0),
            descriptor,
        }
    }

    /// A chunk is ours again; what the kernel gives back twice, or never had, is not taken.
    fn take_back(&mut self, address: u64) {
        if let Some(chunk) = self.given.take(address) {
            self.stash.push(chunk);
        }
    }

    /// Takes back what the kernel is done with.
    pub(crate) fn reclaim(&mut self) {
        while let Some(address) = self.completed.pop() {
            self.take_back(address);
        }
        self.completed.release();
        if self.stash.len() > 2 * FETCH {
            self.umem.put(self.stash.drain(FETCH..));
        }
    }

    /// Whether frames are in memory of ours: [`Sender::pass`] then takes them.
    #[inline]
    pub(crate) fn has(&self, frame: &Frame) -> bool {
        frame.is_lent_by(self.umem)
    }

    /// Appends a frame as it lies in memory; the kernel sees it after [`Sender::publish`].
    ///
    /// # Errors
    /// The frame, if there is no room in the ring, or its bytes are elsewhere.
    #[inline]
    pub(crate) fn pass(&mut self, frame: Frame) -> Result<(), Frame> {
        if frame.is_empty() || self.transmit.room() == 0 {
            return Err(frame);
        }
        let (chunk, offset, length) = self.umem.reclaim(frame)?;
        self.append(chunk, offset, length, false);
        self.counts.0 += 1;
        Ok(())
    }

    /// To a ring that has room.
    fn append(&mut self, chunk: Chunk, offset: usize, length: usize, continued: bool) {
        let descriptor = libc::xdp_desc {
            addr: chunk.address() + offset as u64,
            len: length as u32,
            options: if continued { CONTINUED } else { 0 },
        };
        match self.transmit.push(descriptor) {
            Ok(()) => self.given.give(chunk),
            Err(_) => self.stash.push(chunk),
        }
    }

    /// Appends a copy of a frame made of `parts`, in as many chunks as it takes (several only if the socket
    /// may do so, XDP_USE_SG); the kernel sees it after [`Sender::publish`].
    pub(crate) fn push(&mut self, parts: &[&[u8]; 3]) -> Result<(), Full> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let chunks = length.div_ceil(CHUNK);
        if self.transmit.room() < chunks as u32 {
            return Err(Full);
        }
        if self.stash.len() < chunks {
            self.umem.draw(FETCH.max(chunks), false, &mut self.stash);
        }
        if self.stash.len() < chunks {
            return Err(Full);
        }
        let mut rest = *parts;
        let mut done = 0;
        while let Some(chunk) = (done < length).then(|| self.stash.pop()).flatten() {
            let left = self.umem.write(&chunk, &rest);
            let written = length - done - left;
            let mut gone = written;
            for part in &mut rest {
                let step = gone.min(part.len());
                *part = part.get(step..).unwrap_or_default();
                gone -= step;
            }
            done += written;
            self.append(chunk, 0, written, done < length);
        }
        self.counts.1 += 1;
        Ok(())
    }

    /// Lets the kernel see what was pushed.
    #[inline]
    pub(crate) fn publish(&mut self) {
        self.transmit.publish();
    }

    /// How many descriptors the kernel hasn't looked at yet.
    #[inline]
    pub(crate) fn waiting(&mut self) -> u32 {
        self.transmit.waiting()
    }

    /// Whether the kernel has to be kicked to look at them. Always so in copy mode.
    #[inline]
    pub(crate) fn needs_wakeup(&self) -> bool {
        self.transmit.needs_wakeup()
    }

    /// Takes back the youngest `count` frames that the kernel hasn't looked at; gives how many. Only
    /// when it refuses to look (the device is down): their places stay, pointing nowhere, which the
    /// kernel skips and counts (`tx_invalid_descs`).
    pub(crate) fn withdraw(&mut self, count: u32) -> u32 {
        let mut addresses = Vec::new();
        let mut frames = 0;
        self.transmit.rewrite_waiting(|descriptor| {
            let last = descriptor.options & CONTINUED == 0;
            if descriptor.addr == NOWHERE || (last && frames == count) {
                return None;
            }
            frames += u32::from(last);
            addresses.push(descriptor.addr);
            Some(libc::xdp_desc {
                addr: NOWHERE,
                len: descriptor.len,
                options: 0,
            })
        });
        for address in &addresses {
            self.take_back(*address);
        }
        frames
    }

    /// How many chunks are out.
    pub(crate) fn out(&self) -> usize {
        self.given.count()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if let Some(descriptor) = &self.descriptor {
            descriptor.leave(&mut self.stash, &mut self.given);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::pair;
    use super::*;

    /// A sender in an area of six chunks, with rings for four, and the kernel's ends of them.
    fn sender() -> (Sender, Consumer<libc::xdp_desc>, Producer<u64>) {
        sender_in(Umem::alone(6))
    }

    fn sender_in(umem: &'static Umem) -> (Sender, Consumer<libc::xdp_desc>, Producer<u64>) {
        let (transmit, kernel_takes) = pair(4, u32::MAX - 5);
        let (kernel_gives, completed) = pair(4, u32::MAX);
        let sender = Sender::new(umem, transmit, completed, None);
        (sender, kernel_takes, kernel_gives)
    }

    fn addresses(ring: &mut Consumer<libc::xdp_desc>) -> Vec<u64> {
        let taken = std::iter::from_fn(|| ring.pop().map(|d| d.addr)).collect();
        ring.release();
        taken
    }

    #[test]
    fn chunks_come_back_and_none_is_lost_over_many_turns() {
        let (mut sender, mut takes, mut gives) = sender();
        for round in 0..1000u32 {
            let count = round % 4 + 1;
            for n in 0..count {
                sender.push(&[&[round as u8], &[n as u8; 59], &[]]).unwrap();
            }
            assert_eq!(sender.out(), count as usize);
            sender.publish();
            assert_eq!(sender.waiting(), count);
            for address in addresses(&mut takes) {
                assert_eq!(sender.umem.peek(address), round as u8);
                gives.push(address).unwrap();
            }
            gives.publish();
            sender.reclaim();
            assert_eq!(sender.out(), 0);
        }
    }

    #[test]
    fn a_fifth_frame_has_no_room() {
        let (mut sender, ..) = sender();
        for _ in 0..4 {
            sender.push(&[&[0; 60], &[], &[]]).unwrap();
        }
        assert_eq!(sender.push(&[&[0; 60], &[], &[]]), Err(Full));
        assert_eq!(sender.out(), 4);
    }

    #[test]
    fn what_the_kernel_never_had_or_gives_twice_is_not_taken() {
        let (mut sender, mut takes, mut gives) = sender();
        sender.push(&[&[0; 60], &[], &[]]).unwrap();
        sender.push(&[&[0; 60], &[], &[]]).unwrap();
        sender.publish();
        let had = addresses(&mut takes);
        let other = (0..6).map(|n| n * CHUNK as u64);
        let other = other.clone().find(|n| !had.contains(n)).unwrap();
        for (address, left) in [
            (other, 2),
            (9 * CHUNK as u64, 2),
            (u64::MAX, 2),
            (had[0] + 8, 1),
            (had[0], 1),
        ] {
            gives.push(address).unwrap();
            gives.publish();
            sender.reclaim();
            assert_eq!(sender.out(), left, "{address:#x}");
        }
    }

    #[test]
    fn frames_that_nobody_looked_at_are_withdrawn_the_youngest_first_and_once() {
        let (mut sender, mut takes, _) = sender();
        for _ in 0..4 {
            sender.push(&[&[0; 60], &[], &[]]).unwrap();
        }
        sender.publish();
        takes.pop().unwrap();
        takes.release();
        assert_eq!(sender.withdraw(2), 2);
        assert_eq!(sender.out(), 2);
        // The one in front of those is left; those are not found again.
        assert_eq!(sender.withdraw(9), 0);
        let nowhere = addresses(&mut takes);
        assert_eq!(nowhere[1..], [NOWHERE, NOWHERE]);
        assert_ne!(nowhere[0], NOWHERE);
    }
    #[test]
    fn a_long_frame_goes_in_several_chunks_whole_or_not_at_all() {
        let (mut sender, mut takes, mut gives) = sender();
        let bytes: Vec<u8> = (0..2 * CHUNK + 10).map(|n| (n / 100) as u8).collect();
        for _ in 0..50 {
            sender.push(&[&bytes[..12], &[], &bytes[12..]]).unwrap();
            // Two places are left, or one.
            assert_eq!(sender.push(&[&bytes, &[], &[]]), Err(Full));
            sender.push(&[&bytes[..60], &[], &[]]).unwrap();
            sender.publish();
            let came: Vec<_> = std::iter::from_fn(|| takes.pop()).collect();
            takes.release();
            let shape: Vec<_> = came.iter().map(|d| (d.len as usize, d.options)).collect();
            let whole = (CHUNK, CONTINUED);
            assert_eq!(shape, [whole, whole, (10, 0), (60, 0)]);
            for (descriptor, at) in came.iter().zip([0, CHUNK, 2 * CHUNK]) {
                assert_eq!(sender.umem.peek(descriptor.addr), bytes[at]);
            }
            came.iter().for_each(|d| gives.push(d.addr).unwrap());
            gives.publish();
            sender.reclaim();
            assert_eq!(
                (sender.out(), sender.umem.spare() + sender.stash.len()),
                (0, 6)
            );
        }
        sender.push(&[&bytes, &[], &[]]).unwrap();
        sender.push(&[&bytes[..60], &[], &[]]).unwrap();
        assert_eq!(sender.withdraw(1), 1);
        assert_eq!(sender.out(), 3);
    }

    #[test]
    fn a_frame_that_lies_in_the_memory_is_sent_from_there() {
        let (mut sender, mut takes, mut gives) = sender_in(Umem::alone(200));
        let umem = sender.umem;
        // So many that the sender gives some back.
        for _ in 0..1000 {
            let mut chunks = Vec::new();
            umem.draw(1, false, &mut chunks);
            let chunk = chunks.pop().unwrap();
            let address = chunk.address();
            let frame = umem.lend(chunk, 300, 60);
            assert!(sender.has(&frame));
            sender.pass(frame).unwrap();
            sender.publish();
            let descriptor = takes.pop().unwrap();
            takes.release();
            assert_eq!((descriptor.addr, descriptor.len), (address + 300, 60));
            gives.push(descriptor.addr).unwrap();
            gives.publish();
            sender.reclaim();
        }
        assert_eq!(
            (sender.counts, umem.spare() + sender.stash.len()),
            ((1000, 0), 200)
        );
        let elsewhere = Frame::from_bytes(&[1; 60]);
        assert!(!sender.has(&elsewhere));
        assert_eq!(sender.pass(elsewhere).unwrap_err().len(), 60);
    }
}
