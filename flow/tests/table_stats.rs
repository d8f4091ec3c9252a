//! Statistics are exact, whoever counts, and start anew when cleared.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // also in helpers of tests

mod table_common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use flow::flow::Flow;
use flow::stats::{Source, Totals};
use table_common::{key, mask, new_flow, table, ufid};

const SOURCES: u16 = 4;

fn source(index: u16) -> Source {
    Source::new(index, SOURCES).expect("below the number of sources")
}

fn packet(bytes: u64, used_ms: u64, tcp_flags: u16) -> Totals {
    Totals {
        packets: 1,
        bytes,
        used_ms,
        tcp_flags,
    }
}

fn with_flow(test: impl FnOnce(&Flow)) {
    let (reclaimer, table) = table(1);
    let handle = reclaimer.register();
    table
        .write(&handle)
        .insert(table.prepare(new_flow(1, &key(1), &mask(1))))
        .expect("first");
    let guard = handle.pin();
    test(table.find_ufid(&ufid(1), &guard).expect("installed"));
}

#[test]
fn no_packet_is_lost_between_sources() {
    const EACH: u64 = 20_000;
    with_flow(|flow| {
        std::thread::scope(|scope| {
            for index in 0..SOURCES {
                scope.spawn(move || {
                    for n in 0..EACH {
                        flow.record(source(index), &packet(100, n + 1, 1 << index));
                    }
                });
            }
        });
        let each = u64::from(SOURCES) * EACH;
        let all = Totals {
            packets: each,
            bytes: each * 100,
            used_ms: EACH,
            tcp_flags: 0b1111,
        };
        assert_eq!(flow.stats(), all);
    });
}

#[test]
fn clearing_forgets_what_every_source_counted() {
    with_flow(|flow| {
        for index in 0..SOURCES {
            flow.record(source(index), &packet(60, 5, 2));
        }
        flow.clear_stats();
        assert_eq!(flow.stats(), Totals::default());
        flow.record(source(2), &packet(70, 9, 16));
        assert_eq!(flow.stats(), packet(70, 9, 16));
    });
}

#[test]
fn what_is_counted_while_others_clear_is_old_or_new_but_whole() {
    with_flow(|flow| {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for index in 0..2 {
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(Relaxed) {
                        flow.record(source(index), &packet(1, 1, 0));
                    }
                });
            }
            for _ in 0..2_000 {
                flow.clear_stats();
                std::hint::spin_loop();
            }
            stop.store(true, Relaxed);
        });
        flow.clear_stats();
        assert_eq!(flow.stats(), Totals::default());
        for index in 0..2 {
            flow.record(source(index), &packet(1, 1, 0));
        }
        assert_eq!(
            flow.stats(),
            Totals {
                packets: 2,
                ..packet(2, 1, 0)
            }
        );
    });
}

#[test]
fn a_source_is_below_the_number_of_sources() {
    assert!(Source::new(4, 4).is_none());
    assert!(Source::new(u16::MAX, u16::MAX).is_none());
}
