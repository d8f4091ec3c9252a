//! The AF_XDP driver: frames straight between the driver of a device and memory of ours, past the
//! host's stack.
//!
//! For devices whose packets come as the driver received them: NICs. A veth's or TAP's packets are
//! made by a stack that leaves checksums and segmentation to the receiver, and AF_XDP carries neither:
//! TCP then fails until the endpoints switch those offloads off. So such devices get AF_PACKET, unless
//! AF_XDP is asked for by name ([`open`](crate::open) has the rule).
//!
//! - [`ladder`]: zero copy, native copy, generic: which mode holds;
//! - [`transmit`]: frames out;
//! - [`queue`]: frames in.
//!
//! Every receive queue of the device has a socket with rings of its own, and chunks of memory that the
//! daemon's AF_XDP ports share (12 MiB for each of up to eight queues, less for each of more, in areas of 64
//! MiB). A received frame keeps its chunk; sent by an AF_XDP port of the same area it goes out from there, and
//! nothing of ours copies it. Others' frames are copied into a chunk. Where frames are held up so long that
//! chunks get scarce, further ones are copied on reception, so that reception goes on.
//! Ports share if they are on the same kind of rung (zero copy or not) and both or neither jumbo.
//!
//! With an MTU beyond 3,818 a frame comes and goes in several chunks (Linux 6.6); a long one is then copied.
//!
//! # The host's stack
//! sees nothing that the device receives: what the program can't give to a socket it drops. So
//! [`AttachOptions::hide`] has no part in it. What we send goes past the queueing discipline: neither tc
//! nor tcpdump sees it.
//!
//! # What is lost, and where it is counted
//! - Nothing reads in time: no chunk, or no room in the ring ([`HostCounters::queue_full`]).
//! - Longer than fits ([`RxErrors::truncated`]): after the MTU was raised under the port.
//! - All chunks or places for sending are taken: [`TxRefusal::Full`].
//! - A tag that a device puts beside the packet instead of in it: so that offload is switched off while
//!   the port is there. On a veth it is the *peer's* transmit offload that does it: out of reach.
//!
//! # Missing
//! Queues added later (ethtool -L): their packets are dropped.
//!
//! [`AttachOptions::hide`]: crate::AttachOptions::hide
//! [`TxRefusal::Full`]: crate::TxRefusal::Full

mod ladder;
mod queue;
mod transmit;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use frame::{Frame, Pool};

use self::ladder::{Kernel, Refused, Rung};
use crate::error::Error;
use crate::link::{self, Link};
use crate::offload::OffloadOff;
use crate::open::{AttachOptions, XdpMode};
use crate::port::{Capabilities, Driver, HostCounters, Port, RxErrors, RxQueue, TxOutcome};
use crate::sys::bpf::ProgramLink;
use crate::sys::ethtool::{self, Offload};
use crate::sys::packet_socket::PacketSocket;
use crate::sys::xsk::receiver::Receiver;
use crate::sys::xsk::sender::Sender;
use crate::sys::xsk::socket::{Sizes, Statistics, XskSocket};
use crate::sys::xsk::umem::{LONGEST_RECEIVED, LONGEST_SENT, Lease};

/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// Bytes of a tag.
const TAG: u32 = 4;
/// The largest MTU of which every frame, two tags included, fits a chunk.
const LARGEST_MTU: u32 = longest_mtu(1);
/// Chunks of the longest frame: the kernel takes 17 pieces to send.
const SEVERAL: usize = 8;

/// The MTU of which every frame, two tags included, fits so many chunks.
const fn longest_mtu(chunks: usize) -> u32 {
    (chunks * LONGEST_RECEIVED) as u32 - ETHERNET - 2 * TAG
}
/// How long a program that is being removed may still be there.
const OTHER_PROGRAM: Duration = Duration::from_millis(300);
/// How long the device may take to send the frame of the self-test.
const SELF_TEST: Duration = Duration::from_millis(200);

