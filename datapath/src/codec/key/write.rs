//! From a key or mask to attributes, in the module's order.

use ::flow::action::{EthernetFields, Ipv4Fields, Ipv6Fields, PortFields};
use ::flow::key::{ETH_P_802_2, FRAG_LATER, Key, PORT_NONE, VlanKey};
use netlink::Errno;
use netlink::attr::{Nest, Writer};
use zerocopy::IntoBytes;

use super::super::{nsh, tunnel};
use super::attributes::{Form, kind};
use super::headers::{ArpFields, NdFields};
use super::metadata::Tuple;
use super::prerequisites::{eth_type, ip_proto, is_mpls, is_neighbour_discovery};
use super::vlan::is_tag;

/// Writes the attributes of a key: that of an upcall, or `OVS_FLOW_ATTR_KEY` (masked beforehand for a
/// flow with a UFID, as it was sent for one without). The payload only: the caller opens the nest.
pub fn write_key(writer: &mut Writer<'_>, key: &Key) -> Result<(), Errno> {
    write(writer, key, key, Form::Key)
}

/// Writes the attributes of a mask, `OVS_FLOW_ATTR_MASK`. Which there are depends on the masked key.
pub fn write_mask(writer: &mut Writer<'_>, masked_key: &Key, mask: &Key) -> Result<(), Errno> {
    write(writer, masked_key, mask, Form::Mask)
}

/// `by` decides which attributes there are, `of` is what they hold.
fn write(writer: &mut Writer<'_>, by: &Key, of: &Key, form: Form) -> Result<(), Errno> {
    write_metadata(writer, by, of, form)?;
    let mut nests: [Option<Nest>; 2] = [None, None];
    write_packet(writer, by, of, form, &mut nests)?;
    let [outer, inner] = nests;
    for nest in [inner, outer].into_iter().flatten() {
        writer.end(nest)?;
    }
    Ok(())
}

