//! What differs from the recordings, each with its reason. `docs/differences.md` shows the same to readers.
//!
//! Two tables. A [`Field`] is of no interest in a message of its family, in all cases. A [`Case`] is not
//! what the recording says, in a way that is said here too; a case that is as recorded after all makes its
//! line wrong, and the replay fails until the line is gone.

use crate::replay::translate::{ERROR, HEADERS, attributes, family, u16_at, u32_at};

/// What becomes of a field before two messages are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treat {
    /// Its bytes from the first up to the second offset of the payload count as zero.
    Zero(usize, usize),
    /// Ours has it and the recording hasn't: it must be there, and is taken out.
    Newer,
    /// It is there or not, with any value: it is taken out on both sides.
    Any,
}

/// A field that differs by nature.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// An index of [`transport::FAMILIES`].
    pub family: usize,
    /// Types of attributes, from the outside in.
    pub path: &'static [u16],
    /// What to do about it.
    pub treat: Treat,
    /// Why.
    pub reason: &'static str,
}

/// In all messages.
pub const FIELDS: &[Field] = &[
    Field {
        family: family::VPORT,
        path: &[10],
        treat: Treat::Newer,
        reason: "OVS_VPORT_ATTR_UPCALL_STATS is of Linux 6.3; ovs-vswitchd shows it",
    },
    Field {
        family: family::FLOW,
        path: &[5],
        treat: Treat::Zero(0, 8),
        reason: "OVS_FLOW_ATTR_USED is a time",
    },
    Field {
        family: family::METER,
        path: &[5],
        treat: Treat::Zero(0, 8),
        reason: "OVS_METER_ATTR_USED is a time",
    },
    Field {
        family: family::PACKET,
        path: &[11],
        treat: Treat::Zero(0, 8),
        reason: "OVS_PACKET_ATTR_HASH: ours is always there and stays through rewriting, since readers are \
                 chosen by it; the module's is the kernel's for the packet, 0 after a rewriting and in \
                 EXECUTE without one",
    },
];

/// In recordings of ovs-vswitchd's netlink traffic ([`crate::replay::session::Session::unseen`]): packets
/// that hit a flow, or that nobody read, aren't in them.
pub const TRAFFIC: &[Field] = &[
    Field {
        family: family::DATAPATH,
        path: &[3],
        treat: Treat::Zero(0, 24),
        reason: "OVS_DP_ATTR_STATS: n_hit, n_missed and n_lost count packets; n_flows is compared",
    },
    Field {
        family: family::DATAPATH,
        path: &[4],
        treat: Treat::Zero(0, 8),
        reason: "OVS_DP_ATTR_MEGAFLOW_STATS: n_mask_hit counts packets",
    },
    Field {
        family: family::DATAPATH,
        path: &[4],
        treat: Treat::Zero(8, 12),
        reason: "OVS_DP_ATTR_MEGAFLOW_STATS: n_masks; the module counts masks of the same bits twice where their \
                 attributes reach to different fields (of IPv4 and of IPv6, both looking at nothing but fragments)",
    },
    Field {
        family: family::DATAPATH,
        path: &[4],
        treat: Treat::Zero(16, 24),
        reason: "OVS_DP_ATTR_MEGAFLOW_STATS: n_cache_hit counts packets",
    },
    Field {
        family: family::VPORT,
        path: &[6],
        treat: Treat::Zero(0, 64),
        reason: "OVS_VPORT_ATTR_STATS counts packets",
    },
    Field {
        family: family::FLOW,
        path: &[3],
        treat: Treat::Any,
        reason: "OVS_FLOW_ATTR_STATS counts packets, and isn't there before the first one",
    },
    Field {
        family: family::FLOW,
        path: &[4],
        treat: Treat::Any,
        reason: "OVS_FLOW_ATTR_TCP_FLAGS is of the packets, and isn't there before the first one",
    },
    Field {
        family: family::FLOW,
        path: &[5],
        treat: Treat::Any,
        reason: "OVS_FLOW_ATTR_USED isn't there before the first packet",
    },
    Field {
        family: family::METER,
        path: &[3],
        treat: Treat::Zero(0, 16),
        reason: "OVS_METER_ATTR_STATS counts packets; those of bands are compared, nothing was dropped",
    },
];

/// How a case differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It isn't asked for: the answer would need what isn't built yet, or it would change what later
    /// cases find.
    LeftOut,
    /// Ours answers with this errno.
    Errno(i32),
    /// Where the module succeeds, ours answers with this errno.
    Refused(i32),
    /// Ours succeeds, with or without an answer, where the module refuses.
    Succeeds,
    /// These attributes (by their paths) of the answers have other values.
    Attributes(&'static [&'static [u16]]),
    /// The answers are others; the reason says how.
    Answers,
    /// Something in frames and upcalls is chosen at random: there are as many of them, as long as recorded.
    Chosen,
    /// Whether there is an upcall is chosen at random; if there is one, it is as recorded.
    Sampled,
}

