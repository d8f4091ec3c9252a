//! What generic netlink checks before a family's handler runs: the top-level attribute policies, as
//! `CTRL_CMD_GETPOLICY` shows them, with the errors and the extended ack that a breach earns.
//!
//! The Open vSwitch families are parsed in the old, lenient way: unknown attributes and trailing
//! bytes are ignored, an attribute may be longer than its type.

use crate::attr::{self, Attrs};
use crate::errno::Errno;
use crate::family::Family;
use crate::message::Failure;

/// The form of an attribute. Discriminants of what a policy dump shows are `NL_ATTR_TYPE_*` (uapi
/// `linux/netlink.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// No type, at least so many bytes. Not shown in a policy dump.
    Opaque {
        /// Least number of bytes.
        min: usize,
    },
    /// Present or not, no payload.
    Flag,
    /// Host-order u16.
    U16,
    /// Host-order u32, at most `max`.
    U32 {
        /// Greatest value.
        max: u32,
    },
    /// Host-order u64.
    U64,
    /// Host-order i32, at least `min`.
    S32 {
        /// Least value.
        min: i32,
    },
    /// Text with NUL, at most `max` bytes before it.
    Name {
        /// Most bytes, without the NUL.
        max: u32,
    },
    /// Attributes inside, or nothing.
    Nested,
}

/// One attribute's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Attribute type.
    pub kind: u16,
    /// Its form.
    pub form: Form,
}

const fn rule(kind: u16, form: Form) -> Rule {
    Rule { kind, form }
}

const ANY_U32: Form = Form::U32 { max: u32::MAX };
const ANY_S32: Form = Form::S32 { min: i32::MIN };
const IFNAME: Form = Form::Name { max: 15 };

/// `OVS_DP_ATTR_*`; `PER_CPU_PIDS` has no rule.
const DATAPATH: [Rule; 5] = [
    rule(1, IFNAME),
    rule(2, ANY_U32),
    rule(5, ANY_U32),
    rule(7, Form::U32 { max: 4096 }),
    rule(9, Form::S32 { min: 0 }),
];

/// `OVS_VPORT_ATTR_*`; the statistics are `struct ovs_vport_stats`.
const VPORT: [Rule; 8] = [
    rule(1, ANY_U32),
    rule(2, ANY_U32),
    rule(3, IFNAME),
    rule(4, Form::Nested),
    rule(5, Form::Opaque { min: 0 }),
    rule(6, Form::Opaque { min: 64 }),
    rule(8, Form::S32 { min: 0 }),
    rule(9, ANY_S32),
];

/// `OVS_FLOW_ATTR_*`
const FLOW: [Rule; 7] = [
    rule(1, Form::Nested),
    rule(2, Form::Nested),
    rule(6, Form::Flag),
    rule(7, Form::Nested),
    rule(8, Form::Flag),
    rule(9, Form::Opaque { min: 1 }),
    rule(10, ANY_U32),
];

/// `OVS_PACKET_ATTR_*`; a packet has at least an Ethernet header.
const PACKET: [Rule; 6] = [
    rule(1, Form::Opaque { min: 14 }),
    rule(2, Form::Nested),
    rule(3, Form::Nested),
    rule(8, Form::Flag),
    rule(9, Form::U16),
    rule(11, Form::U64),
];

/// `OVS_METER_ATTR_*`; the statistics are `struct ovs_flow_stats`.
const METER: [Rule; 8] = [
    rule(1, ANY_U32),
    rule(2, Form::Flag),
    rule(3, Form::Opaque { min: 16 }),
    rule(4, Form::Nested),
    rule(5, Form::U64),
    rule(6, Form::Flag),
    rule(7, ANY_U32),
    rule(8, ANY_U32),
];

/// `OVS_CT_LIMIT_ATTR_*`
const CT_LIMIT: [Rule; 1] = [rule(1, Form::Nested)];

pub(crate) const fn of(family: Family) -> &'static [Rule] {
    match family {
        Family::Datapath => &DATAPATH,
        Family::Vport => &VPORT,
        Family::Flow => &FLOW,
        Family::Packet => &PACKET,
        Family::Meter => &METER,
        Family::CtLimit => &CT_LIMIT,
    }
}

