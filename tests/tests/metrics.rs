//! Metrics and status: what they say, that it adds up, and that nobody can keep them from others.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::exposition::Exposition;
use tests::lab::{self, Lab};
use tests::traffic::{iperf3, ping_ok, raw};
use tests::wait;

/// Where metrics are served in these tests, in the namespace of the switch.
const ADDRESS: &str = "127.0.0.1:9475";

fn metrics(lab: &Lab) -> Result<Exposition> {
    let run_dir = lab.run_dir().display().to_string();
    let text = lab.ovs_dpd(["metrics", "--run-dir", &run_dir])?.ok()?;
    Exposition::parse(&text).with_context(|| text)
}

/// Packets in and packets out of the datapath by the metrics.
fn balance(of: &Exposition) -> Result<(f64, f64)> {
    let sum = |names: &[&str]| -> Result<f64> {
        let each = names.iter().map(|name| {
            let name = format!("ovs_dpd_port_{name}_packets_total");
            of.sum(&name, &[("datapath", "ovs-system")])
        });
        each.sum()
    };
    Ok((
        sum(&["receive", "executed", "copied"])?,
        sum(&["transmit", "to_user", "held", "dropped"])?,
    ))
}

fn balanced(lab: &Lab) -> Result<Exposition> {
    wait::until("what went in is what came out", wait::SOON, || {
        let of = metrics(lab)?;
        let (in_, out) = balance(&of)?;
        Ok((in_ == out && in_ > 0.0).then_some(of))
    })
}

#[test]
fn what_comes_in_is_forwarded_or_dropped_by_port_and_reason() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        let c = lab.host_on("br0", "c", "10.1.1.3/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        iperf3(lab, a.namespace(), b.namespace(), "10.1.1.2", 1, "")?;
        // What a third endpoint sends is dropped: all of it.
        let port = lab.ofport(c.port())?;
        lab.ofctl(format!(
            "add-flow br0 priority=100,in_port={port},actions=drop"
        ))?;
        let dropped = |of: &Exposition| {
            let labels = [("port", c.port()), ("reason", "last_action")];
            of.sum("ovs_dpd_port_dropped_packets_total", &labels)
        };
        let of_c = |of: &Exposition, name: &str| {
            of.sum(&format!("ovs_dpd_port_{name}"), &[("port", c.port())])
        };
        let frame = raw::ethernet(c.mac(), [0xff; 6], 0x88b5, b"lost");
        let socket = raw::Wire::open(&c)?;
        // The flow is there.
        wait::soon("a frame that the datapath drops", || {
            socket.send(&frame)?;
            Ok(dropped(&metrics(lab)?)? > 0.0)
        })?;
        let before = balanced(lab)?;
        for _ in 0..500 {
            socket.send(&frame)?;
        }
        let after = wait::until("the counts of 500 frames", wait::SOON, || {
            let of = balanced(lab)?;
            let came =
                of_c(&of, "receive_packets_total")? - of_c(&before, "receive_packets_total")?;
            Ok((came >= 500.0).then_some(of))
        })?;
        let rise = |name: &str| -> Result<f64> { Ok(of_c(&after, name)? - of_c(&before, name)?) };
        ensure!(dropped(&after)? - dropped(&before)? >= 500.0, "{after:?}");
        // To the last packet: what ended at this port's entry.
        ensure!(
            rise("receive_packets_total")? + rise("executed_packets_total")?
                == rise("to_user_packets_total")? + dropped(&after)? - dropped(&before)?,
            "{after:?}"
        );
        // A port that goes takes nothing out of the sum.
        let (went_in, _) = balance(&after)?;
        lab.vsctl(format!("del-port br0 {}", c.port()))?;
        let last = balanced(lab)?;
        ensure!(balance(&last)?.0 >= went_in, "{last:?}");
        let gone = [("port", ""), ("reason", "last_action")];
        let drops = last.sum("ovs_dpd_port_dropped_packets_total", &gone)?;
        ensure!(drops >= dropped(&after)?, "{last:?}");
        Ok(())
    })
}

