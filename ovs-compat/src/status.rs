//! `ovs-dpd status`: what the daemon is doing, as tables or JSON.

use std::fmt::Write as _;
use std::io::{IsTerminal, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, presets};
use datapath::status::{DatapathStatus, PacketCounts, Status};

use crate::rundir::RunDir;

/// Asks the daemon, and prints.
pub fn status(path: &Path, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", ask_json(path)?.trim_end())?;
        return Ok(());
    }
    let status = ask(path)?;
    out.write_all(show(&status, std::io::stdout().is_terminal())?.as_bytes())?;
    Ok(())
}

/// The status of the daemon of that run directory.
pub fn ask(path: &Path) -> Result<Status> {
    serde_json::from_str(&ask_json(path)?)
        .context("the daemon's answer can't be read: is it of another version?")
}

fn ask_json(path: &Path) -> Result<String> {
    let run_dir = RunDir::new(path);
    let mut stream = UnixStream::connect(run_dir.status_socket()).with_context(|| {
        format!(
            "no daemon answers on {}: start one with `ovs-dpd run --run-dir {}`",
            path.display(),
            path.display()
        )
    })?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .context("the daemon broke off in the middle of its answer")?;
    Ok(text)
}

fn show(status: &Status, terminal: bool) -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "ovs-dpd {}, process {}, up {:.0} s, {} worker{}, {} client sockets",
        status.version,
        status.pid,
        status.uptime_s,
        status.workers.len(),
        if status.workers.len() == 1 { "" } else { "s" },
        status.clients.len()
    )?;
    if status.captures != 0 {
        writeln!(text, "captures in progress: {}", status.captures)?;
    }
    for note in &status.notes {
        writeln!(text, "note: {note}")?;
    }
    if status.datapaths.is_empty() {
        writeln!(
            text,
            "no datapaths: ovs-vswitchd makes one when it starts under `ovs-dpd exec`"
        )?;
    }
    show_workers(&mut text, status)?;
    show_conntrack(&mut text, status)?;
    for datapath in &status.datapaths {
        show_datapath(&mut text, datapath, terminal)?;
    }
    Ok(text)
}

/// Queues of a worker that are shown by name.
const BUSIEST: usize = 4;

/// A line each.
fn show_workers(text: &mut String, status: &Status) -> Result<()> {
    for (number, worker) in status.workers.iter().enumerate() {
        let cpu = match worker.cpu {
            Some(cpu) => format!(" on CPU {cpu}"),
            None => String::new(),
        };
        write!(
            text,
            "worker {number}{cpu}: busy {:.0} %, {} queue{}",
            worker.busy_share * 100.0,
            worker.queues.len(),
            if worker.queues.len() == 1 { "" } else { "s" }
        )?;
        let mut queues: Vec<_> = worker
            .queues
            .iter()
            .filter(|q| q.busy_share >= 0.01)
            .collect();
        queues.sort_by(|a, b| b.busy_share.total_cmp(&a.busy_share));
        for (index, queue) in queues.iter().take(BUSIEST).enumerate() {
            let comma = if index == 0 { ":" } else { "," };
            write!(
                text,
                "{comma} {} {:.0} %",
                queue.port,
                queue.busy_share * 100.0
            )?;
        }
        writeln!(text)?;
    }
    if status.queue_moves != 0 {
        writeln!(
            text,
            "queues moved from busy workers to idle ones: {}",
            status.queue_moves
        )?;
    }
    Ok(())
}

/// Nothing while there has been no connection.
fn show_conntrack(text: &mut String, status: &Status) -> Result<()> {
    let of = &status.conntrack;
    if of.inserted + of.invalid + of.limited + of.fragments_waiting == 0 {
        return Ok(());
    }
    writeln!(
        text,
        "conntrack: {} connections of {} at most, {} expected; {} made, {} expired, {} deleted; refused: clash {} limit {} full {}; \
         evicted {}; invalid packets {}; reassembled {}",
        of.connections,
        status.connections_limit,
        of.expectations,
        of.inserted,
        of.expired,
        of.deleted,
        of.insert_failed.saturating_sub(of.clash_resolved + of.full),
        of.limited,
        of.full,
        of.early_drop,
        of.invalid,
        of.reassembled,
    )?;
    Ok(())
}

fn show_datapath(text: &mut String, datapath: &DatapathStatus, terminal: bool) -> Result<()> {
    let lookups = &datapath.lookups;
    let readers = match datapath.upcall_dispatch.as_str() {
        "per-cpu" => format!(" to {} readers", datapath.per_cpu_readers),
        _ => String::new(),
    };
    writeln!(
        text,
        "\ndatapath {} (ifindex {})",
        datapath.name, datapath.ifindex
    )?;
    writeln!(
        text,
        "  flows {}, masks {} (cache {}), meters {}, lookups: hit {} missed {} through the cache {}",
        datapath.flows,
        datapath.masks,
        datapath.masks_cache_size,
        datapath.meters,
        lookups.hit,
        lookups.missed,
        lookups.cache_hit
    )?;
    writeln!(
        text,
        "  upcalls {}{readers}: sent {} lost {}",
        datapath.upcall_dispatch, datapath.packets.upcalls, datapath.packets.upcalls_lost
    )?;
    writeln!(text, "  dropped: {}", drops(&datapath.packets))?;
    let mut table = table(
        terminal,
        &[
            "port",
            "name",
            "type",
            "driver",
            "received",
            "transmitted",
            "upcalls",
            "lost",
            "dropped",
        ],
    );
    for port in &datapath.ports {
        table.add_row([
            port.number.to_string(),
            port.name.clone(),
            port.kind.clone(),
            port.driver.clone(),
            port.packets.received.to_string(),
            port.packets.transmitted.to_string(),
            port.packets.upcalls.to_string(),
            port.packets.upcalls_lost.to_string(),
            drops(&port.packets),
        ]);
    }
    writeln!(text, "{table}")?;
    if !datapath.elsewhere.dropped.is_empty() {
        writeln!(
            text,
            "  dropped without a port, or at ports that are gone: {}",
            drops(&datapath.elsewhere)
        )?;
    }
    for port in &datapath.ports {
        write!(text, "  {}: {}", port.name, port.mode)?;
        if port.host_queue_full + port.host_rx_errors != 0 {
            write!(
                text,
                "; lost before us: {} (queue full), {} (unusable)",
                port.host_queue_full, port.host_rx_errors
            )?;
        }
        if let Some(ring) = &port.ring
            && (ring.produced + ring.dropped_full != 0 || ring.policy == "backpressure")
        {
            write!(text, "; ring: {}", crate::stream::ring(ring))?;
        }
        writeln!(text)?;
    }
    Ok(())
}

fn drops(packets: &PacketCounts) -> String {
    if packets.dropped.is_empty() {
        return "0".to_owned();
    }
    packets
        .dropped
        .iter()
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// An empty table.
pub fn table(terminal: bool, header: &[&str]) -> Table {
    let mut table = Table::new();
    if terminal {
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.load_style(presets::NOTHING);
    }
    table.set_header(header.to_vec());
    table
}