pub use crate::sys::xsk::umem::Usage;

/// What the memory of AF_XDP ports is used for, area by area, of the whole process.
pub fn memory() -> Vec<Usage> {
    crate::sys::xsk::umem::usage()
}

/// A half of a socket that is given away once.
type Half<T> = Mutex<Option<T>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One queue of the device: a socket, its halves.
struct Channel {
    socket: XskSocket,
    /// Until the queue is opened.
    receiver: Half<Receiver>,
    /// Held for a batch, kicks included.
    sender: Mutex<Sender>,
    /// Frames wait in the transmit ring for a device that was busy: kick again.
    stuck: AtomicBool,
    /// As last read: they can't be any more when the device is gone.
    statistics: Mutex<Statistics>,
}

/// What port and queues share; closed when the last of them goes. Fields are dropped in this order:
/// the program comes off the device first, and its packets go to the host's stack again.
struct Shared {
    _program: ProgramLink,
    channels: Vec<Channel>,
    promiscuous: PacketSocket,
    lro: OffloadOff,
    rx_vlan: OffloadOff,
    link: Link,
    rung: Rung,
    refused: Refused,
    sizes: Sizes,
    lease: Arc<Lease>,
    /// Chunks that a frame may take.
    chunks: usize,
    mtu: AtomicU32,
    opened: AtomicBool,
    /// The device was down at the last kick.
    down: AtomicBool,
    gone: AtomicBool,
    runt: AtomicU64,
    truncated: AtomicU64,
}

/// A port on an existing device.
pub struct AfXdp {
    shared: Arc<Shared>,
}

/// Whether all frames of that MTU fit.
fn check_mtu(link: &Link) -> Result<(), Error> {
    let largest = longest_mtu(SEVERAL);
    if link.mtu <= largest {
        return Ok(());
    }
    Err(Error::new(
        libc::EMSGSIZE,
        format!(
            "AF_XDP on {}: frames of MTU {} don't fit its chunks of memory: {largest} at most, or use AF_PACKET",
            link.name, link.mtu
        ),
    ))
}

