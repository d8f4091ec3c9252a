//! Packet sockets as the sender, the bare forwarders and the receivers use them. Sources: packet(7),
//! uapi `linux/if_packet.h`.
#![allow(unsafe_code)] // rings, sendmmsg and recvmmsg have no safe form in libc or rustix

use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Frames in one system call.
pub const BATCH: usize = 32;

/// Bytes of `struct virtio_net_hdr`.
pub const VNET: usize = 10;

/// A packet socket bound to one device of the thread's network namespace.
#[derive(Debug)]
pub struct Wire {
    fd: OwnedFd,
}

/// What a socket is for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish {
    /// Receives what comes in through the device; without it the socket only sends.
    pub receives: bool,
    /// Frames have a virtio-net header, in both directions.
    pub vnet: bool,
    /// Past the queueing discipline.
    pub qdisc_bypass: bool,
    /// The kernel's time of arrival with each frame.
    pub timestamps: bool,
}

impl Wire {
    /// Opens a socket on the device `name`.
    ///
    /// # Errors
    /// Those of the system calls; ENODEV if there is no such device.
    pub fn open(name: &str, wish: Wish) -> io::Result<Self> {
        let wire = Self::unbound(wish)?;
        wire.bind(name, wish.receives)?;
        Ok(wire)
    }

