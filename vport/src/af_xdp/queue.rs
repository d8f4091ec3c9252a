//! One receive queue of an AF_XDP port: out of the ring into the pool's frames.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use frame::{Frame, Pool};

use super::{Channel, Shared, lock};
use crate::error::Error;
use crate::port::{RxErrors, RxQueue, RxStatus};
use crate::sys::xsk::receiver::Receiver;
use crate::sys::xsk::socket::{Kicked, XskSocket};
use crate::sys::xsk::umem::LONGEST_RECEIVED;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

pub(super) struct Queue {
    shared: Arc<Shared>,
    number: usize,
    receiver: Receiver,
}

impl Queue {
    /// `None`: there is no such queue, or it was opened before.
    pub(super) fn new(shared: Arc<Shared>, number: usize) -> Option<Self> {
        let receiver = lock(&shared.channels.get(number)?.receiver).take()?;
        Some(Self {
            shared,
            number,
            receiver,
        })
    }

    /// Up to `max` frames; tells how many were taken out of the ring, good or bad.
    fn take(
        &mut self,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
        errors: &mut RxErrors,
    ) -> usize {
        let mut taken = 0;
        while taken < max {
            let Some(received) = self.receiver.next() else {
                break;
            };
            taken += 1;
            if received.length < ETHERNET {
                errors.runt += 1;
            } else if received.damaged || received.length > LONGEST_RECEIVED {
                errors.truncated += 1;
            } else {
                let mut frame = pool.take(received.length);
                let space = frame.space_mut().get_mut(..received.length);
                if space.is_some_and(|space| self.receiver.copy(&received, space)) {
                    frame.set_len(received.length);
                    out.push(frame);
                } else {
                    errors.malformed += 1;
                    pool.put(frame);
                }
            }
            self.receiver.put_back(received);
        }
        if taken > 0 {
            self.receiver.refill();
        }
        taken
    }
}

impl RxQueue for Queue {
    fn receive(
        &mut self,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Result<RxStatus, Error> {
        let mut errors = RxErrors::default();
        let taken = self.take(pool, out, max, &mut errors);
        if errors.total() > 0 {
            self.shared.runt.fetch_add(errors.runt, Relaxed);
            let damaged = errors.truncated + errors.malformed;
            self.shared.truncated.fetch_add(damaged, Relaxed);
        }
        let more = taken == max;
        // Nothing there: perhaps nothing will ever come again. The kernel must be asked.
        if (taken == 0 && max > 0) || self.receiver.needs_wakeup() {
            let socket = self.shared.channels.get(self.number).map(|c| &c.socket);
            if socket.map(XskSocket::wake) == Some(Kicked::Gone) {
                self.shared.gone.store(true, Relaxed);
                if taken == 0 {
                    return Ok(RxStatus::Gone);
                }
            }
        }
        self.shared.kick_stuck();
        Ok(RxStatus::Open { more, errors })
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let mine = self.shared.channels.get(self.number);
        // `new` has seen that it is there; another device descriptor of the port stands in for what
        // can't be missing.
        mine.map_or_else(
            || self.shared.promiscuous.as_fd(),
            |channel: &Channel| channel.socket.as_fd(),
        )
    }
}
