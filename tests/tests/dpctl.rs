//! `ovs-dpctl` by itself: datapaths, interfaces, flows, filters, and what it says when something
//! is wrong.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::traffic::raw::{Wire, ethernet, udp4};
use tests::{Endpoint, Lab, lab};

const SOON: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(200);

/// A datapath `dp1` with two endpoints as ports 1 and 2.
fn datapath(lab: &Lab) -> Result<(std::sync::Arc<Endpoint>, std::sync::Arc<Endpoint>)> {
    let (a, b) = (lab.endpoint("a")?, lab.endpoint("b")?);
    lab.dpctl("add-dp dp1")?;
    lab.dpctl(["add-if", "dp1", a.port(), b.port()])?;
    Ok((a, b))
}

#[test]
fn datapaths_and_interfaces_come_and_go() -> Result<()> {
    lab::test_bare(|lab| {
        let (a, b) = datapath(lab)?;
        let text = lab.dpctl("show")?;
        for line in [
            "system@dp1:",
            "port 0: dp1 (internal)",
            &format!("port 1: {}", a.port()),
            &format!("port 2: {}", b.port()),
        ] {
            ensure!(text.contains(line), "no {line:?} in\n{text}");
        }
        ensure!(lab.dpctl("dump-dps")?.trim() == "system@dp1");
        ensure!(
            lab.host().links()?.contains(&"dp1".to_owned()),
            "no device dp1"
        );

        lab.dpctl("add-if dp1 int7,type=internal,port_no=7")?;
        ensure!(lab.dpctl("show dp1")?.contains("port 7: int7 (internal)"));
        ensure!(
            lab.host().links()?.contains(&"int7".to_owned()),
            "no device int7"
        );
        lab.dpctl("del-if dp1 int7")?;
        ensure!(
            !lab.host().links()?.contains(&"int7".to_owned()),
            "int7 is still there"
        );

        // What the module says of each mistake.
        for (words, message) in [
            ("add-dp dp1".to_owned(), "File exists"),
            ("del-dp dp2".to_owned(), "No such device"),
            ("show dp2".to_owned(), "No such device"),
            ("add-if dp1 nosuch0".to_owned(), "No such device"),
            (format!("add-if dp1 {}", a.port()), "File exists"),
            ("del-if dp1 lo".to_owned(), "no port named lo"),
        ] {
            let ran = lab.try_dpctl(&words)?;
            ensure!(!ran.status.success(), "`{words}` succeeded");
            ensure!(
                ran.stderr.contains(message),
                "`{words}` without {message:?}: {}",
                ran.stderr
            );
        }

        lab.dpctl("add-dp dp2")?;
        let ran = lab.try_dpctl(["add-if", "dp2", a.port()])?;
        ensure!(
            ran.stderr.contains("busy"),
            "a device on two datapaths: {}",
            ran.stderr
        );
        ensure!(lab.dpctl("dump-dps")?.lines().count() == 2);
        lab.dpctl("del-dp dp2")?;
        lab.dpctl(["del-if", "dp1", b.port()])?;
        ensure!(!lab.dpctl("show")?.contains(b.port()));
        lab.dpctl("del-dp dp1")?;
        ensure!(lab.dpctl("show")?.trim().is_empty());
        lab.nothing_left()
    })
}

#[test]
fn flows_are_added_changed_read_and_deleted_and_do_what_they_say() -> Result<()> {
    lab::test_bare(|lab| {
        let (a, b) = datapath(lab)?;
        let (wa, wb) = (Wire::open(&a)?, Wire::open(&b)?);
        let key = "in_port(1),eth(),eth_type(0x88b5)";
        let frame = ethernet(a.mac(), b.mac(), 0x88b5, b"hello");
        let passes = |wanted: bool| -> Result<()> {
            wa.send(&frame)?;
            if wanted {
                wb.expect("the frame", SOON, |f| (f == frame).then_some(()))
            } else {
                let got = wb.capture_for(QUIET)?;
                ensure!(got.iter().all(|f| *f != frame), "forwarded");
                Ok(())
            }
        };
        passes(false).context("without a flow")?;
        lab.dpctl(["add-flow", "dp1", key, "2"])?;
        passes(true)?;
        passes(true)?;
        let ran = lab.try_dpctl(["add-flow", "dp1", key, "2"])?;
        ensure!(
            ran.stderr.contains("File exists"),
            "added twice: {}",
            ran.stderr
        );
        let text = lab.dpctl("dump-flows dp1")?;
        ensure!(text.contains("packets:2, bytes:120, used:"), "{text}");
        ensure!(text.contains("actions:2"), "{text}");

        // Not "drop": ovs-dpctl makes an action of it that the module doesn't know either.
        lab.dpctl(["mod-flow", "dp1", key, ""])?;
        passes(false).context("after mod-flow to drop")?;
        let text = lab.dpctl("dump-flows dp1")?;
        ensure!(
            text.contains("packets:3") && text.contains("actions:drop"),
            "{text}"
        );
        lab.dpctl(["--clear", "mod-flow", "dp1", key, "2"])?;
        ensure!(
            lab.dpctl("dump-flows dp1")?
                .contains("packets:0, bytes:0, used:never")
        );
        lab.dpctl(["mod-flow", "dp1", "in_port(9),eth(),eth_type(0x88b5)", "2"])
            .err()
            .context("mod-flow made a flow that wasn't there")?;

        lab.dpctl(["-s", "del-flow", "dp1", key])?;
        passes(false).context("after del-flow")?;
        ensure!(lab.dpctl("dump-flows dp1")?.trim().is_empty());
        let ran = lab.try_dpctl(["del-flow", "dp1", key])?;
        ensure!(
            ran.stderr.contains("No such file"),
            "deleted twice: {}",
            ran.stderr
        );
        Ok(())
    })
}

