//! Real traffic between namespaces through ports and nothing else. Needs root (or a user namespace).

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::sync::atomic::Ordering::SeqCst;

use common::{End, Forwarder, Lab, both_ways, internal, test_frame};
use frame::{Pool, VlanTag};
use vport::{AttachOptions, HideChoice, InternalOptions, TxOutcome, TxRefusal, create_internal};

#[test]
fn ping_and_tcp_pass_between_veths_with_default_offloads() {
    let lab = Lab::new(1500);
    let forwarder = lab.forward();
    both_ways(&lab, &forwarder, 1500);
    for port in &forwarder.ports {
        assert!(
            port.mode().starts_with("af_packet, vnet_hdr, hidden by "),
            "{}",
            port.mode()
        );
    }
}

#[test]
fn jumbo_frames_pass() {
    let lab = Lab::new(9000);
    let forwarder = lab.forward();
    both_ways(&lab, &forwarder, 9000);
}

#[test]
fn past_the_qdisc_and_on_several_queues_tcp_passes_too() {
    let lab = Lab::new(1500);
    let options = AttachOptions {
        queues: 3,
        qdisc_bypass: true,
        ..AttachOptions::default()
    };
    let ports = ["pa", "pb"].map(|name| lab.switch.attach(name, options.clone()));
    assert!(
        ports[0].mode().contains("3 queues, past the qdisc"),
        "{}",
        ports[0].mode()
    );
    let [a, b] = ports;
    let forwarder = Forwarder::new(a, b);
    both_ways(&lab, &forwarder, 1500);
}

/// A lab without its veths' addresses: only the switch matters.
fn bare() -> Lab {
    let lab = Lab::new(1500);
    lab.a.ip("addr flush dev eth0");
    lab.b.ip("addr flush dev eth0");
    lab
}

#[test]
fn tap_to_veth_passes_ping_and_tcp() {
    let lab = bare();
    lab.b.ip("addr add 10.9.0.2/24 dev eth0");
    let tap = internal(&lab, &lab.a, "int0", "10.9.0.1", false);
    assert_eq!(tap.driver().name(), "tap");
    let forwarder = Forwarder::new(tap, lab.switch.attach("pb", AttachOptions::default()));
    both_ways(&lab, &forwarder, 1500);
}

#[test]
fn tap_to_tap_passes_ping_and_tcp() {
    let lab = bare();
    let a = internal(&lab, &lab.a, "int0", "10.9.0.1", false);
    let b = internal(&lab, &lab.b, "int1", "10.9.0.2", false);
    let forwarder = Forwarder::new(a, b);
    both_ways(&lab, &forwarder, 1500);
}

#[test]
fn an_internal_port_made_of_a_veth_pair_passes_ping_and_tcp() {
    let lab = bare();
    lab.b.ip("addr add 10.9.0.2/24 dev eth0");
    let veth = internal(&lab, &lab.a, "int0", "10.9.0.1", true);
    assert_eq!(veth.driver().name(), "veth");
    assert!(veth.mode().contains("no TAP (as asked)"), "{}", veth.mode());
    let forwarder = Forwarder::new(veth, lab.switch.attach("pb", AttachOptions::default()));
    both_ways(&lab, &forwarder, 1500);
}

/// Raw ends in both hosts.
fn ends(lab: &Lab) -> (End, End) {
    let options = AttachOptions {
        hide: HideChoice::Off,
        ..AttachOptions::default()
    };
    (
        End::new(lab.a.attach("eth0", options.clone())),
        End::new(lab.b.attach("eth0", options)),
    )
}

#[test]
fn tags_come_out_of_band_and_go_out_in_band() {
    let lab = Lab::new(1500);
    let _forwarder = lab.forward();
    let (mut a, mut b) = ends(&lab);
    let tags = [
        None,
        Some((0x8100, 0x0005)),
        Some((0x8100, 0xe064)),
        Some((0x88a8, 0x3fff)),
    ];
    for tag in tags {
        for len in [60, 100, 1000, 1514] {
            let mut frame = test_frame(len, len as u8);
            frame.vlan = tag.map(|(tpid, tci)| VlanTag { tpid, tci });
            let outcome = a.send(frame.clone());
            assert_eq!(
                (outcome.packets, outcome.refused_total()),
                (1, 0),
                "{tag:?}, {len} bytes"
            );
            assert_eq!(outcome.bytes, frame.wire_len() as u64);
            let got = b
                .next(2000)
                .unwrap_or_else(|| panic!("{tag:?}, {len} bytes: lost"));
            assert_eq!(got.vlan, frame.vlan, "{len} bytes");
            assert_eq!(got.bytes(), frame.bytes(), "{tag:?}, {len} bytes");
        }
    }
}

#[test]
fn two_tags_pass_the_inner_one_in_band() {
    let lab = Lab::new(1500);
    let _forwarder = lab.forward();
    let (mut a, mut b) = ends(&lab);
    for outer in [0x8100, 0x88a8] {
        let mut frame = test_frame(1000, 9);
        frame.insert(12, &[0x81, 0, 0, 7]).unwrap();
        frame.vlan = Some(VlanTag {
            tpid: outer,
            tci: 3,
        });
        assert_eq!(a.send(frame.clone()).packets, 1);
        let got = b.next(2000).unwrap();
        assert_eq!((got.vlan, got.bytes()), (frame.vlan, frame.bytes()));
    }
}

