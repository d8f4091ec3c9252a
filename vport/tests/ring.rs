//! The receive ring of a packet socket: order, wake-ups, what it loses, and how it ends. Needs root.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use common::{End, Forwarder, Lab, Netns, both_ways, eventually, is_test_frame, test_frame};
use frame::{Frame, Gso, GsoKind, PartialChecksum, Pool};
use rustix::event::{Timespec, epoll};
use vport::{AttachOptions, HideChoice, InternalOptions, RingChoice, TxOutcome, create_internal};

const NUMBER: usize = 54;

fn options(ring: RingChoice) -> AttachOptions {
    AttachOptions {
        ring,
        hide: HideChoice::Off,
        ..AttachOptions::default()
    }
}

fn numbered(len: usize, number: u64) -> Frame {
    let mut frame = test_frame(len.max(NUMBER + 8), number as u8);
    frame.bytes_mut()[NUMBER..NUMBER + 8].copy_from_slice(&number.to_be_bytes());
    frame
}

/// A packet over IPv4 that stands for several.
fn gso(len: usize, number: u64, protocol: u8, kind: GsoKind) -> Frame {
    let mut frame = numbered(len, number);
    let bytes = frame.bytes_mut();
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..34].fill(0);
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    bytes[22] = 64;
    bytes[23] = protocol;
    bytes[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    bytes[34..54].fill(0);
    bytes[46] = 0x50; // data offset
    bytes[47] = 0x10; // ACK
    let (offset, header_len) = if protocol == 17 { (6, 42) } else { (16, 54) };
    if protocol == 17 {
        bytes[38..40].copy_from_slice(&((len - 34) as u16).to_be_bytes());
    }
    frame.offload.csum = Some(PartialChecksum { start: 34, offset });
    frame.offload.gso = Some(Gso {
        kind,
        ecn: false,
        size: 1400,
        header_len,
    });
    frame
}

fn number(frame: &Frame) -> Option<u64> {
    let bytes = frame.bytes().get(NUMBER..NUMBER + 8)?;
    is_test_frame(frame).then(|| u64::from_be_bytes(bytes.try_into().unwrap()))
}

/// One of each kind, by its number: short, as long as a slot and longer, for several.
fn mixed(number: u64, jumbo: bool) -> Frame {
    match number % 11 {
        1 if jumbo => numbered(9000, number),
        2 if jumbo => numbered(1900 + (number as usize / 11) % 100, number),
        3 | 4 => gso(3000 + number as usize % 20_000, number, 6, GsoKind::TcpV4),
        5 => numbered(1514, number),
        _ => numbered(62, number),
    }
}

fn all_in_order(ring: RingChoice, mtu: u32) {
    const FRAMES: u64 = 100_000;
    const WINDOW: u64 = 200;
    let lab = Lab::new(mtu);
    let mut end = End::new(lab.switch.attach("pa", options(ring)));
    let port = lab.a.attach("eth0", options(RingChoice::Never));
    let got = Arc::new(AtomicU64::new(0));
    let sender = thread::spawn({
        let got = Arc::clone(&got);
        move || {
            let (mut pool, mut outcome) = (Pool::default(), TxOutcome::default());
            let mut sent = 0;
            while sent < FRAMES {
                if sent - got.load(SeqCst) > WINDOW {
                    thread::yield_now();
                    continue;
                }
                let burst = 1 + sent * 7 % 32;
                let mut frames = (sent..FRAMES.min(sent + burst))
                    .map(|n| mixed(n, mtu > 1500))
                    .collect();
                sent = FRAMES.min(sent + burst);
                port.transmit(&mut frames, &mut pool, &mut outcome);
                assert_eq!(outcome.refused_total(), 0, "{outcome:?}");
            }
        }
    });
    let (mut frames, mut next) = (Vec::new(), 0);
    let mut last = Instant::now();
    while next < FRAMES {
        common::wait([end.queue.as_fd()].into_iter(), 100);
        end.queue.receive(&mut end.pool, &mut frames, 32).unwrap();
        for frame in frames.drain(..) {
            if let Some(n) = number(&frame) {
                let expected = mixed(n, mtu > 1500);
                assert_eq!(n, next, "{:?}", end.port.host_counters());
                assert_eq!(frame.len(), expected.len(), "frame {n}");
                assert!(frame.bytes() == expected.bytes(), "frame {n} changed");
                let kind = |frame: &Frame| frame.offload.gso.map(|gso| gso.kind);
                assert_eq!(kind(&frame), kind(&expected), "frame {n}");
                next += 1;
                last = Instant::now();
            }
            end.pool.put(frame);
        }
        got.store(next, SeqCst);
        assert!(last.elapsed() < Duration::from_secs(10), "stuck at {next}");
    }
    sender.join().unwrap();
    assert_eq!(end.port.host_counters().rx_errors.total(), 0);
    assert_eq!(end.port.host_counters().queue_full, 0);
}

#[test]
fn short_long_and_segmented_frames_arrive_in_order_by_ring_and_by_queue() {
    for ring in [RingChoice::Auto, RingChoice::Never] {
        all_in_order(ring, 1500);
    }
}

#[test]
fn frames_longer_than_a_slot_keep_their_place() {
    all_in_order(RingChoice::Auto, 9000);
}

