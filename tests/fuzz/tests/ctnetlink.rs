//! Requests of ctnetlink, edited at random, against a tracker that random packets fill.
//!
//! What must hold:
//! - nothing panics, and no request gets EIO, which a caught panic would earn;
//! - each message that asks for an acknowledgement gets exactly one, a dump its end; no other gets any;
//! - every reply is well-formed down to the nested attributes, and a connection that is told is found by
//!   both its tuples;
//! - zones count what is there, and when all is flushed nothing is.
//!
//! What it can't see: the connections of other threads in between.
#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use datapath::packet::Packet;
use flow::action::{Conntrack, Masked};
use flow::extract::{Metadata, extract};
use frame::Frame;
use fuzz::campaign::{Campaign, number};
use fuzz::wire::{self, DONE, ERROR, Message};
use fuzz::world::World;
use fuzz::{edit, packet};
use netlink::Protocol;
use netlink::attr::Writer;
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const FIXED: usize = 20;
/// Connections beyond this are flushed.
const MANY: usize = 300;
/// `IPCTNL_MSG_CT_NEW` and `..._GET` of their subsystem.
const NEW: u16 = 0x100;
const GET: u16 = 0x101;

struct Fuzzer {
    world: World,
    seq: u32,
    /// The last requests and what was told, to be edited.
    seeds: Vec<Vec<u8>>,
    now: u64,
    accepted: BTreeMap<u16, u64>,
}

#[test]
fn edited_requests_leave_the_tracker_whole() {
    let mut accepted: BTreeMap<u16, u64> = BTreeMap::new();
    let campaign = Campaign {
        test: "ctnetlink",
        per_episode: 1000,
    };
    campaign.run(|random, count| {
        let mut fuzzer = Fuzzer {
            world: World::new(random.random()),
            seq: 0,
            seeds: made(random),
            now: datapath::daemon::now_ns(),
            accepted: BTreeMap::new(),
        };
        for _ in 0..count {
            fuzzer.packets(random);
            fuzzer.request(random);
            fuzzer.check(random);
        }
        fuzzer.end();
        for (what, times) in fuzzer.accepted {
            *accepted.entry(what).or_default() += times;
        }
        count
    });
    println!("accepted: {accepted:x?}");
    if number("OVS_DPD_FUZZ_EPISODE").is_none() {
        for kind in [NEW, GET, 0x102, 0x103, 0x800, 0x801, 0x802, 0x803, 0x804] {
            let times = accepted.get(&kind).copied().unwrap_or(0);
            assert!(times > 5, "{kind:#x}: only {times} accepted");
        }
    }
}

/// A message, without its length and number.
fn message(kind: u16, flags: u16, af: u8, build: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | REQUEST).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([af, 1, 0, 0]);
    build(&mut Writer::new(&mut bytes));
    bytes
}

/// One of each kind; those about a connection are made of what dumps tell.
fn made(random: &mut SmallRng) -> Vec<Vec<u8>> {
    let mut all = vec![
        message(GET, DUMP, 0, |w| w.be16(18, 2)),
        message(GET, DUMP, 2, |w| {
            w.be32(8, 5);
            w.be32(21, 7);
        }),
        message(0x103, DUMP, 0, |_| {}),
        message(0x104, DUMP, 0, |_| {}),
        message(0x105, 0, 0, |_| {}),
        message(0x106, DUMP, 0, |_| {}),
        message(0x102, 0, 0, |w| w.be16(18, 3)),
        message(0x102, 0, 0, |w| {
            w.be32(8, 1);
            w.be32(3, 8);
        }),
        message(0x201, DUMP, 0, |_| {}),
        message(0x202, 0, 0, |_| {}),
        message(0x801, DUMP, 0, |_| {}),
    ];
    for (l4, attributes) in [(6, 11), (17, 2), (1, 1), (58, 1), (132, 8), (47, 2)] {
        for kind in [0x800, 0x801, 0x802, 0x803, 0x804] {
            all.push(message(kind, 0, 0, |w| {
                let which = random.random_range(0..3);
                w.name(1, &format!("tp{which}")).expect("short");
                w.be16(2, 2);
                w.u8(3, l4);
                let data = w.begin(4);
                for attribute in 1..=attributes {
                    w.be32(attribute, random.random_range(0..1000));
                }
                w.end(data).expect("short");
            }));
        }
    }
    all
}

impl Fuzzer {
    /// Shows the tracker a packet or two.
    fn packets(&mut self, random: &mut SmallRng) {
        let tracker = &self.world.daemon.conntrack;
        for _ in 0..random.random_range(0..3) {
            let made = packet::random(random, true);
            let mut packet = Packet::default();
            packet.renew(Frame::from_bytes(&made.bytes), 1);
            let Ok(layers) = extract(&mut packet.frame, &Metadata::default(), &mut packet.key)
            else {
                continue;
            };
            packet.layers = layers;
            let what = Conntrack {
                zone: random.random_range(0..4),
                commit: true,
                mark: Some(Masked {
                    value: random.random_range(0..8),
                    mask: u32::MAX,
                }),
                timeout: Some(format!("tp{}", random.random_range(0..3)).into()),
                ..Conntrack::default()
            };
            // What it refuses isn't this fuzzer's matter.
            let _ = tracker.execute(&mut packet, &what, self.now);
        }
        if tracker.table.len() > MANY {
            tracker.remove_all(None, |_| true);
        }
    }

