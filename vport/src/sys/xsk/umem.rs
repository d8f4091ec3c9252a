//! The memory that frames lie in, shared with the kernel (a "UMEM"), in chunks of a page.
//!
//! # One for many sockets
//! As large as several queues need. The first socket registers it with the kernel, others are bound as
//! sharers (XDP_SHARED_UMEM), each with a fill and a completion ring of its own: so a frame received by one
//! is sent by another from the chunk that it came in. The kernel lends such an area only by a socket that is
//! bound, and its modes ([`Kind`]) are the first socket's; where that can't be, there is another area, and
//! frames are copied between the two.
//!
//! # Whose a chunk is
//! Set aside for as long as the process lives (and used again for later sockets), so that a frame can keep
//! its chunk as a `&'static mut [u8]`. A chunk of ours is a [`Chunk`], which can't be copied, or such a
//! reference. The kernel's are known one by one ([`Given`]): what it hands back is ours only if it had it,
//! so that no chunk is ever two frames', whatever the kernel says.
//!
//! # When a socket goes
//! its receiver and sender leave their chunks, those in the kernel's hands too, to its
//! [`Descriptor`](super::socket::Descriptor), which gives them back once the socket is closed. The kernel
//! then has them no more in copy mode. With zero copy a driver may be at them for a while longer: they are
//! not used again before everybody has left, when all pages are exchanged for new ones.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use frame::{Frame, Lender};
use rustix::io::Errno;

use super::socket::Descriptor;
use crate::sys::mapping::Mapping;

/// Bytes of a chunk: a page, the most that the kernel takes without hugepages.
pub(crate) const CHUNK: usize = 4096;
/// Bytes that the kernel leaves free in front of a received frame (XDP_PACKET_HEADROOM).
const HEADROOM: usize = 256;
/// The longest frame that can be received in one chunk.
pub(crate) const LONGEST_RECEIVED: usize = CHUNK - HEADROOM;
/// The longest frame that can be sent from one chunk.
pub(crate) const LONGEST_SENT: usize = CHUNK;
/// Chunks of an area for the usual ports: 64 MiB, five queues' worth.
const USUAL: u32 = 16_384;

/// Who moves a frame's bytes between device and chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copying {
    /// The kernel.
    Copy,
    /// Nobody: the driver works on the chunk itself.
    Zero,
}

/// What all sockets of an area have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) copying: Copying,
    /// A frame may be in several chunks (XDP_USE_SG, Linux 6.6).
    pub(crate) several: bool,
}

/// A chunk that is ours, and nobody else's in the process.
#[derive(Debug)]
pub(super) struct Chunk(u32);

impl Chunk {
    /// Its first byte, as rings have it.
    pub(super) fn address(&self) -> u64 {
        u64::from(self.0) * CHUNK as u64
    }
}

/// The chunks that one socket's ring, or the driver behind it, has.
#[derive(Debug)]
pub(super) struct Given {
    chunks: Vec<bool>,
    count: usize,
}

impl Given {
    pub(super) fn new(umem: &Umem) -> Self {
        Self {
            chunks: vec![false; umem.chunks as usize],
            count: 0,
        }
    }

    /// The kernel has it from now on.
    #[inline]
    pub(super) fn give(&mut self, chunk: Chunk) {
        if let Some(given) = self.chunks.get_mut(chunk.0 as usize) {
            *given = true;
            self.count += 1;
        }
    }

