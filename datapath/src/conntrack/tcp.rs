//! TCP as a bystander sees it: a state machine over flags, and windows.
//!
//! States and transitions are those that `conntrack -L` shows; windows follow Guido van Rooij, "Real
//! Stateful TCP Packet Filtering in IP Filter". A connection that nobody has seen from its beginning is
//! taken up in its middle. Once a connection is established, and committed, the datapath is liberal:
//! segments outside the window aren't invalid.

pub mod flags;

use super::timeout::Timeouts;
use super::tuple::Direction;

/// Bits of byte 13 of the header.
pub mod flag {
    #![allow(missing_docs)]
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
    pub const URG: u8 = 0x20;
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum State {
    None,
    SynSent,
    SynRecv,
    Established,
    FinWait,
    CloseWait,
    LastAck,
    TimeWait,
    Close,
    /// Both ends sent a SYN.
    SynSent2,
}

impl State {
    /// The name that tools show.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::SynSent => "SYN_SENT",
            Self::SynRecv => "SYN_RECV",
            Self::Established => "ESTABLISHED",
            Self::FinWait => "FIN_WAIT",
            Self::CloseWait => "CLOSE_WAIT",
            Self::LastAck => "LAST_ACK",
            Self::TimeWait => "TIME_WAIT",
            Self::Close => "CLOSE",
            Self::SynSent2 => "SYN_SENT2",
        }
    }

    /// `enum tcp_conntrack` of uapi `linux/netfilter/nf_conntrack_tcp.h`.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// What of a segment's flags counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Syn,
    SynAck,
    Fin,
    Ack,
    Rst,
}

impl Kind {
    fn of(flags: u8) -> Option<Self> {
        Some(if flags & flag::RST != 0 {
            Self::Rst
        } else if flags & flag::SYN != 0 {
            match flags & flag::ACK {
                0 => Self::Syn,
                _ => Self::SynAck,
            }
        } else if flags & flag::FIN != 0 {
            Self::Fin
        } else if flags & flag::ACK != 0 {
            Self::Ack
        } else {
            return None;
        })
    }
}

/// What the state machine says of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    To(State),
    /// Let through, the state stays: whether it means something, the other end will tell.
    Ignore,
    Invalid,
}

fn step(kind: Kind, from: State, direction: Direction) -> Step {
    use Kind::*;
    use State::*;
    let to = match (direction, kind, from) {
        (Direction::Original, Syn, None | SynSent | TimeWait | Close) => SynSent,
        (Direction::Original, Syn, SynSent2) => SynSent2,
        (Direction::Original, Syn, _) => return Step::Ignore,
        (Direction::Original, SynAck, SynRecv | SynSent2) => SynRecv,
        (Direction::Original, SynAck, _) => return Step::Invalid,
        (Direction::Original, Ack, None) => Established,
        (Direction::Original, Ack, SynSent | SynSent2) => return Step::Invalid,
        (Direction::Original, Ack, SynRecv) => Established,

        (Direction::Reply, Syn, SynSent | SynSent2) => SynSent2,
        (Direction::Reply, Syn, TimeWait) => SynSent,
        (Direction::Reply, Syn, _) => return Step::Invalid,
        (Direction::Reply, SynAck, None) => return Step::Invalid,
        (Direction::Reply, SynAck, SynSent | SynSent2) => SynRecv,
        (Direction::Reply, SynAck, _) => return Step::Ignore,
        (Direction::Reply, Ack, SynSent | SynSent2) => return Step::Ignore,
        (Direction::Reply, Ack, SynRecv) => SynRecv,

        (_, Fin | Rst, None) | (Direction::Reply, Ack, None) => return Step::Invalid,
        (_, Fin, SynSent | SynSent2) => return Step::Invalid,
        (_, Fin, SynRecv | Established) => FinWait,
        (_, Fin, FinWait | CloseWait | LastAck) => LastAck,
        (_, Fin, TimeWait) => TimeWait,
        (_, Fin, Close) => Close,
        (_, Ack, Established) => Established,
        (_, Ack, FinWait | CloseWait) => CloseWait,
        (_, Ack, LastAck | TimeWait) => TimeWait,
        (_, Ack, Close) => Close,
        (_, Rst, _) => Close,
    };
    Step::To(to)
}

