//! Rings between the workers and the ports whose devices may have no room: what a device doesn't take at once
//! waits there, and goes on its way when there is room again.
//!
//! # Contract
//! - A port that takes frames at once has its frames at once: the ring is empty then, and costs three loads.
//! - What waits stays in order; while something waits, what comes later for that port waits behind it.
//! - The thread `drain` sends what waits, of all ports in turns, [`FLUSH_MESSAGES`] at a time. It never waits
//!   for a port: it is told by the device's descriptor that there is room, or tries again soon
//!   ([`AGAIN`]) where the kernel tells nobody (a queueing discipline that dropped).
//! - With `tail-drop` what finds the ring full is dropped, on this port's count; with `backpressure` it
//!   stops whoever feeds this port and nothing else ([`Feeders`]), and what comes nevertheless is
//!   dropped and counted. So is what the kernel has refused for [`PATIENCE`].
//! - A frame counts as transmitted when the device has it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::vport::ring::deferred::FLUSH_MESSAGES;
use ::vport::ring::{Deferred, Flushed, Notify, Ring, Sent, Sink};
use ::vport::{Outlet, Port, Room, TxOutcome, TxRefusal};
use frame::{Frame, Pool};
use netlink::Errno;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::drop_reason::DropReason;
use crate::feeders::Feeders;
use crate::mailbox::{Mailbox, Sending, mailbox};
use crate::stream_status::RingStatus;
use crate::transmit::account;
use crate::vport::Vport;

/// When a device is tried again of which nobody tells that it has room: half as soon each time that it
/// had, twice as late each time that it hadn't, within these bounds.
pub const AGAIN: (Duration, Duration) = (Duration::from_micros(50), Duration::from_micros(800));
/// How long a frame that a queue of the kernel's refuses is offered again, with back-pressure: a shaper takes
/// it in time, a filter on the way out never does, and nobody tells which it is. With tail-drop it is not
/// offered again at all: whoever shapes a port means its drops, and a full class mustn't keep others waiting.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Frames that may wait for a port, unless told otherwise.
pub const DEFAULT_RING: usize = 512;
/// The mailbox's mark among the epoll events; ports have the numbers below.
const MAIL: u64 = u64::MAX;

/// What new ports' rings are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingDefaults {
    /// Frames that may wait.
    pub size: usize,
    /// Whether a full ring stops what feeds it.
    pub backpressure: bool,
}

impl Default for RingDefaults {
    fn default() -> Self {
        Self {
            size: DEFAULT_RING,
            backpressure: false,
        }
    }
}

enum Command {
    Open(u64, Arc<Vport>),
    /// Something waits where nothing waited.
    Work(u64),
    Set {
        id: u64,
        size: Option<usize>,
        backpressure: Option<bool>,
        done: Sender<()>,
    },
    Close(Vec<u64>, Sender<()>),
    Stop,
}

/// How a port's ring reaches its ends.
struct Bell {
    id: u64,
    mail: Arc<Sending<Command>>,
    feeders: Arc<Feeders>,
}

impl Notify for Bell {
    fn resume(&self) {
        self.feeders.resume();
    }
    fn work(&self) {
        self.mail.send(Command::Work(self.id));
    }
}

/// The ring in front of one port.
pub struct PortRing {
    id: u64,
    deferred: Deferred<Frame, Bell>,
}

impl PortRing {
    /// Sends what the device takes at once; the rest waits, or is refused. Leaves `frames` empty.
    pub fn send(
        &self,
        device: &dyn Port,
        frames: &mut Vec<Frame>,
        pool: &mut Pool,
        outcome: &mut TxOutcome,
    ) {
        let Some(outlet) = device.outlet() else {
            return device.transmit(frames, pool, outcome);
        };
        if self.deferred.is_idle() {
            let patient = self.deferred.ring().has_backpressure();
            let offered = outlet.offer(frames, patient, outcome);
            let done = offered.done.min(frames.len());
            frames.drain(..done).for_each(|frame| pool.put(frame));
            if frames.is_empty() {
                return;
            }
        }
        let pushed = self
            .deferred
            .enqueue(frames.drain(..), |frame| pool.put(frame));
        outcome.refuse(TxRefusal::Full, pushed.full as u64);
        outcome.refuse(TxRefusal::Gone, pushed.closed as u64);
    }

