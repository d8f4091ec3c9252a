//! `ovs-dpd capture`: what it sees, that tcpdump reads it, and that nobody waits for it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tests::lab::{self, Lab};
use tests::process::Process;
use tests::traffic::{iperf3, ping, ping_ok, raw};
use tests::wait;

/// A packet of a pcapng file, by the blocks of draft-ietf-opsawg-pcapng.
#[derive(Debug)]
struct Packet {
    interface: String,
    comment: String,
    /// 1: inbound, 2: outbound.
    flags: u32,
    captured: usize,
    length: usize,
}

fn word(bytes: &[u8], at: usize) -> Result<usize> {
    let bytes = bytes.get(at..at + 4).context("too short")?;
    Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
}

/// Options by code.
fn options(mut bytes: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let head = word(bytes, 0)?;
        let (code, length) = (head & 0xffff, head >> 16);
        let value = bytes.get(4..4 + length).context("an option too long")?;
        if code == 0 {
            break;
        }
        all.push((code, value.to_vec()));
        bytes = &bytes[4 + length.next_multiple_of(4)..];
    }
    Ok(all)
}

fn text(options: &[(usize, Vec<u8>)], code: usize) -> String {
    let of = options.iter().find(|(other, _)| *other == code);
    of.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
        .unwrap_or_default()
}

fn read(path: &Path) -> Result<Vec<Packet>> {
    let bytes = std::fs::read(path)?;
    let (mut rest, mut interfaces, mut packets) = (bytes.as_slice(), Vec::new(), Vec::new());
    while !rest.is_empty() {
        let (kind, length) = (word(rest, 0)?, word(rest, 4)?);
        let body = rest.get(8..length - 4).context("a block is cut")?;
        ensure!(word(rest, length - 4)? == length, "a block's two lengths");
        match kind {
            1 => interfaces.push(text(&options(&body[8..])?, 2)),
            6 => {
                let captured = word(body, 12)?;
                let options = options(&body[20 + captured.next_multiple_of(4)..])?;
                let flags = options.iter().find(|(code, _)| *code == 2);
                let interface = interfaces.get(word(body, 0)?);
                packets.push(Packet {
                    interface: interface.context("no interface")?.clone(),
                    comment: text(&options, 1),
                    flags: word(&flags.context("no flags")?.1, 0)? as u32,
                    captured,
                    length: word(body, 16)?,
                });
            }
            _ => {}
        }
        rest = &rest[length..];
    }
    Ok(packets)
}

/// A capture in progress.
fn start(lab: &Lab, name: &str, arguments: &str) -> Result<Process> {
    let output = lab.directory().join(format!("{name}.out"));
    let words = format!(
        "{} capture --run-dir {} {arguments}",
        lab.programs()?.ovs_dpd(),
        lab.run_dir().display()
    );
    let mut capture = lab.host().spawn(words, &output)?;
    capture.wait_output("Ctrl-C ends it", wait::SOON)?;
    Ok(capture)
}

/// Ends it as Ctrl-C does; what it said.
fn end(mut capture: Process) -> Result<String> {
    capture.signal(rustix::process::Signal::INT)?;
    let status = capture.wait(wait::SOON)?;
    let output = capture.output();
    ensure!(status.success(), "{status}: {output}");
    Ok(output)
}

/// Packets captured and lost, by the last line.
fn summary(output: &str) -> Result<(u64, u64)> {
    let line = output
        .lines()
        .rev()
        .find(|line| line.contains(" captured, "));
    let line = line.with_context(|| format!("no summary: {output}"))?;
    let mut numbers = line.split_whitespace().filter_map(|word| word.parse().ok());
    let captured = numbers.next().context(line.to_owned())?;
    Ok((captured, numbers.next().context(line.to_owned())?))
}

fn file(lab: &Lab, name: &str) -> PathBuf {
    lab.directory().join(name)
}

/// What tcpdump makes of a file, a line a packet.
fn tcpdump(lab: &Lab, path: &Path, filter: &str) -> Result<Vec<String>> {
    let text = lab
        .host()
        .exec(format!("tcpdump -nr {} {filter}", path.display()))?;
    let is_packet = |line: &&str| line.contains(" IP");
    Ok(text.lines().filter(is_packet).map(str::to_owned).collect())
}

