//! Packets on their way to user space: MISS and ACTION upcalls.
//!
//! # Contract
//! An upcall is offered to its reader once, at once, without blocking; the reader's queue (the netlink
//! room's) is bounded and fair between ports. What doesn't fit is counted as lost, on its port. Upcalls
//! of one port to one reader keep their order.
//!
//! # Who reads
//! With per-CPU dispatch: the reader `hash % n` of the datapath's list, where the module takes the CPU.
//! The CPU that a worker happens to run on says nothing here, while by its hash a connection's packets
//! always meet the same reader, which keeps their order. Else the port's readers, chosen in the same way,
//! or the one that the action names.

use flow::action::{ActionList, Userspace};
use flow::key::{FRAG_FIRST, FRAG_LATER, FRAG_NONE, KEY_BYTES, Key, TunnelKey};
use frame::segment::Segments;
use frame::{Frame, GsoKind, complete_checksum};
use netlink::attr::Writer;
use netlink::hub::UpcallError;
use netlink::{Errno, Hub, message};

use crate::codec;
use crate::datapath::features;
use crate::drop_reason::DropReason;
use crate::executor::{Batch, Executor};
use crate::packet::Packet;
use crate::transmit::source_port_entropy;

/// `enum ovs_packet_cmd`.
pub mod command {
    /// A lookup found nothing.
    pub const MISS: u8 = 1;
    /// A `userspace` action.
    pub const ACTION: u8 = 2;
    /// User space sends a packet.
    pub const EXECUTE: u8 = 3;
}

/// `enum ovs_packet_attr`.
pub mod attribute {
    #![allow(missing_docs)]
    pub const PACKET: u16 = 1;
    pub const KEY: u16 = 2;
    pub const ACTIONS: u16 = 3;
    pub const USERDATA: u16 = 4;
    pub const EGRESS_TUN_KEY: u16 = 5;
    pub const PROBE: u16 = 8;
    pub const MRU: u16 = 9;
    pub const LEN: u16 = 10;
    pub const HASH: u16 = 11;
    pub const UPCALL_PID: u16 = 12;
}

/// `OVS_PACKET_HASH_SW_BIT`: the hash was computed by software.
const HASH_SW: u64 = 1 << 32;
/// `OVS_PACKET_HASH_L4_BIT`: it is over the L4 ports too.
const HASH_L4: u64 = 1 << 33;
/// Where a tag goes that is out of band.
const ADDRESSES: usize = 12;
/// Bytes of a tag.
const TAG: usize = 4;

/// Builds upcalls and offers them.
pub struct Upcaller {
    hub: Hub,
    /// Which cell of counters is its executor's.
    cell: usize,
    head: Vec<u8>,
}

impl Upcaller {
    /// Offers to the readers that `hub` knows.
    pub fn new(hub: Hub, cell: usize) -> Self {
        Self {
            hub,
            cell,
            head: Vec::with_capacity(2 * KEY_BYTES),
        }
    }
}

struct Message<'a> {
    command: u8,
    pid: u32,
    userdata: Option<&'a [u8]>,
    actions: Option<&'a ActionList>,
    /// The outer header that output to a tunnel would use.
    egress: Option<Box<TunnelKey>>,
}

impl Executor {
    /// No flow matches: the packet goes to user space, and ends there.
    pub(crate) fn miss(&mut self, batch: &Batch<'_>, mut packet: Box<Packet>) {
        let message = Message {
            command: command::MISS,
            pid: packet.upcall_pid.unwrap_or_else(|| reader(batch, &packet)),
            userdata: None,
            actions: None,
            egress: None,
        };
        // A limit is for what an action list does next, not for who is asked what to do.
        packet.limit = None;
        let sent = self.upcall(batch, &mut packet, &message);
        self.finish_upcall(batch, packet, sent);
    }

