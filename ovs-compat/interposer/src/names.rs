//! The addresses of a netlink socket: `bind`, `connect`, `getsockname`, `getpeername`, and the
//! sender's address of a receive.

use core::ffi::c_int;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::Outcome;
use crate::leave;
use crate::table::{Slot, State};

const SIZE: usize = size_of::<libc::sockaddr_nl>();

/// # Safety
/// `address` points to `length` bytes, or is null.
unsafe fn read(
    address: *const libc::sockaddr,
    length: libc::socklen_t,
) -> Option<libc::sockaddr_nl> {
    if address.is_null() || (length as usize) < SIZE {
        return None;
    }
    // SAFETY: as many bytes as are read are there; alignment isn't asked for.
    Some(unsafe { address.cast::<libc::sockaddr_nl>().read_unaligned() })
}

/// Gives an address with this port id, as `getsockname(2)` does: cut to the caller's room, with
/// its full length in `length`.
///
/// # Safety
/// `length` points to the room at `address`, or either is null.
pub unsafe fn write(address: *mut libc::sockaddr, length: *mut libc::socklen_t, port_id: u32) {
    if address.is_null() || length.is_null() {
        return;
    }
    // SAFETY: a structure of integers, for which zeros are a value.
    let mut own: libc::sockaddr_nl = unsafe { core::mem::zeroed() };
    own.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    own.nl_pid = port_id;
    // SAFETY: the caller's room is as long as it says, and no more is written.
    unsafe {
        let room = (length.read_unaligned() as usize).min(SIZE);
        core::ptr::copy_nonoverlapping((&raw const own).cast::<u8>(), address.cast(), room);
        length.write_unaligned(SIZE as libc::socklen_t);
    }
}

/// # Safety
/// As `bind(2)`.
pub unsafe fn bind(
    fd: c_int,
    slot: &Slot,
    address: *const libc::sockaddr,
    length: libc::socklen_t,
) -> Outcome {
    // SAFETY: the caller's contract.
    let Some(address) = (unsafe { read(address, length) }) else {
        return Outcome::Fail(libc::EINVAL);
    };
    if c_int::from(address.nl_family) != libc::AF_NETLINK {
        return Outcome::Fail(libc::EINVAL);
    }
    // The 32 groups that a bind can name are the kernel's: the daemon's have higher numbers.
    if address.nl_groups != 0 {
        if slot.state() != State::Undecided {
            return Outcome::Fail(libc::EINVAL);
        }
        // Read first: the slot goes with the move, which binds to a port id that is known.
        let told = slot.told.load(Acquire);
        let port_id = if told && address.nl_pid == 0 {
            port_id(slot)
        } else {
            address.nl_pid
        };
        return match leave::to_kernel(fd, slot) {
            Outcome::Moved => match leave::bind(fd, port_id, address.nl_groups) {
                Ok(_) => Outcome::Done(0),
                Err(error) => Outcome::Fail(error),
            },
            other => other,
        };
    }
    if address.nl_pid != 0 {
        let bound = slot
            .bound
            .compare_exchange(0, address.nl_pid, AcqRel, Acquire);
        if bound.is_err_and(|bound| bound != address.nl_pid) {
            return Outcome::Fail(libc::EINVAL);
        }
    }
    slot.told.store(true, Release);
    Outcome::Done(0)
}

/// # Safety
/// As `connect(2)`.
pub unsafe fn connect(
    _fd: c_int,
    _slot: &Slot,
    address: *const libc::sockaddr,
    length: libc::socklen_t,
) -> Outcome {
    if address.is_null() || (length as usize) < size_of::<libc::sa_family_t>() {
        return Outcome::Fail(libc::EINVAL);
    }
    // SAFETY: two bytes are there.
    let family = c_int::from(unsafe { address.cast::<libc::sa_family_t>().read_unaligned() });
    if family == libc::AF_UNSPEC {
        return Outcome::Done(0);
    }
    // SAFETY: the caller's contract.
    match unsafe { read(address, length) } {
        Some(address) if family == libc::AF_NETLINK => {
            if address.nl_pid == 0 && address.nl_groups == 0 {
                Outcome::Done(0)
            } else {
                // Other processes can't be reached on this road.
                Outcome::Fail(libc::ECONNREFUSED)
            }
        }
        _ => Outcome::Fail(libc::EINVAL),
    }
}

/// The port id that the caller is to know as its own. One that it chose itself holds as long as
/// the kernel may yet be the one to serve it; the daemon knows only the one that it gave.
pub fn port_id(slot: &Slot) -> u32 {
    match (slot.state(), slot.bound.load(Relaxed)) {
        (State::Undecided, bound) if bound != 0 => bound,
        _ => slot.port_id.load(Relaxed),
    }
}
