//! Changes to links.

use std::hash::{BuildHasher, Hasher};

use rustix::io::Errno;

use super::{ifinfo, is_valid_name};
use crate::error::Error;
use crate::nl::{self, Client, Message};

const VETH_INFO_PEER: u16 = 1;
/// IFLA_INET6_ADDR_GEN_MODE.
const INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;

fn change(message: Message, what: impl Into<String>) -> Result<(), Error> {
    Client::route()
        .and_then(|mut client| client.change(message))
        .map_err(|errno| Error::os(errno, what))
}

fn set(index: u32, kind: u16, value: &[u8], what: &str) -> Result<(), Error> {
    let mut message = Message::new(libc::RTM_SETLINK, nl::ACK);
    message.raw(&ifinfo(index, 0, 0)).attr(kind, value);
    change(message, format!("{what} of device {index}"))
}

/// Sets IFF_UP or clears it.
///
/// # Errors
/// Those of RTM_SETLINK.
pub fn set_up(index: u32, up: bool) -> Result<(), Error> {
    let flag = libc::IFF_UP as u32;
    let mut message = Message::new(libc::RTM_SETLINK, nl::ACK);
    message.raw(&ifinfo(index, if up { flag } else { 0 }, flag));
    change(
        message,
        format!("device {index} {}", if up { "up" } else { "down" }),
    )
}

/// Sets the MTU, in bytes.
///
/// # Errors
/// Those of RTM_SETLINK: `EINVAL` out of the device's range.
pub fn set_mtu(index: u32, mtu: u32) -> Result<(), Error> {
    set(index, libc::IFLA_MTU, &mtu.to_ne_bytes(), "MTU")
}

/// Sets the hardware address.
///
/// # Errors
/// Those of RTM_SETLINK.
pub fn set_mac(index: u32, mac: [u8; 6]) -> Result<(), Error> {
    set(index, libc::IFLA_ADDRESS, &mac, "hardware address")
}

/// Sets the alias, by which a device can be told from others.
///
/// # Errors
/// Those of RTM_SETLINK.
pub fn set_alias(index: u32, alias: &str) -> Result<(), Error> {
    set(index, libc::IFLA_IFALIAS, alias.as_bytes(), "alias")
}

/// Sets how many packets wait to be transmitted; a TAP's queue towards its reader is that long.
///
/// # Errors
/// Those of RTM_SETLINK.
pub fn set_tx_queue_len(index: u32, packets: u32) -> Result<(), Error> {
    set(
        index,
        libc::IFLA_TXQLEN,
        &packets.to_ne_bytes(),
        "queue length",
    )
}

/// Deletes a link (and its peer, if it is one end of a pair).
///
/// # Errors
/// `ENODEV`: it is gone already. `EOPNOTSUPP`: not of a kind that can be deleted.
pub fn delete(index: u32) -> Result<(), Error> {
    Deleter::new(index)?.delete()
}

/// Deletes links at once: the kernel waits for its readers once for all of them, where one after the
/// other would each wait. Those that are gone already don't count.
///
/// # Errors
/// `EOPNOTSUPP`: one of them is not of a kind that can be deleted; all are still there.
pub fn delete_together(indices: &[u32]) -> Result<(), Error> {
    let what = || format!("delete {} devices", indices.len());
    let mut client = Client::route().map_err(|errno| Error::os(errno, what()))?;
    // People number groups from 0: one with the highest bit is nobody's.
    let random = std::hash::RandomState::new().build_hasher().finish() as u32;
    let group = (random | 1 << 31).to_ne_bytes();
    let mut grouped = false;
    for index in indices {
        let mut message = Message::new(libc::RTM_SETLINK, nl::ACK);
        message
            .raw(&ifinfo(*index, 0, 0))
            .attr(libc::IFLA_GROUP, &group);
        match client.change(message) {
            Ok(()) => grouped = true,
            Err(Errno::NODEV) => {}
            Err(errno) => return Err(Error::os(errno, what())),
        }
    }
    if !grouped {
        return Ok(());
    }
    let mut message = Message::new(libc::RTM_DELLINK, nl::ACK);
    message.raw(&ifinfo(0, 0, 0)).attr(libc::IFLA_GROUP, &group);
    match client.change(message) {
        // The last of them went meanwhile.
        Ok(()) | Err(Errno::NODEV) => Ok(()),
        Err(errno) => Err(Error::os(errno, what())),
    }
}

