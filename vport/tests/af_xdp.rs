//! AF_XDP ports on veth pairs, in the modes that a veth has: native and generic copy. Needs root.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::{
    End, Forwarder, Lab, Netns, eventually, is_test_frame, ping, tcp_transfer, test_frame, wait,
};
use frame::{Frame, Pool, VlanTag};
use vport::{AttachOptions, DriverChoice, Port, RxStatus, TxOutcome, TxRefusal, XdpMode, attach};

const MODES: [(XdpMode, &str); 2] = [
    (XdpMode::Native, "native copy"),
    (XdpMode::Generic, "generic"),
];

fn options(xdp: XdpMode) -> AttachOptions {
    AttachOptions {
        driver: DriverChoice::AfXdp,
        xdp,
        ..AttachOptions::default()
    }
}

fn forward(lab: &Lab, xdp: XdpMode) -> Forwarder {
    Forwarder::new(
        lab.switch.attach("pa", options(xdp)),
        lab.switch.attach("pb", options(xdp)),
    )
}

/// Checksums in the packets, as AF_XDP needs them.
fn finish_checksums(lab: &Lab) {
    for host in [&lab.a, &lab.b] {
        host.command("ethtool -K eth0 tx off");
    }
}

/// One datagram of each size there and back.
fn echo_datagrams(lab: &Lab, sizes: impl IntoIterator<Item = usize>) {
    let bind = |address: &'static str| {
        move || {
            let socket = UdpSocket::bind(address).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            socket
        }
    };
    let (a, b) = (
        lab.a.run(bind("10.9.0.1:7007")),
        lab.b.run(bind("10.9.0.2:7007")),
    );
    let mut buffer = vec![0; 2000];
    for size in sizes {
        let sent: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
        for (from, to, address) in [(&a, &b, "10.9.0.2:7007"), (&b, &a, "10.9.0.1:7007")] {
            from.send_to(&sent, address).unwrap();
            let (n, _) = to
                .recv_from(&mut buffer)
                .unwrap_or_else(|error| panic!("{size} bytes to {address}: {error}"));
            assert_eq!(buffer[..n], sent, "{size} bytes to {address}");
        }
    }
}

#[test]
fn ping_udp_and_tcp_pass_in_each_mode() {
    for (xdp, name) in MODES {
        let lab = Lab::new(1500);
        let forwarder = forward(&lab, xdp);
        for port in &forwarder.ports {
            let mode = port.mode();
            assert!(
                mode.starts_with(&format!("af_xdp, {name}, 1 queue")),
                "{mode}"
            );
        }
        finish_checksums(&lab);
        ping(&lab.a, "10.9.0.2", 3, 56);
        ping(&lab.b, "10.9.0.1", 3, 1472);
        // 64 to 1514 bytes on the wire.
        echo_datagrams(&lab, (22..=1472).step_by(29).chain([1471, 1472]));
        tcp_transfer(&lab.a, &lab.b, "10.9.0.2", 8 << 20);
        tcp_transfer(&lab.b, &lab.a, "10.9.0.1", 8 << 20);
        let seen = &forwarder.seen;
        assert_eq!(seen.rx_errors.load(SeqCst), 0, "{seen:?}");
        assert_eq!(seen.gso.load(SeqCst) + seen.partial.load(SeqCst), 0);
        assert!(seen.frames.load(SeqCst) > 5000, "{seen:?}");
    }
}

#[test]
fn afxdp_asked_for_by_name_takes_the_best_rung_and_says_why_not_a_better_one() {
    let lab = Lab::new(1500);
    let mode = lab.switch.attach("pa", options(XdpMode::Auto)).mode();
    assert!(mode.starts_with("af_xdp, native copy, "), "{mode}");
    assert!(
        mode.contains("(not zero copy: bind to queue 0: Operation not supported"),
        "{mode}"
    );
    // Unasked a veth never gets it.
    let mode = lab.switch.attach("pa", AttachOptions::default()).mode();
    assert!(mode.starts_with("af_packet, "), "{mode}");
    // And asked for what there isn't, it is refused.
    let error = refused(&lab.switch, "pa", XdpMode::ZeroCopy);
    assert_eq!(error.errno(), libc::EOPNOTSUPP, "{error}");
}

