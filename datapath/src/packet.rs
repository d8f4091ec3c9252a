//! A packet on its way through the datapath: a frame, and what is known of it.

use flow::headers::Layers;
use flow::key::{Key, TunnelKey};
use frame::Frame;

/// A packet. It ends in exactly one way: handed to a port, to user space, or dropped for a reason.
#[derive(Debug)]
pub struct Packet {
    /// The bytes, the outermost tag, the offloads.
    pub frame: Frame,
    /// What it is looked up by. Stale while [`Layers::key_valid`] is false.
    pub key: Key,
    /// Where its headers are.
    pub layers: Layers,
    /// The port whose counters it ends in: where it came from, or was executed for.
    pub ingress: u32,
    /// Over its connection; what readers and caches are chosen by. Stays the same when headers are
    /// rewritten, so that all upcalls of a packet reach the same reader.
    pub hash: u32,
    /// Limit to the next output or upcall, in bytes; 0: none.
    pub truncate: u32,
    /// Longest fragment received, without the Ethernet header; 0: wasn't fragmented.
    pub mru: u16,
    /// Where upcalls of this packet go instead of their usual reader (`OVS_PACKET_ATTR_UPCALL_PID`).
    pub upcall_pid: Option<u32>,
    /// What `set(tunnel(...))` asked for.
    pub egress: Option<Box<TunnelKey>>,
}

impl Packet {
    /// Length as `trunc` and `check_pkt_len` count it: without the tag that is out of band.
    pub fn len(&self) -> usize {
        self.frame.len()
    }
}
