//! Packets that the kernel module received, forwarded, changed and showed to user space, replayed against
//! ovs-dpd through its ports: what leaves which port, byte for byte, and each upcall.
//!
//! What differs is in `tests/src/replay/differences.rs`.

use anyhow::{Context, Result};
use tests::corpus;
use tests::lab;
use tests::replay::laboratory;
use tests::replay::packets::Packets;

fn replay(group: &str) -> Result<()> {
    lab::test_bare(|lab| {
        let mut packets = Packets::new(lab, group)?;
        for case in corpus::read(group)? {
            packets
                .replay(group, &case)
                .with_context(|| format!("{group} {}", case.name()))?;
        }
        laboratory::remove_cables(lab)?;
        packets.session.conclude()
    })
}

#[test]
fn extraction() -> Result<()> {
    replay("sem_extract")
}

#[test]
fn rewriting() -> Result<()> {
    replay("sem_rewrite")
}

#[test]
fn tags_and_layers() -> Result<()> {
    replay("sem_l2")
}

#[test]
fn other_actions() -> Result<()> {
    replay("sem_misc")
}

#[test]
fn packets_of_user_space() -> Result<()> {
    replay("packet")
}
