//! Netlink, generic netlink and the Open vSwitch families as bytes; the server that speaks them.
//! Knows no flow table.

pub mod attr;
pub mod errno;
pub mod transport;

pub use errno::Errno;
