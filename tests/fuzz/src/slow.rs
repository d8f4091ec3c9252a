//! What actions do to a packet, said as simply as can be: the oracle of the differential test.
//!
//! The packet is its bytes with all tags among them; checksums are made anew after each change, over all
//! that there is. Nothing here shares code with the daemon. What isn't said here isn't tested so. Labels, NSH,
//! L3 packets, meters and upcalls are in [`layers`](crate::layers).

use std::collections::BTreeMap;

use crate::actions::{field, kind};
use crate::packet::{self, Found, be16, ethertype, find, find_l4, is_tag};
use crate::wire::{attributes, u32_at};

/// What a lookup after a recirculation goes by: recirculation id, mark, and what the packet is. Only
/// packets without a tag that aren't fragments are found.
pub type Class = (u32, u32, u16, u8);

/// Flows for recirculated packets.
pub type Flows = BTreeMap<Class, Vec<u8>>;

/// What comes out: port number, frame.
pub type Output = Vec<(u32, Vec<u8>)>;

/// A packet on its way.
#[derive(Clone, Debug)]
pub struct State {
    /// The frame.
    pub bytes: Vec<u8>,
    /// See [`packet::Packet::hidden`].
    pub hidden: Vec<u8>,
    found: Found,
    mark: u32,
    /// The longest that the next output may be, without its outermost tag.
    limit: usize,
    /// It has, or had, more tags than are looked at.
    deep: bool,
    /// The sender left the checksum to be made: whoever makes it never writes a zero.
    pub nonzero: bool,
}

/// Ports that exist.
pub struct Slow<'a> {
    /// By number.
    pub ports: &'a [u32],
    /// What recirculated packets meet.
    pub flows: &'a Flows,
    /// What came out.
    pub output: Output,
    /// A header was to be changed that is, or was, behind a third tag: the module changes what is there,
    /// or nothing, by what it has looked at last.
    pub astray: bool,
}

impl State {
    /// A packet that comes in.
    pub fn new(bytes: Vec<u8>, hidden: Vec<u8>) -> Self {
        Self {
            found: find(&bytes),
            deep: is_tag(find(&bytes).ethertype),
            bytes,
            hidden,
            mark: 0,
            limit: usize::MAX,
            nonzero: false,
        }
    }

    fn tagged(&self) -> bool {
        is_tag(be16(&self.bytes, 12))
    }

    /// The length that actions count by: without the outermost tag.
    fn measure(&self) -> usize {
        self.bytes.len() - if self.tagged() { 4 } else { 0 }
    }

    /// What the packet is, if flows can find it.
    pub fn class(&self) -> Option<(u16, u8)> {
        let found = find(&self.bytes);
        if found.tags != 0 {
            return None;
        }
        match found.ethertype {
            ethertype::IPV4 | ethertype::IPV6 => {
                let l4 = find_l4(&self.bytes, found.l3, found.ethertype)?;
                (l4.frag == 0).then_some((found.ethertype, l4.proto))
            }
            other => Some((other, 0)),
        }
    }
}

impl Slow<'_> {
    /// Runs a list. False: the packet has ended.
    pub fn run(&mut self, state: &mut State, list: &[u8]) {
        let list = attributes(list);
        for (index, (kind, payload)) in list.iter().enumerate() {
            let last = index + 1 == list.len();
            match *kind {
                kind::OUTPUT => self.send(state, u32_at(payload, 0)),
                kind::TRUNC => state.limit = u32_at(payload, 0) as usize,
                kind::PUSH_VLAN => {
                    // "Present" isn't a bit of the frame.
                    let mut tag = payload.clone();
                    tag[2] &= 0xef;
                    state.bytes.splice(12..12, tag);
                    state.found.l3 += 4;
                }
                kind::POP_VLAN if state.tagged() => {
                    state.bytes.drain(12..16);
                    state.found.l3 -= 4;
                    if state.found.l3 == 14 && is_tag(state.found.ethertype) {
                        // The third tag is the first now: what is behind it is seen.
                        state.found = find(&state.bytes);
                    }
                }
                kind::SET => {
                    let (field, value) = attributes(payload).remove(0);
                    let ones = vec![0xff; value.len()];
                    self.set(state, field, &value, &ones);
                }
                kind::SET_MASKED => {
                    let (field, both) = attributes(payload).remove(0);
                    let (value, mask) = both.split_at(both.len() / 2);
                    self.set(state, field, value, mask);
                }
                kind::CLONE => self.run(&mut state.clone(), payload),
                kind::SAMPLE => {
                    let parts = attributes(payload);
                    if u32_at(&parts[0].1, 0) != 0 {
                        self.run(&mut state.clone(), &parts[1].1);
                    }
                }
                kind::CHECK_PKT_LEN => {
                    let parts = attributes(payload);
                    let part = |kind| {
                        let found = parts.iter().find(|(found, _)| *found == kind);
                        found
                            .map(|(_, payload)| payload.as_slice())
                            .expect("all three")
                    };
                    let limit = u16::from_ne_bytes([part(1)[0], part(1)[1]]);
                    let greater = state.measure() > usize::from(limit);
                    self.run(&mut state.clone(), part(if greater { 2 } else { 3 }));
                }
                kind::DEC_TTL => {
                    self.astray |= state.deep;
                    let at = match state.found.ethertype {
                        ethertype::IPV4 => state.found.l3 + 8,
                        ethertype::IPV6 => state.found.l3 + 7,
                        _ => continue,
                    };
                    if state.bytes[at] <= 1 {
                        let exceeded = attributes(payload).remove(0).1;
                        return self.run(state, &exceeded);
                    }
                    state.bytes[at] -= 1;
                    if state.found.ethertype == ethertype::IPV4 {
                        packet::make_ipv4_checksum(&mut state.bytes, state.found.l3);
                    }
                }
                kind::RECIRC => {
                    // What the packet is, is looked at anew, also for what follows here.
                    state.found = find(&state.bytes);
                    state.deep |= is_tag(state.found.ethertype);
                    let mut again = state.clone();
                    self.recirculate(&mut again, u32_at(payload, 0));
                    if last {
                        return;
                    }
                }
                _ => {}
            }
        }
    }

    fn set(&mut self, state: &mut State, field: u16, value: &[u8], mask: &[u8]) {
        let is_ip = matches!(state.found.ethertype, ethertype::IPV4 | ethertype::IPV6);
        if is_ip && !state.deep
            || matches!(field, field::SKB_MARK | field::PRIORITY | field::ETHERNET)
        {
            set(state, field, value, mask);
        } else {
            self.astray = true;
        }
    }

    fn recirculate(&mut self, state: &mut State, id: u32) {
        let Some((ethertype, proto)) = state.class() else {
            return;
        };
        if let Some(list) = self.flows.get(&(id, state.mark, ethertype, proto)) {
            self.run(state, &list.clone());
        }
    }

    fn send(&mut self, state: &mut State, port: u32) {
        let limit = std::mem::replace(&mut state.limit, usize::MAX);
        if !self.ports.contains(&port) {
            return;
        }
        let mut frame = state.bytes.clone();
        let tag = if state.tagged() { 4 } else { 0 };
        frame.truncate(limit.saturating_add(tag));
        self.output.push((port, frame));
    }
}

