//! Packets, well-formed and not, with offloads that are true and that lie, through random flows and
//! action lists of the whole daemon.
//!
//! What must hold:
//! - nothing panics, nothing loops;
//! - at rest, over the datapath: `received + executed + copied = transmitted + to_user + held +
//!   dropped`, exactly;
//! - a device is given nothing that it said it can't take ([`fuzz::device`] looks at each frame): at least
//!   an Ethernet header, no longer than its MTU, no offload that it hasn't;
//! - an upcall is whole, down to its key;
//! - buffers are used again: what is kept doesn't grow.
//!
//! What it can't see: whether what comes out is right (see `differential.rs`), what drivers do.
#![allow(clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use datapath::codec;
use datapath::counters::Totals;
use datapath::datapath::Datapath;
use datapath::executor::Executor;
use flow::extract::{self, Metadata};
use flow::key::Key;
use frame::{Frame, Gso, GsoKind, PartialChecksum, VlanTag};
use fuzz::actions::{self, Wish, field};
use fuzz::campaign::Campaign;
use fuzz::device::{OFFLOADING, PLAIN};
use fuzz::reader::{Reader, connect};
use fuzz::seeds;
use fuzz::wire;
use fuzz::world::World;
use fuzz::{edit, packet};
use netlink::attr::Writer;
use netlink::{Config, Family, Server};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

const PORTS: u32 = 7;
const FLOWS: usize = 24;

#[test]
fn every_packet_ends_once_and_is_counted() {
    let packets = seeds::packets();
    let lists = seeds::action_lists(&seeds::requests());
    let mut sum = Totals::default();
    let mut upcalls = 0;
    let campaign = Campaign {
        test: "packets",
        per_episode: 5000,
    };
    campaign.run(|random, count| {
        let (totals, read) = episode(random, count, &packets, &lists);
        sum.add(&totals);
        upcalls += read;
        count
    });
    println!("upcalls read: {upcalls}\n{sum:?}");
    // A fuzzer whose packets all end in one way has seen little.
    let often = [
        sum.transmitted,
        sum.to_user,
        sum.copied,
        sum.executed,
        sum.hit,
        sum.missed,
    ];
    assert!(often.iter().all(|count| *count > 100), "{often:?}");
}

/// A directory that goes.
struct RunDir(std::path::PathBuf);

impl RunDir {
    fn new() -> Self {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("dpd-fuzz-{}-{number}", std::process::id())))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Bed<'s> {
    world: World,
    datapath: Arc<Datapath>,
    executor: Executor,
    packets: &'s [Vec<u8>],
    lists: &'s [Vec<u8>],
    pids: Vec<u32>,
}

fn episode(
    random: &mut SmallRng,
    count: u64,
    packets: &[Vec<u8>],
    lists: &[Vec<u8>],
) -> (Totals, u64) {
    let dir = RunDir::new();
    let mut config = Config::new(&dir.0);
    config.threads = 1;
    let server = Server::bind(config).expect("a server");
    let world = World::with_hub(random.random(), server.hub());
    let handler = datapath::families::Server::new(Arc::clone(&world.daemon));
    let running = server.serve(Arc::new(handler)).expect("threads");
    let netns = std::path::Path::new("/proc/thread-self/ns/net");
    let (socket, port_id) = connect(&dir.0, netns).expect("a reader");
    let reader = Reader::start(socket, port_id);
    // One that never reads.
    let (idle, idle_id) = connect(&dir.0, netns).expect("an idle one");
    let pids = vec![0, 0x7000_0000, port_id, port_id, idle_id];

    let mut bed = Bed::new(world, random, packets, lists, pids);
    let mut frames = Vec::new();
    let mut given = 0;
    while given < count {
        if random.random_ratio(1, 16) {
            bed.install(random);
        }
        if random.random_ratio(1, 12) {
            bed.execute(random);
            given += 1;
        }
        let many = random.random_range(1..=40);
        for _ in 0..many {
            frames.push(bed.frame(random));
        }
        given += many;
        let port = random.random_range(0..PORTS + 2);
        let datapath = Arc::clone(&bed.datapath);
        bed.world
            .receive(&mut bed.executor, &datapath, port, &mut frames);
        assert!(frames.is_empty());
        conserved(&datapath.totals());
        if random.random_ratio(1, 200) {
            bed.world
                .request(Family::Flow, 2, datapath.ifindex, 0, |_| {})
                .expect("flushed");
            for _ in 0..FLOWS {
                bed.install(random);
            }
        }
        bed.world.reap();
    }
    let totals = bed.datapath.totals();
    drop(idle);
    running.stop();
    (totals, reader.end())
}

fn conserved(totals: &Totals) {
    let came = totals.received + totals.executed + totals.copied;
    let went = totals.transmitted + totals.to_user + totals.held + totals.dropped_total();
    assert_eq!(came, went, "{totals:?}");
}

