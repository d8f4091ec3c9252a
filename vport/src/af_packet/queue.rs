//! One receive queue of an AF_PACKET port: by its ring, or where there is none by recvmmsg in batches,
//! straight into the pool's frames.
//!
//! The batch grows while it comes back full and shrinks while it comes back nearly empty, so that a
//! lone packet doesn't pay for preparing thirty-two slots.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use frame::{Frame, Pool, virtio};
use rustix::io::Errno;
use rustix::net::sockopt;

use super::Shared;
use super::ring::Open;
use crate::error::Error;
use crate::port::{RxErrors, RxQueue, RxStatus};
use crate::sys::mmsg::{BATCH, ReceiveBatch, Received, Slot};
use crate::sys::packet_socket::{Binding, PacketSocket};
use crate::sys::rx_ring::Arrival;

const SMALLEST_BATCH: usize = 4;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;

pub(super) struct Queue {
    shared: Arc<Shared>,
    number: usize,
    batch: ReceiveBatch,
    slots: Vec<Slot>,
    /// How many frames to ask for.
    ask: usize,
    device: Device,
}

/// What the queue knows of the device. A socket is told when its device goes down, but not when it is
/// unregistered after that, so one that is down is asked about each time there is nothing to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Up,
    /// What was received before may still be in the socket.
    Down,
    /// That has been read, so whatever comes now shows that it is up again.
    Drained,
    Gone,
}

impl Queue {
    pub(super) fn new(shared: Arc<Shared>, number: usize) -> Self {
        Self {
            shared,
            number,
            batch: ReceiveBatch::new(),
            slots: Vec::with_capacity(BATCH),
            ask: SMALLEST_BATCH,
            device: Device::Up,
        }
    }

    /// Whether the kernel has unbound the socket.
    fn is_gone(&self) -> bool {
        self.shared
            .receive
            .get(self.number)
            .is_none_or(|socket| socket.binding() == Ok(Binding::Gone))
    }

    fn status(&self, more: bool, errors: RxErrors) -> RxStatus {
        self.shared.count(&errors);
        if self.device == Device::Gone {
            return RxStatus::Gone;
        }
        RxStatus::Open { more, errors }
    }
}

/// The frame in a slot that was received into, and its buffers that aren't needed back to the pool.
fn take(slot: Slot, received: &Received, pool: &mut Pool, errors: &mut RxErrors) -> Option<Frame> {
    let Slot {
        mut small,
        mut large,
    } = slot;
    let split = small.space_mut().len();
    let frame = if received.length <= split {
        pool.put(large);
        small
    } else {
        if let Some(front) = large.space_mut().get_mut(..split) {
            front.copy_from_slice(small.space_mut());
        }
        pool.put(small);
        large
    };
    finish(frame, received, pool, errors)
}

/// The frame that was received into `frame`.
fn finish(
    mut frame: Frame,
    received: &Received,
    pool: &mut Pool,
    errors: &mut RxErrors,
) -> Option<Frame> {
    frame.set_len(received.length);
    frame.vlan = received.vlan;
    if received.damaged {
        errors.truncated += 1;
    } else if received.length < ETHERNET {
        errors.runt += 1;
    } else {
        match virtio::decode(&received.header, received.length) {
            Ok(offload) => {
                frame.offload = offload;
                return Some(frame);
            }
            Err(_) => errors.malformed += 1,
        }
    }
    pool.put(frame);
    None
}

/// How reading a ring ended.
struct Taken {
    /// Slots given back.
    slots: usize,
    /// The next slot is there already.
    more: bool,
    /// The socket's pending error, if that was met.
    error: Option<Errno>,
    /// Frames for which the socket's queue had no room.
    cut: u64,
}

/// Moves up to `max` frames from a ring to `out`.
fn from_ring(
    open: &mut Open,
    socket: &PacketSocket,
    batch: &mut ReceiveBatch,
    pool: &mut Pool,
    out: &mut Vec<Frame>,
    max: usize,
    errors: &mut RxErrors,
) -> Taken {
    let (ready, queued) = open.ring.ready(max.min(BATCH));
    let mut taken = Taken {
        slots: 0,
        more: false,
        error: None,
        cut: 0,
    };
    // Those that came by the queue are there before their slots are, so all at once.
    let mut frames: Vec<Frame> = Vec::new();
    let mut count = 0;
    if queued > 0 {
        frames.extend((0..queued).map(|_| pool.large()));
        count = match batch.receive_long(socket.as_fd(), &mut frames) {
            Ok(count) => count,
            Err(errno) => {
                taken.error = Some(errno);
                0
            }
        };
    }
    let mut frames = frames.into_iter().enumerate();
    for _ in 0..ready {
        let frame = match open.ring.next() {
            None => break,
            Some(Arrival::Queued) => match frames.next() {
                Some((n, frame)) if n < count => match batch.received(n) {
                    Some(received) => finish(frame, &received, pool, errors),
                    None => None,
                },
                unused => {
                    if let Some((_, frame)) = unused {
                        pool.put(frame);
                    }
                    match taken.error {
                        // Gone wrong for this one message alone.
                        Some(Errno::AGAIN) => errors.truncated += 1,
                        Some(Errno::INVAL) => errors.unsayable += 1,
                        // It is there, behind an error that the call has cleared.
                        _ => {
                            taken.more = true;
                            break;
                        }
                    }
                    taken.error = None;
                    None
                }
            },
            Some(Arrival::Cut) => {
                taken.cut += 1;
                None
            }
            Some(Arrival::Malformed) => {
                errors.malformed += 1;
                None
            }
            Some(Arrival::Here {
                bytes,
                vlan,
                header,
            }) => {
                let received = Received {
                    length: bytes.len(),
                    damaged: false,
                    vlan,
                    network: 0,
                    header,
                };
                let mut frame = pool.take(bytes.len());
                if let Some(space) = frame.space_mut().get_mut(..bytes.len()) {
                    space.copy_from_slice(bytes);
                }
                finish(frame, &received, pool, errors)
            }
        };
        open.ring.release();
        taken.slots += 1;
        out.extend(frame);
    }
    frames.for_each(|(_, frame)| pool.put(frame));
    taken.more |= open.ring.ready(1).0 != 0;
    taken
}

