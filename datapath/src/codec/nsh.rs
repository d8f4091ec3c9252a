//! `OVS_NSH_KEY_ATTR_*`: the network service header (RFC 8300) in keys and in `push_nsh`.

use ::flow::key::Key;
use netlink::Errno;
use netlink::attr::{Attr, Attrs, Writer};
use zerocopy::{FromBytes, IntoBytes};

use super::key::attributes::{Form, Length, kind};

const BASE: u16 = 1;
const MD1: u16 = 2;
const MD2: u16 = 3;

/// Bytes of the base header and the service path header, in attributes as on the wire.
const BASE_BYTES: usize = 8;
/// Most bytes of context behind them: the header's length is told in 6 bits, in words.
const MAX_CONTEXT_BYTES: usize = 63 * 4 - BASE_BYTES;

/// The length of an attribute; None for types that don't exist.
pub fn length(of: u16) -> Option<Length> {
    match of {
        BASE => Some(Length::Exact(BASE_BYTES)),
        MD1 => Some(Length::Exact(16)),
        MD2 => Some(Length::Variable),
        _ => None,
    }
}

/// What the attributes of one header say.
#[derive(Default)]
struct Header<'a> {
    base: Option<[u8; BASE_BYTES]>,
    md1: Option<Attr<'a>>,
    md2: Option<Attr<'a>>,
}

impl<'a> Header<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, Errno> {
        let mut header = Self::default();
        let mut attrs = Attrs::new(bytes);
        for attr in &mut attrs {
            if !length(attr.kind).is_some_and(|length| length.allows(attr.payload.len())) {
                return Err(Errno::EINVAL);
            }
            match attr.kind {
                BASE => header.base = Some(attr.array()?),
                MD1 => header.md1 = Some(attr),
                _ => header.md2 = Some(attr),
            }
        }
        if !attrs.rest().is_empty() || header.md1.is_some() && header.md2.is_some() {
            return Err(Errno::EINVAL);
        }
        Ok(header)
    }

    /// Is the context of the type that the base header tells?
    fn is_consistent(&self) -> bool {
        let md_type = self.base.map_or(0, |[_, _, md_type, ..]| md_type);
        (self.md1.is_none() || md_type == 1) && (self.md2.is_none() || md_type == 2)
    }
}

/// Reads `OVS_KEY_ATTR_NSH` (payload) of a key or mask. EINVAL for contexts of MD type 2, which can't
/// be matched.
pub fn parse(out: &mut Key, bytes: &[u8], form: Form) -> Result<(), Errno> {
    let header = Header::read(bytes)?;
    if header.md2.is_some() || form == Form::Key && !header.is_consistent() {
        return Err(Errno::EINVAL);
    }
    if let Some(base) = header.base {
        out.nsh_base = base;
    }
    if let Some(md1) = header.md1 {
        out.nsh_context = FromBytes::read_from_bytes(md1.payload).map_err(|_| Errno::EINVAL)?;
    }
    Ok(())
}

/// Writes `OVS_KEY_ATTR_NSH`.
pub fn write(writer: &mut Writer<'_>, of: &Key, form: Form) -> Result<(), Errno> {
    let [_, _, md_type, ..] = of.nsh_base;
    let nest = writer.begin(kind::NSH);
    writer.bytes(BASE, &of.nsh_base)?;
    if form == Form::Mask || md_type == 1 {
        writer.bytes(MD1, of.nsh_context.as_bytes())?;
    }
    writer.end(nest)
}

/// Reads the header that `push_nsh` adds (payload of the `OVS_KEY_ATTR_NSH` in it), as it will be on
/// the wire. A context that isn't in whole words is cut off, as its length can't be told.
pub fn parse_push(bytes: &[u8]) -> Result<Box<[u8]>, Errno> {
    let header = Header::read(bytes)?;
    let context = header.md1.or(header.md2).ok_or(Errno::EINVAL)?.payload;
    let base = header.base.ok_or(Errno::EINVAL)?;
    if !header.is_consistent() || context.is_empty() || context.len() > MAX_CONTEXT_BYTES {
        return Err(Errno::EINVAL);
    }
    let [flags, ttl, md_type, next, path @ ..] = base;
    let words = (BASE_BYTES + context.len()) / 4;
    // RFC 8300, 2.2: version 0 (2 bits), flags O and U, TTL (6 bits), length in words (6 bits).
    let first = u16::from(flags & 0x3) << 12 | u16::from(ttl & 0x3f) << 6 | words as u16;
    let mut wire = Vec::with_capacity(BASE_BYTES + context.len());
    wire.extend_from_slice(&first.to_be_bytes());
    wire.extend_from_slice(&[md_type, next]);
    wire.extend_from_slice(&path);
    wire.extend_from_slice(context);
    wire.truncate(words * 4);
    Ok(wire.into())
}
