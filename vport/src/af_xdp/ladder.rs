//! The ladder of AF_XDP's modes, climbed down until one holds.
//!
//! | rung | who moves the bytes | where the program runs |
//! |---|---|---|
//! | zero copy | nobody | in the driver |
//! | native | the kernel | in the driver |
//! | generic | the kernel | in the stack, on packets already made: any device |
//!
//! What a device can is found out by trying. Some failures no rung can mend (no privilege, another
//! program on the device, no memory, no device): they end the attempt.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

use super::{Channel, Half, LARGEST_MTU};
use crate::error::Error;
use crate::link::Link;
use crate::sys::bpf::ProgramLink;
use crate::sys::xdp::{Hook, SocketMap};
use crate::sys::xsk::receiver::Receiver;
use crate::sys::xsk::sender::Sender;
use crate::sys::xsk::socket::{Sizes, XskSocket};
use crate::sys::xsk::umem::{Copying, Kind, Lease, Want};

/// Queues tried on a device that doesn't say how many it has.
const MOST_QUEUES: u32 = 64;
/// Queues for which such a device gets memory; further ones share it.
const UNTOLD: u32 = 2;
/// The kernel frees a queue a moment after its last socket was closed, and a program likewise.
const BUSY_TRIES: u32 = 30;
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// Entries of the smallest rings that are worth having.
const SMALLEST: u32 = 256;

/// A mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rung {
    ZeroCopy,
    Native,
    Generic,
}

impl Rung {
    pub(super) const ALL: [Self; 3] = [Self::ZeroCopy, Self::Native, Self::Generic];

    /// The name that `status` shows.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zero copy",
            Self::Native => "native copy",
            Self::Generic => "generic",
        }
    }

    fn copying(self) -> Copying {
        match self {
            Self::ZeroCopy => Copying::Zero,
            Self::Native | Self::Generic => Copying::Copy,
        }
    }

    fn hook(self) -> Hook {
        match self {
            Self::ZeroCopy | Self::Native => Hook::Native,
            Self::Generic => Hook::Generic,
        }
    }
}

/// Why a rung didn't hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    what: String,
    errno: Errno,
    /// No other rung will hold either.
    last: bool,
}

impl Failure {
    fn new(what: impl Into<String>, errno: Errno) -> Self {
        Self {
            what: what.into(),
            errno,
            last: matches!(
                errno,
                Errno::PERM | Errno::ACCESS | Errno::NODEV | Errno::AFNOSUPPORT | Errno::NOSYS
            ),
        }
    }

    fn last(what: impl Into<String>, errno: Errno) -> Self {
        Self {
            last: true,
            ..Self::new(what, errno)
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.errno)
    }
}

/// The rungs that didn't hold.
pub(super) type Refused = Vec<(Rung, Failure)>;

/// For `status` and errors: each rung with its reason.
pub(super) fn describe(refused: &Refused) -> String {
    let each: Vec<String> = refused
        .iter()
        .map(|(rung, failure)| format!("{}: {failure}", rung.name()))
        .collect();
    each.join("; ")
}

/// Tries `rungs` in turn until one holds or a failure is the last.
pub(super) fn climb<T>(
    rungs: &[Rung],
    mut attempt: impl FnMut(Rung) -> Result<T, Failure>,
) -> Result<(T, Rung, Refused), Refused> {
    let mut refused = Refused::new();
    for rung in rungs {
        match attempt(*rung) {
            Ok(held) => return Ok((held, *rung, refused)),
            Err(failure) => {
                let last = failure.last;
                refused.push((*rung, failure));
                if last {
                    break;
                }
            }
        }
    }
    Err(refused)
}

/// What all rungs' failing means to whoever wanted the port.
pub(super) fn error(name: &str, refused: &Refused) -> Error {
    let errno = refused
        .last()
        .map_or(Errno::OPNOTSUPP, |(_, failure)| failure.errno);
    Error::os(errno, format!("AF_XDP on {name}: {}", describe(refused)))
}

/// The system calls that decide: the kernel's own, or in tests ones that fail as told.
pub(super) trait System {
    fn map(&self, queues: u32) -> Result<SocketMap, Errno> {
        SocketMap::new(queues)
    }

    /// Memory for `queues` queues of a port.
    fn memory(&self, kind: Kind, sizes: Sizes, queues: u32, want: Want) -> Result<Lease, Errno> {
        let (chunks, sent) = (sizes.chunks() * queues, sizes.transmit * queues);
        Lease::new(kind, chunks, sent, want)
    }

    fn socket(
        &self,
        lease: &Arc<Lease>,
        sizes: Sizes,
    ) -> Result<(XskSocket, Receiver, Sender), Errno> {
        XskSocket::new(lease, sizes)
    }

    fn bind(&self, socket: &XskSocket, ifindex: u32, queue: u32, _kind: Kind) -> Result<(), Errno> {
        socket.bind(ifindex, queue)
    }

    fn is_zero_copy(&self, socket: &XskSocket) -> Result<bool, Errno> {
        socket.is_zero_copy()
    }

