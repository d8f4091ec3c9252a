//! Which worker serves which queue, and where workers run.
//!
//! A new queue goes to the worker with the least to do. Once a second [`plan`] looks at what each worker
//! and each queue took, and moves one queue from a busy worker to an idle one if that helps.

pub mod cpus;
pub mod load;

/// A worker that is busy for a lesser share of the time keeps its queues.
const HOT: f64 = 0.6;
/// By how much the busier of the two workers must be relieved: measured shares waver, and a queue that
/// moves loses its place in the caches.
const GAIN: f64 = 0.1;

/// What a worker took of the time lately: shares of 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shares {
    /// In all.
    pub busy: f64,
    /// Each queue.
    pub queues: Vec<f64>,
}

/// A queue to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The worker that has it.
    pub from: usize,
    /// The queue's place in that worker's list.
    pub queue: usize,
    /// The worker that shall have it.
    pub to: usize,
}

/// The move that relieves the busiest worker that can be relieved.
pub fn plan(workers: &[Shares]) -> Option<Move> {
    let (to, idlest) = workers
        .iter()
        .enumerate()
        .min_by(|(_, a), (_, b)| a.busy.total_cmp(&b.busy))?;
    let mut hot: Vec<(usize, &Shares)> = workers
        .iter()
        .enumerate()
        .filter(|(_, worker)| worker.busy >= HOT && worker.queues.len() > 1)
        .collect();
    hot.sort_by(|(_, a), (_, b)| b.busy.total_cmp(&a.busy));
    hot.into_iter().find_map(|(from, worker)| {
        let after = |share: &f64| (worker.busy - share).max(idlest.busy + share);
        let (queue, share) = worker
            .queues
            .iter()
            .enumerate()
            .min_by(|(_, a), (_, b)| after(a).total_cmp(&after(b)))?;
        (from != to && after(share) + GAIN <= worker.busy).then_some(Move { from, queue, to })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(queues: &[f64]) -> Shares {
        Shares {
            busy: queues.iter().sum(),
            queues: queues.to_vec(),
        }
    }

    fn carry_out(workers: &mut [Shares], step: Move) {
        let share = workers[step.from].queues.remove(step.queue);
        workers[step.from].busy -= share;
        workers[step.to].queues.push(share);
        workers[step.to].busy += share;
    }

    #[test]
    fn a_busy_worker_gives_a_queue_to_an_idle_one() {
        let workers = [worker(&[0.5, 0.45]), worker(&[0.0])];
        let step = plan(&workers).unwrap();
        assert_eq!((step.from, step.to), (0, 1));
    }

    #[test]
    fn a_queue_alone_stays_where_it_is() {
        assert_eq!(plan(&[worker(&[1.0]), worker(&[])]), None);
    }

    #[test]
    fn nobody_moves_while_nobody_is_busy() {
        assert_eq!(plan(&[worker(&[0.3, 0.2]), worker(&[])]), None);
    }

    #[test]
    fn what_only_swaps_the_burden_is_left() {
        assert_eq!(plan(&[worker(&[0.9, 0.02]), worker(&[0.1])]), None);
        assert_eq!(plan(&[]), None);
    }

    #[test]
    fn who_cannot_be_relieved_does_not_keep_the_next_from_it() {
        let workers = [worker(&[1.0]), worker(&[0.4, 0.4]), worker(&[])];
        assert_eq!(plan(&workers).map(|step| step.from), Some(1));
    }

    #[test]
    fn moves_come_to_an_end() {
        let mut seed = 1_u64;
        for _ in 0..500 {
            let mut workers = vec![Shares::default(); 4];
            for _ in 0..12 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let (at, share) = ((seed >> 33) as usize % 4, (seed >> 40) as f64 / 2e8);
                workers[at].queues.push(share);
                workers[at].busy += share;
            }
            let mut steps = 0;
            while let Some(step) = plan(&workers) {
                let before = workers[step.from].busy;
                carry_out(&mut workers, step);
                assert!(workers[step.from].busy.max(workers[step.to].busy) < before);
                steps += 1;
                assert!(steps < 100, "{workers:?}");
            }
        }
    }
}
