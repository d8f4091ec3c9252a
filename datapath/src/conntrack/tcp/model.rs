//! The state machine against a table, over random segments: rows are kinds of segments, columns the
//! states, as `nf_conntrack` is documented to have them. Windows are tested apart.

use proptest::prelude::*;

use super::*;

/// no ss sr es fw cw la tw cl s2; `iv` invalid, `ig` ignored.
const ORIGINAL: [(Kind, &str); 5] = [
    (Kind::Syn, "ss ss ig ig ig ig ig ss ss s2"),
    (Kind::SynAck, "iv iv sr iv iv iv iv iv iv sr"),
    (Kind::Fin, "iv iv fw fw la la la tw cl iv"),
    (Kind::Ack, "es iv es es cw cw tw tw cl iv"),
    (Kind::Rst, "iv cl cl cl cl cl cl cl cl cl"),
];
const REPLY: [(Kind, &str); 5] = [
    (Kind::Syn, "iv s2 iv iv iv iv iv ss iv s2"),
    (Kind::SynAck, "iv sr ig ig ig ig ig ig ig sr"),
    (Kind::Fin, "iv iv fw fw la la la tw cl iv"),
    (Kind::Ack, "iv ig sr es cw cw tw tw cl ig"),
    (Kind::Rst, "iv cl cl cl cl cl cl cl cl cl"),
];
const COLUMNS: [(State, &str); 10] = [
    (State::None, "no"),
    (State::SynSent, "ss"),
    (State::SynRecv, "sr"),
    (State::Established, "es"),
    (State::FinWait, "fw"),
    (State::CloseWait, "cw"),
    (State::LastAck, "la"),
    (State::TimeWait, "tw"),
    (State::Close, "cl"),
    (State::SynSent2, "s2"),
];

fn told(kind: Kind, from: State, direction: Direction) -> Step {
    let rows = match direction {
        Direction::Original => ORIGINAL,
        Direction::Reply => REPLY,
    };
    let (_, row) = rows.into_iter().find(|(row, _)| *row == kind).unwrap();
    let column = COLUMNS.iter().position(|(state, _)| *state == from);
    let name = row.split(' ').nth(column.unwrap()).unwrap();
    match name {
        "iv" => Step::Invalid,
        "ig" => Step::Ignore,
        name => Step::To(COLUMNS.iter().find(|(_, short)| *short == name).unwrap().0),
    }
}

#[test]
fn every_step_is_that_of_the_table() {
    for (state, _) in COLUMNS {
        for (kind, _) in ORIGINAL {
            for direction in [Direction::Original, Direction::Reply] {
                assert_eq!(
                    step(kind, state, direction),
                    told(kind, state, direction),
                    "{kind:?} in {state:?}, {direction:?}"
                );
            }
        }
    }
}

fn flags(kind: Kind) -> u8 {
    match kind {
        Kind::Syn => flag::SYN,
        Kind::SynAck => flag::SYN | flag::ACK,
        Kind::Fin => flag::FIN | flag::ACK,
        Kind::Ack => flag::ACK,
        Kind::Rst => flag::RST,
    }
}

