//! One end of a ring between us and the kernel. See [`super`], Synchronization.

use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;

use crate::sys::mapping::Mapping;

/// Plain data, every bit pattern of which is a value.
///
/// # Safety
/// It is just that.
pub(super) unsafe trait Entry: Copy {}
// SAFETY: an integer: an address in the UMEM.
unsafe impl Entry for u64 {}
// SAFETY: three integers without padding.
unsafe impl Entry for libc::xdp_desc {}

/// A ring in memory. Indices are free-running; an entry's place is its index modulo the size.
#[derive(Debug)]
struct Ring<T> {
    memory: Mapping,
    offsets: libc::xdp_ring_offset,
    /// A power of two.
    size: u32,
    entries: PhantomData<T>,
}

// SAFETY: memory shared with the kernel only, entries are plain data, all use is through `&mut` of the
// end that owns this ring.
unsafe impl<T: Entry> Send for Ring<T> {}

impl<T: Entry> Ring<T> {
    fn new(memory: Mapping, offsets: libc::xdp_ring_offset, size: u32) -> Result<Self, Errno> {
        let entries = (size as usize).checked_mul(size_of::<T>());
        let fits = |offset: u64, length: usize, align: usize| {
            usize::try_from(offset).is_ok_and(|offset| {
                offset % align == 0
                    && offset
                        .checked_add(length)
                        .is_some_and(|end| end <= memory.length())
            })
        };
        let index = |offset| fits(offset, 4, align_of::<AtomicU32>());
        let all = size.is_power_of_two()
            && entries.is_some_and(|bytes| fits(offsets.desc, bytes, align_of::<T>()))
            && [offsets.producer, offsets.consumer, offsets.flags]
                .into_iter()
                .all(index);
        if !all {
            // Offsets of a kernel that is older than the flags (5.4), or nonsense.
            return Err(Errno::OPNOTSUPP);
        }
        Ok(Self {
            memory,
            offsets,
            size,
            entries: PhantomData,
        })
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: `new` has checked that an aligned word is there; it is shared with the kernel as an
        // atomic only, and lives as long as the mapping.
        unsafe { AtomicU32::from_ptr(self.memory.start().add(offset as usize).cast()) }
    }

    fn producer(&self) -> &AtomicU32 {
        self.word(self.offsets.producer)
    }

    fn consumer(&self) -> &AtomicU32 {
        self.word(self.offsets.consumer)
    }

    fn entry(&self, index: u32) -> *mut T {
        let place = (index & (self.size - 1)) as usize;
        // SAFETY: `place` is below the size, and `new` has checked that so many entries are there.
        unsafe {
            self.memory
                .start()
                .add(self.offsets.desc as usize)
                .cast::<T>()
                .add(place)
        }
    }

