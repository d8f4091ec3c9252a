//! Which driver an existing device gets, and what a dead daemon left behind.
//!
//! # The rule of [`DriverChoice::Auto`]
//! AF_XDP where the device is hardware, or a hypervisor shows it as such (a parent device, and no kind
//! of virtual link: not veth, TAP, bridge, vlan, vxlan, bond, dummy, ...), is up, runs the program in its
//! driver (zero copy or native copy, not generic), leaves tags in packets, has an MTU that fits, no
//! other XDP program, and has sent a frame as a test. AF_PACKET in all other cases: [`Port::mode`] then
//! says why. A device made of software hands over packets whose checksums and segmentation are left to
//! the receiver, and AF_XDP carries neither.
//!
//! AF_XDP asked for by name is tried in each mode from zero copy to generic; if none holds, or the
//! device can't meet what it needs, the port is refused, and the error says why.

use crate::af_packet::{AfPacket, Face};
use crate::af_xdp::AfXdp;
use crate::error::Error;
use crate::link::{self, Link};
use crate::port::{Driver, Port};
use crate::{hide, internal};

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

/// How AF_XDP is to be done, where it is asked for by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpMode {
    /// The best that holds: zero copy, else native copy, else generic.
    #[default]
    Auto,
    /// The driver works on our memory, or nothing.
    ZeroCopy,
    /// In the driver, with a copy by the kernel, or nothing.
    Native,
    /// In the host's stack, or nothing.
    Generic,
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

/// Whether a packet socket is to have a receive ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingChoice {
    /// Where it is safe, and can be had; [`Port::mode`] says.
    #[default]
    Auto,
    /// Wherever it can be had.
    Always,
    /// Not at all.
    Never,
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
    /// How many receive queues; packets of one flow stay on one of them. AF_XDP has as many as the
    /// device.
    pub queues: usize,
    /// Whether a packet socket is to have a receive ring.
    pub ring: RingChoice,
    /// How AF_XDP is to be done.
    pub xdp: XdpMode,
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
            ring: RingChoice::Auto,
            xdp: XdpMode::Auto,
            run_prefix: String::from("dpd"),
        }
    }
}

/// Opens a port on the device `name` of the calling thread's network namespace.
///
/// # Errors
/// `ENODEV`: no such device. `EINVAL`: loopback, or not Ethernet. `EBUSY`: it belongs to a bridge,
/// bond or the like, or (AF_XDP) has another XDP program. `EMSGSIZE`: its MTU is too large for AF_XDP.
/// `EOPNOTSUPP`: not by this driver. `EPERM`: no packet sockets, or no BPF programs, for us.
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
    by_choice(link, options)
}

fn by_choice(link: Link, options: &AttachOptions) -> Result<Box<dyn Port>, Error> {
    match options.driver {
        DriverChoice::AfXdp => Ok(Box::new(AfXdp::open(link, options)?)),
        DriverChoice::Auto if is_hardware(&link) => match AfXdp::open_if_proven(link.clone()) {
            Ok(port) => Ok(Box::new(port)),
            Err(error) => {
                tracing::info!("{error}: AF_PACKET instead");
                let face = Face {
                    driver: Driver::AfPacket,
                    link: link.clone(),
                    guard: None,
                    note: Some(format!("not AF_XDP ({error})")),
                };
                Ok(Box::new(AfPacket::open(link, options, Some(face))?))
            }
        },
        DriverChoice::Auto | DriverChoice::AfPacket => {
            Ok(Box::new(AfPacket::open(link, options, None)?))
        }
    }
}

/// Whether a device is hardware, or shown as such: its packets come as a wire has them.
fn is_hardware(link: &Link) -> bool {
    link.kind.is_none() && link.parent.is_some()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hardware_gets_af_xdp_unasked() {
        let with = |kind: Option<&str>, parent: Option<&str>| {
            is_hardware(&Link {
                kind: kind.map(String::from),
                parent: parent.map(String::from),
                ..Link::default()
            })
        };
        assert!(with(None, Some("0000:01:00.0")));
        assert!(with(None, Some("virtio3")));
        for kind in ["veth", "tun", "bridge", "vlan", "vxlan", "bond", "dummy"] {
            assert!(!with(Some(kind), None), "{kind}");
            assert!(!with(Some(kind), Some("0000:01:00.0")), "{kind}");
        }
        // Before Linux 5.14 nobody tells of a parent: AF_PACKET always works.
        assert!(!with(None, None));
    }

    #[test]
    fn hardware_gets_af_xdp_if_that_works_there_else_af_packet_and_a_word_on_why() {
        let run = || {
            #[expect(deprecated)] // the flag that makes it unsafe isn't used
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            for line in [
                "link add v0 type veth peer name v1",
                "link set v0 up",
                "link set v1 up",
                "link add v2 mtu 40000 type veth peer name v3",
                "link set v2 up",
            ] {
                let mut ip = std::process::Command::new("ip");
                assert!(ip.args(line.split(' ')).status().unwrap().success());
            }
            // As if it were hardware.
            let open = |name| {
                let link = Link {
                    kind: None,
                    parent: Some(String::from("0000:01:00.0")),
                    ..link::by_name(name).unwrap()
                };
                by_choice(link, &AttachOptions::default()).unwrap()
            };
            let port = open("v0");
            assert_eq!(port.driver(), Driver::AfXdp, "{}", port.mode());
            let port = open("v2");
            assert_eq!(port.driver(), Driver::AfPacket);
            let mode = port.mode();
            assert!(
                mode.contains("not AF_XDP (AF_XDP on v2: frames of MTU 40000"),
                "{mode}"
            );
            assert_eq!(port.netnsid(), None);
        };
        std::thread::spawn(run).join().unwrap();
    }
}
