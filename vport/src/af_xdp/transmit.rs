//! Frames out: into the transmit ring, then kicks until the kernel has looked at them all.
//!
//! Each thread keeps to one of the device's queues, so that its frames stay in order; threads that
//! share one take turns, a batch at a time. In copy mode the kick *is* the transmission; a driver that
//! works on our chunks goes on by itself.
//!
//! # A frame's end
//! Counted as sent: the kernel has it, in the transmit ring at least. A device that is busy may leave
//! some there, which the next call (`transmit`, `receive`, `host_counters`) kicks again. When the device
//! is down they are withdrawn and refused, so that nothing old goes out when it comes up.

use std::cell::Cell;
use std::sync::TryLockError;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use frame::{Frame, Pool};

use super::ladder::Rung;
use super::{Channel, Shared, lock};
use crate::port::{TxOutcome, TxRefusal};
use crate::sys::xsk::sender::{Full, Sender};
use crate::sys::xsk::socket::Kicked;

/// Frames between kicks: as many as the kernel sends by one.
const BATCH: usize = 32;
/// Kicks in a row that may lead to nothing before the device is left alone.
const PATIENCE: u32 = 8;
/// Bytes of the two addresses in front of a tag.
const ADDRESSES: usize = 12;
const ETHERNET: usize = 14;

/// This thread's number, by which it finds its queue.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<Option<usize>> = const { Cell::new(None) };
    }
    MINE.with(|mine| {
        mine.get().unwrap_or_else(|| {
            let number = NEXT.fetch_add(1, Relaxed);
            mine.set(Some(number));
            number
        })
    })
}

/// Appends a frame to the ring, its tag in band: as it lies in the memory that we share, or a copy of it,
/// whose original is for the pool. The frame as it was, if there is no room.
fn push(sender: &mut Sender, mut frame: Frame, pool: &mut Pool) -> Result<(), Frame> {
    if sender.has(&frame) {
        if frame.vlan.is_some() && frame.push_tag_inband().is_err() {
            return Err(frame);
        }
        // It has moved to a larger buffer if there was no room for the tag.
        if sender.has(&frame) {
            return sender.pass(frame);
        }
    }
    let bytes = frame.bytes();
    let pushed = match frame.vlan {
        Some(tag) => match bytes.split_at_checked(ADDRESSES) {
            Some((front, back)) => sender.push(&[front, &tag.to_bytes(), back]),
            None => Err(Full),
        },
        None => sender.push(&[bytes, &[], &[]]),
    };
    match pushed {
        Ok(()) => {
            pool.put(frame);
            Ok(())
        }
        Err(Full) => Err(frame),
    }
}

/// Refuses all that is left.
fn refuse(frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome, why: TxRefusal) {
    outcome.refuse(why, frames.len() as u64);
    frames.drain(..).for_each(|frame| pool.put(frame));
}

impl Shared {
    /// Sends `frames` in order, and leaves the vector empty.
    pub(super) fn transmit(
        &self,
        frames: &mut Vec<Frame>,
        pool: &mut Pool,
        outcome: &mut TxOutcome,
    ) {
        if self.gone.load(Relaxed) {
            return refuse(frames, pool, outcome, TxRefusal::Gone);
        }
        let Some(channel) = self
            .channels
            .get(thread_number() % self.channels.len().max(1))
        else {
            return refuse(frames, pool, outcome, TxRefusal::Gone);
        };
        let mut sender = lock(&channel.sender);
        if self.down.load(Relaxed) {
            match channel.socket.kick() {
                Kicked::Down => return refuse(frames, pool, outcome, TxRefusal::Down),
                Kicked::Gone => {
                    self.gone.store(true, Relaxed);
                    return refuse(frames, pool, outcome, TxRefusal::Gone);
                }
                Kicked::Yes | Kicked::Again | Kicked::Failed(_) => self.down.store(false, Relaxed),
            }
        }
        let longest = self.longest() as usize;
        let mut frames = frames.drain(..);
        while frames.len() > 0 {
            let batch = frames.by_ref().take(BATCH);
            self.send_batch(channel, &mut sender, batch, longest, pool, outcome);
        }
    }

