//! What every port can do, whichever its driver.
//!
//! A port takes frames from any thread and never blocks: what the kernel doesn't take at once is
//! refused and counted ([`TxOutcome`]), never kept. Frames come in by its receive queues, each of
//! which belongs to one worker. Order is kept within a queue; nothing is promised across queues.
//!
//! # Thread safety
//! [`Port`] is shared: `transmit` may run on several threads at once, and then frames of different
//! calls may interleave. [`RxQueue`] has one owner. A device may vanish at any time: receiving then
//! says [`RxStatus::Gone`], sending refuses with [`TxRefusal::Gone`], and nothing else happens; the
//! device's descriptors close when the port and all its queues have been dropped.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use frame::tunnel::TunnelKey;
use frame::{Frame, Pool};

use crate::error::Error;
use crate::link::Link;
use crate::tunnel::TunnelConfig;

/// How frames get in and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Driver {
    /// A packet socket with virtio-net headers on an existing device.
    AfPacket,
    /// A TAP device of our own.
    Tap,
    /// A veth pair of our own: an internal port where /dev/net/tun is closed.
    Veth,
    /// AF_XDP rings on an existing device.
    AfXdp,
    /// A tunnel over an IP network.
    Tunnel,
    /// A TCP connection behind a device of our own.
    Stream,
}

impl Driver {
    /// The name that `status` shows.
    pub fn name(self) -> &'static str {
        match self {
            Self::AfPacket => "af_packet",
            Self::Tap => "tap",
            Self::Veth => "veth",
            Self::AfXdp => "af_xdp",
            Self::Tunnel => "tunnel",
            Self::Stream => "stream",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What `transmit` takes as it is. The rest is to be completed or segmented before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Partial internet checksums (TCP, UDP). A partial SCTP checksum (a CRC32c) is never taken.
    pub csum: bool,
    /// TCP over IPv4, to be segmented.
    pub tso4: bool,
    /// TCP over IPv6, to be segmented.
    pub tso6: bool,
    /// UDP, to be cut into datagrams.
    pub uso: bool,
    /// UDP, to be cut into IP fragments.
    pub ufo: bool,
    /// `Frame::vlan` is taken: the driver writes the tag in band without moving the frame's bytes.
    /// Every driver does; here so that one that can't may say so.
    pub vlan: bool,
    /// The longest frame that isn't to be segmented: MTU + 14, in bytes, its outermost tag not
    /// counted (whether that is in band or not). Follows the device's MTU, see
    /// [`Port::link_changed`].
    pub max_frame: u32,
    /// The longest frame of all, one to be segmented included.
    pub max_gso_frame: u32,
}

/// Why a frame wasn't sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TxRefusal {
    /// No room in the device's queue, the socket's buffer, or the qdisc dropped it.
    Full,
    /// Longer than the device takes.
    TooLong,
    /// The device is down.
    Down,
    /// The device is no more, or in another namespace.
    Gone,
    /// Anything else: malformed offloads, out of memory.
    Error,
    /// A tunnel: no way to where the frame is to go.
    Unreachable,
}

impl TxRefusal {
    /// All of them, in the order of [`TxOutcome::refused`].
    pub const ALL: [Self; 6] = [
        Self::Full,
        Self::TooLong,
        Self::Down,
        Self::Gone,
        Self::Error,
        Self::Unreachable,
    ];

    /// The name that `status` shows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::TooLong => "too_long",
            Self::Down => "down",
            Self::Gone => "gone",
            Self::Error => "error",
            Self::Unreachable => "unreachable",
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Full => 0,
            Self::TooLong => 1,
            Self::Down => 2,
            Self::Gone => 3,
            Self::Error => 4,
            Self::Unreachable => 5,
        }
    }
}

/// What became of the frames given to `transmit`. Adds up: give the same one again to sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxOutcome {
    /// Frames that the kernel took (a frame to be segmented counts once).
    pub packets: u64,
    /// Their bytes, an out-of-band tag included.
    pub bytes: u64,
    /// Frames refused, in the order of [`TxRefusal::ALL`].
    pub refused: [u64; 6],
}

