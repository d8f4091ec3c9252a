//! `cargo xtask demo`: Open vSwitch, unmodified, over ovs-dpd, between network namespaces.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tests::traffic::raw::{Wire, udp4};
use tests::traffic::{iperf3, ping};
use tests::{Endpoint, Lab, Namespace, Switch, process, requirement};

use crate::{cargo, packages, say};

/// Shows it all, and removes it again, also when something fails or Ctrl-C is pressed.
///
/// # Errors
/// Something is missing, or doesn't do what it should.
pub fn demo() -> Result<()> {
    ensure!(
        requirement::root(),
        "the demo makes network namespaces: run it as root"
    );
    say::step("packages", packages::install_missing)?;
    say::step("the programs", cargo::build_programs)?;
    // From here on a signal ends the step at work; what was made is removed on the way out.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("signals")?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            process::interrupt();
        }
    });
    let lab = start()?;
    let shown = show(&lab);
    say::heading("clean-up");
    match shown {
        Ok(()) => lab.finish()?,
        Err(error) => {
            if process::interrupted() {
                println!("interrupted");
            } else {
                lab.report();
            }
            drop(lab);
            return Err(error);
        }
    }
    say::good("all of it works, and all of it is gone again");
    Ok(())
}

fn start() -> Result<Lab> {
    say::heading("ovs-dpd, ovsdb-server and ovs-vswitchd on private run directories");
    let lab = Lab::new(Switch::OvsDpd)?;
    let (host, run_dir) = (lab.host().name(), lab.run_dir().display().to_string());
    say::command(&format!(
        "ip netns exec {host} ovs-dpd run --run-dir {run_dir}"
    ));
    say::output(&lab.with_daemon(|daemon| Ok(daemon.output()))?);
    say::command(&format!(
        "ip netns exec {host} ovs-dpd exec --run-dir {run_dir} -- ovs-vswitchd unix:{}/db.sock ...",
        lab.directory().display()
    ));
    let version = lab.host().exec("ovs-vswitchd --version")?;
    say::output(version.lines().next().unwrap_or_default());
    Ok(lab)
}

fn vsctl(lab: &Lab, words: &str) -> Result<String> {
    say::command(&format!("ovs-vsctl {words}"));
    lab.vsctl(words)
}

fn show(lab: &Lab) -> Result<()> {
    say::heading("a bridge with two namespaces and an internal port");
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
    lab.internal("br0", "int0", "10.1.1.254/24")?;
    say::output(&vsctl(lab, "show")?);

    say::heading("ping");
    show_ping(a.namespace(), "a", "10.1.1.2")?;
    show_ping(a.namespace(), "a", "10.1.1.254")?;
    show_ping(lab.host(), "int0", "10.1.1.2")?;

    say::heading("TCP in both directions, with the offloads that the devices have by default");
    let features = a.namespace().exec("ethtool -k eth0")?;
    for name in ["tx-checksumming", "tcp-segmentation-offload"] {
        say::output(
            features
                .lines()
                .find(|l| l.starts_with(name))
                .unwrap_or_default(),
        );
    }
    for (text, to, address, options) in [
        ("a to b", b.namespace(), "10.1.1.2", ""),
        ("b to a", b.namespace(), "10.1.1.2", "-R"),
        ("a to int0", lab.host(), "10.1.1.254", ""),
        ("int0 to a", lab.host(), "10.1.1.254", "-R"),
    ] {
        say::command(&format!("iperf3 -c {address} -t 2 {options}"));
        let run = iperf3(lab, a.namespace(), to, address, 2, options)?;
        ensure!(run.bits_per_second > 0.0, "nothing passed from {text}");
        let gigabits = run.bits_per_second / 1e9;
        println!(
            "  {text}: {gigabits:.2} Gbit/s, {} retransmits",
            run.retransmits
        );
    }

    vlans(lab)?;
    rewriting(lab, &a, &b)?;

    say::heading("what the tools show");
    ping(a.namespace(), "10.1.1.2", 3, "")?;
    say::command("ovs-dpctl show");
    say::output(&lab.dpctl("show")?);
    say::command("ovs-dpctl dump-flows -m");
    say::output(&lab.dpctl("dump-flows -m")?);
    say::command("ovs-dpd status");
    say::output(&lab.status()?);
    Ok(())
}

