//! Which attributes a key must have, and which a mask may have, by what the key says before them.

use ::flow::key::{FRAG_LATER, Key};

use super::attributes::{Set, kind};

/// Ethernet types by which headers follow.
pub mod eth_type {
    #![allow(missing_docs)]
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const RARP: u16 = 0x8035;
    pub const IPV6: u16 = 0x86dd;
    pub const MPLS_UC: u16 = 0x8847;
    pub const MPLS_MC: u16 = 0x8848;
    pub const NSH: u16 = 0x894f;
    pub const TEB: u16 = 0x6558;
}

/// IP protocols with ports, types or codes.
pub mod ip_proto {
    #![allow(missing_docs)]
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// Is it an MPLS type?
pub fn is_mpls(eth_type: u16) -> bool {
    matches!(eth_type, eth_type::MPLS_UC | eth_type::MPLS_MC)
}

/// Neighbour solicitation or advertisement?
pub fn is_neighbour_discovery(icmpv6_type: u16) -> bool {
    matches!(icmpv6_type, 135 | 136)
}

/// Attributes that a mask may have only if the key has them for a reason.
const CONDITIONAL: Set = Set::of(&[
    kind::IPV4,
    kind::IPV6,
    kind::TCP,
    kind::TCP_FLAGS,
    kind::UDP,
    kind::SCTP,
    kind::ICMP,
    kind::ICMPV6,
    kind::ARP,
    kind::ND,
    kind::MPLS,
    kind::NSH,
    kind::CT_ORIG_TUPLE_IPV4,
    kind::CT_ORIG_TUPLE_IPV6,
]);

/// Attributes that a mask may have whatever the key has.
const ALWAYS: Set = Set::of(&[kind::TUNNEL, kind::IN_PORT, kind::ETHERTYPE]);

/// Did the key have all that its types and protocols ask for, and the mask nothing else? A header's
/// mask is allowed only if what announces the header (type, protocol) is matched exactly. `mask` is
/// None if nothing is matched.
pub fn hold(key: &Key, in_key: Set, mask: Option<&Key>, in_mask: Set) -> bool {
    let type_exact = mask.is_some_and(|mask| mask.eth_type == 0xffff);
    let proto_exact = mask.is_some_and(|mask| mask.ip_proto == 0xff);
    let mut expected = Set::default();
    let mut allowed = in_key;
    allowed.remove(CONDITIONAL);
    allowed.add(ALWAYS);
    let mut header = |kinds: &[u16], exact: bool| {
        expected.add(Set::of(kinds));
        if exact {
            allowed.add(Set::of(kinds));
        }
    };

    let eth_type = key.eth_type.get();
    let mut icmp = None;
    match eth_type {
        eth_type::ARP | eth_type::RARP => header(&[kind::ARP], type_exact),
        eth_type::MPLS_UC | eth_type::MPLS_MC => header(&[kind::MPLS], type_exact),
        eth_type::NSH => header(&[kind::NSH], type_exact),
        eth_type::IPV4 => {
            header(&[kind::IPV4], type_exact);
            icmp = Some((ip_proto::ICMP, kind::ICMP));
        }
        eth_type::IPV6 => {
            header(&[kind::IPV6], type_exact);
            icmp = Some((ip_proto::ICMPV6, kind::ICMPV6));
        }
        _ => {}
    }
    let mut discovery = false;
    // A later fragment has no transport header.
    if let Some((icmp_proto, icmp_kind)) = icmp.filter(|_| key.ip_frag != FRAG_LATER) {
        match key.ip_proto {
            ip_proto::TCP => header(&[kind::TCP, kind::TCP_FLAGS], proto_exact),
            ip_proto::UDP => header(&[kind::UDP], proto_exact),
            ip_proto::SCTP => header(&[kind::SCTP], proto_exact),
            proto if proto == icmp_proto => {
                header(&[icmp_kind], proto_exact);
                discovery = proto == ip_proto::ICMPV6 && is_neighbour_discovery(key.tp_src.get());
                if discovery {
                    header(&[kind::ND], mask.is_some_and(|mask| mask.tp_src == 0x00ff));
                }
            }
            _ => {}
        }
    }
    match eth_type {
        eth_type::IPV4 if type_exact => allowed.add(Set::of(&[kind::CT_ORIG_TUPLE_IPV4])),
        // The module keeps ND's fields and the original tuple in the same place.
        eth_type::IPV6 if type_exact && !discovery => {
            allowed.add(Set::of(&[kind::CT_ORIG_TUPLE_IPV6]));
        }
        _ => {}
    }
    in_key.has_all(expected) && allowed.has_all(in_mask)
}
