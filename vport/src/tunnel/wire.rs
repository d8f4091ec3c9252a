//! Which header a tunnel's kind puts in front, and reads.

use frame::tunnel::{Inner, Payload, Refused, TunnelKey, geneve, gre, outer, vxlan};
use frame::{Frame, FrameError};

use super::{TunnelConfig, TunnelKind};

/// IP protocol numbers.
pub(super) const UDP: u8 = 17;
pub(super) const GRE: u8 = 47;

/// Bytes of the IP headers that the kernel puts in front.
const IPV4: usize = 20;
const IPV6: usize = 40;

/// Reads what is behind the IP header: `packet` is all of it. `vouched`: its checksum needn't be checked.
pub(super) fn parse(
    config: &TunnelConfig,
    packet: &[u8],
    vouched: bool,
    key: &mut TunnelKey,
) -> Result<Inner, Refused> {
    match config.kind {
        TunnelKind::Vxlan | TunnelKind::Geneve => {
            outer::udp(packet, vouched, key)?;
            let datagram = packet.get(outer::UDP_HEADER..).unwrap_or_default();
            let inner = parse_datagram(config, datagram, key)?;
            Ok(Inner {
                header: outer::UDP_HEADER + inner.header,
                ..inner
            })
        }
        TunnelKind::Gre | TunnelKind::Ip6Gre => gre::parse(packet, vouched, key),
    }
}

/// Reads what is behind the UDP header.
pub(super) fn parse_datagram(
    config: &TunnelConfig,
    datagram: &[u8],
    key: &mut TunnelKey,
) -> Result<Inner, Refused> {
    match config.kind {
        TunnelKind::Vxlan => vxlan::parse(datagram, config.extensions, key),
        TunnelKind::Geneve => geneve::parse(datagram, key),
        TunnelKind::Gre | TunnelKind::Ip6Gre => Err(Refused::Protocol),
    }
}

/// Puts the tunnel's own header in front of a frame.
pub(super) fn push(
    config: &TunnelConfig,
    frame: &mut Frame,
    key: &TunnelKey,
) -> Result<(), FrameError> {
    match config.kind {
        TunnelKind::Vxlan => vxlan::push(frame, config.extensions, key, Payload::Ethernet),
        TunnelKind::Geneve => geneve::push(frame, key),
        TunnelKind::Gre | TunnelKind::Ip6Gre => gre::push(frame, key),
    }
}

/// Bytes that stand in front of a frame sent by `key`, the IP header included.
pub(super) fn overhead(config: &TunnelConfig, key: &TunnelKey) -> usize {
    let ip = match key.family {
        frame::tunnel::V6 => IPV6,
        _ => IPV4,
    };
    ip + match config.kind {
        TunnelKind::Vxlan => outer::UDP_HEADER + vxlan::HEADER,
        TunnelKind::Geneve => outer::UDP_HEADER + geneve::length(key),
        TunnelKind::Gre | TunnelKind::Ip6Gre => gre::length(key),
    }
}

/// The IP protocol that it goes over.
pub(super) fn protocol(kind: TunnelKind) -> u8 {
    if kind.is_udp() { UDP } else { GRE }
}
