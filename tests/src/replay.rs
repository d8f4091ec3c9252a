//! Recordings of the kernel module (`tests/corpus`) replayed against a running ovs-dpd: over its
//! socket and through its ports.
//!
//! - [`client`]: a netlink socket of the daemon, by the transport's contract.
//! - [`translate`]: numbers that are another machine's: families, port ids, ifindexes.
//! - [`differences`]: what differs, field by field and case by case, each with its reason. Nothing else is
//!   let pass.
//! - [`session`]: lines of a recording, one after the other.
//! - [`laboratory`]: the devices that the recordings were made with; frames in and out.
//! - [`packets`]: frames let in, and what comes of them.

pub mod client;
pub mod differences;
pub mod laboratory;
pub mod packets;
pub mod session;
pub mod translate;
