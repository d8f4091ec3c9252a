//! The memory that frames lie in, shared with the kernel (a "UMEM"), in chunks of a page.

use rustix::io::Errno;

use crate::sys::mapping::Mapping;

/// Bytes of a chunk: a page, the most that the kernel takes without hugepages.
pub(crate) const CHUNK: usize = 4096;
/// Bytes that the kernel leaves free in front of a received frame (XDP_PACKET_HEADROOM).
const HEADROOM: usize = 256;
/// The longest frame that can be received.
pub(crate) const LONGEST_RECEIVED: usize = CHUNK - HEADROOM;
/// The longest frame that can be sent.
pub(crate) const LONGEST_SENT: usize = CHUNK;

/// Chunks, counted from 0.
#[derive(Debug)]
pub(crate) struct Umem {
    memory: Mapping,
}

impl Umem {
    pub(super) fn new(chunks: u32) -> Result<Self, Errno> {
        Ok(Self {
            memory: Mapping::anonymous(chunks as usize * CHUNK)?,
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.start().expose_provenance() as u64
    }

    pub(super) fn length(&self) -> u64 {
        self.memory.length() as u64
    }

    /// The place of `length` bytes at `address`, if all of them are in one chunk of ours.
    fn place(&self, address: u64, length: usize) -> Option<*mut u8> {
        let address = usize::try_from(address).ok()?;
        let end = address.checked_add(length)?;
        let inside = end <= self.memory.length() && address % CHUNK + length <= CHUNK;
        // SAFETY: within the mapping, by the comparison.
        inside.then(|| unsafe { self.memory.start().add(address) })
    }

    /// Copies what lies at `address` into `to`. False: not all of it is in one chunk.
    ///
    /// The chunk must be the caller's; if it isn't (the kernel gave a wrong address), what is copied is
    /// garbage.
    pub(super) fn read(&self, address: u64, to: &mut [u8]) -> bool {
        let Some(from) = self.place(address, to.len()) else {
            return false;
        };
        // SAFETY: `from` has that many bytes, initialised (zeroed pages), and `to` isn't in the
        // mapping, which gives no references.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        true
    }

    /// Copies `parts` one behind the other to `address`. False: they don't fit there.
    ///
    /// The chunk must be the caller's; if it isn't, a frame under way is damaged.
    pub(super) fn write(&self, address: u64, parts: &[&[u8]]) -> bool {
        let length = parts.iter().map(|part| part.len()).sum();
        let Some(mut to) = self.place(address, length) else {
            return false;
        };
        for part in parts {
            // SAFETY: the parts' lengths add up to what `place` has checked, and none of them is in
            // the mapping, which gives no references.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), to, part.len());
                to = to.add(part.len());
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_touched_beyond_a_chunk_or_the_memory() {
        let umem = Umem::new(2).unwrap();
        let (page, mut out) = (CHUNK as u64, [0; 4]);
        assert!(umem.write(page - 4, &[&[1, 2], &[3, 4]]));
        assert!(umem.read(page - 4, &mut out));
        assert_eq!(out, [1, 2, 3, 4]);
        for address in [page - 3, 2 * page - 3, 2 * page, u64::MAX - 1, u64::MAX] {
            assert!(!umem.write(address, &[&[9; 4]]), "{address}");
            assert!(!umem.read(address, &mut out), "{address}");
        }
        assert!(umem.write(0, &[&[7; CHUNK]]));
        assert!(!umem.write(0, &[&[7; CHUNK], &[7]]));
    }
}