    /// Whether what feeds it shall pause.
    #[inline]
    pub fn is_stopped(&self) -> bool {
        self.deferred.ring().is_stopped()
    }

    /// Frames for which it has room, if it stops what feeds it; else there is no telling.
    pub fn room(&self) -> usize {
        let ring = self.deferred.ring();
        if ring.has_backpressure() {
            ring.room()
        } else {
            usize::MAX
        }
    }

    /// For `status`.
    pub fn status(&self) -> RingStatus {
        let ring = self.deferred.ring();
        RingStatus::new(
            ring.has_backpressure(),
            ring.size(),
            ring.len(),
            &ring.counters(),
        )
    }
}

/// The way to the thread that sends what waits.
#[derive(Default)]
pub struct Drains {
    mail: OnceLock<Arc<Sending<Command>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    next: AtomicU64,
    /// Who is to be woken.
    pub feeders: Arc<Feeders>,
}

impl Drains {
    /// Starts the thread, which counts in the cells of `executor`.
    ///
    /// # Errors
    /// No thread or descriptor to be had.
    pub fn start(&self, executor: usize) -> std::io::Result<()> {
        let (sending, mail) = mailbox()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = EventData::new_u64(MAIL);
        epoll::add(&epoll, mail.as_fd(), data, EventFlags::IN)?;
        let drain = Drain {
            executor,
            mail,
            epoll,
            pool: Pool::default(),
            ports: HashMap::new(),
            ready: VecDeque::new(),
            later: BTreeSet::new(),
        };
        let thread = std::thread::Builder::new()
            .name(String::from("drain"))
            .spawn(move || drain.run())?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        if self.mail.set(Arc::new(sending)).is_err() {
            return Err(std::io::Error::other("the drain was started twice"));
        }
        Ok(())
    }

    /// A ring for a port, if its device is of those that may have no room.
    pub fn ring(&self, device: &dyn Port, defaults: RingDefaults) -> Option<PortRing> {
        device.outlet()?;
        let mail = Arc::clone(self.mail.get()?);
        let id = self.next.fetch_add(1, Relaxed);
        if defaults.backpressure {
            self.feeders.use_them();
        }
        let bell = Bell {
            id,
            mail,
            feeders: Arc::clone(&self.feeders),
        };
        let ring = Ring::new(defaults.size, defaults.backpressure, bell);
        Some(PortRing {
            id,
            deferred: Deferred::new(ring),
        })
    }

    /// Takes a new port on, before anything is sent to it.
    pub fn open(&self, port: &Arc<Vport>) {
        if let (Some(ring), Some(mail)) = (&port.ring, self.mail.get()) {
            mail.send(Command::Open(ring.id, Arc::clone(port)));
        }
    }

    /// Lets ports go: what waits for them is dropped and counted when this returns.
    pub fn close(&self, ports: &[Arc<Vport>]) {
        let ids: Vec<u64> = ports
            .iter()
            .filter_map(|p| p.ring.as_ref().map(|ring| ring.id))
            .collect();
        let Some(mail) = self.mail.get().filter(|_| !ids.is_empty()) else {
            return;
        };
        let (done, closed) = channel();
        if mail.send(Command::Close(ids, done)) {
            // An error: the thread has ended, and let everything go.
            let _ = closed.recv();
        }
    }

    /// Changes a port's ring. What is None stays.
    ///
    /// # Errors
    /// EINVAL: a size that can't be; EOPNOTSUPP: the port takes frames at once, or never, and has no ring.
    pub fn set(
        &self,
        port: &Vport,
        size: Option<usize>,
        backpressure: Option<bool>,
    ) -> Result<(), Errno> {
        if size.is_some_and(|size| !(1..=::vport::stream::MAX_RING).contains(&size)) {
            return Err(Errno::EINVAL);
        }
        if backpressure == Some(true) {
            self.feeders.use_them();
        }
        let (Some(ring), Some(mail)) = (&port.ring, self.mail.get()) else {
            let done = port.device.set_ring(size, backpressure);
            return done.map_err(|error| Errno(error.errno()));
        };
        let (done, finished) = channel();
        mail.send(Command::Set {
            id: ring.id,
            size,
            backpressure,
            done,
        });
        finished.recv().map_err(|_ended| Errno::ENODEV)
    }

