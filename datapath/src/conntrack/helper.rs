//! Helpers read what two ends agree upon within a connection: FTP's data connections, TFTP's transfers.
//!
//! A helper adds an expectation. If the connection is translated FTP's messages are too; then the
//! payload's length may change, and all later sequence numbers of that direction with it.
//!
//! Sources: RFC 959 (PORT, PASV), RFC 2428 (EPRT, EPSV), RFC 1350 (TFTP).

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use frame::checksum::{fold, nonzero, pseudo_v4, pseudo_v6, sum, update};
use frame::{Frame, checksum as sums};

use super::connection::{Connection, status};
use super::expectation::Expectation;
use super::tuple::{Direction, Family, Tuple, narrow, proto, wide};
use super::wire::{Headers, array, array_mut};
use super::{Attached, Relation, Tracker};
use crate::packet::Packet;

/// How long an expectation waits: nanoseconds (nf_conntrack_ftp's and _tftp's five minutes).
const PATIENCE: u64 = 300_000_000_000;
/// Bytes of a message that are looked at.
const LONGEST: usize = 512;

/// Which helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Helper {
    /// Over TCP.
    Ftp,
    /// Over UDP.
    Tftp,
}

impl Helper {
    /// The one of that name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "ftp" => Some(Self::Ftp),
            "tftp" => Some(Self::Tftp),
            _ => None,
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ftp => "ftp",
            Self::Tftp => "tftp",
        }
    }
}

/// What a connection's helper keeps.
#[derive(Clone, Debug)]
pub struct HelperState {
    /// Which one.
    pub helper: Helper,
    /// By direction: where the last two lines begin, as far as has been seen (sequence numbers as they
    /// came): the one before may be repeated.
    lines: [[Option<u32>; 2]; 2],
    /// By direction: how later numbers are shifted.
    shifts: [Shift; 2],
}

/// How a direction's sequence numbers are shifted.
#[derive(Clone, Copy, Debug, Default)]
struct Shift {
    /// The number (as it came) of the segment whose length changed last.
    at: u32,
    /// Up to that segment's end.
    before: i32,
    /// Behind it.
    after: i32,
    any: bool,
}

impl Shift {
    /// For a sequence number as it came.
    fn of(&self, seq: u32) -> i32 {
        let behind = self.any && (seq.wrapping_sub(self.at) as i32) > 0;
        if behind { self.after } else { self.before }
    }

    /// For a number that the other end acknowledges, as it knows it.
    fn of_acknowledged(&self, ack: u32) -> i32 {
        let as_it_came = ack.wrapping_sub(self.before as u32);
        let behind = self.any && (as_it_came.wrapping_sub(self.at) as i32) > 0;
        if behind { self.after } else { self.before }
    }
}

impl HelperState {
    /// How a direction's sequence numbers are shifted: from which number on, by how much before it, and
    /// by how much behind.
    pub fn shift(&self, direction: Direction) -> (u32, i32, i32) {
        let shift = self.shifts.get(direction.index());
        shift.map_or((0, 0, 0), |shift| (shift.at, shift.before, shift.after))
    }

    /// By how much the numbers are shifted that a segment of that direction acknowledges.
    pub fn shift_acknowledged(&self, direction: Direction, ack: u32) -> i32 {
        let shift = self.shifts.get(direction.other().index());
        shift.map_or(0, |shift| shift.of_acknowledged(ack))
    }

    /// At a connection's beginning.
    pub fn new(helper: Helper) -> Self {
        Self {
            helper,
            lines: [[None; 2]; 2],
            shifts: [Shift::default(); 2],
        }
    }
}

/// The packet is to be dropped: it couldn't be changed, or what it announces can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

impl Tracker {
    /// Shows a packet to its connection's helper, if there is one. Addresses are translated already.
    pub(super) fn help(
        &self,
        packet: &mut Packet,
        headers: &Headers,
        attached: &Attached,
        now: u64,
    ) -> Result<(), Refused> {
        if attached.relation == Relation::Related && attached.direction == Direction::Reply {
            return Ok(());
        }
        let connection = &attached.connection;
        let Some(helper) = connection.lock().helper.as_ref().map(|of| of.helper) else {
            return Ok(());
        };
        match helper {
            Helper::Tftp => {
                self.help_tftp(packet, headers, connection, attached.direction, now);
                Ok(())
            }
            Helper::Ftp => {
                if attached.relation == Relation::Established {
                    self.help_ftp(packet, headers, connection, attached.direction, now)?;
                }
                Ok(())
            }
        }
    }

