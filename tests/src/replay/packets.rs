//! Packets of the recordings: let in at the far end of a port, awaited at the far ends of all ports and at
//! the reader of upcalls.
//!
//! Behind each packet goes a sentinel, a frame that no flow matches. When its upcall has come, a second one
//! goes; when that one's has come, the packet's batch is over, and what hasn't come never will.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::corpus::{self, Case};
use crate::lab::Lab;
use crate::replay::differences::{self, How};
use crate::replay::laboratory::{self, PATIENCE, UNDERLAY, Wires};
use crate::replay::session::{Session, errno, messages, request};
use crate::replay::translate::family;

/// The recordings' ports that can be captured.
const PORTS: [u32; 6] = [1, 2, 3, 6, 0, UNDERLAY];
/// The ifindex that the laboratory's datapath had.
const DATAPATH: u32 = 11;

/// Frames by port, in order at each.
pub type Frames = BTreeMap<u32, Vec<Vec<u8>>>;

/// The packet laboratory: `dpa` with `va`, `vb`, `vc` at 1 to 3 and the internal port `int0` at 6.
pub struct Packets {
    /// The netlink side.
    pub session: Session,
    /// The far ends.
    pub wires: Wires,
    sentinels: u16,
    /// What is compared of frames and upcalls is how many there are and how long: [`How::Chosen`].
    chosen: bool,
}

impl Packets {
    /// The laboratory as recorded in `lab_setup`, for the recording `group`.
    ///
    /// # Errors
    /// It can't be made so.
    pub fn new(lab: &Lab, group: &str) -> Result<Self> {
        for end in ['a', 'b', 'c'] {
            laboratory::cable(lab, end, 9000)?;
        }
        let mut session = Session::open(lab, "lab_setup")?;
        for case in corpus::read("lab_setup")? {
            session.replay("lab_setup", &case)?;
        }
        session.go_on(&corpus::meta(group)?);
        laboratory::underlay(lab)?;
        lab.host().ip("link set int0 mtu 9000 up")?;
        lab.host().ip("link set dpa up")?;
        laboratory::offloads(lab, "int0", false)?;
        let wires = Wires::open(lab, &PORTS)?;
        let mut packets = Self {
            session,
            wires,
            sentinels: 0,
            chosen: false,
        };
        packets.settle()?;
        Ok(packets)
    }

    /// Waits until every port carries packets.
    fn settle(&mut self) -> Result<()> {
        for port in PORTS.into_iter().filter(|port| *port != UNDERLAY) {
            self.sentinel(port)?;
        }
        Ok(())
    }

    /// Replays one line: flows and packets, or an EXECUTE with what came of it.
    ///
    /// # Errors
    /// The harness failed; what differs is in [`Session::found`].
    pub fn replay(&mut self, group: &str, case: &Case) -> Result<()> {
        let difference = differences::of(group, case.name());
        if difference.is_some_and(|difference| difference.how == How::LeftOut) {
            self.session.left_out += 1;
            return Ok(());
        }
        if !case.request().is_empty() {
            return self.execute(group, case);
        }
        let extra: &[&[u16]] = match difference.map(|difference| difference.how) {
            Some(How::Attributes(paths)) => paths,
            _ => &[],
        };
        self.chosen = difference.is_some_and(|difference| difference.how == How::Chosen);
        let mut wrong = String::new();
        self.session.flush(DATAPATH)?;
        let json = case.json();
        let nothing = BTreeMap::new();
        if let Some(port) = number(json.get("in_port")) {
            let frame = case.bytes("packet_in_hex");
            let upcalls = messages(case, "miss_upcalls_hex");
            self.step(port, &frame, &nothing, upcalls, extra, &mut wrong)?;
        }
        for flow in array(json, "flows") {
            self.install(flow, &mut wrong)?;
        }
        for step in array(json, "steps") {
            let port = number(step.get("in_port")).context("a step without a port")?;
            let frame = bytes(step, "packet_in_hex");
            let out = frames(step)?;
            let upcalls = array(step, "upcalls").filter_map(Value::as_str);
            let upcalls = upcalls.map(corpus::unhex).collect();
            self.step(port, &frame, &out, upcalls, extra, &mut wrong)?;
        }
        self.session.judge(group, case, wrong);
        Ok(())
    }

