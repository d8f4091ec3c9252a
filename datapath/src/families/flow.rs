//! `ovs_flow`: flows installed, changed, deleted, read.
//!
//! # Contract
//! Nothing here takes the configuration lock or waits for who has it: a request finds its datapath in a
//! snapshot, its table by a counted reference ([`crate::table_ref`]), and then waits for the table's own
//! mutex at most. Parsing and validation come before the mutex, building and sending answers after it.
//!
//! Source: uapi `linux/openvswitch.h`, `enum ovs_flow_cmd`; the order of checks as the module has it.

use std::ops::ControlFlow;
use std::sync::Arc;

use ::flow::action::ActionList;
use ::flow::flow::{Flow, FlowId, NewFlow, Ufid};
use ::flow::key::Key;
use ::flow::table::{DumpCursor, FlowTable, InsertError, Writer as TableWriter};
use crossbeam_epoch::Guard;
use netlink::attr::{Table, Writer};
use netlink::message::flags;
use netlink::{Answer, Dump, DumpPart, Errno, Failure, Family, Fit, Group, Request};

use super::{command, with_context};
use crate::codec;
use crate::codec::Limits;
use crate::codec::flow::UfidFlags;
use crate::daemon::Daemon;

mod attribute {
    pub const KEY: u16 = 1;
    pub const ACTIONS: u16 = 2;
    pub const STATS: u16 = 3;
    pub const TCP_FLAGS: u16 = 4;
    pub const USED: u16 = 5;
    pub const CLEAR: u16 = 6;
    pub const MASK: u16 = 7;
    pub const UFID: u16 = 9;
    pub const UFID_FLAGS: u16 = 10;
    pub const COUNT: usize = 11;
}

/// What flows can match and do at present.
pub const LIMITS: Limits = Limits { conntrack: true };

type Attributes<'a> = Table<'a, { attribute::COUNT }>;

pub(super) fn handle(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let attrs: Attributes<'_> = request.table();
    match request.command {
        command::NEW => new(daemon, request, &attrs, answer),
        command::SET => set(daemon, request, &attrs, answer),
        command::DEL => delete(daemon, request, &attrs, answer),
        command::GET => get(daemon, request, &attrs, answer),
        _ => Err(Errno::EOPNOTSUPP.into()),
    }
}

fn new(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    attrs: &Attributes<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let key_attr = attrs
        .get(attribute::KEY)
        .ok_or(Failure::from(Errno::EINVAL).message("Flow key attr not present in new flow."))?;
    let actions_attr = attrs.get(attribute::ACTIONS).ok_or(
        Failure::from(Errno::EINVAL).message("Flow actions attr not present in new flow."),
    )?;
    let mask_attr = attrs.get(attribute::MASK).map(|attr| attr.payload);
    let (key, mask) = codec::key::parse_match(key_attr.payload, mask_attr, LIMITS)?;
    let name = name(attrs)?;
    let actions = Arc::new(codec::action::parse(
        actions_attr.payload,
        &key,
        &mask,
        LIMITS,
    )?);
    let wants = UfidFlags::parse(attrs.get(attribute::UFID_FLAGS))?;
    let new = NewFlow::new(name, &key, &mask, Arc::clone(&actions));
    let id = new.id.clone();
    with_table(daemon, request, |table, handle| {
        let prepared = table.prepare(new);
        let writer = table.write(handle);
        let guard = handle.pin();
        match existing(&writer, &id, &key) {
            None => match writer.insert(prepared) {
                Ok(_) => {}
                Err(InsertError::Full) => return Err(Errno::ENOSPC.into()),
                // `existing` would have found it.
                Err(InsertError::IdInUse(_) | InsertError::KeyInUse(_)) => {
                    return Err(Errno::EEXIST.into());
                }
            },
            // Either flag alone forbids to change what is there, as the module reads them.
            Some(_) if request.flags & (flags::CREATE | flags::EXCL) != 0 => {
                return Err(Errno::EEXIST.into());
            }
            Some(found) => {
                let same = same_flow(&writer, found, &key).ok_or(Errno::ENOENT)?;
                let shown = same.id().clone();
                writer.replace_actions(same, actions);
                let flow = find_by_id(table, &shown, &guard);
                drop(writer);
                return announce(answer, command::NEW, request, flow, wants);
            }
        }
        let flow = find_by_id(table, &id, &guard);
        drop(writer);
        announce(answer, command::NEW, request, flow, wants)
    })
}

/// The flow that a new one would collide with: of the same unique id, or any that matches its unmasked
/// key.
fn existing<'w>(writer: &'w TableWriter<'_>, id: &FlowId, key: &Key) -> Option<&'w Flow> {
    let named = match id {
        FlowId::Ufid(ufid) => writer.find_ufid(ufid),
        FlowId::Key(_) => None,
    };
    named.or_else(|| writer.find_overlap(key))
}

