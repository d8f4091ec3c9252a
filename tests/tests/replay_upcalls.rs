//! Upcalls of the kernel module replayed: who reads them, unfinished checksums and GSO packets, alignment.
//!
//! The recording `sem_upcall` has the messages, not the flows' actions nor the device settings; they are
//! made anew here. Which of several readers gets an upcall is no question: the module goes by CPU or by its
//! own hash.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::corpus::{self, Case};
use tests::lab::{self, Lab};
use tests::replay::client::Client;
use tests::replay::differences;
use tests::replay::laboratory::{self, PATIENCE};
use tests::replay::packets::{Packets, attribute, frames};
use tests::replay::session::messages;
use tests::replay::translate::{attributes, u32_at};
use tests::wait;

const GROUP: &str = "sem_upcall";

/// `enum ovs_action_attr` and what is in them.
mod action {
    pub const OUTPUT: u16 = 1;
    pub const USERSPACE: u16 = 2;
    pub const SET: u16 = 3;
    pub const TRUNC: u16 = 13;
    pub const CHECK_PKT_LEN: u16 = 21;
}

fn output(port: u32) -> Vec<u8> {
    one(action::OUTPUT, &port.to_ne_bytes())
}

fn userspace(pid: u32, data: &[u8]) -> Vec<u8> {
    let mut body = one(1, &pid.to_ne_bytes());
    if !data.is_empty() {
        attribute(&mut body, 2, data);
    }
    one(action::USERSPACE, &body)
}

fn one(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    attribute(&mut bytes, kind, payload);
    bytes
}

/// The payload of an attribute of an upcall.
fn payload(upcall: &[u8], kind: u16) -> Option<&[u8]> {
    let place = attributes(upcall, 24, upcall.len())
        .into_iter()
        .find(|place| place.kind == kind)?;
    upcall.get(place.start + 4..place.end)
}

const PACKET: u16 = 1;
const KEY: u16 = 2;

/// The recorded GSO packet promises a sum over its pseudo header (0xe330) that isn't the right one (0x1e1d).
/// The kernel makes the segments' checksums from the promise, so that they are as wrong; ours are made from
/// the headers. Puts the right one into a recorded upcall, which may be cut: by the difference.
fn right_sum(upcall: &mut [u8]) -> Result<()> {
    /// Of the TCP checksum, behind Ethernet and IPv4.
    const AT: usize = 14 + 20 + 16;
    let packet = attributes(upcall, 24, upcall.len())
        .into_iter()
        .find(|place| place.kind == PACKET)
        .context("no packet")?;
    let field = packet.start + 4 + AT..packet.start + 4 + AT + 2;
    let field = upcall.get_mut(field).context("a short packet")?;
    let recorded = u16::from_be_bytes([field[0], field[1]]);
    let sum = u32::from(!recorded) + 0x1e1d + u32::from(!0xe330_u16);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    field.copy_from_slice(&(!(folded as u16)).to_be_bytes());
    Ok(())
}

/// What a case is about.
struct Upcalls<'a> {
    lab: &'a Lab,
    packets: Packets,
    /// Of the port ids that the recording lists, but the first, which is the usual reader's.
    readers: Vec<Client>,
    /// The recorded upcall of the last case that has one.
    last: Vec<u8>,
}

#[test]
fn readers_and_unfinished_packets() -> Result<()> {
    lab::test_bare(|lab| {
        let packets = Packets::new(lab, GROUP)?;
        let mut upcalls = Upcalls {
            lab,
            packets,
            readers: Vec::new(),
            last: Vec::new(),
        };
        upcalls.readers()?;
        for case in corpus::read(GROUP)? {
            upcalls
                .case(&case)
                .with_context(|| format!("{GROUP} {}", case.name()))?;
        }
        laboratory::remove_cables(lab)?;
        upcalls.packets.session.conclude()
    })
}

