//! Readers and dumps beside writers that insert, delete, resize and flush masks away, with the reaper
//! freeing behind them. What is installed throughout is always found, what is found really matches,
//! and a dump shows each flow once.
//!
//! That these checks can fail is shown too: the same run with a writer that takes a flow out before it
//! puts its successor in (`Writers::Broken`) has to be caught.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // also in helpers of tests

mod table_common;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use flow::cache::{LookupCounters, MaskCache};
use flow::key::Key;
use flow::table::{DumpPart, LANES};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use table_common::{mask, new_flow, number, output, port, table, ufid};

/// Flows there from the beginning to the end, ids 0..FIXED.
const FIXED: u32 = 300;
/// Ids that come and go.
const CHURN: u32 = 6_000;

/// Each id has a key of its own under any of the masks: recirc_id tells them apart.
fn key_of(id: u32) -> Key {
    Key {
        recirc_id: id + 1,
        ..table_common::key(id)
    }
}

fn mask_of(id: u32) -> Key {
    Key {
        recirc_id: u32::MAX,
        ..mask(id % 64)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Writers {
    Right,
    /// Breaks the invariant on purpose: a fixed flow is absent between remove and insert.
    Broken,
}

#[derive(Default)]
struct Faults {
    missed: AtomicU64,
    lost_in_dump: AtomicU64,
    twice_in_dump: AtomicU64,
    lookups: AtomicU64,
    dumps: AtomicU64,
}

fn run(writers: Writers, time: Duration) -> Faults {
    let (reclaimer, table) = table(11);
    let handle = reclaimer.register();
    for id in 0..FIXED {
        let prepared = table.prepare(new_flow(id, &key_of(id), &mask_of(id)));
        table.write(&handle).insert(prepared).expect("new");
    }
    let stop = AtomicBool::new(false);
    let faults = Faults::default();
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (table, reclaimer, stop, faults) = (&table, &reclaimer, &stop, &faults);
            scope.spawn(move || {
                let handle = reclaimer.register();
                let mut random = SmallRng::seed_from_u64(reader);
                let mut cache = MaskCache::new();
                let mut counters = LookupCounters::default();
                let mut guard = handle.pin();
                while !stop.load(Relaxed) {
                    guard.repin();
                    // By single packets, and by several at once.
                    let alone = random.random_bool(0.5);
                    let mut packets = Vec::with_capacity(LANES);
                    for _ in 0..LANES {
                        let fixed = random.random_bool(0.5);
                        let id = if fixed {
                            random.random_range(0..FIXED)
                        } else {
                            FIXED + random.random_range(0..CHURN)
                        };
                        packets.push((key_of(id), random.random_range(0..500), id, fixed));
                    }
                    let mut found = [None; LANES];
                    if alone {
                        for (found, (key, hash, ..)) in found.iter_mut().zip(&packets) {
                            *found = table.lookup(key, *hash, &guard, &mut cache, &mut counters);
                        }
                    } else {
                        found = table.lookup_batch(
                            &packets,
                            |p| (&p.0, p.1),
                            &guard,
                            &mut cache,
                            &mut counters,
                        );
                    }
                    for (found, (key, _, id, fixed)) in found.into_iter().zip(packets) {
                        match found {
                            Some(flow) => {
                                assert!(flow.matches(&key));
                                assert_eq!(number(flow), id);
                                // Actions are replaced by others of the same flow only.
                                assert_eq!(port(flow) % 100_000, id);
                            }
                            None => drop(faults.missed.fetch_add(fixed.into(), Relaxed)),
                        }
                    }
                }
                faults.lookups.fetch_add(counters.hit, Relaxed);
            });
        }
        let dumper = (&table, &reclaimer, &stop, &faults);
        scope.spawn(move || {
            let (table, reclaimer, stop, faults) = dumper;
            let handle = reclaimer.register();
            while !stop.load(Relaxed) {
                let mut cursor = table.dump_start();
                let mut shown: HashMap<u32, u32> = HashMap::new();
                loop {
                    let mut left = 97;
                    let guard = handle.pin();
                    let part = table.dump(&mut cursor, &guard, |flow| {
                        if left == 0 {
                            return ControlFlow::Break(());
                        }
                        left -= 1;
                        *shown.entry(number(flow)).or_default() += 1;
                        ControlFlow::Continue(())
                    });
                    drop(guard);
                    if part.expect("our own cursor") == DumpPart::Done {
                        break;
                    }
                    std::thread::yield_now();
                }
                let lost = (0..FIXED).filter(|id| !shown.contains_key(id)).count();
                let twice = shown.values().filter(|times| **times > 1).count();
                faults.lost_in_dump.fetch_add(lost as u64, Relaxed);
                faults.twice_in_dump.fetch_add(twice as u64, Relaxed);
                faults.dumps.fetch_add(1, Relaxed);
            }
        });
        let reaper = (&reclaimer, &stop);
        scope.spawn(move || {
            let (reclaimer, stop) = reaper;
            let handle = reclaimer.register();
            while !stop.load(Relaxed) {
                reclaimer.reap(&handle);
                reclaimer.wait(Duration::from_millis(1));
            }
        });

        let end = Instant::now() + time;
        let mut random = SmallRng::seed_from_u64(99);
        // In waves: up to all, then down to few, so that arrays grow and shrink.
        let mut rising = true;
        // A busy machine may need longer for enough of them.
        let few = || faults.dumps.load(Relaxed) <= 10 && Instant::now() < end + time * 20;
        while Instant::now() < end || few() {
            let n = table.n_flows() as u32;
            rising = if rising {
                n < FIXED + CHURN * 9 / 10
            } else {
                n < FIXED + CHURN / 50
            };
            let ids: Vec<u32> = (0..16)
                .map(|_| FIXED + random.random_range(0..CHURN))
                .collect();
            let prepared: Vec<_> = ids
                .iter()
                .map(|&id| table.prepare(new_flow(id, &key_of(id), &mask_of(id))))
                .collect();
            let writer = table.write(&handle);
            for (id, prepared) in ids.into_iter().zip(prepared) {
                match writer.find_ufid(&ufid(id)) {
                    None if rising || random.random_bool(0.1) => {
                        writer.insert(prepared).expect("not there");
                    }
                    Some(flow) if !rising || random.random_bool(0.1) => {
                        assert!(writer.remove(flow));
                    }
                    Some(flow) => {
                        let to = id + 100_000 * random.random_range(0..9);
                        assert!(writer.replace_actions(flow, output(to)));
                    }
                    None => {}
                }
            }
            drop(writer);
            if random.random_bool(0.05) {
                table.maintain(&handle, 10, std::thread::yield_now);
            }
            let writer = table.write(&handle);
            if writers == Writers::Broken {
                let id = random.random_range(0..FIXED);
                let prepared = table.prepare(new_flow(id, &key_of(id), &mask_of(id)));
                writer.remove(writer.find_ufid(&ufid(id)).expect("fixed"));
                std::thread::yield_now();
                writer.insert(prepared).expect("just taken out");
            }
        }
        stop.store(true, Relaxed);
    });
    reclaimer.reap(&handle);
    reclaimer.reap(&handle);
    assert_eq!(
        reclaimer.pending(),
        0,
        "garbage that nobody can see is freed"
    );
    faults
}

