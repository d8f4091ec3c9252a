//! `OVS_NSH_KEY_ATTR_*`: the network service header (RFC 8300) in keys and in `push_nsh`.
