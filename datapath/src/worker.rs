//! Workers: threads that sleep until a port has frames, then carry them in batches.
//!
//! # Contract
//! A receive queue belongs to one worker, so its frames are forwarded in order. A worker takes up to
//! [`BATCH`] frames from a queue, forwards them, flushes the ports, and goes to the next queue that has
//! any: under load the queues take turns. A queue moves to another worker between two such batches
//! ([`Workers::balance`]): the first has handed on all that it took, so a flow's packets keep their order.
//!
//! # Thread safety
//! Commands reach a worker by its mailbox. [`Workers::remove`] returns when the worker has dropped the
//! port's queues, and with them their descriptors. A queue is moved under the lock of [`Workers`], from
//! the one's answer to the other's mail, so that no removal can miss it on the way.

mod source;

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ::vport::{RxErrors, RxQueue, RxStatus};
use crossbeam_epoch::LocalHandle;
use frame::Frame;
use rustix::event::epoll::{self, EventData, EventFlags};
use serde::{Deserialize, Serialize};

use crate::daemon::{Daemon, now_ns};
use crate::datapath::Datapath;
use crate::devices::Notice;
use crate::drop_reason::DropReason;
use crate::executor::{Batch, Executor};
use crate::feeders::Pausing;
use crate::mailbox::{Mailbox, Sending, mailbox};
use crate::placement::load::{Load, Sample};
use crate::placement::{self, Shares, cpus};
use crate::vport::Vport;
use source::{Aside, Source};

/// Frames received at a time.
pub const BATCH: usize = 32;
/// The mailbox's mark among the epoll events; queues have the numbers below.
const MAIL: u64 = u64::MAX;
/// The mark of what wakes a worker that pauses.
const RESUME: u64 = u64::MAX - 1;
/// How often the balance is looked at.
const BALANCE_INTERVAL: Duration = Duration::from_secs(1);

enum Command {
    Add(Box<Source>),
    /// Drop the queues of the ports at these addresses.
    Remove(HashSet<usize>, Sender<()>),
    /// Give up the queue of that number.
    Take(u64, Sender<Box<Source>>),
    Stop,
}

/// The workers, as the configuration sees them.
#[derive(Default)]
pub struct Workers {
    crew: Mutex<Crew>,
}

#[derive(Default)]
struct Crew {
    workers: Vec<Worker>,
    next_queue: u64,
    sampled_ns: u64,
    moves: u64,
}

struct Worker {
    mail: Sending<Command>,
    thread: JoinHandle<()>,
    cpu: Option<u32>,
    load: Arc<Load>,
    sample: Sample,
    queues: Vec<Assigned>,
}

/// A queue that a worker has.
struct Assigned {
    id: u64,
    /// The port's address.
    port: usize,
    name: Box<str>,
    load: Arc<Load>,
    sample: Sample,
}

/// A worker, for `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// The CPU that it is kept on.
    pub cpu: Option<u32>,
    /// Share of the last second or so in which it carried packets.
    pub busy_share: f64,
    /// Seconds in which it has carried packets.
    pub busy_s: f64,
    /// Its queues.
    pub queues: Vec<QueueStatus>,
}

/// A receive queue, for `status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QueueStatus {
    /// The port's name.
    pub port: String,
    /// Share of its worker's time.
    pub busy_share: f64,
    /// Frames that came out of it.
    pub frames: u64,
}

