//! Which driver an existing device gets, and what a dead daemon left behind.

use crate::error::Error;
use crate::port::Port;

/// Which driver to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DriverChoice {
    /// What works best there.
    #[default]
    Auto,
    /// A packet socket.
    AfPacket,
    /// AF_XDP, or nothing.
    AfXdp,
}

/// How to open an existing device.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Which driver.
    pub driver: DriverChoice,
    /// Whether the host's stack shall no longer see what the device receives.
    pub hide: bool,
    /// Send past the queueing discipline (and so past tc and tcpdump).
    pub qdisc_bypass: bool,
    /// How many receive queues; packets of one flow stay on one of them.
    pub queues: usize,
    /// Marks what outlives a killed daemon (nftables tables, veth pairs), for [`cleanup`].
    /// Letters, digits, `_`; one daemon, one prefix.
    pub run_prefix: String,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            driver: DriverChoice::Auto,
            hide: true,
            qdisc_bypass: false,
            queues: 1,
            run_prefix: String::from("dpd"),
        }
    }
}

/// Opens a port on the device `name` of the calling thread's network namespace.
///
/// # Errors
/// `ENODEV`: no such device. `EINVAL`: loopback, or not Ethernet. `EBUSY`: it belongs to a bridge,
/// bond or the like. `EOPNOTSUPP`: not by this driver. `EPERM`: no packet sockets for us.
pub fn attach(name: &str, options: &AttachOptions) -> Result<Box<dyn Port>, Error> {
    let _ = options;
    Err(Error::new(libc::EOPNOTSUPP, format!("open {name}")))
}

/// Removes what a killed daemon with this `run_prefix` left behind in the calling thread's network
/// namespace: nftables tables and veth pairs. Tells what it removed.
///
/// # Errors
/// That of the sockets; nothing to remove is none.
pub fn cleanup(run_prefix: &str) -> Result<Vec<String>, Error> {
    Err(Error::new(
        libc::EOPNOTSUPP,
        format!("clean up {run_prefix}"),
    ))
}