    fn execute(&mut self, group: &str, case: &Case) -> Result<()> {
        // The one case whose upcall goes to the requester itself.
        let (recorded, ours) = self.session.translator.requesters();
        let itself = case.name() == "user-pid-req";
        if itself {
            self.session.translator.word(recorded, ours);
        }
        let talked = self.session.talk(group, case)?;
        if itself {
            self.session.translator.forget_word(recorded);
        }
        let Some(mut wrong) = talked else {
            return Ok(());
        };
        let expected = frames(case.json())?;
        let wanted = expected.values().map(Vec::len).sum();
        let patience = if wrong.is_empty() {
            PATIENCE
        } else {
            Duration::ZERO
        };
        let mut came = self.wires.gather(wanted, patience)?;
        self.session.requester.settle()?;
        for (port, more) in self.wires.gather(0, Duration::ZERO)? {
            came.entry(port).or_default().extend(more);
        }
        compare_frames(&expected, &came, &mut wrong);
        self.session.judge(group, case, wrong);
        Ok(())
    }

    /// Installs a flow of a recording.
    ///
    /// # Errors
    /// The harness failed.
    fn install(&mut self, flow: &Value, wrong: &mut String) -> Result<()> {
        let recorded = match flow.get("errno") {
            Some(Value::String(_)) => true,
            Some(Value::Number(_)) => false,
            _ => bail!("a flow without an errno"),
        };
        let (key, mask) = (bytes(flow, "key_hex"), bytes(flow, "mask_hex"));
        let errno = self.flow(&key, Some(&mask), &bytes(flow, "actions_hex"))?;
        if recorded != (errno != 0) {
            writeln!(wrong, "ours errno {errno};\nflow: {:?}", flow.get("errno"))?;
        }
        Ok(())
    }

    /// Installs a flow from recorded attributes; gives the errno.
    ///
    /// # Errors
    /// No answer.
    pub fn flow(&mut self, key: &[u8], mask: Option<&[u8]>, actions: &[u8]) -> Result<i32> {
        /// `OVS_FLOW_CMD_NEW`.
        const NEW: u8 = 1;
        /// `OVS_FLOW_ATTR_KEY`, `_ACTIONS`, `_MASK`.
        const ATTRIBUTES: [u16; 3] = [1, 2, 7];
        let actions = self.session.translator.payload(actions);
        let mut body = Vec::new();
        let parts = [Some(key), Some(&actions), mask];
        for (kind, payload) in ATTRIBUTES.iter().zip(parts) {
            if let Some(payload) = payload {
                attribute(&mut body, *kind, payload);
            }
        }
        let ifindex = self.session.translator.ifindex(DATAPATH)?;
        let request = request(family::FLOW, NEW, ifindex, &body);
        let answers = self.session.requester.converse(&request)?;
        let last = answers.last().context("no answer")?;
        self.session.listener.settle()?;
        self.session.listener.gather(0, Duration::ZERO)?;
        errno(last).context("no errno")
    }

    /// Sets a meter of `rate` packets a second.
    ///
    /// # Errors
    /// It doesn't succeed.
    pub fn meter(&mut self, id: u32, rate: u32, burst: u32) -> Result<()> {
        /// `OVS_METER_CMD_SET`; `OVS_METER_ATTR_ID`, `_BANDS`.
        const SET: u8 = 2;
        const ID: u16 = 1;
        const BANDS: u16 = 4;
        let mut band = Vec::new();
        // `OVS_BAND_ATTR_TYPE`: drop; `_RATE`, `_BURST`.
        for (kind, value) in [(1, 1), (2, rate), (3, burst)] {
            attribute(&mut band, kind, &value.to_ne_bytes());
        }
        let mut bands = Vec::new();
        attribute(&mut bands, 0, &band);
        let mut body = Vec::new();
        attribute(&mut body, ID, &id.to_ne_bytes());
        attribute(&mut body, BANDS, &bands);
        let ifindex = self.session.translator.ifindex(DATAPATH)?;
        let request = request(family::METER, SET, ifindex, &body);
        let answers = self.session.requester.converse(&request)?;
        let errno = answers.last().and_then(|answer| errno(answer));
        anyhow::ensure!(errno == Some(0), "meter {id}: {errno:?}");
        Ok(())
    }

