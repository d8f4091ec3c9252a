//! Tunnels that were made as links, as Open vSwitch makes them over the module: first the link (by
//! rtnetlink, see [`crate::rtnetlink`]), then a port of type NETDEV by the link's name.
//!
//! There is no device: the link is what those see who ask the daemon. The tunnel itself is opened when a
//! port is made of it, and closed with the port; the link stays until it is deleted.

use std::sync::{Arc, Mutex, PoisonError};

use ::vport::TunnelConfig;

/// A tunnel's link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelLink {
    /// Its name, at most 15 bytes.
    pub name: String,
    /// What stands for its index.
    pub ifindex: u32,
    /// `IFLA_INFO_KIND`.
    pub kind: String,
    /// `IFLA_INFO_DATA`, as it was asked for.
    pub data: Vec<u8>,
    /// What the tunnel is to be.
    pub config: TunnelConfig,
    /// Bytes, without the Ethernet header.
    pub mtu: u32,
    /// `IFF_*` that can be set: IFF_UP.
    pub flags: u32,
    /// Hardware address.
    pub address: [u8; 6],
}

/// All of them. Changed under the configuration lock, read by all: a leaf.
#[derive(Debug, Default)]
pub struct TunnelLinks {
    links: Mutex<Vec<Arc<TunnelLink>>>,
}

impl TunnelLinks {
    fn with<R>(&self, work: impl FnOnce(&mut Vec<Arc<TunnelLink>>) -> R) -> R {
        work(&mut self.links.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The first that fits.
    pub fn find(&self, fits: impl Fn(&TunnelLink) -> bool) -> Option<Arc<TunnelLink>> {
        self.with(|links| links.iter().find(|link| fits(link)).cloned())
    }

    /// The one of that name.
    pub fn by_name(&self, name: &str) -> Option<Arc<TunnelLink>> {
        self.find(|link| link.name == name)
    }

    /// Adds one, or puts it in the place of the one with its index.
    pub fn put(&self, link: TunnelLink) {
        self.with(|links| {
            links.retain(|other| other.ifindex != link.ifindex);
            links.push(Arc::new(link));
        });
    }

    /// Removes the one of that index.
    pub fn remove(&self, ifindex: u32) {
        self.with(|links| links.retain(|link| link.ifindex != ifindex));
    }
}
