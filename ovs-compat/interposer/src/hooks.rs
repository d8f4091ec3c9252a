//! The functions of the C library that are replaced. Each asks the table whether the descriptor is
//! ours; if it isn't (or no more), it calls the next definition with what it was given.
//!
//! All are `extern "C-unwind"` and have nothing to drop: a thread that is cancelled in a blocking
//! call unwinds through them.

use core::ffi::{c_int, c_uint, c_void};
use core::sync::atomic::Ordering::Release;

use crate::Outcome;
use crate::next::Next;
use crate::route::{self, calls};
use crate::table::{self, Slot};
use crate::{connect, names, options, receive, send, sys};

/// Runs when the library is loaded, though not before everything else.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn constructor() {
        connect::prepare();
        table::prepare();
        resolve();
    }
    constructor
};

/// Declares the next definitions, and `resolve` which looks all of them up.
macro_rules! next {
    ($($name:ident($($type:ty),*) -> $result:ty;)*) => {
        mod next_of {
            use super::*;
            $(
                #[allow(non_upper_case_globals)] // named as the function
                // SAFETY: the type is that of the C library's declaration.
                pub static $name: Next<unsafe extern "C-unwind" fn($($type),*) -> $result> = unsafe {
                    Next::new(match core::ffi::CStr::from_bytes_with_nul(
                        concat!(stringify!($name), "\0").as_bytes(),
                    ) {
                        Ok(name) => name,
                        Err(_) => c"",
                    })
                };
            )*
        }
        fn resolve() {
            $( next_of::$name.get(); )*
        }
    };
}

