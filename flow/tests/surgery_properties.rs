//! Pushing and popping: what is pushed can be popped, keys that are said to be valid are, and no
//! sequence of operations on no frame whatever panics.
// Helpers outside of the test functions may fail like those.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod oracle;

use flow::action::{Masked, NshFields, PortFields, SetField};
use flow::extract::{Metadata, PacketType, extract, update};
use flow::hash;
use flow::headers::Layers;
use flow::key::{FRAG_LATER, Key};
use flow::rewrite;
use frame::{Frame, Gso, GsoKind, PartialChecksum, Pool, Segments, VlanTag};
use oracle::{cases, hex};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use zerocopy::{FromBytes, IntoBytes};

fn originals() -> Vec<Vec<u8>> {
    let groups = ["sem_extract", "sem_rewrite", "sem_l2"];
    let cases = groups.iter().flat_map(|group| cases(group));
    cases
        .map(|case| hex(&case, "packet_in_hex").unwrap())
        .filter(|p| p.len() < 2000)
        .collect()
}

fn extracted(frame: &mut Frame) -> Option<(Key, Layers)> {
    let mut key = Key::ZERO;
    let layers = extract(frame, &Metadata::default(), &mut key).ok()?;
    Some((key, layers))
}

/// What an extraction from scratch makes of a packet that begins as `key` says.
fn fresh(frame: &Frame, key: &Key, layers: &Layers) -> Option<(Key, Layers)> {
    let packet_type = match key.mac_proto {
        0 => PacketType::L3(layers.protocol),
        _ => PacketType::Ethernet,
    };
    let mut fresh = Key::ZERO;
    let meta = Metadata {
        packet_type,
        ..Metadata::default()
    };
    let layers = extract(&mut frame.clone(), &meta, &mut fresh).ok()?;
    Some((fresh, layers))
}

#[test]
fn what_is_pushed_can_be_popped() {
    let mut done = 0;
    for bytes in originals() {
        let mut frame = Frame::from_bytes(&bytes);
        let Some((mut key, mut layers)) = extracted(&mut frame) else {
            continue;
        };
        let start = layers.network + 2;
        if frame.len() > usize::from(start) + 4 {
            frame.offload.csum = Some(PartialChecksum { start, offset: 2 });
        }
        let before = (frame.clone(), key, layers);
        let (f, k, l) = (&mut frame, &mut key, &mut layers);

        rewrite::push_vlan(f, k, l, 0x88a8, 0x1005).unwrap();
        rewrite::pop_vlan(f, k, l).unwrap();
        if !l.key_valid {
            update(f, k, l).unwrap();
        }
        assert_eq!((&*f, *k, *l), (&before.0, before.1, before.2));

        if f.vlan.is_some() || k.eth_type.get() < 0x600 {
            continue;
        }
        done += 1;
        let ethertype = k.eth_type.get();
        if l.network == 14 {
            rewrite::push_mpls(f, k, l, 0x5140.into(), 0x8847).unwrap();
            assert_eq!(f.bytes()[12..18], [0x88, 0x47, 0, 0, 0x51, 0x40]);
            rewrite::pop_mpls(f, k, l, ethertype).unwrap();
            update(f, k, l).unwrap();
            assert_eq!((&*f, *k, *l), (&before.0, before.1, before.2));

            let (src, dst) = (k.eth_src, k.eth_dst);
            rewrite::pop_eth(f, k, l).unwrap();
            rewrite::push_eth(f, k, l, src, dst).unwrap();
            update(f, k, l).unwrap();
            assert_eq!((&*f, *k, *l), (&before.0, before.1, before.2));
        }
        let header = [
            0x0f, 0xc6, 1, 9, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6,
        ];
        rewrite::push_nsh(f, k, l, &header).unwrap();
        assert_eq!((f.bytes()[3], k.mac_proto), (3, 0), "Ethernet is inside");
        rewrite::pop_nsh(f, k, l).unwrap();
        update(f, k, l).unwrap();
        assert_eq!((&*f, *k, *l), (&before.0, before.1, before.2));
    }
    assert!(done > 100, "{done}");
}

