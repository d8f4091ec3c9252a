//! A prompt thread: reads its clients' requests, answers them, goes on with their dumps.
//!
//! Sockets are edge-triggered: after an event a client is *readable* until a receive came back short.
//! Clients with something to do stand in one queue and get a bounded turn each.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, epoll};

use super::census::Census;
use super::configuration::{Job, Jobs};
use super::{drain, wake, waker};
use crate::connection::{Connection, Flushed};
use crate::family::Group;
use crate::handler::{Handler, Outgoing};
use crate::hub::Hub;
use crate::message::Messages;
use crate::quiet::Quiet;
use crate::session::{self, Context, Place, RunningDump, Step};
use crate::sys::{RECEIVE_BATCH, Receiver};
use crate::transport::{self, BARRIER_LEN, BARRIER_PID, Control, ControlOp};

/// Messages of one client in one turn.
const MESSAGES: usize = 128;
/// Parts of one dump in one turn.
const PARTS: usize = 4;
/// Waiting messages to one client in one turn.
const FLUSHES: usize = 128;
/// Answers that are held back to be sent together, in bytes.
const GATHER: usize = 128 * 1024;

const WAKER: u64 = u64::MAX;

/// What others tell a prompt thread.
pub(super) enum Mail {
    /// A request on another lane's thread has been answered.
    Awake {
        port_id: u32,
        /// The dump that it began.
        dump: Option<RunningDump>,
    },
}

/// Where they tell it.
pub(super) struct Mailbox {
    poll: Arc<OwnedFd>,
    waker: Arc<OwnedFd>,
    mail: Mutex<Vec<Mail>>,
}

impl Mailbox {
    pub(super) fn poll(&self) -> &Arc<OwnedFd> {
        &self.poll
    }

    pub(super) fn waker(&self) -> &Arc<OwnedFd> {
        &self.waker
    }

    pub(super) fn post(&self, mail: Mail) {
        self.mail
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(mail);
        wake(&self.waker);
    }

