//! Requests of every family, real ones edited at random, against the whole daemon.
//!
//! What must hold:
//! - nothing panics, and no request gets EIO, which a caught panic would earn;
//! - each message of a datagram that asks for an acknowledgement gets exactly one, a failed one too;
//!   no other gets any;
//! - every reply is well-formed down to the nested attributes, and a flow that is told and can be
//!   installed so has the same actions then;
//! - what the daemon holds is what a model holds that saw only what succeeded: so a refused request
//!   changes nothing. Looked at after every few messages; after each one in an episode run alone;
//! - when all is deleted nothing is left in the epoch.
//!
//! What it can't see: what sockets, threads and devices of a system do (see `sockets.rs`); time.
#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use datapath::codec;
use datapath::families::flow::LIMITS;
use fuzz::campaign::{Campaign, number};
use fuzz::model::{Model, flow_of};
use fuzz::seeds::{self, Seed};
use fuzz::wire::{self, DONE, ERROR, Message};
use fuzz::world::World;
use fuzz::{actions, edit};
use netlink::Family;
use netlink::attr::Writer;
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const ECHO: u16 = 8;
const DUMP: u16 = 0x300;

/// Datapaths beyond this are deleted again, flows flushed.
const MANY: usize = 6;

struct Fuzzer<'s> {
    world: World,
    model: Model,
    seeds: &'s [Seed],
    lists: &'s [Vec<u8>],
    seq: u32,
    /// The model is what a dump said after this datagram.
    dumped: bool,
    /// An episode is run alone: every datagram is printed.
    talkative: bool,
    /// Since the last look.
    since: Vec<Vec<u8>>,
    /// How often what succeeded, by family and command: so that a fuzzer that only meets refusals is
    /// noticed.
    accepted: BTreeMap<(u16, u8), u64>,
}

#[test]
fn edited_requests_change_what_a_model_says() {
    let seeds = seeds::requests();
    let lists = seeds::action_lists(&seeds);
    let mut accepted: BTreeMap<(u16, u8), u64> = BTreeMap::new();
    let campaign = Campaign {
        test: "messages",
        per_episode: 2000,
    };
    campaign.run(|random, count| {
        let mut fuzzer = Fuzzer::new(&seeds, &lists, random);
        let mut tried = 0;
        while tried < count {
            tried += fuzzer.datagram(random);
            if random.random_ratio(1, 12) || fuzzer.talkative {
                fuzzer.check();
            }
            fuzzer.keep_small();
        }
        fuzzer.check();
        fuzzer.end();
        for (what, times) in fuzzer.accepted {
            *accepted.entry(what).or_default() += times;
        }
        tried
    });
    println!("accepted: {accepted:?}");
    if number("OVS_DPD_FUZZ_EPISODE").is_none() {
        for (family, command) in [
            (Family::Datapath, 1),
            (Family::Datapath, 2),
            (Family::Datapath, 4),
            (Family::Vport, 1),
            (Family::Vport, 2),
            (Family::Vport, 4),
            (Family::Flow, 1),
            (Family::Flow, 2),
            (Family::Flow, 3),
            (Family::Flow, 4),
            (Family::Packet, 3),
        ] {
            let times = accepted.get(&(family.id(), command)).copied().unwrap_or(0);
            assert!(times > 5, "{family:?} {command}: only {times} accepted");
        }
    }
}

impl<'s> Fuzzer<'s> {
    fn new(seeds: &'s [Seed], lists: &'s [Vec<u8>], random: &mut SmallRng) -> Self {
        let mut world = World::new(random.random());
        world.devices.refuse_every(7);
        let dp = world.add_datapath("dpa");
        for (number, name) in [(1, "va"), (2, "vb"), (3, "vc"), (6, "int0")] {
            world.add_port(dp, number, name);
        }
        let model = Model::dumped(&mut world);
        Self {
            world,
            model,
            seeds,
            lists,
            seq: 1000,
            dumped: false,
            talkative: number("OVS_DPD_FUZZ_EPISODE").is_some(),
            since: Vec::new(),
            accepted: BTreeMap::new(),
        }
    }

