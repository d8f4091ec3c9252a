//! Nanoseconds per lookup against flows and masks. `cargo run --release -p flow --example lookup`
//!
//! `cached`: packets of installed flows in random order, with a mask cache. `any mask`: without it.
//! `miss`: packets of no flow. `scan`: searching the masks in turn. CPU time of one thread. All cases of
//! as many flows take turns, and a figure is the median of its turns; `to one` is the median of the
//! ratios to the one-mask table, turn by turn (any mask, and in brackets the miss). benches/ has the
//! figures that are kept.

use std::hint::black_box;
use std::sync::Arc;

use common::{cpu, filled, packets};
use crossbeam_epoch::LocalHandle;
use flow::cache::{LookupCounters, MaskCache};
use flow::key::Key;
use flow::table::{FlowTable, Reclaimer};

mod common;

const TURNS: usize = 15;
const BATCH: usize = 32;
const LOOKUPS: usize = 100_000;
const MASKS: [u32; 4] = [1, 64, 1024, 8192];

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Nanoseconds a lookup, and masks looked at.
fn time(
    table: &FlowTable,
    batched: bool,
    packets: &[(Key, u32)],
    handle: &LocalHandle,
) -> Result<(f64, f64), flow::table::BadCacheSize> {
    table.set_masks_cache_size(256)?;
    let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
    let mut guard = handle.pin();
    let mut spent = 0;
    for of in packets.chunks(BATCH) {
        guard.repin();
        // Whoever looks up has just read the packet: its key is at hand.
        let batch = of.to_vec();
        let start = cpu();
        if batched {
            for group in batch.chunks(flow::table::LANES) {
                let found = table.lookup_batch(
                    black_box(group),
                    |(key, hash)| (key, *hash),
                    &guard,
                    &mut cache,
                    &mut counters,
                );
                black_box(found);
            }
        } else {
            for (key, hash) in &batch {
                let found = table.lookup(black_box(key), *hash, &guard, &mut cache, &mut counters);
                black_box(found);
            }
        }
        spent += cpu() - start;
    }
    // What looking at the clock takes isn't the table's.
    let clock = packets.chunks(BATCH).map(|_| {
        let start = cpu();
        cpu() - start
    });
    let spent = spent.saturating_sub(clock.sum());
    let each = |n: u64| n as f64 / packets.len() as f64;
    Ok((each(spent), each(counters.mask_hit)))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let only = std::env::args().nth(1).and_then(|n| n.parse::<u32>().ok());
    println!(
        "{:>9} {:>6} {:>8} {:>8} {:>8} {:>10} {:>14} {:>9}",
        "flows", "masks", "cached", "any mask", "miss", "scan", "to one (miss)", "looked at"
    );
    for flows in [1u32, 10_000, 1_000_000] {
        if only.is_some_and(|only| only != flows) {
            continue;
        }
        let reclaimer = Arc::new(Reclaimer::new());
        let handle = reclaimer.register();
        let mut cases = Vec::new();
        for masks in MASKS.into_iter().filter(|masks| *masks <= flows) {
            let hits = packets(flows, masks, LOOKUPS as u32);
            let misses: Vec<_> = hits
                .iter()
                .map(|&(key, hash)| {
                    (
                        Key {
                            recirc_id: 9,
                            ..key
                        },
                        hash,
                    )
                })
                .collect();
            cases.push((
                masks,
                filled(flows, masks, &reclaimer, &handle)?,
                hits,
                misses,
            ));
        }
        let mut turns = vec![Vec::new(); cases.len()];
        for _ in 0..TURNS {
            for ((masks, table, hits, misses), turns) in cases.iter().zip(&mut turns) {
                let cached = time(table, false, hits, &handle)?.0;
                let (any, looked_at) = time(table, true, hits, &handle)?;
                let miss = time(table, true, misses, &handle)?.0;
                let few = (LOOKUPS / *masks as usize / 4).max(20);
                let (start, guard) = (cpu(), handle.pin());
                for (key, _) in hits.iter().take(few) {
                    black_box(table.scan(black_box(key), &guard));
                }
                drop(guard);
                let scan = (cpu() - start) as f64 / few as f64;
                turns.push([cached, any, miss, scan, looked_at]);
            }
        }
        for ((masks, ..), of) in cases.iter().zip(&turns) {
            let [cached, any, miss, scan, looked_at] =
                std::array::from_fn(|at| median(of.iter().map(|turn| turn[at])));
            let to_one = |at: usize| {
                let one = turns.iter().flatten().take(TURNS);
                median(of.iter().zip(one).map(|(this, one)| this[at] / one[at]))
            };
            let to_one = format!("{:.2} ({:.2})", to_one(1), to_one(2));
            println!(
                "{flows:>9} {masks:>6} {cached:>8.1} {any:>8.1} {miss:>8.1} {scan:>10.1} {to_one:>14} {looked_at:>9.2}"
            );
        }
    }
    Ok(())
}