impl TxOutcome {
    /// Counts a frame of `bytes` as sent.
    pub fn sent(&mut self, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
    }

    /// Counts `frames` as refused.
    pub fn refuse(&mut self, why: TxRefusal, frames: u64) {
        if let Some(count) = self.refused.get_mut(why.index()) {
            *count += frames;
        }
    }

    /// How many were refused for this reason.
    pub fn refused_for(&self, why: TxRefusal) -> u64 {
        self.refused.get(why.index()).copied().unwrap_or(0)
    }

    /// How many were refused in all.
    pub fn refused_total(&self) -> u64 {
        self.refused.iter().sum()
    }
}

/// Frames lost between the kernel and us in one `receive`, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxErrors {
    /// The kernel could not say the frame in a virtio-net header (`EINVAL`: SCTP GSO, tunnels).
    pub unsayable: u64,
    /// Longer than the buffer.
    pub truncated: u64,
    /// A virtio-net header that makes no sense.
    pub malformed: u64,
    /// Shorter than an Ethernet header.
    pub runt: u64,
    /// A tunnel: a header that is cut short, or isn't the tunnel's.
    pub tunnel_header: u64,
    /// A tunnel: a wrong checksum in front of the inner frame.
    pub tunnel_checksum: u64,
    /// A tunnel: congestion marked on a packet that can't say so (RFC 6040).
    pub tunnel_congestion: u64,
}

impl RxErrors {
    /// All kinds together.
    pub fn total(&self) -> u64 {
        self.unsayable
            + self.truncated
            + self.malformed
            + self.runt
            + self.tunnel_header
            + self.tunnel_checksum
            + self.tunnel_congestion
    }
}

/// How a `receive` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxStatus {
    /// The queue was read.
    Open {
        /// Perhaps there is more: call again before waiting.
        more: bool,
        /// What was lost on the way.
        errors: RxErrors,
    },
    /// The device is no more, or in another namespace: nothing will ever come again. Frames already
    /// in `out` are good. The descriptor may stay readable: stop polling it, drop the queue.
    Gone,
}

/// What happened to the port's packets at the kernel's end, since the port was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounters {
    /// The queue towards us was full: AF_PACKET `tp_drops`, a TAP's `tx_dropped`, AF_XDP
    /// `rx_ring_full` and what found the fill ring empty.
    pub queue_full: u64,
    /// Sum of [`RxErrors`] over all queues.
    pub rx_errors: RxErrors,
}

/// Whether a device has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It has.
    Left,
    /// Not now; its descriptor becomes writable when it has.
    Awaited,
    /// Not now, and nobody will tell: to be tried again soon.
    Later,
}

/// How an offer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Frames from the front that are dealt with: sent, or refused for good.
    pub done: usize,
    /// Why the others aren't.
    pub room: Room,
}

/// A port whose device may have no room for a while.
pub trait Outlet: Send + Sync {
    /// Sends `frames` in order, without blocking, as long as the device has room; counts those that it deals
    /// with. A frame that a queue in the kernel drops is refused, or, with `patient`, is one for which there
    /// is no room.
    fn offer(&self, frames: &[Frame], patient: bool, outcome: &mut TxOutcome) -> Offered;

    /// Becomes writable when there is room again.
    fn writable(&self) -> BorrowedFd<'_>;
}

/// A ring that a port has of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnRing {
    /// Whether it stops what feeds it.
    pub backpressure: bool,
    /// Places.
    pub size: usize,
    /// Frames in it.
    pub len: usize,
    /// What it has counted.
    pub counters: crate::ring::Counters,
}

/// Called when a port's own ring goes on after a stop.
pub type Resume = Arc<dyn Fn() + Send + Sync>;

/// A device that frames go through.
pub trait Port: Send + Sync {
    /// The driver in force.
    fn driver(&self) -> Driver;

    /// One line for `status`: what is in force, and why it isn't better.
    fn mode(&self) -> String;

