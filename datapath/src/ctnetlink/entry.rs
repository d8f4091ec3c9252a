//! A connection as ctnetlink tells it: the attributes of `IPCTNL_MSG_CT_NEW`, in the kernel's order.

use std::sync::Arc;

use netlink::Errno;
use netlink::attr::Writer;

use super::{NESTED, SECOND, af, kind, message, nfgenmsg, subsystem, tuple};
use crate::conntrack::connection::{Connection, Protocol, State, status};
use crate::conntrack::tcp::Tcp;
use crate::conntrack::tuple::Direction;

/// `enum ctattr_type`
pub(super) mod attribute {
    pub const TUPLE_ORIG: u16 = 1;
    pub const TUPLE_REPLY: u16 = 2;
    pub const STATUS: u16 = 3;
    pub const PROTOINFO: u16 = 4;
    pub const HELP: u16 = 5;
    pub const NAT_SRC: u16 = 6;
    pub const TIMEOUT: u16 = 7;
    pub const MARK: u16 = 8;
    pub const COUNTERS_ORIG: u16 = 9;
    pub const COUNTERS_REPLY: u16 = 10;
    pub const USE: u16 = 11;
    pub const ID: u16 = 12;
    pub const NAT_DST: u16 = 13;
    pub const TUPLE_MASTER: u16 = 14;
    pub const SEQ_ADJ_ORIG: u16 = 15;
    pub const SEQ_ADJ_REPLY: u16 = 16;
    pub const ZONE: u16 = 18;
    pub const MARK_MASK: u16 = 21;
    pub const LABELS: u16 = 22;
    pub const LABELS_MASK: u16 = 23;
    pub const SYNPROXY: u16 = 24;
    pub const FILTER: u16 = 25;
    pub const STATUS_MASK: u16 = 26;
    /// One more than the highest.
    pub const COUNT: usize = 27;
}

/// `enum ctattr_protoinfo` and what is nested there.
pub(super) mod protoinfo {
    pub const TCP: u16 = 1;
    pub const SCTP: u16 = 3;
    pub const STATE: u16 = 1;
    pub const TCP_WSCALE_ORIGINAL: u16 = 2;
    pub const TCP_WSCALE_REPLY: u16 = 3;
    pub const TCP_FLAGS_ORIGINAL: u16 = 4;
    pub const TCP_FLAGS_REPLY: u16 = 5;
    pub const SCTP_VTAG_ORIGINAL: u16 = 2;
    pub const SCTP_VTAG_REPLY: u16 = 3;
}

const COUNTERS_PACKETS: u16 = 1;
const COUNTERS_BYTES: u16 = 2;
pub(super) const HELP_NAME: u16 = 1;
const SEQADJ_CORRECTION_POS: u16 = 1;
const SEQADJ_OFFSET_BEFORE: u16 = 2;
const SEQADJ_OFFSET_AFTER: u16 = 3;

/// `nlmsg_type` of a connection's description.
pub const KIND: u16 = kind(subsystem::CTNETLINK, message::NEW);

/// The fixed header of a connection's description.
pub fn fixed(connection: &Connection) -> [u8; 4] {
    nfgenmsg(af(connection.original.family), 0)
}

/// Packets and bytes by direction.
pub type Counts = [(u64, u64); 2];

/// Begins anew to count what has been told; what came since then stays.
pub(super) fn forget(connection: &Connection, told: &Counts) {
    let mut state = connection.lock();
    for ((packets, bytes), (told_packets, told_bytes)) in state.counts.iter_mut().zip(told) {
        // Another client may have been told the same.
        *packets = packets.saturating_sub(*told_packets);
        *bytes = bytes.saturating_sub(*told_bytes);
    }
}

