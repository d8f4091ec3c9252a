//! The table against a row of flows searched from the first: whatever is done, in whatever order, both
//! say the same. One thread; `table_stress` has many.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // also in helpers of tests

mod table_common;

use std::collections::HashSet;
use std::ops::ControlFlow;

use flow::cache::{LookupCounters, MaskCache};
use flow::flow::{Flow, FlowId, NewFlow};
use flow::key::Key;
use flow::table::oracle::{LinearTable, matches};
use flow::table::{DumpCursor, DumpPart, FlowTable, InsertError, LANES, StaleCursor, TableConfig};
use proptest::prelude::*;
use table_common::{key, mask, output, port, table, ufid};

#[derive(Clone, Copy, Debug)]
enum Id {
    Ufid(u32),
    Key(u32),
}

#[derive(Clone, Debug)]
enum Op {
    Insert {
        id: Id,
        key: u32,
        mask: u32,
    },
    Remove(Id),
    Replace(Id, u32),
    Lookup {
        key: u32,
        hash: u32,
    },
    /// That many packets at once, from that key on.
    LookupBatch {
        key: u32,
        step: u32,
        many: usize,
    },
    Overlap(u32),
    Dump(usize),
    Flush,
    Maintain,
    CacheSize(u32),
    Reap,
}

