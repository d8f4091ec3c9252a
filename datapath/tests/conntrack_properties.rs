//! Whatever a packet is: nothing panics; what is translated comes back as it went; threads together do
//! what one does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod conntrack_common;

use std::sync::atomic::{AtomicUsize, Ordering};

use conntrack_common::*;
use datapath::conntrack::action::Refusal;
use flow::action::Conntrack;
use proptest::prelude::*;

fn ends() -> impl Strategy<Value = Ends> {
    // Few of each, so that they meet.
    (0..4_u8, 0..4_u16, 0..3_u8, 0..3_u16).prop_map(|(src, src_port, dst, dst_port)| Ends {
        src: [10, 0, 0, src],
        src_port: 600 + src_port * 300,
        dst: [20, 0, 0, dst],
        dst_port: 53 + dst_port,
    })
}

fn mapping() -> impl Strategy<Value = Conntrack> {
    let address =
        (0..3_u8, 0..3_u8).prop_map(|(low, more)| ([30, 0, 0, low], [30, 0, 0, low + more]));
    let ports =
        proptest::option::of((1000..1010_u16, 0..5_u16).prop_map(|(low, more)| (low, low + more)));
    (
        any::<bool>(),
        address,
        ports,
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(source, addresses, ports, random, hash, persistent)| {
            let mut what = commit_nat(3, source, addresses, ports);
            if let Some(nat) = &mut what.nat {
                (nat.random, nat.hash, nat.persistent) = (random, hash, persistent);
            }
            what
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The answer to a translated packet comes back to who sent it; no two connections are seen as one.
    #[test]
    fn translation_is_reversible(all in proptest::collection::vec((ends(), mapping(), any::<bool>()), 1..40)) {
        let tracker = tracker(10_000);
        let mut became = Vec::new();
        let mut begun = std::collections::HashSet::new();
        for (number, (ends, mapping, over_tcp)) in all.iter().enumerate() {
            // A connection keeps the mapping that it began with, whatever is asked for later.
            if !begun.insert(format!("{ends:?} {over_tcp}")) {
                continue;
            }
            let bytes = match over_tcp {
                true => tcp(*ends, SYN, 100, 0, b""),
                false => udp(*ends, b"question"),
            };
            let packet = match run(&tracker, &bytes, mapping, SECOND) {
                Ok(packet) => packet,
                Err(Refusal::Clash) => continue,
                Err(other) => panic!("{other:?}"),
            };
            let (seen, right) = look(&packet);
            prop_assert!(right, "checksums of {number}");
            became.push((*ends, *over_tcp, seen));
        }
        for (ends, over_tcp, seen) in became {
            let bytes = match over_tcp {
                true => tcp(seen.back(), SYN | ACK, 500, 101, b""),
                false => udp(seen.back(), b"answer"),
            };
            let packet = run(&tracker, &bytes, &ct_nat(3), 2 * SECOND).unwrap();
            let (back, right) = look(&packet);
            prop_assert!(right);
            prop_assert!(bits(&packet).contains("est rpl"), "{}", bits(&packet));
            prop_assert_eq!(format!("{back:?}"), format!("{:?}", ends.back()));
        }
    }

    /// Nothing that comes from a wire panics, whatever is done with it.
    #[test]
    fn mutated_packets_are_survived(
        base in 0..4_usize,
        changes in proptest::collection::vec((0..120_usize, any::<u8>()), 0..12),
        cut in proptest::option::of(14..120_usize),
        mapping in mapping(),
    ) {
        let ends = Ends { src: [10, 0, 0, 1], src_port: 21, dst: [20, 0, 0, 1], dst_port: 21 };
        let mut bytes = match base {
            0 => udp(ends, b"\x00\x01file"),
            1 => tcp(ends, ACK, 1, 1, b"PORT 10,0,0,1,4,5\r\n"),
            2 => tcp(ends, SYN, 1, 0, b""),
            _ => {
                let mut error = udp(ends, &udp(ends, b"inner")[14..]);
                error[23] = 1;
                error[34] = 3;
                error
            }
        };
        for (at, byte) in changes {
            if let Some(there) = bytes.get_mut(at) {
                *there = byte;
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        let tracker = tracker(100);
        for what in [ct(0), commit(3), mapping, ct_nat(3), ct_nat(3)] {
            let mut packet = datapath::packet::Packet::default();
            packet.renew(frame::Frame::from_bytes(&bytes), 1);
            // So that the checksums that were changed don't hide everything.
            packet.frame.offload.csum_valid = true;
            let meta = flow::extract::Metadata::default();
            if let Ok(layers) = flow::extract::extract(&mut packet.frame, &meta, &mut packet.key) {
                packet.layers = layers;
                let _ = tracker.execute(&mut packet, &what, SECOND);
            }
        }
    }
}

#[test]
fn a_source_is_seen_as_one_by_all_whom_it_speaks_to() {
    let tracker = tracker(1000);
    let mapping = commit_nat(
        0,
        true,
        ([30, 0, 0, 1], [30, 0, 0, 200]),
        Some((2000, 60_000)),
    );
    let mut seen = std::collections::HashSet::new();
    for dst in 0..50 {
        let ends = Ends {
            src: [10, 0, 0, 1],
            src_port: 777,
            dst: [20, 0, 0, dst],
            dst_port: 53,
        };
        let packet = run(&tracker, &udp(ends, b""), &mapping, SECOND).unwrap();
        let (ends, _) = look(&packet);
        seen.insert((ends.src, ends.src_port));
    }
    assert_eq!(seen.len(), 1, "{seen:?}");
}

/// Threads commit, answer and delete the same few connections all the time. In the end every count is
/// that of the table.
#[test]
fn threads_together_leave_exact_counts() {
    let tracker = tracker(3000);
    let turns = AtomicUsize::new(0);
    let mapping = commit_nat(5, true, ([30, 0, 0, 1], [30, 0, 0, 4]), None);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (tracker, turns, mapping) = (&tracker, &turns, &mapping);
            scope.spawn(move || {
                let mut random = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                for turn in 0..20_000_u64 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let ends = Ends {
                        src: [10, 0, (random >> 8) as u8 & 7, random as u8],
                        src_port: 1000 + (random >> 16) as u16 % 4,
                        dst: [20, 0, 0, 1],
                        dst_port: 80,
                    };
                    let now = SECOND + turn * 1_000_000;
                    match random >> 40 & 7 {
                        0..=3 => {
                            if let Ok(packet) = run(tracker, &udp(ends, b""), mapping, now) {
                                let (seen, right) = look(&packet);
                                assert!(right);
                                // Somebody may have deleted it meanwhile.
                                let _ = run(tracker, &udp(seen.back(), b""), &ct_nat(5), now);
                            }
                        }
                        4 | 5 => {
                            let _ = run(tracker, &tcp(ends, SYN, 1, 0, b""), &commit(5), now);
                        }
                        6 => {
                            let packet = run(tracker, &udp(ends, b""), &ct(5), now).unwrap();
                            if let Some(found) = packet.conntrack {
                                tracker.remove(&found.connection);
                            }
                        }
                        _ => {
                            tracker.expire(now, 16);
                        }
                    }
                    turns.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(turns.load(Ordering::Relaxed), 80_000);
    assert_eq!(tracker.limits.count(5) as usize, tracker.table.len());
    let mut shown = 0;
    tracker.for_each(0, |_| {
        shown += 1;
        true
    });
    assert_eq!(shown, tracker.table.len());
    tracker.remove_all(None, |_| true);
    assert_eq!((tracker.table.len(), tracker.limits.count(5)), (0, 0));
    assert_eq!(tracker.mapped_sources(), 0);
}