#[test]
fn what_is_installed_throughout_is_always_found_and_shown_once() {
    let faults = run(Writers::Right, Duration::from_secs(3));
    assert!(faults.lookups.load(Relaxed) > 1_000);
    assert!(faults.dumps.load(Relaxed) > 10);
    assert_eq!(faults.missed.load(Relaxed), 0);
    assert_eq!(faults.lost_in_dump.load(Relaxed), 0);
    assert_eq!(faults.twice_in_dump.load(Relaxed), 0);
}

#[test]
fn the_checks_catch_a_writer_that_unlinks_before_it_publishes() {
    let faults = run(Writers::Broken, Duration::from_secs(2));
    assert!(faults.missed.load(Relaxed) > 0);
    assert!(faults.lost_in_dump.load(Relaxed) > 0);
    assert_eq!(faults.twice_in_dump.load(Relaxed), 0);
}

#[test]
fn a_flush_under_load_frees_on_the_reaper_only() {
    let (reclaimer, table) = table(5);
    let handle = reclaimer.register();
    for id in 0..10_000 {
        let prepared = table.prepare(new_flow(id, &key_of(id), &mask_of(id)));
        table.write(&handle).insert(prepared).expect("new");
    }
    let reader = reclaimer.register();
    let guard = reader.pin();
    let seen = table.find_ufid(&ufid(77), &guard).expect("installed");
    assert_eq!(table.write(&handle).flush(), 10_000);
    for _ in 0..10 {
        reclaimer.reap(&handle);
    }
    // The reader still sees what it had found; the flush waits for it.
    assert!(reclaimer.pending() > 0);
    assert_eq!((number(seen), port(seen)), (77, 77));
    assert_eq!(seen.masked_key().recirc_id, 78);
    assert!(table.find_ufid(&ufid(77), &guard).is_none());
    drop(guard);
    reclaimer.reap(&handle);
    assert_eq!(reclaimer.pending(), 0);
}
