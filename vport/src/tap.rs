//! The TAP driver: a device of our own whose other side is the host's stack.
//!
//! What the host transmits on the device is received here, with virtio-net headers: partial
//! checksums and packets to be segmented come whole, and go whole. VLAN tags are in band both ways.
//! The device is never persistent: it goes when its descriptor is closed, so also when this process
//! is killed. It may be moved to another namespace and remains this port.
//!
//! # What is lost, and where it is counted
//! - The host transmits faster than we read: the device's queue (its `txqueuelen`, 1000 packets)
//!   overflows and the kernel counts `tx_dropped` ([`HostCounters::queue_full`]).
//! - Sending hands the packet to the host's stack at once, on the sender's time; nothing queues (the
//!   descriptor's send buffer is unlimited), so [`TxRefusal::Full`] means that memory is short or the
//!   host's backlog is.
//! - The kernel takes frames of any length here, so longer ones than the MTU are refused by us.
//!
//! The device's own counters have its own orientation: what the host transmits is tx. A packet's mark
//! and priority don't cross a TAP.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use frame::virtio::{self, HEADER_BYTES};
use frame::{Frame, Pool};
use rustix::io::Errno;

use crate::error::Error;
use crate::internal::InternalOptions;
use crate::link::{self, Link, Which};
use crate::port::{
    Capabilities, Driver, HostCounters, Port, RxErrors, RxQueue, RxStatus, TxOutcome, TxRefusal,
};
use crate::sys::{mmsg, tun};

const ETHERNET: usize = 14;
/// The longest packet that stands for several, and its Ethernet header.
const MAX_GSO_FRAME: u32 = 65_535 + ETHERNET as u32;

struct Shared {
    fd: OwnedFd,
    index: u32,
    name: String,
    offloads: tun::TunOffloads,
    /// The namespace where it was made: device and inode.
    home: Option<(u64, u64)>,
    mtu: AtomicU32,
    opened: AtomicBool,
    queue_full: AtomicU64,
    truncated: AtomicU64,
    malformed: AtomicU64,
    runt: AtomicU64,
}

/// An internal port that is a TAP device.
pub struct Tap {
    shared: Arc<Shared>,
}

/// Why there is no TAP.
pub(crate) enum TapError {
    /// /dev/net/tun is closed to us or isn't there: something else will do.
    Closed(Errno),
    /// The request itself can't be met.
    Refused(Error),
}

/// Device and inode of a namespace.
fn identity(netns: &OwnedFd) -> Option<(u64, u64)> {
    rustix::fs::fstat(netns)
        .ok()
        .map(|stat| (stat.st_dev, stat.st_ino))
}

impl Tap {
    pub(crate) fn create(name: &str, options: &InternalOptions) -> Result<Self, TapError> {
        let closed = |errno| match errno {
            Errno::PERM | Errno::ACCESS | Errno::NOENT | Errno::NXIO | Errno::NODEV => {
                TapError::Closed(errno)
            }
            errno => TapError::Refused(Error::os(errno, "open /dev/net/tun")),
        };
        let refused = |errno| TapError::Refused(Error::os(errno, format!("TAP device {name}")));
        if !link::is_valid_name(name) {
            return Err(refused(Errno::INVAL));
        }
        let fd = tun::open().map_err(closed)?;
        if let Some(index) = options.ifindex {
            tun::set_index(&fd, index).map_err(refused)?;
        }
        let name = match tun::attach(&fd, name, true, false) {
            Ok(name) => name,
            Err(Errno::BUSY) => return Err(refused(Errno::EXIST)),
            // Open, but not for us to make devices with.
            Err(errno @ Errno::PERM) => return Err(TapError::Closed(errno)),
            Err(errno) => return Err(refused(errno)),
        };
        tun::set_header_size(&fd, HEADER_BYTES).map_err(refused)?;
        let offloads = tun::set_offloads(&fd).map_err(refused)?;
        let home = tun::namespace(&fd).ok().and_then(|netns| identity(&netns));
        let configure = || -> Result<Link, Error> {
            let link = link::by_name(&name)?;
            if let Some(mac) = options.mac {
                link::set_mac(link.index, mac)?;
            }
            if let Some(mtu) = options.mtu {
                link::set_mtu(link.index, mtu)?;
            }
            if let Some(packets) = options.tx_queue_len {
                link::set_tx_queue_len(link.index, packets)?;
            }
            link::by_index(link.index)
        };
        let link = configure().map_err(TapError::Refused)?;
        Ok(Self {
            shared: Arc::new(Shared {
                fd,
                index: link.index,
                name,
                offloads,
                home,
                mtu: AtomicU32::new(link.mtu),
                opened: AtomicBool::new(false),
                queue_full: AtomicU64::new(0),
                truncated: AtomicU64::new(0),
                malformed: AtomicU64::new(0),
                runt: AtomicU64::new(0),
            }),
        })
    }
}

