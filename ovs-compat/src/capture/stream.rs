//! What a capture's server and its client say to each other, on a stream socket.
//!
//! The client sends a line of JSON ([`Request`]) and gets one ([`Reply`]). If that says yes, what follows
//! are messages, integers in little-endian order: `u32` length of what follows, `u8` kind, then
//! - [`PORT`]: `u32` the port's id in what follows, then a [`PortName`] in JSON;
//! - [`PACKET`]: [`Packet`]'s fields, then its bytes;
//! - [`END`]: `u64` packets that were lost. The last one.
//!
//! The client asks for the end by shutting down its half of the connection. Both ends are of the same
//! build: the request says its version, and the server refuses another.

use std::io::{self, Read};

use datapath::capture::{Event, Record, Wish};
use datapath::drop_reason::DropReason;
use frame::GsoKind;
use serde::{Deserialize, Serialize};

/// Names a port.
const PORT: u8 = 1;
/// A packet.
const PACKET: u8 = 2;
/// The end.
const END: u8 = 3;
/// The longest message: a frame of the greatest length and its head.
const LONGEST: usize = frame::MAX_LEN + 1024;
/// The longest line of JSON.
pub const LONGEST_LINE: u64 = 4096;

/// What the client asks for.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Of the client.
    pub version: String,
    /// What it wants to see.
    pub wish: Wish,
}

/// What the server says to that.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// Why not; None: packets follow.
    pub error: Option<String>,
}

/// A port's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortName {
    /// Its datapath.
    pub datapath: String,
    /// Its device.
    pub name: String,
    /// Its number.
    pub number: u32,
    /// Its driver.
    pub driver: String,
}

/// A packet as the client gets it. The fields are those of [`Record`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Packet {
    pub port: u32,
    pub event: Event,
    pub reason: Option<DropReason>,
    pub time_ns: u64,
    pub length: u32,
    pub headless: bool,
    pub partial_checksum: bool,
    pub gso: Option<(GsoKind, u16)>,
    pub bytes: Vec<u8>,
}

/// What comes from the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Names a port.
    Port(u32, PortName),
    /// A packet.
    Packet(Packet),
    /// No more; so many were lost.
    End(u64),
}

const EVENTS: [Event; 3] = [Event::Received, Event::Transmitted, Event::Dropped];
const GSO_KINDS: [GsoKind; 4] = [
    GsoKind::TcpV4,
    GsoKind::TcpV6,
    GsoKind::UdpL4,
    GsoKind::UdpFragments,
];
/// Stands for "none" among numbers of reasons and kinds.
const NONE: u8 = 0xff;
const HEADLESS: u8 = 1;
const PARTIAL_CHECKSUM: u8 = 2;

fn number<T: PartialEq>(all: &[T], one: &T) -> u8 {
    let at = all.iter().position(|other| other == one);
    at.map_or(NONE, |at| at as u8)
}

/// Appends a port's name.
pub fn put_port(out: &mut Vec<u8>, id: u32, name: &PortName) {
    put(out, PORT, |out| {
        out.extend_from_slice(&id.to_le_bytes());
        // Strings and a number: there is nothing in it that JSON can't say.
        out.extend(serde_json::to_vec(name).unwrap_or_default());
    });
}

/// Appends a packet of the port with that id, up to `snaplen` bytes of it.
pub fn put_packet(out: &mut Vec<u8>, port: u32, record: &Record, snaplen: u32) {
    let kept = record.bytes.len().min(snaplen as usize);
    let bytes = record.bytes.get(..kept).unwrap_or_default();
    let flags =
        u8::from(record.headless) * HEADLESS + u8::from(record.partial_checksum) * PARTIAL_CHECKSUM;
    let (gso, size) = match &record.gso {
        Some((kind, size)) => (number(&GSO_KINDS, kind), *size),
        None => (NONE, 0),
    };
    put(out, PACKET, |out| {
        out.extend_from_slice(&port.to_le_bytes());
        let reason = record.reason.map_or(NONE, |reason| reason as u8);
        out.extend_from_slice(&[number(&EVENTS, &record.event), reason, flags, gso]);
        out.extend_from_slice(&size.to_le_bytes());
        out.extend_from_slice(&record.time_ns.to_le_bytes());
        out.extend_from_slice(&(record.length as u32).to_le_bytes());
        out.extend_from_slice(bytes);
    });
}

