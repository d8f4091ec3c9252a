//! What only the driver itself can see: its chunks, its self-test. Needs root.

use std::process::Command;

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
