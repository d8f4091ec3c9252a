//! Functions that copy, close and watch descriptors.

use core::ffi::{c_int, c_uint};
use core::sync::atomic::Ordering::{Relaxed, Release};

use super::next_of;
use crate::sys;
use crate::table::{self, Slot, State};

/// `dup(2)`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup(old: c_int) -> c_int {
    let new = pass!(dup(old));
    if new >= 0 {
        table::duplicated(old, new);
    }
    new
}

/// `dup2(2)`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup2(old: c_int, new: c_int) -> c_int {
    let result = pass!(dup2(old, new));
    if result >= 0 {
        table::duplicated(old, new);
    }
    result
}

/// `dup3(2)`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    let result = pass!(dup3(old, new, flags));
    if result >= 0 {
        table::duplicated(old, new);
    }
    result
}

/// `fcntl(2)`: its third argument, of whatever type, is a register on the architectures that we
/// build for.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn fcntl(fd: c_int, command: c_int, argument: usize) -> c_int {
    let result = pass!(fcntl(fd, command, argument));
    if result >= 0 && (command == libc::F_DUPFD || command == libc::F_DUPFD_CLOEXEC) {
        table::duplicated(fd, result);
    }
    result
}

/// `fcntl(2)`, as newer programs call it.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn fcntl64(fd: c_int, command: c_int, argument: usize) -> c_int {
    let result = pass!(fcntl64(fd, command, argument));
    if result >= 0 && (command == libc::F_DUPFD || command == libc::F_DUPFD_CLOEXEC) {
        table::duplicated(fd, result);
    }
    result
}

/// `close(2)`. The table forgets first: afterwards the number may be another thread's.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn close(fd: c_int) -> c_int {
    table::forget(fd);
    pass!(close(fd))
}

/// `close_range(2)`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if flags & libc::CLOSE_RANGE_CLOEXEC as c_int == 0 {
        table::forget_range(first as usize, last as usize);
    }
    pass!(close_range(first, last, flags))
}

/// `closefrom(3)`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn closefrom(first: c_int) {
    table::forget_range(usize::try_from(first).unwrap_or(0), usize::MAX);
    if let Some(function) = next_of::closefrom.get() {
        // SAFETY: with what our own caller gave.
        unsafe { function(first) }
    }
}

/// `epoll_ctl(2)`: an undecided descriptor may yet become another socket, which must be in the
/// same sets.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn epoll_ctl(
    epoll: c_int,
    op: c_int,
    fd: c_int,
    event: *mut libc::epoll_event,
) -> c_int {
    let result = pass!(epoll_ctl(epoll, op, fd, event));
    if result == 0
        && !table::is_foreign(fd)
        && let Some(slot) = table::find(fd)
    {
        // SAFETY: the caller's contract; the kernel has read it too.
        watch(
            slot,
            epoll,
            fd,
            unsafe { event.as_ref() }.filter(|_| op != libc::EPOLL_CTL_DEL),
        );
    }
    result
}

fn watch(slot: &Slot, epoll: c_int, fd: c_int, event: Option<&libc::epoll_event>) {
    let known = |epoll: c_int, fd: c_int| {
        slot.watches
            .iter()
            .find(|watch| watch.epoll.load(Relaxed) == epoll && watch.fd.load(Relaxed) == fd)
    };
    let Some(event) = event else {
        if let Some(watch) = known(epoll, fd) {
            watch.epoll.store(-1, Release);
        }
        return;
    };
    if slot.state() != State::Undecided {
        return;
    }
    let free = || {
        slot.watches
            .iter()
            .find(|watch| watch.epoll.load(Relaxed) == -1)
    };
    if let Some(watch) = known(epoll, fd).or_else(free) {
        watch.fd.store(fd, Relaxed);
        watch.events.store(event.events, Relaxed);
        watch.data.store(event.u64, Relaxed);
        watch.epoll.store(epoll, Release);
    }
}
