//! What the kernel module's conntrack did with packets (`sem_ct`), replayed against the tracker: the key
//! that each upcall showed, the frames that left, the connections that were left behind.
//!
//! The flows are those of the recording, looked up from the first to the last; actions are carried out
//! here, as far as the recording has them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};

use datapath::codec::{Limits, action, key};
use datapath::conntrack::action::Passage;
use datapath::conntrack::connection::{Connection, Protocol, status};
use datapath::conntrack::tuple::{Family, Tuple, proto};
use datapath::conntrack::{Config, Tracker, action as ct};
use datapath::packet::Packet;
use datapath::refragment;
use flow::action::{Action, ActionList, SetField};
use flow::extract::{Metadata, extract};
use flow::key::Key;
use flow::rewrite;
use frame::{Frame, Pool};
use netlink::attr::{Table, Writer};
use serde_json::Value;
use tests::corpus::{self, Case, unhex};
use zerocopy::IntoBytes;

const LIMITS: Limits = Limits { conntrack: true };
const SECOND: u64 = 1_000_000_000;

/// Ports, addresses or identifiers there are chosen at random.
const RANDOM: [&str; 2] = ["ct-snat-addr-range-persist", "ct-snat4-range-exhaust"];

struct Flow {
    key: Key,
    mask: Key,
    actions: ActionList,
}

fn flows(case: &Case) -> Vec<Flow> {
    let all = case.json()["flows"].as_array().unwrap();
    all.iter()
        .map(|flow| {
            let bytes = |field: &str| unhex(flow[field].as_str().unwrap());
            let (k, m, a) = (bytes("key_hex"), bytes("mask_hex"), bytes("actions_hex"));
            let (key, mask) = key::parse_match(&k, Some(&m), LIMITS).unwrap();
            let actions = action::parse(&a, &key, &mask, LIMITS).unwrap();
            Flow { key, mask, actions }
        })
        .collect()
}

fn matches(flow: &Flow, key: &Key) -> bool {
    let bytes = key.as_bytes().iter().zip(flow.key.as_bytes());
    bytes
        .zip(flow.mask.as_bytes())
        .all(|((a, b), mask)| (a ^ b) & mask == 0)
}

#[derive(Default)]
struct Came {
    out: Vec<(u64, Vec<u8>)>,
    /// Key, MRU, packet.
    upcalls: Vec<(Vec<u8>, u16, Vec<u8>)>,
}

fn whole(frame: &Frame) -> Vec<u8> {
    let mut frame = frame.clone();
    frame.push_tag_inband().unwrap();
    frame.bytes().to_vec()
}

struct Switch {
    tracker: Tracker,
    flows: Vec<Flow>,
    now: AtomicU64,
}

impl Switch {
    fn upcall(&self, packet: &Packet, came: &mut Came) {
        let mut bytes = Vec::new();
        key::write_key(&mut Writer::new(&mut bytes), &packet.key).unwrap();
        came.upcalls.push((bytes, packet.mru, whole(&packet.frame)));
    }