#[test]
fn a_flow_is_found_by_its_ufid_and_flows_by_a_filter() -> Result<()> {
    lab::test_bare(|lab| {
        let (a, b) = datapath(lab)?;
        for key in [
            "in_port(1),eth(),eth_type(0x0800),ipv4(src=10.1.1.1,proto=6,frag=no),tcp(dst=80),tcp_flags(0/0)",
            "in_port(1),eth(),eth_type(0x0800),ipv4(src=10.1.1.1,proto=17,frag=no),udp(dst=53)",
            "in_port(2),eth(),eth_type(0x0800),ipv4(proto=17,frag=no),udp(dst=53)",
            "in_port(2),eth(),eth_type(0x86dd),ipv6(proto=58,frag=no),icmpv6(type=128)",
            "in_port(2),eth(),eth_type(0x8100),vlan(vid=5,pcp=0),encap(eth_type(0x0806),arp(op=1))",
        ] {
            lab.dpctl([
                "add-flow",
                "dp1",
                key,
                if key.contains("port(1)") { "2" } else { "1" },
            ])?;
        }
        let count = |words: &[&str]| -> Result<usize> {
            let mut all = vec!["dump-flows", "dp1"];
            all.extend(words);
            Ok(lab
                .dpctl(&all[..])?
                .lines()
                .filter(|l| l.contains("actions:"))
                .count())
        };
        ensure!(count(&[])? == 5);
        for (filter, expected) in [
            ("filter=tcp", 1),
            ("filter=udp", 2),
            ("filter=in_port=1", 2),
            ("filter=in_port=2,udp", 1),
            ("filter=ipv6", 1),
            // With a flow that doesn't look at the address, and so overlaps.
            ("filter=ip,nw_src=10.1.1.1", 3),
            ("filter=ip,nw_src=10.9.9.9", 1),
        ] {
            let found = count(&[filter])?;
            ensure!(found == expected, "{filter}: {found} flows, not {expected}");
        }
        let named = lab.dpctl("--names dump-flows dp1")?;
        ensure!(named.contains(&format!("in_port({})", a.port())), "{named}");
        ensure!(named.contains(&format!("actions:{}", b.port())), "{named}");

        // ovs-dpctl gives a flow a UFID only when told which.
        let ufid = "ufid:01234567-89ab-cdef-0123-456789abcdef";
        let key = "in_port(1),eth(),eth_type(0x88b5)";
        lab.dpctl(["add-flow", "dp1", &format!("{ufid},{key}"), "2"])?;
        let text = lab.dpctl("-m dump-flows dp1")?;
        ensure!(
            text.lines().any(|l| l.starts_with(ufid)),
            "no {ufid} in {text}"
        );
        let got = lab.dpctl(["get-flow", "dp1", ufid])?;
        ensure!(
            got.contains("eth_type(0x88b5)") && got.contains("actions:2"),
            "{got}"
        );
        lab.dpctl(["del-flow", "dp1", ufid])?;
        lab.dpctl(["get-flow", "dp1", ufid])
            .err()
            .context("a deleted flow was found")?;
        ensure!(count(&[])? == 5);
        lab.dpctl("del-flows dp1")?;
        ensure!(count(&[])? == 0);
        Ok(())
    })
}

#[test]
fn the_datapath_counts_hits_misses_and_flows() -> Result<()> {
    lab::test_bare(|lab| {
        let (a, b) = datapath(lab)?;
        let (wa, wb) = (Wire::open(&a)?, Wire::open(&b)?);
        lab.dpctl([
            "add-flow",
            "dp1",
            "in_port(1),eth(),eth_type(0x0800),ipv4(frag=no)",
            "2",
        ])?;
        let frame = udp4(
            (a.mac(), [10, 0, 0, 1], 1),
            (b.mac(), [10, 0, 0, 2], 2),
            &[0; 40],
        )?;
        for _ in 0..10 {
            wa.send(&frame)?;
            wb.expect("a hit", SOON, |f| (f == frame).then_some(()))?;
        }
        for _ in 0..5 {
            wa.send(&ethernet(a.mac(), b.mac(), 0x88b5, b"a miss"))?;
        }
        let mut text = String::new();
        // Nobody takes the upcalls of the misses: they count as lost.
        tests::wait::soon("the counts", || {
            text = lab.dpctl("-s show dp1")?;
            Ok(text.contains("lookups: hit:10 missed:5 lost:5"))
        })
        .with_context(|| text.clone())?;
        ensure!(text.contains("flows: 1"), "{text}");
        let port = text.split("port 2: ").nth(1).context("port 2")?;
        ensure!(port.contains("TX packets:10"), "{text}");
        Ok(())
    })
}