/// Cases that differ.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The file.
    pub group: &'static str,
    /// The case's name; with a `*` at its end or its beginning, all that match.
    pub name: &'static str,
    /// How.
    pub how: How,
    /// Why.
    pub reason: &'static str,
}

const fn case(group: &'static str, name: &'static str, how: How, reason: &'static str) -> Case {
    Case {
        group,
        name,
        how,
        reason,
    }
}

/// In these cases.
pub const CASES: &[Case] = &[
    case("ctrl", "getfamily-dump", How::Answers, OURS),
    case("meter", "set-id-1024", How::Succeeds, SPARSE),
    case("meter", "set-id-big", How::Succeeds, SPARSE),
    case("sem_upcall", "dp-stats-*", How::Attributes(COUNTS), UNSEEN),
    case("sem_upcall", "set-*", How::Attributes(COUNTS), UNSEEN),
    case("sem_upcall", "features-*", How::Attributes(COUNTS), UNSEEN),
    case("sem_upcall", "va-p*", How::Attributes(PORT_COUNTS), UNSEEN),
    case(
        "sem_upcall",
        "va-3pids",
        How::Attributes(PORT_COUNTS),
        UNSEEN,
    ),
    case(
        "sem_upcall",
        "va-small",
        How::LeftOut,
        "about a socket buffer; the daemon's own queues are bounded otherwise",
    ),
    case(
        "sem_upcall",
        "overflow",
        How::LeftOut,
        "about a socket buffer; netlink/tests/upcalls.rs has our queues' bounds",
    ),
    case("vswitchd_live2", "1577-*", How::Sampled, SAMPLED),
    case("vswitchd_live2", "1589-*", How::Sampled, SAMPLED),
    case("vswitchd_live2", "3366-*", How::Sampled, SAMPLED),
    case("vswitchd_live2", "3369-*", How::Sampled, SAMPLED),
    case("sem_trunc", "vlan-14", How::LeftOut, SHORT),
    case("sem_trunc", "vlan-15", How::LeftOut, SHORT),
    case("sem_misc", "hash-*", How::Attributes(DP_HASH), SEEDED),
    case(
        "sem_misc",
        "user-egress-vxlan",
        How::Attributes(EGRESS_SOURCE_PORT),
        PORT_BY_HASH,
    ),
    case(
        "packet",
        "egress-tun",
        How::Attributes(EGRESS_SOURCE_PORT),
        PORT_BY_HASH,
    ),
    case("packet", "hash-dphash", How::Attributes(DP_HASH), SEEDED),
    case("sem_ct", "ct-snat4-range-exhaust", How::Chosen, PORTS),
    case("sem_ct", "ct-snat-addr-range-persist", How::Chosen, PORTS),
    case("sem_ct", "ct-frag6", How::Chosen, IDENTIFIED),
    case(
        "flow_action_bad",
        "unk-24@tcp4",
        How::Succeeds,
        "OVS_ACTION_ATTR_DROP is of Linux 6.7; ovs-vswitchd 3.3 asks for it",
    ),
];

/// `OVS_PACKET_ATTR_KEY`, `OVS_KEY_ATTR_DP_HASH`.
const DP_HASH: &[&[u16]] = &[&[2, 19]];
/// `OVS_PACKET_ATTR_EGRESS_TUN_KEY`, `OVS_TUNNEL_KEY_ATTR_TP_SRC`.
const EGRESS_SOURCE_PORT: &[&[u16]] = &[&[5, 9]];
const PORT_BY_HASH: &str = "a tunnel's source port is chosen by a hash with a random seed";
/// `OVS_DP_ATTR_STATS`, `OVS_DP_ATTR_MEGAFLOW_STATS`.
const COUNTS: &[&[u16]] = &[&[3], &[4]];
/// `OVS_VPORT_ATTR_STATS`.
const PORT_COUNTS: &[&[u16]] = &[&[6]];
const UNSEEN: &str = "counts packets that the recording doesn't show";
const SPARSE: &str =
    "the module's table has 1024 places at first, which two ids may claim; ours has as many as ids";
const SHORT: &str = "a tag goes to a device among the bytes: the far end's stack drops such a frame of less than 20";
const SEEDED: &str = "the hash action's hash has a random seed";
const PORTS: &str = "addresses and ports are chosen by a secret hash, or at random";
const OURS: &str =
    "lists the kernel's other families too; netlink/tests/ctrl.rs compares those of Open vSwitch";
