//! Writes captures as pcapng, for tcpdump, Wireshark and their like.
//!
//! Source: draft-ietf-opsawg-pcapng: section header (4.1), interface description (4.2), enhanced packet
//! (4.3), interface statistics (4.6). Written in little-endian order, times in nanoseconds. Each port is
//! an interface, described when its first packet comes. All are Ethernet, with one snapshot length:
//! libpcap reads no other mixture.

use std::collections::HashMap;
use std::io::{self, Write};

use datapath::capture::Event;

use super::stream::{Packet, PortName};

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;

const END_OF_OPTIONS: u16 = 0;
const COMMENT: u16 = 1;
const USER_APPLICATION: u16 = 4;
const IF_NAME: u16 = 2;
const IF_DESCRIPTION: u16 = 3;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const ISB_OSDROP: u16 = 7;

const ETHERNET: u16 = 1;
/// Inbound and outbound, in a packet's flags.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

/// A file, or a pipe.
pub struct Writer<W> {
    out: W,
    snaplen: u32,
    /// The number of each port's interface.
    interfaces: HashMap<u32, u32>,
    last_ns: u64,
}

impl<W: Write> Writer<W> {
    /// Begins the file.
    ///
    /// # Errors
    /// Those of `out`, here and below.
    pub fn new(mut out: W, snaplen: u32) -> io::Result<Self> {
        let mut body = Vec::new();
        body.extend_from_slice(&0x1a2b_3c4d_u32.to_le_bytes());
        body.extend_from_slice(&1_u16.to_le_bytes());
        body.extend_from_slice(&0_u16.to_le_bytes());
        // The section's length: not known.
        body.extend_from_slice(&u64::MAX.to_le_bytes());
        let program = concat!("ovs-dpd ", env!("CARGO_PKG_VERSION"));
        option(&mut body, USER_APPLICATION, program.as_bytes());
        option(&mut body, END_OF_OPTIONS, &[]);
        block(&mut out, SECTION, &body)?;
        Ok(Self {
            out,
            snaplen,
            interfaces: HashMap::new(),
            last_ns: 0,
        })
    }

    /// A packet of `port`, with a comment.
    pub fn packet(&mut self, packet: &Packet, port: &PortName, comment: &str) -> io::Result<()> {
        let interface = match self.interfaces.get(&packet.port) {
            Some(interface) => *interface,
            None => self.interface(packet.port, port)?,
        };
        self.last_ns = packet.time_ns;
        let mut body = Vec::new();
        body.extend_from_slice(&interface.to_le_bytes());
        time(&mut body, packet.time_ns);
        body.extend_from_slice(&(packet.bytes.len() as u32).to_le_bytes());
        body.extend_from_slice(&packet.length.to_le_bytes());
        padded(&mut body, &packet.bytes);
        option(&mut body, COMMENT, comment.as_bytes());
        let flags = match packet.event {
            Event::Received => INBOUND,
            Event::Transmitted => OUTBOUND,
            Event::Dropped => 0,
        };
        option(&mut body, EPB_FLAGS, &flags.to_le_bytes());
        option(&mut body, END_OF_OPTIONS, &[]);
        block(&mut self.out, PACKET, &body)
    }

    /// The end: how many packets the capture lost, of all ports.
    pub fn end(&mut self, lost: u64) -> io::Result<()> {
        if !self.interfaces.is_empty() {
            let mut body = Vec::new();
            body.extend_from_slice(&0_u32.to_le_bytes());
            time(&mut body, self.last_ns);
            let comment = format!("{lost} packets of all ports lost by the capture");
            option(&mut body, COMMENT, comment.as_bytes());
            option(&mut body, ISB_OSDROP, &lost.to_le_bytes());
            option(&mut body, END_OF_OPTIONS, &[]);
            block(&mut self.out, STATISTICS, &body)?;
        }
        self.flush()
    }

    /// Hands on what is buffered.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn interface(&mut self, id: u32, port: &PortName) -> io::Result<u32> {
        let number = self.interfaces.len() as u32;
        let mut body = Vec::new();
        body.extend_from_slice(&ETHERNET.to_le_bytes());
        body.extend_from_slice(&[0; 2]);
        body.extend_from_slice(&self.snaplen.to_le_bytes());
        option(&mut body, IF_NAME, port.name.as_bytes());
        let description = format!(
            "port {} of datapath {}, driver {}",
            port.number, port.datapath, port.driver
        );
        option(&mut body, IF_DESCRIPTION, description.as_bytes());
        option(&mut body, IF_TSRESOL, &[9]);
        option(&mut body, END_OF_OPTIONS, &[]);
        block(&mut self.out, INTERFACE, &body)?;
        self.interfaces.insert(id, number);
        Ok(number)
    }
}

fn block(out: &mut impl Write, kind: u32, body: &[u8]) -> io::Result<()> {
    let length = (body.len() as u32 + 12).to_le_bytes();
    out.write_all(&kind.to_le_bytes())?;
    out.write_all(&length)?;
    out.write_all(body)?;
    out.write_all(&length)
}

fn time(body: &mut Vec<u8>, time_ns: u64) {
    body.extend_from_slice(&((time_ns >> 32) as u32).to_le_bytes());
    body.extend_from_slice(&(time_ns as u32).to_le_bytes());
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = value.get(..usize::from(u16::MAX)).unwrap_or(value);
    body.extend_from_slice(&code.to_le_bytes());
    body.extend_from_slice(&(value.len() as u16).to_le_bytes());
    padded(body, value);
}

fn padded(body: &mut Vec<u8>, bytes: &[u8]) {
    body.extend_from_slice(bytes);
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type and body of each block; the lengths at both ends must agree.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |bytes: &[u8]| u32::from_le_bytes(*bytes.first_chunk().unwrap());
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = word(&bytes[4..]) as usize;
            assert!(length.is_multiple_of(4));
            assert_eq!(word(&bytes[length - 4..]) as usize, length);
            found.push((word(bytes), bytes[8..length - 4].to_vec()));
            bytes = &bytes[length..];
        }
        found
    }

    #[test]
    fn an_interface_stands_before_its_first_packet_and_once() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, 100).unwrap();
        let port = |name: &str| PortName {
            datapath: "dp".to_owned(),
            name: name.to_owned(),
            number: 1,
            driver: "tap".to_owned(),
        };
        let packet = |port| Packet {
            port,
            event: Event::Received,
            reason: None,
            time_ns: (5 << 32) + 6,
            length: 9,
            headless: false,
            partial_checksum: false,
            gso: None,
            bytes: vec![1, 2, 3, 4, 5],
        };
        writer.packet(&packet(3), &port("a"), "hm").unwrap();
        writer.packet(&packet(8), &port("b"), "").unwrap();
        writer.packet(&packet(3), &port("a"), "").unwrap();
        writer.end(4).unwrap();
        let blocks = blocks(&bytes);
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(
            kinds,
            [
                SECTION, INTERFACE, PACKET, INTERFACE, PACKET, PACKET, STATISTICS
            ]
        );
        let head = [0, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 5, 0, 0, 0, 9, 0, 0, 0];
        assert_eq!(blocks[2].1[..20], head);
        let rest = [1, 2, 3, 4, 5, 0, 0, 0, 1, 0, 2, 0, b'h', b'm', 0, 0];
        assert_eq!(blocks[2].1[20..36], rest);
        assert_eq!(blocks[4].1[..4], [1, 0, 0, 0]);
    }
}
