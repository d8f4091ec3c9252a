//! A packet on its way through the datapath: a frame, and what is known of it.

use flow::headers::Layers;
use flow::key::{Key, TunnelKey};
use frame::Frame;

use crate::conntrack::Attached;

/// A packet. It ends in exactly one way: handed to a port, to user space, or dropped for a reason.
///
/// A key makes it large, so it travels in a box, and executors use boxes again.
#[derive(Debug, Default)]
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
    /// The longest that the next output or upcall may be (`trunc`): of a frame without the tag that is out of
    /// band, of an upcall with it. None: nothing is cut.
    pub limit: Option<u32>,
    /// Longest fragment received, without the Ethernet header; 0: wasn't fragmented.
    pub mru: u16,
    /// Where upcalls of this packet go instead of their usual reader (`OVS_PACKET_ATTR_UPCALL_PID`).
    pub upcall_pid: Option<u32>,
    /// What `set(tunnel(...))` asked for.
    pub egress: Option<Box<TunnelKey>>,
    /// Its connection, since the last `ct`.
    pub conntrack: Option<Attached>,
    /// Which of the batch's captured packets it is (see [`crate::capture`]); 0: none.
    pub captured: u32,
}

impl Packet {
    /// As a packet that comes in at `ingress`, with nothing known yet. The key is to be extracted.
    pub fn renew(&mut self, frame: Frame, ingress: u32) {
        self.frame = frame;
        self.ingress = ingress;
        self.hash = 0;
        self.limit = None;
        self.mru = 0;
        self.upcall_pid = None;
        self.egress = None;
        self.conntrack = None;
        self.captured = 0;
    }

    /// All but the bytes, of `other`.
    pub fn copy_from(&mut self, other: &Self, frame: Frame) {
        self.frame = frame;
        self.key = other.key;
        self.layers = other.layers;
        self.ingress = other.ingress;
        self.hash = other.hash;
        self.limit = other.limit;
        self.mru = other.mru;
        self.upcall_pid = other.upcall_pid;
        self.egress.clone_from(&other.egress);
        self.conntrack.clone_from(&other.conntrack);
        // What becomes of the copy isn't what becomes of the packet that came.
        self.captured = 0;
    }

    /// Length as meters and `check_pkt_len` count it: without the tag that is out of band.
    pub fn measure(&self) -> usize {
        self.frame.len()
    }
}
