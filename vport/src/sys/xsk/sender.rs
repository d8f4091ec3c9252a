//! Frames out: the transmit ring, and the completion ring by which their chunks come back.

use std::sync::Arc;

use super::ring::{Consumer, Producer};
use super::umem::{CHUNK, Umem};

/// Where no chunk is: the kernel skips a descriptor that says this.
const NOWHERE: u64 = u64::MAX;

/// The sending half of a socket. One owner at a time.
#[derive(Debug)]
pub(crate) struct Sender {
    umem: Arc<Umem>,
    transmit: Producer<libc::xdp_desc>,
    completed: Consumer<u64>,
    /// The sender's first chunk.
    first: u32,
    /// Its chunks that are free, counted from `first`.
    free: Vec<u32>,
    /// Which of them the kernel has: what it gives back twice, or never had, is not taken.
    out: Vec<bool>,
}

/// There is no free chunk, or no room in the ring: [`Sender::reclaim`], kick, or give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Sender {
    /// Has `chunks` chunks from `first` on.
    pub(super) fn new(
        umem: Arc<Umem>,
        transmit: Producer<libc::xdp_desc>,
        completed: Consumer<u64>,
        first: u32,
        chunks: u32,
    ) -> Self {
        Self {
            umem,
            transmit,
            completed,
            first,
            free: (0..chunks).rev().collect(),
            out: vec![false; chunks as usize],
        }
    }

    fn address(&self, chunk: u32) -> u64 {
        (u64::from(self.first) + u64::from(chunk)) * CHUNK as u64
    }

    fn chunk(&self, address: u64) -> Option<u32> {
        let chunk = (address / CHUNK as u64).checked_sub(u64::from(self.first))?;
        u32::try_from(chunk).ok()
    }

    /// A chunk is ours again.
    fn take_back(&mut self, address: u64) {
        let Some(chunk) = self.chunk(address) else {
            return;
        };
        if let Some(out) = self.out.get_mut(chunk as usize)
            && *out
        {
            *out = false;
            self.free.push(chunk);
        }
    }

    /// Takes back what the kernel is done with.
    pub(crate) fn reclaim(&mut self) {
        while let Some(address) = self.completed.pop() {
            self.take_back(address);
        }
        self.completed.release();
    }

    /// Appends a frame made of `parts`, at most [`LONGEST_SENT`](super::umem::LONGEST_SENT) bytes
    /// together; the kernel sees it after [`Sender::publish`].
    pub(crate) fn push(&mut self, parts: &[&[u8]]) -> Result<(), Full> {
        let Some(&chunk) = self.free.last() else {
            return Err(Full);
        };
        let address = self.address(chunk);
        if !self.umem.write(address, parts) {
            return Err(Full);
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.transmit
            .push(libc::xdp_desc {
                addr: address,
                len: length as u32,
                options: 0,
            })
            .map_err(|_| Full)?;
        self.free.pop();
        if let Some(out) = self.out.get_mut(chunk as usize) {
            *out = true;
        }
        Ok(())
    }

    /// Lets the kernel see what was pushed.
    #[inline]
    pub(crate) fn publish(&mut self) {
        self.transmit.publish();
    }

    /// How many frames the kernel hasn't looked at yet.
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
        self.transmit.rewrite_waiting(|descriptor| {
            if addresses.len() as u32 == count || descriptor.addr == NOWHERE {
                return None;
            }
            addresses.push(descriptor.addr);
            Some(libc::xdp_desc {
                addr: NOWHERE,
                ..descriptor
            })
        });
        for address in &addresses {
            self.take_back(*address);
        }
        addresses.len() as u32
    }

    /// How many chunks are out.
    pub(crate) fn out(&self) -> usize {
        self.out.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::pair;
    use super::*;

    /// A sender of four chunks behind two that aren't its own, and the kernel's ends of its rings.
    fn sender() -> (Sender, Consumer<libc::xdp_desc>, Producer<u64>) {
        let (transmit, kernel_takes) = pair(4, u32::MAX - 5);
        let (kernel_gives, completed) = pair(4, u32::MAX);
        let umem = Arc::new(Umem::new(6).unwrap());
        let sender = Sender::new(umem, transmit, completed, 2, 4);
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
                sender.push(&[&[round as u8], &[n as u8; 59]]).unwrap();
            }
            assert_eq!(sender.out(), count as usize);
            sender.publish();
            assert_eq!(sender.waiting(), count);
            for address in addresses(&mut takes) {
                let mut first = [0];
                assert!(sender.umem.read(address, &mut first));
                assert_eq!(first[0], round as u8);
                gives.push(address).unwrap();
            }
            gives.publish();
            sender.reclaim();
            assert_eq!(sender.out(), 0);
        }
    }

    #[test]
    fn a_fifth_frame_has_no_chunk() {
        let (mut sender, ..) = sender();
        for _ in 0..4 {
            sender.push(&[&[0; 60]]).unwrap();
        }
        assert_eq!(sender.push(&[&[0; 60]]), Err(Full));
        assert_eq!(sender.out(), 4);
    }

    #[test]
    fn what_the_kernel_never_had_or_gives_twice_is_not_taken() {
        let (mut sender, _, mut gives) = sender();
        sender.push(&[&[0; 60]]).unwrap();
        sender.push(&[&[0; 60]]).unwrap();
        let mine = 2 * CHUNK as u64;
        for (address, left) in [
            (0, 2),
            (mine + 3 * CHUNK as u64, 2),
            (u64::MAX, 2),
            (mine + 8, 1),
            (mine, 1),
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
            sender.push(&[&[0; 60]]).unwrap();
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
}