impl Workers {
    /// Starts the daemon's workers.
    ///
    /// # Errors
    /// No thread or descriptor to be had; a CPU on which no thread may run.
    pub fn start(&self, daemon: &Arc<Daemon>) -> std::io::Result<()> {
        for number in 0..daemon.options.workers {
            let (sending, mail) = mailbox()?;
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            epoll::add(
                &epoll,
                mail.as_fd(),
                EventData::new_u64(MAIL),
                EventFlags::IN,
            )?;
            let pausing = daemon.drains.feeders.add()?;
            epoll::add(
                &epoll,
                pausing.as_fd(),
                EventData::new_u64(RESUME),
                EventFlags::IN,
            )?;
            let cpus = daemon.options.cpus.as_ref();
            let cpu = cpus.and_then(|cpus| cpus.of_worker(number));
            let load = Arc::new(Load::default());
            let (started, pinned) = channel();
            let life = {
                let (daemon, load) = (Arc::clone(daemon), Arc::clone(&load));
                move || {
                    let ready = cpu.map_or(Ok(()), cpus::pin);
                    let ends = ready.is_err() || started.send(ready).is_err();
                    if ends {
                        return;
                    }
                    let handle = daemon.reclaimer.register();
                    match daemon.new_executor() {
                        Ok(executor) => {
                            Loop::new(executor, handle, mail, epoll, &daemon, load, pausing).run()
                        }
                        Err(errno) => tracing::error!("worker {number} can't start: {errno}"),
                    }
                }
            };
            let thread = std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(life)?;
            pinned.recv().unwrap_or_else(|_ended| {
                Err(std::io::Error::other(format!(
                    "worker {number} may not run on CPU {}",
                    cpu.unwrap_or_default()
                )))
            })?;
            self.lock().workers.push(Worker {
                mail: sending,
                thread,
                cpu,
                load,
                sample: Sample::default(),
                queues: Vec::new(),
            });
        }
        Ok(())
    }

    /// Gives a port's queues to the workers that have the least to do.
    pub fn add(&self, datapath: &Arc<Datapath>, port: &Arc<Vport>, queues: Vec<Box<dyn RxQueue>>) {
        let mut crew = self.lock();
        for queue in queues {
            let id = crew.next_queue;
            crew.next_queue += 1;
            let Some(worker) = crew.workers.iter_mut().min_by_key(|worker| worker.burden()) else {
                tracing::error!("port {} has no worker: its packets are lost", port.name);
                return;
            };
            let load = Arc::new(Load::default());
            worker.queues.push(Assigned {
                id,
                port: address(port),
                name: port.name.clone(),
                load: Arc::clone(&load),
                sample: Sample::default(),
            });
            worker.mail.send(Command::Add(Box::new(Source {
                id,
                load,
                queue,
                port: Arc::clone(port),
                datapath: Arc::clone(datapath),
                ready: true,
                fed: Vec::new(),
                aside: None,
                failures: 0,
            })));
        }
    }

    /// Takes the ports' queues away, and waits until they are closed.
    pub fn remove(&self, ports: &[Arc<Vport>]) {
        let (done, closed) = channel();
        let gone: HashSet<usize> = ports.iter().map(address).collect();
        for worker in &mut self.lock().workers {
            let before = worker.queues.len();
            worker.queues.retain(|queue| !gone.contains(&queue.port));
            if worker.queues.len() != before {
                worker
                    .mail
                    .send(Command::Remove(gone.clone(), done.clone()));
            }
        }
        drop(done);
        // Ends when every worker asked has dropped its sender.
        while closed.recv().is_ok() {}
    }

    /// Measures what workers and queues take of the time, and moves a queue from a busy worker to an idle
    /// one, if a second has gone by since the last time.
    pub fn balance(&self, now_ns: u64) {
        let mut crew = self.lock();
        let elapsed = now_ns.saturating_sub(crew.sampled_ns);
        if elapsed < BALANCE_INTERVAL.as_nanos() as u64 {
            return;
        }
        crew.sampled_ns = now_ns;
        let mut shares = Vec::with_capacity(crew.workers.len());
        for worker in &mut crew.workers {
            worker.sample.take(&worker.load, elapsed);
            for queue in &mut worker.queues {
                queue.sample.take(&queue.load, elapsed);
            }
            shares.push(Shares {
                busy: worker.sample.share,
                queues: worker.queues.iter().map(|q| q.sample.share).collect(),
            });
        }
        if let Some(step) = placement::plan(&shares) {
            crew.carry_out(step);
        }
    }

    /// Each worker as of the last look at the balance, and how often queues have been moved.
    pub fn status(&self) -> (Vec<WorkerStatus>, u64) {
        let crew = self.lock();
        let workers = crew.workers.iter().map(|worker| WorkerStatus {
            cpu: worker.cpu,
            busy_share: worker.sample.share,
            busy_s: worker.load.busy_ns.get() as f64 / 1e9,
            queues: worker.queues.iter().map(Assigned::status).collect(),
        });
        (workers.collect(), crew.moves)
    }

