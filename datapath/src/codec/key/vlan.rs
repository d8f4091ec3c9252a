//! Tags: each wraps what follows it into `OVS_KEY_ATTR_ENCAP`.

use ::flow::key::{Key, VLAN_CFI, VlanKey};
use netlink::Errno;
use netlink::attr::Attr;

use super::attributes::{Attributes, Form, Set, kind};

/// Is this the type of a tag that is parsed (802.1Q, 802.1ad)?
pub fn is_tag(eth_type: u16) -> bool {
    matches!(eth_type, 0x8100 | 0x88a8)
}

/// Reads up to two tags of a key, replacing the attributes present by those inside.
pub fn parse_key(key: &mut Key, attrs: &mut Attributes<'_>) -> Result<(), Errno> {
    if enter_key(&mut key.vlan, attrs)? {
        enter_key(&mut key.cvlan, attrs)?;
    }
    Ok(())
}

/// Reads up to two tags of a mask; `key` is the key that it belongs to. That a packet has a tag or not
/// always counts.
pub fn parse_mask(mask: &mut Key, key: &Key, attrs: &mut Attributes<'_>) -> Result<(), Errno> {
    mask.vlan.tci = 0xffff.into();
    mask.cvlan.tci = 0xffff.into();
    if enter_mask(&mut mask.vlan, key.vlan, attrs)? {
        enter_mask(&mut mask.cvlan, key.cvlan, attrs)?;
    }
    Ok(())
}

fn enter_key(tag: &mut VlanKey, attrs: &mut Attributes<'_>) -> Result<bool, Errno> {
    let Some(eth_type) = attrs.get(kind::ETHERTYPE) else {
        return Ok(false);
    };
    if !attrs.present.has(kind::ETHERNET) || !is_tag(eth_type.be16()?) {
        return Ok(false);
    }
    let (Some(tci), Some(encap)) = (attrs.get(kind::VLAN), attrs.get(kind::ENCAP)) else {
        return Err(Errno::EINVAL);
    };
    let tci = tci.be16()?;
    // A TCI of zero, with nothing behind it, is a frame cut off inside its tag.
    if tci & VLAN_CFI == 0 && (tci != 0 || !encap.payload.is_empty()) {
        return Err(Errno::EINVAL);
    }
    enter(tag, encap, attrs, Form::Key)
}

fn enter_mask(
    tag: &mut VlanKey,
    tag_of_key: VlanKey,
    attrs: &mut Attributes<'_>,
) -> Result<bool, Errno> {
    let Some(encap) = attrs.get(kind::ENCAP) else {
        return Ok(false);
    };
    let value = |attr: Option<Attr<'_>>| attr.map_or(Ok(0), |attr| attr.be16());
    let tagged = tag_of_key.tci.get() & VLAN_CFI != 0;
    let tpid = value(attrs.last(kind::ETHERTYPE))?;
    let tci = value(attrs.last(kind::VLAN))?;
    if !tagged || tpid != 0xffff || tci & VLAN_CFI == 0 {
        return Err(Errno::EINVAL);
    }
    enter(tag, encap, attrs, Form::Mask)
}

fn enter<'a>(
    tag: &mut VlanKey,
    encap: Attr<'a>,
    attrs: &mut Attributes<'a>,
    form: Form,
) -> Result<bool, Errno> {
    let value = |attr: Option<Attr<'_>>| attr.map_or(Ok(0), |attr| attr.be16());
    tag.tpid = value(attrs.last(kind::ETHERTYPE))?.into();
    tag.tci = value(attrs.last(kind::VLAN))?.into();
    attrs
        .present
        .remove(Set::of(&[kind::ENCAP, kind::VLAN, kind::ETHERTYPE]));
    attrs.read(encap.payload, form)?;
    Ok(true)
}