impl Queue {
    /// `None`: there is no ring.
    fn receive_by_ring(
        &mut self,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Option<Result<RxStatus, Error>> {
        let (ring, socket) = (
            self.shared.rings.get(self.number)?,
            self.shared.receive.get(self.number)?,
        );
        let mut guard = ring.lock();
        let open = guard.as_mut().ok()?;
        let mut errors = RxErrors::default();
        let mut taken = from_ring(open, socket, &mut self.batch, pool, out, max, &mut errors);
        drop(guard);
        if taken.cut > 0 {
            self.shared.queue_full.fetch_add(taken.cut, Relaxed);
        }
        if taken.slots > 0 && self.device == Device::Drained {
            self.device = Device::Up;
        }
        if taken.slots == 0 && taken.error.is_none() {
            // Woken for nothing: a pending error would wake us again and again.
            taken.error = sockopt::socket_error(socket.as_fd())
                .unwrap_or(Ok(()))
                .err();
            if taken.error.is_none() && self.device != Device::Up {
                self.device = if self.is_gone() {
                    Device::Gone
                } else {
                    Device::Drained
                };
            }
        }
        match taken.error {
            None | Some(Errno::INTR) => {}
            Some(Errno::NETDOWN | Errno::NXIO) => {
                self.device = if self.is_gone() {
                    Device::Gone
                } else {
                    Device::Down
                };
                taken.more = true;
            }
            Some(errno) => {
                self.shared.count(&errors);
                let what = format!("receive from {}", self.shared.face.name);
                return Some(Err(Error::os(errno, what)));
            }
        }
        Some(Ok(self.status(taken.more, errors)))
    }
}

impl RxQueue for Queue {
    fn receive(
        &mut self,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Result<RxStatus, Error> {
        if max > 0
            && self.device != Device::Gone
            && let Some(result) = self.receive_by_ring(pool, out, max)
        {
            return result;
        }
        let mut errors = RxErrors::default();
        let ask = self.ask.min(max);
        if ask == 0 || self.device == Device::Gone {
            return Ok(self.status(true, errors));
        }
        self.slots.clear();
        self.slots.extend((0..ask).map(|_| Slot {
            small: pool.small(),
            large: pool.large(),
        }));
        let result = match self.shared.receive.get(self.number) {
            Some(socket) => self.batch.receive(socket.as_fd(), &mut self.slots),
            None => Err(Errno::BADF),
        };
        let count = *result.as_ref().unwrap_or(&0);
        for (n, slot) in self.slots.drain(..).enumerate() {
            match self.batch.received(n) {
                Some(received) if n < count => {
                    out.extend(take(slot, &received, pool, &mut errors));
                }
                _ => {
                    pool.put(slot.large);
                    pool.put(slot.small);
                }
            }
        }
        match result {
            Ok(count) => {
                if self.device == Device::Drained {
                    self.device = Device::Up;
                }
                if count == self.ask {
                    self.ask = (self.ask * 2).min(BATCH);
                } else if count * 4 <= self.ask {
                    self.ask = (self.ask / 2).max(SMALLEST_BATCH);
                }
                Ok(self.status(count == ask, errors))
            }
            Err(Errno::AGAIN) => {
                self.ask = SMALLEST_BATCH;
                if self.device != Device::Up {
                    self.device = if self.is_gone() {
                        Device::Gone
                    } else {
                        Device::Drained
                    };
                }
                Ok(self.status(false, errors))
            }
            Err(Errno::INTR) => Ok(self.status(true, errors)),
            Err(Errno::INVAL) => {
                errors.unsayable += 1;
                Ok(self.status(true, errors))
            }
            Err(Errno::NETDOWN | Errno::NXIO) => {
                self.device = if self.is_gone() {
                    Device::Gone
                } else {
                    Device::Down
                };
                Ok(self.status(true, errors))
            }
            Err(errno) => Err(Error::os(
                errno,
                format!("receive from {}", self.shared.face.name),
            )),
        }
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // There is a socket for each queue; the sender stands in for one that can't be missing.
        self.shared
            .receive
            .get(self.number)
            .unwrap_or(&self.shared.send)
            .as_fd()
    }
}
