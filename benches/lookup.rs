//! Nanoseconds a lookup against flows and masks, in one thread, nothing else around it.
//!
//! - *hit*: packets of installed flows in random order, with the mask cache.
//! - *hit, no cache*: the same without it: what an attacker's random packets cost.
//! - *miss*: packets that no flow matches.
//! - *linear scan*: looking at each mask in turn (the oracle of the tests).
//!
//! Masks are made as in a Tuple Space Explosion attack (CVE-2019-25076): the prefixes that tell packets
//! from one rule for a source, a destination and a port, each combination a mask; megaflows of different
//! masks don't overlap, as those of ovs-vswitchd don't.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow};
use benches::cpu;
use benches::report::Report;
use clap::Parser;
use crossbeam_epoch::LocalHandle;
use flow::action::{Action, ActionList};
use flow::cache::{LookupCounters, MaskCache};
use flow::flow::{NewFlow, Ufid};
use flow::key::Key;
use flow::table::{FlowTable, Reclaimer, TableConfig};

/// Nanoseconds a lookup against flows and masks.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each case has its turn.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Numbers of flows.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10_000, 1_000_000])]
    flows: Vec<u32>,
    /// Numbers of masks.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 1024, 8192])]
    masks: Vec<u32>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

const LOOKUPS: u32 = 500_000;
const BATCH: u32 = 32;
/// Packets that are looked up in turn.
const PACKETS: u32 = 100_000;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let mut report = Report::new("lookup");
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    for masks in &arguments.masks {
        for flows in arguments.flows.iter().filter(|flows| *flows >= masks) {
            let case = Case::new(*flows, *masks, &reclaimer, &handle)?;
            let metric = format!("{flows} flow(s), {} mask(s)", case.table.n_masks());
            eprintln!("{metric}");
            report.add(&metric, "insert, ns", Some(case.insert_ns));
            for _ in 0..arguments.rounds {
                report.add(
                    &metric,
                    "hit, ns",
                    Some(case.time(4096, &case.hits, &handle)),
                );
                let uncached = case.time(0, &case.hits, &handle);
                report.add(&metric, "hit, no cache, ns", Some(uncached));
                report.add(
                    &metric,
                    "miss, ns",
                    Some(case.time(4096, &case.misses, &handle)),
                );
                report.add(&metric, "linear scan, ns", Some(case.scan(*masks, &handle)));
            }
            drop(case);
            while reclaimer.pending() != 0 {
                reclaimer.reap(&handle);
            }
        }
    }
    report.finish("hit, no cache, ns")
}

/// A filled table and packets for it, each with its hash.
struct Case {
    table: FlowTable,
    hits: Vec<(Key, u32)>,
    misses: Vec<(Key, u32)>,
    insert_ns: f64,
}

impl Case {
    fn new(
        flows: u32,
        masks: u32,
        reclaimer: &Arc<Reclaimer>,
        handle: &LocalHandle,
    ) -> Result<Self> {
        let table = FlowTable::new(TableConfig::new(0x5eed, 1), reclaimer)
            .map_err(|_| anyhow!("no table"))?;
        let actions = Arc::new(ActionList {
            program: [Action::Output(2)].into(),
            wire: [].into(),
        });
        let mut random = Random(7);
        let combination = |n: u32| Combination::new(8191 - n % masks * (8192 / masks));
        let start = Instant::now();
        for n in 0..flows {
            let (of, port) = (combination(n), n / masks + 1);
            let key = of.packet(port, &mut random);
            let ufid = Ufid::new(&n.to_be_bytes());
            let prepared =
                table.prepare(NewFlow::new(ufid, &key, &of.mask(), Arc::clone(&actions)));
            let writer = table.write(handle);
            if writer.find_overlap(&key).is_none() {
                writer.insert(prepared).map_err(|e| anyhow!("{e:?}"))?;
            }
        }
        let insert_ns = start.elapsed().as_nanos() as f64 / table.n_flows() as f64;
        let hits: Vec<(Key, u32)> = (0..PACKETS)
            .map(|_| {
                let n = random.next() % flows;
                (combination(n).packet(n / masks + 1, &mut random), n + 1)
            })
            .collect();
        let elsewhere = |(key, hash): &(Key, u32)| {
            let mut key = *key;
            key.recirc_id = 9;
            (key, *hash)
        };
        Ok(Self {
            misses: hits.iter().map(elsewhere).collect(),
            hits,
            table,
            insert_ns,
        })
    }

    /// Nanoseconds a lookup, with a mask cache of that size.
    fn time(&self, cache_size: u32, packets: &[(Key, u32)], handle: &LocalHandle) -> f64 {
        // The sizes given here are ones that it takes.
        let _ = self.table.set_masks_cache_size(cache_size);
        let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
        let mut packets = packets.iter().cycle();
        let mut guard = handle.pin();
        let start = Instant::now();
        for _ in 0..LOOKUPS / BATCH {
            guard.repin();
            for (key, hash) in packets.by_ref().take(BATCH as usize) {
                let found =
                    self.table
                        .lookup(black_box(key), *hash, &guard, &mut cache, &mut counters);
                black_box(found);
            }
        }
        start.elapsed().as_nanos() as f64 / f64::from(LOOKUPS / BATCH * BATCH)
    }

    /// Nanoseconds a look at each mask in turn.
    fn scan(&self, masks: u32, handle: &LocalHandle) -> f64 {
        let count = (LOOKUPS / masks / 8).max(100);
        let guard = handle.pin();
        let start = Instant::now();
        for (key, _) in self.hits.iter().cycle().take(count as usize) {
            black_box(self.table.scan(black_box(key), &guard));
        }
        start.elapsed().as_nanos() as f64 / f64::from(count)
    }
}

/// Where packets first differ from a rule's source, destination and port.
#[derive(Clone, Copy)]
struct Combination([u32; 3]);

impl Combination {
    const WIDTHS: [u32; 3] = [32, 16, 16];

    /// One of 8,192.
    fn new(n: u32) -> Self {
        Self([n % 32, n / 32 % 16, n / 512 % 16])
    }

    fn mask(self) -> Key {
        let ones = |at: usize| {
            let width = Self::WIDTHS[at];
            (1_u64 << width) - (1_u64 << (width - 1 - self.0[at]))
        };
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

    /// A packet of this megaflow on `port`, otherwise at random.
    fn packet(self, port: u32, random: &mut Random) -> Key {
        let mut field = |at: usize, rule: u32| {
            let rest = Self::WIDTHS[at] - 1 - self.0[at];
            let below = ((1_u64 << rest) - 1) as u32;
            (rule ^ (1 << rest)) & !below | random.next() & below
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
        key.tp_src = (random.next() as u16).into();
        key
    }
}

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
}
