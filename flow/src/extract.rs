//! From a frame to a key.
//!
//! The kernel's semantics (`key_extract`): a header that is cut short or malformed doesn't drop the
//! packet, its fields are zero; only a truncated VLAN tag and a bad NSH header do. The outermost tag
//! among the bytes is moved out of band on the way.
//!
//! Runs per packet: nothing is allocated, the key is written in the caller's place.

use frame::Frame;

use crate::headers::Layers;
use crate::key::{Key, TunnelKey};

/// What a packet begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PacketType {
    /// An Ethernet header.
    #[default]
    Ethernet,
    /// The header of this Ethernet type (a packet out of an L3 tunnel).
    L3(u16),
}

/// What is known of a packet besides its bytes. Host byte order.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// Datapath port number, or [`PORT_NONE`](crate::key::PORT_NONE).
    pub in_port: u32,
    /// Packet mark.
    pub skb_mark: u32,
    /// Queueing priority.
    pub priority: u32,
    /// Recirculation context.
    pub recirc_id: u32,
    /// Hash computed by the `hash` action.
    pub dp_hash: u32,
    /// What the packet begins with.
    pub packet_type: PacketType,
    /// Outer header, if it came through a tunnel.
    pub tunnel: Option<Box<TunnelKey>>,
    /// What conntrack said.
    pub ct: Option<Box<ConntrackMetadata>>,
}

/// What conntrack said of a packet: the key's fields of the same names.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct ConntrackMetadata {
    pub state: u8,
    pub zone: u16,
    pub mark: u32,
    pub labels: [u8; 16],
    pub orig_src: [u8; 16],
    pub orig_dst: [u8; 16],
    pub orig_tp_src: u16,
    pub orig_tp_dst: u16,
    pub orig_proto: u8,
}

/// Why a packet has no key: drop and count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtractError {
    /// Shorter than an Ethernet header.
    #[error("shorter than an Ethernet header")]
    Runt,
    /// A VLAN tag is cut short.
    #[error("a VLAN tag is cut short")]
    Vlan,
    /// An NSH header is cut short or malformed.
    #[error("an NSH header is cut short or malformed")]
    Nsh,
}

/// Extracts `key` and where the headers are. `key` may hold anything that an earlier call left there
/// (or [`Key::ZERO`]); all of it is written.
///
/// # Errors
/// [`ExtractError`]: the packet is to be dropped; `key` is then unspecified.
pub fn extract(frame: &mut Frame, meta: &Metadata, key: &mut Key) -> Result<Layers, ExtractError> {
    let _ = (frame, meta, key);
    Err(ExtractError::Runt)
}

/// Extracts the packet's part of `key` again after its bytes changed; the metadata stay. Needed only if
/// [`Layers::key_valid`] is false.
///
/// # Errors
/// [`ExtractError`]: the packet is to be dropped.
pub fn update(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), ExtractError> {
    let _ = (frame, key, layers);
    Err(ExtractError::Runt)
}