#[test]
fn the_metrics_tell_of_the_whole_daemon() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        ping_ok(a.namespace(), "10.1.1.254")?;
        lab.ofctl("-O OpenFlow13 add-meter br0 meter=7,pktps,bands=type=drop,rate=1000")?;
        let of = metrics(lab)?;
        for (name, least) in [
            ("ovs_dpd_flows", 1.0),
            ("ovs_dpd_masks", 1.0),
            ("ovs_dpd_meters", 1.0),
            ("ovs_dpd_lookups_missed_total", 1.0),
            ("ovs_dpd_port_upcalls_queued_total", 1.0),
            ("ovs_dpd_port_receive_bytes_total", 98.0),
            ("ovs_dpd_worker_queues", 4.0),
            ("ovs_dpd_worker_busy_seconds_total", 1e-6),
            ("ovs_dpd_conntrack_connections_limit", 1_000_000.0),
            ("ovs_dpd_clients", 1.0),
            ("process_resident_memory_bytes", 1e6),
        ] {
            ensure!(of.sum(name, &[])? >= least, "{name} in {of:?}");
        }
        // Which ports there are is the same in both.
        let status = lab.status_json()?;
        let ports = status["datapaths"][0]["ports"].as_array();
        let ports = ports.context("no ports in the status")?.len() as f64;
        ensure!(of.sum("ovs_dpd_port_info", &[])? == ports, "{of:?}");
        let limit = status["connections_limit"].as_u64();
        ensure!(limit == Some(1 << 20), "{limit:?}");
        ensure!(status["datapaths"][0]["meters"] == 1, "{status}");
        let workers = status["workers"].as_array().context("no workers")?;
        ensure!(workers[0]["queues"].is_array(), "{status}");
        let text = lab.status()?;
        ensure!(
            text.contains("worker 0: busy") && text.contains("meters 1,"),
            "{text}"
        );
        Ok(())
    })
}

fn scrape(lab: &Lab) -> Result<Exposition> {
    let text = lab.host().inside(|| -> Result<String> {
        let mut stream = TcpStream::connect(ADDRESS)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })??;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let length = format!("Content-Length: {}\r\n", body.len());
    ensure!(head.contains(&length), "not {length}: {head}");
    Exposition::parse(body).with_context(|| body.to_owned())
}

#[test]
fn scrapers_that_stall_keep_nobody_waiting() -> Result<()> {
    lab::test_bare(|lab| {
        lab.stop_daemon()?;
        lab.start_daemon_with(&["--metrics-listen", ADDRESS])?;
        lab.dpctl("add-dp dp1")?;
        // Some say nothing, some half a request, some read no answer; more than there is room for.
        let mut stalled = lab.host().inside(|| -> Result<Vec<TcpStream>> {
            let mut all = Vec::new();
            for say in ["", "GET /metr", "GET /metrics HTTP/1.1\r\n\r\n"] {
                for _ in 0..20 {
                    let mut stream = TcpStream::connect(ADDRESS)?;
                    stream.write_all(say.as_bytes())?;
                    all.push(stream);
                }
            }
            Ok(all)
        })??;
        let silent = UnixStream::connect(lab.run_dir().join("status.sock"))?;
        let began = Instant::now();
        for _ in 0..5 {
            let of = scrape(lab)?;
            ensure!(of.sum("ovs_dpd_flows", &[("datapath", "dp1")])? == 0.0);
            lab.status_json()?;
        }
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(2), "ten answers took {took:?}");
        // Those that never ask are let go.
        let last = stalled.get_mut(39).context("too few")?;
        last.set_read_timeout(Some(Duration::from_secs(15)))?;
        let read = last.read(&mut [0; 16]);
        let closed = match &read {
            Ok(bytes) => *bytes == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        };
        ensure!(closed, "{read:?}");
        drop(silent);
        Ok(())
    })
}

#[test]
fn metrics_come_from_a_unix_socket_too_and_bad_addresses_are_explained() -> Result<()> {
    lab::test_bare(|lab| {
        lab.stop_daemon()?;
        let path = lab.directory().join("m.sock");
        let text = path.display().to_string();
        lab.start_daemon_with(&["--metrics-listen", &text])?;
        let mut stream = UnixStream::connect(&path)?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.contains("\novs_dpd_build_info{"), "{answer}");
        // A daemon that is killed leaves its socket; the next one takes its place.
        lab.with_daemon(|daemon| daemon.process().kill())?;
        ensure!(path.exists());
        lab.start_daemon_with(&["--metrics-listen", &text])?;
        let refused = lab.directory().join("other").display().to_string();
        for (address, says) in [
            (text.as_str(), "somebody else does"),
            ("9475", "an address with a port"),
        ] {
            let words = ["run", "--run-dir", &refused, "--metrics-listen", address];
            let ran = lab.ovs_dpd(words)?;
            ensure!(
                !ran.status.success() && ran.stderr.contains(says),
                "{ran:?}"
            );
        }
        lab.stop_daemon()?;
        ensure!(!path.exists(), "its socket is left behind");
        lab.start_daemon()
    })
}
