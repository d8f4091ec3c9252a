//! A transmit ring on a packet socket (PACKET_TX_RING, TPACKET_V2), as a way to send frames whose
//! length the kernel checks for `sendmsg` but not for rings with virtio-net headers. For a few odd
//! frames: each is a system call of its own.
//!
//! # Contract with the kernel
//! A slot is ours while its status is AVAILABLE, the kernel's from SEND_REQUEST until it has set it
//! back, which it does when the packet is freed or handed to another owner (a veth does so before
//! the packet is read). So the kernel is made to copy the whole frame at once: the virtio-net header
//! says that all of it is header.
//!
//! # Synchronization
//! The status word passes a slot: we store SEND_REQUEST with Release after writing the frame, and
//! load it with Acquire before writing the next. Everything else is used through `&mut`.
//!
//! Source: uapi `linux/if_packet.h`; Documentation/networking/packet_mmap.rst.

use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use frame::Frame;
use frame::virtio::HEADER_BYTES;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::packet_socket::PacketSocket;
use super::{last, mmsg, set_option};

const PACKET_VERSION: libc::c_int = 10;
const PACKET_TX_RING: libc::c_int = 13;
const TPACKET_V2: libc::c_int = 1;
const STATUS_AVAILABLE: u32 = 0;
const STATUS_SEND_REQUEST: u32 = 1;
/// Where a slot's frame begins: behind `struct tpacket2_hdr`, of which the first word is the status
/// and the second the length.
const DATA: usize = 32;
const LENGTH: usize = 4;
const SLOTS: usize = 16;
const PAGE: usize = 4096;

/// `struct tpacket_req`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    block_size: libc::c_uint,
    blocks: libc::c_uint,
    frame_size: libc::c_uint,
    frames: libc::c_uint,
}

/// A bound socket, and the ring once there is one.
#[derive(Debug)]
pub(crate) struct TxRing {
    socket: PacketSocket,
    ring: Option<Mapping>,
    /// The slot at which the kernel looks next.
    next: usize,
}

/// The slots in memory.
#[derive(Debug)]
struct Mapping {
    /// Mapped, `SLOTS * slot_size` bytes.
    memory: NonNull<u8>,
    slot_size: usize,
}

// SAFETY: the mapping belongs to this value alone (the kernel aside), and no thread-local state is
// involved; all access is through `&mut TxRing`.
unsafe impl Send for Mapping {}

impl Mapping {
    /// How long a frame, tags included, has room.
    fn longest(&self) -> usize {
        self.slot_size - DATA - HEADER_BYTES
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length by `TxRing::fit`, not used after this.
        let result =
            unsafe { rustix::mm::munmap(self.memory.as_ptr().cast(), SLOTS * self.slot_size) };
        debug_assert!(result.is_ok());
    }
}

impl TxRing {
    /// On a socket that has virtio-net headers and is bound to the device. No memory is used yet.
    pub(crate) fn new(socket: PacketSocket) -> Result<Self, Errno> {
        set_option(socket.as_fd(), libc::SOL_PACKET, PACKET_VERSION, TPACKET_V2)?;
        Ok(Self {
            socket,
            ring: None,
            next: 0,
        })
    }

    /// Makes the slots large enough for frames of `longest` bytes, tags included.
    pub(crate) fn fit(&mut self, longest: usize) -> Result<(), Errno> {
        if self
            .ring
            .as_ref()
            .is_some_and(|ring| ring.longest() >= longest)
        {
            return Ok(());
        }
        self.reset()?;
        let slot_size = (DATA + HEADER_BYTES + longest).next_multiple_of(PAGE);
        self.request(slot_size, SLOTS)?;
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel checks the length.
        let memory = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                SLOTS * slot_size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                self.socket.as_fd(),
                0,
            )?
        };
        let memory = NonNull::new(memory.cast()).ok_or(Errno::NOMEM)?;
        self.ring = Some(Mapping { memory, slot_size });
        Ok(())
    }

    /// Gives the slots back; the next [`fit`](Self::fit) begins anew.
    pub(crate) fn reset(&mut self) -> Result<(), Errno> {
        self.next = 0;
        match self.ring.take() {
            // A ring can be changed only when nobody has it mapped: dropped first.
            Some(ring) => {
                drop(ring);
                self.request(0, 0)
            }
            None => Ok(()),
        }
    }

    fn request(&self, slot_size: usize, slots: usize) -> Result<(), Errno> {
        let request = Request {
            block_size: slot_size as libc::c_uint,
            blocks: slots as libc::c_uint,
            frame_size: slot_size as libc::c_uint,
            frames: slots as libc::c_uint,
        };
        set_option(
            self.socket.as_fd(),
            libc::SOL_PACKET,
            PACKET_TX_RING,
            request,
        )
    }

    /// Sends one frame without blocking. `AGAIN`: all slots are on their way. `MSGSIZE`:
    /// it doesn't [`fit`](Self::fit).
    pub(crate) fn send(&mut self, frame: &Frame) -> Result<(), Errno> {
        let (mut header, mut tag) = ([0; HEADER_BYTES], [0; 4]);
        mmsg::parts(frame, &mut header, &mut tag);
        let length = frame.wire_len();
        // virtio_net_hdr.hdr_len: all of it is to be copied.
        let hdr_len = u16::try_from(length).map_err(|_| Errno::MSGSIZE)?;
        let [flags, kind, _, _, rest @ ..] = header;
        let [high, low] = hdr_len.to_ne_bytes();
        let [size0, size1, start0, start1, offset0, offset1] = rest;
        let header = [
            flags, kind, high, low, size0, size1, start0, start1, offset0, offset1,
        ];
        let (front, back) = frame
            .bytes()
            .split_at_checked(if frame.vlan.is_some() { 12 } else { 0 })
            .ok_or(Errno::INVAL)?;
        let tag: &[u8] = if frame.vlan.is_some() { &tag } else { &[] };
        let ring = self.ring.as_ref().ok_or(Errno::MSGSIZE)?;
        if length > ring.longest() {
            return Err(Errno::MSGSIZE);
        }

        // SAFETY: `next < SLOTS`, so the slot lies within the mapping; its first word is aligned (slots
        // are pages) and shared with the kernel only as an atomic.
        let (slot, status) = unsafe {
            let slot = ring.memory.as_ptr().add(self.next * ring.slot_size);
            (slot, AtomicU32::from_ptr(slot.cast()))
        };
        if status.load(Ordering::Acquire) != STATUS_AVAILABLE {
            return Err(Errno::AGAIN);
        }
        // SAFETY: the slot is ours (its status says so); DATA + header + length <= slot_size was
        // checked above, and the sources don't overlap the mapping.
        unsafe {
            slot.add(LENGTH)
                .cast::<u32>()
                .write((HEADER_BYTES + length) as u32);
            let mut to = slot.add(DATA);
            for part in [&header[..], front, tag, back] {
                std::ptr::copy_nonoverlapping(part.as_ptr(), to, part.len());
                to = to.add(part.len());
            }
        }
        status.store(STATUS_SEND_REQUEST, Ordering::Release);
        // SAFETY: no buffer: the kernel looks into the ring.
        let sent = unsafe {
            libc::send(
                self.socket.as_fd().as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
            )
        };
        if sent > 0 {
            self.next = (self.next + 1) % SLOTS;
            return Ok(());
        }
        let errno = if sent < 0 { last() } else { Errno::IO };
        // The kernel hasn't moved on and would look at this slot again.
        status.store(STATUS_AVAILABLE, Ordering::Release);
        Err(errno)
    }
}
