//! Answers questions about the daemon: the status as JSON, the metrics by HTTP.
//!
//! # Contract
//! One thread serves all who ask and waits for none of them. Each listener has [`ASKERS`] connections at
//! a time, of which the oldest gives way to a new one; each connection has [`PATIENCE`] from its beginning
//! to its end. So a client that doesn't read, or doesn't ask, keeps nobody waiting and holds nothing for
//! long. Forwarding knows nothing of it.

mod http;

use std::collections::VecDeque;
use std::fs::Permissions;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use datapath::daemon::Daemon;
use datapath::status::Status;
use netlink::quiet::Quiet;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags, accept_with, recv, send, shutdown};
use tracing::warn;

/// Connections of a listener at a time.
const ASKERS: usize = 16;
/// How long a connection may last.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// JSON, at once, to whoever connects.
    Status,
    /// Prometheus' text, by HTTP.
    Metrics,
}

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// TCP.
    Inet(SocketAddr),
    /// A UNIX socket: anything with a slash.
    Unix(PathBuf),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        text.parse().map(Self::Inet).map_err(|_| {
            format!(
                "{text:?} is neither an address with a port, as 127.0.0.1:9475 or [::1]:9475, nor the \
                 path of a UNIX socket, with a slash"
            )
        })
    }
}

struct Listener {
    socket: OwnedFd,
    service: Service,
    askers: VecDeque<Asker>,
    refusals: Quiet,
}

/// The listeners, until [`Answers::serve`].
#[derive(Default)]
pub struct Answers {
    listeners: Vec<Listener>,
}

impl Answers {
    /// Answers `status` at that path.
    ///
    /// # Errors
    /// It can't be listened there.
    pub fn status_at(&mut self, path: &Path) -> Result<()> {
        // Left by a daemon that is dead: we hold the directory's lock.
        crate::run::remove_file(path);
        self.listen_at(path, Service::Status)
    }

    /// Serves metrics at that address.
    ///
    /// # Errors
    /// It can't be listened there.
    pub fn metrics_at(&mut self, address: &MetricsAddress) -> Result<()> {
        match address {
            MetricsAddress::Inet(address) => {
                let socket = TcpListener::bind(address)
                    .with_context(|| format!("can't serve metrics on {address}"))?;
                self.add(socket.into(), Service::Metrics)
            }
            MetricsAddress::Unix(path) => {
                remove_stale(path)?;
                self.listen_at(path, Service::Metrics)
            }
        }
    }

    fn listen_at(&mut self, path: &Path, service: Service) -> Result<()> {
        let socket = UnixListener::bind(path)
            .with_context(|| format!("can't listen on {}", path.display()))?;
        // Reading is open to all, as GET requests are.
        std::fs::set_permissions(path, Permissions::from_mode(0o666))
            .with_context(|| format!("can't open {} to all", path.display()))?;
        self.add(socket.into(), service)
    }

    fn add(&mut self, socket: OwnedFd, service: Service) -> Result<()> {
        rustix::io::ioctl_fionbio(&socket, true).context("can't set up a listener")?;
        self.listeners.push(Listener {
            socket,
            service,
            askers: VecDeque::new(),
            refusals: Quiet::default(),
        });
        Ok(())
    }

    /// Answers until the process ends.
    pub fn serve(mut self, daemon: &Daemon) {
        loop {
            if let Err(errno) = self.wait() {
                warn!("status and metrics: poll: {errno}");
                std::thread::sleep(Duration::from_millis(100));
            }
            for listener in &mut self.listeners {
                listener.accept(daemon);
                let service = listener.service;
                let now = Instant::now();
                listener
                    .askers
                    .retain_mut(|asker| asker.goes_on(now, service, daemon));
            }
        }
    }

