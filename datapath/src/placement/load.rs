//! How much of the time something took: measured by its worker, read by others.

use crate::counters::Count;

/// Of a worker or a queue.
///
/// # Thread safety
/// Written by one worker at a time (a queue's load moves with the queue); read by anybody.
#[derive(Debug, Default)]
pub struct Load {
    /// Nanoseconds in which frames were received and forwarded.
    pub busy_ns: Count,
    /// Frames.
    pub frames: Count,
}

/// What a [`Load`] was at the last look, and its share of the time between the last two.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    busy_ns: u64,
    /// Of 1.
    pub share: f64,
}

impl Sample {
    /// Looks again, `elapsed_ns` after the last look.
    pub fn take(&mut self, load: &Load, elapsed_ns: u64) {
        let busy_ns = load.busy_ns.get();
        let spent = busy_ns.saturating_sub(self.busy_ns);
        self.busy_ns = busy_ns;
        self.share = (spent as f64 / elapsed_ns.max(1) as f64).min(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_of_the_time_since_the_last_look() {
        let (load, mut sample) = (Load::default(), Sample::default());
        load.busy_ns.add(500);
        sample.take(&load, 1000);
        assert_eq!(sample.share, 0.5);
        sample.take(&load, 1000);
        assert_eq!(sample.share, 0.0);
    }
}