fn refused(netns: &Netns, name: &'static str, xdp: XdpMode) -> vport::Error {
    netns.run(move || attach(name, &options(xdp)).err().unwrap())
}

#[test]
fn the_hosts_stack_sees_nothing_while_the_port_is_open() {
    for (xdp, _) in MODES {
        let lab = Lab::new(1500);
        lab.switch.ip("addr add 10.9.0.9/24 dev pa");
        ping(&lab.a, "10.9.0.9", 1, 56);
        let port = lab.switch.attach("pa", options(xdp));
        let command = "ping -n -q -c 1 -W 1 10.9.0.9";
        let answered = lab.a.run(move || {
            let words: Vec<_> = command.split(' ').collect();
            let status = std::process::Command::new(words[0])
                .args(&words[1..])
                .output()
                .unwrap()
                .status;
            status.success()
        });
        assert!(!answered, "the host's stack still answers: {}", port.mode());
        drop(port);
        lab.a.ip("neigh flush all");
        ping(&lab.a, "10.9.0.9", 1, 56);
    }
}

/// `count` numbered frames from one end to the other, in bursts larger than a kick sends.
fn numbered(from: &mut End, to: &mut End, count: u32) {
    let (mut sent, mut expected, mut out) = (0u32, 0u32, Vec::new());
    let mut idle = 0;
    while expected < count {
        let burst = (count - sent).min(200);
        let mut frames: Vec<Frame> = (sent..sent + burst)
            .map(|n| {
                let mut frame = test_frame(60 + n as usize % 1400, 7);
                frame.bytes_mut()[14..18].copy_from_slice(&n.to_be_bytes());
                frame
            })
            .collect();
        let mut outcome = TxOutcome::default();
        from.port
            .transmit(&mut frames, &mut from.pool, &mut outcome);
        assert_eq!(
            (outcome.packets, outcome.refused_total()),
            (burst.into(), 0)
        );
        sent += burst;
        while expected < sent {
            wait([to.queue.as_fd()].into_iter(), 100);
            to.queue.receive(&mut to.pool, &mut out, 32).unwrap();
            idle = if out.is_empty() { idle + 1 } else { 0 };
            assert!(idle < 50, "{expected} of {sent} frames came");
            for frame in out.drain(..) {
                if is_test_frame(&frame) {
                    assert_eq!(frame.len(), 60 + expected as usize % 1400);
                    assert_eq!(frame.bytes()[14..18], expected.to_be_bytes());
                    expected += 1;
                }
                to.pool.put(frame);
            }
        }
    }
}

#[test]
fn bursts_arrive_whole_and_in_order_through_many_turns_of_the_rings() {
    for (xdp, _) in MODES {
        let lab = Lab::new(1500);
        let mut a = End::new(lab.a.attach("eth0", options(xdp)));
        let mut b = End::new(lab.switch.attach("pa", options(xdp)));
        numbered(&mut a, &mut b, 20_000);
        numbered(&mut b, &mut a, 20_000);
        for end in [&a, &b] {
            assert_eq!(end.port.host_counters(), vport::HostCounters::default());
        }
    }
}

#[test]
fn several_threads_send_at_once_and_no_frame_is_lost() {
    let lab = Lab::new(1500);
    let port: Arc<dyn Port> = lab.a.attach("eth0", options(XdpMode::Native)).into();
    let mut b = End::new(lab.switch.attach("pa", options(XdpMode::Native)));
    let threads: Vec<_> = (0..4u8)
        .map(|mark| {
            let port = Arc::clone(&port);
            std::thread::spawn(move || {
                let (mut pool, mut outcome) = (Pool::default(), TxOutcome::default());
                for _ in 0..20 {
                    let mut frames = (0..20).map(|_| test_frame(100, mark)).collect();
                    port.transmit(&mut frames, &mut pool, &mut outcome);
                }
                outcome
            })
        })
        .collect();
    for thread in threads {
        let outcome = thread.join().unwrap();
        assert_eq!(
            (outcome.packets, outcome.bytes),
            (400, 40_000),
            "{outcome:?}"
        );
    }
    let mut count = 0;
    while let Some(frame) = b.next(300) {
        assert_eq!(frame.len(), 100);
        count += 1;
    }
    assert_eq!(count, 1600);
}

