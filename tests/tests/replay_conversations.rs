//! Conversations with the kernel module, replayed against ovs-dpd over its socket: the same number of
//! replies, in the same order, with the same bytes; notifications and upcalls too.
//!
//! What differs is in `tests/src/replay/differences.rs`, field by field and case by case. Left out as
//! recordings: ovs-vswitchd's own (`replay_vswitchd.rs`), packets (`replay_packets.rs`,
//! `replay_upcalls.rs`).

use anyhow::{Context, Result};
use tests::corpus::{self, Case};
use tests::lab::{self, Lab};
use tests::replay::client::{self, Client};
use tests::replay::laboratory::{self, Wires};
use tests::replay::session::Session;

/// The devices of the protocol's recordings, with the indexes that they had.
const CABLES: [(char, u32); 4] = [('a', 6), ('b', 8), ('c', 10), ('d', 12)];

fn cables(lab: &Lab, session: &mut Session) -> Result<()> {
    for (end, recorded) in CABLES {
        laboratory::cable(lab, end, 1500)?;
        let ours = laboratory::ifindex(lab, &format!("v{end}"))?;
        session.translator.device(recorded, ours);
    }
    Ok(())
}

fn replay(
    groups: &[&str],
    mut before: impl FnMut(&Lab, &mut Session, &str, &Case) -> Result<bool>,
) -> Result<()> {
    lab::test_bare(|lab| {
        let mut session = Session::open(lab, groups.first().context("no group")?)?;
        cables(lab, &mut session)?;
        for group in groups {
            session.go_on(&corpus::meta(group)?);
            for case in corpus::read(group)? {
                let done = before(lab, &mut session, group, &case)
                    .with_context(|| format!("{group} {}", case.name()))?;
                if !done {
                    session
                        .replay(group, &case)
                        .with_context(|| format!("{group} {}", case.name()))?;
                }
            }
        }
        laboratory::remove_cables(lab)?;
        session.conclude()
    })
}

#[test]
fn families() -> Result<()> {
    replay(&["ctrl"], |_, _, _, _| Ok(false))
}

#[test]
fn datapaths() -> Result<()> {
    let mut unprivileged: Option<Client> = None;
    replay(&["dp"], |lab, session, group, case| {
        // `self-sub`: the requester belongs to the datapaths' group meanwhile.
        if case.name() == "self-sub-new-echo" {
            session.requester.join(0)?;
        }
        if case.name() == "priv-new" {
            session.requester.leave(0)?;
        }
        if case.name().starts_with("unpriv-") {
            if unprivileged.is_none() {
                unprivileged = Some(stranger(lab)?);
            }
            let stranger = unprivileged.as_mut().context("no client")?;
            std::mem::swap(stranger, &mut session.requester);
            let replayed = session.replay_as(group, case);
            std::mem::swap(stranger, &mut session.requester);
            replayed?;
            return Ok(true);
        }
        Ok(false)
    })
}

/// A client of a user without privileges.
fn stranger(lab: &Lab) -> Result<Client> {
    use std::os::unix::fs::PermissionsExt;
    for directory in [lab.directory(), &lab.run_dir()] {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
    }
    let netns = lab.host().inside(client::netns)??;
    let dir = lab.run_dir();
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                let nobody = rustix::process::Uid::from_raw(65_534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody)?;
                Client::connect(&dir, netns)
            })
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
}

#[test]
fn vports() -> Result<()> {
    let mut elsewhere = None;
    replay(&["vport"], |lab, session, _group, case| {
        let host = lab.host();
        match case.name() {
            "async-netdev-removed" => drop(host.ip("link del vd")?),
            "async-link-down" => drop(host.ip("link set va down")?),
            // The module hears of it at once; ours soon, by a message of the kernel.
            "async-rename" => {
                host.ip("link set va name vax")?;
                session.until("the new name", |reply| contains(reply, b"vax\0"), 1)?;
            }
            "get-va-mtu" => drop(host.ip("link set va mtu 1400")?),
            "async-move-netns" => {
                let other = tests::Namespace::new("moved")?;
                host.ip(["link", "set", "vax", "netns", other.name()])?;
                elsewhere = Some(other);
            }
            "async-move-internal" => {
                let other = elsewhere.as_ref().context("no namespace")?;
                host.ip(["link", "set", "int1", "netns", other.name()])?;
                session.until(
                    "the other namespace",
                    |reply| contains(reply, &[8, 0, 9, 0]),
                    4,
                )?;
            }
            _ => {}
        }
        Ok(false)
    })
}

fn contains(reply: &[u8], wanted: &[u8]) -> bool {
    reply.windows(wanted.len()).any(|part| part == wanted)
}

/// From 02:00:00:00:00:01 10.0.0.1:1000 to 02:00:00:00:00:02 10.0.0.2:2000, SYN and ACK, 74 bytes.
const SEGMENT: [u8; 54] = [
    2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 60, 0x12, 0x34, 0, 0, 64, 6, 0, 0, 10, 0,
    0, 1, 10, 0, 0, 2, 3, 0xe8, 7, 0xd0, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x12, 0x20, 0, 0, 0, 0, 0,
];

#[test]
fn flows_and_keys() -> Result<()> {
    let groups = ["flow_basic", "flow_keys", "flow_key_bad"];
    replay(&groups, |lab, session, group, case| {
        if group != "flow_basic" {
            flush(session, case)?;
        }
        // The recording's packets aren't in it: two before one case, one before the other.
        let packets = match (group, case.name()) {
            ("flow_basic", "s-get") => 2,
            ("flow_basic", "s-update-new") => 1,
            _ => 0,
        };
        if packets != 0 {
            let wires = Wires::open(lab, &[1, 2])?;
            let mut frame = SEGMENT.to_vec();
            frame.resize(74, 0);
            for _ in 0..packets {
                wires.send(1, &frame)?;
            }
            let came = wires.gather(packets, laboratory::PATIENCE)?;
            anyhow::ensure!(came.values().map(Vec::len).sum::<usize>() == packets);
        }
        Ok(false)
    })
}

#[test]
fn actions_meters_and_limits() -> Result<()> {
    // The meters and limits are in the same run: they are made after the flows.
    let groups = ["flow_actions", "flow_action_bad", "meter", "ct_limit"];
    replay(&groups, |_, session, group, case| {
        let alone = case.name().contains('@') || case.name() == "flow-with-meter";
        if group.starts_with("flow") || alone {
            flush(session, case)?;
        }
        Ok(false)
    })
}

/// Each flow was alone; a case `X.get` is about the flow of case `X`.
fn flush(session: &mut Session, case: &Case) -> Result<()> {
    if case.family() != "ovs_flow" || case.name().ends_with(".get") {
        return Ok(());
    }
    let ifindex = case.request().get(20..24).map(<[u8; 4]>::try_from);
    let Some(Ok(ifindex)) = ifindex else {
        return Ok(());
    };
    session.flush(u32::from_ne_bytes(ifindex))
}
