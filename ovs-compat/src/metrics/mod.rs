//! `ovs-dpd metrics`: the status in Prometheus' text format.
//!
//! Everything is by datapath and port, and by a fixed set of reasons: nothing that packets say becomes a
//! label. `port=""` stands for what is no port's any more: of ports that are gone, and of packets that were
//! executed without one. So, over a datapath's ports and at rest,
//! `received + executed + copied = transmitted + to_user + held + dropped`.

mod exposition;
mod process;

use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use datapath::status::{DatapathStatus, PacketCounts, PortStatus, Status};
use datapath::stream_status::StreamStatus;

pub use exposition::CONTENT_TYPE;
use exposition::{Exposition, Kind::Counter, Kind::Gauge};

/// Asks the daemon, and prints.
pub fn metrics(path: &Path) -> Result<()> {
    let status = crate::status::ask(path)?;
    std::io::stdout()
        .lock()
        .write_all(render(&status).as_bytes())?;
    Ok(())
}

/// The whole text.
pub fn render(status: &Status) -> String {
    let mut out = Exposition::default();
    let version = [("version", status.version.as_str())];
    out.family("ovs_dpd_build_info", Gauge, "The program, always 1.")
        .sample(&version, 1);
    datapaths(&mut out, status);
    ports(&mut out, status);
    workers(&mut out, status);
    conntrack(&mut out, status);
    streams(&mut out, status);
    clients(&mut out, status);
    process::describe(&mut out, status.pid);
    out.finish()
}

fn datapaths(out: &mut Exposition, status: &Status) {
    let all = &status.datapaths;
    let mut each = |name, kind, help: &str, of: &dyn Fn(&DatapathStatus) -> u64| {
        out.family(name, kind, help);
        for datapath in all {
            out.sample(&[("datapath", &datapath.name)], of(datapath));
        }
    };
    each("ovs_dpd_flows", Gauge, "Flows installed.", &|dp| dp.flows);
    each("ovs_dpd_masks", Gauge, "Different masks of flows.", &|dp| {
        dp.masks
    });
    let help = "Size of each worker's mask cache.";
    each("ovs_dpd_mask_cache_entries", Gauge, help, &|dp| {
        dp.masks_cache_size.into()
    });
    each("ovs_dpd_meters", Gauge, "Meters.", &|dp| dp.meters.into());
    let help = "Lookups that found a flow.";
    each("ovs_dpd_lookups_hit_total", Counter, help, &|dp| {
        dp.lookups.hit
    });
    let help = "Lookups that found none: their packets went, or were to go, to user space.";
    each("ovs_dpd_lookups_missed_total", Counter, help, &|dp| {
        dp.lookups.missed
    });
    let help = "Upcalls that reached no reader, as ovs-dpctl's \"lost\"; by port in \
                ovs_dpd_port_upcalls_lost_total.";
    each("ovs_dpd_lookups_lost_total", Counter, help, &|dp| {
        dp.packets.upcalls_lost
    });
    let help = "Masks that lookups have tried.";
    each("ovs_dpd_masks_tried_total", Counter, help, &|dp| {
        dp.lookups.mask_hit
    });
    let help = "Lookups that found their flow through the mask cache.";
    each("ovs_dpd_mask_cache_hits_total", Counter, help, &|dp| {
        dp.lookups.cache_hit
    });
}

/// A datapath, a port's name (empty: no port's), its counts.
type PortCounts<'a> = (&'a str, &'a str, &'a PacketCounts);

