//! `setsockopt` and `getsockopt`: SOL_NETLINK is ours, SOL_SOCKET mostly the UNIX socket's.

use core::ffi::{c_int, c_void};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use transport::{Control, ControlOp, GROUP_BASE, is_group};

use crate::Outcome;
use crate::leave;
use crate::send;
use crate::table::{Slot, State};

/// # Safety
/// As `setsockopt(2)`. `Moved` also says that the option is the socket's own.
pub unsafe fn set(
    fd: c_int,
    slot: &Slot,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: libc::socklen_t,
) -> Outcome {
    if level != libc::SOL_NETLINK {
        // A filter would see our barriers, and could keep their acks back.
        let filters = [libc::SO_ATTACH_FILTER, libc::SO_ATTACH_BPF];
        if level == libc::SOL_SOCKET && filters.contains(&name) {
            return match slot.state() {
                State::Undecided => leave::to_kernel(fd, slot),
                _ => Outcome::Fail(libc::EOPNOTSUPP),
            };
        }
        return Outcome::Moved;
    }
    if (length as usize) < size_of::<u32>() || value.is_null() {
        return Outcome::Fail(libc::EINVAL);
    }
    // SAFETY: `length` bytes are there; alignment isn't asked for.
    let value = unsafe { value.cast::<u32>().read_unaligned() };
    let Ok(number) = u32::try_from(name) else {
        return Outcome::Fail(libc::ENOPROTOOPT);
    };
    let op = ControlOp::from_number(number);
    let member = matches!(
        op,
        Some(ControlOp::AddMembership | ControlOp::DropMembership)
    );
    if member && !is_group(value) {
        return match slot.state() {
            State::Undecided => leave::to_kernel(fd, slot),
            _ => Outcome::Fail(libc::EINVAL),
        };
    }
    if member {
        let bit = 1u64
            .checked_shl(value.wrapping_sub(GROUP_BASE))
            .unwrap_or(0);
        // Who wants the daemon's notifications is the daemon's.
        slot.change(State::Undecided, State::Ours);
        if op == Some(ControlOp::AddMembership) {
            slot.groups.fetch_or(bit, AcqRel);
        } else {
            slot.groups.fetch_and(!bit, AcqRel);
        }
    } else if op.is_some() || name == libc::NETLINK_PKTINFO {
        let bit = 1u32.checked_shl(number).unwrap_or(0);
        if value != 0 {
            slot.options.fetch_or(bit, AcqRel);
        } else {
            slot.options.fetch_and(!bit, AcqRel);
        }
    } else {
        return Outcome::Fail(libc::ENOPROTOOPT);
    }
    let Some(op) = op else {
        return Outcome::Done(0);
    };
    let value = if member { value } else { u32::from(value != 0) };
    match send::bytes(fd, &Control { op, value }.to_bytes()) {
        Ok(()) => Outcome::Done(0),
        Err(error) => match send::failed(fd, slot, error) {
            // The daemon has ended; the socket is the kernel's now, and so is the answer.
            Outcome::Fail(libc::ECONNRESET) => Outcome::Moved,
            other => other,
        },
    }
}

/// # Safety
/// As `getsockopt(2)`. `Moved` also says that the option is the socket's own.
pub unsafe fn get(
    _fd: c_int,
    slot: &Slot,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    length: *mut libc::socklen_t,
) -> Outcome {
    let own = match (level, name) {
        (libc::SOL_SOCKET, libc::SO_DOMAIN) => libc::AF_NETLINK as u32,
        (libc::SOL_SOCKET, libc::SO_TYPE) => slot.kind.load(Relaxed) as u32,
        (libc::SOL_SOCKET, libc::SO_PROTOCOL) => slot.protocol.load(Relaxed) as u32,
        (libc::SOL_NETLINK, libc::NETLINK_LIST_MEMBERSHIPS) => {
            // SAFETY: the caller's contract.
            return unsafe { list_memberships(slot, value, length) };
        }
        (libc::SOL_NETLINK, _) => {
            let number = u32::try_from(name).unwrap_or(u32::MAX);
            let boolean = name == libc::NETLINK_PKTINFO
                || ControlOp::from_number(number).is_some_and(|op| {
                    !matches!(op, ControlOp::AddMembership | ControlOp::DropMembership)
                });
            if !boolean {
                return Outcome::Fail(libc::ENOPROTOOPT);
            }
            slot.options.load(Acquire).checked_shr(number).unwrap_or(0) & 1
        }
        _ => return Outcome::Moved,
    };
    if value.is_null() || length.is_null() {
        return Outcome::Fail(libc::EFAULT);
    }
    // SAFETY: the caller's room is as long as it says, and no more is written.
    unsafe {
        let room = (length.read_unaligned() as usize).min(size_of::<u32>());
        if level == libc::SOL_NETLINK && room < size_of::<u32>() {
            return Outcome::Fail(libc::EINVAL);
        }
        core::ptr::copy_nonoverlapping((&raw const own).cast::<u8>(), value.cast(), room);
        length.write_unaligned(room as libc::socklen_t);
    }
    Outcome::Done(0)
}

/// A bitmap of u32 words, group 1 in its lowest bit, as much as there is room for; its full
/// length in bytes is told.
///
/// # Safety
/// As `getsockopt(2)`.
unsafe fn list_memberships(
    slot: &Slot,
    value: *mut c_void,
    length: *mut libc::socklen_t,
) -> Outcome {
    if length.is_null() {
        return Outcome::Fail(libc::EFAULT);
    }
    let groups = slot.groups.load(Acquire);
    let words = GROUP_BASE.wrapping_add(transport::GROUP_COUNT).div_ceil(32);
    // SAFETY: the caller's room is as long as it says, and no more is written.
    unsafe {
        let room = length.read_unaligned() / 4;
        for word in 0..room.min(words) {
            let bits = (0..32u32).fold(0u32, |bits, bit| {
                let group = word.wrapping_mul(32).wrapping_add(bit).wrapping_add(1);
                let member = group.checked_sub(GROUP_BASE).is_some_and(|index| {
                    groups.checked_shr(index).is_some_and(|rest| rest & 1 == 1)
                });
                if member { bits | 1 << bit } else { bits }
            });
            value.cast::<u32>().add(word as usize).write_unaligned(bits);
        }
        length.write_unaligned(words.wrapping_mul(4));
    }
    Outcome::Done(0)
}
