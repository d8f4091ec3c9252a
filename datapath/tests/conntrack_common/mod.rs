//! Packets for a tracker, and what is done with them.
#![allow(dead_code)] // each test uses a part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use datapath::conntrack::action::{Passage, Refusal, state};
use datapath::conntrack::{Config, Tracker};
use datapath::packet::Packet;
use etherparse::{PacketBuilder, PacketHeaders, TransportHeader};
use flow::action::{Conntrack, Nat};
use flow::extract::{Metadata, extract};
use frame::Frame;

pub const SECOND: u64 = 1_000_000_000;

/// A tracker of so many connections.
pub fn tracker(max_connections: usize) -> Tracker {
    let config = Config {
        max_connections,
        ..Config::new(0x5eed)
    };
    Tracker::new(config, 0)
}

/// Flags of a TCP segment.
pub const SYN: u8 = 2;
pub const ACK: u8 = 16;
pub const FIN: u8 = 1;
pub const RST: u8 = 4;

#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub src: [u8; 4],
    pub src_port: u16,
    pub dst: [u8; 4],
    pub dst_port: u16,
}

impl Ends {
    pub fn back(self) -> Self {
        Self {
            src: self.dst,
            src_port: self.dst_port,
            dst: self.src,
            dst_port: self.src_port,
        }
    }
}

pub fn udp(ends: Ends, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4(ends.src, ends.dst, 64)
        .udp(ends.src_port, ends.dst_port);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, payload).unwrap();
    bytes
}

pub fn udp6(src: [u8; 16], src_port: u16, dst: [u8; 16], dst_port: u16, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv6(src, dst, 64)
        .udp(src_port, dst_port);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, payload).unwrap();
    bytes
}

pub fn tcp(ends: Ends, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Vec<u8> {
    let mut builder = PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4(ends.src, ends.dst, 64)
        .tcp(ends.src_port, ends.dst_port, seq, 8192);
    if flags & SYN != 0 {
        builder = builder.syn();
    }
    if flags & FIN != 0 {
        builder = builder.fin();
    }
    if flags & RST != 0 {
        builder = builder.rst();
    }
    if flags & ACK != 0 {
        builder = builder.ack(ack);
    }
    let mut bytes = Vec::new();
    builder.write(&mut bytes, payload).unwrap();
    bytes
}

pub fn packet(bytes: &[u8]) -> Packet {
    let mut packet = Packet::default();
    packet.renew(Frame::from_bytes(bytes), 1);
    let meta = Metadata::default();
    packet.layers = extract(&mut packet.frame, &meta, &mut packet.key).unwrap();
    packet
}

pub fn ct(zone: u16) -> Conntrack {
    Conntrack {
        zone,
        ..Conntrack::default()
    }
}

pub fn commit(zone: u16) -> Conntrack {
    Conntrack {
        commit: true,
        ..ct(zone)
    }
}

/// `ct(nat)`: as the connection says.
pub fn ct_nat(zone: u16) -> Conntrack {
    Conntrack {
        nat: Some(Nat::default()),
        ..ct(zone)
    }
}

pub fn wide([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// `ct(commit,nat(src=...))` or `dst`.
pub fn commit_nat(
    zone: u16,
    source: bool,
    addresses: ([u8; 4], [u8; 4]),
    ports: Option<(u16, u16)>,
) -> Conntrack {
    Conntrack {
        nat: Some(Nat {
            source: Some(source),
            min_addr: Some(wide(addresses.0)),
            max_addr: Some(wide(addresses.1)),
            min_port: ports.map(|ports| ports.0),
            max_port: ports.map(|ports| ports.1),
            ..Nat::default()
        }),
        ..commit(zone)
    }
}

/// Carries out an action; gives the packet.
pub fn run(tracker: &Tracker, bytes: &[u8], what: &Conntrack, now: u64) -> Result<Packet, Refusal> {
    let mut packet = packet(bytes);
    match tracker.execute(&mut packet, what, now)? {
        Passage::On => Ok(packet),
        Passage::Held => panic!("held"),
    }
}

/// What a packet's key says of its connection.
pub fn bits(packet: &Packet) -> String {
    let names = [
        (state::NEW, "new"),
        (state::ESTABLISHED, "est"),
        (state::RELATED, "rel"),
        (state::REPLY, "rpl"),
        (state::INVALID, "inv"),
        (state::TRACKED, "trk"),
        (state::SRC_NAT, "snat"),
        (state::DST_NAT, "dnat"),
    ];
    let set = names
        .iter()
        .filter(|(bit, _)| packet.key.ct_state & bit != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
}

/// The ends that a frame has, and whether all its checksums are right.
pub fn look(packet: &Packet) -> (Ends, bool) {
    let bytes = packet.frame.bytes();
    let headers = PacketHeaders::from_ethernet_slice(bytes).unwrap();
    let payload = headers.payload.slice();
    let Some(etherparse::NetHeaders::Ipv4(ip, _)) = headers.net else {
        panic!("not IPv4");
    };
    let ip_right = ip.calc_header_checksum() == ip.header_checksum;
    let (src_port, dst_port, right) = match headers.transport {
        Some(TransportHeader::Udp(udp)) => (
            udp.source_port,
            udp.destination_port,
            udp.checksum == 0 || udp.calc_checksum_ipv4(&ip, payload).unwrap() == udp.checksum,
        ),
        Some(TransportHeader::Tcp(tcp)) => (
            tcp.source_port,
            tcp.destination_port,
            tcp.calc_checksum_ipv4(&ip, payload).unwrap() == tcp.checksum,
        ),
        other => panic!("{other:?}"),
    };
    let ends = Ends {
        src: ip.source,
        src_port,
        dst: ip.destination,
        dst_port,
    };
    (ends, ip_right && right)
}
