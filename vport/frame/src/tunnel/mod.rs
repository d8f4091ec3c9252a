//! Headers of tunnels: what is in front of a frame on its way over an IP network.
//!
//! Each kind has a file with two functions: `parse` reads its header into a [`TunnelKey`], `push` puts one
//! in front of a frame as a key asks. Neither knows of sockets; the IP header in front of all is
//! [`outer`]'s on the way in, and the kernel's on the way out.

pub mod ecn;
pub mod erspan;
pub mod geneve;
pub mod gre;
pub mod key;
pub mod outer;
pub mod too_big;
pub mod vxlan;

pub use key::{TunnelKey, V4, V6, tunnel_flags};

/// `ETH_P_TEB`: an Ethernet frame (transparent Ethernet bridging).
pub const ETH_P_TEB: u16 = 0x6558;

/// What a tunnel carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// An Ethernet frame.
    Ethernet,
    /// A packet of this Ethernet type.
    L3(u16),
}

/// What [`vxlan::parse`] and its likes found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// How many bytes the header has.
    pub header: usize,
    /// What is behind it.
    pub payload: Payload,
}

/// Why a packet that came to a tunnel isn't the tunnel's: drop and count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A header is cut short.
    Short,
    /// A version, flag or field that this tunnel doesn't know.
    Header,
    /// It carries what this tunnel doesn't carry.
    Protocol,
    /// A checksum is wrong.
    Checksum,
    /// Congestion experienced by a packet that can't say so (RFC 6040, 4.2).
    Congestion,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Short => "a header is cut short",
            Self::Header => "a header that isn't this tunnel's",
            Self::Protocol => "carries what this tunnel doesn't",
            Self::Checksum => "a wrong checksum",
            Self::Congestion => "congestion marked on a packet that can't say so",
        })
    }
}

impl std::error::Error for Refused {}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Refused> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    Ok(u16::from_be_bytes(*word.ok_or(Refused::Short)?))
}