#[test]
fn tags_go_out_in_band() {
    for (xdp, _) in MODES {
        let lab = Lab::new(1500);
        let mut a = End::new(lab.a.attach("eth0", options(xdp)));
        let mut b = End::new(lab.switch.attach("pa", options(xdp)));
        for len in [60, 1514] {
            let mut frame = test_frame(len, 3);
            frame.vlan = Some(VlanTag {
                tpid: 0x88a8,
                tci: 0xe123,
            });
            let outcome = a.send(frame.clone());
            assert_eq!((outcome.packets, outcome.bytes), (1, len as u64 + 4));
            let mut got = b.next(2000).unwrap();
            assert_eq!(got.len(), len + 4);
            assert!(got.pop_tag_outofband());
            assert_eq!(got, frame);
        }
    }
}

#[test]
fn what_a_port_can_not_send_is_refused_by_reason() {
    let lab = Lab::new(1500);
    let mut a = End::new(lab.a.attach("eth0", options(XdpMode::Native)));
    let mut b = End::new(lab.switch.attach("pa", options(XdpMode::Native)));
    assert_eq!(
        a.send(test_frame(1515, 0)).refused_for(TxRefusal::TooLong),
        1
    );
    let mut partial = test_frame(100, 0);
    partial.offload.csum = Some(frame::PartialChecksum {
        start: 34,
        offset: 16,
    });
    assert_eq!(a.send(partial).refused_for(TxRefusal::Error), 1);
    assert_eq!(
        a.send(Frame::from_bytes(&[1; 13]))
            .refused_for(TxRefusal::Error),
        1
    );
    // In a batch, what is good goes.
    let mut frames = vec![test_frame(60, 1), test_frame(1515, 2), test_frame(61, 3)];
    let mut outcome = TxOutcome::default();
    a.port.transmit(&mut frames, &mut a.pool, &mut outcome);
    assert_eq!(
        (outcome.packets, outcome.bytes, outcome.refused_total()),
        (2, 121, 1)
    );
    assert_eq!(b.next(2000).unwrap().len(), 60);
    assert_eq!(b.next(2000).unwrap().len(), 61);
}

#[test]
fn a_port_that_is_down_refuses_and_comes_back_without_old_frames() {
    for (xdp, _) in MODES {
        let lab = Lab::new(1500);
        let mut a = End::new(lab.a.attach("eth0", options(xdp)));
        let mut b = End::new(lab.switch.attach("pa", options(xdp)));
        lab.a.ip("link set eth0 down");
        for _ in 0..3 {
            let mut frames = (0..40).map(|_| test_frame(60, 1)).collect();
            let mut outcome = TxOutcome::default();
            a.port.transmit(&mut frames, &mut a.pool, &mut outcome);
            assert_eq!(
                (outcome.packets, outcome.refused_for(TxRefusal::Down)),
                (0, 40)
            );
        }
        assert!(a.next(50).is_none());
        lab.a.ip("link set eth0 up");
        eventually("the carrier is back", || {
            lab.switch.link("pa").flags & libc::IFF_RUNNING as u32 != 0
        });
        assert_eq!(a.send(test_frame(99, 2)).packets, 1);
        assert_eq!(b.next(2000).unwrap().len(), 99, "an old frame went out");
        assert!(b.next(100).is_none());
        numbered(&mut a, &mut b, 5000);
        numbered(&mut b, &mut a, 5000);
    }
}

