//! The server: a listening socket, and the threads that serve its clients.
//!
//! # Threads
//! - `nl-hello` accepts connections, receives their hello, and refuses whom it must.
//! - `nl-prompt-N` read requests, answer them, go on with dumps and with what waits for a client. A
//!   connection belongs to one of them for its life.
//! - `nl-config` runs requests that may sleep, one after the other; `nl-long` those that take long.
//!
//! None of them waits for a client: what a client does or doesn't do bounds only its own service.
//! Per turn a client gets a bounded number of messages; the others' turns come before its next.
//!
//! # Locks
//! Innermost: a connection's outbox. The registries of [`Hub`], a thread's inbox and the census are
//! held for a few instructions, and nothing is called under them.

mod census;
mod configuration;
mod hello;
mod prompt;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::handler::Handler;
use crate::hub::Hub;
use crate::links::Links;
use crate::sys::{self, Credentials};
use crate::transport::{self, Netns};
use census::Census;
pub use census::Limits;
use prompt::Prompt;

/// Name of the lock file in the run directory.
const LOCK_NAME: &str = "ovs-dpd.lock";

/// Whether the peer of a UNIX connection may change state: root or the daemon's own user (both as seen from
/// the daemon's user namespace), or a member of `group`.
///
/// # Errors
/// Not a UNIX connection.
pub fn peer_may_change(socket: BorrowedFd<'_>, group: Option<u32>) -> io::Result<bool> {
    let credentials = sys::peer_credentials(socket)?;
    Ok(may_change(socket, credentials, group))
}

fn may_change(socket: BorrowedFd<'_>, credentials: Credentials, group: Option<u32>) -> bool {
    credentials.uid == 0
        || credentials.uid == rustix::process::geteuid().as_raw()
        || group.is_some_and(|group| {
            credentials.gid == group
                || sys::peer_groups(socket).is_ok_and(|groups| groups.contains(&group))
        })
}

/// What a server needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Run directory: made if it isn't there.
    pub run_dir: PathBuf,
    /// Members of this group (also supplementary) may change state.
    pub group: Option<u32>,
    /// Prompt threads; 0: as many as CPUs, at most 4.
    pub threads: usize,
    /// How many may connect.
    pub limits: Limits,
}

impl Config {
    /// The defaults for this run directory.
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        Self {
            run_dir: run_dir.into(),
            group: None,
            threads: 0,
            limits: Limits::default(),
        }
    }
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another daemon is alive.
    #[error("another daemon{} is running on {}", .pid.map_or_else(String::new, |pid| format!(" (process {pid})")), .run_dir.display())]
    Occupied {
        /// Where.
        run_dir: PathBuf,
        /// Its process id, if it wrote one down.
        pid: Option<u32>,
    },
    /// The run directory is someone else's, who could put another socket there.
    #[error("{} belongs to user {owner}, or others may write to it", .run_dir.display())]
    Insecure {
        /// Where.
        run_dir: PathBuf,
        /// Whose.
        owner: u32,
    },
    /// A system call failed.
    #[error("{what} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A socket that listens; nobody is served yet.
#[derive(Debug)]
pub struct Server {
    config: Config,
    hub: Hub,
    links: Links,
    listener: OwnedFd,
    netns: Netns,
    /// Held for as long as the daemon lives; the kernel gives it up when it dies.
    lock: File,
}

impl Server {
    /// Makes the run directory and its socket. A socket that a dead daemon left is replaced.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(config: Config) -> Result<Self, BindError> {
        let dir = config.run_dir.as_path();
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| BindError::Io { what, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .map_err(failed("making the run directory", dir))?;
        let metadata = fs::metadata(dir).map_err(failed("looking at", dir))?;
        let owner = metadata.uid();
        if owner != rustix::process::geteuid().as_raw() || metadata.mode() & 0o002 != 0 {
            return Err(BindError::Insecure {
                run_dir: dir.to_owned(),
                owner,
            });
        }
        let lock = take_lock(dir)?;
        let path = dir.join(transport::SOCKET_NAME);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("removing the old socket", &path)(error));
            }
            _ => {}
        }
        let links = Links::prepare(dir).map_err(failed("making the links' marks in", dir))?;
        let listener = listen(&path).map_err(failed("listening on", &path))?;
        // Anyone may ask; who may change state is decided by credentials.
        fs::set_permissions(&path, Permissions::from_mode(0o666))
            .map_err(failed("opening to all", &path))?;
        let namespace = Path::new("/proc/thread-self/ns/net");
        let netns = fs::metadata(namespace).map_err(failed("looking at", namespace))?;
        let netns = Netns {
            dev: netns.dev(),
            ino: netns.ino(),
        };
        let span = transport::PORT_ID_LAST - transport::PORT_ID_FIRST + 1;
        let hub = Hub::new(random() as u32 % span);
        Ok(Self {
            config,
            hub,
            links,
            listener,
            netns,
            lock,
        })
    }

    /// Where upcalls and notifications go.
    pub fn hub(&self) -> Hub {
        self.hub.clone()
    }

    /// Marks of the links that a service for [`Protocol::Route`](crate::service::Protocol::Route) has.
    pub fn links(&self) -> Links {
        self.links.clone()
    }

    /// Takes back what [`Server::bind`] made in the run directory, the lock file last: for who serves
    /// nobody. A daemon that starts in that moment finds either the lock held or no lock file.
    ///
    /// # Errors
    /// A file can't be removed.
    pub fn remove(self) -> io::Result<()> {
        let dir = &self.config.run_dir;
        let gone = |removed: io::Result<()>| match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        gone(fs::remove_file(dir.join(transport::SOCKET_NAME)))?;
        gone(fs::remove_dir_all(dir.join(transport::LINKS_NAME)))?;
        // Held until `self` goes: whoever has opened it meanwhile sees that it is another's.
        gone(fs::remove_file(dir.join(LOCK_NAME)))
    }

    /// Starts to serve.
    ///
    /// # Errors
    /// A thread or one of its descriptors couldn't be made; nobody is served then.
    pub fn serve(self, handler: Arc<dyn Handler>) -> io::Result<Running> {
        let Self {
            config,
            hub,
            links: _,
            listener,
            netns,
            lock,
        } = self;
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let threads = if config.threads == 0 {
            cpus.min(4)
        } else {
            config.threads
        };
        let census = Arc::new(Census::new(config.limits));
        let close = Arc::new(AtomicBool::new(false));
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Running {
            hub: hub.clone(),
            handler: Arc::clone(&handler),
            socket: config.run_dir.join(transport::SOCKET_NAME),
            close: Arc::clone(&close),
            stop: Arc::clone(&stop),
            wakers: Vec::new(),
            jobs: None,
            hello: None,
            lanes: Vec::new(),
            prompts: Vec::new(),
            _lock: lock,
        };
        let (jobs, lanes) = configuration::start(&hub, &handler)?;
        running.jobs = Some(jobs.clone());
        running.lanes.extend(lanes);
        let mut mailboxes = Vec::new();
        for index in 0..threads {
            let (prompt, mailbox) = Prompt::new(
                hub.clone(),
                Arc::clone(&handler),
                jobs.clone(),
                Arc::clone(&census),
                Arc::clone(&stop),
            )?;
            running.wakers.push(Arc::clone(mailbox.waker()));
            mailboxes.push(mailbox);
            let spawned = thread::Builder::new()
                .name(format!("nl-prompt-{index}"))
                .spawn(|| prompt.run())?;
            running.prompts.push(spawned);
        }
        let greeter = hello::Greeter::new(
            listener,
            hello::Rules {
                netns,
                instance: random(),
                group: config.group,
            },
            hub,
            handler,
            mailboxes,
            census,
            close,
        )?;
        running.wakers.push(greeter.waker());
        let spawned = thread::Builder::new()
            .name("nl-hello".into())
            .spawn(|| greeter.run())?;
        running.hello = Some(spawned);
        Ok(running)
    }
}

