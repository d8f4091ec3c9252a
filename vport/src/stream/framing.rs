//! Frames in a stream of bytes: each behind its length, 16 bits, big-endian.
//!
//! Whatever the peer sends is cut into frames; what can't be one is counted and passed over, so that the
//! frames behind it are still found. Nothing in the stream says where a frame begins but the frames before.

use frame::{Frame, Pool};

/// Bytes of the length.
pub(super) const HEADER: usize = 2;
/// Bytes of an Ethernet header: shorter ones aren't frames.
pub(super) const ETHERNET: usize = 14;
/// Bytes kept of what was received: some frames of any length.
const BUFFER: usize = 256 * 1024;

/// What couldn't be a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Refused {
    /// Shorter than an Ethernet header.
    pub(super) runt: u64,
    /// Longer than the device takes.
    pub(super) oversized: u64,
}

/// Cuts what is received into frames.
pub(super) struct Reader {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// Where to receive into; [`Reader::received`] says how much. Never empty once all whole frames are
    /// taken out.
    pub(super) fn space(&mut self) -> &mut [u8] {
        // Half of the buffer is more than the longest frame.
        if self.start > BUFFER / 2 || self.start == self.end {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }

    /// So many bytes of [`Reader::space`] are the peer's now.
    pub(super) fn received(&mut self, bytes: usize) {
        self.end = self.end.saturating_add(bytes).min(self.buffer.len());
    }

    /// The next frame, if it is there whole. Frames longer than `longest` bytes are passed over.
    pub(super) fn next(
        &mut self,
        longest: usize,
        pool: &mut Pool,
        refused: &mut Refused,
    ) -> Option<Frame> {
        loop {
            let bytes = self.buffer.get(self.start..self.end)?;
            let (length, rest) = bytes.split_first_chunk::<HEADER>()?;
            let length = usize::from(u16::from_be_bytes(*length));
            let bytes = rest.get(..length)?;
            self.start += HEADER + length;
            if length < ETHERNET {
                refused.runt += 1;
            } else if length > longest {
                refused.oversized += 1;
            } else {
                let mut frame = pool.take(length);
                if let Some(space) = frame.space_mut().get_mut(..length) {
                    space.copy_from_slice(bytes);
                }
                frame.set_len(length);
                return Some(frame);
            }
        }
    }

    /// Whether a whole frame may be waiting.
    pub(super) fn holds_frame(&self) -> bool {
        let bytes = self.buffer.get(self.start..self.end).unwrap_or_default();
        bytes
            .split_first_chunk::<HEADER>()
            .is_some_and(|(length, rest)| rest.len() >= usize::from(u16::from_be_bytes(*length)))
    }
}

/// Makes a frame a message: its tag among its bytes, its length in front. False: it is too long for that, and
/// as it was but for the tag.
pub(super) fn encode(frame: &mut Frame) -> bool {
    if frame.push_tag_inband().is_err() {
        return false;
    }
    let Ok(length) = u16::try_from(frame.len()) else {
        return false;
    };
    match frame.push_front(HEADER) {
        Ok(front) => {
            front.copy_from_slice(&length.to_be_bytes());
            true
        }
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use frame::VlanTag;

    fn feed(reader: &mut Reader, bytes: &[u8]) {
        let space = reader.space();
        assert!(space.len() >= bytes.len());
        space[..bytes.len()].copy_from_slice(bytes);
        reader.received(bytes.len());
    }

    fn all(reader: &mut Reader) -> (Vec<usize>, Refused) {
        let (mut pool, mut refused) = (Pool::default(), Refused::default());
        let frames = std::iter::from_fn(|| reader.next(1514, &mut pool, &mut refused))
            .map(|frame| frame.len())
            .collect();
        (frames, refused)
    }

    #[test]
    fn a_frame_comes_out_as_it_went_in_byte_by_byte() {
        let mut frame = Frame::from_bytes(&[7; 60]);
        frame.vlan = Some(VlanTag {
            tpid: 0x8100,
            tci: 5,
        });
        assert!(encode(&mut frame));
        assert_eq!(frame.bytes()[..2], [0, 64]);
        let mut reader = Reader::new();
        let (last, first) = frame.bytes().split_last().unwrap();
        for byte in first {
            feed(&mut reader, &[*byte]);
            assert_eq!(all(&mut reader).0, [0_usize; 0]);
        }
        assert!(!reader.holds_frame());
        feed(&mut reader, &[*last]);
        assert!(reader.holds_frame());
        assert_eq!(all(&mut reader), (vec![64], Refused::default()));
    }

    #[test]
    fn what_is_no_frame_is_counted_and_the_next_one_found() {
        let mut reader = Reader::new();
        for length in [0_u16, 13, 14, 65_535, 1515, 1514] {
            feed(&mut reader, &length.to_be_bytes());
            feed(&mut reader, &vec![1; usize::from(length)]);
        }
        let refused = Refused {
            runt: 2,
            oversized: 2,
        };
        assert_eq!(all(&mut reader), (vec![14, 1514], refused));
    }

    #[test]
    fn there_is_always_space_for_the_longest_frame() {
        let mut reader = Reader::new();
        for _ in 0..40 {
            feed(&mut reader, &65_535_u16.to_be_bytes());
            feed(&mut reader, &vec![1; 65_535]);
            assert_eq!(all(&mut reader).1.oversized, 1);
        }
    }

    #[test]
    fn too_long_for_the_length_is_refused() {
        let mut frame = Frame::from_bytes(&vec![0; 65_536]);
        assert!(!encode(&mut frame));
        let mut frame = Frame::from_bytes(&vec![0; 65_535]);
        assert!(encode(&mut frame));
    }
}
