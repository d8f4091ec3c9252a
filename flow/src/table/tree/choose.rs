//! Which test divides the patterns of a leaf best.

use super::{Pattern, Test};

/// Pairs of patterns further apart than this in a sample suggest tests too.
const APART: usize = 3;

/// A test that sends about half of the patterns to either side and few to both.
pub(super) fn choose(sample: &[Pattern<'_>]) -> Option<Test> {
    let mut best: Option<(usize, Test)> = None;
    let mut consider = |test: Test| {
        if best.is_some_and(|(_, known)| known == test) {
            return;
        }
        let mut count = [0usize; 2];
        for pattern in sample {
            for (count, allowed) in count.iter_mut().zip(pattern.allows(&test)) {
                *count += usize::from(allowed);
            }
        }
        let largest = count[0].max(count[1]);
        // What lies on both sides counts once more.
        let cost = largest + (count[0] + count[1] - sample.len());
        if largest < sample.len() && best.is_none_or(|(least, _)| cost < least) {
            best = Some((cost, test));
        }
    };
    // Neighbours at two distances: what two patterns both need, or where they differ, is a test.
    let far = sample.len() / APART + 1;
    let distances: &[usize] = if sample.len() > 2 { &[1, far] } else { &[1] };
    for distance in distances {
        for (nth, one) in sample.iter().enumerate() {
            let other = &sample[(nth + distance) % sample.len()];
            for (chunk, _) in one.mask.iter() {
                let ((bits, value), (other_bits, other_value)) = (one.at(chunk), other.at(chunk));
                let both = bits & other_bits;
                let differ = (value ^ other_value) & both;
                if both == 0 || (bits == other_bits && differ == 0) {
                    continue;
                }
                // Of two that need the same bits, each of those that differ is as good; else what the
                // more exact one needs tells it from all that are less exact: a range of prefixes.
                let bit = 1u64.checked_shl(differ.trailing_zeros()).unwrap_or(0);
                let by_bit = (bit != 0).then_some((bit, bit));
                let by_other = Some((both, other_value & both));
                let by_one = Some((both, value & both));
                let order = match (bits == both, other_bits == both) {
                    (true, true) => [by_bit, by_one, by_other],
                    (true, false) => [by_other, by_one, by_bit],
                    _ => [by_one, by_other, by_bit],
                };
                for (bits, value) in order.into_iter().flatten() {
                    consider(Test { bits, value, chunk });
                }
            }
        }
    }
    best.map(|(_, test)| test)
}
