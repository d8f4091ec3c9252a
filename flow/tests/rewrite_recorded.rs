//! Rewriting against what the kernel module sent out for the same frames and actions: a small walk over
//! the recorded action attributes, with an own decoder.
// Helpers outside of the test functions may fail like those.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod oracle;

use std::collections::VecDeque;

use flow::action::{
    EthernetFields, Ipv4Fields, Ipv6Fields, Masked, NshFields, PortFields, SetField,
};
use flow::extract::{Metadata, extract, update};
use flow::headers::Layers;
use flow::key::Key;
use flow::rewrite::{self, RewriteError, Ttl};
use frame::Frame;
use oracle::{attribute, attributes, cases, hex, key_attributes, to_hex, unhex};
use serde_json::Value;
use zerocopy::network_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout};

#[derive(Clone)]
struct Packet {
    frame: Frame,
    key: Key,
    layers: Layers,
    trunc: Option<usize>,
}

/// What became of a packet: frames by port (the recorder had a socket a port, so that the order between
/// ports isn't known), upcalls.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    out: Vec<(u64, String)>,
    upcalls: Vec<(String, String)>,
}

/// Why a case isn't replayed: it is about something that isn't rewriting.
#[derive(Debug)]
enum Stop {
    Drop,
    Elsewhere(u16),
}

impl From<RewriteError> for Stop {
    fn from(_: RewriteError) -> Self {
        Self::Drop
    }
}

/// The recorder's datapath had ports 0 to 8.
const LAST_PORT: u64 = 8;

struct Replay<'a> {
    flows: Vec<&'a Value>,
    outcome: Outcome,
    deferred: VecDeque<(Packet, Vec<u8>)>,
}

fn u16_ne(bytes: &[u8]) -> u16 {
    u16::from_le_bytes(bytes[..2].try_into().unwrap())
}

fn u16_be(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes[..2].try_into().unwrap())
}

fn u32_ne(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

/// Value and mask of a structure; no mask means all of it.
fn masked<T: FromBytes + KnownLayout + Immutable>(payload: &[u8], with_mask: bool) -> Masked<T> {
    let size = size_of::<T>();
    let (value, mask) = match with_mask {
        true => (payload[..size].to_vec(), payload[size..2 * size].to_vec()),
        false => (payload[..size].to_vec(), vec![0xff; size]),
    };
    let value: Vec<u8> = value
        .iter()
        .zip(&mask)
        .map(|(value, mask)| value & mask)
        .collect();
    Masked {
        value: T::read_from_bytes(&value).unwrap(),
        mask: T::read_from_bytes(&mask).unwrap(),
    }
}

fn set_field(payload: &[u8], with_mask: bool) -> Result<SetField, Stop> {
    let (kind, payload) = attributes(payload)[0];
    let word = || {
        let mask = if with_mask {
            u32_ne(&payload[4..])
        } else {
            u32::MAX
        };
        Masked {
            value: u32_ne(payload) & mask,
            mask,
        }
    };
    Ok(match kind {
        2 => SetField::Priority(word()),
        15 => SetField::SkbMark(word()),
        4 => SetField::Ethernet(masked::<EthernetFields>(payload, with_mask)),
        7 => SetField::Ipv4(masked::<Ipv4Fields>(payload, with_mask)),
        8 => SetField::Ipv6(masked::<Ipv6Fields>(payload, with_mask)),
        9 => SetField::Tcp(masked::<PortFields>(payload, with_mask)),
        10 => SetField::Udp(masked::<PortFields>(payload, with_mask)),
        17 => SetField::Sctp(masked::<PortFields>(payload, with_mask)),
        21 => SetField::Mpls(masked::<U32>(payload, with_mask)),
        28 => SetField::Nsh(Box::new(masked::<NshFields>(payload, with_mask))),
        other => return Err(Stop::Elsewhere(1000 + other)),
    })
}

/// Base header and context as on the wire, from nested `OVS_NSH_KEY_ATTR_*`.
fn nsh_header(payload: &[u8]) -> Vec<u8> {
    let [flags, ttl, mdtype, np, path @ ..] = attribute(payload, 1).unwrap() else {
        panic!()
    };
    let context = attribute(payload, 2)
        .or_else(|| attribute(payload, 3))
        .unwrap_or_default();
    let first = u16::from(*flags) << 12 | u16::from(*ttl) << 6 | (2 + context.len() as u16 / 4);
    [&first.to_be_bytes()[..], &[*mdtype, *np], path, context].concat()
}

impl Replay<'_> {
    fn bytes_out(packet: &Packet) -> Vec<u8> {
        let mut frame = packet.frame.clone();
        if let Some(len) = packet.trunc {
            frame.truncate(len);
        }
        frame.push_tag_inband().unwrap();
        frame.bytes().to_vec()
    }

    fn upcall(&mut self, packet: &mut Packet) {
        let bytes = to_hex(&Self::bytes_out(packet));
        packet.trunc = None;
        self.outcome
            .upcalls
            .push((to_hex(&key_attributes(&packet.key)), bytes));
    }

    fn run(&mut self, packet: &mut Packet, actions: &[u8]) -> Result<(), Stop> {
        for (kind, payload) in attributes(actions) {
            let Packet {
                frame, key, layers, ..
            } = packet;
            match kind {
                1 => {
                    // An Ethernet port takes no L3 packet.
                    let port = u64::from(u32_ne(payload));
                    if key.mac_proto != 0 && port <= LAST_PORT {
                        self.outcome
                            .out
                            .push((port, to_hex(&Self::bytes_out(packet))));
                    }
                    packet.trunc = None;
                }
                2 => self.upcall(packet),
                3 | 11 => rewrite::set(frame, key, layers, &set_field(payload, kind == 11)?)?,
                4 => {
                    let (tpid, tci) = (u16_be(payload), u16_be(&payload[2..]));
                    rewrite::push_vlan(frame, key, layers, tpid, tci)?;
                }
                5 => rewrite::pop_vlan(frame, key, layers)?,
                7 => {
                    let mut copy = packet.clone();
                    if !copy.layers.key_valid {
                        let Packet {
                            frame, key, layers, ..
                        } = &mut copy;
                        update(frame, key, layers).map_err(|_| Stop::Drop)?;
                    }
                    copy.key.recirc_id = u32_ne(payload);
                    let found = self.flows.iter().find(|flow| {
                        let key = hex(flow, "key_hex").unwrap();
                        attribute(&key, 20).is_some_and(|id| u32_ne(id) == copy.key.recirc_id)
                    });
                    match found.and_then(|flow| hex(flow, "actions_hex")) {
                        Some(actions) => self.deferred.push_back((copy, actions)),
                        None => self.upcall(&mut copy),
                    }
                }
                9 => {
                    let lse = U32::from_bytes(payload[..4].try_into().unwrap());
                    rewrite::push_mpls(frame, key, layers, lse, u16_be(&payload[4..]))?;
                }
                10 => rewrite::pop_mpls(frame, key, layers, u16_be(payload))?,
                13 => packet.trunc = Some(u32_ne(payload) as usize),
                14 => {
                    let src = payload[..6].try_into().unwrap();
                    let dst = payload[6..12].try_into().unwrap();
                    rewrite::push_eth(frame, key, layers, src, dst)?;
                }
                15 => rewrite::pop_eth(frame, key, layers)?,
                17 => {
                    let header = nsh_header(attribute(payload, 28).unwrap());
                    rewrite::push_nsh(frame, key, layers, &header)?;
                }
                18 => rewrite::pop_nsh(frame, key, layers)?,
                20 => {
                    let inner = payload.to_vec();
                    let _ = self.run(&mut packet.clone(), &inner);
                }
                21 => {
                    let longer =
                        packet.frame.len() > usize::from(u16_ne(attribute(payload, 1).unwrap()));
                    let branch = attribute(payload, if longer { 2 } else { 3 }).unwrap();
                    self.run(&mut packet.clone(), branch)?;
                }
                22 => {
                    let lse = U32::from_bytes(payload[..4].try_into().unwrap());
                    let l3 = u16_ne(&payload[6..]) & 1 != 0;
                    rewrite::add_mpls(frame, key, layers, lse, u16_be(&payload[4..]), l3)?;
                }
                23 => {
                    if rewrite::dec_ttl(frame, key, layers)? == Ttl::Exceeded {
                        let exceeded = attribute(payload, 1).unwrap_or_default().to_vec();
                        let _ = self.run(packet, &exceeded);
                        return Err(Stop::Drop);
                    }
                }
                other => return Err(Stop::Elsewhere(other)),
            }
        }
        Ok(())
    }
}