/// `CTRL_ATTR_FAMILY_ID`, `CTRL_ATTR_FAMILY_NAME`.
pub(crate) const CTRL: [Rule; 2] = [rule(1, Form::U16), rule(2, IFNAME)];

/// Checks the attributes in `bytes`, which begin `offset` bytes into their message, against `rules`.
///
/// # Errors
/// ERANGE or EINVAL, with offset and rule for the extended ack.
pub fn check(rules: &'static [Rule], bytes: &[u8], offset: usize) -> Result<(), Failure> {
    let mut at = offset;
    for attr in Attrs::new(bytes) {
        if let Some(rule) = rules.iter().find(|rule| rule.kind == attr.kind)
            && let Err((errno, message)) = rule.form.check(attr.payload)
        {
            let failure = Failure::from(errno).message(message).offset(at as u32);
            return Err(failure.rule(rule));
        }
        at += attr::HEADER + attr::align(attr.payload.len());
    }
    Ok(())
}

const BREACH: &str = "Attribute failed policy validation";
const OUT_OF_RANGE: &str = "integer out of range";

impl Form {
    fn check(self, payload: &[u8]) -> Result<(), (Errno, &'static str)> {
        let at_least = |min: usize| {
            if payload.len() < min {
                Err((Errno::ERANGE, BREACH))
            } else {
                Ok(())
            }
        };
        match self {
            Self::Opaque { min } => at_least(min),
            Self::Flag if payload.is_empty() => Ok(()),
            Self::Flag => Err((Errno::ERANGE, BREACH)),
            Self::U16 => at_least(2),
            Self::U64 => at_least(8),
            Self::U32 { max } => match payload.first_chunk() {
                None => Err((Errno::ERANGE, BREACH)),
                Some(bytes) if u32::from_ne_bytes(*bytes) > max => {
                    Err((Errno::ERANGE, OUT_OF_RANGE))
                }
                Some(_) => Ok(()),
            },
            Self::S32 { min } => match payload.first_chunk() {
                None => Err((Errno::ERANGE, BREACH)),
                Some(bytes) if i32::from_ne_bytes(*bytes) < min => {
                    Err((Errno::ERANGE, OUT_OF_RANGE))
                }
                Some(_) => Ok(()),
            },
            Self::Name { max } => {
                let max = max as usize;
                let seen = payload
                    .get(..payload.len().min(max + 1))
                    .unwrap_or_default();
                if !seen.contains(&0) {
                    return Err((Errno::EINVAL, BREACH));
                }
                let text = payload.strip_suffix(&[0]).unwrap_or(payload);
                if text.len() > max {
                    Err((Errno::ERANGE, BREACH))
                } else {
                    Ok(())
                }
            }
            Self::Nested if payload.is_empty() => Ok(()),
            Self::Nested => at_least(attr::HEADER),
        }
    }

    /// Whether a policy dump shows it.
    pub(crate) const fn is_shown(self) -> bool {
        !matches!(self, Self::Opaque { .. })
    }

    /// Writes the form as `NL_POLICY_TYPE_ATTR_*`. Nothing for an opaque one.
    pub(crate) fn describe(self, writer: &mut attr::Writer<'_>) {
        const TYPE: u16 = 1;
        const MIN_S: u16 = 2;
        const MAX_S: u16 = 3;
        const MIN_U: u16 = 4;
        const MAX_U: u16 = 5;
        const MAX_LENGTH: u16 = 7;
        let kind = match self {
            Self::Opaque { .. } => return,
            Self::Flag => 1,
            Self::U16 => {
                writer.u64(MIN_U, 0);
                writer.u64(MAX_U, u16::MAX.into());
                3
            }
            Self::U32 { max } => {
                writer.u64(MIN_U, 0);
                writer.u64(MAX_U, max.into());
                4
            }
            Self::U64 => {
                writer.u64(MIN_U, 0);
                writer.u64(MAX_U, u64::MAX);
                5
            }
            Self::S32 { min } => {
                writer.u64(MIN_S, i64::from(min) as u64);
                writer.u64(MAX_S, i64::from(i32::MAX) as u64);
                8
            }
            Self::Name { max } => {
                writer.u32(MAX_LENGTH, max);
                12
            }
            Self::Nested => 13,
        };
        writer.u32(TYPE, kind);
    }
}
