//! The shape of the tree over masks, which can't be seen from outside.

use super::*;
use crate::action::ActionList;

/// A megaflow of the Tuple Space Explosion: it differs from the rule first in these bits of its fields.
fn explosion(n: u32) -> (Key, Key) {
    let bits = [n % 32, n / 32 % 16, n / 512 % 16];
    let field = |at: usize, width: u32, rule: u64| {
        let rest = width - 1 - bits[at];
        (
            (rule ^ 1 << rest) >> rest << rest,
            (1u64 << width) - (1 << rest),
        )
    };
    let (src, src_mask) = field(0, 32, 0x0a01_0203);
    let (dst, dst_mask) = field(1, 16, 0xc0a8);
    let (tp, tp_mask) = field(2, 16, 0x1f90);
    let with = |src: u64, dst: u64, tp: u64, rest: u8| {
        let mut key = Key {
            ip_proto: rest,
            ..Key::ZERO
        };
        key.ip_src[..4].copy_from_slice(&(src as u32).to_be_bytes());
        key.ip_dst[..2].copy_from_slice(&(dst as u16).to_be_bytes());
        key.tp_dst = (tp as u16).into();
        key
    };
    (
        with(src, dst, tp, 6),
        with(src_mask, dst_mask, tp_mask, 0xff),
    )
}

fn shape(order: impl Iterator<Item = u32>) -> (f64, f64, usize) {
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    let table = FlowTable::new(TableConfig::new(1, 1), &reclaimer).unwrap();
    let mut keys = Vec::new();
    for n in order {
        let (key, mask) = explosion(n);
        let new = NewFlow::new(
            Ufid::new(&n.to_be_bytes()),
            &key,
            &mask,
            Arc::<ActionList>::default(),
        );
        let prepared = table.prepare(new);
        table.write(&handle).insert(prepared).unwrap();
        keys.push(key);
    }
    table.maintain(&handle, usize::MAX, || ());
    let guard = handle.pin();
    let shapes: Vec<_> = keys
        .iter()
        .map(|key| {
            let forest = table.contents(&guard).forest.load();
            forest.tree.depth(key)
        })
        .collect();
    let mean = |of: fn(&(usize, usize)) -> usize| {
        shapes.iter().map(of).sum::<usize>() as f64 / shapes.len() as f64
    };
    (
        mean(|s| s.0),
        mean(|s| s.1),
        shapes.iter().map(|s| s.0).max().unwrap_or(0),
    )
}

#[test]
fn a_key_passes_few_tests_however_many_masks_come_in_whatever_order() {
    const MASKS: u32 = 2048;
    let orders: [(&str, Vec<u32>); 3] = [
        ("up", (0..MASKS).collect()),
        ("down", (0..MASKS).rev().collect()),
        ("mixed", (0..MASKS).map(|n| n * 1027 % MASKS).collect()),
    ];
    for (name, order) in orders {
        let (tests, masks, deepest) = shape(order.into_iter());
        // The least is 10 tests: 2,048 masks, two in a leaf.
        println!("{name}: {tests} tests, {masks} masks, {deepest} at most");
        assert!(tests < 13.0, "{name}: {tests} tests");
        assert!(masks < 2.5, "{name}: {masks} masks");
        assert!(deepest < 22, "{name}: {deepest} tests");
    }
}

/// A mask is found in each way of lying: by its flows, by what many have in common, and outside of the
/// tree; and the tree is empty when all have gone.
#[test]
fn masks_are_found_however_they_lie_and_leave_nothing_behind() {
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    let table = FlowTable::new(TableConfig::new(1, 1), &reclaimer).unwrap();
    let mut flows: Vec<(u32, Key, Key)> = (0..1024)
        .map(|n| n * 8)
        .map(|n| {
            let (key, mask) = explosion(n);
            (n, key, mask)
        })
        .collect();
    // Many flows of one mask, with little in common.
    for n in 0..200u32 {
        let (mut key, mut mask) = explosion(8191);
        (key.in_port, mask.in_port) = (n.wrapping_mul(0x9e37_79b9), u32::MAX);
        flows.push((10_000 + n, key, mask));
    }
    // One that allows nearly all outcomes: no packet of its protocol is kept out by an address.
    flows.push((
        20_000,
        Key {
            ip_proto: 6,
            ..Key::ZERO
        },
        Key {
            ip_proto: 0xff,
            ..Key::ZERO
        },
    ));
    let check = |installed: &[(u32, Key, Key)]| {
        let guard = handle.pin();
        let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
        for (n, key, _) in &flows {
            let found = table.lookup(key, 0, &guard, &mut cache, &mut counters);
            assert_eq!(
                found.is_some(),
                table.scan(key, &guard).is_some(),
                "flow {n}"
            );
            assert!(found.is_some() || installed.iter().all(|(other, ..)| other != n));
            assert!(found.is_none_or(|flow| flow.matches(key)));
        }
    };
    for (n, key, mask) in &flows {
        let ufid = Ufid::new(&n.to_be_bytes());
        let prepared = table.prepare(NewFlow::new(ufid, key, mask, Arc::<ActionList>::default()));
        table.write(&handle).insert(prepared).unwrap();
    }
    check(&flows);
    let lying = table.write(&handle).lying();
    assert!(
        lying.iter().all(|masks| *masks > 0),
        "each way is met: {lying:?}"
    );
    // The widest first, so that what is left must be found by its own place in the tree.
    let mut left = flows.clone();
    while let Some((n, ..)) = left.pop() {
        let writer = table.write(&handle);
        assert!(
            writer.remove(
                writer
                    .find_ufid(&Ufid::new(&n.to_be_bytes()).unwrap())
                    .unwrap()
            )
        );
        drop(writer);
        if left.len().is_multiple_of(100) {
            check(&left);
        }
    }
    assert_eq!((table.n_flows(), table.n_masks()), (0, 0));
    let guard = handle.pin();
    let contents = table.contents(&guard);
    let forest = contents.forest.load();
    assert_eq!(forest.tree.depth(&Key::ZERO), (0, 0));
    assert_eq!(forest.previous.depth(&Key::ZERO), (0, 0));
    assert_eq!(contents.wide.load().iter().count(), 0);
}

