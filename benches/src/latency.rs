//! Percentiles of times.

use anyhow::Result;
use hdrhistogram::Histogram;

/// Times in nanoseconds, to three digits.
#[derive(Debug)]
pub struct Latencies(Histogram<u64>);

impl Latencies {
    /// None yet.
    ///
    /// # Errors
    /// None: the bounds are right.
    pub fn new() -> Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, 60_000_000_000, 3)?))
    }

    /// Adds a time of `nanoseconds`; what is before its beginning (a clock that was set) counts as 1.
    pub fn add(&mut self, nanoseconds: i64) {
        self.0.saturating_record(nanoseconds.max(1).unsigned_abs());
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// A percentile, in microseconds.
    pub fn us(&self, percentile: f64) -> f64 {
        self.0.value_at_percentile(percentile) as f64 / 1000.0
    }

    /// The average, in microseconds.
    pub fn mean_us(&self) -> f64 {
        self.0.mean() / 1000.0
    }
}
