//! What clients see of a connection's ends, and may set: `IP_CT_TCP_FLAG_*` of uapi
//! `linux/netfilter/nf_conntrack_tcp.h`.

use super::{Direction, MAX_SCALE, State, Tcp};

/// It offered a window scale.
pub const WINDOW_SCALE: u8 = 0x01;
/// It takes selective acknowledgements.
pub const SACK_PERM: u8 = 0x02;
/// It began to close.
pub const CLOSE_INIT: u8 = 0x04;
/// Segments outside its window are let through.
pub const BE_LIBERAL: u8 = 0x08;
/// It sent data that isn't acknowledged yet.
pub const DATA_UNACKNOWLEDGED: u8 = 0x10;
/// It has acknowledged something.
pub const MAXACK_SET: u8 = 0x20;

impl State {
    /// By [`State::number`].
    pub fn from_number(number: u8) -> Option<Self> {
        const ALL: [State; 10] = [
            State::None,
            State::SynSent,
            State::SynRecv,
            State::Established,
            State::FinWait,
            State::CloseWait,
            State::LastAck,
            State::TimeWait,
            State::Close,
            State::SynSent2,
        ];
        ALL.get(usize::from(number)).copied()
    }
}

impl Tcp {
    /// Of the end that sends in that direction.
    pub fn flags(&self, direction: Direction) -> u8 {
        let Some(end) = self.ends.get(direction.index()) else {
            return 0;
        };
        [
            (end.scale.is_some(), WINDOW_SCALE),
            (end.sack_permitted, SACK_PERM),
            (end.closing, CLOSE_INIT),
            (self.liberal, BE_LIBERAL),
            (end.unacknowledged, DATA_UNACKNOWLEDGED),
            (end.max_ack.is_some(), MAXACK_SET),
        ]
        .into_iter()
        .fold(0, |bits, (set, bit)| if set { bits | bit } else { bits })
    }

    /// Sets those of `flags` that are in `mask`. What follows from segments alone stays as it is
    /// (DATA_UNACKNOWLEDGED, MAXACK_SET); being liberal is both ends' in one.
    pub fn set_flags(&mut self, direction: Direction, flags: u8, mask: u8) {
        let Some(end) = self.ends.get_mut(direction.index()) else {
            return;
        };
        let set = |bit: u8, value: &mut bool| {
            if mask & bit != 0 {
                *value = flags & bit != 0;
            }
        };
        set(SACK_PERM, &mut end.sack_permitted);
        set(CLOSE_INIT, &mut end.closing);
        set(BE_LIBERAL, &mut self.liberal);
        if mask & WINDOW_SCALE != 0 {
            end.scale = (flags & WINDOW_SCALE != 0).then(|| end.scale.unwrap_or(0));
        }
    }

    /// Window scale of the end that sends in that direction; 0 also if it offered none.
    pub fn scale(&self, direction: Direction) -> u8 {
        let end = self.ends.get(direction.index());
        end.and_then(|end| end.scale).unwrap_or(0)
    }

    /// Sets it, for an end that offered one: at most what RFC 7323 allows.
    pub fn set_scale(&mut self, direction: Direction, scale: u8) {
        if let Some(end) = self.ends.get_mut(direction.index())
            && end.scale.is_some()
        {
            end.scale = Some(scale.min(MAX_SCALE));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Segment, flag};
    use super::*;

    #[test]
    fn what_is_set_is_shown() {
        let syn = Segment {
            seq: 1,
            ack: 0,
            flags: flag::SYN,
            window: 1,
            payload: 0,
            options: &[3, 3, 7, 4, 2],
            shifted: 0,
        };
        let mut tcp = Tcp::new(&syn).unwrap();
        let (original, reply) = (Direction::Original, Direction::Reply);
        assert_eq!(tcp.flags(original), WINDOW_SCALE | SACK_PERM);
        assert_eq!((tcp.scale(original), tcp.flags(reply)), (7, 0));
        tcp.set_flags(original, BE_LIBERAL, BE_LIBERAL | SACK_PERM);
        assert_eq!(tcp.flags(original), WINDOW_SCALE | BE_LIBERAL);
        tcp.set_scale(original, 200);
        tcp.set_scale(reply, 3);
        assert_eq!((tcp.scale(original), tcp.scale(reply)), (MAX_SCALE, 0));
        for number in 0..10 {
            assert_eq!(State::from_number(number).unwrap().number(), number);
        }
        assert_eq!(State::from_number(10), None);
    }
}
