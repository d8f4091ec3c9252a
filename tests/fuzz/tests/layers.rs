//! Random headers around packets, through random lists of what pushes and pops them, beside the twin
//! [`fuzz::layers`]: what comes out of each port and what user space gets to see is the same, byte for byte.
//!
//! Packets: none to three labels, NSH of both types around frames and around IP, a tag; whatever IP holds.
//! Actions: push, pop and add labels, push and pop Ethernet and NSH, tags, set and set_masked of Ethernet, the
//! label and IP, meters, upcalls, trunc, check_pkt_len, dec_ttl, clone, sample, recirculation.
//!
//! What it can't see: what `differential.rs` is about (offloads, fragments, three tags); packets that an action
//! takes for what they aren't, and lists beyond the limits of depth, which are counted and left out.
#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::Arc;

use datapath::codec;
use datapath::datapath::Datapath;
use datapath::drop_reason::DropReason;
use datapath::executor::Executor;
use flow::extract::{self, Metadata};
use flow::key::Key;
use frame::{Frame, VlanTag};
use fuzz::actions::{self, Wish, field, kind, put};
use fuzz::campaign::Campaign;
use fuzz::device::PLAIN;
use fuzz::layers::{BRIDGED, Class, Event, Layer, Layers, MPLS, MPLS_MC, NSH, State};
use fuzz::packet::{self, ethertype, find, find_l4, is_tag};
use fuzz::reader::connect;
use fuzz::wire::{self, attributes};
use fuzz::world::World;
use netlink::attr::Writer;
use netlink::{Config, Family, Server};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rustix::fd::OwnedFd;
use rustix::net::{RecvFlags, recv};

const IN_PORT: u32 = 1;
const PORTS: [u32; 4] = [0, 1, 2, 3];
const CLASSES: [(bool, u16); 9] = [
    (true, ethertype::IPV4),
    (true, ethertype::IPV6),
    (true, ethertype::ARP),
    (true, MPLS),
    (true, NSH),
    (false, ethertype::IPV4),
    (false, ethertype::IPV6),
    (false, MPLS),
    (false, NSH),
];
/// A packet here costs as much as several of the other fuzzers': lists that are refused, meters, a socket. The
/// campaign's number is about the time that it takes.
const COST: u64 = 4;
/// Recirculation ids with flows: a packet met by one goes on to a higher one only.
const RECIRC_IDS: u32 = 2;

#[test]
fn headers_come_and_go_as_in_the_twin() {
    let (mut astray, mut refused, mut all) = (0, 0, 0);
    let campaign = Campaign {
        test: "layers",
        per_episode: 1000,
    };
    campaign.run(|random, count| {
        let (mut bed, dir) = Bed::new(random);
        for _ in 0..count {
            bed.case(random);
        }
        astray += bed.astray;
        refused += bed.refused;
        all += count;
        bed.end();
        let _ = std::fs::remove_dir_all(dir);
        count * COST
    });
    println!("{all} packets, {astray} astray; {refused} lists refused");
    assert!(astray * 5 < all, "too many left out");
    assert!(refused < all * 4, "too many lists refused");
}

struct Bed {
    world: World,
    dp: i32,
    executor: Executor,
    flows: BTreeMap<Class, Vec<u8>>,
    socket: OwnedFd,
    pid: u32,
    running: netlink::Running,
    astray: u64,
    refused: u64,
}

/// What a list may hold, as it grows.
struct Growing<'r> {
    random: &'r mut SmallRng,
    pid: u32,
    /// Recirculation ids to go to.
    recirc: Vec<u32>,
    depth: u32,
    /// Not where lists may be put off, since then they would ask the meters in another order.
    metered: bool,
}