next! {
    socket(c_int, c_int, c_int) -> c_int;
    bind(c_int, *const libc::sockaddr, libc::socklen_t) -> c_int;
    connect(c_int, *const libc::sockaddr, libc::socklen_t) -> c_int;
    getsockname(c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> c_int;
    getpeername(c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> c_int;
    setsockopt(c_int, c_int, c_int, *const c_void, libc::socklen_t) -> c_int;
    getsockopt(c_int, c_int, c_int, *mut c_void, *mut libc::socklen_t) -> c_int;
    send(c_int, *const c_void, usize, c_int) -> isize;
    sendto(c_int, *const c_void, usize, c_int, *const libc::sockaddr, libc::socklen_t) -> isize;
    sendmsg(c_int, *const libc::msghdr, c_int) -> isize;
    sendmmsg(c_int, *mut libc::mmsghdr, c_uint, c_int) -> c_int;
    write(c_int, *const c_void, usize) -> isize;
    writev(c_int, *const libc::iovec, c_int) -> isize;
    recv(c_int, *mut c_void, usize, c_int) -> isize;
    recvfrom(c_int, *mut c_void, usize, c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> isize;
    recvmsg(c_int, *mut libc::msghdr, c_int) -> isize;
    recvmmsg(c_int, *mut libc::mmsghdr, c_uint, c_int, *mut libc::timespec) -> c_int;
    read(c_int, *mut c_void, usize) -> isize;
    readv(c_int, *const libc::iovec, c_int) -> isize;
    __read_chk(c_int, *mut c_void, usize, usize) -> isize;
    __recv_chk(c_int, *mut c_void, usize, usize, c_int) -> isize;
    __recvfrom_chk(c_int, *mut c_void, usize, usize, c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> isize;
    dup(c_int) -> c_int;
    dup2(c_int, c_int) -> c_int;
    dup3(c_int, c_int, c_int) -> c_int;
    fcntl(c_int, c_int, usize) -> c_int;
    fcntl64(c_int, c_int, usize) -> c_int;
    close(c_int) -> c_int;
    close_range(c_uint, c_uint, c_int) -> c_int;
    closefrom(c_int) -> ();
    epoll_ctl(c_int, c_int, c_int, *mut libc::epoll_event) -> c_int;
}

/// Calls the next definition.
macro_rules! pass {
    ($name:ident($($arg:expr),*)) => {
        match next_of::$name.get() {
            // SAFETY: with what our own caller gave, who vouches for it.
            Some(function) => unsafe { function($($arg),*) },
            None => sys::fail(libc::ENOSYS) as _,
        }
    };
}

/// Nothing of ours panics; if it did, it would end here and not unwind into C.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        // SAFETY: no arguments.
        unsafe { libc::abort() }
    }
}

#[inline(never)] // A frame with a destructor, which the hooks' own must not have.
fn guarded(serve: impl FnOnce() -> Outcome) -> Outcome {
    let bomb = Bomb;
    let outcome = serve();
    core::mem::forget(bomb);
    outcome
}

/// Serves a call on one of our descriptors, or passes it on. `route` is for those of NETLINK_ROUTE:
/// None passes it on as well; `after` looks at what the next definition has received there.
macro_rules! hook {
    ($(#[$doc:meta])* fn $name:ident($fd:ident: c_int $(, $arg:ident: $type:ty)*) -> $result:ty,
     |$slot:ident| $serve:expr $(, route: $route:expr)? $(, after: |$length:ident| $after:expr)?) => {
        $(#[$doc])*
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name($fd: c_int $(, $arg: $type)*) -> $result {
            if !table::is_foreign($fd) {
                if let Some($slot) = table::find($fd) {
                    match guarded(|| $serve) {
                        Outcome::Done(value) => return value as $result,
                        Outcome::Fail(error) => return sys::fail(error) as $result,
                        Outcome::Moved => {}
                    }
                }
                $(
                    else if table::is_route($fd) {
                        match guarded(|| $route.unwrap_or(Outcome::Moved)) {
                            Outcome::Done(value) => return value as $result,
                            Outcome::Fail(error) => return sys::fail(error) as $result,
                            Outcome::Moved => {}
                        }
                    }
                )?
            }
            #[allow(clippy::let_and_return)] // not where `after` follows
            let result = pass!($name($fd $(, $arg)*));
            $(
                if result >= 0 && table::is_route($fd) {
                    let $length = result;
                    $after
                }
            )?
            result
        }
    };
}

mod descriptors;

/// `socket(2)`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    if connect::serves(domain, kind, protocol) && !table::is_vforked() {
        match connect::open(kind, protocol) {
            Some(Ok(fd)) => return fd,
            Some(Err(error)) => return sys::fail(error) as c_int,
            None => {}
        }
    }
    let fd = pass!(socket(domain, kind, protocol));
    if fd >= 0 && !table::is_vforked() {
        if domain == libc::AF_NETLINK && protocol == libc::NETLINK_ROUTE {
            table::set_route(fd);
        } else {
            table::set_foreign(fd);
        }
    }
    fd
}

hook! {
    /// `bind(2)`.
    fn bind(fd: c_int, address: *const libc::sockaddr, length: libc::socklen_t) -> c_int,
    // SAFETY: the caller's contract.
    |slot| unsafe { names::bind(fd, slot, address, length) }
}

hook! {
    /// `connect(2)`.
    fn connect(fd: c_int, address: *const libc::sockaddr, length: libc::socklen_t) -> c_int,
    // SAFETY: the caller's contract.
    |slot| unsafe { names::connect(fd, slot, address, length) },
    route: // SAFETY: the caller's contract.
    unsafe { route::connect_to_kernel(fd, address, length) }
}

/// # Safety
/// As `getsockname(2)`.
unsafe fn tell(
    address: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
    port_id: u32,
) -> Outcome {
    if address.is_null() || length.is_null() {
        return Outcome::Fail(libc::EFAULT);
    }
    // SAFETY: the caller's contract.
    unsafe { names::write(address, length, port_id) };
    Outcome::Done(0)
}

hook! {
    /// `getsockname(2)`.
    fn getsockname(fd: c_int, address: *mut libc::sockaddr, length: *mut libc::socklen_t) -> c_int,
    // SAFETY: the caller's contract.
    |slot| unsafe {
        slot.told.store(true, Release);
        tell(address, length, names::port_id(slot))
    }
}

hook! {
    /// `getpeername(2)`.
    fn getpeername(fd: c_int, address: *mut libc::sockaddr, length: *mut libc::socklen_t) -> c_int,
    // SAFETY: the caller's contract.
    |_slot| unsafe { tell(address, length, 0) }
}

hook! {
    /// `setsockopt(2)`.
    fn setsockopt(fd: c_int, level: c_int, name: c_int, value: *const c_void, length: libc::socklen_t) -> c_int,
    // SAFETY: the caller's contract.
    |slot| unsafe { options::set(fd, slot, level, name, value, length) }
}

hook! {
    /// `getsockopt(2)`.
    fn getsockopt(fd: c_int, level: c_int, name: c_int, value: *mut c_void, length: *mut libc::socklen_t) -> c_int,
    // SAFETY: the caller's contract.
    |slot| unsafe { options::get(fd, slot, level, name, value, length) }
}

/// # Safety
/// `buffer` holds `length` bytes.
unsafe fn send_buffer(
    fd: c_int,
    slot: &Slot,
    buffer: *const c_void,
    length: usize,
    flags: c_int,
) -> Outcome {
    // SAFETY: the caller's contract.
    let vector = unsafe { send::vector(buffer, length) };
    send::datagram(fd, slot, &[vector], flags)
}

/// # Safety
/// `vectors` are `count` elements, or null.
pub unsafe fn vectors<'a>(vectors: *const libc::iovec, count: usize) -> &'a [libc::iovec] {
    if vectors.is_null() {
        return &[];
    }
    // SAFETY: the caller's contract.
    unsafe { core::slice::from_raw_parts(vectors, count) }
}

hook! {
    /// `send(2)`.
    fn send(fd: c_int, buffer: *const c_void, length: usize, flags: c_int) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe { send_buffer(fd, slot, buffer, length, flags) },
    route: // SAFETY: the caller's contract.
    unsafe { calls::buffer(fd, buffer, length, flags) }
}

hook! {
    /// `sendto(2)`: the address can only be the kernel's.
    fn sendto(fd: c_int, buffer: *const c_void, length: usize, flags: c_int, address: *const libc::sockaddr, address_length: libc::socklen_t) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe { send_buffer(fd, slot, buffer, length, flags) },
    route: // SAFETY: the caller's contract.
    unsafe {
        if calls::is_to_kernel(address.cast(), address_length) {
            calls::buffer(fd, buffer, length, flags)
        } else {
            None
        }
    }
}

hook! {
    /// `write(2)`.
    fn write(fd: c_int, buffer: *const c_void, length: usize) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe { send_buffer(fd, slot, buffer, length, 0) },
    route: // SAFETY: the caller's contract.
    unsafe { calls::buffer(fd, buffer, length, 0) }
}

hook! {
    /// `writev(2)`.
    fn writev(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize,
    |slot| match usize::try_from(count) {
        // SAFETY: the caller's contract.
        Ok(count) => send::datagram(fd, slot, unsafe { vectors(parts, count) }, 0),
        Err(_) => Outcome::Fail(libc::EINVAL),
    },
    route: usize::try_from(count).ok().and_then(|count| {
        // SAFETY: the caller's contract.
        route::datagram(fd, unsafe { vectors(parts, count) }, 0)
    })
}

/// # Safety
/// As `sendmsg(2)`.
unsafe fn send_message(
    fd: c_int,
    slot: &Slot,
    message: *const libc::msghdr,
    flags: c_int,
) -> Outcome {
    // SAFETY: the caller's contract.
    match unsafe { message.as_ref() } {
        Some(message) => {
            // SAFETY: the caller's contract.
            let parts = unsafe { vectors(message.msg_iov, message.msg_iovlen) };
            send::datagram(fd, slot, parts, flags)
        }
        None => Outcome::Fail(libc::EFAULT),
    }
}

hook! {
    /// `sendmsg(2)`.
    fn sendmsg(fd: c_int, message: *const libc::msghdr, flags: c_int) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe { send_message(fd, slot, message, flags) },
    route: // SAFETY: the caller's contract.
    unsafe { calls::message(fd, message, flags) }
}

/// # Safety
/// As `sendmmsg(2)`.
unsafe fn send_messages(
    fd: c_int,
    slot: &Slot,
    messages: *mut libc::mmsghdr,
    count: c_uint,
    flags: c_int,
) -> Outcome {
    let mut sent = 0usize;
    while sent < (count as usize).min(1024) {
        // SAFETY: the caller's contract; `sent` is below its count.
        let outcome = unsafe {
            let message = messages.add(sent);
            let outcome = send_message(fd, slot, &raw const (*message).msg_hdr, flags);
            if let Outcome::Done(length) = outcome {
                (*message).msg_len = length as c_uint;
            }
            outcome
        };
        match outcome {
            Outcome::Done(_) => sent = sent.wrapping_add(1),
            // What was sent before counts; the rest is for the next call.
            _ if sent > 0 => break,
            other => return other,
        }
    }
    Outcome::Done(sent as isize)
}

hook! {
    /// `sendmmsg(2)`.
    fn sendmmsg(fd: c_int, messages: *mut libc::mmsghdr, count: c_uint, flags: c_int) -> c_int,
    // SAFETY: the caller's contract.
    |slot| unsafe { send_messages(fd, slot, messages, count, flags) },
    route: // SAFETY: the caller's contract.
    unsafe { calls::messages(fd, messages, count, flags) }
}

/// # Safety
/// `buffer` has room for `length` bytes; `address` and `address_length` as in `recvfrom(2)`.
unsafe fn receive_buffer(
    fd: c_int,
    slot: &Slot,
    buffer: *mut c_void,
    length: usize,
    flags: c_int,
    address: *mut libc::sockaddr,
    address_length: *mut libc::socklen_t,
) -> Outcome {
    // SAFETY: the caller's contract.
    let vector = unsafe { send::vector(buffer, length) };
    let outcome = receive::datagram(fd, slot, &[vector], flags, &mut 0);
    if let Outcome::Done(_) = outcome {
        // SAFETY: the caller's contract.
        unsafe { names::write(address, address_length, 0) };
    }
    outcome
}

hook! {
    /// `recv(2)`.
    fn recv(fd: c_int, buffer: *mut c_void, length: usize, flags: c_int) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe {
        receive_buffer(fd, slot, buffer, length, flags, core::ptr::null_mut(), core::ptr::null_mut())
    }
}

hook! {
    /// `recvfrom(2)`.
    fn recvfrom(fd: c_int, buffer: *mut c_void, length: usize, flags: c_int, address: *mut libc::sockaddr, address_length: *mut libc::socklen_t) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe { receive_buffer(fd, slot, buffer, length, flags, address, address_length) },
    after: |_length| if !address_length.is_null() {
        // SAFETY: the caller's contract.
        unsafe { route::fix_sender(address, address_length.read_unaligned() as usize) }
    }
}

hook! {
    /// `read(2)`.
    fn read(fd: c_int, buffer: *mut c_void, length: usize) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe {
        receive_buffer(fd, slot, buffer, length, 0, core::ptr::null_mut(), core::ptr::null_mut())
    }
}

hook! {
    /// `read(2)` of a fortified program; the next definition aborts if there isn't room.
    fn __read_chk(fd: c_int, buffer: *mut c_void, length: usize, room: usize) -> isize,
    // SAFETY: the caller's contract.
    |slot| if length > room { Outcome::Moved } else { unsafe {
        receive_buffer(fd, slot, buffer, length, 0, core::ptr::null_mut(), core::ptr::null_mut())
    } }
}

hook! {
    /// `recv(2)` of a fortified program; the next definition aborts if there isn't room.
    fn __recv_chk(fd: c_int, buffer: *mut c_void, length: usize, room: usize, flags: c_int) -> isize,
    // SAFETY: the caller's contract.
    |slot| if length > room { Outcome::Moved } else { unsafe {
        receive_buffer(fd, slot, buffer, length, flags, core::ptr::null_mut(), core::ptr::null_mut())
    } }
}

hook! {
    /// `recvfrom(2)` of a fortified program; the next definition aborts if there isn't room.
    fn __recvfrom_chk(fd: c_int, buffer: *mut c_void, length: usize, room: usize, flags: c_int, address: *mut libc::sockaddr, address_length: *mut libc::socklen_t) -> isize,
    // SAFETY: the caller's contract.
    |slot| if length > room { Outcome::Moved } else { unsafe {
        receive_buffer(fd, slot, buffer, length, flags, address, address_length)
    } },
    after: |_length| if !address_length.is_null() {
        // SAFETY: the caller's contract.
        unsafe { route::fix_sender(address, address_length.read_unaligned() as usize) }
    }
}

hook! {
    /// `readv(2)`.
    fn readv(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize,
    |slot| match usize::try_from(count) {
        // SAFETY: the caller's contract.
        Ok(count) => receive::datagram(fd, slot, unsafe { vectors(parts, count) }, 0, &mut 0),
        Err(_) => Outcome::Fail(libc::EINVAL),
    }
}

/// # Safety
/// As `recvmsg(2)`.
unsafe fn receive_message(
    fd: c_int,
    slot: &Slot,
    message: *mut libc::msghdr,
    flags: c_int,
) -> Outcome {
    // SAFETY: the caller's contract.
    let Some(message) = (unsafe { message.as_mut() }) else {
        return Outcome::Fail(libc::EFAULT);
    };
    // SAFETY: the caller's contract.
    let parts = unsafe { vectors(message.msg_iov, message.msg_iovlen) };
    let mut message_flags = 0;
    let outcome = receive::datagram(fd, slot, parts, flags, &mut message_flags);
    if let Outcome::Done(_) = outcome {
        message.msg_flags = message_flags;
        message.msg_controllen = 0;
        if message.msg_name.is_null() {
            message.msg_namelen = 0;
        } else {
            // SAFETY: the caller's contract.
            unsafe { names::write(message.msg_name.cast(), &raw mut message.msg_namelen, 0) };
        }
    }
    outcome
}

hook! {
    /// `recvmsg(2)`.
    fn recvmsg(fd: c_int, message: *mut libc::msghdr, flags: c_int) -> isize,
    // SAFETY: the caller's contract.
    |slot| unsafe { receive_message(fd, slot, message, flags) },
    after: |_length| {
        // SAFETY: the caller's contract: what was received into is there.
        unsafe { calls::fix_message(message) }
    }
}

/// # Safety
/// As `recvmmsg(2)`.
unsafe fn receive_messages(
    fd: c_int,
    slot: &Slot,
    messages: *mut libc::mmsghdr,
    count: c_uint,
    flags: c_int,
    timeout: *mut libc::timespec,
) -> Outcome {
    // SAFETY: the caller's contract.
    let patience = unsafe { timeout.as_ref() }.map(|time| {
        i128::from(time.tv_sec)
            .saturating_mul(1_000_000_000)
            .saturating_add(time.tv_nsec.into())
    });
    let start = sys::monotonic_ns();
    let mut flags = flags;
    let wait_for_one = flags & libc::MSG_WAITFORONE != 0;
    flags &= !libc::MSG_WAITFORONE;
    let mut received = 0usize;
    while received < count as usize {
        // SAFETY: the caller's contract; `received` is below its count.
        let outcome = unsafe {
            let message = messages.add(received);
            let outcome = receive_message(fd, slot, &raw mut (*message).msg_hdr, flags);
            if let Outcome::Done(length) = outcome {
                (*message).msg_len = length as c_uint;
            }
            outcome
        };
        match outcome {
            Outcome::Done(_) => received = received.wrapping_add(1),
            Outcome::Fail(error) if received > 0 => {
                // What was received before counts; the error is for the next call.
                if error != libc::EAGAIN && error != libc::EINTR {
                    slot.pending.store(error, Release);
                }
                break;
            }
            Outcome::Moved if received > 0 => break,
            other => return other,
        }
        if wait_for_one {
            flags |= libc::MSG_DONTWAIT;
        }
        // As in the kernel, time is looked at after each message only.
        if patience.is_some_and(|time| sys::monotonic_ns().saturating_sub(start) >= time) {
            break;
        }
    }
    Outcome::Done(received as isize)
}

hook! {
    /// `recvmmsg(2)`.
    fn recvmmsg(fd: c_int, messages: *mut libc::mmsghdr, count: c_uint, flags: c_int, timeout: *mut libc::timespec) -> c_int,
    // SAFETY: the caller's contract.
    |slot| unsafe { receive_messages(fd, slot, messages, count, flags, timeout) },
    after: |received| {
        // SAFETY: the caller's contract; so many have been received.
        unsafe {
            for index in 0..usize::try_from(received).unwrap_or(0) {
                calls::fix_message(&raw mut (*messages.add(index)).msg_hdr);
            }
        }
    }
}