const SAMPLED: &str = "sFlow's sample of every other packet";
const IDENTIFIED: &str =
    "what names the fragments of an IPv6 packet is counted from a random number on";
/// The line of [`CASES`] for a case.
pub fn of(group: &str, name: &str) -> Option<&'static Case> {
    let fits = |pattern: &str| match (pattern.strip_suffix('*'), pattern.strip_prefix('*')) {
        (Some(begin), _) => name.starts_with(begin),
        (_, Some(end)) => name.ends_with(end),
        _ => name == pattern,
    };
    CASES
        .iter()
        .find(|case| case.group == group && fits(case.name))
}

/// A message in the form in which it is compared, `newer` fields taken out if `ours`; or what is missing.
/// `unseen` is treated like [`FIELDS`].
pub fn comparable(
    message: &[u8],
    unseen: &[Field],
    also: &[&[u16]],
    ours: bool,
) -> Result<Vec<u8>, String> {
    let mut bytes = message.to_vec();
    let Some(of) = transport::family_of(u16_at(message, 4)) else {
        return Ok(bytes);
    };
    if u16_at(message, 4) == ERROR {
        return Ok(bytes);
    }
    let fields = FIELDS.iter().chain(unseen);
    for field in fields.filter(|field| field.family == of) {
        match field.treat {
            Treat::Zero(from, to) => zero(&mut bytes, field.path, from, to),
            Treat::Newer if ours => {
                take_out(&mut bytes, field.path).ok_or_else(|| format!("no {:?}", field.path))?;
            }
            Treat::Newer => {}
            Treat::Any => {
                take_out(&mut bytes, field.path);
            }
        }
    }
    for path in also {
        zero(&mut bytes, path, 0, usize::MAX);
    }
    Ok(bytes)
}

fn zero(bytes: &mut [u8], path: &[u16], from: usize, to: usize) {
    let mut todo = vec![(HEADERS, bytes.len(), path)];
    while let Some((start, end, path)) = todo.pop() {
        let Some((first, rest)) = path.split_first() else {
            continue;
        };
        for place in attributes(bytes, start, end) {
            if place.kind != *first {
                continue;
            }
            let payload = place.start + 4;
            if rest.is_empty() {
                let last = payload.saturating_add(to).min(place.end);
                if let Some(range) = bytes.get_mut(payload + from..last) {
                    range.fill(0);
                }
            } else {
                todo.push((payload, place.end, rest));
            }
        }
    }
}

/// Takes a top-level attribute out and corrects `nlmsg_len`.
fn take_out(bytes: &mut Vec<u8>, path: &[u16]) -> Option<()> {
    let place = attributes(bytes, HEADERS, bytes.len())
        .into_iter()
        .find(|place| path == [place.kind])?;
    let end = place.end.next_multiple_of(4).min(bytes.len());
    let len = u32_at(bytes, 0).checked_sub((end - place.start) as u32)?;
    bytes.drain(place.start..end);
    bytes.get_mut(..4)?.copy_from_slice(&len.to_ne_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_is_hidden() {
        let mut message = vec![0; HEADERS];
        message[4..6].copy_from_slice(&transport::family_id(family::FLOW as u16).to_ne_bytes());
        message.extend_from_slice(&[12, 0, 5, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        message.extend_from_slice(&[8, 0, 4, 0, 9, 9, 9, 9]);
        let seen = comparable(&message, &[], &[], true).unwrap();
        assert_eq!(&seen[HEADERS + 4..HEADERS + 12], &[0; 8]);
        assert_eq!(&seen[HEADERS + 12..], &message[HEADERS + 12..]);
    }

    #[test]
    fn a_newer_field_must_be_there() {
        let mut message = vec![0; HEADERS];
        message[0] = 40;
        message[4..6].copy_from_slice(&transport::family_id(family::VPORT as u16).to_ne_bytes());
        assert!(comparable(&message, &[], &[], true).is_err());
        message.extend_from_slice(&[8, 0, 10, 0, 0, 0, 0, 0]);
        message.extend_from_slice(&[8, 0, 5, 0, 7, 0, 0, 0]);
        let seen = comparable(&message, &[], &[], true).unwrap();
        assert_eq!(seen.len(), HEADERS + 8);
        assert_eq!(seen[0], 32);
    }

    #[test]
    fn every_line_has_a_reason() {
        assert!(CASES.iter().all(|case| !case.reason.is_empty()));
        let fields = || FIELDS.iter().chain(TRAFFIC);
        assert!(fields().all(|field| !field.reason.is_empty()));
    }
}
