//! `OVS_TUNNEL_KEY_ATTR_*`: the outer header, in keys, masks, `set(tunnel(...))` and upcalls.

use ::flow::key::{TunnelKey, tunnel_flags};
use netlink::Errno;
use netlink::attr::{Attr, Attrs, Writer};
use zerocopy::FromZeros;
use zerocopy::network_endian::U64;

use super::key::attributes::Length;

const ID: u16 = 0;
const IPV4_SRC: u16 = 1;
const IPV4_DST: u16 = 2;
const TOS: u16 = 3;
const TTL: u16 = 4;
const DONT_FRAGMENT: u16 = 5;
const CSUM: u16 = 6;
const OAM: u16 = 7;
const GENEVE_OPTS: u16 = 8;
const TP_SRC: u16 = 9;
const TP_DST: u16 = 10;
const VXLAN_OPTS: u16 = 11;
const IPV6_SRC: u16 = 12;
const IPV6_DST: u16 = 13;
const PAD: u16 = 14;
const ERSPAN_OPTS: u16 = 15;
const IPV4_INFO_BRIDGE: u16 = 16;

/// `OVS_VXLAN_EXT_GBP`.
const VXLAN_EXT_GBP: u16 = 1;

/// [`TunnelKey::family`] of IPv4.
const V4: u8 = 4;
/// [`TunnelKey::family`] of IPv6.
const V6: u8 = 6;

/// Most bytes of Geneve options that a key has room for.
const MAX_OPTIONS: usize = 255;
/// Bytes of `struct erspan_metadata`.
const ERSPAN_BYTES: usize = 12;
/// Of a Geneve option's type: the option is critical (RFC 8926, 3.5).
const GENEVE_CRITICAL: u8 = 0x80;

/// The length of an attribute; None for types that don't exist.
pub fn length(of: u16) -> Option<Length> {
    Some(match of {
        ID => Length::Exact(8),
        IPV4_SRC | IPV4_DST => Length::Exact(4),
        TOS | TTL => Length::Exact(1),
        DONT_FRAGMENT | CSUM | OAM | PAD | IPV4_INFO_BRIDGE => Length::Exact(0),
        GENEVE_OPTS | ERSPAN_OPTS => Length::Variable,
        TP_SRC | TP_DST => Length::Exact(2),
        VXLAN_OPTS => Length::Nested,
        IPV6_SRC | IPV6_DST => Length::Exact(16),
        _ => return None,
    })
}

/// What has been seen of a tunnel's attributes, beside their values.
#[derive(Default)]
struct Seen {
    v4: bool,
    v6: bool,
    ttl: bool,
    info_bridge: bool,
    options: bool,
}

/// Reads the tunnel of a key. EINVAL without a destination or a TTL, too.
pub fn parse_key(out: &mut TunnelKey, bytes: &[u8]) -> Result<(), Errno> {
    let seen = parse(out, bytes, None)?;
    out.family = if seen.v6 { V6 } else { V4 };
    let to_nowhere = out.dst == [0; 16];
    let complete = if seen.info_bridge {
        // It says "as the bridge does": nothing but an id can go with it.
        out.src == [0; 16]
            && to_nowhere
            && out.tp_dst == 0
            && !seen.ttl
            && out.tos == 0
            && out.flags & !tunnel_flags::KEY == 0
    } else {
        (seen.v4 || seen.v6) && !to_nowhere && seen.ttl
    };
    if complete { Ok(()) } else { Err(Errno::EINVAL) }
}

/// Reads the tunnel of a mask; `key` is the tunnel of the key that it belongs to.
pub fn parse_mask(out: &mut TunnelKey, bytes: &[u8], key: &TunnelKey) -> Result<(), Errno> {
    let seen = parse(out, bytes, Some(key))?;
    out.family = 0xff;
    // The module has the addresses of both families in one place: source and destination of IPv4
    // are the beginning of IPv6's source.
    if seen.v6 && key.family == V4 {
        let [_, _, _, _, dst @ ..] = out.src;
        put_v4(&mut out.dst, dst.first_chunk().copied().unwrap_or_default());
    } else if seen.v4 && key.family == V6 {
        let (dst, source) = (v4(&out.dst), &mut out.src);
        if let Some(place) = source.get_mut(4..8) {
            place.copy_from_slice(&dst);
        }
        out.dst = [0; 16];
    }
    Ok(())
}