#[test]
fn no_operation_on_any_frame_panics() {
    let mut rng = SmallRng::seed_from_u64(21);
    let mut pool = Pool::new(64);
    let originals = originals();
    let (mut keys, mut operations, mut valid) = (0, 0, 0);
    // Left dirty from one to the next, as a worker's is.
    let mut key = Key::ZERO;
    for round in 0..150_000 {
        let original = &originals[round % originals.len()];
        let mut frame = pool.take(original.len());
        if round % 50 == 0 {
            let len = rng.random_range(0..200);
            rng.fill_bytes(&mut frame.space_mut()[..len]);
            frame.set_len(len);
        } else {
            frame.space_mut()[..original.len()].copy_from_slice(original);
            frame.set_len(original.len());
        }
        for _ in 0..rng.random_range(0..8) {
            let at = rng.random_range(0..100);
            if let Some(byte) = frame.bytes_mut().get_mut(at) {
                *byte = rng.random();
            }
        }
        if rng.random_range(0..4) == 0 {
            frame.truncate(rng.random_range(0..120));
        }
        if rng.random_range(0..4) == 0 {
            frame.vlan = Some(VlanTag {
                tpid: 0x8100,
                tci: rng.random(),
            });
        }
        if rng.random_range(0..4) == 0 {
            let (start, offset) = (rng.random_range(0..100), rng.random_range(0..20));
            frame.offload.csum = Some(PartialChecksum { start, offset });
        }
        if rng.random_range(0..8) == 0 {
            let kind = [
                GsoKind::TcpV4,
                GsoKind::TcpV6,
                GsoKind::UdpL4,
                GsoKind::UdpFragments,
            ];
            let kind = kind[rng.random_range(0..4)];
            frame.offload.gso = Some(Gso {
                kind,
                ecn: false,
                size: 40,
                header_len: 0,
            });
        }
        let packet_type = match rng.random_range(0..10) {
            0 => PacketType::L3([0x0800, 0x86dd, 0x894f, 0x8847, 0x6558][rng.random_range(0..5)]),
            _ => PacketType::Ethernet,
        };
        let meta = Metadata {
            packet_type,
            ..Metadata::default()
        };
        let Ok(mut layers) = extract(&mut frame, &meta, &mut key) else {
            pool.put(frame);
            continue;
        };
        keys += 1;
        let mut expected = Key::ZERO;
        let again = extract(&mut frame, &meta, &mut expected).unwrap();
        assert!(key == expected && layers == again, "{key:?}\n{expected:?}");
        for _ in 0..rng.random_range(0..8) {
            operations += 1;
            if operate(&mut rng, &mut frame, &mut key, &mut layers).is_err() {
                // The datapath drops it then; going on is harder.
                continue;
            }
            assert!(frame.len() < 4000);
            assert_ne!(hash::l4(&key, 0), 0);
        }
        if layers.key_valid && key.ip_frag != FRAG_LATER {
            valid += 1;
            if let Some((expected, again)) = fresh(&frame, &key, &layers) {
                assert!(same_where_set(&key, &expected), "{key:?}\n{expected:?}");
                assert_eq!(layers, again);
            }
        } else if update(&mut frame, &mut key, &mut layers).is_ok() {
            assert!(layers.key_valid);
        }
        if let Ok(mut segments) = Segments::new(&frame) {
            while let Some(segment) = segments.next(&mut pool) {
                pool.put(segment);
            }
        }
        let _ = frame::complete_checksum(&mut frame);
        pool.put(frame);
    }
    assert!(
        keys > 100_000 && operations > 300_000 && valid > 20_000,
        "{keys} {operations} {valid}"
    );
}

/// Metadata aside, and ports: those of a header that doesn't count (cut short) can be set all the same.
fn same_where_set(key: &Key, expected: &Key) -> bool {
    let mut key = *key;
    (key.priority, key.skb_mark) = (expected.priority, expected.skb_mark);
    (key.tp_src, key.tp_dst) = (expected.tp_src, expected.tp_dst);
    key == *expected
}

fn random<T: FromBytes>(rng: &mut SmallRng) -> T {
    let mut bytes = vec![0; size_of::<T>()];
    rng.fill_bytes(&mut bytes);
    T::read_from_bytes(&bytes).unwrap()
}

