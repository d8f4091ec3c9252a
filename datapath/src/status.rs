//! What `ovs-dpd status` shows: datapaths, ports, flows, upcalls, losses, drops by reason.

use std::collections::BTreeMap;

use netlink::Hub;
use serde::{Deserialize, Serialize};

use crate::conntrack::client::Statistics;
use crate::counters::Totals;
use crate::daemon::Daemon;
use crate::datapath::{Datapath, features};
use crate::drop_reason::DropReason;
use crate::stream_status::{RingStatus, StreamStatus};
use crate::vport::Vport;
use crate::worker::WorkerStatus;

/// The whole daemon at one moment. Counts of different ports aren't read at the same instant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since the start.
    pub uptime_s: f64,
    /// Worker threads in order of their numbers.
    pub workers: Vec<WorkerStatus>,
    /// How often a queue was moved from a busy worker to an idle one.
    pub queue_moves: u64,
    /// What can't be had here and what is done instead.
    pub notes: Vec<String>,
    /// The datapaths.
    pub datapaths: Vec<DatapathStatus>,
    /// Connections of all datapaths.
    pub conntrack: Statistics,
    /// How many connections there can be.
    pub connections_limit: u64,
    /// Streams, ports or not.
    pub streams: Vec<StreamStatus>,
    /// Captures in progress.
    pub captures: usize,
    /// The connected sockets of clients.
    pub clients: Vec<ClientStatus>,
}

/// One datapath.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DatapathStatus {
    /// Its name.
    pub name: String,
    /// Its local port's ifindex.
    pub ifindex: i32,
    /// `per-cpu` or `per-vport`.
    pub upcall_dispatch: String,
    /// Readers in the per-CPU list.
    pub per_cpu_readers: usize,
    /// Flows installed.
    pub flows: u64,
    /// Different masks among them.
    pub masks: u64,
    /// Entries of the mask cache.
    pub masks_cache_size: u32,
    /// Meters.
    pub meters: u32,
    /// Lookups.
    pub lookups: Lookups,
    /// Over all ports and packets without one.
    pub packets: PacketCounts,
    /// Those of them that are no port's: executed without one, or of ports that are gone.
    pub elsewhere: PacketCounts,
    /// The ports.
    pub ports: Vec<PortStatus>,
}

/// Lookups of a datapath.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Lookups {
    /// Found a flow.
    pub hit: u64,
    /// Found none.
    pub missed: u64,
    /// Masks looked at.
    pub mask_hit: u64,
    /// Found through the mask cache.
    pub cache_hit: u64,
}

/// What became of packets. At rest, over a datapath:
/// `received + executed + copied = transmitted + to_user + held + sum(dropped)`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)] // see `counters::Cell`
pub struct PacketCounts {
    pub received: u64,
    pub received_bytes: u64,
    pub executed: u64,
    pub copied: u64,
    pub transmitted: u64,
    pub transmitted_bytes: u64,
    pub to_user: u64,
    pub held: u64,
    pub upcalls: u64,
    pub upcalls_lost: u64,
    /// Drops by reason; reasons that never happened are left out.
    pub dropped: BTreeMap<String, u64>,
}

/// One port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PortStatus {
    /// Its number.
    pub number: u32,
    /// Its device's name now.
    pub name: String,
    /// `netdev` or `internal`.
    pub kind: String,
    /// The driver in force.
    pub driver: String,
    /// What is in force, and why it isn't better.
    pub mode: String,
    /// The device's ifindex.
    pub ifindex: u32,
    /// Readers of its upcalls.
    pub upcall_pids: Vec<u32>,
    /// What became of its packets.
    pub packets: PacketCounts,
    /// Where frames wait for it, if they may.
    pub ring: Option<RingStatus>,
    /// What the kernel dropped before we could receive it.
    pub host_queue_full: u64,
    /// What came but couldn't be used, as the kernel told it.
    pub host_rx_errors: u64,
}