/// TCP through two switches with a tagged veth between them.
fn trunk(tpid: u16) {
    let lab = Lab::new(1500);
    lab.switch.ip("link add trunk0 type veth peer name trunk1");
    lab.switch.ip("link set trunk0 up");
    lab.switch.ip("link set trunk1 up");
    let tag = VlanTag { tpid, tci: 0x6005 };
    let switch = |access: &str, trunk: &str| {
        let [access, trunk] =
            [access, trunk].map(|name| lab.switch.attach(name, AttachOptions::default()));
        Forwarder::with(access, trunk, move |to, frame| {
            // What comes from the trunk without that tag is none of the hosts'.
            frame.vlan = match (to, frame.vlan) {
                (0, Some(got)) if got == tag => None,
                (0, other) => other.or(Some(VlanTag { tpid, tci: 0x0fff })),
                (_, _) => Some(tag),
            };
        })
    };
    let left = switch("pa", "trunk0");
    let _right = switch("pb", "trunk1");
    both_ways(&lab, &left, 1500);
    assert_eq!(left.seen.refused.load(SeqCst), 0, "{:?}", left.seen);
}

#[test]
fn tcp_with_default_offloads_passes_a_trunk_tagged_8021q() {
    trunk(0x8100);
}

#[test]
fn tcp_with_default_offloads_passes_a_trunk_tagged_8021ad() {
    trunk(0x88a8);
}

#[test]
fn tags_cross_a_tap_in_band() {
    let lab = bare();
    let tap = internal(&lab, &lab.a, "int0", "10.9.0.1", false);
    let mut tap = End::new(tap);
    let options = AttachOptions {
        hide: HideChoice::Off,
        ..AttachOptions::default()
    };
    let mut host = End::new(lab.a.attach("int0", options));
    for tpid in [0x8100, 0x88a8] {
        let mut frame = test_frame(1514, 3);
        frame.vlan = Some(VlanTag { tpid, tci: 0x2007 });
        assert_eq!(tap.send(frame.clone()).packets, 1);
        let got = host.next(2000).unwrap();
        assert_eq!((got.vlan, got.bytes()), (frame.vlan, frame.bytes()));
        assert_eq!(host.send(frame.clone()).packets, 1, "{tpid:x}");
        let mut got = tap.next(2000).unwrap();
        assert_eq!((got.vlan, got.len()), (None, 1518));
        assert!(got.pop_tag_outofband());
        assert_eq!((got.vlan, got.bytes()), (frame.vlan, frame.bytes()));
    }
}

#[test]
fn several_threads_may_send_on_one_port_at_once() {
    let lab = Lab::new(1500);
    let _forwarder = lab.forward();
    let (a, mut b) = ends(&lab);
    const EACH: usize = 500;
    let outcomes: Vec<TxOutcome> = std::thread::scope(|scope| {
        let sender = |thread: u8| {
            let port = &a.port;
            scope.spawn(move || {
                let (mut pool, mut outcome) = (Pool::default(), TxOutcome::default());
                for n in 0..EACH {
                    let mut frame = test_frame(1514, thread);
                    // Every other one by the transmit ring.
                    frame.vlan = (n % 2 == 0).then_some(VlanTag {
                        tpid: 0x88a8,
                        tci: 1,
                    });
                    port.transmit(&mut vec![frame], &mut pool, &mut outcome);
                }
                outcome
            })
        };
        let threads: Vec<_> = (1..=4).map(sender).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut sent = [0; 5];
    for (outcome, sent) in outcomes.iter().zip(&mut sent[1..]) {
        assert_eq!(outcome.packets + outcome.refused_total(), EACH as u64);
        *sent = outcome.packets;
    }
    let mut received = [0; 5];
    while let Some(frame) = b.next(500) {
        let mark = frame.bytes()[14];
        assert_eq!(
            frame.bytes(),
            test_frame(1514, mark).bytes(),
            "a frame was mixed up"
        );
        received[usize::from(mark)] += 1;
    }
    assert_eq!(received, sent);
}

#[test]
fn a_frame_that_is_too_long_is_refused_as_such() {
    let lab = Lab::new(1500);
    let (mut a, _b) = ends(&lab);
    let outcome = a.send(test_frame(1515, 0));
    assert_eq!(
        (outcome.packets, outcome.refused_for(TxRefusal::TooLong)),
        (0, 1)
    );
    let tap = lab
        .switch
        .run(|| create_internal("int0", &InternalOptions::default()).unwrap());
    lab.switch.ip("link set int0 up");
    let mut tap = End::new(tap);
    assert_eq!(
        tap.send(test_frame(1515, 0))
            .refused_for(TxRefusal::TooLong),
        1
    );
    assert_eq!(tap.send(test_frame(1514, 0)).packets, 1);
    lab.switch.ip("link set int0 mtu 2000");
    tap.port.link_changed(&lab.switch.link("int0"));
    assert_eq!(tap.send(test_frame(1515, 0)).packets, 1);
}

#[test]
fn frames_for_others_are_captured() {
    let lab = Lab::new(1500);
    let _forwarder = lab.forward();
    let (mut a, mut b) = ends(&lab);
    assert_eq!(lab.b.link("eth0").promiscuity, 1);
    a.send(test_frame(60, 1));
    assert!(b.next(2000).is_some());
    drop(b);
    assert_eq!(lab.b.link("eth0").promiscuity, 0);
}

#[test]
fn a_port_does_not_receive_what_it_sends() {
    let lab = Lab::new(1500);
    let _forwarder = lab.forward();
    let (mut a, mut b) = ends(&lab);
    a.send(test_frame(60, 1));
    assert!(b.next(2000).is_some());
    assert!(a.next(200).is_none());
}