/// Reads what `set(tunnel(...))` sends with: as a key, and Geneve options must be well-formed.
pub fn parse_set(bytes: &[u8]) -> Result<TunnelKey, Errno> {
    let mut tunnel = TunnelKey::new_zeroed();
    parse_key(&mut tunnel, bytes)?;
    if tunnel.flags & tunnel_flags::GENEVE_OPT != 0 && geneve_is_critical(options(&tunnel))? {
        tunnel.flags |= tunnel_flags::CRIT_OPT;
    }
    if tunnel.opts_len == 0 {
        tunnel.flags &= !OPTIONS;
    }
    if tunnel.family == V4 && tunnel.dst == [0; 16] {
        tunnel.flags |= tunnel_flags::INFO_BRIDGE;
    }
    Ok(tunnel)
}

const OPTIONS: u16 = tunnel_flags::GENEVE_OPT | tunnel_flags::VXLAN_OPT | tunnel_flags::ERSPAN_OPT;

/// Is there a critical option? EINVAL if they don't fill their space.
fn geneve_is_critical(mut options: &[u8]) -> Result<bool, Errno> {
    let mut critical = false;
    while !options.is_empty() {
        let [_, _, kind, length, ..] = options else {
            return Err(Errno::EINVAL);
        };
        critical |= kind & GENEVE_CRITICAL != 0;
        let bytes = 4 + 4 * usize::from(length & 0x1f);
        options = options.get(bytes..).ok_or(Errno::EINVAL)?;
    }
    Ok(critical)
}

/// Reads into the key, or into the mask of a key with the tunnel `mask_of`.
fn parse(out: &mut TunnelKey, bytes: &[u8], mask_of: Option<&TunnelKey>) -> Result<Seen, Errno> {
    let mut seen = Seen::default();
    let mut flags = 0;
    let mut attrs = Attrs::new(bytes);
    for attr in &mut attrs {
        if !length(attr.kind).is_some_and(|length| length.allows(attr.payload.len())) {
            return Err(Errno::EINVAL);
        }
        match attr.kind {
            ID => {
                out.id = U64::from_bytes(attr.array()?);
                flags |= tunnel_flags::KEY;
            }
            IPV4_SRC => {
                put_v4(&mut out.src, attr.array()?);
                seen.v4 = true;
            }
            IPV4_DST => {
                put_v4(&mut out.dst, attr.array()?);
                seen.v4 = true;
            }
            IPV6_SRC => {
                out.src = attr.array()?;
                seen.v6 = true;
            }
            IPV6_DST => {
                out.dst = attr.array()?;
                seen.v6 = true;
            }
            TOS => out.tos = attr.u8()?,
            TTL => {
                out.ttl = attr.u8()?;
                seen.ttl = true;
            }
            DONT_FRAGMENT => flags |= tunnel_flags::DONT_FRAGMENT,
            CSUM => flags |= tunnel_flags::CSUM,
            OAM => flags |= tunnel_flags::OAM,
            TP_SRC => out.tp_src = attr.be16()?.into(),
            TP_DST => out.tp_dst = attr.be16()?.into(),
            GENEVE_OPTS | VXLAN_OPTS | ERSPAN_OPTS => {
                if std::mem::replace(&mut seen.options, true) {
                    return Err(Errno::EINVAL);
                }
                flags |= parse_options(out, attr, mask_of)?;
            }
            IPV4_INFO_BRIDGE => {
                seen.info_bridge = true;
                seen.v4 = true;
            }
            _ => {}
        }
    }
    out.flags = flags;
    if !attrs.rest().is_empty() || seen.v4 && seen.v6 {
        return Err(Errno::EINVAL);
    }
    Ok(seen)
}

/// Reads one of the three kinds of options; the answer is its flag.
fn parse_options(
    out: &mut TunnelKey,
    attr: Attr<'_>,
    mask_of: Option<&TunnelKey>,
) -> Result<u16, Errno> {
    let gbp;
    let mut erspan = [0; ERSPAN_BYTES];
    let (flag, data): (u16, &[u8]) = match attr.kind {
        GENEVE_OPTS => {
            let len = attr.payload.len();
            // Options are matched as they lie, so a mask of another length can't be told apart
            // from a match on more or fewer options.
            let fits = mask_of.is_none_or(|key| usize::from(key.opts_len) == len);
            if len > MAX_OPTIONS || !len.is_multiple_of(4) || !fits {
                return Err(Errno::EINVAL);
            }
            (tunnel_flags::GENEVE_OPT, attr.payload)
        }
        VXLAN_OPTS => {
            gbp = parse_vxlan(attr)?;
            (tunnel_flags::VXLAN_OPT, &gbp)
        }
        _ => {
            if attr.payload.len() > MAX_OPTIONS {
                return Err(Errno::EINVAL);
            }
            // Whatever its length, the last 12 bytes are the metadata.
            erspan
                .iter_mut()
                .rev()
                .zip(attr.payload.iter().rev())
                .for_each(|(to, from)| *to = *from);
            (tunnel_flags::ERSPAN_OPT, &erspan)
        }
    };
    let place = out.opts.get_mut(..data.len()).ok_or(Errno::EINVAL)?;
    place.copy_from_slice(data);
    out.opts_len = match mask_of {
        Some(_) => 0xff,
        None => u8::try_from(data.len()).map_err(|_| Errno::EINVAL)?,
    };
    Ok(flag)
}

