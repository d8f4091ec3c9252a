//! `libovs_compat.so`, for `LD_PRELOAD`: gives a program's Open vSwitch netlink sockets to
//! ovs-dpd.
//!
//! Only the kernel can own a generic-netlink family. So `socket(AF_NETLINK, *, NETLINK_GENERIC)`
//! gives a UNIX socket, connected to the daemon, that carries the same datagrams; package
//! `transport` says how. The same with `NETLINK_NETFILTER`, where the daemon has the subsystems of
//! ctnetlink. What a UNIX socket does otherwise than a netlink socket is hidden here.
//! `poll`, `epoll` and what waits in between are the kernel's own.
//!
//! # What a caller can rely on
//! - No daemon, one of another network namespace or version: a real netlink socket.
//! - A descriptor whose first message is for a family that isn't Open vSwitch's (or a subsystem
//!   that isn't ctnetlink's: nftables, ipset) becomes a real
//!   netlink socket before that message is sent, under the same number and port id
//!   ([`leave`]). So ethtool, devlink and wg reach the kernel. A later message for such a family
//!   is put to the kernel on the side, and its answers come in order ([`relay`]).
//! - The answer of the daemon is there when a receive with `MSG_DONTWAIT` looks for it, as the
//!   kernel's would be ([`receive`]).
//! - The end of the daemon ends every wait: one receive or send fails with `ECONNRESET`, and from
//!   then on the descriptor is a quiet, real netlink socket, on which the daemon's families are
//!   unknown (ENOENT), as if a module had been unloaded. `poll` doesn't spin on it.
//! - A descriptor of NETLINK_ROUTE is a real netlink socket; of its messages those about tunnels'
//!   links are handed to the daemon, whose answers take the place of the kernel's ([`route`]).
//! - Descriptors of anybody else cost one relaxed load. (A descriptor seen for the first time
//!   costs one `getsockname`: it could have come through exec or over a socket.)
//!
//! # Contexts
//! Hooks run anywhere: before this library's constructor (libcap-ng calls `close` from its own),
//! in signal handlers, between fork and exec, after vfork in a borrowed address space. So: no
//! allocation, no lock, no thread-local variable but `errno`, no panic. State is a table of
//! atomics ([`table`]). Our own descriptors are served by raw system calls; for all others the
//! next definition of the function is called (`RTLD_NEXT`, resolved by the constructor or on
//! first use), so that other preloaded libraries and pthread cancellation go on to work: hooks are
//! `extern "C-unwind"` without destructors for that reason. What serves our own has no panic in
//! it; if it had one, it would abort and not unwind into C.
//!
//! What is redirected: [`connect::serves`].
#![allow(unsafe_code)] // The C library's functions are replaced here: nothing of it can be safe.

mod connect;
mod hooks;
mod leave;
mod message;
mod names;
mod next;
mod options;
mod receive;
mod relay;
mod route;
mod send;
mod sys;
mod table;

/// What serving a call on one of our descriptors came to.
enum Outcome {
    /// The return value.
    Done(isize),
    /// `-1` with this errno.
    Fail(i32),
    /// The descriptor has become a real netlink socket: the call belongs to the kernel.
    Moved,
}
