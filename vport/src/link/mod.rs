//! Links, as rtnetlink tells them: what there is ([`by_name`], [`by_index`], [`all`]), changes to
//! them ([`change`]), and what happens to them ([`LinkMonitor`]).
//!
//! All of it is about the calling thread's network namespace.
//!
//! Source: uapi `linux/rtnetlink.h`, `linux/if_link.h`.

pub mod change;
pub mod monitor;

use rustix::io::Errno;

pub use change::{
    Veth, create_veth, delete, delete_together, set_alias, set_mac, set_mtu, set_tx_queue_len,
    set_up,
};
pub use monitor::{LinkEvent, LinkMonitor};

use crate::error::Error;
use crate::nl::{self, Client, Message};

/// Bytes of `struct ifinfomsg`.
const IFINFO: usize = 16;
/// Ask for links without statistics: they cost the kernel more than the rest.
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

const IFLA_PARENT_DEV_NAME: u16 = 56;
/// IFLA_XDP_PROG_ID, inside IFLA_XDP.
const XDP_PROG_ID: u16 = 4;

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
    /// IFLA_LINK: ifindex of its peer or parent, in the namespace of [`link_netnsid`](Self::link_netnsid).
    pub link: Option<u32>,
    /// ifindex of the bridge, bond, ... that owns it.
    pub master: Option<u32>,
    /// The id of the namespace where its peer or parent is, if not in this one.
    pub link_netnsid: Option<i32>,
    /// IFLA_IFALIAS.
    pub alias: Option<String>,
    /// IFLA_PROMISCUITY: how many want it promiscuous.
    pub promiscuity: u32,
    /// IFLA_PARENT_DEV_NAME: the hardware (or what a hypervisor shows as such) behind it. Linux 5.14.
    pub parent: Option<String>,
    /// IFLA_XDP: the id of the XDP program on it.
    pub xdp: Option<u32>,
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

    /// Whether its frames are Ethernet frames.
    pub fn is_ethernet(&self) -> bool {
        self.arp_type == libc::ARPHRD_ETHER && !self.is_loopback()
    }

    /// From what follows the header of an RTM_NEWLINK; `None` if it isn't about a link as such (a
    /// bridge tells of its ports in the same messages) or is malformed.
    fn parse(payload: &[u8]) -> Option<Self> {
        let index = link_index(payload)?;
        let header = payload.first_chunk::<IFINFO>()?;
        let mut complete = false;
        let mut link = Self {
            index,
            arp_type: u16::from_ne_bytes([header[2], header[3]]),
            flags: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            ..Self::default()
        };
        for (kind, value) in nl::attributes(payload.get(IFINFO..)?) {
            match kind {
                libc::IFLA_IFNAME => link.name = nl::str_of(value),
                libc::IFLA_ADDRESS => link.mac = value.try_into().ok(),
                libc::IFLA_MTU => {
                    link.mtu = nl::u32_of(value)?;
                    complete = true;
                }
                libc::IFLA_LINK => link.link = nl::u32_of(value),
                libc::IFLA_MASTER => link.master = nl::u32_of(value),
                libc::IFLA_OPERSTATE => link.operstate = value.first().copied()?,
                libc::IFLA_LINK_NETNSID => {
                    link.link_netnsid = nl::u32_of(value).map(|id| id as i32);
                }
                libc::IFLA_IFALIAS => link.alias = Some(nl::str_of(value)),
                libc::IFLA_PROMISCUITY => link.promiscuity = nl::u32_of(value)?,
                IFLA_PARENT_DEV_NAME => link.parent = Some(nl::str_of(value)),
                libc::IFLA_XDP => {
                    link.xdp = nl::attributes(value)
                        .find(|(kind, _)| *kind == XDP_PROG_ID)
                        .and_then(|(_, id)| nl::u32_of(id));
                }
                libc::IFLA_LINKINFO => {
                    link.kind = nl::attributes(value)
                        .find(|(kind, _)| *kind == libc::IFLA_INFO_KIND)
                        .map(|(_, kind)| nl::str_of(kind));
                }
                _ => {}
            }
        }
        // Wireless drivers multicast events in the same form, with a name and little else.
        complete.then_some(link)
    }
}

