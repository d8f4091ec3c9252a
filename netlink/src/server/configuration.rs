//! The configuration thread: requests that may sleep, in the order of their arrival. And a second thread of
//! its kind for those that take long and sleep on nothing: a flush of a million connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};

use super::prompt::{Mail, Mailbox};
use crate::connection::Connection;
use crate::handler::{Handler, Lane, Outgoing};
use crate::hub::Hub;
use crate::message::Header;
use crate::session::{self, Context, Place, Step};

/// One request of one client, which waits for it.
pub(super) struct Job {
    pub(super) client: Arc<Connection>,
    /// One whole message.
    pub(super) message: Vec<u8>,
    /// Whether an earlier dump of the client was unread.
    pub(super) busy: bool,
    pub(super) home: Arc<Mailbox>,
}

enum Order {
    Job(Job),
    Stop,
}

/// Where jobs are handed in. Holds at most one for each connection.
#[derive(Clone)]
pub(super) struct Jobs {
    configuration: Sender<Order>,
    long: Sender<Order>,
    stop: Arc<AtomicBool>,
}

impl Jobs {
    /// False: the thread has ended.
    #[must_use]
    pub(super) fn submit(&self, lane: Lane, job: Job) -> bool {
        let thread = match lane {
            Lane::Prompt | Lane::MaySleep => &self.configuration,
            Lane::Long => &self.long,
        };
        thread.send(Order::Job(job)).is_ok()
    }

    /// After the jobs in hand, if any.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        for thread in [&self.configuration, &self.long] {
            let _ = thread.send(Order::Stop);
        }
    }
}

struct Queue {
    receiver: Receiver<Order>,
    stop: Arc<AtomicBool>,
}

/// Starts both threads.
pub(super) fn start(
    hub: &Hub,
    handler: &Arc<dyn Handler>,
) -> io::Result<(Jobs, [JoinHandle<()>; 2])> {
    let stop = Arc::new(AtomicBool::new(false));
    let start = |name: &str| {
        let (sender, receiver) = mpsc::channel();
        let (handler, hub) = (Arc::clone(handler), hub.clone());
        let stop = Arc::clone(&stop);
        let queue = Queue { receiver, stop };
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&queue, &hub, &*handler))?;
        io::Result::Ok((sender, thread))
    };
    let (configuration, first) = start("nl-config")?;
    // If this fails the first ends, as nobody can send it anything.
    let (long, second) = start("nl-long")?;
    let jobs = Jobs {
        configuration,
        long,
        stop,
    };
    Ok((jobs, [first, second]))
}

fn run(queue: &Queue, hub: &Hub, handler: &dyn Handler) {
    let mut out = Outgoing::default();
    loop {
        let order = match queue.receiver.try_recv() {
            Ok(order) => order,
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {
                handler.before_sleep();
                match queue.receiver.recv() {
                    Ok(order) => order,
                    Err(_) => return,
                }
            }
        };
        let Order::Job(job) = order else { return };
        if queue.stop.load(Ordering::Acquire) {
            return;
        }
        let dump = perform(&job, hub, handler, &mut out);
        job.home.post(Mail::Awake {
            port_id: job.client.port_id,
            dump,
        });
    }
}

fn perform(
    job: &Job,
    hub: &Hub,
    handler: &dyn Handler,
    out: &mut Outgoing,
) -> Option<session::RunningDump> {
    let header = Header::parse(&job.message)?;
    let context = Context { handler, hub };
    let peer = job.client.peer();
    let message = (header, &*job.message);
    let step = session::step(context, &peer, Place::Lane, message, || job.busy, out);
    job.client.send(out);
    out.clear();
    match step {
        Step::Dumping(dump) => Some(dump),
        Step::Done | Step::Elsewhere(_) => None,
    }
}
