//! Accepting: who is there, and are we meant?
//!
//! A connection has [`PATIENCE`] to say hello. Only so many may be silent at a time, fewest of those
//! without privilege, so that none of them can keep others out.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use super::census::Census;
use super::prompt::Mailbox;
use super::{drain, waker};
use crate::connection::{Connection, SEND_BUFFER};
use crate::handler::Handler;
use crate::hub::Hub;
use crate::quiet::Quiet;
use crate::service::Protocol;
use crate::sys::{self, Credentials};
use crate::transport::{HELLO_LEN, Hello, Netns, Status, VERSION, Welcome};

/// How long a connection may be silent before its hello.
const PATIENCE: Duration = Duration::from_secs(3);
/// How many connections may be silent.
const SILENT: usize = 512;
/// How many of them may be without privilege.
const SILENT_UNPRIVILEGED: usize = 128;
/// How many of one user without privilege.
const SILENT_USER: usize = 16;
/// Accepted in one turn.
const ACCEPTS: usize = 64;

const LISTENER: u64 = u64::MAX;
const WAKER: u64 = u64::MAX - 1;

/// What it takes to be welcome.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) netns: Netns,
    pub(super) instance: u64,
    pub(super) group: Option<u32>,
}

impl Rules {
    /// What it is to speak, or why not.
    fn check(&self, hello: &Hello, handler: &dyn Handler) -> Result<Protocol, Status> {
        if hello.version != VERSION {
            Err(Status::OtherVersion)
        } else if hello.netns != self.netns || hello.netns == (Netns { dev: 0, ino: 0 }) {
            Err(Status::OtherNetns)
        } else {
            Protocol::from_number(hello.protocol)
                .filter(|protocol| {
                    *protocol == Protocol::Generic || handler.service(*protocol).is_some()
                })
                .ok_or(Status::OtherProtocol)
        }
    }

    fn welcome(&self, status: Status, port_id: u32) -> Welcome {
        Welcome {
            version: VERSION,
            status,
            port_id,
            netns: self.netns,
            instance: self.instance,
        }
    }

    /// Root or the daemon's own user (both as seen from the daemon's user namespace), or a member of
    /// the group.
    fn is_privileged(&self, socket: &OwnedFd, credentials: Credentials) -> bool {
        super::may_change(socket.as_fd(), credentials, self.group)
    }
}

struct Silent {
    socket: OwnedFd,
    credentials: Credentials,
    privileged: bool,
    deadline: Instant,
}

/// The thread `nl-hello`.
pub(super) struct Greeter {
    listener: OwnedFd,
    rules: Rules,
    hub: Hub,
    handler: Arc<dyn Handler>,
    prompts: Vec<Arc<Mailbox>>,
    census: Arc<Census>,
    stop: Arc<AtomicBool>,
    poll: OwnedFd,
    waker: Arc<OwnedFd>,
    silent: HashMap<u64, Silent>,
    next: u64,
    /// Given up for a moment to refuse a connection when there are no descriptors left.
    spare: Option<OwnedFd>,
    refusals: Quiet,
}

impl Greeter {
    pub(super) fn new(
        listener: OwnedFd,
        rules: Rules,
        hub: Hub,
        handler: Arc<dyn Handler>,
        prompts: Vec<Arc<Mailbox>>,
        census: Arc<Census>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let waker = Arc::new(waker()?);
        let flags = epoll::EventFlags::IN;
        epoll::add(&poll, &listener, epoll::EventData::new_u64(LISTENER), flags)?;
        epoll::add(&poll, &*waker, epoll::EventData::new_u64(WAKER), flags)?;
        Ok(Self {
            listener,
            rules,
            hub,
            handler,
            prompts,
            census,
            stop,
            poll,
            waker,
            silent: HashMap::new(),
            next: 0,
            spare: super::waker().ok(),
            refusals: Quiet::default(),
        })
    }