impl Port for Tap {
    fn driver(&self) -> Driver {
        Driver::Tap
    }

    fn mode(&self) -> String {
        let uso = if self.shared.offloads.udp {
            ", USO"
        } else {
            ""
        };
        let stops = if tun::stops_when_full(&self.shared.fd) {
            ", stops the host when full"
        } else {
            ""
        };
        format!("tap, vnet_hdr, checksum, TSO{uso}{stops}")
    }

    fn ifindex(&self) -> u32 {
        self.shared.index
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn capabilities(&self) -> Capabilities {
        let offloads = self.shared.offloads;
        Capabilities {
            csum: true,
            tso4: offloads.tcp,
            tso6: offloads.tcp,
            uso: offloads.udp,
            ufo: false,
            vlan: true,
            max_frame: self
                .shared
                .mtu
                .load(Relaxed)
                .saturating_add(ETHERNET as u32),
            max_gso_frame: MAX_GSO_FRAME,
        }
    }

    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        if self.shared.opened.swap(true, Relaxed) {
            return Err(Error::new(
                libc::EBUSY,
                format!("queues of {}", self.name()),
            ));
        }
        Ok(vec![Box::new(Queue {
            shared: Arc::clone(&self.shared),
        })])
    }

    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        let max_frame = self.capabilities().max_frame as usize;
        let mut left = frames.len() as u64;
        for frame in frames.iter() {
            left -= 1;
            if frame.offload.gso.is_none() && frame.len() > max_frame {
                outcome.refuse(TxRefusal::TooLong, 1);
                continue;
            }
            match self.write(frame) {
                Ok(_) => outcome.sent(frame.wire_len()),
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => {
                    outcome.refuse(TxRefusal::Full, 1);
                }
                Err(Errno::MSGSIZE | Errno::TOOBIG) => outcome.refuse(TxRefusal::TooLong, 1),
                Err(Errno::IO) => {
                    outcome.refuse(TxRefusal::Down, 1 + left);
                    break;
                }
                Err(Errno::BADFD) => {
                    outcome.refuse(TxRefusal::Gone, 1 + left);
                    break;
                }
                Err(_) => outcome.refuse(TxRefusal::Error, 1),
            }
        }
        frames.drain(..).for_each(|frame| pool.put(frame));
    }

    fn host_counters(&self) -> HostCounters {
        let shared = &self.shared;
        let stats = tun::name(&shared.fd)
            .map_err(|errno| Error::os(errno, self.name()))
            .and_then(|name| link::find_stats(Which::Name(&name), self.netnsid()));
        // Kept for when the device can't be asked any more.
        if let Ok(stats) = stats {
            shared.queue_full.fetch_max(stats.tx_dropped, Relaxed);
        }
        HostCounters {
            queue_full: shared.queue_full.load(Relaxed),
            rx_errors: RxErrors {
                unsayable: 0,
                truncated: shared.truncated.load(Relaxed),
                malformed: shared.malformed.load(Relaxed),
                runt: shared.runt.load(Relaxed),
                ..RxErrors::default()
            },
        }
    }

    fn link_changed(&self, link: &Link) {
        if link.index == self.shared.index {
            self.shared.mtu.store(link.mtu, Relaxed);
        }
    }

    fn link(&self) -> Result<Link, Error> {
        let name = tun::name(&self.shared.fd).map_err(|errno| Error::os(errno, self.name()))?;
        let link = link::find(Which::Name(&name), self.netnsid())?;
        self.shared.mtu.store(link.mtu, Relaxed);
        Ok(link)
    }

    fn netnsid(&self) -> Option<i32> {
        let netns = tun::namespace(&self.shared.fd).ok()?;
        if identity(&netns) == self.shared.home {
            return None;
        }
        link::netnsid_of(netns.as_fd()).ok()
    }

    fn own_device(&self) -> Option<u32> {
        // Elsewhere the index may be another's here.
        let netns = tun::namespace(&self.shared.fd).ok()?;
        (identity(&netns)? == self.shared.home?).then_some(self.shared.index)
    }
}

