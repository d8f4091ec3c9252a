//! How long single changes of a table take its writer, in microseconds of its own CPU time: the usual
//! one, and the tail. `cargo run --release -p flow --example update`
//!
//! The masks are those of a Tuple Space Explosion, coming in three orders; then a million flows. A row
//! for each kind of change.

use std::sync::Arc;

use common::{MASKS, cpu, new_flow, output};
use flow::flow::Ufid;
use flow::table::{FlowTable, InsertError, Reclaimer, TableConfig};

mod common;

fn row(what: &str, mut times: Vec<u64>) {
    times.sort_unstable();
    let at = |part: f64| {
        let last = times.len().saturating_sub(1);
        times
            .get((last as f64 * part) as usize)
            .copied()
            .unwrap_or(0) as f64
            / 1e3
    };
    let mean = times.iter().sum::<u64>() as f64 / times.len() as f64 / 1e3;
    println!(
        "{what:<34} {:>8} {mean:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>9.2}",
        times.len(),
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0)
    );
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "{:<34} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9}",
        "us of CPU", "changes", "mean", "p50", "p99", "p99.9", "longest"
    );
    // The flow numbers say the mask: `n % MASKS`.
    type Order = fn(u32) -> u32;
    let orders: [(&str, Order, u32, u32); 5] = [
        ("8192 masks, up", |n| MASKS - 1 - n, MASKS, MASKS),
        ("8192 masks, down", |n| n, MASKS, MASKS),
        ("8192 masks, mixed", |n| n * 5_167 % MASKS, MASKS, MASKS),
        ("8192 masks, 1M flows", |n| n, 1_000_000, MASKS),
        ("1 mask, 1M flows", |n| n, 1_000_000, 1),
    ];
    for (name, order, flows, masks) in orders {
        let reclaimer = Arc::new(Reclaimer::new());
        let handle = reclaimer.register();
        let table = FlowTable::new(TableConfig::new(0x5eed, 1), &reclaimer)?;
        let (actions, mut random) = (output(), common::Random(7));
        let id = |n: u32| Ufid::new(&order(n).wrapping_mul(0x9e37_79b1).to_be_bytes());
        let mut inserts = Vec::with_capacity(flows as usize);
        for n in 0..flows {
            let prepared = table.prepare(new_flow(order(n), masks, &actions, &mut random));
            let start = cpu();
            let writer = table.write(&handle);
            match writer.insert(prepared) {
                Ok(_) | Err(InsertError::KeyInUse(_)) => {}
                Err(error) => return Err(error.into()),
            }
            drop(writer);
            inserts.push(cpu() - start);
            if n % 1024 == 0 {
                reclaimer.reap(&handle);
            }
        }
        row(&format!("{name}: insert"), inserts);
        let mut removals = Vec::with_capacity(flows as usize);
        for n in 0..flows {
            let start = cpu();
            let writer = table.write(&handle);
            if let Some(flow) = id(n).and_then(|id| writer.find_ufid(&id)) {
                writer.remove(flow);
            }
            drop(writer);
            removals.push(cpu() - start);
            if n == flows / 2 {
                let start = cpu();
                table.maintain(&handle, usize::MAX, || ());
                row(&format!("{name}: maintain"), vec![cpu() - start]);
            }
            if n % 1024 == 0 {
                reclaimer.reap(&handle);
            }
        }
        row(&format!("{name}: remove"), removals);
        let start = cpu();
        table.write(&handle).flush();
        row(&format!("{name}: flush"), vec![cpu() - start]);
        reclaimer.reap(&handle);
    }
    Ok(())
}
