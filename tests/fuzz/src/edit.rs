//! Random edits of a request: of its attributes, at any depth, and of its bytes.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

use crate::wire::HEADERS;

/// What an attribute is while it is edited: it may lie about its length.
#[derive(Clone, Debug)]
struct Attribute {
    kind: u16,
    payload: Vec<u8>,
    said: Option<u16>,
    padded: bool,
}

/// A request doesn't grow beyond this.
const LONGEST: usize = 8192;

const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    3,
    4,
    7,
    13,
    14,
    0x7f,
    0xff,
    0x1000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    u64::MAX,
];

/// Edits a message in one to four places; parts come from `other`, too.
pub fn message(message: &mut Vec<u8>, other: &[u8], random: &mut SmallRng) {
    let edits = 1 + random.random_range(0..8_u32).count_ones();
    for _ in 0..edits {
        if message.len() < HEADERS || random.random_ratio(1, 24) {
            bytes(message, random);
            continue;
        }
        let begin = match u16::from_ne_bytes([message[4], message[5]]) {
            // The controller has no header of ours.
            16 => 20,
            _ => HEADERS,
        };
        let from = other.get(begin..).unwrap_or_default();
        let edited = attributes(&message[begin..], from, random);
        message.truncate(begin);
        message.extend_from_slice(&edited);
        message.truncate(LONGEST);
    }
    let len = message.len() as u32;
    if let Some(field) = message.get_mut(..4) {
        field.copy_from_slice(&len.to_ne_bytes());
    }
}

/// Edits a run of attributes in one place, perhaps deep inside.
pub fn attributes(run: &[u8], other: &[u8], random: &mut SmallRng) -> Vec<u8> {
    let (mut list, rest) = parse(run);
    let nested: Vec<usize> = (0..list.len())
        .filter(|index| is_run(&list[*index].payload))
        .collect();
    if let Some(index) = nested.choose(random)
        && random.random_ratio(2, 3)
    {
        let attribute = &mut list[*index];
        let donors = parse(other).0;
        // Like into like, where there is such.
        let donor = donors
            .iter()
            .find(|donor| donor.kind == attribute.kind)
            .or_else(|| donors.choose(random));
        let from = donor.map_or(&[][..], |donor| &donor.payload);
        attribute.payload = attributes(&attribute.payload, from, random);
    } else {
        list_edit(&mut list, other, random);
    }
    write(&list, &rest)
}

/// Edits bytes as bytes.
pub fn bytes(bytes: &mut Vec<u8>, random: &mut SmallRng) {
    if bytes.is_empty() {
        bytes.push(random.random());
        return;
    }
    let at = random.random_range(0..bytes.len());
    match random.random_range(0..7) {
        0 | 1 => bytes[at] ^= 1 << random.random_range(0..8),
        2 => bytes[at] = random.random(),
        3 => {
            let number = NUMBERS[random.random_range(0..NUMBERS.len())];
            let number = if random.random() {
                number.to_ne_bytes()
            } else {
                number.to_be_bytes()
            };
            let width = 1 << random.random_range(0..4);
            let number = &number[if random.random() {
                0..width
            } else {
                8 - width..8
            }];
            for (into, from) in bytes[at..].iter_mut().zip(number) {
                *into = *from;
            }
        }
        4 => bytes.truncate(at),
        5 => {
            let more = random.random_range(1..16);
            bytes.extend((0..more).map(|_| random.random::<u8>()));
        }
        _ => {
            let until = random.random_range(at..bytes.len()).min(at + 64);
            let copy = bytes[at..until].to_vec();
            let into = random.random_range(0..bytes.len());
            for (into, from) in bytes[into..].iter_mut().zip(copy) {
                *into = from;
            }
        }
    }
}

fn parse(run: &[u8]) -> (Vec<Attribute>, Vec<u8>) {
    let mut list = Vec::new();
    let mut at = 0;
    while at + 4 <= run.len() {
        let len = usize::from(u16::from_ne_bytes([run[at], run[at + 1]]));
        if len < 4 || at + len > run.len() {
            break;
        }
        list.push(Attribute {
            kind: u16::from_ne_bytes([run[at + 2], run[at + 3]]),
            payload: run[at + 4..at + len].to_vec(),
            said: None,
            padded: true,
        });
        at = (at + ((len + 3) & !3)).min(run.len());
    }
    (list, run[at..].to_vec())
}

/// Whether a payload looks like attributes and nothing else.
fn is_run(payload: &[u8]) -> bool {
    let (list, rest) = parse(payload);
    !list.is_empty() && rest.is_empty() && list.iter().all(|attribute| attribute.kind & 0x3fff < 64)
}

fn write(list: &[Attribute], rest: &[u8]) -> Vec<u8> {
    let mut run = Vec::new();
    for attribute in list {
        let len = attribute
            .said
            .unwrap_or((attribute.payload.len() + 4).min(0xffff) as u16);
        run.extend_from_slice(&len.to_ne_bytes());
        run.extend_from_slice(&attribute.kind.to_ne_bytes());
        run.extend_from_slice(&attribute.payload);
        if attribute.padded {
            run.resize(run.len().next_multiple_of(4), 0);
        }
    }
    run.extend_from_slice(rest);
    run
}

/// Any attribute of a run, at any depth.
fn any(run: &[u8], random: &mut SmallRng) -> Option<Attribute> {
    let (list, _) = parse(run);
    let chosen = list.choose(random)?;
    if is_run(&chosen.payload) && random.random() {
        any(&chosen.payload, random)
    } else {
        Some(chosen.clone())
    }
}

fn list_edit(list: &mut Vec<Attribute>, other: &[u8], random: &mut SmallRng) {
    if list.is_empty() {
        list.extend(any(other, random));
        return;
    }
    let at = random.random_range(0..list.len());
    match random.random_range(0..16) {
        0 => {
            let copy = list[at].clone();
            list.insert(random.random_range(0..=list.len()), copy);
        }
        1 => {
            list.remove(at);
        }
        2 => {
            let with = random.random_range(0..list.len());
            list.swap(at, with);
        }
        3 => {
            let len = list[at].payload.len();
            list[at].payload.truncate(random.random_range(0..=len));
        }
        4 => {
            let more = 1 << random.random_range(0..9);
            list[at]
                .payload
                .extend((0..more).map(|_| random.random::<u8>()));
        }
        5 => {
            // Into itself, once or up to the depth that is allowed and beyond.
            let times = if random.random_ratio(1, 4) {
                random.random_range(2..24)
            } else {
                1
            };
            for _ in 0..times {
                let inner = write(std::slice::from_ref(&list[at]), &[]);
                list[at].payload = inner;
            }
        }
        6 => {
            let (inner, _) = parse(&list[at].payload);
            list.splice(at..=at, inner);
        }
        7..=9 => bytes(&mut list[at].payload, random),
        10 => list[at].kind = random.random_range(0..34),
        11 => list[at].kind ^= if random.random() { 0x8000 } else { 0x4000 },
        12 => {
            let said = [0, 1, 3, 4, 5, 0x7fff, 0xffff, list[at].payload.len() as u16];
            list[at].said = said.choose(random).copied();
        }
        13 => list[at].padded = false,
        _ => {
            if let Some(stranger) = any(other, random) {
                if random.random() {
                    list[at] = stranger;
                } else {
                    list.insert(random.random_range(0..=list.len()), stranger);
                }
            }
        }
    }
}