/// Will delete a link of the namespace in which this was made, whichever the thread's is then.
#[derive(Debug)]
pub(crate) struct Deleter {
    client: Client,
    index: u32,
}

impl Deleter {
    pub(crate) fn new(index: u32) -> Result<Self, Error> {
        let client =
            Client::route().map_err(|errno| Error::os(errno, format!("delete device {index}")))?;
        Ok(Self { client, index })
    }

    pub(crate) fn delete(&mut self) -> Result<(), Error> {
        let mut message = Message::new(libc::RTM_DELLINK, nl::ACK);
        message.raw(&ifinfo(self.index, 0, 0));
        self.client
            .change(message)
            .map_err(|errno| Error::os(errno, format!("delete device {}", self.index)))
    }
}

/// A veth pair to be made.
#[derive(Clone, Debug)]
pub struct Veth<'a> {
    /// The one end.
    pub name: &'a str,
    /// The other.
    pub peer: &'a str,
    /// Index of the one end; otherwise the kernel chooses.
    pub ifindex: Option<u32>,
    /// Hardware address of the one end; otherwise random.
    pub mac: Option<[u8; 6]>,
    /// MTU of the one end; otherwise 1500.
    pub mtu: Option<u32>,
    /// MTU of the other end; otherwise 1500.
    pub peer_mtu: Option<u32>,
    /// The other end shall get no IPv6 address by itself.
    pub peer_silent: bool,
}

/// Makes a veth pair, both ends down.
///
/// # Errors
/// `EEXIST`: one of the names, or the index, is taken. `EINVAL`: one can't be a name.
pub fn create_veth(veth: &Veth<'_>) -> Result<(), Error> {
    let what = format!("create veth {} - {}", veth.name, veth.peer);
    if !is_valid_name(veth.name) || !is_valid_name(veth.peer) {
        return Err(Error::os(Errno::INVAL, what));
    }
    let mut message = Message::new(libc::RTM_NEWLINK, nl::CREATE | nl::EXCL | nl::ACK);
    message
        .raw(&ifinfo(veth.ifindex.unwrap_or(0), 0, 0))
        .attr_str(libc::IFLA_IFNAME, veth.name);
    if let Some(mac) = veth.mac {
        message.attr(libc::IFLA_ADDRESS, &mac);
    }
    if let Some(mtu) = veth.mtu {
        message.attr(libc::IFLA_MTU, &mtu.to_ne_bytes());
    }
    message.nested(libc::IFLA_LINKINFO, |info| {
        info.attr_str(libc::IFLA_INFO_KIND, "veth")
            .nested(libc::IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |peer| {
                    peer.raw(&ifinfo(0, 0, 0))
                        .attr_str(libc::IFLA_IFNAME, veth.peer);
                    if let Some(mtu) = veth.peer_mtu {
                        peer.attr(libc::IFLA_MTU, &mtu.to_ne_bytes());
                    }
                });
            });
    });
    change(message, what)?;
    if veth.peer_silent {
        silence(super::by_name(veth.peer)?.index);
    }
    Ok(())
}

/// The device shall get no IPv6 address by itself.
pub(crate) fn silence(index: u32) {
    let mut message = Message::new(libc::RTM_SETLINK, nl::ACK);
    message
        .raw(&ifinfo(index, 0, 0))
        .nested(libc::IFLA_AF_SPEC, |spec| {
            spec.nested(libc::AF_INET6 as u16, |inet6| {
                inet6.attr(INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]);
            });
        });
    // A host without IPv6 has nothing to be silenced.
    if let Err(error) = change(message, "IPv6 address mode") {
        tracing::debug!("device {index}: {error}");
    }
}
