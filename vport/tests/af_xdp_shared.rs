//! AF_XDP ports that share memory: frames go from one to the other without a copy, and none is lost to
//! anybody whatever comes and goes. Few tests in one program, as the memory is the process's. Needs root.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{
    End, Forwarder, Lab, eventually, is_test_frame, ping, tcp_transfer, test_frame, wait,
};
use frame::{Frame, Pool, VlanTag};
use vport::{AttachOptions, DriverChoice, Port, RxStatus, TxOutcome, XdpMode};

/// The memory is the process's: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(xdp: XdpMode) -> AttachOptions {
    AttachOptions {
        driver: DriverChoice::AfXdp,
        xdp,
        ..AttachOptions::default()
    }
}

/// Every chunk is back, and no port is left.
fn all_are_back() {
    eventually("all chunks are back", || {
        vport::af_xdp::memory()
            .iter()
            .all(|area| area.ports == 0 && area.free == area.chunks)
    });
}

/// Frames sent from where they came in, and by a copy.
fn counts(port: &dyn Port) -> (u64, u64) {
    let mode = port.mode();
    let (_, rest) = mode.split_once("sent ").unwrap();
    let words: Vec<_> = rest.split([' ', ',']).collect();
    let copied = words.iter().position(|word| *word == "by").unwrap() - 1;
    (words[0].parse().unwrap(), words[copied].parse().unwrap())
}

fn area(port: &dyn Port) -> String {
    let mode = port.mode();
    let (_, rest) = mode.split_once("memory ").unwrap();
    String::from(rest.split_once(" of ").unwrap().0)
}

#[test]
fn what_one_port_receives_another_sends_from_where_it_is() {
    let _alone = alone();
    for xdp in [XdpMode::Native, XdpMode::Generic] {
        let lab = Lab::new(1500);
        let (a, b) = (
            lab.switch.attach("pa", options(xdp)),
            lab.switch.attach("pb", options(xdp)),
        );
        assert_eq!(area(&*a), area(&*b));
        let forwarder = Forwarder::new(a, b);
        for host in [&lab.a, &lab.b] {
            host.command("ethtool -K eth0 tx off");
        }
        ping(&lab.a, "10.9.0.2", 3, 1472);
        tcp_transfer(&lab.a, &lab.b, "10.9.0.2", 16 << 20);
        for port in &forwarder.ports {
            let (passed, copied) = counts(&**port);
            assert!(passed > 50 && copied == 0, "{passed}, {copied}");
        }
        assert_eq!(forwarder.seen.refused.load(SeqCst), 0);
        drop(forwarder);
        all_are_back();
    }
}

#[test]
fn tags_pushed_out_of_band_go_in_band_without_a_copy() {
    let _alone = alone();
    let lab = Lab::new(1500);
    let tag = VlanTag {
        tpid: 0x8100,
        tci: 0x2005,
    };
    let forwarder = Forwarder::with(
        lab.switch.attach("pa", options(XdpMode::Native)),
        lab.switch.attach("pb", options(XdpMode::Native)),
        move |_, frame| frame.vlan = Some(tag),
    );
    let mut a = End::new(lab.a.attach("eth0", AttachOptions::default()));
    let mut b = End::new(lab.b.attach("eth0", options(XdpMode::Native)));
    for length in [60, 1000, 1514] {
        assert_eq!(a.send(test_frame(length, 9)).packets, 1);
        let mut came = b.next(2000).unwrap();
        assert_eq!(came.len(), length + 4);
        assert!(came.pop_tag_outofband());
        assert_eq!(came.vlan, Some(tag));
        came.vlan = None;
        assert!(came == test_frame(length, 9));
    }
    assert_eq!(counts(&*forwarder.ports[1]), (3, 0));
    drop((forwarder, a, b));
    all_are_back();
}

#[test]
fn frames_held_up_do_not_stop_reception() {
    let _alone = alone();
    let lab = Lab::new(1500);
    let mut a = End::new(lab.a.attach("eth0", AttachOptions::default()));
    let mut port = End::new(lab.switch.attach("pa", options(XdpMode::Native)));
    // More than there are chunks in the whole area.
    let chunks = vport::af_xdp::memory()
        .iter()
        .find(|area| area.ports > 0)
        .unwrap()
        .chunks;
    let mut held: Vec<Frame> = Vec::new();
    while held.len() < chunks + 1000 {
        let mut frames = (0..64).map(|n| test_frame(60 + n, n as u8)).collect();
        let mut outcome = TxOutcome::default();
        a.port.transmit(&mut frames, &mut a.pool, &mut outcome);
        assert_eq!(outcome.packets, 64);
        for _ in 0..64 {
            held.push(port.next(2000).unwrap());
        }
    }
    for (n, frame) in held.iter().enumerate() {
        assert!(*frame == test_frame(60 + n % 64, (n % 64) as u8), "{n}");
    }
    // Sending goes on too: so many chunks are nobody's but the senders'.
    let mut frames = (0..200).map(|_| test_frame(60, 1)).collect();
    let mut outcome = TxOutcome::default();
    port.port
        .transmit(&mut frames, &mut port.pool, &mut outcome);
    assert_eq!((outcome.packets, outcome.refused_total()), (200, 0));
    // They outlive port and device.
    lab.switch.ip("link del pa");
    drop((port, a));
    for (n, frame) in held.iter().enumerate() {
        assert!(*frame == test_frame(60 + n % 64, (n % 64) as u8), "{n}");
    }
    drop(held);
    all_are_back();
}

