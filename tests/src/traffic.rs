//! Traffic: what endpoints say to each other.
//!
//! - [`ping`]: ICMP echo, counted.
//! - [`iperf`]: TCP and UDP throughput by iperf3.
//! - [`tcp`]: bytes that come back as they went.
//! - [`udp`]: a paced stream with sequence numbers, and a collector of datagrams.
//! - [`raw`]: frames as they are on the wire.

pub mod iperf;
pub mod ping;
pub mod raw;
pub mod tcp;
pub mod udp;

pub use iperf::iperf3;
pub use ping::{ping, ping_ok};
