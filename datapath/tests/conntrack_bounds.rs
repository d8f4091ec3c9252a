//! What can't be had: more memory than there is to be, another's connection's place, a zone's overflow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod conntrack_common;

use conntrack_common::*;
use datapath::conntrack::action::Refusal;

fn flood(number: u32) -> Ends {
    let [a, b, c, d] = number.to_be_bytes();
    Ends {
        src: [a | 64, b, c, d],
        src_port: 1024 + (number % 50_000) as u16,
        dst: [10, 0, 0, 2],
        dst_port: 80,
    }
}

const CLIENT: Ends = Ends {
    src: [10, 0, 0, 1],
    src_port: 1000,
    dst: [10, 0, 0, 2],
    dst_port: 80,
};

#[test]
fn a_flood_of_syns_takes_bounded_memory_and_no_established_connection() {
    const MOST: usize = 20_000;
    // More of them: OVS_DPD_FLOOD=10000000, in a release build.
    let flooding = std::env::var("OVS_DPD_FLOOD").map_or(600_000, |count| count.parse().unwrap());
    let tracker = tracker(MOST);
    let mut now = SECOND;
    let see = |bytes: &[u8], now| run(&tracker, bytes, &commit(1), now);
    see(&tcp(CLIENT, SYN, 100, 0, b""), now).unwrap();
    see(&tcp(CLIENT.back(), SYN | ACK, 500, 101, b""), now).unwrap();
    see(&tcp(CLIENT, ACK, 101, 501, b""), now).unwrap();
    let mut seq = 101;
    for number in 0..flooding {
        // 100,000 a second.
        now += SECOND / 100_000;
        see(&tcp(flood(number), SYN, number, 0, b""), now).unwrap();
        if number % 1000 == 0 {
            let packet = see(&tcp(CLIENT, ACK, seq, 501, b"data"), now).unwrap();
            assert_eq!(bits(&packet), "est trk", "after {number}");
            seq += 4;
            see(&tcp(CLIENT.back(), ACK, 501, seq, b""), now).unwrap();
            tracker.expire(now, 64);
        }
    }
    let [connections, places, timers, candidates] = tracker.table.held();
    assert_eq!(connections, MOST, "the table is full");
    // A place that is left behind in one shard is no other's: shards fill unevenly over time.
    let bound = MOST + MOST / 4;
    for (what, count) in [
        ("connections", connections),
        ("places", places),
        ("timers", timers),
        ("candidates", candidates),
    ] {
        assert!(count <= bound, "{what}: {count}");
    }
    let statistics = tracker.statistics();
    assert_eq!(statistics.full, 0);
    assert!(
        statistics.early_drop + statistics.expired > u64::from(flooding) * 5 / 6,
        "{statistics:?}"
    );
    // And when it is over everything goes.
    now += 200 * SECOND;
    for _ in 0..400 {
        now += SECOND;
        tracker.expire(now, 1 << 20);
    }
    assert_eq!(tracker.table.held()[0], 1, "the established one stays");
    assert_eq!(tracker.limits.count(1), 1);
}

#[test]
fn a_table_of_assured_connections_refuses_new_ones() {
    const MOST: usize = 200;
    let tracker = tracker(MOST);
    let mut refused = 0;
    for number in 0..2000 {
        let ends = flood(number);
        let first = run(&tracker, &udp(ends, b"x"), &commit(0), SECOND);
        match first {
            Ok(_) => {
                run(&tracker, &udp(ends.back(), b"x"), &ct(0), 2 * SECOND).unwrap();
                run(&tracker, &udp(ends, b"x"), &ct(0), 5 * SECOND).unwrap();
            }
            Err(refusal) => {
                assert_eq!(refusal, Refusal::Full);
                refused += 1;
            }
        }
    }
    assert_eq!(tracker.table.len(), MOST);
    assert_eq!(refused, 2000 - MOST as u64);
    assert_eq!(tracker.statistics().full, refused);
    assert_eq!(tracker.limits.count(0) as usize, tracker.table.len());
}

#[test]
fn a_zone_at_its_limit_takes_the_next_when_one_has_gone() {
    let tracker = tracker(1000);
    tracker.limits.set(9, 2);
    let see = |number, now| run(&tracker, &udp(flood(number), b""), &commit(9), now);
    see(1, SECOND).unwrap();
    see(2, SECOND).unwrap();
    assert_eq!(see(3, SECOND).unwrap_err(), Refusal::Limit);
    see(1, 20 * SECOND).unwrap();
    tracker.expire(35 * SECOND, 1000);
    see(3, 35 * SECOND).unwrap();
    assert_eq!(see(4, 35 * SECOND).unwrap_err(), Refusal::Limit);
    assert_eq!(tracker.statistics().limited, 2);
}