/// Refuses a device that has another program, and waits for one that is just being removed.
fn check_otherprogram(link: &Link) -> Result<(), Error> {
    let end = Instant::now() + OTHER_PROGRAM;
    let mut program = link.xdp;
    while let Some(id) = program {
        if Instant::now() > end {
            return Err(Error::new(
                libc::EBUSY,
                format!(
                    "AF_XDP on {}: another XDP program (id {id}) is on the device",
                    link.name
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
        program = link::by_index(link.index)?.xdp;
    }
    Ok(())
}

impl AfXdp {
    /// As the options ask: by any rung of the ladder, or by the one they name.
    pub(crate) fn open(link: Link, options: &AttachOptions) -> Result<Self, Error> {
        let rungs: &[Rung] = match options.xdp {
            XdpMode::Auto => &Rung::ALL,
            XdpMode::ZeroCopy => &[Rung::ZeroCopy],
            XdpMode::Native => &[Rung::Native],
            XdpMode::Generic => &[Rung::Generic],
        };
        Self::open_by(&Kernel, link, rungs)
    }

    /// Where nobody asked for it: in the driver only (in generic mode AF_PACKET is faster), only if
    /// no tag gets lost, and only if the device has shown that it sends.
    pub(crate) fn open_if_proven(link: Link) -> Result<Self, Error> {
        let name = link.name.clone();
        let refuse = |errno, why: &str| Err(Error::new(errno, format!("AF_XDP on {name}: {why}")));
        if !link.is_up() {
            return refuse(libc::ENETDOWN, "can't be tested while the device is down");
        }
        let port = Self::open_by(&Kernel, link, &[Rung::ZeroCopy, Rung::Native])?;
        if port.shared.rx_vlan.stuck().is_some() {
            return refuse(libc::EOPNOTSUPP, "the device takes tags out of packets");
        }
        if !port.sends() {
            return refuse(
                libc::EIO,
                "the device didn't send the frame of the self-test",
            );
        }
        Ok(port)
    }

    fn open_by(system: &dyn ladder::System, link: Link, rungs: &[Rung]) -> Result<Self, Error> {
        let name = link.name.clone();
        let fail = |step: &'static str| {
            let what = format!("AF_XDP on {name}: {step}");
            move |errno| Error::os(errno, what)
        };
        check_mtu(&link)?;
        check_otherprogram(&link)?;
        let promiscuous = PacketSocket::new().map_err(fail("packet socket"))?;
        let queues = ethtool::receive_queues(promiscuous.as_fd(), &name).ok();
        let lro = OffloadOff::new(&link, Offload::Lro).map_err(fail("offloads"))?;
        let rx_vlan = OffloadOff::new(&link, Offload::RxVlan).map_err(fail("offloads"))?;
        let (held, rung, refused) =
            ladder::climb(rungs, |rung| ladder::hold(system, &link, queues, rung))
                .map_err(|refused| ladder::error(&name, &refused))?;
        promiscuous
            .add_promiscuous(link.index)
            .map_err(fail("promiscuous mode"))?;
        if !refused.is_empty() {
            tracing::info!(
                "{name}: AF_XDP, {} ({})",
                rung.name(),
                ladder::describe(&refused)
            );
        }
        Ok(Self {
            shared: Arc::new(Shared {
                _program: held.program,
                channels: held.channels,
                promiscuous,
                lro,
                rx_vlan,
                rung,
                refused,
                sizes: held.sizes,
                lease: held.lease,
                chunks: if link.mtu > LARGEST_MTU { SEVERAL } else { 1 },
                mtu: AtomicU32::new(link.mtu),
                opened: AtomicBool::new(false),
                down: AtomicBool::new(false),
                gone: AtomicBool::new(false),
                runt: AtomicU64::new(0),
                truncated: AtomicU64::new(0),
                link,
            }),
        })
    }

    /// Whether the device sends a frame and says so: one from itself to itself, of a type for
    /// experiments (IEEE 802, 0x88b5), which no switch forwards.
    fn sends(&self) -> bool {
        let mac = self.shared.link.mac.unwrap_or([2, 0, 0, 0, 0, 1]);
        let mut bytes = [0; 60];
        for (to, from) in bytes
            .iter_mut()
            .zip(mac.iter().chain(&mac).chain(&[0x88, 0xb5]))
        {
            *to = *from;
        }
        let mut outcome = TxOutcome::default();
        self.transmit(
            &mut vec![Frame::from_bytes(&bytes)],
            &mut Pool::new(1),
            &mut outcome,
        );
        let end = Instant::now() + SELF_TEST;
        while outcome.packets == 1 && Instant::now() < end {
            if self.shared.chunks_out() == 0 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

impl Shared {
    /// How many chunks the kernel has for sending, after taking back what it is done with.
    fn chunks_out(&self) -> usize {
        self.channels
            .iter()
            .map(|channel| {
                let mut sender = lock(&channel.sender);
                sender.reclaim();
                sender.out()
            })
            .sum()
    }

    /// Frames sent from where they came in, and by a copy.
    fn sent(&self) -> (u64, u64) {
        let counts = self.channels.iter().map(|c| lock(&c.sender).counts);
        counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// Bytes of the longest frame that the device takes now, a tag not counted.
    fn longest(&self) -> u32 {
        let chunks = (self.chunks * LONGEST_SENT) as u32 - TAG;
        self.mtu.load(Relaxed).saturating_add(ETHERNET).min(chunks)
    }
}

impl Port for AfXdp {
    fn driver(&self) -> Driver {
        Driver::AfXdp
    }

    fn mode(&self) -> String {
        let shared = &self.shared;
        let queues = shared.channels.len();
        let mut mode = format!(
            "af_xdp, {}, {queues} queue{} of {} + {} frames, need_wakeup, past the qdisc (no tc, no tcpdump), \
             hidden by the XDP program, no offloads",
            shared.rung.name(),
            if queues == 1 { "" } else { "s" },
            shared.sizes.receive,
            shared.sizes.transmit,
        );
        if shared.chunks > 1 {
            mode.push_str(", frames in several chunks");
        }
        let (passed, copied) = shared.sent();
        let umem = shared.lease.umem();
        mode.push_str(&format!(
            ", memory {} of {} MiB, sent {passed} from where they came in, {copied} by a copy",
            umem.number(),
            umem.length() >> 20
        ));
        for (off, name) in [(&shared.lro, "LRO"), (&shared.rx_vlan, "VLAN stripping")] {
            if off.switched() {
                mode.push_str(&format!(", {name} switched off"));
            } else if let Some(errno) = off.stuck() {
                mode.push_str(&format!(", {name} STAYS ON ({errno})"));
            }
        }
        let mtu = shared.mtu.load(Relaxed);
        if mtu > longest_mtu(shared.chunks) {
            let most = shared.chunks * LONGEST_RECEIVED;
            mode.push_str(&format!(
                ", MTU {mtu}: FRAMES BEYOND {most} BYTES ARE LOST (add the port again)"
            ));
        }
        if !shared.refused.is_empty() {
            mode.push_str(&format!(" (not {})", ladder::describe(&shared.refused)));
        }
        mode
    }

    fn ifindex(&self) -> u32 {
        self.shared.link.index
    }

    fn name(&self) -> &str {
        &self.shared.link.name
    }

    fn capabilities(&self) -> Capabilities {
        let longest = self.shared.longest();
        Capabilities {
            csum: false,
            tso4: false,
            tso6: false,
            uso: false,
            ufo: false,
            vlan: true,
            max_frame: longest,
            max_gso_frame: longest,
        }
    }

    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        if self.shared.opened.swap(true, Relaxed) {
            return Err(Error::new(
                libc::EBUSY,
                format!("queues of {}", self.name()),
            ));
        }
        Ok((0..self.shared.channels.len())
            .filter_map(|n| queue::Queue::new(Arc::clone(&self.shared), n))
            .map(|queue| Box::new(queue) as Box<dyn RxQueue>)
            .collect())
    }

    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        self.shared.transmit(frames, pool, outcome);
    }

    fn host_counters(&self) -> HostCounters {
        let shared = &self.shared;
        let mut counters = HostCounters {
            queue_full: 0,
            rx_errors: RxErrors {
                runt: shared.runt.load(Relaxed),
                truncated: shared.truncated.load(Relaxed),
                ..RxErrors::default()
            },
        };
        for channel in &shared.channels {
            let mut known = lock(&channel.statistics);
            if let Ok(now) = channel.socket.statistics() {
                *known = now;
            }
            // In copy mode the kernel counts a frame that found no chunk as both; what else it
            // dropped was too long. In zero copy an empty fill ring is no loss by itself.
            let no_chunk = match shared.rung {
                Rung::ZeroCopy => known.dropped,
                Rung::Native | Rung::Generic => known.dropped.min(known.fill_empty),
            };
            counters.queue_full += known.ring_full + no_chunk;
            counters.rx_errors.truncated += known.dropped - no_chunk;
        }
        shared.kick_stuck();
        counters
    }

    fn link_changed(&self, link: &Link) {
        let shared = &self.shared;
        if link.index != shared.link.index {
            return;
        }
        let before = shared.mtu.swap(link.mtu, Relaxed);
        if link.mtu > longest_mtu(shared.chunks) && before != link.mtu {
            tracing::warn!(
                "{}: MTU {}: AF_XDP loses frames beyond {} bytes: add the port again",
                link.name,
                link.mtu,
                shared.chunks * LONGEST_RECEIVED
            );
        }
    }
}

#[cfg(test)]
mod tests;
