//! Upcalls that a client's socket had no room for: bounded, in order for each source, fair between
//! sources.
//!
//! Served by deficit round robin (Shreedhar and Varghese, 1995) over bytes. When it is full, the
//! newest of the source that holds most makes room, so that a quiet port never loses because a noisy
//! one floods.

use std::collections::{BTreeSet, HashMap, VecDeque};

/// What a message costs beyond its bytes: the allocation and its place in the queue.
const OVERHEAD: usize = 128;
/// Bytes that a source may send in a round.
const QUANTUM: usize = 4096;

#[derive(Debug, Default)]
struct Source {
    queue: VecDeque<Box<[u8]>>,
    cost: usize,
    deficit: usize,
}

/// No room, and no other source holds more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct FairQueue {
    sources: HashMap<u32, Source>,
    /// Sources with something queued, in the order of service.
    turns: VecDeque<u32>,
    /// (cost, source) of the same.
    by_cost: BTreeSet<(usize, u32)>,
    cost: usize,
    limit: usize,
    len: usize,
}

impl FairQueue {
    /// Holds at most `limit` bytes, overhead included.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            sources: HashMap::new(),
            turns: VecDeque::new(),
            by_cost: BTreeSet::new(),
            cost: 0,
            limit,
            len: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Messages.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes, overhead included.
    pub(crate) fn cost(&self) -> usize {
        self.cost
    }

    /// Whether a message of `len` bytes from `source` would be queued.
    pub(crate) fn admits(&self, source: u32, len: usize) -> bool {
        let cost = len + OVERHEAD;
        let need = (self.cost + cost).saturating_sub(self.limit);
        let own = self.sources.get(&source).map_or(0, |source| source.cost) + cost;
        // Others give only what they hold beyond what this source will. All or nothing: so that
        // nobody loses for a message that is refused in the end.
        let mut spare = 0;
        for (held, id) in self
            .by_cost
            .iter()
            .rev()
            .take_while(|(held, _)| *held > own)
        {
            if spare >= need {
                break;
            }
            if *id != source {
                spare += held - own;
            }
        }
        spare >= need
    }

    /// Queues `message` behind those of its `source`. Ok: how many of other sources made room.
    pub(crate) fn push(&mut self, source: u32, message: Box<[u8]>) -> Result<u32, Full> {
        if !self.admits(source, message.len()) {
            return Err(Full);
        }
        let cost = message.len() + OVERHEAD;
        let mut displaced = 0;
        while self.cost + cost > self.limit {
            // There is one: `spare` was theirs.
            let Some(&(_, fullest)) = self.by_cost.last() else {
                return Err(Full);
            };
            self.drop_newest(fullest);
            displaced += 1;
        }
        let entry = self.sources.entry(source).or_default();
        if entry.queue.is_empty() {
            entry.deficit = QUANTUM;
            self.turns.push_back(source);
        } else {
            self.by_cost.remove(&(entry.cost, source));
        }
        entry.queue.push_back(message);
        entry.cost += cost;
        self.by_cost.insert((entry.cost, source));
        self.cost += cost;
        self.len += 1;
        Ok(displaced)
    }

