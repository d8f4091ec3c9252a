//! `ovs_packet`: packets that user space sends (`OVS_PACKET_CMD_EXECUTE`). Upcalls, the other way, are
//! in [`crate::upcall`].
//!
//! As in the module, only the metadata of the key count: headers are read from the packet. What becomes
//! of the packet isn't told: it is counted. Upcalls and transmissions come before the ack.

use std::sync::Arc;

use ::flow::extract::{self, ConntrackMetadata, Metadata, PacketType};
use ::flow::key::Key;
use frame::Frame;
use netlink::attr::Table;
use netlink::{Errno, Failure, Request};

use super::flow::LIMITS;
use super::with_context;
use crate::codec;
use crate::daemon::{Daemon, now_ns};
use crate::executor::Batch;
use crate::packet::Packet;
use crate::upcall::attribute;

const COUNT: usize = 13;

pub(super) fn execute(daemon: &Arc<Daemon>, request: &Request<'_>) -> Result<(), Failure> {
    let attrs: Table<'_, COUNT> = request.table();
    let bytes = attrs.require(attribute::PACKET)?.payload;
    let key_attr = attrs.require(attribute::KEY)?;
    let actions_attr = attrs.require(attribute::ACTIONS)?;
    let metadata = codec::key::parse_metadata(key_attr.payload, LIMITS)?;
    let known = metadata.key;
    let mru = attrs.get(attribute::MRU).map_or(Ok(0), |attr| attr.u16())?;
    let hash = attrs
        .get(attribute::HASH)
        .map(|attr| attr.u64())
        .transpose()?;
    let upcall_pid = attrs
        .get(attribute::UPCALL_PID)
        .map(|attr| attr.u32())
        .transpose()?;

    let mut packet = Box::<Packet>::default();
    packet.renew(Frame::from_bytes(bytes), known.in_port);
    let meta = Metadata {
        in_port: known.in_port,
        skb_mark: known.skb_mark,
        priority: known.priority,
        recirc_id: known.recirc_id,
        dp_hash: known.dp_hash,
        packet_type: match known.mac_proto {
            0 => PacketType::L3(known.eth_type.get()),
            _ => PacketType::Ethernet,
        },
        tunnel: (known.tunnel.family != 0).then(|| Box::new(known.tunnel)),
        ct: has_conntrack(&known).then(|| {
            Box::new(ConntrackMetadata {
                state: known.ct_state,
                zone: known.ct_zone,
                mark: known.ct_mark,
                labels: known.ct_labels,
                orig_src: known.ct_orig_src,
                orig_dst: known.ct_orig_dst,
                orig_tp_src: known.ct_orig_tp_src.get(),
                orig_tp_dst: known.ct_orig_tp_dst.get(),
                orig_proto: known.ct_orig_proto,
            })
        }),
    };
    packet.layers = extract::extract(&mut packet.frame, &meta, &mut packet.key)
        .map_err(|_short| Errno::EINVAL)?;
    metadata.check(&packet.key)?;
    let actions = codec::action::parse_exact(actions_attr.payload, &packet.key, LIMITS)?;
    packet.mru = mru;
    packet.upcall_pid = upcall_pid;

    let datapath = daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV)?;
    with_context(daemon, |context| {
        let executor = &mut context.executor;
        // The low half is the hash that the upcall told: it keeps a packet at its reader.
        packet.hash = match hash {
            Some(told) if told as u32 != 0 => told as u32,
            _ => executor.hash(&packet.key),
        };
        let ports = datapath.ports.load();
        let guard = context.handle.pin();
        let mut batch = Batch::new(&datapath, &ports, &guard, now_ns());
        executor.execute(&mut batch, packet, &actions);
        executor.flush(&batch);
        Ok(())
    })
}

/// Whether the key tells anything of a connection.
fn has_conntrack(key: &Key) -> bool {
    key.ct_state != 0
        || key.ct_zone != 0
        || key.ct_mark != 0
        || key.ct_labels != [0; 16]
        || key.ct_orig_proto != 0
        || key.ct_orig_src != [0; 16]
        || key.ct_orig_dst != [0; 16]
}