    fn send_batch(
        &self,
        channel: &Channel,
        sender: &mut Sender,
        batch: impl Iterator<Item = Frame>,
        longest: usize,
        pool: &mut Pool,
        outcome: &mut TxOutcome,
    ) {
        sender.reclaim();
        let mut lengths = [0; BATCH];
        let mut pushed = 0;
        for frame in batch {
            let unfinished = frame.offload.csum.is_some() || frame.offload.gso.is_some();
            let length = frame.wire_len();
            let (refusal, frame) = if frame.len() > longest {
                (TxRefusal::TooLong, frame)
            } else if frame.len() < ETHERNET || unfinished {
                // Our capabilities say that we take no such frame.
                (TxRefusal::Error, frame)
            } else {
                let result = push(sender, frame, pool)
                    .or_else(|frame| self.push_again(channel, sender, frame, pool));
                match result {
                    Ok(()) => {
                        if let Some(place) = lengths.get_mut(pushed) {
                            *place = length;
                        }
                        pushed += 1;
                        continue;
                    }
                    Err(frame) => (TxRefusal::Full, frame),
                }
            };
            outcome.refuse(refusal, 1);
            pool.put(frame);
        }
        sender.publish();
        let (unsent, why) = match self.push_out(channel, sender) {
            Kicked::Yes | Kicked::Again => (0, TxRefusal::Error),
            Kicked::Down => {
                self.down.store(true, Relaxed);
                (sender.withdraw(pushed as u32), TxRefusal::Down)
            }
            Kicked::Gone => {
                self.gone.store(true, Relaxed);
                (sender.withdraw(pushed as u32), TxRefusal::Gone)
            }
            Kicked::Failed(errno) => {
                tracing::debug!("{}: AF_XDP transmission: {errno}", self.link.name);
                (sender.withdraw(pushed as u32), TxRefusal::Error)
            }
        };
        outcome.refuse(why, u64::from(unsent));
        let sent = pushed.saturating_sub(unsent as usize);
        lengths
            .iter()
            .take(sent)
            .for_each(|length| outcome.sent(*length));
    }

    /// After a first try found no chunk or place: the kernel may have some by now.
    #[cold]
    fn push_again(
        &self,
        channel: &Channel,
        sender: &mut Sender,
        frame: Frame,
        pool: &mut Pool,
    ) -> Result<(), Frame> {
        sender.publish();
        self.push_out(channel, sender);
        sender.reclaim();
        push(sender, frame, pool)
    }

    /// Kicks until the kernel has looked at all that was published, or stops getting on.
    fn push_out(&self, channel: &Channel, sender: &mut Sender) -> Kicked {
        let zero_copy = self.rung == Rung::ZeroCopy;
        let mut waiting = sender.waiting();
        let mut vain = 0;
        while waiting > 0 {
            if zero_copy && !sender.needs_wakeup() {
                break;
            }
            match channel.socket.kick() {
                Kicked::Yes if zero_copy => break,
                Kicked::Yes | Kicked::Again => {}
                failed => return failed,
            }
            let left = sender.waiting();
            if left < waiting {
                vain = 0;
            } else {
                vain += 1;
                if vain == PATIENCE {
                    channel.stuck.store(true, Relaxed);
                    return Kicked::Again;
                }
            }
            waiting = left;
        }
        channel.stuck.store(false, Relaxed);
        Kicked::Yes
    }

    /// Tries again where a device was busy. Whoever sends there at the moment does it anyway.
    pub(super) fn kick_stuck(&self) {
        for channel in &self.channels {
            if !channel.stuck.load(Relaxed) {
                continue;
            }
            let mut sender = match channel.sender.try_lock() {
                Ok(sender) => sender,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => continue,
            };
            if matches!(self.push_out(channel, &mut sender), Kicked::Gone) {
                self.gone.store(true, Relaxed);
                channel.stuck.store(false, Relaxed);
            }
        }
    }
}