    /// The kernel says that it is done with the chunk in which `address` is. `None`: it never had it.
    #[inline]
    pub(super) fn take(&mut self, address: u64) -> Option<Chunk> {
        let number = u32::try_from(address / CHUNK as u64).ok()?;
        let given = self
            .chunks
            .get_mut(number as usize)
            .filter(|given| **given)?;
        *given = false;
        self.count -= 1;
        Some(Chunk(number))
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// All of them, for when the kernel can have none any more.
    fn take_all(&mut self) -> Vec<Chunk> {
        self.count = 0;
        let numbers = (0..).zip(&mut self.chunks);
        numbers
            .filter_map(|(number, given)| std::mem::take(given).then_some(Chunk(number)))
            .collect()
    }
}

/// What a half of a socket leaves behind.
#[derive(Debug, Default)]
pub(super) struct Left {
    ours: Vec<Chunk>,
    kernels: Vec<Chunk>,
}

impl Left {
    pub(super) fn add(&mut self, ours: &mut Vec<Chunk>, kernels: &mut Given) {
        self.ours.append(ours);
        self.kernels.append(&mut kernels.take_all());
    }
}

#[derive(Debug)]
struct State {
    /// Chunks that nobody has.
    spare: Vec<Chunk>,
    /// Chunks at which a driver may still be.
    retired: Vec<Chunk>,
    /// Chunks promised to the ports that are there.
    reserved: u32,
    /// So many chunks are for senders; beyond that a receiver lends no frame its chunk.
    floor: usize,
    ports: u32,
    /// As the first socket registered it, while there are ports.
    kind: Option<Kind>,
    /// Sockets that are bound, or were.
    bound: Vec<Weak<Descriptor>>,
}

/// An area of chunks, counted from 0.
#[derive(Debug)]
pub(crate) struct Umem {
    memory: Mapping,
    chunks: u32,
    number: usize,
    state: Mutex<State>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All areas that there ever were: as many as were needed at the same time.
static AREAS: Mutex<Vec<&'static Umem>> = Mutex::new(Vec::new());

/// Which area a port wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// One that others have, or that they can share.
    Shared,
    /// One that nobody has, and others can share.
    Fresh,
    /// One that nobody has, not larger than needed.
    Tight,
}

/// What an area of memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// By which [`Port::mode`](crate::Port::mode) tells it from others.
    pub number: usize,
    /// Chunks of 4096 bytes.
    pub chunks: usize,
    /// Chunks that no socket and no frame has.
    pub free: usize,
    /// Ports that share it; without any it takes no memory, unless frames of theirs are left.
    pub ports: usize,
}

/// That of all areas.
pub(crate) fn usage() -> Vec<Usage> {
    lock(&AREAS).iter().map(|umem| umem.usage()).collect()
}

/// A port's right to chunks of an area, and its place among the sharers.
#[derive(Debug)]
pub(crate) struct Lease {
    umem: &'static Umem,
    reserved: u32,
    floor: usize,
}

impl Lease {
    /// For a port whose queues need `chunks` together, of which half of `sent` at least are kept for
    /// sending: in an area that others of that kind have, if wanted, else in one that nobody has, else in
    /// a new one. `ENOMEM`.
    pub(crate) fn new(kind: Kind, chunks: u32, sent: u32, want: Want) -> Result<Self, Errno> {
        let wish = match want {
            Want::Shared | Want::Fresh => USUAL.max(chunks.saturating_mul(2)),
            Want::Tight => chunks,
        };
        let mut areas = lock(&AREAS);
        let shared = areas.iter();
        let shared = (want == Want::Shared)
            .then(|| shared.clone().find(|umem| umem.can_share(kind, chunks)))
            .flatten();
        let idle = || {
            let mut idle = areas.iter();
            idle.find(|umem| umem.chunks >= chunks && umem.chunks <= wish && umem.is_idle(chunks))
        };
        let umem = match shared.or_else(idle) {
            Some(umem) => *umem,
            None => {
                let umem: &'static Umem = Box::leak(Box::new(Umem::new(wish, areas.len())?));
                areas.push(umem);
                umem
            }
        };
        let lease = Self {
            umem,
            reserved: chunks,
            floor: (sent / 2) as usize,
        };
        let mut state = lock(&umem.state);
        state.ports += 1;
        state.reserved += lease.reserved;
        state.floor += lease.floor;
        state.kind = Some(kind);
        Ok(lease)
    }