impl Growing<'_> {
    fn list(&mut self, state: &State, known: bool) -> Vec<u8> {
        let (mut state, mut known) = (state.clone(), known);
        let mut bytes = Vec::new();
        for _ in 0..self.random.random_range(1..=6) {
            let begin = bytes.len();
            self.action(&mut bytes, &state, &mut known);
            let nothing = BTreeMap::new();
            let mut twin = Layers {
                ports: &[],
                flows: &nothing,
                meters: BTreeMap::new(),
                events: Vec::new(),
                astray: false,
            };
            twin.run(&mut state, &bytes[begin..]);
        }
        self.output(&mut bytes);
        bytes
    }

    fn output(&mut self, bytes: &mut Vec<u8>) {
        let port: u32 = self.random.random_range(0..5);
        put(bytes, kind::OUTPUT, &port.to_ne_bytes());
    }

    fn nested(&mut self, state: &State, known: bool) -> Vec<u8> {
        self.depth -= 1;
        let list = match self.random.random_range(0..5) {
            0 => Vec::new(),
            _ => self.list(state, known),
        };
        self.depth += 1;
        list
    }

    fn action(&mut self, bytes: &mut Vec<u8>, state: &State, known: &mut bool) {
        let frame = matches!(state.front.first(), Some(Layer::Ether(_)));
        let tagged = matches!(state.front.get(1), Some(Layer::Tag(..))) && frame;
        let behind = state.front.get(usize::from(frame) + usize::from(tagged));
        let labelled = matches!(behind, Some(Layer::Label(..)));
        let nsh = matches!(state.front.first(), Some(Layer::Nsh(_)));
        match self.random.random_range(0..24) {
            0 | 1 => self.output(bytes),
            2 | 3 => {
                let mut payload = Vec::new();
                let mut writer = Writer::new(&mut payload);
                writer.u32(1, self.pid);
                let data: [u8; 6] = self.random.random();
                writer.bytes(2, &data).expect("short");
                put(bytes, kind::USERSPACE, &payload);
            }
            4 => {
                let limit: u32 = self.random.random_range(14..160);
                put(bytes, kind::TRUNC, &limit.to_ne_bytes());
            }
            5 if frame => {
                let tci = 0x1000 | self.random.random::<u16>() & 0xefff;
                put(
                    bytes,
                    kind::PUSH_VLAN,
                    &[[0x81, 0], tci.to_be_bytes()].concat(),
                );
            }
            5 | 6 if tagged => put(bytes, kind::POP_VLAN, &[]),
            7 | 8 if !tagged => {
                put(
                    bytes,
                    kind::PUSH_MPLS,
                    &[&self.label()[..], &[0, 0]].concat(),
                );
                *known = false;
            }
            9 if !tagged => {
                let behind: u16 = self.random.random_range(0..2);
                let flags = [behind.to_ne_bytes(), [0, 0]].concat();
                put(bytes, kind::ADD_MPLS, &[self.label(), flags].concat());
                *known = false;
            }
            10..=12 if labelled => {
                // What is really there, seldom something else.
                let below = state
                    .front
                    .get(usize::from(frame) + usize::from(tagged) + 1);
                let told = match below {
                    _ if self.random.random_ratio(1, 30) => ethertype::ARP,
                    None => state.kind,
                    Some(Layer::Label(..)) => MPLS,
                    Some(Layer::Ether(_)) => BRIDGED,
                    Some(Layer::Nsh(_)) => NSH,
                    Some(Layer::Tag(..)) => ethertype::VLAN,
                };
                put(bytes, kind::POP_MPLS, &told.to_be_bytes());
                *known = false;
            }
            13 if !frame => {
                let addresses: [u8; 12] = self.random.random();
                put(bytes, kind::PUSH_ETH, &addresses);
                *known = false;
            }
            13 if !tagged => {
                put(bytes, kind::POP_ETH, &[]);
                *known = false;
            }
            14 if !tagged => {
                let header = nsh_action(self.random);
                put(bytes, kind::PUSH_NSH, &header);
                *known = false;
            }
            15 | 16 if nsh => {
                put(bytes, kind::POP_NSH, &[]);
                *known = false;
            }
            17..=19 => {
                let mut fields = Vec::new();
                if *known && frame {
                    fields.push(field::ETHERNET);
                }
                match state.kind {
                    _ if labelled => fields.push(field::MPLS),
                    _ if !*known || state.front.len() > 2 => {}
                    ethertype::IPV4 => fields.push(field::IPV4),
                    ethertype::IPV6 => fields.push(field::IPV6),
                    _ => {}
                }
                let proto = match state.kind {
                    ethertype::IPV4 => state.payload[9],
                    _ => state.payload[6],
                };
                let wish = Wish {
                    fields,
                    proto,
                    frag: 0,
                    ..Wish::default()
                };
                if !wish.fields.is_empty() {
                    actions::set(bytes, self.random, &wish);
                }
            }
            20 if self.depth > 0 => {
                let list = self.nested(state, *known);
                put(bytes, kind::CLONE, &list);
            }
            21 if self.depth > 0 => {
                let mut payload = Vec::new();
                let mut writer = Writer::new(&mut payload);
                if self.random.random() {
                    writer.u32(1, if self.random.random() { 0 } else { u32::MAX });
                    writer.bytes(2, &self.nested(state, *known)).expect("short");
                    put(bytes, kind::SAMPLE, &payload);
                } else {
                    writer.u16(1, self.random.random_range(20..200));
                    writer.bytes(2, &self.nested(state, *known)).expect("short");
                    writer.bytes(3, &self.nested(state, *known)).expect("short");
                    put(bytes, kind::CHECK_PKT_LEN, &payload);
                }
            }
            22 if self.metered && self.random.random() => {
                let meter: u32 = self.random.random_range(1..4);
                put(bytes, kind::METER, &meter.to_ne_bytes());
            }
            22 if self.depth > 0 => {
                let mut payload = Vec::new();
                let list = self.nested(state, *known);
                Writer::new(&mut payload).bytes(1, &list).expect("short");
                put(bytes, kind::DEC_TTL, &payload);
            }
            _ => {
                if let Some(id) = self.recirc.choose(self.random) {
                    put(bytes, kind::RECIRC, &id.to_ne_bytes());
                }
            }
        }
    }

    fn label(&mut self) -> Vec<u8> {
        let mut payload = self.random.random::<[u8; 4]>().to_vec();
        let announced = if self.random.random_ratio(1, 5) {
            MPLS_MC
        } else {
            MPLS
        };
        payload.extend(announced.to_be_bytes());
        payload
    }
}

