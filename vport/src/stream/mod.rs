//! Stream ports: Ethernet frames over a TCP connection, each behind its length (16 bits, big-endian).
//!
//! # Contract
//! - [`Streams::add`] makes a device of the stream's name, so that Open vSwitch can take it as a port of type
//!   `system` (its carrier is the connection's), and keeps connecting, or listening, until the stream is
//!   deleted. One peer at a time: who connects beside it is sent away.
//! - What the datapath sends to the port, and what the host sends to the device, goes to the peer. What the
//!   peer sends goes to the datapath, and nowhere if the device is no port. The host's stack gets nothing.
//! - The datapath never waits: it appends to a bounded queue ([`ring::Deferred`](crate::ring::Deferred)),
//!   and the stream's own thread sends. A frame without room, or without a connection, is refused.
//! - What is queued when the connection ends is dropped and counted: it is old when there is another.
//! - A datapath that doesn't keep up with the peer stops the stream from being read, so that TCP slows the
//!   peer down; nothing is dropped in between.
//! - Nobody is authenticated and nothing encrypted.
//!
//! # Loss, and where it is counted
//! [`StreamStatus`] has all of it; `tx.enqueued = tx.sent + tx.dropped_full + tx.dropped_close` plus what waits.
//!
//! - `framing`: frames in a stream of bytes; `connection`: TCP; `service`: the thread; `port`: what the
//!   datapath sees.

mod connection;
mod framing;
mod port;
mod service;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use frame::Frame;
use rustix::event::{EventfdFlags, eventfd};

use crate::error::Error;
use crate::link;
use crate::port::{Port, Resume};
use crate::ring::{self, Deferred, Feeder, Notify, Ring, deferred};

/// How many frames may wait for the peer, unless told otherwise.
pub const DEFAULT_RING: usize = 1000;
/// How many frames may wait for the datapath.
const INBOX: usize = 512;
/// The most frames a ring may have room for.
pub const MAX_RING: usize = 1 << 16;

/// How a stream finds its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// It waits for the peer at this address.
    Listen(SocketAddr),
    /// It connects to the peer there, again and again.
    Connect(SocketAddr),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listen(address) => write!(f, "listen {address}"),
            Self::Connect(address) => write!(f, "connect {address}"),
        }
    }
}

/// What a new stream is to be.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// How it finds its peer.
    pub endpoint: Endpoint,
    /// How many frames may wait for the peer: at least 1.
    pub ring: usize,
    /// A full ring stops what feeds it, instead of dropping.
    pub backpressure: bool,
}

/// What a stream does just now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It has no peer: it listens, or waits to connect again.
    #[default]
    Waiting,
    /// It has begun to connect.
    Connecting,
    /// It has a peer.
    Connected(SocketAddr),
    /// Its device was deleted by somebody else: nothing will come of it any more.
    Gone,
}

/// A stream, as `stream list` shows it.
#[derive(Clone, Debug)]
pub struct StreamStatus {
    /// The device's name when it was made.
    pub name: String,
    /// The device's ifindex.
    pub ifindex: u32,
    /// How it finds its peer.
    pub endpoint: Endpoint,
    /// What it does.
    pub state: State,
    /// Why it isn't connected, or the last connection ended; empty if there is nothing to be said.
    pub reason: String,
    /// Whether the device is a port of a datapath.
    pub attached: bool,
    /// Connections so far.
    pub connections: u64,
    /// Who connected while there was a peer, and was sent away.
    pub turned_away: u64,
    /// Towards the peer.
    pub tx: deferred::Counters,
    /// The ring in front of the peer.
    pub tx_ring: ring::Counters,
    /// Its places.
    pub tx_ring_size: usize,
    /// Frames in it.
    pub tx_ring_len: usize,
    /// Whether it stops what feeds it.
    pub backpressure: bool,
    /// Frames that the host sent to the device, and that were given to the queue.
    pub from_host: u64,
    /// Frames that the host sent while there was no peer.
    pub from_host_unconnected: u64,
    /// The ring in front of the datapath: `produced` is what the peer sent and could be used.
    pub rx_ring: ring::Counters,
    /// Its places.
    pub rx_ring_size: usize,
    /// Frames in it.
    pub rx_ring_len: usize,
    /// What the peer sent that is shorter than an Ethernet header.
    pub rx_runt: u64,
    /// What the peer sent that is longer than the device takes.
    pub rx_oversized: u64,
    /// What the peer sent while the device was no port of a datapath, or down.
    pub rx_unattached: u64,
}

