//! Traffic: what endpoints say to each other.
//!
//! - [`ping`]: ICMP echo, counted.
//! - [`iperf`]: TCP and UDP throughput by iperf3.
//! - [`tcp`]: bytes that come back as they went.
//! - [`udp`]: a paced stream with sequence numbers, and a collector of datagrams.
//! - [`raw`]: frames as they are on the wire.
//! - [`whoami`]: as whom a server sees its clients.

pub mod iperf;
pub mod ping;
pub mod raw;
pub mod tcp;
pub mod udp;
pub mod whoami;

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::namespace::Namespace;

pub use iperf::iperf3;
pub use ping::{ping, ping_ok};

/// Binds a socket in a namespace, and tries again while the address is in use: a program that
/// another test is just starting holds, between fork and exec, a copy of every socket that was
/// closed here meanwhile.
fn bind<T: Send>(
    namespace: &Namespace,
    what: &str,
    socket: impl Fn() -> io::Result<T> + Send + Sync,
) -> Result<T> {
    crate::wait::until(what, Duration::from_secs(5), || {
        match namespace.inside(&socket)? {
            Ok(socket) => Ok(Some(socket)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error).context(what.to_owned()),
        }
    })
}
