//! What isn't built is refused quietly; what newer kernels know is taken as they take it; what an
//! executed packet's key may say.

#![allow(clippy::unwrap_used)] // helpers of tests

use datapath::codec::{Limits, action, key};
use flow::action::Action;
use flow::key::{Key, PORT_NONE};
use netlink::Errno;
use netlink::attr::Writer;

const ALL: Limits = Limits { conntrack: true };
const NO_CONNTRACK: Limits = Limits { conntrack: false };

const ETHERNET: u16 = 4;
const ETHERTYPE: u16 = 6;
const CT_STATE: u16 = 22;
const CT_ORIG_TUPLE_IPV4: u16 = 26;

/// A frame of this type, and more.
fn attrs(eth_type: u16, more: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes);
    writer.bytes(ETHERNET, &[2; 12]).unwrap();
    writer.be16(ETHERTYPE, eth_type);
    more(&mut writer);
    bytes
}

#[test]
fn without_conntrack_only_untracked_packets_are_matched() {
    let untracked = attrs(0x1234, |w| w.u32(CT_STATE, 0));
    let tracked = attrs(0x1234, |w| w.u32(CT_STATE, 0x20));
    assert!(key::parse_match(&tracked, None, ALL).is_ok());
    assert_eq!(
        key::parse_match(&tracked, None, NO_CONNTRACK),
        Err(Errno::EINVAL)
    );
    assert_eq!(
        key::parse_metadata(&tracked, NO_CONNTRACK).unwrap_err(),
        Errno::EINVAL
    );
    assert!(key::parse_match(&untracked, None, NO_CONNTRACK).is_ok());
    let asked = key::parse_match(&untracked, Some(&tracked), NO_CONNTRACK);
    assert_eq!(asked, Err(Errno::EINVAL));
    assert!(key::parse_match(&untracked, Some(&tracked), ALL).is_ok());
}

#[test]
fn without_conntrack_its_actions_are_refused() {
    let ip = Key {
        eth_type: 0x0800.into(),
        mac_proto: 1,
        ..Key::ZERO
    };
    for kind in [12, 16] {
        let list = [4, 0, kind, 0];
        assert_eq!(
            action::parse_exact(&list, &ip, ALL).unwrap().program.len(),
            1
        );
        assert_eq!(
            action::parse_exact(&list, &ip, NO_CONNTRACK).unwrap_err(),
            Errno::EINVAL
        );
    }
}

#[test]
fn drop_comes_last_and_psample_is_unknown() {
    let parse = |list: &[u8]| action::parse_exact(list, &Key::ZERO, ALL);
    let drop = [8, 0, 24, 0, 7, 0, 0, 0];
    let output = [8, 0, 1, 0, 2, 0, 0, 0];
    assert!(matches!(
        parse(&drop).unwrap().program[..],
        [Action::Drop(7)]
    ));
    assert!(parse(&[output, drop].concat()).is_ok());
    assert_eq!(parse(&[drop, output].concat()).unwrap_err(), Errno::EINVAL);
    assert_eq!(parse(&[4, 0, 25, 0]).unwrap_err(), Errno::EINVAL);
}

#[test]
fn an_executed_packet_has_no_port_unless_told() {
    let metadata = key::parse_metadata(&[], ALL).unwrap();
    assert_eq!(
        metadata.key,
        Key {
            in_port: PORT_NONE,
            mac_proto: 1,
            ..Key::ZERO
        }
    );
}

#[test]
fn an_executed_packet_without_ethernet_header_tells_its_type() {
    let mut layer3 = Vec::new();
    Writer::new(&mut layer3).be16(ETHERTYPE, 0x0800);
    let metadata = key::parse_metadata(&layer3, ALL).unwrap().key;
    assert_eq!((metadata.mac_proto, metadata.eth_type.get()), (0, 0x0800));
    let frame = key::parse_metadata(&attrs(0x0800, |_| {}), ALL)
        .unwrap()
        .key;
    assert_eq!((frame.mac_proto, frame.eth_type.get()), (1, 0));
}

#[test]
fn an_original_tuple_must_be_of_the_packets_family() {
    let tuple = attrs(0x0800, |w| w.bytes(CT_ORIG_TUPLE_IPV4, &[1; 16]).unwrap());
    let metadata = key::parse_metadata(&tuple, ALL).unwrap();
    let extracted = |eth_type: u16| Key {
        eth_type: eth_type.into(),
        ..Key::ZERO
    };
    assert_eq!(metadata.check(&extracted(0x0800)), Ok(()));
    assert_eq!(metadata.check(&extracted(0x86dd)), Err(Errno::EINVAL));
}