    /// Ends the thread and waits for it.
    pub fn stop(&self) {
        if let Some(mail) = self.mail.get() {
            mail.send(Command::Stop);
        }
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the drain had ended by a panic");
        }
    }
}

/// The thread's life.
struct Drain {
    executor: usize,
    mail: Mailbox<Command>,
    epoll: OwnedFd,
    pool: Pool,
    ports: HashMap<u64, Entry>,
    /// Ports with something to send.
    ready: VecDeque<u64>,
    /// Ports to be tried again, and when.
    later: BTreeSet<(Instant, u64)>,
}

struct Entry {
    port: Arc<Vport>,
    /// How long to wait before it is tried again.
    wait: Duration,
    /// Since when the kernel refuses its first frame.
    refused: Option<Instant>,
}

/// A device as the far end of a ring; a message is a frame, whole.
struct Device<'a> {
    outlet: &'a dyn Outlet,
    /// What a queue of the kernel's refuses stays in the ring.
    patient: bool,
    pool: &'a mut Pool,
    outcome: TxOutcome,
    room: Room,
}

impl Sink<Frame> for Device<'_> {
    fn size(&self, _message: &Frame) -> usize {
        1
    }

    fn send(&mut self, messages: &VecDeque<Frame>, _offset: usize) -> Sent {
        let (first, _) = messages.as_slices();
        let offered = self.outlet.offer(first, self.patient, &mut self.outcome);
        self.room = offered.room;
        if offered.done == 0 {
            Sent::Blocked
        } else {
            Sent::Bytes(offered.done)
        }
    }

    fn recycle(&mut self, message: Frame) {
        self.pool.put(message);
    }
}