#[test]
fn the_memory_is_shared_also_when_the_first_ports_device_is_gone() {
    let _alone = alone();
    let lab = Lab::new(1500);
    let first = lab.switch.attach("pa", options(XdpMode::Native));
    let second = lab.switch.attach("pb", options(XdpMode::Generic));
    assert_eq!(area(&*first), area(&*second));
    lab.switch.ip("link del pa");
    lab.switch.ip("link add pc type veth peer name pd");
    // By the second: the first can share no more, while it is still there.
    let third = lab.switch.attach("pc", options(XdpMode::Native));
    assert_eq!(area(&*third), area(&*second));
    drop(first);
    lab.switch.ip("link del pc");
    lab.switch.ip("link del pb");
    // By nobody: all that are there have lost their devices.
    lab.switch.ip("link add pe type veth peer name pf");
    let fourth = lab.switch.attach("pe", options(XdpMode::Native));
    assert_ne!(area(&*fourth), area(&*second));
    drop((second, third, fourth));
    all_are_back();
}

#[test]
fn jumbo_frames_come_and_go_in_several_chunks() {
    let _alone = alone();
    for xdp in [XdpMode::Native, XdpMode::Generic] {
        let lab = Lab::new(9000);
        let forwarder = Forwarder::new(
            lab.switch.attach("pa", options(xdp)),
            lab.switch.attach("pb", options(xdp)),
        );
        for port in &forwarder.ports {
            let mode = port.mode();
            assert!(mode.contains("frames in several chunks"), "{mode}");
            assert_eq!(port.capabilities().max_frame, 9014);
        }
        for host in [&lab.a, &lab.b] {
            host.command("ethtool -K eth0 tx off");
        }
        for size in [56, 3798, 3799, 4054, 4055, 7638, 7639, 8150, 8972] {
            ping(&lab.a, "10.9.0.2", 1, size);
        }
        tcp_transfer(&lab.a, &lab.b, "10.9.0.2", 16 << 20);
        tcp_transfer(&lab.b, &lab.a, "10.9.0.1", 16 << 20);
        let seen = &forwarder.seen;
        assert_eq!(seen.longest.load(SeqCst), 9014, "{seen:?}");
        assert_eq!(seen.rx_errors.load(SeqCst), 0, "{seen:?}");
        assert_eq!(seen.refused.load(SeqCst), 0, "{seen:?}");
        let (passed, copied) = counts(&*forwarder.ports[0]);
        assert!(passed > 10 && copied > 10, "{passed}, {copied}");
        drop(forwarder);
        all_are_back();
    }
}

/// A flood of numbered frames into `pa`, which a forwarder takes to `pb`, one end of which reads them.
#[test]
fn ports_that_come_and_go_under_traffic_damage_nothing_and_leave_nothing() {
    let _alone = alone();
    let lab = Lab::new(1500);
    let stop = Arc::new(AtomicBool::new(false));
    let came = Arc::new(AtomicU64::new(0));
    let sender = {
        let (port, stop) = (
            lab.a.attach("eth0", AttachOptions::default()),
            Arc::clone(&stop),
        );
        std::thread::spawn(move || {
            let mut pool = Pool::default();
            let mut number = 0u64;
            while !stop.load(SeqCst) {
                let mut frames = Vec::new();
                for _ in 0..32 {
                    let mut frame = test_frame(14 + 800, 0);
                    for place in frame.bytes_mut()[14..].chunks_exact_mut(8) {
                        place.copy_from_slice(&number.to_be_bytes());
                    }
                    frames.push(frame);
                    number += 1;
                }
                port.transmit(&mut frames, &mut pool, &mut TxOutcome::default());
            }
        })
    };
    let reader = {
        let (port, stop, came) = (
            lab.b.attach("eth0", options(XdpMode::Native)),
            Arc::clone(&stop),
            Arc::clone(&came),
        );
        std::thread::spawn(move || {
            let mut end = End::new(port);
            let (mut out, mut held) = (Vec::new(), Vec::new());
            while !stop.load(SeqCst) {
                wait([std::os::fd::AsFd::as_fd(&end.queue)].into_iter(), 20);
                let status = end.queue.receive(&mut end.pool, &mut out, 32).unwrap();
                assert_ne!(status, RxStatus::Gone);
                for frame in out.drain(..).filter(is_test_frame) {
                    came.fetch_add(1, SeqCst);
                    held.push(frame);
                }
                // Looked at only later, when their chunks would long be others' if anybody erred.
                if held.len() > 500 {
                    for frame in held.drain(..) {
                        let (first, rest) = frame.bytes()[14..].split_first_chunk::<8>().unwrap();
                        assert!(rest.chunks_exact(8).all(|place| place == first));
                    }
                }
            }
        })
    };
    let end = Instant::now() + Duration::from_secs(4);
    let mut rounds = 0;
    while Instant::now() < end {
        let modes = [XdpMode::Native, XdpMode::Generic];
        let a = lab.switch.attach("pa", options(modes[rounds % 2]));
        let b = lab.switch.attach("pb", options(modes[rounds / 2 % 2]));
        let forwarder = Forwarder::new(a, b);
        let before = came.load(SeqCst);
        eventually("frames come", || came.load(SeqCst) > before + 100);
        if rounds % 3 == 0 {
            lab.switch.ip("link set pb down");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(forwarder);
        lab.switch.ip("link set pb up");
        rounds += 1;
    }
    stop.store(true, SeqCst);
    sender.join().unwrap();
    reader.join().unwrap();
    assert!(rounds > 5, "{rounds}");
    all_are_back();
}