    fn process(&self, mut packet: Packet, came: &mut Came) {
        let Some(flow) = self.flows.iter().find(|flow| matches(flow, &packet.key)) else {
            self.upcall(&packet, came);
            return;
        };
        let now = self.now.load(Ordering::Relaxed);
        for action in &flow.actions.program {
            match action {
                Action::Ct(what) => {
                    if self.tracker.execute(&mut packet, what, now) != Ok(Passage::On) {
                        return;
                    }
                }
                Action::CtClear => ct::clear(&mut packet),
                Action::Userspace(_) => self.upcall(&packet, came),
                Action::Output(port) => {
                    let port = u64::from(*port);
                    if refragment::is_due(&packet, 9014).unwrap() {
                        // What names the pieces of an IPv6 packet is chosen freely: as in the recording.
                        let each = |piece: Frame| came.out.push((port, whole(&piece)));
                        let pool = &mut Pool::default();
                        refragment::refragment(&packet, 0xc29a_300b, pool, each).unwrap();
                    } else {
                        came.out.push((port, whole(&packet.frame)));
                    }
                }
                Action::PushVlan { tpid, tci } => {
                    let Packet {
                        frame, key, layers, ..
                    } = &mut packet;
                    rewrite::push_vlan(frame, key, layers, *tpid, *tci).unwrap();
                }
                Action::Set(field) if matches!(**field, SetField::Unsettable) => return,
                Action::Recirc(id) => {
                    packet.key.recirc_id = *id;
                    self.process(packet, came);
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn step(&self, port: u64, bytes: &[u8]) -> Came {
        let mut packet = Packet::default();
        packet.renew(Frame::from_bytes(bytes), port as u32);
        let meta = Metadata {
            in_port: port as u32,
            ..Metadata::default()
        };
        packet.layers = extract(&mut packet.frame, &meta, &mut packet.key).unwrap();
        let mut came = Came::default();
        self.process(packet, &mut came);
        came
    }
}

/// As `conntrack -L -o extended` shows it, without the lifetime; and that, in seconds.
fn shown(connection: &Connection, now: u64) -> (String, u64) {
    let state = connection.lock();
    let address = |family, bytes: [u8; 16]| match family {
        Family::V4 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).to_string(),
        Family::V6 => Ipv6Addr::from(bytes).to_string(),
    };
    let tuple = |tuple: &Tuple| {
        let (src, dst) = (
            address(tuple.family, tuple.src),
            address(tuple.family, tuple.dst),
        );
        let ports = match tuple.proto {
            proto::ICMP | proto::ICMPV6 => {
                let (kind, code) = (tuple.dst_port >> 8, tuple.dst_port & 0xff);
                format!("type={kind} code={code} id={}", tuple.src_port)
            }
            proto::GRE => "srckey=0x0 dstkey=0x0".to_owned(),
            _ => format!("sport={} dport={}", tuple.src_port, tuple.dst_port),
        };
        format!("src={src} dst={dst} {ports}")
    };
    let original = &connection.original;
    let family = match original.family {
        Family::V4 => "ipv4 2",
        Family::V6 => "ipv6 10",
    };
    let name = match original.proto {
        proto::TCP => "tcp 6",
        proto::UDP => "udp 17",
        proto::SCTP => "sctp 132",
        proto::ICMP => "icmp 1",
        proto::GRE => "gre 47",
        other => panic!("{other}"),
    };
    let mut words = vec![family.to_owned(), name.to_owned()];
    match &state.protocol {
        Protocol::Tcp(tcp) => words.push(tcp.state.name().to_owned()),
        Protocol::Sctp(sctp) => words.push(sctp.state.name().to_owned()),
        _ => {}
    }
    words.push(tuple(original));
    if !connection.is(status::SEEN_REPLY) {
        words.push("[UNREPLIED]".to_owned());
    }
    words.push(tuple(&state.reply));
    if connection.is(status::ASSURED) {
        words.push("[ASSURED]".to_owned());
    }
    words.push(format!("mark={}", state.mark));
    words.push(format!("zone={}", original.zone));
    if let Some(helper) = &state.helper {
        words.push(format!("helper={}", helper.helper.name()));
    }
    (words.join(" "), (connection.deadline() - now) / SECOND)
}

/// A recorded line, split in the same way.
fn told(line: &str) -> (String, u64) {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let lifetime = words.remove(4).parse().unwrap();
    words.retain(|word| !word.starts_with("use="));
    (words.join(" "), lifetime)
}

fn upcalls(step: &Value) -> Vec<(Vec<u8>, u16, Vec<u8>)> {
    let all = step["upcalls"].as_array().unwrap();
    all.iter()
        .map(|message| {
            let message = unhex(message.as_str().unwrap());
            let attrs = Table::<13>::new(corpus::attributes(&message));
            let key = attrs.get(2).unwrap().payload.to_vec();
            let mru = attrs.get(9).map_or(0, |mru| mru.u16().unwrap());
            (key, mru, attrs.get(1).unwrap().payload.to_vec())
        })
        .collect()
}

fn replay(case: &Case, failures: &mut Vec<String>) {
    let name = case.name();
    let switch = Switch {
        tracker: Tracker::new(Config::new(7), 0),
        flows: flows(case),
        now: AtomicU64::new(10 * SECOND),
    };
    if name == "ct-limit" {
        switch.tracker.limits.set(9, 2);
    }
    let mut fail = |what: String| failures.push(format!("{name}: {what}"));
    for (number, step) in case.json()["steps"].as_array().unwrap().iter().enumerate() {
        let bytes = unhex(step["packet_in_hex"].as_str().unwrap());
        let came = switch.step(step["in_port"].as_u64().unwrap(), &bytes);
        let out: Vec<(u64, Vec<u8>)> = step["out"]
            .as_array()
            .unwrap()
            .iter()
            .map(|out| {
                let frame = unhex(out["hex"].as_str().unwrap());
                (out["port"].as_u64().unwrap(), frame)
            })
            .collect();
        if came.out.len() != out.len() || came.out != out && !RANDOM.contains(&name) {
            fail(format!(
                "step {number} out\n ours {:02x?}\n theirs {out:02x?}",
                came.out
            ));
        }
        let theirs = upcalls(step);
        if came.upcalls.len() != theirs.len() {
            fail(format!(
                "step {number}: {} upcalls, not {}",
                came.upcalls.len(),
                theirs.len()
            ));
        }
        for (ours, theirs) in came.upcalls.iter().zip(&theirs) {
            if ours != theirs && !RANDOM.contains(&name) {
                fail(format!(
                    "step {number} upcall\n ours   {ours:02x?}\n theirs {theirs:02x?}"
                ));
            }
        }
    }
    let now = switch.now.load(Ordering::Relaxed);
    let mut ours = Vec::new();
    switch.tracker.for_each(now, |connection| {
        ours.push(shown(connection, now));
        true
    });
    let lines = case.json()["conntrack"].as_array();
    let theirs: Vec<_> = lines
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(told)
        .collect();
    if RANDOM.contains(&name) {
        assert_eq!(ours.len(), theirs.len(), "{name}");
        return;
    }
    let texts = |all: &[(String, u64)]| {
        all.iter()
            .map(|(text, _)| text.clone())
            .collect::<BTreeSet<_>>()
    };
    if texts(&ours) != texts(&theirs) {
        fail(format!("connections\n ours   {ours:?}\n theirs {theirs:?}"));
        return;
    }
    for (text, lifetime) in &ours {
        let (_, told) = theirs.iter().find(|(line, _)| line == text).unwrap();
        // The recording looked a moment later.
        if !(*told..=told + 1).contains(lifetime) {
            fail(format!("{text} lives {lifetime} s, not {told}"));
        }
    }
}

#[test]
fn packets_meet_the_connections_that_they_met_in_the_module() {
    let mut failures = Vec::new();
    let mut cases = 0;
    for case in corpus::read("sem_ct").unwrap() {
        let has_flows = case.json().get("flows").is_some();
        if !has_flows {
            continue;
        }
        replay(&case, &mut failures);
        cases += 1;
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(cases >= 50, "{cases}");
}
