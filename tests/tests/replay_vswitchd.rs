//! What ovs-vswitchd and ovs-dpctl said to the kernel module, as captures of their netlink traffic have it, said to
//! ovs-dpd: every probe, bridges, ports, tunnels, packets that miss, revalidation, conntrack limits, meters, mirrors,
//! sFlow, a bond, a second datapath, a restart. Every request is sent, every answer compared.
//!
//! A packet whose upcall was captured comes in at its port again. Packets that hit a flow aren't in a capture of
//! netlink traffic: what counts them is in `differences::TRAFFIC`, and nothing else is left out.

use anyhow::{Context, Result};
use tests::corpus::{self, Case};
use tests::lab::{self, Lab};
use tests::replay::differences;
use tests::replay::laboratory::{self, Wires};
use tests::replay::session::Session;
use tests::replay::translate::{HEADERS, attributes, family, u32_at};

/// `OVS_VPORT_CMD_NEW`, `_DEL`, `_GET`.
mod vport {
    pub const NEW: u64 = 1;
    pub const DEL: u64 = 2;
    pub const GET: u64 = 3;
}

#[test]
fn a_start_a_bridge_and_pings() -> Result<()> {
    replay("vswitchd_live", &[(2, "v1"), (3, "v2")])
}

#[test]
fn every_command() -> Result<()> {
    let ports = [(2, "v1"), (3, "v2"), (4, "v3"), (u32::MAX, "pu")];
    replay("vswitchd_live2", &ports)
}

/// Replays a capture. `cables` are the devices that there were, by their port numbers later.
fn replay(group: &str, cables: &[(u32, &str)]) -> Result<()> {
    lab::test_bare(|lab| {
        let mut capture = Capture::open(lab, group, cables)?;
        for case in corpus::read(group)? {
            capture
                .line(lab, group, &case)
                .with_context(|| format!("{group} {}", case.name()))?;
        }
        for (_, device) in cables {
            if lab.host().links()?.iter().any(|name| name == device) {
                lab.host().ip(["link", "del", device])?;
            }
        }
        capture.session.conclude()
    })
}

struct Capture {
    session: Session,
    /// The far ends of the cables.
    wires: Wires,
}

impl Capture {
    fn open(lab: &Lab, group: &str, cables: &[(u32, &str)]) -> Result<Self> {
        let mut session = Session::open(lab, group)?;
        session.unseen = differences::TRAFFIC;
        for number in 0..transport::FAMILIES.len() as u32 {
            session.listener.leave(number)?;
        }
        let host = lab.host();
        let mut far_ends = Vec::new();
        for (port, device) in cables {
            let far = format!("t-{device}");
            host.ip([
                "link", "add", device, "up", "type", "veth", "peer", "name", &far,
            ])?;
            host.ip(["link", "set", &far, "up"])?;
            laboratory::offloads(lab, device, false)?;
            laboratory::offloads(lab, &far, false)?;
            far_ends.push((*port, far));
        }
        let far_ends = far_ends.iter().map(|(port, far)| (*port, far.as_str()));
        let wires = Wires::at(lab, far_ends)?;
        Ok(Self { session, wires })
    }

    fn line(&mut self, lab: &Lab, group: &str, case: &Case) -> Result<()> {
        if let Some(command) = case.text("mark").strip_prefix("ip link del ") {
            lab.host().ip(["link", "del", command])?;
        }
        if !case.text("mark").is_empty() {
            return Ok(());
        }
        if let Some(port) = case.json().get("in_port").and_then(|port| port.as_u64()) {
            let port = u32::try_from(port)?;
            self.wires.send(port, &case.bytes("packet_in_hex"))?;
        }
        if case.request().is_empty() {
            return self.session.replay(group, case);
        }
        self.readers(case);
        let changes = case.family() == "ovs_vport" && case.command() != Some(vport::GET);
        if changes {
            // Notifications are in a capture where somebody listened to them.
            match case.json().get("notifs") {
                Some(_) => self.session.listener.join(family::VPORT as u32)?,
                None => self.session.listener.leave(family::VPORT as u32)?,
            }
            self.session.listener.settle()?;
        }
        if changes && case.command() == Some(vport::NEW) {
            laboratory::tunnel(lab, &name(&case.request()), true)?;
        }
        self.session.replay_as(group, case)?;
        if changes && case.command() == Some(vport::DEL) {
            let reply = case.replies().into_iter().next().unwrap_or_default();
            laboratory::tunnel(lab, &name(&reply), false)?;
        }
        Ok(())
    }

    /// The readers of upcalls that a datapath is told are one here.
    fn readers(&mut self, case: &Case) {
        /// `OVS_DP_ATTR_PER_CPU_PIDS`.
        const PER_CPU_PIDS: u16 = 8;
        if case.family() != "ovs_datapath" {
            return;
        }
        let request = case.request();
        let reader = self.session.reader.port_id();
        for place in attributes(&request, HEADERS, request.len()) {
            if place.kind == PER_CPU_PIDS {
                for at in (place.start + 4..place.end).step_by(4) {
                    self.session.translator.word(u32_at(&request, at), reader);
                }
            }
        }
    }
}

/// The name in a message of `ovs_vport`; empty if there is none.
fn name(message: &[u8]) -> String {
    /// `OVS_VPORT_ATTR_NAME`.
    const NAME: u16 = 3;
    let places = attributes(message, HEADERS, message.len());
    let place = places.into_iter().find(|place| place.kind == NAME);
    let bytes = place.and_then(|place| message.get(place.start + 4..place.end));
    let text = String::from_utf8_lossy(bytes.unwrap_or_default());
    text.trim_end_matches('\0').to_owned()
}
