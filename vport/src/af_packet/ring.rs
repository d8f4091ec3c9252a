//! The receive ring of a queue: when there is one, how large, and when it is given up.
//!
//! # Where there is a ring
//! Linux (6.18 and before) loses a ring for good when a packet comes whose GSO a virtio-net header can't
//! say: the slot that it was to have stays reserved, and whatever comes after it is dropped. So there is a
//! ring only where such packets are rare, which is on veths (a TAP's other end may send UDP to be cut into
//! fragments; between veths the kernel cuts it), with a filter in front that refuses SCTP to be segmented. (Without
//! a ring these packets are lost just so.) What comes to grief all the same is found by
//! [`ReceiveRing::check`]: drops while the ring is empty and nothing has been taken from it. The socket
//! then goes back to its queue, for good.
//!
//! # How large
//! 4 MiB (2048 slots) while all rings together are small, then 1 MiB, then none: 512 MiB in all,
//! or a sixteenth of the machine's memory if that is less.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::link::Link;
use crate::open::RingChoice;
use crate::sys::bpf;
use crate::sys::packet_socket::PacketSocket;
use crate::sys::rx_ring::RxRing;

const LARGE: usize = 4 << 20;
const SMALL: usize = 1 << 20;
const MOST: usize = 512 << 20;

/// Bytes of all rings of the process.
static IN_USE: AtomicUsize = AtomicUsize::new(0);

/// A part of what all rings may have together.
#[derive(Debug)]
struct Share(usize);

impl Share {
    fn take() -> Option<Self> {
        let info = rustix::system::sysinfo();
        let memory = usize::try_from(info.totalram).unwrap_or(usize::MAX);
        let memory = memory.saturating_mul(info.mem_unit.max(1) as usize);
        let limit = (memory / 16).min(MOST);
        [(LARGE, limit / 2), (SMALL, limit)]
            .into_iter()
            .find_map(|(bytes, limit)| {
                IN_USE
                    .fetch_update(Relaxed, Relaxed, |used| {
                        used.checked_add(bytes).filter(|sum| *sum <= limit)
                    })
                    .ok()
                    .map(|_| Self(bytes))
            })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        IN_USE.fetch_sub(self.0, Relaxed);
    }
}

/// A ring in use.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) ring: RxRing,
    /// [`RxRing::taken`] at the last check.
    seen: u64,
    _share: Share,
}

/// A queue's ring, or why there is none.
#[derive(Debug)]
pub(super) struct ReceiveRing {
    // A leaf: held by the queue's owner while it receives, by others only for the moment of a check.
    open: Mutex<Result<Open, String>>,
}

impl ReceiveRing {
    /// Tries to make one on a socket that isn't bound yet.
    pub(super) fn new(socket: &PacketSocket, captured: &Link, choice: RingChoice) -> Self {
        let open = match choice {
            RingChoice::Never => Err(String::from("as asked")),
            RingChoice::Auto if captured.kind.as_deref() != Some("veth") => {
                Err(String::from("not a veth"))
            }
            RingChoice::Auto | RingChoice::Always => Self::open(socket),
        };
        Self {
            open: Mutex::new(open),
        }
    }

    fn open(socket: &PacketSocket) -> Result<Open, String> {
        let share = Share::take().ok_or("other ports' rings have all the memory for it")?;
        let filter = bpf::sayable().map_err(|errno| format!("filter: {errno}"))?;
        let ring = RxRing::new(socket, share.0).map_err(|errno| errno.to_string())?;
        let open = Open {
            ring,
            seen: 0,
            _share: share,
        };
        match socket.set_filter(filter.as_fd()) {
            Ok(()) => Ok(open),
            Err(errno) => {
                let why = format!("filter: {errno}");
                match open.ring.remove(socket) {
                    Ok(()) => Err(why),
                    Err(errno) => Err(format!("{why}; {errno}")),
                }
            }
        }
    }

    /// To be held while receiving.
    pub(super) fn lock(&self) -> MutexGuard<'_, Result<Open, String>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the ring up if the kernel has lost it. `drops`: how many frames it has dropped since the
    /// last call. Errors: the socket receives nothing any more.
    pub(super) fn check(&self, socket: &PacketSocket, drops: u32) -> Result<bool, Errno> {
        let mut guard = self.lock();
        let Ok(open) = &mut *guard else {
            return Ok(false);
        };
        let idle = open.ring.taken() == open.seen && open.ring.ready(1).0 == 0;
        open.seen = open.ring.taken();
        if !idle || drops == 0 {
            return Ok(false);
        }
        let lost = std::mem::replace(
            &mut *guard,
            Err(String::from(
                "lost to a packet that has no virtio-net header",
            )),
        );
        // Taking it apart waits for other CPUs; the queue's owner shall not wait with us.
        drop(guard);
        if let Ok(open) = lost {
            open.ring.remove(socket)?;
            socket.remove_filter()?;
        }
        Ok(true)
    }

    /// For `status`.
    pub(super) fn describe(&self) -> String {
        match &*self.lock() {
            Ok(open) => format!("receive ring of {} slots", open.ring.slots()),
            Err(why) => format!("no receive ring ({why})"),
        }
    }
}
