//! sFlow and IPFIX: samples that reach a collector.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::traffic::raw::{Wire, udp4};
use tests::traffic::udp::Collector;
use tests::{Endpoint, Lab, lab};

const LIMIT: Duration = Duration::from_secs(20);
const MARK: &[u8] = b"a payload that is easy to find again";

/// A bridge with two endpoints and a rule between them.
fn pair(lab: &Lab) -> Result<(std::sync::Arc<Endpoint>, std::sync::Arc<Endpoint>)> {
    lab.bridge("br0")?;
    let (a, b) = (lab.endpoint("a")?, lab.endpoint("b")?);
    lab.port("br0", &a, "")?;
    lab.port("br0", &b, "")?;
    Ok((a, b))
}

fn send(a: &Endpoint, b: &Endpoint, count: usize) -> Result<()> {
    let (wa, wb) = (Wire::open(a)?, Wire::open(b)?);
    let frame = udp4(
        (a.mac(), [10, 1, 1, 1], 1111),
        (b.mac(), [10, 1, 1, 2], 2222),
        MARK,
    )?;
    for _ in 0..count {
        wa.send(&frame)?;
        // Sampling takes nothing away from the traffic itself.
        wb.expect("the datagram itself", LIMIT, |f| (f == frame).then_some(()))?;
    }
    Ok(())
}

fn holds_mark(datagram: &[u8]) -> bool {
    datagram.windows(MARK.len()).any(|w| w == MARK)
}

#[test]
fn sflow_samples_reach_the_collector_with_the_packets_header() -> Result<()> {
    lab::test(|lab| {
        let (a, b) = pair(lab)?;
        let collector = Collector::bind(lab.host(), "127.0.0.1:0".parse()?)?;
        let target = collector.address()?;
        lab.vsctl(format!(
            "-- --id=@s create sflow agent=lo target=\"{target}\" header=128 sampling=4 polling=0 \
             -- set bridge br0 sflow=@s"
        ))?;
        // A quarter of them: that none of 200 is sampled has a chance of 10^-25.
        send(&a, &b, 200)?;
        let rate = collector.wait("an sFlow sample", LIMIT, |d| {
            ensure_version_5(d).ok()?;
            holds_mark(d).then(|| d.to_vec())
        })?;
        // sFlow version 5, 5 words on: a flow sample; its rate is the third word of the sample.
        ensure!(rate.len() > 100, "a short datagram: {rate:x?}");
        let flows = lab.dp_flows()?;
        ensure!(
            flows
                .iter()
                .any(|f| f.contains("sample(") && f.contains("sFlow(")),
            "no sample action: {flows:#?}"
        );
        Ok(())
    })
}

fn ensure_version_5(datagram: &[u8]) -> Result<()> {
    ensure!(datagram.starts_with(&[0, 0, 0, 5]), "not sFlow 5");
    Ok(())
}

#[test]
fn sflow_of_every_packet_misses_none() -> Result<()> {
    lab::test(|lab| {
        let (a, b) = pair(lab)?;
        let collector = Collector::bind(lab.host(), "127.0.0.1:0".parse()?)?;
        let target = collector.address()?;
        lab.vsctl(format!(
            "-- --id=@s create sflow agent=lo target=\"{target}\" header=128 sampling=1 polling=0 \
             -- set bridge br0 sflow=@s"
        ))?;
        send(&a, &b, 20)?;
        let mut seen = 0;
        collector.wait("20 samples", LIMIT, |d| {
            seen += d.windows(MARK.len()).filter(|w| *w == MARK).count();
            (seen >= 20).then_some(())
        })
    })
}

#[test]
fn ipfix_records_of_a_bridge_and_of_a_rule_reach_the_collector() -> Result<()> {
    lab::test(|lab| {
        let (a, b) = pair(lab)?;
        let of_bridge = Collector::bind(lab.host(), "127.0.0.1:0".parse()?)?;
        let of_rule = Collector::bind(lab.host(), "127.0.0.1:0".parse()?)?;
        lab.vsctl(format!(
            "-- --id=@i create ipfix targets=\"{}\" sampling=1 obs_domain_id=77 obs_point_id=1 \
             cache_active_timeout=1 cache_max_flows=10 -- set bridge br0 ipfix=@i",
            of_bridge.address()?
        ))?;
        lab.vsctl(format!(
            "-- --id=@b get bridge br0 -- --id=@i create ipfix targets=\"{}\" cache_active_timeout=1 \
             cache_max_flows=10 -- create Flow_Sample_Collector_Set id=5 bridge=@b ipfix=@i",
            of_rule.address()?
        ))?;
        lab.ofctl([
            "add-flow",
            "br0",
            "udp,actions=sample(probability=65535,collector_set_id=5,obs_domain_id=78,obs_point_id=2),normal",
        ])?;
        send(&a, &b, 20)?;
        for (collector, domain) in [(&of_bridge, 77_u32), (&of_rule, 78)] {
            collector.wait(&format!("an IPFIX record of domain {domain}"), LIMIT, |d| {
                // RFC 7011 section 3.1: version 10, length, time, sequence, domain; then sets, and
                // a set with an id of 256 or more is data. Both addresses are in the record.
                let header = d.first_chunk::<16>()?;
                let right = header[..2] == [0, 10] && header[12..] == domain.to_be_bytes();
                let address = |a: [u8; 4]| d.windows(4).any(|w| w == a);
                (right && address([10, 1, 1, 1]) && address([10, 1, 1, 2])).then_some(())
            })?;
        }
        Ok(())
    })
}
