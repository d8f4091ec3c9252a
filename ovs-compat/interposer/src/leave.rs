//! A descriptor goes over to a real netlink socket: its first message was for another family, or
//! the daemon has ended. Number, port id, options, membership of epoll sets stay.

use core::ffi::c_int;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::Outcome;
use crate::sys::{self, Errno};
use crate::table::{self, Slot, State};

/// The descriptor isn't for the daemon: makes it the kernel's.
pub fn to_kernel(fd: c_int, slot: &Slot) -> Outcome {
    match leave(fd, slot) {
        Ok(()) => Outcome::Moved,
        Err(error) => Outcome::Fail(error),
    }
}

/// The connection has ended, in a receive or in a send. What the caller waits for will never
/// come: not EAGAIN (read as success), not ENOBUFS (read as "send it again"). Said once; then the
/// descriptor is a real one, where nothing comes and the daemon's families are unknown.
///
/// `before` is the state that the caller saw at its start: an undecided descriptor may have ended
/// because another thread has just moved it.
pub fn lost(fd: c_int, slot: &Slot, before: State) -> Outcome {
    if slot.state() == State::Leaving {
        return wait_until_moved(fd, slot, before);
    }
    if !table::names(fd, slot) {
        return moved(before);
    }
    // If no real socket can be had (EMFILE), the next call on this one ends here again.
    let _ = leave(fd, slot);
    Outcome::Fail(libc::ECONNRESET)
}

/// Only undecided descriptors go to the kernel while the daemon lives.
fn moved(before: State) -> Outcome {
    if before == State::Ours {
        Outcome::Fail(libc::ECONNRESET)
    } else {
        Outcome::Moved
    }
}

/// Another thread is moving the descriptor.
pub fn wait_until_moved(fd: c_int, slot: &Slot, before: State) -> Outcome {
    for _ in 0..200 {
        if !table::names(fd, slot) {
            return moved(before);
        }
        sys::pause(1);
    }
    // It was interrupted by this one (a signal handler), or its thread is gone.
    Outcome::Fail(libc::ECONNRESET)
}

fn leave(fd: c_int, slot: &Slot) -> Result<(), Errno> {
    let before = slot.state();
    if table::is_vforked() || !matches!(before, State::Undecided | State::Ours) {
        return Err(libc::ECONNRESET);
    }
    if !slot.change(before, State::Leaving) {
        return Err(libc::ECONNRESET);
    }
    let (kind, protocol) = (slot.kind.load(Relaxed), slot.protocol.load(Relaxed));
    let real = match sys::socket(libc::AF_NETLINK, kind | libc::SOCK_CLOEXEC, protocol) {
        Ok(real) => real,
        Err(error) => {
            slot.change(State::Leaving, before);
            return Err(error);
        }
    };
    replay(fd, slot, real);
    let watches = [0, 1].map(|index| slot.watches.get(index).map(watched));
    // Whoever waits on the old socket in another thread learns of it by its end.
    sys::shutdown(fd);
    table::surrender(slot, |number| {
        let flags = sys::fcntl(number, libc::F_GETFD, 0).unwrap_or(0);
        let keep = if flags & libc::FD_CLOEXEC != 0 {
            libc::O_CLOEXEC
        } else {
            0
        };
        // `number` is open and `real` too: EBUSY alone is possible, while somebody else opens it.
        while sys::dup3(real, number, keep) == Err(libc::EBUSY) {}
    });
    sys::close(real);
    for (epoll, number, event) in watches.into_iter().flatten() {
        // The set may be gone, or the descriptor out of it.
        if epoll >= 0 {
            let _ = sys::epoll_add(epoll, number, event);
        }
    }
    Ok(())
}

fn watched(watch: &table::Watch) -> (c_int, c_int, libc::epoll_event) {
    let event = libc::epoll_event {
        events: watch.events.load(Relaxed),
        u64: watch.data.load(Relaxed),
    };
    (watch.epoll.load(Acquire), watch.fd.load(Relaxed), event)
}

/// Gives `real` what the caller has set on `fd`. What the kernel refuses (buffer sizes without
/// privileges, an option that it doesn't know) stays at its default.
fn replay(fd: c_int, slot: &Slot, real: c_int) {
    // The kernel doubles what it is given.
    for (read, write, force) in [
        (libc::SO_RCVBUF, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
        (libc::SO_SNDBUF, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
    ] {
        let ours = sys::getsockopt(fd, libc::SOL_SOCKET, read, 0i32);
        let default = sys::getsockopt(real, libc::SOL_SOCKET, read, 0i32);
        if let (Ok(ours), Ok(default)) = (ours, default)
            && ours != default
            && sys::setsockopt(real, libc::SOL_SOCKET, force, ours / 2).is_err()
        {
            let _ = sys::setsockopt(real, libc::SOL_SOCKET, write, ours / 2);
        }
    }
    if let Ok(pass) = sys::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PASSCRED, 0i32) {
        let _ = sys::setsockopt(real, libc::SOL_SOCKET, libc::SO_PASSCRED, pass);
    }
    for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        if let Ok(time) = sys::getsockopt(fd, libc::SOL_SOCKET, name, [0i64; 2]) {
            let _ = sys::setsockopt(real, libc::SOL_SOCKET, name, time);
        }
    }
    let options = slot.options.load(Relaxed);
    for number in (0..32).filter(|number| options & (1 << number) != 0) {
        let _ = sys::setsockopt(real, libc::SOL_NETLINK, number, 1i32);
    }
    // The port id that the caller knows; else that which the kernel likes, at the first send.
    if slot.told.load(Acquire) {
        let told = match slot.bound.load(Relaxed) {
            0 => slot.port_id.load(Relaxed),
            bound => bound,
        };
        for port_id in [told, 0] {
            if bind(real, port_id, 0).is_ok() {
                break;
            }
        }
    }
    if let Ok(flags) = sys::fcntl(fd, libc::F_GETFL, 0)
        && flags & libc::O_NONBLOCK != 0
    {
        let _ = sys::fcntl(real, libc::F_SETFL, flags & !libc::O_ACCMODE);
    }
}

/// `bind(2)` of a real netlink socket.
pub fn bind(fd: c_int, port_id: u32, groups: u32) -> Result<isize, Errno> {
    // SAFETY: a structure of integers, for which zeros are a value.
    let mut address: libc::sockaddr_nl = unsafe { core::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_pid = port_id;
    address.nl_groups = groups;
    sys::bind(fd, &address, size_of::<libc::sockaddr_nl>())
}
