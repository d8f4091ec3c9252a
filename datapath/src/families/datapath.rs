//! `ovs_datapath`: datapaths made, deleted, read, changed.
//!
//! Source: uapi `linux/openvswitch.h`, `enum ovs_datapath_cmd`; the order of checks as the module has it.

use std::sync::Arc;

use flow::cache::MASK_CACHE_DEFAULT;
use netlink::attr::{Table, Writer};
use netlink::{Answer, Dump, DumpPart, Errno, Failure, Family, Fit, Group, Request};

use super::{check_device_name, command, cpu_ids, port_id_bytes, port_ids, with_context};
use crate::daemon::Daemon;
use crate::datapath::{Datapath, Settings, features};

mod attribute {
    pub const NAME: u16 = 1;
    pub const UPCALL_PID: u16 = 2;
    pub const STATS: u16 = 3;
    pub const MEGAFLOW_STATS: u16 = 4;
    pub const USER_FEATURES: u16 = 5;
    pub const MASKS_CACHE_SIZE: u16 = 7;
    pub const PER_CPU_PIDS: u16 = 8;
    pub const IFINDEX: u16 = 9;
    pub const COUNT: usize = 10;
}

/// The first family version that knows features: older clients reset them.
const VERSION_WITH_FEATURES: u8 = 2;

type Attributes<'a> = Table<'a, { attribute::COUNT }>;

pub(super) fn handle(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let attrs: Attributes<'_> = request.table();
    match request.command {
        command::NEW => new(daemon, request, &attrs, answer),
        command::DEL => {
            let configuration = daemon.configure();
            let datapath = find(daemon, request, &attrs)?;
            answer.announce(Group::Datapath, command::DEL, datapath.ifindex, |writer| {
                write(writer, &datapath)
            })?;
            with_context(daemon, |context| {
                configuration.remove_datapath(&context.handle, &datapath);
                Ok(())
            })
        }
        command::SET => {
            let _configuration = daemon.configure();
            let datapath = find(daemon, request, &attrs)?;
            change(daemon, &datapath, &attrs)?;
            answer.announce(Group::Datapath, command::SET, datapath.ifindex, |writer| {
                write(writer, &datapath)
            })?;
            Ok(())
        }
        command::GET => {
            let datapath = find(daemon, request, &attrs)?;
            answer.reply(command::GET, datapath.ifindex, |writer| {
                write(writer, &datapath)
            })?;
            Ok(())
        }
        _ => Err(Errno::EOPNOTSUPP.into()),
    }
}

fn new(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    attrs: &Attributes<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let name = attrs.require(attribute::NAME)?.name(15)?;
    let pids = attrs.require(attribute::UPCALL_PID)?.payload;
    let upcall_pids = port_ids(pids.get(..4).unwrap_or(pids))?;
    let ifindex = attrs
        .get(attribute::IFINDEX)
        .map(|attr| attr.u32())
        .transpose()?;
    let configuration = daemon.configure();
    let mut settings = Settings {
        masks_cache_size: MASK_CACHE_DEFAULT,
        ..Settings::default()
    };
    apply(&mut settings, attrs)?;
    check_device_name(name)?;
    let made = with_context(daemon, |context| {
        let ifindex = ifindex.filter(|index| *index != 0);
        Ok(configuration.add_datapath(&context.handle, name, ifindex, settings, upcall_pids)?)
    });
    let datapath = match made {
        Ok(datapath) => datapath,
        Err(failure) => {
            if failure.errno == Errno::EEXIST
                && request.version < VERSION_WITH_FEATURES
                && let Some(existing) = daemon.by_name(name)
            {
                // A client that doesn't know features found a datapath of one that did.
                update(&existing, |settings| settings.features = 0);
            }
            return Err(failure);
        }
    };
    answer.announce(Group::Datapath, command::NEW, datapath.ifindex, |writer| {
        write(writer, &datapath)
    })?;
    Ok(())
}

/// By name, else by the header's ifindex.
fn find(
    daemon: &Daemon,
    request: &Request<'_>,
    attrs: &Attributes<'_>,
) -> Result<Arc<Datapath>, Errno> {
    match attrs.get(attribute::NAME) {
        Some(name) => daemon.by_name(name.name(15)?),
        None => daemon.by_ifindex(request.dp_ifindex),
    }
    .ok_or(Errno::ENODEV)
}

