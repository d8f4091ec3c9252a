//! NETLINK_ROUTE, as far as it is about the links of tunnels: what Open vSwitch asks of the kernel before
//! it makes a port of a tunnel, and after the port is gone.
//!
//! - RTM_NEWLINK of a kind that [`kind`] knows, with COLLECT_METADATA, makes a
//!   [`TunnelLink`]; of a link that is there it changes MTU and flags, as RTM_SETLINK does;
//! - RTM_GETLINK tells of one, with the attributes that it was made with;
//! - RTM_DELLINK removes it, and a port that is made of it.
//!
//! Everything else is the kernel's.
//!
//! Source: uapi `linux/rtnetlink.h`, `linux/if_link.h`, `linux/if_tunnel.h`.

use std::sync::Arc;

use netlink::attr::{Attr, Attrs, Table, Writer};
use netlink::service::{Answer, Request, Served};
use netlink::{Dump, Errno, Failure, Lane, Links, Service};

use crate::daemon::Daemon;
use crate::tunnel_link::TunnelLink;
use crate::{devices, families};

pub mod kind;

/// `nlmsg_type`.
pub mod message {
    #![allow(missing_docs)]
    pub const NEWLINK: u16 = 16;
    pub const DELLINK: u16 = 17;
    pub const GETLINK: u16 = 18;
    pub const SETLINK: u16 = 19;
}

/// `IFLA_*`.
mod attribute {
    pub const ADDRESS: u16 = 1;
    pub const BROADCAST: u16 = 2;
    pub const IFNAME: u16 = 3;
    pub const MTU: u16 = 4;
    pub const TXQLEN: u16 = 13;
    pub const OPERSTATE: u16 = 16;
    pub const LINKINFO: u16 = 18;
    pub const STATS64: u16 = 23;
    pub const CARRIER: u16 = 33;
    pub const COUNT: usize = 34;
    /// Within [`LINKINFO`].
    pub const INFO_KIND: u16 = 1;
    pub const INFO_DATA: u16 = 2;
    pub const INFO_COUNT: usize = 3;
}

/// `NLM_F_*` of a NEW request.
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

/// `struct ifinfomsg`.
const IFINFO: usize = 16;
const ARPHRD_ETHER: u16 = 1;
const IF_OPER_UNKNOWN: u8 = 0;
/// Of a port without a queue of its own.
const TX_QUEUE: u32 = 0;
/// A device's limits, as the kernel's tunnel devices have them.
const MIN_MTU: u32 = 68;
const MAX_MTU: u32 = 65_535;
const DEFAULT_MTU: u32 = 1450;

/// A string with or without a NUL at its end: iproute2 sends both. EINVAL if it isn't UTF-8.
fn text(attr: Attr<'_>) -> Result<&str, Errno> {
    let bytes = attr.payload.split(|byte| *byte == 0).next();
    std::str::from_utf8(bytes.unwrap_or_default()).map_err(|_| Errno::EINVAL)
}

/// What a request names, and asks for.
struct Asked<'a> {
    index: u32,
    flags: u32,
    change: u32,
    attrs: Table<'a, { attribute::COUNT }>,
}

impl<'a> Asked<'a> {
    fn of(request: &Request<'a>) -> Result<Self, Errno> {
        let (fixed, attributes) = request.split::<IFINFO>()?;
        let word = |at: usize| {
            let bytes = fixed.get(at..).and_then(|bytes| bytes.first_chunk());
            u32::from_ne_bytes(bytes.copied().unwrap_or_default())
        };
        Ok(Self {
            index: word(4),
            flags: word(8),
            change: word(12),
            attrs: Table::new(attributes),
        })
    }

    fn name(&self) -> Result<Option<&'a str>, Errno> {
        let name = self.attrs.get(attribute::IFNAME);
        name.map(text).transpose()
    }

    fn mtu(&self) -> Result<Option<u32>, Errno> {
        let mtu = self.attrs.get(attribute::MTU);
        match mtu.map(|attr| attr.u32()).transpose()? {
            Some(mtu) if !(MIN_MTU..=MAX_MTU).contains(&mtu) => Err(Errno::EINVAL),
            mtu => Ok(mtu),
        }
    }
}

