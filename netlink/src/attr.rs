//! Netlink attributes: reading them without trust, writing them without surprise.
//!
//! The layout is `struct nlattr` (uapi `linux/netlink.h`): u16 length with header, u16 type, both in
//! host order, payload, padding to 4. The `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER` bits are ignored
//! in reading and never written, as the Open vSwitch families do.

use crate::errno::Errno;

/// Bytes of an attribute's header.
pub const HEADER: usize = 4;

/// `len` rounded up to the alignment of attributes.
pub const fn align(len: usize) -> usize {
    (len + 3) & !3
}

/// One attribute: its type without flag bits, and its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr<'a> {
    /// Type, without `NLA_F_*`.
    pub kind: u16,
    /// Payload, without padding.
    pub payload: &'a [u8],
}

impl<'a> Attr<'a> {
    /// As one byte; more is ignored, as the module does. ERANGE when shorter.
    pub fn u8(&self) -> Result<u8, Errno> {
        self.payload.first().copied().ok_or(Errno::ERANGE)
    }

    /// As u16 in host order. ERANGE when shorter.
    pub fn u16(&self) -> Result<u16, Errno> {
        self.array().map(u16::from_ne_bytes)
    }

    /// As u16 in network order. ERANGE when shorter.
    pub fn be16(&self) -> Result<u16, Errno> {
        self.array().map(u16::from_be_bytes)
    }

    /// As u32 in host order. ERANGE when shorter.
    pub fn u32(&self) -> Result<u32, Errno> {
        self.array().map(u32::from_ne_bytes)
    }

    /// As u32 in network order. ERANGE when shorter.
    pub fn be32(&self) -> Result<u32, Errno> {
        self.array().map(u32::from_be_bytes)
    }

    /// As u64 in host order. ERANGE when shorter.
    pub fn u64(&self) -> Result<u64, Errno> {
        self.array().map(u64::from_ne_bytes)
    }

    /// The first `N` bytes. ERANGE when shorter.
    pub fn array<const N: usize>(&self) -> Result<[u8; N], Errno> {
        self.payload
            .first_chunk::<N>()
            .copied()
            .ok_or(Errno::ERANGE)
    }

    /// The text up to the first NUL, which must be there (`NLA_NUL_STRING`). EINVAL otherwise, and
    /// for what isn't UTF-8 or is longer than `max` bytes.
    pub fn name(&self, max: usize) -> Result<&'a str, Errno> {
        let end = self
            .payload
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(Errno::EINVAL)?;
        let text = self.payload.get(..end).ok_or(Errno::EINVAL)?;
        if end > max {
            return Err(Errno::EINVAL);
        }
        std::str::from_utf8(text).map_err(|_| Errno::EINVAL)
    }

    /// The attributes inside.
    pub fn nested(&self) -> Attrs<'a> {
        Attrs::new(self.payload)
    }
}

/// Walks a run of attributes. Ends at the first that doesn't fit; [`Attrs::rest`] tells whether
/// something was left over.
#[derive(Clone, Debug)]
pub struct Attrs<'a> {
    rest: &'a [u8],
}

impl<'a> Attrs<'a> {
    /// Over `bytes`, which begin with an attribute.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What hasn't been walked: after the walk, bytes that are no attribute.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = Attr<'a>;

    fn next(&mut self) -> Option<Attr<'a>> {
        let (len, rest) = self.rest.split_first_chunk::<2>()?;
        let (kind, _) = rest.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_ne_bytes(*len));
        let payload = self.rest.get(HEADER..len)?;
        self.rest = self.rest.get(align(len)..).unwrap_or_default();
        Some(Attr {
            kind: u16::from_ne_bytes(*kind) & 0x3fff,
            payload,
        })
    }
}

/// Top-level attributes by type: of duplicates the last counts, unknown types and trailing bytes
/// are ignored, as generic netlink's non-strict parsing does.
#[derive(Clone, Debug)]
pub struct Table<'a, const N: usize> {
    found: [Option<Attr<'a>>; N],
}

impl<'a, const N: usize> Table<'a, N> {
    /// Sorts the attributes with a type below `N`.
    pub fn new(bytes: &'a [u8]) -> Self {
        let mut found = [None; N];
        for attr in Attrs::new(bytes) {
            if let Some(slot) = found.get_mut(usize::from(attr.kind)) {
                *slot = Some(attr);
            }
        }
        Self { found }
    }

    /// The attribute of that type.
    pub fn get(&self, kind: u16) -> Option<Attr<'a>> {
        self.found.get(usize::from(kind)).copied().flatten()
    }

    /// The attribute of that type; EINVAL if it isn't there.
    pub fn require(&self, kind: u16) -> Result<Attr<'a>, Errno> {
        self.get(kind).ok_or(Errno::EINVAL)
    }
}

/// Appends attributes to a buffer.
#[derive(Debug)]
pub struct Writer<'b> {
    buffer: &'b mut Vec<u8>,
}

