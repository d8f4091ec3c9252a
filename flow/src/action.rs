//! Actions as data: what a flow does with its packets.
//!
//! The list is decoded once, when it is installed; execution (in the datapath) is a walk over it. Each
//! list also keeps the attribute bytes that are given back when a client reads it.
//!
//! Source: uapi `linux/openvswitch.h`, `enum ovs_action_attr`.

use zerocopy::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::key::TunnelKey;

/// A decoded list of actions.
#[derive(Clone, Debug, Default)]
pub struct ActionList {
    /// What to do, in order.
    pub program: Box<[Action]>,
    /// The list as `OVS_ACTION_ATTR_*` attributes, normalised as the module gives them back.
    pub wire: Box<[u8]>,
}

/// A value and the bits of it that are written. The value has no bit outside the mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked<T> {
    /// What is written.
    pub value: T,
    /// Which bits are written.
    pub mask: T,
}

/// One action. Ports, meters and zones are named by number, never by pointer.
#[derive(Clone, Debug)]
pub enum Action {
    /// Send to a datapath port. A port that doesn't exist is skipped.
    Output(u32),
    /// Send to user space.
    Userspace(Box<Userspace>),
    /// Overwrite (part of) a header or of the metadata.
    Set(Box<SetField>),
    /// Push a tag. `tci` has [`crate::key::VLAN_CFI`] set.
    PushVlan {
        /// 0x8100 or 0x88a8.
        tpid: u16,
        /// Priority, CFI, id.
        tci: u16,
    },
    /// Remove the outermost tag.
    PopVlan,
    /// Run `actions` on a copy with a probability of `probability` / 2^32 (u32::MAX: always).
    Sample {
        /// Out of `u32::MAX`.
        probability: u32,
        /// On the copy.
        actions: Box<ActionList>,
    },
    /// Look the packet up again under this recirculation id.
    Recirc(u32),
    /// Compute the key's `dp_hash` over the L4 five-tuple.
    Hash {
        /// Mixed into the hash.
        basis: u32,
    },
    /// Limit the next output or upcall to this many bytes.
    Trunc(u32),
    /// Run on a copy; metadata and packet are as before afterwards.
    Clone(Box<ActionList>),
    /// Branch on the packet's length, without the outermost tag.
    CheckPktLen {
        /// Bytes.
        len: u16,
        /// If longer.
        greater: Box<ActionList>,
        /// Otherwise.
        less_equal: Box<ActionList>,
    },
    /// Push a label stack entry in front of the L3 header.
    PushMpls {
        /// The entry.
        lse: U32,
        /// 0x8847 or 0x8848.
        ethertype: u16,
    },
    /// Remove the outermost label; what follows has this type.
    PopMpls {
        /// Type of what follows.
        ethertype: u16,
    },
    /// Push a label stack entry in front of the L3 header or of the whole frame.
    AddMpls {
        /// The entry.
        lse: U32,
        /// 0x8847 or 0x8848.
        ethertype: u16,
        /// In front of the L3 header (else of the frame).
        l3: bool,
    },
    /// Push an Ethernet header onto an L3 packet.
    PushEth {
        /// Source.
        src: [u8; 6],
        /// Destination.
        dst: [u8; 6],
    },
    /// Remove the Ethernet header.
    PopEth,
    /// Push an NSH header: base header and context, as on the wire, in whole words.
    PushNsh(Box<[u8]>),
    /// Remove the NSH header.
    PopNsh,
    /// Decrement the TTL; at 1 or less run `exceeded` and drop.
    DecTtl {
        /// Run before the drop.
        exceeded: Box<ActionList>,
    },
    /// Pass through a meter.
    Meter(u32),
    /// Conntrack (parsed as data; see the conntrack room for its meaning).
    Ct(Box<Conntrack>),
    /// Forget what conntrack said.
    CtClear,
    /// Drop explicitly; nonzero: an error number of the translation.
    Drop(u32),
}

/// `OVS_ACTION_ATTR_USERSPACE`.
#[derive(Clone, Debug)]
pub struct Userspace {
    /// Port id of the reader.
    pub pid: u32,
    /// Given back in the upcall, opaque.
    pub userdata: Option<Box<[u8]>>,
    /// Tell the tunnel key that output to this port would use.
    pub egress_tun_port: Option<u32>,
    /// Put the action list into the upcall.
    pub want_actions: bool,
}