    fn help_tftp(
        &self,
        packet: &Packet,
        headers: &Headers,
        connection: &Arc<Connection>,
        direction: Direction,
        now: u64,
    ) {
        // Read and write requests.
        if !matches!(
            array::<2>(packet.frame.bytes(), headers.transport + 8),
            Some([0, 1 | 2])
        ) {
            return;
        }
        let (own, other) = {
            let state = connection.lock();
            (
                state.tuple(&connection.original, direction),
                state.tuple(&connection.original, direction.other()),
            )
        };
        self.expectations.add(
            Expectation {
                tuple: Tuple {
                    src_port: 0,
                    ..other
                },
                master: Arc::clone(connection),
                direction,
                told_port: own.src_port,
                deadline: now + PATIENCE,
            },
            now,
        );
    }

    fn help_ftp(
        &self,
        packet: &mut Packet,
        headers: &Headers,
        connection: &Arc<Connection>,
        direction: Direction,
        now: u64,
    ) -> Result<(), Refused> {
        let bytes = packet.frame.bytes();
        let tcp = array::<20>(bytes, headers.transport).ok_or(Refused)?;
        let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let payload_at = headers.transport + usize::from(tcp[12] >> 4) * 4;
        let payload = bytes.get(payload_at..).unwrap_or_default();
        let mut change = None;
        if !payload.is_empty() {
            let next = seq.wrapping_add(payload.len() as u32);
            let at_line = {
                let mut state = connection.lock();
                let lines = match state.helper.as_mut() {
                    Some(state) => &mut state.lines,
                    None => return Ok(()),
                };
                let known = &mut lines[direction.index()];
                let at_line = *known == [None; 2] || known.contains(&Some(seq));
                if payload.last() == Some(&b'\n') && !known.contains(&Some(next)) {
                    if *known == [None; 2] {
                        known[1] = Some(seq);
                    }
                    *known = [known[1], Some(next)];
                }
                at_line
            };
            if at_line {
                let text = payload.get(..LONGEST).unwrap_or(payload);
                let family = connection.original.family;
                if let Some(found) = announced(text, direction, family) {
                    change = self.expect_ftp(&found, connection, direction, now)?;
                }
            }
        }
        if let Some((range, text)) = change {
            let grown = text.len() as i32 - range.len() as i32;
            mangle(
                &mut packet.frame,
                headers,
                payload_at + range.start..payload_at + range.end,
                text.as_bytes(),
            )
            .ok_or(Refused)?;
            if grown != 0 {
                shift(connection, headers, &mut packet.frame, direction);
                let mut state = connection.lock();
                if let Some(state) = state.helper.as_mut() {
                    let shift = &mut state.shifts[direction.index()];
                    let before = shift.of(seq);
                    *shift = Shift {
                        at: seq,
                        before,
                        after: before + grown,
                        any: true,
                    };
                }
                connection.set(status::SEQ_ADJUST);
                return Ok(());
            }
        }
        if connection.is(status::SEQ_ADJUST) {
            shift(connection, headers, &mut packet.frame, direction);
        }
        Ok(())
    }

    /// Expects the announced connection. Some: what is to stand in the message instead, and where.
    fn expect_ftp(
        &self,
        found: &Announced,
        connection: &Arc<Connection>,
        direction: Direction,
        now: u64,
    ) -> Result<Option<(std::ops::Range<usize>, String)>, Refused> {
        let (own, other) = {
            let state = connection.lock();
            (
                state.tuple(&connection.original, direction),
                state.tuple(&connection.original, direction.other()),
            )
        };
        // Nobody may announce connections to a third (RFC 2577).
        if found.address.is_some_and(|address| address != own.src) {
            return Ok(None);
        }
        let expect = |port: u16| {
            let tuple = Tuple {
                src: other.src,
                dst: other.dst,
                src_port: 0,
                dst_port: port,
                ..other
            };
            self.expectations.add(
                Expectation {
                    tuple,
                    master: Arc::clone(connection),
                    direction,
                    told_port: found.port,
                    deadline: now + PATIENCE,
                },
                now,
            )
        };
        if !connection.is(status::NAT) {
            return if expect(found.port) {
                Ok(None)
            } else {
                Err(Refused)
            };
        }
        let port = (found.port..=u16::MAX)
            .take(256)
            .find(|port| expect(*port))
            .ok_or(Refused)?;
        Ok(Some((found.range.clone(), found.write(&other, port))))
    }
}

