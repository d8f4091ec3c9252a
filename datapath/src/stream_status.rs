//! What `ovs-dpd stream list` shows: the streams, beside the ports that some of them are.

use ::vport::stream::{Endpoint, State, StreamStatus as Told};
use serde::{Deserialize, Serialize};

/// One stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StreamStatus {
    /// The name of its device when that was made.
    pub name: String,
    /// The device's ifindex.
    pub ifindex: u32,
    /// `listen` or `connect`.
    pub role: String,
    /// Where it listens, or what it connects to.
    pub address: String,
    /// `waiting`, `connecting`, `connected`, or `gone`: the device was deleted by somebody else.
    pub state: String,
    /// The peer's address, if it has one.
    pub peer: Option<String>,
    /// Why it isn't connected, or the last connection ended.
    pub reason: String,
    /// Whether it is a port of a datapath.
    pub attached: bool,
    /// Connections so far.
    pub connections: u64,
    /// Who connected while there was a peer, and was sent away.
    pub turned_away: u64,
    /// Frames for the peer: `enqueued = sent + dropped_full + dropped_close` and what waits.
    pub enqueued: u64,
    /// See [`StreamStatus::enqueued`].
    pub sent: u64,
    /// The ring was full.
    pub dropped_full: u64,
    /// There was no connection any more.
    pub dropped_close: u64,
    /// The ring in front of the peer.
    pub ring: RingStatus,
    /// Frames that the host sent to the device.
    pub from_host: u64,
    /// Frames that the host sent to the device while there was no peer: lost.
    pub from_host_unconnected: u64,
    /// The ring in front of the datapath: `produced` are the peer's frames.
    pub inbox: RingStatus,
    /// The peer's frames that are shorter than an Ethernet header: lost.
    pub runt: u64,
    /// The peer's frames that are longer than the device takes: lost.
    pub oversized: u64,
    /// The peer's frames while the device was no port, or down: lost.
    pub unattached: u64,
}

/// One ring.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RingStatus {
    /// `tail-drop` or `backpressure`.
    pub policy: String,
    /// Places.
    pub size: u64,
    /// Frames in it.
    pub len: u64,
    /// Frames that found a place.
    pub produced: u64,
    /// Frames taken out.
    pub consumed: u64,
    /// Frames that found no place.
    pub dropped_full: u64,
    /// How often it stopped what feeds it.
    pub stops: u64,
    /// How often it let that go on. At rest as often.
    pub wakes: u64,
}

/// The name of a policy.
pub fn policy(backpressure: bool) -> &'static str {
    if backpressure {
        "backpressure"
    } else {
        "tail-drop"
    }
}

impl RingStatus {
    /// Of a ring's counters.
    pub fn new(backpressure: bool, size: usize, len: usize, of: &::vport::ring::Counters) -> Self {
        Self {
            policy: policy(backpressure).to_owned(),
            size: size as u64,
            len: len as u64,
            produced: of.produced,
            consumed: of.consumed,
            dropped_full: of.dropped_full,
            stops: of.stops,
            wakes: of.wakes,
        }
    }
}

impl From<Told> for StreamStatus {
    fn from(told: Told) -> Self {
        let (role, address) = match told.endpoint {
            Endpoint::Listen(address) => ("listen", address),
            Endpoint::Connect(address) => ("connect", address),
        };
        let (state, peer) = match told.state {
            State::Waiting => ("waiting", None),
            State::Connecting => ("connecting", None),
            State::Connected(peer) => ("connected", Some(peer.to_string())),
            State::Gone => ("gone", None),
        };
        Self {
            name: told.name,
            ifindex: told.ifindex,
            role: role.to_owned(),
            address: address.to_string(),
            state: state.to_owned(),
            peer,
            reason: told.reason,
            attached: told.attached,
            connections: told.connections,
            turned_away: told.turned_away,
            enqueued: told.tx.enqueued,
            sent: told.tx.sent,
            dropped_full: told.tx.dropped_full,
            dropped_close: told.tx.dropped_close,
            ring: RingStatus::new(
                told.backpressure,
                told.tx_ring_size,
                told.tx_ring_len,
                &told.tx_ring,
            ),
            from_host: told.from_host,
            from_host_unconnected: told.from_host_unconnected,
            inbox: RingStatus::new(true, told.rx_ring_size, told.rx_ring_len, &told.rx_ring),
            runt: told.rx_runt,
            oversized: told.rx_oversized,
            unattached: told.rx_unattached,
        }
    }
}
