//! The flow key: what is known of a packet when it is looked up.
//!
//! One fixed layout serves as key and as mask, so that masking, hashing and comparing are loops over
//! words. Fields that come from the wire keep the wire's byte order (`zerocopy::network_endian`);
//! metadata is in host order. There is no padding: every byte counts in a comparison.
//!
//! Source: uapi `linux/openvswitch.h`, `enum ovs_key_attr` and the structures below it.

use zerocopy::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use frame::tunnel::{TunnelKey, tunnel_flags};

/// One 802.1Q or 802.1ad tag in a key. All zero: no tag.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct VlanKey {
    /// 0x8100 or 0x88a8.
    pub tpid: U16,
    /// Priority, then [`VLAN_CFI`] which says that a tag is there, then the 12-bit id.
    pub tci: U16,
}

/// Set in [`VlanKey::tci`] when a tag is present (uapi: "VLAN_TAG_PRESENT"), as the protocol has it.
pub const VLAN_CFI: u16 = 0x1000;

/// `OVS_FRAG_TYPE_NONE`: not a fragment.
pub const FRAG_NONE: u8 = 0;
/// `OVS_FRAG_TYPE_FIRST`: a fragment with offset 0.
pub const FRAG_FIRST: u8 = 1;
/// `OVS_FRAG_TYPE_LATER`: a fragment with another offset.
pub const FRAG_LATER: u8 = 2;

/// [`Key::in_port`] of a packet that came from no port (`DP_MAX_PORTS`).
pub const PORT_NONE: u32 = 0xffff;

/// What is known of a packet. The same layout serves as mask: ones where a field is compared.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Key {
    /// Outer header.
    pub tunnel: TunnelKey,

    /// Recirculation context; 0 for a packet that comes from a port.
    pub recirc_id: u32,
    /// Hash computed by the `hash` action; 0: none yet.
    pub dp_hash: u32,
    /// Datapath port number, or [`PORT_NONE`].
    pub in_port: u32,
    /// Packet mark.
    pub skb_mark: u32,
    /// Queueing priority.
    pub priority: u32,
    /// Conntrack mark.
    pub ct_mark: u32,
    /// Conntrack label.
    pub ct_labels: [u8; 16],
    /// Source of the original direction's tuple (IPv4 in the first four bytes).
    pub ct_orig_src: [u8; 16],
    /// Destination of the original direction's tuple.
    pub ct_orig_dst: [u8; 16],
    /// Source port of the original direction's tuple.
    pub ct_orig_tp_src: U16,
    /// Destination port of the original direction's tuple.
    pub ct_orig_tp_dst: U16,
    /// Conntrack zone.
    pub ct_zone: u16,
    /// `OVS_CS_F_*`.
    pub ct_state: u8,
    /// Protocol of the original direction's tuple.
    pub ct_orig_proto: u8,

    /// Source MAC address.
    pub eth_src: [u8; 6],
    /// Destination MAC address.
    pub eth_dst: [u8; 6],
    /// Outermost tag.
    pub vlan: VlanKey,
    /// Second tag.
    pub cvlan: VlanKey,
    /// Ethernet type behind the tags; 0x05ff ([`ETH_P_802_2`]: 802.2 frames are 0x0004 in the kernel's
    /// key) — see [`crate::extract`].
    pub eth_type: U16,
    /// 1: the packet begins with an Ethernet header; 0: it is an L3 packet.
    pub mac_proto: u8,

    /// IP protocol, or the low byte of the ARP opcode.
    pub ip_proto: u8,
    /// Type of service / traffic class.
    pub ip_tos: u8,
    /// Time to live / hop limit.
    pub ip_ttl: u8,
    /// [`FRAG_NONE`], [`FRAG_FIRST`] or [`FRAG_LATER`].
    pub ip_frag: u8,
    /// A bit for each entry of `mpls` in use, lowest first (1, 3 or 7), in keys as in masks: so a mask
    /// of one label matches stacks of any depth.
    pub mpls_labels: u8,
    /// Source address: IPv4 (also ARP's sender) in the first four bytes, or IPv6.
    pub ip_src: [u8; 16],
    /// Destination address: IPv4 (also ARP's target) in the first four bytes, or IPv6.
    pub ip_dst: [u8; 16],
    /// IPv6 flow label, 20 bits.
    pub ipv6_label: U32,
    /// IPv6 extension headers seen (`OFPIEH12_*` bits, host order).
    pub ipv6_exthdrs: u16,

    /// TCP/UDP/SCTP source port, or the ICMP type.
    pub tp_src: U16,
    /// TCP/UDP/SCTP destination port, or the ICMP code.
    pub tp_dst: U16,
    /// TCP flags (12 bits).
    pub tcp_flags: U16,

    /// ARP sender's hardware address.
    pub arp_sha: [u8; 6],
    /// ARP target's hardware address.
    pub arp_tha: [u8; 6],
    /// ND target.
    pub nd_target: [u8; 16],
    /// ND source link-layer address option.
    pub nd_sll: [u8; 6],
    /// ND target link-layer address option.
    pub nd_tll: [u8; 6],

    /// MPLS label stack, outermost first.
    pub mpls: [U32; 3],
    /// NSH: flags, ttl, mdtype, np, then the service path header (RFC 8300).
    pub nsh_base: [u8; 8],
    /// NSH MD type 1 context.
    pub nsh_context: [U32; 4],
    /// Keeps the layout free of implicit padding; always zero.
    pub zero: [u8; 4],
}

/// Bytes of a [`Key`].
pub const KEY_BYTES: usize = size_of::<Key>();
/// 32-bit words of a [`Key`] (its alignment is that of `u32`).
pub const KEY_WORDS: usize = KEY_BYTES / 4;
const _: () = assert!(KEY_BYTES.is_multiple_of(8) && align_of::<Key>() == 4);

/// The value that the kernel's key has for 802.2 frames without a type (`ETH_P_802_2`).
pub const ETH_P_802_2: u16 = 0x0004;

impl Default for Key {
    fn default() -> Self {
        Self::ZERO
    }
}

impl Key {
    /// All zero: as a mask, everything is wildcarded.
    pub const ZERO: Self = zerocopy::transmute!([0u8; KEY_BYTES]);
}
