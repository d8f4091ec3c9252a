//! What `cargo xtask guard` counts the instructions of: the work for a packet, case by case.
//!
//! Run under callgrind, which counts in [`measured`] only and writes a total each time that returns. The
//! names of the cases come out in that order, each with its number of packets. Nothing here depends on
//! the clock, on addresses or on chance: the hashes' seeds are fixed.
//!
//! A new case is one more call of [`Guard::case`]; then `cargo xtask guard --renew`.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::Result;
use flow::cache::{LookupCounters, MaskCache};
use flow::extract::{self, Metadata};
use flow::hash;
use flow::key::Key;
use flow::table::{FlowTable, LANES, Reclaimer};
use vport::ring::{Notify, Ring};

#[path = "../../../flow/examples/common/mod.rs"]
mod common;
mod forward;
mod frames;
mod sink;

/// Packets of a case.
const PACKETS: usize = 256;

/// Callgrind counts what this calls, and only that.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
    // So that there is something to return to: a jump in its place would end no call.
    black_box(());
}

/// The cases in their order.
struct Guard;

impl Guard {
    /// Measures `work`, which is done to so many packets. What is done only once, such as taking memory
    /// that is used again, is done before: `work` runs twice.
    fn case(&self, name: &str, packets: usize, mut work: impl FnMut()) {
        work();
        measured(&mut work);
        println!("{packets}\t{name}");
    }
}

fn main() -> Result<()> {
    let guard = Guard;
    parse(&guard);
    lookup(&guard)?;
    forward::forward(&guard)?;
    rings(&guard);
    Ok(())
}

/// Nobody to wake.
struct Quiet;

impl Notify for Quiet {
    fn work(&self) {}
    fn resume(&self) {}
}

/// A frame into a ring and out again.
fn rings(guard: &Guard) {
    for (batch, backpressure) in [(1, true), (32, true), (32, false)] {
        let ring = Ring::new(PACKETS, backpressure, Quiet);
        let mut frames: Vec<_> = (0..batch).map(|_| frames::tcp4()).collect();
        let mut back = Vec::with_capacity(batch);
        let kind = if backpressure {
            "back-pressure"
        } else {
            "no back-pressure"
        };
        guard.case(&format!("ring, {batch} at a time, {kind}"), PACKETS, || {
            for _ in 0..PACKETS / batch {
                ring.push(frames.drain(..), |_refused| ());
                ring.pop(batch, |frame| {
                    back.push(frame);
                    true
                });
                std::mem::swap(&mut frames, &mut back);
            }
        });
    }
}

fn parse(guard: &Guard) {
    let meta = Metadata {
        in_port: 1,
        ..Metadata::default()
    };
    for (name, frame) in frames::all() {
        let (mut frame, mut key) = (frame, Key::ZERO);
        guard.case(&format!("parse {name}"), PACKETS, || {
            for _ in 0..PACKETS {
                let layers = extract::extract(black_box(&mut frame), &meta, &mut key);
                black_box((&layers, &key));
            }
        });
    }
    let mut key = Key::ZERO;
    let mut frame = frames::tcp4();
    if extract::extract(&mut frame, &meta, &mut key).is_ok() {
        guard.case("hash of TCP over IPv4", PACKETS, || {
            for _ in 0..PACKETS {
                black_box(hash::l4(black_box(&key), 7));
            }
        });
    }
}

fn lookup(guard: &Guard) -> Result<()> {
    let reclaimer = Arc::new(Reclaimer::new());
    let handle = reclaimer.register();
    for (flows, masks) in [(1, 1), (4096, 1), (2048, 2048)] {
        let table = common::filled(flows, masks, &reclaimer, &handle)
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        while table.maintain(&handle, 1000, || ()) {}
        let hits = common::packets(flows, masks, PACKETS as u32);
        let misses: Vec<_> = hits
            .iter()
            .map(|&(mut key, hash)| {
                key.recirc_id = 9;
                (key, hash)
            })
            .collect();
        let name = format!("{flows} flows, {masks} masks");
        let pin = handle.pin();
        let (mut cache, mut counters) = (MaskCache::new(), LookupCounters::default());
        let mut batch = |packets: &[(Key, u32)]| {
            for group in packets.chunks(LANES) {
                black_box(table.lookup_batch(
                    black_box(group),
                    |packet| (&packet.0, packet.1),
                    &pin,
                    &mut cache,
                    &mut counters,
                ));
            }
        };
        guard.case(&format!("lookup, {name}"), PACKETS, || batch(&hits));
        guard.case(&format!("lookup, {name}, a miss"), PACKETS, || {
            batch(&misses)
        });
        let alone = format!("lookup of one packet alone, {name}");
        guard.case(&alone, PACKETS, || {
            alone_each(&table, &hits, &pin, &mut cache, &mut counters);
        });
    }
    Ok(())
}

fn alone_each(
    table: &FlowTable,
    packets: &[(Key, u32)],
    pin: &crossbeam_epoch::Guard,
    cache: &mut MaskCache,
    counters: &mut LookupCounters,
) {
    for (key, hash) in packets {
        black_box(table.lookup(black_box(key), *hash, pin, cache, counters));
    }
}
