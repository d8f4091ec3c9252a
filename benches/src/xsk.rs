//! The barest AF_XDP forwarder: one socket on queue 0 of each of two devices, in the mode that drivers
//! without zero copy have, memory shared, so that what one receives the other sends from where it lies. No
//! look at a frame, no accounting, no check; and nothing of `vport`, beside which it is measured.
//!
//! Source: uapi `linux/if_xdp.h`, `linux/bpf.h`.
#![allow(unsafe_code)] // rings in shared memory and bpf(2) have no safe form in libc or rustix

use std::ffi::CString;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::wire::BATCH;

const CHUNK: usize = 4096;
/// Entries of every ring, and chunks of each socket.
const SIZE: u32 = 2048;

fn check(result: libc::c_long) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as i32)
}

fn map(fd: i32, length: usize, offset: i64) -> io::Result<*mut u8> {
    let flags = if fd < 0 {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    } else {
        libc::MAP_SHARED
    } | libc::MAP_POPULATE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice. It stays until the program ends.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, fd, offset) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at.cast())
}

/// One of our ends of a ring; indices are free-running.
struct Ring<T> {
    start: *mut u8,
    offsets: libc::xdp_ring_offset,
    index: u32,
    entry: std::marker::PhantomData<T>,
}

// SAFETY: shared with the kernel only; all use is through `&mut`.
unsafe impl<T> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    fn new(fd: i32, offsets: libc::xdp_ring_offset, page: i64) -> io::Result<Self> {
        let length = offsets.desc as usize + SIZE as usize * size_of::<T>();
        Ok(Self {
            start: map(fd, length, page)?,
            offsets,
            index: 0,
            entry: std::marker::PhantomData,
        })
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: the kernel has said that a word is there, in a mapping that stays.
        unsafe { AtomicU32::from_ptr(self.start.add(offset as usize).cast()) }
    }

    fn place(&self, index: u32) -> *mut T {
        let at = self.offsets.desc as usize + (index % SIZE) as usize * size_of::<T>();
        // SAFETY: within the mapping, whose length is that of `SIZE` entries.
        unsafe { self.start.add(at).cast() }
    }

    /// How many entries the kernel has produced for us.
    fn there(&self) -> u32 {
        let produced = self.word(self.offsets.producer).load(Ordering::Acquire);
        produced.wrapping_sub(self.index)
    }

    fn pop(&mut self) -> T {
        // SAFETY: a place that the kernel has produced, by `there`.
        let entry = unsafe { self.place(self.index).read() };
        self.index = self.index.wrapping_add(1);
        entry
    }

    fn release(&self) {
        self.word(self.offsets.consumer)
            .store(self.index, Ordering::Release);
    }

    fn push(&mut self, entry: T) {
        // SAFETY: there are never more entries in all rings together than one of them has places.
        unsafe { self.place(self.index).write(entry) };
        self.index = self.index.wrapping_add(1);
    }

    fn publish(&self) {
        self.word(self.offsets.producer)
            .store(self.index, Ordering::Release);
    }

    /// How many entries the kernel hasn't consumed.
    fn waiting(&self) -> u32 {
        let consumed = self.word(self.offsets.consumer).load(Ordering::Acquire);
        self.index.wrapping_sub(consumed)
    }
}

/// One device's socket.
struct Socket {
    // The program goes with its link.
    _link: OwnedFd,
    fd: OwnedFd,
    received: Ring<libc::xdp_desc>,
    fill: Ring<u64>,
    transmit: Ring<libc::xdp_desc>,
    completed: Ring<u64>,
}

