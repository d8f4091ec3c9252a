//! One datapath: a name, a local port, a set of ports, a flow table, meters, what its client asked of it.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use flow::table::{FlowTable, Reclaimer};

use crate::conntrack::Tracker;
use crate::counters::{Counters, Totals};
use crate::meter::Meters;
use crate::table_ref::TableCell;
use crate::vport::VportSet;

/// `OVS_DP_F_*`: what a client can ask of a datapath.
pub mod features {
    /// The last attribute of an upcall may be unaligned.
    pub const UNALIGNED: u32 = 1 << 0;
    /// A port may have several readers.
    pub const VPORT_PIDS: u32 = 1 << 1;
    /// Traffic-control chains share recirculation ids: not here.
    pub const TC_RECIRC_SHARING: u32 = 1 << 2;
    /// Upcalls go to a list of readers of the datapath.
    pub const DISPATCH_PER_CPU: u32 = 1 << 3;
    /// What we have.
    pub const SUPPORTED: u32 = UNALIGNED | VPORT_PIDS | DISPATCH_PER_CPU;
}

/// What a client can change. Replaced as a whole.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// [`features`] in force.
    pub features: u32,
    /// Readers of upcalls with [`features::DISPATCH_PER_CPU`]; remembered while it is off.
    pub per_cpu_pids: Vec<u32>,
    /// Entries of the mask cache: 0 or a power of two.
    pub masks_cache_size: u32,
}

/// A datapath.
///
/// # Thread safety
/// Readers on the packet path load `ports` and `settings` once a batch and the table under an epoch pin.
/// `ports` and `settings` are written under the configuration lock only.
pub struct Datapath {
    /// `OVS_DP_ATTR_NAME`: the local port's name.
    pub name: Box<str>,
    /// The index of the local port's device: what clients call the datapath by.
    pub ifindex: i32,
    /// What a client asked for.
    pub settings: ArcSwap<Settings>,
    /// The ports.
    pub ports: ArcSwap<VportSet>,
    /// The flows.
    pub table: TableCell,
    /// The table's generation, which sets it apart from all others of this run.
    pub generation: u64,
    /// Sizes of the table can be read without a pin.
    pub(crate) reclaimer: Arc<Reclaimer>,
    /// Counts of packets that came through no port (executed without one), or whose port is gone.
    pub counters: Counters,
    /// What ports that are gone had counted.
    pub departed: Mutex<Totals>,
    /// The meters.
    pub meters: Meters,
    /// The daemon's connections.
    pub conntrack: Arc<Tracker>,
}

impl Datapath {
    /// A datapath without ports, with so many executors' cells.
    pub fn new(
        name: &str,
        ifindex: i32,
        settings: Settings,
        table: FlowTable,
        executors: usize,
        conntrack: &Arc<Tracker>,
    ) -> Self {
        Self {
            name: name.into(),
            ifindex,
            settings: ArcSwap::from_pointee(settings),
            ports: ArcSwap::default(),
            generation: table.generation(),
            reclaimer: Arc::clone(table.reclaimer()),
            table: TableCell::new(table),
            counters: Counters::new(executors),
            departed: Mutex::default(),
            meters: Meters::default(),
            conntrack: Arc::clone(conntrack),
        }
    }

    /// Flows and masks in the table; none once it is deleted. Rare: registers with the epoch.
    pub fn sizes(&self) -> (u64, u64) {
        let handle = self.reclaimer.register();
        let guard = handle.pin();
        self.table
            .load(&guard)
            .map_or((0, 0), |table| (table.n_flows(), table.n_masks()))
    }

    /// The name of the local port's device, which is the datapath's.
    pub fn local_name(&self) -> String {
        match self.ports.load().get(0) {
            Some(local) => local.current_name(),
            None => self.name.to_string(),
        }
    }

    /// Counts of packets that are no port's: of ports that are gone, and of packets without one.
    pub fn portless(&self) -> Totals {
        let mut sum = self
            .departed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        sum.add(&self.counters.totals());
        sum
    }

    /// Counts of all its ports and of packets that are no port's.
    pub fn totals(&self) -> Totals {
        let mut sum = self.portless();
        for port in self.ports.load().iter() {
            sum.add(&port.counters.totals());
        }
        sum
    }
}
