//! A packet as a line of text: when, which port, which way, what it is, what became of it.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use datapath::capture::Event;
use flow::extract::{self, Metadata};
use flow::key::{FRAG_LATER, FRAG_NONE, Key, VLAN_CFI, VlanKey};
use frame::{Frame, GsoKind};

use super::stream::{Packet, PortName};

/// The line, without its end.
pub fn line(packet: &Packet, port: &PortName) -> String {
    let mut text = time(packet.time_ns);
    let _ = write!(text, " {} {}  {}", port.name, way(packet), what(packet));
    let _ = write!(text, ", length {}", packet.length);
    for note in notes(packet) {
        let _ = write!(text, "; {note}");
    }
    text
}

/// What a packet's comment in a file says: port, way, what isn't among the bytes.
pub fn comment(packet: &Packet, port: &PortName) -> String {
    let mut text = format!("{} {}", port.name, way(packet));
    for note in notes(packet) {
        let _ = write!(text, "; {note}");
    }
    text
}

fn way(packet: &Packet) -> &'static str {
    match packet.event {
        Event::Received => "in",
        Event::Transmitted => "out",
        Event::Dropped => "drop",
    }
}

fn notes(packet: &Packet) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(reason) = packet.reason {
        notes.push(format!("dropped: {}", reason.name()));
    }
    if let Some((kind, size)) = packet.gso {
        let kind = match kind {
            GsoKind::TcpV4 | GsoKind::TcpV6 => "TCP segments",
            GsoKind::UdpL4 => "UDP datagrams",
            GsoKind::UdpFragments => "IP fragments",
        };
        notes.push(format!("stands for {kind} of {size} bytes"));
    }
    if packet.partial_checksum {
        notes.push("checksum not filled in yet".to_owned());
    }
    if packet.headless {
        notes.push("had no Ethernet header: the one shown is made up".to_owned());
    }
    notes
}

/// Hours, minutes, seconds and microseconds of the day, UTC.
fn time(time_ns: u64) -> String {
    let micros = time_ns / 1000;
    let seconds = micros / 1_000_000 % 86_400;
    format!(
        "{:02}:{:02}:{:02}.{:06}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        micros % 1_000_000
    )
}

/// What the bytes say, as far as they are there.
fn what(packet: &Packet) -> String {
    let mut frame = Frame::from_bytes(&packet.bytes);
    let mut key = Key::ZERO;
    if extract::extract(&mut frame, &Metadata::default(), &mut key).is_err() {
        return "can't be parsed".to_owned();
    }
    let mut text = format!("{} > {}", mac(key.eth_src), mac(key.eth_dst));
    for VlanKey { tci, .. } in [key.vlan, key.cvlan] {
        if tci.get() & VLAN_CFI != 0 {
            let _ = write!(text, ", vlan {}", tci.get() & 0xfff);
        }
    }
    let _ = write!(text, ", {}", network(&key));
    text
}

fn network(key: &Key) -> String {
    match key.eth_type.get() {
        0x0800 => ip(
            key,
            v4(&key.ip_src).to_string(),
            v4(&key.ip_dst).to_string(),
        ),
        0x86dd => ip(
            key,
            Ipv6Addr::from(key.ip_src).to_string(),
            Ipv6Addr::from(key.ip_dst).to_string(),
        ),
        0x0806 => {
            let (from, to) = (v4(&key.ip_src), v4(&key.ip_dst));
            match key.ip_proto {
                1 => format!("ARP who has {to}, tell {from}"),
                2 => format!("ARP {from} is at {}", mac(key.arp_sha)),
                other => format!("ARP operation {other}"),
            }
        }
        0x8847 | 0x8848 => format!("MPLS label {}", key.mpls[0].get() >> 12),
        0x894f => "NSH".to_owned(),
        other => format!("type 0x{other:04x}"),
    }
}

fn ip(key: &Key, from: String, to: String) -> String {
    let name = match key.ip_proto {
        1 => "ICMP",
        6 => "TCP",
        17 => "UDP",
        58 => "ICMPv6",
        132 => "SCTP",
        _ => "",
    };
    let (source, destination) = (key.tp_src.get(), key.tp_dst.get());
    let mut text = match (key.ip_proto, key.ip_frag) {
        (_, FRAG_LATER) => format!("IP {from} > {to}: {name} fragment"),
        (6 | 17 | 132, _) => format!("{name} {from}.{source} > {to}.{destination}"),
        (1 | 58, _) => format!("{name} {from} > {to}: type {source} code {destination}"),
        (proto, _) => format!("IP {from} > {to}: protocol {proto}"),
    };
    if key.ip_proto == 6 && key.ip_frag != FRAG_LATER {
        let _ = write!(text, " [{}]", flags(key.tcp_flags.get()));
    }
    if key.ip_frag != FRAG_NONE && key.ip_frag != FRAG_LATER {
        text.push_str(", first fragment");
    }
    text
}

/// As tcpdump writes them.
fn flags(bits: u16) -> String {
    const NAMES: [char; 8] = ['F', 'S', 'R', 'P', '.', 'U', 'E', 'W'];
    let set = NAMES.iter().enumerate();
    set.filter(|(bit, _)| bits & (1 << bit) != 0)
        .map(|(_, name)| name)
        .collect()
}

fn v4(address: &[u8; 16]) -> Ipv4Addr {
    let [a, b, c, d, ..] = *address;
    Ipv4Addr::new(a, b, c, d)
}

fn mac(address: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = address;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use datapath::drop_reason::DropReason;

    use super::*;

    fn packet(bytes: Vec<u8>) -> Packet {
        Packet {
            port: 0,
            event: Event::Received,
            reason: Some(DropReason::LastAction),
            time_ns: (3661 * 1_000_000 + 7) * 1000,
            length: 1000,
            headless: false,
            partial_checksum: true,
            gso: Some((GsoKind::TcpV4, 1448)),
            bytes,
        }
    }

    fn port() -> PortName {
        PortName {
            datapath: "dp".to_owned(),
            name: "v-a".to_owned(),
            number: 1,
            driver: "tap".to_owned(),
        }
    }

    #[test]
    fn a_tcp_segment_says_who_and_what_became_of_it() {
        let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x81, 0, 0, 5, 8, 0];
        bytes.extend([
            0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        bytes.extend([
            0, 80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12, 0, 0, 0, 0, 0, 0,
        ]);
        assert_eq!(
            line(&packet(bytes), &port()),
            "01:01:01.000007 v-a in  02:00:00:00:00:01 > 02:00:00:00:00:02, vlan 5, \
             TCP 10.0.0.1.80 > 10.0.0.2.256 [S.], length 1000; dropped: last_action; \
             stands for TCP segments of 1448 bytes; checksum not filled in yet"
        );
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut seed = 1_u64;
        for len in 0..200 {
            let mut bytes = vec![0; len];
            for byte in &mut bytes {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (seed >> 56) as u8;
            }
            if let Some(eth_type) = bytes.get_mut(12..14) {
                eth_type.copy_from_slice(&[[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]][len % 4]);
            }
            assert!(line(&packet(bytes), &port()).contains("v-a in"));
        }
    }
}