    /// Ends the workers and waits for them.
    pub fn stop(&self) {
        let workers = std::mem::take(&mut self.lock().workers);
        for worker in &workers {
            worker.mail.send(Command::Stop);
        }
        for worker in workers {
            if worker.thread.join().is_err() {
                tracing::error!("a worker had ended by a panic");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Crew> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Crew {
    fn carry_out(&mut self, step: placement::Move) -> Option<()> {
        let from = self.workers.get_mut(step.from)?;
        let (reply, answer) = channel();
        let id = from.queues.get(step.queue)?.id;
        from.mail.send(Command::Take(id, reply));
        // A worker reads its mail after each round of batches. None: the device is gone, and the queue
        // with it.
        let source = answer.recv().ok()?;
        let queue = from.queues.remove(step.queue);
        let (port, share) = (queue.name.clone(), queue.sample.share);
        let to = self.workers.get_mut(step.to)?;
        to.queues.push(queue);
        to.mail.send(Command::Add(source));
        self.moves += 1;
        tracing::debug!(
            "a queue of port {port} ({:.0} % of the time) moves from worker {} to {}",
            share * 100.0,
            step.from,
            step.to
        );
        Some(())
    }
}

impl Worker {
    /// What new queues are given by: tenths of the time, then how many queues it has.
    fn burden(&self) -> (u64, usize) {
        ((self.sample.share * 10.0) as u64, self.queues.len())
    }
}

impl Assigned {
    fn status(&self) -> QueueStatus {
        QueueStatus {
            port: self.name.to_string(),
            busy_share: self.sample.share,
            frames: self.load.frames.get(),
        }
    }
}

fn address(port: &Arc<Vport>) -> usize {
    Arc::as_ptr(port) as usize
}

/// One worker's life.
struct Loop<'d> {
    executor: Executor,
    handle: LocalHandle,
    mail: Mailbox<Command>,
    epoll: OwnedFd,
    daemon: &'d Daemon,
    load: Arc<Load>,
    pausing: Arc<Pausing>,
    sources: Vec<Option<Source>>,
    /// Places of those that are to be served, in turns: each once. A wake costs what there is to do,
    /// however many queues there are.
    turns: VecDeque<usize>,
    /// Places of those that stand aside.
    aside: Vec<usize>,
    frames: Vec<Frame>,
    /// Until when all time is accounted for.
    mark_ns: u64,
    /// When frames came last.
    last_frames_ns: u64,
}

impl<'d> Loop<'d> {
    fn new(
        executor: Executor,
        handle: LocalHandle,
        mail: Mailbox<Command>,
        epoll: OwnedFd,
        daemon: &'d Daemon,
        load: Arc<Load>,
        pausing: Arc<Pausing>,
    ) -> Self {
        let frames = Vec::with_capacity(BATCH);
        Self {
            executor,
            handle,
            mail,
            epoll,
            daemon,
            load,
            pausing,
            sources: Vec::new(),
            turns: VecDeque::new(),
            aside: Vec::new(),
            frames,
            mark_ns: now_ns(),
            last_frames_ns: 0,
        }
    }

    fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        let busy_poll = self.daemon.options.busy_poll.as_nanos() as u64;
        loop {
            let (pauses, again_ns) = self.resume_sources();
            // Never before the first frames: an idle worker sleeps.
            let looks_on = self.mark_ns.saturating_sub(self.last_frames_ns) < busy_poll;
            let sleeps = self.turns.is_empty() && !looks_on;
            if sleeps && pauses && !self.may_pause() {
                continue;
            }
            let timeout = match (sleeps, again_ns) {
                (false, _) => Some(Duration::ZERO),
                (true, None) => None,
                (true, Some(at)) => Some(Duration::from_nanos(at.saturating_sub(now_ns()))),
            };
            let timeout = timeout.map(|wait| rustix::time::Timespec {
                tv_sec: wait.as_secs() as i64,
                tv_nsec: i64::from(wait.subsec_nanos()),
            });
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("worker: epoll_wait: {errno}");
                    return;
                }
            }
            if sleeps {
                self.mark_ns = now_ns();
            }
            for event in &events {
                match event.data.u64() {
                    MAIL => {
                        if !self.read_mail() {
                            return;
                        }
                    }
                    RESUME => self.pausing.acknowledge(),
                    index => self.is_ready(index as usize),
                }
            }
            self.pausing.feeder.go_on();
            let mut carried = false;
            for _ in 0..self.turns.len() {
                if let Some(index) = self.turns.pop_front() {
                    carried |= self.serve(index);
                }
            }
            if !carried {
                self.mark_ns = now_ns();
            }
        }
    }