    fn take(&self) -> Vec<Mail> {
        std::mem::take(&mut *self.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What the thread knows of a client.
struct Client {
    connection: Arc<Connection>,
    /// Datagrams that were received and not finished, each with how far it is.
    input: VecDeque<(Vec<u8>, usize)>,
    readable: bool,
    /// EPOLLOUT came.
    writable: bool,
    /// The peer will say nothing more once its datagrams are read.
    hung_up: bool,
    /// They are read.
    ended: bool,
    /// A request of it is on another lane's thread.
    asleep: bool,
    dump: Option<RunningDump>,
    /// Something of the dump was sent besides its end.
    dumped: bool,
    /// The newest barrier behind the dump.
    barrier: Option<u32>,
    scheduled: bool,
}

impl Client {
    fn new(connection: Arc<Connection>) -> Self {
        Self {
            connection,
            input: VecDeque::new(),
            readable: true,
            writable: false,
            hung_up: false,
            ended: false,
            asleep: false,
            dump: None,
            dumped: false,
            barrier: None,
            scheduled: false,
        }
    }

    fn is_busy(&self) -> bool {
        self.dump.is_some() || self.connection.dump_unread()
    }
}

/// The thread.
pub(super) struct Prompt {
    clients: HashMap<u32, Client>,
    turns: VecDeque<u32>,
    server: Shared,
    stop: Arc<AtomicBool>,
    mailbox: Arc<Mailbox>,
    receiver: Receiver,
    out: Outgoing,
}

/// What a turn needs besides its client.
struct Shared {
    hub: Hub,
    handler: Arc<dyn Handler>,
    jobs: Jobs,
    home: Arc<Mailbox>,
    census: Arc<Census>,
    complaints: Quiet,
}

/// How far a datagram came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Finished,
    /// Go on here: the client sleeps, or its turn is over.
    At(usize),
}

impl Prompt {
    pub(super) fn new(
        hub: Hub,
        handler: Arc<dyn Handler>,
        jobs: Jobs,
        census: Arc<Census>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<(Self, Arc<Mailbox>)> {
        let poll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let waker = Arc::new(waker()?);
        epoll::add(
            &*poll,
            &*waker,
            epoll::EventData::new_u64(WAKER),
            epoll::EventFlags::IN,
        )?;
        let mailbox = Arc::new(Mailbox {
            poll,
            waker,
            mail: Mutex::default(),
        });
        let home = Arc::clone(&mailbox);
        let prompt = Self {
            clients: HashMap::new(),
            turns: VecDeque::new(),
            server: Shared {
                hub,
                handler,
                jobs,
                home,
                census,
                complaints: Quiet::default(),
            },
            stop,
            mailbox: Arc::clone(&mailbox),
            receiver: Receiver::default(),
            out: Outgoing::default(),
        };
        Ok((prompt, mailbox))
    }

    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(256);
        while !self.stop.load(Ordering::Acquire) {
            let timeout = if self.turns.is_empty() {
                self.server.handler.before_sleep();
                None
            } else {
                Some(rustix::event::Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                })
            };
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&*self.mailbox.poll, room, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("epoll_wait: {errno}; this thread's clients are lost");
                    break;
                }
            }
            for event in &events {
                self.note(*event);
            }
            for _ in 0..self.turns.len() {
                let Some(port_id) = self.turns.pop_front() else {
                    break;
                };
                self.turn(port_id);
            }
        }
        for (_, client) in self.clients.drain() {
            self.server.end(&client);
        }
    }

    fn note(&mut self, event: epoll::Event) {
        let key = event.data.u64();
        if key == WAKER {
            drain(&self.mailbox.waker);
            for Mail::Awake { port_id, dump } in self.mailbox.take() {
                if let Some(client) = self.clients.get_mut(&port_id) {
                    client.asleep = false;
                    if dump.is_some() {
                        client.dump = dump;
                        client.dumped = false;
                    }
                    schedule(&mut self.turns, port_id, client);
                }
            }
            return;
        }
        let Ok(port_id) = u32::try_from(key) else {
            return;
        };
        let client = match self.clients.entry(port_id) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let Some(connection) = self.server.hub.client(port_id) else {
                    return;
                };
                entry.insert(Client::new(connection))
            }
        };
        let flags = event.flags;
        let hung_up = epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        client.hung_up |= flags.intersects(hung_up);
        client.readable |= flags.contains(epoll::EventFlags::IN) || client.hung_up;
        client.writable |= flags.contains(epoll::EventFlags::OUT);
        schedule(&mut self.turns, port_id, client);
    }

    fn turn(&mut self, port_id: u32) {
        let Some(client) = self.clients.get_mut(&port_id) else {
            return;
        };
        client.scheduled = false;
        let mut again = false;
        if std::mem::take(&mut client.writable) && client.connection.flush(FLUSHES) == Flushed::More
        {
            client.writable = true;
            again = true;
        }
        again |= self.server.advance_dump(client, &mut self.out);
        again |= self.server.read(client, &mut self.receiver, &mut self.out);
        // What it has just begun needn't wait for another turn.
        if client.dump.is_some() {
            again |= self.server.advance_dump(client, &mut self.out);
        }
        if client.ended && !client.asleep && client.input.is_empty() {
            self.server.end(client);
            self.clients.remove(&port_id);
        } else if again {
            schedule(&mut self.turns, port_id, client);
        }
    }
}

fn schedule(turns: &mut VecDeque<u32>, port_id: u32, client: &mut Client) {
    if !client.scheduled {
        client.scheduled = true;
        turns.push_back(port_id);
    }
}

impl Shared {
    /// The client has left.
    fn end(&self, client: &Client) {
        let connection = &client.connection;
        self.hub.dismiss(connection);
        connection.close();
        self.census
            .leave(connection.credentials, connection.privileged);
        self.handler.gone(connection.port_id);
    }