/// Writes all that is told of a connection. Gives what it tells of packets and bytes.
///
/// # Errors
/// EMSGSIZE: never, by its size.
pub fn write(
    writer: &mut Writer<'_>,
    connection: &Arc<Connection>,
    now: u64,
) -> Result<Counts, Errno> {
    let original = &connection.original;
    let state = connection.lock();
    tuple::write(writer, attribute::TUPLE_ORIG, original)?;
    tuple::write(writer, attribute::TUPLE_REPLY, &state.reply)?;
    if original.zone != 0 {
        writer.be16(attribute::ZONE, original.zone);
    }
    writer.be32(attribute::STATUS, connection.status());
    writer.be32(attribute::MARK, state.mark);
    writer.be32(attribute::ID, connection.id);
    writer.be32(
        attribute::USE,
        u32::try_from(connection.users()).unwrap_or(u32::MAX),
    );
    if let Some(master) = &connection.master {
        tuple::write(writer, attribute::TUPLE_MASTER, &master.original)?;
    }
    let left = connection.deadline().saturating_sub(now) / SECOND;
    writer.be32(attribute::TIMEOUT, u32::try_from(left).unwrap_or(u32::MAX));
    write_protoinfo(writer, &state)?;
    for (kind, direction) in [
        (attribute::COUNTERS_ORIG, Direction::Original),
        (attribute::COUNTERS_REPLY, Direction::Reply),
    ] {
        let (packets, bytes) = state
            .counts
            .get(direction.index())
            .copied()
            .unwrap_or_default();
        let nest = writer.begin(kind | NESTED);
        writer.be64(COUNTERS_PACKETS, packets);
        writer.be64(COUNTERS_BYTES, bytes);
        writer.end(nest)?;
    }
    if let Some(helper) = &state.helper {
        let nest = writer.begin(attribute::HELP | NESTED);
        writer.name(HELP_NAME, helper.helper.name())?;
        writer.end(nest)?;
    }
    if state.labels != [0; 16] {
        writer.bytes(attribute::LABELS, &state.labels)?;
    }
    if connection.is(status::SEQ_ADJUST)
        && let Some(helper) = &state.helper
    {
        for (kind, direction) in [
            (attribute::SEQ_ADJ_ORIG, Direction::Original),
            (attribute::SEQ_ADJ_REPLY, Direction::Reply),
        ] {
            let (at, before, after) = helper.shift(direction);
            let nest = writer.begin(kind | NESTED);
            writer.be32(SEQADJ_CORRECTION_POS, at);
            writer.be32(SEQADJ_OFFSET_BEFORE, before as u32);
            writer.be32(SEQADJ_OFFSET_AFTER, after as u32);
            writer.end(nest)?;
        }
    }
    Ok(state.counts)
}

fn write_protoinfo(writer: &mut Writer<'_>, state: &State) -> Result<(), Errno> {
    match &state.protocol {
        Protocol::Tcp(tcp) => write_tcp(writer, tcp),
        Protocol::Sctp(sctp) => {
            let [original, reply] = sctp.tags();
            let nest = writer.begin(attribute::PROTOINFO | NESTED);
            let inner = writer.begin(protoinfo::SCTP | NESTED);
            writer.u8(protoinfo::STATE, sctp.state.number());
            writer.be32(protoinfo::SCTP_VTAG_ORIGINAL, original);
            writer.be32(protoinfo::SCTP_VTAG_REPLY, reply);
            writer.end(inner)?;
            writer.end(nest)
        }
        Protocol::Udp { .. } | Protocol::Gre | Protocol::Icmp | Protocol::Generic => Ok(()),
    }
}

fn write_tcp(writer: &mut Writer<'_>, tcp: &Tcp) -> Result<(), Errno> {
    let (original, reply) = (Direction::Original, Direction::Reply);
    let nest = writer.begin(attribute::PROTOINFO | NESTED);
    let inner = writer.begin(protoinfo::TCP | NESTED);
    writer.u8(protoinfo::STATE, tcp.state.number());
    writer.u8(protoinfo::TCP_WSCALE_ORIGINAL, tcp.scale(original));
    writer.u8(protoinfo::TCP_WSCALE_REPLY, tcp.scale(reply));
    // `struct nf_ct_tcp_flags`: flags, mask.
    writer.bytes(protoinfo::TCP_FLAGS_ORIGINAL, &[tcp.flags(original), 0])?;
    writer.bytes(protoinfo::TCP_FLAGS_REPLY, &[tcp.flags(reply), 0])?;
    writer.end(inner)?;
    writer.end(nest)
}