fn change(daemon: &Daemon, datapath: &Datapath, attrs: &Attributes<'_>) -> Result<(), Failure> {
    let mut settings = Settings::clone(&datapath.settings.load());
    apply(&mut settings, attrs)?;
    let cache = settings.masks_cache_size;
    datapath.settings.store(Arc::new(settings));
    with_context(daemon, |context| {
        let table = datapath
            .table
            .acquire(&context.handle)
            .ok_or(Errno::ENODEV)?;
        table
            .set_masks_cache_size(cache)
            .map_err(|_bad_size| Errno::ERANGE)?;
        Ok(())
    })
}

fn update(datapath: &Datapath, change: impl FnOnce(&mut Settings)) {
    let mut settings = Settings::clone(&datapath.settings.load());
    change(&mut settings);
    datapath.settings.store(Arc::new(settings));
}

/// What the attributes of NEW and SET ask for. Features that aren't mentioned are off afterwards.
fn apply(settings: &mut Settings, attrs: &Attributes<'_>) -> Result<(), Errno> {
    let wanted = attrs
        .get(attribute::USER_FEATURES)
        .map_or(Ok(0), |attr| attr.u32())?;
    if wanted & !features::SUPPORTED != 0 {
        return Err(Errno::EOPNOTSUPP);
    }
    if let Some(attr) = attrs.get(attribute::MASKS_CACHE_SIZE) {
        let size = attr.u32()?;
        if size != 0 && !size.is_power_of_two() {
            return Err(Errno::EINVAL);
        }
        settings.masks_cache_size = size;
    }
    settings.features = wanted;
    if wanted & features::DISPATCH_PER_CPU != 0
        && let Some(attr) = attrs.get(attribute::PER_CPU_PIDS)
    {
        settings.per_cpu_pids = port_ids(attr.payload)?;
    }
    Ok(())
}

/// All attributes of a datapath, in the module's order.
pub fn write(writer: &mut Writer<'_>, datapath: &Datapath) -> Result<(), Errno> {
    let settings = datapath.settings.load();
    let totals = datapath.totals();
    let (flows, masks) = datapath.sizes();
    writer.name(attribute::NAME, &datapath.local_name())?;
    writer.bytes(
        attribute::STATS,
        &words(&[totals.hit, totals.missed, totals.upcalls_lost, flows]),
    )?;
    // n_masks is a u32 with padding behind it.
    let masks = u64::from_ne_bytes(pair(masks as u32, 0));
    writer.bytes(
        attribute::MEGAFLOW_STATS,
        &words(&[totals.mask_hit, masks, totals.cache_hit, 0]),
    )?;
    writer.u32(attribute::USER_FEATURES, settings.features);
    writer.u32(attribute::MASKS_CACHE_SIZE, settings.masks_cache_size);
    if settings.features & features::DISPATCH_PER_CPU != 0 && !settings.per_cpu_pids.is_empty() {
        let shown = settings.per_cpu_pids.len().min(cpu_ids());
        let pids = settings.per_cpu_pids.get(..shown).unwrap_or_default();
        writer.bytes(attribute::PER_CPU_PIDS, &port_id_bytes(pids))?;
    }
    Ok(())
}

fn words(values: &[u64; 4]) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (place, value) in bytes.chunks_exact_mut(8).zip(values) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    bytes
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    let (low, high) = bytes.split_at_mut(4);
    low.copy_from_slice(&first.to_ne_bytes());
    high.copy_from_slice(&second.to_ne_bytes());
    bytes
}

/// A dump of all datapaths.
pub(super) fn dump(daemon: &Arc<Daemon>) -> impl Dump + use<> {
    DatapathDump {
        daemon: Arc::clone(daemon),
        after: None,
    }
}

struct DatapathDump {
    daemon: Arc<Daemon>,
    /// The ifindex of the datapath written last.
    after: Option<i32>,
}

impl Dump for DatapathDump {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        let mut all = Vec::clone(&self.daemon.datapaths());
        all.sort_by_key(|datapath| datapath.ifindex);
        for datapath in all {
            if self.after.is_some_and(|after| datapath.ifindex <= after) {
                continue;
            }
            let fit = part.message(Family::Datapath, command::GET, datapath.ifindex, |writer| {
                write(writer, &datapath)
            })?;
            match fit {
                Fit::Written => self.after = Some(datapath.ifindex),
                Fit::Full => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Of the family's messages, for notifications.
pub const FAMILY: Family = Family::Datapath;
