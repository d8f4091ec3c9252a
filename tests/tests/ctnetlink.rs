//! ctnetlink with the real Open vSwitch: its tools show and change the daemon's connections, and not the
//! host's; the other users of netfilter reach the kernel.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::Endpoint;
use tests::lab::{self, Lab};
use tests::traffic::{ping_ok, tcp};
use tests::wait;

/// Zone 7 for IPv4, zone 8 for IPv6; b's answers are tracked too.
const RULES: [&str; 5] = [
    "priority=10,arp,actions=normal",
    "priority=10,icmp6,icmp_type=135,actions=normal",
    "priority=10,icmp6,icmp_type=136,actions=normal",
    "priority=5,ip,actions=ct(commit,zone=7,exec(load:0x5->NXM_NX_CT_MARK[],load:0x9->NXM_NX_CT_LABEL[0..31])),normal",
    "priority=5,ipv6,actions=ct(commit,zone=8),normal",
];

/// One connection each of TCP, ICMP and ICMPv6, that the endpoint begins.
fn connections(lab: &Lab) -> Result<Arc<Endpoint>> {
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
    a.address("fd00::1/64")?;
    b.address("fd00::2/64")?;
    ping_ok(a.namespace(), "fd00::2")?;
    lab.ofctl("del-flows br0")?;
    for rule in RULES {
        lab.ofctl(["add-flow", "br0", rule])?;
    }
    ping_ok(a.namespace(), "10.1.1.2")?;
    ping_ok(a.namespace(), "fd00::2")?;
    let to = "10.1.1.2:7000".parse()?;
    tcp::echo(a.namespace(), b.namespace(), to, 1000)?;
    Ok(a)
}

/// The lines of a dump, each of which begins with its protocol.
fn dump(lab: &Lab, options: &str) -> Result<Vec<String>> {
    let shown = lab.appctl(format!("dpctl/dump-conntrack {options}").as_str())?;
    Ok(shown.lines().map(str::to_owned).collect())
}

fn line<'d>(dump: &'d [String], protocol: &str) -> Result<&'d str> {
    let prefix = format!("{protocol},");
    let line = dump.iter().find(|line| line.starts_with(&prefix));
    line.map(String::as_str)
        .with_context(|| format!("{protocol} in {dump:#?}"))
}

#[test]
fn connections_are_shown() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        connections(lab)?;
        let all = dump(lab, "-m -s")?;
        let tcp = line(&all, "tcp")?;
        for part in [
            "orig=(src=10.1.1.1,dst=10.1.1.2,sport=",
            ",dport=7000,packets=",
            "reply=(src=10.1.1.2,dst=10.1.1.1,sport=7000,dport=",
            "zone=7",
            "status=SEEN_REPLY|ASSURED|CONFIRMED",
            "timeout=",
            "mark=5",
            "labels=0x9",
            "id=",
            "state_orig=TIME_WAIT",
            "wscale_orig=",
            "flags_orig=WINDOW_SCALE|SACK_PERM|CLOSE_INIT",
        ] {
            ensure!(tcp.contains(part), "{part} in {tcp}");
        }
        let icmp = line(&all, "icmp")?;
        ensure!(icmp.contains("type=8,code=0") && icmp.contains("type=0,code=0"));
        let icmpv6 = line(&all, "icmpv6")?;
        ensure!(icmpv6.contains("src=fd00::1,dst=fd00::2") && icmpv6.contains("zone=8"));
        ensure!(icmpv6.contains("type=128,code=0") && icmpv6.contains("type=129,code=0"));

        // One zone; the program beside ovs-vswitchd sees the same.
        let eight = dump(lab, "zone=8")?;
        ensure!(eight.len() == 1, "{eight:#?}");
        ensure!(dump(lab, "zone=9")?.is_empty());
        ensure!(lab.dpctl("dump-conntrack zone=8")? == format!("{}\n", eight[0]));
        let counts = lab.appctl("dpctl/ct-stats-show")?;
        for part in ["Total: 3", "TCP: 1", "ICMP: 1"] {
            ensure!(counts.contains(part), "{part} in {counts}");
        }
        let counts = lab.dpctl("ct-stats-show zone=7 -m")?;
        ensure!(
            counts.contains("Total: 2") && counts.contains("TIME_WAIT]=1"),
            "{counts}"
        );
        let limits = lab.appctl("dpctl/ct-get-limits zone=7")?;
        ensure!(limits.contains("zone=7,limit=0,count=2"), "{limits}");
        Ok(())
    })
}

#[test]
fn connections_are_flushed() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let a = connections(lab)?;
        // By tuple: nothing else goes.
        let wrong = "flush-conntrack zone=7 ct_nw_src=10.1.1.9,ct_nw_dst=10.1.1.2,ct_nw_proto=6,ct_tp_src=1,ct_tp_dst=7000";
        ensure!(!lab.try_dpctl(wrong)?.status.success());
        let tcp = line(&dump(lab, "")?, "tcp")?.to_owned();
        let port = tcp
            .split_once("sport=")
            .and_then(|(_, rest)| rest.split_once(','))
            .context("a port")?
            .0
            .to_owned();
        lab.appctl([
            "dpctl/flush-conntrack",
            "zone=7",
            &format!("ct_nw_src=10.1.1.1,ct_nw_dst=10.1.1.2,ct_nw_proto=6,ct_tp_src={port},ct_tp_dst=7000"),
        ])?;
        let left = dump(lab, "")?;
        ensure!(left.len() == 2 && line(&left, "tcp").is_err(), "{left:#?}");
        // By zone, from OpenFlow.
        lab.ofctl("ct-flush-zone br0 8")?;
        wait::soon("zone 8 flushed", || {
            Ok(line(&dump(lab, "")?, "icmpv6").is_err())
        })?;
        line(&dump(lab, "")?, "icmp")?;
        lab.appctl("dpctl/flush-conntrack zone=7")?;
        ensure!(dump(lab, "")?.is_empty());
        // All, by a program of its own.
        let status = |lab: &Lab| -> Result<Option<u64>> {
            Ok(lab.status_json()?["conntrack"]["connections"].as_u64())
        };
        ping_ok(a.namespace(), "10.1.1.2")?;
        ensure!(status(lab)? == Some(1));
        lab.dpctl("flush-conntrack")?;
        ensure!(status(lab)? == Some(0));
        Ok(())
    })
}