/// A key that has ones in this chunk and nowhere else.
fn only(chunk: usize) -> Key {
    let mut chunks = [[0u8; 8]; crate::mask::KEY_CHUNKS];
    chunks[chunk] = [0xff; 8];
    zerocopy::transmute!(chunks)
}

#[test]
fn masks_that_no_test_divides_are_searched_in_the_order_of_their_use() {
    const MASKS: usize = 40;
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    let table = FlowTable::new(TableConfig::new(1, 1), &reclaimer).unwrap();
    table.set_masks_cache_size(0).unwrap();
    // No two need the same bit, so that each packet could match all of them.
    for n in 0..MASKS {
        let ufid = Ufid::new(&[n as u8]);
        let new = NewFlow::new(ufid, &only(n), &only(n), Arc::<ActionList>::default());
        table.write(&handle).insert(table.prepare(new)).unwrap();
    }
    let mut cache = MaskCache::new();
    let mut looked_at = |times: u64| {
        let guard = handle.pin();
        let mut counters = LookupCounters::default();
        for _ in 0..times {
            let last = only(MASKS - 1);
            let found = table.lookup(&last, 0, &guard, &mut cache, &mut counters);
            assert_eq!(
                found.map(|flow| flow.ufid().unwrap().as_bytes()[0]),
                Some(MASKS as u8 - 1)
            );
        }
        counters.mask_hit / times
    };
    assert_eq!(looked_at(5000), MASKS as u64);
    let [flows, _, wide] = table.write(&handle).lying();
    table.maintain(&handle, usize::MAX, || ());
    assert_eq!(looked_at(1), flows as u64 + 1);
    assert_eq!(table.write(&handle).lying(), [flows, 0, wide]);
}

/// The most that one change had to look at, and all of them together.
fn work(orders: &[u32], change: impl Fn(u32)) -> (u64, u64) {
    let mut all = (0, 0);
    for n in orders {
        tree::WORK.set(0);
        change(*n);
        let work = tree::WORK.get();
        all = (all.0.max(work), all.1 + work);
    }
    all
}

/// "An update takes microseconds": what one has to look at doesn't grow with the masks there are.
#[test]
fn no_change_has_much_to_do_however_many_masks_there_are() {
    const MASKS: u32 = 4096;
    let orders: [(&str, Vec<u32>); 3] = [
        ("up", (0..MASKS).collect()),
        ("down", (0..MASKS).rev().collect()),
        ("mixed", (0..MASKS).map(|n| n * 1027 % MASKS).collect()),
    ];
    for (name, order) in orders {
        let reclaimer = Arc::new(Reclaimer::new());
        let handle = reclaimer.register();
        let table = FlowTable::new(TableConfig::new(1, 1), &reclaimer).unwrap();
        let id = |n: u32| Ufid::new(&n.to_be_bytes()).unwrap();
        let (most, all) = work(&order, |n| {
            let (key, mask) = explosion(n);
            let new = NewFlow::new(Some(id(n)), &key, &mask, Arc::<ActionList>::default());
            table.write(&handle).insert(table.prepare(new)).unwrap();
        });
        println!(
            "{name}: insert {most} at most, {} each",
            all / u64::from(MASKS)
        );
        assert!(most < 6_000, "{name}: {most}");
        let (most, all) = work(&order, |n| {
            let writer = table.write(&handle);
            assert!(writer.remove(writer.find_ufid(&id(n)).unwrap()));
        });
        println!(
            "{name}: remove {most} at most, {} each",
            all / u64::from(MASKS)
        );
        assert!(most < 6_000, "{name}: {most}");
    }
}
