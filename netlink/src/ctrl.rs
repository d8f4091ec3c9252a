//! The controller (`nlctrl`, uapi `linux/genetlink.h`): which families there are. It knows only
//! ours; who asks for another is sent to the kernel by the interposer.

use crate::attr::{Table, Writer};
use crate::errno::Errno;
use crate::family::{CTRL_ID, Family};
use crate::handler::{Dump, DumpPart, Outgoing};
use crate::message::{Failure, GENL_HEADER, Header, NLMSG_HEADER, flags};
use crate::policy;

const NEW_FAMILY: u8 = 1;
const GET_FAMILY: u8 = 3;
const GET_POLICY: u8 = 10;
/// `nlctrl`'s own version.
const VERSION: u8 = 2;

/// `CTRL_ATTR_*`
mod attr {
    pub const FAMILY_ID: u16 = 1;
    pub const FAMILY_NAME: u16 = 2;
    pub const VERSION: u16 = 3;
    pub const HDRSIZE: u16 = 4;
    pub const MAXATTR: u16 = 5;
    pub const OPS: u16 = 6;
    pub const MCAST_GROUPS: u16 = 7;
    pub const POLICY: u16 = 8;
    pub const OP_POLICY: u16 = 9;
    pub const OP: u16 = 10;
    pub const OP_ID: u16 = 1;
    pub const OP_FLAGS: u16 = 2;
    pub const GROUP_NAME: u16 = 1;
    pub const GROUP_ID: u16 = 2;
    pub const POLICY_DO: u16 = 1;
    /// `NLA_F_NESTED`, which a policy dump sets and the rest doesn't.
    pub const NESTED: u16 = 0x8000;
}

/// Answers a request that is no dump.
pub(crate) fn answer(
    command: u8,
    attrs: &[u8],
    seq: u32,
    pid: u32,
    out: &mut Outgoing,
) -> Result<(), Failure> {
    if command != GET_FAMILY {
        return Err(Errno::EOPNOTSUPP.into());
    }
    policy::check(&policy::CTRL, attrs, NLMSG_HEADER + GENL_HEADER)?;
    let family = asked(attrs)?;
    let header = Header {
        len: 0,
        kind: CTRL_ID,
        flags: 0,
        seq,
        pid,
    };
    out.push(&message(header, NEW_FAMILY, |writer| {
        describe(family, writer)
    })?);
    Ok(())
}

/// Begins a dump.
pub(crate) fn dump(
    command: u8,
    attrs: &[u8],
    seq: u32,
    pid: u32,
) -> Result<Box<dyn Dump>, Failure> {
    let header = Header {
        len: 0,
        kind: CTRL_ID,
        flags: flags::MULTI,
        seq,
        pid,
    };
    let messages = match command {
        GET_FAMILY => Family::ALL
            .into_iter()
            .map(|family| message(header, NEW_FAMILY, |writer| describe(family, writer)))
            .collect::<Result<Vec<_>, _>>()?,
        GET_POLICY => {
            policy::check(&policy::CTRL, attrs, NLMSG_HEADER + GENL_HEADER)?;
            policies(asked(attrs)?, attrs, header)?
        }
        _ => return Err(Errno::EOPNOTSUPP.into()),
    };
    Ok(Box::new(Listing(messages.into_iter())))
}

/// Whether a dump of this command exists at all: refused before it begins if not.
pub(crate) fn dumps(command: u8) -> bool {
    matches!(command, GET_FAMILY | GET_POLICY)
}

/// By id, else by name.
fn asked(attrs: &[u8]) -> Result<Family, Errno> {
    let table = Table::<3>::new(attrs);
    let by_id = table.get(attr::FAMILY_ID).map(|id| id.u16()).transpose()?;
    let by_name = table
        .get(attr::FAMILY_NAME)
        .map(|name| name.name(15))
        .transpose()?;
    match (by_id, by_name) {
        (Some(id), None) => Family::from_id(id).ok_or(Errno::ENOENT),
        (_, Some(name)) => Family::from_name(name).ok_or(Errno::ENOENT),
        (None, None) => Err(Errno::EINVAL),
    }
}

fn message(
    header: Header,
    command: u8,
    build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
) -> Result<Vec<u8>, Errno> {
    let mut buffer = Vec::new();
    header.emit(&mut buffer);
    buffer.extend_from_slice(&[command, VERSION, 0, 0]);
    build(&mut Writer::new(&mut buffer))?;
    let len = (buffer.len() as u32).to_ne_bytes();
    if let Some(field) = buffer.first_chunk_mut() {
        *field = len;
    }
    Ok(buffer)
}

fn describe(family: Family, writer: &mut Writer<'_>) -> Result<(), Errno> {
    writer.name(attr::FAMILY_NAME, family.name())?;
    writer.u16(attr::FAMILY_ID, family.id());
    writer.u32(attr::VERSION, family.version().into());
    writer.u32(attr::HDRSIZE, crate::message::OVS_HEADER as u32);
    writer.u32(attr::MAXATTR, family.max_attr().into());
    let ops = writer.begin(attr::OPS);
    for (index, op) in (1..).zip(family.ops()) {
        let nest = writer.begin(index);
        writer.u32(attr::OP_ID, op.command.into());
        writer.u32(attr::OP_FLAGS, op.flags);
        writer.end(nest)?;
    }
    writer.end(ops)?;
    if let Some(group) = family.group() {
        let groups = writer.begin(attr::MCAST_GROUPS);
        let nest = writer.begin(1);
        writer.u32(attr::GROUP_ID, group.id());
        writer.name(attr::GROUP_NAME, family.name())?;
        writer.end(nest)?;
        writer.end(groups)?;
    }
    Ok(())
}

/// One message for each operation (they all use policy 0), then one for each rule.
fn policies(family: Family, attrs: &[u8], header: Header) -> Result<Vec<Vec<u8>>, Errno> {
    let only = Table::<11>::new(attrs)
        .get(attr::OP)
        .map(|op| op.u32())
        .transpose()?;
    if only.is_some_and(|only| family.ops().iter().all(|op| u32::from(op.command) != only)) {
        return Err(Errno::ENOENT);
    }
    let mut messages = Vec::new();
    for op in family
        .ops()
        .iter()
        .filter(|op| only.is_none_or(|id| id == u32::from(op.command)))
    {
        messages.push(message(header, GET_POLICY, |writer| {
            writer.u16(attr::FAMILY_ID, family.id());
            let ops = writer.begin(attr::OP_POLICY | attr::NESTED);
            let nest = writer.begin(u16::from(op.command) | attr::NESTED);
            writer.u32(attr::POLICY_DO, 0);
            writer.end(nest)?;
            writer.end(ops)
        })?);
    }
    for rule in family.policy().iter().filter(|rule| rule.form.is_shown()) {
        messages.push(message(header, GET_POLICY, |writer| {
            writer.u16(attr::FAMILY_ID, family.id());
            let all = writer.begin(attr::POLICY | attr::NESTED);
            let first = writer.begin(attr::NESTED);
            let nest = writer.begin(rule.kind | attr::NESTED);
            rule.form.describe(writer);
            writer.end(nest)?;
            writer.end(first)?;
            writer.end(all)
        })?);
    }
    Ok(messages)
}

/// Messages that were built when the dump began.
struct Listing(std::vec::IntoIter<Vec<u8>>);

impl Dump for Listing {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        // All of them are far smaller than a part.
        for message in self.0.by_ref() {
            part.buffer.extend_from_slice(&message);
        }
        Ok(true)
    }
}
