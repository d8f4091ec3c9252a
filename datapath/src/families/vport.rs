//! `ovs_vport`: ports added, deleted, read, changed.
//!
//! Source: uapi `linux/openvswitch.h`, `enum ovs_vport_cmd`; the order of checks as the module has it.

use std::sync::Arc;

use ::vport::{TunnelConfig, TunnelKind};
use frame::tunnel::vxlan::Extensions;
use netlink::attr::{Attr, Table, Writer};
use netlink::{Answer, Dump, DumpPart, Errno, Failure, Family, Fit, Group, Request};

use super::{check_device_name, command, cpu_ids, port_id_bytes, port_ids};
use crate::daemon::{Daemon, PortWish};
use crate::datapath::{Datapath, features};
use crate::vport::{MAX_PORTS, Vport, VportType};

mod attribute {
    pub const PORT_NO: u16 = 1;
    pub const TYPE: u16 = 2;
    pub const NAME: u16 = 3;
    pub const OPTIONS: u16 = 4;
    pub const UPCALL_PID: u16 = 5;
    pub const STATS: u16 = 6;
    pub const IFINDEX: u16 = 8;
    pub const NETNSID: u16 = 9;
    pub const UPCALL_STATS: u16 = 10;
    pub const COUNT: usize = 11;
}

/// Within `OVS_VPORT_ATTR_UPCALL_STATS` (Linux 6.3).
mod upcall_stats {
    pub const SUCCESS: u16 = 0;
    pub const FAIL: u16 = 1;
}

type Attributes<'a> = Table<'a, { attribute::COUNT }>;

pub(super) fn handle(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let attrs: Attributes<'_> = request.table();
    match request.command {
        command::NEW => {
            let wish = wish(&attrs)?;
            let configuration = daemon.configure();
            let datapath = daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV)?;
            let wish = wish.check()?;
            let port = configuration.add_port(&datapath, &wish)?;
            announce(answer, command::NEW, &datapath, &port)
        }
        command::SET => {
            let configuration = daemon.configure();
            let (datapath, port) = find(daemon, request, &attrs)?;
            if attrs
                .get(attribute::TYPE)
                .is_some_and(|attr| attr.u32() != Ok(port.kind.number()))
            {
                return Err(Errno::EINVAL.into());
            }
            if attrs.get(attribute::OPTIONS).is_some() {
                return Err(Errno::EOPNOTSUPP.into());
            }
            if let Some(attr) = attrs.get(attribute::UPCALL_PID) {
                port.upcall_pids.store(Arc::new(readers(attr.payload)?));
            }
            drop(configuration);
            announce(answer, command::SET, &datapath, &port)
        }
        command::DEL => {
            let configuration = daemon.configure();
            let (datapath, port) = find(daemon, request, &attrs)?;
            if port.number == 0 {
                return Err(Errno::EINVAL.into());
            }
            announce(answer, command::DEL, &datapath, &port)?;
            let number = port.number;
            drop(port);
            configuration.remove_port(&datapath, number);
            Ok(())
        }
        command::GET => {
            let (datapath, port) = find(daemon, request, &attrs)?;
            daemon.devices.look(&port);
            answer.reply(command::GET, datapath.ifindex, |writer| {
                write(writer, &datapath, &port)
            })?;
            Ok(())
        }
        _ => Err(Errno::EOPNOTSUPP.into()),
    }
}

fn announce(
    answer: &mut Answer<'_>,
    command: u8,
    datapath: &Datapath,
    port: &Vport,
) -> Result<(), Failure> {
    answer.announce(Group::Vport, command, datapath.ifindex, |writer| {
        write(writer, datapath, port)
    })?;
    Ok(())
}

/// What NEW asks for, before the datapath is looked up.
struct Wish<'a> {
    name: &'a str,
    kind: u32,
    number: Option<u32>,
    ifindex: Option<u32>,
    upcall_pids: &'a [u8],
    options: Option<Attr<'a>>,
}