#[test]
fn tcpdump_reads_both_directions_of_a_ping_at_every_kind_of_port() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        ping_ok(a.namespace(), "10.1.1.254")?;
        for (port, ways) in [(a.port(), [1, 2]), ("int0", [2, 1])] {
            let path = file(lab, &format!("{port}.pcapng"));
            let capture = start(lab, port, &format!("{port} --write {}", path.display()))?;
            ping(a.namespace(), "10.1.1.254", 5, "-i 0.05")?;
            let (captured, lost) = summary(&end(capture)?)?;
            ensure!(
                captured >= 10 && lost == 0,
                "{captured} captured, {lost} lost"
            );
            let lines = tcpdump(lab, &path, "icmp")?;
            ensure!(lines.len() == 10, "{lines:#?}");
            ensure!(
                lines[0].contains("10.1.1.1 > 10.1.1.254: ICMP echo request"),
                "{lines:#?}"
            );
            let packets = read(&path)?;
            ensure!(packets.len() as u64 == captured, "{packets:#?}");
            ensure!(
                packets.iter().all(|packet| packet.interface == port),
                "{packets:#?}"
            );
            // A ping has 98 bytes; requests and replies go opposite ways.
            for way in ways {
                let pings = packets.iter().filter(|p| p.length == 98 && p.flags == way);
                ensure!(pings.count() == 5, "{packets:#?}");
            }
            let first = packets.iter().find(|p| p.length == 98).context("no ping")?;
            let word = if ways[0] == 1 { "in" } else { "out" };
            ensure!(first.comment == format!("{port} {word}"), "{first:?}");
        }
        let status = lab.status_json()?;
        ensure!(status["captures"] == 0, "{}", status["captures"]);
        Ok(())
    })
}

#[test]
fn a_capture_can_be_limited_and_piped() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        // Into tcpdump, with its filter; --count ends it.
        let output = file(lab, "pipe.out");
        let script = format!(
            "{} capture --run-dir {} {} --direction in --count 4 --snaplen 60 --write - | tcpdump -nr - icmp",
            lab.programs()?.ovs_dpd(),
            lab.run_dir().display(),
            a.port()
        );
        let mut pipe = lab.host().spawn(["sh", "-c", &script], &output)?;
        pipe.wait_output("Ctrl-C ends it", wait::SOON)?;
        ping(a.namespace(), "10.1.1.2", 8, "-i 0.05")?;
        let status = pipe.wait(wait::SOON)?;
        let text = pipe.output();
        ensure!(status.success(), "{text}");
        ensure!(
            text.contains("ICMP echo request") && !text.contains("echo reply"),
            "{text}"
        );
        ensure!(summary(&text)? == (4, 0), "{text}");
        // Lines, to a reader that goes.
        let output = file(lab, "head.out");
        let script = format!(
            "{} capture --run-dir {} {} | head -n 2",
            lab.programs()?.ovs_dpd(),
            lab.run_dir().display(),
            b.port()
        );
        let mut pipe = lab.host().spawn(["sh", "-c", &script], &output)?;
        pipe.wait_output("Ctrl-C ends it", wait::SOON)?;
        ping(a.namespace(), "10.1.1.2", 8, "-i 0.05")?;
        pipe.wait(wait::SOON)?;
        let text = pipe.output();
        let line = format!(" {} out  {} > {}", b.port(), a.mac_text(), b.mac_text());
        ensure!(text.contains(&line), "no {line:?}: {text}");
        ensure!(
            text.contains("ICMP 10.1.1.1 > 10.1.1.2: type 8 code 0, length 98"),
            "{text}"
        );
        Ok(())
    })
}