/// Where a nested attribute began. See [`Writer::begin`].
#[derive(Debug)]
#[must_use]
pub struct Nest(usize);

impl<'b> Writer<'b> {
    /// Appends to `buffer`, whose length is a multiple of 4.
    pub fn new(buffer: &'b mut Vec<u8>) -> Self {
        Self { buffer }
    }

    /// Bytes written into the buffer so far, all messages included.
    pub fn position(&self) -> usize {
        self.buffer.len()
    }

    /// Forgets what was written after `position`.
    pub fn rewind(&mut self, position: usize) {
        self.buffer.truncate(position);
    }

    /// An attribute with this payload. One of more than 65,531 bytes can't be said in netlink: it is
    /// left out, and the answer is EMSGSIZE.
    pub fn bytes(&mut self, kind: u16, payload: &[u8]) -> Result<(), Errno> {
        let len = u16::try_from(payload.len() + HEADER).map_err(|_| Errno::EMSGSIZE)?;
        self.buffer.extend_from_slice(&len.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(payload);
        self.buffer.resize(align(self.buffer.len()), 0);
        Ok(())
    }

    fn fixed<const N: usize>(&mut self, kind: u16, payload: [u8; N]) {
        let header = (HEADER + N) as u16;
        self.buffer.extend_from_slice(&header.to_ne_bytes());
        self.buffer.extend_from_slice(&kind.to_ne_bytes());
        self.buffer.extend_from_slice(&payload);
        self.buffer.resize(align(self.buffer.len()), 0);
    }

    /// An attribute without payload.
    pub fn flag(&mut self, kind: u16) {
        self.fixed(kind, []);
    }

    /// One byte.
    pub fn u8(&mut self, kind: u16, value: u8) {
        self.fixed(kind, [value]);
    }

    /// Host order.
    pub fn u16(&mut self, kind: u16, value: u16) {
        self.fixed(kind, value.to_ne_bytes());
    }

    /// Network order.
    pub fn be16(&mut self, kind: u16, value: u16) {
        self.fixed(kind, value.to_be_bytes());
    }

    /// Host order.
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.fixed(kind, value.to_ne_bytes());
    }

    /// Network order.
    pub fn be32(&mut self, kind: u16, value: u32) {
        self.fixed(kind, value.to_be_bytes());
    }

    /// Network order.
    pub fn be64(&mut self, kind: u16, value: u64) {
        self.fixed(kind, value.to_be_bytes());
    }

    /// Host order.
    pub fn u64(&mut self, kind: u16, value: u64) {
        self.fixed(kind, value.to_ne_bytes());
    }

    /// Text with its NUL.
    pub fn name(&mut self, kind: u16, text: &str) -> Result<(), Errno> {
        let mut payload = Vec::with_capacity(text.len() + 1);
        payload.extend_from_slice(text.as_bytes());
        payload.push(0);
        self.bytes(kind, &payload)
    }

    /// Opens a nested attribute; close it with [`Writer::end`].
    pub fn begin(&mut self, kind: u16) -> Nest {
        let start = self.buffer.len();
        self.fixed(kind, []);
        Nest(start)
    }

    /// Closes a nested attribute. One that grew over 65,535 bytes is taken back: EMSGSIZE.
    pub fn end(&mut self, nest: Nest) -> Result<(), Errno> {
        let Ok(len) = u16::try_from(self.buffer.len() - nest.0) else {
            self.buffer.truncate(nest.0);
            return Err(Errno::EMSGSIZE);
        };
        if let Some(field) = self.buffer.get_mut(nest.0..nest.0 + 2) {
            field.copy_from_slice(&len.to_ne_bytes());
        }
        Ok(())
    }

    /// Bytes that are attributes already (a multiple of 4).
    pub fn raw(&mut self, attributes: &[u8]) {
        self.buffer.extend_from_slice(attributes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut buffer = Vec::new();
        let mut writer = Writer::new(&mut buffer);
        writer.u16(1, 7);
        let nest = writer.begin(2);
        writer.name(3, "br0").unwrap();
        writer.end(nest).unwrap();
        let mut attrs = Attrs::new(&buffer);
        assert_eq!(attrs.next().unwrap().u16(), Ok(7));
        let nested = attrs.next().unwrap();
        assert_eq!(nested.nested().next().unwrap().name(15), Ok("br0"));
        assert_eq!(attrs.next(), None);
        assert!(attrs.rest().is_empty());
    }

    #[test]
    fn a_length_beyond_the_end_stops_the_walk() {
        let bytes = [9, 0, 1, 0, 0, 0, 0, 0];
        let mut attrs = Attrs::new(&bytes);
        assert_eq!(attrs.next(), None);
        assert_eq!(attrs.rest().len(), 8);
    }

    #[test]
    fn an_attribute_too_long_for_netlink_is_refused() {
        let mut buffer = Vec::new();
        assert_eq!(
            Writer::new(&mut buffer).bytes(1, &[0; 65532]),
            Err(Errno::EMSGSIZE)
        );
        assert!(buffer.is_empty());
    }
}