fn wish<'a>(attrs: &Attributes<'a>) -> Result<Wish<'a>, Errno> {
    let name = attrs.require(attribute::NAME)?.name(15)?;
    let kind = attrs.require(attribute::TYPE)?.u32()?;
    let upcall_pids = attrs.require(attribute::UPCALL_PID)?.payload;
    let number = attrs
        .get(attribute::PORT_NO)
        .map_or(Ok(0), |attr| attr.u32())?;
    if number >= MAX_PORTS {
        return Err(Errno::EFBIG);
    }
    let ifindex = attrs
        .get(attribute::IFINDEX)
        .map_or(Ok(0), |attr| attr.u32())?;
    Ok(Wish {
        name,
        kind,
        number: (number != 0).then_some(number),
        ifindex: (ifindex != 0).then_some(ifindex),
        upcall_pids,
        options: attrs.get(attribute::OPTIONS),
    })
}

impl<'a> Wish<'a> {
    /// What is checked once there is a datapath.
    fn check(self) -> Result<PortWish<'a>, Errno> {
        let (kind, tunnel) = match self.kind {
            1 => (VportType::Netdev, None),
            2 => (VportType::Internal, None),
            3 => (VportType::Gre, Some(TunnelKind::Gre)),
            4 => (VportType::Vxlan, Some(TunnelKind::Vxlan)),
            5 => (VportType::Geneve, Some(TunnelKind::Geneve)),
            _ => return Err(Errno::EAFNOSUPPORT),
        };
        if kind != VportType::Netdev {
            check_device_name(self.name)?;
        }
        let tunnel = tunnel.map(|kind| tunnel_config(kind, self.options));
        Ok(PortWish {
            name: self.name,
            kind,
            number: self.number,
            ifindex: self.ifindex,
            tunnel: tunnel.transpose()?,
            upcall_pids: readers(self.upcall_pids)?,
        })
    }
}

/// Within `OVS_VPORT_ATTR_OPTIONS`, and `OVS_TUNNEL_ATTR_EXTENSION` of VXLAN.
mod option {
    pub const DST_PORT: u16 = 1;
    pub const EXTENSION: u16 = 2;
    pub const GBP: u16 = 1;
}

/// The port that VXLAN had before it was given one, and that the kernel's devices take for 0.
const OLD_VXLAN_PORT: u16 = 8472;

fn tunnel_config(kind: TunnelKind, options: Option<Attr<'_>>) -> Result<TunnelConfig, Errno> {
    let mut config = TunnelConfig {
        kind,
        port: 0,
        extensions: Extensions::default(),
    };
    if !kind.is_udp() {
        return Ok(config);
    }
    let mut port = None;
    for attr in options.ok_or(Errno::EINVAL)?.nested() {
        match attr.kind {
            option::DST_PORT if attr.payload.len() == 2 => port = Some(attr.u16()?),
            option::EXTENSION if kind == TunnelKind::Vxlan => {
                for extension in attr.nested().filter(|of| of.kind == option::GBP) {
                    if !extension.payload.is_empty() {
                        return Err(Errno::ERANGE);
                    }
                    config.extensions.gbp = true;
                }
            }
            _ => {}
        }
    }
    config.port = match (port.ok_or(Errno::EINVAL)?, kind) {
        (0, TunnelKind::Vxlan) => OLD_VXLAN_PORT,
        (port, _) => port,
    };
    Ok(config)
}

fn write_options(writer: &mut Writer<'_>, config: &TunnelConfig) -> Result<(), Errno> {
    let nest = writer.begin(attribute::OPTIONS);
    writer.u16(option::DST_PORT, config.port);
    if config.extensions.gbp {
        let extension = writer.begin(option::EXTENSION);
        writer.flag(option::GBP);
        writer.end(extension)?;
    }
    writer.end(nest)
}

