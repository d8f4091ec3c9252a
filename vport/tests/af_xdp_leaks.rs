//! Many rounds of AF_XDP ports leave nothing. A program of its own, with one test, since it counts the
//! descriptors of the process. Needs root.
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Lab, test_frame};
use frame::Pool;
use vport::{AttachOptions, DriverChoice, TxOutcome, XdpMode};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn memory_pages() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Kilobytes that are pinned for the kernel's use, or locked.
fn pinned() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = |name| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        let words = line.split_whitespace().nth(1).unwrap();
        words.parse::<usize>().unwrap()
    };
    line("VmPin:") + line("VmLck:")
}

#[test]
fn a_hundred_rounds_leave_no_program_descriptor_or_memory() {
    let mut lab = Lab::new(1500);
    let mut pool = Pool::default();
    let mut before = (0, 0);
    for round in 0..100 {
        if round == 20 {
            before = (descriptors(), memory_pages());
        }
        let options = AttachOptions {
            driver: DriverChoice::AfXdp,
            xdp: if round % 2 == 0 {
                XdpMode::Native
            } else {
                XdpMode::Generic
            },
            ..AttachOptions::default()
        };
        let port = lab.switch.attach("pa", options.clone());
        let peer = lab.a.attach("eth0", options);
        let mut queues = port.open_queues().unwrap();
        for port in [&port, &peer] {
            let mut frames = (0..100).map(|_| test_frame(60, 1)).collect();
            port.transmit(&mut frames, &mut pool, &mut TxOutcome::default());
        }
        let mut frames = Vec::new();
        queues[0].receive(&mut pool, &mut frames, 10).unwrap();
        frames.into_iter().for_each(|frame| pool.put(frame));
        if round % 20 == 19 {
            // Frames are out, both ways, when the device goes.
            lab.switch.ip("link del pa");
            drop((port, peer, queues));
            lab = Lab::new(1500);
        } else if round % 3 == 0 {
            drop(port);
            drop(queues);
        }
    }
    let shown = lab.switch.ip("-d link") + &lab.a.ip("-d link");
    assert!(!shown.contains("xdp"), "{shown}");
    assert_eq!(lab.switch.link("pa").promiscuity, 0);
    assert_eq!(descriptors(), before.0, "descriptors");
    let grown = memory_pages().saturating_sub(before.1);
    assert!(grown < 512, "{grown} pages more than after 20 rounds");
    assert_eq!(pinned(), 0);
}
