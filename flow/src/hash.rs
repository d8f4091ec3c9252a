//! The packet's hash: over what makes a connection.

use std::hash::{BuildHasher, Hasher};

use foldhash::fast::FixedState;

use crate::headers::eth_type;
use crate::key::{FRAG_NONE, Key};

/// A hash over addresses, protocol and ports; of a packet that isn't IP over its Ethernet addresses, type
/// and labels. `basis` is the seed. Never 0, which in a key means "none yet".
///
/// For the `hash` action, the choice of an upcall's reader, and caches. All fragments of a packet have
/// the same hash: only the first one has ports, so that no fragment's ports count.
#[inline]
pub fn l4(key: &Key, basis: u32) -> u32 {
    let mut hasher = FixedState::with_seed(u64::from(basis)).build_hasher();
    let ethertype = key.eth_type.get();
    match ethertype {
        eth_type::IPV4 | eth_type::IPV6 => {
            hasher.write_u128(u128::from_ne_bytes(key.ip_src));
            hasher.write_u128(u128::from_ne_bytes(key.ip_dst));
            let ports = match key.ip_frag {
                FRAG_NONE => u64::from(key.tp_src.get()) << 16 | u64::from(key.tp_dst.get()),
                _ => 0,
            };
            // A later IPv6 fragment's protocol isn't known.
            let proto = if key.ip_frag == FRAG_NONE {
                key.ip_proto
            } else {
                0
            };
            hasher.write_u64(ports << 8 | u64::from(proto));
        }
        _ => {
            let [a, b, c, d, e, f] = key.eth_src;
            let [g, h, i, j, k, l] = key.eth_dst;
            hasher.write_u128(u128::from_ne_bytes([
                a, b, c, d, e, f, g, h, i, j, k, l, 0, 0, 0, 0,
            ]));
            hasher.write_u64(u64::from(ethertype) << 32 | u64::from(key.vlan.tci.get()));
            for label in &key.mpls {
                hasher.write_u32(label.get());
            }
        }
    }
    let hash = hasher.finish();
    match (hash >> 32) as u32 ^ hash as u32 {
        0 => 1,
        hash => hash,
    }
}