fn recorded(case: &Value) -> Outcome {
    let out = case["out"].as_array().unwrap().iter();
    let upcalls = case["upcalls"].as_array().unwrap().iter();
    Outcome {
        out: out
            .map(|frame| {
                (
                    frame["port"].as_u64().unwrap(),
                    frame["hex"].as_str().unwrap().into(),
                )
            })
            .collect(),
        upcalls: upcalls
            .map(|message| {
                let message = unhex(message.as_str().unwrap());
                let member = |kind| to_hex(attribute(&message[24..], kind).unwrap());
                (member(2), member(1))
            })
            .collect(),
    }
}

#[test]
fn frames_and_keys_are_the_kernels() {
    let (mut same, mut elsewhere, mut wrong) = (0, Vec::new(), Vec::new());
    for group in ["sem_rewrite", "sem_l2", "sem_misc"] {
        for case in cases(group) {
            let name = case["name"].as_str().unwrap();
            let Some(actions) = hex(&case, "actions_hex") else {
                continue;
            };
            if case["flow_errno"] != 0 {
                continue;
            }
            let mut frame = Frame::from_bytes(&hex(&case, "packet_in_hex").unwrap());
            let in_port = u32::try_from(case["in_port"].as_u64().unwrap()).unwrap();
            let meta = Metadata {
                in_port,
                ..Metadata::default()
            };
            let mut key = Key::ZERO;
            let layers = extract(&mut frame, &meta, &mut key).unwrap();
            let flows = case["flows"].as_array().map(|flows| flows.iter().collect());
            let mut replay = Replay {
                flows: flows.unwrap_or_default(),
                outcome: Outcome::default(),
                deferred: VecDeque::new(),
            };
            let mut ended = replay.run(
                &mut Packet {
                    frame,
                    key,
                    layers,
                    trunc: None,
                },
                &actions,
            );
            while let Some((mut packet, actions)) = replay.deferred.pop_front() {
                ended = ended.and(replay.run(&mut packet, &actions));
            }
            if let Err(Stop::Elsewhere(what)) = ended {
                elsewhere.push((name.to_owned(), what));
                continue;
            }
            let (mut ours, theirs) = (replay.outcome, recorded(&case));
            ours.out.sort_by_key(|(port, _)| *port);
            if name == "user-badpid" {
                // Nobody listened; here there is always somebody.
                ours.upcalls.clear();
            }
            if ours == theirs {
                same += 1;
            } else {
                wrong.push(format!("{name}\n  ours   {ours:x?}\n  kernel {theirs:x?}"));
            }
        }
    }
    println!("elsewhere: {elsewhere:?}");
    assert!(
        wrong.is_empty(),
        "{} wrong, {same} right:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(same > 160, "only {same} cases were replayed");
}
