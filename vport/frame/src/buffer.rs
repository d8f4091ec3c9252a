//! The bytes of a frame, with room in front.
//!
//! # Contract
//! - Every byte of the storage is initialised once, when it is allocated; nothing is cleared when a
//!   buffer is taken again from its [`Pool`](crate::Pool). What [`Frame::space_mut`] shows may
//!   therefore be the bytes of an earlier frame: fill it, then say how much with [`Frame::set_len`].
//! - Whatever changes the front keeps [`PartialChecksum::start`](crate::PartialChecksum) pointing at
//!   the same byte; if that byte goes, so does the request to complete the checksum.
//! - No argument makes any of these functions panic.

use crate::class::Class;
use crate::offload::{Offload, PartialChecksum};
use crate::storage::{Lender, Storage};
use crate::tunnel::TunnelKey;

/// Room kept in front of a received frame: for tags, labels and an outer header, in whole cache lines.
pub const HEADROOM: usize = 128;

/// The longest frame: an IP packet of 64 KiB behind every header that a datapath can put in front.
pub const MAX_LEN: usize = 65_535 + 512;

/// Bytes of two Ethernet addresses: where a tag goes.
const ADDRESSES: usize = 12;
/// Bytes of a tag, type and control information.
const TAG: usize = 4;

/// One tag, out of band, as the kernel keeps the outermost one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanTag {
    /// 0x8100 or 0x88a8.
    pub tpid: u16,
    /// Priority, DEI, id. Whether a tag is there is told by the `Option` around this.
    pub tci: u16,
}

impl VlanTag {
    /// Whether `tpid` is one of the two types of a tag.
    #[inline]
    pub const fn is_tpid(tpid: u16) -> bool {
        matches!(tpid, 0x8100 | 0x88a8)
    }

    /// The tag as it stands among the bytes.
    #[inline]
    pub const fn to_bytes(self) -> [u8; TAG] {
        let [a, b] = self.tpid.to_be_bytes();
        let [c, d] = self.tci.to_be_bytes();
        [a, b, c, d]
    }
}

/// Why a frame can't be changed so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// It would become longer than [`MAX_LEN`].
    TooLong,
    /// There are not so many bytes.
    TooShort,
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::TooLong => "frame would become too long",
            Self::TooShort => "frame is too short",
        })
    }
}

impl std::error::Error for FrameError {}

/// A frame and what travels with it.
#[derive(Debug, Default)]
pub struct Frame {
    // start <= end <= storage.len(), always.
    storage: Storage,
    start: usize,
    end: usize,
    /// The outermost VLAN tag, if it isn't among the bytes.
    pub vlan: Option<VlanTag>,
    /// What the host's traffic control is to classify it by.
    pub class: Class,
    /// What is left to be done.
    pub offload: Offload,
    /// The outer header that it came with, or is to be sent with.
    pub tunnel: Option<Box<TunnelKey>>,
}