/// The payload of a push_nsh.
fn nsh_action(random: &mut SmallRng) -> Vec<u8> {
    let md_type: u8 = random.random_range(1..3);
    let mut base = vec![
        random.random_range(0..4),
        random.random_range(0..64),
        md_type,
        3,
    ];
    base.extend(random.random::<[u8; 4]>());
    let mut nsh = Vec::new();
    let mut writer = Writer::new(&mut nsh);
    writer.bytes(1, &base).expect("short");
    let metadata: Vec<u8> = match md_type {
        1 => (0..16).map(|_| random.random()).collect(),
        _ => (0..random.random_range(1..=8) * 4)
            .map(|_| random.random())
            .collect(),
    };
    writer
        .bytes(1 + u16::from(md_type), &metadata)
        .expect("short");
    let mut outer = Vec::new();
    Writer::new(&mut outer).bytes(28, &nsh).expect("short");
    outer
}

/// A packet of IP or ARP, what it is, and its Ethernet addresses; whole, and with a right length.
fn inner(random: &mut SmallRng) -> (u16, Vec<u8>, [u8; 12]) {
    loop {
        let packet = packet::random(random, true);
        let found = find(&packet.bytes);
        if found.tags != 0 || found.ethertype == ethertype::LOCAL {
            continue;
        }
        // Headers behind IPv6's extensions aren't what this is about.
        let l4 = find_l4(&packet.bytes, found.l3, found.ethertype);
        if found.ethertype == ethertype::IPV6 && l4.is_none_or(|l4| l4.at != found.l3 + 40) {
            continue;
        }
        let addresses = packet.bytes[..12].try_into().expect("twelve");
        return (found.ethertype, packet.bytes[14..].to_vec(), addresses);
    }
}

/// A packet as one comes in: always a frame.
fn incoming(random: &mut SmallRng) -> State {
    let (kind, payload, addresses) = inner(random);
    let mut front = vec![Layer::Ether(addresses)];
    match random.random_range(0..8) {
        0 => front.push(Layer::Tag(ethertype::VLAN, random.random::<u16>() & 0xefff)),
        1..=3 => labels(random, &mut front),
        4 | 5 => {
            let md = nsh_action(random);
            let mut header = fuzz::layers::nsh_header(&md);
            // What comes next.
            header[3] = match (kind, random.random_range(0..2)) {
                (ethertype::IPV4, 0) => 1,
                (ethertype::IPV6, 0) => 2,
                _ => 3,
            };
            let frame = header[3] == 3;
            front.push(Layer::Nsh(header));
            if frame {
                front.push(Layer::Ether(random.random()));
            }
        }
        _ => {}
    }
    State::new(front, kind, payload)
}

fn labels(random: &mut SmallRng, front: &mut Vec<Layer>) {
    let count = random.random_range(1..=3);
    for index in 0..count {
        let mut entry: [u8; 4] = random.random();
        // Bottom of the stack.
        entry[2] = entry[2] & 0xfe | u8::from(index + 1 == count);
        front.push(Layer::Label(MPLS, entry));
    }
}

