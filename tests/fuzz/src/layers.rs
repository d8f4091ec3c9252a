//! What actions do to the headers around a packet, said as simply as can be: the oracle of the layers' test.
//!
//! A packet is a row of headers around what never changes its place. Pushing puts a header in front, popping
//! takes it; bytes are only made when somebody looks. Nothing here shares code with the daemon; the fields of
//! IP and what is in it are [`slow`](crate::slow)'s business.

use std::collections::BTreeMap;

use crate::actions::{field, kind};
use crate::packet::ethertype;
use crate::slow;
use crate::wire::{attributes, u32_at};

/// `ETH_P_*`
pub const MPLS: u16 = 0x8847;
/// The other ethertype of labels.
pub const MPLS_MC: u16 = 0x8848;
/// RFC 8300.
pub const NSH: u16 = 0x894f;
/// A whole frame.
pub const BRIDGED: u16 = 0x6558;

/// A header. What follows it is said by its place in the row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Destination and source.
    Ether([u8; 12]),
    /// Type and tag control.
    Tag(u16, u16),
    /// The ethertype that announces the stack, and the entry.
    Label(u16, [u8; 4]),
    /// The whole header.
    Nsh(Vec<u8>),
}

/// A packet.
#[derive(Clone, Debug)]
pub struct State {
    /// From the outermost on.
    pub front: Vec<Layer>,
    /// What is behind them.
    pub kind: u16,
    /// See `kind`.
    pub payload: Vec<u8>,
    /// The longest that the next output or upcall may be.
    limit: usize,
    /// A frame has come to light that nobody has looked into yet.
    unseen: bool,
}

/// What a lookup after a recirculation goes by: its id, whether there is an Ethernet header, and what follows.
pub type Class = (u32, bool, u16);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A frame left by a port.
    Out(u32, Vec<u8>),
    /// An upcall: its user data, the packet, and how long it was if it was cut.
    Up(Vec<u8>, Vec<u8>, Option<u32>),
}

/// The twin.
pub struct Layers<'a> {
    /// Ports that exist, by number.
    pub ports: &'a [u32],
    /// What recirculated packets meet.
    pub flows: &'a BTreeMap<Class, Vec<u8>>,
    /// How many packets each meter still lets pass; one that isn't here lets all pass.
    pub meters: BTreeMap<u32, u32>,
    /// What happened.
    pub events: Vec<Event>,
    /// The packet was taken for what it isn't.
    pub astray: bool,
}

impl State {
    /// A packet that comes in.
    pub fn new(front: Vec<Layer>, kind: u16, payload: Vec<u8>) -> Self {
        Self {
            front,
            kind,
            payload,
            limit: usize::MAX,
            unseen: false,
        }
    }

    /// The bytes of all from layer `from` on, and what they are.
    fn render(&self, from: usize) -> (u16, Vec<u8>) {
        let (mut kind, mut bytes) = (self.kind, self.payload.clone());
        for layer in self.front[from..].iter().rev() {
            (kind, bytes) = match layer {
                Layer::Ether(addresses) => (
                    BRIDGED,
                    [&addresses[..], &kind.to_be_bytes(), &bytes].concat(),
                ),
                Layer::Tag(tpid, tci) => {
                    let tag = [tci.to_be_bytes(), kind.to_be_bytes()].concat();
                    (*tpid, [tag, bytes].concat())
                }
                Layer::Label(announced, entry) => (*announced, [&entry[..], &bytes].concat()),
                Layer::Nsh(header) => (NSH, [&header[..], &bytes].concat()),
            };
        }
        (kind, bytes)
    }

