//! A recorded conversation, line after line, and what of it came out otherwise.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use transport::ControlOp;

use crate::corpus::{self, Case, Meta};
use crate::lab::Lab;
use crate::replay::client::Client;
use crate::replay::differences::{self, Field, How, comparable};
use crate::replay::laboratory::{PATIENCE, client};
use crate::replay::translate::{
    DONE, ERROR, HEADERS, Translator, attributes, family, u16_at, u32_at,
};
use crate::wait;

/// The sockets that a recording was made with.
pub struct Session {
    /// Sends the requests.
    pub requester: Client,
    /// Repeats what failed, with extended acknowledgements.
    pub extended: Client,
    /// Reads upcalls.
    pub reader: Client,
    /// Belongs to all groups.
    pub listener: Client,
    /// The recording's numbers.
    pub translator: Translator,
    /// Everything that isn't as recorded.
    pub found: Vec<String>,
    /// Fields that aren't compared because the recording doesn't show the packets.
    pub unseen: &'static [Field],
    /// How many cases were compared.
    pub compared: usize,
    /// How many were left out.
    pub left_out: usize,
    /// Our ifindex of the datapath that was last asked about.
    datapath: Option<u32>,
}

impl Session {
    /// Sockets as for the recording `group`.
    ///
    /// # Errors
    /// The daemon can't be reached; there is no such recording.
    pub fn open(lab: &Lab, group: &str) -> Result<Self> {
        let meta = corpus::meta(group)?;
        let requester = client(lab)?;
        let mut extended = client(lab)?;
        extended.control(ControlOp::ExtAck, 1)?;
        extended.control(ControlOp::CapAck, 1)?;
        let reader = client(lab)?;
        let mut listener = client(lab)?;
        listener.join_all()?;
        let mut translator = Translator::new(&meta, requester.port_id());
        translator.word(meta.reader, reader.port_id());
        Ok(Self {
            requester,
            extended,
            reader,
            listener,
            translator,
            found: Vec::new(),
            unseen: &[],
            compared: 0,
            left_out: 0,
            datapath: None,
        })
    }

    /// The same sockets for another recording of the same run.
    pub fn go_on(&mut self, meta: &Meta) {
        self.translator.go_on(meta);
        self.translator.word(meta.reader, self.reader.port_id());
    }

    /// Replays one line of a conversation.
    ///
    /// # Errors
    /// The harness failed; what differs is in [`Session::found`].
    pub fn replay(&mut self, group: &str, case: &Case) -> Result<()> {
        if let Some(wrong) = self.talk(group, case)? {
            self.judge(group, case, wrong);
        }
        Ok(())
    }

    /// Replays one line and says what is wrong; None if the case is left out.
    ///
    /// # Errors
    /// The harness failed.
    pub fn talk(&mut self, group: &str, case: &Case) -> Result<Option<String>> {
        let difference = differences::of(group, case.name());
        if difference.is_some_and(|difference| difference.how == How::LeftOut) {
            self.left_out += 1;
            return Ok(None);
        }
        let mut wrong = String::new();
        let recorded = case.request();
        let extra: &[&[u16]] = match difference.map(|difference| difference.how) {
            Some(How::Attributes(paths)) => paths,
            _ => &[],
        };
        if !recorded.is_empty() {
            let request = self.translator.request(&recorded)?;
            let named = u32_at(&request, 20);
            self.datapath = (named != 0).then_some(named).or(self.datapath);
            let answers = self.requester.converse(&request)?;
            self.compare("reply", case.replies(), answers, extra, &mut wrong)?;
            if wrong.is_empty() {
                self.repeat(case, &recorded, &mut wrong)?;
            }
        }
        // What comes behind a wrong answer isn't waited for.
        let patience = if wrong.is_empty() {
            PATIENCE
        } else {
            Duration::ZERO
        };
        let expected = messages(case, "notifs");
        self.listener.settle()?;
        let came = self.listener.gather(expected.len(), patience)?;
        self.compare("notification", expected, came, extra, &mut wrong)?;
        let mut expected = messages(case, "upcalls_hex");
        self.reader.settle()?;
        let sampled = difference.is_some_and(|difference| difference.how == How::Sampled);
        let wanted = if sampled { 0 } else { expected.len() };
        let mut came = self.reader.gather(wanted, patience)?;
        if sampled && (came.is_empty() || expected.is_empty()) {
            expected.clear();
            came.clear();
        }
        self.compare("upcall", expected, came, extra, &mut wrong)?;
        Ok(Some(wrong))
    }

