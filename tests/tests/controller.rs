//! Packets to and from an OpenFlow controller, and the trace of a packet's way.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::traffic::raw::{Wire, udp4};
use tests::{lab, wait};

const SOON: Duration = Duration::from_secs(5);
const MARK: &[u8] = b"a payload that is easy to find again";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn a_packet_out_leaves_as_it_was_given() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let (a, b) = (lab.endpoint("a")?, lab.endpoint("b")?);
        lab.port("br0", &a, "")?;
        lab.port("br0", &b, "")?;
        let (pa, pb) = (lab.ofport(a.port())?, lab.ofport(b.port())?);
        let (wa, wb) = (Wire::open(&a)?, Wire::open(&b)?);
        let frame = udp4(
            (a.mac(), [10, 1, 1, 1], 1),
            (b.mac(), [10, 1, 1, 2], 2),
            MARK,
        )?;
        let packet = hex(&frame);
        lab.ofctl([
            "packet-out",
            "br0",
            &format!("in_port=controller packet={packet} actions=output:{pb}"),
        ])?;
        wb.expect("to a port", SOON, |f| (f == frame).then_some(()))?;
        // As if it had come from a: through the tables.
        lab.ofctl([
            "packet-out",
            "br0",
            &format!("in_port={pa} packet={packet} actions=table"),
        ])?;
        wb.expect("through the tables", SOON, |f| (f == frame).then_some(()))?;
        lab.ofctl([
            "packet-out",
            "br0",
            &format!("in_port=controller packet={packet} actions=flood"),
        ])?;
        wa.expect("flooded to a", SOON, |f| (f == frame).then_some(()))?;
        wb.expect("flooded to b", SOON, |f| (f == frame).then_some(()))?;
        let actions = format!("mod_nw_dst:10.9.9.9,output:{pb}");
        lab.ofctl([
            "packet-out",
            "br0",
            &format!("in_port=controller packet={packet} actions={actions}"),
        ])?;
        wb.expect("changed on the way", SOON, |f| {
            (f.get(30..34) == Some(&[10, 9, 9, 9])).then_some(())
        })
    })
}

#[test]
fn a_packet_in_reaches_the_controller_with_its_port_and_bytes() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let (a, b) = (lab.endpoint("a")?, lab.endpoint("b")?);
        lab.port("br0", &a, "")?;
        lab.port("br0", &b, "")?;
        let pa = lab.ofport(a.port())?;
        lab.ofctl("del-flows br0")?;
        lab.ofctl(["add-flow", "br0", "udp,tp_dst=53,actions=controller"])?;
        lab.ofctl([
            "add-flow",
            "br0",
            "udp,tp_dst=54,actions=controller(max_len=60,userdata=01.02.03),normal",
        ])?;
        let output = lab.directory().join("monitor.out");
        let bridge = format!("unix:{}", lab.directory().join("br0.mgmt").display());
        let words = ["monitor", &bridge, "65534", "-P", "nxt_packet_in2"];
        let monitor = lab.spawn_ofctl(words, &output)?;
        let (wa, wb) = (Wire::open(&a)?, Wire::open(&b)?);
        let from = (a.mac(), [10, 1, 1, 1], 4000);
        let send = |port: u16| -> Result<Vec<u8>> {
            let frame = udp4(from, (b.mac(), [10, 1, 1, 2], port), MARK)?;
            wa.send(&frame)?;
            Ok(frame)
        };
        // The monitor may not be listening yet.
        let came = wait::soon("a packet-in", || {
            send(53)?;
            Ok(monitor.output().contains("PACKET_IN"))
        });
        came.with_context(|| format!("the monitor printed:\n{}", monitor.output()))?;
        let text = monitor.output();
        let first = text
            .lines()
            .find(|l| l.contains("PACKET_IN"))
            .context("no PACKET_IN")?;
        ensure!(first.contains(&format!("in_port={pa}")), "{text}");
        ensure!(first.contains("total_len=78"), "{text}");
        ensure!(text.contains("tp_src=4000,tp_dst=53"), "{text}");
        let frame = send(54)?;
        wb.expect("forwarded as well", SOON, |f| (f == frame).then_some(()))?;
        wait::soon("the second rule's", || {
            let text = monitor.output();
            Ok(text.contains("userdata=01.02.03") && text.contains("tp_dst=54"))
        })?;
        // Again, now that a flow with the action is in the datapath.
        let before = monitor.output().matches("userdata=01.02.03").count();
        send(54)?;
        wait::soon("one more", || {
            Ok(monitor.output().matches("userdata=01.02.03").count() > before)
        })
    })
}

#[test]
fn a_trace_tells_what_the_datapath_does() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let out = lab.ofport(b.port())?;
        lab.ofctl("del-flows br0")?;
        lab.ofctl([
            "add-flow",
            "br0",
            &format!("udp,actions=mod_vlan_vid:7,output:{out}"),
        ])?;
        let dp_out = lab.dp_port(b.port())?;
        let flow = format!(
            "in_port={},udp,nw_src=10.1.1.1,nw_dst=10.1.1.2",
            lab.ofport(a.port())?
        );
        let text = lab.appctl(["ofproto/trace", "br0", &flow])?;
        let actions = format!("Datapath actions: push_vlan(vid=7,pcp=0),{dp_out}");
        ensure!(text.contains(&actions), "not {actions:?}:\n{text}");
        // And from a flow as the datapath has it.
        let dp = lab
            .switch()
            .datapath()
            .rsplit('@')
            .next()
            .unwrap_or_default();
        let key = format!(
            "in_port({}),eth(src={},dst={}),eth_type(0x0800),\
             ipv4(src=10.1.1.1,dst=10.1.1.2,proto=17,tos=0,ttl=64,frag=no),udp(src=1,dst=2)",
            lab.dp_port(a.port())?,
            a.mac_text(),
            b.mac_text()
        );
        let text = lab.appctl(["ofproto/trace", dp, &key])?;
        ensure!(text.contains(&actions), "not {actions:?}:\n{text}");
        Ok(())
    })
}