    /// Sends parts of the client's dump while its socket takes them. True: there is more to do now.
    fn advance_dump(&self, client: &mut Client, out: &mut Outgoing) -> bool {
        for _ in 0..PARTS {
            let Some(dump) = &mut client.dump else {
                return false;
            };
            // Not idle: EPOLLOUT will come.
            if !client.connection.is_idle() {
                return false;
            }
            let over = dump.advance(out);
            client.dumped |= out.ends.len() > usize::from(over);
            client.connection.send(out);
            out.clear();
            if over {
                client.dump = None;
                if client.dumped && client.connection.is_idle() {
                    client.connection.dump_sent();
                }
                if let Some(cookie) = client.barrier.take() {
                    client.connection.send_one(&transport::barrier_ack(cookie));
                }
                return false;
            }
        }
        client.dump.is_some() && client.connection.is_idle()
    }

    /// Reads and answers for one turn. True: there is more to do now.
    fn read(&self, client: &mut Client, receiver: &mut Receiver, out: &mut Outgoing) -> bool {
        let mut budget = MESSAGES;
        while budget > 0
            && !client.asleep
            && let Some((datagram, at)) = client.input.pop_front()
        {
            if let Progress::At(at) = self.datagram(client, &datagram, at, &mut budget, out) {
                client.input.push_front((datagram, at));
            }
        }
        if budget > 0 && !client.asleep && client.input.is_empty() && client.readable {
            self.receive(client, receiver, &mut budget, out);
        }
        client.connection.send(out);
        out.clear();
        !client.asleep && (!client.input.is_empty() || client.readable)
    }