impl Frame {
    /// A copy of `bytes` (at most [`MAX_LEN`] of them), with [`HEADROOM`] in front.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let bytes = bytes.get(..MAX_LEN).unwrap_or(bytes);
        let mut frame = Self::with_space(bytes.len());
        frame.space_mut().copy_from_slice(bytes);
        frame.set_len(bytes.len());
        frame
    }

    /// An empty frame with room for `space` bytes behind [`HEADROOM`], from the allocator.
    pub fn with_space(space: usize) -> Self {
        Self::in_buffer(vec![0; HEADROOM + space.min(MAX_LEN)].into_boxed_slice())
    }

    /// An empty frame in a buffer that was used before.
    pub(crate) fn in_buffer(buffer: Box<[u8]>) -> Self {
        let start = HEADROOM.min(buffer.len());
        Self::in_storage(Storage::Own(buffer), start, start)
    }

    /// The `len` bytes from `start` on of a piece of memory, which `lender` gets back when the frame goes
    /// (or moves to a larger buffer). What doesn't lie in the piece isn't the frame's.
    pub fn lent(
        piece: &'static mut [u8],
        start: usize,
        len: usize,
        lender: &'static dyn Lender,
    ) -> Self {
        let start = start.min(piece.len());
        let end = start.saturating_add(len).min(piece.len());
        Self::in_storage(Storage::lent(piece, lender), start, end)
    }

    /// Whether its bytes are in a piece of memory from `lender`.
    #[inline]
    pub fn is_lent_by(&self, lender: &'static dyn Lender) -> bool {
        self.storage.is_from(lender)
    }

    /// The piece of memory that `lender` lent, and where in it the frame starts and ends: now the caller's,
    /// who is the lender or acts for it.
    ///
    /// # Errors
    /// The frame as it was, if its bytes are elsewhere.
    pub fn into_lent(
        mut self,
        lender: &'static dyn Lender,
    ) -> Result<(&'static mut [u8], usize, usize), Self> {
        match std::mem::take(&mut self.storage).into_lent(lender) {
            Ok(piece) => Ok((piece, self.start, self.end)),
            Err(storage) => {
                self.storage = storage;
                Err(self)
            }
        }
    }

    fn in_storage(storage: Storage, start: usize, end: usize) -> Self {
        Self {
            storage,
            start,
            end,
            vlan: None,
            class: Class::default(),
            offload: Offload::default(),
            tunnel: None,
        }
    }

    /// The buffer, for the next frame; none if it was lent, which then goes back.
    pub(crate) fn into_buffer(self) -> Option<Box<[u8]>> {
        match self.storage {
            Storage::Own(buffer) => Some(buffer),
            Storage::Lent(_) => None,
        }
    }

    /// The frame's bytes, without the tag that is out of band.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        self.storage.get(self.start..self.end).unwrap_or_default()
    }

    /// The same, to be changed.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.storage
            .get_mut(self.start..self.end)
            .unwrap_or_default()
    }

    /// How many bytes, without the tag that is out of band.
    #[inline]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// How many bytes, with the tag that is out of band: what a packet counter counts on the wire.
    #[inline]
    pub fn wire_len(&self) -> usize {
        self.len() + if self.vlan.is_some() { TAG } else { 0 }
    }

    /// Bytes free in front.
    #[inline]
    pub fn headroom(&self) -> usize {
        self.start
    }

    /// Bytes free behind.
    #[inline]
    pub fn tailroom(&self) -> usize {
        self.storage.len() - self.end
    }

    /// From the frame's first byte to the end of the buffer: where a port receives into. What is in it
    /// is unspecified (an earlier frame); [`Frame::set_len`] says afterwards how much is this frame.
    #[inline]
    pub fn space_mut(&mut self) -> &mut [u8] {
        self.storage.get_mut(self.start..).unwrap_or_default()
    }

    /// The first `len` bytes of [`Frame::space_mut`] are the frame now; no more than there is room for.
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        self.end = self.start.saturating_add(len).min(self.storage.len());
    }

    /// Empties the frame for the next use of its buffer: no bytes, no tag, no offloads,
    /// [`HEADROOM`] in front.
    pub fn reset(&mut self) {
        self.start = HEADROOM.min(self.storage.len());
        self.end = self.start;
        self.vlan = None;
        self.class = Class::default();
        self.offload = Offload::default();
        self.tunnel = None;
    }

    /// Gives up bytes at the end, so that `len` remain (nothing happens if there are fewer). A checksum
    /// that was to be written behind that is forgotten.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len() {
            return;
        }
        self.end = self.start + len;
        if self.offload.csum.is_some_and(|csum| csum.field() + 2 > len) {
            self.offload.csum = None;
        }
    }

    /// `n` bytes more in front, zero, and gives them.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn push_front(&mut self, n: usize) -> Result<&mut [u8], FrameError> {
        self.insert_gap(0, n)
    }

    /// Gives up the first `n` bytes.
    ///
    /// # Errors
    /// [`FrameError::TooShort`].
    pub fn pull_front(&mut self, n: usize) -> Result<(), FrameError> {
        self.remove(0, n)
    }

    /// Puts `bytes` in front of the byte `at` (`at == len()`: appends).
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn insert(&mut self, at: usize, bytes: &[u8]) -> Result<(), FrameError> {
        self.insert_gap(at, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    /// Makes room for `n` bytes in front of the byte `at` by moving what is in front of it into the
    /// headroom, and gives that room, zeroed.
    fn insert_gap(&mut self, at: usize, n: usize) -> Result<&mut [u8], FrameError> {
        if at > self.len() {
            return Err(FrameError::TooShort);
        }
        if n > MAX_LEN || self.len() + n > MAX_LEN {
            return Err(FrameError::TooLong);
        }
        let csum = match self.offload.csum {
            Some(csum) if at <= usize::from(csum.start) => {
                let moved = u16::try_from(usize::from(csum.start) + n);
                Some(PartialChecksum {
                    start: moved.map_err(|_| FrameError::TooLong)?,
                    ..csum
                })
            }
            // It would no longer be clear where the sum goes.
            Some(csum) if n > 0 && at < csum.field() + 2 => None,
            same => same,
        };
        if n > self.start {
            self.grow(n);
        }
        let start = self.start - n;
        self.storage.copy_within(self.start..self.start + at, start);
        self.start = start;
        self.offload.csum = csum;
        let gap = self
            .storage
            .get_mut(start + at..start + at + n)
            .unwrap_or_default();
        gap.fill(0);
        Ok(gap)
    }

    /// Takes out `n` bytes from the byte `at` on, moving what is in front of them.
    ///
    /// # Errors
    /// [`FrameError::TooShort`].
    pub fn remove(&mut self, at: usize, n: usize) -> Result<(), FrameError> {
        let until = at.checked_add(n).filter(|until| *until <= self.len());
        let until = until.ok_or(FrameError::TooShort)?;
        if let Some(csum) = self.offload.csum {
            let (start, field) = (usize::from(csum.start), csum.field());
            self.offload.csum = if until <= start {
                u16::try_from(start - n)
                    .ok()
                    .map(|start| PartialChecksum { start, ..csum })
            } else if n == 0 || at >= field + 2 {
                Some(csum)
            } else {
                None
            };
        }
        self.storage
            .copy_within(self.start..self.start + at, self.start + n);
        self.start += n;
        Ok(())
    }

    /// Moves to a larger buffer, with `more` + [`HEADROOM`] bytes in front.
    #[cold]
    fn grow(&mut self, more: usize) {
        let start = more + HEADROOM;
        let mut storage = vec![0; start + self.len() + self.tailroom()].into_boxed_slice();
        let end = start + self.len();
        if let Some(into) = storage.get_mut(start..end) {
            into.copy_from_slice(self.bytes());
        }
        (self.storage, self.start, self.end) = (Storage::Own(storage), start, end);
    }

    /// Writes the out-of-band tag, if any, behind the addresses.
    ///
    /// # Errors
    /// [`FrameError::TooShort`] (no addresses) or [`FrameError::TooLong`]; the tag is then still out of band.
    pub fn push_tag_inband(&mut self) -> Result<(), FrameError> {
        let Some(tag) = self.vlan else { return Ok(()) };
        self.insert(ADDRESSES, &tag.to_bytes())?;
        self.vlan = None;
        Ok(())
    }

    /// Moves the outermost tag among the bytes out of band. Tells whether there was one to move: there
    /// is none if one is out of band already, or if no type follows it.
    pub fn pop_tag_outofband(&mut self) -> bool {
        if self.vlan.is_some() {
            return false;
        }
        let Some(&[a, b, c, d, _, _]) = self
            .bytes()
            .get(ADDRESSES..)
            .and_then(|bytes| bytes.first_chunk::<6>())
        else {
            return false;
        };
        let tag = VlanTag {
            tpid: u16::from_be_bytes([a, b]),
            tci: u16::from_be_bytes([c, d]),
        };
        if !VlanTag::is_tpid(tag.tpid) || self.remove(ADDRESSES, TAG).is_err() {
            return false;
        }
        self.vlan = Some(tag);
        true
    }
}

impl Clone for Frame {
    /// A deep copy in a buffer of its own: the frame's bytes with [`HEADROOM`]. On the packet path use
    /// [`Pool::copy`](crate::Pool::copy).
    fn clone(&self) -> Self {
        let mut copy = Self::from_bytes(self.bytes());
        copy.vlan = self.vlan;
        copy.class = self.class;
        copy.offload = self.offload;
        copy.tunnel.clone_from(&self.tunnel);
        copy
    }
}

impl PartialEq for Frame {
    /// The same bytes, tag and offloads; where they are kept doesn't matter.
    fn eq(&self, other: &Self) -> bool {
        self.vlan == other.vlan
            && self.offload == other.offload
            && self.tunnel == other.tunnel
            && self.bytes() == other.bytes()
    }
}
