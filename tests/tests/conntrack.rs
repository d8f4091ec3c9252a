//! Connection tracking with the real ovs-vswitchd: its probes, a stateful firewall, translation of
//! sources and destinations, ICMP errors through it, zones in series, and a restart.

use anyhow::{Result, ensure};
use tests::lab::{self, Lab};
use tests::traffic::{ping, ping_ok, tcp};

/// Replaces the bridge's rules.
fn rules(lab: &Lab, rules: &[&str]) -> Result<()> {
    lab.ofctl("del-flows br0")?;
    for rule in rules {
        lab.ofctl(["add-flow", "br0", rule])?;
    }
    Ok(())
}

/// a may begin connections to b, b none to a.
const FIREWALL: [&str; 8] = [
    "table=0,priority=10,arp,actions=normal",
    "table=0,priority=10,icmp6,icmp_type=135,actions=normal",
    "table=0,priority=10,icmp6,icmp_type=136,actions=normal",
    "table=0,priority=5,ip,actions=ct(table=1,zone=7)",
    "table=0,priority=5,ipv6,actions=ct(table=1,zone=7)",
    "table=1,priority=10,in_port=1,ct_state=+trk+new,ip,actions=ct(commit,zone=7,exec(load:0x5->NXM_NX_CT_MARK[])),normal",
    "table=1,priority=10,in_port=1,ct_state=+trk+new,ipv6,actions=ct(commit,zone=7,exec(load:0x5->NXM_NX_CT_MARK[])),normal",
    "table=1,priority=10,ct_state=+trk+est,ct_mark=0x5,actions=normal",
];

#[test]
fn the_probes_find_everything() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let shown = lab.appctl("dpif/show-dp-features br0")?;
        for feature in [
            "CT state: Yes",
            "CT zone: Yes",
            "CT mark: Yes",
            "CT label: Yes",
            "CT state NAT: Yes",
            "CT orig tuple: Yes",
            "CT orig tuple for IPv6: Yes",
            "Conntrack eventmask: Yes",
            "Conntrack clear: Yes",
            "Conntrack timeout policy: Yes",
            "Conntrack all-zero IP SNAT: Yes",
        ] {
            let found = shown.lines().any(|line| line.eq_ignore_ascii_case(feature));
            ensure!(found, "{feature} in {shown}");
        }
        Ok(())
    })
}

#[test]
fn a_firewall_lets_answers_pass_and_nothing_else() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        a.address("fd00::1/64")?;
        b.address("fd00::2/64")?;
        ping_ok(a.namespace(), "fd00::2")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        rules(lab, &FIREWALL)?;
        for (to, back) in [("10.1.1.2", "10.1.1.1"), ("fd00::2", "fd00::1")] {
            ping_ok(a.namespace(), to)?;
            ensure!(
                ping(b.namespace(), back, 2, "-i 0.2 -W 0.5")?.received == 0,
                "{back}"
            );
        }
        let (from, to) = (a.namespace(), b.namespace());
        tcp::echo(from, to, "10.1.1.2:7000".parse()?, 8 << 20)?;
        tcp::echo(from, to, "[fd00::2]:7000".parse()?, 8 << 20)?;
        // Datagrams in fragments are one connection's.
        let large = ping(from, "10.1.1.2", 3, "-i 0.2 -s 6000")?;
        ensure!(large.received == 3, "fragments: {large:?}");
        let large = ping(from, "fd00::2", 3, "-i 0.2 -s 6000")?;
        ensure!(large.received == 3, "IPv6 fragments: {large:?}");
        Ok(())
    })
}

#[test]
fn a_restart_of_vswitchd_keeps_connections() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        rules(lab, &FIREWALL)?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        let before = lab.status_json()?["conntrack"]["connections"].as_u64();
        ensure!(before.is_some_and(|count| count > 0), "{before:?}");
        lab.restart_vswitchd()?;
        let after = lab.status_json()?["conntrack"]["connections"].as_u64();
        ensure!(after == before, "{before:?} {after:?}");
        rules(lab, &FIREWALL)?;
        drop(b);
        ping_ok(a.namespace(), "10.1.1.2")
    })
}

#[test]
fn a_source_is_translated_and_back() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        // Nobody has the address that a is seen as: b is told who it is.
        b.neighbour("10.1.1.100", &a)?;
        rules(
            lab,
            &[
                "table=0,priority=10,arp,actions=normal",
                "table=0,priority=5,in_port=1,ip,actions=ct(commit,zone=1,nat(src=10.1.1.100:5000-5999)),2",
                "table=0,priority=5,in_port=2,ip,actions=ct(table=1,zone=1,nat)",
                "table=1,priority=10,ct_state=+trk+est,ip,actions=1",
                "table=1,priority=10,ct_state=+trk+rel,ip,actions=1",
            ],
        )?;
        tcp::echo(
            a.namespace(),
            b.namespace(),
            "10.1.1.2:7000".parse()?,
            8 << 20,
        )?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        // A closed UDP port: the error finds its way back, and says what a sent.
        let script = "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n\
            s.connect(('10.1.1.2',7999))\ns.settimeout(2)\ns.send(b'x')\n\
            try:\n  s.recv(9)\nexcept ConnectionRefusedError:\n  print('refused')";
        let said = a.namespace().exec(["python3", "-c", script])?;
        ensure!(said.contains("refused"), "{said}");
        Ok(())
    })
}