fn segment(flags: u8, seq: u32, ack: u32, payload: u32) -> Segment<'static> {
    Segment {
        seq,
        ack,
        flags,
        window: 1000,
        payload,
        options: &[],
        shifted: 0,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_segments_lead_where_the_table_says(
        first in 0..5_usize,
        all in proptest::collection::vec((0..5_usize, any::<bool>()), 0..40),
    ) {
        let timeouts = Timeouts::default();
        let (first, _) = ORIGINAL[first];
        // Numbers that answer nothing, so that only states count.
        let opening = segment(flags(first), 1_000_000, 0, 0);
        let begun = Tcp::new(&opening);
        let expected = told(first, State::None, Direction::Original);
        prop_assert_eq!(begun.is_some(), matches!(expected, Step::To(_)));
        let Some(mut tcp) = begun else { return Ok(()) };
        tcp.liberal = true;
        tcp.handle(Direction::Original, &opening, false, false, &timeouts);
        let mut model = match expected { Step::To(to) => to, _ => unreachable!() };
        prop_assert_eq!(tcp.state, model);
        let mut closing = false;
        let mut last_rst = false;
        for (kind, reply) in all {
            let (kind, _) = ORIGINAL[kind];
            let direction = if reply { Direction::Reply } else { Direction::Original };
            // A reset has the number that the other end awaits, if it is known.
            let seq = match kind {
                Kind::Rst => tcp.ends[direction.other().index()].max_ack.unwrap_or(0),
                _ => 1_000_000,
            };
            let segment = segment(flags(kind), seq, 5, 0);
            let verdict = tcp.handle(direction, &segment, true, true, &timeouts);
            match told(kind, model, direction) {
                Step::Invalid => prop_assert_eq!(verdict, Verdict::Invalid),
                Step::Ignore => {
                    let ignored = Verdict::Accept { timeout: None, assured: false };
                    prop_assert_eq!(verdict, ignored);
                    last_rst = false;
                }
                Step::To(State::SynSent) if model >= State::TimeWait && (closing || last_rst) => {
                    prop_assert_eq!(verdict, Verdict::Reopen);
                    return Ok(());
                }
                Step::To(to) => {
                    let accepted = matches!(verdict, Verdict::Accept { .. });
                    prop_assert!(accepted, "{verdict:?}");
                    closing |= model != to && to == State::FinWait;
                    last_rst = kind == Kind::Rst && !reply;
                    model = to;
                }
            }
            prop_assert_eq!(tcp.state, model);
        }
    }

    /// A sender that keeps to the rules, over a path that loses and repeats, is never out of window.
    #[test]
    fn honest_ends_stay_in_the_window(
        isn: (u32, u32),
        moves in proptest::collection::vec((any::<bool>(), 0..1400_u32, any::<bool>(), any::<bool>()), 0..200),
    ) {
        let timeouts = Timeouts::default();
        let (a, b) = isn;
        let mut seen_reply = false;
        let syn = segment(flag::SYN, a, 0, 0);
        let mut tcp = Tcp::new(&syn).unwrap();
        let mut show = |tcp: &mut Tcp, direction, segment: &Segment<'_>| {
            let verdict = tcp.handle(direction, segment, seen_reply, false, &timeouts);
            seen_reply |= direction == Direction::Reply;
            matches!(verdict, Verdict::Accept { .. })
        };
        prop_assert!(show(&mut tcp, Direction::Original, &syn));
        let answer = segment(flag::SYN | flag::ACK, b, a.wrapping_add(1), 0);
        prop_assert!(show(&mut tcp, Direction::Reply, &answer));
        // What each has sent, and what has reached it.
        let mut sent = [a.wrapping_add(1), b.wrapping_add(1)];
        let mut reached = [b.wrapping_add(1), a.wrapping_add(1)];
        let mut acknowledged = sent;
        let third = segment(flag::ACK, sent[0], reached[0], 0);
        prop_assert!(show(&mut tcp, Direction::Original, &third));
        prop_assert_eq!(tcp.state, State::Established);
        for (reply, size, arrives, repeated) in moves {
            let own = usize::from(reply);
            let direction = if reply { Direction::Reply } else { Direction::Original };
            // No more in flight than the window that the other end's last acknowledgement opened.
            let in_flight = sent[own].wrapping_sub(acknowledged[own]);
            let size = size.min(1000_u32.saturating_sub(in_flight));
            let data = segment(flag::ACK, sent[own], reached[own], size);
            for _ in 0..=u8::from(repeated) {
                prop_assert!(show(&mut tcp, direction, &data), "{data:?} {tcp:?}");
            }
            if arrives {
                acknowledged[1 - own] = reached[own];
                reached[1 - own] = sent[own].wrapping_add(size);
                sent[own] = sent[own].wrapping_add(size);
            }
        }
        prop_assert!(!tcp.liberal);
    }

    #[test]
    fn segments_far_outside_the_window_are_invalid_unless_one_is_liberal(far in 200_000..0x7000_0000_u32) {
        let timeouts = Timeouts::default();
        let syn = segment(flag::SYN, 100, 0, 0);
        let mut tcp = Tcp::new(&syn).unwrap();
        tcp.handle(Direction::Original, &syn, false, false, &timeouts);
        let answer = segment(flag::SYN | flag::ACK, 500, 101, 0);
        tcp.handle(Direction::Reply, &answer, false, false, &timeouts);
        tcp.handle(Direction::Original, &segment(flag::ACK, 101, 501, 0), true, false, &timeouts);
        let wild = segment(flag::ACK, 101_u32.wrapping_add(far), 501, 10);
        prop_assert_eq!(
            tcp.handle(Direction::Original, &wild, true, true, &timeouts),
            Verdict::Invalid
        );
        tcp.liberal = true;
        let verdict = tcp.handle(Direction::Original, &wild, true, true, &timeouts);
        let accepted = matches!(verdict, Verdict::Accept { .. });
        prop_assert!(accepted);
    }
}