#[test]
fn a_zones_timeouts_are_kept() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let _b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        lab.vsctl("-- --id=@dp create Datapath datapath_version=0 -- set Open_vSwitch . datapaths:system=@dp")?;
        lab.vsctl("add-zone-tp system zone=7 icmp_first=3 icmp_reply=3 udp_first=2")?;
        lab.ofctl("del-flows br0")?;
        for rule in &RULES[..4] {
            lab.ofctl(["add-flow", "br0", rule])?;
        }
        let icmp = |zone: &str| -> Result<u32> {
            let all = dump(lab, &format!("-s {zone}"))?;
            let left = line(&all, "icmp")?.split("timeout=").nth(1);
            let left = left.and_then(|rest| rest.split(',').next());
            Ok(left.context("a timeout")?.parse()?)
        };
        ping_ok(a.namespace(), "10.1.1.2")?;
        let left = icmp("zone=7")?;
        ensure!(left <= 3, "{left} s left");
        wait::until("the connection's end", Duration::from_secs(9), || {
            Ok(dump(lab, "")?.is_empty().then_some(()))
        })?;
        // Without the policy it's the default's thirty seconds.
        lab.vsctl("del-zone-tp system zone=7")?;
        wait::soon("the default's timeout", || {
            ping_ok(a.namespace(), "10.1.1.2")?;
            Ok(icmp("zone=7")? > 20)
        })
    })
}

#[test]
fn the_hosts_table_is_neither_shown_nor_changed() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        connections(lab)?;
        let host = lab.host();
        let count = || -> Result<u32> {
            let count = host.exec("cat /proc/sys/net/netfilter/nf_conntrack_count")?;
            Ok(count.trim().parse()?)
        };
        // The kernel tracks what the host says to itself; nft is run under exec, and reaches it.
        lab.under_exec("nft add table inet watch")?.ok()?;
        let chain = "add chain inet watch out { type filter hook output priority 0 ; }";
        lab.under_exec(["nft", chain])?.ok()?;
        lab.under_exec(["nft", "add rule inet watch out ct state new counter"])?
            .ok()?;
        ensure!(host.exec("nft list ruleset")?.contains("watch"));
        let ruleset = lab.under_exec("nft list ruleset")?.ok()?;
        ensure!(ruleset.contains("ct state new counter"), "{ruleset}");
        host.exec("ping -c 1 127.0.0.1")?;
        ensure!(count()? > 0);
        let shown = lab.dpctl("dump-conntrack")?;
        ensure!(!shown.contains("127.0.0.1"), "{shown}");
        lab.dpctl("flush-conntrack")?;
        lab.appctl("dpctl/flush-conntrack")?;
        ensure!(dump(lab, "")?.is_empty());
        ensure!(count()? > 0, "the host's connections stay");
        lab.under_exec("nft delete table inet watch")?.ok()?;
        Ok(())
    })
}

#[test]
fn who_may_not_change_sees_nothing() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        connections(lab)?;
        for command in ["dump-conntrack", "flush-conntrack"] {
            let ran = lab.under_exec([
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "ovs-dpctl",
                command,
            ])?;
            let refused = ran.stderr.contains("Operation not permitted");
            ensure!(!ran.status.success() && refused, "{ran:?}");
            ensure!(ran.stdout.is_empty(), "{ran:?}");
        }
        ensure!(dump(lab, "")?.len() == 3);
        Ok(())
    })
}

/// An independent decoder: conntrack-tools.
#[test]
fn conntrack_tools_agree() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        connections(lab)?;
        let conntrack = |words: &str| -> Result<String> {
            lab.under_exec(format!("conntrack {words}").as_str())?.ok()
        };
        let shown = conntrack("-L -o extended,id")?;
        for part in [
            "ipv4     2 tcp      6 ",
            " TIME_WAIT src=10.1.1.1 dst=10.1.1.2 ",
            "[ASSURED] mark=5 ",
            "zone=7 use=1 id=",
            "type=8 code=0",
        ] {
            ensure!(shown.contains(part), "{part} in {shown}");
        }
        let six = conntrack("-L -f ipv6")?;
        ensure!(six.contains("src=fd00::1 dst=fd00::2 type=128"), "{six}");
        ensure!(conntrack("-C")?.trim() == "3");
        ensure!(conntrack("-S")?.contains("insert_failed=0"));
        // Filters of the other side's: by address and port, by mark, by zone.
        ensure!(
            conntrack("-L -p tcp -s 10.1.1.1 --dport 7000")?
                .lines()
                .count()
                == 1
        );
        ensure!(conntrack("-L -p tcp --dport 7001")?.is_empty());
        ensure!(conntrack("-L -m 5/0xf")?.lines().count() == 2);
        ensure!(conntrack("-L -w 8 -f ipv6")?.lines().count() == 1);
        ensure!(conntrack("-L expect")?.is_empty());
        // Deleted by what is shown, by a mark, and all.
        conntrack("-D -p icmp -w 7")?;
        ensure!(conntrack("-C")?.trim() == "2");
        conntrack("-F")?;
        ensure!(conntrack("-C")?.trim() == "0");
        Ok(())
    })
}