fn operate(
    rng: &mut SmallRng,
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
) -> Result<(), rewrite::RewriteError> {
    let ethertype = key.eth_type.get();
    match rng.random_range(0..18) {
        0 => rewrite::push_vlan(frame, key, layers, 0x8100, rng.random::<u16>() | 0x1000),
        1 => rewrite::pop_vlan(frame, key, layers),
        2 => rewrite::push_mpls(frame, key, layers, rng.random::<u32>().into(), 0x8847),
        3 => rewrite::add_mpls(
            frame,
            key,
            layers,
            rng.random::<u32>().into(),
            0x8848,
            false,
        ),
        4 => rewrite::pop_mpls(
            frame,
            key,
            layers,
            if rng.random() { 0x0800 } else { 0x6558 },
        ),
        5 => rewrite::push_eth(frame, key, layers, [1; 6], [2; 6]),
        6 => rewrite::pop_eth(frame, key, layers),
        7 => rewrite::push_nsh(
            frame,
            key,
            layers,
            &[0x0f; 40][..4 * rng.random_range(0..10)],
        ),
        8 => rewrite::pop_nsh(frame, key, layers),
        // Of a header that doesn't count it is decremented, too, and the key says so, as the kernel's.
        9 if key.ip_ttl != 0 => rewrite::dec_ttl(frame, key, layers).map(|_| ()),
        10 => update(frame, key, layers).map_err(|_| rewrite::RewriteError::NoHeader),
        // As validation has it: only what the key says is there.
        11 if ethertype == 0x0800 && layers.key_valid && key.ip_proto != 0 => {
            let field = Masked {
                value: random(rng),
                mask: random(rng),
            };
            rewrite::set(frame, key, layers, &SetField::Ipv4(field))
        }
        12 if ethertype == 0x86dd && layers.key_valid && key.ip_proto != 0 => {
            let field = Masked {
                value: random(rng),
                mask: random(rng),
            };
            rewrite::set(frame, key, layers, &SetField::Ipv6(field))
        }
        13 if layers.key_valid => {
            let ports = Masked {
                value: random::<PortFields>(rng),
                mask: random(rng),
            };
            let field = match key.ip_proto {
                6 => SetField::Tcp(ports),
                17 => SetField::Udp(ports),
                132 => SetField::Sctp(ports),
                _ => return Ok(()),
            };
            rewrite::set(frame, key, layers, &field)
        }
        14 if layers.key_valid => {
            let field = Masked {
                value: random(rng),
                mask: random(rng),
            };
            rewrite::set(frame, key, layers, &SetField::Ethernet(field))
        }
        15 if ethertype == 0x894f && layers.key_valid => {
            let field: Masked<NshFields> = Masked {
                value: random(rng),
                mask: random(rng),
            };
            rewrite::set(frame, key, layers, &SetField::Nsh(Box::new(field)))
        }
        16 => {
            // Nothing that validation lets through: the key becomes nonsense, no more than that.
            let (mut frame, mut key) = (frame.clone(), *key);
            for field in [
                SetField::Ipv4(Masked {
                    value: random(rng),
                    mask: random(rng),
                }),
                SetField::Ipv6(Masked {
                    value: random(rng),
                    mask: random(rng),
                }),
                SetField::Tcp(Masked {
                    value: random(rng),
                    mask: random(rng),
                }),
                SetField::Udp(Masked {
                    value: random(rng),
                    mask: random(rng),
                }),
                SetField::Sctp(Masked {
                    value: random(rng),
                    mask: random(rng),
                }),
                SetField::Mpls(Masked {
                    value: random(rng),
                    mask: random(rng),
                }),
                SetField::Nsh(Box::new(Masked {
                    value: random(rng),
                    mask: random(rng),
                })),
                SetField::Priority(Masked { value: 1, mask: 1 }),
                SetField::Unsettable,
            ] {
                let wild = Layers {
                    network: rng.random_range(0..200),
                    transport: rng.random::<bool>().then(|| rng.random_range(0..200)),
                    ..*layers
                };
                let len = frame.len();
                let _ = rewrite::set(&mut frame, &mut key, &wild, &field);
                assert_eq!(frame.len(), len);
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

#[test]
fn hashes_are_spread_and_fragments_alike() {
    let mut key = Key::ZERO;
    key.eth_type = 0x0800.into();
    key.ip_proto = 17;
    let mut buckets = [0u32; 64];
    let hashes: Vec<u32> = (0..16_384u32)
        .map(|n| {
            key.tp_src = (n as u16).into();
            key.ip_src[..4].copy_from_slice(&(n / 7).to_be_bytes());
            hash::l4(&key, 1)
        })
        .collect();
    for hash in &hashes {
        buckets[(hash % 64) as usize] += 1;
    }
    assert!(
        buckets.iter().all(|count| (160..360).contains(count)),
        "{buckets:?}"
    );
    let again = hash::l4(&key, 1);
    assert_eq!(Some(&again), hashes.last());
    assert_ne!(hash::l4(&key, 2), again, "another seed");
    // The first fragment has ports, the next has none, and an IPv6 one has no protocol either.
    key.ip_frag = flow::key::FRAG_FIRST;
    let first = hash::l4(&key, 1);
    (key.ip_frag, key.ip_proto, key.tp_src) = (FRAG_LATER, 44, 0.into());
    assert_eq!(hash::l4(&key, 1), first);
    // Bytes that aren't the connection's don't count.
    key.ip_ttl = 9;
    key.skb_mark = 9;
    assert_eq!(hash::l4(&key, 1), first);
    assert!(key.as_bytes().len() == flow::key::KEY_BYTES);
}