    pub(crate) fn umem(&self) -> &'static Umem {
        self.umem
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = lock(&self.umem.state);
        state.ports -= 1;
        state.reserved -= self.reserved;
        state.floor -= self.floor;
        if state.ports == 0 {
            state.kind = None;
            state.bound.clear();
            self.umem.renew(&mut state);
        }
    }
}

impl Umem {
    fn new(chunks: u32, number: usize) -> Result<Self, Errno> {
        Ok(Self {
            memory: Mapping::anonymous(chunks as usize * CHUNK)?,
            chunks,
            number,
            state: Mutex::new(State {
                spare: (0..chunks).rev().map(Chunk).collect(),
                retired: Vec::new(),
                reserved: 0,
                floor: 0,
                ports: 0,
                kind: None,
                bound: Vec::new(),
            }),
        })
    }

    /// One for a test, which nobody else has.
    #[cfg(test)]
    pub(super) fn alone(chunks: u32) -> &'static Self {
        Box::leak(Box::new(Self::new(chunks, 0).unwrap()))
    }

    /// What the kernel would do: bytes at 256 bytes behind `address`.
    #[cfg(test)]
    pub(super) fn poke(&self, address: u64, bytes: &[u8]) {
        let chunk = Chunk((address / CHUNK as u64) as u32);
        let mut all = vec![0; 256];
        all.extend(bytes);
        assert_eq!(self.write(&chunk, &[&all]), 0);
    }

    /// The byte at `address`.
    #[cfg(test)]
    pub(super) fn peek(&self, address: u64) -> u8 {
        let (chunk, offset) = (address / CHUNK as u64, address % CHUNK as u64);
        let mut byte = [0];
        assert!(self.read(&Chunk(chunk as u32), offset as usize, &mut byte));
        byte[0]
    }

    fn can_share(&self, kind: Kind, chunks: u32) -> bool {
        let state = lock(&self.state);
        state.kind == Some(kind)
            && state.reserved.saturating_add(chunks) <= self.chunks
            && state.spare.len() >= chunks as usize
            && state.bound.iter().any(|socket| socket.strong_count() > 0)
    }

    fn is_idle(&self, chunks: u32) -> bool {
        let state = lock(&self.state);
        state.ports == 0 && state.spare.len() >= chunks as usize
    }

    /// Nobody uses it: its pages go, if all chunks are there.
    fn renew(&self, state: &mut State) {
        if state.spare.len() + state.retired.len() == self.chunks as usize
            && self.memory.forget().is_ok()
        {
            let mut retired = std::mem::take(&mut state.retired);
            state.spare.append(&mut retired);
        }
    }

    /// By which `status` tells areas apart.
    pub(crate) fn number(&self) -> usize {
        self.number
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.start().expose_provenance() as u64
    }

    /// Bytes.
    pub(crate) fn length(&self) -> u64 {
        self.memory.length() as u64
    }

    pub(super) fn kind(&self) -> Option<Kind> {
        lock(&self.state).kind
    }

    /// The sockets by which another can be bound to the same memory.
    pub(super) fn sharers(&self) -> Vec<Arc<Descriptor>> {
        let mut state = lock(&self.state);
        state.bound.retain(|socket| socket.strong_count() > 0);
        state.bound.iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn is_bound(&self, socket: Weak<Descriptor>) {
        lock(&self.state).bound.push(socket);
    }

    /// Appends up to `count` chunks to `to`; `lending`: not those that are for senders.
    #[cold]
    pub(super) fn draw(&self, count: usize, lending: bool, to: &mut Vec<Chunk>) {
        let mut state = lock(&self.state);
        let floor = if lending { state.floor } else { 0 };
        let from = state.spare.len() - count.min(state.spare.len().saturating_sub(floor));
        to.extend(state.spare.drain(from..));
    }

    /// Takes chunks back.
    #[cold]
    pub(super) fn put(&self, chunks: impl IntoIterator<Item = Chunk>) {
        lock(&self.state).spare.extend(chunks);
    }

    /// Takes back what a closed socket had.
    pub(super) fn put_left(&self, left: Left) {
        let mut state = lock(&self.state);
        let Left { ours, kernels } = left;
        state.spare.extend(ours);
        match state.kind.map(|kind| kind.copying) {
            Some(Copying::Zero) => state.retired.extend(kernels),
            _ => state.spare.extend(kernels),
        }
    }

    /// How many ports use it, and how many chunks nobody has.
    fn usage(&self) -> Usage {
        let state = lock(&self.state);
        Usage {
            number: self.number,
            chunks: self.chunks as usize,
            free: state.spare.len(),
            ports: state.ports as usize,
        }
    }

    /// How many chunks nobody has.
    #[cfg(test)]
    pub(crate) fn spare(&self) -> usize {
        lock(&self.state).spare.len()
    }

    /// A chunk as memory.
    #[expect(clippy::mut_from_ref)] // exclusive by the token, not by `self`
    #[inline]
    fn bytes(&'static self, chunk: Chunk) -> &'static mut [u8] {
        let start = (chunk.0 as usize).min(self.chunks as usize - 1) * CHUNK;
        // SAFETY: within the mapping (areas aren't empty), which is never unmapped, since a `&'static Umem`
        // is never dropped; initialised (zeroed pages, or what was received). Nobody else has a reference
        // or a claim: the token says so and is used up. It is again one only by `chunk`, which uses
        // up the reference.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start().add(start), CHUNK) }
    }

    /// A chunk's memory as a chunk. `None`: it is none of ours.
    #[inline]
    fn chunk(&self, bytes: &'static mut [u8]) -> Option<Chunk> {
        let offset = bytes
            .as_ptr()
            .addr()
            .checked_sub(self.memory.start().addr())?;
        let whole = bytes.len() == CHUNK && offset % CHUNK == 0 && offset < self.memory.length();
        whole.then_some(Chunk((offset / CHUNK) as u32))
    }

    /// A frame that keeps its chunk.
    #[inline]
    pub(super) fn lend(&'static self, chunk: Chunk, offset: usize, length: usize) -> Frame {
        Frame::lent(self.bytes(chunk), offset, length, self)
    }

    /// A frame's chunk, offset and length.
    ///
    /// # Errors
    /// The frame, if it isn't in a chunk of this area.
    #[inline]
    pub(super) fn reclaim(&'static self, frame: Frame) -> Result<(Chunk, usize, usize), Frame> {
        let (bytes, start, end) = frame.into_lent(self)?;
        match self.chunk(bytes) {
            Some(chunk) => Ok((chunk, start, end - start)),
            None => Err(Frame::default()),
        }
    }

    /// Copies what lies at `offset` of a chunk of ours into `to`. False: not all of it is in the chunk.
    pub(super) fn read(&self, chunk: &Chunk, offset: usize, to: &mut [u8]) -> bool {
        if chunk.0 >= self.chunks || offset.checked_add(to.len()).is_none_or(|end| end > CHUNK) {
            return false;
        }
        let start = chunk.0 as usize * CHUNK + offset;
        // SAFETY: within the mapping by the comparison, initialised (zeroed pages); no reference into it
        // lives, since the token is there; so `to` isn't in it either.
        unsafe {
            let from = self.memory.start().add(start);
            std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len());
        }
        true
    }

    /// Copies `parts` one behind the other to the front of a chunk of ours; gives how many bytes of them
    /// had no room, from the end.
    pub(super) fn write(&self, chunk: &Chunk, parts: &[&[u8]]) -> usize {
        let mut room = if chunk.0 < self.chunks { CHUNK } else { 0 };
        let mut left = 0;
        for part in parts {
            let length = part.len().min(room);
            let start = chunk.0 as usize * CHUNK + (CHUNK - room);
            // SAFETY: within the mapping (`room` is what is left of the chunk, none if there is no such
            // chunk); no reference into it lives, since the token is there, so no part is in it.
            unsafe {
                let to = self.memory.start().wrapping_add(start);
                std::ptr::copy_nonoverlapping(part.as_ptr(), to, length);
            }
            room -= length;
            left += part.len() - length;
        }
        left
    }
}