/// Changes the bits of `into` that `mask` has to those of `value`.
pub fn blend(into: &mut [u8], value: &[u8], mask: &[u8]) {
    for ((into, value), mask) in into.iter_mut().zip(value).zip(mask) {
        *into = *into & !mask | value & mask;
    }
}

/// An IP packet with a field changed.
pub fn set_in(kind: u16, packet: &[u8], field: u16, value: &[u8], mask: &[u8]) -> Vec<u8> {
    let frame = [&[0; 12][..], &kind.to_be_bytes(), packet].concat();
    let mut state = State::new(frame, Vec::new());
    set(&mut state, field, value, mask);
    state.bytes.split_off(14)
}

fn set(state: &mut State, field: u16, value: &[u8], mask: &[u8]) {
    let Found { l3, ethertype, .. } = state.found;
    match field {
        field::SKB_MARK => {
            let mut mark = state.mark.to_ne_bytes();
            blend(&mut mark, value, mask);
            state.mark = u32::from_ne_bytes(mark);
        }
        field::ETHERNET => {
            // The attribute has the source first.
            blend(&mut state.bytes[6..12], &value[..6], &mask[..6]);
            blend(&mut state.bytes[..6], &value[6..], &mask[6..]);
        }
        field::IPV4 => {
            let ip = &mut state.bytes[l3..];
            blend(&mut ip[12..16], &value[..4], &mask[..4]);
            blend(&mut ip[16..20], &value[4..8], &mask[4..8]);
            blend(&mut ip[1..2], &value[9..10], &mask[9..10]);
            blend(&mut ip[8..9], &value[10..11], &mask[10..11]);
            packet::make_ipv4_checksum(&mut state.bytes, l3);
            let is_sum = find_l4(&state.bytes, l3, ethertype).is_some_and(|l4| l4.proto != 132);
            if is_sum {
                checksum(state);
            }
        }
        field::IPV6 => {
            let ip = &mut state.bytes[l3..];
            blend(&mut ip[8..24], &value[..16], &mask[..16]);
            blend(&mut ip[24..40], &value[16..32], &mask[16..32]);
            // Class and label share their bytes with the version and with each other.
            let (class, label) = (value[37], &value[32..36]);
            let (class_mask, label_mask) = (mask[37], &mask[32..36]);
            let word =
                u32::from(class) << 20 | u32::from_be_bytes([0, label[1], label[2], label[3]]);
            let bits = u32::from(class_mask) << 20
                | u32::from_be_bytes([0, label_mask[1] & 15, label_mask[2], label_mask[3]]);
            blend(&mut ip[..4], &word.to_be_bytes(), &bits.to_be_bytes());
            blend(&mut ip[7..8], &value[38..39], &mask[38..39]);
            checksum(state);
        }
        field::TCP | field::UDP | field::SCTP => {
            let l4 = find_l4(&state.bytes, l3, ethertype).expect("the flow says so");
            blend(&mut state.bytes[l4.at..l4.at + 4], value, mask);
            checksum(state);
        }
        _ => {}
    }
}

fn checksum(state: &mut State) {
    let Found { l3, ethertype, .. } = state.found;
    packet::make_l4_checksum(&mut state.bytes, l3, ethertype, &state.hidden);
    if state.nonzero
        && let Some(l4) = find_l4(&state.bytes, l3, ethertype)
        && let Some((field, true)) = packet::checksum_at(&l4, ethertype)
        && state.bytes[field..field + 2] == [0, 0]
    {
        state.bytes[field..field + 2].fill(0xff);
    }
}
