//! The bytes of a frame, with room in front.

use crate::offload::Offload;

/// Room kept in front of a received frame: for tags, labels and an outer header, in whole cache lines.
pub const HEADROOM: usize = 128;

/// One tag, out of band, as the kernel keeps the outermost one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanTag {
    /// 0x8100 or 0x88a8.
    pub tpid: u16,
    /// Priority, DEI, id. Whether a tag is there is told by the `Option` around this.
    pub tci: u16,
}

/// A frame and what travels with it.
#[derive(Debug, Default)]
pub struct Frame {
    storage: Vec<u8>,
    start: usize,
    /// The outermost VLAN tag, if it isn't among the bytes.
    pub vlan: Option<VlanTag>,
    /// What is left to be done.
    pub offload: Offload,
}

impl Frame {
    /// A copy of `bytes`, with [`HEADROOM`] in front.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut storage = Vec::with_capacity(HEADROOM + bytes.len());
        storage.resize(HEADROOM, 0);
        storage.extend_from_slice(bytes);
        Self { storage, start: HEADROOM, vlan: None, offload: Offload::default() }
    }

    /// The frame's bytes, without the tag that is out of band.
    pub fn bytes(&self) -> &[u8] {
        self.storage.get(self.start..).unwrap_or_default()
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.storage.get_mut(self.start..).unwrap_or_default()
    }

    /// How many bytes, without the tag that is out of band.
    pub fn len(&self) -> usize {
        self.storage.len().saturating_sub(self.start)
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
