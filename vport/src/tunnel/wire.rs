//! Which header a tunnel's kind puts in front, and reads.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{SystemTime, UNIX_EPOCH};

use frame::Frame;
use frame::tunnel::{Inner, Payload, Refused, TunnelKey, erspan, geneve, gre, outer, vxlan};

use super::{Shared, TunnelConfig, TunnelKind};
use crate::port::TxRefusal;

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
        TunnelKind::Erspan | TunnelKind::Ip6Erspan => erspan::parse(packet, vouched, key),
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
        _ => Err(Refused::Protocol),
    }
}

/// Puts the tunnel's own header in front of a frame.
pub(super) fn push(shared: &Shared, frame: &mut Frame, key: &TunnelKey) -> Result<(), TxRefusal> {
    let config = &shared.config;
    let pushed = match config.kind {
        TunnelKind::Vxlan => vxlan::push(frame, config.extensions, key, Payload::Ethernet),
        TunnelKind::Geneve => geneve::push(frame, key),
        TunnelKind::Gre | TunnelKind::Ip6Gre => gre::push(frame, key),
        TunnelKind::Erspan | TunnelKind::Ip6Erspan => {
            match erspan::push(frame, key, stamp(shared)) {
                Ok(true) => Ok(()),
                // Nobody said which version, so there is nowhere to go.
                Ok(false) => return Err(TxRefusal::Unreachable),
                Err(error) => Err(error),
            }
        }
    };
    pushed.map_err(|_too_long| TxRefusal::TooLong)
}

fn stamp(shared: &Shared) -> erspan::Stamp {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    erspan::Stamp {
        sequence: shared.sequence.fetch_add(1, Relaxed),
        // It wraps every five days, as all clocks of 32 bits do.
        time: time.map_or(0, |time| (time.as_micros() / 100) as u32),
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
        TunnelKind::Erspan | TunnelKind::Ip6Erspan => erspan::length(key),
    }
}

/// What stands at the third byte behind the IP header of a tunnel's packets: the UDP port, or GRE's protocol.
pub(super) fn marks(config: &TunnelConfig) -> Vec<u16> {
    match config.kind {
        TunnelKind::Vxlan | TunnelKind::Geneve => vec![config.port],
        TunnelKind::Gre | TunnelKind::Ip6Gre => vec![frame::tunnel::ETH_P_TEB],
        TunnelKind::Erspan | TunnelKind::Ip6Erspan => {
            vec![erspan::ETH_P_ERSPAN, erspan::ETH_P_ERSPAN2]
        }
    }
}

/// The IP protocol that it goes over.
pub(super) fn protocol(kind: TunnelKind) -> u8 {
    if kind.is_udp() { UDP } else { GRE }
}
