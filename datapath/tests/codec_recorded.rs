//! The kernel module's answers, replayed against the codecs alone: which flows it takes, with which
//! errno it refuses the others, and the bytes in which it gives key, mask and actions back.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use datapath::codec::flow::{Ufid, UfidFlags, parse_ufid};
use datapath::codec::{Limits, action, key};
use flow::action::ActionList;
use flow::key::Key;
use netlink::Errno;
use netlink::attr::{Table, Writer};
use tests::corpus::{self, Case};
use zerocopy::IntoBytes;

/// `enum ovs_flow_attr`.
mod attr {
    pub const KEY: u16 = 1;
    pub const ACTIONS: u16 = 2;
    pub const MASK: u16 = 7;
    pub const UFID: u16 = 9;
    pub const UFID_FLAGS: u16 = 10;
}

const NEW: u64 = 1;
const SET: u64 = 4;
const LIMITS: Limits = Limits { conntrack: true };

struct Parsed {
    key: Key,
    mask: Key,
    actions: Option<ActionList>,
    ufid: Option<Ufid>,
    flags: UfidFlags,
}

impl Parsed {
    fn masked(&self) -> Key {
        let mut masked = self.key;
        let mask = self.mask.as_bytes();
        masked
            .as_mut_bytes()
            .iter_mut()
            .zip(mask)
            .for_each(|(byte, mask)| *byte &= mask);
        masked
    }
}

fn parse(request: &[u8]) -> Result<Parsed, Errno> {
    let attrs = Table::<12>::new(request);
    let ufid = parse_ufid(attrs.get(attr::UFID))?;
    let flags = UfidFlags::parse(attrs.get(attr::UFID_FLAGS))?;
    let mask = attrs.get(attr::MASK).map(|mask| mask.payload);
    let (key, mask) = key::parse_match(attrs.require(attr::KEY)?.payload, mask, LIMITS)?;
    let actions = attrs
        .get(attr::ACTIONS)
        .map(|actions| action::parse(actions.payload, &key, &mask, LIMITS))
        .transpose()?;
    Ok(Parsed {
        key,
        mask,
        actions,
        ufid,
        flags,
    })
}

fn written(write: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut Writer::new(&mut bytes)).unwrap();
    bytes
}

/// Compares what we would give back with what the module gave back.
fn compare(case: &Case, parsed: &Parsed, reply: &[u8], failures: &mut Vec<String>) {
    let reply = Table::<12>::new(reply);
    let mut check = |what: &str, kind: u16, omitted: bool, ours: Vec<u8>| {
        let theirs = reply.get(kind).map(|attr| attr.payload.to_vec());
        let ours = (!omitted).then_some(ours);
        if ours != theirs {
            failures.push(format!(
                "{}: {what}\n  ours {ours:02x?}\n  real {theirs:02x?}",
                case.name()
            ));
        }
    };
    let (masked, named) = (parsed.masked(), parsed.ufid.is_some());
    let key = if named { &masked } else { &parsed.key };
    let flags = parsed.flags;
    check(
        "key",
        attr::KEY,
        named && flags.omit_key(),
        written(|w| key::write_key(w, key)),
    );
    let mask = written(|w| key::write_mask(w, &masked, &parsed.mask));
    check("mask", attr::MASK, flags.omit_mask(), mask);
    if let Some(actions) = &parsed.actions {
        check(
            "actions",
            attr::ACTIONS,
            flags.omit_actions(),
            actions.wire.to_vec(),
        );
    }
    let ufid = parsed.ufid.map(|ufid| ufid.as_bytes().to_vec());
    check("ufid", attr::UFID, !named, ufid.unwrap_or_default());
}

/// Replays the requests of a group that install or change a flow. Some are left out, by name.
fn replay(group: &str, leave_out: &[&str]) -> (usize, usize) {
    let cases = corpus::read(group).unwrap();
    let mut failures = Vec::new();
    let (mut judged, mut compared) = (0, 0);
    for (index, case) in cases.iter().enumerate() {
        let installs = case.family() == "ovs_flow" && matches!(case.command(), Some(NEW | SET));
        if !installs || leave_out.contains(&case.name()) {
            continue;
        }
        judged += 1;
        let parsed = parse(&case.request_attributes());
        let ours = parsed
            .as_ref()
            .err()
            .map_or("", |errno| errno.name().unwrap());
        // The table is asked only for flows that are valid.
        let theirs = match case.errno().unwrap() {
            "ENODEV" | "EEXIST" | "ENOENT" => "",
            other => other,
        };
        if ours != theirs {
            failures.push(format!("{}: ours {ours:?}, real {theirs:?}", case.name()));
        }
        if let Ok(parsed) = &parsed {
            let get = cases
                .get(index + 1)
                .filter(|next| next.name() == format!("{}.get", case.name()));
            let replies = [Some(case), get];
            for reply in replies
                .into_iter()
                .flatten()
                .flat_map(Case::reply_attributes)
            {
                compared += 1;
                compare(case, parsed, &reply, &mut failures);
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {judged}:\n{}",
        failures.len(),
        failures.join("\n")
    );
    (judged, compared)
}

#[test]
fn keys_and_masks_that_the_module_was_given() {
    assert_eq!(replay("flow_keys", &[]), (370, 500));
}

#[test]
fn keys_that_the_module_refuses() {
    assert_eq!(replay("flow_key_bad", &[]), (206, 30));
}

#[test]
fn actions_that_the_module_was_given() {
    assert_eq!(replay("flow_actions", &[]), (395, 214));
}

#[test]
fn actions_that_the_module_refuses() {
    // `drop`, which the module knows since Linux 6.7.
    assert_eq!(replay("flow_action_bad", &["unk-24@tcp4"]), (59, 6));
}

#[test]
fn flows_by_key_and_by_ufid() {
    let the_tables = [
        "new-key-only",      // refused for the lack of actions, which only NEW asks for
        "set-mask-mismatch", // answered with the mask in the table
        "u-set-clear",       // has no key, which is enough for SET without actions
        "u-set-key-clear",   // answered with the key and mask in the table
    ];
    assert_eq!(replay("flow_basic", &the_tables), (64, 26));
}

/// Keys of upcalls, from frames of every kind: the same bytes again.
#[test]
fn keys_of_misses() {
    let mut keys = 0;
    for group in ["sem_extract", "sem_l2", "sem_misc", "sem_rewrite"] {
        for case in corpus::read(group).unwrap() {
            let sent = case.bytes("miss_key_hex");
            if sent.is_empty() {
                continue;
            }
            keys += 1;
            let key = key::parse_key(&sent, LIMITS);
            if sent.ends_with(&[4, 0, 21, 0]) {
                // A label stack cut off or without an end: no labels in it, and such a key isn't
                // taken back.
                assert_eq!(key, Err(Errno::EINVAL));
                continue;
            }
            let key = key.unwrap_or_else(|errno| panic!("{}: {errno:?}", case.name()));
            assert_eq!(
                written(|w| key::write_key(w, &key)),
                sent,
                "{}",
                case.name()
            );
        }
    }
    assert_eq!(keys, 378);
}
