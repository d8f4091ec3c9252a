//! Frames in memory that was lent.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use std::sync::Mutex;

use frame::{Frame, Lender, Pool, VlanTag};

#[derive(Default)]
struct Shelf(Mutex<Vec<&'static mut [u8]>>);

impl Lender for Shelf {
    fn take_back(&self, piece: &'static mut [u8]) {
        self.0.lock().unwrap().push(piece);
    }
}

fn shelf() -> &'static Shelf {
    Box::leak(Box::default())
}

fn lend(shelf: &'static Shelf) -> Frame {
    let piece: &'static mut [u8] = Box::leak(vec![7; 1024].into_boxed_slice());
    Frame::lent(piece, 256, 60, shelf)
}

fn back(shelf: &Shelf) -> usize {
    let pieces = std::mem::take(&mut *shelf.0.lock().unwrap());
    assert!(pieces.iter().all(|piece| piece.len() == 1024));
    pieces.len()
}

#[test]
fn a_piece_goes_back_once_whichever_way_its_frame_goes() {
    let shelf = shelf();
    drop(lend(shelf));
    assert_eq!(back(shelf), 1);
    let mut pool = Pool::default();
    pool.put(lend(shelf));
    assert_eq!((back(shelf), pool.free()), (1, (0, 0)));
    // Beyond the room in front it moves to memory of its own.
    let mut frame = lend(shelf);
    frame.push_front(257).unwrap();
    assert_eq!((back(shelf), frame.len()), (1, 317));
    assert!(!frame.is_lent_by(shelf));
    drop(frame);
    assert_eq!(back(shelf), 0);
    // On another thread, and by a panic.
    let frame = lend(shelf);
    let thread = std::thread::spawn(move || {
        let _frame = frame;
        panic!("as it should");
    });
    assert!(thread.join().is_err());
    assert_eq!(back(shelf), 1);
}

#[test]
fn a_copy_is_no_loan() {
    let shelf = shelf();
    let frame = lend(shelf);
    let copies = (frame.clone(), Pool::default().copy(&frame));
    assert!(copies.0 == frame && copies.1 == frame);
    drop(copies);
    assert_eq!(back(shelf), 0);
    drop(frame);
    assert_eq!(back(shelf), 1);
}

#[test]
fn a_lent_frame_changes_in_place_and_its_lender_can_have_it_as_it_is() {
    let (mine, other) = (shelf(), shelf());
    let mut frame = lend(mine);
    frame.vlan = Some(VlanTag {
        tpid: 0x8100,
        tci: 5,
    });
    frame.push_tag_inband().unwrap();
    assert_eq!((frame.len(), frame.headroom(), back(mine)), (64, 252, 0));
    let frame = frame.into_lent(other).unwrap_err();
    assert_eq!(frame.len(), 64);
    let (piece, start, end) = frame.into_lent(mine).unwrap();
    assert_eq!((piece.len(), start, end), (1024, 252, 316));
    assert_eq!(piece[252 + 12..252 + 16], [0x81, 0, 0, 5]);
    assert_eq!((back(mine), back(other)), (0, 0));
    // Nothing was lent.
    assert!(Frame::from_bytes(&[1; 60]).into_lent(mine).is_err());
}

#[test]
fn what_is_not_in_the_piece_is_not_the_frames() {
    let shelf = shelf();
    for (start, len, expected) in [(1020, 60, 4), (2000, 1, 0), (usize::MAX, usize::MAX, 0)] {
        let piece: &'static mut [u8] = Box::leak(vec![7; 1024].into_boxed_slice());
        let frame = Frame::lent(piece, start, len, shelf);
        assert_eq!((frame.len(), frame.bytes().len()), (expected, expected));
    }
}
