//! Attributes that stand for a header of the packet.

use ::flow::action::{EthernetFields, Ipv4Fields, Ipv6Fields, PortFields};
use ::flow::key::{ETH_P_802_2, FRAG_LATER, Key};
use netlink::Errno;
use netlink::attr::Attr;
use zerocopy::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::nsh;
use super::attributes::{Attributes, Form, kind};
use super::metadata;

/// `struct ovs_key_arp`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ArpFields {
    pub sip: [u8; 4],
    pub tip: [u8; 4],
    pub op: U16,
    pub sha: [u8; 6],
    pub tha: [u8; 6],
    pub pad: [u8; 2],
}

/// `struct ovs_key_nd`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NdFields {
    pub target: [u8; 16],
    pub sll: [u8; 6],
    pub tll: [u8; 6],
}

/// Most labels of a stack that are told apart.
const MPLS_DEPTH: usize = 3;

fn fields<T: FromBytes>(attr: Attr<'_>) -> Result<T, Errno> {
    T::read_from_bytes(attr.payload).map_err(|_| Errno::EINVAL)
}

/// An IPv4 address where both families have their place.
fn widen(address: [u8; 4]) -> [u8; 16] {
    let mut wide = [0; 16];
    wide.iter_mut()
        .zip(address)
        .for_each(|(to, from)| *to = from);
    wide
}

/// Reads all header attributes into `out`. EINVAL for values out of range, and if anything remains
/// present in `attrs`: tags and metadata have been read before.
pub fn parse(out: &mut Key, attrs: &mut Attributes<'_>, form: Form) -> Result<(), Errno> {
    parse_ethernet(out, attrs, form)?;
    parse_ip(out, attrs, form)?;
    if let Some(attr) = attrs.take(kind::ARP) {
        let arp: ArpFields = fields(attr)?;
        let [high, low] = arp.op.to_bytes();
        if form == Form::Key && high != 0 {
            return Err(Errno::EINVAL);
        }
        out.ip_src = widen(arp.sip);
        out.ip_dst = widen(arp.tip);
        out.ip_proto = low;
        out.arp_sha = arp.sha;
        out.arp_tha = arp.tha;
    }
    if let Some(attr) = attrs.take(kind::NSH) {
        nsh::parse(out, attr.payload, form)?;
    }
    if let Some(attr) = attrs.take(kind::MPLS) {
        let entries = <[U32]>::ref_from_bytes(attr.payload).map_err(|_| Errno::EINVAL)?;
        if !(1..=MPLS_DEPTH).contains(&entries.len()) {
            return Err(Errno::EINVAL);
        }
        out.mpls
            .iter_mut()
            .zip(entries)
            .for_each(|(to, from)| *to = *from);
        out.mpls_labels = (1 << entries.len()) - 1;
    }
    parse_transport(out, attrs)?;
    if attrs.present.is_empty() {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

fn parse_ethernet(out: &mut Key, attrs: &mut Attributes<'_>, form: Form) -> Result<(), Errno> {
    if let Some(attr) = attrs.take(kind::ETHERNET) {
        let ethernet: EthernetFields = fields(attr)?;
        out.eth_src = ethernet.src;
        out.eth_dst = ethernet.dst;
        if attrs.present.has(kind::VLAN) {
            return Err(Errno::EINVAL);
        }
        if form == Form::Key && !attrs.present.has(kind::ETHERTYPE) {
            out.eth_type = ETH_P_802_2.into();
        }
        metadata::parse_eth_type(out, attrs, form)
    } else if form == Form::Key && out.eth_type == 0 {
        Err(Errno::EINVAL)
    } else {
        Ok(())
    }
}

fn parse_ip(out: &mut Key, attrs: &mut Attributes<'_>, form: Form) -> Result<(), Errno> {
    if let Some(attr) = attrs.take(kind::IPV4) {
        let ip: Ipv4Fields = fields(attr)?;
        if form == Form::Key && ip.frag > FRAG_LATER {
            return Err(Errno::EINVAL);
        }
        out.ip_src = widen(ip.src);
        out.ip_dst = widen(ip.dst);
        out.ip_proto = ip.proto;
        out.ip_tos = ip.tos;
        out.ip_ttl = ip.ttl;
        out.ip_frag = ip.frag;
    }
    if let Some(attr) = attrs.take(kind::IPV6) {
        let ip: Ipv6Fields = fields(attr)?;
        if form == Form::Key && (ip.frag > FRAG_LATER || ip.label.get() >> 20 != 0) {
            return Err(Errno::EINVAL);
        }
        out.ip_src = ip.src;
        out.ip_dst = ip.dst;
        out.ipv6_label = ip.label;
        out.ip_proto = ip.proto;
        out.ip_tos = ip.tclass;
        out.ip_ttl = ip.hlimit;
        out.ip_frag = ip.frag;
    }
    if let Some(attr) = attrs.take(kind::IPV6_EXTHDRS) {
        out.ipv6_exthdrs = attr.u16()?;
    }
    Ok(())
}

fn parse_transport(out: &mut Key, attrs: &mut Attributes<'_>) -> Result<(), Errno> {
    if let Some(attr) = attrs.take(kind::TCP_FLAGS) {
        out.tcp_flags = attr.be16()?.into();
    }
    for kind in [kind::TCP, kind::UDP, kind::SCTP] {
        if let Some(attr) = attrs.take(kind) {
            let ports: PortFields = fields(attr)?;
            out.tp_src = ports.src;
            out.tp_dst = ports.dst;
        }
    }
    for kind in [kind::ICMP, kind::ICMPV6] {
        if let Some(attr) = attrs.take(kind) {
            let [icmp_type, code] = attr.array()?;
            out.tp_src = u16::from(icmp_type).into();
            out.tp_dst = u16::from(code).into();
        }
    }
    if let Some(attr) = attrs.take(kind::ND) {
        let nd: NdFields = fields(attr)?;
        out.nd_target = nd.target;
        out.nd_sll = nd.sll;
        out.nd_tll = nd.tll;
    }
    Ok(())
}