impl<'s> Bed<'s> {
    fn new(
        mut world: World,
        random: &mut SmallRng,
        packets: &'s [Vec<u8>],
        lists: &'s [Vec<u8>],
        pids: Vec<u32>,
    ) -> Self {
        let mut small = PLAIN;
        small.max_frame = 574;
        let mut plain = PLAIN;
        plain.max_frame = 1514;
        let mut some = OFFLOADING;
        (some.tso6, some.uso, some.ufo, some.max_gso_frame) = (false, false, false, 20_000);
        let mut sums = PLAIN;
        sums.csum = true;
        for (name, capabilities) in [("p1", plain), ("p2", some), ("p3", small), ("p4", sums)] {
            world.devices.set_capabilities(name, capabilities);
        }
        if random.random() {
            world.devices.refuse_every(random.random_range(2..50));
        }
        let dp = world.add_datapath("dpa");
        for number in 1..PORTS {
            world.add_port(dp, number, &format!("p{number}"));
        }
        for number in 0..PORTS {
            let pid = *pids.choose(random).expect("some");
            let set = world.request(Family::Vport, 4, dp, 0, |writer| {
                writer.u32(1, number);
                writer.u32(5, pid);
            });
            set.expect("a port's reader");
        }
        if random.random_ratio(1, 3) {
            let list: Vec<u8> = pids.iter().flat_map(|pid| pid.to_ne_bytes()).collect();
            let set = world.request(Family::Datapath, 4, dp, 0, |writer| {
                writer.u32(5, 8);
                writer.bytes(8, &list).expect("short");
            });
            set.expect("readers");
        }
        let executor = world.daemon.new_executor().expect("one of few");
        let datapath = world.datapath("dpa").expect("made");
        let mut bed = Self {
            world,
            datapath,
            executor,
            packets,
            lists,
            pids,
        };
        for _ in 0..FLOWS {
            bed.install(random);
        }
        bed
    }

    /// Bytes of a packet: recorded, or made; perhaps edited.
    fn bytes(&self, random: &mut SmallRng) -> Vec<u8> {
        let mut bytes = match random.random() {
            true => self.packets.choose(random).expect("packets").clone(),
            false => packet::random(random, false).bytes,
        };
        if random.random() {
            for _ in 0..random.random_range(1..6) {
                // Headers are in front.
                if random.random_ratio(3, 4) {
                    let mut head = bytes.split_off(0);
                    let rest = head.split_off(head.len().min(70));
                    edit::bytes(&mut head, random);
                    bytes = [head, rest].concat();
                } else {
                    edit::bytes(&mut bytes, random);
                }
            }
        }
        bytes
    }

    fn frame(&self, random: &mut SmallRng) -> Frame {
        if random.random_ratio(1, 12) {
            return honest_gso(random);
        }
        let mut bytes = self.bytes(random);
        if random.random_ratio(1, 50) {
            bytes.resize(random.random_range(1000..66_000), 0x5a);
        }
        let len = bytes.len();
        let mut frame = Frame::from_bytes(&bytes);
        if random.random_ratio(1, 6) {
            let tpid = if random.random() { 0x8100 } else { 0x88a8 };
            let tci = random.random();
            frame.vlan = Some(VlanTag { tpid, tci });
        }
        frame.offload.csum_valid = random.random();
        if random.random_ratio(1, 4) {
            let found = (len > 14).then(|| packet::find(&pad(&bytes)));
            let start = match found {
                Some(found) if random.random() => found.l3 as u16 + 20 * random.random_range(1..3),
                _ => random.random_range(0..(len + 20).min(65_535) as u16),
            };
            let offset = match random.random_range(0..4) {
                0 => 16,
                1 => 6,
                2 => 8,
                _ => random.random_range(0..1000),
            };
            frame.offload.csum = Some(PartialChecksum { start, offset });
        }
        if random.random_ratio(1, 6) {
            frame.offload.gso = Some(lying_gso(random, len));
        }
        frame
    }

    /// A flow for a packet like those that come: some of its key's attributes wildcarded, perhaps for a
    /// recirculated one.
    fn install(&mut self, random: &mut SmallRng) {
        let bytes = self.bytes(random);
        let mut frame = Frame::from_bytes(&bytes);
        let mut key = Key::ZERO;
        let meta = Metadata {
            in_port: random.random_range(0..PORTS),
            recirc_id: random.random_range(0..12_u32).saturating_sub(6),
            ..Metadata::default()
        };
        if extract::extract(&mut frame, &meta, &mut key).is_err() {
            return;
        }
        let mut key_bytes = Vec::new();
        codec::key::write_key(&mut Writer::new(&mut key_bytes), &key).expect("a key");
        let attributes = wire::attributes(&key_bytes);
        let mut mask = Vec::new();
        for (kind, payload) in &attributes {
            Writer::new(&mut mask)
                .bytes(*kind, &masked(random, *kind, payload))
                .expect("short");
        }
        let list = self.list(random, &attributes);
        let ifindex = self.datapath.ifindex;
        let made = self
            .world
            .request(Family::Flow, 1, ifindex, 0x400, |writer| {
                writer.bytes(1, &key_bytes).expect("short");
                writer.bytes(7, &mask).expect("short");
                writer.bytes(2, &list).expect("short");
            });
        // What the codec refuses isn't this fuzzer's matter.
        drop(made);
    }

