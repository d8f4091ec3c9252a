//! The descriptor: it owns the kernel's side of the rings.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::receiver::Receiver;
use super::ring::{Consumer, Producer};
use super::sender::Sender;
use super::umem::{CHUNK, Chunk, Copying, Given, Lease, Left};
use crate::sys::{check, last, set_option};

/// How many entries the rings have, and chunks the halves. Powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) receive: u32,
    pub(crate) transmit: u32,
}

impl Sizes {
    /// Chunks that it needs.
    pub(crate) fn chunks(self) -> u32 {
        self.receive + self.transmit
    }

    /// Bytes of memory for frames.
    pub(crate) fn bytes(self) -> usize {
        self.chunks() as usize * CHUNK
    }
}

/// What the socket lost, as the kernel counts it (`struct xdp_statistics`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Statistics {
    /// No chunk in the fill ring (copy mode), too long, or no memory.
    pub(crate) dropped: u64,
    /// The receive ring was full.
    pub(crate) ring_full: u64,
    /// How often the fill ring was found empty; each time a frame lost in copy mode.
    pub(crate) fill_empty: u64,
}

/// What a kick led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kicked {
    /// The kernel looked at the ring.
    Yes,
    /// It has done what it does in one call, or the device is busy: kick again.
    Again,
    /// The device is down.
    Down,
    /// The socket isn't bound any more: the device is gone.
    Gone,
    /// It failed otherwise.
    Failed(Errno),
}

impl From<Result<libc::c_int, Errno>> for Kicked {
    fn from(result: Result<libc::c_int, Errno>) -> Self {
        match result {
            Ok(_) => Self::Yes,
            Err(Errno::AGAIN | Errno::BUSY | Errno::NOBUFS | Errno::INTR) => Self::Again,
            Err(Errno::NETDOWN) => Self::Down,
            Err(Errno::NXIO | Errno::NODEV | Errno::BADF) => Self::Gone,
            Err(errno) => Self::Failed(errno),
        }
    }
}

/// The descriptor and what the socket's halves left behind, until all of them are gone and it closes.
#[derive(Debug)]
pub(crate) struct Descriptor {
    /// Until it is closed.
    fd: Option<OwnedFd>,
    left: Mutex<Left>,
    lease: Arc<Lease>,
}

impl Descriptor {
    /// The chunks of one of the halves.
    pub(super) fn leave(&self, ours: &mut Vec<Chunk>, kernels: &mut Given) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.add(ours, kernels);
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // Closed by this: no half has its rings mapped any more, and nobody else the descriptor.
        drop(self.fd.take());
        let left = self.left.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.lease.umem().put_left(std::mem::take(left));
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

/// An AF_XDP socket. Non-blocking, closed on exec.
#[derive(Debug)]
pub(crate) struct XskSocket {
    descriptor: Arc<Descriptor>,
    /// It hasn't registered the memory, but shares that of sockets that are bound.
    shares: bool,
}

/// `getsockopt` of a plain structure; gives how many bytes of it the kernel has filled in.
fn get_option<T: Copy>(
    fd: BorrowedFd<'_>,
    option: libc::c_int,
    value: &mut T,
) -> Result<usize, Errno> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: both point at values that live until the call returns, of the length given; the callers
    // give the structures that the options fill, all of integers.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_mut(value).cast(),
            &mut length,
        )
    })?;
    Ok(length as usize)
}