    /// Sets how many connections a zone may have.
    ///
    /// # Errors
    /// It doesn't succeed.
    pub fn limit(&mut self, zone: i32, limit: u32) -> Result<()> {
        /// `OVS_CT_LIMIT_CMD_SET`; `OVS_CT_LIMIT_ATTR_ZONE_LIMIT`.
        const SET: u8 = 1;
        const ZONE_LIMIT: u16 = 1;
        let mut entry = zone.to_ne_bytes().to_vec();
        entry.extend_from_slice(&limit.to_ne_bytes());
        entry.extend_from_slice(&[0; 4]);
        let mut body = Vec::new();
        attribute(&mut body, ZONE_LIMIT, &entry);
        let ifindex = self.session.translator.ifindex(DATAPATH)?;
        let request = request(family::CT_LIMIT, SET, ifindex, &body);
        let answers = self.session.requester.converse(&request)?;
        let errno = answers.last().and_then(|answer| errno(answer));
        anyhow::ensure!(
            errno.is_none_or(|errno| errno == 0),
            "zone {zone}: {errno:?}"
        );
        Ok(())
    }

    /// Deletes all flows.
    ///
    /// # Errors
    /// As [`Session::flush`].
    pub fn flush(&mut self) -> Result<()> {
        self.session.flush(DATAPATH)
    }

    /// Lets one packet in and compares what comes of it.
    ///
    /// # Errors
    /// The harness failed.
    pub fn step(
        &mut self,
        port: u32,
        frame: &[u8],
        out: &Frames,
        upcalls: Vec<Vec<u8>>,
        extra: &[&[u16]],
        wrong: &mut String,
    ) -> Result<()> {
        self.wires.send(port, frame)?;
        self.step_by(|| Ok(()), port, out, upcalls, extra, wrong)
    }

    /// The same for what `send` lets in at that port.
    ///
    /// # Errors
    /// The harness failed.
    pub fn step_by(
        &mut self,
        send: impl FnOnce() -> Result<()>,
        port: u32,
        out: &Frames,
        upcalls: Vec<Vec<u8>>,
        extra: &[&[u16]],
        wrong: &mut String,
    ) -> Result<()> {
        send()?;
        if port == UNDERLAY {
            // A tunnel's packets come by queues of their own, which sentinels don't follow.
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut came = self.sentinel(port)?;
        came.extend(self.sentinel(port)?);
        // The packet has left by now; the host may still be carrying it to a socket.
        let wanted = out.values().map(Vec::len).sum();
        let frames = self.wires.gather(wanted, Duration::from_millis(100))?;
        if self.chosen {
            if lengths(out) != lengths(&frames) {
                compare_frames(out, &frames, wrong);
            }
            let of = |upcalls: &[Vec<u8>]| upcalls.iter().map(Vec::len).collect::<Vec<_>>();
            if of(&upcalls) == of(&came) {
                return Ok(());
            }
        } else {
            compare_frames(out, &frames, wrong);
        }
        self.session.compare("upcall", upcalls, came, extra, wrong)
    }

    /// What the datapath says of itself (`OVS_DP_CMD_GET`).
    ///
    /// # Errors
    /// No answer.
    pub fn datapath(&mut self) -> Result<Vec<u8>> {
        /// `OVS_DP_CMD_GET`.
        const GET: u8 = 3;
        let ifindex = self.session.translator.ifindex(DATAPATH)?;
        let request = request(family::DATAPATH, GET, ifindex, &[]);
        let answers = self.session.requester.converse(&request)?;
        answers.into_iter().next().context("no answer")
    }

    /// Sends a sentinel and waits for its upcall; gives the upcalls before it.
    fn sentinel(&mut self, port: u32) -> Result<Vec<Vec<u8>>> {
        if port == UNDERLAY {
            return self.tunnel_sentinel();
        }
        self.sentinels = self.sentinels.wrapping_add(1);
        let mut frame = [0; 60];
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0xfd, 2, 0, 0, 0, 0, 0xfe, 0x88, 0xb5]);
        frame[14..16].copy_from_slice(&self.sentinels.to_be_bytes());
        self.wires.send(port, &frame)?;
        self.until_upcall(&frame)
            .with_context(|| format!("sentinel at port {port}"))
    }

    /// The same through the first VXLAN tunnel.
    fn tunnel_sentinel(&mut self) -> Result<Vec<Vec<u8>>> {
        self.sentinels = self.sentinels.wrapping_add(1);
        let mut inner = [0; 60];
        inner[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0xfd, 2, 0, 0, 0, 0, 0xfe, 0x88, 0xb5]);
        inner[14..16].copy_from_slice(&self.sentinels.to_be_bytes());
        let mut frame = vec![2, 0, 0, 0, 0xaa, 1, 2, 0, 0, 0, 0xaa, 2, 8, 0];
        let mut ip = [
            0x45, 0, 0, 96, 0, 0, 0, 0, 64, 17, 0, 0, 172, 16, 0, 2, 172, 16, 0, 1,
        ];
        let words = ip
            .chunks(2)
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        let sum: u32 = words.sum();
        let sum = !((sum >> 16) + (sum & 0xffff)) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend_from_slice(&ip);
        frame.extend_from_slice(&[0x15, 0xb3, 0x12, 0xb5, 0, 76, 0, 0]);
        frame.extend_from_slice(&[8, 0, 0, 0, 0xff, 0xff, 0xff, 0]);
        frame.extend_from_slice(&inner);
        self.wires.send(UNDERLAY, &frame)?;
        self.until_upcall(&inner).context("sentinel in a tunnel")
    }

    /// Waits for the upcall of a frame; gives the upcalls before it.
    fn until_upcall(&mut self, frame: &[u8]) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + PATIENCE;
        let mut before = Vec::new();
        while Instant::now() < deadline {
            for message in self.session.reader.gather(1, Duration::from_millis(100))? {
                if message.ends_with(frame) {
                    return Ok(before);
                }
                before.push(message);
            }
        }
        bail!("no upcall")
    }
}

