//! Carries packets through lookups and actions. Every thread that does so has an executor of its own.
//!
//! # Semantics
//! Those of the module: at most [`MAX_DEPTH`] action lists within each other; a clone, sample or
//! recirculation deeper than [`INLINE_DEPTH`] is put off until the outermost list is done, at most
//! [`MAX_DEFERRED`] of them for a packet; what exceeds that is dropped and counted. So every packet ends,
//! also in a loop of recirculations.
//!
//! # Thread safety
//! An executor belongs to one thread. What it shares (ports, tables, counters) it reaches through the
//! [`Batch`], for the time of a batch: no reference outlives it, so that an idle thread keeps nothing
//! alive.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_epoch::Guard;
use flow::action::{Action, ActionList, SetField};
use flow::cache::{LookupCounters, MaskCache};
use flow::extract::{self, Metadata};
use flow::flow::Flow;
use flow::hash;
use flow::key::Key;
use flow::rewrite::{self, Ttl};
use flow::stats::{self, Source};
use flow::table::{FlowTable, LANES};
use frame::{Frame, GsoKind, Pool};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::capture::{Captures, Tap};
use crate::conntrack::{self, action::Passage};
use crate::counters::Cell;
use crate::datapath::Datapath;
use crate::drop_reason::DropReason;
use crate::packet::Packet;
use crate::transmit::TransmitQueues;
use crate::upcall::Upcaller;
use crate::vport::VportSet;

/// Action lists within each other (`OVS_RECURSION_LIMIT`).
pub const MAX_DEPTH: u32 = 5;
/// Down to this depth a nested list runs at once (`OVS_DEFERRED_ACTION_THRESHOLD`).
pub const INLINE_DEPTH: u32 = MAX_DEPTH - 2;
/// Lists put off for a packet: the module's queue has ten places (`DEFERRED_ACTION_FIFO_SIZE`) and leaves
/// one empty, as the recording `sem_limits` shows.
pub const MAX_DEFERRED: usize = 9;

/// What one batch of packets shares: one datapath, one look at its ports and table.
pub struct Batch<'g> {
    /// The datapath.
    pub datapath: &'g Datapath,
    /// Its ports at the batch's beginning.
    pub ports: &'g VportSet,
    /// Its flows; None when it is being deleted.
    pub table: Option<&'g FlowTable>,
    /// Keeps flows and actions alive.
    pub guard: &'g Guard,
    /// Monotonic clock, nanoseconds.
    pub now_ns: u64,
    depth: u32,
    deferred: VecDeque<Deferred<'g>>,
    /// How many lists the packet that is being carried has had put off, done ones included: what those
    /// put off again counts too, or a loop of recirculations would never end.
    put_off: usize,
}

struct Deferred<'g> {
    packet: Box<Packet>,
    work: Work<'g>,
}

#[derive(Clone, Copy)]
enum Work<'g> {
    Recirculate(u32),
    Run(&'g ActionList),
}

impl<'g> Batch<'g> {
    /// A batch on `datapath` at the time `now_ns`.
    pub fn new(datapath: &'g Datapath, ports: &'g VportSet, guard: &'g Guard, now_ns: u64) -> Self {
        Self {
            datapath,
            ports,
            table: datapath.table.load(guard),
            guard,
            now_ns,
            depth: 0,
            deferred: VecDeque::new(),
            put_off: 0,
        }
    }

    /// Monotonic clock, milliseconds: what flows' statistics tell.
    pub fn now_ms(&self) -> u64 {
        self.now_ns / 1_000_000
    }

    /// Where `executor` counts what happens to packets of this ingress port.
    pub fn cell(&self, port: u32, executor: usize) -> &'g Cell {
        match self.ports.get(port) {
            Some(vport) => vport.counters.cell(executor),
            None => self.datapath.counters.cell(executor),
        }
    }
}

