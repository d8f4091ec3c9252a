//! Nanoseconds of CPU a lookup against flows and masks, in one thread, nothing else around it.
//!
//! - *hit*: packets of all flows in random order, as batches come from a port: caches are defeated.
//! - *hit, one flow*: all packets belong to one flow.
//! - *miss*: packets that no flow matches.
//! - *alone*: as *hit*, one packet at a time: what recirculated packets are looked up by.
//! - *linear scan*: looking at each mask in turn (the oracle of the tests).
//! - *to one mask*: hit, in proportion to the table with as many flows of one mask, in the same round.
//! - *insert*, *remove*: a change by one thread while another looks packets up without a pause.
//!
//! Masks are made as in a Tuple Space Explosion attack (CVE-2019-25076): the prefixes that tell packets
//! from one rule for a source, a destination and a port, each combination a mask; megaflows of different
//! masks don't overlap, as those of ovs-vswitchd don't.
//!
//! The keys of a batch are at hand when it is looked up, since whoever looks up has just extracted them;
//! so they are copied before the clock is read.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, anyhow};
use benches::cpu;
use benches::plot::{Axis, Chart};
use benches::report::Report;
use clap::Parser;
use common::{Random, cpu as now, filled, new_flow, output, packets};
use crossbeam_epoch::LocalHandle;
use flow::cache::{LookupCounters, MaskCache};
use flow::flow::Ufid;
use flow::key::Key;
use flow::table::{FlowTable, InsertError, LANES, Reclaimer};

#[path = "../flow/examples/common/mod.rs"]
mod common;

/// Nanoseconds a lookup against flows and masks.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each case has its turn.
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Numbers of flows.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 10_000, 100_000, 1_000_000])]
    flows: Vec<u32>,
    /// Numbers of masks.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 1024, 8192])]
    masks: Vec<u32>,
    /// Draw benches/plots/lookup-*.svg.
    #[arg(long)]
    plot: bool,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

const LOOKUPS: u32 = 100_000;
const BATCH: usize = 32;
/// Changes that are timed in one turn.
const CHANGES: u32 = 20_000;

const HIT: &str = "hit, ns";
const ONE: &str = "hit, one flow, ns";
const MISS: &str = "miss, ns";
const ALONE: &str = "alone, ns";
const SCAN: &str = "linear scan, ns";

type Packets = Vec<(Key, u32)>;

fn metric(flows: u32, masks: u32) -> String {
    format!("{flows} flow(s), {masks} mask(s)")
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    cpu::ahead_of_others();
    let mut report = Report::new("lookup");
    for &flows in &arguments.flows {
        // All tables of as many flows take turns.
        let reclaimer = Arc::new(Reclaimer::new());
        let handle = reclaimer.register();
        let masks = arguments.masks.iter().filter(|masks| **masks <= flows);
        let cases: Vec<Case> = masks
            .map(|masks| Case::new(flows, *masks, &reclaimer, &handle))
            .collect::<Result<_>>()?;
        for _ in 0..arguments.rounds {
            let mut one_mask = None;
            for case in &cases {
                let metric = metric(flows, case.masks);
                let mut add = |subject: &str, value: f64| {
                    report.add(&metric, subject, Some(value));
                    value
                };
                let hit = add(HIT, case.batches(&case.hits, &handle));
                add("to one mask", hit / *one_mask.get_or_insert(hit));
                add(ONE, case.batches(&case.same, &handle));
                add(MISS, case.batches(&case.misses, &handle));
                add(ALONE, case.alone(&handle));
                add(SCAN, case.scan(&handle));
                let (insert, remove) = case.changes(&reclaimer, &handle)?;
                add("insert, ns", insert);
                add("remove, ns", remove);
            }
        }
    }
    if arguments.plot {
        plot(&report, &arguments)?;
    }
    report.finish_table()
}

/// A filled table and packets for it, each with its hash.
struct Case {
    masks: u32,
    flows: u32,
    table: FlowTable,
    hits: Packets,
    same: Packets,
    misses: Packets,
}

impl Case {
    fn new(
        flows: u32,
        masks: u32,
        reclaimer: &Arc<Reclaimer>,
        handle: &LocalHandle,
    ) -> Result<Self> {
        let table = filled(flows, masks, reclaimer, handle).map_err(|error| anyhow!("{error}"))?;
        while table.maintain(handle, 1000, || ()) {}
        let hits = packets(flows, masks, LOOKUPS);
        let elsewhere = |&(key, hash): &(Key, u32)| {
            let recirc_id = 9;
            (Key { recirc_id, ..key }, hash)
        };
        Ok(Self {
            masks,
            flows,
            same: hits.iter().cycle().take(1).copied().collect(),
            misses: hits.iter().map(elsewhere).collect(),
            hits,
            table,
        })
    }

    /// Nanoseconds a packet that is looked up beside those of its batch.
    fn batches(&self, packets: &Packets, handle: &LocalHandle) -> f64 {
        let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
        timed(packets, handle, |batch, guard| {
            for group in batch.chunks(LANES) {
                black_box(self.table.lookup_batch(
                    black_box(group),
                    |packet| (&packet.0, packet.1),
                    guard,
                    &mut cache,
                    &mut counters,
                ));
            }
        })
    }

