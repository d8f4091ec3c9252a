//! The keyed hashes of a table. Both the start and the multipliers come from the seed, so nobody who
//! doesn't know it can choose keys that collide.

use std::hash::Hasher;

use foldhash::SharedSeed;
use foldhash::quality::FoldHasher;

use crate::flow::FlowId;
use crate::key::Key;
use crate::mask::{Mask, chunks};

pub(crate) struct Seed {
    start: u64,
    shared: SharedSeed,
}

impl Seed {
    pub(crate) fn new(seed: u64) -> Self {
        // Two different values from one: what is hashed first must not be known from the multipliers.
        let start = seed.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15;
        Self {
            start,
            shared: SharedSeed::from_u64(seed),
        }
    }

    /// Of a row of chunks. The number of chunks belongs to what is hashed (a mask has one number).
    #[inline]
    fn chunks(&self, mut chunks: impl Iterator<Item = u64>) -> u32 {
        let mut hasher = FoldHasher::with_seed(self.start, &self.shared);
        while let Some(first) = chunks.next() {
            let second = chunks.next().unwrap_or(0);
            hasher.write_u128(u128::from(first) | u128::from(second) << 64);
        }
        let hash = hasher.finish();
        (hash ^ hash >> 32) as u32
    }

    /// Of a key as far as the mask compares it.
    #[inline]
    pub(crate) fn masked(&self, mask: &Mask, key: &Key) -> u32 {
        self.chunks(mask.masked(key))
    }

    /// Of a mask.
    pub(crate) fn mask(&self, mask: &Mask) -> u32 {
        self.chunks(
            mask.iter()
                .flat_map(|(index, bits)| [u64::from(index), bits]),
        )
    }

    /// Of a whole key.
    pub(crate) fn key(&self, key: &Key) -> u32 {
        self.chunks(chunks(key).iter().map(|chunk| u64::from_ne_bytes(*chunk)))
    }

    /// Of what a flow is named by.
    pub(crate) fn id(&self, id: &FlowId) -> u32 {
        match id {
            FlowId::Ufid(ufid) => self.bytes(ufid.as_bytes()),
            FlowId::Key(key) => self.key(key),
        }
    }

    pub(crate) fn bytes(&self, bytes: &[u8]) -> u32 {
        let mut hasher = FoldHasher::with_seed(self.start, &self.shared);
        hasher.write(bytes);
        let hash = hasher.finish();
        (hash ^ hash >> 32) as u32
    }
}
