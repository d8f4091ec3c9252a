//! Workers: threads that sleep until a port has frames, then carry them in batches.
//!
//! # Contract
//! A receive queue belongs to one worker, so its frames are forwarded in order. A worker takes up to
//! [`BATCH`] frames from a queue, forwards them, flushes the ports, and goes to the next queue that has
//! any: under load the queues take turns.
//!
//! # Thread safety
//! Commands reach a worker by its mailbox. [`Workers::remove`] returns when the worker has dropped the
//! port's queues, and with them their descriptors.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use ::vport::{RxQueue, RxStatus};
use crossbeam_epoch::LocalHandle;
use frame::Frame;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::daemon::{Daemon, now_ns};
use crate::datapath::Datapath;
use crate::devices::Notice;
use crate::drop_reason::DropReason;
use crate::executor::{Batch, Executor};
use crate::mailbox::{Mailbox, Sending, mailbox};
use crate::vport::Vport;

/// Frames received at a time.
pub const BATCH: usize = 32;
/// The mailbox's mark among the epoll events; queues have the numbers below.
const MAIL: u64 = u64::MAX;

enum Command {
    Add(Box<Source>),
    /// Drop the queues of the ports at these addresses.
    Remove(HashSet<usize>, Sender<()>),
    Stop,
}

struct Source {
    queue: Box<dyn RxQueue>,
    port: Arc<Vport>,
    datapath: Arc<Datapath>,
    /// Perhaps there is more: served again before the worker sleeps.
    ready: bool,
}

/// The workers, as the configuration sees them.
#[derive(Default)]
pub struct Workers {
    threads: Mutex<Vec<Worker>>,
}

struct Worker {
    mail: Sending<Command>,
    thread: JoinHandle<()>,
    /// The ports whose queues it has, by address, a queue each.
    ports: Vec<usize>,
}

impl Workers {
    /// Starts the daemon's workers.
    ///
    /// # Errors
    /// No thread or descriptor to be had.
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
            let executor = {
                let daemon = Arc::clone(daemon);
                move || {
                    let handle = daemon.reclaimer.register();
                    match daemon.new_executor() {
                        Ok(executor) => Loop::new(executor, handle, mail, epoll, &daemon).run(),
                        Err(errno) => tracing::error!("worker {number} can't start: {errno}"),
                    }
                }
            };
            let thread = std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(executor)?;
            self.lock().push(Worker {
                mail: sending,
                thread,
                ports: Vec::new(),
            });
        }
        Ok(())
    }

    /// Gives a port's queues to the workers that have the fewest.
    pub fn add(&self, datapath: &Arc<Datapath>, port: &Arc<Vport>, queues: Vec<Box<dyn RxQueue>>) {
        let mut workers = self.lock();
        for queue in queues {
            let Some(worker) = workers.iter_mut().min_by_key(|worker| worker.ports.len()) else {
                tracing::error!("port {} has no worker: its packets are lost", port.name);
                return;
            };
            worker.ports.push(address(port));
            worker.mail.send(Command::Add(Box::new(Source {
                queue,
                port: Arc::clone(port),
                datapath: Arc::clone(datapath),
                ready: true,
            })));
        }
    }

    /// Takes the ports' queues away, and waits until they are closed.
    pub fn remove(&self, ports: &[Arc<Vport>]) {
        let (done, closed) = channel();
        let gone: HashSet<usize> = ports.iter().map(address).collect();
        for worker in self.lock().iter_mut() {
            let before = worker.ports.len();
            worker.ports.retain(|known| !gone.contains(known));
            if worker.ports.len() != before {
                worker
                    .mail
                    .send(Command::Remove(gone.clone(), done.clone()));
            }
        }
        drop(done);
        // Ends when every worker asked has dropped its sender.
        while closed.recv().is_ok() {}
    }

    /// Ends the workers and waits for them.
    pub fn stop(&self) {
        let workers = std::mem::take(&mut *self.lock());
        for worker in &workers {
            worker.mail.send(Command::Stop);
        }
        for worker in workers {
            if worker.thread.join().is_err() {
                tracing::error!("a worker had ended by a panic");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
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
    sources: Vec<Option<Source>>,
    frames: Vec<Frame>,
}

impl<'d> Loop<'d> {
    fn new(
        executor: Executor,
        handle: LocalHandle,
        mail: Mailbox<Command>,
        epoll: OwnedFd,
        daemon: &'d Daemon,
    ) -> Self {
        let frames = Vec::with_capacity(BATCH);
        Self {
            executor,
            handle,
            mail,
            epoll,
            daemon,
            sources: Vec::new(),
            frames,
        }
    }

    fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        let no_wait = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            let busy = self.sources.iter().flatten().any(|source| source.ready);
            events.clear();
            let timeout = busy.then_some(&no_wait);
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout,
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("worker: epoll_wait: {errno}");
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
                    index => {
                        if let Some(Some(source)) = self.sources.get_mut(index as usize) {
                            source.ready = true;
                        }
                    }
                }
            }
            for index in 0..self.sources.len() {
                self.serve(index);
            }
        }
    }

    /// False: the worker is to end.
    fn read_mail(&mut self) -> bool {
        self.mail.acknowledge();
        while let Some(command) = self.mail.next() {
            match command {
                Command::Stop => return false,
                Command::Add(source) => self.add(*source),
                Command::Remove(ports, done) => {
                    for slot in &mut self.sources {
                        if slot
                            .as_ref()
                            .is_some_and(|source| ports.contains(&address(&source.port)))
                        {
                            // Closing the descriptor takes it out of the epoll set.
                            *slot = None;
                        }
                    }
                    let live: Vec<u64> = self
                        .sources
                        .iter()
                        .flatten()
                        .map(|source| source.datapath.generation)
                        .collect();
                    self.executor.forget_tables(&live);
                    drop(done);
                }
            }
        }
        true
    }

    fn add(&mut self, source: Source) {
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
    }

    fn serve(&mut self, index: usize) {
        let Some(Some(source)) = self.sources.get_mut(index) else {
            return;
        };
        if !source.ready {
            return;
        }
        let status = source
            .queue
            .receive(&mut self.executor.pool, &mut self.frames, BATCH);
        let number = source.port.number;
        let (gone, lost) = match status {
            Ok(RxStatus::Open { more, errors }) => {
                source.ready = more;
                (false, errors.total())
            }
            Ok(RxStatus::Gone) => (true, 0),
            Err(error) => {
                tracing::warn!("port {}: {error}", source.port.name);
                source.ready = false;
                (error.is_gone(), 0)
            }
        };
        if lost != 0 {
            let cell = source.port.counters.cell(self.executor.index);
            cell.received.add(lost);
            cell.drop(DropReason::Malformed, lost);
        }
        if !self.frames.is_empty() {
            let ports = source.datapath.ports.load();
            let guard = self.handle.pin();
            let mut batch = Batch::new(&source.datapath, &ports, &guard, now_ns());
            self.executor.receive(&mut batch, number, &mut self.frames);
            self.executor.flush(&batch);
        }
        if gone {
            let notice = Notice::Gone {
                datapath: source.datapath.ifindex,
                port: number,
            };
            self.sources[index] = None;
            self.daemon.devices.notify(notice);
        }
    }
}