    /// Deletes the flows of the datapath with that recorded ifindex: the recordings did so between cases
    /// without saying it.
    ///
    /// # Errors
    /// It doesn't succeed.
    pub fn flush(&mut self, recorded_ifindex: u32) -> Result<()> {
        /// `OVS_FLOW_CMD_DEL`.
        const DEL: u8 = 2;
        let ifindex = self.translator.ifindex(recorded_ifindex)?;
        let request = request(family::FLOW, DEL, ifindex, &[]);
        let answers = self.requester.converse(&request)?;
        let errno = answers.last().and_then(|answer| errno(answer));
        anyhow::ensure!(errno == Some(0), "flush: {errno:?}");
        Ok(())
    }

    /// Reads a port until the answer is as `wanted`.
    ///
    /// # Errors
    /// It never is.
    pub fn until(&mut self, what: &str, wanted: impl Fn(&[u8]) -> bool, port: u32) -> Result<()> {
        let ifindex = self.datapath.context("no datapath yet")?;
        let body = [&[8, 0, 1, 0][..], &port.to_ne_bytes()].concat();
        let request = request(family::VPORT, vport::GET, ifindex, &body);
        wait::soon(what, || {
            let answers = self.requester.converse(&request)?;
            Ok(answers.first().is_some_and(|answer| wanted(answer)))
        })
    }

    /// The same while [`Session::requester`] is another socket than the translator knows.
    ///
    /// # Errors
    /// As [`Session::replay`].
    pub fn replay_as(&mut self, group: &str, case: &Case) -> Result<()> {
        let usual = self.translator.requester(self.requester.port_id(), case);
        let replayed = self.replay(group, case);
        self.translator.restore(usual);
        replayed
    }

    /// Takes a case's result down.
    pub fn judge(&mut self, group: &str, case: &Case, wrong: String) {
        let name = case.name();
        let difference = differences::of(group, name);
        let failed = case.errno().is_some_and(|errno| !errno.is_empty());
        self.compared += 1;
        match difference.map(|difference| difference.how) {
            None | Some(How::Attributes(_) | How::Chosen | How::Sampled) if wrong.is_empty() => {}
            None | Some(How::Attributes(_) | How::Chosen | How::Sampled) => {
                self.found.push(format!("{group} {name}:\n{wrong}"));
            }
            Some(How::Refused(_)) if wrong.is_empty() && failed => {}
            Some(_) if wrong.is_empty() => self.found.push(format!(
                "{group} {name}: as recorded, although differences.rs says otherwise"
            )),
            Some(How::Errno(errno) | How::Refused(errno))
                if !wrong.contains(&format!("ours errno {errno};")) =>
            {
                self.found
                    .push(format!("{group} {name}: not with errno {errno}:\n{wrong}"))
            }
            Some(How::Succeeds) if !wrong.contains("ours errno 0;") => {
                self.found
                    .push(format!("{group} {name}: not a success:\n{wrong}"));
            }
            Some(_) => {}
        }
    }

    /// What failed once more, from a socket that asked for extended acknowledgements.
    fn repeat(&mut self, case: &Case, recorded: &[u8], wrong: &mut String) -> Result<()> {
        let answer = case.bytes("extack_hex");
        if answer.is_empty() {
            return Ok(());
        }
        let mut request = self.translator.request(recorded)?;
        let mut expected = self.translator.reply(&answer)?;
        let seq = answer.get(8..12).context("short answer")?;
        request
            .get_mut(8..12)
            .context("short")?
            .copy_from_slice(seq);
        let port_id = self.extended.port_id().to_ne_bytes();
        expected
            .get_mut(12..16)
            .context("short")?
            .copy_from_slice(&port_id);
        let answers = self.extended.converse(&request)?;
        let plain = answers.iter().map(|ours| without_message(&expected, ours));
        if plain.collect::<Vec<_>>() != [expected.clone()] {
            writeln!(
                wrong,
                "extended acknowledgement\n  expected {}",
                show(&expected)
            )?;
            for answer in answers {
                writeln!(wrong, "  ours     {}", show(&answer))?;
            }
        }
        Ok(())
    }