/// One client socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientStatus {
    /// Its port id.
    pub port_id: u32,
    /// Process that connected.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Whether it may change state.
    pub privileged: bool,
    /// Requests so far.
    pub requests: u64,
    /// Messages waiting for it.
    pub queued: usize,
    /// Messages lost for want of room.
    pub lost: u64,
}

impl From<&Totals> for PacketCounts {
    fn from(sum: &Totals) -> Self {
        let dropped = DropReason::ALL
            .into_iter()
            .map(|reason| (reason.name().to_owned(), sum.dropped_by(reason)))
            .filter(|(_, count)| *count != 0)
            .collect();
        Self {
            received: sum.received,
            received_bytes: sum.received_bytes,
            executed: sum.executed,
            copied: sum.copied,
            transmitted: sum.transmitted,
            transmitted_bytes: sum.transmitted_bytes,
            to_user: sum.to_user,
            held: sum.held,
            upcalls: sum.upcalls,
            upcalls_lost: sum.upcalls_lost,
            dropped,
        }
    }
}

impl Status {
    /// Of `daemon`, now.
    pub fn of(daemon: &Daemon) -> Self {
        let (workers, queue_moves) = daemon.workers.status();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: daemon.started.elapsed().as_secs_f64(),
            workers,
            queue_moves,
            notes: daemon.options.notes.clone(),
            datapaths: daemon.datapaths().iter().map(|dp| datapath(dp)).collect(),
            conntrack: daemon.conntrack.statistics(),
            connections_limit: daemon.conntrack.max_connections() as u64,
            streams: daemon.streams.list().into_iter().map(Into::into).collect(),
            captures: daemon.captures.len(),
            clients: clients(&daemon.hub),
        }
    }
}

fn datapath(datapath: &Datapath) -> DatapathStatus {
    let settings = datapath.settings.load();
    // Read once, so that the whole is the sum of what is shown; and those that are gone first, so that none
    // counts twice.
    let elsewhere = datapath.portless();
    let ports: Vec<(PortStatus, Totals)> = datapath.ports.load().iter().map(|p| port(p)).collect();
    let mut totals = elsewhere.clone();
    for (_, of_port) in &ports {
        totals.add(of_port);
    }
    let (flows, masks) = datapath.sizes();
    let per_cpu = settings.features & features::DISPATCH_PER_CPU != 0;
    DatapathStatus {
        name: datapath.local_name(),
        ifindex: datapath.ifindex,
        upcall_dispatch: if per_cpu { "per-cpu" } else { "per-vport" }.to_owned(),
        per_cpu_readers: settings.per_cpu_pids.len(),
        flows,
        masks,
        masks_cache_size: settings.masks_cache_size,
        meters: datapath.meters.len(),
        lookups: Lookups {
            hit: totals.hit,
            missed: totals.missed,
            mask_hit: totals.mask_hit,
            cache_hit: totals.cache_hit,
        },
        packets: PacketCounts::from(&totals),
        elsewhere: PacketCounts::from(&elsewhere),
        ports: ports.into_iter().map(|(port, _)| port).collect(),
    }
}

fn port(vport: &Vport) -> (PortStatus, Totals) {
    let host = vport.device.host_counters();
    let totals = vport.counters.totals();
    let status = PortStatus {
        number: vport.number,
        name: vport.current_name(),
        kind: vport.kind.name().to_owned(),
        driver: vport.device.driver().name().to_owned(),
        mode: vport.device.mode(),
        ifindex: vport.device.ifindex(),
        upcall_pids: vport.upcall_pids.load().to_vec(),
        packets: PacketCounts::from(&totals),
        ring: vport.ring_status(),
        host_queue_full: host.queue_full,
        host_rx_errors: host.rx_errors.total(),
    };
    (status, totals)
}

fn clients(hub: &Hub) -> Vec<ClientStatus> {
    hub.clients()
        .into_iter()
        .map(|client| ClientStatus {
            port_id: client.port_id,
            pid: client.pid,
            uid: client.uid,
            privileged: client.privileged,
            requests: client.requests,
            queued: client.queued,
            lost: client.lost,
        })
        .collect()
}
