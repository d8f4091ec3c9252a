//! SCTP (RFC 9260) as a bystander sees it: a state machine over chunks, and verification tags.

use super::timeout::Timeouts;
use super::tuple::Direction;

/// Where an association stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum State {
    None,
    Closed,
    CookieWait,
    CookieEchoed,
    Established,
    ShutdownSent,
    ShutdownReceived,
    ShutdownAckSent,
    HeartbeatSent,
}

impl State {
    /// The name that tools show.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Closed => "CLOSED",
            Self::CookieWait => "COOKIE_WAIT",
            Self::CookieEchoed => "COOKIE_ECHOED",
            Self::Established => "ESTABLISHED",
            Self::ShutdownSent => "SHUTDOWN_SENT",
            Self::ShutdownReceived => "SHUTDOWN_RECD",
            Self::ShutdownAckSent => "SHUTDOWN_ACK_SENT",
            Self::HeartbeatSent => "HEARTBEAT_SENT",
        }
    }

    /// `enum sctp_conntrack` of uapi `linux/netfilter/nf_conntrack_sctp.h`.
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// Types of chunks that change something.
mod chunk {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const HEARTBEAT: u8 = 4;
    pub const HEARTBEAT_ACK: u8 = 5;
    pub const ABORT: u8 = 6;
    pub const SHUTDOWN: u8 = 7;
    pub const SHUTDOWN_ACK: u8 = 8;
    pub const ERROR: u8 = 9;
    pub const COOKIE_ECHO: u8 = 10;
    pub const COOKIE_ACK: u8 = 11;
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// An association.
#[derive(Clone, Debug)]
pub struct Sctp {
    /// Where it stands.
    pub state: State,
    /// The tag that packets of each direction bear; None: not known yet.
    tags: [Option<u32>; 2],
}

impl Sctp {
    /// The tags that packets of each direction bear; 0: not known yet.
    pub fn tags(&self) -> [u32; 2] {
        self.tags.map(|tag| tag.unwrap_or(0))
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It belongs to the association, which now lives for so many nanoseconds.
    Accept {
        /// Nanoseconds from now.
        timeout: u64,
        /// Both ends mean it.
        assured: bool,
    },
    /// It belongs to none.
    Invalid,
}

/// Type, flags and value of each chunk; None for a malformed one, behind which there is none.
fn chunks(mut rest: &[u8]) -> impl Iterator<Item = Option<(u8, &[u8])>> {
    std::iter::from_fn(move || {
        let &[kind, _flags, l0, l1] = rest.first_chunk()?;
        let length = usize::from(u16::from_be_bytes([l0, l1]));
        let value = rest.get(4..length);
        rest = rest
            .get(length.next_multiple_of(4).max(4)..)
            .unwrap_or_default();
        Some(value.map(|value| (kind, value)))
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_be_bytes(*word))
}

fn step(kind: u8, from: State, direction: Direction) -> State {
    use State::*;
    let reply = direction == Direction::Reply;
    match (kind, from) {
        (chunk::INIT, None | Closed) if !reply => CookieWait,
        (chunk::INIT, HeartbeatSent) if !reply => CookieWait,
        (chunk::INIT, ShutdownSent | ShutdownReceived) if !reply => Closed,
        (chunk::INIT_ACK, Closed) if reply => CookieWait,
        (chunk::ABORT, _) => Closed,
        (chunk::SHUTDOWN, Established) if reply => ShutdownReceived,
        (chunk::SHUTDOWN, Established) => ShutdownSent,
        (chunk::SHUTDOWN_ACK, ShutdownSent | ShutdownReceived) => ShutdownAckSent,
        (chunk::ERROR, CookieEchoed) if reply => Closed,
        (chunk::COOKIE_ECHO, CookieWait) => CookieEchoed,
        (chunk::COOKIE_ACK, CookieEchoed) => Established,
        (chunk::SHUTDOWN_COMPLETE, ShutdownAckSent) => Closed,
        (chunk::HEARTBEAT, None) if !reply => HeartbeatSent,
        (chunk::HEARTBEAT_ACK, HeartbeatSent) if reply => Established,
        (_, None) => Closed,
        (_, same) => same,
    }
}

impl Sctp {
    /// An association that begins with this packet (from the common header on). `handle` is to be
    /// called with the same packet next. None: none begins so.
    pub fn new(packet: &[u8]) -> Option<Self> {
        let tag = word(packet, 4)?;
        let mut this = Self {
            state: State::None,
            tags: [None; 2],
        };
        let (kind, value) = chunks(packet.get(12..)?).next()??;
        match kind {
            chunk::INIT if tag == 0 => {
                // Its answers bear the tag that it gives.
                this.tags[Direction::Reply.index()] = Some(word(value, 0)?);
            }
            chunk::HEARTBEAT => this.tags[Direction::Original.index()] = Some(tag),
            _ => return None,
        }
        Some(this)
    }

    /// Looks at a packet of an association, and changes it accordingly.
    pub fn handle(
        &mut self,
        direction: Direction,
        packet: &[u8],
        assured: bool,
        timeouts: &Timeouts,
    ) -> Verdict {
        let (Some(tag), Some(mut rest)) = (word(packet, 4), packet.get(12..)) else {
            return Verdict::Invalid;
        };
        if rest.is_empty() {
            return Verdict::Invalid;
        }
        let own = direction.index();
        let mut state = self.state;
        let mut tags = self.tags;
        let mut seen_data = false;
        for found in chunks(std::mem::take(&mut rest)) {
            let Some((kind, value)) = found else {
                return Verdict::Invalid;
            };
            let known = tags.get(own).copied().flatten();
            let right = match kind {
                chunk::INIT => tag == 0,
                // With the T bit the tag is the peer's own (RFC 9260, 8.5.1).
                chunk::ABORT | chunk::SHUTDOWN_COMPLETE => {
                    known.is_none_or(|known| known == tag)
                        || tags.get(direction.other().index()).copied().flatten() == Some(tag)
                }
                chunk::HEARTBEAT if known.is_none() => {
                    tags[own] = Some(tag);
                    true
                }
                chunk::HEARTBEAT_ACK if known.is_none() => {
                    tags[own] = Some(tag);
                    true
                }
                _ => known.is_none_or(|known| known == tag),
            };
            if !right {
                return Verdict::Invalid;
            }
            if matches!(kind, chunk::INIT | chunk::INIT_ACK) {
                match word(value, 0) {
                    Some(peer) => tags[direction.other().index()] = Some(peer),
                    None => return Verdict::Invalid,
                }
            }
            seen_data |= kind == chunk::DATA;
            state = step(kind, state, direction);
        }
        if self.state == State::None && matches!(state, State::None | State::Closed) {
            return Verdict::Invalid;
        }
        let answered = !assured
            && direction == Direction::Reply
            && state == State::Established
            && (self.state != State::Established || seen_data);
        (self.state, self.tags) = (state, tags);
        Verdict::Accept {
            timeout: timeouts.sctp(state),
            assured: answered,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(tag: u32, kind: u8, value: &[u8]) -> Vec<u8> {
        let mut packet = vec![3, 0xe8, 7, 0xd0];
        packet.extend(tag.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend([kind, 0, 0, 4 + value.len() as u8]);
        packet.extend(value);
        packet
    }

    #[test]
    fn an_association_is_set_up_and_shut_down() {
        let timeouts = Timeouts::default();
        let (a, b) = (0xa1_u32, 0xb2_u32);
        let init = packet(0, chunk::INIT, &[&a.to_be_bytes()[..], &[0; 12]].concat());
        let mut sctp = Sctp::new(&init).unwrap();
        let mut see = |direction, packet: &[u8], state| {
            let verdict = sctp.handle(direction, packet, false, &timeouts);
            assert!(matches!(verdict, Verdict::Accept { .. }));
            assert_eq!(sctp.state, state);
        };
        let (original, reply) = (Direction::Original, Direction::Reply);
        see(original, &init, State::CookieWait);
        let answer = [&b.to_be_bytes()[..], &[0; 12]].concat();
        see(
            reply,
            &packet(a, chunk::INIT_ACK, &answer),
            State::CookieWait,
        );
        see(
            original,
            &packet(b, chunk::COOKIE_ECHO, b"abcd"),
            State::CookieEchoed,
        );
        see(
            reply,
            &packet(a, chunk::COOKIE_ACK, b""),
            State::Established,
        );
        see(
            original,
            &packet(b, chunk::SHUTDOWN, &[0; 4]),
            State::ShutdownSent,
        );
        see(
            reply,
            &packet(a, chunk::SHUTDOWN_ACK, b""),
            State::ShutdownAckSent,
        );
        see(
            original,
            &packet(b, chunk::SHUTDOWN_COMPLETE, b""),
            State::Closed,
        );
    }

    #[test]
    fn a_wrong_tag_is_invalid_and_data_begin_nothing() {
        assert!(Sctp::new(&packet(7, chunk::DATA, &[0; 16])).is_none());
        let init = packet(0, chunk::INIT, &[9; 16]);
        let mut sctp = Sctp::new(&init).unwrap();
        let timeouts = Timeouts::default();
        sctp.handle(Direction::Original, &init, false, &timeouts);
        let forged = packet(1, chunk::INIT_ACK, &[8; 16]);
        assert_eq!(
            sctp.handle(Direction::Reply, &forged, false, &timeouts),
            Verdict::Invalid
        );
    }
}
