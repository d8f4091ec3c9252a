//! `OVS_TUNNEL_KEY_ATTR_*`: the outer header, in keys, masks, `set(tunnel(...))` and upcalls.

use ::flow::key::TunnelKey;
use netlink::Errno;
use netlink::attr::Writer;

/// Writes the attributes of a tunnel to send through: those of `set(tunnel(...))`, and the content of
/// `OVS_PACKET_ATTR_EGRESS_TUN_KEY`.
pub fn write(writer: &mut Writer<'_>, tunnel: &TunnelKey) -> Result<(), Errno> {
    let _ = (writer, tunnel);
    Err(Errno::EOPNOTSUPP)
}
