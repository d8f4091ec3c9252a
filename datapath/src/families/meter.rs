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

#[cfg(test)]
mod tests {
    use super::*;

    /// The attributes that `build` writes, as a meter.
    fn meter_of(build: impl FnOnce(&mut Writer<'_>)) -> Result<Meter, Errno> {
        let mut buffer = Vec::new();
        build(&mut Writer::new(&mut buffer));
        meter(&Table::new(&buffer))
    }

    fn stats(writer: &mut Writer<'_>, kind: u16, packets: u64, bytes: u64) {
        write_count(writer, kind, Count { packets, bytes }).unwrap();
    }

    fn bands(writer: &mut Writer<'_>, more: impl FnOnce(&mut Writer<'_>)) {
        let bands = writer.begin(attribute::BANDS);
        let band = writer.begin(BAND);
        writer.u32(band_attribute::TYPE, 1);
        writer.u32(band_attribute::RATE, 10);
        writer.u32(band_attribute::BURST, 5);
        more(writer);
        writer.end(band).unwrap();
        writer.end(bands).unwrap();
    }

    fn counts(meter: &Meter) -> (Count, Option<Count>) {
        let report = meter.report();
        (report.seen, report.exceeded)
    }

    // What follows was asked of the module (Linux 6.1).

    #[test]
    fn a_meter_begins_with_the_statistics_that_it_is_given_and_its_band_with_none() {
        let given = Count {
            packets: 7,
            bytes: 700,
        };
        let meter = meter_of(|writer| {
            stats(writer, attribute::STATS, 7, 700);
            bands(writer, |writer| {
                stats(writer, band_attribute::STATS, 9, 900)
            });
        });
        assert_eq!(counts(&meter.unwrap()), (given, Some(Count::default())));
        let cleared = meter_of(|writer| {
            stats(writer, attribute::STATS, 7, 700);
            writer.flag(attribute::CLEAR);
            bands(writer, |_| ());
        });
        assert_eq!(counts(&cleared.unwrap()).0, Count::default());
    }

    #[test]
    fn what_is_too_short_within_a_band_is_out_of_range() {
        let short = meter_of(|writer| {
            bands(writer, |writer| {
                writer.bytes(band_attribute::STATS, &[0; 8]).unwrap();
            });
        });
        assert_eq!(short.unwrap_err(), Errno::ERANGE);
        let short = meter_of(|writer| bands(writer, |writer| writer.u16(band_attribute::RATE, 3)));
        assert_eq!(short.unwrap_err(), Errno::ERANGE);
    }

    #[test]
    fn of_an_attribute_given_twice_the_last_counts_and_unknown_ones_are_ignored() {
        let zero = meter_of(|writer| bands(writer, |writer| writer.u32(band_attribute::RATE, 0)));
        assert_eq!(zero.unwrap_err(), Errno::EINVAL);
        let unknown = meter_of(|writer| bands(writer, |writer| writer.u32(9, 1)));
        assert!(unknown.is_ok());
    }

    #[test]
    fn bytes_that_are_no_attribute_are_no_band() {
        for garbage in [[0xff, 0, 0, 0], [1, 0, 0, 0]] {
            let meter = meter_of(|writer| writer.bytes(attribute::BANDS, &garbage).unwrap());
            assert_eq!(counts(&meter.unwrap()).1, None);
        }
    }
}
