//! What only the driver itself can see: its chunks, its self-test. Needs root.

use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::port::TxRefusal;

/// Runs `what` in a network namespace of its own, with a pair of veths that are up.
fn in_namespace(what: impl FnOnce() + Send + 'static) {
    let run = || {
        #[expect(deprecated)] // the flag that makes it unsafe isn't used
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
        ip("link add v0 type veth peer name v1");
        ip("link set v0 up");
        ip("link set v1 up");
        what();
    };
    std::thread::spawn(run).join().unwrap();
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

fn open(name: &str, rung: Rung) -> AfXdp {
    let link = link::by_name(name).unwrap();
    AfXdp::open_by(&Kernel, link, &[rung]).unwrap()
}

fn send(port: &AfXdp, count: usize) -> TxOutcome {
    let mut frames = (0..count).map(|_| Frame::from_bytes(&[2; 60])).collect();
    let mut outcome = TxOutcome::default();
    port.transmit(&mut frames, &mut Pool::default(), &mut outcome);
    outcome
}

fn all_come_back(port: &AfXdp) {
    let end = Instant::now() + Duration::from_secs(2);
    while port.shared.chunks_out() != 0 {
        assert!(Instant::now() < end, "{} are out", port.shared.chunks_out());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn chunks_sent_come_back_whatever_became_of_the_frames() {
    for rung in [Rung::Native, Rung::Generic] {
        in_namespace(move || {
            let port = open("v0", rung);
            // Far more than there are chunks.
            for _ in 0..50 {
                assert_eq!(send(&port, 100).packets, 100);
            }
            all_come_back(&port);
            // Nobody there to receive.
            ip("link set v1 down");
            assert_eq!(send(&port, 100).refused_for(TxRefusal::Gone), 0);
            all_come_back(&port);
            // Down: withdrawn, more often than there are places in the ring.
            ip("link set v0 down");
            for _ in 0..50 {
                assert_eq!(send(&port, 100).refused_for(TxRefusal::Down), 100);
            }
            all_come_back(&port);
            ip("link set v0 up");
            ip("link set v1 up");
            assert_eq!(send(&port, 100).packets, 100);
            all_come_back(&port);
            ip("link del v0");
            assert_eq!(send(&port, 100).refused_for(TxRefusal::Gone), 100);
        });
    }
}

#[test]
fn unasked_it_is_taken_only_in_the_driver_of_a_device_that_has_sent_a_frame() {
    in_namespace(|| {
        let by = |name| AfXdp::open_if_proven(link::by_name(name).unwrap());
        assert_eq!(by("v0").unwrap().shared.rung, Rung::Native);
        ip("link set v0 down");
        let error = by("v0").err().unwrap();
        assert_eq!(error.errno(), libc::ENETDOWN);
        // No program in its driver.
        ip("link add br0 type bridge");
        ip("link set br0 up");
        let error = by("br0").err().unwrap();
        assert_eq!(error.errno(), libc::EOPNOTSUPP, "{error}");
        assert!(!error.to_string().contains("generic"), "{error}");
        assert_eq!(link::by_name("br0").unwrap().xdp, None);
        assert_eq!(link::by_name("br0").unwrap().promiscuity, 0);
    });
}

/// Frames from `port` until told to stop, each with its number all over; gives how many were made.
fn send_numbered(port: &AfXdp, stop: &AtomicBool, outcome: &mut TxOutcome) -> u64 {
    let (mut number, mut pool) = (0u64, Pool::default());
    while !stop.load(SeqCst) {
        let mut frames = Vec::new();
        for _ in 0..40 {
            let mut frame = pool.take(1000);
            for place in frame.space_mut()[..1000].chunks_exact_mut(8) {
                place.copy_from_slice(&number.to_be_bytes());
            }
            frame.set_len(1000);
            frames.push(frame);
            number += 1;
        }
        port.transmit(&mut frames, &mut pool, outcome);
    }
    number
}

#[test]
fn a_device_that_flaps_under_traffic_damages_duplicates_and_leaks_nothing() {
    in_namespace(|| {
        let (port, peer) = (open("v0", Rung::Native), open("v1", Rung::Native));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut outcome = TxOutcome::default();
                let made = send_numbered(&port, &stop, &mut outcome);
                assert_eq!(outcome.packets + outcome.refused_total(), made);
                assert!(outcome.refused_for(TxRefusal::Down) > 0, "{outcome:?}");
                outcome.packets
            });
            // To poll a socket makes the kernel send, beside whoever kicks it.
            scope.spawn(|| {
                let queue = port.open_queues().unwrap().remove(0);
                while !stop.load(SeqCst) {
                    let mut fds = [PollFd::new(&queue, PollFlags::IN)];
                    let timeout = Timespec {
                        tv_sec: 0,
                        tv_nsec: 50_000,
                    };
                    poll(&mut fds, Some(&timeout)).unwrap();
                }
            });
            let receiver = scope.spawn(|| {
                let mut queue = peer.open_queues().unwrap().remove(0);
                let (mut pool, mut out, mut came) = (Pool::default(), Vec::new(), 0u64);
                let mut next = 0u64;
                loop {
                    let ending = stop.load(SeqCst);
                    queue.receive(&mut pool, &mut out, 32).unwrap();
                    if out.is_empty() && ending {
                        return came;
                    }
                    for frame in out.drain(..) {
                        let (first, rest) = frame.bytes().split_first_chunk::<8>().unwrap();
                        let number = u64::from_be_bytes(*first);
                        // The stack's own, of IPv6, are shorter.
                        if frame.len() == 1000 {
                            assert!(rest.chunks_exact(8).all(|place| place == first));
                            assert!(number >= next, "{number} after {next}");
                            next = number + 1;
                            came += 1;
                        }
                        pool.put(frame);
                    }
                }
            });
            for _ in 0..40 {
                ip("link set v0 down");
                std::thread::sleep(Duration::from_millis(5));
                ip("link set v0 up");
                std::thread::sleep(Duration::from_millis(20));
            }
            stop.store(true, SeqCst);
            let (sent, came) = (sender.join().unwrap(), receiver.join().unwrap());
            assert!(came > 0 && came <= sent, "{came} of {sent} came");
        });
        all_come_back(&port);
    });
}