/// EINVAL for more readers than CPUs, as the module.
fn readers(payload: &[u8]) -> Result<Vec<u32>, Errno> {
    let pids = port_ids(payload)?;
    if pids.len() > cpu_ids() {
        return Err(Errno::EINVAL);
    }
    Ok(pids)
}

/// By name (in any datapath if the header names none), else by number.
fn find(
    daemon: &Daemon,
    request: &Request<'_>,
    attrs: &Attributes<'_>,
) -> Result<(Arc<Datapath>, Arc<Vport>), Errno> {
    if let Some(attr) = attrs.get(attribute::NAME) {
        let (datapath, port) = daemon.find_port(attr.name(15)?).ok_or(Errno::ENODEV)?;
        if request.dp_ifindex != 0 && request.dp_ifindex != datapath.ifindex {
            return Err(Errno::ENODEV);
        }
        return Ok((datapath, port));
    }
    let number = attrs.require(attribute::PORT_NO)?.u32()?;
    if number >= MAX_PORTS {
        return Err(Errno::EFBIG);
    }
    let datapath = daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV)?;
    let port = datapath
        .ports
        .load()
        .get(number)
        .cloned()
        .ok_or(Errno::ENODEV)?;
    Ok((datapath, port))
}

/// All attributes of a port, in the module's order.
pub fn write(writer: &mut Writer<'_>, datapath: &Datapath, port: &Vport) -> Result<(), Errno> {
    writer.u32(attribute::PORT_NO, port.number);
    writer.u32(attribute::TYPE, port.kind.number());
    writer.name(attribute::NAME, &port.current_name())?;
    writer.u32(attribute::IFINDEX, port.device.ifindex());
    if let Some(id) = port.observed.load().netnsid {
        writer.bytes(attribute::NETNSID, &id.to_ne_bytes())?;
    }
    let mut stats = [0; 64];
    for (place, value) in stats.chunks_exact_mut(8).zip(port.stats()) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    writer.bytes(attribute::STATS, &stats)?;
    let totals = port.counters.totals();
    let nest = writer.begin(attribute::UPCALL_STATS);
    writer.u64(upcall_stats::SUCCESS, totals.upcalls);
    writer.u64(upcall_stats::FAIL, totals.upcalls_lost);
    writer.end(nest)?;
    let pids = port.upcall_pids.load();
    let all = datapath.settings.load().features & features::VPORT_PIDS != 0;
    let shown = if all {
        &pids[..]
    } else {
        pids.get(..1).unwrap_or_default()
    };
    writer.bytes(attribute::UPCALL_PID, &port_id_bytes(shown))?;
    match (&port.tunnel, port.kind) {
        (Some(config), VportType::Vxlan | VportType::Geneve) => write_options(writer, config),
        _ => Ok(()),
    }
}

/// A dump of one datapath's ports.
pub(super) fn dump(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
) -> Result<impl Dump + use<>, Errno> {
    let datapath = daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV)?;
    Ok(VportDump {
        daemon: Arc::clone(daemon),
        ifindex: datapath.ifindex,
        next: 0,
    })
}

struct VportDump {
    daemon: Arc<Daemon>,
    ifindex: i32,
    /// The lowest number that hasn't been written.
    next: u32,
}

impl Dump for VportDump {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        // Looked up anew for each part, so that a slow reader keeps no port open.
        let datapath = self.daemon.by_ifindex(self.ifindex).ok_or(Errno::ENODEV)?;
        let ports = datapath.ports.load();
        for port in ports.iter_from(self.next) {
            self.daemon.devices.look(port);
            let fit = part.message(Family::Vport, command::GET, self.ifindex, |writer| {
                write(writer, &datapath, port)
            })?;
            match fit {
                Fit::Written => self.next = port.number + 1,
                Fit::Full => return Ok(false),
            }
        }
        Ok(true)
    }
}
