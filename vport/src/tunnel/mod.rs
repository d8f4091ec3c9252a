//! Tunnels: ports whose device is an IP network.
//!
//! A tunnel port receives what comes to it from anywhere and sends where each frame's
//! [`TunnelKey`](frame::tunnel::TunnelKey) says: there is no peer in its configuration. Routes,
//! neighbours, fragments and IPsec on the way out are the kernel's.
//!
//! # Receiving
//! A UDP socket shows neither whether there was a checksum nor what a packet that stands for several
//! stands for. So packet sockets bound to IPv4 and IPv6 (not to a device) receive, which see what the
//! host's stack sees, where it sees it: behind bridges, bonds, tags and traffic control, with virtio-net
//! headers, so that a neighbour's unfinished checksums and unsegmented TCP stay as they are
//! ([`queue`]). A UDP (or raw) socket beside them holds the port, so that the host doesn't
//! answer "unreachable"; nothing is read from it. What the host's own firewall refuses on INPUT arrives
//! nevertheless, and what IPsec in transport mode decrypts doesn't arrive.
//!
//! # Sending
//! By UDP sockets, so that the host's routes, firewall and IPsec policies apply ([`send`]): a pool of
//! them, since a socket has one source port, from which networks tell flows apart. Datagrams of one
//! length with checksums go to the kernel as one (UDP_SEGMENT).
//!
//! # Path MTU
//! A packet that doesn't fit and may not be cut is answered as by a router, as the kernel's tunnels do
//! on a bridge: [`path`] knows what fits, [`reflect`] lets the answer in at the port.

mod hold;
mod path;
mod queue;
mod reflect;
mod send;
mod wire;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use frame::tunnel::TunnelKey;
use frame::tunnel::vxlan::Extensions;
use frame::{Frame, Pool};

use crate::error::Error;
use crate::link::Link;
use crate::port::{Capabilities, Driver, HostCounters, Port, RxErrors, RxQueue, TxOutcome};
use crate::sys::packet_socket::PacketSocket;

/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// What tunnel devices of the kernel have when Open vSwitch makes them.
const MTU: u32 = 65_000;

/// What a tunnel speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TunnelKind {
    /// VXLAN, over UDP.
    Vxlan,
    /// Geneve, over UDP.
    Geneve,
    /// GRE with Ethernet frames, over IPv4.
    Gre,
    /// GRE with Ethernet frames, over IPv6.
    Ip6Gre,
    /// ERSPAN types II and III, over IPv4.
    Erspan,
    /// ERSPAN types II and III, over IPv6.
    Ip6Erspan,
}

impl TunnelKind {
    /// The name that `status` shows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
            Self::Gre => "gre",
            Self::Ip6Gre => "ip6gre",
            Self::Erspan => "erspan",
            Self::Ip6Erspan => "ip6erspan",
        }
    }

    /// Whether it goes over UDP, and so has a port.
    pub const fn is_udp(self) -> bool {
        matches!(self, Self::Vxlan | Self::Geneve)
    }

    /// Whether it goes over IPv4, and whether over IPv6.
    const fn families(self) -> (bool, bool) {
        match self {
            Self::Vxlan | Self::Geneve => (true, true),
            Self::Gre | Self::Erspan => (true, false),
            Self::Ip6Gre | Self::Ip6Erspan => (false, true),
        }
    }
}

/// How a tunnel is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelConfig {
    /// What it speaks.
    pub kind: TunnelKind,
    /// The UDP port that it receives on, and that it sends to unless a key names another; 0 if it has none.
    pub port: u16,
    /// Of VXLAN.
    pub extensions: Extensions,
}

/// What port and queues share.
struct Shared {
    name: String,
    config: TunnelConfig,
    ifindex: u32,
    senders: send::Senders,
    paths: path::Paths,
    reflection: reflect::Reflection,
    received: Received,
    /// Of the next packet that has a sequence number.
    sequence: AtomicU32,
    _hold: hold::Hold,
}

/// What was lost on the way in.
#[derive(Default)]
struct Received {
    queue_full: AtomicU64,
    unsayable: AtomicU64,
    truncated: AtomicU64,
    malformed: AtomicU64,
    refused: AtomicU64,
    checksum: AtomicU64,
    congestion: AtomicU64,
}