/// Whether the flow that was found is the one that is meant: the same key, not merely an overlap.
fn same_flow<'w>(writer: &'w TableWriter<'_>, found: &'w Flow, key: &Key) -> Option<&'w Flow> {
    match found.id() {
        FlowId::Ufid(_) => found.matches(key).then_some(found),
        FlowId::Key(own) if **own == *key => Some(found),
        FlowId::Key(_) => writer.find_key(key),
    }
}

fn set(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    attrs: &Attributes<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let ufid = name(attrs)?;
    let mask_attr = attrs.get(attribute::MASK).map(|attr| attr.payload);
    let matched = match attrs.get(attribute::KEY) {
        Some(attr) => Some(codec::key::parse_match(attr.payload, mask_attr, LIMITS)?),
        None if ufid.is_none() => {
            return Err(Failure::from(Errno::EINVAL)
                .message("Flow set message rejected, Key attribute missing."));
        }
        None => None,
    };
    let actions = match (attrs.get(attribute::ACTIONS), &matched) {
        (None, _) => None,
        (Some(_), None) => {
            return Err(Failure::from(Errno::EINVAL)
                .message("Flow actions can only be set with a flow key."));
        }
        (Some(attr), Some((key, mask))) => Some(Arc::new(codec::action::parse(
            attr.payload,
            key,
            mask,
            LIMITS,
        )?)),
    };
    let clear = attrs.get(attribute::CLEAR).is_some();
    let wants = UfidFlags::parse(attrs.get(attribute::UFID_FLAGS))?;
    with_table(daemon, request, |table, handle| {
        let writer = table.write(handle);
        let guard = handle.pin();
        let key = matched.as_ref().map(|(key, _)| key);
        let flow = find(table, ufid.as_ref(), key, &guard).ok_or(Errno::ENOENT)?;
        if let Some(actions) = actions {
            writer.replace_actions(flow, actions);
        }
        drop(writer);
        // The answer still has the statistics that are then cleared.
        announce(answer, command::SET, request, Some(flow), wants)?;
        if clear {
            flow.clear_stats();
        }
        Ok(())
    })
}

fn delete(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    attrs: &Attributes<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let ufid = name(attrs)?;
    let key = optional_key(attrs)?;
    let wants = UfidFlags::parse(attrs.get(attribute::UFID_FLAGS))?;
    with_table(daemon, request, |table, handle| {
        let writer = table.write(handle);
        if ufid.is_none() && key.is_none() {
            writer.flush();
            return Ok(());
        }
        let guard = handle.pin();
        let flow = find(table, ufid.as_ref(), key.as_ref(), &guard).ok_or(Errno::ENOENT)?;
        writer.remove(flow);
        drop(writer);
        announce(answer, command::DEL, request, Some(flow), wants)
    })
}

fn get(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
    attrs: &Attributes<'_>,
    answer: &mut Answer<'_>,
) -> Result<(), Failure> {
    let ufid = name(attrs)?;
    let key = optional_key(attrs)?;
    if ufid.is_none() && key.is_none() {
        return Err(Failure::from(Errno::EINVAL)
            .message("Flow get message rejected, Key attribute missing."));
    }
    let wants = UfidFlags::parse(attrs.get(attribute::UFID_FLAGS))?;
    let datapath = daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV)?;
    with_context(daemon, |context| {
        let guard = context.handle.pin();
        let table = datapath.table.load(&guard).ok_or(Errno::ENODEV)?;
        let flow = find(table, ufid.as_ref(), key.as_ref(), &guard).ok_or(Errno::ENOENT)?;
        answer.reply(command::GET, request.dp_ifindex, |writer| {
            write(writer, flow, wants)
        })?;
        Ok(())
    })
}

fn name(attrs: &Attributes<'_>) -> Result<Option<Ufid>, Errno> {
    codec::flow::parse_ufid(attrs.get(attribute::UFID))
}

fn optional_key(attrs: &Attributes<'_>) -> Result<Option<Key>, Errno> {
    attrs
        .get(attribute::KEY)
        .map(|attr| codec::key::parse_key(attr.payload, LIMITS))
        .transpose()
}

/// By unique id if there is one (the key is of no interest then), else by exact unmasked key.
fn find<'g>(
    table: &'g FlowTable,
    ufid: Option<&Ufid>,
    key: Option<&Key>,
    guard: &'g Guard,
) -> Option<&'g Flow> {
    match (ufid, key) {
        (Some(ufid), _) => table.find_ufid(ufid, guard),
        (None, Some(key)) => table.find_key(key, guard),
        (None, None) => None,
    }
}

fn find_by_id<'g>(table: &'g FlowTable, id: &FlowId, guard: &'g Guard) -> Option<&'g Flow> {
    match id {
        FlowId::Ufid(ufid) => table.find_ufid(ufid, guard),
        FlowId::Key(key) => table.find_key(key, guard),
    }
}

