//! Policies over connections with the real ovs-vswitchd: limits of zones, marks and labels that follow a
//! change of mind, OVN's pipeline, UDP in fragments, and a restart under an open connection.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::endpoint::Endpoint;
use tests::lab::{self, Lab};
use tests::traffic::{ping, ping_ok, tcp, whoami};

/// How long an answer may take where one is expected.
const SOON: Duration = Duration::from_secs(5);
/// How long is waited where none is.
const NEVER: Duration = Duration::from_millis(300);

/// Replaces the bridge's rules.
fn rules(lab: &Lab, rules: &[&str]) -> Result<()> {
    lab.ofctl("del-flows br0")?;
    for rule in rules {
        lab.ofctl(["add-flow", "br0", rule])?;
    }
    Ok(())
}

/// A bridge with a at port 1 and b at port 2.
fn two(lab: &Lab) -> Result<(Arc<Endpoint>, Arc<Endpoint>)> {
    lab.bridge("br0")?;
    let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
    let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
    ensure!(lab.ofport(a.port())? == 1, "the rules name port 1");
    Ok((a, b))
}

fn address(text: &str) -> Result<SocketAddr> {
    text.parse().with_context(|| text.to_owned())
}

fn counted(lab: &Lab, what: &str) -> Result<u64> {
    let status = lab.status_json()?;
    let count = status["conntrack"][what].as_u64();
    count.with_context(|| format!("no {what} in {}", status["conntrack"]))
}

/// Waits until the bridge's rules have been looked at again by whoever revalidates flows.
fn revalidated(lab: &Lab) -> Result<()> {
    lab.appctl("revalidator/wait")?;
    Ok(())
}

/// `zone=ZONE,limit=LIMIT,count=COUNT` of `ct-get-limits`.
fn limits(lab: &Lab) -> Result<String> {
    lab.appctl("dpctl/ct-get-limits zone=4,5,6")
}

#[test]
fn a_zone_takes_as_many_connections_as_its_limit() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let (a, b) = two(lab)?;
        rules(
            lab,
            &[
                "table=0,priority=10,arp,actions=normal",
                "table=0,priority=5,in_port=1,udp,tp_dst=7005,actions=ct(commit,zone=5),2",
                "table=0,priority=5,in_port=1,udp,tp_dst=7006,actions=ct(commit,zone=6),2",
                "table=0,priority=5,in_port=1,udp,tp_dst=7004,actions=ct(commit,zone=4),2",
                "table=0,priority=5,in_port=2,udp,actions=1",
            ],
        )?;
        lab.appctl("dpctl/ct-set-limits default=2 zone=5,limit=3 zone=6,limit=0")?;
        let servers = [7004, 7005, 7006].map(|port| {
            whoami::Server::start(b.namespace(), SocketAddr::from(([10, 1, 1, 2], port)))
        });
        let mut sockets: Vec<UdpSocket> = Vec::new();
        let mut ask = |port: u16, number: u16, expected: bool| -> Result<()> {
            let client = SocketAddr::from(([10, 1, 1, 1], port + 100 * (number + 1)));
            let server = SocketAddr::from(([10, 1, 1, 2], port));
            let limit = if expected { SOON } else { NEVER };
            let (socket, answer) = whoami::udp(a.namespace(), client, server, limit)?;
            ensure!(
                answer.is_some() == expected,
                "{client} to {server}: {answer:?}"
            );
            sockets.push(socket);
            Ok(())
        };
        // The default, a limit of its own, and none.
        for number in 0..5 {
            ask(7004, number, number < 2)?;
            ask(7005, number, number < 3)?;
            ask(7006, number, true)?;
        }
        let shown = limits(lab)?;
        for line in [
            "default limit=2",
            "zone=4,limit=2,count=2",
            "zone=5,limit=3,count=3",
            "zone=6,limit=0,count=5",
        ] {
            ensure!(shown.lines().any(|l| l == line), "{line} in {shown}");
        }
        // Five packets found no room: counted, and dropped as conntrack's.
        ensure!(counted(lab, "limited")? == 5);
        let status = lab.status()?;
        ensure!(status.contains("conntrack 5"), "{status}");
        // Those that are in stay in, and the zone takes more when it may have more.
        for socket in sockets.iter().take(3) {
            ensure!(whoami::again(socket, SOON)?.is_some());
        }
        // ovs-dpctl sets the same limits.
        lab.dpctl("ct-set-limits zone=5,limit=4")?;
        let mut again = |number: u16, expected: bool| -> Result<()> {
            let client = SocketAddr::from(([10, 1, 1, 1], 9000 + number));
            let server = address("10.1.1.2:7005")?;
            let limit = if expected { SOON } else { NEVER };
            let (socket, answer) = whoami::udp(a.namespace(), client, server, limit)?;
            ensure!(answer.is_some() == expected, "{client}: {answer:?}");
            sockets.push(socket);
            Ok(())
        };
        again(0, true)?;
        again(1, false)?;
        let shown = limits(lab)?;
        ensure!(shown.contains("zone=5,limit=4,count=4"), "{shown}");
        // Without one of its own the default is in force, under which the zone is overfull.
        lab.appctl("dpctl/ct-del-limits zone=5")?;
        again(2, false)?;
        let shown = limits(lab)?;
        ensure!(shown.contains("zone=5,limit=2,count=4"), "{shown}");
        lab.appctl("dpctl/ct-set-limits default=0")?;
        again(3, true)?;
        let shown = limits(lab)?;
        ensure!(shown.contains("zone=5,limit=0,count=5"), "{shown}");
        for server in servers {
            drop(server?);
        }
        Ok(())
    })
}