    fn needs_wakeup(&self) -> bool {
        self.word(self.offsets.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// Bytes to map for a ring of `size` entries.
fn length<T>(offsets: &libc::xdp_ring_offset, size: u32) -> Result<usize, Errno> {
    usize::try_from(offsets.desc)
        .ok()
        .and_then(|desc| desc.checked_add(size as usize * size_of::<T>()))
        .ok_or(Errno::OVERFLOW)
}

/// Room for more entries than any frame needs: no need to look where the kernel is.
const ENOUGH: u32 = 17;

/// The end that produces: of a fill or transmit ring.
#[derive(Debug)]
pub(super) struct Producer<T> {
    ring: Ring<T>,
    /// The next entry to be written. The kernel sees those before [`Producer::publish`]ed.
    next: u32,
    /// Where the kernel was when we last looked: never ahead of where it is.
    consumed: u32,
}

impl<T: Entry> Producer<T> {
    pub(super) fn map(
        fd: BorrowedFd<'_>,
        page_offset: u64,
        offsets: libc::xdp_ring_offset,
        size: u32,
    ) -> Result<Self, Errno> {
        let memory = Mapping::of(fd, length::<T>(&offsets, size)?, page_offset)?;
        Self::new(Ring::new(memory, offsets, size)?)
    }

    fn new(ring: Ring<T>) -> Result<Self, Errno> {
        let next = ring.producer().load(Ordering::Relaxed);
        let consumed = ring.consumer().load(Ordering::Acquire);
        Ok(Self {
            ring,
            next,
            consumed,
        })
    }

    /// Puts an entry in the next place, not yet visible to the kernel; gives it back if there is none.
    #[inline]
    pub(super) fn push(&mut self, entry: T) -> Result<(), T> {
        if self.next.wrapping_sub(self.consumed) >= self.ring.size {
            self.consumed = self.ring.consumer().load(Ordering::Acquire);
            if self.next.wrapping_sub(self.consumed) >= self.ring.size {
                return Err(entry);
            }
        }
        // SAFETY: a place of the ring, which the kernel has consumed (Acquire above) and doesn't read
        // before we publish it.
        unsafe { self.ring.entry(self.next).write(entry) };
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    /// How many entries can be pushed.
    #[inline]
    pub(super) fn room(&mut self) -> u32 {
        let room = self.ring.size - self.next.wrapping_sub(self.consumed).min(self.ring.size);
        if room > ENOUGH {
            return room;
        }
        self.ring.size - self.waiting()
    }

    /// Lets the kernel see what was pushed.
    #[inline]
    pub(super) fn publish(&mut self) {
        self.ring.producer().store(self.next, Ordering::Release);
    }

    /// How many entries the kernel hasn't consumed yet.
    #[inline]
    pub(super) fn waiting(&mut self) -> u32 {
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.next.wrapping_sub(self.consumed).min(self.ring.size)
    }

    /// Overwrites each entry that the kernel hasn't consumed, the youngest first, with what `with`
    /// makes of it; ends when that is `None`. For when the kernel is known not to be reading: a ring
    /// is not made to be changed behind the producer's index.
    pub(super) fn rewrite_waiting(&mut self, mut with: impl FnMut(T) -> Option<T>) {
        for back in 1..=self.waiting() {
            let place = self.ring.entry(self.next.wrapping_sub(back));
            // SAFETY: a place of the ring with an entry that we wrote; the kernel only reads there.
            match with(unsafe { place.read() }) {
                // SAFETY: as above.
                Some(entry) => unsafe { place.write_volatile(entry) },
                None => return,
            }
        }
    }

    /// Whether the kernel waits for a system call before it looks at the ring again.
    #[inline]
    pub(super) fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// The end that consumes: of a receive or completion ring.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    ring: Ring<T>,
    /// The next entry to be read.
    next: u32,
    /// Where the kernel was when we last looked: never ahead of where it is.
    produced: u32,
}

impl<T: Entry> Consumer<T> {
    pub(super) fn map(
        fd: BorrowedFd<'_>,
        page_offset: u64,
        offsets: libc::xdp_ring_offset,
        size: u32,
    ) -> Result<Self, Errno> {
        let memory = Mapping::of(fd, length::<T>(&offsets, size)?, page_offset)?;
        Self::new(Ring::new(memory, offsets, size)?)
    }

    fn new(ring: Ring<T>) -> Result<Self, Errno> {
        let next = ring.consumer().load(Ordering::Relaxed);
        Ok(Self {
            ring,
            next,
            produced: next,
        })
    }

    /// The next entry, if there is one. Its place is the kernel's again after [`Consumer::release`].
    #[inline]
    pub(super) fn pop(&mut self) -> Option<T> {
        if self.next == self.produced {
            let produced = self.ring.producer().load(Ordering::Acquire);
            if produced.wrapping_sub(self.next) > self.ring.size {
                // Nothing that a ring can say.
                return None;
            }
            self.produced = produced;
            if self.next == produced {
                return None;
            }
        }
        // SAFETY: a place of the ring that the kernel has written (Acquire above) and doesn't write
        // again before we release it.
        let entry = unsafe { self.ring.entry(self.next).read() };
        self.next = self.next.wrapping_add(1);
        Some(entry)
    }

    /// Lets the kernel have the places of what was popped.
    #[inline]
    pub(super) fn release(&mut self) {
        self.ring.consumer().store(self.next, Ordering::Release);
    }
}

/// Both ends of a ring in memory: what tests have in place of the kernel.
#[cfg(test)]
pub(super) fn pair<T: Entry>(size: u32, start: u32) -> (Producer<T>, Consumer<T>) {
    const OFFSETS: libc::xdp_ring_offset = libc::xdp_ring_offset {
        producer: 0,
        consumer: 64,
        desc: 192,
        flags: 128,
    };
    let file = rustix::fs::memfd_create("ring", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    let map = || {
        let memory = Mapping::of(std::os::fd::AsFd::as_fd(&file), 4096, 0).unwrap();
        Ring::<T>::new(memory, OFFSETS, size).unwrap()
    };
    let ring = map();
    ring.producer().store(start, Ordering::Relaxed);
    ring.consumer().store(start, Ordering::Relaxed);
    (Producer::new(map()).unwrap(), Consumer::new(map()).unwrap())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const OFFSETS: libc::xdp_ring_offset = libc::xdp_ring_offset {
        producer: 0,
        consumer: 64,
        desc: 192,
        flags: 128,
    };

    #[test]
    fn a_ring_is_a_queue_also_when_its_indices_wrap() {
        for (size, start) in [(1, 0), (2, u32::MAX), (8, u32::MAX - 3), (8, 7)] {
            let (mut producer, mut consumer) = pair::<u64>(size, start);
            let (mut model, mut pushed) = (VecDeque::new(), 0u64);
            let mut random = 12345u32;
            for _ in 0..10_000 {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if random >> 31 == 0 {
                    let full = model.len() == size as usize;
                    assert_eq!(producer.push(pushed).is_err(), full);
                    if !full {
                        model.push_back(pushed);
                        pushed += 1;
                    }
                    producer.publish();
                } else {
                    assert_eq!(consumer.pop(), model.pop_front());
                    consumer.release();
                }
                assert_eq!(producer.waiting() as usize, model.len());
            }
        }
    }

    #[test]
    fn nothing_is_seen_before_it_is_published_nor_freed_before_it_is_released() {
        let (mut producer, mut consumer) = pair::<u64>(2, 0);
        producer.push(1).unwrap();
        assert_eq!(consumer.pop(), None);
        producer.publish();
        assert_eq!(consumer.pop(), Some(1));
        producer.push(2).unwrap();
        assert_eq!(producer.push(3), Err(3));
        consumer.release();
        producer.push(3).unwrap();
    }

    #[test]
    fn two_threads_pass_a_million_in_order() {
        let (mut producer, mut consumer) = pair::<u64>(64, u32::MAX - 10);
        let sender = std::thread::spawn(move || {
            for n in 0..1_000_000 {
                while producer.push(n).is_err() {
                    std::thread::yield_now();
                }
                producer.publish();
            }
        });
        for n in 0..1_000_000 {
            let got = loop {
                if let Some(got) = consumer.pop() {
                    break got;
                }
                std::thread::yield_now();
            };
            assert_eq!(got, n);
            consumer.release();
        }
        sender.join().unwrap();
    }

    #[test]
    fn what_waits_can_be_rewritten_the_youngest_first() {
        let (mut producer, mut consumer) = pair::<u64>(4, u32::MAX);
        for n in 0..4 {
            producer.push(n).unwrap();
        }
        producer.publish();
        assert_eq!(consumer.pop(), Some(0));
        consumer.release();
        producer.rewrite_waiting(|n| (n > 1).then_some(n + 10));
        let rest: Vec<_> = std::iter::from_fn(|| consumer.pop()).collect();
        assert_eq!(rest, [1, 12, 13]);
    }

    #[test]
    fn an_index_that_makes_no_sense_gives_nothing() {
        let (mut producer, mut consumer) = pair::<u64>(4, 0);
        producer.next = 100;
        producer.publish();
        assert_eq!(consumer.pop(), None);
        assert_eq!(producer.waiting(), 4);
    }

    #[test]
    fn offsets_beyond_the_memory_are_refused() {
        let memory = || Mapping::anonymous(4096).unwrap();
        for (offsets, size) in [
            (OFFSETS, 3),
            (OFFSETS, 512),
            (
                libc::xdp_ring_offset {
                    producer: 4093,
                    ..OFFSETS
                },
                8,
            ),
            (
                libc::xdp_ring_offset {
                    consumer: 2,
                    ..OFFSETS
                },
                8,
            ),
            (
                libc::xdp_ring_offset {
                    desc: u64::MAX,
                    ..OFFSETS
                },
                8,
            ),
        ] {
            assert!(Ring::<u64>::new(memory(), offsets, size).is_err());
        }
    }
}