/// What is known of one end: of what it sent, and of what it may still send.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    /// Behind the last byte that it sent.
    end: u32,
    /// Behind the last byte that the other end would take.
    max_end: u32,
    /// Largest window that it offered, scaled; 0: nothing seen of it yet.
    max_win: u32,
    /// Highest acknowledgement that it sent.
    max_ack: Option<u32>,
    /// Window scale; None: it didn't offer one.
    scale: Option<u8>,
    sack_permitted: bool,
    /// It sent data that isn't acknowledged yet.
    unacknowledged: bool,
    /// It began to close.
    closing: bool,
}

/// A segment's header, host byte order.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Sequence number of its first byte.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// [`flag`].
    pub flags: u8,
    /// Window, unscaled.
    pub window: u16,
    /// Bytes of payload.
    pub payload: u32,
    /// The options' bytes.
    pub options: &'a [u8],
    /// What selective acknowledgements are too high by.
    shifted: u32,
}

impl<'a> Segment<'a> {
    /// From a TCP header and what follows it. None: cut short, or flags that no TCP sends.
    pub fn parse(tcp: &'a [u8]) -> Option<Self> {
        let header = tcp.first_chunk::<20>()?;
        let length = usize::from(header[12] >> 4) * 4;
        if length < 20 || length > tcp.len() {
            return None;
        }
        let flags = header[13];
        let word = |at: usize| {
            let bytes = tcp.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map_or(0, |bytes| u32::from_be_bytes(*bytes))
        };
        if !legal(flags) {
            return None;
        }
        Some(Self {
            seq: word(4),
            ack: word(8),
            flags,
            window: u16::from_be_bytes([header[14], header[15]]),
            payload: u32::try_from(tcp.len() - length).ok()?,
            options: tcp.get(20..length)?,
            shifted: 0,
        })
    }

    /// The same, its acknowledgements as who is acknowledged sent the numbers: a helper has shifted them by
    /// so much on their way to the sender of this segment.
    pub fn unshifted(mut self, by: i32) -> Self {
        self.shifted = by as u32;
        if self.has(flag::ACK) {
            self.ack = self.ack.wrapping_sub(self.shifted);
        }
        self
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Behind its last byte: SYN and FIN take a number each.
    fn end(&self) -> u32 {
        let marks = u32::from(self.has(flag::SYN)) + u32::from(self.has(flag::FIN));
        self.seq.wrapping_add(self.payload).wrapping_add(marks)
    }

    /// The highest byte that it says has arrived: the acknowledgement, or the right edge of a SACK block.
    fn selective(&self) -> u32 {
        let mut highest = self.ack;
        for (kind, value) in options(self.options) {
            if kind != 5 {
                continue;
            }
            for block in value.chunks_exact(8) {
                if let Some(&[_, _, _, _, a, b, c, d]) = block.first_chunk() {
                    let right = u32::from_be_bytes([a, b, c, d]).wrapping_sub(self.shifted);
                    if after(right, highest) {
                        highest = right;
                    }
                }
            }
        }
        highest
    }
}

/// Combinations of flags that occur (RFC 9293); PSH, ECE and CWR go with any.
fn legal(flags: u8) -> bool {
    use flag::*;
    const COMBINATIONS: [u8; 9] = [
        SYN,
        SYN | URG,
        SYN | ACK,
        RST,
        RST | ACK,
        FIN | ACK,
        FIN | ACK | URG,
        ACK,
        ACK | URG,
    ];
    COMBINATIONS.contains(&(flags & (SYN | ACK | FIN | RST | URG)))
}

/// Kind and value of each option, as far as they make sense.
fn options(mut rest: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        loop {
            match *rest {
                [] | [0, ..] => return None,
                [1, ref behind @ ..] => rest = behind,
                [kind, length, ..] => {
                    let length = usize::from(length).max(2);
                    let value = rest.get(2..length)?;
                    rest = rest.get(length..)?;
                    return Some((kind, value));
                }
                [_] => return None,
            }
        }
    })
}

