//! Mirrors: everything of a bridge to a port, and to a VLAN.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::lab;
use tests::traffic::raw::{Wire, ethernet};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_mirror_shows_both_directions_once_and_the_traffic_still_arrives() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let ends = ["a", "b", "m"].map(|label| lab.endpoint(label));
        let [a, b, m] = ends;
        let (a, b, m) = (a?, b?, m?);
        for end in [&a, &b, &m] {
            lab.port("br0", end, "")?;
        }
        lab.vsctl(format!(
            "-- --id=@p get port {} -- --id=@m create mirror name=m0 select-all=true output-port=@p \
             -- set bridge br0 mirrors=@m",
            m.port()
        ))?;
        // Without learning: a change of mirrors forgets who is where, and m would see the flood.
        for (from, to) in [(&a, &b), (&b, &a)] {
            let (from, to) = (lab.ofport(from.port())?, lab.ofport(to.port())?);
            lab.ofctl([
                "add-flow",
                "br0",
                &format!("in_port={from},actions=output:{to}"),
            ])?;
        }
        let (wa, wb, wm) = (Wire::open(&a)?, Wire::open(&b)?, Wire::open(&m)?);
        for (from, wire, other, there, text) in [
            (&a, &wa, &b, &wb, &b"first"[..]),
            (&b, &wb, &a, &wa, &b"second"[..]),
        ] {
            let frame = ethernet(from.mac(), other.mac(), 0x88b5, text);
            wire.send(&frame)?;
            there.expect("the frame itself", SOON, |f| (f == frame).then_some(()))?;
            wm.expect("its mirror", SOON, |f| (f == frame).then_some(()))?;
        }
        let again = wm.capture_for(Duration::from_millis(300))?;
        ensure!(
            again.iter().all(|f| f[12..14] != [0x88, 0xb5]),
            "mirrored twice: {again:x?}"
        );
        // Written to the database every few seconds.
        tests::wait::soon("the mirror's statistics", || {
            Ok(lab
                .vsctl("get mirror m0 statistics")?
                .contains("tx_packets"))
        })?;
        lab.vsctl("clear bridge br0 mirrors")?;
        let frame = ethernet(a.mac(), b.mac(), 0x88b5, b"third");
        // Let no flow of before answer.
        lab.appctl("revalidator/purge")?;
        wa.send(&frame)?;
        wb.expect("the frame itself", SOON, |f| (f == frame).then_some(()))?;
        let after = wm.capture_for(Duration::from_millis(300))?;
        ensure!(
            after.iter().all(|f| *f != frame),
            "mirrored without a mirror"
        );
        Ok(())
    })
}

#[test]
fn a_mirror_into_a_vlan_tags_its_copies_and_can_be_cut_short() -> Result<()> {
    lab::test(|lab| {
        lab.bridge("br0")?;
        let ends = ["a", "b", "t"].map(|label| lab.endpoint(label));
        let [a, b, t] = ends;
        let (a, b, t) = (a?, b?, t?);
        lab.port("br0", &a, "tag=10")?;
        lab.port("br0", &b, "tag=10")?;
        lab.port("br0", &t, "trunks=99")?;
        lab.vsctl(
            "-- --id=@m create mirror name=m0 select-all=true output-vlan=99 \
             -- set bridge br0 mirrors=@m flood-vlans=99",
        )?;
        let (wa, wt) = (Wire::open(&a)?, Wire::open(&t)?);
        let frame = ethernet(a.mac(), b.mac(), 0x88b5, &[0x55; 1000]);
        wa.send(&frame)?;
        let tagged = [&frame[..12], &[0x81, 0, 0, 99], &frame[12..]].concat();
        wt.expect("the copy in VLAN 99", SOON, |f| (f == tagged).then_some(()))?;

        lab.vsctl("clear bridge br0 mirrors")?;
        let m = lab.endpoint("m")?;
        lab.port("br0", &m, "")?;
        lab.vsctl(format!(
            "-- --id=@p get port {} -- --id=@m create mirror name=m1 select-all=true output-port=@p \
             snaplen=100 -- set bridge br0 mirrors=@m",
            m.port()
        ))?;
        let wm = Wire::open(&m)?;
        // Let no flow of before answer.
        lab.appctl("revalidator/purge")?;
        wa.send(&frame)?;
        let short = wm.expect("a copy", SOON, |f| (f[..6] == b.mac()).then(|| f.to_vec()))?;
        // The tag of the access port's VLAN is part of what is mirrored.
        ensure!(
            short.len() == 100 || short.len() == 104,
            "{} bytes",
            short.len()
        );
        Ok(())
    })
}
