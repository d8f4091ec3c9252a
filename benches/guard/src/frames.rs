//! Frames to be parsed.

use frame::Frame;

const MACS: [u8; 12] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];

fn ethernet(parts: &[&[u8]]) -> Frame {
    let mut bytes = MACS.to_vec();
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes.resize(bytes.len().max(60), 0);
    Frame::from_bytes(&bytes)
}

fn ipv4(protocol: u8) -> [u8; 20] {
    [
        0x45, 0, 0, 46, 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]
}

fn ipv6(next: u8, payload: u8) -> [u8; 40] {
    let mut header = [0; 40];
    (header[0], header[5], header[6], header[7]) = (0x60, payload, next, 64);
    (header[8], header[23], header[24], header[39]) = (0xfd, 1, 0xfd, 2);
    header
}

const TCP: [u8; 20] = [
    4, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
];

/// 10.0.0.1:1024 to 10.0.0.2:80.
pub fn tcp4() -> Frame {
    ethernet(&[&[8, 0], &ipv4(6), &TCP])
}

/// As [`tcp4`], in VLAN 10.
pub fn tagged() -> Frame {
    ethernet(&[&[0x81, 0, 0, 10, 8, 0], &ipv4(6), &TCP])
}

/// One of each kind.
pub fn all() -> Vec<(&'static str, Frame)> {
    let udp = [4, 0, 0, 53, 0, 26, 0, 0];
    let mut arp = [0; 28];
    arp[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    let mut solicitation = [0; 32];
    (solicitation[0], solicitation[8]) = (135, 0xfd);
    (solicitation[24], solicitation[25]) = (1, 1);
    // Destination options of eight bytes.
    let options = [17, 0, 1, 4, 0, 0, 0, 0];
    vec![
        ("TCP over IPv4", tcp4()),
        ("TCP over IPv4 in a VLAN", tagged()),
        (
            "TCP over IPv4 in two VLANs",
            ethernet(&[&[0x88, 0xa8, 0, 9, 0x81, 0, 0, 10, 8, 0], &ipv4(6), &TCP]),
        ),
        (
            "UDP over IPv6",
            ethernet(&[&[0x86, 0xdd], &ipv6(17, 8), &udp]),
        ),
        (
            "UDP over IPv6 with options",
            ethernet(&[&[0x86, 0xdd], &ipv6(60, 16), &options, &udp]),
        ),
        (
            "a neighbour solicitation",
            ethernet(&[&[0x86, 0xdd], &ipv6(58, 32), &solicitation]),
        ),
        ("ARP", ethernet(&[&[8, 6], &arp])),
        (
            "TCP over IPv4 under MPLS",
            ethernet(&[&[0x88, 0x47, 0, 1, 1, 64], &ipv4(6), &TCP]),
        ),
    ]
}