fn bpf(command: i32, attributes: &[u64]) -> io::Result<OwnedFd> {
    let length = std::mem::size_of_val(attributes);
    // SAFETY: the callers' attributes are those of the command, their pointers valid during the call; each
    // of the commands used makes a descriptor, which nobody else owns.
    unsafe {
        let fd = check(libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            length,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Puts a program on the driver of the device that gives packets of queue 0 to the socket.
fn attach(ifindex: u32, socket: i32) -> io::Result<OwnedFd> {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    // BPF_MAP_CREATE: an XSKMAP (17) of one entry.
    let map = bpf(0, &[pair(17, 4), pair(4, 1), 0])?;
    let (key, value) = (0u32, socket);
    let update = [
        map.as_raw_fd() as u64,
        std::ptr::from_ref(&key).expose_provenance() as u64,
        std::ptr::from_ref(&value).expose_provenance() as u64,
        0,
    ];
    // BPF_MAP_UPDATE_ELEM. SAFETY: key and value are four bytes each, as the map's are.
    unsafe {
        check(libc::syscall(
            libc::SYS_bpf,
            2,
            update.as_ptr(),
            size_of_val(&update),
        ))?;
    }
    let fd = map.as_raw_fd() as u64;
    // r2 = queue; r1 = map; r3 = XDP_PASS; r0 = bpf_redirect_map(r1, r2, r3); return r0.
    let program: [u64; 6] = [
        0x61 | 0x12 << 8 | 16 << 16,
        0x18 | 0x11 << 8 | fd << 32,
        0,
        0xb7 | 0x03 << 8 | 2 << 32,
        0x85 | 51 << 32,
        0x95,
    ];
    let license = c"Apache-2.0";
    // BPF_PROG_LOAD: XDP (6).
    let load = [
        pair(6, program.len() as u32),
        program.as_ptr().expose_provenance() as u64,
        license.as_ptr().expose_provenance() as u64,
        0,
        0,
        0,
        0,
        0,
        pair(0, 37),
    ];
    let program = bpf(5, &load)?;
    // BPF_LINK_CREATE: BPF_XDP (37), XDP_FLAGS_DRV_MODE.
    bpf(
        28,
        &[pair(program.as_raw_fd() as u32, ifindex), pair(37, 1 << 2)],
    )
}

impl Socket {
    /// With chunks from `first` on; shares the memory of `other`, or registers it.
    fn open(name: &str, memory: *mut u8, first: u32, other: Option<&Self>) -> io::Result<Self> {
        let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the string ends in NUL and outlives the call.
        let ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
        // SAFETY: no pointers are passed; the descriptor is new and owned by nobody else.
        let fd = unsafe {
            let fd = libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            OwnedFd::from_raw_fd(check(fd.into())?)
        };
        let raw = fd.as_raw_fd();
        if other.is_none() {
            // SAFETY: integers only.
            let mut registration: libc::xdp_umem_reg = unsafe { zeroed() };
            registration.addr = memory.expose_provenance() as u64;
            registration.len = (2 * SIZE as usize * CHUNK) as u64;
            registration.chunk_size = CHUNK as u32;
            set(raw, libc::XDP_UMEM_REG, &registration)?;
        }
        for option in [
            libc::XDP_UMEM_FILL_RING,
            libc::XDP_UMEM_COMPLETION_RING,
            libc::XDP_RX_RING,
            libc::XDP_TX_RING,
        ] {
            set(raw, option, &SIZE)?;
        }
        // SAFETY: integers only.
        let mut offsets: libc::xdp_mmap_offsets = unsafe { zeroed() };
        let mut length = size_of::<libc::xdp_mmap_offsets>() as libc::socklen_t;
        // SAFETY: both outlive the call, the length is that of the first.
        check(libc::c_long::from(unsafe {
            libc::getsockopt(
                raw,
                libc::SOL_XDP,
                libc::XDP_MMAP_OFFSETS,
                std::ptr::from_mut(&mut offsets).cast(),
                &mut length,
            )
        }))?;
        let mut fill = Ring::new(raw, offsets.fr, libc::XDP_UMEM_PGOFF_FILL_RING as i64)?;
        let completion = libc::XDP_UMEM_PGOFF_COMPLETION_RING as i64;
        let (completed, received, transmit) = (
            Ring::new(raw, offsets.cr, completion)?,
            Ring::new(raw, offsets.rx, libc::XDP_PGOFF_RX_RING)?,
            Ring::new(raw, offsets.tx, libc::XDP_PGOFF_TX_RING)?,
        );
        (first..first + SIZE).for_each(|chunk| fill.push(u64::from(chunk) * CHUNK as u64));
        fill.publish();
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: match other {
                Some(_) => libc::XDP_SHARED_UMEM,
                None => libc::XDP_COPY | libc::XDP_USE_NEED_WAKEUP,
            },
            sxdp_ifindex: ifindex,
            sxdp_queue_id: 0,
            sxdp_shared_umem_fd: other.map_or(0, |other| other.fd.as_raw_fd() as u32),
        };
        // SAFETY: the address outlives the call, and has the length given.
        check(libc::c_long::from(unsafe {
            libc::bind(
                raw,
                std::ptr::from_ref(&address).cast(),
                size_of::<libc::sockaddr_xdp>() as libc::socklen_t,
            )
        }))?;
        Ok(Self {
            _link: attach(ifindex, raw)?,
            fd,
            received,
            fill,
            transmit,
            completed,
        })
    }

    /// Takes back what was sent, for `other` to receive into.
    fn reclaim(&mut self, other: &mut Ring<u64>) {
        let there = self.completed.there();
        if there > 0 {
            (0..there).for_each(|_| other.push(self.completed.pop()));
            self.completed.release();
            other.publish();
        }
    }
}

fn set<T>(fd: i32, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value outlives the call, and has the length given.
    check(libc::c_long::from(unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_XDP,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    }))
    .map(|_| ())
}

/// A forwarder between two devices of the thread's network namespace.
pub struct XskPair {
    sockets: [Socket; 2],
}

impl XskPair {
    /// Opens one.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn open([a, b]: [&str; 2]) -> io::Result<Self> {
        let memory = map(-1, 2 * SIZE as usize * CHUNK, 0)?;
        let a = Socket::open(a, memory, 0, None)?;
        let b = Socket::open(b, memory, SIZE, Some(&a))?;
        Ok(Self { sockets: [a, b] })
    }

    /// Forwards what there is, a batch each way. False: there was nothing.
    pub fn forward(&mut self) -> bool {
        let [a, b] = &mut self.sockets;
        let (there, back) = (one_way(a, b), one_way(b, a));
        there || back
    }

    /// The descriptors that are readable when there is something.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        self.sockets.each_ref().map(|socket| socket.fd.as_fd())
    }
}

fn one_way(from: &mut Socket, to: &mut Socket) -> bool {
    let count = from.received.there().min(BATCH as u32);
    if count == 0 {
        return false;
    }
    for _ in 0..count {
        let frame = from.received.pop();
        to.transmit.push(frame);
    }
    from.received.release();
    to.transmit.publish();
    for _ in 0..8 {
        if to.transmit.waiting() == 0 {
            break;
        }
        // SAFETY: no buffer, no address.
        unsafe {
            libc::sendto(
                to.fd.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null(),
                0,
            );
        }
    }
    to.reclaim(&mut from.fill);
    true
}