fn show_ping(from: &Namespace, name: &str, to: &str) -> Result<()> {
    say::command(&format!("({name}) ping -c 5 {to}"));
    let ping = ping(from, to, 5, "")?;
    ensure!(
        ping.received == ping.sent,
        "{} of {} came back",
        ping.received,
        ping.sent
    );
    let average = ping.average_us.unwrap_or_default();
    println!(
        "  {} of {} came back, on average in {average:.0} us",
        ping.received, ping.sent
    );
    Ok(())
}

/// Two bridges with a trunk between them; tcpdump on the trunk shows the tag.
fn vlans(lab: &Lab) -> Result<()> {
    say::heading("VLANs: access ports on two bridges, and a trunk between them");
    lab.bridge("br1")?;
    let (near, far) = lab.cable("trunk")?;
    for (bridge, port) in [("br0", &near), ("br1", &far)] {
        say::command(&format!("ovs-vsctl add-port {bridge} {port} trunks=10,20"));
        lab.device(bridge, port, "trunks=10,20")?;
    }
    let mut ends = Vec::new();
    for (label, bridge, tag, address) in [
        ("c", "br0", 10, "10.2.2.1/24"),
        ("d", "br1", 10, "10.2.2.2/24"),
        ("e", "br1", 20, "10.2.2.3/24"),
    ] {
        let end = lab.endpoint(label)?;
        end.address(address)?;
        say::command(&format!(
            "ovs-vsctl add-port {bridge} {} tag={tag}",
            end.port()
        ));
        lab.port(bridge, &end, &format!("tag={tag}"))?;
        ends.push(end);
    }
    let output = lab.directory().join("trunk.out");
    let words = format!("tcpdump -l -n -e -c 2 -i {far} icmp or (vlan and icmp)");
    let mut capture = lab.host().spawn(&words, &output)?;
    capture.wait_output("listening on", Duration::from_secs(10))?;
    show_ping(ends[0].namespace(), "c", "10.2.2.2")?;
    capture.wait(Duration::from_secs(10))?;
    say::command(&words);
    let text = capture.output();
    let line = text
        .lines()
        .find(|l| l.contains("vlan 10"))
        .context("no tag on the trunk")?;
    say::output(line);
    say::command("(c) ping 10.2.2.3, in VLAN 20");
    let apart = ping(ends[0].namespace(), "10.2.2.3", 2, "-W 0.5")?;
    ensure!(apart.received == 0, "VLAN 10 reached VLAN 20");
    println!("  no answer, as it should be");
    Ok(())
}

/// A rule that changes addresses and ports; tcpdump shows what arrives.
fn rewriting(lab: &Lab, a: &Endpoint, b: &Endpoint) -> Result<()> {
    say::heading("an OpenFlow rule that rewrites headers");
    let rule = format!(
        "priority=100,udp,nw_dst=10.1.1.2,tp_dst=2000,actions=mod_nw_src:192.0.2.7,dec_ttl,\
         mod_tp_dst:2222,output:{}",
        lab.ofport(b.port())?
    );
    say::command(&format!("ovs-ofctl add-flow br0 {rule}"));
    lab.ofctl(["add-flow", "br0", &rule])?;
    let output = lab.directory().join("rewrite.out");
    let words = "tcpdump -l -n -e -vv -c 1 -i eth0 udp";
    let mut capture = b.namespace().spawn(words, &output)?;
    capture.wait_output("listening on", Duration::from_secs(10))?;
    let wire = Wire::open(a)?;
    let from = (a.mac(), [10, 1, 1, 1], 1000);
    wire.send(&udp4(from, (b.mac(), [10, 1, 1, 2], 2000), b"rewrite me")?)?;
    capture.wait(Duration::from_secs(10))?;
    println!("  a sends 10.1.1.1.1000 > 10.1.1.2.2000, ttl 64; b receives");
    say::command(words);
    let text = capture.output();
    let packet: Vec<_> = text
        .lines()
        .skip_while(|l| !l.contains("IPv4"))
        .take(2)
        .collect();
    say::output(&packet.join("\n"));
    let packet = packet.join(" ");
    for part in ["192.0.2.7.1000 > 10.1.1.2.2222", "ttl 63", "udp sum ok"] {
        ensure!(packet.contains(part), "no {part:?} in {text}");
    }
    say::command("ovs-ofctl dump-flows br0");
    say::output(&lab.ofctl("dump-flows br0")?);
    Ok(())
}
