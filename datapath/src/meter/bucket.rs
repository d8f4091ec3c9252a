//! A token bucket in one atomic word.
//!
//! # Semantics
//! The bucket starts full, holds the burst and fills at the rate. What it is asked for comes in
//! thousandths: bits for a rate in kilobits, thousandths of a packet for one in packets. A packet passes
//! if the bucket holds what it costs, or is full: one that costs more than a full bucket passes then, and
//! is owed for. So the long-term rate is kept with any size of packet; the module drops such a packet
//! always, which with a small burst and unsegmented packets means all of a connection.
//!
//! # Representation
//! The word is the time at which the bucket will be full again. What it lacks now is that time less now:
//! time passing needs no write, and executors whose clocks were read at slightly different moments lose
//! nothing to each other. A word in the past says "full".
//!
//! Time is counted in ticks of 2^-[`Bucket::shift`] nanoseconds: finer for high rates, so that the
//! smallest packet costs hundreds of ticks at the highest rate, and coarser for low ones, so that the
//! longest burst (2^32 kilobits at 1 kbit/s, 136 years) still fits. Ticks wrap around: differences
//! count, and one that no burst can cause is taken for the past; unless it is one that an executor sees
//! which read its clock a while ago (it was preempted in the middle of a batch): for that one the bucket
//! is empty, since others have filled it from the time that it doesn't know of.
//!
//! # Synchronization
//! The word stands for itself only: Relaxed. Taking is by compare-and-swap, which fails only where
//! another executor's has succeeded; a refusal writes nothing.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Nanoseconds in which a rate of 1 yields a thousandth.
const NS_A_THOUSANDTH: u64 = 1_000_000;
/// Bits of the price after the point.
const FRACTION: u32 = 32;
/// An executor's clock is never older: a thread isn't kept from running for so long.
const OLD_NS: u64 = 10_000_000_000;
/// More thousandths than any frame costs: 8 bits a byte, 1 MiB.
const LARGEST: u64 = 8 << 20;

/// A token bucket.
#[derive(Debug)]
pub struct Bucket {
    /// When it will be full, in ticks.
    full_at: AtomicU64,
    /// Ticks that a thousandth costs, times 2^[`FRACTION`].
    price: u64,
    /// Ticks that an empty bucket takes to fill.
    capacity: u64,
    /// No burst causes a longer difference.
    longest: u64,
    /// A difference beyond this lies in the past; one between `longest` and this is of an old clock.
    old: u64,
    /// A nanosecond has 2^this ticks.
    shift: i32,
}

impl Bucket {
    /// Full. Rate a second and burst are in the meter's unit. A burst of 0, which could let nothing
    /// pass, is one second's worth: what Open vSwitch asks for where no burst is named.
    pub fn new(rate: NonZeroU32, burst: u32) -> Self {
        let shift = (rate.ilog2() as i32 - 3).min(10);
        let a_second = u128::from(NS_A_THOUSANDTH) << (FRACTION as i32 + shift);
        let price = (a_second / u128::from(rate.get())) as u64;
        let burst = if burst == 0 { rate.get() } else { burst };
        let capacity = ticks(u64::from(burst) * 1000, price);
        let longest = capacity + ticks(LARGEST, price);
        Self {
            full_at: AtomicU64::new(0),
            price,
            capacity,
            longest,
            old: longest + shifted(OLD_NS, shift),
            shift,
        }
    }

    /// Takes so many thousandths, at `now_ns` of a clock that goes steadily. False: there aren't as many.
    #[inline]
    #[must_use]
    pub fn take(&self, thousandths: u64, now_ns: u64) -> bool {
        let now = shifted(now_ns, self.shift);
        let cost = ticks(thousandths.min(LARGEST), self.price);
        let mut full_at = self.full_at.load(Relaxed);
        loop {
            let mut lacking = full_at.wrapping_sub(now);
            if lacking > self.longest {
                if lacking <= self.old {
                    return false;
                }
                lacking = 0;
            }
            if lacking != 0 && lacking + cost > self.capacity {
                return false;
            }
            let next = now.wrapping_add(lacking).wrapping_add(cost);
            match self
                .full_at
                .compare_exchange_weak(full_at, next, Relaxed, Relaxed)
            {
                Ok(_) => return true,
                Err(seen) => full_at = seen,
            }
        }
    }
}

/// Nanoseconds in ticks of 2^-`shift`, wrapped around.
#[inline]
fn shifted(ns: u64, shift: i32) -> u64 {
    if shift < 0 {
        ns >> -shift
    } else {
        ns.wrapping_shl(shift as u32)
    }
}