#[test]
fn drops_are_shown_with_their_reasons() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        let port = lab.ofport(a.port())?;
        let to = lab.ofport(b.port())?;
        lab.ofctl(format!(
            "add-flow br0 priority=100,in_port={port},dl_type=0x88b5,actions=drop"
        ))?;
        lab.ofctl(format!(
            "add-flow br0 priority=100,in_port={port},dl_type=0x88b6,actions=output:{to}"
        ))?;
        let socket = raw::Wire::open(&a)?;
        let unwanted = raw::ethernet(a.mac(), b.mac(), 0x88b5, b"unwanted");
        let refused = raw::ethernet(a.mac(), b.mac(), 0x88b6, b"refused");
        // Both flows are there before it begins.
        wait::soon("the flows", || {
            socket.send(&unwanted)?;
            socket.send(&refused)?;
            let flows = lab.dp_flows()?;
            let has = |what: &str| flows.iter().any(|flow| flow.contains(what));
            Ok(has("0x88b5") && has("0x88b6"))
        })?;
        let dropped = |port: &str, reason: &str| -> Result<u64> {
            let status = lab.status_json()?;
            let ports = status["datapaths"][0]["ports"]
                .as_array()
                .context("no ports")?;
            let port = ports
                .iter()
                .find(|p| p["name"] == port)
                .context("no port")?;
            Ok(port["packets"]["dropped"][reason].as_u64().unwrap_or(0))
        };
        // A peer that goes down: the port refuses what is given to it.
        lab.host().ip(["link", "set", b.port(), "down"])?;
        let path = file(lab, "a.pcapng");
        let of_a = start(
            lab,
            "a",
            &format!("{} --direction in -w {}", a.port(), path.display()),
        )?;
        let of_b = start(lab, "b", &format!("{} --drops", b.port()))?;
        let of_all = start(lab, "all", "--drops")?;
        let before = dropped(a.port(), "last_action")?;
        for _ in 0..50 {
            socket.send(&unwanted)?;
            socket.send(&refused)?;
        }
        wait::soon("50 drops", || {
            Ok(dropped(a.port(), "last_action")? >= before + 50)
        })?;
        let refusals = |text: &str| {
            let of = format!(" {} out ", b.port());
            text.lines()
                .filter(|line| line.contains(&of) && line.contains("; dropped: output_down"))
                .count()
        };
        wait::soon("50 refusals", || Ok(refusals(&of_b.output()) >= 50))?;
        let rise = (dropped(a.port(), "last_action")? - before) as usize;
        end(of_a)?;
        let packets = read(&path)?;
        let marked = |p: &&Packet| p.comment == format!("{} in; dropped: last_action", a.port());
        ensure!(
            packets.iter().filter(marked).count() == rise,
            "{packets:#?}"
        );
        let text = end(of_all)?;
        let of = format!(" {} drop ", a.port());
        let drops = text.lines().filter(|line| {
            line.contains(&of) && line.contains("type 0x88b5, length 60; dropped: last_action")
        });
        ensure!(drops.count() >= 50 && refusals(&text) >= 50, "{text}");
        let text = end(of_b)?;
        ensure!(!text.contains(&of), "another port's drops: {text}");
        lab.host().ip(["link", "set", b.port(), "up"])?;
        Ok(())
    })
}

#[test]
fn packets_that_stand_for_several_are_captured_whole() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        let path = file(lab, "gso.pcapng");
        let arguments = format!("{} -s 100 --count 2000 -w {}", b.port(), path.display());
        let mut capture = start(lab, "gso", &arguments)?;
        iperf3(lab, a.namespace(), b.namespace(), "10.1.1.2", 1, "")?;
        let status = capture.wait(wait::SOON)?;
        ensure!(status.success(), "{}", capture.output());
        let packets = read(&path)?;
        ensure!(packets.len() == 2000, "{}", packets.len());
        ensure!(packets.iter().all(|p| p.captured == p.length.min(100)));
        let large: Vec<_> = packets.iter().filter(|p| p.length > 1514).collect();
        ensure!(!large.is_empty(), "nothing was carried whole");
        for packet in large {
            ensure!(
                packet.comment.contains("; stands for TCP segments of 14")
                    && packet.comment.contains("; checksum not filled in yet"),
                "{packet:?}"
            );
        }
        ensure!(tcpdump(lab, &path, "tcp")?.len() > 1900);
        Ok(())
    })
}