/// One line of an open connection to an echo server.
fn say(stream: &mut TcpStream, limit: Duration) -> Result<bool> {
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"hello\n")?;
    let mut back = [0; 6];
    match stream.read_exact(&mut back) {
        Ok(()) => Ok(back == *b"hello\n"),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error.into()),
    }
}

const ECHO: &str = "import socket,threading\ns=socket.socket()\n\
    s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)\ns.bind(('10.1.1.2',7000))\ns.listen(50)\n\
    print('ready',flush=True)\n\
    def serve(c):\n  while True:\n    d=c.recv(65536)\n    if not d: return\n    c.sendall(d)\n\
    while True:\n  threading.Thread(target=serve,args=(s.accept()[0],),daemon=True).start()";

/// The rules of OVN's logical switch, in short: each port has a zone of its own, kept in a register; a
/// packet goes through its sender's zone, then through its receiver's; a connection that the rules no longer
/// allow gets a label, and with the label it is dropped at once, in both directions.
fn ovn(lab: &Lab, allow: &str) -> Result<()> {
    let allow = |table: u32, next: u32| {
        [
            // New ones that are allowed; they are committed without the label.
            format!(
                "table={table},priority=30,ct_state=+new-est-rel+trk,tcp,{allow},actions=ct(commit,table={next},zone=NXM_NX_REG13[0..15],exec(set_field:0/1->ct_label))"
            ),
            format!(
                "table={table},priority=30,ct_state=+est-rpl+trk,ct_label=0/1,tcp,{allow},actions=resubmit(,{next})"
            ),
            // Established, but not allowed (any more): the label says so from now on.
            format!(
                "table={table},priority=20,ct_state=+est-rpl+trk,ct_label=0/1,tcp,actions=ct(commit,zone=NXM_NX_REG13[0..15],exec(set_field:1/1->ct_label))"
            ),
            format!(
                "table={table},priority=40,ct_state=+est+rpl+trk,ct_label=0/1,ip,actions=resubmit(,{next})"
            ),
            format!(
                "table={table},priority=40,ct_state=-new-est+rel-inv+trk,ct_label=0/1,ip,actions=resubmit(,{next})"
            ),
            format!("table={table},priority=50,ct_state=+trk,ct_label=1/1,ip,actions=drop"),
            format!("table={table},priority=50,ct_state=+inv+trk,ip,actions=drop"),
            format!(
                "table={table},priority=10,icmp,ct_state=+new+trk,actions=ct(commit,table={next},zone=NXM_NX_REG13[0..15])"
            ),
            format!("table={table},priority=10,icmp,ct_state=+est+trk,actions=resubmit(,{next})"),
        ]
    };
    let mut all: Vec<String> = [
        // Physical to logical: zones of sender and receiver.
        "table=0,priority=100,arp,actions=normal",
        "table=0,priority=50,in_port=1,ip,actions=set_field:11->reg13,set_field:1->reg14,resubmit(,8)",
        "table=0,priority=50,in_port=2,ip,actions=set_field:12->reg13,set_field:2->reg14,resubmit(,8)",
        // ls_in_pre_stateful.
        "table=8,ip,actions=ct(table=9,zone=NXM_NX_REG13[0..15])",
        // ls_in_l2_lkup.
        "table=10,reg14=1,ip,actions=set_field:2->reg15,set_field:12->reg13,ct_clear,resubmit(,11)",
        "table=10,reg14=2,ip,actions=set_field:1->reg15,set_field:11->reg13,ct_clear,resubmit(,11)",
        // ls_out_pre_stateful.
        "table=11,ip,actions=ct(table=12,zone=NXM_NX_REG13[0..15])",
        "table=13,reg15=1,actions=1",
        "table=13,reg15=2,actions=2",
    ]
    .map(str::to_owned)
    .into();
    all.extend(allow(9, 10));
    all.extend(allow(12, 13));
    let texts: Vec<&str> = all.iter().map(String::as_str).collect();
    rules(lab, &texts)
}

