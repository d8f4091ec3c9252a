//! Frames that a tunnel itself has for the datapath: answers to packets that don't fit.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use frame::tunnel::{TunnelKey, tunnel_flags};
use frame::{Frame, Pool};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::Shared;
use crate::error::Error;
use crate::port::{RxErrors, RxQueue, RxStatus};

/// Answers that wait at most: they are for senders that will send again.
const MOST: usize = 256;

/// Where answers wait.
#[derive(Debug)]
pub(super) struct Reflection {
    waiting: Mutex<VecDeque<Frame>>,
    event: OwnedFd,
}

impl Reflection {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            waiting: Mutex::default(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Lets a frame in at the port, as if from the far end that `key` sends to.
    pub(super) fn push(&self, mut frame: Frame, key: &TunnelKey, source: [u8; 16]) {
        let mut back = Box::new(*key);
        back.src = key.dst;
        back.dst = source;
        back.flags &= !tunnel_flags::CRIT_OPT;
        back.tp_src = 0.into();
        frame.tunnel = Some(back);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MOST {
            return;
        }
        waiting.push_back(frame);
        if waiting.len() == 1 {
            // Only a counter at its end refuses: then the reader will come anyway.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }

    fn take(&self, out: &mut Vec<Frame>, max: usize) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = waiting.len().min(max);
        out.extend(waiting.drain(..count));
        if waiting.is_empty() {
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        }
        !waiting.is_empty()
    }
}

/// The queue by which they get to a worker.
pub(super) struct Queue {
    shared: Arc<Shared>,
    event: OwnedFd,
}

impl Queue {
    pub(super) fn new(shared: Arc<Shared>) -> Result<Self, Errno> {
        let event = rustix::io::fcntl_dupfd_cloexec(&shared.reflection.event, 0)?;
        Ok(Self { shared, event })
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl RxQueue for Queue {
    fn receive(
        &mut self,
        _pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Result<RxStatus, Error> {
        Ok(RxStatus::Open {
            more: self.shared.reflection.take(out, max),
            errors: RxErrors::default(),
        })
    }
}
