//! `OVS_KEY_ATTR_*`: what a flow matches, and what is known of a packet.

use ::flow::key::Key;
use netlink::Errno;
use netlink::attr::Writer;

use super::Limits;

/// Reads `OVS_FLOW_ATTR_KEY` and, if sent, `OVS_FLOW_ATTR_MASK` (payloads) into key and mask.
///
/// Without a mask the match is exact over the attributes present in the key. The key is given back
/// unmasked. EINVAL for everything that the module refuses.
pub fn parse_match(
    key_attrs: &[u8],
    mask_attrs: Option<&[u8]>,
    limits: Limits,
) -> Result<(Key, Key), Errno> {
    let _ = (key_attrs, mask_attrs, limits);
    Err(Errno::EOPNOTSUPP)
}

/// Reads `OVS_FLOW_ATTR_KEY` of a request that only names a flow (GET, DEL): a mask is of no interest.
pub fn parse_key(key_attrs: &[u8], limits: Limits) -> Result<Key, Errno> {
    let _ = (key_attrs, limits);
    Err(Errno::EOPNOTSUPP)
}

/// What the key of `OVS_PACKET_CMD_EXECUTE` says about its packet that the packet itself doesn't.
#[derive(Clone, Copy, Debug)]
pub struct Metadata {
    /// Priority, in_port, mark, hash, recirculation, tunnel, conntrack, `mac_proto`, and `eth_type`
    /// of an L3 packet; the rest is zero and is to be extracted from the packet.
    pub key: Key,
    ct_orig_family: Option<u16>,
}

impl Metadata {
    /// EINVAL if the original tuple given isn't of the extracted packet's family.
    pub fn check(&self, extracted: &Key) -> Result<(), Errno> {
        match self.ct_orig_family {
            Some(eth_type) if eth_type != extracted.eth_type.get() => Err(Errno::EINVAL),
            _ => Ok(()),
        }
    }
}

/// Reads `OVS_PACKET_ATTR_KEY` of `OVS_PACKET_CMD_EXECUTE` (payload).
pub fn parse_metadata(key_attrs: &[u8], limits: Limits) -> Result<Metadata, Errno> {
    let _ = (key_attrs, limits);
    Err(Errno::EOPNOTSUPP)
}

/// Writes the attributes of a key: that of an upcall, or `OVS_FLOW_ATTR_KEY` (masked beforehand for a
/// flow with a UFID, as it was sent for one without). EMSGSIZE is only theoretical.
pub fn write_key(writer: &mut Writer<'_>, key: &Key) -> Result<(), Errno> {
    let _ = (writer, key);
    Err(Errno::EOPNOTSUPP)
}

/// Writes the attributes of a mask, `OVS_FLOW_ATTR_MASK`. Which ones there are depends on the masked key.
pub fn write_mask(writer: &mut Writer<'_>, masked_key: &Key, mask: &Key) -> Result<(), Errno> {
    let _ = (writer, masked_key, mask);
    Err(Errno::EOPNOTSUPP)
}