/// The service for [`netlink::Protocol::Route`].
pub struct Rtnetlink {
    daemon: Arc<Daemon>,
    marks: Option<Links>,
}

impl Rtnetlink {
    /// For `daemon`; `marks` tells interposed programs which links are asked for here.
    pub fn new(daemon: Arc<Daemon>, marks: Option<Links>) -> Self {
        Self { daemon, marks }
    }

    fn find(&self, asked: &Asked<'_>) -> Result<Option<Arc<TunnelLink>>, Errno> {
        let links = &self.daemon.tunnel_links;
        if asked.index != 0 {
            return Ok(links.find(|link| link.ifindex == asked.index));
        }
        Ok(asked.name()?.and_then(|name| links.by_name(name)))
    }

    fn new_link(&self, request: &Request<'_>, asked: &Asked<'_>) -> Result<Served, Failure> {
        if let Some(link) = self.find(asked)? {
            if request.has(NLM_F_EXCL) {
                return Err(Errno::EEXIST.into());
            }
            self.change(&link, asked)?;
            return Ok(Served::Done);
        }
        let info = asked.attrs.get(attribute::LINKINFO);
        let Some(info) = info.filter(|_| request.has(NLM_F_CREATE)) else {
            return Ok(Served::NotOurs);
        };
        let info: Table<'_, { attribute::INFO_COUNT }> = Table::new(info.payload);
        let kind = text(info.require(attribute::INFO_KIND)?)?;
        let data = info.get(attribute::INFO_DATA);
        let data = data.map_or(&[][..], |attr| attr.payload);
        let config = match kind::config(kind, Attrs::new(data))? {
            kind::Wanted::Tunnel(config) => config,
            kind::Wanted::Missing => return Err(Errno::EOPNOTSUPP.into()),
            kind::Wanted::Others => return Ok(Served::NotOurs),
        };
        let name = asked.name()?.ok_or(Errno::EINVAL)?;
        families::check_device_name(name)?;
        let mtu = asked.mtu()?.unwrap_or(DEFAULT_MTU);
        let configuration = self.daemon.configure();
        if ::vport::link::by_name(name).is_ok() || self.daemon.find_port(name).is_some() {
            return Err(Errno::EEXIST.into());
        }
        configuration.tunnel_is_free(config, None)?;
        let ifindex = self.daemon.next_tunnel_ifindex();
        // Opened to see whether it can be; it is opened for good when a port is made of it.
        drop(configuration.make_tunnel(name, config, ifindex)?);
        let link = TunnelLink {
            name: name.to_owned(),
            ifindex,
            kind: kind.to_owned(),
            data: data.to_vec(),
            config,
            mtu,
            flags: asked.flags & asked.change & libc::IFF_UP as u32,
            address: address(self.daemon.options.seed, ifindex),
        };
        if let Some(marks) = &self.marks
            && let Err(error) = marks.add(name, ifindex.cast_signed())
        {
            tracing::warn!("tunnel {name}: can't be marked in the run directory: {error}");
            return Err(Errno::EIO.into());
        }
        self.daemon.tunnel_links.put(link);
        Ok(Served::Done)
    }

    fn set_link(&self, asked: &Asked<'_>) -> Result<Served, Failure> {
        match self.find(asked)? {
            Some(link) => {
                self.change(&link, asked)?;
                Ok(Served::Done)
            }
            None => Ok(Served::NotOurs),
        }
    }

    fn change(&self, link: &TunnelLink, asked: &Asked<'_>) -> Result<(), Errno> {
        let mtu = asked.mtu()?.unwrap_or(link.mtu);
        let changed = asked.change & libc::IFF_UP as u32;
        let _configuration = self.daemon.configure();
        self.daemon.tunnel_links.put(TunnelLink {
            mtu,
            flags: link.flags & !changed | asked.flags & changed,
            ..link.clone()
        });
        Ok(())
    }