    /// There may be frames in the queue at that place.
    fn is_ready(&mut self, index: usize) {
        if let Some(Some(source)) = self.sources.get_mut(index)
            && source.aside.is_none()
            && !std::mem::replace(&mut source.ready, true)
        {
            self.turns.push_back(index);
        }
    }

    /// Lets the queues go on that need no longer stand aside. Gives whether some pause as what they feed is
    /// stopped, and when the next of the others is to be tried again.
    fn resume_sources(&mut self) -> (bool, Option<u64>) {
        let (mut pauses, mut again_ns) = (false, None);
        if self.aside.is_empty() {
            return (pauses, again_ns);
        }
        let now = now_ns();
        let mut aside = std::mem::take(&mut self.aside);
        aside.retain(|index| {
            let Some(Some(source)) = self.sources.get_mut(*index) else {
                return false;
            };
            match source.aside {
                Some(Aside::Stopped) if source.is_stopped() => {
                    pauses = true;
                    return true;
                }
                Some(Aside::Until(at)) if at > now => {
                    again_ns = Some(again_ns.map_or(at, |next: u64| next.min(at)));
                    return true;
                }
                _ => {}
            }
            source.aside = None;
            let data = EventData::new_u64(*index as u64);
            if let Err(errno) = epoll::add(&self.epoll, source.queue.as_fd(), data, EventFlags::IN)
            {
                tracing::error!("port {}: epoll: {errno}", source.port.name);
            }
            self.is_ready(*index);
            false
        });
        self.aside = aside;
        (pauses, again_ns)
    }

    /// Announces that this worker sleeps though queues pause, and looks at all that they feed again: false
    /// if one of them is to go on.
    fn may_pause(&self) -> bool {
        let aside = self
            .aside
            .iter()
            .filter_map(|index| self.sources.get(*index)?.as_ref());
        let mut paused = aside.filter(|source| source.aside == Some(Aside::Stopped));
        self.pausing.feeder.pause(|| paused.all(Source::is_stopped))
    }

    /// Takes a queue out of its place, and out of the epoll set: its descriptor may be its port's too, and
    /// so outlive it.
    fn take(&mut self, index: usize) -> Option<Source> {
        let source = self.sources.get_mut(index)?.take()?;
        self.turns.retain(|other| *other != index);
        self.aside.retain(|other| *other != index);
        if source.aside.is_none()
            && let Err(errno) = epoll::delete(&self.epoll, source.queue.as_fd())
        {
            tracing::error!("port {}: epoll: {errno}", source.port.name);
        }
        Some(source)
    }

    /// False: the worker is to end.
    fn read_mail(&mut self) -> bool {
        self.mail.acknowledge();
        while let Some(command) = self.mail.next() {
            match command {
                Command::Stop => return false,
                Command::Add(source) => self.add(*source),
                Command::Remove(ports, done) => {
                    for index in 0..self.sources.len() {
                        let source = self.sources.get(index).and_then(Option::as_ref);
                        if source.is_some_and(|source| ports.contains(&address(&source.port))) {
                            self.take(index);
                        }
                    }
                    self.forget_tables();
                    drop(done);
                }
                Command::Take(id, reply) => {
                    let is_it =
                        |slot: &Option<Source>| slot.as_ref().is_some_and(|source| source.id == id);
                    let index = self.sources.iter().position(is_it);
                    if let Some(source) = index.and_then(|index| self.take(index)) {
                        // Nobody waits any more: the daemon is ending, and the queue closes.
                        let _ = reply.send(Box::new(source));
                    }
                    self.forget_tables();
                }
            }
        }
        true
    }

