//! Where a frame's bytes are: in memory of their own, or in some that was lent.
//!
//! Memory that a kernel or a device writes into is set aside for as long as the process lives, and its
//! pieces go round: a piece is an exclusive reference, which a frame holds and gives back when it goes,
//! wherever that is. So nothing is counted for a frame, and none can outlive its memory.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Who lends pieces of memory to frames.
pub trait Lender: Send + Sync {
    /// A piece comes back, whole. On any thread; doesn't block for long.
    fn take_back(&self, piece: &'static mut [u8]);
}

/// A piece of memory that goes back to its lender when dropped.
pub(crate) struct Loan {
    piece: &'static mut [u8],
    lender: &'static dyn Lender,
}

impl Loan {
    fn is_from(&self, lender: &'static dyn Lender) -> bool {
        std::ptr::addr_eq(self.lender, lender)
    }

    /// The piece; the lender doesn't hear of it.
    fn keep(mut self) -> &'static mut [u8] {
        std::mem::take(&mut self.piece)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if !self.piece.is_empty() {
            self.lender.take_back(std::mem::take(&mut self.piece));
        }
    }
}

impl fmt::Debug for Loan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lent, {} bytes", self.piece.len())
    }
}

/// A frame's buffer.
#[derive(Debug)]
pub(crate) enum Storage {
    Own(Box<[u8]>),
    Lent(Loan),
}

impl Storage {
    pub(crate) fn lent(piece: &'static mut [u8], lender: &'static dyn Lender) -> Self {
        Self::Lent(Loan { piece, lender })
    }

    /// The piece, if it is that lender's; else the buffer as it was.
    pub(crate) fn into_lent(self, lender: &'static dyn Lender) -> Result<&'static mut [u8], Self> {
        match self {
            Self::Lent(loan) if loan.is_from(lender) => Ok(loan.keep()),
            other => Err(other),
        }
    }

    pub(crate) fn is_from(&self, lender: &'static dyn Lender) -> bool {
        matches!(self, Self::Lent(loan) if loan.is_from(lender))
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self::Own(Box::default())
    }
}

impl Deref for Storage {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(loan) => loan.piece,
        }
    }
}

impl DerefMut for Storage {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(loan) => loan.piece,
        }
    }
}
