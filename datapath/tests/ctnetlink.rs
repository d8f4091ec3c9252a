//! ctnetlink, message by message: what is asked of a tracker that real packets have filled.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod conntrack_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use conntrack_common::{Ends, SECOND, SYN, commit, ct, run, tcp, tracker, udp, udp6, wide};
use datapath::conntrack::Tracker;
use datapath::conntrack::tuple::{Family, Tuple, proto};
use datapath::ctnetlink::{Ctnetlink, entry, tuple};
use flow::action::{Conntrack, Masked};
use netlink::attr::{Table, Writer};
use netlink::message::{Header, Messages, flags};
use netlink::{
    Answer, Dump, Errno, Failure, Handler, Hub, Lane, Loopback, Protocol, Request, Service,
};

const NEW: u16 = 0x100;
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
const GET_CTRZERO: u16 = 0x103;
const GET_STATS_CPU: u16 = 0x104;
const GET_STATS: u16 = 0x105;
const EXP_GET: u16 = 0x201;
const TIMEOUT: u16 = 0x800;

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const LIFETIME: u16 = 7;
const MARK: u16 = 8;
const COUNTERS_ORIG: u16 = 9;
const ID: u16 = 12;
const ZONE: u16 = 18;
const MARK_MASK: u16 = 21;
const LABELS: u16 = 22;

const ENDS: Ends = Ends {
    src: [10, 0, 0, 1],
    src_port: 1000,
    dst: [10, 0, 0, 2],
    dst_port: 80,
};

/// Nanoseconds; every test has a process-wide clock, and nobody turns it back.
static NOW: AtomicU64 = AtomicU64::new(SECOND);

fn now() -> u64 {
    NOW.load(Ordering::Relaxed)
}

struct World {
    tracker: Arc<Tracker>,
    service: Ctnetlink,
    client: Loopback,
}

impl Handler for World {
    fn lane(&self, _: &Request<'_>) -> Lane {
        Lane::Prompt
    }

    fn handle(&self, _: &Request<'_>, _: &mut Answer<'_>) -> Result<(), Failure> {
        Err(Errno::EIO.into())
    }

    fn dump(&self, _: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        Err(Errno::EIO.into())
    }

    fn gone(&self, _: u32) {}

    fn before_sleep(&self) {}

    fn service(&self, _: Protocol) -> Option<&dyn Service> {
        Some(&self.service)
    }
}

impl World {
    fn new() -> Self {
        let tracker = Arc::new(tracker(1 << 16));
        Self {
            service: Ctnetlink::new(Arc::clone(&tracker), now),
            tracker,
            client: Loopback {
                protocol: Protocol::Netfilter,
                ..Loopback::new(Hub::default(), 9)
            },
        }
    }

    fn see(&self, bytes: &[u8], what: &Conntrack) {
        run(&self.tracker, bytes, what, now()).unwrap();
    }

