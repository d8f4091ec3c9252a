//! Bonds between two bridges: balance-tcp with LACP, and a link that fails.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::traffic::udp::Stream;
use tests::traffic::{ping_ok, tcp};
use tests::{Lab, lab, wait};

/// br0 and br1 with two cables between them, bonded on both sides.
fn bonded(lab: &Lab, columns: &str) -> Result<()> {
    lab.bridge("br0")?;
    lab.bridge("br1")?;
    let (x0, x1) = lab.cable("x")?;
    let (y0, y1) = lab.cable("y")?;
    // Both sides start on the same cable: what comes in by a member that isn't active is dropped.
    lab.vsctl(format!(
        "add-bond br0 bond0 {x0} {y0} {columns} other_config:bond-primary={x0}"
    ))?;
    lab.vsctl(format!(
        "add-bond br1 bond1 {x1} {y1} {columns} other_config:bond-primary={x1}"
    ))?;
    Ok(())
}

fn members_enabled(lab: &Lab, bond: &str) -> Result<usize> {
    let text = lab.appctl(["bond/show", bond])?;
    Ok(text
        .lines()
        .filter(|l| l.starts_with("member ") && l.ends_with(": enabled"))
        .count())
}

#[test]
fn lacp_and_balance_tcp_spread_connections_and_survive_a_lost_link() -> Result<()> {
    lab::test(|lab| {
        // Frames that LACP's state doesn't take yet, or no more.
        lab.expect_log(
            "in transmission but all members are down",
            "the bond before LACP",
        );
        bonded(
            lab,
            "bond_mode=balance-tcp lacp=active other_config:lacp-time=fast \
             other_config:bond-rebalance-interval=1000",
        )?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br1", "b", "10.1.1.2/24")?;
        for bond in ["bond0", "bond1"] {
            wait::soon("LACP", || {
                Ok(lab
                    .appctl(["lacp/show", bond])?
                    .matches("current attached")
                    .count()
                    == 2)
            })?;
            wait::soon("both members enabled", || {
                Ok(members_enabled(lab, bond)? == 2)
            })?;
        }
        ping_ok(a.namespace(), "10.1.1.2")?;

        // Many connections, by their ports, over both members.
        let sent = |device: &str| -> Result<u64> {
            let text = lab.vsctl(["get", "interface", device, "statistics:tx_packets"])?;
            Ok(text.trim().parse()?)
        };
        let before = (sent("t-x0")?, sent("t-y0")?);
        // A bucket of hashes that was first used while LACP had let in one member only stays there until
        // Open vSwitch balances anew, so it may take some rounds.
        wait::until("both members carrying", Duration::from_secs(40), || {
            for port in 7000..7016 {
                tcp::echo(
                    a.namespace(),
                    b.namespace(),
                    ([10, 1, 1, 2], port).into(),
                    100_000,
                )?;
            }
            let flows = lab.dp_flows()?;
            ensure!(
                flows.iter().any(|f| f.contains("hash("))
                    && flows.iter().any(|f| f.contains("recirc(")),
                "balance-tcp without hash and recirculation: {flows:#?}"
            );
            // Much more than LACP's own frames, of which there is one a second.
            let after = (sent("t-x0")?, sent("t-y0")?);
            Ok((after.0 - before.0 > 100 && after.1 - before.1 > 100).then_some(()))
        })?;

        a.neighbour("10.1.1.2", &b)?;
        b.neighbour("10.1.1.1", &a)?;
        let to = "10.1.1.2:7100".parse()?;
        let stream = Stream::start(a.namespace(), b.namespace(), to, 500)?;
        stream.wait_more(100)?;
        lab.host().ip("link set t-x0 down")?;
        wait::soon("the member disabled", || {
            Ok(members_enabled(lab, "bond0")? == 1)
        })?;
        stream.wait_more(500)?;
        stream.stop()?;
        lab.host().ip("link set t-x0 up")?;
        wait::until("the member enabled again", Duration::from_secs(30), || {
            Ok((members_enabled(lab, "bond0")? == 2).then_some(()))
        })?;
        ping_ok(a.namespace(), "10.1.1.2")
    })
}

#[test]
fn an_active_backup_bond_moves_to_its_other_member() -> Result<()> {
    lab::test(|lab| {
        bonded(lab, "bond_mode=active-backup")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let _b = lab.host_on("br1", "b", "10.1.1.2/24")?;
        wait::soon("both members enabled", || {
            Ok(members_enabled(lab, "bond0")? == 2)
        })?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        for cable in ["t-x0", "t-y0"] {
            lab.host().ip(["link", "set", cable, "down"])?;
            wait::soon("the member disabled", || {
                Ok(members_enabled(lab, "bond0")? == 1)
            })?;
            wait::soon("the other side's too", || {
                Ok(members_enabled(lab, "bond1")? == 1)
            })?;
            ping_ok(a.namespace(), "10.1.1.2")?;
            lab.host().ip(["link", "set", cable, "up"])?;
            wait::soon("both enabled again", || {
                Ok(members_enabled(lab, "bond0")? == 2)
            })?;
            wait::soon("the other side's too", || {
                Ok(members_enabled(lab, "bond1")? == 2)
            })?;
        }
        Ok(())
    })
}
