//! Log lines that a client can cause: one a second each, with the number that was left out.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// One place that logs.
#[derive(Debug, Default)]
pub struct Quiet {
    /// Second of the last line, from 1.
    last: AtomicU64,
    left_out: AtomicU64,
}

impl Quiet {
    /// Has said nothing yet.
    pub const fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        }
    }

    /// Calls `line`, unless it was called less than a second ago.
    pub fn say(&self, line: impl FnOnce()) {
        static START: OnceLock<Instant> = OnceLock::new();
        let now = START.get_or_init(Instant::now).elapsed().as_secs() + 1;
        if self.last.swap(now, Ordering::Relaxed) == now {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            tracing::info!("{left_out} lines like the next were left out");
        }
        line();
    }
}
