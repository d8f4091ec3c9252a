//! `ovs_meter`: the meters of a datapath, set, read and deleted.
//!
//! Source: uapi `linux/openvswitch.h`, `enum ovs_meter_cmd`; the order of checks and of attributes as the
//! module has them. All commands answer, with or without NLM_F_ECHO, and none notifies.

use std::num::NonZeroU32;
use std::sync::Arc;

use netlink::attr::{Attr, Table, Writer};
use netlink::family::command::meter as command;
use netlink::{Answer, Errno, Failure, Request};

use crate::daemon::{Daemon, now_ns};
use crate::meter::{Band, Count, Full, MAX_BANDS, MAX_METERS, Meter, Report, Unit};

mod attribute {
    pub const ID: u16 = 1;
    pub const KBPS: u16 = 2;
    pub const STATS: u16 = 3;
    pub const BANDS: u16 = 4;
    pub const USED: u16 = 5;
    pub const CLEAR: u16 = 6;
    pub const MAX_METERS: u16 = 7;
    pub const MAX_BANDS: u16 = 8;
    pub const COUNT: usize = 9;
}

/// `enum ovs_band_attr`, within a band.
mod band_attribute {
    pub const TYPE: u16 = 1;
    pub const RATE: u16 = 2;
    pub const BURST: u16 = 3;
    pub const STATS: u16 = 4;
    pub const COUNT: usize = 5;
}

/// What a band has as its type in the list of bands: the module gives none.
const BAND: u16 = 0;
/// `OVS_METER_BAND_TYPE_DROP`: the only kind. In SET the module takes any for it.
const BAND_TYPE_DROP: u32 = 1;
/// Bytes of `struct ovs_flow_stats`: two u64 in host order.
const STATS: usize = 16;

type Attributes<'a> = Table<'a, { attribute::COUNT }>;

pub(super) fn handle(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let attrs: Attributes<'_> = request.table();
    let find = || daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV);
    let command = request.command;
    match command {
        command::FEATURES => {
            let datapath = find()?;
            answer.reply(command, datapath.ifindex, write_features)?;
        }
        command::SET => {
            let meter = meter(&attrs)?;
            let id = attrs.require(attribute::ID)?.u32()?;
            let datapath = find()?;
            let before = datapath
                .meters
                .put(id, Arc::new(meter))
                .map_err(|Full| Errno::EFBIG)?;
            answer.reply(command, datapath.ifindex, |writer| {
                writer.u32(attribute::ID, id);
                match before {
                    Some(meter) => write(writer, id, &meter.report()),
                    None => Ok(()),
                }
            })?;
        }
        command::GET => {
            let id = attrs.require(attribute::ID)?.u32()?;
            let datapath = find()?;
            let meter = datapath.meters.get(id).ok_or(Errno::ENOENT)?;
            answer.reply(command, datapath.ifindex, |writer| {
                write(writer, id, &meter.report())
            })?;
        }
        command::DEL => {
            let id = attrs.require(attribute::ID)?.u32()?;
            let datapath = find()?;
            let meter = datapath.meters.take(id);
            answer.reply(command, datapath.ifindex, |writer| match meter {
                Some(meter) => write(writer, id, &meter.report()),
                None => Ok(()),
            })?;
        }
        _ => return Err(Errno::EOPNOTSUPP.into()),
    }
    Ok(())
}

/// The meter that SET asks for.
fn meter(attrs: &Attributes<'_>) -> Result<Meter, Errno> {
    let bands = attrs.require(attribute::BANDS)?;
    if bands.nested().count() > MAX_BANDS as usize {
        return Err(Errno::EINVAL);
    }
    let band = bands.nested().next().map(|attr| band(&attr)).transpose()?;
    let unit = match attrs.get(attribute::KBPS) {
        Some(_) => Unit::Kilobits,
        None => Unit::Packets,
    };
    let before = match (attrs.get(attribute::STATS), attrs.get(attribute::CLEAR)) {
        (Some(attr), None) => count(&attr)?,
        _ => Count::default(),
    };
    Ok(Meter::new(unit, band, before, now_ns() / 1_000_000))
}

fn band(attr: &Attr<'_>) -> Result<Band, Errno> {
    let attrs: Table<'_, { band_attribute::COUNT }> = Table::new(attr.payload);
    // What is there must be long enough, before anything is missed. The count that a band may be given
    // is of no effect, unlike the meter's.
    let number = |kind| attrs.get(kind).map(|attr| attr.u32()).transpose();
    let (kind, rate, burst) = (
        number(band_attribute::TYPE)?,
        number(band_attribute::RATE)?,
        number(band_attribute::BURST)?,
    );
    attrs
        .get(band_attribute::STATS)
        .map(|attr| count(&attr))
        .transpose()?;
    kind.ok_or(Errno::EINVAL)?;
    let rate = rate.and_then(NonZeroU32::new).ok_or(Errno::EINVAL)?;
    Ok(Band::new(rate, burst.ok_or(Errno::EINVAL)?))
}

/// ERANGE when it is shorter.
fn count(attr: &Attr<'_>) -> Result<Count, Errno> {
    let bytes: [u8; STATS] = attr.array()?;
    let word = |at: usize| {
        bytes[at..]
            .first_chunk()
            .map_or(0, |word| u64::from_ne_bytes(*word))
    };
    Ok(Count {
        packets: word(0),
        bytes: word(8),
    })
}

fn write_features(writer: &mut Writer<'_>) -> Result<(), Errno> {
    writer.u32(attribute::MAX_METERS, MAX_METERS);
    writer.u32(attribute::MAX_BANDS, MAX_BANDS);
    let bands = writer.begin(attribute::BANDS);
    let band = writer.begin(BAND);
    writer.u32(band_attribute::TYPE, BAND_TYPE_DROP);
    writer.end(band)?;
    writer.end(bands)
}

fn write(writer: &mut Writer<'_>, id: u32, report: &Report) -> Result<(), Errno> {
    writer.u32(attribute::ID, id);
    write_count(writer, attribute::STATS, report.seen)?;
    writer.u64(attribute::USED, report.used_ms);
    let bands = writer.begin(attribute::BANDS);
    if let Some(count) = report.exceeded {
        let band = writer.begin(BAND);
        write_count(writer, band_attribute::STATS, count)?;
        writer.end(band)?;
    }
    writer.end(bands)
}

fn write_count(writer: &mut Writer<'_>, kind: u16, count: Count) -> Result<(), Errno> {
    let mut bytes = [0; STATS];
    bytes[..8].copy_from_slice(&count.packets.to_ne_bytes());
    bytes[8..].copy_from_slice(&count.bytes.to_ne_bytes());
    writer.bytes(kind, &bytes)
}