impl Upcalls<'_> {
    fn readers(&mut self) -> Result<()> {
        let cases = corpus::read(GROUP)?;
        let pids = cases
            .iter()
            .find_map(|case| case.json().get("pids")?.as_array().cloned())
            .context("no port ids")?;
        for pid in pids.iter().skip(1).filter_map(Value::as_u64) {
            let client = laboratory::client(self.lab)?;
            let translator = &mut self.packets.session.translator;
            translator.word(u32::try_from(pid)?, client.port_id());
            self.readers.push(client);
        }
        Ok(())
    }

    fn case(&mut self, case: &Case) -> Result<()> {
        let name = case.name();
        let left_out = differences::of(GROUP, name)
            .is_some_and(|difference| difference.how == differences::How::LeftOut);
        if left_out {
            self.packets.session.left_out += 1;
            return Ok(());
        }
        if !case.request().is_empty() {
            return self.packets.session.replay(GROUP, case);
        }
        if case.json().get("got").is_some() {
            return self.dispatched(case);
        }
        self.last_upcall(messages(case, "upcalls"));
        if case.json().get("vnet").is_some() {
            return self.unfinished(case);
        }
        // Alignment: a miss of what the upcall shows.
        let expected = messages(case, "upcalls");
        let frame = payload(&self.last, PACKET).context("no packet")?.to_vec();
        let mut wrong = String::new();
        self.packets.flush()?;
        self.packets
            .step(1, &frame, &Default::default(), expected, &[], &mut wrong)?;
        self.packets.session.judge(GROUP, case, wrong);
        Ok(())
    }

    fn last_upcall(&mut self, upcalls: Vec<Vec<u8>>) {
        if let Some(last) = upcalls.into_iter().last() {
            self.last = last;
        }
    }

    /// One packet, several readers.
    fn dispatched(&mut self, case: &Case) -> Result<()> {
        let got = case.json().get("got").and_then(Value::as_object);
        let expected: Vec<_> = got
            .context("got")?
            .values()
            .flat_map(|list| list.as_array().into_iter().flatten())
            .filter_map(Value::as_str)
            .map(corpus::unhex)
            .collect();
        self.last_upcall(expected.clone());
        let frame = payload(&self.last, PACKET).context("no packet")?.to_vec();
        self.packets.flush()?;
        let reader = self.packets.session.reader.port_id();
        let actions = match case.name() {
            name if name.contains("otherpid") => Some(userspace(reader, b"x")),
            name if name.contains("user-action") => Some(userspace(u32::MAX, b"x")),
            _ => None,
        };
        if let Some(actions) = actions {
            let key = payload(&self.last, KEY).context("no key")?;
            let errno = self.packets.flow(key, None, &actions)?;
            ensure!(errno == 0, "flow: {errno}");
        }
        let lost = self.lost()?;
        self.packets.wires.send(1, &frame)?;
        let mut wrong = String::new();
        if expected.is_empty() {
            // Nobody reads: it is counted.
            wait::soon("the loss", || Ok(self.lost()? == lost + 1))?;
        }
        let mut came = Vec::new();
        wait::until("the upcall", PATIENCE, || {
            for reader in &mut self.readers {
                came.extend(reader.gather(0, std::time::Duration::ZERO)?);
            }
            Ok((came.len() >= expected.len()).then_some(()))
        })
        .or_else(|error| {
            wrong = format!("{error:#}\n");
            anyhow::Ok(())
        })?;
        // The usual reader isn't among those who were named.
        let session = &mut self.packets.session;
        session.reader.settle()?;
        came.extend(session.reader.gather(0, std::time::Duration::ZERO)?);
        session.compare("upcall", expected, came, &[], &mut wrong)?;
        session.judge(GROUP, case, wrong);
        Ok(())
    }

    /// `n_lost` of the datapath.
    fn lost(&mut self) -> Result<u64> {
        let answer = self.packets.datapath()?;
        let stats = payload(&answer, 3).context("no statistics")?;
        let word = stats.get(16..24).and_then(|bytes| bytes.try_into().ok());
        Ok(u64::from_ne_bytes(word.context("short")?))
    }

    /// Checksums and segments that someone else was to finish.
    fn unfinished(&mut self, case: &Case) -> Result<()> {
        let real = case.name().ends_with("-real");
        for device in ["va", "pa", "vb", "pb"] {
            laboratory::offloads(self.lab, device, real)?;
        }
        let header: Vec<u16> = case
            .json()
            .get("vnet")
            .and_then(Value::as_array)
            .context("vnet")?
            .iter()
            .filter_map(|number| u16::try_from(number.as_u64()?).ok())
            .collect();
        let [flags, kind, rest @ ..] = header.as_slice() else {
            anyhow::bail!("a short virtio-net header");
        };
        let mut virtio = [*flags as u8, *kind as u8, 0, 0, 0, 0, 0, 0, 0, 0];
        for (place, value) in virtio[2..].chunks_exact_mut(2).zip(rest) {
            place.copy_from_slice(&value.to_ne_bytes());
        }
        self.packets.flush()?;
        let reader = self.packets.session.reader.port_id();
        let actions = match case.name() {
            name if name.contains("-user") => [userspace(reader, b"abc"), output(2)].concat(),
            name if name.contains("-cpl") => {
                let longer = one(2, &userspace(reader, b"longer"));
                let body = [one(1, &1100_u16.to_ne_bytes()), longer, one(3, &output(2))];
                one(action::CHECK_PKT_LEN, &body.concat())
            }
            name if name.contains("-trunc") => {
                let cut = one(action::TRUNC, &100_u32.to_ne_bytes());
                [cut, userspace(reader, &[])].concat()
            }
            name if name.contains("-set") => {
                let ip = [1, 1, 1, 1, 2, 2, 2, 2, 6, 0, 9, 0];
                let addresses = one(action::SET, &one(7, &ip));
                let ports = one(action::SET, &one(9, &[0, 7, 0, 8]));
                [addresses, ports, userspace(reader, &[]), output(2)].concat()
            }
            _ => Vec::new(),
        };
        if !actions.is_empty() {
            // The flow is that of the whole packet's key, which the case before shows.
            let key = self.key()?;
            let errno = self.packets.flow(&key, None, &actions)?;
            ensure!(errno == 0, "flow: {errno}");
        }
        let frame = case.bytes("packet_in_hex");
        let lab = self.lab;
        let send = || laboratory::send_offloaded(lab, "pa", virtio, &frame);
        let mut wrong = String::new();
        let out = frames(case.json())?;
        let mut expected = messages(case, "upcalls");
        if case.name().starts_with("gso-tcp4") && real {
            for upcall in &mut expected {
                right_sum(upcall)?;
            }
        }
        self.packets
            .step_by(send, 1, &out, expected, &[], &mut wrong)?;
        self.packets.session.judge(GROUP, case, wrong);
        Ok(())
    }

    /// The key of the packets with unfinished checksums.
    fn key(&self) -> Result<Vec<u8>> {
        let cases = corpus::read(GROUP)?;
        let miss = cases
            .iter()
            .find(|case| case.name() == "gso-tcp4-miss-real")
            .context("no such case")?;
        let upcalls = messages(miss, "upcalls");
        let upcall = upcalls.first().context("no upcall")?;
        ensure!(u32_at(upcall, 0) as usize == upcall.len());
        Ok(payload(upcall, KEY).context("no key")?.to_vec())
    }
}