fn ports(out: &mut Exposition, status: &Status) {
    let devices: Vec<(&str, &PortStatus)> = status
        .datapaths
        .iter()
        .flat_map(|dp| dp.ports.iter().map(|port| (dp.name.as_str(), port)))
        .collect();
    let help = "Each port, always 1: its number, type, driver and ifindex.";
    out.family("ovs_dpd_port_info", Gauge, help);
    for (datapath, port) in &devices {
        let (number, ifindex) = (port.number.to_string(), port.ifindex.to_string());
        let labels = [
            ("datapath", *datapath),
            ("port", &port.name),
            ("number", &number),
            ("type", &port.kind),
            ("driver", &port.driver),
            ("ifindex", &ifindex),
        ];
        out.sample(&labels, 1);
    }
    let counts: Vec<PortCounts<'_>> = status
        .datapaths
        .iter()
        .flat_map(|dp| {
            let ports = dp.ports.iter().map(|port| (&*port.name, &port.packets));
            let all = ports.chain([("", &dp.elsewhere)]);
            all.map(|(port, counts)| (dp.name.as_str(), port, counts))
        })
        .collect();
    for (name, help, of) in PORT_COUNTERS {
        out.family(name, Counter, help);
        for (datapath, port, counts) in &counts {
            out.sample(&[("datapath", datapath), ("port", port)], of(counts));
        }
    }
    let help = "Packets dropped, by the port that they came from, or were refused by (output_*), and by \
                reason. Reasons that never happened aren't listed.";
    out.family("ovs_dpd_port_dropped_packets_total", Counter, help);
    for (datapath, port, counts) in &counts {
        for (reason, count) in &counts.dropped {
            let labels = [("datapath", *datapath), ("port", port), ("reason", reason)];
            out.sample(&labels, *count);
        }
    }
    let mut each = |name, help: &str, of: &dyn Fn(&PortStatus) -> u64| {
        out.family(name, Counter, help);
        for (datapath, port) in &devices {
            out.sample(&[("datapath", datapath), ("port", &port.name)], of(port));
        }
    };
    let help = "Packets that the kernel dropped before the daemon, for want of room in its queue.";
    each("ovs_dpd_port_host_dropped_packets_total", help, &|port| {
        port.host_queue_full
    });
    let help = "Packets that came from the kernel but couldn't be used.";
    each("ovs_dpd_port_receive_errors_total", help, &|port| {
        port.host_rx_errors
    });
}

type PortCounter = (&'static str, &'static str, fn(&PacketCounts) -> u64);

const PORT_COUNTERS: [PortCounter; 10] = [
    (
        "ovs_dpd_port_receive_packets_total",
        "Packets that came out of the port; one to be segmented counts once.",
        |counts| counts.received,
    ),
    (
        "ovs_dpd_port_receive_bytes_total",
        "Their bytes, Ethernet headers included.",
        |counts| counts.received_bytes,
    ),
    (
        "ovs_dpd_port_transmit_packets_total",
        "Packets that the port took; one to be segmented counts once.",
        |counts| counts.transmitted,
    ),
    (
        "ovs_dpd_port_transmit_bytes_total",
        "Their bytes, Ethernet headers included.",
        |counts| counts.transmitted_bytes,
    ),
    (
        "ovs_dpd_port_executed_packets_total",
        "Packets that user space sent on behalf of the port.",
        |counts| counts.executed,
    ),
    (
        "ovs_dpd_port_copied_packets_total",
        "Packets that became one more: clones, outputs that aren't the last action, segments.",
        |counts| counts.copied,
    ),
    (
        "ovs_dpd_port_to_user_packets_total",
        "Packets from the port that ended in user space.",
        |counts| counts.to_user,
    ),
    (
        "ovs_dpd_port_held_packets_total",
        "Fragments from the port that became part of another packet, or wait to.",
        |counts| counts.held,
    ),
    (
        "ovs_dpd_port_upcalls_queued_total",
        "Upcalls of the port that reached a reader's queue.",
        |counts| counts.upcalls,
    ),
    (
        "ovs_dpd_port_upcalls_lost_total",
        "Upcalls of the port that reached none, or had to make room for others.",
        |counts| counts.upcalls_lost,
    ),
];

fn workers(out: &mut Exposition, status: &Status) {
    let labelled: Vec<_> = status
        .workers
        .iter()
        .enumerate()
        .map(|(number, worker)| {
            let cpu = worker.cpu.map(|cpu| cpu.to_string()).unwrap_or_default();
            (number.to_string(), cpu, worker)
        })
        .collect();
    let help = "Seconds in which the worker carried packets: its rate is the worker's busy share. \
                cpu=\"\": it isn't kept on one.";
    out.family("ovs_dpd_worker_busy_seconds_total", Counter, help);
    for (number, cpu, worker) in &labelled {
        out.sample(&[("worker", number), ("cpu", cpu)], worker.busy_s);
    }
    let help = "Receive queues that the worker serves.";
    out.family("ovs_dpd_worker_queues", Gauge, help);
    for (number, cpu, worker) in &labelled {
        let queues = worker.queues.len() as u64;
        out.sample(&[("worker", number), ("cpu", cpu)], queues);
    }
    let help = "Queues moved from busy workers to idle ones.";
    out.family("ovs_dpd_queue_moves_total", Counter, help)
        .sample(&[], status.queue_moves);
}