    fn receive(
        &self,
        client: &mut Client,
        receiver: &mut Receiver,
        budget: &mut usize,
        out: &mut Outgoing,
    ) {
        let received = match receiver.receive(client.connection.fd()) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                client.readable = false;
                client.ended = client.hung_up;
                return;
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                // It closed with answers unread; what it sent before is still there to be read.
                client.hung_up = true;
                return;
            }
            Err(_) => {
                client.readable = false;
                client.ended = true;
                return;
            }
        };
        let short = received < RECEIVE_BATCH;
        client.readable = !short;
        let mut last_empty = false;
        for index in 0..received {
            let (datagram, cut) = receiver.datagram(index);
            last_empty = datagram.is_empty();
            if cut {
                // Its barrier is lost, so the client would wait for ever.
                self.complaints.say(|| {
                    let port_id = client.connection.port_id;
                    tracing::warn!("client {port_id:#x} sent an oversized datagram: hung up");
                });
                client.connection.hang_up();
                client.input.clear();
                client.ended = true;
                client.readable = false;
                return;
            }
            if client.asleep || *budget == 0 {
                if !last_empty {
                    client.input.push_back((datagram.to_vec(), 0));
                }
            } else if let Progress::At(at) = self.datagram(client, datagram, 0, budget, out) {
                client.input.push_back((datagram.to_vec(), at));
            }
        }
        // End of file reads as an empty datagram, and a client may send those.
        if last_empty {
            client.hung_up |= is_hung_up(&client.connection);
            if client.hung_up {
                client.ended = true;
                client.readable = false;
            } else {
                client.readable = true;
            }
        } else if short && client.hung_up {
            // Once more, for the end of file.
            client.readable = true;
        }
    }

    /// Answers a datagram's messages from `at` on.
    fn datagram(
        &self,
        client: &mut Client,
        datagram: &[u8],
        at: usize,
        budget: &mut usize,
        out: &mut Outgoing,
    ) -> Progress {
        if at == 0
            && let Some(payload) = transport::reflected(datagram)
        {
            *budget = budget.saturating_sub(1);
            if !payload.is_empty() {
                // On its own: it may have any length, and messages in `out` are aligned.
                client.connection.send(out);
                out.clear();
                client.connection.send_one(payload);
            }
            return Progress::Finished;
        }
        // The barrier at the end counts also behind messages that are none.
        let (body, barrier) = split_barrier(datagram);
        let mut messages = Messages::new(body.get(at..).unwrap_or_default());
        loop {
            let here = body.len() - messages.rest().len();
            if *budget == 0 && !messages.rest().is_empty() {
                return Progress::At(here);
            }
            let Some(message) = messages.next() else {
                break;
            };
            *budget = budget.saturating_sub(1);
            if self.message(client, message, out) == Turn::Over {
                let next = body.len() - messages.rest().len();
                // Behind the last message of all there is nothing to come back for.
                if next == body.len() && barrier.is_none() {
                    return Progress::Finished;
                }
                return Progress::At(next);
            }
        }
        if let Some(cookie) = barrier {
            self.barrier(client, cookie, out);
        }
        Progress::Finished
    }

    fn barrier(&self, client: &mut Client, cookie: u32, out: &mut Outgoing) {
        if client.dump.is_some() {
            client.barrier = Some(cookie);
        } else {
            out.push(&transport::barrier_ack(cookie));
        }
    }

    fn message(
        &self,
        client: &mut Client,
        message: (crate::message::Header, &[u8]),
        out: &mut Outgoing,
    ) -> Turn {
        let (header, bytes) = message;
        if header.pid == BARRIER_PID {
            if let Some(control) = Control::parse(bytes) {
                self.control(client, control);
                return Turn::GoesOn;
            }
            if header.kind == transport::NLMSG_NOOP && header.has(crate::message::flags::ACK) {
                self.barrier(client, header.seq, out);
                return Turn::GoesOn;
            }
        }
        client.connection.received.fetch_add(1, Ordering::Relaxed);
        let context = Context {
            handler: &*self.handler,
            hub: &self.hub,
        };
        let peer = client.connection.peer();
        match session::step(
            context,
            &peer,
            Place::Prompt,
            message,
            || client.is_busy(),
            out,
        ) {
            Step::Done => {}
            Step::Dumping(dump) => {
                client.dump = Some(dump);
                client.dumped = false;
                // Its first part comes before the answers to what follows, as in the kernel.
                client.connection.send(out);
                out.clear();
                self.advance_dump(client, out);
            }
            Step::Elsewhere(lane) => {
                client.connection.send(out);
                out.clear();
                let job = Job {
                    busy: client.is_busy(),
                    client: Arc::clone(&client.connection),
                    message: bytes.to_vec(),
                    home: Arc::clone(&self.home),
                };
                client.asleep = self.jobs.submit(lane, job);
                if !client.asleep {
                    // The server is stopping.
                    client.connection.hang_up();
                }
                return Turn::Over;
            }
        }
        if out.buffer.len() >= GATHER {
            client.connection.send(out);
            out.clear();
        }
        Turn::GoesOn
    }

    fn control(&self, client: &Client, control: Control) {
        let connection = &client.connection;
        match control.op {
            ControlOp::AddMembership | ControlOp::DropMembership => {
                let member = control.op == ControlOp::AddMembership;
                // A group that isn't there is a client's mistake without consequence.
                if let Some(group) = Group::from_id(control.value) {
                    self.hub.set_member(connection, group, member);
                }
            }
            option => connection.set_option(option, control.value != 0),
        }
    }
}

/// Whether a client's turn goes on after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    GoesOn,
    Over,
}

fn split_barrier(datagram: &[u8]) -> (&[u8], Option<u32>) {
    let Some(start) = datagram.len().checked_sub(BARRIER_LEN) else {
        return (datagram, None);
    };
    let (body, tail) = datagram.split_at(start);
    match transport::Header::parse(tail).and_then(transport::barrier_cookie) {
        Some(cookie) => (body, Some(cookie)),
        None => (datagram, None),
    }
}

fn is_hung_up(connection: &Connection) -> bool {
    let fd = connection.fd();
    let mut polled = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::RDHUP)];
    let nothing = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match rustix::event::poll(&mut polled, Some(&nothing)) {
        Ok(_) => polled.iter().any(|fd| {
            fd.revents()
                .intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
        }),
        Err(_) => true,
    }
}