#[test]
fn a_destination_is_one_of_several() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let c = lab.host_on("br0", "c", "10.1.1.3/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        // The service's address is answered for by either.
        a.neighbour("10.1.1.50", &b)?;
        let bucket = |host: &str| {
            format!("bucket=weight=1,actions=ct(commit,zone=3,nat(dst={host}:7000),table=2)")
        };
        lab.ofctl([
            "-O",
            "OpenFlow13",
            "add-group",
            "br0",
            &format!(
                "group_id=1,type=select,{},{}",
                bucket("10.1.1.2"),
                bucket("10.1.1.3")
            ),
        ])?;
        let to = |host: &str, end: &tests::endpoint::Endpoint, port: u32| {
            format!(
                "table=2,priority=10,ip,nw_dst={host},actions=mod_dl_dst:{},{port}",
                end.mac_text()
            )
        };
        rules(
            lab,
            &[
                "table=0,priority=10,arp,actions=normal",
                "table=0,priority=6,in_port=1,ip,nw_dst=10.1.1.50,actions=ct(table=1,zone=3,nat)",
                "table=0,priority=5,ip,actions=ct(table=2,zone=3,nat)",
                "table=1,priority=10,ct_state=+trk+new,ip,actions=group:1",
                "table=1,priority=10,ct_state=+trk+est,ip,actions=resubmit(,2)",
                "table=2,priority=5,ip,actions=normal",
                &to("10.1.1.2", &b, 2),
                &to("10.1.1.3", &c, 3),
            ],
        )?;
        let serve = "import socket,sys\ns=socket.socket()\n\
            s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)\ns.bind(('0.0.0.0',7000))\n\
            s.listen(50)\nprint('up',flush=True)\nwhile True:\n  c,_=s.accept()\n  c.send(sys.argv[1].encode())\n  c.close()";
        let servers = [("b", b.namespace()), ("c", c.namespace())].map(|(name, namespace)| {
            namespace.spawn(["python3", "-c", serve, name], &lab.directory().join(name))
        });
        let ask = "import socket,time\nseen=[]\nfor n in range(40):\n  s=None\n  for t in range(50):\n    try:\n      s=socket.create_connection(('10.1.1.50',80),5)\n      break\n    except ConnectionRefusedError:\n      time.sleep(.1)\n  seen.append(s.recv(9).decode())\n  s.close()\nprint(''.join(seen))";
        let said = a.namespace().exec(["python3", "-c", ask])?;
        for server in servers {
            drop(server?);
        }
        ensure!(said.trim().len() == 40, "{said}");
        ensure!(
            said.contains('b') && said.contains('c'),
            "both serve: {said}"
        );
        Ok(())
    })
}

/// A packet passes two zones, each with its mark and label, and is answered through both.
#[test]
fn zones_in_series_keep_marks_and_labels_of_their_own() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
        rules(
            lab,
            &[
                "table=0,priority=10,arp,actions=normal",
                "table=0,priority=5,ip,actions=ct(table=1,zone=1)",
                "table=1,ct_state=+trk+new,ip,actions=ct(commit,zone=1,exec(load:0x11->NXM_NX_CT_MARK[],load:0xa1->NXM_NX_CT_LABEL[])),ct(table=2,zone=2)",
                "table=1,ct_state=+trk+est,ct_mark=0x11,ct_label=0xa1/0xff,ip,actions=ct(table=2,zone=2)",
                "table=2,in_port=1,ct_zone=2,ct_state=+trk+new,ip,actions=ct(commit,zone=2,exec(load:0x22->NXM_NX_CT_MARK[0..7])),2",
                "table=2,in_port=1,ct_zone=2,ct_state=+trk+est,ct_mark=0x22,ct_nw_dst=10.1.1.2,ct_nw_proto=6,tcp,actions=2",
                "table=2,in_port=2,ct_zone=2,ct_state=+trk+est+rpl,ct_mark=0x22,ct_nw_dst=10.1.1.2,ct_nw_proto=6,tcp,actions=1",
            ],
        )?;
        tcp::echo(
            a.namespace(),
            b.namespace(),
            "10.1.1.2:7000".parse()?,
            8 << 20,
        )
    })
}