#[test]
fn an_expired_connection_isnt_found_though_nobody_took_it_out() {
    let tracker = tracker(1000);
    let bytes = udp(CLIENT, b"");
    run(&tracker, &bytes, &commit(0), SECOND).unwrap();
    let answer = udp(CLIENT.back(), b"");
    let packet = run(&tracker, &answer, &ct(0), 32 * SECOND).unwrap();
    assert_eq!(bits(&packet), "new trk");
    // Nor in the way.
    run(&tracker, &bytes, &commit(0), 32 * SECOND).unwrap();
    assert_eq!(tracker.table.len(), 1);
}

#[test]
fn an_exhausted_range_is_a_clear_drop() {
    let tracker = tracker(1000);
    let nat = commit_nat(0, true, ([9; 4], [9; 4]), Some((3000, 3009)));
    let mut seen = std::collections::HashSet::new();
    for port in 0..10 {
        let ends = Ends {
            src_port: 100 + port,
            ..CLIENT
        };
        let packet = run(&tracker, &udp(ends, b"x"), &nat, SECOND).unwrap();
        let (ends, right) = look(&packet);
        assert!(right && ends.src == [9; 4] && (3000..=3009).contains(&ends.src_port));
        assert!(seen.insert(ends.src_port), "{ends:?} twice");
    }
    let ends = Ends {
        src_port: 200,
        ..CLIENT
    };
    let refused = run(&tracker, &udp(ends, b"x"), &nat, SECOND).unwrap_err();
    assert_eq!(refused, Refusal::Clash);
    assert_eq!(
        tracker.limits.count(0),
        10,
        "what was refused takes no place"
    );
}

#[test]
fn fragments_wait_in_bounded_memory_for_a_bounded_time() {
    let tracker = tracker(1000);
    let whole = udp(CLIENT, &[7; 3000]);
    let piece = |id: u16, more: bool| {
        let mut bytes = whole[..34 + 1480].to_vec();
        bytes[16..18].copy_from_slice(&1500_u16.to_be_bytes());
        bytes[18..20].copy_from_slice(&id.to_be_bytes());
        bytes[20] = if more { 0x20 } else { 0 };
        bytes
    };
    let mut refused = 0;
    for id in 0..10_000 {
        let mut packet = packet(&piece(id, true));
        refused += u32::from(tracker.execute(&mut packet, &ct(0), SECOND).is_err());
    }
    let (packets, bytes) = tracker.fragments.waiting();
    assert!(bytes <= 4 << 20 && packets > 2000, "{packets} {bytes}");
    assert_eq!(packets as u32 + refused, 10_000);
    tracker.expire(40 * SECOND, 10);
    assert_eq!(tracker.fragments.waiting(), (0, 0));
    assert_eq!(tracker.statistics().fragments_timed_out, packets as u64);
}

#[test]
fn requests_to_a_helper_cost_the_same_however_many_wait() {
    let tracker = tracker(100_000);
    let what = flow::action::Conntrack {
        helper: Some("tftp".into()),
        ..commit(1)
    };
    let mut number = 0;
    let mut requests = |count: u32| {
        let began = std::time::Instant::now();
        for _ in 0..count {
            number += 1;
            let ends = Ends {
                dst_port: 69,
                ..flood(number)
            };
            let request = udp(ends, b"\0\x01file\0octet\0");
            run(&tracker, &request, &what, SECOND).unwrap();
        }
        began.elapsed()
    };
    let first = requests(100);
    requests(16_000);
    let last = requests(100);
    let noise = std::time::Duration::from_millis(50);
    assert!(last < first * 10 + noise, "{first:?} {last:?}");
    requests(1000);
    assert_eq!(tracker.expectations.len(), 16_384);
    tracker.remove_all(None, |_| true);
    assert_eq!(tracker.expectations.len(), 0);
}

#[test]
fn fragments_cost_the_same_where_each_finds_no_room_but_one_whose_time_is_up() {
    let tracker = tracker(1000);
    let whole = udp(CLIENT, &[7; 100]);
    let piece = |number: u32, now: u64| {
        let mut bytes = whole[..34 + 24].to_vec();
        bytes[16..18].copy_from_slice(&44_u16.to_be_bytes());
        bytes[18..20].copy_from_slice(&(number as u16).to_be_bytes());
        bytes[20] = 0x20;
        tracker.execute(&mut packet(&bytes), &ct((number >> 16) as u16), now)
    };
    const MILLISECOND: u64 = SECOND / 1000;
    let began = std::time::Instant::now();
    let mut full = 0;
    while piece(full, SECOND + u64::from(full) * MILLISECOND / 2).is_ok() {
        full += 1;
    }
    assert!(full > 20_000, "{full}");
    let filling = began.elapsed();
    let began = std::time::Instant::now();
    let mut held = 0;
    for number in 0..5000 {
        let now = 31 * SECOND + u64::from(number) * MILLISECOND / 2;
        held += u32::from(piece(1 << 20 | number, now).is_ok());
    }
    assert!(held > 4000, "{held}");
    let later = began.elapsed();
    assert!(later < filling * 2, "{filling:?} {later:?}");
}
