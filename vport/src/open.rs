//! Which driver an existing device gets, and what a dead daemon left behind.

use crate::af_packet::AfPacket;
use crate::error::Error;
use crate::port::Port;
use crate::{hide, internal, link};

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

/// How to keep a device's packets from the host's own stack (see [`hide`](crate::hide)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HideChoice {
    /// By a tcx link, else by nftables, else not at all; [`Port::mode`] says which.
    #[default]
    Auto,
    /// By nftables, else not at all.
    Nftables,
    /// Not at all.
    Off,
}

/// How to open an existing device.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Which driver.
    pub driver: DriverChoice,
    /// Whether the host's stack shall no longer see what the device receives.
    pub hide: HideChoice,
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
            hide: HideChoice::Auto,
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
    let link = link::by_name(name)?;
    if !link.is_ethernet() {
        let what = if link.is_loopback() {
            "the loopback"
        } else {
            "not an Ethernet device"
        };
        return Err(Error::new(libc::EINVAL, format!("{name} is {what}")));
    }
    if let Some(master) = link.master {
        let master = link::by_index(master).map_or_else(|_| master.to_string(), |link| link.name);
        return Err(Error::new(
            libc::EBUSY,
            format!("{name} belongs to {master}"),
        ));
    }
    match options.driver {
        DriverChoice::AfXdp => Err(Error::new(
            libc::EOPNOTSUPP,
            format!("AF_XDP on {name}: not built yet"),
        )),
        // On veth and TAP for good: partial checksums and GSO don't survive AF_XDP there.
        DriverChoice::Auto | DriverChoice::AfPacket => {
            Ok(Box::new(AfPacket::open(link, options, None)?))
        }
    }
}

/// Removes what a killed daemon with this `run_prefix` left behind in the calling thread's network
/// namespace: nftables tables and veth pairs. Tells what it removed.
///
/// # Errors
/// That of the sockets; nothing to remove is none.
pub fn cleanup(run_prefix: &str) -> Result<Vec<String>, Error> {
    let mut removed =
        hide::cleanup(run_prefix).map_err(|errno| Error::os(errno, "nftables tables"))?;
    removed.extend(internal::cleanup(run_prefix)?);
    Ok(removed)
}