/// The largest shift (RFC 7323, 2.3).
const MAX_SCALE: u8 = 14;

impl End {
    /// As a SYN introduces it.
    fn introduced(segment: &Segment<'_>) -> Self {
        let end = segment.end();
        let mut this = Self {
            end,
            max_end: end,
            max_win: u32::from(segment.window).max(1),
            ..Self::default()
        };
        for (kind, value) in options(segment.options) {
            match (kind, value) {
                (3, [scale]) => this.scale = Some((*scale).min(MAX_SCALE)),
                (4, []) => this.sack_permitted = true,
                _ => {}
            }
        }
        this
    }
}

#[inline]
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[inline]
fn after(a: u32, b: u32) -> bool {
    before(b, a)
}

/// How far behind an acknowledgement may be at least.
const MIN_ACK_WINDOW: u32 = 66_000;
/// Retransmissions after which a connection is taken for dead sooner.
const MAX_RETRANSMISSIONS: u8 = 3;

/// A TCP connection.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// Where it stands.
    pub state: State,
    ends: [End; 2],
    /// Segments outside the window are let through.
    pub liberal: bool,
    last: Last,
    retransmissions: u8,
}

/// The last segment, to tell repetitions and answers to what was ignored.
#[derive(Clone, Copy, Debug)]
struct Last {
    kind: Option<Kind>,
    reply: bool,
    seq: u32,
    ack: u32,
    end: u32,
    window: u16,
    /// A SYN that was ignored, with what it offered.
    ignored: Option<End>,
}

/// What becomes of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It belongs to the connection, which now lives for so many nanoseconds; None: as long as before.
    Accept {
        /// Nanoseconds from now.
        timeout: Option<u64>,
        /// The connection has proved that both ends mean it.
        assured: bool,
    },
    /// It belongs to no connection.
    Invalid,
    /// It begins a new connection where this one has ended.
    Reopen,
    /// It ends a connection that never was one: to be forgotten at once.
    Forget,
}

impl Tcp {
    /// A connection that begins with this segment. None: none does. `handle` is to be called with the
    /// same segment next.
    pub fn new(segment: &Segment<'_>) -> Option<Self> {
        let kind = Kind::of(segment.flags)?;
        let Step::To(to) = step(kind, State::None, Direction::Original) else {
            return None;
        };
        let mut ends = [End::default(); 2];
        ends[0] = End::introduced(segment);
        if to != State::SynSent {
            // Taken up in the middle: both windows are unknown, so wide.
            ends[0].max_end = ends[0].end.wrapping_add(ends[0].max_win);
            ends[0].scale = None;
        }
        Some(Self {
            state: State::None,
            ends,
            liberal: to != State::SynSent,
            last: Last {
                kind: None,
                reply: false,
                seq: 0,
                ack: 0,
                end: 0,
                window: 0,
                ignored: None,
            },
            retransmissions: 0,
        })
    }