    /// Sends one datagram of one to three messages. Tells how many there were.
    fn datagram(&mut self, random: &mut SmallRng) -> u64 {
        let messages = if random.random_ratio(1, 8) {
            random.random_range(2..4)
        } else {
            1
        };
        let mut datagram = Vec::new();
        for _ in 0..messages {
            let one = self.message(random);
            datagram.extend_from_slice(&one);
            datagram.resize(datagram.len().next_multiple_of(4), 0);
        }
        if random.random_ratio(1, 40) {
            edit::bytes(&mut datagram, random);
        }
        // Names of our own, so that answers find their requests.
        let framed = wire::framed(&datagram);
        for (at, _) in &framed {
            self.seq += 1;
            datagram[at + 8..at + 12].copy_from_slice(&self.seq.to_ne_bytes());
        }
        let replies = self.world.exchange(&datagram);
        self.since.push(datagram.clone());
        let mut by_seq: BTreeMap<u32, Vec<Message>> = BTreeMap::new();
        for message in replies.iter().flat_map(|datagram| wire::messages(datagram)) {
            by_seq.entry(message.seq).or_default().push(message);
        }
        if self.talkative {
            eprintln!("{datagram:02x?}");
        }
        self.dumped = false;
        for (at, len) in &framed {
            let request = &datagram[*at..at + len];
            let seq = wire::u32_at(request, 8);
            self.judge(
                request,
                by_seq.remove(&seq).unwrap_or_default(),
                framed.len(),
            );
        }
        assert!(by_seq.is_empty(), "answers to nobody: {by_seq:?}");
        framed.len().max(1) as u64
    }

    fn message(&self, random: &mut SmallRng) -> Vec<u8> {
        let seed = self.seeds.choose(random).expect("seeds");
        let other = self.seeds.choose(random).expect("seeds");
        let mut message = seed.message.clone();
        let family = u16::from_ne_bytes([message[4], message[5]]);
        if random.random_ratio(1, 6) && family == Family::Flow.id() {
            message = self.of_lists(random);
        } else if random.random_ratio(7, 8) {
            edit::message(&mut message, &other.message, random);
        }
        if message.len() >= 24 {
            if family != 16 && random.random_ratio(31, 32) {
                let ifindexes: Vec<i32> = self.model.datapaths.keys().copied().collect();
                let ifindex = ifindexes.choose(random).copied().unwrap_or(1);
                // A port is found by its name in any datapath: mostly the header says nothing else.
                message[20..24].copy_from_slice(&ifindex.to_ne_bytes());
            }
            let mut flags = u16::from_ne_bytes([message[6], message[7]]);
            flags |= REQUEST;
            if random.random_ratio(15, 16) {
                flags |= ACK;
            }
            if random.random_ratio(15, 16) {
                flags |= ECHO;
            }
            if random.random_ratio(1, 32) {
                flags ^= 1 << random.random_range(0..16);
            }
            message[6..8].copy_from_slice(&flags.to_ne_bytes());
            if random.random_ratio(1, 64) {
                let at = [4, 16, 17, 18, 20].choose(random).copied().unwrap_or(4);
                message[at] = random.random();
            }
            if random.random_ratio(1, 64) && family != 16 {
                message[16] = random.random_range(0..6);
            }
        }
        message
    }

    /// A flow request whose key is a recorded one's and whose actions are another's, or made.
    fn of_lists(&self, random: &mut SmallRng) -> Vec<u8> {
        let flows: Vec<&Seed> = self
            .seeds
            .iter()
            .filter(|s| s.good && s.family == "ovs_flow")
            .collect();
        let base = flows.choose(random).expect("flows");
        let attributes = wire::lenient(&base.message[24..]);
        let mut message = base.message[..24].to_vec();
        let mut writer = Writer::new(&mut message);
        for (kind, payload) in &attributes {
            let list;
            let payload = if *kind == 2 {
                list = match random.random_range(0..3) {
                    0 => actions::list(random, &actions::Wish::default()),
                    1 => self.lists.choose(random).expect("lists").clone(),
                    _ => {
                        let list = self.lists.choose(random).expect("lists");
                        let other = self.lists.choose(random).expect("lists");
                        edit::attributes(list, other, random)
                    }
                };
                &list
            } else {
                payload
            };
            writer.bytes(*kind, payload).expect("short");
        }
        let len = message.len() as u32;
        message[..4].copy_from_slice(&len.to_ne_bytes());
        message
    }