#[test]
fn ovns_pipeline_drops_what_is_no_longer_allowed() -> Result<()> {
    lab::test(|lab| {
        let (a, b) = two(lab)?;
        ovn(lab, "tp_dst=7000")?;
        let words = ["python3", "-c", ECHO];
        let mut server = b.namespace().spawn(words, &lab.directory().join("echo"))?;
        server.wait_output("ready", tests::wait::SOON)?;
        let to = address("10.1.1.2:7000")?;
        let connect = || {
            a.namespace()
                .inside(|| TcpStream::connect_timeout(&to, SOON))
        };
        let mut stream = connect()??;
        for _ in 0..5 {
            ensure!(say(&mut stream, SOON)?, "an allowed connection is served");
        }
        ping_ok(a.namespace(), "10.1.1.2")?;
        ping_ok(b.namespace(), "10.1.1.1")?;
        // Not b to a.
        let back = address("10.1.1.1:7001")?;
        let _listener = a
            .namespace()
            .inside(|| std::net::TcpListener::bind(back))??;
        let tried = b
            .namespace()
            .inside(|| TcpStream::connect_timeout(&back, NEVER))?;
        ensure!(tried.is_err(), "b begins nothing");
        // The policy changes: the open connection ends, both ways, and no new one comes.
        ovn(lab, "tp_dst=7999")?;
        revalidated(lab)?;
        ensure!(
            !say(&mut stream, NEVER)?,
            "a connection that isn't allowed goes on"
        );
        ensure!(connect()?.is_err(), "a new one is made");
        let shown = lab.ofctl("dump-flows br0 table=9,ct_label=1/1")?;
        ensure!(!shown.contains("n_packets=0"), "the label drops: {shown}");
        // And changes back: the connection is still there, only labelled; OVN takes the label off.
        ovn(lab, "tp_dst=7000")?;
        lab.ofctl(["add-flow", "br0", "table=9,priority=60,ct_state=+est-rpl+trk,ct_label=1/1,tcp,tp_dst=7000,actions=ct(commit,table=10,zone=NXM_NX_REG13[0..15],exec(set_field:0/1->ct_label))"])?;
        revalidated(lab)?;
        stream.set_read_timeout(Some(SOON))?;
        let mut back = [0; 6];
        stream
            .read_exact(&mut back)
            .context("the line that was dropped")?;
        ensure!(back == *b"hello\n" && say(&mut stream, SOON)?);
        Ok(())
    })
}