/// One thread's means to carry packets.
pub struct Executor {
    /// Which slot of a flow's statistics is its own.
    source: Source,
    /// Which cell of counters is its own: the same number.
    pub(crate) index: usize,
    /// Its buffers.
    pub pool: Pool,
    pub(crate) transmit: TransmitQueues,
    pub(crate) upcaller: Upcaller,
    tap: Tap,
    caches: Vec<(u64, MaskCache)>,
    random: SmallRng,
    hash_seed: u32,
    /// Packets of one port that are to be looked up side by side. Empty between batches.
    #[allow(clippy::vec_box)]
    together: Vec<Box<Packet>>,
    /// Boxes to be used again.
    #[allow(clippy::vec_box)] // The boxes are what is kept: packets move by pointer.
    spare: Vec<Box<Packet>>,
}

/// Boxes that an executor keeps: a batch and what its actions may copy.
const SPARE: usize = 128;
/// Tables whose mask caches an executor keeps: an executor of requests is told of none that goes.
const CACHES: usize = 64;

impl Executor {
    /// The executor of that number. `seed` is for `sample` and for hashes: it should be secret.
    pub fn new(source: Source, upcaller: Upcaller, seed: u64) -> Self {
        let index = usize::from(source.index());
        let mut random = SmallRng::seed_from_u64(seed ^ index as u64);
        let transmit = TransmitQueues::new(random.random());
        let mut pool = Pool::default();
        // Fragments of different workers' packets between two hosts must not come together.
        pool.seed_idents(random.random());
        Self {
            source,
            index,
            pool,
            transmit,
            upcaller,
            tap: Tap::default(),
            caches: Vec::new(),
            random,
            hash_seed: seed as u32,
            together: Vec::with_capacity(LANES),
            spare: Vec::new(),
        }
    }

    /// The same, seen by those captures.
    pub fn seen_by(mut self, captures: &Arc<Captures>) -> Self {
        self.tap = Tap::new(Arc::clone(captures));
        self
    }

    /// Frames that came out of `port`. Call [`Executor::flush`] at the batch's end.
    pub fn receive(&mut self, batch: &mut Batch<'_>, port: u32, frames: &mut Vec<Frame>) {
        let cell = batch.cell(port, self.index);
        let mut bytes = 0;
        for frame in frames.iter() {
            bytes += frame.wire_len() as u64;
        }
        cell.received.add(frames.len() as u64);
        cell.received_bytes.add(bytes);
        let mut meta = Metadata {
            in_port: port,
            ..Metadata::default()
        };
        self.tap.begin();
        for mut frame in frames.drain(..) {
            meta.tunnel = frame.tunnel.take();
            let mut packet = self.spare.pop().unwrap_or_default();
            packet.renew(frame, port);
            if self.tap.is_on() {
                packet.captured = self.tap.received(batch, port, &packet.frame);
            }
            match extract::extract(&mut packet.frame, &meta, &mut packet.key) {
                Ok(layers) => {
                    packet.layers = layers;
                    packet.hash = self.hash(&packet.key);
                    self.together.push(packet);
                    if self.together.len() == LANES {
                        self.process_together(batch);
                    }
                }
                Err(_) => self.drop(batch, packet, DropReason::Malformed),
            }
        }
        self.process_together(batch);
    }

    /// Looks up all packets that were put together, then carries each.
    fn process_together(&mut self, batch: &mut Batch<'_>) {
        let mut packets = std::mem::take(&mut self.together);
        if let (Some(table), Some(first)) = (batch.table, packets.first()) {
            let cache = cache_for(&mut self.caches, table);
            let mut looked = LookupCounters::default();
            let found = table.lookup_batch(
                &packets,
                |p| (&p.key, p.hash),
                batch.guard,
                cache,
                &mut looked,
            );
            // They come from one port.
            let cell = batch.cell(first.ingress, self.index);
            cell.mask_hit.add(looked.mask_hit);
            cell.cache_hit.add(looked.cache_hit);
            for (packet, found) in packets.drain(..).zip(found) {
                self.carry(batch, packet, found);
            }
        } else {
            for packet in packets.drain(..) {
                self.process(batch, packet);
            }
        }
        self.together = packets;
    }

