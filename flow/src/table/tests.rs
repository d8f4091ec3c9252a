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
    let guard = handle.pin();
    let shapes: Vec<_> = keys
        .iter()
        .map(|key| table.contents(&guard).tree.load().depth(key))
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
        assert!(tests < 13.0, "{name}: {tests} tests");
        assert!(masks < 2.5, "{name}: {masks} masks");
        assert!(deepest < 22, "{name}: {deepest} tests");
    }
}
