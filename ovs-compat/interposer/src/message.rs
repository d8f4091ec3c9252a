//! For whom a message is: by family in generic netlink, by subsystem in netfilter's.

use core::ffi::c_int;

use transport::Header;

/// Bytes of a message that are looked at: `nlmsghdr`, `genlmsghdr`, and the attributes of a
/// CTRL_CMD_GETFAMILY.
pub const HEAD_LEN: usize = 128;

/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_CMD_GETPOLICY` and the attributes that name a
/// family (linux/genetlink.h).
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_CMD_GETPOLICY: u8 = 10;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// `NFNL_SUBSYS_*` (linux/netfilter/nfnetlink.h), the high byte of `nlmsg_type`, that the daemon serves:
/// CTNETLINK, CTNETLINK_EXP, CTNETLINK_TIMEOUT.
const SUBSYSTEMS: [u8; 3] = [1, 2, 8];
/// `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// For one of the daemon's families or subsystems, or a question about one.
    Ours,
    /// For any other family, or a question about any other, or about all.
    Kernels,
    /// No request (NOOP, DONE) or nothing that can be read: says nothing about the socket.
    Neutral,
}

/// Looks at the first message to a socket of this protocol, given its first [`HEAD_LEN`] bytes.
pub fn verdict(protocol: c_int, head: &[u8]) -> Verdict {
    let Some(header) = Header::parse(head) else {
        return Verdict::Neutral;
    };
    if protocol == libc::NETLINK_NETFILTER {
        let [subsystem, _] = header.kind.to_be_bytes();
        return match header.kind {
            0..GENL_ID_CTRL => Verdict::Neutral,
            _ if SUBSYSTEMS.contains(&subsystem) => Verdict::Ours,
            _ => Verdict::Kernels,
        };
    }
    match header.kind {
        0..GENL_ID_CTRL => Verdict::Neutral,
        GENL_ID_CTRL if asks_for_ours(header, head).unwrap_or(false) => Verdict::Ours,
        kind if transport::family_of(kind).is_some() => Verdict::Ours,
        _ => Verdict::Kernels,
    }
}

fn asks_for_ours(header: Header, head: &[u8]) -> Option<bool> {
    let end = head.len().min(header.len as usize);
    let message = head.get(..end)?;
    let command = *message.get(16)?;
    if command != CTRL_CMD_GETFAMILY && command != CTRL_CMD_GETPOLICY {
        return None;
    }
    let mut rest = message.get(20..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & TYPE_MASK;
        let payload = rest.get(4..length)?;
        match kind {
            CTRL_ATTR_FAMILY_NAME => {
                let name = payload.split(|byte| *byte == 0).next()?;
                return Some(
                    transport::FAMILIES
                        .iter()
                        .any(|family| family.as_bytes() == name),
                );
            }
            CTRL_ATTR_FAMILY_ID => {
                let id = u16::from_ne_bytes(*payload.first_chunk()?);
                return Some(transport::family_of(id).is_some());
            }
            _ => rest = rest.get(length.next_multiple_of(4)..)?,
        }
    }
}