#[test]
fn a_reader_that_is_stuck_loses_packets_and_delays_none() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        let b = lab.host_on("br0", "b", "10.1.1.2/24")?;
        ping_ok(a.namespace(), "10.1.1.2")?;
        let capture = start(
            lab,
            "stuck",
            &format!("{} -w {}", a.port(), file(lab, "s").display()),
        )?;
        capture.signal(rustix::process::Signal::STOP)?;
        let resident = lab.with_daemon(|daemon| daemon.process().status_kb("VmRSS"))?;
        // Its queue is full within moments.
        let speed = iperf3(lab, a.namespace(), b.namespace(), "10.1.1.2", 2, "")?;
        ensure!(speed.bits_per_second > 2e8, "{speed:?}");
        let seen = ping(a.namespace(), "10.1.1.2", 20, "-i 0.02")?;
        ensure!(seen.received == 20, "{seen:?}");
        let now = lab.with_daemon(|daemon| daemon.process().status_kb("VmRSS"))?;
        ensure!(now < resident + 64 * 1024, "{resident} kB, then {now} kB");
        ensure!(lab.status_json()?["captures"] == 1);
        capture.signal(rustix::process::Signal::CONT)?;
        let (captured, lost) = summary(&end(capture)?)?;
        ensure!(captured > 0 && lost > 0, "{captured} captured, {lost} lost");
        // One that is killed while it is stuck is forgotten.
        let mut capture = start(lab, "killed", a.port())?;
        capture.signal(rustix::process::Signal::STOP)?;
        capture.kill()?;
        wait::soon("the end of a dead capture", || {
            Ok(lab.status_json()?["captures"] == 0)
        })
    })
}

#[test]
fn who_may_not_and_what_is_not_there_is_told_why() -> Result<()> {
    lab::test_bare(|lab| {
        let a = lab.endpoint("a")?;
        lab.dpctl("add-dp dp1")?;
        lab.dpctl(["add-if", "dp1", a.port()])?;
        let run_dir = lab.run_dir().display().to_string();
        let says = |words: &[&str], what: &str| -> Result<()> {
            let words = [&["capture", "--run-dir", &run_dir], words].concat();
            let ran = lab.ovs_dpd(words.as_slice())?;
            ensure!(
                !ran.status.success() && ran.stderr.contains(what),
                "{ran:?}"
            );
            Ok(())
        };
        let names = format!("there is no port nosuch; there are dp1, {}", a.port());
        says(&["nosuch"], &names)?;
        says(&[], "<PORT|--drops>")?;
        says(
            &["dp1", "--drops", "--direction", "in"],
            "cannot be used with",
        )?;
        // Somebody without privileges.
        let program = lab.programs()?.ovs_dpd();
        let words = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            &program,
            "capture",
            "--run-dir",
            &run_dir,
            "dp1",
        ];
        let ran = lab.host().try_exec(words, wait::SOON)?;
        ensure!(
            !ran.status.success() && ran.stderr.contains("packets are shown to root"),
            "{ran:?}"
        );
        lab.stop_daemon()?;
        says(&["dp1"], "no daemon answers on")?;
        lab.start_daemon()
    })
}

#[test]
fn nonsense_on_the_captures_socket_is_answered_and_harms_nobody() -> Result<()> {
    lab::test_bare(|lab| {
        lab.dpctl("add-dp dp1")?;
        let path = lab.run_dir().join("capture.sock");
        let said = |what: &[u8]| -> Result<String> {
            let mut stream = UnixStream::connect(&path)?;
            stream.set_read_timeout(Some(wait::SOON))?;
            stream.write_all(what)?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer)
        };
        for what in [
            b"\n".as_slice(),
            b"{}\n",
            b"\xff\xff\n",
            b"[[[[[[[[\n",
            // Nothing: it is let go after a while.
            b"",
            &[b'['; 4096],
        ] {
            let answer = said(what)?;
            ensure!(answer.starts_with("{\"error\":\""), "{what:?}: {answer:?}");
        }
        let other = concat!(
            r#"{"version":"0.0.0","wish":{"port":null,"received":true,"transmitted":true,"#,
            r#""dropped":true,"snaplen":60}}"#,
            "\n"
        );
        let answer = said(other.as_bytes())?;
        ensure!(answer.contains("use that of the daemon"), "{answer}");
        // No more at a time than there may be, and room again when they end.
        let mut all = Vec::new();
        for number in 0..8 {
            all.push(start(lab, &format!("n{number}"), "--drops")?);
        }
        let run_dir = lab.run_dir().display().to_string();
        let ran = lab.ovs_dpd(["capture", "--drops", "--run-dir", &run_dir])?;
        ensure!(ran.stderr.contains("8 captures are in progress"), "{ran:?}");
        ensure!(lab.status()?.contains("captures in progress: 8"));
        for capture in all {
            end(capture)?;
        }
        end(start(lab, "again", "--drops")?)?;
        Ok(())
    })
}