    /// A packet that user space sends with actions of its own.
    pub fn execute(&mut self, batch: &mut Batch<'_>, packet: Box<Packet>, actions: &ActionList) {
        batch.cell(packet.ingress, self.index).executed.add(1);
        self.tap.begin();
        // The list outlives this call, not the batch's references: a batch of its own, sharing all
        // but the lifetime.
        let mut inner = Batch {
            datapath: batch.datapath,
            ports: batch.ports,
            table: batch.table,
            guard: batch.guard,
            now_ns: batch.now_ns,
            depth: batch.depth,
            deferred: VecDeque::new(),
            put_off: 0,
        };
        self.run_outermost(&mut inner, packet, actions);
    }

    /// The hash that chooses a packet's reader.
    pub fn hash(&self, key: &Key) -> u32 {
        hash::l4(key, self.hash_seed)
    }

    /// Hands everything that is queued to the ports.
    pub fn flush(&mut self, batch: &Batch<'_>) {
        self.transmit
            .flush(batch, self.index, &mut self.pool, &mut self.tap);
        self.tap.publish();
    }

    /// Drops what belongs to tables that are no more. `live` are the generations in use.
    pub fn forget_tables(&mut self, live: &[u64]) {
        self.caches.retain(|(id, _)| live.contains(id));
    }