    pub(super) fn waker(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.waker)
    }

    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        while !self.stop.load(Ordering::Acquire) {
            events.clear();
            let timeout = self.patience_left();
            let room = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.poll, room, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!("epoll_wait: {errno}; no new clients");
                    return;
                }
            }
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    WAKER => drain(&self.waker),
                    key => self.hear(key),
                }
            }
            let now = Instant::now();
            self.silent.retain(|_, silent| silent.deadline > now);
        }
    }

    /// Until the first deadline; None if nobody is silent.
    fn patience_left(&self) -> Option<rustix::event::Timespec> {
        let first = self.silent.values().map(|silent| silent.deadline).min()?;
        let left = first.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        left.try_into().ok()
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => self.receive(socket),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(errno) => {
                    // No descriptors: without this the listener would stay readable for ever.
                    self.spare = None;
                    let refused = rustix::net::accept_with(&self.listener, flags).is_ok();
                    self.spare = waker().ok();
                    self.refusals
                        .say(|| tracing::warn!("accept: {errno}; client refused"));
                    if !refused {
                        std::thread::sleep(Duration::from_millis(10));
                        return;
                    }
                }
            }
        }
    }

    fn receive(&mut self, socket: OwnedFd) {
        let Ok(credentials) = sys::peer_credentials(socket.as_fd()) else {
            return;
        };
        let privileged = self.rules.is_privileged(&socket, credentials);
        if !self.has_room(credentials, privileged) {
            self.refuse(&socket, credentials, Status::Full);
            return;
        }
        // Usually the hello is there already.
        let key = self.next;
        self.next += 1;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        if epoll::add(&self.poll, &socket, epoll::EventData::new_u64(key), flags).is_err() {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        self.silent.insert(
            key,
            Silent {
                socket,
                credentials,
                privileged,
                deadline,
            },
        );
    }

    fn has_room(&self, credentials: Credentials, privileged: bool) -> bool {
        if self.silent.len() >= SILENT {
            return false;
        }
        if privileged {
            return true;
        }
        let others = || self.silent.values().filter(|silent| !silent.privileged);
        others().count() < SILENT_UNPRIVILEGED
            && others()
                .filter(|silent| silent.credentials.uid == credentials.uid)
                .count()
                < SILENT_USER
    }

    /// A silent connection has said something.
    fn hear(&mut self, key: u64) {
        let Some(silent) = self.silent.get(&key) else {
            return;
        };
        let mut bytes = [0; HELLO_LEN];
        let heard = match rustix::net::recv(&silent.socket, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((len, _)) => Hello::parse(bytes.get(..len).unwrap_or_default()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            Err(_) => None,
        };
        let Some(silent) = self.silent.remove(&key) else {
            return;
        };
        let _ = epoll::delete(&self.poll, &silent.socket);
        // What is no hello gets no answer.
        let Some(hello) = heard else { return };
        match self.rules.check(&hello, &*self.handler) {
            Ok(protocol) => self.admit(silent, protocol),
            Err(status) => self.refuse(&silent.socket, silent.credentials, status),
        }
    }

    fn admit(&mut self, silent: Silent, protocol: Protocol) {
        let Silent {
            socket,
            credentials,
            privileged,
            ..
        } = silent;
        if !self.census.enter(credentials, privileged) {
            self.refuse(&socket, credentials, Status::Full);
            return;
        }
        // Fails only if the system's limit is lower, which is no reason to refuse.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER);
        let place = self.hub.len() % self.prompts.len().max(1);
        let Some(prompt) = self.prompts.get(place) else {
            return;
        };
        let client = self.hub.admit(|port_id| {
            Connection::new(
                port_id,
                socket,
                Arc::clone(prompt.poll()),
                credentials,
                privileged,
                protocol,
            )
        });
        // First the welcome: it is the first datagram. Its thread adopts the client at the first
        // event; if watching it fails there will be none.
        client.send_one(&self.rules.welcome(Status::Ok, client.port_id).to_bytes());
        if let Err(error) = client.watch() {
            tracing::error!("epoll_ctl: {error}; client refused");
            self.hub.dismiss(&client);
            client.close();
            self.census.leave(credentials, privileged);
        }
    }

    fn refuse(&self, socket: &OwnedFd, credentials: Credentials, status: Status) {
        self.refusals.say(|| {
            let Credentials { pid, uid, .. } = credentials;
            tracing::info!("client refused (process {pid}, user {uid}): {status:?}");
        });
        let welcome = self.rules.welcome(status, 0).to_bytes();
        // The other end may be gone; the connection ends anyway.
        let _ = rustix::net::send(socket, &welcome, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}
