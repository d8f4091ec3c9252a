//! OpenFlow groups: select (by a hash of the datapath, and recirculation), all, fast failover.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::traffic::raw::{Wire, udp4};
use tests::{Lab, lab};

const SOON: Duration = Duration::from_secs(5);

/// Sends one datagram each of `flows` source ports from a, and gives the ports that b and c saw.
fn spread(lab: &Lab, group: &str, flows: u16) -> Result<[BTreeSet<u16>; 2]> {
    lab.bridge("br0")?;
    let ends = ["a", "b", "c"].map(|label| lab.endpoint(label));
    let [a, b, c] = ends;
    let (a, b, c) = (a?, b?, c?);
    for end in [&a, &b, &c] {
        lab.port("br0", end, "")?;
    }
    let (pa, pb, pc) = (
        lab.ofport(a.port())?,
        lab.ofport(b.port())?,
        lab.ofport(c.port())?,
    );
    let group = group
        .replace("$b", &pb.to_string())
        .replace("$c", &pc.to_string());
    lab.ofctl([
        "-O",
        "OpenFlow15",
        "add-group",
        "br0",
        &format!("group_id=1,{group}"),
    ])?;
    lab.ofctl("del-flows br0")?;
    let rule = format!("udp,in_port={pa},actions=group:1");
    lab.ofctl(["-O", "OpenFlow15", "add-flow", "br0", &rule])?;
    let (wa, wires) = (Wire::open(&a)?, [Wire::open(&b)?, Wire::open(&c)?]);
    let to = ([2, 0, 0, 0, 9, 9], [10, 1, 1, 9], 9);
    let mut seen = [BTreeSet::new(), BTreeSet::new()];
    for port in 0..flows {
        wa.send(&udp4((a.mac(), [10, 1, 1, 1], 1000 + port), to, &[0; 20])?)?;
        // In lots, so that no queue of upcalls overflows.
        if port % 20 == 19 || port + 1 == flows {
            let want = usize::from(port) + 1;
            let deadline = std::time::Instant::now() + SOON;
            while seen[0].union(&seen[1]).count() < want && std::time::Instant::now() < deadline {
                for (ports, wire) in seen.iter_mut().zip(&wires) {
                    for frame in wire.capture_for(Duration::from_millis(20))? {
                        if frame.len() >= 36 && frame[..6] == to.0 {
                            ports.insert(u16::from_be_bytes([frame[34], frame[35]]) - 1000);
                        }
                    }
                }
            }
        }
    }
    Ok(seen)
}

#[test]
fn a_select_group_spreads_flows_by_the_datapaths_hash() -> Result<()> {
    lab::test(|lab| {
        let group = "type=select,selection_method=dp_hash,bucket=output:$b,bucket=output:$c";
        let [b, c] = spread(lab, group, 200)?;
        ensure!(
            b.union(&c).count() == 200,
            "{} and {} of 200",
            b.len(),
            c.len()
        );
        ensure!(b.is_disjoint(&c), "a flow went to both buckets");
        ensure!(
            b.len() > 40 && c.len() > 40,
            "one-sided: {} and {}",
            b.len(),
            c.len()
        );
        let flows = lab.dp_flows()?;
        ensure!(
            flows.iter().any(|f| f.contains("hash("))
                && flows.iter().any(|f| f.contains("recirc(")),
            "no hash and recirculation: {flows:#?}"
        );
        let hashed = |f: &&String| f.contains("dp_hash(0x") && !f.contains("dp_hash(0/0)");
        ensure!(
            flows.iter().any(|f| hashed(&f)),
            "nothing matches on dp_hash: {flows:#?}"
        );
        Ok(())
    })
}

#[test]
fn a_select_group_by_fields_and_weights() -> Result<()> {
    lab::test(|lab| {
        let group = "type=select,selection_method=hash,fields(udp_src),\
                     bucket=weight:1,actions=output:$b,bucket=weight:3,actions=output:$c";
        let [b, c] = spread(lab, group, 200)?;
        ensure!(
            b.union(&c).count() == 200,
            "{} and {} of 200",
            b.len(),
            c.len()
        );
        ensure!(
            b.len() < c.len() && !b.is_empty(),
            "weights 1:3 gave {}:{}",
            b.len(),
            c.len()
        );
        Ok(())
    })
}

#[test]
fn an_all_group_sends_a_changed_copy_to_each_bucket() -> Result<()> {
    lab::test(|lab| {
        let group =
            "type=all,bucket=actions=set_field:99->udp_dst,output:$b,bucket=actions=output:$c";
        let [b, c] = spread(lab, group, 10)?;
        ensure!(
            b.len() == 10 && c.len() == 10,
            "{} and {} of 10",
            b.len(),
            c.len()
        );
        Ok(())
    })
}
