//! `ovs-dpd status`: what the daemon is doing, as tables or JSON.

use std::fmt::Write as _;
use std::io::{IsTerminal, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{ContentArrangement, Table, presets};
use datapath::conntrack::client::Statistics;
use datapath::status::{DatapathStatus, PacketCounts, Status};

use crate::rundir::RunDir;

/// Asks the daemon, and prints.
pub fn status(path: &Path, json: bool) -> Result<()> {
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
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", text.trim_end())?;
        return Ok(());
    }
    let status: Status = serde_json::from_str(&text)
        .context("the daemon's answer can't be read: is it of another version?")?;
    out.write_all(show(&status, std::io::stdout().is_terminal())?.as_bytes())?;
    Ok(())
}

fn show(status: &Status, terminal: bool) -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "ovs-dpd {}, process {}, up {:.0} s, {} worker{}, {} client sockets",
        status.version,
        status.pid,
        status.uptime_s,
        status.workers,
        if status.workers == 1 { "" } else { "s" },
        status.clients.len()
    )?;
    for note in &status.notes {
        writeln!(text, "note: {note}")?;
    }
    if status.datapaths.is_empty() {
        writeln!(
            text,
            "no datapaths: ovs-vswitchd makes one when it starts under `ovs-dpd exec`"
        )?;
    }
    show_conntrack(&mut text, &status.conntrack)?;
    for datapath in &status.datapaths {
        show_datapath(&mut text, datapath, terminal)?;
    }
    Ok(text)
}

/// Nothing while there has been no connection.
fn show_conntrack(text: &mut String, of: &Statistics) -> Result<()> {
    if of.inserted + of.invalid + of.limited + of.fragments_waiting == 0 {
        return Ok(());
    }
    writeln!(
        text,
        "conntrack: {} connections, {} expected; {} made, {} expired, {} deleted; refused: clash {} limit {} full {}; \
         evicted {}; invalid packets {}; reassembled {}",
        of.connections,
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
        "  flows {}, masks {} (cache {}), lookups: hit {} missed {} through the cache {}",
        datapath.flows,
        datapath.masks,
        datapath.masks_cache_size,
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
    for port in &datapath.ports {
        write!(text, "  {}: {}", port.name, port.mode)?;
        if port.host_queue_full + port.host_rx_errors != 0 {
            write!(
                text,
                "; lost before us: {} (queue full), {} (unusable)",
                port.host_queue_full, port.host_rx_errors
            )?;
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

fn table(terminal: bool, header: &[&str]) -> Table {
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
