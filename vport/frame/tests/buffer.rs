//! A frame against a plain vector, under every operation and with absurd arguments.

use frame::{Frame, FrameError, MAX_LEN, PartialChecksum, Pool, VlanTag};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// Bytes with a mark on each, so that what the checksum's start points at can be followed.
#[derive(Clone)]
struct Model {
    bytes: Vec<(u8, bool)>,
}

impl Model {
    fn mark(&self) -> Option<usize> {
        self.bytes.iter().position(|(_, marked)| *marked)
    }
}

fn check(frame: &Frame, model: &Model) {
    assert_eq!(frame.len(), model.bytes.len());
    assert_eq!(frame.is_empty(), model.bytes.is_empty());
    assert!(
        frame
            .bytes()
            .iter()
            .eq(model.bytes.iter().map(|(byte, _)| byte))
    );
    if let Some(csum) = frame.offload.csum {
        assert_eq!(
            Some(usize::from(csum.start)),
            model.mark(),
            "points at another byte"
        );
        assert!(
            csum.field() + 2 <= frame.len(),
            "{csum:?} outside of {} bytes",
            frame.len()
        );
    }
}

#[test]
fn operations_are_those_of_a_vector() {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut pool = Pool::new(8);
    let mut kept_checksums = 0;
    for _ in 0..3000 {
        let len = rng.random_range(0..300);
        let mut bytes = vec![0; len];
        rng.fill_bytes(&mut bytes);
        let mut frame = pool.take(if rng.random() { len } else { 5000 });
        frame.space_mut()[..len].copy_from_slice(&bytes);
        frame.set_len(len);
        let mut model = Model {
            bytes: bytes.iter().map(|byte| (*byte, false)).collect(),
        };
        if len >= 8 {
            let start = rng.random_range(0..=len - 8);
            model.bytes[start].1 = true;
            frame.offload.csum = Some(PartialChecksum {
                start: start as u16,
                offset: 6,
            });
        }
        for _ in 0..rng.random_range(1..20) {
            let at = rng.random_range(0..=frame.len() + 3);
            let n = match rng.random_range(0..20) {
                0 => usize::MAX,
                1 => rng.random_range(0..1000),
                _ => rng.random_range(0..24),
            };
            match rng.random_range(0..6) {
                0 => {
                    let done = frame.push_front(n).map(|gap| gap.fill(7));
                    assert_eq!(done.is_ok(), n < MAX_LEN);
                    if done.is_ok() {
                        model.bytes.splice(0..0, vec![(7, false); n]);
                    }
                }
                1 => {
                    if frame.pull_front(n).is_ok() {
                        model.bytes.drain(..n);
                    } else {
                        assert!(n > frame.len());
                    }
                }
                2 => {
                    let new = vec![9; n.min(2000)];
                    if frame.insert(at, &new).is_ok() {
                        model
                            .bytes
                            .splice(at..at, new.iter().map(|byte| (*byte, false)));
                    } else {
                        assert!(at > frame.len());
                    }
                }
                3 => {
                    if frame.remove(at, n).is_ok() {
                        model.bytes.drain(at..at + n);
                    } else {
                        assert!(at.saturating_add(n) > frame.len());
                    }
                }
                4 => {
                    frame.truncate(n);
                    model.bytes.truncate(n);
                }
                _ => {
                    let copy = pool.copy(&frame);
                    assert!(copy == frame && copy == frame.clone());
                    pool.put(std::mem::replace(&mut frame, copy));
                }
            }
            check(&frame, &model);
        }
        kept_checksums += usize::from(frame.offload.csum.is_some());
        pool.put(frame);
    }
    assert!(
        kept_checksums > 500,
        "only {kept_checksums} requests for a checksum survived"
    );
    let (small, large) = pool.free();
    assert!((1..=8).contains(&small) && large == 1, "{small} {large}");
}

#[test]
fn a_buffer_is_used_again_as_it_is() {
    let mut pool = Pool::new(8);
    let mut frame = pool.large();
    assert_eq!(frame.space_mut().len(), MAX_LEN);
    frame.space_mut().fill(0xab);
    frame.set_len(100);
    frame.vlan = Some(VlanTag {
        tpid: 0x8100,
        tci: 5,
    });
    let place = frame.bytes().as_ptr();
    pool.put(frame);
    let mut again = pool.large();
    assert!(again.is_empty() && again.vlan.is_none());
    // Not zeroed: that would cost more than the rest of a receive.
    assert_eq!(again.space_mut()[MAX_LEN - 1], 0xab);
    again.set_len(1);
    assert_eq!(again.bytes().as_ptr(), place);
    again.set_len(usize::MAX);
    assert_eq!(again.len(), MAX_LEN);
}

#[test]
fn a_frame_has_a_longest_length() {
    let mut frame = Frame::from_bytes(&vec![1; MAX_LEN + 1]);
    assert_eq!(frame.len(), MAX_LEN);
    assert_eq!(frame.push_front(1), Err(FrameError::TooLong));
    assert_eq!(frame.insert(5, &[1]), Err(FrameError::TooLong));
    frame.vlan = Some(VlanTag {
        tpid: 0x8100,
        tci: 5,
    });
    assert_eq!(frame.push_tag_inband(), Err(FrameError::TooLong));
    assert!(frame.vlan.is_some() && frame.len() == MAX_LEN);
}

proptest! {
    #[test]
    fn a_tag_goes_in_and_out(
        bytes in prop::collection::vec(any::<u8>(), 14..100),
        tpid in prop::sample::select(vec![0x8100, 0x88a8]),
        tci in any::<u16>(),
        start in 14u16..40,
    ) {
        let mut frame = Frame::from_bytes(&bytes);
        let tag = VlanTag { tpid, tci };
        frame.vlan = Some(tag);
        frame.offload.csum = Some(PartialChecksum { start, offset: 6 });
        let before = frame.clone();
        frame.push_tag_inband().unwrap();
        prop_assert_eq!(frame.len(), bytes.len() + 4);
        prop_assert_eq!(&frame.bytes()[12..16], &tag.to_bytes());
        prop_assert_eq!(frame.offload.csum, Some(PartialChecksum { start: start + 4, offset: 6 }));
        prop_assert!(frame.pop_tag_outofband());
        prop_assert_eq!(&frame, &before);
        prop_assert!(!frame.pop_tag_outofband());
    }
}