    fn attach(
        &self,
        map: &SocketMap,
        ifindex: u32,
        hook: Hook,
        several: bool,
    ) -> Result<ProgramLink, Errno> {
        map.attach(ifindex, hook, several)
    }

    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// The kernel.
pub(super) struct Kernel;

impl System for Kernel {}

/// What a rung that holds consists of.
pub(super) struct Held {
    pub(super) program: ProgramLink,
    pub(super) channels: Vec<Channel>,
    pub(super) sizes: Sizes,
    pub(super) lease: Arc<Lease>,
}

/// Rings for each of `queues` queues: a port gets 96 MiB of frames at most.
fn sizes(queues: u32) -> Sizes {
    let receive = match queues {
        0..=8 => 2048,
        9..=16 => 1024,
        17..=32 => 512,
        _ => SMALLEST,
    };
    Sizes {
        receive,
        transmit: (receive / 2).max(SMALLEST),
    }
}

fn unless_busy<T>(
    system: &dyn System,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    for _ in 1..BUSY_TRIES {
        match attempt() {
            Err(Errno::BUSY | Errno::EXIST) => system.pause(BUSY_PAUSE),
            result => return result,
        }
    }
    attempt()
}

/// A port's memory and its first socket.
type First = (Arc<Lease>, (XskSocket, Receiver, Sender));

/// Memory and rings as large as the limit on locked memory allows; `sizes` follows. First with room for
/// other ports to share it.
fn first(
    system: &dyn System,
    kind: Kind,
    queues: u32,
    sizes: &mut Sizes,
    mut want: Want,
) -> Result<First, Failure> {
    loop {
        let lease = system.memory(kind, *sizes, queues, want).map(Arc::new);
        let made = lease.and_then(|lease| {
            let socket = system.socket(&lease, *sizes)?;
            Ok((lease, socket))
        });
        match made {
            Ok(made) => return Ok(made),
            Err(Errno::NOBUFS | Errno::NOMEM) if want != Want::Tight => want = Want::Tight,
            Err(Errno::NOBUFS | Errno::NOMEM) if sizes.transmit > SMALLEST => {
                sizes.receive = (sizes.receive / 2).max(SMALLEST);
                sizes.transmit = (sizes.transmit / 2).max(SMALLEST);
            }
            Err(errno @ (Errno::NOBUFS | Errno::NOMEM)) => {
                return Err(Failure::last(
                    format!(
                        "{} KiB of locked memory for {queues} queues (CAP_IPC_LOCK, or a higher RLIMIT_MEMLOCK)",
                        (sizes.bytes() >> 10) * queues as usize
                    ),
                    errno,
                ));
            }
            Err(errno) => return Err(Failure::new("socket", errno)),
        }
    }
}

/// Tries one rung: a socket for each queue, bound; then the program. `queues`: how many the device
/// has, if it says.
pub(super) fn hold(
    system: &dyn System,
    link: &Link,
    queues: Option<u32>,
    rung: Rung,
) -> Result<Held, Failure> {
    match hold_in(system, link, queues, rung, Want::Shared) {
        // All ports whose memory it was to share have lost their devices.
        Err(failure) if failure.errno == Errno::BADF => {
            hold_in(system, link, queues, rung, Want::Fresh)
        }
        result => result,
    }
}

fn hold_in(
    system: &dyn System,
    link: &Link,
    queues: Option<u32>,
    rung: Rung,
    want: Want,
) -> Result<Held, Failure> {
    let most = queues.unwrap_or(MOST_QUEUES).max(1);
    let map = system.map(most).map_err(|errno| {
        let needs = match errno {
            Errno::PERM | Errno::ACCESS => {
                " (needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace)"
            }
            _ => "",
        };
        Failure::new(format!("map of sockets{needs}"), errno)
    })?;
    let kind = Kind {
        copying: rung.copying(),
        several: link.mtu > LARGEST_MTU,
    };
    let mut sizes = sizes(queues.unwrap_or(UNTOLD));
    let (lease, made) = first(system, kind, queues.unwrap_or(UNTOLD), &mut sizes, want)?;
    let mut made = Some(made);
    let mut channels = Vec::new();
    for queue in 0..most {
        let (socket, receiver, sender) = match made.take() {
            Some(made) => made,
            None => system
                .socket(&lease, sizes)
                .map_err(|errno| Failure::new(format!("socket of queue {queue}"), errno))?,
        };
        let bound = unless_busy(system, || system.bind(&socket, link.index, queue, kind));
        match bound {
            Ok(()) => {}
            // The end of the queues of a device that didn't say how many it has.
            Err(Errno::INVAL) if queues.is_none() && queue > 0 => break,
            Err(errno @ Errno::BUSY) => {
                let what = format!("queue {queue} belongs to another AF_XDP socket");
                return Err(Failure::last(what, errno));
            }
            Err(errno) => return Err(Failure::new(format!("bind to queue {queue}"), errno)),
        }
        if rung == Rung::ZeroCopy && !system.is_zero_copy(&socket).unwrap_or(false) {
            let what = format!("queue {queue} copies all the same");
            return Err(Failure::new(what, Errno::OPNOTSUPP));
        }
        map.insert(queue, socket.as_fd())
            .map_err(|errno| Failure::new(format!("socket of queue {queue} in the map"), errno))?;
        channels.push(Channel {
            socket,
            receiver: Half::new(Some(receiver)),
            sender: Mutex::new(sender),
            stuck: AtomicBool::new(false),
            statistics: Mutex::default(),
        });
    }
    // Last, so that no packet comes before it has a place to go.
    let program = unless_busy(system, || {
        system.attach(&map, link.index, rung.hook(), kind.several)
    })
    .map_err(|errno| match errno {
        Errno::BUSY | Errno::EXIST => {
            Failure::last("another XDP program is on the device", Errno::BUSY)
        }
        Errno::RANGE | Errno::INVAL | Errno::MSGSIZE | Errno::NOSPC => {
            let what = format!(
                "program (the driver may not take it at MTU {}, or with {} queues)",
                link.mtu,
                channels.len()
            );
            Failure::new(what, errno)
        }
        _ => Failure::new("program", errno),
    })?;
    Ok(Held {
        program,
        channels,
        sizes,
        lease,
    })
}

#[cfg(test)]
mod tests;