#[test]
fn every_lone_frame_wakes_its_reader() {
    const FRAMES: u64 = 100_000;
    let lab = Lab::new(9000);
    let mut end = End::new(lab.switch.attach("pa", options(RingChoice::Auto)));
    assert!(end.port.mode().contains("receive ring of "));
    let port = lab.a.attach("eth0", options(RingChoice::Never));
    let got = Arc::new(AtomicU64::new(0));
    let sender = thread::spawn({
        let got = Arc::clone(&got);
        move || {
            let (mut pool, mut outcome) = (Pool::default(), TxOutcome::default());
            for n in 0..FRAMES {
                let frame = numbered(if n % 7 == 0 { 5000 } else { 62 }, n);
                port.transmit(&mut vec![frame], &mut pool, &mut outcome);
                while got.load(SeqCst) == n {
                    thread::yield_now();
                }
                // Now and then long enough for the reader to sleep.
                if n % 16 == 0 {
                    thread::sleep(Duration::from_micros(n % 200));
                }
            }
        }
    });
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let data = epoll::EventData::new_u64(0);
    epoll::add(&poll, end.queue.as_fd(), data, epoll::EventFlags::IN).unwrap();
    let (mut frames, mut next) = (Vec::new(), 0);
    let second = Timespec {
        tv_sec: 5,
        tv_nsec: 0,
    };
    while next < FRAMES {
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data,
        }];
        let woken = epoll::wait(&poll, &mut events, Some(&second)).unwrap();
        assert_eq!(woken, 1, "asleep at frame {next}");
        // Not until there is nothing: what is left has to wake us again.
        end.queue.receive(&mut end.pool, &mut frames, 1).unwrap();
        next += frames.drain(..).filter_map(|f| number(&f)).count() as u64;
        got.store(next, SeqCst);
    }
    sender.join().unwrap();
    drop(lab);
}

#[test]
fn what_finds_no_room_is_counted_and_the_rest_is_in_order() {
    let lab = Lab::new(9000);
    for len in [62, 9000] {
        let mut end = End::new(lab.switch.attach("pa", options(RingChoice::Auto)));
        let port = lab.a.attach("eth0", options(RingChoice::Never));
        let (mut pool, mut outcome) = (Pool::default(), TxOutcome::default());
        const FRAMES: u64 = 5000;
        for n in 0..FRAMES {
            // Short ones between, for which there is room when there is none for the long.
            let frame = numbered(if n % 4 == 0 { 62 } else { len }, n);
            port.transmit(&mut vec![frame], &mut pool, &mut outcome);
            // Nobody reads until the ring, or the socket's buffer, has been full for long.
        }
        assert_eq!(outcome.packets, FRAMES);
        let (mut frames, mut last, mut got) = (Vec::new(), None, 0);
        eventually("all are received or counted", || {
            end.queue.receive(&mut end.pool, &mut frames, 32).unwrap();
            for frame in frames.drain(..) {
                if let Some(n) = number(&frame) {
                    assert!(last < Some(n), "{n} after {last:?}");
                    assert_eq!(frame.len(), if n % 4 == 0 { 62 } else { len });
                    last = Some(n);
                    got += 1;
                }
                end.pool.put(frame);
            }
            let counters = end.port.host_counters();
            assert_eq!(counters.rx_errors.total(), 0, "{counters:?}");
            got > 0 && got + counters.queue_full >= FRAMES
        });
        assert!(got > 500 && got < FRAMES, "{got}");
        // And it goes on.
        assert!(end.port.mode().contains("receive ring of "));
        port.transmit(&mut vec![numbered(len, 1)], &mut pool, &mut outcome);
        let frame = end.next(2000).unwrap();
        assert_eq!(frame.bytes(), numbered(len, 1).bytes());
    }
}

#[test]
fn a_ring_that_the_kernel_lost_becomes_a_queue() {
    let netns = Netns::new();
    let tap = netns.run(|| create_internal("int0", &InternalOptions::default()).unwrap());
    netns.ip("link set int0 addrgenmode none");
    netns.ip("link set int0 up");
    let mut tap = End::new(tap);
    let unasked = netns.attach("int0", options(RingChoice::Auto));
    assert!(
        unasked.mode().contains("no receive ring (not a veth)"),
        "{}",
        unasked.mode()
    );
    drop(unasked);
    let mut host = End::new(netns.attach("int0", options(RingChoice::Always)));
    tap.send(gso(4000, 1, 6, GsoKind::TcpV4));
    assert_eq!(number(&host.next(2000).unwrap()), Some(1));
    // Refused by the filter: the next one is the first to arrive.
    tap.send(gso(4000, 2, 132, GsoKind::TcpV4));
    tap.send(numbered(62, 3));
    assert_eq!(number(&host.next(2000).unwrap()), Some(3));
    host.port.look_after();
    assert!(host.port.mode().contains("receive ring of "));
    // UDP to be cut into fragments: no virtio-net header says so.
    tap.send(gso(4000, 4, 17, GsoKind::UdpFragments));
    host.port.look_after();
    let lost = host.port.host_counters();
    assert_eq!(lost.queue_full, 1, "{lost:?}");
    assert!(
        host.port.mode().contains("no receive ring (lost to"),
        "{}",
        host.port.mode()
    );
    for n in 5..100 {
        tap.send(numbered(62, n));
        assert_eq!(number(&host.next(2000).unwrap()), Some(n));
    }
    tap.send(gso(4000, 100, 6, GsoKind::TcpV4));
    assert_eq!(number(&host.next(2000).unwrap()), Some(100));
}

#[test]
fn traffic_passes_without_a_ring_and_on_several_rings() {
    for (ring, queues, said) in [
        (RingChoice::Never, 1, "no receive ring (as asked)"),
        (RingChoice::Auto, 3, "receive ring of "),
    ] {
        let lab = Lab::new(1500);
        let [a, b] = ["pa", "pb"].map(|name| {
            let options = AttachOptions {
                ring,
                queues,
                ..AttachOptions::default()
            };
            lab.switch.attach(name, options)
        });
        assert!(a.mode().contains(said), "{}", a.mode());
        let forwarder = Forwarder::new(a, b);
        both_ways(&lab, &forwarder, 1500);
    }
}
