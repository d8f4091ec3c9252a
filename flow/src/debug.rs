//! `Debug` for keys: only what isn't zero, so that a log line can be read.

use std::fmt;

use crate::key::Key;

macro_rules! nonzero {
    ($out:expr, $of:expr, $($field:ident)*) => {
        $( if zerocopy::IntoBytes::as_bytes(&$of.$field).iter().any(|byte| *byte != 0) {
            $out.field(stringify!($field), &$of.$field);
        } )*
    };
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Key");
        if self.tunnel.family != 0 || self.tunnel.ttl != 0 {
            out.field("tunnel", &self.tunnel);
        }
        nonzero!(out, self, recirc_id dp_hash in_port skb_mark priority ct_mark ct_labels ct_orig_src
            ct_orig_dst ct_orig_tp_src ct_orig_tp_dst ct_zone ct_state ct_orig_proto eth_src eth_dst vlan
            cvlan eth_type mac_proto ip_proto ip_tos ip_ttl ip_frag mpls_labels ip_src ip_dst ipv6_label
            ipv6_exthdrs tp_src tp_dst tcp_flags arp_sha arp_tha nd_target nd_sll nd_tll mpls nsh_base
            nsh_context);
        out.finish()
    }
}
