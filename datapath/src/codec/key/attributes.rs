//! The attributes of a key or mask, sorted by type: their lengths, and which are there.

use netlink::Errno;
use netlink::attr::{Attr, Attrs};

use super::metadata::CT_STATE_BITS;

/// `enum ovs_key_attr`.
#[allow(missing_docs)]
pub mod kind {
    pub const ENCAP: u16 = 1;
    pub const PRIORITY: u16 = 2;
    pub const IN_PORT: u16 = 3;
    pub const ETHERNET: u16 = 4;
    pub const VLAN: u16 = 5;
    pub const ETHERTYPE: u16 = 6;
    pub const IPV4: u16 = 7;
    pub const IPV6: u16 = 8;
    pub const TCP: u16 = 9;
    pub const UDP: u16 = 10;
    pub const ICMP: u16 = 11;
    pub const ICMPV6: u16 = 12;
    pub const ARP: u16 = 13;
    pub const ND: u16 = 14;
    pub const SKB_MARK: u16 = 15;
    pub const TUNNEL: u16 = 16;
    pub const SCTP: u16 = 17;
    pub const TCP_FLAGS: u16 = 18;
    pub const DP_HASH: u16 = 19;
    pub const RECIRC_ID: u16 = 20;
    pub const MPLS: u16 = 21;
    pub const CT_STATE: u16 = 22;
    pub const CT_ZONE: u16 = 23;
    pub const CT_MARK: u16 = 24;
    pub const CT_LABELS: u16 = 25;
    pub const CT_ORIG_TUPLE_IPV4: u16 = 26;
    pub const CT_ORIG_TUPLE_IPV6: u16 = 27;
    pub const NSH: u16 = 28;
    pub const IPV6_EXTHDRS: u16 = 32;
}

const COUNT: usize = 33;

/// Is it the key that is read or written, or the mask?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Values of fields.
    Key,
    /// The bits of them that count.
    Mask,
}

/// How long the payload of an attribute is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So many bytes.
    Exact(usize),
    /// To be checked by whoever reads it.
    Variable,
    /// Attributes again.
    Nested,
}

impl Length {
    /// Does a payload of `len` bytes have this length?
    pub fn allows(self, len: usize) -> bool {
        match self {
            Self::Exact(exact) => exact == len,
            Self::Variable | Self::Nested => true,
        }
    }
}

/// The length of a key attribute; None for types that don't exist. Types 29 to 31 are not for the
/// wire: two that only user space has, and one internal to the module.
pub fn length(of: u16) -> Option<Length> {
    Some(match of {
        0 => Length::Exact(0),
        kind::ENCAP | kind::TUNNEL | kind::NSH => Length::Nested,
        kind::MPLS => Length::Variable,
        kind::VLAN
        | kind::ETHERTYPE
        | kind::ICMP
        | kind::ICMPV6
        | kind::TCP_FLAGS
        | kind::CT_ZONE
        | kind::IPV6_EXTHDRS => Length::Exact(2),
        kind::PRIORITY
        | kind::IN_PORT
        | kind::TCP
        | kind::UDP
        | kind::SCTP
        | kind::SKB_MARK
        | kind::DP_HASH
        | kind::RECIRC_ID
        | kind::CT_STATE
        | kind::CT_MARK => Length::Exact(4),
        kind::ETHERNET | kind::IPV4 => Length::Exact(12),
        kind::CT_LABELS | kind::CT_ORIG_TUPLE_IPV4 => Length::Exact(16),
        kind::ARP => Length::Exact(24),
        kind::ND => Length::Exact(28),
        kind::IPV6 | kind::CT_ORIG_TUPLE_IPV6 => Length::Exact(40),
        _ => return None,
    })
}

/// A set of attribute types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set(u64);

impl Set {
    /// Of these types.
    pub const fn of(kinds: &[u16]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < kinds.len() {
            bits |= 1 << kinds[i];
            i += 1;
        }
        Self(bits)
    }

    /// Is this type in it?
    pub fn has(self, kind: u16) -> bool {
        self.0 & (1 << kind) != 0
    }