/// What `set` and `set_masked` write. `set` is the same with a mask of ones.
#[derive(Clone, Debug)]
pub enum SetField {
    /// Queueing priority.
    Priority(Masked<u32>),
    /// Packet mark.
    SkbMark(Masked<u32>),
    /// Egress tunnel metadata, as a whole.
    Tunnel(Box<TunnelKey>),
    /// Ethernet addresses.
    Ethernet(Masked<EthernetFields>),
    /// IPv4 header.
    Ipv4(Masked<Ipv4Fields>),
    /// IPv6 header.
    Ipv6(Masked<Ipv6Fields>),
    /// TCP ports.
    Tcp(Masked<PortFields>),
    /// UDP ports.
    Udp(Masked<PortFields>),
    /// SCTP ports.
    Sctp(Masked<PortFields>),
    /// The outermost label stack entry.
    Mpls(Masked<U32>),
    /// NSH base header and context (MD type 1), as `ovs_key_nsh`.
    Nsh(Box<Masked<NshFields>>),
    /// Passes validation, drops the packet: what the module does with `set(ct_mark)` and `set(ct_label)`.
    Unsettable,
}

/// `struct ovs_key_ethernet`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EthernetFields {
    /// Source.
    pub src: [u8; 6],
    /// Destination.
    pub dst: [u8; 6],
}

/// `struct ovs_key_ipv4`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Ipv4Fields {
    /// Source.
    pub src: [u8; 4],
    /// Destination.
    pub dst: [u8; 4],
    /// Protocol: can't be written, must equal the flow's.
    pub proto: u8,
    /// Type of service.
    pub tos: u8,
    /// Time to live.
    pub ttl: u8,
    /// Fragment type: can't be written.
    pub frag: u8,
}

/// `struct ovs_key_ipv6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Ipv6Fields {
    /// Source.
    pub src: [u8; 16],
    /// Destination.
    pub dst: [u8; 16],
    /// Flow label, 20 bits.
    pub label: U32,
    /// Next header: can't be written.
    pub proto: u8,
    /// Traffic class.
    pub tclass: u8,
    /// Hop limit.
    pub hlimit: u8,
    /// Fragment type: can't be written.
    pub frag: u8,
}

/// `struct ovs_key_tcp`, `ovs_key_udp`, `ovs_key_sctp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PortFields {
    /// Source port.
    pub src: U16,
    /// Destination port.
    pub dst: U16,
}

/// NSH base header and MD type 1 context.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NshFields {
    /// flags, ttl, mdtype, np, service path header.
    pub base: [u8; 8],
    /// MD type 1 context.
    pub context: [U32; 4],
}

/// `OVS_ACTION_ATTR_CT`.
#[derive(Clone, Debug, Default)]
pub struct Conntrack {
    /// Zone.
    pub zone: u16,
    /// Commit the connection.
    pub commit: bool,
    /// Commit it anew, though it exists in the other direction.
    pub force: bool,
    /// Mark to set.
    pub mark: Option<Masked<u32>>,
    /// Label to set.
    pub labels: Option<Masked<[u8; 16]>>,
    /// Name of the helper.
    pub helper: Option<Box<str>>,
    /// Address translation.
    pub nat: Option<Nat>,
    /// `IPCT_*` events wanted.
    pub eventmask: Option<u32>,
    /// Name of the timeout policy.
    pub timeout: Option<Box<str>>,
}

/// `OVS_CT_ATTR_NAT`. Neither source nor destination: translate as the connection says.
#[derive(Clone, Debug, Default)]
pub struct Nat {
    /// Some(true): source, Some(false): destination.
    pub source: Option<bool>,
    /// Lowest address (IPv4 in the first four bytes).
    pub min_addr: Option<[u8; 16]>,
    /// Highest address.
    pub max_addr: Option<[u8; 16]>,
    /// The addresses are IPv6.
    pub ipv6: bool,
    /// Lowest port.
    pub min_port: Option<u16>,
    /// Highest port.
    pub max_port: Option<u16>,
    /// Same mapping for a client over time.
    pub persistent: bool,
    /// Choose the port by hash.
    pub hash: bool,
    /// Choose the port at random.
    pub random: bool,
}
