//! `ct`: attributes in any order, some of which look at those before them.

use ::flow::action::{Conntrack, Masked, Nat};
use ::flow::key::Key;
use netlink::Errno;
use netlink::attr::{Attr, Attrs, Writer};

use super::super::key::prerequisites::{eth_type, ip_proto};
use super::require;

const COMMIT: u16 = 1;
const ZONE: u16 = 2;
const MARK: u16 = 3;
const LABELS: u16 = 4;
const HELPER: u16 = 5;
const NAT: u16 = 6;
const FORCE_COMMIT: u16 = 7;
const EVENTMASK: u16 = 8;
const TIMEOUT: u16 = 9;

const NAT_SRC: u16 = 1;
const NAT_DST: u16 = 2;
const NAT_IP_MIN: u16 = 3;
const NAT_IP_MAX: u16 = 4;
const NAT_PROTO_MIN: u16 = 5;
const NAT_PROTO_MAX: u16 = 6;
const NAT_PERSISTENT: u16 = 7;
const NAT_PROTO_HASH: u16 = 8;
const NAT_PROTO_RANDOM: u16 = 9;

/// Shortest and longest payload of an attribute; None for types that don't exist.
fn length(of: u16) -> Option<(usize, usize)> {
    Some(match of {
        COMMIT | FORCE_COMMIT => (0, 0),
        ZONE => (2, 2),
        MARK => (8, 8),
        LABELS => (32, 32),
        HELPER => (1, 16),
        NAT => (0, 96),
        EVENTMASK => (4, 4),
        TIMEOUT => (1, 32),
        _ => return None,
    })
}

/// Decodes the payload of a `ct` for packets of a flow with this masked key. EINVAL unless they are
/// all IPv4 or all IPv6.
pub fn parse(bytes: &[u8], key: &Key) -> Result<Conntrack, Errno> {
    let ipv6 = match key.eth_type.get() {
        eth_type::IPV4 => false,
        eth_type::IPV6 => true,
        _ => return Err(Errno::EINVAL),
    };
    let mut ct = Conntrack::default();
    let mut attrs = Attrs::new(bytes);
    for attr in &mut attrs {
        let (shortest, longest) = length(attr.kind).ok_or(Errno::EINVAL)?;
        require((shortest..=longest).contains(&attr.payload.len()))?;
        match attr.kind {
            COMMIT => ct.commit = true,
            FORCE_COMMIT => (ct.commit, ct.force) = (true, true),
            ZONE => ct.zone = attr.u16()?,
            MARK => {
                let [value, mask]: [[u8; 4]; 2] = zerocopy::transmute!(attr.array::<8>()?);
                let mark = Masked {
                    value: u32::from_ne_bytes(value),
                    mask: u32::from_ne_bytes(mask),
                };
                require(mark.mask != 0)?;
                ct.mark = Some(mark);
            }
            LABELS => {
                let [value, mask]: [[u8; 16]; 2] = zerocopy::transmute!(attr.array::<32>()?);
                require(mask != [0; 16])?;
                ct.labels = Some(Masked { value, mask });
            }
            HELPER => ct.helper = Some(attr.name(15)?.into()),
            NAT => parse_nat(&mut ct, attr, ipv6)?,
            EVENTMASK => ct.eventmask = Some(attr.u32()?),
            // A policy without a name is none.
            TIMEOUT => {
                let name = attr.name(31)?;
                ct.timeout = (!name.is_empty()).then(|| name.into());
            }
            _ => return Err(Errno::EINVAL),
        }
    }
    require(attrs.rest().is_empty())?;
    require(ct.commit || ct.mark.is_none() && ct.labels.is_none())?;
    if let Some(helper) = &ct.helper {
        require(helper_exists(helper, key.ip_proto))?;
    }
    Ok(ct)
}

/// Helpers are bound to a protocol.
fn helper_exists(name: &str, proto: u8) -> bool {
    matches!(
        (name, proto),
        ("ftp", ip_proto::TCP) | ("tftp", ip_proto::UDP)
    )
}

