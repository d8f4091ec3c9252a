//! One port of a datapath: its number, its device, who reads its upcalls, what it has counted.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use ::vport::{HostCounters, Port, TunnelConfig, TxOutcome};
use arc_swap::ArcSwap;
use frame::{Frame, Pool};

use crate::counters::Counters;
use crate::outlet::PortRing;
use crate::stream_status::RingStatus;

/// `enum ovs_vport_type`: how the port's device came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VportType {
    /// An existing network device.
    Netdev,
    /// A device that the datapath made.
    Internal,
    /// A GRE tunnel, made by this request and gone with the port; as the two that follow.
    Gre,
    /// A VXLAN tunnel.
    Vxlan,
    /// A Geneve tunnel.
    Geneve,
}

impl VportType {
    /// The protocol's number.
    pub const fn number(self) -> u32 {
        match self {
            Self::Netdev => 1,
            Self::Internal => 2,
            Self::Gre => 3,
            Self::Vxlan => 4,
            Self::Geneve => 5,
        }
    }

    /// The name that `status` shows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Netdev => "netdev",
            Self::Internal => "internal",
            Self::Gre => "gre",
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
        }
    }
}

/// What only the kernel can tell of a port's device. Asking may wait for its RTNL lock, so it is asked by
/// threads that may sleep, and read by all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Observed {
    /// What the kernel lost at its end.
    pub host: HostCounters,
    /// Where an internal port's device is, if not here.
    pub netnsid: Option<i32>,
}

/// A port. Workers reach it by its number, through the datapath's set of ports; they keep it no longer
/// than a batch.
pub struct Vport {
    /// `OVS_VPORT_ATTR_PORT_NO`.
    pub number: u32,
    /// `OVS_VPORT_ATTR_TYPE`.
    pub kind: VportType,
    /// The name that it was added by. A later rename of the device doesn't change it: it is what the
    /// module finds ports by.
    pub name: Box<str>,
    /// The device.
    pub device: Box<dyn Port>,
    /// Where frames wait that the device has no room for, if that is such a device.
    pub ring: Option<PortRing>,
    /// How it is made, if it is a tunnel: packets need an outer header to leave by it.
    pub tunnel: Option<TunnelConfig>,
    /// The device's present name, if it was renamed.
    pub renamed: ArcSwap<Option<Box<str>>>,
    /// As of when the device was asked last.
    pub observed: ArcSwap<Observed>,
    /// Somebody read `observed` since: it is worth asking again.
    pub read: AtomicBool,
    /// Port ids of the readers of this port's upcalls, used without per-CPU dispatch.
    pub upcall_pids: ArcSwap<Vec<u32>>,
    /// Counts, one cell an executor.
    pub counters: Counters,
}

impl Vport {
    /// The name of the device as it is now.
    pub fn current_name(&self) -> String {
        match self.renamed.load().as_ref() {
            Some(name) => name.to_string(),
            None => self.name.to_string(),
        }
    }

    /// Sends `frames` in order, without blocking, or lets them wait; leaves the vector empty.
    #[inline]
    pub fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        match &self.ring {
            Some(ring) => ring.send(&*self.device, frames, pool, outcome),
            None => self.device.transmit(frames, pool, outcome),
        }
    }

    /// Whether what feeds this port, and nothing else, shall pause.
    #[inline]
    pub fn is_stopped(&self) -> bool {
        match &self.ring {
            Some(ring) => ring.is_stopped(),
            None => self.device.is_stopped(),
        }
    }

    /// How many frames may be received at a time for this port alone, so that they find room.
    pub fn room(&self) -> usize {
        match &self.ring {
            Some(ring) => ring.room(),
            None => self.device.room(),
        }
    }

    /// The ring in front of the device, for `status`.
    pub fn ring_status(&self) -> Option<RingStatus> {
        if let Some(ring) = &self.ring {
            return Some(ring.status());
        }
        let own = self.device.own_ring()?;
        Some(RingStatus::new(
            own.backpressure,
            own.size,
            own.len,
            &own.counters,
        ))
    }

    /// Asks the device. May sleep.
    pub fn observe(&self) {
        let observed = Observed {
            host: self.device.host_counters(),
            netnsid: self.device.netnsid(),
        };
        self.observed.store(Arc::new(observed));
    }

    /// `struct ovs_vport_stats`, in the orientation of the device: what the datapath sends to an
    /// internal port is what the host receives there.
    pub fn stats(&self) -> [u64; 8] {
        use crate::drop_reason::DropReason as R;
        let sum = self.counters.totals();
        let host = self.observed.load().host;
        let from_us = (sum.transmitted, sum.transmitted_bytes);
        let to_us = (sum.received, sum.received_bytes);
        let ((rx, rx_bytes), (tx, tx_bytes)) = match self.kind {
            VportType::Internal => (from_us, to_us),
            _ => (to_us, from_us),
        };
        let refused = sum.dropped_by(R::OutputFull) + sum.dropped_by(R::OutputDown);
        let failed = sum.dropped_by(R::OutputTooLong)
            + sum.dropped_by(R::OutputGone)
            + sum.dropped_by(R::OutputUnreachable)
            + sum.dropped_by(R::OutputError);
        let (rx_errors, tx_errors, rx_dropped, tx_dropped) = match self.kind {
            VportType::Internal => (failed, host.rx_errors.total(), refused, host.queue_full),
            _ => (host.rx_errors.total(), failed, host.queue_full, refused),
        };
        [
            rx, tx, rx_bytes, tx_bytes, rx_errors, tx_errors, rx_dropped, tx_dropped,
        ]
    }
}

/// The ports of a datapath by number: a snapshot, replaced as a whole.
#[derive(Clone, Default)]
pub struct VportSet {
    slots: Vec<Option<Arc<Vport>>>,
}

/// Numbers from here up aren't given to ports (`DP_MAX_PORTS`).
pub const MAX_PORTS: u32 = 0xffff;

impl VportSet {
    /// The port of that number.
    #[inline]
    pub fn get(&self, number: u32) -> Option<&Arc<Vport>> {
        self.slots.get(number as usize)?.as_ref()
    }

    /// All ports in order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Vport>> {
        self.slots.iter().flatten()
    }

    /// Ports with a number of `from` or more, in order.
    pub fn iter_from(&self, from: u32) -> impl Iterator<Item = &Arc<Vport>> {
        self.slots.iter().skip(from as usize).flatten()
    }

    /// How many ports there are.
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// The port that was added by that name.
    pub fn by_name(&self, name: &str) -> Option<&Arc<Vport>> {
        // A rename takes a port out of the module's index by name, under both names.
        self.iter()
            .find(|port| &*port.name == name && port.renamed.load().is_none())
    }

    /// The port whose device has that index.
    pub fn by_ifindex(&self, ifindex: u32) -> Option<&Arc<Vport>> {
        self.iter().find(|port| port.device.ifindex() == ifindex)
    }

    /// The lowest free number from 1.
    pub fn free_number(&self) -> Option<u32> {
        (1..MAX_PORTS).find(|number| self.get(*number).is_none())
    }

    /// The same set with that port too.
    pub fn with(&self, port: Arc<Vport>) -> Self {
        let mut set = self.clone();
        let index = port.number as usize;
        if set.slots.len() <= index {
            set.slots.resize(index + 1, None);
        }
        if let Some(slot) = set.slots.get_mut(index) {
            *slot = Some(port);
        }
        set
    }

    /// The same set without the port of that number.
    pub fn without(&self, number: u32) -> Self {
        let mut set = self.clone();
        if let Some(slot) = set.slots.get_mut(number as usize) {
            *slot = None;
        }
        set
    }
}
