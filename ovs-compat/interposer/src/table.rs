//! Which descriptors are ours, and what is known of the socket behind them.
//!
//! An entry a descriptor number, a slot a socket; duplicates of a descriptor name the same slot,
//! which counts them.
//!
//! # Synchronization
//! Everything is an atomic of its own: a hook may be interrupted by a signal whose handler calls
//! another, or stop for ever because another thread forked. An entry is published by a Release
//! swap after its slot was filled in and read with Acquire. No reader can trust that a slot is
//! still what its entry meant a moment ago: it can only get another socket's *state*, never
//! invalid memory, and cookies are unique in the process, so that a late store by a loser of such
//! a race leaves the slot's next owner as it is ([`Slot::acknowledge`]).
//!
//! Each use of an entry compares the kernel's socket cookie with the slot's. So a descriptor that
//! was closed behind our back (by a raw system call, or inside the C library) and used again for
//! something else heals itself, as does one that a vforked child saw.

use core::ffi::{c_int, c_void};
use core::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use crate::{connect, sys};

/// Descriptor numbers from here on can't be ours (socket() then says EMFILE).
pub const DESCRIPTORS: usize = 1 << 18;
/// Sockets at a time (beyond, socket() says ENFILE).
const SLOTS: usize = 1 << 14;

/// Not looked at since it was opened.
const UNKNOWN: u16 = 0;
/// Somebody else's.
const FOREIGN: u16 = 1;
/// A socket of NETLINK_ROUTE: real, but some of its messages are looked at (`route`).
const ROUTE: u16 = 2;
/// Entries from here on are slots.
const FIRST: u16 = 3;

// Untouched pages of these cost nothing: a program that has no socket of ours touches one or two.
static ENTRIES: [AtomicU16; DESCRIPTORS] = [const { AtomicU16::new(UNKNOWN) }; DESCRIPTORS];
static SLOT: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];
/// One more than the highest descriptor that was ever looked at.
static DESCRIPTORS_SEEN: AtomicUsize = AtomicUsize::new(0);
/// One more than the highest slot ever used.
static SLOTS_SEEN: AtomicUsize = AtomicUsize::new(0);
/// The next barrier's cookie. One for the process: see the module's head.
static COOKIE: AtomicU32 = AtomicU32::new(1);

/// What a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Nobody's slot.
    Free = 0,
    /// Being filled in.
    Claimed = 1,
    /// Connected to the daemon; no message has said yet whose it will be.
    Undecided = 2,
    /// The daemon's.
    Ours = 3,
    /// On its way to the kernel: see `leave`.
    Leaving = 4,
}

/// An epoll set that an undecided descriptor was put into.
pub struct Watch {
    /// Descriptor of the epoll set; -1 for none.
    pub epoll: AtomicI32,
    /// The number that was put into it.
    pub fd: AtomicI32,
    pub events: AtomicU32,
    pub data: AtomicU64,
}

impl Watch {
    const fn new() -> Self {
        Self {
            epoll: AtomicI32::new(-1),
            fd: AtomicI32::new(-1),
            events: AtomicU32::new(0),
            data: AtomicU64::new(0),
        }
    }
}

/// One socket.
pub struct Slot {
    state: AtomicU32,
    /// Entries that name this slot; 0 frees it.
    references: AtomicU32,
    /// `SO_COOKIE`.
    socket: AtomicU64,
    /// `nl_pid` that the daemon gave.
    pub port_id: AtomicU32,
    /// SOCK_RAW or SOCK_DGRAM, as asked.
    pub kind: AtomicI32,
    /// `NETLINK_GENERIC`, ...
    pub protocol: AtomicI32,
    /// Cookie of the newest barrier sent; 0 for none.
    newest: AtomicU32,
    /// Newest cookie acknowledged.
    acknowledged: AtomicU32,
    /// An errno that the next receive reports; 0 for none.
    pub pending: AtomicI32,
    /// Options of SOL_NETLINK that are on, a bit each by number.
    pub options: AtomicU32,
    /// Memberships, a bit each from `transport::GROUP_BASE` on.
    pub groups: AtomicU64,
    /// `nl_pid` that the caller bound itself to; 0 for none.
    pub bound: AtomicU32,
    /// Whether the caller knows its port id: by `bind` or `getsockname`.
    pub told: AtomicBool,
    pub watches: [Watch; 2],
}