    fn request(&mut self, random: &mut SmallRng) {
        let mut message = self.seeds.choose(random).expect("seeds").clone();
        if random.random_ratio(3, 4) {
            let other = self.seeds.choose(random).expect("seeds");
            let edited = edit::attributes(&message[FIXED..], &other[FIXED..], random);
            message.truncate(FIXED);
            message.extend(edited);
        }
        if random.random_ratio(1, 4) {
            let kinds = [
                NEW, GET, 0x102, 0x103, 0x200, 0x800, 0x801, 0x900, 0x107, 0x203,
            ];
            let kind = kinds.choose(random).expect("kinds");
            message[4..6].copy_from_slice(&kind.to_ne_bytes());
        }
        if random.random_ratio(1, 8) {
            message[16] = [0, 2, 10, 7, 255].choose(random).copied().expect("some");
        }
        let mut flags = u16::from_ne_bytes([message[6], message[7]]);
        flags |= ACK;
        if random.random_ratio(1, 6) {
            flags ^= 1 << random.random_range(1..16);
        }
        message[6..8].copy_from_slice(&flags.to_ne_bytes());
        if random.random_ratio(1, 32) {
            message.truncate(random.random_range(16..=FIXED));
        } else if random.random_ratio(1, 32) {
            edit::bytes(&mut message, random);
            message.resize(message.len().max(16), 0);
        }
        self.ask(message);
    }

    /// Sends a message, and judges the answers; gives what was told.
    fn ask(&mut self, mut message: Vec<u8>) -> Vec<Message> {
        self.seq += 1;
        let len = message.len() as u32;
        message[..4].copy_from_slice(&len.to_ne_bytes());
        message[8..12].copy_from_slice(&self.seq.to_ne_bytes());
        let said = self.world.exchange_as(Protocol::Netfilter, &message);
        let said: Vec<Message> = said.iter().flat_map(|d| wire::messages(d)).collect();
        let context = || format!("request {message:02x?}\nreplies {said:02x?}");
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let flags = u16::from_ne_bytes([message[6], message[7]]);
        let ends: Vec<i32> = said.iter().filter_map(Message::error).collect();
        let dumped = said.iter().any(|m| m.kind == DONE);
        assert!(said.iter().all(|m| m.seq == self.seq), "{}", context());
        assert!(
            ends.iter()
                .all(|errno| (0..200).contains(errno) && *errno != 5),
            "{}",
            context()
        );
        if flags & ACK != 0 || dumped {
            assert_eq!(ends.len(), 1, "{}", context());
        } else {
            assert!(ends.iter().all(|errno| *errno != 0) && ends.len() <= 1);
        }
        let told: Vec<Message> = said
            .into_iter()
            .filter(|m| m.kind != ERROR && m.kind != DONE)
            .collect();
        let failed = ends.iter().any(|errno| *errno != 0);
        assert!(!failed || told.is_empty(), "told besides an error");
        if !failed && flags & REQUEST != 0 && kind >= 16 && message.len() >= FIXED {
            *self.accepted.entry(kind).or_default() += 1;
        }
        told
    }

    fn check(&mut self, random: &mut SmallRng) {
        let tracker = &self.world.daemon.conntrack;
        let counted: u32 = (0..=8).map(|zone| tracker.limits.count(zone)).sum();
        assert_eq!(counted as usize, tracker.table.len());
        if !random.random_ratio(1, 16) {
            return;
        }
        let told = self.ask(message(GET, DUMP | ACK, 0, |_| {}));
        for one in told.choose_multiple(random, 3) {
            // Down to the nested attributes, or `attributes` panics.
            let attributes = wire::attributes(&one.bytes[FIXED..]);
            let (af, zone) = (one.bytes[16], wire::last(&attributes, 18));
            for (kind, payload) in attributes.iter().filter(|(kind, _)| matches!(kind, 1 | 2)) {
                let get = message(GET, ACK, af, |w| {
                    w.bytes(*kind, payload).expect("short");
                    if let Some(zone) = zone {
                        w.bytes(18, zone).expect("short");
                    }
                });
                // It may have expired, or been told with a status that it no longer has.
                let again = self.ask(get.clone());
                assert!(again.len() <= 1);
                self.seeds.push(get);
            }
            // What was told, as a change and as a deletion.
            let mut change = one.bytes.clone();
            change[4..6].copy_from_slice(&[NEW, 0x102].choose(random).expect("two").to_ne_bytes());
            change[6..8].copy_from_slice(&REQUEST.to_ne_bytes());
            self.seeds.push(change);
        }
        let surplus = self.seeds.len().saturating_sub(120);
        self.seeds.drain(41..41 + surplus);
    }

    fn end(&mut self) {
        self.ask(message(0x102, ACK, 0, |_| {}));
        let tracker = &self.world.daemon.conntrack;
        assert!(tracker.table.is_empty());
        assert!((0..8).all(|zone| tracker.limits.count(zone) == 0));
        assert!(self.ask(message(GET, DUMP, 0, |_| {})).is_empty());
    }
}