    /// All its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.render(0).1
    }

    fn is_frame(&self) -> bool {
        matches!(self.front.first(), Some(Layer::Ether(_)))
    }

    /// How many of the layers are Ethernet's: its header, its tags.
    fn link(&self) -> usize {
        let tags = self.front.iter().skip(1);
        match self.is_frame() {
            true => {
                1 + tags
                    .take_while(|layer| matches!(layer, Layer::Tag(..)))
                    .count()
            }
            false => 0,
        }
    }

    fn tagged(&self) -> bool {
        self.link() > 1
    }

    /// The length that actions count by: without the outermost tag.
    fn measure(&self) -> usize {
        self.bytes().len() - if self.tagged() { 4 } else { 0 }
    }

    /// What the packet is, if flows can find it.
    pub fn class(&self) -> Option<(bool, u16)> {
        (!self.tagged()).then(|| (self.is_frame(), self.render(self.link()).0))
    }

    /// Whether what is behind Ethernet's headers is IP.
    fn is_ip(&self) -> bool {
        self.front.len() == self.link() && matches!(self.kind, ethertype::IPV4 | ethertype::IPV6)
    }
}

impl Layers<'_> {
    /// Runs a list.
    pub fn run(&mut self, state: &mut State, list: &[u8]) {
        let list = attributes(list);
        for (index, (kind, payload)) in list.iter().enumerate() {
            let last = index + 1 == list.len();
            // Tags behind tags are `differential.rs`'s business.
            self.astray |= state.link() > 2;
            match *kind {
                kind::OUTPUT => self.send(state, u32_at(payload, 0)),
                kind::USERSPACE => self.upcall(state, payload),
                kind::TRUNC => state.limit = u32_at(payload, 0) as usize,
                kind::PUSH_VLAN => {
                    let word = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
                    state.front.insert(1, Layer::Tag(word(0), word(2) & 0xefff));
                }
                kind::POP_VLAN if state.tagged() => drop(state.front.remove(1)),
                kind::PUSH_MPLS => label(state, payload, state.link()),
                kind::ADD_MPLS => {
                    let behind = u16::from_ne_bytes([payload[6], payload[7]]) & 1 != 0;
                    label(state, payload, if behind { state.link() } else { 0 });
                }
                kind::POP_MPLS => {
                    let told = u16::from_be_bytes([payload[0], payload[1]]);
                    if !self.pop_label(state, told) {
                        return;
                    }
                }
                kind::PUSH_ETH => {
                    // The attribute has the source first.
                    let mut addresses = [0; 12];
                    addresses[..6].copy_from_slice(&payload[6..]);
                    addresses[6..].copy_from_slice(&payload[..6]);
                    state.front.insert(0, Layer::Ether(addresses));
                }
                // The frame isn't known yet: the packet ends.
                kind::POP_ETH if state.unseen => return,
                kind::POP_ETH => drop(state.front.remove(0)),
                kind::PUSH_NSH => {
                    let next = match state.render(0).0 {
                        ethertype::IPV4 => 1,
                        ethertype::IPV6 => 2,
                        BRIDGED => 3,
                        NSH => 4,
                        MPLS => 5,
                        // There is no number for it: the packet ends.
                        _ => return,
                    };
                    let mut header = nsh_header(payload);
                    header[3] = next;
                    state.front.insert(0, Layer::Nsh(header));
                }
                kind::POP_NSH => match state.front.first() {
                    Some(Layer::Nsh(_)) => {
                        state.front.remove(0);
                        state.unseen |= state.is_frame();
                    }
                    _ => return,
                },
                kind::SET => {
                    let (field, value) = attributes(payload).remove(0);
                    self.set(state, field, &value, &vec![0xff; value.len()]);
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
                    let parts: BTreeMap<u16, Vec<u8>> = attributes(payload).into_iter().collect();
                    let limit = u16::from_ne_bytes([parts[&1][0], parts[&1][1]]);
                    let longer = state.measure() > usize::from(limit);
                    self.run(&mut state.clone(), &parts[&if longer { 2 } else { 3 }]);
                }
                kind::METER => {
                    if let Some(left) = self.meters.get_mut(&u32_at(payload, 0)) {
                        if *left == 0 {
                            return;
                        }
                        *left -= 1;
                    }
                }
                kind::DEC_TTL if state.is_ip() && !state.unseen => {
                    let at = if state.kind == ethertype::IPV4 { 8 } else { 7 };
                    if state.payload[at] <= 1 {
                        let exceeded = attributes(payload).remove(0).1;
                        return self.run(state, &exceeded);
                    }
                    state.payload[at] -= 1;
                    if state.kind == ethertype::IPV4 {
                        crate::packet::make_ipv4_checksum(&mut state.payload, 0);
                    }
                }
                kind::RECIRC => {
                    state.unseen = false;
                    let id = u32_at(payload, 0);
                    let list = state
                        .class()
                        .and_then(|(frame, what)| self.flows.get(&(id, frame, what)));
                    if let Some(list) = list.cloned() {
                        self.run(&mut state.clone(), &list);
                    }
                    if last {
                        return;
                    }
                }
                _ => {}
            }
        }
    }

    fn send(&mut self, state: &mut State, port: u32) {
        let limit = std::mem::replace(&mut state.limit, usize::MAX);
        // What is no frame doesn't leave by an Ethernet port.
        if !self.ports.contains(&port) || !state.is_frame() {
            return;
        }
        let mut frame = state.bytes();
        let tag = if state.tagged() { 4 } else { 0 };
        frame.truncate(limit.saturating_add(tag));
        self.events.push(Event::Out(port, frame));
    }

    fn upcall(&mut self, state: &mut State, payload: &[u8]) {
        let limit = std::mem::replace(&mut state.limit, usize::MAX);
        let parts: BTreeMap<u16, Vec<u8>> = attributes(payload).into_iter().collect();
        let mut packet = state.bytes();
        let whole = (packet.len() > limit).then_some(packet.len() as u32);
        packet.truncate(limit);
        let data = parts.get(&2).cloned().unwrap_or_default();
        self.events.push(Event::Up(data, packet, whole));
    }

    fn pop_label(&mut self, state: &mut State, told: u16) -> bool {
        let at = state.link();
        let Some(Layer::Label(..)) = state.front.get(at) else {
            // Nothing to pop: only possible where what is there was taken for a label.
            self.astray = true;
            return false;
        };
        state.front.remove(at);
        match state.front.get_mut(at) {
            Some(Layer::Label(announced, _)) if matches!(told, MPLS | MPLS_MC) => *announced = told,
            _ => self.astray |= state.render(at).0 != told,
        }
        state.unseen |= told == BRIDGED;
        !self.astray
    }

    fn set(&mut self, state: &mut State, field: u16, value: &[u8], mask: &[u8]) {
        let link = state.link();
        let is_ip = state.is_ip() && !state.unseen;
        match (field, state.front.get_mut(link)) {
            // Nobody looks at these here.
            (field::SKB_MARK | field::PRIORITY, _) => {}
            (field::ETHERNET, _) => {
                if let Some(Layer::Ether(addresses)) = state.front.first_mut() {
                    slow::blend(&mut addresses[6..], &value[..6], &mask[..6]);
                    slow::blend(&mut addresses[..6], &value[6..], &mask[6..]);
                }
            }
            (field::MPLS, Some(Layer::Label(_, entry))) => slow::blend(entry, value, mask),
            _ if is_ip => {
                state.payload = slow::set_in(state.kind, &state.payload, field, value, mask);
            }
            _ => self.astray = true,
        }
    }
}

fn label(state: &mut State, payload: &[u8], at: usize) {
    let announced = u16::from_be_bytes([payload[4], payload[5]]);
    let entry = [payload[0], payload[1], payload[2], payload[3]];
    state.front.insert(at, Layer::Label(announced, entry));
}

/// The header that `OVS_ACTION_ATTR_PUSH_NSH` describes (RFC 8300 section 2); what comes next isn't known here.
pub fn nsh_header(payload: &[u8]) -> Vec<u8> {
    let nest = attributes(payload).remove(0).1;
    let parts: BTreeMap<u16, Vec<u8>> = attributes(&nest).into_iter().collect();
    let base = &parts[&1];
    let (flags, ttl, md_type) = (u16::from(base[0]), u16::from(base[1]), base[2]);
    let metadata = &parts[&if md_type == 1 { 2 } else { 3 }];
    let words = 2 + metadata.len() as u16 / 4;
    let mut header = (flags << 12 | ttl << 6 | words).to_be_bytes().to_vec();
    header.extend([md_type, 0]);
    header.extend(&base[4..8]);
    header.extend(metadata);
    header
}