    fn wait(&self) -> Result<(), Errno> {
        let askers = self.listeners.iter().flat_map(|listener| &listener.askers);
        let first = askers.clone().map(|asker| asker.deadline).min();
        let listeners = self.listeners.iter();
        let mut fds: Vec<PollFd<'_>> = listeners
            .map(|listener| PollFd::new(&listener.socket, PollFlags::IN))
            .chain(askers.map(|asker| PollFd::new(&asker.socket, asker.stage.waits_for())))
            .collect();
        let timeout = first.map(|first| {
            let left = first.saturating_duration_since(Instant::now());
            let left = left + Duration::from_millis(1);
            rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

impl Listener {
    fn accept(&mut self, daemon: &Daemon) {
        // No more than there is room for: those who wait are served in the next round.
        for _ in 0..ASKERS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match accept_with(&self.socket, flags) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(errno) => {
                    // No descriptors, most likely; the listener stays readable meanwhile.
                    self.refusals
                        .say(|| warn!("status and metrics: accept: {errno}"));
                    self.askers.pop_front();
                    std::thread::sleep(Duration::from_millis(10));
                    return;
                }
            };
            if self.askers.len() >= ASKERS {
                self.askers.pop_front();
            }
            self.askers
                .push_back(Asker::new(socket, self.service, daemon));
        }
    }
}

enum Stage {
    /// HTTP: what came of the request.
    Asking(Vec<u8>),
    /// What is to be sent, and how much of it has been.
    Answered(Vec<u8>, usize),
    /// Sent; what still comes is read, so that a reset doesn't overtake the answer.
    Parting,
}

impl Stage {
    fn waits_for(&self) -> PollFlags {
        match self {
            Self::Asking(_) | Self::Parting => PollFlags::IN,
            Self::Answered(..) => PollFlags::OUT,
        }
    }
}

struct Asker {
    socket: OwnedFd,
    deadline: Instant,
    stage: Stage,
}

impl Asker {
    fn new(socket: OwnedFd, service: Service, daemon: &Daemon) -> Self {
        let stage = match service {
            Service::Status => Stage::Answered(json(daemon), 0),
            Service::Metrics => Stage::Asking(Vec::new()),
        };
        Self {
            socket,
            deadline: Instant::now() + PATIENCE,
            stage,
        }
    }

    /// Does what can be done without waiting. False: it is over.
    fn goes_on(&mut self, now: Instant, service: Service, daemon: &Daemon) -> bool {
        if now >= self.deadline {
            return false;
        }
        loop {
            let step = match &mut self.stage {
                Stage::Asking(request) => match receive(&self.socket, request) {
                    Ok(0) => return false,
                    Ok(_) => {
                        if let Some(answer) = http::answer(request, || metrics(daemon)) {
                            self.stage = Stage::Answered(answer, 0);
                        }
                        Ok(())
                    }
                    Err(errno) => Err(errno),
                },
                Stage::Answered(bytes, sent) => {
                    let rest = bytes.get(*sent..).unwrap_or_default();
                    if rest.is_empty() {
                        if service == Service::Status
                            || shutdown(&self.socket, Shutdown::Write).is_err()
                        {
                            return false;
                        }
                        self.stage = Stage::Parting;
                        continue;
                    }
                    send(&self.socket, rest, SendFlags::NOSIGNAL).map(|n| *sent += n)
                }
                Stage::Parting => match receive(&self.socket, &mut Vec::new()) {
                    Ok(0) => return false,
                    Ok(_) => Ok(()),
                    Err(errno) => Err(errno),
                },
            };
            match step {
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                Err(_gone) => return false,
            }
        }
    }
}

fn receive(socket: &OwnedFd, into: &mut Vec<u8>) -> Result<usize, Errno> {
    let mut bytes = [0; 1024];
    let (length, _) = recv(socket, &mut bytes, RecvFlags::empty())?;
    into.extend_from_slice(bytes.get(..length).unwrap_or_default());
    Ok(length)
}

fn json(daemon: &Daemon) -> Vec<u8> {
    serde_json::to_vec(&Status::of(daemon)).unwrap_or_else(|error| {
        warn!("status: {error}");
        Vec::new()
    })
}

fn metrics(daemon: &Daemon) -> String {
    crate::metrics::render(&Status::of(daemon))
}

/// Removes a socket on which nobody listens.
fn remove_stale(path: &Path) -> Result<()> {
    let is_socket = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta.file_type().is_socket(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    if !is_socket {
        bail!("can't serve metrics on {}: it is no socket", path.display());
    }
    if UnixStream::connect(path).is_ok() {
        bail!(
            "can't serve metrics on {}: somebody else does",
            path.display()
        );
    }
    std::fs::remove_file(path).with_context(|| format!("can't remove {}", path.display()))
}

/// Starts the thread that answers.
pub fn start(answers: Answers, daemon: &Arc<Daemon>) -> Result<()> {
    let daemon = Arc::clone(daemon);
    crate::run::spawn("status", move || answers.serve(&daemon))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_of_tcp_or_a_path() {
        let of = |text: &str| text.parse::<MetricsAddress>();
        let inet = |text: &str| MetricsAddress::Inet(text.parse().unwrap());
        assert_eq!(of("127.0.0.1:9475"), Ok(inet("127.0.0.1:9475")));
        assert_eq!(of("[::]:1"), Ok(inet("[::]:1")));
        assert_eq!(of("./m.sock"), Ok(MetricsAddress::Unix("./m.sock".into())));
        for text in ["", "9475", ":9475", "localhost:9475", "127.0.0.1"] {
            assert!(of(text).is_err(), "{text:?}");
        }
    }
}
