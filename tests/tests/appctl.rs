//! What ovs-vswitchd says about its datapath by `ovs-appctl`.

use anyhow::{Context, Result, ensure};
use tests::traffic::ping_ok;
use tests::{Lab, Switch, lab};

fn two_on_a_bridge(lab: &Lab) -> Result<std::sync::Arc<tests::Endpoint>> {
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    lab.host_on("br0", "b", "10.1.1.2/24")?;
    Ok(a)
}

#[test]
fn upcalls_and_revalidators_report_their_flows() -> Result<()> {
    lab::test(|lab| {
        let a = two_on_a_bridge(lab)?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        lab.appctl("revalidator/wait")?;
        let text = lab.appctl("upcall/show")?;
        let current = text
            .lines()
            .find_map(|l| {
                l.split("(current ")
                    .nth(1)?
                    .split(')')
                    .next()?
                    .parse::<u32>()
                    .ok()
            })
            .with_context(|| format!("no count of flows in\n{text}"))?;
        ensure!((2..20).contains(&current), "{current} flows:\n{text}");
        ensure!(text.contains("ufid enabled : true"), "{text}");
        lab.appctl("revalidator/purge")?;
        ensure!(
            lab.dp_flows()?.is_empty(),
            "after revalidator/purge: {:#?}",
            lab.dp_flows()?
        );
        ping_ok(a.namespace(), "10.1.1.2")
    })
}

#[test]
fn dpctl_commands_of_the_daemon_agree_with_ovs_dpctl() -> Result<()> {
    lab::test(|lab| {
        let a = two_on_a_bridge(lab)?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        let dp = lab.switch().datapath();
        ensure!(lab.appctl("dpctl/dump-dps")?.contains(dp));
        let show = lab.appctl("dpctl/show")?;
        for port in ["br0", "v-a", "v-b"] {
            ensure!(show.contains(&format!(": {port}")), "no {port}:\n{show}");
        }
        let ports = |text: &str| text.lines().filter(|l| l.contains("port ")).count();
        ensure!(ports(&show) == ports(&lab.dpctl(["show", dp])?), "{show}");
        let flows = lab.appctl(["dpctl/dump-flows", dp])?;
        ensure!(flows.contains("actions:"), "no flows: {flows}");
        let of_type = |kind: &str| lab.appctl(["dpctl/dump-flows", dp, kind]);
        ensure!(of_type("type=ovs")?.contains("actions:") || lab.switch() == Switch::Netdev);
        ensure!(
            of_type("type=offloaded")?.trim().is_empty(),
            "offloaded to what?"
        );
        let of_bridge = lab.appctl("dpif/dump-flows br0")?;
        ensure!(of_bridge.contains("actions:"), "no flows: {of_bridge}");
        let show = lab.appctl("dpif/show")?;
        ensure!(
            show.contains("br0 65534/") && show.contains("v-a 1/"),
            "{show}"
        );
        lab.appctl(["dpctl/del-flows", dp])?;
        Ok(())
    })
}

/// What `dpif/show-dp-features` of ovs-vswitchd 3.1 prints over Linux 6.1's module, all of it.
const FEATURES: &str = "\
Masked set action: Yes
Tunnel push pop: No
Ufid: Yes
Truncate action: Yes
Clone action: Yes
Sample nesting: 10
Conntrack eventmask: Yes
Conntrack clear: Yes
Max dp_hash algorithm: 0
Check pkt length action: Yes
Conntrack timeout policy: Yes
Explicit Drop action: No
Optimized Balance TCP mode: No
Conntrack all-zero IP SNAT: Yes
MPLS Label add: Yes
Max VLAN headers: 2
Max MPLS depth: 3
Recirc: Yes
CT state: Yes
CT zone: Yes
CT mark: Yes
CT label: Yes
CT state NAT: Yes
CT orig tuple: Yes
CT orig tuple for IPv6: Yes
IPv6 ND Extension: No";

#[test]
fn probed_features_are_those_of_the_module() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let text = lab.appctl("dpif/show-dp-features br0")?;
        ensure!(text.trim() == FEATURES, "not as over the module:\n{text}");
        Ok(())
    })
}

#[test]
fn the_cache_of_masks_is_read_and_set() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let a = two_on_a_bridge(lab)?;
        let dp = lab.switch().datapath();
        let size = |wanted: u32| -> Result<()> {
            let line = format!("masks-cache: size:{wanted}");
            for text in [
                lab.appctl("dpctl/cache-get-size")?,
                lab.dpctl("cache-get-size")?,
                lab.dpctl(["show", dp])?,
            ] {
                ensure!(text.lines().any(|l| l.trim() == line), "no {line}:\n{text}");
            }
            Ok(())
        };
        size(256)?;
        // Open vSwitch asks for the next power of two.
        for (asked, got) in [("512", 512), ("300", 512), ("0", 0), ("4096", 4096)] {
            lab.dpctl(["cache-set-size", dp, "masks-cache", asked])?;
            size(got)?;
            ping_ok(a.namespace(), "10.1.1.2")?;
        }
        for (words, message) in [
            (["masks-cache", "8192"], "Numerical result out of range"),
            (["nosuch", "256"], "not found"),
        ] {
            let ran = lab.try_dpctl(["cache-set-size", dp, words[0], words[1]])?;
            ensure!(
                !ran.status.success() && ran.stderr.contains(message),
                "{words:?}: {}{}",
                ran.stdout,
                ran.stderr
            );
        }
        size(4096)
    })
}

#[test]
fn pings_pass_through_many_purges_of_all_flows() -> Result<()> {
    lab::test(|lab| {
        let a = two_on_a_bridge(lab)?;
        for _ in 0..10 {
            ping_ok(a.namespace(), "10.1.1.2")?;
            lab.appctl("revalidator/purge")?;
        }
        if lab.switch() == Switch::OvsDpd {
            let text = lab.dpctl("show")?;
            ensure!(
                text.contains("flows: 0") || lab.dp_flows()?.len() < 10,
                "{text}"
            );
        }
        Ok(())
    })
}