/// How an address and a port are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// `h1,h2,h3,h4,p1,p2`.
    Commas,
    /// `|1|address|port|`, any delimiter.
    Extended(u8),
    /// `|||port|`.
    PortOnly(u8),
}

/// Where the other end is told to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Announced {
    address: Option<[u8; 16]>,
    port: u16,
    style: Style,
    /// Where it stands in the payload.
    range: std::ops::Range<usize>,
}

impl Announced {
    /// The same with the address that the other end of the connection knows, and another port.
    fn write(&self, other: &Tuple, port: u16) -> String {
        let mut text = String::new();
        let [p1, p2] = port.to_be_bytes();
        // Writing to a string can't fail.
        let _ = match (self.style, other.family) {
            (Style::Commas, _) => {
                let [a, b, c, d] = narrow(other.dst);
                write!(text, "{a},{b},{c},{d},{p1},{p2}")
            }
            (Style::Extended(by), Family::V4) => {
                let (by, address) = (char::from(by), Ipv4Addr::from(narrow(other.dst)));
                write!(text, "{by}1{by}{address}{by}{port}{by}")
            }
            (Style::Extended(by), Family::V6) => {
                let (by, address) = (char::from(by), Ipv6Addr::from(other.dst));
                write!(text, "{by}2{by}{address}{by}{port}{by}")
            }
            (Style::PortOnly(by), _) => {
                let by = char::from(by);
                write!(text, "{by}{by}{by}{port}{by}")
            }
        };
        text
    }
}

/// What a message at the beginning of a line announces.
fn announced(text: &[u8], direction: Direction, family: Family) -> Option<Announced> {
    let starts = |with: &[u8]| {
        text.get(..with.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(with))
    };
    // A line that goes on in the next segment announces nothing yet.
    let line_end = text.iter().position(|byte| matches!(byte, b'\r' | b'\n'))?;
    let line = text.get(..line_end)?;
    match direction {
        Direction::Original if starts(b"PORT ") && family == Family::V4 => commas(line, 5),
        Direction::Original if starts(b"EPRT ") => extended(line, 5, family),
        Direction::Reply if starts(b"227 ") && family == Family::V4 => {
            // Servers don't agree on the words in front of the numbers.
            let open = line.iter().position(|byte| *byte == b'(');
            let at = match open {
                Some(open) => open + 1,
                None => 4 + line.get(4..)?.iter().position(u8::is_ascii_digit)?,
            };
            commas(line, at)
        }
        Direction::Reply if starts(b"229 ") => {
            let open = line.iter().position(|byte| *byte == b'(')?;
            port_only(line, open + 1)
        }
        _ => None,
    }
}

fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 5 {
        return None;
    }
    text.iter().try_fold(0_u32, |sum, digit| {
        digit
            .is_ascii_digit()
            .then(|| sum * 10 + u32::from(digit - b'0'))
    })
}

fn commas(line: &[u8], at: usize) -> Option<Announced> {
    let rest = line.get(at..)?;
    let length = rest
        .iter()
        .position(|byte| !byte.is_ascii_digit() && *byte != b',')
        .unwrap_or(rest.len());
    let text = rest.get(..length)?;
    let mut numbers = [0_u8; 6];
    let mut fields = text.split(|byte| *byte == b',');
    for into in &mut numbers {
        *into = u8::try_from(number(fields.next()?)?).ok()?;
    }
    let [a, b, c, d, p1, p2] = numbers;
    let port = u16::from_be_bytes([p1, p2]);
    (fields.next().is_none() && port != 0).then(|| Announced {
        address: Some(wide([a, b, c, d])),
        port,
        style: Style::Commas,
        range: at..at + length,
    })
}