impl Slot {
    const fn new() -> Self {
        Self {
            state: AtomicU32::new(State::Free as u32),
            references: AtomicU32::new(0),
            socket: AtomicU64::new(0),
            port_id: AtomicU32::new(0),
            kind: AtomicI32::new(0),
            protocol: AtomicI32::new(0),
            newest: AtomicU32::new(0),
            acknowledged: AtomicU32::new(0),
            pending: AtomicI32::new(0),
            options: AtomicU32::new(0),
            groups: AtomicU64::new(0),
            bound: AtomicU32::new(0),
            told: AtomicBool::new(false),
            watches: [Watch::new(), Watch::new()],
        }
    }

    pub fn state(&self) -> State {
        match self.state.load(Acquire) {
            1 => State::Claimed,
            2 => State::Undecided,
            3 => State::Ours,
            4 => State::Leaving,
            _ => State::Free,
        }
    }

    /// From one state to another; false if it was in a third.
    pub fn change(&self, from: State, to: State) -> bool {
        self.state
            .compare_exchange(from as u32, to as u32, AcqRel, Acquire)
            .is_ok()
    }

    /// A cookie for the next barrier.
    pub fn next_cookie() -> u32 {
        loop {
            let cookie = COOKIE.fetch_add(1, Relaxed);
            if cookie != 0 {
                return cookie;
            }
        }
    }

    /// The barrier with this cookie has been sent.
    pub fn sent(&self, cookie: u32) {
        raise(&self.newest, cookie);
    }

    /// The ack with this cookie has been received.
    pub fn acknowledge(&self, cookie: u32) {
        raise(&self.acknowledged, cookie);
    }

    /// Whether the newest barrier's ack is still to come: the daemon isn't done with what was
    /// sent.
    pub fn is_outstanding(&self) -> bool {
        later(self.newest.load(Acquire), self.acknowledged.load(Acquire))
    }
}

/// Whether cookie `a` was drawn after `b`: they wrap.
fn later(a: u32, b: u32) -> bool {
    a != b && a.wrapping_sub(b) < 1 << 31
}

fn raise(value: &AtomicU32, to: u32) {
    // The result only says whether it was later already.
    let _ = value.fetch_update(AcqRel, Acquire, |now| later(to, now).then_some(to));
}

fn entry(fd: c_int) -> Option<&'static AtomicU16> {
    ENTRIES.get(usize::try_from(fd).ok()?)
}

fn slot_of(value: u16) -> Option<&'static Slot> {
    SLOT.get(usize::from(value.checked_sub(FIRST)?))
}

fn value_of(index: usize) -> Option<u16> {
    u16::try_from(index).ok()?.checked_add(FIRST)
}

/// Whether this descriptor is known to be somebody else's. The fast path of every hook.
#[inline]
pub fn is_foreign(fd: c_int) -> bool {
    // Relaxed is enough: nothing is read through a FOREIGN entry.
    entry(fd).is_none_or(|entry| entry.load(Relaxed) == FOREIGN)
}

/// The socket behind a descriptor, if it is ours.
pub fn find(fd: c_int) -> Option<&'static Slot> {
    let entry = entry(fd)?;
    match entry.load(Acquire) {
        FOREIGN | ROUTE => None,
        UNKNOWN => recognise(fd),
        value => {
            let slot = slot_of(value)?;
            if sys::socket_cookie(fd) == Some(slot.socket.load(Acquire)) {
                return Some(slot);
            }
            if is_vforked() {
                return None;
            }
            if entry
                .compare_exchange(value, UNKNOWN, AcqRel, Acquire)
                .is_ok()
            {
                release(value);
            }
            recognise(fd)
        }
    }
}