impl XskSocket {
    /// A socket with rings, on a port's memory, and its two halves; not bound yet. `ENOBUFS`: more memory
    /// than may be locked (RLIMIT_MEMLOCK, without CAP_IPC_LOCK). `EAFNOSUPPORT`: no AF_XDP in this kernel.
    pub(crate) fn new(lease: &Arc<Lease>, sizes: Sizes) -> Result<(Self, Receiver, Sender), Errno> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_XDP, kind, 0) };
        if fd < 0 {
            return Err(last());
        }
        // SAFETY: the descriptor is new, so nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let umem = lease.umem();
        let descriptor = Arc::new(Descriptor {
            fd: Some(fd),
            left: Mutex::default(),
            lease: Arc::clone(lease),
        });
        let socket = Self {
            descriptor: Arc::clone(&descriptor),
            shares: !umem.sharers().is_empty(),
        };
        let set = |option, value: u32| set_option(socket.as_fd(), libc::SOL_XDP, option, value);
        if !socket.shares {
            let registration = libc::xdp_umem_reg {
                addr: umem.address(),
                len: umem.length(),
                chunk_size: CHUNK as u32,
                headroom: 0,
                flags: 0,
                tx_metadata_len: 0,
            };
            set_option(
                socket.as_fd(),
                libc::SOL_XDP,
                libc::XDP_UMEM_REG,
                registration,
            )?;
        }
        set(libc::XDP_UMEM_FILL_RING, sizes.receive)?;
        set(libc::XDP_UMEM_COMPLETION_RING, sizes.transmit)?;
        set(libc::XDP_RX_RING, sizes.receive)?;
        set(libc::XDP_TX_RING, sizes.transmit)?;
        let none = libc::xdp_ring_offset {
            producer: 0,
            consumer: 0,
            desc: 0,
            flags: 0,
        };
        let mut offsets = libc::xdp_mmap_offsets {
            rx: none,
            tx: none,
            fr: none,
            cr: none,
        };
        let filled = get_option(socket.as_fd(), libc::XDP_MMAP_OFFSETS, &mut offsets)?;
        if filled < size_of::<libc::xdp_mmap_offsets>() {
            // Before Linux 5.4 there are no flags in it.
            return Err(Errno::OPNOTSUPP);
        }
        let fd = socket.as_fd();
        let receiver = Receiver::new(
            umem,
            Consumer::map(
                fd,
                libc::XDP_PGOFF_RX_RING as u64,
                offsets.rx,
                sizes.receive,
            )?,
            Producer::map(
                fd,
                libc::XDP_UMEM_PGOFF_FILL_RING,
                offsets.fr,
                sizes.receive,
            )?,
            sizes.receive,
            Some(Arc::clone(&descriptor)),
        );
        let sender = Sender::new(
            umem,
            Producer::map(
                fd,
                libc::XDP_PGOFF_TX_RING as u64,
                offsets.tx,
                sizes.transmit,
            )?,
            Consumer::map(
                fd,
                libc::XDP_UMEM_PGOFF_COMPLETION_RING,
                offsets.cr,
                sizes.transmit,
            )?,
            Some(descriptor),
        );
        Ok((socket, receiver, sender))
    }

    /// To one queue of a device, as the memory's [`Kind`](super::umem::Kind) says. `EBUSY`: another socket
    /// has it, or had it a moment ago. `EINVAL`: no such queue. `EBADF`: nobody is left by whom memory could
    /// be shared.
    pub(crate) fn bind(&self, ifindex: u32, queue: u32) -> Result<(), Errno> {
        let umem = self.descriptor.lease.umem();
        let bind = |flags, sharer: Option<&Arc<Descriptor>>| {
            let address = libc::sockaddr_xdp {
                sxdp_family: libc::AF_XDP as u16,
                sxdp_flags: flags,
                sxdp_ifindex: ifindex,
                sxdp_queue_id: queue,
                sxdp_shared_umem_fd: sharer.map_or(0, |sharer| sharer.as_raw_fd() as u32),
            };
            // SAFETY: `address` is a local of the length given.
            check(unsafe {
                libc::bind(
                    self.descriptor.as_raw_fd(),
                    std::ptr::from_ref(&address).cast(),
                    size_of::<libc::sockaddr_xdp>() as libc::socklen_t,
                )
            })
        };
        let result = if !self.shares {
            let kind = umem.kind().ok_or(Errno::INVAL)?;
            let copying = match kind.copying {
                Copying::Copy => libc::XDP_COPY,
                Copying::Zero => libc::XDP_ZEROCOPY,
            };
            let several = if kind.several { libc::XDP_USE_SG } else { 0 };
            bind(libc::XDP_USE_NEED_WAKEUP | copying | several, None)
        } else {
            let sharers = umem.sharers();
            let mut tries = sharers
                .iter()
                .map(|sharer| bind(libc::XDP_SHARED_UMEM, Some(sharer)));
            // A socket whose device is gone shares no more.
            tries
                .find(|result| *result != Err(Errno::BADF))
                .unwrap_or(Err(Errno::BADF))
        };
        result.map(|_| umem.is_bound(Arc::downgrade(&self.descriptor)))
    }

    /// Makes the kernel look at the transmit ring: in copy mode it sends some 32 frames (a budget
    /// that newer kernels let one choose), so kick until none waits.
    pub(crate) fn kick(&self) -> Kicked {
        // SAFETY: no buffer, no address.
        let sent = unsafe {
            libc::sendto(
                self.descriptor.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                std::ptr::null(),
                0,
            )
        };
        Kicked::from(if sent < 0 { Err(last()) } else { Ok(0) })
    }

    /// Makes the driver look at the fill ring, where it waits for that; and tells how the device is.
    pub(crate) fn wake(&self) -> Kicked {
        // SAFETY: no buffer, no address.
        let received = unsafe {
            libc::recvfrom(
                self.descriptor.as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
        Kicked::from(if received < 0 { Err(last()) } else { Ok(0) })
    }

    /// What was lost since the socket was made.
    pub(crate) fn statistics(&self) -> Result<Statistics, Errno> {
        let mut all = libc::xdp_statistics {
            rx_dropped: 0,
            rx_invalid_descs: 0,
            tx_invalid_descs: 0,
            rx_ring_full: 0,
            rx_fill_ring_empty_descs: 0,
            tx_ring_empty_descs: 0,
        };
        // An older kernel fills in the first three only; the rest stays zero.
        get_option(self.as_fd(), libc::XDP_STATISTICS, &mut all)?;
        Ok(Statistics {
            dropped: all.rx_dropped,
            ring_full: all.rx_ring_full,
            fill_empty: all.rx_fill_ring_empty_descs,
        })
    }

    /// Whether the driver really works on our chunks.
    pub(crate) fn is_zero_copy(&self) -> Result<bool, Errno> {
        let mut options = libc::xdp_options { flags: 0 };
        get_option(self.as_fd(), libc::XDP_OPTIONS, &mut options)?;
        Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
    }
}

impl AsFd for XskSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open for as long as the descriptor is borrowed: only its `drop` closes it.
        unsafe { BorrowedFd::borrow_raw(self.descriptor.as_raw_fd()) }
    }
}