/// Marks decide who is served: a mark that is changed takes effect at once, by mask.
#[test]
fn a_mark_that_is_changed_takes_effect() -> Result<()> {
    lab::test(|lab| {
        let (a, b) = two(lab)?;
        let with = |mark: &str| {
            vec![
                "table=0,priority=10,arp,actions=normal".to_owned(),
                "table=0,priority=5,ip,actions=ct(table=1,zone=3)".to_owned(),
                "table=1,priority=9,in_port=1,ct_state=+trk+new,tcp,actions=ct(commit,zone=3,exec(set_field:0x10/0xf0->ct_mark,set_field:0x123456789abcdef0fedcba9876543210->ct_label)),2".to_owned(),
                // Only the low bits: the high ones stay.
                format!("table=1,priority=8,in_port=1,ct_state=+trk+est,ct_mark=0x10/0xf0,ct_label=0x12345678000000000000000000003210/0xffffffff00000000000000000000ffff,tcp,actions=ct(commit,table=2,zone=3,exec(set_field:{mark}/0xf->ct_mark))"),
                "table=2,ct_mark=0x15,tcp,actions=2".to_owned(),
                "table=1,priority=8,in_port=2,ct_state=+trk+est+rpl,ct_mark=0x10/0xf0,tcp,actions=1".to_owned(),
            ]
        };
        let set = |mark: &str| -> Result<()> {
            let all = with(mark);
            let texts: Vec<&str> = all.iter().map(String::as_str).collect();
            rules(lab, &texts)?;
            revalidated(lab)
        };
        set("0x5")?;
        let words = ["python3", "-c", ECHO];
        let mut server = b.namespace().spawn(words, &lab.directory().join("echo"))?;
        server.wait_output("ready", tests::wait::SOON)?;
        let to = address("10.1.1.2:7000")?;
        let mut stream = a
            .namespace()
            .inside(|| TcpStream::connect_timeout(&to, SOON))??;
        ensure!(say(&mut stream, SOON)?);
        set("0x6")?;
        ensure!(!say(&mut stream, NEVER)?, "0x16 isn't 0x15");
        set("0x5")?;
        stream.set_read_timeout(Some(SOON))?;
        let mut back = [0; 6];
        stream
            .read_exact(&mut back)
            .context("the line that was dropped")?;
        ensure!(say(&mut stream, SOON)?);
        Ok(())
    })
}

/// UDP and ICMPv6 in fragments through a zone, with and without translation; they leave as they came.
#[test]
fn fragments_are_tracked_whole_and_translated() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let (a, b) = two(lab)?;
        a.address("fd00::1/64")?;
        b.address("fd00::2/64")?;
        for (address, of) in [("fd00::1", &a), ("fd00::99", &a)] {
            b.neighbour(address, of)?;
        }
        a.neighbour("fd00::2", &b)?;
        b.neighbour("10.1.1.99", &a)?;
        for nat in [None, Some(("src=10.1.1.99", "src=fd00::99"))] {
            let (v4, v6, back) = match nat {
                Some((v4, v6)) => (format!(",nat({v4})"), format!(",nat({v6})"), ",nat"),
                None => (String::new(), String::new(), ""),
            };
            rules(
                lab,
                &[
                    "table=0,priority=10,arp,actions=normal",
                    &format!("table=0,priority=5,in_port=1,ip,actions=ct(commit,zone=8{v4}),2"),
                    &format!("table=0,priority=5,in_port=1,ipv6,actions=ct(commit,zone=8{v6}),2"),
                    &format!("table=0,priority=5,in_port=2,ip,actions=ct(table=1,zone=8{back})"),
                    &format!("table=0,priority=5,in_port=2,ipv6,actions=ct(table=1,zone=8{back})"),
                    "table=1,ct_state=+trk+est,ip,actions=1",
                    "table=1,ct_state=+trk+est,ipv6,actions=1",
                ],
            )?;
            for (from, to, seen) in [
                ("10.1.1.1:0", "10.1.1.2:7000", "10.1.1.99"),
                ("[fd00::1]:0", "[fd00::2]:7000", "fd00::99"),
            ] {
                let to = address(to)?;
                let server = tests::traffic::udp::Collector::bind(b.namespace(), to)?;
                let local = address(from)?;
                let client = a.namespace().inside(|| UdpSocket::bind(local))??;
                let before = counted(lab, "reassembled")?;
                for length in [2000_usize, 9000, 60_000] {
                    let datagram: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
                    client.send_to(&datagram, to)?;
                    server.wait("a datagram", SOON, |came| (came == datagram).then_some(()))?;
                }
                ensure!(counted(lab, "reassembled")? >= before + 3);
                drop(server);
                if nat.is_some() {
                    let _server = whoami::Server::start(b.namespace(), to)?;
                    client.connect(to)?;
                    let who = whoami::again(&client, SOON)?;
                    ensure!(
                        who.is_some_and(|who| who.ip().to_string() == seen),
                        "{who:?}"
                    );
                }
            }
            for to in ["10.1.1.2", "fd00::2"] {
                let echoed = ping(a.namespace(), to, 3, "-i 0.2 -s 6000")?;
                ensure!(echoed.received == 3, "{to} {nat:?}: {echoed:?}");
            }
        }
        ensure!(counted(lab, "fragments_waiting")? == 0);
        Ok(())
    })
}

