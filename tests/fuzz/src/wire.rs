//! Replies read strictly: a length that doesn't fit is a failure, not the end of a walk.
//!
//! Written anew, so that what the daemon writes isn't judged by what wrote it.

/// `NLMSG_ERROR`, `NLMSG_DONE`.
pub const ERROR: u16 = 2;
/// See [`ERROR`].
pub const DONE: u16 = 3;

/// Bytes of the headers in front of a family's attributes.
pub const HEADERS: usize = 24;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `nlmsg_type`
    pub kind: u16,
    /// `nlmsg_flags`
    pub flags: u16,
    /// `nlmsg_seq`
    pub seq: u32,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// An attribute: its type without flags, its payload.
pub type Attribute = (u16, Vec<u8>);

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

/// The 32-bit word at `at`, in host order.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The messages of a datagram, which holds nothing else.
pub fn messages(datagram: &[u8]) -> Vec<Message> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < datagram.len() {
        assert!(datagram.len() - at >= 16, "a header cut short at {at}");
        let len = u32_at(datagram, at) as usize;
        assert!(
            len >= 16 && at + len <= datagram.len(),
            "nlmsg_len {len} at {at} of {}",
            datagram.len()
        );
        found.push(Message {
            kind: u16_at(datagram, at + 4),
            flags: u16_at(datagram, at + 6),
            seq: u32_at(datagram, at + 8),
            bytes: datagram[at..at + len].to_vec(),
        });
        at += (len + 3) & !3;
    }
    found
}

/// The messages that a request's bytes are walked into, as netlink walks them: until one lies.
pub fn framed(datagram: &[u8]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 16 <= datagram.len() {
        let len = u32_at(datagram, at) as usize;
        if len < 16 || len > datagram.len() - at {
            break;
        }
        found.push((at, len));
        at += (len + 3) & !3;
    }
    found
}

impl Message {
    /// The errno of an acknowledgement or of a dump's end; None for others.
    pub fn error(&self) -> Option<i32> {
        matches!(self.kind, ERROR | DONE).then(|| -(u32_at(&self.bytes, 16) as i32))
    }

    /// The command of a family's message.
    pub fn command(&self) -> u8 {
        self.bytes[16]
    }

    /// Of a family's message.
    pub fn dp_ifindex(&self) -> i32 {
        u32_at(&self.bytes, 20) as i32
    }

    /// The attributes of a family's message.
    pub fn attributes(&self) -> Vec<Attribute> {
        attributes(&self.bytes[HEADERS..])
    }
}

/// Attributes, of which nothing may be left over.
pub fn attributes(bytes: &[u8]) -> Vec<Attribute> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        assert!(
            bytes.len() - at >= 4,
            "an attribute cut short at {at}: {bytes:02x?}"
        );
        let len = usize::from(u16_at(bytes, at));
        assert!(
            len >= 4 && at + len <= bytes.len(),
            "nla_len {len} at {at}: {bytes:02x?}"
        );
        found.push((
            u16_at(bytes, at + 2) & 0x3fff,
            bytes[at + 4..at + len].to_vec(),
        ));
        at += (len + 3) & !3;
    }
    found
}

/// Attributes as far as they go: of requests, which may hold anything. The last of a type counts.
pub fn lenient(bytes: &[u8]) -> Vec<Attribute> {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 4 <= bytes.len() {
        let len = usize::from(u16_at(bytes, at));
        if len < 4 || at + len > bytes.len() {
            break;
        }
        found.push((
            u16_at(bytes, at + 2) & 0x3fff,
            bytes[at + 4..at + len].to_vec(),
        ));
        at += (len + 3) & !3;
    }
    found
}

/// The last attribute of that type.
pub fn last(attributes: &[Attribute], kind: u16) -> Option<&[u8]> {
    attributes
        .iter()
        .rev()
        .find(|(found, _)| *found == kind)
        .map(|(_, payload)| payload.as_slice())
}