/// Whether a descriptor that [`find`] doesn't find is a socket of NETLINK_ROUTE.
pub fn is_route(fd: c_int) -> bool {
    entry(fd).is_some_and(|entry| entry.load(Relaxed) == ROUTE)
}

/// The descriptor has been opened as a socket of NETLINK_ROUTE.
pub fn set_route(fd: c_int) {
    set(fd, ROUTE);
}

/// Whether the entry of a descriptor still names this slot.
pub fn names(fd: c_int, slot: &Slot) -> bool {
    entry(fd)
        .and_then(|entry| slot_of(entry.load(Acquire)))
        .is_some_and(|found| core::ptr::eq(found, slot))
}

/// An unknown descriptor: it came through exec, over a socket, or from one of the many functions
/// that open something and aren't hooked.
#[cold]
fn recognise(fd: c_int) -> Option<&'static Slot> {
    let entry = entry(fd)?;
    let Some(name) = connect::name_of(fd) else {
        if !is_vforked() {
            let value = if sys::is_netlink(fd, libc::NETLINK_ROUTE) {
                ROUTE
            } else {
                FOREIGN
            };
            // Only if still unknown: another thread may have closed it and opened one of ours.
            let _ = entry.compare_exchange(UNKNOWN, value, AcqRel, Acquire);
            saw(fd);
        }
        return None;
    };
    if is_vforked() {
        return None;
    }
    let socket = sys::socket_cookie(fd)?;
    let value = match adopt(socket) {
        Some(value) => value,
        None => claim(socket, name)?,
    };
    if entry
        .compare_exchange(UNKNOWN, value, AcqRel, Acquire)
        .is_err()
    {
        release(value); // Another thread was faster.
    }
    saw(fd);
    slot_of(entry.load(Acquire))
}

/// One more reference to the slot of a socket that is known under another number.
fn adopt(socket: u64) -> Option<u16> {
    let seen = SLOTS_SEEN.load(Acquire);
    let index = SLOT.iter().take(seen).position(|slot| {
        slot.socket.load(Acquire) == socket
            && slot
                .references
                .fetch_update(AcqRel, Acquire, |n| (n > 0).then_some(n.wrapping_add(1)))
                .is_ok()
    })?;
    value_of(index)
}

/// A slot for a new socket, with one reference.
fn claim(socket: u64, name: connect::Name) -> Option<u16> {
    let index = SLOT
        .iter()
        .position(|slot| slot.change(State::Free, State::Claimed))?;
    SLOTS_SEEN.fetch_max(index.saturating_add(1), AcqRel);
    let slot = SLOT.get(index)?;
    slot.socket.store(socket, Relaxed);
    slot.port_id.store(name.port_id, Relaxed);
    slot.kind.store(name.kind, Relaxed);
    slot.protocol.store(name.protocol, Relaxed);
    // Equal: nothing is outstanding, and any cookie drawn from now on is later.
    let cookie = COOKIE.load(Relaxed).wrapping_sub(1);
    slot.newest.store(cookie, Relaxed);
    slot.acknowledged.store(cookie, Relaxed);
    slot.pending.store(0, Relaxed);
    slot.options.store(0, Relaxed);
    slot.groups.store(0, Relaxed);
    slot.bound.store(0, Relaxed);
    slot.told.store(false, Relaxed);
    for watch in &slot.watches {
        watch.epoll.store(-1, Relaxed);
    }
    slot.references.store(1, Relaxed);
    slot.state.store(State::Undecided as u32, Release);
    value_of(index)
}

fn release(value: u16) {
    let Some(slot) = slot_of(value) else { return };
    let last = slot
        .references
        .fetch_update(AcqRel, Acquire, |n| n.checked_sub(1))
        == Ok(1);
    if last {
        slot.socket.store(0, Relaxed);
        slot.state.store(State::Free as u32, Release);
    }
}

fn saw(fd: c_int) {
    if let Ok(number) = usize::try_from(fd) {
        DESCRIPTORS_SEEN.fetch_max(number.saturating_add(1), AcqRel);
    }
}

