//! What a flow costs in memory, with 100,000 and 1,000,000 of them; and how fast they are installed,
//! shown and taken out. `cargo run --release -p flow --example memory`

use std::io::Error;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use flow::action::{Action, ActionList};
use flow::flow::{NewFlow, Ufid};
use flow::key::Key;
use flow::table::{FlowTable, Reclaimer, TableConfig};

/// Resident bytes of this process.
fn resident() -> Result<u64, Error> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.unwrap_or(0) * 4096)
}

/// A connection's megaflow as ovs-vswitchd installs it for a five-tuple.
fn connection(n: u32) -> (Key, Key) {
    let mut key = Key {
        in_port: 1,
        ip_proto: 6,
        ..Key::ZERO
    };
    key.eth_type = 0x0800.into();
    key.ip_src[..4].copy_from_slice(&n.to_be_bytes());
    key.ip_dst[..4].copy_from_slice(&n.rotate_left(16).to_be_bytes());
    key.tp_src = (n as u16).into();
    key.tp_dst = 80.into();
    let mut mask = Key {
        recirc_id: u32::MAX,
        in_port: u32::MAX,
        ip_proto: 0xff,
        ip_frag: 3,
        ..Key::ZERO
    };
    mask.eth_type = 0xffff.into();
    (mask.eth_src, mask.eth_dst) = ([0xff; 6], [0xff; 6]);
    mask.vlan.tci = 0xffff.into();
    mask.ip_src[..4].fill(0xff);
    mask.ip_dst[..4].fill(0xff);
    (mask.tp_src, mask.tp_dst) = (0xffff.into(), 0xffff.into());
    (key, mask)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    for flows in [100_000u32, 1_000_000] {
        let table = FlowTable::new(TableConfig::new(0x5eed, u64::from(flows)), &reclaimer)?;
        let before = resident()?;
        let (start, mut worst) = (Instant::now(), 0);
        for n in 0..flows {
            let (key, mask) = connection(n);
            let ufid = Ufid::new(
                &u128::from(n)
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .to_be_bytes(),
            );
            let actions = ActionList {
                program: [Action::Output(2)].into(),
                wire: [0; 8].into(),
            };
            let prepared = table.prepare(NewFlow::new(ufid, &key, &mask, Arc::new(actions)));
            let one = Instant::now();
            let writer = table.write(&handle);
            writer.insert(prepared)?;
            drop(writer);
            worst = worst.max(one.elapsed().as_micros());
        }
        let insert = start.elapsed();
        let per_flow = (resident()? - before) / u64::from(flows);
        println!("{flows} flows: {per_flow} bytes each, all included");
        println!("  insert {:?} each, the longest {worst} us", insert / flows);

        let start = Instant::now();
        let (mut cursor, mut shown, mut packets) = (table.dump_start(), 0, 0);
        let guard = handle.pin();
        table.dump(&mut cursor, &guard, |flow| {
            shown += u32::from(flow.ufid().is_some());
            packets += flow.stats().packets;
            ControlFlow::Continue(())
        })?;
        drop(guard);
        let dump = start.elapsed();
        println!(
            "  dump of ids and statistics {:?} each ({shown} flows, {packets} packets)",
            dump / flows
        );

        let (start, mut worst) = (Instant::now(), 0);
        for n in 0..flows / 2 {
            let ufid = Ufid::new(
                &u128::from(n)
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .to_be_bytes(),
            );
            let one = Instant::now();
            let writer = table.write(&handle);
            if let Some(flow) = ufid.and_then(|ufid| writer.find_ufid(&ufid)) {
                writer.remove(flow);
            }
            drop(writer);
            worst = worst.max(one.elapsed().as_micros());
        }
        println!(
            "  delete {:?} each, the longest {worst} us",
            start.elapsed() / (flows / 2)
        );
        let start = Instant::now();
        table.write(&handle).flush();
        println!("  flush of the rest {:?}", start.elapsed());
        let start = Instant::now();
        let batches = reclaimer.reap(&handle);
        println!("  reaper {:?} for {batches} batches", start.elapsed());
    }
    Ok(())
}
