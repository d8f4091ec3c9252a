//! Meters: what exceeds a rate is dropped (`OVS_METER_*` in uapi `linux/openvswitch.h`).
//!
//! - [`bucket`]: the token bucket: one atomic word.
//! - [`registry`]: a datapath's meters by id.
//!
//! # Thread safety
//! Any executor may pass packets through any meter at any time. The only word that executors share is
//! the bucket's; what they count has a slot an executor, as a flow's statistics. A meter never changes
//! but for that: to set a meter is to put another in its place.

pub mod bucket;
pub mod registry;

use std::num::NonZeroU32;

use flow::stats::{Source, Stats, Totals};

pub use bucket::Bucket;
pub use registry::{Full, MAX_METERS, Meters};

/// Bands that a meter may have (`OVS_METER_ATTR_MAX_BANDS`).
pub const MAX_BANDS: u32 = 1;

/// What a meter counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Rates in kilobits (1000 bits) a second, bursts in kilobits.
    Kilobits,
    /// Rates in packets a second, bursts in packets.
    Packets,
}

/// Packets and bytes (`struct ovs_flow_stats`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Count {
    fn and(self, totals: &Totals) -> Self {
        Self {
            packets: self.packets.wrapping_add(totals.packets),
            bytes: self.bytes.wrapping_add(totals.bytes),
        }
    }
}

/// A band that drops: the only kind that there is.
#[derive(Debug)]
pub struct Band {
    bucket: Bucket,
    exceeded: Stats,
}

impl Band {
    /// Of that rate and burst, in the meter's unit.
    pub fn new(rate: NonZeroU32, burst: u32) -> Self {
        Self {
            bucket: Bucket::new(rate, burst),
            exceeded: Stats::default(),
        }
    }
}

/// A meter.
#[derive(Debug)]
pub struct Meter {
    unit: Unit,
    band: Option<Band>,
    seen: Stats,
    before: Count,
    made_ms: u64,
}

/// What a meter has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// All that came to it.
    pub seen: Count,
    /// What its band dropped; None without a band.
    pub exceeded: Option<Count>,
    /// When the newest packet came, or else when it was made: milliseconds of the monotonic clock.
    pub used_ms: u64,
}

impl Meter {
    /// With a full bucket. Without a band it drops nothing. `before` is what it counts from.
    pub fn new(unit: Unit, band: Option<Band>, before: Count, now_ms: u64) -> Self {
        Self {
            unit,
            band,
            seen: Stats::default(),
            before,
            made_ms: now_ms,
        }
    }

    /// A packet of that many bytes. False: it exceeds the rate, and is to be dropped. `bytes` counts a
    /// frame that is yet to be segmented as it is, once. `now_ns` is the monotonic clock.
    #[inline]
    #[must_use]
    pub fn pass(&self, bytes: usize, source: Source, now_ns: u64) -> bool {
        let packet = Totals {
            packets: 1,
            bytes: bytes as u64,
            used_ms: now_ns / 1_000_000,
            tcp_flags: 0,
        };
        self.seen.record(source, &packet);
        let Some(band) = &self.band else {
            return true;
        };
        let thousandths = match self.unit {
            Unit::Kilobits => bytes as u64 * 8,
            Unit::Packets => 1000,
        };
        let passes = band.bucket.take(thousandths, now_ns);
        if !passes {
            band.exceeded.record(source, &packet);
        }
        passes
    }

    /// What it has counted: at rest, exactly.
    pub fn report(&self) -> Report {
        let seen = self.seen.totals();
        Report {
            seen: self.before.and(&seen),
            exceeded: self
                .band
                .as_ref()
                .map(|band| Count::default().and(&band.exceeded.totals())),
            used_ms: self.made_ms.max(seen.used_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn source() -> Source {
        Source::new(0, 1).unwrap()
    }

    fn band(rate: u32, burst: u32) -> Option<Band> {
        Some(Band::new(NonZeroU32::new(rate).unwrap(), burst))
    }

    fn count(packets: u64, bytes: u64) -> Count {
        Count { packets, bytes }
    }

    #[test]
    fn a_meter_of_packets_doesnt_weigh_them() {
        let meter = Meter::new(Unit::Packets, band(1, 1), Count::default(), 7);
        assert_eq!(meter.report().used_ms, 7);
        let passed: Vec<_> = [60_000, 60, 60]
            .map(|bytes| meter.pass(bytes, source(), SECOND))
            .to_vec();
        assert_eq!(passed, [true, false, false]);
        let report = meter.report();
        assert_eq!(report.seen, count(3, 60_120));
        assert_eq!(report.exceeded, Some(count(2, 120)));
        assert_eq!(report.used_ms, 1000);
    }

    #[test]
    fn a_meter_of_kilobits_weighs_packets_in_bits() {
        let meter = Meter::new(Unit::Kilobits, band(10, 8), Count::default(), 0);
        let passed = (0..9).filter(|_| meter.pass(125, source(), SECOND)).count();
        assert_eq!(passed, 8);
        assert_eq!(meter.report().exceeded, Some(count(1, 125)));
    }

    #[test]
    fn without_a_band_everything_passes_and_is_counted() {
        let meter = Meter::new(Unit::Kilobits, None, count(5, 500), 0);
        assert!((0..3).all(|_| meter.pass(100, source(), SECOND)));
        assert_eq!(meter.report().seen, count(8, 800));
        assert_eq!(meter.report().exceeded, None);
    }

    #[test]
    fn executors_counts_add_up() {
        let meter = Meter::new(Unit::Packets, band(1, 3), Count::default(), 0);
        for index in [0, 1, 1, 2, 0] {
            let _ = meter.pass(10, Source::new(index, 3).unwrap(), SECOND);
        }
        assert_eq!(meter.report().seen, count(5, 50));
        assert_eq!(meter.report().exceeded, Some(count(2, 20)));
    }
}
