//! Nanoseconds per lookup against flows and masks. `cargo run --release -p flow --example lookup`
//!
//! `cached`: packets of installed flows in random order, with a mask cache. `any mask`: without it.
//! `miss`: packets of no flow. `linear scan`: searching the masks in turn. A rough figure, CPU time of one thread; benches/ has the real ones.

use std::hint::black_box;
use std::sync::Arc;

use flow::action::{Action, ActionList};
use flow::cache::{LookupCounters, MaskCache};
use flow::flow::{NewFlow, Ufid};
use flow::key::Key;
use flow::table::{FlowTable, Reclaimer, TableConfig};

/// This thread's own time on a CPU, in ns: others on the machine don't count.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split_whitespace()
        .next()
        .and_then(|ns| ns.parse().ok())
        .unwrap_or(f64::NAN)
}

const LOOKUPS: u32 = 1_000_000;

/// As an attacker makes masks (Tuple Space Explosion): there is one rule for each input port, and packets
/// that differ from it first in bit `i` of the source, `j` of the destination and `k` of the port. A
/// megaflow is made for each combination, and no two overlap.
#[derive(Clone, Copy)]
struct Combination([u32; 3]);

const WIDTHS: [u32; 3] = [32, 16, 16];

impl Combination {
    /// One of 8,192.
    fn new(n: u32) -> Self {
        Self([n % 32, n / 32 % 16, n / 512 % 16])
    }

    fn mask(self) -> Key {
        let ones = |at: usize| (1u64 << WIDTHS[at]) - (1u64 << (WIDTHS[at] - 1 - self.0[at]));
        let mut mask = Key {
            recirc_id: u32::MAX,
            in_port: u32::MAX,
            ip_proto: 0xff,
            ..Key::ZERO
        };
        mask.eth_type = 0xffff.into();
        mask.ip_src[..4].copy_from_slice(&(ones(0) as u32).to_be_bytes());
        mask.ip_dst[..2].copy_from_slice(&(ones(1) as u16).to_be_bytes());
        mask.tp_dst = (ones(2) as u16).into();
        mask
    }

    /// A packet of this megaflow, otherwise at random.
    fn packet(self, port: u32, state: &mut u64) -> Key {
        let mut field = |at: usize, rule: u32| {
            let rest = WIDTHS[at] - 1 - self.0[at];
            let random = random(state) & ((1u64 << rest) - 1) as u32;
            (rule ^ 1 << rest) & !((1u64 << rest) - 1) as u32 | random
        };
        let (src, dst, tp) = (field(0, 0x0a01_0203), field(1, 0xc0a8), field(2, 0x1f90));
        let mut key = Key {
            in_port: port,
            ip_proto: 6,
            ..Key::ZERO
        };
        key.eth_type = 0x0800.into();
        key.ip_src[..4].copy_from_slice(&src.to_be_bytes());
        key.ip_dst[..2].copy_from_slice(&(dst as u16).to_be_bytes());
        key.tp_dst = (tp as u16).into();
        key.tp_src = (random(state) as u16).into();
        key
    }
}

fn random(state: &mut u64) -> u32 {
    *state = state
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    (*state >> 32) as u32
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    println!(
        "nanoseconds each; the last column: masks looked at for one packet, without a mask cache"
    );
    println!(
        "{:>9} {:>6} {:>9} {:>9} {:>9} {:>11} {:>9} {:>9}",
        "flows", "masks", "cached", "any mask", "miss", "linear scan", "insert", "looked at"
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
            let combination = |n: u32| Combination::new(8191 - n % masks * (8192 / masks));
            let start = cpu();
            for n in 0..flows {
                let (of, port) = (combination(n), n / masks + 1);
                let key = of.packet(port, &mut state);
                let new = NewFlow::new(
                    Ufid::new(&n.to_be_bytes()),
                    &key,
                    &of.mask(),
                    Arc::clone(&actions),
                );
                let prepared = table.prepare(new);
                let writer = table.write(&handle);
                if writer.find_overlap(&key).is_none() {
                    writer.insert(prepared)?;
                }
            }
            let insert = (cpu() - start) / table.n_flows() as f64;
            reclaimer.reap(&handle);
            let packets: Vec<(Key, u32)> = (0..100_000u32)
                .map(|_| {
                    let n = random(&mut state) % flows;
                    (combination(n).packet(n / masks + 1, &mut state), n + 1)
                })
                .collect();
            let none: Vec<(Key, u32)> = packets
                .iter()
                .map(|(key, hash)| {
                    (
                        Key {
                            recirc_id: 9,
                            ..*key
                        },
                        *hash,
                    )
                })
                .collect();
            let time = |size: u32, packets: &[(Key, u32)], most: u32| {
                let _ = table.set_masks_cache_size(size);
                let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
                let mut best = f64::MAX;
                for _ in 0..5 {
                    let start = cpu();
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
                    best = best.min((cpu() - start) / f64::from(most / 32 * 32));
                }
                (
                    best,
                    counters.mask_hit as f64 / f64::from(most / 32 * 32 * 5),
                )
            };
            let (hit, _) = time(4096, &packets, LOOKUPS);
            let (any, looked_at) = time(0, &packets, LOOKUPS);
            let (miss, _) = time(4096, &none, LOOKUPS);
            let guard = handle.pin();
            let few = (LOOKUPS / masks / 4).max(100);
            let start = cpu();
            for (key, _) in packets.iter().cycle().take(few as usize) {
                black_box(table.scan(black_box(key), &guard));
            }
            let scan = (cpu() - start) / f64::from(few);
            drop(guard);
            println!(
                "{flows:>9} {:>6} {hit:>9.1} {any:>9.1} {miss:>9.1} {scan:>11.1} {insert:>9.0} {looked_at:>9.2}",
                table.n_masks()
            );
        }
    }
    Ok(())
}
