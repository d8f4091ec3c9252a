//! A receive ring on a packet socket (PACKET_RX_RING, TPACKET_V2) with virtio-net headers: frames are
//! there without a system call. One that is longer than a slot has its place in the ring, and comes
//! whole by the socket's queue (PACKET_COPY_THRESH): the n-th slot with TP_STATUS_COPY is of the n-th
//! message, since the kernel gives out both under one lock.
//!
//! # Contract with the kernel
//! A slot is the kernel's while its status is KERNEL, ours from USER until we set it back. The kernel
//! fills slots in turn and never looks beyond one that isn't its own.
//!
//! # Synchronization
//! The status word passes a slot: we load it with Acquire before reading the frame, and store KERNEL
//! with Release when the frame has been copied out. Everything else is used through `&mut`.
//!
//! Source: uapi `linux/if_packet.h`; Documentation/networking/packet_mmap.rst.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

use frame::VlanTag;
use frame::virtio::HEADER_BYTES;
use rustix::io::Errno;

use super::mapping::Mapping;
use super::packet_socket::PacketSocket;
use super::set_option;

const PACKET_RX_RING: libc::c_int = 5;
const PACKET_COPY_THRESH: libc::c_int = 7;
const PACKET_VERSION: libc::c_int = 10;
const TPACKET_V2: libc::c_int = 1;
const STATUS_KERNEL: u32 = 0;
const STATUS_USER: u32 = 1;
const STATUS_COPY: u32 = 1 << 1;
const STATUS_VLAN_VALID: u32 = 1 << 4;
const STATUS_VLAN_TPID_VALID: u32 = 1 << 6;
/// Bytes of a slot: room for a frame of the usual MTU.
pub(crate) const SLOT: usize = 2048;
/// Bytes that the kernel allocates in one piece, if it can.
const BLOCK: usize = 1 << 16;

/// `struct tpacket_req`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    block_size: libc::c_uint,
    blocks: libc::c_uint,
    frame_size: libc::c_uint,
    frames: libc::c_uint,
}

/// `struct tpacket2_hdr`, at the front of a slot.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    status: u32,
    length: u32,
    captured: u32,
    mac: u16,
    net: u16,
    seconds: u32,
    nanoseconds: u32,
    tci: u16,
    tpid: u16,
    padding: [u8; 4],
}

/// What the ring's next slot has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arrival<'a> {
    /// A frame.
    Here {
        /// Without the tag that the kernel took out.
        bytes: &'a [u8],
        /// That tag.
        vlan: Option<VlanTag>,
        /// `struct virtio_net_hdr`.
        header: [u8; HEADER_BYTES],
    },
    /// The next message of the socket's queue is what would be here.
    Queued,
    /// A frame longer than the slot, for which the socket's queue had no room.
    Cut,
    /// Nothing that makes sense.
    Malformed,
}

/// A ring in memory; the socket is somebody else's.
#[derive(Debug)]
pub(crate) struct RxRing {
    memory: Mapping,
    /// How many slots have been given back since the beginning.
    taken: u64,
}

impl RxRing {
    /// Makes a ring of `bytes` (whole blocks of 64 KiB) on a socket that isn't bound yet and has
    /// virtio-net headers.
    pub(crate) fn new(socket: &PacketSocket, bytes: usize) -> Result<Self, Errno> {
        let fd = socket.as_fd();
        let bytes = bytes.max(1).next_multiple_of(BLOCK);
        set_option(fd, libc::SOL_PACKET, PACKET_VERSION, TPACKET_V2)?;
        set_option(fd, libc::SOL_PACKET, PACKET_COPY_THRESH, 1 as libc::c_int)?;
        request(socket, bytes)?;
        match Mapping::of(fd, bytes, 0) {
            Ok(memory) => Ok(Self { memory, taken: 0 }),
            Err(errno) => {
                request(socket, 0)?;
                Err(errno)
            }
        }
    }

