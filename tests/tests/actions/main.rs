//! Each action through OpenFlow and the real ovs-vswitchd: the frames that come out, byte by byte, and the
//! datapath action that did it.
//!
//! Every frame is sent twice: the first goes through an upcall and comes back with its actions (EXECUTE), the
//! second meets the flow that ovs-vswitchd has put into the datapath meanwhile. What comes out must be the same.
//!
//! Elsewhere: conntrack (`conntrack.rs`), groups (`group.rs`), sFlow and IPFIX, which are `sample` and
//! `userspace` (`sampling.rs`), the rates of meters (`meter.rs`), tunnels.

mod encapsulation;
mod fields;
mod forwarding;
mod frames;
mod mpls;
mod pipeline;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::traffic::raw::{Wire, hex};
use tests::{Endpoint, Lab};

/// How long a frame may take.
const SOON: Duration = Duration::from_secs(20);
/// How long one waits for a frame that mustn't come.
const QUIET: Duration = Duration::from_millis(60);

/// A bridge `br0` with three endpoints as ports 1, 2 and 3, and no rule.
pub struct Bed<'l> {
    /// The laboratory.
    pub lab: &'l Lab,
    ends: [Arc<Endpoint>; 3],
    wires: [Wire; 3],
}

impl<'l> Bed<'l> {
    /// The bridge and its endpoints.
    pub fn new(lab: &'l Lab) -> Result<Self> {
        lab.bridge("br0")?;
        let ends = [lab.endpoint("a")?, lab.endpoint("b")?, lab.endpoint("c")?];
        for (number, end) in (1..).zip(&ends) {
            lab.port("br0", end, "")?;
            ensure!(
                lab.ofport(end.port())? == number,
                "{} isn't port {number}",
                end.port()
            );
        }
        let wires = [
            Wire::open(&ends[0])?,
            Wire::open(&ends[1])?,
            Wire::open(&ends[2])?,
        ];
        for text in ["failed to flow_get", "Failed to acquire udpif_key"] {
            lab.expect_log(text, "revalidators that had begun a dump before a purge");
        }
        // "Dropped ... log messages" wouldn't tell which.
        lab.appctl("vlog/disable-rate-limit dpif ofproto_dpif_upcall")?;
        let bed = Self { lab, ends, wires };
        bed.rules(&[])?;
        Ok(bed)
    }

    /// The device of port `number` in the switch's namespace.
    pub fn device(&self, number: usize) -> &str {
        self.ends[number - 1].port()
    }

    /// Makes these the only rules, and empties the datapath.
    ///
    /// The revalidators stand still meanwhile: one that had already found what becomes of the old megaflow, while
    /// there was no rule, would make that of the new one too, which is the same frame's, and drop it. Then they go
    /// once through what they had begun to dump before.
    pub fn rules(&self, rules: &[&str]) -> Result<()> {
        self.lab.appctl("revalidator/pause")?;
        self.openflow(&["del-flows", "br0"])?;
        for rule in rules {
            self.openflow(&["add-flow", "br0", rule])?;
        }
        self.lab.appctl("revalidator/purge")?;
        for command in ["resume", "pause", "resume"] {
            self.lab.appctl(format!("revalidator/{command}").as_str())?;
        }
        Ok(())
    }

    /// ovs-ofctl in OpenFlow 1.5, which has masked set_field and no lossy translations.
    pub fn openflow(&self, words: &[&str]) -> Result<String> {
        self.lab
            .ofctl([&["-O", "OpenFlow15"], words].concat().as_slice())
    }

    /// Sends a frame from the endpoint of a port.
    pub fn send(&self, port: usize, frame: &[u8]) -> Result<()> {
        self.wires[port - 1].send(frame)
    }

    /// What comes out of a port: at least `count` frames, and all that follow soon.
    pub fn gather(&self, port: usize, count: usize) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + SOON;
        let mut frames = Vec::new();
        while frames.len() < count && Instant::now() < deadline {
            frames.extend(self.wires[port - 1].capture_for(Duration::from_millis(5))?);
        }
        frames.extend(self.wires[port - 1].capture_for(QUIET)?);
        Ok(frames)
    }

    /// Sends a frame into port 1, twice, and checks all that comes out of the ports 2 and 3.
    pub fn expect(&self, what: &str, frame: &[u8], at2: &[&[u8]], at3: &[&[u8]]) -> Result<()> {
        for way in ["by EXECUTE", "by the flow"] {
            self.send(1, frame)?;
            for (port, wanted) in [(2, at2), (3, at3)] {
                let came = self.gather(port, wanted.len())?;
                let show = |frames: &[&[u8]]| {
                    let lines: Vec<_> = frames.iter().map(|f| hex(f)).collect();
                    lines.join("\n ")
                };
                let came: Vec<&[u8]> = came.iter().map(Vec::as_slice).collect();
                ensure!(
                    came == wanted,
                    "{what}, {way}, port {port}: came\n {}\nwanted\n {}\nflows {:#?}\n{}",
                    show(&came),
                    show(wanted),
                    self.lab.dp_flows()?,
                    self.lab.status_json()?
                );
            }
            if way == "by EXECUTE" {
                self.installed()?;
            }
        }
        Ok(())
    }

    /// Waits until ovs-vswitchd's handlers have put their flows in.
    fn installed(&self) -> Result<()> {
        tests::wait::soon("a flow", || Ok(!self.lab.dp_flows()?.is_empty()))
    }

    /// The actions of the flows in the datapath.
    pub fn actions(&self) -> Result<Vec<String>> {
        let flows = self.lab.dp_flows()?;
        let actions = flows
            .iter()
            .filter_map(|flow| flow.split_once("actions:"))
            .map(|(_, actions)| actions.to_owned());
        Ok(actions.collect())
    }

    /// Checks that a flow in the datapath has all of `parts` in its actions, and has carried a packet.
    pub fn uses(&self, parts: &[&str]) -> Result<()> {
        let flows = self.lab.dp_flows()?;
        let fits = |flow: &&String| {
            flow.split_once("actions:")
                .is_some_and(|(_, actions)| parts.iter().all(|part| actions.contains(part)))
        };
        ensure!(
            flows
                .iter()
                .filter(fits)
                .any(|flow| !flow.contains("packets:0")),
            "no used flow with {parts:?}: {flows:#?}"
        );
        Ok(())
    }

    /// One rule, what it makes of `frame` at port 2, and the datapath actions that do it.
    pub fn rule(&self, rule: &str, frame: &[u8], out: &[u8], parts: &[&str]) -> Result<()> {
        self.rules(&[rule])?;
        self.expect(rule, frame, &[out], &[])?;
        self.uses(parts)
    }
}
