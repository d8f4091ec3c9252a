//! The generic-netlink families of Open vSwitch: ids, names, commands, groups.
//!
//! Commands and attributes have the numbers of uapi `linux/openvswitch.h`. Family and group ids,
//! which the kernel assigns at run time, are fixed here, and are none that it could assign: see
//! [`transport`](crate::transport).

use crate::policy::{self, Rule};
use crate::transport;

/// Id of the controller, `GENL_ID_CTRL`.
pub const CTRL_ID: u16 = 16;

/// The right flags of an operation (uapi `linux/genetlink.h`, `GENL_*`).
const DO: u32 = 0x02;
const DUMP: u32 = 0x04;
const HAS_POLICY: u32 = 0x08;
const NEEDS_ADMIN: u32 = 0x10;

/// One of the six families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `ovs_datapath`
    Datapath,
    /// `ovs_vport`
    Vport,
    /// `ovs_flow`
    Flow,
    /// `ovs_packet`
    Packet,
    /// `ovs_meter`
    Meter,
    /// `ovs_ct_limit`
    CtLimit,
}

/// A multicast group; its number is what `NETLINK_ADD_MEMBERSHIP` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Group {
    /// `ovs_datapath`
    Datapath = transport::GROUP_BASE,
    /// `ovs_vport`
    Vport = transport::GROUP_BASE + 1,
    /// `ovs_flow`
    Flow = transport::GROUP_BASE + 2,
    /// `ovs_meter`
    Meter = transport::GROUP_BASE + 3,
    /// `ovs_ct_limit`
    CtLimit = transport::GROUP_BASE + 4,
}

impl Group {
    /// All groups, by ascending id.
    pub const ALL: [Self; 5] = [
        Self::Datapath,
        Self::Vport,
        Self::Flow,
        Self::Meter,
        Self::CtLimit,
    ];

    /// Group id on the wire.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The group with this id.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|group| group.id() == id)
    }

    /// Place in [`Group::ALL`].
    pub(crate) const fn index(self) -> usize {
        (self as u32 - Self::Datapath as u32) as usize
    }
}

/// An operation of a family: its command and `GENL_*` flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// Command, unique in its family.
    pub command: u8,
    /// `GENL_*`: do, dump, policy, privilege.
    pub flags: u32,
}

impl Op {
    const fn new(command: u8, flags: u32) -> Self {
        Self {
            command,
            flags: flags | DO | HAS_POLICY,
        }
    }

    /// Whether `NLM_F_DUMP` is understood.
    pub const fn dumps(&self) -> bool {
        self.flags & DUMP != 0
    }

    /// Whether only a privileged peer may ask for it.
    pub const fn needs_privilege(&self) -> bool {
        self.flags & NEEDS_ADMIN != 0
    }
}

/// `OVS_DP_CMD_*`, `OVS_VPORT_CMD_*` and `OVS_FLOW_CMD_*`, which have the same numbers.
pub mod command {
    /// `OVS_*_CMD_NEW`
    pub const NEW: u8 = 1;
    /// `OVS_*_CMD_DEL`
    pub const DEL: u8 = 2;
    /// `OVS_*_CMD_GET`
    pub const GET: u8 = 3;
    /// `OVS_*_CMD_SET`
    pub const SET: u8 = 4;

    /// `OVS_PACKET_CMD_*`
    pub mod packet {
        /// Upcall: no flow matched.
        pub const MISS: u8 = 1;
        /// Upcall: an action said so.
        pub const ACTION: u8 = 2;
        /// Request: apply actions to a packet.
        pub const EXECUTE: u8 = 3;
    }

    /// `OVS_METER_CMD_*`
    pub mod meter {
        /// What the datapath's meters can do.
        pub const FEATURES: u8 = 1;
        /// Add or change.
        pub const SET: u8 = 2;
        /// Delete.
        pub const DEL: u8 = 3;
        /// Statistics.
        pub const GET: u8 = 4;
    }

