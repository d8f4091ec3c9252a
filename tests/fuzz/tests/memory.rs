//! Memory: what flows took is given back, or used again.
#![allow(clippy::expect_used, clippy::panic)]

use fuzz::campaign::number;
use fuzz::world::World;
use netlink::Family;

const CYCLES: usize = 10;
/// What may come on top after the second cycle: the allocator's own waste.
const SLACK: u64 = 24 << 20;

/// `VmRSS`, bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("VmRSS");
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|word| word.parse::<u64>().ok());
    kib.expect("a number") << 10
}

#[test]
fn flows_added_and_flushed_again_and_again_leave_nothing() {
    let flows = number("OVS_DPD_FUZZ_FLOWS").unwrap_or(100_000) as u32;
    let mut world = World::new(7);
    let dp = world.add_datapath("dpa");
    world.add_port(dp, 1, "p1");
    let mut after = Vec::new();
    let empty = resident();
    let mut full = 0;
    for cycle in 0..CYCLES {
        for number in 0..flows {
            install(&mut world, dp, number);
        }
        full = resident();
        assert_eq!(
            world.datapath("dpa").expect("there").sizes().0,
            u64::from(flows)
        );
        world
            .request(Family::Flow, 2, dp, 0, |_| {})
            .expect("flushed");
        assert_eq!(world.datapath("dpa").expect("there").sizes(), (0, 0));
        assert_eq!(world.reap(), 0, "cycle {cycle}: not freed");
        after.push(resident());
    }
    let per_flow = full.saturating_sub(empty) / u64::from(flows);
    println!("empty {empty}, full {full} ({per_flow} a flow), after each cycle {after:?}");
    let (second, last) = (after[1], after[CYCLES - 1]);
    assert!(last <= second + SLACK, "grows: {after:?}");
    assert!(
        last < full,
        "nothing was given back or used again: {after:?}"
    );
}

/// One of two masks, a key of its own, a unique id.
fn install(world: &mut World, dp: i32, number: u32) {
    let wide = number.is_multiple_of(2);
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.to_ne_bytes());
    let mut ethernet = [2; 12];
    ethernet[..4].copy_from_slice(&number.to_be_bytes());
    let mut ip = [0; 12];
    (ip[8], ip[10]) = (6, 64);
    let made = world.request(Family::Flow, 1, dp, 0x400, |writer| {
        let nest = writer.begin(1);
        writer.u32(3, 1);
        writer.bytes(4, &ethernet).expect("short");
        writer.be16(6, 0x0800);
        writer.bytes(7, &ip).expect("short");
        writer.bytes(9, &[0; 4]).expect("short");
        writer.be16(18, 0);
        writer.end(nest).expect("short");
        let nest = writer.begin(7);
        writer.u32(3, u32::MAX);
        writer.bytes(4, &[0xff; 12]).expect("short");
        writer.be16(6, 0xffff);
        let mut mask = [0; 12];
        mask[8] = if wide { 0 } else { 0xff };
        writer.bytes(7, &mask).expect("short");
        writer.end(nest).expect("short");
        let nest = writer.begin(2);
        writer.u32(1, 1);
        writer.end(nest).expect("short");
        writer.bytes(9, &id).expect("short");
    });
    if let Err(errno) = made {
        panic!("flow {number}: {errno:?}");
    }
}