/// The group policy word, in host order; zero if not given.
fn parse_vxlan(attr: Attr<'_>) -> Result<[u8; 4], Errno> {
    let mut gbp = [0; 4];
    let mut attrs = attr.nested();
    for extension in &mut attrs {
        if extension.kind != VXLAN_EXT_GBP || extension.payload.len() != gbp.len() {
            return Err(Errno::EINVAL);
        }
        gbp = extension.array()?;
    }
    if attrs.rest().is_empty() {
        Ok(gbp)
    } else {
        Err(Errno::EINVAL)
    }
}

/// Writes the attributes of a tunnel to send through: those of `set(tunnel(...))`, and the content of
/// `OVS_PACKET_ATTR_EGRESS_TUN_KEY`. The payload only: the caller opens the nest.
pub fn write(writer: &mut Writer<'_>, tunnel: &TunnelKey) -> Result<(), Errno> {
    if tunnel.flags & tunnel_flags::INFO_BRIDGE != 0 {
        write_id(writer, tunnel);
        writer.flag(IPV4_INFO_BRIDGE);
        return Ok(());
    }
    write_match(writer, tunnel, tunnel)
}

fn write_id(writer: &mut Writer<'_>, of: &TunnelKey) {
    if of.flags & tunnel_flags::KEY != 0 {
        // Big-endian on the wire, whatever the host's order.
        writer.u64(ID, u64::from_ne_bytes(of.id.to_bytes()));
    }
}

/// Writes the attributes of a key's or mask's tunnel: `by` (the masked key's) decides which family's
/// addresses and how many bytes of options there are, `of` is what they hold.
pub fn write_match(writer: &mut Writer<'_>, by: &TunnelKey, of: &TunnelKey) -> Result<(), Errno> {
    let has = |flag| of.flags & flag != 0;
    write_id(writer, of);
    let addresses = match by.family {
        V4 => [(IPV4_SRC, &of.src, 4), (IPV4_DST, &of.dst, 4)],
        V6 => [(IPV6_SRC, &of.src, 16), (IPV6_DST, &of.dst, 16)],
        _ => [(0, &of.src, 0), (0, &of.dst, 0)],
    };
    for (kind, address, len) in addresses {
        let address = address.get(..len).unwrap_or_default();
        if address.iter().any(|byte| *byte != 0) {
            writer.bytes(kind, address)?;
        }
    }
    if of.tos != 0 {
        writer.u8(TOS, of.tos);
    }
    writer.u8(TTL, of.ttl);
    if has(tunnel_flags::DONT_FRAGMENT) {
        writer.flag(DONT_FRAGMENT);
    }
    if has(tunnel_flags::CSUM) {
        writer.flag(CSUM);
    }
    if of.tp_src != 0 {
        writer.be16(TP_SRC, of.tp_src.get());
    }
    if of.tp_dst != 0 {
        writer.be16(TP_DST, of.tp_dst.get());
    }
    if has(tunnel_flags::OAM) {
        writer.flag(OAM);
    }
    let data = of.opts.get(..usize::from(by.opts_len)).unwrap_or_default();
    if data.is_empty() {
        return Ok(());
    }
    if has(tunnel_flags::GENEVE_OPT) {
        writer.bytes(GENEVE_OPTS, data)?;
    } else if has(tunnel_flags::VXLAN_OPT) {
        let nest = writer.begin(VXLAN_OPTS);
        writer.bytes(VXLAN_EXT_GBP, data.first_chunk::<4>().unwrap_or(&[0; 4]))?;
        writer.end(nest)?;
    } else if has(tunnel_flags::ERSPAN_OPT) {
        writer.bytes(ERSPAN_OPTS, data)?;
    }
    Ok(())
}

/// The options in use.
fn options(tunnel: &TunnelKey) -> &[u8] {
    tunnel
        .opts
        .get(..usize::from(tunnel.opts_len))
        .unwrap_or_default()
}

fn put_v4(place: &mut [u8; 16], address: [u8; 4]) {
    place
        .iter_mut()
        .zip(address)
        .for_each(|(to, from)| *to = from);
}

fn v4(place: &[u8; 16]) -> [u8; 4] {
    place.first_chunk().copied().unwrap_or_default()
}
