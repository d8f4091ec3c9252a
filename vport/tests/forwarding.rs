//! Real traffic between namespaces through ports and nothing else. Needs root (or a user namespace).

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use common::{End, Forwarder, Lab, both_ways, internal, test_frame};
use frame::VlanTag;
use vport::{AttachOptions, HideChoice, InternalOptions, TxRefusal, create_internal};

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