impl Received {
    fn count(&self, errors: &RxErrors) {
        if errors.total() > 0 {
            self.unsayable.fetch_add(errors.unsayable, Relaxed);
            self.truncated.fetch_add(errors.truncated, Relaxed);
            self.malformed.fetch_add(errors.malformed, Relaxed);
            self.refused.fetch_add(errors.tunnel_header, Relaxed);
            self.checksum.fetch_add(errors.tunnel_checksum, Relaxed);
            self.congestion.fetch_add(errors.tunnel_congestion, Relaxed);
        }
    }
}

/// A tunnel port.
pub struct Tunnel {
    shared: Arc<Shared>,
    /// Until the queues are opened.
    sockets: Mutex<Option<Vec<Arc<PacketSocket>>>>,
    /// The same, for their counters.
    receivers: Vec<Arc<PacketSocket>>,
}

impl Tunnel {
    /// Opens a tunnel in the calling thread's network namespace. `ifindex` stands for the device that it
    /// hasn't got.
    ///
    /// # Errors
    /// `EADDRINUSE`: somebody has the UDP port. `EPERM`: no packet sockets for us.
    pub fn create(name: &str, config: TunnelConfig, ifindex: u32) -> Result<Self, Error> {
        let hold = hold::Hold::new(name, &config)?;
        let receivers = hold::receivers(name, &config)?;
        let shared = Shared {
            name: name.into(),
            config,
            ifindex,
            senders: send::Senders::default(),
            paths: path::Paths::default(),
            reflection: reflect::Reflection::new()
                .map_err(|errno| Error::os(errno, format!("eventfd for {name}")))?,
            received: Received::default(),
            sequence: AtomicU32::new(0),
            _hold: hold,
        };
        Ok(Self {
            shared: Arc::new(shared),
            sockets: Mutex::new(Some(receivers.clone())),
            receivers,
        })
    }
}

impl Port for Tunnel {
    fn driver(&self) -> Driver {
        Driver::Tunnel
    }

    fn mode(&self) -> String {
        let TunnelConfig {
            kind,
            port,
            extensions,
        } = self.shared.config;
        let mut mode = kind.name().to_owned();
        if kind.is_udp() {
            mode += &format!(", UDP port {port}");
        }
        if extensions.gbp {
            mode += ", GBP";
        }
        if extensions.gpe {
            mode += ", GPE";
        }
        mode
    }

    fn ifindex(&self) -> u32 {
        self.shared.ifindex
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            csum: true,
            tso4: true,
            tso6: true,
            uso: true,
            ufo: false,
            vlan: true,
            max_frame: MTU + ETHERNET,
            max_gso_frame: 65_535 + ETHERNET,
        }
    }

    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        let sockets = self
            .sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .ok_or_else(|| Error::new(libc::EBUSY, format!("queues of {}", self.shared.name)))?;
        let reflected = reflect::Queue::new(Arc::clone(&self.shared))
            .map_err(|errno| Error::os(errno, format!("eventfd of {}", self.shared.name)))?;
        let mut queues: Vec<Box<dyn RxQueue>> = vec![Box::new(reflected)];
        for socket in sockets {
            queues.push(Box::new(queue::Queue::new(
                Arc::clone(&self.shared),
                socket,
            )));
        }
        Ok(queues)
    }

    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        send::transmit(&self.shared, frames, pool, outcome);
    }

    fn host_counters(&self) -> HostCounters {
        let received = &self.shared.received;
        for socket in &self.receivers {
            if let Ok(drops) = socket.take_drops() {
                received.queue_full.fetch_add(u64::from(drops), Relaxed);
            }
        }
        HostCounters {
            queue_full: received.queue_full.load(Relaxed),
            rx_errors: RxErrors {
                unsayable: received.unsayable.load(Relaxed),
                truncated: received.truncated.load(Relaxed),
                malformed: received.malformed.load(Relaxed),
                runt: 0,
                tunnel_header: received.refused.load(Relaxed),
                tunnel_checksum: received.checksum.load(Relaxed),
                tunnel_congestion: received.congestion.load(Relaxed),
            },
        }
    }

    fn link_changed(&self, _link: &Link) {}

    fn link(&self) -> Result<Link, Error> {
        Ok(Link {
            index: self.shared.ifindex,
            name: self.shared.name.clone(),
            mtu: MTU,
            ..Link::default()
        })
    }

    fn tunnel(&self) -> Option<TunnelConfig> {
        Some(self.shared.config)
    }

    fn complete_tunnel_key(&self, key: &mut TunnelKey) -> bool {
        send::complete(&self.shared, key)
    }
}