/// The link that a message is about; `None` if it is about something else.
fn link_index(payload: &[u8]) -> Option<u32> {
    let header = payload.first_chunk::<IFINFO>()?;
    if i32::from(header[0]) != libc::AF_UNSPEC {
        return None;
    }
    Some(u32::from_ne_bytes([
        header[4], header[5], header[6], header[7],
    ]))
}

/// `struct ifinfomsg` for `index`, changing those of `flags` that are in `mask`.
fn ifinfo(index: u32, flags: u32, mask: u32) -> [u8; IFINFO] {
    let mut header = [0; IFINFO];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&mask.to_ne_bytes());
    header
}

/// Whether `name` can be a device's: 1 to 15 bytes, none of them `/`, `:` or white.
pub fn is_valid_name(name: &str) -> bool {
    (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && !name
            .bytes()
            .any(|byte| matches!(byte, b'/' | b':' | 0) || byte.is_ascii_whitespace())
}

/// Which link is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which<'a> {
    Name(&'a str),
    Index(u32),
}

impl Which<'_> {
    /// RTM_GETLINK; with `netnsid`, in the namespace that ours knows by that id.
    fn request(self, netnsid: Option<i32>) -> Message {
        let mut message = Message::new(libc::RTM_GETLINK, nl::ACK);
        match self {
            Self::Name(name) => message
                .raw(&ifinfo(0, 0, 0))
                .attr_str(libc::IFLA_IFNAME, name),
            Self::Index(index) => message.raw(&ifinfo(index, 0, 0)),
        };
        if let Some(id) = netnsid {
            message.attr(libc::IFLA_TARGET_NETNSID, &id.to_ne_bytes());
        }
        message
    }

    fn describe(self) -> String {
        match self {
            Self::Name(name) => format!("device {name}"),
            Self::Index(index) => format!("device {index}"),
        }
    }
}