    fn delete(&self, asked: &Asked<'_>) -> Result<Served, Failure> {
        let Some(link) = self.find(asked)? else {
            return Ok(Served::NotOurs);
        };
        let handle = self.daemon.reclaimer.register();
        if let Some((datapath, port)) = self.daemon.find_port(&link.name)
            && port.device.ifindex() == link.ifindex
        {
            let gone = Arc::downgrade(&port);
            // The removal waits until nobody holds the port.
            drop(port);
            devices::remove(&self.daemon, &handle, &datapath, &gone);
        }
        let _configuration = self.daemon.configure();
        self.daemon.tunnel_links.remove(link.ifindex);
        if let Some(marks) = &self.marks
            && let Err(error) = marks.remove(&link.name, link.ifindex.cast_signed())
        {
            tracing::warn!("tunnel {}: its mark can't be removed: {error}", link.name);
        }
        Ok(Served::Done)
    }

    fn get(&self, asked: &Asked<'_>, answer: &mut Answer<'_>) -> Result<Served, Failure> {
        let Some(link) = self.find(asked)? else {
            return Ok(Served::NotOurs);
        };
        let stats = self
            .daemon
            .find_port(&link.name)
            .map_or([0; 8], |(_, port)| port.stats());
        let running = match link.flags & libc::IFF_UP as u32 {
            0 => 0,
            _ => libc::IFF_RUNNING | libc::IFF_LOWER_UP,
        };
        let flags = link.flags | (running | libc::IFF_BROADCAST | libc::IFF_MULTICAST) as u32;
        let mut fixed = [0; IFINFO];
        let words = [u32::from(ARPHRD_ETHER) << 16, link.ifindex, flags, 0];
        for (place, word) in fixed.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        // Family and padding, then the type in host order.
        if let Some(place) = fixed.get_mut(..4) {
            let [a, b] = ARPHRD_ETHER.to_ne_bytes();
            place.copy_from_slice(&[0, 0, a, b]);
        }
        answer.reply(message::NEWLINK, &fixed, |writer| {
            write(writer, &link, &stats)
        })?;
        Ok(Served::Done)
    }
}

fn write(writer: &mut Writer<'_>, link: &TunnelLink, stats: &[u64; 8]) -> Result<(), Errno> {
    writer.name(attribute::IFNAME, &link.name)?;
    writer.u32(attribute::TXQLEN, TX_QUEUE);
    writer.u8(attribute::OPERSTATE, IF_OPER_UNKNOWN);
    writer.u32(attribute::MTU, link.mtu);
    writer.u8(attribute::CARRIER, 1);
    writer.bytes(attribute::ADDRESS, &link.address)?;
    writer.bytes(attribute::BROADCAST, &[0xff; 6])?;
    // The first eight of `struct rtnl_link_stats64` are `struct ovs_vport_stats`.
    let mut bytes = [0; 24 * 8];
    for (place, value) in bytes.chunks_exact_mut(8).zip(stats) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    writer.bytes(attribute::STATS64, &bytes)?;
    let info = writer.begin(attribute::LINKINFO);
    writer.name(attribute::INFO_KIND, &link.kind)?;
    writer.bytes(attribute::INFO_DATA, &link.data)?;
    writer.end(info)
}

/// A locally administered address, another one for each link of a run.
fn address(seed: u64, ifindex: u32) -> [u8; 6] {
    let mixed = (seed ^ u64::from(ifindex)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let [_, _, a, b, c, d, e, f] = mixed.to_be_bytes();
    [a & 0xfc | 2, b, c, d, e, f]
}

impl Service for Rtnetlink {
    fn lane(&self, request: &Request<'_>) -> Lane {
        match request.kind {
            message::GETLINK => Lane::Prompt,
            _ => Lane::MaySleep,
        }
    }

    fn needs_privilege(&self, request: &Request<'_>) -> bool {
        request.kind != message::GETLINK
    }

    fn is_dump(&self, _request: &Request<'_>) -> bool {
        false
    }

    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<Served, Failure> {
        let asked = Asked::of(request)?;
        match request.kind {
            message::NEWLINK => self.new_link(request, &asked),
            message::SETLINK => self.set_link(&asked),
            message::DELLINK => self.delete(&asked),
            message::GETLINK => self.get(&asked, answer),
            _ => Ok(Served::NotOurs),
        }
    }

    fn dump(&self, _request: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        Err(Errno::EOPNOTSUPP.into())
    }
}
