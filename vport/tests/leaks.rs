//! Many rounds of opening and closing leave nothing. A program of its own, with one test, since it
//! counts the descriptors of the process. Needs root.
#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{Lab, test_frame};
use frame::Pool;
use vport::{AttachOptions, HideChoice, InternalOptions, TxOutcome, create_internal};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn memory_pages() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn two_hundred_rounds_leave_no_descriptor_device_filter_or_memory() {
    let lab = Lab::new(1500);
    let mut pool = Pool::default();
    let mut before = (0, 0);
    for round in 0..200 {
        if round == 20 {
            before = (descriptors(), memory_pages());
        }
        let hide = if round % 2 == 0 {
            HideChoice::Auto
        } else {
            HideChoice::Nftables
        };
        let port = lab.switch.attach(
            "pa",
            AttachOptions {
                hide,
                ..AttachOptions::default()
            },
        );
        let options = InternalOptions {
            force_veth: round % 3 == 0,
            ..InternalOptions::default()
        };
        let internal = lab
            .switch
            .run(move || create_internal("int0", &options).unwrap());
        for port in [&port, &internal] {
            let mut queues = port.open_queues().unwrap();
            let mut frames = Vec::new();
            queues[0].receive(&mut pool, &mut frames, 32).unwrap();
            let mut tagged = test_frame(1514, 1);
            tagged.vlan = Some(frame::VlanTag {
                tpid: 0x88a8,
                tci: 1,
            });
            let mut frames = vec![test_frame(60, 1), tagged];
            port.transmit(&mut frames, &mut pool, &mut TxOutcome::default());
            if round % 5 == 0 {
                lab.switch.ip("link del int0");
            }
            if round % 5 == 0 {
                break;
            }
        }
    }
    assert_eq!(descriptors(), before.0, "descriptors");
    let grown = memory_pages().saturating_sub(before.1);
    assert!(grown < 512, "{grown} pages more than after 20 rounds");
    let links = lab.switch.run(|| vport::link::all().unwrap());
    assert_eq!(links.len(), 3, "{links:?}");
    assert_eq!(lab.switch.link("pa").promiscuity, 0);
    assert_eq!(lab.switch.command("nft list tables"), "");
}