impl Tap {
    fn write(&self, frame: &Frame) -> Result<usize, Errno> {
        let (mut header, mut tag) = ([0; HEADER_BYTES], [0; 4]);
        let parts = mmsg::parts(frame, &mut header, &mut tag).map(IoSlice::new);
        rustix::io::retry_on_intr(|| rustix::io::writev(&self.shared.fd, &parts))
    }
}

struct Queue {
    shared: Arc<Shared>,
}

impl Queue {
    /// One frame; `Ok(None)` if it was lost.
    fn read(
        &self,
        slot: &mut mmsg::Slot,
        pool: &mut Pool,
        errors: &mut RxErrors,
    ) -> Result<Option<Frame>, Errno> {
        let mut header = [0; HEADER_BYTES];
        let (split, length) = {
            let small = slot.small.space_mut();
            let split = small.len();
            let rest = slot.large.space_mut().get_mut(split..).unwrap_or_default();
            let capacity = HEADER_BYTES + split + rest.len();
            let mut parts = [
                IoSliceMut::new(&mut header),
                IoSliceMut::new(small),
                IoSliceMut::new(rest),
            ];
            let length = rustix::io::readv(&self.shared.fd, &mut parts)?;
            if length >= capacity {
                // The kernel cuts a longer packet off without a word.
                errors.truncated += 1;
                return Ok(None);
            }
            (split, length)
        };
        let Some(length) = length
            .checked_sub(HEADER_BYTES)
            .filter(|len| *len >= ETHERNET)
        else {
            errors.runt += 1;
            return Ok(None);
        };
        let Ok(offload) = virtio::decode(&header, length) else {
            errors.malformed += 1;
            return Ok(None);
        };
        let mut frame = if length <= split {
            std::mem::replace(&mut slot.small, pool.small())
        } else {
            let front = slot.small.space_mut();
            if let Some(to) = slot.large.space_mut().get_mut(..split) {
                to.copy_from_slice(front);
            }
            std::mem::replace(&mut slot.large, pool.large())
        };
        frame.set_len(length);
        frame.offload = offload;
        Ok(Some(frame))
    }
}

impl RxQueue for Queue {
    fn receive(
        &mut self,
        pool: &mut Pool,
        out: &mut Vec<Frame>,
        max: usize,
    ) -> Result<RxStatus, Error> {
        let mut errors = RxErrors::default();
        let mut slot = mmsg::Slot {
            small: pool.small(),
            large: pool.large(),
        };
        let mut end = Ok(RxStatus::Open { more: true, errors });
        for _ in 0..max {
            match self.read(&mut slot, pool, &mut errors) {
                Ok(frame) => out.extend(frame),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    end = match errno {
                        Errno::AGAIN => Ok(RxStatus::Open {
                            more: false,
                            errors,
                        }),
                        Errno::BADFD | Errno::FAULT => Ok(RxStatus::Gone),
                        errno => Err(Error::os(
                            errno,
                            format!("receive from {}", self.shared.name),
                        )),
                    };
                    break;
                }
            }
        }
        pool.put(slot.large);
        pool.put(slot.small);
        if errors.total() > 0 {
            self.shared.truncated.fetch_add(errors.truncated, Relaxed);
            self.shared.malformed.fetch_add(errors.malformed, Relaxed);
            self.shared.runt.fetch_add(errors.runt, Relaxed);
        }
        end.map(|status| match status {
            RxStatus::Open { more, .. } => RxStatus::Open { more, errors },
            RxStatus::Gone => RxStatus::Gone,
        })
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}