    fn process<'g>(&mut self, batch: &mut Batch<'g>, packet: Box<Packet>) {
        let cell = batch.cell(packet.ingress, self.index);
        let Some(table) = batch.table else {
            cell.missed.add(1);
            self.drop(batch, packet, DropReason::UpcallNoReader);
            return;
        };
        let cache = cache_for(&mut self.caches, table);
        let mut looked = LookupCounters::default();
        let found = table.lookup(&packet.key, packet.hash, batch.guard, cache, &mut looked);
        cell.mask_hit.add(looked.mask_hit);
        cell.cache_hit.add(looked.cache_hit);
        self.carry(batch, packet, found);
    }

    /// A packet was looked up.
    fn carry<'g>(&mut self, batch: &mut Batch<'g>, packet: Box<Packet>, found: Option<&'g Flow>) {
        let cell = batch.cell(packet.ingress, self.index);
        match found {
            Some(flow) => {
                cell.hit.add(1);
                let seen = stats::Totals {
                    packets: 1,
                    bytes: packet.frame.wire_len() as u64,
                    used_ms: batch.now_ms(),
                    tcp_flags: packet.key.tcp_flags.get(),
                };
                flow.record(self.source, &seen);
                self.run_outermost(batch, packet, flow.actions());
            }
            None => {
                cell.missed.add(1);
                self.miss(batch, packet);
            }
        }
    }

    /// Runs a list and, if it is the outermost, what was put off meanwhile.
    fn run_outermost<'g>(
        &mut self,
        batch: &mut Batch<'g>,
        packet: Box<Packet>,
        list: &'g ActionList,
    ) {
        if batch.depth >= MAX_DEPTH {
            self.drop(batch, packet, DropReason::RecursionLimit);
            return;
        }
        if batch.depth == 0 {
            batch.put_off = 0;
        }
        batch.depth += 1;
        self.run(batch, packet, list);
        if batch.depth == 1 {
            while let Some(Deferred { packet, work }) = batch.deferred.pop_front() {
                match work {
                    Work::Recirculate(_) => self.process(batch, packet),
                    Work::Run(list) => self.run(batch, packet, list),
                }
            }
        }
        batch.depth -= 1;
    }

    fn run<'g>(&mut self, batch: &mut Batch<'g>, mut packet: Box<Packet>, list: &'g ActionList) {
        let mut rest = list.program.iter();
        while let Some(action) = rest.next() {
            let last = rest.as_slice().is_empty();
            match action {
                Action::Output(port) => {
                    let (out, on) = self.part(batch, packet, last);
                    self.output(batch, out, *port);
                    let Some(on) = on else { return };
                    packet = on;
                    packet.limit = None;
                }
                Action::Userspace(user) => {
                    let sent = self.upcall_action(batch, &mut packet, user, list);
                    packet.limit = None;
                    if last {
                        self.finish_upcall(batch, packet, sent);
                        return;
                    }
                }
                Action::Trunc(len) => packet.limit = Some(*len),
                Action::Hash { basis } => {
                    packet.key.dp_hash = hash::l4(&packet.key, *basis);
                }
                Action::Recirc(id) => {
                    if !packet.layers.key_valid && self.refresh(&mut packet).is_err() {
                        self.drop(batch, packet, DropReason::ActionError);
                        return;
                    }
                    let work = Work::Recirculate(*id);
                    let Some(on) = self.branch(batch, packet, work, last) else {
                        return;
                    };
                    packet = on;
                }
                Action::Sample {
                    probability,
                    actions,
                } => {
                    let taken = *probability == u32::MAX
                        || (*probability != 0 && self.random.random::<u32>() <= *probability);
                    if taken {
                        let Some(on) = self.branch(batch, packet, Work::Run(actions), last) else {
                            return;
                        };
                        packet = on;
                    }
                }
                Action::Clone(actions) => {
                    let Some(on) = self.branch(batch, packet, Work::Run(actions), last) else {
                        return;
                    };
                    packet = on;
                }
                Action::CheckPktLen {
                    len,
                    greater,
                    less_equal,
                } => {
                    let fits = longest_packet(&packet) <= usize::from(*len);
                    let actions = if fits { less_equal } else { greater };
                    let Some(on) = self.branch(batch, packet, Work::Run(actions), last) else {
                        return;
                    };
                    packet = on;
                }
                Action::DecTtl { exceeded } => {
                    match rewrite::dec_ttl(&mut packet.frame, &mut packet.key, &packet.layers) {
                        Ok(Ttl::Alive) => {}
                        Ok(Ttl::Exceeded) => {
                            if exceeded.program.is_empty() {
                                self.drop(batch, packet, DropReason::IpTtl);
                            } else {
                                self.nest(batch, packet, Work::Run(exceeded), false);
                            }
                            return;
                        }
                        Err(_) => {
                            self.drop(batch, packet, DropReason::ActionError);
                            return;
                        }
                    }
                }
                Action::Drop(error) => {
                    let reason = match error {
                        0 => DropReason::Explicit,
                        _ => DropReason::ExplicitWithError,
                    };
                    self.drop(batch, packet, reason);
                    return;
                }
                Action::CtClear => conntrack::action::clear(&mut packet),
                Action::Ct(ct) => {
                    if !packet.layers.key_valid && self.refresh(&mut packet).is_err() {
                        self.drop(batch, packet, DropReason::ActionError);
                        return;
                    }
                    let now = batch.now_ns;
                    let tracker = &batch.datapath.conntrack;
                    match tracker.execute(&mut packet, ct, now) {
                        Ok(Passage::On) => {}
                        Ok(Passage::Held) => {
                            batch.cell(packet.ingress, self.index).held.add(1);
                            self.recycle(packet);
                            return;
                        }
                        Err(_refusal) => {
                            self.drop(batch, packet, DropReason::Conntrack);
                            return;
                        }
                    }
                }
                Action::Meter(id) => {
                    let (bytes, source) = (packet.measure(), self.source);
                    let passes = batch
                        .datapath
                        .meters
                        .with(*id, |meter| meter.pass(bytes, source, batch.now_ns));
                    // A meter that doesn't exist lets the packet pass, as in the module.
                    if passes == Some(false) {
                        self.drop(batch, packet, DropReason::Meter);
                        return;
                    }
                }
                Action::Set(field) => {
                    if let SetField::Tunnel(tunnel) = &**field {
                        packet.egress = Some(tunnel.clone());
                    } else if let Err(_refused) =
                        rewrite::set(&mut packet.frame, &mut packet.key, &packet.layers, field)
                    {
                        self.drop(batch, packet, DropReason::ActionError);
                        return;
                    }
                }
                Action::PushVlan { .. }
                | Action::PopVlan
                | Action::PushMpls { .. }
                | Action::PopMpls { .. }
                | Action::AddMpls { .. }
                | Action::PushEth { .. }
                | Action::PopEth
                | Action::PushNsh(_)
                | Action::PopNsh => {
                    if restructure(&mut packet, action).is_err() {
                        self.drop(batch, packet, DropReason::ActionError);
                        return;
                    }
                }
            }
        }
        self.drop(batch, packet, DropReason::LastAction);
    }

    /// The packet for an action to keep, and the one that goes on behind it: none behind a list's last.
    fn part(
        &mut self,
        batch: &Batch<'_>,
        packet: Box<Packet>,
        last: bool,
    ) -> (Box<Packet>, Option<Box<Packet>>) {
        if last {
            return (packet, None);
        }
        (self.copy(batch, &packet), Some(packet))
    }

    /// Sends a packet into `work`; gives the packet that goes on behind it, if the action isn't the last.
    fn branch<'g>(
        &mut self,
        batch: &mut Batch<'g>,
        packet: Box<Packet>,
        work: Work<'g>,
        last: bool,
    ) -> Option<Box<Packet>> {
        let keeps_key = match work {
            Work::Recirculate(_) => true,
            Work::Run(list) => !last && changes_packets(list),
        };
        let (into, on) = self.part(batch, packet, last);
        self.nest(batch, into, work, keeps_key);
        on
    }

    /// Runs a nested list or a recirculation: at once, or later if that would go too deep. `keeps_key`:
    /// the list around needs its key unchanged, which in the module costs a level.
    fn nest<'g>(
        &mut self,
        batch: &mut Batch<'g>,
        mut packet: Box<Packet>,
        work: Work<'g>,
        keeps_key: bool,
    ) {
        if let Work::Recirculate(id) = work {
            packet.key.recirc_id = id;
        }
        if !keeps_key || batch.depth <= INLINE_DEPTH {
            match work {
                Work::Recirculate(_) => self.process(batch, packet),
                Work::Run(list) => {
                    batch.depth += u32::from(keeps_key);
                    self.run(batch, packet, list);
                    batch.depth -= u32::from(keeps_key);
                }
            }
        } else if batch.put_off < MAX_DEFERRED {
            batch.put_off += 1;
            batch.deferred.push_back(Deferred { packet, work });
        } else {
            self.drop(batch, packet, DropReason::DeferredLimit);
        }
    }

    fn output(&mut self, batch: &Batch<'_>, mut packet: Box<Packet>, port: u32) {
        let (pool, tap) = (&mut self.pool, &mut self.tap);
        match self
            .transmit
            .push(batch, self.index, pool, tap, &mut packet, port)
        {
            Ok(()) => self.recycle(packet),
            Err(reason) => self.drop(batch, packet, reason),
        }
    }

    fn refresh(&mut self, packet: &mut Packet) -> Result<(), extract::ExtractError> {
        extract::update(&mut packet.frame, &mut packet.key, &mut packet.layers)
    }

    fn copy(&mut self, batch: &Batch<'_>, packet: &Packet) -> Box<Packet> {
        batch.cell(packet.ingress, self.index).copied.add(1);
        let mut copy = self.spare.pop().unwrap_or_default();
        copy.copy_from(packet, self.pool.copy(&packet.frame));
        copy
    }

    pub(crate) fn drop(&mut self, batch: &Batch<'_>, packet: Box<Packet>, reason: DropReason) {
        batch.cell(packet.ingress, self.index).drop(reason, 1);
        if self.tap.is_on() {
            self.tap.dropped(batch, &packet, reason);
        }
        self.recycle(packet);
    }

    /// The packet has ended: what it was made of is used again.
    pub(crate) fn recycle(&mut self, mut packet: Box<Packet>) {
        packet.conntrack = None;
        self.pool.put(std::mem::take(&mut packet.frame));
        if self.spare.len() < SPARE {
            self.spare.push(packet);
        }
    }
}