    fn unbound(wish: Wish) -> io::Result<Self> {
        // Protocol 0: nothing is received before bind() says from which device.
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let wire = Self { fd };
        let packet = libc::SOL_PACKET;
        if wish.vnet {
            wire.set(packet, libc::PACKET_VNET_HDR, &1_i32)?;
        }
        if wish.qdisc_bypass {
            wire.set(packet, libc::PACKET_QDISC_BYPASS, &1_i32)?;
        }
        if wish.timestamps {
            wire.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1_i32)?;
        }
        if wish.receives {
            wire.set(packet, libc::PACKET_IGNORE_OUTGOING, &1_i32)?;
            wire.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(64_i32 << 20))?;
        }
        wire.set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &(4_i32 << 20))?;
        Ok(wire)
    }

    fn bind(&self, name: &str, receives: bool) -> io::Result<()> {
        let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the string ends in NUL and outlives the call.
        let ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if ifindex == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: sockaddr_ll is plain old data, for which all zeroes is a value.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = ifindex as i32;
        if receives {
            address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        }
        // SAFETY: pointer and length describe `address`, which outlives the call.
        let bound = unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        checked(bound).map(drop)
    }

    fn set<T: Copy>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        // SAFETY: pointer and length describe `value`, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                size_of::<T>() as u32,
            )
        };
        checked(set).map(drop)
    }

    /// Sends frames, up to [`BATCH`]; gives how many the kernel took.
    ///
    /// # Errors
    /// Those of sendmmsg(2) about the first frame.
    pub fn send(&self, frames: &[&[u8]]) -> io::Result<usize> {
        // SAFETY: all-zero is valid for mmsghdr and iovec: null pointers and zero lengths.
        let (mut messages, mut vectors) = unsafe {
            (
                zeroed::<[libc::mmsghdr; BATCH]>(),
                zeroed::<[libc::iovec; BATCH]>(),
            )
        };
        let count = frames.len().min(BATCH);
        for (frame, (message, vector)) in frames.iter().zip(messages.iter_mut().zip(&mut vectors)) {
            vector.iov_base = frame.as_ptr().cast_mut().cast();
            vector.iov_len = frame.len();
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: the first `count` messages point at vectors (a local) and at frames borrowed until
        // the call returns; the kernel only reads them.
        let sent = unsafe {
            libc::sendmmsg(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr(),
                count as u32,
                libc::MSG_NOSIGNAL,
            )
        };
        checked(sent)
    }

    /// Receives into `buffers`, up to [`BATCH`] of them, without waiting; `lengths` gets the frames'.
    /// Gives their number.
    ///
    /// # Errors
    /// Those of recvmmsg(2): `WouldBlock` if there is none.
    pub fn receive(&self, buffers: &mut [Vec<u8>], lengths: &mut [usize]) -> io::Result<usize> {
        // SAFETY: all-zero is valid for mmsghdr and iovec.
        let (mut messages, mut vectors) = unsafe {
            (
                zeroed::<[libc::mmsghdr; BATCH]>(),
                zeroed::<[libc::iovec; BATCH]>(),
            )
        };
        let count = buffers.len().min(BATCH);
        let places = messages.iter_mut().zip(&mut vectors);
        for (buffer, (message, vector)) in buffers.iter_mut().zip(places) {
            vector.iov_base = buffer.as_mut_ptr().cast();
            vector.iov_len = buffer.len();
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: the first `count` messages point at vectors (a local) and at buffers borrowed
        // mutably until the call returns, each with its own length.
        let received = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr(),
                count as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let received = checked(received)?.min(count);
        for (length, message) in lengths.iter_mut().zip(&messages).take(received) {
            *length = message.msg_len as usize;
        }
        Ok(received)
    }

    /// The next frame, its length, and when it arrived: nanoseconds of the real-time clock (of a
    /// socket with [`Wish::timestamps`]).
    ///
    /// # Errors
    /// Those of recvmsg(2): `WouldBlock` if there is none.
    pub fn receive_stamped(&self, buffer: &mut [u8]) -> io::Result<(usize, i64)> {
        let mut control = [0_u64; 8];
        let mut vector = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: msghdr is plain old data, for which all zeroes is a value.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &raw mut vector;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        // SAFETY: the header points at buffers that outlive the call, with their own lengths.
        let length =
            unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        let mut stamp = 0;
        // SAFETY: the header is as recvmsg left it; the CMSG macros stay within msg_controllen, and
        // the kernel wrote a timespec behind a header of that kind.
        unsafe {
            let message = libc::CMSG_FIRSTHDR(&raw const header);
            if !message.is_null()
                && (*message).cmsg_level == libc::SOL_SOCKET
                && (*message).cmsg_type == libc::SCM_TIMESTAMPNS
            {
                let at = libc::CMSG_DATA(message)
                    .cast::<libc::timespec>()
                    .read_unaligned();
                stamp = at.tv_sec * 1_000_000_000 + at.tv_nsec;
            }
        }
        Ok((length, stamp))
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn checked(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

const BLOCK: usize = 1 << 18;
const BLOCKS: usize = 32;
/// Where the kernel writes a block's status: behind version and offset of its descriptor.
const BLOCK_STATUS: usize = 8;
const BLOCK_PACKETS: usize = 12;
const BLOCK_FIRST: usize = 16;

/// A socket with a TPACKET_V3 receive ring: frames are read where the kernel has put them.
#[derive(Debug)]
pub struct Ring {
    wire: Wire,
    memory: NonNull<u8>,
    next: usize,
}

// SAFETY: the mapping is owned by this value and used through `&mut self` only.
unsafe impl Send for Ring {}

impl Ring {
    /// Opens a receive ring on the device `name`.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn open(name: &str) -> io::Result<Self> {
        let wire = Wire::unbound(Wish {
            receives: true,
            ..Wish::default()
        })?;
        let version = libc::tpacket_versions::TPACKET_V3 as i32;
        wire.set(libc::SOL_PACKET, libc::PACKET_VERSION, &version)?;
        let request = libc::tpacket_req3 {
            tp_block_size: BLOCK as u32,
            tp_block_nr: BLOCKS as u32,
            tp_frame_size: 2048,
            tp_frame_nr: (BLOCK / 2048 * BLOCKS) as u32,
            tp_retire_blk_tov: 1,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        wire.set(libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        let memory = map(&wire, BLOCK * BLOCKS)?;
        let ring = Self {
            wire,
            memory,
            next: 0,
        };
        ring.wire.bind(name, true)?;
        Ok(ring)
    }

    /// Hands the next block's frames to `take`, up to [`BATCH`] at a time. False: no block is ready.
    pub fn block(&mut self, mut take: impl FnMut(&[&[u8]])) -> bool {
        // SAFETY: `next` < BLOCKS, so the descriptor lies within the mapping, aligned as the kernel
        // laid it out; the status is shared with the kernel as an atomic only.
        let (block, status) = unsafe {
            let block = self.memory.as_ptr().add(self.next * BLOCK);
            (block, AtomicU32::from_ptr(block.add(BLOCK_STATUS).cast()))
        };
        if status.load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return false;
        }
        // SAFETY: the block is ours until its status says otherwise, and its descriptor is written.
        let (count, first) = unsafe {
            (
                block.add(BLOCK_PACKETS).cast::<u32>().read(),
                block.add(BLOCK_FIRST).cast::<u32>().read(),
            )
        };
        let mut frames: [&[u8]; BATCH] = [&[]; BATCH];
        let (mut filled, mut at) = (0, first as usize);
        for _ in 0..count {
            // SAFETY: the kernel chains `count` tpacket3_hdr within the block, each with its frame at
            // tp_mac of tp_snaplen bytes, which stay as they are until the block is given back.
            let header = unsafe {
                let packet = block.add(at);
                let header = packet.cast::<libc::tpacket3_hdr>().read();
                let data = packet.add(usize::from(header.tp_mac));
                frames[filled] = std::slice::from_raw_parts(data, header.tp_snaplen as usize);
                header
            };
            filled += 1;
            at += header.tp_next_offset as usize;
            if filled == BATCH {
                take(&frames);
                filled = 0;
            }
        }
        take(&frames[..filled]);
        status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % BLOCKS;
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length and nothing refers to it any more.
        unsafe {
            libc::munmap(self.memory.as_ptr().cast(), BLOCK * BLOCKS);
        }
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

/// Bytes of a slot of a [`FrameRing`], and how many it has.
const SLOT: usize = 2048;
const SLOTS: usize = 4096;

/// A socket with a TPACKET_V2 receive ring and virtio-net headers. A frame is there as soon as it has
/// arrived; one that is longer than a slot comes whole by the socket's queue (PACKET_COPY_THRESH), in
/// its turn.
///
/// Linux (6.18 and before) loses such a ring for good when a packet comes whose GSO a virtio-net header
/// can't say (SCTP; UDP to be cut into fragments): its slot stays reserved. The benches send none;
/// [`FrameRing::is_lost`] tells, so that a floor that has gone deaf isn't measured.
#[derive(Debug)]
pub struct FrameRing {
    wire: Wire,
    memory: NonNull<u8>,
    next: usize,
    long: Vec<Vec<u8>>,
    /// Nothing has come since [`FrameRing::is_lost`] was asked.
    quiet: bool,
}

// SAFETY: the mapping is owned by this value and used through `&mut self` only.
unsafe impl Send for FrameRing {}

impl FrameRing {
    /// Opens a receive ring on the device `name`.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn open(name: &str) -> io::Result<Self> {
        let wire = Wire::unbound(Wish {
            receives: true,
            vnet: true,
            ..Wish::default()
        })?;
        let version = libc::tpacket_versions::TPACKET_V2 as i32;
        wire.set(libc::SOL_PACKET, libc::PACKET_VERSION, &version)?;
        wire.set(libc::SOL_PACKET, libc::PACKET_COPY_THRESH, &1_i32)?;
        let request = libc::tpacket_req {
            tp_block_size: (SLOT * 32) as u32,
            tp_block_nr: (SLOTS / 32) as u32,
            tp_frame_size: SLOT as u32,
            tp_frame_nr: SLOTS as u32,
        };
        wire.set(libc::SOL_PACKET, libc::PACKET_RX_RING, &request)?;
        let memory = map(&wire, SLOT * SLOTS)?;
        let ring = Self {
            wire,
            memory,
            next: 0,
            long: vec![vec![0; 70_000]; BATCH],
            quiet: false,
        };
        ring.wire.bind(name, true)?;
        Ok(ring)
    }

    /// Whether the kernel has dropped frames since it was asked last, though the ring is empty. To be
    /// asked when nothing has come for a while.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn is_lost(&mut self) -> io::Result<bool> {
        // struct tpacket_stats: packets, drops. Reading clears it.
        let mut stats = [0_u32; 2];
        let mut length = size_of_val(&stats) as u32;
        // SAFETY: pointer and length describe locals that outlive the call.
        let read = unsafe {
            libc::getsockopt(
                self.wire.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                stats.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        checked(read)?;
        let was_quiet = std::mem::replace(&mut self.quiet, true);
        Ok(was_quiet && stats[1] != 0)
    }

    /// Hands what has arrived to `take`, up to [`BATCH`] frames, each behind its virtio-net header.
    /// False: there is nothing.
    pub fn batch(&mut self, take: impl FnOnce(&[&[u8]])) -> bool {
        // SAFETY: `n` < SLOTS, so the slot lies within the mapping, its header aligned; the status is
        // shared with the kernel as an atomic only.
        let slot = |n: usize| unsafe {
            let slot = self.memory.as_ptr().add(n % SLOTS * SLOT);
            (slot, AtomicU32::from_ptr(slot.cast()))
        };
        let mut lengths = [0; BATCH];
        let mut count = 0;
        while count < BATCH {
            let (_, status) = slot(self.next + count);
            let status = status.load(Ordering::Acquire);
            if status & libc::TP_STATUS_USER == 0 {
                break;
            }
            if status & libc::TP_STATUS_COPY != 0 {
                let at = count..=count;
                // A frame that the queue had no room for is lost: of length 0.
                let _ = self
                    .wire
                    .receive(&mut self.long[at.clone()], &mut lengths[at]);
            }
            count += 1;
        }
        let mut frames: [&[u8]; BATCH] = [&[]; BATCH];
        let mut filled = 0;
        for (n, length) in lengths.iter().enumerate().take(count) {
            let (memory, status) = slot(self.next + n);
            if status.load(Ordering::Relaxed) & libc::TP_STATUS_COPY != 0 {
                frames[filled] = &self.long[n][..*length];
                filled += usize::from(*length != 0);
                continue;
            }
            // SAFETY: the slot is ours until its status says otherwise; the kernel has put the frame at
            // tp_mac and the virtio-net header before it.
            frames[filled] = unsafe {
                let header = memory.cast::<libc::tpacket2_hdr>().read();
                let data = memory.add(usize::from(header.tp_mac) - VNET);
                std::slice::from_raw_parts(data, header.tp_snaplen as usize + VNET)
            };
            filled += 1;
        }
        take(&frames[..filled]);
        for n in 0..count {
            let (_, status) = slot(self.next + n);
            status.store(libc::TP_STATUS_KERNEL, Ordering::Release);
        }
        self.next = (self.next + count) % SLOTS;
        self.quiet &= count == 0;
        count != 0
    }
}

impl Drop for FrameRing {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length and nothing refers to it any more.
        unsafe {
            libc::munmap(self.memory.as_ptr().cast(), SLOT * SLOTS);
        }
    }
}

impl AsFd for FrameRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

fn map(wire: &Wire, length: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a new shared mapping of the socket's ring, at an address that the kernel chooses.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            wire.fd.as_raw_fd(),
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(memory.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Nanoseconds of the real-time clock, which the kernel's time stamps are of.
pub fn realtime() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}
