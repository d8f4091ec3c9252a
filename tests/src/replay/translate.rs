//! From a recording's numbers to those of the daemon under test: families, port ids, ifindexes.
//!
//! The families' numbers are in a recording's first line, port ids are told by who set them up, ifindexes
//! are learnt from replies: where the module said one, ours may say another, the same from then on.

use std::collections::HashMap;

use anyhow::{Result, bail};

use crate::corpus::{Case, Meta};

/// `NLMSG_ERROR`.
pub const ERROR: u16 = 2;
/// `NLMSG_DONE`.
pub const DONE: u16 = 3;
/// `GENL_ID_CTRL`.
pub const CONTROL: u16 = 16;
/// Netlink's, generic netlink's and Open vSwitch's header.
pub const HEADERS: usize = 24;

/// Where in [`transport::FAMILIES`] a family is.
pub mod family {
    #![allow(missing_docs)]
    pub const DATAPATH: usize = 0;
    pub const VPORT: usize = 1;
    pub const FLOW: usize = 2;
    pub const PACKET: usize = 3;
    pub const METER: usize = 4;
    pub const CT_LIMIT: usize = 5;
}

const DP_IFINDEX: u16 = 9;
const VPORT_IFINDEX: u16 = 8;

/// Numbers that a recording's requests name although nothing has them.
const NOBODY: [u32; 4] = [0, 9_999, 99_999, u32::MAX];

/// An attribute's place in a message, header included.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its type without flags.
    pub kind: u16,
    /// Where its header begins.
    pub start: usize,
    /// Where its payload ends.
    pub end: usize,
}

/// The attributes that are in `bytes` from `start` on, as far as their lengths make sense.
pub fn attributes(bytes: &[u8], start: usize, end: usize) -> Vec<Place> {
    let mut places = Vec::new();
    let mut at = start;
    while at + 4 <= end {
        let len = usize::from(u16_at(bytes, at));
        if len < 4 || at + len > end {
            break;
        }
        places.push(Place {
            kind: u16_at(bytes, at + 2) & 0x3fff,
            start: at,
            end: at + len,
        });
        at += len.next_multiple_of(4);
    }
    places
}

/// A u16 in host order; 0 beyond the end.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let found = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    found.map_or(0, u16::from_ne_bytes)
}

/// A u32 in host order; 0 beyond the end.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    found.map_or(0, u32::from_ne_bytes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Knows both sides' numbers.
#[derive(Debug)]
pub struct Translator {
    /// `nlmsg_type` recorded, to the index of [`transport::FAMILIES`].
    families: HashMap<u16, usize>,
    /// Multicast groups, by the recorded number.
    groups: HashMap<u32, u32>,
    ifindexes: HashMap<u32, u32>,
    /// The port id of the recorded requester, and of ours.
    requester: (u32, u32),
    /// Port ids wherever they stand: random 32-bit numbers that are nothing else.
    words: HashMap<u32, u32>,
}

impl Translator {
    /// For a recording with that first line, replayed by the client of port id `requester`.
    pub fn new(meta: &Meta, requester: u32) -> Self {
        let number = |(at, name): (usize, &&str)| Some((meta.family(name)?, at));
        Self {
            families: transport::FAMILIES
                .iter()
                .enumerate()
                .filter_map(number)
                .collect(),
            groups: meta
                .groups()
                .into_iter()
                .zip(transport::GROUP_BASE..)
                .collect(),
            ifindexes: HashMap::new(),
            requester: (meta.requester, requester),
            words: HashMap::new(),
        }
    }

    /// Another recording of the same laboratory: its requester's port id.
    pub fn go_on(&mut self, meta: &Meta) {
        self.requester.0 = meta.requester;
    }

    /// The recorded port id stands for `ours`, wherever it stands.
    pub fn word(&mut self, recorded: u32, ours: u32) {
        self.words.insert(recorded, ours);
    }

    /// No longer.
    pub fn forget_word(&mut self, recorded: u32) {
        self.words.remove(&recorded);
    }

    /// The port id of the recorded requester, and of ours.
    pub fn requesters(&self) -> (u32, u32) {
        self.requester
    }

    /// The requester is another socket, whose recorded port id stands in the case's replies. Gives what it
    /// was, for [`Translator::restore`].
    pub fn requester(&mut self, ours: u32, case: &Case) -> (u32, u32) {
        let before = self.requester;
        let request = case.request();
        let recorded = match case.replies().first() {
            Some(reply) => u32_at(reply, 12),
            None => u32_at(&request, 12),
        };
        self.requester = (recorded, ours);
        before
    }

    /// Undoes [`Translator::requester`].
    pub fn restore(&mut self, before: (u32, u32)) {
        self.requester = before;
    }

    /// The device of index `recorded` there has the index `ours` here.
    pub fn device(&mut self, recorded: u32, ours: u32) {
        self.ifindexes.insert(recorded, ours);
    }

    /// The family of a recorded message, an index of [`transport::FAMILIES`].
    pub fn family_of(&self, message: &[u8]) -> Option<usize> {
        self.families.get(&u16_at(message, 4)).copied()
    }

    /// A recorded request, as we send it.
    ///
    /// # Errors
    /// It names a datapath that hasn't been seen.
    pub fn request(&self, recorded: &[u8]) -> Result<Vec<u8>> {
        self.message(recorded, true)
    }

