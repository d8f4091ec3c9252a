//! `set` and `set_masked`: one key attribute inside; of `set_masked`, value and mask.

use ::flow::action::{EthernetFields, Ipv4Fields, Ipv6Fields, Masked, PortFields, SetField};
use ::flow::key::Key;
use netlink::Errno;
use netlink::attr::{Attr, Writer, align};
use zerocopy::network_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::key::attributes::{kind, length};
use super::super::key::prerequisites::{eth_type, ip_proto, is_mpls};
use super::super::tunnel;
use super::require;

/// What is known of the packet that is written to.
#[derive(Clone, Copy)]
pub struct Known<'k> {
    /// Of all packets of the flow.
    pub key: &'k Key,
    /// At this place in the list; 0: unknown.
    pub eth_type: u16,
    /// Is there an Ethernet header at this place?
    pub ethernet: bool,
}

/// Decodes one; `writer` gets what is given back, if it isn't what was sent. EINVAL for fields that
/// can't be written, at all or in packets of this flow.
pub fn parse(
    attr: Attr<'_>,
    masked: bool,
    known: Known<'_>,
    writer: &mut Writer<'_>,
) -> Result<SetField, Errno> {
    let field = attr.nested().next().ok_or(Errno::EINVAL)?;
    // Exactly one, and nothing behind it.
    require(align(field.payload.len() + netlink::attr::HEADER) == attr.payload.len())?;
    let len = field.payload.len() / if masked { 2 } else { 1 };
    require(length(field.kind).is_some_and(|length| length.allows(len)))?;
    let (value, mask) = field.payload.split_at_checked(len).ok_or(Errno::EINVAL)?;
    let ones;
    let mask = if masked {
        let stray = value
            .iter()
            .zip(mask)
            .any(|(value, mask)| value & !mask != 0);
        require(!stray)?;
        mask
    } else {
        ones = vec![0xff; len];
        &ones
    };
    let set = decode(field.kind, value, mask, masked, known)?;
    if !masked {
        let nest = writer.begin(super::kind::SET);
        match &set {
            SetField::Tunnel(tunnel) => {
                let inner = writer.begin(kind::TUNNEL);
                tunnel::write(writer, tunnel)?;
                writer.end(inner)?;
            }
            _ => writer.bytes(field.kind, value)?,
        }
        writer.end(nest)?;
    }
    Ok(set)
}

fn decode(
    kind: u16,
    value: &[u8],
    mask: &[u8],
    masked: bool,
    known: Known<'_>,
) -> Result<SetField, Errno> {
    let is_ip = matches!(known.eth_type, eth_type::IPV4 | eth_type::IPV6);
    let ports = |proto: u8| -> Result<Masked<PortFields>, Errno> {
        require(is_ip && known.key.ip_proto == proto)?;
        both(value, mask)
    };
    Ok(match kind {
        kind::PRIORITY => SetField::Priority(host_order(value, mask)?),
        kind::SKB_MARK => SetField::SkbMark(host_order(value, mask)?),
        kind::CT_MARK | kind::CT_LABELS => SetField::Unsettable,
        kind::TUNNEL => {
            require(!masked)?;
            SetField::Tunnel(Box::new(tunnel::parse_set(value)?))
        }
        kind::ETHERNET => {
            require(known.ethernet)?;
            SetField::Ethernet(both::<EthernetFields>(value, mask)?)
        }
        kind::IPV4 => {
            let mut ip: Masked<Ipv4Fields> = both(value, mask)?;
            require(known.eth_type == eth_type::IPV4)?;
            let keeps = (ip.value.proto, ip.value.frag) == (known.key.ip_proto, known.key.ip_frag);
            require(if masked {
                ip.mask.proto == 0 && ip.mask.frag == 0
            } else {
                keeps
            })?;
            (ip.value.proto, ip.value.frag, ip.mask.proto, ip.mask.frag) = (0, 0, 0, 0);
            SetField::Ipv4(ip)
        }
        kind::IPV6 => {
            let mut ip: Masked<Ipv6Fields> = both(value, mask)?;
            require(known.eth_type == eth_type::IPV6)?;
            let keeps = (ip.value.proto, ip.value.frag) == (known.key.ip_proto, known.key.ip_frag);
            require(if masked {
                ip.mask.proto == 0 && ip.mask.frag == 0
            } else {
                keeps
            })?;
            require(!masked || ip.mask.label.get() >> 20 == 0)?;
            require(ip.value.label.get() >> 20 == 0)?;
            (ip.value.proto, ip.value.frag, ip.mask.proto, ip.mask.frag) = (0, 0, 0, 0);
            ip.mask.label = (ip.mask.label.get() & 0x000f_ffff).into();
            SetField::Ipv6(ip)
        }
        kind::TCP => SetField::Tcp(ports(ip_proto::TCP)?),
        kind::UDP => SetField::Udp(ports(ip_proto::UDP)?),
        kind::SCTP => SetField::Sctp(ports(ip_proto::SCTP)?),
        kind::MPLS => {
            require(is_mpls(known.eth_type))?;
            SetField::Mpls(prefixes::<U32>(value, mask)?)
        }
        // NSH among them: the module refuses it, too.
        _ => return Err(Errno::EINVAL),
    })
}

fn both<T: FromBytes>(value: &[u8], mask: &[u8]) -> Result<Masked<T>, Errno> {
    let read = |bytes| T::read_from_bytes(bytes).map_err(|_| Errno::EINVAL);
    Ok(Masked {
        value: read(value)?,
        mask: read(mask)?,
    })
}

/// The first of possibly several.
fn prefixes<T: FromBytes + Immutable + IntoBytes>(
    value: &[u8],
    mask: &[u8],
) -> Result<Masked<T>, Errno> {
    let read = |bytes| {
        T::read_from_prefix(bytes)
            .map(|(read, _)| read)
            .map_err(|_| Errno::EINVAL)
    };
    Ok(Masked {
        value: read(value)?,
        mask: read(mask)?,
    })
}

fn host_order(value: &[u8], mask: &[u8]) -> Result<Masked<u32>, Errno> {
    let Masked { value, mask } = both::<[u8; 4]>(value, mask)?;
    Ok(Masked {
        value: u32::from_ne_bytes(value),
        mask: u32::from_ne_bytes(mask),
    })
}
