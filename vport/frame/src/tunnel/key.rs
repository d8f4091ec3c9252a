//! What is known of a packet's outer header.

use std::fmt;

use zerocopy::network_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The outer header of a packet that came through a tunnel, or that `set(tunnel(...))` asks for.
///
/// All zero: no tunnel. Source: `enum ovs_tunnel_key_attr`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TunnelKey {
    /// Tunnel id (VNI, GRE key), big-endian in the low bytes.
    pub id: U64,
    /// Outer source: IPv4 in the first four bytes, or IPv6.
    pub src: [u8; 16],
    /// Outer destination: IPv4 in the first four bytes, or IPv6.
    pub dst: [u8; 16],
    /// [`tunnel_flags`].
    pub flags: u16,
    /// Outer type of service.
    pub tos: u8,
    /// Outer time to live.
    pub ttl: u8,
    /// Outer UDP source port.
    pub tp_src: U16,
    /// Outer UDP destination port.
    pub tp_dst: U16,
    /// 0 (no tunnel), 4 or 6.
    pub family: u8,
    /// How many bytes of `opts` are in use; in a mask, 0xff or 0.
    pub opts_len: u8,
    /// Keeps the layout free of implicit padding; always zero.
    pub zero: [u8; 6],
    /// Geneve options as on the wire, VXLAN-GBP (u32, host order) or ERSPAN metadata, by `flags`.
    /// Left-aligned; the rest is zero.
    pub opts: [u8; 256],
}

/// [`TunnelKey::family`] of IPv4.
pub const V4: u8 = 4;
/// [`TunnelKey::family`] of IPv6.
pub const V6: u8 = 6;

impl TunnelKey {
    /// No tunnel.
    pub const fn none() -> Self {
        zerocopy::transmute!([0u8; size_of::<Self>()])
    }

    /// Whether one of these [`tunnel_flags`] is set.
    #[inline]
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }

    /// The options in use.
    pub fn options(&self) -> &[u8] {
        self.opts
            .get(..usize::from(self.opts_len))
            .unwrap_or_default()
    }

    /// Makes `options` the options, of the kind that `flag` says. Those that don't fit are left out
    /// as a whole.
    pub fn set_options(&mut self, flag: u16, options: &[u8]) {
        let Ok(len) = u8::try_from(options.len()) else {
            return;
        };
        if let Some(place) = self.opts.get_mut(..options.len()) {
            place.copy_from_slice(options);
            self.opts_len = len;
            self.flags |= flag;
        }
    }
}

impl fmt::Debug for TunnelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        macro_rules! nonzero {
            ($out:expr, $($field:ident)*) => {
                $( if self.$field.as_bytes().iter().any(|byte| *byte != 0) {
                    $out.field(stringify!($field), &self.$field);
                } )*
            };
        }
        let mut out = f.debug_struct("TunnelKey");
        nonzero!(out, id src dst flags tos ttl tp_src tp_dst family opts_len);
        if self.opts_len > 0 {
            out.field("opts", &self.options());
        }
        out.finish()
    }
}

/// Bits of [`TunnelKey::flags`].
pub mod tunnel_flags {
    /// The id is present.
    pub const KEY: u16 = 1 << 0;
    /// Outer checksum.
    pub const CSUM: u16 = 1 << 1;
    /// Outer don't-fragment.
    pub const DONT_FRAGMENT: u16 = 1 << 2;
    /// Geneve OAM frame.
    pub const OAM: u16 = 1 << 3;
    /// `opts` are Geneve options.
    pub const GENEVE_OPT: u16 = 1 << 4;
    /// `opts` is a VXLAN-GBP word.
    pub const VXLAN_OPT: u16 = 1 << 5;
    /// `opts` is ERSPAN metadata.
    pub const ERSPAN_OPT: u16 = 1 << 6;
    /// `OVS_TUNNEL_KEY_ATTR_IPV4_INFO_BRIDGE`.
    pub const INFO_BRIDGE: u16 = 1 << 7;
    /// A critical Geneve option is among `opts`.
    pub const CRIT_OPT: u16 = 1 << 8;
}