    /// `OVS_CT_LIMIT_CMD_*`
    pub mod ct_limit {
        /// Set limits.
        pub const SET: u8 = 1;
        /// Back to the default.
        pub const DEL: u8 = 2;
        /// Read limits.
        pub const GET: u8 = 3;
    }
}

const TABLE_OPS: [Op; 4] = [
    Op::new(command::NEW, NEEDS_ADMIN),
    Op::new(command::DEL, NEEDS_ADMIN),
    Op::new(command::GET, DUMP),
    Op::new(command::SET, NEEDS_ADMIN),
];
const PACKET_OPS: [Op; 1] = [Op::new(command::packet::EXECUTE, NEEDS_ADMIN)];
/// In the order in which the module lists them.
const METER_OPS: [Op; 4] = [
    Op::new(command::meter::FEATURES, 0),
    Op::new(command::meter::SET, NEEDS_ADMIN),
    Op::new(command::meter::GET, 0),
    Op::new(command::meter::DEL, NEEDS_ADMIN),
];
const CT_LIMIT_OPS: [Op; 3] = [
    Op::new(command::ct_limit::SET, NEEDS_ADMIN),
    Op::new(command::ct_limit::DEL, NEEDS_ADMIN),
    Op::new(command::ct_limit::GET, 0),
];

impl Family {
    /// All families, by ascending id.
    pub const ALL: [Self; 6] = [
        Self::Datapath,
        Self::Vport,
        Self::Flow,
        Self::Packet,
        Self::Meter,
        Self::CtLimit,
    ];

    /// Place in [`Family::ALL`].
    const fn index(self) -> u16 {
        match self {
            Self::Datapath => 0,
            Self::Vport => 1,
            Self::Flow => 2,
            Self::Packet => 3,
            Self::Meter => 4,
            Self::CtLimit => 5,
        }
    }

    /// `nlmsg_type` of its messages.
    pub const fn id(self) -> u16 {
        transport::family_id(self.index())
    }

    /// The family with this `nlmsg_type`.
    pub fn from_id(id: u16) -> Option<Self> {
        Self::ALL.get(transport::family_of(id)?).copied()
    }

    /// `OVS_*_FAMILY`
    pub const fn name(self) -> &'static str {
        match self {
            Self::Datapath => "ovs_datapath",
            Self::Vport => "ovs_vport",
            Self::Flow => "ovs_flow",
            Self::Packet => "ovs_packet",
            Self::Meter => "ovs_meter",
            Self::CtLimit => "ovs_ct_limit",
        }
    }

    /// The family of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// `OVS_*_VERSION`, which replies carry whatever the request said.
    pub const fn version(self) -> u8 {
        match self {
            Self::Datapath => 2,
            _ => 1,
        }
    }

    /// Highest attribute type that it knows.
    pub const fn max_attr(self) -> u16 {
        match self {
            Self::Datapath | Self::Vport | Self::Meter => 9,
            Self::Flow | Self::Packet => 11,
            Self::CtLimit => 1,
        }
    }

    /// Its operations, in the order in which the module lists them.
    pub const fn ops(self) -> &'static [Op] {
        match self {
            Self::Datapath | Self::Vport | Self::Flow => &TABLE_OPS,
            Self::Packet => &PACKET_OPS,
            Self::Meter => &METER_OPS,
            Self::CtLimit => &CT_LIMIT_OPS,
        }
    }

    /// The operation with this command.
    pub fn op(self, command: u8) -> Option<&'static Op> {
        self.ops().iter().find(|op| op.command == command)
    }

    /// Its multicast group, which has its name.
    pub const fn group(self) -> Option<Group> {
        match self {
            Self::Datapath => Some(Group::Datapath),
            Self::Vport => Some(Group::Vport),
            Self::Flow => Some(Group::Flow),
            Self::Packet => None,
            Self::Meter => Some(Group::Meter),
            Self::CtLimit => Some(Group::CtLimit),
        }
    }

    /// What its top-level attributes must look like before its handler sees them.
    pub const fn policy(self) -> &'static [Rule] {
        policy::of(self)
    }
}