/// Below 2^60: 2^42 thousandths at most, of 2^17 ticks at most.
#[inline]
fn ticks(thousandths: u64, price: u64) -> u64 {
    let half = 1 << (FRACTION - 1);
    ((u128::from(thousandths) * u128::from(price) + half) >> FRACTION) as u64
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::time::Instant;

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    /// A machine that has been up for three months.
    const BEGIN: u64 = 90 * 86_400 * SECOND + 123_456_789;

    fn bucket(rate: u32, burst: u32) -> Bucket {
        Bucket::new(NonZeroU32::new(rate).unwrap(), burst)
    }

    /// How packets come.
    #[derive(Clone, Copy, Debug)]
    enum Arrivals {
        /// One after the other, at so many times the rate.
        Even(u64),
        /// So many at one moment, as a worker's batch; at twice the rate.
        Batches(u64),
        /// Evenly at eight times the rate for a half of the time, then none.
        HalfIdle,
    }

    /// Offers about `goal` packets' worth of time after the burst is used up; what passed, and what the
    /// rate allows, in bits.
    fn offer(bucket: &Bucket, rate: u32, bytes: u64, arrivals: Arrivals, goal: u64) -> (u64, f64) {
        let cost = bytes * 8;
        while bucket.take(cost, BEGIN) {}
        let bits_a_ns = f64::from(rate) / 1e6;
        let packet_ns = cost as f64 / bits_a_ns;
        let (at_once, gap) = match arrivals {
            Arrivals::Even(times) => (1, packet_ns / times as f64),
            Arrivals::Batches(size) => (size, packet_ns * size as f64 / 2.0),
            Arrivals::HalfIdle => (1, packet_ns / 8.0),
        };
        let end = packet_ns * goal as f64;
        // The pauses last as long as four packets, which the bucket holds where this is asked of it.
        let pause = packet_ns * 4.0;
        let mut passed = 0;
        let mut at = 0.0;
        while at <= end {
            let idle = matches!(arrivals, Arrivals::HalfIdle) && (at / pause) as u64 % 2 == 1;
            if !idle {
                for _ in 0..at_once {
                    passed += u64::from(bucket.take(cost, BEGIN + at as u64)) * cost;
                }
            }
            at += gap;
        }
        (passed, bits_a_ns * at.min(end))
    }

    #[test]
    fn from_1_kbit_to_10_gbit_a_second_the_rate_is_kept_within_2_percent_and_a_packet() {
        let rates = [
            1, 2, 7, 10, 64, 100, 999, 1000, 4096, 100_000, 999_999, 10_000_000,
        ];
        let sizes = [60, 64, 125, 590, 1514, 9014, 65_549];
        let arrivals = [
            Arrivals::Even(64),
            Arrivals::Even(2),
            Arrivals::Batches(2),
            Arrivals::Batches(32),
            Arrivals::HalfIdle,
        ];
        for rate in rates {
            for bytes in sizes {
                // A burst, in packets: less than one, one and a half, and many.
                for packets in [0.4, 1.5, 40.0] {
                    let burst = (bytes as f64 * 8.0 * packets / 1000.0).ceil().max(1.0) as u32;
                    for arrivals in arrivals {
                        let cost = bytes as f64 * 8.0;
                        let case = format!("{rate} kbit/s, burst {burst}, {bytes} B, {arrivals:?}");
                        let meter = bucket(rate, burst);
                        let (passed, allowed) = offer(&meter, rate, bytes, arrivals, 1000);
                        let passed = passed as f64;
                        // A bucket can give no more than it has, whatever comes when. Instants are
                        // whole nanoseconds, which is what the half percent is for.
                        assert!(
                            passed <= allowed * 1.005 + cost,
                            "{case}: {passed} of {allowed}"
                        );
                        // It gives as much as comes if it can hold what comes between two looks.
                        let between = match arrivals {
                            Arrivals::Even(64) => 0.0,
                            Arrivals::Even(_) => 0.5,
                            Arrivals::Batches(size) => size as f64 * 0.5,
                            Arrivals::HalfIdle => 5.0,
                        };
                        let holds = f64::from(burst) * 1000.0 >= cost * (between + 1.0)
                            || matches!(arrivals, Arrivals::Even(64));
                        if holds {
                            let least = allowed * 0.98 - cost;
                            assert!(passed >= least, "{case}: {passed} of {allowed}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rates_in_packets_are_kept_as_well() {
        for rate in [1, 3, 1000, 1_000_000, u32::MAX] {
            let meter = bucket(rate, 40);
            while meter.take(1000, BEGIN) {}
            let step = (SECOND / u64::from(rate) / 16).max(1);
            let span = (SECOND * 2000 / u64::from(rate)).max(10_000);
            let mut passed = 0_u64;
            for at in (0..=span).step_by(step as usize) {
                // More than a nanosecond's worth at the highest rate.
                for _ in 0..8 {
                    passed += u64::from(meter.take(1000, BEGIN + at));
                }
            }
            let allowed = f64::from(rate) * span as f64 / SECOND as f64;
            let off = passed as f64 - allowed;
            assert!(
                off.abs() <= allowed * 0.02 + 1.0,
                "{rate}: {passed} of {allowed}"
            );
        }
    }

    #[test]
    fn while_the_clock_stands_still_exactly_the_burst_passes() {
        for (rate, burst) in [
            (1, 1),
            (1000, 1),
            (1, 1000),
            (10_000_000, 64),
            (100_000_000, 9),
        ] {
            let meter = bucket(rate, burst);
            let passed = (0..2_000_000).filter(|_| meter.take(100, BEGIN)).count();
            assert_eq!(passed, burst as usize * 10, "{rate} {burst}");
        }
    }

    #[test]
    fn after_any_pause_no_more_than_the_burst_has_gathered() {
        let meter = bucket(1000, 10);
        let (hour, year) = (3600 * SECOND, 365 * 86_400 * SECOND);
        let mut now = BEGIN;
        for pause in [
            0,
            SECOND,
            hour,
            104 * 24 * hour,
            209 * 24 * hour,
            year,
            5 * year,
        ] {
            now += pause;
            let passed = (0..100).filter(|_| meter.take(1000, now)).count();
            assert_eq!(passed, 10, "after {pause} ns");
            now += SECOND / 100; // full again
        }
    }

    #[test]
    fn the_longest_burst_at_the_lowest_rate_fits() {
        let meter = bucket(1, u32::MAX);
        // 512 MiB of it in frames of 64 KiB, then all the rest at the price of one.
        for _ in 0..8192 {
            assert!(meter.take(65_536 * 8, BEGIN));
        }
        let left = meter.capacity - meter.full_at.load(Relaxed).wrapping_sub(BEGIN >> 3);
        let expected = (u64::from(u32::MAX) * 1000 - 8192 * 65_536 * 8) * 125_000;
        assert_eq!(left, expected);
    }

    #[test]
    fn a_packet_larger_than_the_bucket_passes_when_it_is_full_and_is_owed_for() {
        let meter = bucket(1, 1);
        assert!(meter.take(12_000, BEGIN));
        assert!(!meter.take(12_000, BEGIN + 12 * SECOND - 1000));
        // What is owed counts for small ones, too.
        assert!(!meter.take(100, BEGIN + 11 * SECOND));
        assert!(meter.take(100, BEGIN + 11 * SECOND + SECOND / 10));
        assert!(!meter.take(12_000, BEGIN + 12 * SECOND));
        assert!(meter.take(12_000, BEGIN + 12 * SECOND + SECOND / 10));
    }

    #[test]
    fn a_burst_of_0_is_a_second_of_the_rate() {
        let meter = bucket(7, 0);
        assert_eq!((0..100).filter(|_| meter.take(1000, BEGIN)).count(), 7);
    }

    #[test]
    fn clocks_read_at_different_moments_neither_lose_nor_gain() {
        let meter = bucket(1000, 100);
        while meter.take(1000, BEGIN) {}
        let mut passed = 0;
        for step in 0..100_000_u64 {
            // Three executors: one 300 us behind, one 100 us before.
            let skew = [0, 300_000, 100_000][(step % 3) as usize];
            let now = BEGIN + SECOND + step * 10_000 - skew;
            passed += u64::from(meter.take(1000, now));
        }
        // The bucket had filled in the first second; then one second more.
        assert!((1098..=1101).contains(&passed), "{passed}");
    }

    #[test]
    fn an_executor_with_an_old_clock_gets_nothing_out_of_turn() {
        // 0.1 ms of burst: a clock that is 20 ms old lies far behind the last packet's time.
        let meter = bucket(1_000_000, 100);
        let late = BEGIN + 20_000_000;
        while meter.take(800, late) {}
        assert!(!meter.take(800, BEGIN));
        assert!(!meter.take(800, late));
        // A pause is no old clock.
        assert!(meter.take(800, late + 30 * SECOND));
    }

    /// Fails when `take` stores what it computed instead of comparing first, if there is a second
    /// processor.
    #[test]
    fn executors_that_hammer_one_meter_together_get_exactly_the_burst() {
        for round in 0..10 {
            let burst = 1_000_000;
            let meter = bucket(1000, burst);
            let start = Barrier::new(2);
            let passed: usize = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..2)
                    .map(|_| {
                        scope.spawn(|| {
                            let mut passed = 0;
                            start.wait();
                            while meter.take(1000, BEGIN) {
                                passed += 1;
                            }
                            passed
                        })
                    })
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).sum()
            });
            assert_eq!(passed, burst as usize, "round {round}");
        }
    }

    #[test]
    fn executors_that_hammer_one_meter_together_keep_within_the_rate() {
        let (rate, burst) = (1_000_000, 100);
        let meter = bucket(rate, burst);
        let begin = Instant::now();
        let bits: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let mut bits = 0;
                        while begin.elapsed().as_millis() < 300 {
                            let now = BEGIN + begin.elapsed().as_nanos() as u64;
                            for _ in 0..32 {
                                bits += u64::from(meter.take(800, now)) * 800;
                            }
                        }
                        bits
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        let allowed = begin.elapsed().as_secs_f64() * f64::from(rate) * 1000.0;
        let most = allowed * 1.001 + f64::from(burst) * 1000.0 + 800.0;
        assert!((bits as f64) <= most, "{bits} bits of {allowed}");
    }
}
