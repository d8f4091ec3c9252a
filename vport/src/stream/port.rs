//! What the datapath sees of a stream: a port that never blocks, and its one queue.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use frame::{Frame, Pool};

use super::framing::{self, ETHERNET};
use super::{Shared, State, acknowledge, lock, signal};
use crate::error::Error;
use crate::link::Link;
use crate::port::{
    Capabilities, Driver, HostCounters, OwnRing, Port, Resume, RxErrors, RxQueue, RxStatus,
    TxOutcome, TxRefusal,
};
use crate::ring::Sleep;

/// The longest frame that a length of 16 bits can say, a tag left room for.
const LONGEST: u32 = 65_535 - 4;

pub(super) struct StreamPort {
    shared: Arc<Shared>,
    opened: AtomicBool,
}

impl StreamPort {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            opened: AtomicBool::new(false),
        }
    }
}

impl Port for StreamPort {
    fn driver(&self) -> Driver {
        Driver::Stream
    }

    fn mode(&self) -> String {
        let (state, reason) = lock(&self.shared.state).clone();
        let state = match state {
            State::Waiting => String::from("no peer"),
            State::Connecting => String::from("connecting"),
            State::Connected(peer) => format!("peer {peer}"),
            State::Gone => String::from("device gone"),
        };
        let reason = match reason.as_str() {
            "" => String::new(),
            reason => format!(" ({reason})"),
        };
        format!("stream, {}, {state}{reason}", self.shared.endpoint)
    }

    fn ifindex(&self) -> u32 {
        self.shared.ifindex
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn capabilities(&self) -> Capabilities {
        let mtu = self.shared.mtu.load(Relaxed);
        let max_frame = mtu.saturating_add(ETHERNET as u32).min(LONGEST);
        Capabilities {
            csum: false,
            tso4: false,
            tso6: false,
            uso: false,
            ufo: false,
            vlan: true,
            max_frame,
            max_gso_frame: max_frame,
        }
    }

    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        if self.opened.swap(true, Relaxed) || self.shared.attached.swap(true, Relaxed) {
            return Err(Error::new(
                libc::EBUSY,
                format!("queues of {}", self.name()),
            ));
        }
        Ok(vec![Box::new(Queue {
            shared: Arc::clone(&self.shared),
        })])
    }

    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        let shared = &self.shared;
        let refusal = if shared.gone.load(Relaxed) {
            Some(TxRefusal::Gone)
        } else if !shared.connected.load(Relaxed) || !shared.up.load(Relaxed) {
            Some(TxRefusal::Down)
        } else {
            None
        };
        if let Some(why) = refusal {
            outcome.refuse(why, frames.len() as u64);
            frames.drain(..).for_each(|frame| pool.put(frame));
            return;
        }
        let mut sizes = [0_u64; 2]; // of all that were given to the queue; of those it refused
        let mut refused = Vec::new();
        let messages = frames.drain(..).filter_map(|mut frame| {
            let unfinished = frame.offload.csum.is_some() || frame.offload.gso.is_some();
            if unfinished || frame.len() < ETHERNET {
                // Our capabilities say that we take no such frame.
                outcome.refuse(TxRefusal::Error, 1);
            } else if framing::encode(&mut frame) {
                sizes[0] += (frame.len() - framing::HEADER) as u64;
                return Some(frame);
            } else {
                outcome.refuse(TxRefusal::TooLong, 1);
            }
            pool.put(frame);
            None
        });
        let pushed = shared.out.enqueue(messages, |frame| refused.push(frame));
        for frame in refused {
            sizes[1] += (frame.len() - framing::HEADER) as u64;
            pool.put(frame);
        }
        outcome.packets += pushed.taken as u64;
        outcome.bytes += sizes[0] - sizes[1];
        outcome.refuse(TxRefusal::Full, pushed.full as u64);
        outcome.refuse(TxRefusal::Gone, pushed.closed as u64);
    }

    fn own_ring(&self) -> Option<OwnRing> {
        let ring = self.shared.out.ring();
        Some(OwnRing {
            backpressure: ring.has_backpressure(),
            size: ring.size(),
            len: ring.len(),
            counters: ring.counters(),
        })
    }

    fn is_stopped(&self) -> bool {
        self.shared.out.ring().is_stopped()
    }

    fn room(&self) -> usize {
        let ring = self.shared.out.ring();
        if ring.has_backpressure() {
            ring.room()
        } else {
            usize::MAX
        }
    }

    fn on_resume(&self, resume: Resume) {
        *lock(&self.shared.out.ring().notify().resume) = Some(resume);
    }

    fn set_ring(&self, size: Option<usize>, backpressure: Option<bool>) -> Result<(), Error> {
        self.shared.set_ring(size, backpressure)
    }

    fn host_counters(&self) -> HostCounters {
        let shared = &self.shared;
        HostCounters {
            // What the peer sent is never dropped for want of room: the stream isn't read then.
            queue_full: 0,
            rx_errors: RxErrors {
                truncated: shared.oversized.load(Relaxed),
                runt: shared.runt.load(Relaxed),
                ..RxErrors::default()
            },
        }
    }

    fn link_changed(&self, link: &Link) {
        if link.index == self.shared.ifindex {
            self.shared.mtu.store(link.mtu, Relaxed);
            self.shared.up.store(link.is_up(), Relaxed);
        }
    }

    fn link(&self) -> Result<Link, Error> {
        let link = crate::link::by_index(self.shared.ifindex)?;
        self.link_changed(&link);
        Ok(link)
    }
}

struct Queue {
    shared: Arc<Shared>,
}

impl RxQueue for Queue {
    fn receive(
        &mut self,
        _pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Result<RxStatus, Error> {
        let inbox = &self.shared.inbox;
        let count = inbox.pop(max, |frame| {
            out.push(frame);
            true
        });
        let mut more = count == max;
        if !more {
            acknowledge(&inbox.notify().ready);
            more = inbox.announce_sleep() == Sleep::Stay;
        }
        if !more && self.shared.gone.load(Relaxed) {
            return Ok(RxStatus::Gone);
        }
        Ok(RxStatus::Open {
            more,
            errors: RxErrors::default(),
        })
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.inbox.notify().ready.as_fd()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.attached.store(false, Relaxed);
        // The thread takes over what is still in the ring.
        signal(&self.shared.wake);
    }
}
