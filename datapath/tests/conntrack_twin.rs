//! Random packets through random `ct` actions, beside a slow twin of the tracker that knows nothing of buckets,
//! threads and timers: a list of connections, searched from its beginning.
//!
//! UDP over IPv4 and pings; three zones; commit, force, marks and labels with masks. What is compared is all
//! that a flow can match afterwards: state, zone, mark, label, original tuple. Not here: TCP (its states are the recordings'
//! business), translation (`conntrack_properties.rs`), time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod conntrack_common;

use conntrack_common::*;
use datapath::conntrack::action::state;
use etherparse::PacketBuilder;
use flow::action::{Conntrack, Masked};
use proptest::prelude::*;

/// Who speaks to whom about what: addresses, and ports or the identifier of a ping, which is both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple {
    ping: bool,
    from: (u8, u16),
    to: (u8, u16),
}

impl Tuple {
    fn back(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
            ..self
        }
    }
}

/// A packet: `answer` is an echo reply, and means nothing for UDP.
#[derive(Clone, Copy, Debug)]
struct Seen {
    tuple: Tuple,
    answer: bool,
}

impl Seen {
    fn bytes(self) -> Vec<u8> {
        let Tuple { ping, from, to } = self.tuple;
        let (src, dst) = ([10, 0, 0, from.0], [10, 0, 0, to.0]);
        if !ping {
            let (src_port, dst_port) = (from.1, to.1);
            let ends = Ends {
                src,
                src_port,
                dst,
                dst_port,
            };
            return udp(ends, b"data");
        }
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(src, dst, 64);
        let mut bytes = Vec::new();
        if self.answer {
            let builder = builder.icmpv4_echo_reply(from.1, 1);
            builder.write(&mut bytes, b"data").unwrap();
        } else {
            let builder = builder.icmpv4_echo_request(from.1, 1);
            builder.write(&mut bytes, b"data").unwrap();
        }
        bytes
    }
}

/// A connection of the twin.
#[derive(Clone, Debug)]
struct Known {
    zone: u16,
    tuple: Tuple,
    answered: bool,
    mark: u32,
    labels: [u8; 16],
}

/// What a flow sees: state, mark, label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sight {
    state: u8,
    zone: u16,
    mark: u32,
    labels: [u8; 16],
}

#[derive(Debug, Default)]
struct Twin(Vec<Known>);

impl Twin {
    fn see(&mut self, seen: Seen, what: &Conntrack) -> Sight {
        let forward = |known: &Known| known.zone == what.zone && known.tuple == seen.tuple;
        let backward = |known: &Known| known.zone == what.zone && known.tuple.back() == seen.tuple;
        // An answer to a ping never begins a connection, and a request never answers one.
        let request = !seen.tuple.ping || !seen.answer;
        let reply = !seen.tuple.ping || seen.answer;
        let mut found = self
            .0
            .iter()
            .position(|known| request && forward(known) || reply && backward(known));
        if let Some(at) = found
            && what.force
            && !(request && forward(&self.0[at]))
        {
            // Begun anew in this direction.
            self.0.remove(at);
            found = None;
            if !request {
                return Sight {
                    state: state::TRACKED | state::INVALID,
                    zone: what.zone,
                    mark: 0,
                    labels: [0; 16],
                };
            }
        }
        let mut new = Known {
            zone: what.zone,
            tuple: seen.tuple,
            answered: false,
            mark: 0,
            labels: [0; 16],
        };
        let (bits, known) = match found {
            Some(at) => {
                let known = &mut self.0[at];
                if request && forward(known) {
                    let bit = match known.answered {
                        true => state::ESTABLISHED,
                        false => state::NEW,
                    };
                    (bit, known)
                } else {
                    known.answered = true;
                    (state::ESTABLISHED | state::REPLY, known)
                }
            }
            None if !request => (state::INVALID, &mut new),
            None => (state::NEW, &mut new),
        };
        let invalid = bits == state::INVALID;
        if what.commit && !invalid {
            if let Some(mark) = what.mark {
                known.mark = known.mark & !mark.mask | mark.value;
            }
            if let Some(labels) = &what.labels {
                for (at, byte) in known.labels.iter_mut().enumerate() {
                    *byte = *byte & !labels.mask[at] | labels.value[at];
                }
            }
        }
        let sight = Sight {
            state: bits | state::TRACKED,
            zone: what.zone,
            mark: known.mark,
            labels: known.labels,
        };
        if what.commit && !invalid && found.is_none() {
            self.0.push(new);
        }
        sight
    }
}

fn seen() -> impl Strategy<Value = Seen> {
    // Few of each, so that they meet.
    let end = || (1..4_u8, 0..2_u16);
    (any::<bool>(), end(), end(), any::<bool>()).prop_map(|(ping, from, to, answer)| {
        // A ping has one identifier.
        let (port, other) = match ping {
            true => (from.1 + 7, from.1 + 7),
            false => (from.1 + 1000, to.1 + 1000),
        };
        let tuple = Tuple {
            ping,
            from: (from.0, port),
            to: (to.0 + 4 * u8::from(to.0 == from.0), other),
        };
        // Half the packets go back.
        match answer {
            true => Seen {
                tuple: tuple.back(),
                answer,
            },
            false => Seen { tuple, answer },
        }
    })
}

fn action() -> impl Strategy<Value = Conntrack> {
    let mark = proptest::option::of((any::<u32>(), any::<u32>()));
    let labels = proptest::option::of((any::<[u8; 16]>(), any::<[u8; 16]>()));
    (
        0..3_u16,
        any::<bool>(),
        proptest::bool::weighted(0.2),
        mark,
        labels,
    )
        .prop_map(|(zone, commit, force, mark, labels)| {
            let commit = commit || force;
            // A request without commit can't set them; a value reaches no further than its mask.
            let mark = mark.filter(|_| commit).map(|(value, mask)| Masked {
                value: value & mask,
                mask,
            });
            let labels = labels.filter(|_| commit).map(|(value, mask)| Masked {
                value: std::array::from_fn(|at| value[at] & mask[at]),
                mask,
            });
            Conntrack {
                commit,
                force,
                mark,
                labels,
                ..ct(zone)
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_tracker_sees_what_its_twin_sees(
        all in proptest::collection::vec((seen(), action()), 1..60),
    ) {
        let tracker = tracker(10_000);
        let mut twin = Twin::default();
        for (number, (seen, what)) in all.iter().enumerate() {
            let expected = twin.see(*seen, what);
            let packet = run(&tracker, &seen.bytes(), what, SECOND).unwrap();
            let came = Sight {
                state: packet.key.ct_state,
                zone: packet.key.ct_zone,
                mark: packet.key.ct_mark,
                labels: packet.key.ct_labels,
            };
            prop_assert_eq!(came, expected, "packet {} of {:?}", number, &all);
        }
    }
}