/// Appends an attribute.
pub fn attribute(out: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    let len = (payload.len() + 4) as u16;
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn array<'v>(value: &'v Value, field: &str) -> impl Iterator<Item = &'v Value> + use<'v> {
    let list = value.get(field).and_then(Value::as_array);
    list.into_iter().flatten()
}

fn bytes(value: &Value, field: &str) -> Vec<u8> {
    let text = value.get(field).and_then(Value::as_str);
    corpus::unhex(text.unwrap_or_default())
}

/// A port's number; [`UNDERLAY`] where the wire under the tunnels is meant.
fn number(port: Option<&Value>) -> Option<u32> {
    match port? {
        Value::String(name) if name == "underlay" => Some(UNDERLAY),
        port => port.as_u64().and_then(|port| u32::try_from(port).ok()),
    }
}

/// The frames that a recording says have left, by port.
pub fn frames(value: &Value) -> Result<Frames> {
    let mut frames = Frames::new();
    for frame in array(value, "out") {
        let port = number(frame.get("port")).context("a frame without a port")?;
        frames.entry(port).or_default().push(bytes(frame, "hex"));
    }
    Ok(frames)
}

fn lengths(frames: &Frames) -> BTreeMap<u32, Vec<usize>> {
    let of = |frames: &Vec<Vec<u8>>| frames.iter().map(Vec::len).collect();
    frames.iter().map(|(port, all)| (*port, of(all))).collect()
}

/// What is chosen by a kernel and its secrets in a packet under a tunnel: IPv4's identification, and with it
/// the header's sum; the UDP source port, and with it the sum over it.
fn without_choices(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let u16_at = |frame: &[u8], at: usize| match frame.get(at..at + 2) {
        Some([a, b]) => u16::from_be_bytes([*a, *b]),
        _ => 0,
    };
    let (udp, checked, blank): (usize, bool, &[usize]) = match u16_at(&frame, 12) {
        0x0800 => {
            let later = u16_at(&frame, 20) & 0x1fff != 0;
            let udp = frame.get(23) == Some(&17) && !later;
            (34, udp, &[18, 24])
        }
        0x86dd => (54, frame.get(20) == Some(&17), &[]),
        _ => return frame,
    };
    let mut places = blank.to_vec();
    if checked {
        places.push(udp);
        if u16_at(&frame, udp + 6) != 0 {
            places.push(udp + 6);
        }
    }
    for at in places {
        if let Some(place) = frame.get_mut(at..at + 2) {
            place.fill(0);
        }
    }
    frame
}

fn compare_frames(expected: &Frames, came: &Frames, wrong: &mut String) {
    let under = |frames: &Frames| {
        let mut frames = frames.clone();
        if let Some(wire) = frames.get_mut(&UNDERLAY) {
            // The host's own reports of IPv6 groups.
            wire.retain(|frame| !frame.starts_with(&[0x33, 0x33]));
            wire.iter_mut()
                .for_each(|frame| *frame = without_choices(frame));
        }
        frames.retain(|_, frames| !frames.is_empty());
        frames
    };
    let (expected, came) = (&under(expected), &under(came));
    if expected == came {
        return;
    }
    for (what, frames) in [("expected", expected), ("ours    ", came)] {
        for (port, frames) in frames {
            for frame in frames {
                let digits: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
                let _ = writeln!(wrong, "  {what} port {port} frame {digits}");
            }
        }
    }
    if wrong.is_empty() {
        wrong.push_str("frames");
    }
}