fn set(fd: c_int, value: u16) {
    if let Some(entry) = entry(fd) {
        saw(fd);
        release(entry.swap(value, AcqRel));
    }
}

/// A new socket of ours; the errno if there is no room for it.
pub fn register(fd: c_int, name: connect::Name) -> Result<(), sys::Errno> {
    if entry(fd).is_none() {
        return Err(libc::EMFILE);
    }
    let socket = sys::socket_cookie(fd).ok_or(libc::ENOTSOCK)?;
    let value = claim(socket, name).ok_or(libc::ENFILE)?;
    set(fd, value);
    Ok(())
}

/// The descriptor has been opened as something that is surely not ours.
pub fn set_foreign(fd: c_int) {
    set(fd, FOREIGN);
}

/// The descriptor is about to be closed.
pub fn forget(fd: c_int) {
    let Some(entry) = entry(fd) else { return };
    match entry.load(Relaxed) {
        UNKNOWN => {}
        FOREIGN | ROUTE => entry.store(UNKNOWN, Relaxed),
        _ if is_vforked() => {}
        _ => set(fd, UNKNOWN),
    }
}

/// The descriptors `first..=last` are about to be closed.
pub fn forget_range(first: usize, last: usize) {
    let seen = DESCRIPTORS_SEEN.load(Acquire);
    for fd in first..seen.min(last.saturating_add(1)) {
        forget(fd as c_int);
    }
}

/// `new` has become a duplicate of `old`.
pub fn duplicated(old: c_int, new: c_int) {
    if old == new || is_vforked() {
        return;
    }
    let value = entry(old).map_or(UNKNOWN, |entry| entry.load(Acquire));
    let slot = slot_of(value).filter(|slot| {
        slot.references
            .fetch_update(AcqRel, Acquire, |n| (n > 0).then_some(n.wrapping_add(1)))
            .is_ok()
    });
    // FOREIGN isn't copied: a vforked child may have seen `old` as something else.
    set(new, if slot.is_some() { value } else { UNKNOWN });
}

/// Gives each descriptor of this slot's socket to somebody else: `f` makes its number mean
/// something else, then it is FOREIGN.
pub fn surrender(slot: &Slot, mut f: impl FnMut(c_int)) {
    let socket = slot.socket.load(Acquire);
    // Held, so that the slot doesn't become another socket's under the loop.
    let held = slot
        .references
        .fetch_update(AcqRel, Acquire, |n| (n > 0).then_some(n.wrapping_add(1)));
    if held.is_err() || socket == 0 {
        return;
    }
    for fd in 0..DESCRIPTORS_SEEN.load(Acquire) {
        let fd = fd as c_int;
        if names(fd, slot) && sys::socket_cookie(fd) == Some(socket) {
            f(fd);
            set_foreign(fd);
        }
    }
    if let Some(value) = SLOT
        .iter()
        .position(|other| core::ptr::eq(other, slot))
        .and_then(value_of)
    {
        release(value);
    }
}

/// A page with our process id, wiped on fork: see [`is_vforked`].
static PAGE: AtomicPtr<c_void> = AtomicPtr::new(core::ptr::null_mut());

/// Prepares [`is_vforked`]; without it, no child is taken for a vforked one.
pub fn prepare() {
    if let Some(page) = sys::page_wiped_on_fork() {
        PAGE.store(page, Release);
        is_vforked();
    }
}

/// Whether we run in a vforked child: its descriptors are its own, but the table is its parent's,
/// and must stay as it is. (A forked child has a table of its own, and sees the page wiped.)
pub fn is_vforked() -> bool {
    let page = PAGE.load(Acquire);
    if page.is_null() {
        return false;
    }
    // SAFETY: the page was mapped by `prepare`, is never unmapped, and holds nothing else.
    let owner = unsafe { &*page.cast::<AtomicI32>() };
    // SAFETY: no arguments, no memory.
    let pid = unsafe { libc::getpid() };
    match owner.load(Relaxed) {
        0 => {
            owner.store(pid, Relaxed);
            false
        }
        other => other != pid,
    }
}