/// The far end of the ring towards the peer.
struct Outward {
    /// Wakes the stream's thread.
    wake: OwnedFd,
    /// The thread itself feeds the ring too.
    resume: Mutex<Option<Resume>>,
}

impl Notify for Outward {
    fn resume(&self) {
        signal(&self.wake);
        let resume = lock(&self.resume).clone();
        if let Some(resume) = resume {
            resume();
        }
    }
    fn work(&self) {
        signal(&self.wake);
    }
}

/// The far end of the ring towards the datapath.
struct Inward {
    /// Readable when there is something for the worker.
    ready: OwnedFd,
    /// Wakes the stream's thread, which pauses as this.
    wake: OwnedFd,
    feeder: Feeder,
}

impl Notify for Inward {
    fn resume(&self) {
        if self.feeder.wakes() {
            signal(&self.wake);
        }
    }
    fn work(&self) {
        signal(&self.ready);
    }
}

/// What the thread, the port and its queue share. Not the device's descriptor: the device goes with the
/// thread.
struct Shared {
    name: String,
    ifindex: u32,
    endpoint: Endpoint,
    mtu: AtomicU32,
    up: AtomicBool,
    connected: AtomicBool,
    attached: AtomicBool,
    gone: AtomicBool,
    stop: AtomicBool,
    wake: OwnedFd,
    out: Deferred<Frame, Outward>,
    inbox: Ring<Frame, Inward>,
    state: Mutex<(State, String)>,
    connections: AtomicU64,
    turned_away: AtomicU64,
    from_host: AtomicU64,
    from_host_unconnected: AtomicU64,
    runt: AtomicU64,
    oversized: AtomicU64,
    unattached: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal(event: &OwnedFd) {
    // An eventfd refuses only at 2^64 - 1 unread signals, and is readable then.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

fn acknowledge(event: &OwnedFd) {
    // EAGAIN: there was no signal.
    let _ = rustix::io::read(event, &mut [0_u8; 8]);
}

impl Shared {
    fn longest(&self) -> usize {
        // Two tags besides the MTU's worth.
        (self.mtu.load(Relaxed) as usize).saturating_add(framing::ETHERNET + 8)
    }

    fn set_state(&self, state: State, reason: impl Into<String>) {
        *lock(&self.state) = (state, reason.into());
    }

    fn set_ring(&self, size: Option<usize>, backpressure: Option<bool>) -> Result<(), Error> {
        if let Some(size) = size.filter(|size| !(1..=MAX_RING).contains(size)) {
            return Err(Error::new(
                libc::EINVAL,
                format!("a ring of {size} (1 to {MAX_RING} frames)"),
            ));
        }
        let ring = self.out.ring();
        if let Some(size) = size {
            ring.resize(size, drop);
        }
        if let Some(on) = backpressure {
            ring.set_backpressure(on);
        }
        Ok(())
    }

    fn status(&self) -> StreamStatus {
        let (state, reason) = lock(&self.state).clone();
        let ring = self.out.ring();
        StreamStatus {
            name: self.name.clone(),
            ifindex: self.ifindex,
            endpoint: self.endpoint,
            state,
            reason,
            attached: self.attached.load(Relaxed),
            connections: self.connections.load(Relaxed),
            turned_away: self.turned_away.load(Relaxed),
            tx: self.out.counters(),
            tx_ring: ring.counters(),
            tx_ring_size: ring.size(),
            tx_ring_len: ring.len(),
            backpressure: ring.has_backpressure(),
            from_host: self.from_host.load(Relaxed),
            from_host_unconnected: self.from_host_unconnected.load(Relaxed),
            rx_ring: self.inbox.counters(),
            rx_ring_size: self.inbox.size(),
            rx_ring_len: self.inbox.len(),
            rx_runt: self.runt.load(Relaxed),
            rx_oversized: self.oversized.load(Relaxed),
            rx_unattached: self.unattached.load(Relaxed),
        }
    }
}

struct Stream {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        signal(&self.shared.wake);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(
                "stream {}: its thread had ended by a panic",
                self.shared.name
            );
        }
    }
}

/// All streams of a daemon.
#[derive(Default)]
pub struct Streams {
    streams: Mutex<BTreeMap<String, Stream>>,
}