    fn list(&self, random: &mut SmallRng, key: &[wire::Attribute]) -> Vec<u8> {
        match random.random_range(0..8) {
            0 => self.lists.choose(random).expect("lists").clone(),
            1 => {
                let list = self.lists.choose(random).expect("lists");
                let other = self.lists.choose(random).expect("lists");
                edit::attributes(list, other, random)
            }
            _ => {
                let mut fields = vec![field::PRIORITY, field::SKB_MARK, field::ETHERNET];
                let here = |kind| wire::last(key, kind).is_some();
                for kind in [
                    field::IPV4,
                    field::IPV6,
                    field::TCP,
                    field::UDP,
                    field::SCTP,
                    field::MPLS,
                ] {
                    if here(kind) {
                        fields.extend([kind; 3]);
                    }
                }
                let (proto, frag) = match (wire::last(key, 7), wire::last(key, 8)) {
                    (Some(ip), _) => (ip[8], ip[11]),
                    (_, Some(ip)) => (ip[36], ip[39]),
                    _ => (0, 0),
                };
                let wish = Wish {
                    ports: (0..PORTS + 1).collect(),
                    recirc: (0..6).collect(),
                    fields,
                    proto,
                    frag,
                    depth: 3,
                    wild: random.random(),
                    trunc: true,
                    pids: self.pids.clone(),
                };
                actions::list(random, &wish)
            }
        }
    }

    /// A packet that user space sends.
    fn execute(&mut self, random: &mut SmallRng) {
        let bytes = self.bytes(random);
        let list = self.list(random, &[]);
        let mut key = Vec::new();
        let mut writer = Writer::new(&mut key);
        writer.u32(3, random.random_range(0..PORTS));
        writer.u32(20, random.random_range(0..3));
        let ifindex = self.datapath.ifindex;
        let done = self.world.request(Family::Packet, 3, ifindex, 0, |writer| {
            writer.bytes(1, &bytes).expect("short");
            writer.bytes(2, &key).expect("short");
            writer.bytes(3, &list).expect("short");
            if random.random_ratio(1, 4) {
                writer.u16(9, random.random());
            }
        });
        drop(done);
    }
}

fn pad(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().max(64), 0);
    bytes
}

fn masked(random: &mut SmallRng, kind: u16, payload: &[u8]) -> Vec<u8> {
    // The tag's content, the tunnel: attributes inside.
    if matches!(kind, 1 | 16) {
        let mut inner = Vec::new();
        for (kind, payload) in wire::attributes(payload) {
            let payload = masked(random, kind, &payload);
            Writer::new(&mut inner)
                .bytes(kind, &payload)
                .expect("short");
        }
        return inner;
    }
    // Types are compared, or nothing behind them could be; recirculation is kept apart mostly.
    let exact = matches!(kind, 6 | 5) || kind == 20 && random.random_ratio(7, 8);
    match exact || random.random_ratio(1, 10) {
        true => vec![0xff; payload.len()],
        false => vec![0; payload.len()],
    }
}

/// What a guest may claim of any bytes.
fn lying_gso(random: &mut SmallRng, len: usize) -> Gso {
    let kinds = [
        GsoKind::TcpV4,
        GsoKind::TcpV6,
        GsoKind::UdpL4,
        GsoKind::UdpFragments,
    ];
    let size = match random.random_range(0..8) {
        // Not for a long one: that it is cut into as many packets as it has bytes is known.
        0 if len < 2000 => random.random_range(0..8),
        1 => random.random_range(60_000..=65_535),
        _ => random.random_range(64..2000),
    };
    Gso {
        kind: *kinds.choose(random).expect("four"),
        ecn: random.random(),
        size,
        header_len: random.random(),
    }
}

/// A packet that stands for several, as a good sender makes it; its length may be that of the longest.
fn honest_gso(random: &mut SmallRng) -> Frame {
    let (mut bytes, _, size) = packet::segmented(random);
    let found = packet::find(&bytes);
    let l4 = packet::find_l4(&bytes, found.l3, found.ethertype).expect("it has one");
    if random.random_ratio(1, 4) {
        bytes.resize(random.random_range(2000..65_000), 0xa5);
    }
    let mut frame = Frame::from_bytes(&bytes);
    let udp = l4.proto == 17;
    frame.offload.csum = Some(PartialChecksum {
        start: l4.at as u16,
        offset: if udp { 6 } else { 16 },
    });
    let kind = match (udp, found.ethertype) {
        (true, _) if random.random() => GsoKind::UdpFragments,
        (true, _) => GsoKind::UdpL4,
        (false, packet::ethertype::IPV4) => GsoKind::TcpV4,
        _ => GsoKind::TcpV6,
    };
    frame.offload.gso = Some(Gso {
        kind,
        ecn: false,
        size: size.max(if bytes.len() > 2000 { 500 } else { 8 }) as u16,
        header_len: random.random(),
    });
    frame
}