    /// A `userspace` action of `list`. The packet stays with the caller.
    pub(crate) fn upcall_action(
        &mut self,
        batch: &Batch<'_>,
        packet: &mut Packet,
        action: &Userspace,
        list: &ActionList,
    ) -> Result<(), DropReason> {
        let per_cpu = batch.datapath.settings.load().features & features::DISPATCH_PER_CPU != 0;
        let message = Message {
            command: command::ACTION,
            pid: if per_cpu {
                reader(batch, packet)
            } else {
                action.pid
            },
            userdata: action.userdata.as_deref(),
            actions: action.want_actions.then_some(list),
            egress: action
                .egress_tun_port
                .and_then(|port| egress(batch, packet, port)),
        };
        self.upcall(batch, packet, &message)
    }

    /// The packet ended with an upcall.
    pub(crate) fn finish_upcall(
        &mut self,
        batch: &Batch<'_>,
        packet: Box<Packet>,
        sent: Result<(), DropReason>,
    ) {
        match sent {
            Ok(()) => {
                batch.cell(packet.ingress, self.index).to_user.add(1);
                self.recycle(packet);
            }
            Err(reason) => self.drop(batch, packet, reason),
        }
    }

    fn upcall(
        &mut self,
        batch: &Batch<'_>,
        packet: &mut Packet,
        message: &Message<'_>,
    ) -> Result<(), DropReason> {
        let sent = if message.pid == 0 {
            Err(DropReason::UpcallNoReader)
        } else if packet.frame.offload.gso.is_some() {
            self.upcall_segments(batch, packet, message)
        } else {
            match complete_checksum(&mut packet.frame) {
                Ok(()) => {
                    let frame = &packet.frame;
                    self.upcaller
                        .offer(batch, packet, &packet.key, frame, message)
                }
                Err(_) => Err(DropReason::Malformed),
            }
        };
        let cell = batch.cell(packet.ingress, self.index);
        match sent {
            Ok(()) => cell.upcalls.add(1),
            Err(_) => cell.upcalls_lost.add(1),
        }
        sent
    }

    /// User space gets packets as they will be on the wire: one upcall a segment.
    fn upcall_segments(
        &mut self,
        batch: &Batch<'_>,
        packet: &Packet,
        message: &Message<'_>,
    ) -> Result<(), DropReason> {
        let mut segments = Segments::new(&packet.frame).map_err(|_| DropReason::Malformed)?;
        let fragments = matches!(
            packet.frame.offload.gso,
            Some(gso) if gso.kind == GsoKind::UdpFragments
        );
        let mut key = packet.key;
        if fragments {
            key.ip_frag = FRAG_FIRST;
        }
        while let Some(segment) = segments.next(&mut self.pool) {
            let sent = self.upcaller.offer(batch, packet, &key, &segment, message);
            self.pool.put(segment);
            sent?;
            if fragments {
                key.ip_frag = FRAG_LATER;
                key.tp_src = 0.into();
                key.tp_dst = 0.into();
            }
        }
        Ok(())
    }
}

impl Upcaller {
    fn offer(
        &mut self,
        batch: &Batch<'_>,
        packet: &Packet,
        key: &Key,
        frame: &Frame,
        message: &Message<'_>,
    ) -> Result<(), DropReason> {
        // A tag that is out of band goes back behind the addresses, which thereby belong to the head.
        let tag = frame.vlan.filter(|_| frame.len() >= ADDRESSES);
        let whole = frame.len() + if tag.is_some() { TAG } else { 0 };
        let kept = packet
            .limit
            .map_or(whole, |limit| whole.min(limit as usize));
        let unaligned = batch.datapath.settings.load().features & features::UNALIGNED != 0;
        let dp_ifindex = batch.datapath.ifindex;
        let truncated = (kept < whole).then_some(whole);
        message::upcall_head(
            &mut self.head,
            message.command,
            dp_ifindex,
            kept,
            unaligned,
            |writer| write_attributes(writer, packet, key, message, truncated),
        )
        .map_err(|_| DropReason::UpcallTooBig)?;
        let mut rest = frame.bytes();
        if let (Some(tag), Some((addresses, behind))) = (tag, rest.split_at_checked(ADDRESSES)) {
            let mut begin = [0; ADDRESSES + TAG];
            begin[..ADDRESSES].copy_from_slice(addresses);
            begin[ADDRESSES..ADDRESSES + 2].copy_from_slice(&tag.tpid.to_be_bytes());
            begin[ADDRESSES + 2..].copy_from_slice(&tag.tci.to_be_bytes());
            self.head
                .extend_from_slice(begin.get(..kept).unwrap_or(&begin));
            rest = behind;
        }
        let rest = rest
            .get(..kept.saturating_sub(whole - rest.len()))
            .unwrap_or(rest);
        match self
            .hub
            .upcall(message.pid, packet.ingress, &self.head, rest)
        {
            Ok(delivery) => {
                // Upcalls of other ports that made room were counted as sent before.
                let lost = u64::from(delivery.displaced);
                batch.cell(packet.ingress, self.cell).upcalls_lost.add(lost);
                Ok(())
            }
            Err(UpcallError::NoPeer) => Err(DropReason::UpcallNoReader),
            Err(UpcallError::Full) => Err(DropReason::UpcallQueueFull),
            Err(UpcallError::TooLong) => Err(DropReason::UpcallTooBig),
        }
    }
}