    /// Compares messages; says in `wrong` what differs.
    ///
    /// # Errors
    /// A recorded one can't be translated.
    pub fn compare(
        &mut self,
        what: &str,
        recorded: Vec<Vec<u8>>,
        ours: Vec<Vec<u8>>,
        extra: &[&[u16]],
        wrong: &mut String,
    ) -> Result<()> {
        // A dump has no order; everything else has.
        let dump = recorded.last().is_some_and(|last| u16_at(last, 4) == DONE);
        let mut ours = ours;
        let mut recorded = recorded;
        if dump {
            let key = |message: &Vec<u8>| {
                let last = u16_at(message, 4) == DONE;
                (last, message.get(24..).map(<[u8]>::to_vec))
            };
            ours.sort_by_key(key);
            recorded.sort_by_key(key);
        }
        for (recorded, ours) in recorded.iter().zip(&ours) {
            self.translator.learn(recorded, ours);
        }
        let mut expected = Vec::new();
        for message in &recorded {
            match self.translator.reply(message) {
                Ok(message) => expected.push(comparable(&message, self.unseen, extra, false)),
                Err(error) => {
                    writeln!(wrong, "{what}: {error}: expected {}", show(message))?;
                    for (n, message) in ours.iter().enumerate() {
                        writeln!(wrong, "  ours {n} {}", show(message))?;
                    }
                    return Ok(());
                }
            }
        }
        let mut came: Vec<_> = ours
            .iter()
            .map(|message| comparable(message, self.unseen, extra, true))
            .collect();
        if dump {
            // Port ids and ifindexes are part of what was sorted by.
            expected.sort();
            came.sort();
        }
        if expected == came {
            return Ok(());
        }
        if let Some(errno) = ours.last().and_then(|message| errno(message)) {
            writeln!(wrong, "ours errno {errno};")?;
        }
        writeln!(wrong, "{what}:")?;
        for message in &expected {
            writeln!(
                wrong,
                "  expected {}",
                message.as_deref().map_or_else(String::clone, show)
            )?;
        }
        for message in &came {
            writeln!(
                wrong,
                "  ours     {}",
                message.as_deref().map_or_else(String::clone, show)
            )?;
        }
        Ok(())
    }

    /// Fails with everything that was found.
    ///
    /// # Errors
    /// Something was found; nothing was compared.
    pub fn conclude(&self) -> Result<()> {
        eprintln!(
            "{} cases compared, {} left out",
            self.compared, self.left_out
        );
        if self.compared == 0 {
            bail!("nothing was compared");
        }
        if !self.found.is_empty() {
            bail!(
                "{} differences:\n{}",
                self.found.len(),
                self.found.join("\n")
            );
        }
        Ok(())
    }
}

/// A request of our own.
pub fn request(family: usize, command: u8, ifindex: u32, attributes: &[u8]) -> Vec<u8> {
    let mut request = Vec::new();
    let header = transport::Header {
        len: (HEADERS + attributes.len()) as u32,
        kind: transport::family_id(family as u16),
        flags: transport::NLM_F_REQUEST | transport::NLM_F_ACK,
        seq: 0,
        pid: 0,
    };
    request.extend_from_slice(&header.to_bytes());
    request.extend_from_slice(&[command, 1, 0, 0]);
    request.extend_from_slice(&ifindex.to_ne_bytes());
    request.extend_from_slice(attributes);
    request
}

/// Of `enum ovs_vport_attr` and `enum ovs_vport_type`.
mod vport {
    pub const GET: u8 = 3;
}

/// Our extended acknowledgement without the message for a reader that it has where the module says its
/// reason to the kernel's log only.
fn without_message(expected: &[u8], ours: &[u8]) -> Vec<u8> {
    /// `NLM_F_ACK_TLVS`.
    const TLVS: u16 = 0x200;
    /// `NLMSGERR_ATTR_MSG`.
    const MESSAGE: u16 = 1;
    let mut ours = ours.to_vec();
    let added = u16_at(&ours, 6) & !u16_at(expected, 6) == TLVS;
    let message = attributes(&ours, expected.len(), ours.len());
    if let (true, [place]) = (added, message.as_slice())
        && place.kind == MESSAGE
    {
        ours.truncate(place.start);
        let (len, flags) = (ours.len() as u32, u16_at(&ours, 6) & !TLVS);
        ours[..4].copy_from_slice(&len.to_ne_bytes());
        ours[6..8].copy_from_slice(&flags.to_ne_bytes());
    }
    ours
}

/// Messages of a field: hexadecimal digits, or objects with a field `hex`.
pub fn messages(case: &Case, field: &str) -> Vec<Vec<u8>> {
    let list = case.json().get(field).and_then(|list| list.as_array());
    list.into_iter()
        .flatten()
        .filter_map(|item| item.as_str().or_else(|| item.get("hex")?.as_str()))
        .map(corpus::unhex)
        .collect()
}

/// The errno that ends a conversation; 0 for an acknowledgement.
pub fn errno(message: &[u8]) -> Option<i32> {
    let kind = u16_at(message, 4);
    (kind == ERROR || kind == DONE).then(|| -(u32_at(message, 16) as i32))
}

/// A message for a reader: header, then attributes as far as their types tell.
pub fn show(message: &[u8]) -> String {
    let mut text = format!(
        "type {:#x} flags {:#x} seq {:#x} pid {:#x}",
        u16_at(message, 4),
        u16_at(message, 6),
        u32_at(message, 8),
        u32_at(message, 12)
    );
    if let Some(errno) = errno(message) {
        let _ = write!(text, " errno {errno}");
    }
    let _ = write!(text, " ");
    for byte in message.get(16..).unwrap_or_default().iter().take(2000) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}
