//! Between Open vSwitch's netlink attributes and the types of `flow`, with the module's validation.
//!
//! What a client sends is checked here, once, in the order and with the errnos of the module
//! (Linux 6.1): a flow that gets through may be executed without further checks. The other way round,
//! keys, masks and actions are given back byte for byte as the module gives them back.
//!
//! Attributes are bounds-checked, nothing here panics on any bytes, and nothing is allocated that
//! isn't in proportion to the message itself.
//!
//! - [`key`], `OVS_KEY_ATTR_*`, as key, as mask, and as the metadata of an executed packet.
//! - [`tunnel`], `OVS_TUNNEL_KEY_ATTR_*`, in keys, set actions and upcalls.
//! - [`nsh`], `OVS_NSH_KEY_ATTR_*`.
//! - [`action`], `OVS_ACTION_ATTR_*`.
//! - [`flow`], what names a flow: UFIDs and their flags.
//!
//! Source: uapi `linux/openvswitch.h`; where it leaves a choice, recordings of the module's answers.

pub mod action;
pub mod flow;
pub mod key;
pub mod nsh;
pub mod tunnel;

/// What the datapath can do at present. What it can't is refused with EINVAL, which clients that
/// probe for features take as a plain "no".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Matches on conntrack state other than "untracked", and the actions `ct` and `ct_clear`.
    pub conntrack: bool,
}
