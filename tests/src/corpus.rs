//! Recorded conversations with the kernel module (Linux 6.1), to be replayed against ours.
//!
//! A file is a group: one JSON object a line, in the order in which they happened; state carries over
//! from line to line. The first line, `meta`, tells the families' numbers then. Protocol lines have
//! `name`, `family`, `cmd`, `request_hex` (a whole netlink message), `replies_hex`, `errno` (0, a
//! symbolic name, or null where no answer was asked for). Messages are little-endian.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

/// Bytes in front of a family's attributes: netlink's, generic netlink's and Open vSwitch's header.
const HEADERS: usize = 16 + 4 + 4;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
/// `NLMSG_DONE`.
const DONE: u16 = 3;

/// One line.
#[derive(Clone, Debug)]
pub struct Case(Value);

/// What the first line of a group tells.
#[derive(Clone, Debug)]
pub struct Meta {
    /// The port id of the requester.
    pub requester: u32,
    /// The port id of the reader of upcalls.
    pub reader: u32,
    families: Value,
}

impl Meta {
    /// The number that a family had.
    pub fn family(&self, name: &str) -> Option<u16> {
        let number = self.families.get(name)?.get("id")?.as_u64()?;
        u16::try_from(number).ok()
    }

    /// The numbers that the families' multicast groups had, in ascending order.
    pub fn groups(&self) -> Vec<u32> {
        let families = self.families.as_object();
        let groups = families.into_iter().flat_map(|families| families.values());
        let mut numbers: Vec<u32> = groups
            .filter_map(|family| family.get("groups")?.as_object())
            .flat_map(|groups| groups.values())
            .filter_map(|number| u32::try_from(number.as_u64()?).ok())
            .collect();
        numbers.sort_unstable();
        numbers
    }
}

/// Reads the first line of a group.
pub fn meta(group: &str) -> Result<Meta> {
    let path = path(group);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let line: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
    let number = |field: &str| {
        let value = line.get(field).and_then(Value::as_u64)?;
        u32::try_from(value).ok()
    };
    Ok(Meta {
        requester: number("req_pid").context("req_pid")?,
        reader: number("upcall_pid").context("upcall_pid")?,
        families: line.get("families").cloned().unwrap_or_default(),
    })
}

fn path(group: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(format!("{group}.jsonl"))
}

/// Reads the cases of a group: `flow_keys` and so on. The line `meta` is left out.
pub fn read(group: &str) -> Result<Vec<Case>> {
    let path = path(group);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut cases = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let value: Value = serde_json::from_str(line)
            .with_context(|| format!("{}:{}", path.display(), number + 1))?;
        if value.get("meta").is_none() {
            cases.push(Case(value));
        }
    }
    Ok(cases)
}

impl Case {
    /// Unique within most groups.
    pub fn name(&self) -> &str {
        self.text("name")
    }

    /// The family's name, `ovs_flow` and so on.
    pub fn family(&self) -> &str {
        self.text("family")
    }

    /// The command's number in its family.
    pub fn command(&self) -> Option<u64> {
        self.0.get("cmd").and_then(Value::as_u64)
    }

    /// The symbolic name of the error; empty for success; None if no answer was asked for.
    pub fn errno(&self) -> Option<&str> {
        match self.0.get("errno") {
            Some(Value::String(name)) => Some(name),
            Some(Value::Number(_)) => Some(""),
            _ => None,
        }
    }

    /// The request, a whole netlink message; empty on lines without one.
    pub fn request(&self) -> Vec<u8> {
        self.bytes("request_hex")
    }

    /// The request's attributes, behind all headers.
    pub fn request_attributes(&self) -> Vec<u8> {
        attributes(&self.request()).to_vec()
    }

    /// Every message that the requester got, acknowledgement included.
    pub fn replies(&self) -> Vec<Vec<u8>> {
        let replies = self.0.get("replies_hex").and_then(Value::as_array);
        replies
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(unhex)
            .collect()
    }

    /// The attributes of each reply that is neither an acknowledgement nor the end of a dump.
    pub fn reply_attributes(&self) -> Vec<Vec<u8>> {
        let is_answer = |reply: &Vec<u8>| {
            let kind = reply.get(4..6).and_then(|kind| kind.try_into().ok());
            kind.map(u16::from_le_bytes)
                .is_some_and(|kind| kind != ERROR && kind != DONE)
        };
        self.replies()
            .iter()
            .filter(|reply| is_answer(reply))
            .map(|m| attributes(m).to_vec())
            .collect()
    }

    /// A field of text; empty if it isn't there.
    pub fn text(&self, field: &str) -> &str {
        self.0
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// A field of bytes in hexadecimal; empty if it isn't there.
    pub fn bytes(&self, field: &str) -> Vec<u8> {
        unhex(self.text(field))
    }

    /// The line as it is, for fields of other kinds.
    pub fn json(&self) -> &Value {
        &self.0
    }
}

/// What follows the headers of a message of one of our families.
pub fn attributes(message: &[u8]) -> &[u8] {
    message.get(HEADERS..).unwrap_or_default()
}

/// Bytes from hexadecimal; stops at what is none.
pub fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks_exact(2);
    digits
        .map_while(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}