    /// Nanoseconds a packet that is looked up by itself.
    fn alone(&self, handle: &LocalHandle) -> f64 {
        let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
        timed(&self.hits, handle, |batch, guard| {
            for (key, hash) in batch {
                black_box(self.table.lookup(
                    black_box(key),
                    *hash,
                    guard,
                    &mut cache,
                    &mut counters,
                ));
            }
        })
    }

    /// Nanoseconds a look at each mask in turn.
    fn scan(&self, handle: &LocalHandle) -> f64 {
        let count = (LOOKUPS / self.masks / 8).max(20);
        let guard = handle.pin();
        let start = now();
        for (key, _) in self.hits.iter().cycle().take(count as usize) {
            black_box(self.table.scan(black_box(key), &guard));
        }
        (now() - start) as f64 / f64::from(count)
    }

    /// Nanoseconds of the writer to put a flow in, and to take it out, beside a thread that looks up.
    fn changes(&self, reclaimer: &Arc<Reclaimer>, handle: &LocalHandle) -> Result<(f64, f64)> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let handle = reclaimer.register();
                while !stop.load(Ordering::Relaxed) {
                    self.batches(&self.hits, &handle);
                }
            });
            let (actions, mut random) = (output(), Random(5));
            // Of the masks that are there, behind the flows that are.
            let numbers = self.flows..self.flows + CHANGES;
            let prepared: Vec<_> = numbers
                .clone()
                .map(|n| {
                    self.table
                        .prepare(new_flow(n, self.masks, &actions, &mut random))
                })
                .collect();
            let start = now();
            let mut done = Ok(());
            for flow in prepared {
                match self.table.write(handle).insert(flow) {
                    Ok(_) | Err(InsertError::KeyInUse(_) | InsertError::IdInUse(_)) => {}
                    Err(error) => done = Err(anyhow!("{error}")),
                }
            }
            let inserted = now();
            for n in numbers {
                let writer = self.table.write(handle);
                let id = Ufid::new(&n.wrapping_mul(0x9e37_79b1).to_be_bytes());
                if let Some(flow) = id.and_then(|id| writer.find_ufid(&id)) {
                    writer.remove(flow);
                }
            }
            let removed = now();
            stop.store(true, Ordering::Relaxed);
            reclaimer.reap(handle);
            let each = |from: u64, to: u64| (to - from) as f64 / f64::from(CHANGES);
            done.map(|()| (each(start, inserted), each(inserted, removed)))
        })
    }
}

/// Nanoseconds a packet, in batches whose keys are at hand.
fn timed(
    packets: &Packets,
    handle: &LocalHandle,
    mut work: impl FnMut(&Packets, &crossbeam_epoch::Guard),
) -> f64 {
    let mut guard = handle.pin();
    let batches = LOOKUPS / BATCH as u32;
    let mut spent = 0;
    let mut from = packets.iter().copied().cycle();
    let mut batch = Packets::with_capacity(BATCH);
    for _ in 0..batches {
        guard.repin();
        batch.clear();
        batch.extend(from.by_ref().take(BATCH));
        let start = now();
        work(&batch, &guard);
        spent += now() - start;
    }
    // What looking at the clock takes isn't the table's.
    let clock: u64 = (0..batches)
        .map(|_| {
            let start = now();
            now() - start
        })
        .sum();
    spent.saturating_sub(clock) as f64 / f64::from(batches * BATCH as u32)
}

fn plot(report: &Report, arguments: &Arguments) -> Result<()> {
    let ns = || Axis::log("ns of CPU a packet");
    let mut by_masks = Chart::new(
        "A lookup against masks (random packets of all flows)",
        Axis::log("masks"),
        ns(),
    );
    let mut by_flows = Chart::new("A lookup against flows", Axis::log("flows"), ns());
    for &flows in &arguments.flows {
        for &masks in arguments.masks.iter().filter(|masks| **masks <= flows) {
            let of = |subject| report.spread(&metric(flows, masks), subject);
            let put = |chart: &mut Chart, series: &str, x: u32, subject| {
                if let Some(spread) = of(subject) {
                    chart.spread(series, f64::from(x), spread);
                }
            };
            if flows >= 10_000 {
                put(&mut by_masks, &format!("{flows} flows"), masks, HIT);
            }
            if flows == 10_000 {
                put(&mut by_masks, "10000 flows, linear scan", masks, SCAN);
            }
            put(
                &mut by_flows,
                &format!("{masks} masks, all flows"),
                flows,
                HIT,
            );
            if [1, 8192].contains(&masks) {
                put(
                    &mut by_flows,
                    &format!("{masks} masks, one flow"),
                    flows,
                    ONE,
                );
                put(
                    &mut by_flows,
                    &format!("{masks} masks, packets alone"),
                    flows,
                    ALONE,
                );
            }
        }
    }
    by_masks.write("lookup-masks")?;
    by_flows.write("lookup-flows")?;
    Ok(())
}