/// All attributes but the packet, in the module's order.
fn write_attributes(
    writer: &mut Writer<'_>,
    packet: &Packet,
    key: &Key,
    message: &Message<'_>,
    truncated_from: Option<usize>,
) -> Result<(), Errno> {
    let nest = writer.begin(attribute::KEY);
    codec::key::write_key(writer, key)?;
    writer.end(nest)?;
    if let Some(userdata) = message.userdata {
        writer.bytes(attribute::USERDATA, userdata)?;
    }
    if let Some(tunnel) = &message.egress {
        let nest = writer.begin(attribute::EGRESS_TUN_KEY);
        codec::tunnel::write(writer, tunnel)?;
        writer.end(nest)?;
    }
    if let Some(actions) = message.actions {
        let nest = writer.begin(attribute::ACTIONS);
        writer.raw(&actions.wire);
        writer.end(nest)?;
    }
    if packet.mru != 0 {
        writer.u16(attribute::MRU, packet.mru);
    }
    if let Some(len) = truncated_from {
        writer.u32(
            attribute::LEN,
            u32::try_from(len).map_err(|_| Errno::EFBIG)?,
        );
    }
    writer.u64(
        attribute::HASH,
        u64::from(packet.hash) | HASH_SW | hash_l4(&packet.key),
    );
    Ok(())
}

/// The outer header that the packet would go out of a tunnel port with; None: it wouldn't.
fn egress(batch: &Batch<'_>, packet: &Packet, port: u32) -> Option<Box<TunnelKey>> {
    let vport = batch.ports.get(port)?;
    let mut outer = packet.egress.clone()?;
    outer.tp_src = source_port_entropy(packet.hash).into();
    vport
        .device
        .complete_tunnel_key(&mut outer)
        .then_some(outer)
}

/// Protocols whose ports the hash is over.
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// Whether the hash is over L4 ports: fragments have none that count.
fn hash_l4(key: &Key) -> u64 {
    let ports = matches!(key.ip_proto, TCP | UDP | SCTP);
    match ports && key.ip_frag == FRAG_NONE {
        true => HASH_L4,
        false => 0,
    }
}

/// The port id of who reads this packet's upcalls; 0: nobody.
fn reader(batch: &Batch<'_>, packet: &Packet) -> u32 {
    let settings = batch.datapath.settings.load();
    if settings.features & features::DISPATCH_PER_CPU != 0 {
        return pick(&settings.per_cpu_pids, packet.hash);
    }
    match batch.ports.get(packet.ingress) {
        Some(vport) => pick(&vport.upcall_pids.load(), packet.hash),
        None => 0,
    }
}

fn pick(pids: &[u32], hash: u32) -> u32 {
    match pids.len() {
        0 => 0,
        // The low bits choose buckets elsewhere: take the high ones, scaled.
        n => pids
            .get(((u64::from(hash) * n as u64) >> 32) as usize)
            .copied()
            .unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reader_is_picked_and_none_beyond() {
        assert_eq!(pick(&[], 7), 0);
        assert_eq!(pick(&[5], u32::MAX), 5);
        assert_eq!(pick(&[5, 6], u32::MAX), 6);
        assert_eq!(pick(&[5, 6], 0), 5);
    }
}
