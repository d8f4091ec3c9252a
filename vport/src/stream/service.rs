//! A stream's thread: it meets the peer, sends what is queued, receives, and takes what the host sends to the
//! device. It sleeps in `poll` only.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use frame::virtio::HEADER_BYTES;
use frame::{Frame, Pool};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::connection::{self, Connection, Meeting, Read, ToPeer};
use super::framing::{self, ETHERNET, Refused};
use super::{Shared, State, acknowledge};
use crate::error::Error;
use crate::link::{self, Link};
use crate::ring::Flushed;
use crate::sys::tun;

/// Frames given to the datapath, or taken from the host, at a time.
const BATCH: usize = 64;
/// Peers turned away at a time.
const ACCEPTS: usize = 16;
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);
/// The wait before connecting again: doubled each time, up to the second.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A connection that lasted that long wasn't a failure.
const LASTING: Duration = Duration::from_secs(5);

/// The device that stands for the stream.
pub(super) struct Device {
    fd: OwnedFd,
    pub(super) link: Link,
}

impl Device {
    /// A TAP device without offloads, up, without a carrier. It goes when this is dropped.
    pub(super) fn create(name: &str) -> Result<Self, Error> {
        let fail = |errno| Error::os(errno, format!("TAP device {name}"));
        let fd = tun::open().map_err(|errno| Error::os(errno, "open /dev/net/tun"))?;
        let name = match tun::attach(&fd, name, true, false) {
            Err(Errno::BUSY) => return Err(fail(Errno::EXIST)),
            made => made.map_err(fail)?,
        };
        tun::set_header_size(&fd, HEADER_BYTES).map_err(fail)?;
        tun::set_carrier(&fd, false).map_err(fail)?;
        let link = link::by_name(&name)?;
        // The host's stack has no business there.
        link::change::silence(link.index);
        link::set_up(link.index, true)?;
        Ok(Self { fd, link })
    }
}

/// How far the stream is.
enum Phase {
    /// Listening, or, with a time, waiting to connect again.
    Alone(Option<Instant>),
    Connecting {
        socket: OwnedFd,
        until: Instant,
    },
    Up {
        connection: Box<Connection>,
        since: Instant,
    },
}

pub(super) struct Service {
    shared: Arc<Shared>,
    device: Device,
    meeting: Meeting,
    phase: Phase,
    back_off: Duration,
    pool: Pool,
    frames: Vec<Frame>,
    /// There is more to do before sleeping.
    again: bool,
}

/// What a poll found, by descriptor.
struct Found {
    device: PollFlags,
    meeting: PollFlags,
    peer: PollFlags,
}

