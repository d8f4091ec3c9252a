//! How fast connections are made, looked up, dumped and flushed, and what each costs in memory:
//! `cargo run --release -p datapath --example conntrack [connections] [threads]`.
//!
//! Packets are made on the way and carried through the tracker alone: no ports, no flow table. Processor time
//! is of all threads together: if it stays the same with more of them they don't stand in each other's way,
//! however many processors they get.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::time::Instant;

use datapath::conntrack::{Config, Tracker};
use datapath::ctnetlink::Ctnetlink;
use datapath::packet::Packet;
use flow::action::Conntrack;
use flow::extract::{Metadata, extract};
use frame::Frame;
use netlink::message::{Header, Messages, flags};
use netlink::{
    Answer, Dump, Errno, Failure, Handler, Hub, Lane, Loopback, Protocol, Request, Service,
};

const SECOND: u64 = 1_000_000_000;

/// A UDP packet without a checksum, from one of many sources.
fn bytes(number: u32, reply: bool) -> [u8; 60] {
    let mut bytes = [0; 60];
    bytes[12] = 8;
    bytes[14] = 0x45;
    bytes[17] = 46;
    bytes[22] = 64;
    bytes[23] = 17;
    let client = (0x0a00_0000 + (number >> 4)).to_be_bytes();
    let (src, dst) = if reply { (30, 26) } else { (26, 30) };
    bytes[src..src + 4].copy_from_slice(&client);
    bytes[dst..dst + 4].copy_from_slice(&[192, 0, 2, 1]);
    let port = (1024 + (number & 15) as u16).to_be_bytes();
    let (src, dst) = if reply { (36, 34) } else { (34, 36) };
    bytes[src..src + 2].copy_from_slice(&port);
    bytes[dst..dst + 2].copy_from_slice(&[0, 53]);
    bytes[39] = 26;
    bytes
}

fn packet(number: u32, reply: bool, packet: &mut Packet) {
    let mut frame = std::mem::take(&mut packet.frame);
    frame.reset();
    let from = bytes(number, reply);
    if frame.tailroom() < from.len() {
        frame = Frame::with_space(2048);
    }
    frame.space_mut()[..from.len()].copy_from_slice(&from);
    frame.set_len(from.len());
    packet.renew(frame, 1);
    packet.layers = extract(&mut packet.frame, &Metadata::default(), &mut packet.key).unwrap();
}

/// A server of ctnetlink alone.
struct Server(Ctnetlink);

impl Handler for Server {
    fn lane(&self, _: &Request<'_>) -> Lane {
        Lane::Prompt
    }

    fn handle(&self, _: &Request<'_>, _: &mut Answer<'_>) -> Result<(), Failure> {
        Err(Errno::EOPNOTSUPP.into())
    }

    fn dump(&self, _: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        Err(Errno::EOPNOTSUPP.into())
    }

    fn gone(&self, _: u32) {}

    fn before_sleep(&self) {}

    fn service(&self, _: Protocol) -> Option<&dyn Service> {
        Some(&self.0)
    }
}

/// A request about connections, of one zone or of all: how many messages come back.
fn ask(server: &Server, message: u8, more: u16, zone: Option<u16>) -> usize {
    let mut request = Vec::new();
    Header {
        len: if zone.is_some() { 28 } else { 20 },
        kind: u16::from_be_bytes([1, message]),
        flags: flags::REQUEST | more,
        seq: 1,
        pid: 0,
    }
    .emit(&mut request);
    request.extend([0; 4]);
    if let Some(zone) = zone {
        // CTA_ZONE
        request.extend([6, 0, 18, 0]);
        request.extend(zone.to_be_bytes());
        request.extend([0; 2]);
    }
    let client = Loopback {
        protocol: Protocol::Netfilter,
        ..Loopback::new(Hub::default(), 1)
    };
    let said = client.exchange(server, &request);
    said.iter()
        .map(|datagram| Messages::new(datagram).count())
        .sum()
}

/// Zone 2 has ten connections, all others are in zone 1.
fn clients(tracker: Arc<Tracker>) {
    for number in 0..10 {
        let mut one = Packet::default();
        packet(number, false, &mut one);
        let what = Conntrack {
            zone: 2,
            commit: true,
            ..Conntrack::default()
        };
        tracker.execute(&mut one, &what, SECOND).unwrap();
    }
    let server = Server(Ctnetlink::new(tracker, || SECOND));
    for (what, message, more, zone) in [
        ("dump, all", 1, flags::DUMP, None),
        ("dump, ten in a zone", 1, flags::DUMP, Some(2)),
        ("dump, an empty zone", 1, flags::DUMP, Some(3)),
        ("flush, ten in a zone", 2, 0, Some(2)),
        ("flush, all", 2, 0, None),
    ] {
        let began = Instant::now();
        let messages = ask(&server, message, more, zone);
        println!("{what:<22} {:>10.1?}, {messages} messages", began.elapsed());
    }
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}

/// Processor time of all threads so far, in nanoseconds: `utime` and `stime` of proc(5), in hundredths of a
/// second.
fn processor_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let behind_name = stat.rsplit_once(')').unwrap().1;
    let fields = behind_name.split_whitespace().skip(11).take(2);
    fields
        .map(|ticks| ticks.parse::<f64>().unwrap() * 1e7)
        .sum()
}

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|word| word.parse::<u32>().unwrap());
    let connections = arguments.next().unwrap_or(1_000_000);
    let threads = arguments.next().unwrap_or(1);
    let config = Config {
        // Shards fill unevenly.
        max_connections: connections as usize * 11 / 10,
        ..Config::new(1)
    };
    let tracker = Arc::new(Tracker::new(config, 0));
    let before = resident();
    let look = Conntrack {
        zone: 1,
        ..Conntrack::default()
    };
    let commit = Conntrack {
        commit: true,
        ..look.clone()
    };
    let run = |what: &Conntrack, reply: bool, passes: u32| {
        let share = connections / threads;
        let (began, used) = (Instant::now(), processor_time());
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let tracker = &tracker;
                scope.spawn(move || {
                    let mut one = Packet::default();
                    for _ in 0..passes {
                        for number in thread * share..(thread + 1) * share {
                            packet(number, reply, &mut one);
                            tracker.execute(&mut one, what, SECOND).unwrap();
                        }
                    }
                });
            }
        });
        let packets = f64::from(share * threads * passes);
        let each = (processor_time() - used) / packets;
        (packets / began.elapsed().as_secs_f64(), each)
    };
    let made = run(&commit, false, 1);
    let bytes = (resident() - before) / u64::from(connections);
    let answered = run(&look, true, 1);
    let seen = run(&look, false, 2);
    let held = tracker.table.len();
    let began = Instant::now();
    tracker.expire(30 * SECOND, usize::MAX);
    let swept = began.elapsed();
    println!("{held} connections of {connections}, {threads} threads");
    for (what, (rate, each)) in [("made", made), ("answers", answered), ("looked up", seen)] {
        println!("{what:<10} {rate:>12.0} a second, {each:>6.0} ns of processor time each");
    }
    println!("memory:    {bytes:>12} bytes a connection");
    println!("a look at each: {swept:?}");
    clients(tracker);
}