    /// The next message in fair order.
    pub(crate) fn pop(&mut self) -> Option<Box<[u8]>> {
        loop {
            let id = *self.turns.front()?;
            let Some(source) = self.sources.get_mut(&id) else {
                self.turns.pop_front();
                continue;
            };
            let Some(next) = source.queue.front() else {
                self.turns.pop_front();
                self.sources.remove(&id);
                continue;
            };
            let cost = next.len() + OVERHEAD;
            if source.deficit < cost {
                source.deficit += QUANTUM;
                self.turns.rotate_left(1);
                continue;
            }
            source.deficit -= cost;
            let message = source.queue.pop_front();
            self.shrink(id, cost);
            return message;
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    fn drop_newest(&mut self, id: u32) {
        let Some(source) = self.sources.get_mut(&id) else {
            return;
        };
        if let Some(message) = source.queue.pop_back() {
            self.shrink(id, message.len() + OVERHEAD);
        }
    }

    /// A message of `cost` has left this source.
    fn shrink(&mut self, id: u32, cost: usize) {
        let Some(source) = self.sources.get_mut(&id) else {
            return;
        };
        self.by_cost.remove(&(source.cost, id));
        source.cost -= cost;
        self.cost -= cost;
        self.len -= 1;
        if source.queue.is_empty() {
            self.sources.remove(&id);
            if self.turns.front() == Some(&id) {
                self.turns.pop_front();
            } else {
                self.turns.retain(|turn| *turn != id);
            }
        } else {
            self.by_cost.insert((source.cost, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(source: u8, number: u8, len: usize) -> Box<[u8]> {
        let mut bytes = vec![0; len.max(2)];
        bytes[0] = source;
        bytes[1] = number;
        bytes.into()
    }

    #[test]
    fn a_noisy_source_makes_room_for_a_quiet_one() {
        let mut queue = FairQueue::new(10 * (100 + OVERHEAD));
        for number in 0..10 {
            assert_eq!(queue.push(1, message(1, number, 100)), Ok(0));
        }
        assert_eq!(queue.push(1, message(1, 10, 100)), Err(Full));
        assert_eq!(queue.push(2, message(2, 0, 100)), Ok(1));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop())
            .map(|m| (m[0], m[1]))
            .collect();
        // The newest of source 1 (number 9) is gone, its order kept.
        let ones: Vec<_> = order.iter().filter(|m| m.0 == 1).map(|m| m.1).collect();
        assert_eq!(ones, (0..9).collect::<Vec<_>>());
        assert_eq!(order.iter().filter(|m| m.0 == 2).count(), 1);
        assert_eq!((queue.cost(), queue.len()), (0, 0));
    }

    #[test]
    fn sources_get_equal_bytes_whatever_their_sizes() {
        let mut queue = FairQueue::new(1 << 24);
        for number in 0..200 {
            queue.push(1, message(1, number, 9000)).unwrap();
            queue.push(2, message(2, number, 60)).unwrap();
        }
        let mut bytes = [0usize; 3];
        while let Some(message) = queue.pop() {
            bytes[usize::from(message[0])] += message.len() + OVERHEAD;
            if bytes[2] == 200 * (60 + OVERHEAD) {
                break;
            }
        }
        // All of the small ones went out while the big ones had about as many bytes.
        assert!(bytes[1] <= bytes[2] + 2 * 9128 + QUANTUM, "{bytes:?}");
        assert!(bytes[1] >= bytes[2] / 2, "{bytes:?}");
    }

    /// Against a dull model: per-source order, the limit, and nothing lost that wasn't said so.
    #[test]
    fn accounts_for_every_message() {
        use rand::{Rng, SeedableRng, rngs::SmallRng};
        let mut rng = SmallRng::seed_from_u64(7);
        let mut queue = FairQueue::new(20_000);
        let (mut pushed, mut popped, mut displaced, mut last) = (0u64, 0u64, 0u64, [-1i64; 8]);
        let mut next = [0i64; 8];
        for _ in 0..100_000 {
            if rng.random_bool(0.6) {
                let source = rng.random_range(0..8usize);
                let mut bytes = vec![0; rng.random_range(16..3000)];
                bytes[0] = source as u8;
                bytes[8..16].copy_from_slice(&next[source].to_ne_bytes());
                next[source] += 1;
                if let Ok(others) = queue.push(source as u32, bytes.into()) {
                    pushed += 1;
                    displaced += u64::from(others);
                }
            } else if let Some(message) = queue.pop() {
                let number = i64::from_ne_bytes(message[8..16].try_into().unwrap());
                let source = usize::from(message[0]);
                assert!(number > last[source]);
                last[source] = number;
                popped += 1;
            }
            assert!(queue.cost() <= 20_000);
            assert_eq!(pushed, popped + displaced + queue.len() as u64);
            assert_eq!(queue.turns.len(), queue.sources.len());
        }
        assert!(displaced > 100 && popped > 10_000);
    }
}