    /// Looks at a segment of a connection, and changes it accordingly.
    pub fn handle(
        &mut self,
        direction: Direction,
        segment: &Segment<'_>,
        seen_reply: bool,
        assured: bool,
        timeouts: &Timeouts,
    ) -> Verdict {
        let Some(kind) = Kind::of(segment.flags) else {
            return Verdict::Invalid;
        };
        let mut old = self.state;
        let mut skip_window = false;
        let mut new = match step(kind, old, direction) {
            Step::Invalid => return Verdict::Invalid,
            Step::Ignore => {
                if !self.answers_ignored(kind, direction, segment) {
                    self.remember_ignored(kind, direction, segment);
                    return Verdict::Accept {
                        timeout: None,
                        assured: false,
                    };
                }
                // Both ends are in sync, though we weren't.
                old = State::SynSent;
                State::SynRecv
            }
            Step::To(new) => new,
        };
        match new {
            State::SynSent if old >= State::TimeWait => {
                let closed = self.ends.iter().any(|end| end.closing);
                let reset = self.last.kind == Some(Kind::Rst) && !self.last.reply;
                if closed || reset {
                    return Verdict::Reopen;
                }
            }
            State::Close if kind == Kind::Rst => {
                match self.judge_reset(direction, segment, seen_reply, assured) {
                    Reset::Ends => {}
                    Reset::Answers => skip_window = true,
                    Reset::Doubtful => new = old,
                    Reset::Invalid => return Verdict::Invalid,
                }
            }
            _ => {}
        }
        if !skip_window && !self.in_window(direction, kind, segment) {
            return Verdict::Invalid;
        }
        self.last.kind = Some(kind);
        self.last.reply = direction == Direction::Reply;
        self.last.ignored = None;
        self.state = new;
        if old != new && new == State::FinWait {
            self.ends[direction.index()].closing = true;
        }
        let mut timeout = self.timeout(kind, new, timeouts);
        let mut sure = false;
        if !seen_reply {
            if kind == Kind::Rst {
                // Whoever resets what nobody has answered, or answers with a reset: there is nothing.
                return Verdict::Forget;
            }
            if kind == Kind::Syn && old == State::SynSent {
                // Else who repeats SYNs could keep a mapping alive for ever.
                return Verdict::Accept {
                    timeout: None,
                    assured: false,
                };
            }
            if new == State::Established {
                timeout = timeout.min(timeouts.tcp_unacknowledged);
            }
        } else if !assured
            && matches!(old, State::SynRecv | State::Established)
            && new == State::Established
        {
            sure = true;
        }
        Verdict::Accept {
            timeout: Some(timeout),
            assured: sure,
        }
    }

    fn timeout(&self, kind: Kind, new: State, timeouts: &Timeouts) -> u64 {
        let usual = timeouts.tcp(new);
        if self.retransmissions >= MAX_RETRANSMISSIONS {
            usual.min(timeouts.tcp_retransmitted)
        } else if kind == Kind::Rst {
            timeouts.tcp(State::Close)
        } else if self.ends.iter().any(|end| end.unacknowledged) {
            usual.min(timeouts.tcp_unacknowledged)
        } else if self.last.window == 0 {
            usual.min(timeouts.tcp_retransmitted)
        } else {
            usual
        }
    }

    /// Whether a SYN|ACK answers a SYN that was ignored. Then the ends are as that SYN said.
    fn answers_ignored(&mut self, kind: Kind, direction: Direction, segment: &Segment<'_>) -> bool {
        let reply = direction == Direction::Reply;
        let Some(ignored) = self.last.ignored else {
            return false;
        };
        if kind != Kind::SynAck || self.last.reply == reply || segment.ack != self.last.end {
            return false;
        }
        self.ends[direction.other().index()] = ignored;
        self.ends[direction.index()] = End::default();
        self.last.ignored = None;
        true
    }

    fn remember_ignored(&mut self, kind: Kind, direction: Direction, segment: &Segment<'_>) {
        self.last = Last {
            kind: Some(kind),
            reply: direction == Direction::Reply,
            seq: segment.seq,
            ack: segment.ack,
            end: segment.end(),
            window: segment.window,
            ignored: (kind == Kind::Syn).then(|| End::introduced(segment)),
        };
    }

    fn judge_reset(
        &self,
        direction: Direction,
        segment: &Segment<'_>,
        seen_reply: bool,
        assured: bool,
    ) -> Reset {
        if let Some(expected) = self.ends[direction.other().index()].max_ack {
            if before(segment.seq, expected) {
                return Reset::Invalid;
            }
            let in_train = self.last.kind == Some(Kind::Ack)
                && self.last.reply == (direction == Direction::Reply)
                && segment.seq == self.last.end;
            if self.state == State::Established && segment.seq != expected && !in_train {
                // The other end will answer a guess with a challenge (RFC 5961, 3.2): wait for it.
                return Reset::Doubtful;
            }
        }
        let answers = seen_reply && self.last.kind == Some(Kind::Syn)
            || !assured && self.last.kind == Some(Kind::Ack);
        if answers && segment.ack == self.last.end {
            return Reset::Answers;
        }
        Reset::Ends
    }