fn delimited(line: &[u8], at: usize) -> Option<(u8, [&[u8]; 3], usize)> {
    let (by, rest) = line.get(at..)?.split_first()?;
    if !(33..=126).contains(by) || by.is_ascii_digit() {
        return None;
    }
    let mut fields = [&rest[..0]; 3];
    let mut rest = rest;
    for field in &mut fields {
        let end = rest.iter().position(|byte| byte == by)?;
        *field = rest.get(..end)?;
        rest = rest.get(end + 1..)?;
    }
    Some((*by, fields, line.len() - rest.len()))
}

fn extended(line: &[u8], at: usize, family: Family) -> Option<Announced> {
    let (by, [kind, address, port], end) = delimited(line, at)?;
    let address = std::str::from_utf8(address).ok()?;
    let address = match (kind, family) {
        (b"1", Family::V4) => wide(address.parse::<Ipv4Addr>().ok()?.octets()),
        (b"2", Family::V6) => address.parse::<Ipv6Addr>().ok()?.octets(),
        _ => return None,
    };
    let port = u16::try_from(number(port)?)
        .ok()
        .filter(|port| *port != 0)?;
    Some(Announced {
        address: Some(address),
        port,
        style: Style::Extended(by),
        range: at..end,
    })
}

fn port_only(line: &[u8], at: usize) -> Option<Announced> {
    let (by, [kind, address, port], end) = delimited(line, at)?;
    let port = u16::try_from(number(port)?)
        .ok()
        .filter(|port| *port != 0)?;
    (kind.is_empty() && address.is_empty()).then_some(Announced {
        address: None,
        port,
        style: Style::PortOnly(by),
        range: at..end,
    })
}

/// Puts `text` in the place of a range of the frame, lengths and checksums kept right.
fn mangle(
    frame: &mut Frame,
    headers: &Headers,
    range: std::ops::Range<usize>,
    text: &[u8],
) -> Option<()> {
    let old_len = frame.len();
    let bytes = frame.bytes();
    let whole = [bytes.get(..range.start)?, text, bytes.get(range.end..)?].concat();
    let mut new = Frame::from_bytes(&whole);
    (new.vlan, new.offload) = (frame.vlan, frame.offload);
    let grown = |length: u16| {
        let length = i64::from(length) + whole.len() as i64 - old_len as i64;
        u16::try_from(length).ok()
    };
    match headers.family {
        Family::V4 => {
            let at = headers.network;
            let field = array_mut::<2>(new.bytes_mut(), at + 2)?;
            let old = *field;
            *field = grown(u16::from_be_bytes(old))?.to_be_bytes();
            let length = *field;
            let sum = array_mut::<2>(new.bytes_mut(), at + 10)?;
            *sum = update(u16::from_be_bytes(*sum), &old, &length).to_be_bytes();
        }
        Family::V6 => {
            let field = array_mut::<2>(new.bytes_mut(), headers.network + 4)?;
            *field = grown(u16::from_be_bytes(*field))?.to_be_bytes();
        }
    }
    // TCP: made anew, with what is in it.
    let at = headers.transport + 16;
    let bytes = new.bytes();
    let length = bytes.len().checked_sub(headers.transport)?;
    let pseudo = match headers.family {
        Family::V4 => {
            let src = array(bytes, headers.network + 12)?;
            let dst = array(bytes, headers.network + 16)?;
            pseudo_v4(*src, *dst, proto::TCP, length)
        }
        Family::V6 => {
            let src = array(bytes, headers.network + 8)?;
            let dst = array(bytes, headers.network + 24)?;
            pseudo_v6(src, dst, proto::TCP, length)
        }
    };
    let field = if new.offload.csum.is_some() {
        fold(pseudo)
    } else {
        *array_mut::<2>(new.bytes_mut(), at)? = [0, 0];
        let l4 = sum(headers.l4(new.bytes()));
        nonzero(!fold(sums::add(pseudo, l4)))
    };
    *array_mut::<2>(new.bytes_mut(), at)? = field.to_be_bytes();
    *frame = new;
    Some(())
}