    /// Drops caches of tables that this worker has no queues of.
    fn forget_tables(&mut self) {
        let sources = self.sources.iter().flatten();
        let live: Vec<u64> = sources.map(|source| source.datapath.generation).collect();
        self.executor.forget_tables(&live);
    }

    fn add(&mut self, mut source: Source) {
        (source.aside, source.ready) = (None, false);
        let index = match self.sources.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.sources.push(None);
                self.sources.len() - 1
            }
        };
        let data = EventData::new_u64(index as u64);
        if let Err(errno) = epoll::add(&self.epoll, source.queue.as_fd(), data, EventFlags::IN) {
            tracing::error!(
                "port {}: epoll: {errno}: its packets are lost",
                source.port.name
            );
            return;
        }
        if let Some(slot) = self.sources.get_mut(index) {
            *slot = Some(source);
        }
        self.is_ready(index);
    }

    /// Whether there were frames.
    fn serve(&mut self, index: usize) -> bool {
        let Some(Some(source)) = self.sources.get_mut(index) else {
            return false;
        };
        source.ready = false;
        let may_stop = self.daemon.drains.feeders.in_use();
        if may_stop
            && source.is_stopped()
            && epoll::delete(&self.epoll, source.queue.as_fd()).is_ok()
        {
            source.aside = Some(Aside::Stopped);
            self.aside.push(index);
            return false;
        }
        let max = if may_stop { source.room() } else { BATCH };
        let status = source
            .queue
            .receive(&mut self.executor.pool, &mut self.frames, max);
        let number = source.port.number;
        let (gone, lost) = match status {
            Ok(RxStatus::Open { more, errors }) => {
                source.failures = 0;
                if more {
                    source.ready = true;
                    self.turns.push_back(index);
                }
                (false, errors)
            }
            Ok(RxStatus::Gone) => (true, RxErrors::default()),
            Err(error) if error.is_gone() => {
                tracing::info!("port {}: {error}", source.port.name);
                (true, RxErrors::default())
            }
            Err(error) => {
                let aside = source.has_failed(&error, now_ns());
                if epoll::delete(&self.epoll, source.queue.as_fd()).is_ok() {
                    source.aside = Some(aside);
                    self.aside.push(index);
                }
                (false, RxErrors::default())
            }
        };
        if lost.total() != 0 {
            let cell = source.port.counters.cell(self.executor.index);
            cell.received.add(lost.total());
            let tunnel = [
                (DropReason::TunnelHeader, lost.tunnel_header),
                (DropReason::TunnelChecksum, lost.tunnel_checksum),
                (DropReason::TunnelCongestion, lost.tunnel_congestion),
            ];
            let others = lost.total() - tunnel.iter().map(|(_, lost)| lost).sum::<u64>();
            cell.drop(DropReason::Malformed, others);
            for (reason, lost) in tunnel {
                cell.drop(reason, lost);
            }
        }
        let received = self.frames.len();
        if received != 0 {
            let ports = source.datapath.ports.load();
            let guard = self.handle.pin();
            let mut batch = Batch::new(&source.datapath, &ports, &guard, now_ns());
            self.executor.receive(&mut batch, number, &mut self.frames);
            self.executor.flush(&batch);
            let now = now_ns();
            let fed = self.executor.transmit.take_fed();
            source.has_fed(fed, now);
            let spent = now.saturating_sub(self.mark_ns);
            for load in [&*source.load, &*self.load] {
                load.busy_ns.add(spent);
                load.frames.add(received as u64);
            }
            (self.mark_ns, self.last_frames_ns) = (now, now);
        }
        if gone {
            let notice = Notice::Gone {
                datapath: source.datapath.ifindex,
                port: Arc::downgrade(&source.port),
            };
            self.take(index);
            self.daemon.devices.notify(notice);
        }
        received != 0
    }
}