    /// Whether the segment lies in the window, which it moves.
    fn in_window(&mut self, direction: Direction, kind: Kind, segment: &Segment<'_>) -> bool {
        let [original, reply] = &mut self.ends;
        let (sender, receiver) = match direction {
            Direction::Original => (original, reply),
            Direction::Reply => (reply, original),
        };
        let (mut seq, mut end) = (segment.seq, segment.end());
        let (mut ack, mut selective) = (segment.ack, segment.ack);
        let mut window = u32::from(segment.window);
        if receiver.sack_permitted {
            selective = segment.selective();
        }
        let syn = segment.has(flag::SYN);
        if sender.max_win == 0 {
            if syn {
                *sender = End::introduced(segment);
                if sender.scale.is_none() || receiver.scale.is_none() {
                    (sender.scale, receiver.scale) = (None, None);
                }
                if !segment.has(flag::ACK) {
                    // Both open at once.
                    return true;
                }
            } else {
                sender.end = end;
                let scaled = window << sender.scale.unwrap_or(0);
                sender.max_win = scaled.max(1);
                sender.max_end = end.wrapping_add(sender.max_win);
                if receiver.max_win == 0 {
                    (receiver.end, receiver.max_end) = (selective, selective);
                } else if selective == receiver.end.wrapping_add(1) {
                    // An answer to a keep-alive that we took up the connection with.
                    receiver.end = selective;
                }
            }
        } else if syn
            && after(end, sender.end)
            && (self.state == State::SynSent && direction == Direction::Original
                || self.state == State::SynRecv && direction == Direction::Reply)
        {
            // A new attempt with other numbers.
            let liberal = sender.scale;
            *sender = End::introduced(segment);
            if kind == Kind::SynAck && (liberal.is_none() || receiver.scale.is_none()) {
                sender.scale = None;
            }
        }
        let absent = !segment.has(flag::ACK)
            || segment.flags & (flag::RST | flag::ACK) == flag::RST | flag::ACK && ack == 0;
        if absent {
            (ack, selective) = (receiver.end, receiver.end);
        }
        if segment.has(flag::RST) && seq == 0 && self.state == State::SynSent {
            (seq, end) = (sender.end, sender.end);
        }
        let above = receiver.max_win == 0
            || after(
                end,
                sender.end.wrapping_sub(receiver.max_win).wrapping_sub(1),
            );
        let slack = sender.max_win.max(MIN_ACK_WINDOW);
        let inside = before(seq, sender.max_end.wrapping_add(1))
            && above
            && before(selective, receiver.end.wrapping_add(1))
            && after(selective, receiver.end.wrapping_sub(slack).wrapping_sub(1));
        if !inside {
            return self.liberal;
        }
        if !syn {
            window <<= sender.scale.unwrap_or(0);
        }
        sender.max_win = sender
            .max_win
            .max(window.wrapping_add(selective.wrapping_sub(ack)));
        if after(end, sender.end) {
            sender.end = end;
            sender.unacknowledged = true;
        }
        if segment.has(flag::ACK) && sender.max_ack.is_none_or(|max| after(ack, max)) {
            sender.max_ack = Some(ack);
        }
        if receiver.max_win != 0 && after(end, sender.max_end) {
            receiver.max_win = receiver
                .max_win
                .wrapping_add(end.wrapping_sub(sender.max_end));
        }
        let edge = selective.wrapping_add(window);
        if after(edge, receiver.max_end.wrapping_sub(1)) {
            receiver.max_end = edge.wrapping_add(u32::from(window == 0));
        }
        if ack == receiver.end {
            receiver.unacknowledged = false;
        }
        if kind == Kind::Ack {
            let reply = direction == Direction::Reply;
            let repeated = self.last.reply == reply
                && self.last.seq == seq
                && self.last.ack == ack
                && self.last.end == end
                && self.last.window == segment.window;
            if repeated {
                self.retransmissions = self.retransmissions.saturating_add(1);
            } else {
                self.retransmissions = 0;
            }
            self.last.reply = reply;
            (self.last.seq, self.last.ack, self.last.end) = (seq, ack, end);
        }
        self.last.end = end;
        self.last.window = segment.window;
        true
    }
}

enum Reset {
    /// It ends the connection.
    Ends,
    /// It answers a segment that was let through unseen.
    Answers,
    /// Its number isn't the expected one.
    Doubtful,
    Invalid,
}

#[cfg(test)]
mod model;
