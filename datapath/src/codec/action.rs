//! `OVS_ACTION_ATTR_*`: what a flow does.

use ::flow::action::ActionList;
use ::flow::key::Key;
use netlink::Errno;

use super::Limits;

/// Decodes and validates a list of actions (payload of `OVS_FLOW_ATTR_ACTIONS`) for packets that
/// match `key` under `mask`. For `OVS_PACKET_CMD_EXECUTE` see [`parse_exact`].
///
/// EOVERFLOW when nested deeper than 16 levels, ERANGE for a few short attributes, EINVAL for the rest.
pub fn parse(attrs: &[u8], key: &Key, mask: &Key, limits: Limits) -> Result<ActionList, Errno> {
    let _ = (attrs, key, mask, limits);
    Err(Errno::EOPNOTSUPP)
}

/// As [`parse`], with every bit of the key known.
pub fn parse_exact(attrs: &[u8], key: &Key, limits: Limits) -> Result<ActionList, Errno> {
    let _ = (attrs, key, limits);
    Err(Errno::EOPNOTSUPP)
}
