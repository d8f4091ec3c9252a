//! Links, as rtnetlink tells them.

use crate::error::Error;

/// A network device, as RTM_NEWLINK describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// ifindex.
    pub index: u32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// ARPHRD_*: 1 is Ethernet.
    pub arp_type: u16,
    /// IFF_*.
    pub flags: u32,
    /// Bytes, without the Ethernet header.
    pub mtu: u32,
    /// Hardware address, if it is one of 6 bytes.
    pub mac: Option<[u8; 6]>,
    /// IFLA_INFO_KIND: "veth", "tun", ...; NICs have none.
    pub kind: Option<String>,
    /// IF_OPER_* (RFC 2863): 6 is up.
    pub operstate: u8,
    /// ifindex of the bridge, bond, ... that owns it.
    pub master: Option<u32>,
    /// The id of the namespace where its peer or parent is, if not in this one.
    pub link_netnsid: Option<i32>,
    /// IFLA_IFALIAS.
    pub alias: Option<String>,
    /// Frames that the device itself has counted.
    pub stats: Option<LinkStats>,
}

/// A device's own counters (IFLA_STATS64), in its own orientation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Received.
    pub rx_packets: u64,
    /// Transmitted.
    pub tx_packets: u64,
    /// Received.
    pub rx_bytes: u64,
    /// Transmitted.
    pub tx_bytes: u64,
    /// Bad when received.
    pub rx_errors: u64,
    /// Not transmitted.
    pub tx_errors: u64,
    /// No room when received.
    pub rx_dropped: u64,
    /// No room when transmitted: on a TAP, packets that we didn't read in time.
    pub tx_dropped: u64,
}

impl Link {
    /// IFF_UP.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    /// IFF_LOOPBACK.
    pub fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }
}

/// What happened to a device of our namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// There is one, or one has changed: also its name (same index as before).
    New(Link),
    /// It was deleted, or moved to another namespace.
    Gone {
        /// Which it was.
        index: u32,
    },
}

/// Follows the links of our namespace.
#[derive(Debug)]
pub struct LinkMonitor {}

impl LinkMonitor {
    /// Starts with an event for each link that is there.
    ///
    /// # Errors
    /// That of the socket.
    pub fn new() -> Result<Self, Error> {
        Err(Error::new(libc::EOPNOTSUPP, "link monitor"))
    }
}