    /// The device's ifindex (for a TAP in another namespace: the one it had here).
    fn ifindex(&self) -> u32;

    /// The device's name when the port was opened. A rename doesn't change it, as it doesn't
    /// change the module's index by name.
    fn name(&self) -> &str;

    /// What `transmit` takes, as of now.
    fn capabilities(&self) -> Capabilities;

    /// The receive queues, each for one worker. Once: a second call answers `EBUSY`.
    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error>;

    /// Sends `frames` in order, without blocking; leaves the vector empty and its frames in `pool`.
    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome);

    /// The same port as one that may have no room, if it tells when it has again. What takes frames at once
    /// isn't one.
    fn outlet(&self) -> Option<&dyn Outlet> {
        None
    }

    /// The ring that it has of its own, if it has one.
    fn own_ring(&self) -> Option<OwnRing> {
        None
    }

    /// Whether its own ring tells what feeds it to pause.
    fn is_stopped(&self) -> bool {
        false
    }

    /// Frames for which its own ring has room, if that stops what feeds it; else there is no telling.
    fn room(&self) -> usize {
        usize::MAX
    }

    /// Who is to be told when its own ring goes on.
    fn on_resume(&self, _resume: Resume) {}

    /// Changes its own ring. What is None stays.
    ///
    /// # Errors
    /// `EOPNOTSUPP`: it has none. `EINVAL`: a size that can't be.
    fn set_ring(&self, _size: Option<usize>, _backpressure: Option<bool>) -> Result<(), Error> {
        Err(Error::new(
            libc::EOPNOTSUPP,
            format!("{} takes frames at once, or never: a ring", self.name()),
        ))
    }

    /// Mends what the kernel has broken without telling anybody. Cheap; to be called every few seconds.
    fn look_after(&self) {}

    /// What the kernel lost at its end.
    fn host_counters(&self) -> HostCounters;

    /// Tells the port what [`LinkEvent::New`](crate::LinkEvent) said about its device (MTU, flags).
    fn link_changed(&self, link: &Link);

    /// The device as it is now: its name after a rename, its index and MTU also in another namespace.
    /// (An MTU changed there is known to [`capabilities`](Self::capabilities) only after this was
    /// called: no monitor of ours hears of it.) To be called in the namespace where the port was made.
    ///
    /// # Errors
    /// `ENODEV`, `EBADFD`: it is no more.
    fn link(&self) -> Result<Link, Error> {
        crate::link::by_index(self.ifindex())
    }

    /// How the tunnel is made, of a port that is one.
    fn tunnel(&self) -> Option<TunnelConfig> {
        None
    }

    /// Fills in what a frame sent by this key would have: source address, ports. The key's source port is
    /// the entropy that the frame would have. False: the frame wouldn't be sent.
    fn complete_tunnel_key(&self, _key: &mut TunnelKey) -> bool {
        false
    }

    /// Where an internal port's device now is: `None` in our own namespace, else the id by which
    /// our namespace knows the other (OVS_VPORT_ATTR_NETNSID).
    fn netnsid(&self) -> Option<i32> {
        None
    }

    /// Index of the device that goes when this port is dropped, if it is in our own namespace: many
    /// of them go together sooner ([`delete_together`](crate::link::delete_together)).
    fn own_device(&self) -> Option<u32> {
        None
    }
}

/// One receive queue of a port. Its descriptor becomes readable when there is something to receive,
/// mostly when the device vanishes; where the kernel tells nobody (an AF_XDP socket; a packet socket on
/// a device that went down first), [`LinkMonitor`](crate::LinkMonitor) does, and the next `receive` says
/// [`RxStatus::Gone`]. Level triggered.
pub trait RxQueue: Send + AsFd {
    /// Appends up to `max` frames to `out`, without blocking.
    ///
    /// An error is one of the machine (no memory, no descriptor); what the wire or the device does
    /// is told by [`RxStatus`].
    fn receive(
        &mut self,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Result<RxStatus, Error>;
}