impl Streams {
    /// Makes the device and begins to look for the peer. The device is there, up and without a carrier, when
    /// this returns. In the calling thread's network namespace.
    ///
    /// # Errors
    /// `EEXIST`: there is a stream or a device of that name. `EINVAL`: a bad name or ring size. `EADDRINUSE`,
    /// `EADDRNOTAVAIL`: can't listen there. `ENODEV`, `EPERM`: no TAP devices for us.
    pub fn add(&self, name: &str, options: &StreamOptions) -> Result<(), Error> {
        if !link::is_valid_name(name) || name.contains('%') {
            return Err(Error::new(
                libc::EINVAL,
                format!("{name:?} can't be a device's name"),
            ));
        }
        if options.ring == 0 || options.ring > MAX_RING {
            return Err(Error::new(
                libc::EINVAL,
                format!("a ring of {} (1 to {MAX_RING} frames)", options.ring),
            ));
        }
        let mut streams = lock(&self.streams);
        // One whose device is gone makes room.
        if let Some(old) = streams.get(name) {
            if !old.shared.gone.load(Relaxed) {
                return Err(Error::new(libc::EEXIST, format!("stream {name}")));
            }
            streams.remove(name);
        }
        let no_descriptor = |errno| Error::os(errno, format!("stream {name}"));
        let event =
            || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(no_descriptor);
        let same = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|error| Error::io(&error, format!("stream {name}")))
        };
        let meeting = connection::Meeting::new(options.endpoint)?;
        let device = service::Device::create(name)?;
        let wake = event()?;
        let outward = Outward {
            wake: same(&wake)?,
            resume: Mutex::new(None),
        };
        let inward = Inward {
            ready: event()?,
            wake: same(&wake)?,
            feeder: Feeder::new(),
        };
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            ifindex: device.link.index,
            endpoint: options.endpoint,
            mtu: AtomicU32::new(device.link.mtu),
            up: AtomicBool::new(true),
            connected: AtomicBool::new(false),
            attached: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            wake,
            out: Deferred::new(Ring::new(options.ring, options.backpressure, outward)),
            inbox: Ring::new(INBOX, true, inward),
            state: Mutex::default(),
            connections: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            from_host: AtomicU64::new(0),
            from_host_unconnected: AtomicU64::new(0),
            runt: AtomicU64::new(0),
            oversized: AtomicU64::new(0),
            unattached: AtomicU64::new(0),
        });
        let service = service::Service::new(Arc::clone(&shared), device, meeting);
        let thread = std::thread::Builder::new()
            .name(format!("stream-{name}"))
            .spawn(move || service.run())
            .map_err(|error| Error::io(&error, format!("stream {name}")))?;
        let thread = Some(thread);
        streams.insert(name.to_owned(), Stream { shared, thread });
        Ok(())
    }

    /// Ends a stream; its device is gone when this returns.
    ///
    /// # Errors
    /// `ENOENT`: there is none of that name.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let stream = lock(&self.streams).remove(name);
        match stream {
            Some(_ended_when_dropped) => Ok(()),
            None => Err(Error::new(libc::ENOENT, format!("stream {name}"))),
        }
    }

    /// Ends all.
    pub fn clear(&self) {
        let all = std::mem::take(&mut *lock(&self.streams));
        for stream in all.values() {
            stream.shared.stop.store(true, Relaxed);
            signal(&stream.shared.wake);
        }
    }

    /// All, by name.
    pub fn list(&self) -> Vec<StreamStatus> {
        let streams = lock(&self.streams);
        streams.values().map(|s| s.shared.status()).collect()
    }

    /// Changes the ring in front of a stream's peer. What is None stays.
    ///
    /// # Errors
    /// `ENOENT`: there is none of that name. `EINVAL`: a bad size.
    pub fn set(
        &self,
        name: &str,
        ring: Option<usize>,
        backpressure: Option<bool>,
    ) -> Result<(), Error> {
        let streams = lock(&self.streams);
        let stream = streams
            .get(name)
            .ok_or_else(|| Error::new(libc::ENOENT, format!("stream {name}")))?;
        stream.shared.set_ring(ring, backpressure)
    }

    /// A port on the stream whose device has that name now, if there is one.
    pub fn port_named(&self, name: &str) -> Option<Box<dyn Port>> {
        if lock(&self.streams).is_empty() {
            return None;
        }
        self.port(link::by_name(name).ok()?.index)
    }

    fn port(&self, ifindex: u32) -> Option<Box<dyn Port>> {
        let streams = lock(&self.streams);
        let stream = streams.values().find(|s| s.shared.ifindex == ifindex)?;
        let port = port::StreamPort::new(Arc::clone(&stream.shared));
        drop(streams);
        // Nobody followed the device so far. Should it have gone, the queue will tell.
        if let Err(error) = port.link() {
            tracing::debug!("{error}");
        }
        Some(Box::new(port))
    }
}