fn parse_nat(ct: &mut Conntrack, attr: Attr<'_>, ipv6: bool) -> Result<(), Errno> {
    // A second one adds to the first.
    let again = ct.nat.is_some();
    let mut nat = ct.nat.take().unwrap_or_default();
    let mut given = again;
    let (mut ip_max, mut port_max) = (false, false);
    let mut attrs = attr.nested();
    for attr in &mut attrs {
        let len = match attr.kind {
            NAT_SRC | NAT_DST | NAT_PERSISTENT | NAT_PROTO_HASH | NAT_PROTO_RANDOM => 0,
            NAT_IP_MIN | NAT_IP_MAX if ipv6 => 16,
            NAT_IP_MIN | NAT_IP_MAX => 4,
            NAT_PROTO_MIN | NAT_PROTO_MAX => 2,
            _ => return Err(Errno::EINVAL),
        };
        require(attr.payload.len() == len)?;
        match attr.kind {
            NAT_SRC | NAT_DST => {
                if std::mem::replace(&mut given, true) {
                    return Err(Errno::ERANGE);
                }
                nat.source = Some(attr.kind == NAT_SRC);
            }
            NAT_IP_MIN => nat.min_addr = Some(address(attr)),
            NAT_IP_MAX => {
                nat.max_addr = Some(address(attr));
                ip_max = true;
            }
            NAT_PROTO_MIN => nat.min_port = Some(attr.u16()?),
            NAT_PROTO_MAX => {
                nat.max_port = Some(attr.u16()?);
                port_max = true;
            }
            NAT_PERSISTENT => nat.persistent = true,
            NAT_PROTO_HASH => nat.hash = true,
            _ => nat.random = true,
        }
    }
    require(attrs.rest().is_empty())?;
    let ranged = nat.min_addr.is_some() || nat.max_addr.is_some();
    let ported = nat.min_port.is_some() || nat.max_port.is_some();
    if given {
        require(ct.commit)?;
    } else {
        require(!(ranged || ported || nat.persistent || nat.hash || nat.random))?;
    }
    // One end missing: for the lowest zero is meant, for the highest the lowest.
    if ranged {
        let min = *nat.min_addr.get_or_insert([0; 16]);
        if !ip_max {
            nat.max_addr = Some(min);
        }
    }
    if ported {
        let min = *nat.min_port.get_or_insert(0);
        if !port_max {
            nat.max_port = Some(min);
        }
    }
    nat.ipv6 = ipv6;
    ct.nat = Some(nat);
    Ok(())
}

fn address(attr: Attr<'_>) -> [u8; 16] {
    let mut wide = [0; 16];
    wide.iter_mut()
        .zip(attr.payload)
        .for_each(|(to, from)| *to = *from);
    wide
}

/// Writes the action as it is given back.
pub fn write(writer: &mut Writer<'_>, kind: u16, ct: &Conntrack) -> Result<(), Errno> {
    let nest = writer.begin(kind);
    if ct.commit {
        writer.flag(if ct.force { FORCE_COMMIT } else { COMMIT });
    }
    writer.u16(ZONE, ct.zone);
    if let Some(Masked { value, mask }) = ct.mark {
        let (value, mask) = (value.to_ne_bytes(), mask.to_ne_bytes());
        writer.bytes(MARK, [value, mask].as_flattened())?;
    }
    if let Some(Masked { value, mask }) = ct.labels {
        writer.bytes(LABELS, [value, mask].as_flattened())?;
    }
    if let Some(helper) = &ct.helper {
        writer.name(HELPER, helper)?;
    }
    if let Some(eventmask) = ct.eventmask {
        writer.u32(EVENTMASK, eventmask);
    }
    if let Some(timeout) = &ct.timeout {
        writer.name(TIMEOUT, timeout)?;
    }
    if let Some(nat) = &ct.nat {
        write_nat(writer, nat)?;
    }
    writer.end(nest)
}

fn write_nat(writer: &mut Writer<'_>, nat: &Nat) -> Result<(), Errno> {
    let nest = writer.begin(NAT);
    let Some(source) = nat.source else {
        return writer.end(nest);
    };
    writer.flag(if source { NAT_SRC } else { NAT_DST });
    let bytes = if nat.ipv6 { 16 } else { 4 };
    if let Some(min) = &nat.min_addr {
        writer.bytes(NAT_IP_MIN, min.get(..bytes).unwrap_or_default())?;
        if let Some(max) = nat.max_addr.as_ref().filter(|max| *max != min) {
            writer.bytes(NAT_IP_MAX, max.get(..bytes).unwrap_or_default())?;
        }
    }
    if let Some(min) = nat.min_port {
        writer.u16(NAT_PROTO_MIN, min);
        if let Some(max) = nat.max_port.filter(|max| *max != min) {
            writer.u16(NAT_PROTO_MAX, max);
        }
    }
    for (set, kind) in [
        (nat.persistent, NAT_PERSISTENT),
        (nat.hash, NAT_PROTO_HASH),
        (nat.random, NAT_PROTO_RANDOM),
    ] {
        if set {
            writer.flag(kind);
        }
    }
    writer.end(nest)
}
