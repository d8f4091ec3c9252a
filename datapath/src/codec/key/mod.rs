//! `OVS_KEY_ATTR_*`: what a flow matches, and what is known of a packet.
//!
//! - [`attributes`]: the attributes of a key or mask, sorted; their lengths.
//! - [`vlan`], [`metadata`], [`headers`]: what they mean.
//! - [`prerequisites`]: which of them need which others.
//! - `write`: the way back.

pub mod attributes;
mod headers;
mod metadata;
pub mod prerequisites;
pub mod vlan;
mod write;

use ::flow::key::{Key, TunnelKey};
use netlink::Errno;
use zerocopy::FromZeros;

use self::attributes::{Attributes, Form, Set, exact_mask, kind};
use super::Limits;

pub use self::write::{write_key, write_mask};

/// Reads `OVS_FLOW_ATTR_KEY` and, if sent, `OVS_FLOW_ATTR_MASK` (payloads) into key and mask.
///
/// Without a mask the match is exact over the attributes present in the key. The key is given back
/// unmasked. EINVAL for everything that the module refuses.
pub fn parse_match(
    key_attrs: &[u8],
    mask_attrs: Option<&[u8]>,
    limits: Limits,
) -> Result<(Key, Key), Errno> {
    // Borrowed by `attrs`, which therefore comes after it.
    let exact;
    // A mask that wasn't asked for may be exact about the zeroes of an untracked packet.
    let untracked_only = !limits.conntrack && mask_attrs.is_some();
    let mut attrs = Attributes::default();
    let (key, in_key) = read_key(&mut attrs, key_attrs, limits)?;

    let mut mask = Key::ZERO;
    let mask_attrs = match mask_attrs {
        Some(sent) => sent,
        None => {
            if key.tunnel.family != 0 {
                mask.tunnel = exact_tunnel();
            }
            exact = exact_mask(key_attrs);
            &exact
        }
    };
    attrs.present = Set::default();
    attrs.read(mask_attrs, Form::Mask)?;
    vlan::parse_mask(&mut mask, &key, &mut attrs)?;
    let in_mask = attrs.present;
    metadata::parse(&mut mask, &key.tunnel, &mut attrs, Form::Mask)?;
    headers::parse(&mut mask, &mut attrs, Form::Mask)?;
    if !prerequisites::hold(&key, in_key, Some(&mask), in_mask)
        || untracked_only && !metadata::is_untracked(&mask)
    {
        return Err(Errno::EINVAL);
    }
    Ok((key, mask))
}

/// Reads `OVS_FLOW_ATTR_KEY` of a request that only names a flow (GET, DEL): its mask is of no interest.
pub fn parse_key(key_attrs: &[u8], limits: Limits) -> Result<Key, Errno> {
    let (key, in_key) = read_key(&mut Attributes::default(), key_attrs, limits)?;
    if prerequisites::hold(&key, in_key, None, Set::default()) {
        Ok(key)
    } else {
        Err(Errno::EINVAL)
    }
}

/// The key, and which attributes it had behind the tags.
fn read_key<'a>(
    attrs: &mut Attributes<'a>,
    key_attrs: &'a [u8],
    limits: Limits,
) -> Result<(Key, Set), Errno> {
    let mut key = Key::ZERO;
    attrs.read(key_attrs, Form::Key)?;
    vlan::parse_key(&mut key, attrs)?;
    let present = attrs.present;
    metadata::parse(&mut key, &TunnelKey::new_zeroed(), attrs, Form::Key)?;
    headers::parse(&mut key, attrs, Form::Key)?;
    metadata::settle_original_tuple(&mut key, attrs, present);
    if limits.conntrack || metadata::is_untracked(&key) {
        Ok((key, present))
    } else {
        Err(Errno::EINVAL)
    }
}

/// A client leaves out what is zero in a tunnel: without a mask that is to be matched nevertheless.
fn exact_tunnel() -> TunnelKey {
    TunnelKey {
        id: u64::MAX.into(),
        src: [0xff; 16],
        dst: [0xff; 16],
        flags: u16::MAX,
        tos: 0xff,
        ttl: 0xff,
        tp_src: u16::MAX.into(),
        tp_dst: u16::MAX.into(),
        ..TunnelKey::new_zeroed()
    }
}

/// What the key of `OVS_PACKET_CMD_EXECUTE` says about its packet that the packet itself doesn't.
#[derive(Clone, Copy, Debug)]
pub struct Metadata {
    /// Priority, in_port, mark, hash, recirculation, tunnel, conntrack, `mac_proto`, and `eth_type`
    /// of an L3 packet; the rest is zero and is to be extracted from the packet.
    pub key: Key,
    original_v4: bool,
    original_v6: bool,
}

impl Metadata {
    /// EINVAL if the original tuple given isn't of the extracted packet's family.
    pub fn check(&self, extracted: &Key) -> Result<(), Errno> {
        let eth_type = extracted.eth_type.get();
        let wrong = self.original_v4 && eth_type != prerequisites::eth_type::IPV4
            || self.original_v6 && eth_type != prerequisites::eth_type::IPV6;
        if wrong { Err(Errno::EINVAL) } else { Ok(()) }
    }
}

/// Reads `OVS_PACKET_ATTR_KEY` of `OVS_PACKET_CMD_EXECUTE` (payload). Of attributes for headers only
/// the lengths are looked at.
pub fn parse_metadata(key_attrs: &[u8], limits: Limits) -> Result<Metadata, Errno> {
    let mut key = Key::ZERO;
    let mut attrs = Attributes::default();
    attrs.read(key_attrs, Form::Key)?;
    let present = attrs.present;
    metadata::parse(&mut key, &TunnelKey::new_zeroed(), &mut attrs, Form::Key)?;
    if !limits.conntrack && !metadata::is_untracked(&key) {
        return Err(Errno::EINVAL);
    }
    Ok(Metadata {
        key,
        original_v4: present.has(kind::CT_ORIG_TUPLE_IPV4),
        original_v6: present.has(kind::CT_ORIG_TUPLE_IPV6),
    })
}