/// A server that serves. Dropping it stops it.
pub struct Running {
    hub: Hub,
    handler: Arc<dyn Handler>,
    socket: PathBuf,
    /// To nl-hello.
    close: Arc<AtomicBool>,
    /// To the prompt threads.
    stop: Arc<AtomicBool>,
    wakers: Vec<Arc<OwnedFd>>,
    jobs: Option<configuration::Jobs>,
    hello: Option<JoinHandle<()>>,
    /// The configuration thread, and that for what takes long.
    lanes: Vec<JoinHandle<()>>,
    prompts: Vec<JoinHandle<()>>,
    _lock: File,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

impl Running {
    /// Closes the socket, ends every connection, and returns when all threads have ended: as soon as
    /// the requests that the configuration thread and that for long ones are at, if any, are through. Requests behind those
    /// are not begun.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        if self.lanes.is_empty() && self.prompts.is_empty() {
            return;
        }
        let _ = fs::remove_file(&self.socket);
        self.close.store(true, Ordering::Release);
        if let Some(jobs) = self.jobs.take() {
            jobs.stop();
        }
        self.wake_all();
        // A client is gone after its last request: so those of the other lanes end first.
        let first = self.hello.take().into_iter().chain(self.lanes.drain(..));
        first.for_each(join);
        self.stop.store(true, Ordering::Release);
        self.wake_all();
        self.prompts.drain(..).for_each(join);
        // Those whose thread hasn't seen them yet.
        for client in self.hub.connections() {
            self.hub.dismiss(&client);
            client.close();
            self.handler.gone(client.port_id);
        }
    }
}

impl Running {
    fn wake_all(&self) {
        for waker in &self.wakers {
            wake(waker);
        }
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread of the netlink server panicked");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn take_lock(dir: &Path) -> Result<File, BindError> {
    let path = dir.join(LOCK_NAME);
    let failed = |what, source| BindError::Io {
        what,
        path: path.clone(),
        source,
    };
    loop {
        // For us alone: whoever can open it can lock it, and so keep the next daemon from starting.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|error| failed("opening", error))?;
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(|error| failed("closing to others", error))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                let pid = text.trim().parse().ok();
                return Err(BindError::Occupied {
                    run_dir: dir.to_owned(),
                    pid,
                });
            }
            Err(errno) => return Err(failed("locking", errno.into())),
        }
        let ours = file
            .metadata()
            .map_err(|error| failed("looking at", error))?;
        match fs::symlink_metadata(&path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
            // Who held the lock before us has removed the file (`Server::remove`): this is the lock of nothing.
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("looking at", error)),
        }
        file.set_len(0).map_err(|error| failed("emptying", error))?;
        writeln!(file, "{}", std::process::id()).map_err(|error| failed("writing", error))?;
        return Ok(file);
    }
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&listener, 4096)?;
    Ok(listener)
}

/// From the seed that the standard library draws for hash tables.
fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// An eventfd that is readable after [`wake`].
fn waker() -> io::Result<OwnedFd> {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    Ok(rustix::event::eventfd(0, flags)?)
}

fn wake(waker: &OwnedFd) {
    // It fails only when the counter is full, and then it is readable.
    let _ = rustix::io::write(waker, &1u64.to_ne_bytes());
}

fn drain(waker: &OwnedFd) {
    let _ = rustix::io::read(waker, &mut [0u8; 8]);
}
