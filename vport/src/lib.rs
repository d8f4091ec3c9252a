//! Frames in and out of the devices behind the ports. Knows no flows.
//!
//! - [`port`]: what every port can do: [`Port`], [`RxQueue`], and what they report;
//! - [`open`]: which driver an existing device gets ([`attach`]), and what a dead daemon left
//!   behind ([`cleanup`]);
//! - [`internal`]: ports that are devices of our own ([`create_internal`]): a TAP, or a veth pair
//!   where /dev/net/tun is closed;
//! - [`af_packet`], [`af_xdp`], [`tap`]: a driver each;
//! - [`tunnel`]: ports whose device is an IP network;
//! - [`ring`]: bounded rings that stop what feeds them; deferred transmission;
//! - [`stream`]: ports whose frames go through TCP connections;
//! - [`hide`]: keeps a port's packets from the host's own stack;
//! - [`link`]: rtnetlink, as far as ports need it, and the monitor of links;
//! - [`error`]: an errno for the protocol, with a sentence for people.
//!
//! Unsafe code lives in `sys/`, one kernel noun a file, and in `ring/slot.rs`.

pub mod af_packet;
pub mod af_xdp;
pub mod error;
pub mod hide;
pub mod internal;
pub mod link;
mod nl;
mod offload;
pub mod open;
pub mod port;
pub mod ring;
pub mod stream;
mod sys;
pub mod tap;
pub mod tunnel;

pub use error::Error;
pub use internal::{InternalOptions, create_internal};
pub use link::{Link, LinkEvent, LinkMonitor};
pub use open::{AttachOptions, DriverChoice, HideChoice, RingChoice, XdpMode, attach, cleanup};
pub use port::{
    Capabilities, Driver, HostCounters, Offered, Outlet, OwnRing, Port, Resume, Room, RxErrors,
    RxQueue, RxStatus, TxOutcome, TxRefusal,
};
pub use tunnel::{Tunnel, TunnelConfig, TunnelKind};