fn cache_for<'c>(caches: &'c mut Vec<(u64, MaskCache)>, table: &FlowTable) -> &'c mut MaskCache {
    let id = table.generation();
    let at = match caches.iter().position(|(known, _)| *known == id) {
        Some(at) => at,
        None => {
            if caches.len() >= CACHES {
                caches.remove(0);
            }
            caches.push((id, MaskCache::new()));
            caches.len() - 1
        }
    };
    &mut caches[at].1
}

/// Whether a list does anything besides handing packets on; only then does the module keep a copy of
/// the key, and count a level.
fn changes_packets(list: &ActionList) -> bool {
    !list.program.iter().all(|action| {
        matches!(
            action,
            Action::Output(_) | Action::Recirc(_) | Action::Trunc(_) | Action::Userspace(_)
        )
    })
}

/// The longest packet that a frame stands for, Ethernet header included: of its segments if it is to be
/// segmented, of the fragments it came as if it was reassembled.
fn longest_packet(packet: &Packet) -> usize {
    if packet.mru != 0 {
        return usize::from(packet.mru) + usize::from(packet.layers.network);
    }
    // Behind a third tag no L4 header is looked for, but who left the checksum to be made knew where it is.
    let told = packet.frame.offload.csum.map(|csum| csum.start);
    let (Some(gso), Some(l4)) = (packet.frame.offload.gso, packet.layers.transport.or(told)) else {
        return packet.measure();
    };
    let l4 = usize::from(l4);
    let header = match gso.kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 => {
            let offset = packet.frame.bytes().get(l4 + 12).copied().unwrap_or(0x50);
            usize::from(offset >> 4) * 4
        }
        GsoKind::UdpL4 => 8,
        GsoKind::UdpFragments => 0,
    };
    (l4 + header + usize::from(gso.size)).min(packet.measure())
}

