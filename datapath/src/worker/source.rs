//! A receive queue at its worker: whom it feeds, and why it isn't read if it isn't.

use std::sync::Arc;

use ::vport::RxQueue;

use super::BATCH;
use crate::datapath::Datapath;
use crate::placement::load::Load;
use crate::vport::Vport;

/// How long a port counts among those that a queue feeds.
const LATELY_NS: u64 = 20_000_000;
/// How long a queue is left alone that couldn't be received from, at first and at most: it doubles.
const PATIENCE_NS: (u64, u64) = (1_000_000, 1_000_000_000);

/// A queue that a worker serves, and what it remembers of it.
pub(super) struct Source {
    /// Names it among all queues of this run.
    pub(super) id: u64,
    pub(super) load: Arc<Load>,
    pub(super) queue: Box<dyn RxQueue>,
    pub(super) port: Arc<Vport>,
    pub(super) datapath: Arc<Datapath>,
    /// Perhaps there is more: it is among those to be served before the worker sleeps.
    pub(super) ready: bool,
    /// The ports that it has fed lately, and when it fed them last.
    pub(super) fed: Vec<(u32, u64)>,
    /// Why it isn't read, if it isn't.
    pub(super) aside: Option<Aside>,
    /// How often in a row it couldn't be received from.
    pub(super) failures: u32,
}

/// Why a queue isn't read at present. It is out of the epoll set: it may be readable, or say that its
/// device is down, all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aside {
    /// All that it feeds is stopped.
    Stopped,
    /// The machine refused; it is tried again at that time.
    Until(u64),
}

impl Source {
    /// Whether all that a batch of it could go to, as far as its last batches tell, is stopped.
    pub(super) fn is_stopped(&self) -> bool {
        if self.fed.is_empty() {
            return false;
        }
        let ports = self.datapath.ports.load();
        let stopped = |number: u32| ports.get(number).is_some_and(|port| port.is_stopped());
        self.fed.iter().all(|(number, _)| stopped(*number))
    }

    /// How many frames to receive, so that they find room: as many as one likes if it feeds a port that
    /// doesn't stop it.
    pub(super) fn room(&self) -> usize {
        let ports = self.datapath.ports.load();
        let rooms = self.fed.iter().map(|(number, _)| {
            let port = ports.get(*number);
            port.map_or(usize::MAX, |port| port.room())
        });
        match (rooms.clone().min(), rooms.max()) {
            (Some(least), Some(usize::MAX)) if least != usize::MAX => BATCH,
            (Some(least), _) => least.clamp(1, BATCH),
            (None, _) => BATCH,
        }
    }

    /// Receiving failed at `now_ns`: until when it is left alone.
    pub(super) fn has_failed(&mut self, error: &::vport::Error, now_ns: u64) -> Aside {
        let (first, most) = PATIENCE_NS;
        let patience = first << self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        // The first, the second, the fourth, ...: what lasts isn't told for ever.
        if self.failures.is_power_of_two() {
            let times = self.failures;
            tracing::warn!("port {}: {error} (failure {times})", self.port.name);
        }
        Aside::Until(now_ns.saturating_add(patience.min(most)))
    }

    /// It has fed these ports now.
    pub(super) fn has_fed(&mut self, ports: impl Iterator<Item = u32>, now_ns: u64) {
        for port in ports {
            match self.fed.iter_mut().find(|(number, _)| *number == port) {
                Some((_, at)) => *at = now_ns,
                None => self.fed.push((port, now_ns)),
            }
        }
        if self.fed.len() > 1 {
            self.fed
                .retain(|(_, at)| now_ns.saturating_sub(*at) < LATELY_NS);
        }
    }
}
