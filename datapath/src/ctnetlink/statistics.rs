//! What has been counted: `conntrack -S` and `conntrack -C`.

use netlink::handler::{DumpPart, Fit};
use netlink::service::Answer;
use netlink::{Dump, Errno};

use super::{kind, message, nfgenmsg, subsystem};
use crate::conntrack::Tracker;
use crate::conntrack::client::Statistics;

/// `enum ctattr_stats_cpu`
mod cpu {
    pub const INVALID: u16 = 4;
    pub const INSERT: u16 = 8;
    pub const INSERT_FAILED: u16 = 9;
    pub const DROP: u16 = 10;
    pub const EARLY_DROP: u16 = 11;
    pub const CLASH_RESOLVE: u16 = 14;
}

/// `enum ctattr_stats_global`
mod global {
    pub const ENTRIES: u16 = 1;
    pub const MAX_ENTRIES: u16 = 2;
}

/// Counts modulo 2^32, as these attributes have them.
fn word(count: u64) -> u32 {
    count as u32
}

/// A dump of one message: the tracker counts for all processors together.
pub(super) fn dump(statistics: Statistics) -> impl Dump {
    PerCpu(statistics)
}

struct PerCpu(Statistics);

impl Dump for PerCpu {
    fn fill(&mut self, part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        let Statistics {
            inserted,
            insert_failed,
            invalid,
            early_drop,
            full,
            clash_resolved,
            ..
        } = self.0;
        let kind = kind(subsystem::CTNETLINK, message::GET_STATS_CPU);
        let fit = part.record(kind, &nfgenmsg(0, 0), |writer| {
            writer.be32(cpu::INVALID, word(invalid));
            writer.be32(cpu::INSERT, word(inserted));
            writer.be32(cpu::INSERT_FAILED, word(insert_failed));
            writer.be32(cpu::DROP, word(full));
            writer.be32(cpu::EARLY_DROP, word(early_drop));
            writer.be32(cpu::CLASH_RESOLVE, word(clash_resolved));
            Ok(())
        })?;
        Ok(fit == Fit::Written)
    }
}

/// How many connections there are, and can be.
pub(super) fn global(tracker: &Tracker, answer: &mut Answer<'_>) -> Result<(), Errno> {
    let kind = kind(subsystem::CTNETLINK, message::GET_STATS);
    answer.reply(kind, &nfgenmsg(0, 0), |writer| {
        writer.be32(global::ENTRIES, word(tracker.table.len() as u64));
        writer.be32(global::MAX_ENTRIES, word(tracker.table.most() as u64));
        Ok(())
    })
}

/// A dump of what there never is any of.
pub(super) struct Nothing;

impl Dump for Nothing {
    fn fill(&mut self, _part: &mut DumpPart<'_>) -> Result<bool, Errno> {
        Ok(true)
    }
}