/// Connections outlive ovs-vswitchd, killed or restarted in order: an open TCP connection goes on through
/// rules that let nothing pass but what is established.
#[test]
fn an_open_connection_goes_on_over_a_restart() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        let (a, b) = two(lab)?;
        let all = [
            "table=0,priority=10,arp,actions=normal",
            "table=0,priority=5,ip,actions=ct(table=1,zone=7,nat)",
            "table=1,priority=10,in_port=1,ct_state=+trk+new,tcp,actions=ct(commit,zone=7,nat(src=10.1.1.99),exec(load:0x5->NXM_NX_CT_MARK[])),2",
            "table=1,priority=10,in_port=1,ct_state=+trk+est,ct_mark=0x5,tcp,actions=2",
            "table=1,priority=10,in_port=2,ct_state=+trk+est,ct_mark=0x5,tcp,actions=1",
        ];
        b.neighbour("10.1.1.99", &a)?;
        rules(lab, &all)?;
        let words = ["python3", "-c", ECHO];
        let mut server = b.namespace().spawn(words, &lab.directory().join("echo"))?;
        server.wait_output("ready", tests::wait::SOON)?;
        let to = address("10.1.1.2:7000")?;
        let mut streams = Vec::new();
        for _ in 0..20 {
            let stream = a
                .namespace()
                .inside(|| TcpStream::connect_timeout(&to, SOON))??;
            streams.push(stream);
        }
        for stream in &mut streams {
            ensure!(say(stream, SOON)?);
        }
        for killed in [false, true] {
            let before = counted(lab, "connections")?;
            let made = counted(lab, "inserted")?;
            ensure!(before >= 20, "{before}");
            if killed {
                lab.kill_vswitchd()?;
                lab.start_vswitchd()?;
            } else {
                lab.restart_vswitchd()?;
            }
            ensure!(counted(lab, "connections")? == before, "some are gone");
            // Only now: nothing of `new` may pass, so who goes on is known.
            let established: Vec<&str> = all
                .iter()
                .copied()
                .filter(|rule| !rule.contains("+new"))
                .collect();
            rules(lab, &established)?;
            for stream in &mut streams {
                ensure!(say(stream, SOON)?, "a connection is lost; killed: {killed}");
            }
            ensure!(
                counted(lab, "inserted")? == made,
                "connections were made anew"
            );
            rules(lab, &all)?;
        }
        tcp::echo(
            a.namespace(),
            b.namespace(),
            address("10.1.1.2:7009")?,
            1 << 20,
        )
    })
}