impl Lender for Umem {
    fn take_back(&self, piece: &'static mut [u8]) {
        if let Some(chunk) = self.chunk(piece) {
            let mut state = lock(&self.state);
            state.spare.push(chunk);
            if state.ports == 0 {
                self.renew(&mut state);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(umem: &Umem) -> Chunk {
        let mut chunks = Vec::new();
        umem.draw(1, false, &mut chunks);
        chunks.pop().unwrap()
    }

    #[test]
    fn nothing_is_touched_beyond_a_chunk() {
        let umem = Umem::alone(2);
        let (chunk, mut out) = (one(umem), [0; 4]);
        assert_eq!(umem.write(&chunk, &[&[1; CHUNK - 4], &[1, 2], &[3, 4]]), 0);
        assert!(umem.read(&chunk, CHUNK - 4, &mut out));
        assert_eq!(out, [1, 2, 3, 4]);
        for offset in [CHUNK - 3, CHUNK, usize::MAX] {
            assert!(!umem.read(&chunk, offset, &mut out), "{offset}");
        }
        let next = one(umem);
        assert_eq!(umem.write(&chunk, &[&[7; CHUNK], &[7; 9], &[7]]), 10);
        assert!(umem.read(&next, 0, &mut out));
        assert_eq!(out, [0; 4]);
    }

    #[test]
    fn a_chunk_is_a_frame_and_a_chunk_again() {
        let (umem, other) = (Umem::alone(4), Umem::alone(4));
        let chunk = one(umem);
        let address = chunk.address();
        umem.write(&chunk, &[&[5; 100]]);
        let frame = umem.lend(chunk, 40, 60);
        assert_eq!((frame.bytes(), umem.spare()), ([5; 60].as_slice(), 3));
        let frame = other.reclaim(frame).unwrap_err();
        let (chunk, offset, length) = umem.reclaim(frame).unwrap();
        assert_eq!((chunk.address(), offset, length), (address, 40, 60));
        drop(umem.lend(chunk, 0, 60));
        assert_eq!((umem.spare(), other.spare()), (4, 4));
    }

    #[test]
    fn the_kernel_gives_back_only_what_it_had_and_once() {
        let umem = Umem::alone(3);
        let mut given = Given::new(umem);
        let chunk = one(umem);
        let address = chunk.address();
        assert!(given.take(address).is_none());
        given.give(chunk);
        let elsewhere = (address + CHUNK as u64) % (3 * CHUNK as u64);
        for wrong in [elsewhere, 3 * CHUNK as u64, u64::MAX] {
            assert!(given.take(wrong).is_none(), "{wrong:#x}");
        }
        assert_eq!(given.take(address + 300).unwrap().address(), address);
        assert!(given.take(address).is_none());
        assert_eq!(given.count(), 0);
    }

    #[test]
    fn what_is_for_senders_is_not_lent() {
        let umem = Umem::alone(8);
        lock(&umem.state).floor = 5;
        let mut chunks = Vec::new();
        umem.draw(8, true, &mut chunks);
        assert_eq!(chunks.len(), 3);
        umem.draw(8, true, &mut chunks);
        assert_eq!(chunks.len(), 3);
        umem.draw(8, false, &mut chunks);
        assert_eq!(chunks.len(), 8);
        umem.put(chunks.drain(..));
        assert_eq!(umem.spare(), 8);
    }
}