fn id() -> impl Strategy<Value = Id> {
    prop_oneof![
        (0..300u32).prop_map(Id::Ufid),
        (0..300u32).prop_map(|n| Id::Key(n * 419))
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let key = 0..1u32 << 17;
    // One mask of two has many flows, so that a mask lies in the tree in each of its ways.
    let mask = prop_oneof![0..64u32, Just(63), Just(56)];
    prop_oneof![
        30 => (id(), key.clone(), mask).prop_map(|(id, key, mask)| Op::Insert { id, key, mask }),
        14 => id().prop_map(Op::Remove),
        4 => (id(), 0..9u32).prop_map(|(id, to)| Op::Replace(id, to)),
        30 => (key.clone(), 0..40u32).prop_map(|(key, hash)| Op::Lookup { key, hash }),
        10 => (key.clone(), prop_oneof![0..3u32, 0..99u32], 0..=LANES)
            .prop_map(|(key, step, many)| Op::LookupBatch { key, step, many }),
        5 => key.prop_map(Op::Overlap),
        10 => (0..20usize).prop_map(Op::Dump),
        1 => Just(Op::Maintain),
        1 => (0..4u32).prop_map(|n| Op::CacheSize([0, 1, 16, 4096][n as usize])),
        2 => Just(Op::Reap),
        1 => (0..8u32).prop_map(|n| if n == 0 { Op::Flush } else { Op::Maintain }),
    ]
}

fn flow_id(id: Id) -> FlowId {
    match id {
        Id::Ufid(n) => FlowId::Ufid(ufid(n)),
        Id::Key(n) => FlowId::Key(Box::new(key(n))),
    }
}

/// A dump under way, and what it has to come to.
struct Dump {
    cursor: DumpCursor,
    /// Flows there from the beginning to now.
    throughout: Vec<FlowId>,
    /// Flows there at the beginning.
    at_start: Vec<FlowId>,
    shown: Vec<FlowId>,
}

fn same(flow: &Flow, model: &NewFlow) {
    assert_eq!(*flow.id(), model.id);
    assert_eq!(flow.mask().to_key(), model.mask.to_key());
    assert!(matches(model, &flow.masked_key()));
    assert!(flow.matches(&model.key));
    assert_eq!(flow.actions().program.len(), 1);
}

fn run(ops: &[Op], seed: u64) {
    let (reclaimer, table) = table(seed);
    let handle = reclaimer.register();
    let mut model = LinearTable::default();
    let mut cache = MaskCache::new();
    let mut counters = LookupCounters::default();
    let mut looked_up = 0;
    let mut dump: Option<Dump> = None;
    for op in ops {
        match *op {
            Op::Insert {
                id,
                key: k,
                mask: m,
            } => {
                // A flow named by its key has that key.
                let k = if let Id::Key(n) = id { n } else { k };
                let new = || {
                    let id = if let Id::Ufid(n) = id {
                        Some(ufid(n))
                    } else {
                        None
                    };
                    NewFlow::new(id, &key(k), &mask(m), output(7))
                };
                let prepared = table.prepare(new());
                let id_taken = model.find(&flow_id(id)).is_some();
                let key_taken = model
                    .flows
                    .iter()
                    .any(|flow| flow.mask == new().mask && matches(flow, &key(k)));
                let writer = table.write(&handle);
                match writer.insert(prepared) {
                    Ok(flow) => {
                        assert!(!id_taken && !key_taken);
                        model.flows.push(new());
                        same(flow, &new());
                    }
                    Err(InsertError::IdInUse(_)) => assert!(id_taken),
                    Err(InsertError::KeyInUse(back)) => {
                        assert!(!id_taken && key_taken);
                        assert_eq!(*back.flow().id(), flow_id(id));
                    }
                    Err(InsertError::Full) => panic!("full"),
                }
            }
            Op::Remove(id) => {
                let writer = table.write(&handle);
                let found = writer.find(&flow_id(id));
                let expected = model.remove(&flow_id(id));
                assert_eq!(found.is_some(), expected.is_some());
                if let (Some(found), Some(expected)) = (found, expected) {
                    same(found, &expected);
                    assert!(writer.remove(found));
                    assert!(!writer.remove(found), "twice");
                    same(found, &expected);
                    if let Some(dump) = &mut dump {
                        dump.throughout.retain(|id| *id != expected.id);
                    }
                }
            }
            Op::Replace(id, to) => {
                let writer = table.write(&handle);
                if let Some(flow) = writer.find(&flow_id(id)) {
                    assert!(writer.replace_actions(flow, output(to)));
                    assert_eq!(port(flow), to);
                }
            }
            Op::Lookup { key: k, hash } => {
                let guard = handle.pin();
                let found = table.lookup(&key(k), hash, &guard, &mut cache, &mut counters);
                looked_up += 1;
                assert_eq!(found.is_some(), table.scan(&key(k), &guard).is_some());
                match found {
                    Some(flow) => {
                        let key = key(k);
                        let mut candidates = model.matching(&key);
                        assert!(candidates.any(|candidate| candidate.id == *flow.id()));
                    }
                    None => assert_eq!(model.matching(&key(k)).count(), 0),
                }
                assert_eq!(counters.hit + counters.missed, looked_up);
            }
            Op::LookupBatch { key: k, step, many } => {
                let packets: Vec<_> = (0..many as u32)
                    .map(|n| (key((k + n * step) % (1 << 17)), n % 7))
                    .collect();
                let guard = handle.pin();
                let found = table.lookup_batch(
                    &packets,
                    |p| (&p.0, p.1),
                    &guard,
                    &mut cache,
                    &mut counters,
                );
                looked_up += many as u64;
                for (packet, found) in packets.iter().zip(found) {
                    let mut candidates = model.matching(&packet.0);
                    match found {
                        Some(flow) => assert!(candidates.any(|c| c.id == *flow.id())),
                        None => assert_eq!(candidates.count(), 0),
                    }
                }
                assert!(found.iter().skip(many).all(Option::is_none));
                assert_eq!(counters.hit + counters.missed, looked_up);
                assert!(counters.cache_hit <= counters.hit);
            }
            Op::Overlap(k) => {
                let writer = table.write(&handle);
                let found = writer
                    .find_overlap(&key(k))
                    .map(|flow| flow.matches(&key(k)));
                assert_eq!(found, model.matching(&key(k)).next().map(|_| true));
            }
            Op::Dump(most) => {
                let state = dump.get_or_insert_with(|| {
                    let ids: Vec<_> = model.flows.iter().map(|flow| flow.id.clone()).collect();
                    Dump {
                        cursor: table.dump_start(),
                        throughout: ids.clone(),
                        at_start: ids,
                        shown: Vec::new(),
                    }
                });
                let mut left = most;
                let guard = handle.pin();
                let part = table.dump(&mut state.cursor, &guard, |flow| {
                    if left == 0 {
                        return ControlFlow::Break(());
                    }
                    left -= 1;
                    assert!(model.find(flow.id()).is_some(), "shown, but not installed");
                    state.shown.push(flow.id().clone());
                    ControlFlow::Continue(())
                });
                if part == Ok(DumpPart::Done) {
                    check_dump(dump.take().expect("just there"));
                }
            }
            Op::Flush => {
                let had = table.write(&handle).flush();
                assert_eq!(had, model.flows.len() as u64);
                model.flows.clear();
                if let Some(dump) = &mut dump {
                    dump.throughout.clear();
                }
            }
            Op::Maintain => {
                table.maintain(&handle, 10, || ());
            }
            Op::CacheSize(size) => table.set_masks_cache_size(size).expect("legal"),
            Op::Reap => drop(reclaimer.reap(&handle)),
        }
        let masks: Vec<_> = model.flows.iter().map(|flow| &flow.mask).collect();
        let different = masks
            .iter()
            .enumerate()
            .filter(|(at, m)| !masks[..*at].contains(m));
        assert_eq!(table.n_flows(), model.flows.len() as u64);
        assert_eq!(table.n_masks(), different.count() as u64);
    }
    // Each flow is found by its name; all that is retired is freed once nobody is pinned.
    let guard = handle.pin();
    for flow in &model.flows {
        let found = match &flow.id {
            FlowId::Ufid(ufid) => table.find_ufid(ufid, &guard),
            FlowId::Key(key) => table.find_key(key, &guard),
        };
        same(found.expect("installed"), flow);
    }
    drop(guard);
    reclaimer.reap(&handle);
    assert_eq!(reclaimer.pending(), 0);
}

fn check_dump(dump: Dump) {
    for (at, id) in dump.shown.iter().enumerate() {
        assert!(!dump.shown[..at].contains(id), "{id:?} shown twice");
        assert!(dump.at_start.contains(id), "{id:?} came later");
    }
    for id in &dump.throughout {
        assert!(dump.shown.contains(id), "{id:?} lost");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn the_table_agrees_with_a_row_of_flows(
        ops in proptest::collection::vec(op(), 1..1200), seed: u64,
    ) {
        run(&ops, seed);
    }
}

#[test]
fn deleting_one_of_two_overlapping_flows_reveals_the_other() {
    let (reclaimer, table) = table(3);
    let handle = reclaimer.register();
    let (packet, mut cache, mut counters) = (key(5), MaskCache::new(), LookupCounters::default());
    for m in [1, 2] {
        let new = table_common::new_flow(m, &packet, &mask(m));
        table
            .write(&handle)
            .insert(table.prepare(new))
            .expect("different masks");
    }
    let mut seen = HashSet::new();
    for _ in 0..2 {
        let found = {
            let guard = handle.pin();
            let found = table.lookup(&packet, 9, &guard, &mut cache, &mut counters);
            *found.expect("one is left").ufid().expect("named so")
        };
        assert!(seen.insert(found));
        let writer = table.write(&handle);
        writer.remove(writer.find_ufid(&found).expect("installed"));
    }
    let guard = handle.pin();
    assert!(
        table
            .lookup(&packet, 9, &guard, &mut cache, &mut counters)
            .is_none()
    );
}

/// A key that has ones in this byte and nowhere else.
fn only(byte: usize) -> Key {
    let mut bytes = [0u8; flow::key::KEY_BYTES];
    bytes[byte] = 0xff;
    zerocopy::transmute!(bytes)
}

#[test]
fn the_cache_remembers_masks_that_nothing_else_names() {
    // No two masks need the same bit: nothing tells which of them a packet matches.
    const MASKS: usize = 40;
    let (reclaimer, table) = table(3);
    let handle = reclaimer.register();
    for n in 0..MASKS {
        let new = table_common::new_flow(n as u32, &only(n * 8), &only(n * 8));
        let prepared = table.prepare(new);
        table.write(&handle).insert(prepared).expect("different");
    }
    let guard = handle.pin();
    let mut cache = MaskCache::new();
    let mut looked = |hash: u32, packets: u64| {
        let mut counters = LookupCounters::default();
        for _ in 0..packets {
            let packet = only((MASKS - 1) * 8);
            let found = table.lookup(&packet, hash, &guard, &mut cache, &mut counters);
            assert!(found.is_some());
        }
        assert_eq!((counters.hit, counters.missed), (packets, 0));
        (counters.cache_hit, counters.mask_hit)
    };
    let (_, all) = looked(0, 1);
    assert_eq!(all, MASKS as u64, "without a hash all masks are looked at");
    assert_eq!(looked(77, 1), (0, all));
    let (hits, masks) = looked(77, 4);
    assert_eq!(hits, 4);
    assert!(masks < 4 * all / 2, "{masks} masks for 4 packets");
    table.set_masks_cache_size(0).expect("legal");
    assert_eq!(looked(77, 4), (0, 4 * all), "there is no cache");
    table.set_masks_cache_size(256).expect("legal");
    assert_eq!(looked(77, 1), (0, all), "the cache was emptied");
    assert!(table.set_masks_cache_size(3).is_err());
    assert!(table.set_masks_cache_size(8192).is_err());
}

#[test]
fn a_cache_hit_is_a_mask_that_was_remembered_for_the_hash() {
    let (reclaimer, table) = table(3);
    let handle = reclaimer.register();
    let prepared = table.prepare(table_common::new_flow(1, &key(5), &mask(63)));
    table.write(&handle).insert(prepared).expect("the only one");
    let guard = handle.pin();
    let mut cache = MaskCache::new();
    for (size, hash, hits) in [(256, 7, 3), (0, 7, 0), (256, 0, 0)] {
        table.set_masks_cache_size(size).expect("legal");
        let packet = [(key(5), hash)];
        let mut counters = LookupCounters::default();
        for _ in 0..2 {
            table.lookup(&packet[0].0, hash, &guard, &mut cache, &mut counters);
            table.lookup_batch(&packet, |p| (&p.0, p.1), &guard, &mut cache, &mut counters);
        }
        let expected = LookupCounters {
            hit: 4,
            missed: 0,
            mask_hit: 4,
            cache_hit: hits,
        };
        assert_eq!(counters, expected);
    }
}

#[test]
fn a_cursor_of_another_table_is_refused() {
    let (reclaimer, table) = table(3);
    let other = FlowTable::new(TableConfig::new(3, 2), &reclaimer).expect("legal");
    let handle = reclaimer.register();
    let mut cursor = other.dump_start();
    let part = table.dump(&mut cursor, &handle.pin(), |_| ControlFlow::Continue(()));
    assert_eq!(part, Err(StaleCursor));
}

#[test]
#[should_panic(expected = "a pin of another collector")]
fn a_pin_of_another_reclaimer_is_refused() {
    let (_reclaimer, table) = table(3);
    let guard = flow::table::Reclaimer::new().register().pin();
    let _ = table.find_ufid(&ufid(1), &guard);
}
