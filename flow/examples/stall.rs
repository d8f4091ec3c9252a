//! How long a reader is held up by a writer: the longest lookups of a group of packets, in microseconds of
//! the reader's own CPU time, while nobody writes and while one writer changes the table as fast as it can, with a
//! reaper behind it. `cargo run --release -p flow --example stall`
//!
//! Each group of sixteen is timed, so a figure has the cost of looking at the clock in it, and whatever interrupts
//! the machine serves in the reader's time. So each kind of writer has its turns at the reader's table
//! (`here`) and at one that is nobody's (`elsewhere`), with a reaper each: what the first has more is the
//! readers' share. Figures over all turns.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use common::{MASKS, Random, cpu, filled, new_flow, output, packets};
use flow::cache::{LookupCounters, MaskCache};
use flow::flow::Ufid;
use flow::table::{FlowTable, InsertError, LANES, Reclaimer};

mod common;

/// Groups of packets that are looked up in a turn.
const GROUPS: usize = 100_000;
const TURNS: usize = 8;

/// What the writer does meanwhile.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Writer {
    None,
    /// Inserts and removes flows of a mask each.
    Masks,
    /// Inserts and removes flows of masks that are there.
    Flows,
    /// Takes everything out, and puts it in again.
    Flush,
}

fn write(table: &FlowTable, reclaimer: &Arc<Reclaimer>, kind: Writer, stop: &AtomicBool) {
    let handle = reclaimer.register();
    let (actions, mut random) = (output(), Random(5));
    // Masks are those of the second half; the flows that are looked up have the first.
    let (masks, flows) = match kind {
        Writer::None => return,
        Writer::Masks => (MASKS, MASKS),
        Writer::Flows | Writer::Flush => (MASKS, 100_000),
    };
    while !stop.load(Relaxed) {
        for n in 0..flows {
            if stop.load(Relaxed) {
                return;
            }
            let prepared = table.prepare(new_flow(n, masks, &actions, &mut random));
            match table.write(&handle).insert(prepared) {
                Ok(_) | Err(InsertError::KeyInUse(_) | InsertError::IdInUse(_)) => {}
                Err(InsertError::Full) => return,
            }
        }
        if kind == Writer::Flush {
            table.write(&handle).flush();
            continue;
        }
        for n in 0..flows {
            let writer = table.write(&handle);
            let id = Ufid::new(&n.wrapping_mul(0x9e37_79b1).to_be_bytes());
            if let Some(flow) = id.and_then(|id| writer.find_ufid(&id)) {
                writer.remove(flow);
            }
        }
    }
}

/// The times of [`GROUPS`] groups, beside a writer of this table or of another.
fn turn(kind: Writer, here: bool, times: &mut Vec<u64>) -> Result<(), Box<dyn std::error::Error>> {
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    let table = filled(10_000, MASKS, &reclaimer, &handle)?;
    let other_reclaimer = Arc::new(Reclaimer::new());
    let other = filled(10_000, MASKS, &other_reclaimer, &other_reclaimer.register())?;
    let hits = packets(10_000, MASKS, 100_000);
    let (written, used) = if here {
        (&table, &reclaimer)
    } else {
        (&other, &other_reclaimer)
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| write(written, used, kind, &stop));
        scope.spawn(|| {
            let handle = used.register();
            while !stop.load(Relaxed) {
                if used.reap(&handle) == 0 {
                    used.wait(Duration::from_millis(1));
                }
                written.maintain(&handle, 8, std::thread::yield_now);
            }
        });
        let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
        let mut guard = handle.pin();
        let groups = hits.as_slice().chunks_exact(LANES).cycle().take(GROUPS);
        for (n, group) in groups.enumerate() {
            let start = cpu();
            if n % 2 == 0 {
                guard.repin();
            }
            // Now and then as a worker with nothing to do.
            if n % 256 == 0 {
                drop(guard);
                guard = handle.pin();
            }
            black_box(table.lookup_batch(
                black_box(group),
                |packet| (&packet.0, packet.1),
                &guard,
                &mut cache,
                &mut counters,
            ));
            times.push(cpu() - start);
        }
        stop.store(true, Relaxed);
    });
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "{:<18} {:>8} {:>8} {:>8} {:>9} {:>9} {:>11}",
        "us of CPU", "p50", "p99.9", "p99.99", "p99.9999", "longest", "over 50 us"
    );
    for kind in [Writer::None, Writer::Masks, Writer::Flows, Writer::Flush] {
        let mut times = [(); 2].map(|()| vec![1; GROUPS * TURNS]);
        times.iter_mut().for_each(Vec::clear);
        for _ in 0..TURNS {
            for (times, here) in times.iter_mut().zip([true, false]) {
                turn(kind, here, times)?;
            }
        }
        for (times, place) in times.iter_mut().zip(["here", "elsewhere"]) {
            let over = times.iter().filter(|time| **time > 50_000).count();
            times.sort_unstable();
            let last = times.len().saturating_sub(1) as f64;
            let at = |part: f64| {
                let time = times.get((last * part) as usize);
                time.map_or(0.0, |&ns| ns as f64 / 1e3)
            };
            println!(
                "{:<18} {:>8.2} {:>8.2} {:>8.2} {:>9.2} {:>9.2} {over:>11}",
                format!("{kind:?} {place}"),
                at(0.5),
                at(0.999),
                at(0.9999),
                at(0.999_999),
                at(1.0)
            );
        }
    }
    Ok(())
}