/// Appends the end.
pub fn put_end(out: &mut Vec<u8>, lost: u64) {
    put(out, END, |out| out.extend_from_slice(&lost.to_le_bytes()));
}

fn put(out: &mut Vec<u8>, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, 0, kind]);
    body(out);
    let length = (out.len() - start - 4) as u32;
    if let Some(field) = out.get_mut(start..start + 4) {
        field.copy_from_slice(&length.to_le_bytes());
    }
}

/// Reads a message; None at the end of the stream.
///
/// # Errors
/// Those of the stream; `InvalidData` for what is no message.
pub fn read(from: &mut impl Read) -> io::Result<Option<Message>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length) as usize;
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "what comes isn't a capture");
    if length > LONGEST {
        return Err(invalid());
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    parse(&bytes).map(Some).ok_or_else(invalid)
}

fn parse(bytes: &[u8]) -> Option<Message> {
    let (kind, mut rest) = bytes.split_first()?;
    let rest = &mut rest;
    match *kind {
        PORT => {
            let id = u32::from_le_bytes(take(rest)?);
            Some(Message::Port(id, serde_json::from_slice(rest).ok()?))
        }
        PACKET => {
            let port = u32::from_le_bytes(take(rest)?);
            let [event, reason, flags, gso]: [u8; 4] = take(rest)?;
            let size = u16::from_le_bytes(take(rest)?);
            let time_ns = u64::from_le_bytes(take(rest)?);
            let length = u32::from_le_bytes(take(rest)?);
            let reason = match reason {
                NONE => None,
                number => Some(*DropReason::ALL.get(usize::from(number))?),
            };
            let gso = match gso {
                NONE => None,
                number => Some((*GSO_KINDS.get(usize::from(number))?, size)),
            };
            Some(Message::Packet(Packet {
                port,
                event: *EVENTS.get(usize::from(event))?,
                reason,
                time_ns,
                length,
                headless: flags & HEADLESS != 0,
                partial_checksum: flags & PARTIAL_CHECKSUM != 0,
                gso,
                bytes: rest.to_vec(),
            }))
        }
        END => Some(Message::End(u64::from_le_bytes(take(rest)?))),
        _ => None,
    }
}

fn take<const N: usize>(from: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = from.split_first_chunk::<N>()?;
    *from = rest;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use datapath::capture::PortLabel;

    use super::*;

    fn record() -> Record {
        Record {
            event: Event::Transmitted,
            port: Arc::new(PortLabel {
                datapath: String::new(),
                name: String::new(),
                number: 0,
                driver: "tap",
            }),
            time_ns: 1 << 60,
            reason: Some(DropReason::OutputFull),
            length: 65_000,
            bytes: vec![1, 2, 3, 4].into(),
            headless: true,
            partial_checksum: true,
            gso: Some((GsoKind::UdpL4, 1400)),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let name = PortName {
            datapath: "ovs-system".to_owned(),
            name: "a\"b".to_owned(),
            number: 3,
            driver: "tap".to_owned(),
        };
        let mut bytes = Vec::new();
        put_port(&mut bytes, 7, &name);
        put_packet(&mut bytes, 7, &record(), 3);
        put_end(&mut bytes, 5);
        let mut from = bytes.as_slice();
        assert_eq!(read(&mut from).unwrap(), Some(Message::Port(7, name)));
        let packet = Packet {
            port: 7,
            event: Event::Transmitted,
            reason: Some(DropReason::OutputFull),
            time_ns: 1 << 60,
            length: 65_000,
            headless: true,
            partial_checksum: true,
            gso: Some((GsoKind::UdpL4, 1400)),
            bytes: vec![1, 2, 3],
        };
        assert_eq!(read(&mut from).unwrap(), Some(Message::Packet(packet)));
        assert_eq!(read(&mut from).unwrap(), Some(Message::End(5)));
        assert_eq!(read(&mut from).unwrap(), None);
    }

    #[test]
    fn what_is_cut_or_changed_is_an_error_or_another_message() {
        let mut bytes = Vec::new();
        put_packet(&mut bytes, 7, &record(), 3);
        for len in 4..bytes.len() {
            assert!(read(&mut &bytes[..len]).is_err(), "{len}");
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = read(&mut changed.as_slice());
            }
        }
    }
}