fn write_metadata(writer: &mut Writer<'_>, by: &Key, of: &Key, form: Form) -> Result<(), Errno> {
    writer.u32(kind::RECIRC_ID, of.recirc_id);
    writer.u32(kind::DP_HASH, of.dp_hash);
    writer.u32(kind::PRIORITY, of.priority);
    if by.tunnel.family != 0 || form == Form::Mask {
        let nest = writer.begin(kind::TUNNEL);
        tunnel::write_match(writer, &by.tunnel, &of.tunnel)?;
        writer.end(nest)?;
    }
    // The module knows 16 bits of a port; clients expect the upper ones of a mask to be set.
    match form {
        Form::Key if by.in_port == PORT_NONE => {}
        Form::Key => writer.u32(kind::IN_PORT, of.in_port),
        Form::Mask if by.in_port == PORT_NONE && of.in_port != u32::MAX => {}
        Form::Mask => writer.u32(kind::IN_PORT, of.in_port | 0xffff_0000),
    }
    writer.u32(kind::SKB_MARK, of.skb_mark);
    writer.u32(kind::CT_STATE, of.ct_state.into());
    writer.u16(kind::CT_ZONE, of.ct_zone);
    writer.u32(kind::CT_MARK, of.ct_mark);
    writer.bytes(kind::CT_LABELS, &of.ct_labels)?;
    if by.ct_orig_proto != 0 {
        match by.eth_type.get() {
            eth_type::IPV4 => {
                writer.bytes(kind::CT_ORIG_TUPLE_IPV4, Tuple::<4>::load(of).as_bytes())?;
            }
            eth_type::IPV6 => {
                writer.bytes(kind::CT_ORIG_TUPLE_IPV6, Tuple::<16>::load(of).as_bytes())?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Writes what stands for bytes of the packet. Tags leave their nest open, in `nests`.
fn write_packet(
    writer: &mut Writer<'_>,
    by: &Key,
    of: &Key,
    form: Form,
    nests: &mut [Option<Nest>; 2],
) -> Result<(), Errno> {
    let eth_type = by.eth_type.get();
    if by.mac_proto != 0 {
        let ethernet = EthernetFields {
            src: of.eth_src,
            dst: of.eth_dst,
        };
        writer.bytes(kind::ETHERNET, ethernet.as_bytes())?;
        let tags = [(by.vlan, of.vlan), (by.cvlan, of.cvlan)];
        for ((tag, tag_of), nest) in tags.into_iter().zip(nests) {
            if tag.tci == 0 && !is_tag(eth_type) {
                break;
            }
            *nest = Some(open_tag(writer, tag_of, form));
            if tag.tci == 0 {
                return Ok(());
            }
        }
        // A frame without a type has none in its key either; in the mask, one that is matched.
        if eth_type == ETH_P_802_2 {
            if form == Form::Mask && of.eth_type != 0 {
                writer.be16(kind::ETHERTYPE, of.eth_type.get());
            }
            return Ok(());
        }
    }
    writer.be16(kind::ETHERTYPE, of.eth_type.get());
    // Still a tag: a third one, behind which nothing is known.
    if is_tag(eth_type) {
        return Ok(());
    }
    match eth_type {
        eth_type::IPV4 => {
            let ip = Ipv4Fields {
                src: narrow(&of.ip_src),
                dst: narrow(&of.ip_dst),
                proto: of.ip_proto,
                tos: of.ip_tos,
                ttl: of.ip_ttl,
                frag: of.ip_frag,
            };
            writer.bytes(kind::IPV4, ip.as_bytes())?;
        }
        eth_type::IPV6 => {
            let ip = Ipv6Fields {
                src: of.ip_src,
                dst: of.ip_dst,
                label: of.ipv6_label,
                proto: of.ip_proto,
                tclass: of.ip_tos,
                hlimit: of.ip_ttl,
                frag: of.ip_frag,
            };
            writer.bytes(kind::IPV6, ip.as_bytes())?;
            writer.u16(kind::IPV6_EXTHDRS, of.ipv6_exthdrs);
        }
        eth_type::NSH => nsh::write(writer, of, form)?,
        eth_type::ARP | eth_type::RARP => {
            let arp = ArpFields {
                sip: narrow(&of.ip_src),
                tip: narrow(&of.ip_dst),
                op: u16::from(of.ip_proto).into(),
                sha: of.arp_sha,
                tha: of.arp_tha,
                pad: [0; 2],
            };
            writer.bytes(kind::ARP, arp.as_bytes())?;
        }
        other if is_mpls(other) => {
            let labels = of.mpls_labels.count_ones() as usize;
            let entries = of.mpls.get(..labels).unwrap_or(&of.mpls);
            writer.bytes(kind::MPLS, entries.as_bytes())?;
        }
        _ => {}
    }
    write_transport(writer, by, of)
}

fn write_transport(writer: &mut Writer<'_>, by: &Key, of: &Key) -> Result<(), Errno> {
    let eth_type = by.eth_type.get();
    if !matches!(eth_type, eth_type::IPV4 | eth_type::IPV6) || by.ip_frag == FRAG_LATER {
        return Ok(());
    }
    let ports = PortFields {
        src: of.tp_src,
        dst: of.tp_dst,
    };
    let type_and_code = [of.tp_src.to_bytes()[1], of.tp_dst.to_bytes()[1]];
    match by.ip_proto {
        ip_proto::TCP => {
            writer.bytes(kind::TCP, ports.as_bytes())?;
            writer.be16(kind::TCP_FLAGS, of.tcp_flags.get());
        }
        ip_proto::UDP => writer.bytes(kind::UDP, ports.as_bytes())?,
        ip_proto::SCTP => writer.bytes(kind::SCTP, ports.as_bytes())?,
        ip_proto::ICMP if eth_type == eth_type::IPV4 => {
            writer.bytes(kind::ICMP, &type_and_code)?;
        }
        ip_proto::ICMPV6 if eth_type == eth_type::IPV6 => {
            writer.bytes(kind::ICMPV6, &type_and_code)?;
            if is_neighbour_discovery(by.tp_src.get()) {
                let nd = NdFields {
                    target: of.nd_target,
                    sll: of.nd_sll,
                    tll: of.nd_tll,
                };
                writer.bytes(kind::ND, nd.as_bytes())?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn open_tag(writer: &mut Writer<'_>, tag: VlanKey, form: Form) -> Nest {
    let tpid = if form == Form::Mask {
        0xffff
    } else {
        tag.tpid.get()
    };
    writer.be16(kind::ETHERTYPE, tpid);
    writer.be16(kind::VLAN, tag.tci.get());
    writer.begin(kind::ENCAP)
}

/// The IPv4 address in a field for both families.
fn narrow(address: &[u8; 16]) -> [u8; 4] {
    address.first_chunk().copied().unwrap_or_default()
}
