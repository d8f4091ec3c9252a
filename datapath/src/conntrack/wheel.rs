//! A timer wheel of two levels: what is to be looked at when.
//!
//! An item's deadline may move later without the wheel being told: when its turn comes it is looked at,
//! and put in again. No operation's work grows with what is in the wheel: a step looks at as many items
//! as it is allowed to, and goes on there the next time.

/// Nanoseconds of a tick: a quarter of a second, about.
const TICK_SHIFT: u32 = 28;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
const LEVELS: usize = 2;

/// Items by deadline.
#[derive(Debug)]
pub struct Wheel<T> {
    /// The next tick to come.
    tick: u64,
    levels: Box<[[Vec<T>; SLOTS]; LEVELS]>,
    /// Whose turn has come, or that are to move a level down.
    due: Vec<Vec<T>>,
    len: usize,
}

impl<T> Wheel<T> {
    /// Empty, at that time.
    pub fn new(now: u64) -> Self {
        Self {
            tick: (now >> TICK_SHIFT) + 1,
            levels: Box::new(std::array::from_fn(|_| std::array::from_fn(|_| Vec::new()))),
            due: Vec::new(),
            len: 0,
        }
    }

    /// How many items there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `item` gets its turn at `deadline`, or up to a tick later.
    pub fn insert(&mut self, deadline: u64, item: T) {
        self.len += 1;
        let at = ((deadline >> TICK_SHIFT) + 1).max(self.tick);
        let ahead = at - self.tick;
        let level = (0..LEVELS)
            .find(|level| ahead >> (SLOT_BITS * (*level as u32 + 1)) == 0)
            .unwrap_or(LEVELS - 1);
        // Beyond the last level it gets a turn too soon, and is put in again.
        let furthest = (1_u64 << (SLOT_BITS * LEVELS as u32)) - 1;
        let at = at.min(self.tick + furthest);
        let slot = (at >> (SLOT_BITS * level as u32)) as usize % SLOTS;
        if let Some(items) = self
            .levels
            .get_mut(level)
            .and_then(|slots| slots.get_mut(slot))
        {
            items.push(item);
        }
    }

    /// Gives `look` up to `budget` items whose turn it is by `now`; those for which it names a deadline
    /// go in again. True: all were looked at.
    pub fn step(
        &mut self,
        now: u64,
        budget: usize,
        mut look: impl FnMut(&T) -> Option<u64>,
    ) -> bool {
        let mut left = budget;
        loop {
            while let Some(items) = self.due.last_mut() {
                let Some(item) = items.pop() else {
                    self.due.pop();
                    continue;
                };
                if left == 0 {
                    items.push(item);
                    return false;
                }
                left -= 1;
                self.len -= 1;
                if let Some(deadline) = look(&item) {
                    self.insert(deadline, item);
                }
            }
            if self.tick > now >> TICK_SHIFT {
                return true;
            }
            if self.len == 0 {
                self.tick = (now >> TICK_SHIFT) + 1;
                return true;
            }
            self.turn();
        }
    }

    /// One tick.
    fn turn(&mut self) {
        let tick = self.tick;
        self.tick += 1;
        for level in 0..LEVELS {
            let shift = SLOT_BITS * level as u32;
            if tick & ((1 << shift) - 1) != 0 {
                break;
            }
            let slot = (tick >> shift) as usize % SLOTS;
            let items = self
                .levels
                .get_mut(level)
                .and_then(|slots| slots.get_mut(slot));
            if let Some(items) = items.filter(|items| !items.is_empty()) {
                self.due.push(std::mem::take(items));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn everything_gets_its_turn_in_time(
            deadlines in proptest::collection::vec(0..3_000_000_u64, 1..60),
            start in 0..1_000_000_u64,
        ) {
            // In milliseconds.
            let ns = |ms: u64| ms * 1_000_000;
            let mut wheel = Wheel::new(ns(start));
            for deadline in &deadlines {
                wheel.insert(ns(start + deadline), start + deadline);
            }
            let mut seen = Vec::new();
            let mut now = start;
            while !wheel.is_empty() {
                now += 700;
                wheel.step(ns(now), usize::MAX, |due| {
                    if *due > now {
                        return Some(ns(*due));
                    }
                    seen.push((*due, now));
                    None
                });
                prop_assert!(now < start + 3_100_000);
            }
            prop_assert_eq!(seen.len(), deadlines.len());
            for (due, seen_at) in seen {
                // A tick and a step late at most.
                prop_assert!(seen_at >= due && seen_at <= due + 700 + 600, "{} {}", due, seen_at);
            }
        }
    }

    #[test]
    fn a_step_does_no_more_than_it_may_and_goes_on_later() {
        let mut wheel = Wheel::new(0);
        for item in 0..1000 {
            wheel.insert(1_000_000_000, item);
        }
        let mut looked = 0;
        let mut steps = 0;
        while !wheel.step(3_000_000_000, 64, |_| {
            looked += 1;
            None
        }) {
            steps += 1;
        }
        assert_eq!(looked, 1000);
        assert!(steps >= 15);
        assert!(wheel.is_empty());
    }

    #[test]
    fn an_item_that_lives_on_is_put_in_again() {
        let mut wheel = Wheel::new(0);
        wheel.insert(1_000_000_000, ());
        let mut turns = 0;
        for second in 1..100 {
            wheel.step(second * 1_000_000_000, 10, |()| {
                turns += 1;
                (second < 50).then_some((second + 10) * 1_000_000_000)
            });
        }
        assert!(wheel.is_empty());
        assert!((4..8).contains(&turns), "{turns}");
    }
}