impl Service {
    pub(super) fn new(shared: Arc<Shared>, device: Device, meeting: Meeting) -> Self {
        let phase = match meeting {
            Meeting::Listener(_) => Phase::Alone(None),
            Meeting::Address(_) => Phase::Alone(Some(Instant::now())),
        };
        Self {
            shared,
            device,
            meeting,
            phase,
            back_off: BACK_OFF.0,
            pool: Pool::default(),
            frames: Vec::with_capacity(BATCH),
            again: false,
        }
    }

    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Relaxed) {
            let found = match self.sleep() {
                Ok(found) => found,
                Err(errno) => {
                    tracing::error!("stream {}: poll: {errno}", self.shared.name);
                    break;
                }
            };
            self.again = false;
            if found.device.intersects(PollFlags::ERR | PollFlags::HUP) || !self.host(found.device)
            {
                tracing::info!("stream {}: its device is gone", self.shared.name);
                self.end("its device was deleted");
                self.shared.set_state(State::Gone, "its device was deleted");
                break;
            }
            self.meet(found.meeting, found.peer);
            self.exchange(found.peer);
            self.discard_unread();
        }
        if !matches!(super::lock(&self.shared.state).0, State::Gone) {
            self.end("the stream was deleted");
        }
        self.shared.gone.store(true, Relaxed);
        let pool = &mut self.pool;
        self.shared.out.close(|frame| pool.put(frame));
        self.shared.inbox.close();
        super::signal(&self.shared.inbox.notify().ready);
    }

    /// Waits for something to do.
    fn sleep(&mut self) -> Result<Found, Errno> {
        let shared = &self.shared;
        let none = PollFlags::empty();
        let mut timeout = match &self.phase {
            Phase::Alone(at) => at.map(|at| at.saturating_duration_since(Instant::now())),
            Phase::Connecting { until, .. } => {
                Some(until.saturating_duration_since(Instant::now()))
            }
            Phase::Up { .. } => None,
        };
        if self.again {
            timeout = Some(Duration::ZERO);
        }
        // The host's frames wait in the device while the ring is stopped.
        let host = if shared.out.ring().is_stopped() {
            none
        } else {
            PollFlags::IN
        };
        let mut fds = vec![
            PollFd::new(&shared.wake, PollFlags::IN),
            PollFd::new(&self.device.fd, host),
        ];
        let listening = match &self.meeting {
            Meeting::Listener(listener) => {
                fds.push(PollFd::new(listener, PollFlags::IN));
                1
            }
            Meeting::Address(_) => 0,
        };
        // One look decides what is waited for: the peer, or the datapath, which wakes us by the feeder.
        let inbox = &shared.inbox;
        let paused = inbox.is_stopped() && inbox.notify().feeder.pause(|| inbox.is_stopped());
        match &self.phase {
            Phase::Alone(_) => {}
            Phase::Connecting { socket, .. } => fds.push(PollFd::new(socket, PollFlags::OUT)),
            Phase::Up { connection, .. } => {
                let mut flags = none;
                if !paused {
                    flags |= PollFlags::IN;
                    if connection.reader.holds_frame() {
                        // It has all been read: nothing may come to wake us.
                        timeout = Some(Duration::ZERO);
                    }
                }
                if connection.blocked {
                    flags |= PollFlags::OUT;
                }
                fds.push(PollFd::new(connection.socket(), flags));
            }
        }
        let timeout = timeout.map(|wait| Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Found::none()),
            Err(errno) => return Err(errno),
        }
        let flags = |index: usize| fds.get(index).map_or(none, PollFd::revents);
        let found = Found {
            device: flags(1),
            meeting: if listening == 1 { flags(2) } else { none },
            peer: flags(2 + listening),
        };
        if !flags(0).is_empty() {
            acknowledge(&shared.wake);
        }
        shared.inbox.notify().feeder.go_on();
        Ok(found)
    }

    /// Takes what the host sends to the device. False: the device is no more.
    fn host(&mut self, found: PollFlags) -> bool {
        if !found.contains(PollFlags::IN) {
            return true;
        }
        let shared = &self.shared;
        let mut alive = true;
        for _ in 0..BATCH {
            let mut frame = self.pool.take(shared.longest() + HEADER_BYTES);
            match rustix::io::read(&self.device.fd, frame.space_mut()) {
                Ok(length) => {
                    frame.set_len(length);
                    if frame.pull_front(HEADER_BYTES).is_ok() && frame.len() >= ETHERNET {
                        self.frames.push(frame);
                        continue;
                    }
                    self.pool.put(frame);
                }
                Err(errno) => {
                    self.pool.put(frame);
                    alive = !matches!(errno, Errno::BADFD | Errno::FAULT);
                    if errno != Errno::INTR {
                        break;
                    }
                }
            }
        }
        if !shared.connected.load(Relaxed) {
            let count = self.frames.len() as u64;
            shared.from_host_unconnected.fetch_add(count, Relaxed);
            self.frames.drain(..).for_each(|frame| self.pool.put(frame));
            return alive;
        }
        let count = self.frames.len() as u64;
        shared.from_host.fetch_add(count, Relaxed);
        let pool = &mut self.pool;
        let messages = self.frames.drain(..).filter_map(|mut frame| {
            // The device's MTU keeps them short enough.
            framing::encode(&mut frame).then_some(frame)
        });
        shared.out.enqueue(messages, |frame| pool.put(frame));
        alive
    }

    /// Finds the peer, or loses patience.
    fn meet(&mut self, meeting: PollFlags, peer: PollFlags) {
        if !meeting.is_empty() {
            for _ in 0..ACCEPTS {
                if !self.accept() {
                    break;
                }
            }
        }
        let now = Instant::now();
        match (&self.phase, &self.meeting) {
            (Phase::Alone(Some(at)), Meeting::Address(address)) if *at <= now => {
                match connection::connect(*address) {
                    Ok(socket) => {
                        self.shared.set_state(State::Connecting, "");
                        self.phase = Phase::Connecting {
                            socket,
                            until: now + CONNECT,
                        };
                    }
                    Err(errno) => self.wait_again(&errno.to_string()),
                }
            }
            (Phase::Connecting { until, .. }, _) if !peer.is_empty() || *until <= now => {
                let Phase::Connecting { socket, .. } =
                    std::mem::replace(&mut self.phase, Phase::Alone(None))
                else {
                    return;
                };
                if peer.is_empty() {
                    return self.wait_again("the peer doesn't answer");
                }
                let met = connection::finish(socket)
                    .and_then(|socket| Ok((Connection::new(socket)?, now)));
                match (met, &self.meeting) {
                    (Ok((connection, now)), Meeting::Address(address)) => {
                        let address = *address;
                        self.begin(connection, address, now);
                    }
                    (Ok(_), Meeting::Listener(_)) => {}
                    (Err(errno), _) => self.wait_again(&errno.to_string()),
                }
            }
            _ => {}
        }
    }

    /// One who has connected. False: there is none.
    fn accept(&mut self) -> bool {
        let Meeting::Listener(listener) = &self.meeting else {
            return false;
        };
        match connection::accept(listener) {
            Ok(None) => false,
            Ok(Some((socket, address))) => {
                if matches!(self.phase, Phase::Up { .. }) {
                    self.shared.turned_away.fetch_add(1, Relaxed);
                    return true;
                }
                match Connection::new(socket) {
                    Ok(connection) => self.begin(connection, address, Instant::now()),
                    Err(errno) => self.shared.set_state(State::Waiting, errno.to_string()),
                }
                true
            }
            Err(error) => {
                // No descriptors, no memory: the listener stays readable, so don't spin on it.
                if !matches!(self.phase, Phase::Up { .. }) {
                    self.shared.set_state(State::Waiting, error.to_string());
                }
                std::thread::sleep(Duration::from_millis(10));
                false
            }
        }
    }

    fn begin(&mut self, connection: Connection, peer: std::net::SocketAddr, now: Instant) {
        let shared = &self.shared;
        tracing::info!("stream {}: connected with {peer}", shared.name);
        // What was queued just when the last connection ended.
        let pool = &mut self.pool;
        shared.out.abandon(|frame| pool.put(frame));
        shared.set_state(State::Connected(peer), "");
        shared.connections.fetch_add(1, Relaxed);
        self.phase = Phase::Up {
            connection: Box::new(connection),
            since: now,
        };
        shared.connected.store(true, Relaxed);
        self.carrier(true);
    }

    fn carrier(&self, on: bool) {
        if let Err(errno) = tun::set_carrier(&self.device.fd, on)
            && errno != Errno::BADFD
        {
            tracing::warn!("stream {}: carrier: {errno}", self.shared.name);
        }
    }

    /// There is no peer any more.
    fn end(&mut self, why: &str) {
        let shared = &self.shared;
        shared.connected.store(false, Relaxed);
        if let Phase::Up { since, .. } = &self.phase {
            tracing::info!("stream {}: no peer any more: {why}", shared.name);
            if since.elapsed() >= LASTING {
                self.back_off = BACK_OFF.0;
            }
            self.carrier(false);
        }
        let pool = &mut self.pool;
        shared.out.abandon(|frame| pool.put(frame));
        self.wait_again(why);
    }

    fn wait_again(&mut self, why: &str) {
        self.shared.set_state(State::Waiting, why);
        self.phase = Phase::Alone(match self.meeting {
            Meeting::Listener(_) => None,
            Meeting::Address(_) => {
                let wait = self.back_off;
                self.back_off = (wait * 2).min(BACK_OFF.1);
                Some(Instant::now() + wait)
            }
        });
    }

    /// Sends and receives.
    fn exchange(&mut self, found: PollFlags) {
        let Phase::Up { connection, .. } = &mut self.phase else {
            if !self.shared.out.is_idle() {
                // Queued just when the connection ended.
                let pool = &mut self.pool;
                self.shared.out.abandon(|frame| pool.put(frame));
            }
            return;
        };
        let shared = &self.shared;
        let mut ended = None;
        if found.contains(PollFlags::OUT) {
            connection.blocked = false;
            shared.out.writable();
        }
        let mut sink = ToPeer {
            socket: connection.socket(),
            pool: &mut self.pool,
            error: None,
        };
        let flushed = shared.out.flush(&mut sink);
        let error = sink.error;
        match flushed {
            Flushed::More => self.again = true,
            Flushed::Blocked => connection.blocked = true,
            Flushed::Broken => {
                ended = Some(error.map_or_else(|| String::from("broken"), |e| e.to_string()));
            }
            Flushed::Empty | Flushed::NotOurs => {}
        }
        if ended.is_none() {
            ended = self.receive(found);
        }
        if let Some(why) = ended {
            self.end(&why);
        }
    }

    /// Gives the datapath what the peer sent. Some: the connection has ended, and why.
    fn receive(&mut self, found: PollFlags) -> Option<String> {
        let Phase::Up { connection, .. } = &mut self.phase else {
            return None;
        };
        let shared = &self.shared;
        let mut ended = None;
        let readable = PollFlags::IN | PollFlags::ERR | PollFlags::HUP;
        if found.intersects(readable) && !connection.reader.holds_frame() {
            match connection.read() {
                Read::Bytes | Read::Blocked => {}
                Read::Ended(why) => ended = Some(why),
            }
        } else if found.intersects(PollFlags::ERR | PollFlags::HUP) {
            // Broken while the ring is stopped: what wasn't read is lost with the connection.
            ended = Some(match connection.socket().take_error() {
                Ok(Some(error)) => error.to_string(),
                _ => String::from("the connection broke"),
            });
        }
        let usable = shared.attached.load(Relaxed) && shared.up.load(Relaxed);
        let room = if usable { shared.inbox.room() } else { BATCH };
        let mut refused = Refused::default();
        let longest = shared.longest();
        while self.frames.len() < room.min(BATCH)
            && let Some(frame) = connection
                .reader
                .next(longest, &mut self.pool, &mut refused)
        {
            self.frames.push(frame);
        }
        if refused != Refused::default() {
            shared.runt.fetch_add(refused.runt, Relaxed);
            shared.oversized.fetch_add(refused.oversized, Relaxed);
        }
        let pool = &mut self.pool;
        if usable {
            shared
                .inbox
                .push(self.frames.drain(..), |frame| pool.put(frame));
        } else {
            let count = self.frames.len() as u64;
            shared.unattached.fetch_add(count, Relaxed);
            self.frames.drain(..).for_each(|frame| pool.put(frame));
        }
        ended
    }

    /// Takes back what the datapath will never read.
    fn discard_unread(&mut self) {
        let shared = &self.shared;
        if shared.attached.load(Relaxed) {
            return;
        }
        let pool = &mut self.pool;
        let count = shared.inbox.pop(usize::MAX, |frame| {
            pool.put(frame);
            true
        });
        shared.unattached.fetch_add(count as u64, Relaxed);
    }
}

impl Found {
    fn none() -> Self {
        Self {
            device: PollFlags::empty(),
            meeting: PollFlags::empty(),
            peer: PollFlags::empty(),
        }
    }
}