/// The link as it is, in our namespace or the one with this id.
pub(crate) fn find(which: Which<'_>, netnsid: Option<i32>) -> Result<Link, Error> {
    let mut link = None;
    let mut message = which.request(netnsid);
    message.attr(libc::IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    Client::route()
        .and_then(|mut client| {
            client.query(message, |_, payload| {
                link = Link::parse(payload).or(link.take())
            })
        })
        .map_err(|errno| Error::os(errno, which.describe()))?;
    link.ok_or_else(|| Error::os(Errno::NODEV, which.describe()))
}

/// The link of this name.
///
/// # Errors
/// `ENODEV`: none; also of a name that can't be one.
pub fn by_name(name: &str) -> Result<Link, Error> {
    if !is_valid_name(name) {
        return Err(Error::os(Errno::NODEV, Which::Name(name).describe()));
    }
    find(Which::Name(name), None)
}

/// The link of this ifindex.
///
/// # Errors
/// `ENODEV`: none.
pub fn by_index(index: u32) -> Result<Link, Error> {
    find(Which::Index(index), None)
}

/// All links.
///
/// # Errors
/// Those of the socket.
pub fn all() -> Result<Vec<Link>, Error> {
    let mut client = Client::route().map_err(|errno| Error::os(errno, "list of devices"))?;
    all_from(&mut client)
}

fn all_from(client: &mut Client) -> Result<Vec<Link>, Error> {
    let mut links = Vec::new();
    let mut message = Message::new(libc::RTM_GETLINK, nl::DUMP);
    message
        .raw(&ifinfo(0, 0, 0))
        .attr(libc::IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    client
        .query(message, |_, payload| links.extend(Link::parse(payload)))
        .map_err(|errno| Error::os(errno, "list of devices"))?;
    Ok(links)
}

/// A link's own counters.
///
/// # Errors
/// `ENODEV`: no such link.
pub fn stats(index: u32) -> Result<LinkStats, Error> {
    find_stats(Which::Index(index), None)
}

pub(crate) fn find_stats(which: Which<'_>, netnsid: Option<i32>) -> Result<LinkStats, Error> {
    let mut found = None;
    Client::route()
        .and_then(|mut client| {
            client.query(which.request(netnsid), |_, payload| {
                found = nl::attributes(payload.get(IFINFO..).unwrap_or_default())
                    .find(|(kind, _)| *kind == libc::IFLA_STATS64)
                    .and_then(|(_, value)| parse_stats(value));
            })
        })
        .map_err(|errno| Error::os(errno, which.describe()))?;
    found.ok_or_else(|| Error::os(Errno::NODEV, which.describe()))
}

/// The first eight counters of `struct rtnl_link_stats64`.
fn parse_stats(value: &[u8]) -> Option<LinkStats> {
    let counter = |n: usize| {
        value
            .get(n * 8..)?
            .first_chunk::<8>()
            .map(|bytes| u64::from_ne_bytes(*bytes))
    };
    Some(LinkStats {
        rx_packets: counter(0)?,
        tx_packets: counter(1)?,
        rx_bytes: counter(2)?,
        tx_bytes: counter(3)?,
        rx_errors: counter(4)?,
        tx_errors: counter(5)?,
        rx_dropped: counter(6)?,
        tx_dropped: counter(7)?,
    })
}

/// The id by which our namespace knows the one that the descriptor refers to; gives it one if it
/// has none yet.
///
/// # Errors
/// `EPERM`: none yet, and we may not give one.
pub fn netnsid_of(netns: std::os::fd::BorrowedFd<'_>) -> Result<i32, Error> {
    use std::os::fd::AsRawFd;
    const NETNSA_NSID: u16 = 1;
    const NETNSA_FD: u16 = 3;
    let fd = netns.as_raw_fd().to_ne_bytes();
    // struct rtgenmsg: the family, padded.
    let ask = || -> Result<Option<i32>, Errno> {
        let mut id = None;
        let mut message = Message::new(libc::RTM_GETNSID, nl::ACK);
        message.raw(&[0; 4]).attr(NETNSA_FD, &fd);
        Client::route()?.query(message, |_, payload| {
            id = nl::attributes(payload.get(4..).unwrap_or_default())
                .find(|(kind, _)| *kind == NETNSA_NSID)
                .and_then(|(_, value)| nl::u32_of(value).map(|id| id as i32))
                .filter(|id| *id >= 0);
        })?;
        Ok(id)
    };
    let give = || -> Result<(), Errno> {
        let mut message = Message::new(libc::RTM_NEWNSID, nl::ACK);
        message
            .raw(&[0; 4])
            .attr(NETNSA_FD, &fd)
            .attr(NETNSA_NSID, &(-1i32).to_ne_bytes());
        Client::route()?.change(message)
    };
    let what = "id of a network namespace";
    if let Some(id) = ask().map_err(|errno| Error::os(errno, what))? {
        return Ok(id);
    }
    give().map_err(|errno| Error::os(errno, what))?;
    ask()
        .map_err(|errno| Error::os(errno, what))?
        .ok_or_else(|| Error::os(Errno::NOENT, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_is_there_and_is_no_ethernet() {
        let lo = by_name("lo").unwrap();
        assert!(lo.is_loopback() && !lo.is_ethernet());
        assert_eq!(by_index(lo.index).unwrap().name, "lo");
        assert!(all().unwrap().iter().any(|link| link.name == "lo"));
        stats(lo.index).unwrap();
    }

    #[test]
    fn a_link_that_is_not_there_is_enodev() {
        assert_eq!(by_name("nosuchdevice0").unwrap_err().errno(), libc::ENODEV);
        assert_eq!(
            by_name("a name that is too long").unwrap_err().errno(),
            libc::ENODEV
        );
        assert_eq!(by_index(i32::MAX as u32).unwrap_err().errno(), libc::ENODEV);
    }

    #[test]
    fn a_message_about_a_bridge_port_is_not_about_the_link() {
        let mut payload = ifinfo(7, 0, 0).to_vec();
        payload.extend([8, 0, libc::IFLA_MTU as u8, 0, 220, 5, 0, 0]);
        assert!(Link::parse(&payload).is_some());
        payload[0] = 7; // AF_BRIDGE
        assert!(Link::parse(&payload).is_none());
        assert!(Link::parse(&payload[..15]).is_none());
    }
}