    /// Is all of `other` in it?
    pub fn has_all(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Nothing in it?
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// With `other`.
    pub fn add(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Without `other`.
    pub fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }
}

/// Sorted attributes.
///
/// The module sorts those of the key and then those of the mask into one table, which it doesn't
/// clear in between: a tag's TPID or TCI that is missing in the mask is read from what the key (or the
/// tag outside) left there. This is visible, clients depend on flows being accepted so, and therefore
/// it is kept: [`Attributes::last`].
#[derive(Debug)]
pub struct Attributes<'a> {
    last: [Option<Attr<'a>>; COUNT],
    /// Those present.
    pub present: Set,
}

impl Default for Attributes<'_> {
    fn default() -> Self {
        Self {
            last: [None; COUNT],
            present: Set::default(),
        }
    }
}

impl<'a> Attributes<'a> {
    /// Sorts `bytes` into the table, in addition to what is present. EINVAL for unknown types, wrong
    /// lengths, duplicates and what is no attribute. In a mask, one that is all zero says nothing and
    /// is skipped.
    pub fn read(&mut self, bytes: &'a [u8], form: Form) -> Result<(), Errno> {
        let mut attrs = Attrs::new(bytes);
        for attr in &mut attrs {
            let length = length(attr.kind).ok_or(Errno::EINVAL)?;
            if self.present.has(attr.kind) || !length.allows(attr.payload.len()) {
                return Err(Errno::EINVAL);
            }
            if form == Form::Mask && attr.payload.iter().all(|byte| *byte == 0) {
                continue;
            }
            self.present.add(Set::of(&[attr.kind]));
            if let Some(slot) = self.last.get_mut(usize::from(attr.kind)) {
                *slot = Some(attr);
            }
        }
        if attrs.rest().is_empty() {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }

    /// The attribute that was last read of this type, whether or not it counts as present.
    pub fn last(&self, kind: u16) -> Option<Attr<'a>> {
        self.last.get(usize::from(kind)).copied().flatten()
    }

    /// The attribute of this type, if present.
    pub fn get(&self, kind: u16) -> Option<Attr<'a>> {
        self.present.has(kind).then(|| self.last(kind)).flatten()
    }

    /// The same, which then is no longer present.
    pub fn take(&mut self, kind: u16) -> Option<Attr<'a>> {
        let attr = self.get(kind);
        self.present.remove(Set::of(&[kind]));
        attr
    }
}

/// A mask for every bit of what is present in a key, nested attributes included. `key` has been read
/// without error.
pub fn exact_mask(key: &[u8]) -> Vec<u8> {
    let mut mask = key.to_vec();
    fill(&mut mask, length);
    mask
}

/// Ones into every payload. Lengths come from `length`, by type.
fn fill(mut bytes: &mut [u8], length: fn(u16) -> Option<Length>) {
    while let Some(attr) = Attrs::new(bytes).next() {
        let (kind, len) = (attr.kind, attr.payload.len());
        let (this, rest) = bytes.split_at_mut(bytes.len().min(netlink::attr::align(len + 4)));
        let Some(payload) = this.get_mut(4..4 + len) else {
            return;
        };
        let inside: Option<fn(u16) -> Option<Length>> = match (length(kind), kind) {
            (Some(Length::Nested), kind::TUNNEL) => Some(super::super::tunnel::length),
            (Some(Length::Nested), kind::NSH) => Some(super::super::nsh::length),
            (Some(Length::Nested), kind::ENCAP) => Some(self::length),
            (Some(Length::Nested), _) => Some(|_| None),
            _ => None,
        };
        match (inside, kind) {
            (Some(length), _) => fill(payload, length),
            // Bits that don't exist can't be matched.
            (None, kind::CT_STATE) => {
                let bits = CT_STATE_BITS.to_ne_bytes();
                payload
                    .iter_mut()
                    .zip(bits)
                    .for_each(|(to, from)| *to = from);
            }
            (None, _) => payload.fill(0xff),
        }
        bytes = rest;
    }
}
