//! Nanoseconds per lookup against flows and masks. `cargo run --release -p flow --example lookup`
//!
//! `hit`: packets of installed flows in random order, the mask cache warm. `any mask`: the same without
//! a mask cache. `miss`: packets of no flow. A rough figure on one thread; benches/ has the real ones.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use flow::action::{Action, ActionList};
use flow::cache::{LookupCounters, MaskCache};
use flow::flow::{NewFlow, Ufid};
use flow::key::Key;
use flow::table::{FlowTable, Reclaimer, TableConfig};

const LOOKUPS: u32 = 1_000_000;

/// Prefixes of addresses and ports: masks as an attacker makes them, all different, none overlapping
/// in what they match: each has a bit that differs from every flow of shorter prefixes.
fn mask(n: u32) -> Key {
    let mut mask = Key {
        recirc_id: u32::MAX,
        in_port: u32::MAX,
        ip_proto: 0xff,
        ..Key::ZERO
    };
    mask.eth_type = 0xffff.into();
    let prefix = |bits: u32| u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    mask.ip_src[..4].copy_from_slice(&prefix(n % 32 + 1).to_be_bytes());
    mask.ip_dst[..4].copy_from_slice(&prefix(n / 32 % 16 + 17).to_be_bytes());
    mask.tp_dst = (prefix(n / 512 % 16 + 1) >> 16 | prefix(n / 512 % 16 + 17) & 0xffff)
        .try_into()
        .unwrap_or(0u16)
        .into();
    mask
}

fn random(state: &mut u64) -> u32 {
    *state = state
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    (*state >> 32) as u32
}

fn key(state: &mut u64) -> Key {
    let mut key = Key {
        in_port: 1,
        ip_proto: 6,
        ..Key::ZERO
    };
    key.eth_type = 0x0800.into();
    key.ip_src[..4].copy_from_slice(&random(state).to_be_bytes());
    key.ip_dst[..4].copy_from_slice(&random(state).to_be_bytes());
    key.tp_src = (random(state) as u16).into();
    key.tp_dst = (random(state) as u16).into();
    key
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    println!(
        "{:>9} {:>6} {:>9} {:>9} {:>9}",
        "flows", "masks", "hit ns", "any mask", "miss"
    );
    for masks in [1u32, 64, 1024, 8192] {
        for flows in [1u32, 10_000, 1_000_000] {
            if flows < masks {
                continue;
            }
            let table = FlowTable::new(TableConfig::new(0x5eed, 1), &reclaimer)?;
            let actions = Arc::new(ActionList {
                program: [Action::Output(2)].into(),
                wire: [].into(),
            });
            let mut state = 7;
            let mut keys = Vec::new();
            let masks_used: Vec<Key> = (0..masks)
                .map(|n| mask(8191 - n * (8192 / masks)))
                .collect();
            for n in 0..flows {
                let key = key(&mut state);
                let ufid = Ufid::new(&n.to_be_bytes());
                let new = NewFlow::new(
                    ufid,
                    &key,
                    &masks_used[(n % masks) as usize],
                    Arc::clone(&actions),
                );
                if table.write(&handle).insert(table.prepare(new)).is_ok() {
                    keys.push(key);
                }
            }
            reclaimer.reap(&handle);
            let packets: Vec<(Key, u32)> = (0..100_000u32.min(flows.max(1000)))
                .map(|_| {
                    let at = random(&mut state) as usize % keys.len();
                    (keys[at], at as u32 + 1)
                })
                .collect();
            let none: Vec<(Key, u32)> = (0..10_000)
                .map(|n| {
                    (
                        Key {
                            in_port: 9,
                            ..key(&mut state)
                        },
                        n + 1,
                    )
                })
                .collect();
            let time = |size: u32, packets: &[(Key, u32)], most: u32| {
                let _ = table.set_masks_cache_size(size);
                let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
                let mut best = f64::MAX;
                for _ in 0..3 {
                    let start = Instant::now();
                    let mut guard = handle.pin();
                    let mut of = packets.iter().cycle();
                    for _ in 0..most / 32 {
                        guard.repin();
                        for (key, hash) in of.by_ref().take(32) {
                            black_box(table.lookup(
                                black_box(key),
                                *hash,
                                &guard,
                                &mut cache,
                                &mut counters,
                            ));
                        }
                    }
                    best = best.min(start.elapsed().as_nanos() as f64 / f64::from(most / 32 * 32));
                }
                best
            };
            let slow = (LOOKUPS / masks).max(2_000);
            let hit = time(4096, &packets, (LOOKUPS / masks).max(50_000));
            let any = time(0, &packets, slow);
            let miss = time(4096, &none, slow);
            println!(
                "{flows:>9} {:>6} {hit:>9.1} {any:>9.1} {miss:>9.1}",
                table.n_masks()
            );
        }
    }
    Ok(())
}
