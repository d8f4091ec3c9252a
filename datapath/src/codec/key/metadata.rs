//! What is known of a packet beside its bytes.

use ::flow::key::{Key, PORT_NONE, TunnelKey};
use netlink::Errno;
use zerocopy::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::tunnel;
use super::attributes::{Attributes, Form, Set, kind};
use super::prerequisites::eth_type;

/// All of `OVS_CS_F_*` that exist.
pub const CT_STATE_BITS: u32 = 0xff;

/// `struct ovs_key_ct_tuple_ipv4` and `_ipv6`, by the size of the address.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Tuple<const N: usize> {
    src: [u8; N],
    dst: [u8; N],
    tp_src: U16,
    tp_dst: U16,
    proto: u8,
    pad: [u8; 3],
}

impl<const N: usize> Tuple<N> {
    fn store_addresses(&self, key: &mut Key) {
        key.ct_orig_src
            .iter_mut()
            .zip(self.src)
            .for_each(|(to, from)| *to = from);
        key.ct_orig_dst
            .iter_mut()
            .zip(self.dst)
            .for_each(|(to, from)| *to = from);
    }

    fn store(&self, key: &mut Key) {
        self.store_addresses(key);
        key.ct_orig_tp_src = self.tp_src;
        key.ct_orig_tp_dst = self.tp_dst;
        key.ct_orig_proto = self.proto;
    }

    /// The original tuple of `key`.
    pub fn load(key: &Key) -> Self {
        let address = |of: &[u8; 16]| of.first_chunk().copied().unwrap_or([0; N]);
        Self {
            src: address(&key.ct_orig_src),
            dst: address(&key.ct_orig_dst),
            tp_src: key.ct_orig_tp_src,
            tp_dst: key.ct_orig_tp_dst,
            proto: key.ct_orig_proto,
            pad: [0; 3],
        }
    }
}

/// Reads the metadata into `out`, which is the key or the mask by `form`; for a mask, `key_tunnel` is
/// the tunnel of the key that it belongs to. Attributes that were read are no longer present in `attrs`.
pub fn parse(
    out: &mut Key,
    key_tunnel: &TunnelKey,
    attrs: &mut Attributes<'_>,
    form: Form,
) -> Result<(), Errno> {
    if let Some(attr) = attrs.take(kind::DP_HASH) {
        out.dp_hash = attr.u32()?;
    }
    if let Some(attr) = attrs.take(kind::RECIRC_ID) {
        out.recirc_id = attr.u32()?;
    }
    if let Some(attr) = attrs.take(kind::PRIORITY) {
        out.priority = attr.u32()?;
    }
    match (attrs.take(kind::IN_PORT), form) {
        // A port is matched whole or not at all.
        (Some(_), Form::Mask) => out.in_port = u32::MAX,
        (Some(attr), Form::Key) => {
            out.in_port = attr.u32()?;
            if out.in_port >= PORT_NONE {
                return Err(Errno::EINVAL);
            }
        }
        (None, Form::Mask) => {}
        (None, Form::Key) => out.in_port = PORT_NONE,
    }
    if let Some(attr) = attrs.take(kind::SKB_MARK) {
        out.skb_mark = attr.u32()?;
    }
    if let Some(attr) = attrs.take(kind::TUNNEL) {
        match form {
            Form::Key => tunnel::parse_key(&mut out.tunnel, attr.payload).map(|_| ())?,
            Form::Mask => tunnel::parse_mask(&mut out.tunnel, attr.payload, key_tunnel)?,
        }
    }
    parse_conntrack(out, attrs)?;

    // A packet without Ethernet header tells its type all the same, as metadata.
    let layer3 = !attrs.present.has(kind::ETHERNET) && attrs.present.has(kind::ETHERTYPE);
    out.mac_proto = match form {
        Form::Mask => 0xff,
        Form::Key => u8::from(!layer3),
    };
    if layer3 {
        parse_eth_type(out, attrs, form)
    } else {
        Ok(())
    }
}

fn parse_conntrack(out: &mut Key, attrs: &mut Attributes<'_>) -> Result<(), Errno> {
    if let Some(attr) = attrs.take(kind::CT_STATE) {
        out.ct_state = u8::try_from(attr.u32()?).map_err(|_| Errno::EINVAL)?;
    }
    if let Some(attr) = attrs.take(kind::CT_ZONE) {
        out.ct_zone = attr.u16()?;
    }
    if let Some(attr) = attrs.take(kind::CT_MARK) {
        out.ct_mark = attr.u32()?;
    }
    if let Some(attr) = attrs.take(kind::CT_LABELS) {
        out.ct_labels = attr.array()?;
    }
    if let Some(attr) = attrs.take(kind::CT_ORIG_TUPLE_IPV4) {
        let tuple = Tuple::<4>::read_from_bytes(attr.payload).map_err(|_| Errno::EINVAL)?;
        tuple.store(out);
    }
    if let Some(attr) = attrs.take(kind::CT_ORIG_TUPLE_IPV6) {
        let tuple = Tuple::<16>::read_from_bytes(attr.payload).map_err(|_| Errno::EINVAL)?;
        tuple.store(out);
    }
    Ok(())
}

/// Reads `OVS_KEY_ATTR_ETHERTYPE`, if present. Lengths of 802.3 frames are no types; a type is matched
/// whole or not at all.
pub fn parse_eth_type(out: &mut Key, attrs: &mut Attributes<'_>, form: Form) -> Result<(), Errno> {
    if let Some(attr) = attrs.take(kind::ETHERTYPE) {
        let eth_type = attr.be16()?;
        if form == Form::Key && eth_type < 0x600 {
            return Err(Errno::EINVAL);
        }
        out.eth_type = if form == Form::Mask { 0xffff } else { eth_type }.into();
    }
    Ok(())
}

/// The original tuple's addresses belong to the packet's family: those of the other are forgotten. To
/// be called when the type is known.
pub fn settle_original_tuple(out: &mut Key, attrs: &Attributes<'_>, present: Set) {
    let original = |kind| {
        attrs
            .last(kind)
            .filter(|_| present.has(kind))
            .map(|attr| attr.payload)
    };
    out.ct_orig_src = [0; 16];
    out.ct_orig_dst = [0; 16];
    match out.eth_type.get() {
        eth_type::IPV4 => {
            let tuple = original(kind::CT_ORIG_TUPLE_IPV4).map(Tuple::<4>::read_from_bytes);
            if let Some(Ok(tuple)) = tuple {
                tuple.store_addresses(out);
            }
        }
        eth_type::IPV6 => {
            let tuple = original(kind::CT_ORIG_TUPLE_IPV6).map(Tuple::<16>::read_from_bytes);
            if let Some(Ok(tuple)) = tuple {
                tuple.store_addresses(out);
            }
        }
        _ => {}
    }
}

/// Nothing of conntrack in it?
pub fn is_untracked(key: &Key) -> bool {
    key.ct_state == 0
        && key.ct_zone == 0
        && key.ct_mark == 0
        && key.ct_labels == [0; 16]
        && Tuple::<16>::load(key)
            .as_bytes()
            .iter()
            .all(|byte| *byte == 0)
}