    /// A recorded reply, notification or upcall, as it is expected of ours.
    ///
    /// # Errors
    /// It names an ifindex that [`Translator::learn`] hasn't seen.
    pub fn reply(&self, recorded: &[u8]) -> Result<Vec<u8>> {
        let mut message = recorded.to_vec();
        if u32_at(recorded, 12) == self.requester.0 {
            put(&mut message, 12, &self.requester.1.to_ne_bytes());
        }
        match u16_at(recorded, 4) {
            ERROR => {
                // The request comes back behind the errno.
                let len = match u16_at(recorded, 6) & transport::NLM_F_CAPPED {
                    0 => u32_at(recorded, 20) as usize,
                    _ => transport::NLMSGHDR_LEN,
                };
                if let Some(request) = recorded.get(20..recorded.len().min(20 + len)) {
                    let request = self.message(request, true)?;
                    put(&mut message, 20, &request);
                }
                Ok(message)
            }
            DONE => Ok(message),
            _ => self.message(&message, false),
        }
    }

    /// The numbers of a family and of its groups in a message of `nlctrl`.
    fn control(&self, message: &mut [u8]) {
        const FAMILY_ID: u16 = 1;
        const GROUPS: u16 = 7;
        const GROUP_ID: u16 = 2;
        for place in attributes(message, HEADERS - 4, message.len()) {
            let payload = place.start + 4;
            match place.kind {
                FAMILY_ID => {
                    if let Some(family) = self.families.get(&u16_at(message, payload)) {
                        let ours = transport::family_id(*family as u16);
                        put(message, payload, &ours.to_ne_bytes());
                    }
                }
                GROUPS => {
                    let groups = attributes(message, payload, place.end);
                    let fields = groups
                        .iter()
                        .flat_map(|group| attributes(message, group.start + 4, group.end));
                    for field in fields.collect::<Vec<_>>() {
                        let recorded = u32_at(message, field.start + 4);
                        if let (GROUP_ID, Some(ours)) = (field.kind, self.groups.get(&recorded)) {
                            put(message, field.start + 4, &ours.to_ne_bytes());
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// Attributes of a recording with our port ids in them.
    pub fn payload(&self, recorded: &[u8]) -> Vec<u8> {
        let mut payload = recorded.to_vec();
        self.words_in(&mut payload, 0);
        payload
    }

    fn words_in(&self, message: &mut [u8], start: usize) {
        for at in (start..message.len()).step_by(4) {
            if let Some(ours) = self.words.get(&u32_at(message, at)) {
                put(message, at, &ours.to_ne_bytes());
            }
        }
    }

    fn message(&self, recorded: &[u8], lenient: bool) -> Result<Vec<u8>> {
        let mut message = recorded.to_vec();
        let Some(family) = self.family_of(recorded) else {
            if u16_at(recorded, 4) == CONTROL {
                self.control(&mut message);
            }
            return Ok(message);
        };
        put(
            &mut message,
            4,
            &transport::family_id(family as u16).to_ne_bytes(),
        );
        if message.len() >= HEADERS {
            let ifindex = self.ifindex(u32_at(recorded, 20))?;
            put(&mut message, 20, &ifindex.to_ne_bytes());
        }
        self.words_in(&mut message, HEADERS);
        let wanted = match family {
            family::DATAPATH => DP_IFINDEX,
            family::VPORT => VPORT_IFINDEX,
            _ => return Ok(message),
        };
        for place in attributes(recorded, HEADERS, recorded.len()) {
            if place.kind == wanted && place.end - place.start == 8 {
                let told = u32_at(recorded, place.start + 4);
                // A request may ask for an index that nothing has yet.
                let ours = match (self.ifindexes.get(&told), lenient) {
                    (Some(ours), _) => *ours,
                    (None, true) => told,
                    (None, false) => bail!("ifindex {told} hasn't been seen"),
                };
                put(&mut message, place.start + 4, &ours.to_ne_bytes());
            }
        }
        Ok(message)
    }

    /// Ours for a recorded datapath.
    ///
    /// # Errors
    /// It hasn't been seen.
    pub fn ifindex(&self, recorded: u32) -> Result<u32> {
        match self.ifindexes.get(&recorded) {
            Some(ours) => Ok(*ours),
            None if NOBODY.contains(&recorded) => Ok(recorded),
            None => bail!("datapath {recorded} hasn't been seen"),
        }
    }

    /// Takes the ifindexes of a recorded reply and of ours to be the same things, where the recorded one
    /// is new.
    pub fn learn(&mut self, recorded: &[u8], ours: &[u8]) {
        let Some(family) = self.family_of(recorded) else {
            return;
        };
        if transport::family_of(u16_at(ours, 4)) != Some(family) {
            return;
        }
        let mut pairs = vec![(u32_at(recorded, 20), u32_at(ours, 20))];
        if family == family::VPORT {
            let told = |message: &[u8]| {
                let places = attributes(message, HEADERS, message.len());
                let place = places
                    .into_iter()
                    .find(|place| place.kind == VPORT_IFINDEX)?;
                Some(u32_at(message, place.start + 4))
            };
            pairs.extend(told(recorded).zip(told(ours)));
        }
        for (recorded, ours) in pairs {
            if !NOBODY.contains(&recorded) {
                self.ifindexes.entry(recorded).or_insert(ours);
            }
        }
    }
}
