//! One receive queue of an AF_XDP port: out of the ring, in the chunks that they came in.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use frame::{Frame, Pool};

use super::{Channel, Shared, lock};
use crate::error::Error;
use crate::port::{RxErrors, RxQueue, RxStatus};
use crate::sys::xsk::receiver::{Received, Receiver};
use crate::sys::xsk::socket::{Kicked, XskSocket};

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

/// A frame of which not all chunks have come yet.
struct Partial {
    frame: Frame,
    /// Bytes, of those too that had no room.
    length: usize,
    good: bool,
}

pub(super) struct Queue {
    shared: Arc<Shared>,
    number: usize,
    receiver: Receiver,
    partial: Option<Partial>,
}

impl Queue {
    /// `None`: there is no such queue, or it was opened before.
    pub(super) fn new(shared: Arc<Shared>, number: usize) -> Option<Self> {
        let receiver = lock(&shared.channels.get(number)?.receiver).take()?;
        Some(Self {
            shared,
            number,
            receiver,
            partial: None,
        })
    }

    /// Up to `max` pieces, of which frames become; tells how many were taken out of the ring, good or bad.
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
            if received.continued || self.partial.is_some() {
                self.append(received, pool, out, errors);
            } else if received.length < ETHERNET {
                errors.runt += 1;
                self.receiver.put_back(received);
            } else {
                match self.receiver.lend(received) {
                    Ok(frame) => out.push(frame),
                    Err(received) => self.copy(received, pool, out, errors),
                }
            }
        }
        if taken > 0 {
            self.receiver.refill();
        }
        taken
    }

    /// No chunk is left that could take its chunk's place.
    #[cold]
    fn copy(
        &mut self,
        received: Received,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        errors: &mut RxErrors,
    ) {
        let mut frame = pool.take(received.length);
        let space = frame.space_mut().get_mut(..received.length);
        if space.is_some_and(|space| self.receiver.copy(&received, space)) {
            frame.set_len(received.length);
            out.push(frame);
        } else {
            errors.malformed += 1;
            pool.put(frame);
        }
        self.receiver.put_back(received);
    }

    /// A piece of a frame in several chunks.
    fn append(
        &mut self,
        received: Received,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        errors: &mut RxErrors,
    ) {
        let several = self.shared.chunks > 1;
        let mut partial = self.partial.take().unwrap_or_else(|| Partial {
            frame: pool.large(),
            length: 0,
            good: several,
        });
        let end = partial.length.saturating_add(received.length);
        let space = partial.frame.space_mut().get_mut(partial.length..end);
        partial.good &= space.is_some_and(|space| self.receiver.copy(&received, space));
        partial.length = end;
        let continued = received.continued;
        self.receiver.put_back(received);
        if continued {
            self.partial = Some(partial);
        } else if !partial.good {
            errors.truncated += 1;
            pool.put(partial.frame);
        } else if end < ETHERNET {
            errors.runt += 1;
            pool.put(partial.frame);
        } else {
            partial.frame.set_len(end);
            out.push(partial.frame);
        }
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