fn restructure(packet: &mut Packet, action: &Action) -> Result<(), rewrite::RewriteError> {
    let Packet {
        frame, key, layers, ..
    } = packet;
    match action {
        Action::PushVlan { tpid, tci } => rewrite::push_vlan(frame, key, layers, *tpid, *tci),
        Action::PopVlan => rewrite::pop_vlan(frame, key, layers),
        Action::PushMpls { lse, ethertype } => {
            rewrite::push_mpls(frame, key, layers, *lse, *ethertype)
        }
        Action::PopMpls { ethertype } => rewrite::pop_mpls(frame, key, layers, *ethertype),
        Action::AddMpls { lse, ethertype, l3 } => {
            rewrite::add_mpls(frame, key, layers, *lse, *ethertype, *l3)
        }
        Action::PushEth { src, dst } => rewrite::push_eth(frame, key, layers, *src, *dst),
        Action::PopEth => rewrite::pop_eth(frame, key, layers),
        Action::PushNsh(header) => rewrite::push_nsh(frame, key, layers, header),
        Action::PopNsh => rewrite::pop_nsh(frame, key, layers),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flow::table::{Reclaimer, TableConfig};

    #[test]
    fn tables_that_come_and_go_leave_bounded_caches() {
        let reclaimer = Arc::new(Reclaimer::new());
        let mut caches = Vec::new();
        for generation in 0..3 * CACHES as u64 {
            let table = FlowTable::new(TableConfig::new(1, generation), &reclaimer).unwrap();
            cache_for(&mut caches, &table);
            assert_eq!(caches.last().unwrap().0, generation);
        }
        assert_eq!(caches.len(), CACHES);
    }
}