fn with_table(
    daemon: &Daemon,
    request: &Request<'_>,
    work: impl FnOnce(&FlowTable, &crossbeam_epoch::LocalHandle) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let datapath = daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV)?;
    with_context(daemon, |context| {
        let table = datapath
            .table
            .acquire(&context.handle)
            .ok_or(Errno::ENODEV)?;
        work(&table, &context.handle)
    })
}

fn announce(
    answer: &mut Answer<'_>,
    command: u8,
    request: &Request<'_>,
    flow: Option<&Flow>,
    wants: UfidFlags,
) -> Result<(), Failure> {
    if let Some(flow) = flow {
        answer.announce(Group::Flow, command, request.dp_ifindex, |writer| {
            write(writer, flow, wants)
        })?;
    }
    Ok(())
}

/// The attributes of a flow, in the module's order.
fn write(writer: &mut Writer<'_>, flow: &Flow, wants: UfidFlags) -> Result<(), Errno> {
    match flow.id() {
        FlowId::Ufid(ufid) => {
            writer.bytes(attribute::UFID, ufid.as_bytes())?;
            if !wants.omit_key() {
                write_key(writer, &flow.masked_key())?;
            }
        }
        // The key is this flow's name: it can't be left out.
        FlowId::Key(key) => write_key(writer, key)?,
    }
    if !wants.omit_mask() {
        let nest = writer.begin(attribute::MASK);
        codec::key::write_mask(writer, &flow.masked_key(), &flow.mask().to_key())?;
        writer.end(nest)?;
    }
    let stats = flow.stats();
    if stats.used_ms != 0 {
        writer.u64(attribute::USED, stats.used_ms);
    }
    if stats.packets != 0 {
        let mut counts = [0; 16];
        let (packets, bytes) = counts.split_at_mut(8);
        packets.copy_from_slice(&stats.packets.to_ne_bytes());
        bytes.copy_from_slice(&stats.bytes.to_ne_bytes());
        writer.bytes(attribute::STATS, &counts)?;
    }
    // The attribute has eight bits, the header twelve: NS and the reserved ones aren't shown.
    let shown = (stats.tcp_flags & 0xff) as u8;
    if shown != 0 {
        writer.u8(attribute::TCP_FLAGS, shown);
    }
    if !wants.omit_actions() {
        write_actions(writer, flow.actions())?;
    }
    Ok(())
}

fn write_key(writer: &mut Writer<'_>, key: &Key) -> Result<(), Errno> {
    let nest = writer.begin(attribute::KEY);
    codec::key::write_key(writer, key)?;
    writer.end(nest)
}

fn write_actions(writer: &mut Writer<'_>, actions: &ActionList) -> Result<(), Errno> {
    let nest = writer.begin(attribute::ACTIONS);
    writer.raw(&actions.wire);
    writer.end(nest)
}

/// A dump of one datapath's flows.
pub(super) fn dump(
    daemon: &Arc<Daemon>,
    request: &Request<'_>,
) -> Result<impl Dump + use<>, Failure> {
    let attrs: Attributes<'_> = request.table();
    let wants = UfidFlags::parse(attrs.get(attribute::UFID_FLAGS))?;
    let datapath = daemon.by_ifindex(request.dp_ifindex).ok_or(Errno::ENODEV)?;
    let cursor = with_context(daemon, |context| {
        let guard = context.handle.pin();
        let table = datapath.table.load(&guard).ok_or(Errno::ENODEV)?;
        Ok(table.dump_start())
    })?;
    Ok(FlowDump {
        daemon: Arc::clone(daemon),
        ifindex: datapath.ifindex,
        cursor,
        wants,
    })
}

/// Holds a cursor, not the table: a client that reads slowly keeps nothing alive.
struct FlowDump {
    daemon: Arc<Daemon>,
    ifindex: i32,
    cursor: DumpCursor,
    wants: UfidFlags,
}

impl Dump for FlowDump {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        let datapath = self.daemon.by_ifindex(self.ifindex).ok_or(Errno::ENODEV)?;
        let Self {
            daemon,
            ifindex,
            cursor,
            wants,
        } = self;
        let filled = with_context(daemon, |context| {
            let guard = context.handle.pin();
            let table = datapath.table.load(&guard).ok_or(Errno::ENODEV)?;
            let mut failed = None;
            let state = table.dump(cursor, &guard, |flow| {
                let fit = part.message(Family::Flow, command::GET, *ifindex, |writer| {
                    write(writer, flow, *wants)
                });
                match fit {
                    Ok(Fit::Written) => ControlFlow::Continue(()),
                    Ok(Fit::Full) => ControlFlow::Break(()),
                    Err(errno) => {
                        failed = Some(errno);
                        ControlFlow::Break(())
                    }
                }
            });
            match (failed, state) {
                (Some(errno), _) => Err(errno.into()),
                (None, Ok(state)) => Ok(state == ::flow::table::DumpPart::Done),
                // A datapath made anew under the same ifindex: the one that was asked about is gone.
                (None, Err(_stale)) => Err(Errno::ENODEV.into()),
            }
        });
        filled.map_err(|failure| failure.errno)
    }
}