/// Shifts the numbers of a segment as earlier changes of length demand.
fn shift(connection: &Connection, headers: &Headers, frame: &mut Frame, direction: Direction) {
    let (own, other) = match connection.lock().helper.as_ref() {
        Some(state) => (
            state.shifts[direction.index()],
            state.shifts[direction.other().index()],
        ),
        None => return,
    };
    let at = headers.transport;
    let Some(tcp) = array::<20>(frame.bytes(), at) else {
        return;
    };
    let word = |bytes: [u8; 4]| u32::from_be_bytes(bytes);
    let seq = word([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let ack = word([tcp[8], tcp[9], tcp[10], tcp[11]]);
    let (flags, length) = (tcp[13], usize::from(tcp[12] >> 4) * 4);
    patch(frame, at, 4, seq.wrapping_add(own.of(seq) as u32));
    if flags & super::tcp::flag::ACK == 0 {
        return;
    }
    let unshift = |ack: u32| ack.wrapping_sub(other.of_acknowledged(ack) as u32);
    patch(frame, at, 8, unshift(ack));
    // Selective acknowledgements too (RFC 2018).
    let mut option = 20;
    while option + 1 < length {
        let Some([kind, size]) = array::<2>(frame.bytes(), at + option).copied() else {
            return;
        };
        match kind {
            0 => return,
            1 => option += 1,
            kind => {
                let size = usize::from(size).max(2);
                if kind == 5 {
                    for edge in (option + 2..(option + size).min(length)).step_by(4) {
                        if let Some(number) = array(frame.bytes(), at + edge).copied() {
                            patch(frame, at, edge, unshift(word(number)));
                        }
                    }
                }
                option += size;
            }
        }
    }
}

/// Overwrites four bytes of the TCP header at `tcp`, its checksum kept right. An odd offset (options may
/// have one) counts the other way round in the sum.
fn patch(frame: &mut Frame, tcp: usize, at: usize, value: u32) {
    let partial = frame.offload.csum.is_some();
    let Some(field) = array_mut::<4>(frame.bytes_mut(), tcp + at) else {
        return;
    };
    let (old, new) = (*field, value.to_be_bytes());
    if old == new {
        return;
    }
    *field = new;
    if partial {
        return;
    }
    if let Some(sum) = array_mut::<2>(frame.bytes_mut(), tcp + 16) {
        let was = u16::from_be_bytes(*sum);
        let is = if at.is_multiple_of(2) {
            update(was, &old, &new)
        } else {
            update(was.swap_bytes(), &old, &new).swap_bytes()
        };
        *sum = is.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_read_in_all_their_styles() {
        let original = |text: &[u8], family| announced(text, Direction::Original, family);
        let reply = |text: &[u8], family| announced(text, Direction::Reply, family);
        let v4 = Family::V4;
        let port = original(b"PORT 10,0,0,1,4,210\r\n", v4).unwrap();
        assert_eq!((port.address, port.port), (Some(wide([10, 0, 0, 1])), 1234));
        assert_eq!(port.range, 5..19);
        let pasv = reply(b"227 Entering Passive Mode (10,0,0,2,8,1).\r\n", v4).unwrap();
        assert_eq!(pasv.port, 2049);
        assert_eq!(reply(b"227 10,0,0,2,8,1\r\n", v4).unwrap().port, 2049);
        let eprt = original(b"eprt |1|10.0.0.1|4000|\r\n", v4).unwrap();
        assert_eq!((eprt.port, eprt.range), (4000, 5..22));
        let six = original(b"EPRT |2|fd00::1|5282|\r\n", Family::V6).unwrap();
        assert_eq!(
            six.address,
            Some("fd00::1".parse::<Ipv6Addr>().unwrap().octets())
        );
        let epsv = reply(b"229 Extended (|||6446|)\r\n", v4).unwrap();
        assert_eq!((epsv.port, epsv.address), (6446, None));
        assert_eq!(b"229 Extended (|||6446|)"[epsv.range], b"|||6446|"[..]);
    }

    #[test]
    fn nonsense_announces_nothing() {
        for text in [
            &b"PORT 10,0,0,1,4\r\n"[..],
            b"PORT 10,0,0,1,4,256\r\n",
            b"PORT 10,0,0,1,0,0\r\n",
            b"PORT 10,0,0,1,4,210",
            b"EPRT |1|10.0.0.1|70000|\r\n",
            b"EPRT |3|x|4|\r\n",
            b"EPRT ",
            b"",
        ] {
            assert_eq!(announced(text, Direction::Original, Family::V4), None);
        }
        assert_eq!(
            announced(b"229 (||1|2|)\r\n", Direction::Reply, Family::V4),
            None
        );
    }
}
