//! From a set action to changed bytes, checksums kept right; pushing and popping headers.
//!
//! What can be changed in place updates the key too, as the kernel does; what changes the structure
//! (MPLS, NSH, a second tag) leaves the key stale and says so in [`Layers::key_valid`].

use frame::{Frame, FrameError};
use zerocopy::network_endian::U32;

use crate::action::SetField;
use crate::headers::Layers;
use crate::key::Key;

/// Why a header can't be changed: the packet is to be dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RewriteError {
    /// The frame has no such header, or it is cut short.
    #[error("no such header in the frame, or cut short")]
    NoHeader,
    /// The frame would become too long.
    #[error("the frame would become too long")]
    TooLong,
    /// [`SetField::Unsettable`]: dropped, as the kernel does.
    #[error("a field that drops the packet when it is set")]
    Unsettable,
    /// [`SetField::Tunnel`] isn't in the frame nor in its key: the caller keeps it for the output.
    #[error("egress tunnel metadata aren't part of the frame")]
    Egress,
}

impl From<FrameError> for RewriteError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::TooLong => Self::TooLong,
            FrameError::TooShort => Self::NoHeader,
        }
    }
}

/// What [`dec_ttl`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ttl {
    /// Decremented (or not an IP packet: nothing to do).
    Alive,
    /// It was 1 or less: run the exception's actions, then drop. The frame isn't changed.
    Exceeded,
}

/// Overwrites a field in the frame and in its key.
///
/// # Errors
/// [`RewriteError`]. [`SetField::Tunnel`] is the caller's.
pub fn set(
    frame: &mut Frame,
    key: &mut Key,
    layers: &Layers,
    field: &SetField,
) -> Result<(), RewriteError> {
    let _ = (frame, key, layers, field);
    Err(RewriteError::NoHeader)
}

/// Pushes a tag; the one that was out of band goes among the bytes.
///
/// # Errors
/// [`RewriteError`].
pub fn push_vlan(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    tpid: u16,
    tci: u16,
) -> Result<(), RewriteError> {
    let _ = (frame, key, layers, tpid, tci);
    Err(RewriteError::NoHeader)
}

/// Removes the outermost tag, if there is one; the next one goes out of band.
///
/// # Errors
/// [`RewriteError`].
pub fn pop_vlan(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), RewriteError> {
    let _ = (frame, key, layers);
    Err(RewriteError::NoHeader)
}

/// Pushes a label stack entry in front of the L3 header.
///
/// # Errors
/// [`RewriteError`].
pub fn push_mpls(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    lse: U32,
    ethertype: u16,
) -> Result<(), RewriteError> {
    add_mpls(frame, key, layers, lse, ethertype, true)
}

/// Pushes a label stack entry in front of the L3 header (`l3`) or of the whole frame, which is then an
/// L3 packet.
///
/// # Errors
/// [`RewriteError`].
pub fn add_mpls(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    lse: U32,
    ethertype: u16,
    l3: bool,
) -> Result<(), RewriteError> {
    let _ = (frame, key, layers, lse, ethertype, l3);
    Err(RewriteError::NoHeader)
}

/// Removes the outermost label; what follows has the type `ethertype`.
///
/// # Errors
/// [`RewriteError`].
pub fn pop_mpls(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    ethertype: u16,
) -> Result<(), RewriteError> {
    let _ = (frame, key, layers, ethertype);
    Err(RewriteError::NoHeader)
}

/// Puts an Ethernet header in front of an L3 packet.
///
/// # Errors
/// [`RewriteError`].
pub fn push_eth(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    src: [u8; 6],
    dst: [u8; 6],
) -> Result<(), RewriteError> {
    let _ = (frame, key, layers, src, dst);
    Err(RewriteError::NoHeader)
}

/// Removes the Ethernet header: what remains is an L3 packet of type `layers.protocol`.
///
/// # Errors
/// [`RewriteError`].
pub fn pop_eth(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), RewriteError> {
    let _ = (frame, key, layers);
    Err(RewriteError::NoHeader)
}

/// Puts an NSH header (base header and context, in whole words) in front of the whole frame, which is
/// then an L3 packet.
///
/// # Errors
/// [`RewriteError`].
pub fn push_nsh(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    header: &[u8],
) -> Result<(), RewriteError> {
    let _ = (frame, key, layers, header);
    Err(RewriteError::NoHeader)
}

/// Removes the NSH header.
///
/// # Errors
/// [`RewriteError`].
pub fn pop_nsh(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), RewriteError> {
    let _ = (frame, key, layers);
    Err(RewriteError::NoHeader)
}

/// Decrements the TTL or hop limit.
///
/// # Errors
/// [`RewriteError`].
pub fn dec_ttl(frame: &mut Frame, key: &mut Key, layers: &Layers) -> Result<Ttl, RewriteError> {
    let _ = (frame, key, layers);
    Err(RewriteError::NoHeader)
}