    fn judge(&mut self, request: &[u8], replies: Vec<Message>, of: usize) {
        let flags = u16::from_ne_bytes([request[6], request[7]]);
        let kind = u16::from_ne_bytes([request[4], request[5]]);
        let ends: Vec<i32> = replies.iter().filter_map(Message::error).collect();
        let told = replies.iter().filter(|m| m.kind != ERROR && m.kind != DONE);
        let told: Vec<Message> = told.cloned().collect();
        let context = || format!("request {request:02x?}\nreplies {replies:02x?}");
        let dumped = replies.iter().any(|m| m.kind == DONE);
        if dumped {
            assert!(flags & DUMP == DUMP, "{}", context());
        }
        // EIO: a panic was caught; EFBIG and the like are the module's.
        assert!(
            ends.iter()
                .all(|errno| (0..200).contains(errno) && *errno != 5),
            "{}",
            context()
        );
        if flags & ACK != 0 && !dumped {
            assert_eq!(ends.len(), 1, "{}", context());
        } else if dumped {
            // A dump's end is its acknowledgement.
            assert_eq!(ends.len(), 1, "{}", context());
        } else {
            assert!(
                ends.iter().all(|errno| *errno != 0) && ends.len() <= 1,
                "{}",
                context()
            );
        }
        let failed = ends.iter().any(|errno| *errno != 0);
        let asks = flags & REQUEST != 0 && kind >= 16;
        if !asks || failed && !dumped {
            assert!(told.is_empty(), "told besides an error: {}", context());
        }
        if !self.dumped
            && ends == [17]
            && kind == Family::Datapath.id()
            && request[16] == 1
            && request[17] < 2
        {
            self.model.met_by_an_old_client(request);
        }
        if !asks || failed || request.len() < 20 {
            return;
        }
        for message in &told {
            assert_eq!(message.kind, kind, "{}", context());
            if kind != 16 {
                self.well_formed(message);
            }
        }
        if dumped || request.len() < 24 {
            return;
        }
        *self.accepted.entry((kind, request[16])).or_default() += 1;
        // What a dump said holds after the whole datagram.
        if !self.dumped && !self.model.apply(request, &told) {
            self.dumped = true;
            let now = Model::dumped(&mut self.world);
            let size = |model: &Model| {
                let of = model.datapaths.values();
                of.map(|dp| 1 + dp.ports.len() + dp.flows.len())
                    .sum::<usize>()
            };
            if of == 1 && Family::from_id(kind) == Some(Family::Flow) {
                assert!(size(&now).abs_diff(size(&self.model)) <= 1, "{}", context());
            }
            self.model = now;
        }
    }

    /// Of replies: their attributes are whole, and a flow can be installed as it is told.
    fn well_formed(&mut self, message: &Message) {
        let attributes = message.attributes();
        if Family::from_id(message.kind) != Some(Family::Flow) {
            return;
        }
        let Some((_, flow)) = flow_of(&attributes) else {
            return;
        };
        // A masked key needn't be one that can be installed, in the module neither: its type may be 0.
        let Ok((key, mask)) = codec::key::parse_match(&flow.key, Some(&flow.mask), LIMITS) else {
            return;
        };
        let Ok(actions) = codec::action::parse(&flow.actions, &key, &mask, LIMITS) else {
            return;
        };
        assert_eq!(
            &*actions.wire,
            &flow.actions[..],
            "actions told otherwise again"
        );
    }

    fn check(&mut self) {
        let dumped = Model::dumped(&mut self.world);
        if let Err(difference) = self.model.compare(&dumped) {
            panic!("{difference}\nsince the last look: {:02x?}", self.since);
        }
        self.since.clear();
        // Readers are shown by features; take them as they are.
        self.model = dumped;
    }

    /// Neither datapaths nor flows grow without end, and neither runs out.
    fn keep_small(&mut self) {
        let many: Vec<i32> = self.model.datapaths.keys().copied().skip(MANY).collect();
        for ifindex in many {
            self.world
                .request(Family::Datapath, 2, ifindex, 0, |_| {})
                .expect("deleted");
            self.model.datapaths.remove(&ifindex);
        }
        for (ifindex, datapath) in &mut self.model.datapaths {
            if datapath.flows.len() > 40 {
                self.world
                    .request(Family::Flow, 2, *ifindex, 0, |_| {})
                    .expect("flushed");
                datapath.flows.clear();
            }
            if datapath.ports.len() > 12 {
                for number in datapath.ports.keys().copied().skip(6).collect::<Vec<_>>() {
                    self.world
                        .request(Family::Vport, 2, *ifindex, 0, |writer| {
                            writer.u32(1, number)
                        })
                        .expect("deleted");
                    datapath.ports.remove(&number);
                }
            }
        }
        let has_dpa = self.model.datapaths.values().any(|dp| dp.name == b"dpa\0");
        if !has_dpa {
            let made = self.world.request(Family::Datapath, 1, 0, 0, |writer| {
                writer.name(1, "dpa").expect("short");
                writer.u32(2, 0);
            });
            if made.is_ok() {
                let ifindex = self.world.datapath("dpa").expect("made").ifindex;
                for (number, name) in [(1, "va"), (2, "vb"), (3, "vc"), (6, "int0")] {
                    // Its device may be another datapath's.
                    let _ = self.world.request(Family::Vport, 1, ifindex, 0, |writer| {
                        writer.u32(1, number);
                        writer.u32(2, if number == 6 { 2 } else { 1 });
                        writer.name(3, name).expect("short");
                        writer.u32(5, 0);
                    });
                }
                self.model = Model::dumped(&mut self.world);
            }
        }
        self.world.reap();
    }

    fn end(&mut self) {
        for ifindex in self.model.datapaths.keys() {
            self.world
                .request(Family::Datapath, 2, *ifindex, 0, |_| {})
                .expect("deleted");
        }
        assert!(self.world.daemon.datapaths().is_empty());
        assert_eq!(self.world.reap(), 0, "left in the epoch");
    }
}