impl Bed {
    fn new(random: &mut SmallRng) -> (Self, std::path::PathBuf) {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("dpd-layers-{}-{number}", std::process::id()));
        let mut config = Config::new(&dir);
        config.threads = 1;
        let server = Server::bind(config).expect("a server");
        let mut world = World::with_hub(random.random(), server.hub());
        let handler = datapath::families::Server::new(Arc::clone(&world.daemon));
        let running = server.serve(Arc::new(handler)).expect("threads");
        let netns = std::path::Path::new("/proc/thread-self/ns/net");
        let (socket, pid) = connect(&dir, netns).expect("a reader");
        world.devices.set_capabilities("", PLAIN);
        world.devices.keep();
        let dp = world.add_datapath("dpa");
        for number in 1..=3 {
            world.add_port(dp, number, &format!("p{number}"));
        }
        let executor = world.daemon.new_executor().expect("one of few");
        let mut bed = Self {
            world,
            dp,
            executor,
            flows: BTreeMap::new(),
            socket,
            pid,
            running,
            astray: 0,
            refused: 0,
        };
        for id in 1..=RECIRC_IDS {
            for (frame, what) in CLASSES {
                bed.recirculated(random, (id, frame, what));
            }
        }
        (bed, dir)
    }

    fn end(self) {
        drop(self.socket);
        self.running.stop();
    }

    /// A flow for recirculated packets of a class, with a list that the daemon takes.
    fn recirculated(&mut self, random: &mut SmallRng, class: Class) {
        let (id, frame, what) = class;
        for _ in 0..200 {
            let (kind, payload, addresses) = inner(random);
            let mut front = Vec::new();
            if frame {
                front.push(Layer::Ether(addresses));
            }
            match what {
                MPLS => labels(random, &mut front),
                NSH => front.push(Layer::Nsh(fuzz::layers::nsh_header(&nsh_action(random)))),
                _ if what != kind => continue,
                _ => {}
            }
            let list = Growing {
                random,
                pid: self.pid,
                recirc: (id + 1..=RECIRC_IDS + 1).collect(),
                depth: 0,
                metered: false,
            }
            .list(&State::new(front, kind, payload), true);
            if self.install(class, &list) {
                self.flows.insert(class, list);
                return;
            }
        }
        panic!("no list for {class:02x?}");
    }

    fn install(&mut self, class: Class, list: &[u8]) -> bool {
        let (id, frame, what) = class;
        let build = |writer: &mut Writer<'_>, mask: bool| {
            writer.u32(20, if mask { u32::MAX } else { id });
            if frame {
                writer.bytes(4, &[0; 12]).expect("short");
            }
            writer.be16(6, if mask { 0xffff } else { what });
            // A protocol without a header of its own in the key.
            let proto = if mask { 0 } else { 200 };
            match what {
                ethertype::IPV4 => {
                    let mut ip = [0; 12];
                    ip[8] = proto;
                    writer.bytes(7, &ip).expect("short");
                }
                ethertype::IPV6 => {
                    let mut ip = [0; 40];
                    ip[36] = proto;
                    writer.bytes(8, &ip).expect("short");
                }
                ethertype::ARP => writer.bytes(13, &[0; 24]).expect("short"),
                MPLS => writer.bytes(21, &[0; 4]).expect("short"),
                _ => {
                    let nest = writer.begin(28);
                    let md_type = u8::from(!mask);
                    writer
                        .bytes(1, &[0, 0, md_type, 0, 0, 0, 0, 0])
                        .expect("short");
                    writer.bytes(2, &[0; 16]).expect("short");
                    writer.end(nest).expect("short");
                }
            }
        };
        let (mut key, mut mask) = (Vec::new(), Vec::new());
        build(&mut Writer::new(&mut key), false);
        build(&mut Writer::new(&mut mask), true);
        let made = self
            .world
            .request(Family::Flow, 1, self.dp, 0x400, |writer| {
                writer.bytes(1, &key).expect("short");
                writer.bytes(7, &mask).expect("short");
                writer.bytes(2, list).expect("short");
            });
        if made.is_err() {
            let parsed =
                codec::key::parse_match(&key, Some(&mask), datapath::families::flow::LIMITS);
            if let Err(error) = parsed {
                panic!("{class:02x?}: {error:?}");
            }
        }
        made.is_ok()
    }

    fn case(&mut self, random: &mut SmallRng) {
        let state = incoming(random);
        let bytes = state.bytes();
        let frame = received(random, &bytes);
        let depth = random.random_range(1..=2);
        let list = (0..100).find_map(|_| {
            let list = Growing {
                random,
                pid: self.pid,
                recirc: (1..=RECIRC_IDS + 1).collect(),
                depth,
                metered: depth < 2,
            }
            .list(&state, true);
            let taken = self.install_exact(&frame, &list);
            self.refused += u64::from(!taken);
            taken.then_some(list)
        });
        let again = format!("packet {bytes:02x?}\nlist {list:02x?}");
        let list = list.unwrap_or_else(|| panic!("all refused: {again}"));

        // One that is shut soon, one that never is; the third doesn't exist.
        let meters = BTreeMap::from([(1, random.random_range(1..4)), (2, 1_000_000)]);
        if depth < 2 {
            for (id, burst) in &meters {
                self.meter(*id, *burst);
            }
        }
        let datapath = self.world.datapath("dpa").expect("there");
        let put_off = |datapath: &Datapath| {
            let totals = datapath.totals();
            totals.dropped_by(DropReason::RecursionLimit)
                + totals.dropped_by(DropReason::DeferredLimit)
        };
        let before = put_off(&datapath);
        self.world
            .receive(&mut self.executor, &datapath, IN_PORT, &mut vec![frame]);
        let sent = self.world.devices.take_sent().into_iter();
        let mut real: Vec<Event> = sent
            .map(|(name, frame)| Event::Out(number(&name), in_band(frame)))
            .collect();
        real.extend(self.upcalls());
        self.world
            .request(Family::Flow, 2, self.dp, 0, |writer| {
                writer.bytes(9, &[7; 16]).expect("short");
            })
            .expect("it was there");
        self.world.reap();

        let mut twin = Layers {
            ports: &PORTS,
            flows: &self.flows,
            meters,
            events: Vec::new(),
            astray: false,
        };
        twin.run(&mut state.clone(), &list);
        if twin.astray || put_off(&datapath) != before {
            self.astray += 1;
            return;
        }
        let mut expected = twin.events;
        real.sort();
        expected.sort();
        if real != expected {
            let differs = real.iter().zip(&expected).find(|(a, b)| a != b);
            panic!(
                "{again}\nstate {state:02x?}\nfirst difference (real, twin): {differs:02x?}\n{} and {} events\nreal {real:02x?}\ntwin {expected:02x?}\nflows {:02x?}",
                real.len(),
                expected.len(),
                self.flows
            );
        }
    }

    /// A meter of packets whose bucket is full.
    fn meter(&mut self, id: u32, burst: u32) {
        self.world
            .request(Family::Meter, 2, self.dp, 0, |writer| {
                writer.u32(1, id);
                let bands = writer.begin(4);
                let band = writer.begin(0);
                for (kind, value) in [(1, 1), (2, 1), (3, burst)] {
                    writer.u32(kind, value);
                }
                writer.end(band).expect("short");
                writer.end(bands).expect("short");
            })
            .expect("a meter");
    }

    /// The upcalls that wait: they are in the socket when the packet has been carried.
    fn upcalls(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut room = vec![0; 1 << 17];
        while let Ok((len, _)) = recv(&self.socket, &mut room[..], RecvFlags::DONTWAIT) {
            for message in wire::messages(&room[..len]) {
                let parts: BTreeMap<u16, Vec<u8>> = attributes(&message.bytes[wire::HEADERS..])
                    .into_iter()
                    .collect();
                let whole = parts.get(&10).map(|len| wire::u32_at(len, 0));
                events.push(Event::Up(
                    parts.get(&4).cloned().unwrap_or_default(),
                    parts[&1].clone(),
                    whole,
                ));
            }
        }
        events
    }

    /// A flow for exactly this packet.
    fn install_exact(&mut self, frame: &Frame, list: &[u8]) -> bool {
        let mut copy = frame.clone();
        let mut key = Key::ZERO;
        let meta = Metadata {
            in_port: IN_PORT,
            ..Metadata::default()
        };
        extract::extract(&mut copy, &meta, &mut key).expect("a good packet");
        let mut bytes = Vec::new();
        codec::key::write_key(&mut Writer::new(&mut bytes), &key).expect("a key");
        self.world
            .request(Family::Flow, 1, self.dp, 0x400, |writer| {
                writer.bytes(1, &bytes).expect("short");
                writer.bytes(2, list).expect("short");
                writer.bytes(9, &[7; 16]).expect("short");
            })
            .is_ok()
    }
}

fn number(name: &str) -> u32 {
    name.strip_prefix('p')
        .map_or(0, |number| number.parse().expect("a number"))
}

fn in_band(mut frame: Frame) -> Vec<u8> {
    frame.push_tag_inband().expect("room");
    frame.bytes().to_vec()
}

/// As a port receives it: the tag in band or out of it.
fn received(random: &mut SmallRng, bytes: &[u8]) -> Frame {
    let tpid = packet::be16(bytes, 12);
    if !is_tag(tpid) || random.random() {
        return Frame::from_bytes(bytes);
    }
    let mut frame = Frame::from_bytes(&[&bytes[..12], &bytes[16..]].concat());
    frame.vlan = Some(VlanTag {
        tpid,
        tci: packet::be16(bytes, 14),
    });
    frame
}