impl Drain {
    fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        loop {
            let wait = match self.later.first() {
                _ if !self.ready.is_empty() => Some(Duration::ZERO),
                Some((at, _)) => Some(at.saturating_duration_since(Instant::now())),
                None => None,
            };
            let timeout = wait.map(|wait| rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(wait.subsec_nanos()),
            });
            events.clear();
            let space = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, space, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("drain: epoll_wait: {errno}");
                    return;
                }
            }
            for event in &events {
                match event.data.u64() {
                    MAIL => {
                        if !self.read_mail() {
                            return;
                        }
                    }
                    id => self.writable(id),
                }
            }
            let now = Instant::now();
            while let Some((at, id)) = self.later.first().copied()
                && at <= now
            {
                self.later.pop_first();
                self.writable(id);
            }
            for _ in 0..self.ready.len() {
                if let Some(id) = self.ready.pop_front() {
                    self.flush(id);
                }
            }
        }
    }

    /// False: it is to end.
    fn read_mail(&mut self) -> bool {
        self.mail.acknowledge();
        while let Some(command) = self.mail.next() {
            match command {
                Command::Stop => return false,
                Command::Open(id, port) => self.open(id, port),
                Command::Work(id) => self.ready.push_back(id),
                Command::Set {
                    id,
                    size,
                    backpressure,
                    done,
                } => {
                    self.set(id, size, backpressure);
                    // Who asked may have given up.
                    let _ = done.send(());
                }
                Command::Close(ids, done) => {
                    for id in ids {
                        self.close(id);
                    }
                    // Who asked may have given up.
                    let _ = done.send(());
                }
            }
        }
        true
    }

    fn open(&mut self, id: u64, port: Arc<Vport>) {
        if let Some(outlet) = port.device.outlet() {
            let data = EventData::new_u64(id);
            let flags = EventFlags::ONESHOT;
            if let Err(errno) = epoll::add(&self.epoll, outlet.writable(), data, flags) {
                tracing::error!("port {}: epoll: {errno}", port.name);
            }
        }
        let wait = AGAIN.0;
        let entry = Entry {
            port,
            wait,
            refused: None,
        };
        self.ports.insert(id, entry);
    }

    fn set(&mut self, id: u64, size: Option<usize>, backpressure: Option<bool>) {
        let Some(Entry { port, .. }) = self.ports.get(&id) else {
            return;
        };
        let Some(ring) = &port.ring else { return };
        let ring = ring.deferred.ring();
        if let Some(on) = backpressure {
            ring.set_backpressure(on);
        }
        if let Some(size) = size {
            let pool = &mut self.pool;
            let mut lost = 0;
            ring.resize(size, |frame| {
                lost += 1;
                pool.put(frame);
            });
            let cell = port.counters.cell(self.executor);
            cell.drop(DropReason::OutputFull, lost);
        }
    }

    fn close(&mut self, id: u64) {
        let Some(Entry { port, .. }) = self.ports.remove(&id) else {
            return;
        };
        if let Some(outlet) = port.device.outlet() {
            // ENOENT: it couldn't be added.
            let _ = epoll::delete(&self.epoll, outlet.writable());
        }
        if let Some(ring) = &port.ring {
            let pool = &mut self.pool;
            let mut lost = 0;
            ring.deferred.close(|frame| {
                lost += 1;
                pool.put(frame);
            });
            let cell = port.counters.cell(self.executor);
            cell.drop(DropReason::OutputGone, lost);
        }
    }

    /// There may be room again.
    fn writable(&mut self, id: u64) {
        let ring = self
            .ports
            .get(&id)
            .and_then(|entry| entry.port.ring.as_ref());
        if ring.is_some_and(|ring| ring.deferred.writable()) {
            self.ready.push_back(id);
        }
    }

    fn flush(&mut self, id: u64) {
        let Some(Entry {
            port,
            wait,
            refused,
        }) = self.ports.get_mut(&id)
        else {
            return;
        };
        let (Some(ring), Some(outlet)) = (&port.ring, port.device.outlet()) else {
            return;
        };
        let mut device = Device {
            outlet,
            patient: ring.deferred.ring().has_backpressure()
                && refused.is_none_or(|since| since.elapsed() < PATIENCE),
            pool: &mut self.pool,
            outcome: TxOutcome::default(),
            room: Room::Left,
        };
        let flushed = ring.deferred.flush(&mut device);
        let (outcome, room) = (device.outcome, device.room);
        let dealt_with = outcome.packets + outcome.refused_total();
        account(port.counters.cell(self.executor), &outcome);
        match (flushed, room) {
            (Flushed::Blocked, Room::Later) if outcome.packets == 0 => {
                refused.get_or_insert_with(Instant::now);
            }
            // Impatient, it goes on until all that waited behind is tried.
            (Flushed::More, _) if outcome.packets == 0 => {}
            _ => *refused = None,
        }
        match (flushed, room) {
            (Flushed::More, _) => self.ready.push_back(id),
            (Flushed::Blocked, Room::Awaited) => {
                let data = EventData::new_u64(id);
                let flags = EventFlags::OUT | EventFlags::ONESHOT;
                if let Err(errno) = epoll::modify(&self.epoll, outlet.writable(), data, flags) {
                    tracing::warn!("port {}: epoll: {errno}: it is tried again", port.name);
                    self.later.insert((Instant::now() + AGAIN.1, id));
                }
            }
            (Flushed::Blocked, _) => {
                *wait = if dealt_with == 0 {
                    *wait * 2
                } else {
                    *wait / 2
                };
                *wait = (*wait).clamp(AGAIN.0, AGAIN.1);
                self.later.insert((Instant::now() + *wait, id));
            }
            (Flushed::Empty | Flushed::NotOurs | Flushed::Broken, _) => {}
        }
    }
}

// The arithmetic of a flush: a frame counts as one byte, so messages alone bound it.
const _: () = assert!(FLUSH_MESSAGES < ::vport::ring::deferred::FLUSH_BYTES);