    /// The messages that come back, or the error.
    fn ask(
        &self,
        kind: u16,
        more: u16,
        af: u8,
        build: impl FnOnce(&mut Writer<'_>),
    ) -> Result<Vec<Vec<u8>>, i32> {
        self.ask_version(kind, more, [af, 0], build)
    }

    fn ask_version(
        &self,
        kind: u16,
        more: u16,
        [af, version]: [u8; 2],
        build: impl FnOnce(&mut Writer<'_>),
    ) -> Result<Vec<Vec<u8>>, i32> {
        let mut bytes = Vec::new();
        Header {
            len: 0,
            kind,
            flags: flags::REQUEST | more,
            seq: 3,
            pid: 0,
        }
        .emit(&mut bytes);
        bytes.extend([af, version, 0, 0]);
        build(&mut Writer::new(&mut bytes));
        let len = (bytes.len() as u32).to_ne_bytes();
        bytes[..4].copy_from_slice(&len);
        let mut told = Vec::new();
        for datagram in self.client.exchange(self, &bytes) {
            for (header, message) in Messages::new(&datagram) {
                assert_eq!((header.seq, header.pid), (3, 9));
                let error = || -i32::from_ne_bytes(message[16..20].try_into().unwrap());
                match header.kind {
                    2 | 3 if error() != 0 => return Err(error()),
                    2 | 3 => {}
                    _ => told.push(message.to_vec()),
                }
            }
        }
        Ok(told)
    }

    fn dump(&self, build: impl FnOnce(&mut Writer<'_>)) -> Vec<Vec<u8>> {
        self.ask(GET, flags::DUMP, 0, build).unwrap()
    }
}

fn tuple_of(ends: Ends, protocol: u8) -> Tuple {
    Tuple {
        src: wide(ends.src),
        dst: wide(ends.dst),
        src_port: ends.src_port,
        dst_port: ends.dst_port,
        zone: 0,
        proto: protocol,
        family: Family::V4,
    }
}

/// Names a connection.
fn name(writer: &mut Writer<'_>, kind: u16, ends: Ends, protocol: u8, zone: u16) {
    tuple::write(writer, kind, &tuple_of(ends, protocol)).unwrap();
    writer.be16(ZONE, zone);
}

fn table(message: &[u8]) -> Table<'_, 27> {
    Table::new(&message[20..])
}

fn word(message: &[u8], kind: u16) -> u32 {
    table(message).get(kind).unwrap().be32().unwrap()
}

#[test]
fn a_connection_is_found_by_either_tuple_in_its_zone() {
    let world = World::new();
    world.see(&udp(ENDS, b"abc"), &commit(7));
    for (kind, ends) in [(TUPLE_ORIG, ENDS), (TUPLE_REPLY, ENDS.back())] {
        let get = |zone, af| world.ask(GET, 0, af, |w| name(w, kind, ends, proto::UDP, zone));
        let told = get(7, 2).unwrap();
        assert_eq!(told.len(), 1);
        assert_eq!(told[0][4..6], NEW.to_ne_bytes());
        let attributes = table(&told[0]);
        assert_eq!(attributes.get(ZONE).unwrap().be16(), Ok(7));
        let original = attributes.get(TUPLE_ORIG).unwrap();
        let zoned = Tuple {
            zone: 7,
            ..tuple_of(ENDS, proto::UDP)
        };
        assert_eq!(tuple::read(original, Some(Family::V4), 7), Ok(zoned));
        assert_eq!(get(8, 2), Err(libc::ENOENT));
        assert_eq!(
            get(7, 10),
            Err(libc::EINVAL),
            "its addresses are no IPv6 ones"
        );
        assert_eq!(get(7, 0), Err(libc::EOPNOTSUPP));
    }
    assert_eq!(world.ask(GET, 0, 2, |w| w.be16(ZONE, 7)), Err(libc::EINVAL));
    let other = world.ask(GET, 0, 2, |w| name(w, TUPLE_ORIG, ENDS, proto::TCP, 7));
    assert_eq!(other, Err(libc::ENOENT));
    assert_eq!(world.ask(0x10a, 0, 2, |_| {}), Err(libc::EINVAL));
}

#[test]
fn who_has_no_privileges_sees_nothing() {
    let mut world = World::new();
    world.see(&udp(ENDS, b""), &commit(0));
    world.client.privileged = false;
    for (kind, more) in [
        (GET, flags::DUMP),
        (DELETE, 0),
        (GET_STATS, 0),
        (TIMEOUT | 1, flags::DUMP),
        (EXP_GET, flags::DUMP),
    ] {
        assert_eq!(world.ask(kind, more, 0, |_| {}), Err(libc::EPERM));
    }
    assert_eq!(world.tracker.table.len(), 1);
}

#[test]
fn deletions_hit_what_they_name() {
    let world = World::new();
    let ends = |port| Ends {
        src_port: port,
        ..ENDS
    };
    for (port, zone, mark) in [(1, 1, 5), (2, 1, 6), (3, 2, 5), (4, 0, 0)] {
        let mark = Masked {
            value: mark,
            mask: u32::MAX,
        };
        let what = Conntrack {
            mark: Some(mark),
            ..commit(zone)
        };
        world.see(&udp(ends(port), b""), &what);
    }
    let six = [0x20; 16];
    world.see(&udp6(six, 5, [0x30; 16], 53, b""), &commit(1));
    let ports = || {
        let mut ports: Vec<u16> = Vec::new();
        world.tracker.for_each(now(), |connection| {
            ports.push(connection.original.src_port);
            true
        });
        ports.sort_unstable();
        ports
    };
    // By tuple and id.
    let shown = world
        .ask(GET, 0, 2, |w| name(w, TUPLE_ORIG, ends(4), proto::UDP, 0))
        .unwrap();
    let id = word(&shown[0], ID);
    let delete = |id| {
        world.ask(DELETE, 0, 2, |w| {
            name(w, TUPLE_ORIG, ends(4), proto::UDP, 0);
            w.be32(ID, id);
        })
    };
    assert_eq!(delete(id ^ 1), Err(libc::ENOENT));
    assert_eq!(ports(), [1, 2, 3, 4, 5]);
    delete(id).unwrap();
    assert_eq!(delete(id), Err(libc::ENOENT));
    assert_eq!(ports(), [1, 2, 3, 5]);
    // By mark: bits 1 and 2 are those of 6.
    world
        .ask(DELETE, 0, 0, |w| {
            w.be32(MARK, 6);
            w.be32(MARK_MASK, 6);
        })
        .unwrap();
    assert_eq!(ports(), [1, 3, 5]);
    // By family, which counts from version 1 on.
    world.ask_version(DELETE, 0, [10, 1], |_| {}).unwrap();
    assert_eq!(ports(), [1, 3]);
    let mask_alone = world.ask(DELETE, 0, 0, |w| w.be32(MARK_MASK, 1));
    assert_eq!(mask_alone, Err(libc::EINVAL));
    world.ask(DELETE, 0, 0, |w| w.be16(ZONE, 1)).unwrap();
    assert_eq!(ports(), [3]);
    world.ask_version(DELETE, 0, [10, 0], |_| {}).unwrap();
    assert_eq!(ports(), [], "in version 0 a family is none");
    assert_eq!(world.tracker.limits.count(1), 0);
}

#[test]
fn a_dump_shows_each_once() {
    let world = World::new();
    for port in 1..=5000 {
        let ends = Ends {
            src_port: port,
            ..ENDS
        };
        world.see(&udp(ends, b"abc"), &commit(port % 3));
    }
    let mut seen: Vec<u32> = world.dump(|_| {}).iter().map(|m| word(m, ID)).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 5000);
    let zone = world.dump(|w| w.be16(ZONE, 2));
    assert_eq!(zone.len(), 1667);
    assert!(
        zone.iter()
            .all(|m| table(m).get(ZONE).unwrap().be16() == Ok(2))
    );
    assert!(world.dump(|w| w.be16(ZONE, 3)).is_empty());
    assert!(world.ask(GET, flags::DUMP, 10, |_| {}).unwrap().is_empty());
    // Counts are told, and then begin anew.
    let packets = |message: &Vec<u8>| {
        let counters = table(message).get(COUNTERS_ORIG).unwrap();
        Table::<3>::new(counters.payload)
            .get(1)
            .unwrap()
            .payload
            .to_vec()
    };
    let told = world.ask(GET_CTRZERO, flags::DUMP, 0, |_| {}).unwrap();
    assert!(told.iter().all(|m| packets(m) == 1u64.to_be_bytes()));
    assert!(world.dump(|_| {}).iter().all(|m| packets(m) == [0; 8]));
    let counts = world.ask(GET_STATS, 0, 0, |_| {}).unwrap();
    assert_eq!((word(&counts[0], 1), word(&counts[0], 2)), (5000, 1 << 16));
    let counts = world.ask(GET_STATS_CPU, flags::DUMP, 0, |_| {}).unwrap();
    assert_eq!(word(&counts[0], 8), 5000, "inserted");
    assert!(world.ask(GET_STATS_CPU, 0, 0, |_| {}).unwrap().is_empty());
    assert!(
        world
            .ask(EXP_GET, flags::DUMP, 0, |_| {})
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_client_changes_mark_labels_lifetime_status_and_state() {
    let world = World::new();
    world.see(&tcp(ENDS, SYN, 1, 0, b""), &commit(0));
    let change = |more, build: &dyn Fn(&mut Writer<'_>)| {
        world.ask(NEW, more, 2, |w| {
            name(w, TUPLE_ORIG, ENDS, proto::TCP, 0);
            build(w);
        })
    };
    assert_eq!(change(flags::EXCL, &|_| {}), Err(libc::EEXIST));
    change(0, &|w| {
        w.be32(MARK, 0x12);
        w.be32(LIFETIME, 1000);
        w.bytes(LABELS, &[1, 0, 0, 0]).unwrap();
        let nest = w.begin(PROTOINFO);
        let tcp = w.begin(1);
        w.u8(1, 3);
        w.end(tcp).unwrap();
        w.end(nest).unwrap();
    })
    .unwrap();
    let shown = world.dump(|_| {}).remove(0);
    assert_eq!((word(&shown, MARK), word(&shown, LIFETIME)), (0x12, 1000));
    let mut labels = [0; 16];
    labels[0] = 1;
    assert_eq!(table(&shown).get(LABELS).unwrap().payload, labels);
    let info = Table::<4>::new(table(&shown).get(PROTOINFO).unwrap().payload);
    let state = Table::<6>::new(info.get(1).unwrap().payload).get(1);
    assert_eq!(state.unwrap().u8(), Ok(3), "established");
    // Outside the mask bits stay; under it they are the value's.
    change(0, &|w| {
        w.be32(MARK, 0x05);
        w.be32(MARK_MASK, 0x0f);
    })
    .unwrap();
    assert_eq!(word(&world.dump(|_| {})[0], MARK), 0x15);
    // Assured from now on, and confirmed for ever.
    let status = word(&shown, STATUS);
    change(0, &|w| w.be32(STATUS, status | 4)).unwrap();
    assert_eq!(word(&world.dump(|_| {})[0], STATUS), status | 4);
    assert_eq!(change(0, &|w| w.be32(STATUS, status)), Err(libc::EBUSY));
    assert_eq!(change(0, &|w| w.be32(STATUS, 4)), Err(libc::EBUSY));
    // All or nothing: the state is none.
    let refused = change(0, &|w| {
        w.be32(MARK, 99);
        w.bytes(LABELS, &[1, 2]).unwrap();
    });
    assert_eq!(refused, Err(libc::EINVAL));
    assert_eq!(word(&world.dump(|_| {})[0], MARK), 0x15);
    assert_eq!(
        change(0, &|w| w.flag(6)),
        Err(libc::EOPNOTSUPP),
        "a translation"
    );
    // One that isn't there isn't made.
    let other = Ends {
        src_port: 7,
        ..ENDS
    };
    let make = |more| world.ask(NEW, more, 2, |w| name(w, TUPLE_ORIG, other, proto::TCP, 0));
    assert_eq!(make(0), Err(libc::ENOENT));
    assert_eq!(make(flags::CREATE), Err(libc::EOPNOTSUPP));
    // Packets see what was set.
    let packet = run(&world.tracker, &tcp(ENDS, SYN, 1, 0, b""), &ct(0), now()).unwrap();
    assert_eq!(packet.key.ct_mark, 0x15);
}

#[test]
fn connections_follow_their_policy() {
    let world = World::new();
    let policy = |message: u16, more: u16, name: Option<&str>, seconds: Option<u32>| {
        world.ask(TIMEOUT | message, more, 0, |w| {
            if let Some(name) = name {
                w.name(1, name).unwrap();
            }
            w.be16(2, 2);
            w.u8(3, proto::UDP);
            if let Some(seconds) = seconds {
                let data = w.begin(4);
                w.be32(1, seconds);
                w.end(data).unwrap();
            }
        })
    };
    const CREATE: u16 = flags::CREATE;
    let named = Some("short");
    assert_eq!(policy(0, CREATE, named, None), Err(libc::EINVAL));
    policy(0, CREATE, named, Some(5)).unwrap();
    assert_eq!(
        policy(0, CREATE | flags::EXCL, named, Some(5)),
        Err(libc::EEXIST)
    );
    assert_eq!(policy(0, CREATE, named, Some(5)), Err(libc::EBUSY));
    let what = Conntrack {
        timeout: Some("short".into()),
        ..commit(0)
    };
    let lifetime = |port| {
        let ends = Ends {
            src_port: port,
            ..ENDS
        };
        let packet = run(&world.tracker, &udp(ends, b""), &what, now()).unwrap();
        (packet.conntrack.unwrap().connection.deadline() - now()) / SECOND
    };
    assert_eq!(lifetime(1), 5);
    policy(0, flags::REPLACE, named, Some(9)).unwrap();
    assert_eq!(lifetime(1), 9, "what began with it follows it");
    // TCP connections aren't its business.
    let packet = run(&world.tracker, &tcp(ENDS, SYN, 1, 0, b""), &what, now()).unwrap();
    let deadline = packet.conntrack.unwrap().connection.deadline();
    assert_eq!((deadline - now()) / SECOND, 120);
    let shown = policy(1, 0, named, None).unwrap();
    let attributes = Table::<6>::new(&shown[0][20..]);
    assert_eq!(attributes.get(1).unwrap().name(31), Ok("short"));
    let data = Table::<3>::new(attributes.get(4).unwrap().payload);
    assert_eq!(data.get(1).unwrap().be32(), Ok(9));
    assert_eq!(data.get(2).unwrap().be32(), Ok(120));
    let dumped = policy(1, flags::DUMP, None, None).unwrap();
    assert_eq!((dumped.len(), &dumped[0][8..]), (1, &shown[0][8..]));
    policy(2, 0, named, None).unwrap();
    assert_eq!(policy(2, 0, named, None), Err(libc::ENOENT));
    assert_eq!(policy(1, 0, named, None), Err(libc::ENOENT));
    assert_eq!(lifetime(1), 9, "also when it has lost its name");
    // The defaults of all others.
    assert_eq!(lifetime(2), 30);
    policy(3, 0, None, Some(77)).unwrap();
    assert_eq!(lifetime(3), 77);
    let shown = policy(4, 0, None, None).unwrap();
    let data = Table::<6>::new(&shown[0][20..]).get(4).unwrap();
    assert_eq!(Table::<3>::new(data.payload).get(1).unwrap().be32(), Ok(77));
}

#[test]
fn a_message_without_its_header_is_none() {
    let world = World::new();
    let mut bytes = Vec::new();
    Header {
        len: 16,
        kind: DELETE,
        flags: flags::REQUEST | flags::ACK,
        seq: 3,
        pid: 0,
    }
    .emit(&mut bytes);
    world.see(&udp(ENDS, b""), &commit(0));
    let said = world.client.exchange(&world, &bytes);
    assert_eq!(said.len(), 1);
    assert_eq!(said[0][16..20], [0; 4]);
    assert_eq!(world.tracker.table.len(), 1);
    assert_eq!(entry::KIND, NEW);
}

#[test]
fn counts_that_begin_anew_lose_no_packet() {
    const PACKETS: u64 = 20_000;
    let world = World::new();
    world.see(&udp(ENDS, b"x"), &commit(0));
    let packets = |messages: Vec<Vec<u8>>| {
        let counters = table(&messages[0]).get(COUNTERS_ORIG).unwrap();
        let count = Table::<3>::new(counters.payload).get(1).unwrap();
        u64::from_be_bytes(count.array().unwrap())
    };
    let tracker = Arc::clone(&world.tracker);
    let sender = std::thread::spawn(move || {
        for _ in 1..PACKETS {
            run(&tracker, &udp(ENDS, b"x"), &ct(0), now()).unwrap();
        }
    });
    let mut told = 0;
    for dumps in [0, flags::DUMP].into_iter().cycle() {
        let last = sender.is_finished();
        let name = |writer: &mut Writer<'_>| {
            if dumps == 0 {
                name(writer, TUPLE_ORIG, ENDS, 17, 0);
            }
        };
        told += packets(world.ask(GET_CTRZERO, dumps, 2, name).unwrap());
        if last {
            break;
        }
    }
    sender.join().unwrap();
    assert_eq!(told, PACKETS);
}