#[test]
fn a_device_deleted_or_moved_with_frames_under_way_is_gone() {
    for (xdp, _) in MODES {
        for moved in [false, true] {
            let lab = Lab::new(1500);
            let mut end = End::new(lab.switch.attach("pa", options(xdp)));
            let mut other = End::new(lab.a.attach("eth0", options(xdp)));
            // Some in the receive ring, some sent, none read.
            for _ in 0..20 {
                let mut frames = (0..100).map(|_| test_frame(60, 1)).collect();
                other
                    .port
                    .transmit(&mut frames, &mut other.pool, &mut TxOutcome::default());
                let mut frames = (0..100).map(|_| test_frame(60, 1)).collect();
                end.port
                    .transmit(&mut frames, &mut end.pool, &mut TxOutcome::default());
            }
            if moved {
                lab.switch
                    .ip(&format!("link set pa netns {}", lab.b.path()));
            } else {
                lab.switch.ip("link del pa");
            }
            // An AF_XDP descriptor doesn't become readable then: the monitor of links tells.
            let mut frames = Vec::new();
            eventually("the queue says Gone", || {
                end.queue.receive(&mut end.pool, &mut frames, 32).unwrap() == RxStatus::Gone
            });
            assert!(
                frames.len() >= 1000,
                "{} frames that were there",
                frames.len()
            );
            assert_eq!(end.send(test_frame(60, 1)).refused_for(TxRefusal::Gone), 1);
            let again = end.queue.receive(&mut end.pool, &mut frames, 32).unwrap();
            assert_eq!(again, RxStatus::Gone);
            end.port.host_counters();
            end.port.mode();
            if moved {
                // The program goes with the port, wherever the device is.
                let b = &lab.b;
                b.ip("link set pa up");
                drop(end);
                assert_eq!(b.link("pa").xdp, None);
                b.attach("pa", options(xdp));
            }
        }
    }
}

#[test]
fn every_queue_of_a_device_is_read() {
    let lab = Lab::new(1500);
    lab.switch.ip("link del pa");
    lab.switch
        .ip("link add pa numrxqueues 2 numtxqueues 2 type veth peer name eth0 numrxqueues 2 numtxqueues 2");
    lab.switch
        .ip(&format!("link set eth0 netns {}", lab.a.path()));
    lab.switch.ip("link set pa up");
    lab.a.ip("link set eth0 up");
    for (xdp, _) in MODES {
        let port = lab.switch.attach("pa", options(xdp));
        assert!(port.mode().contains(", 2 queues of "), "{}", port.mode());
        let mut queues = port.open_queues().unwrap();
        assert_eq!(queues.len(), 2);
        let mut counts = [0, 0];
        let (mut pool, mut frames) = (Pool::default(), Vec::new());
        // A veth's transmit queue is the receive queue of its peer; an AF_XDP port has one for each
        // of two threads that were started one after the other.
        let peer: Arc<dyn Port> = lab.a.attach("eth0", options(xdp)).into();
        for _ in 0..8 {
            let peer = Arc::clone(&peer);
            std::thread::spawn(move || {
                let mut frames = vec![test_frame(60, 1)];
                peer.transmit(&mut frames, &mut Pool::default(), &mut TxOutcome::default());
            })
            .join()
            .unwrap();
        }
        eventually("all eight came", || {
            for (queue, count) in queues.iter_mut().zip(&mut counts) {
                queue.receive(&mut pool, &mut frames, 32).unwrap();
                *count += frames.drain(..).filter(is_test_frame).count();
            }
            counts[0] + counts[1] == 8
        });
        // Before the driver has a program of its own, a veth doesn't say which queue it was.
        let queues_used = counts.iter().filter(|count| **count > 0).count();
        assert_eq!(
            queues_used,
            if xdp == XdpMode::Native { 2 } else { 1 },
            "{counts:?}"
        );
        assert_eq!(port.open_queues().err().unwrap().errno(), libc::EBUSY);
    }
}

#[test]
fn an_mtu_that_does_not_fit_is_refused_in_words() {
    let lab = Lab::new(40_000);
    for xdp in [XdpMode::Auto, XdpMode::Native, XdpMode::Generic] {
        let error = refused(&lab.switch, "pa", xdp);
        assert_eq!(error.errno(), libc::EMSGSIZE);
        let text = error.to_string();
        assert!(
            text.contains("MTU 40000") && text.contains("30698 at most"),
            "{text}"
        );
    }
    // Fits a chunk, but not the driver: the next rung.
    for name in ["pa", "pb"] {
        lab.switch.ip(&format!("link set {name} mtu 3818"));
    }
    for host in [&lab.a, &lab.b] {
        host.ip("link set eth0 mtu 3818");
    }
    let mode = lab.switch.attach("pa", options(XdpMode::Auto)).mode();
    assert!(mode.starts_with("af_xdp, generic"), "{mode}");
    assert!(mode.contains("may not take it at MTU 3818"), "{mode}");
    let _forwarder = forward(&lab, XdpMode::Auto);
    ping(&lab.a, "10.9.0.2", 3, 3818 - 28);
}

