//! ovs-vswitchd killed and started again: flows go on, and the datapath is taken over.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::traffic::udp::Stream;
use tests::traffic::{ping, ping_ok};
use tests::{Endpoint, Lab, lab};

/// Two endpoints on br0 that need no ARP, with ping flows established.
fn steady_pair(lab: &Lab) -> Result<(std::sync::Arc<Endpoint>, std::sync::Arc<Endpoint>)> {
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
    a.neighbour("10.1.1.2", &b)?;
    b.neighbour("10.1.1.1", &a)?;
    ping_ok(a.namespace(), "10.1.1.2")?;
    Ok((a, b))
}

#[test]
fn established_flows_lose_nothing_while_vswitchd_is_killed_and_it_takes_over_after() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let (a, b) = steady_pair(lab)?;
        let show = lab.dpctl("show")?;
        let to = "10.1.1.2:7000".parse()?;
        let stream = Stream::start(a.namespace(), b.namespace(), to, 2000)?;
        stream.wait_more(200)?;
        // The stream's own flow is in the datapath now.
        lab.kill_vswitchd()?;
        stream.wait_more(4000)?;
        let pinged = ping(a.namespace(), "10.1.1.2", 50, "")?;
        ensure!(pinged.received == 50, "without ovs-vswitchd: {pinged:?}");
        // Ports, and what they are called, are those of the datapath alone.
        let ports = |text: &str| -> Vec<String> {
            text.lines()
                .filter(|l| l.contains("port "))
                .map(str::to_owned)
                .collect()
        };
        ensure!(
            ports(&lab.dpctl("show")?) == ports(&show),
            "{}",
            lab.dpctl("show")?
        );
        let counts = stream.stop()?;
        ensure!(
            counts.lost() == 0,
            "while ovs-vswitchd was killed: {counts:?}"
        );

        let device = |lab: &Lab| lab.host().ip("-o link show ovs-system");
        let before = device(lab)?;
        lab.start_vswitchd()?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        ensure!(
            device(lab)? == before,
            "another datapath: {before} and {}",
            device(lab)?
        );
        ensure!(
            ports(&lab.dpctl("show")?) == ports(&show),
            "ports were renumbered"
        );
        // And it is the one that answers: a port more.
        let c = lab.host_on("br0", "c", "10.1.1.3/24")?;
        ping_ok(c.namespace(), "10.1.1.1")
    })
}

#[test]
fn vswitchd_killed_again_and_again_under_traffic_always_takes_over() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let (a, b) = steady_pair(lab)?;
        let to = "10.1.1.2:7000".parse()?;
        let stream = Stream::start(a.namespace(), b.namespace(), to, 1000)?;
        for _ in 0..5 {
            stream.wait_more(100)?;
            lab.kill_vswitchd()?;
            stream.wait_more(100)?;
            lab.start_vswitchd()?;
            ping_ok(b.namespace(), "10.1.1.1")?;
        }
        stream.wait_more(100)?;
        stream.stop()?;
        Ok(())
    })
}

#[test]
fn an_orderly_restart_keeps_established_flows() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let (a, b) = steady_pair(lab)?;
        let to = "10.1.1.2:7000".parse()?;
        let stream = Stream::start(a.namespace(), b.namespace(), to, 2000)?;
        stream.wait_more(200)?;
        lab.stop_vswitchd()?;
        stream.wait_more(1000)?;
        let counts = stream.stop()?;
        // On an orderly exit the revalidators leave the flows where they are.
        ensure!(
            counts.lost() == 0,
            "while ovs-vswitchd was stopped: {counts:?}"
        );
        lab.start_vswitchd()?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        lab.restart_vswitchd()?;
        ping_ok(a.namespace(), "10.1.1.2")
    })
}

#[test]
fn a_client_survives_the_daemon_and_the_next_daemon_serves() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.expect_log(
            "Connection reset by peer",
            "whoever asks while the daemon dies is told so",
        );
        lab.expect_log(
            "(No such file or directory)",
            "and from then on there is no such family",
        );
        let (a, _b) = steady_pair(lab)?;
        lab.with_daemon(|daemon| daemon.process().kill())?;
        // Nothing hangs: ovs-vswitchd still answers, and still ends.
        lab.appctl("version")?;
        lab.stop_vswitchd()?;
        lab.start_daemon()?;
        lab.start_vswitchd()?;
        tests::wait::until("forwarding again", Duration::from_secs(20), || {
            Ok((ping(a.namespace(), "10.1.1.2", 3, "-W 0.5")?.received == 3).then_some(()))
        })
    })
}