    /// Lets the socket have its queue again. What is in the ring is lost.
    pub(crate) fn remove(self, socket: &PacketSocket) -> Result<(), Errno> {
        // A ring can be removed only when nobody has it mapped.
        drop(self);
        request(socket, 0)
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> usize {
        self.memory.length() / SLOT
    }

    /// How many slots have been given back since the beginning.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// The slot `ahead` of the next one, and its status.
    fn slot(&self, ahead: usize) -> (*mut u8, &AtomicU32) {
        let slots = self.slots() as u64;
        let at = (self.taken + ahead as u64) % slots;
        // SAFETY: `at` < slots, so the slot lies within the mapping; its first word is aligned (slots are
        // 2048 bytes from the start of a page) and shared with the kernel only as an atomic.
        unsafe {
            let slot = self.memory.start().add(at as usize * SLOT);
            (slot, AtomicU32::from_ptr(slot.cast()))
        }
    }

    /// Of the next `max` slots: how many are ours, and how many of these came by the queue.
    pub(crate) fn ready(&self, max: usize) -> (usize, usize) {
        let (mut ready, mut queued) = (0, 0);
        while ready < max.min(self.slots()) {
            let status = self.slot(ready).1.load(Ordering::Acquire);
            if status & STATUS_USER == 0 {
                break;
            }
            ready += 1;
            queued += usize::from(status & STATUS_COPY != 0);
        }
        (ready, queued)
    }

    /// What the next slot has, if it is ours.
    pub(crate) fn next(&mut self) -> Option<Arrival<'_>> {
        let (slot, status) = self.slot(0);
        let status = status.load(Ordering::Acquire);
        if status & STATUS_USER == 0 {
            return None;
        }
        if status & STATUS_COPY != 0 {
            return Some(Arrival::Queued);
        }
        // SAFETY: the slot is ours (its status says so), and larger than a Header, which is plain integers;
        // the mapping's pages were filled with zeroes.
        let aux = unsafe { slot.cast::<Header>().read() };
        let (start, length) = (usize::from(aux.mac), aux.captured as usize);
        if aux.length > aux.captured {
            return Some(Arrival::Cut);
        }
        let Some(before) = start.checked_sub(HEADER_BYTES) else {
            return Some(Arrival::Malformed);
        };
        if before < size_of::<Header>() || length > SLOT - start.min(SLOT) {
            return Some(Arrival::Malformed);
        }
        let vlan = (status & STATUS_VLAN_VALID != 0).then_some(VlanTag {
            tpid: if status & STATUS_VLAN_TPID_VALID != 0 {
                aux.tpid
            } else {
                0x8100
            },
            tci: aux.tci,
        });
        // SAFETY: start + length <= SLOT was checked, and start >= HEADER_BYTES. The kernel doesn't write
        // to a slot that is ours; it stays so while `self` is borrowed, as only `release` gives it back.
        let (header, bytes) = unsafe {
            (
                slot.add(before).cast::<[u8; HEADER_BYTES]>().read(),
                std::slice::from_raw_parts(slot.add(start), length),
            )
        };
        Some(Arrival::Here {
            bytes,
            vlan,
            header,
        })
    }

    /// Gives the next slot back to the kernel, if it is ours.
    pub(crate) fn release(&mut self) {
        let (_, status) = self.slot(0);
        if status.load(Ordering::Relaxed) & STATUS_USER != 0 {
            status.store(STATUS_KERNEL, Ordering::Release);
            self.taken += 1;
        }
    }
}

fn request(socket: &PacketSocket, bytes: usize) -> Result<(), Errno> {
    let request = if bytes == 0 {
        Request {
            block_size: 0,
            blocks: 0,
            frame_size: 0,
            frames: 0,
        }
    } else {
        Request {
            block_size: BLOCK as libc::c_uint,
            blocks: (bytes / BLOCK) as libc::c_uint,
            frame_size: SLOT as libc::c_uint,
            frames: (bytes / SLOT) as libc::c_uint,
        }
    };
    set_option(socket.as_fd(), libc::SOL_PACKET, PACKET_RX_RING, request)
}