#[test]
fn frames_beyond_a_chunk_are_counted_when_the_mtu_was_raised_under_the_port() {
    let lab = Lab::new(1500);
    let mut end = End::new(lab.switch.attach("pa", options(XdpMode::Generic)));
    for netns in [(&lab.switch, "pa"), (&lab.a, "eth0")] {
        netns.0.ip(&format!("link set {} mtu 9000", netns.1));
    }
    end.port.link_changed(&lab.switch.link("pa"));
    assert!(
        end.port
            .mode()
            .contains("FRAMES BEYOND 3840 BYTES ARE LOST")
    );
    assert_eq!(end.port.capabilities().max_frame, 4092);
    let mut peer = End::new(lab.a.attach("eth0", AttachOptions::default()));
    assert_eq!(peer.send(test_frame(5000, 1)).packets, 1);
    assert_eq!(peer.send(test_frame(3840, 2)).packets, 1);
    assert_eq!(end.next(2000).unwrap().len(), 3840);
    let counters = end.port.host_counters();
    assert_eq!((counters.queue_full, counters.rx_errors.truncated), (0, 1));
    assert_eq!(
        end.send(test_frame(4093, 1))
            .refused_for(TxRefusal::TooLong),
        1
    );
    assert_eq!(end.send(test_frame(4092, 1)).packets, 1);
    assert_eq!(peer.next(2000).unwrap().len(), 4092);
}

#[test]
fn what_nobody_reads_is_counted() {
    for (xdp, _) in MODES {
        let lab = Lab::new(1500);
        let mut end = End::new(lab.switch.attach("pa", options(xdp)));
        let mut peer = End::new(lab.a.attach("eth0", options(xdp)));
        let mut outcome = TxOutcome::default();
        for _ in 0..100 {
            let mut frames = (0..30).map(|_| test_frame(60, 1)).collect();
            peer.port
                .transmit(&mut frames, &mut peer.pool, &mut outcome);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(outcome.packets, 3000);
        let mut came = 0;
        while end.next(100).is_some() {
            came += 1;
        }
        let counters = end.port.host_counters();
        assert_eq!(came + counters.queue_full, 3000, "{counters:?}");
        assert_eq!(counters.rx_errors.total(), 0, "{counters:?}");
        assert!(counters.queue_full > 900, "{counters:?}");
        // And goes on.
        peer.send(test_frame(70, 1));
        assert_eq!(end.next(1000).unwrap().len(), 70);
    }
}

#[test]
fn another_program_on_the_device_is_ebusy_in_words() {
    let lab = Lab::new(1500);
    let first = lab.switch.attach("pa", options(XdpMode::Auto));
    let id = lab.switch.link("pa").xdp.unwrap();
    for xdp in [XdpMode::Auto, XdpMode::Native, XdpMode::Generic] {
        let error = refused(&lab.switch, "pa", xdp);
        assert_eq!(error.errno(), libc::EBUSY);
        let text = error.to_string();
        assert!(
            text.contains(&format!("another XDP program (id {id})")),
            "{text}"
        );
    }
    drop(first);
    lab.switch.attach("pa", options(XdpMode::Auto));
}

#[test]
fn what_a_port_changes_on_the_device_is_undone() {
    let lab = Lab::new(1500);
    let features = || lab.switch.command("ethtool -k pa");
    let before = features();
    let port = lab.switch.attach("pa", options(XdpMode::Native));
    assert_eq!(lab.switch.link("pa").promiscuity, 1);
    assert!(
        features().contains("rx-vlan-offload: off"),
        "{}",
        features()
    );
    assert!(
        port.mode().contains("VLAN stripping switched off"),
        "{}",
        port.mode()
    );
    drop(port);
    assert_eq!(features(), before);
    // Also under another name, with somebody else under the old one.
    let port = lab.switch.attach("pa", options(XdpMode::Native));
    lab.switch.ip("link set pa name px");
    lab.switch.ip("link set pb name pa");
    lab.switch.command("ethtool -K pa rxvlan off");
    drop(port);
    assert!(
        features().contains("rx-vlan-offload: off"),
        "{}",
        features()
    );
    lab.switch.ip("link set pa name pb");
    lab.switch.ip("link set px name pa");
    assert_eq!(features(), before);
    assert_eq!(lab.switch.link("pa").promiscuity, 0);
    assert_eq!(lab.switch.link("pa").xdp, None);
}
