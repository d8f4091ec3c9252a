//! Packets that the kernel module received, forwarded, changed and showed to user space, replayed against
//! ovs-dpd through its ports: what leaves which port, byte for byte, and each upcall.
//!
//! What differs is in `tests/src/replay/differences.rs`.

use anyhow::{Context, Result};
use serde_json::Value;
use tests::corpus;
use tests::lab;
use tests::replay::laboratory;
use tests::replay::packets::Packets;
use tests::replay::translate::{HEADERS, attributes, u32_at};

fn replay(group: &str) -> Result<()> {
    lab::test_bare(|lab| {
        let mut packets = Packets::new(lab, group)?;
        for case in corpus::read(group)? {
            if case.name() == "meter-drop" {
                packets.meter(5, 1, 1)?;
            }
            packets
                .replay(group, &case)
                .with_context(|| format!("{group} {}", case.name()))?;
        }
        if group == "sem_limits" {
            limits(lab)?;
        }
        laboratory::remove_cables(lab)?;
        packets.session.conclude()
    })
}

/// Lists too many to be put off end as drops of their own reason; the limit of five levels isn't reached. A list
/// or a recirculation nests at most three levels deep before it is put off, and what was put off begins at the
/// first level again; so only a packet that came back into the datapath while it is being sent could get deeper,
/// as in the module by way of an internal port, and ours go to the host by a queue. The check is there for what
/// may be added.
fn limits(lab: &lab::Lab) -> Result<()> {
    let status = lab.status_json()?.to_string();
    anyhow::ensure!(status.contains("deferred_limit"), "{status}");
    anyhow::ensure!(!status.contains("recursion_limit"), "{status}");
    Ok(())
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
fn nesting_and_what_is_put_off() -> Result<()> {
    replay("sem_limits")
}

#[test]
fn tunnels() -> Result<()> {
    replay("sem_tunnel")
}

#[test]
fn cut_packets_and_what_is_left_to_be_looked_at() -> Result<()> {
    replay("sem_trunc")
}

#[test]
fn packets_of_user_space() -> Result<()> {
    replay("packet")
}

/// A daemon for each case, since connections outlive flows and datapaths. (What the connections themselves
/// look like is compared in the datapath's own tests.)
#[test]
fn connections() -> Result<()> {
    let group = "sem_ct";
    let cases = corpus::read(group)?;
    let mut rest = cases.as_slice();
    let mut compared = 0;
    while let Some((first, behind)) = rest.split_first() {
        // A request looks at what the case before it has left.
        let requests = behind.iter().take_while(|case| !case.request().is_empty());
        let count = 1 + requests.count();
        let (now, later) = rest.split_at(count);
        rest = later;
        if first.json().get("meta").is_some() {
            continue;
        }
        compared += count;
        lab::test_bare(|lab| {
            let mut packets = Packets::new(lab, group)?;
            for case in now {
                let name = case.name();
                if name == "ct-limit" {
                    packets.limit(9, 2)?;
                }
                packets
                    .replay(group, case)
                    .with_context(|| name.to_owned())?;
                if let Some(lines) = case.json().get("conntrack").and_then(Value::as_array) {
                    let connections = lab.status_json()?["conntrack"]["connections"].as_u64();
                    let told = lines.len() as u64;
                    anyhow::ensure!(
                        connections == Some(told),
                        "{name}: {connections:?} of {told} connections"
                    );
                }
            }
            laboratory::remove_cables(lab)?;
            packets.session.conclude()
        })?;
    }
    anyhow::ensure!(compared >= 50, "{compared} cases");
    Ok(())
}

/// Hashes aren't compared with the recordings; but one that user space tells comes back in the upcall.
#[test]
fn a_told_hash_comes_back() -> Result<()> {
    /// `OVS_PACKET_ATTR_HASH`.
    const HASH: u16 = 11;
    let told = |message: &[u8]| {
        let places = attributes(message, HEADERS, message.len());
        let place = places.into_iter().find(|place| place.kind == HASH)?;
        Some(u32_at(message, place.start + 4))
    };
    lab::test_bare(|lab| {
        let mut packets = Packets::new(lab, "packet")?;
        let cases = corpus::read("packet")?;
        let case = cases.iter().find(|case| case.name() == "hash");
        let request = case.context("no such case")?.request();
        let request = packets.session.translator.request(&request)?;
        packets.session.requester.converse(&request)?;
        let upcalls = packets.session.reader.gather(1, laboratory::PATIENCE)?;
        let upcall = upcalls.first().context("no upcall")?;
        anyhow::ensure!(told(&request).is_some_and(|hash| hash != 0));
        assert_eq!(told(upcall), told(&request));
        laboratory::remove_cables(lab)
    })
}

/// What EXECUTE's packet leads to goes to the reader that EXECUTE tells, whoever else is the port's.
#[test]
fn a_told_reader_gets_what_follows() -> Result<()> {
    /// `OVS_PACKET_ATTR_UPCALL_PID`.
    const UPCALL_PID: u16 = 12;
    lab::test_bare(|lab| {
        let mut packets = Packets::new(lab, "packet")?;
        let cases = corpus::read("packet")?;
        let case = cases.iter().find(|case| case.name() == "recirc-miss");
        let usual = case.context("no such case")?.request();
        let usual = packets.session.translator.request(&usual)?;
        let mut told = usual.clone();
        told.resize(told.len().next_multiple_of(4), 0);
        told.extend([8, 0]);
        told.extend(UPCALL_PID.to_ne_bytes());
        told.extend(packets.session.extended.port_id().to_ne_bytes());
        let len = told.len() as u32;
        told[..4].copy_from_slice(&len.to_ne_bytes());
        for (request, wanted) in [(usual, (1, 0)), (told, (0, 1))] {
            packets.session.requester.converse(&request)?;
            let session = &mut packets.session;
            session.reader.settle()?;
            session.extended.settle()?;
            // Whoever is to get it is waited for; then the other has nothing.
            let reader = session.reader.gather(wanted.0, laboratory::PATIENCE)?;
            let extended = session.extended.gather(wanted.1, laboratory::PATIENCE)?;
            assert_eq!((reader.len(), extended.len()), wanted);
        }
        laboratory::remove_cables(lab)
    })
}