fn conntrack(out: &mut Exposition, status: &Status) {
    let of = &status.conntrack;
    let gauges = [
        (
            "ovs_dpd_conntrack_connections",
            "Connections tracked.",
            of.connections,
        ),
        (
            "ovs_dpd_conntrack_connections_limit",
            "How many there can be.",
            status.connections_limit,
        ),
        (
            "ovs_dpd_conntrack_expectations",
            "Connections that others have announced.",
            of.expectations,
        ),
        (
            "ovs_dpd_conntrack_fragments_waiting",
            "Packets whose fragments aren't all there.",
            of.fragments_waiting,
        ),
    ];
    for (name, help, value) in gauges {
        out.family(name, Gauge, help).sample(&[], value);
    }
    let counters = [
        (
            "ovs_dpd_conntrack_inserted_total",
            "Connections committed.",
            of.inserted,
        ),
        (
            "ovs_dpd_conntrack_insert_failed_total",
            "Connections that couldn't be committed.",
            of.insert_failed,
        ),
        (
            "ovs_dpd_conntrack_clash_resolved_total",
            "Commits that met the same connection of another packet.",
            of.clash_resolved,
        ),
        (
            "ovs_dpd_conntrack_table_full_total",
            "Connections refused because the table was full.",
            of.full,
        ),
        (
            "ovs_dpd_conntrack_zone_limited_total",
            "Connections refused by a zone's limit.",
            of.limited,
        ),
        (
            "ovs_dpd_conntrack_evicted_total",
            "Connections that made room for others in a full table.",
            of.early_drop,
        ),
        (
            "ovs_dpd_conntrack_expired_total",
            "Connections whose time was over.",
            of.expired,
        ),
        (
            "ovs_dpd_conntrack_deleted_total",
            "Connections deleted by request or by their end.",
            of.deleted,
        ),
        (
            "ovs_dpd_conntrack_invalid_packets_total",
            "Packets that fit no connection's state.",
            of.invalid,
        ),
        (
            "ovs_dpd_conntrack_reassembled_packets_total",
            "Packets put together from fragments.",
            of.reassembled,
        ),
    ];
    for (name, help, value) in counters {
        out.family(name, Counter, help).sample(&[], value);
    }
    let lost = [
        ("timed_out", of.fragments_timed_out),
        ("overlapped", of.fragments_overlapped),
        ("duplicate", of.fragments_duplicate),
        ("malformed", of.fragments_malformed),
        ("no_memory", of.fragments_no_memory),
    ];
    let help = "Fragments that didn't become part of a packet.";
    out.family("ovs_dpd_conntrack_fragments_lost_total", Counter, help);
    for (reason, count) in lost {
        out.sample(&[("reason", reason)], count);
    }
}

fn streams(out: &mut Exposition, status: &Status) {
    let all = &status.streams;
    let mut each = |name, kind, help: &str, of: &dyn Fn(&StreamStatus) -> u64| {
        out.family(name, kind, help);
        for stream in all {
            out.sample(&[("stream", &stream.name)], of(stream));
        }
    };
    let help = "Whether the stream has a peer.";
    each("ovs_dpd_stream_connected", Gauge, help, &|stream| {
        (stream.state == "connected").into()
    });
    let help = "Connections that the stream has had.";
    each("ovs_dpd_stream_connections_total", Counter, help, &|s| {
        s.connections
    });
    let help = "Frames queued for the stream's peer.";
    let name = "ovs_dpd_stream_enqueued_packets_total";
    each(name, Counter, help, &|stream| stream.enqueued);
    let help = "Frames sent to the stream's peer.";
    each("ovs_dpd_stream_sent_packets_total", Counter, help, &|s| {
        s.sent
    });
    let help =
        "Frames that the stream's peer will not get: the queue was full, or the connection gone.";
    out.family("ovs_dpd_stream_dropped_packets_total", Counter, help);
    for stream in all {
        let reasons = [
            ("full", stream.dropped_full),
            ("closed", stream.dropped_close),
        ];
        for (reason, count) in reasons {
            out.sample(&[("stream", &stream.name), ("reason", reason)], count);
        }
    }
}

fn clients(out: &mut Exposition, status: &Status) {
    let clients = &status.clients;
    let help = "Sockets of Open vSwitch's programs that are connected.";
    out.family("ovs_dpd_clients", Gauge, help)
        .sample(&[], clients.len() as u64);
    let help = "Captures in progress.";
    out.family("ovs_dpd_captures", Gauge, help)
        .sample(&[], status.captures as u64);
    let queued: u64 = clients.iter().map(|client| client.queued as u64).sum();
    let help = "Messages that wait for clients to read them.";
    out.family("ovs_dpd_client_messages_queued", Gauge, help)
        .sample(&[], queued);
}
