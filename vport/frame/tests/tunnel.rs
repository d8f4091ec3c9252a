//! Tunnels' headers: nothing that comes makes a parser panic or read what isn't there, and what is written
//! is read again.

use frame::Frame;
use frame::tunnel::vxlan::Extensions;
use frame::tunnel::{
    Payload, TunnelKey, V4, V6, ecn, erspan, geneve, gre, outer, too_big, tunnel_flags, vxlan,
};
use frame::{Gso, GsoKind, Pool};
use proptest::collection::vec;
use proptest::prelude::*;

/// Bytes that begin like something: noise alone doesn't get far.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let begin = prop_oneof![
        Just(vec![]),
        Just(vec![0x45, 0, 0, 60, 0, 0, 0, 0, 64, 17]),
        Just(vec![0x60, 0, 0, 0, 0, 60, 17, 64]),
        Just(vec![0x08, 0, 0, 0]),
        Just(vec![0x88, 0x48, 1, 2]),
        Just(vec![0x0c, 0, 0, 3]),
        Just(vec![0x02, 0x40, 0x65, 0x58]),
        Just(vec![0xb0, 0, 0x65, 0x58]),
        Just(vec![0x10, 0, 0x88, 0xbe, 0, 0, 0, 1, 0x10]),
        Just(vec![0x30, 0, 0x22, 0xeb, 0, 0, 0, 1, 0, 0, 0, 2, 0x20]),
        Just(vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00, 0x45]),
        Just(vec![
            2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x81, 0, 0, 5, 0x86, 0xdd, 0x60
        ]),
    ];
    (begin, vec(any::<u8>(), 0..400)).prop_map(|(mut begin, rest)| {
        begin.extend(rest);
        begin
    })
}

fn key() -> impl Strategy<Value = TunnelKey> {
    let options = (0..=63_usize).prop_flat_map(|words| vec(any::<u8>(), words * 4));
    (
        any::<[u8; 16]>(),
        any::<[u8; 8]>(),
        any::<u16>(),
        any::<bool>(),
        options,
    )
        .prop_map(|(address, id, flags, v6, options)| {
            let mut key = TunnelKey::none();
            key.family = if v6 { V6 } else { V4 };
            key.src = address;
            key.id = u64::from_be_bytes(id).into();
            key.flags = flags & (tunnel_flags::KEY | tunnel_flags::CSUM | tunnel_flags::OAM);
            if !options.is_empty() {
                key.set_options(tunnel_flags::GENEVE_OPT, &options);
            }
            key
        })
}

proptest! {
    #[test]
    fn whatever_comes_is_read_within_its_bounds(bytes in packet(), vouched in any::<bool>(), extensions in 0..4_u8) {
        let speaks = Extensions { gbp: extensions & 1 != 0, gpe: extensions & 2 != 0 };
        let mut key = TunnelKey::none();
        if let Ok(ip) = outer::ip(&bytes, &mut key) {
            prop_assert!(ip.header <= bytes.len() && ip.header <= ip.length);
        }
        let _ = outer::udp(&bytes, vouched, &mut key);
        let parsed = [
            vxlan::parse(&bytes, speaks, &mut TunnelKey::none()),
            geneve::parse(&bytes, &mut TunnelKey::none()),
            gre::parse(&bytes, vouched, &mut TunnelKey::none()),
            erspan::parse(&bytes, vouched, &mut TunnelKey::none()),
        ];
        for inner in parsed.into_iter().flatten() {
            prop_assert!(inner.header <= bytes.len());
        }
    }

    #[test]
    fn any_frame_can_be_marked_and_answered(bytes in packet(), outer in any::<u8>(), mtu in 0..70_000_usize, size in 0..3000_u16) {
        let mut frame = Frame::from_bytes(&bytes);
        let len = frame.len();
        let _ = ecn::decapsulate(outer, &mut frame);
        prop_assert_eq!(frame.len(), len);
        for kind in [None, Some(GsoKind::TcpV4), Some(GsoKind::TcpV6), Some(GsoKind::UdpL4), Some(GsoKind::UdpFragments)] {
            frame.offload.gso = kind.map(|kind| Gso { kind, ecn: false, size, header_len: 0 });
            prop_assert!(too_big::longest_packet(&frame) <= len);
        }
        if let Some(answer) = too_big::answer(&frame, mtu, &mut Pool::default()) {
            prop_assert!(answer.len() <= len + 48 + 40);
            // Nobody is told of an answer itself.
            prop_assert!(too_big::answer(&answer, mtu, &mut Pool::default()).is_none());
        }
    }

    #[test]
    fn what_is_written_is_read_again(key in key(), payload in vec(any::<u8>(), 14..200)) {
        let vni = key.id.get() & 0xff_ffff;
        let mut frame = Frame::from_bytes(&payload);
        geneve::push(&mut frame, &key).unwrap();
        prop_assert_eq!(frame.len(), payload.len() + geneve::length(&key));
        let mut read = TunnelKey::none();
        let inner = geneve::parse(frame.bytes(), &mut read).unwrap();
        prop_assert_eq!(&frame.bytes()[inner.header..], &payload[..]);
        prop_assert_eq!((read.id.get(), read.options()), (vni, key.options()));
        prop_assert_eq!(read.has(tunnel_flags::OAM), key.has(tunnel_flags::OAM));

        let mut frame = Frame::from_bytes(&payload);
        gre::push(&mut frame, &key).unwrap();
        let mut read = TunnelKey::none();
        let inner = gre::parse(frame.bytes(), false, &mut read).unwrap();
        prop_assert_eq!(&frame.bytes()[inner.header..], &payload[..]);
        prop_assert_eq!(read.has(tunnel_flags::KEY), key.has(tunnel_flags::KEY));

        let mut frame = Frame::from_bytes(&payload);
        let plain = Extensions::default();
        vxlan::push(&mut frame, plain, &key, Payload::Ethernet).unwrap();
        let mut read = TunnelKey::none();
        let inner = vxlan::parse(frame.bytes(), plain, &mut read).unwrap();
        prop_assert_eq!(&frame.bytes()[inner.header..], &payload[..]);
        prop_assert_eq!(read.id.get(), vni);
    }
}
