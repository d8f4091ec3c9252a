//! What the examples share: the Tuple Space Explosion, and a thread's own time.
#![allow(dead_code)] // each example uses its part

use std::sync::Arc;

use crossbeam_epoch::LocalHandle;
use flow::action::{Action, ActionList};
use flow::flow::{NewFlow, Ufid};
use flow::key::Key;
use flow::table::{FlowTable, InsertError, Reclaimer, TableConfig};
use rustix::time::{ClockId, clock_gettime};

/// This thread's own time on a CPU, in ns: others on the machine don't count.
pub fn cpu() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// A sequence without meaning, the same in each run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
}

/// As an attacker makes masks: there is one rule for each input port, and packets that differ from it
/// first in bit `i` of the source, `j` of the destination and `k` of the port. A megaflow is made for
/// each combination, and no two overlap.
#[derive(Clone, Copy)]
pub struct Combination([u32; 3]);

/// As many combinations as there are.
pub const MASKS: u32 = 8192;
const WIDTHS: [u32; 3] = [32, 16, 16];

impl Combination {
    /// One of [`MASKS`].
    pub fn new(n: u32) -> Self {
        Self([n % 32, n / 32 % 16, n / 512 % 16])
    }

    /// The `n`th of `masks` that are spread over all.
    pub fn of(n: u32, masks: u32) -> Self {
        Self::new(MASKS - 1 - n % masks * (MASKS / masks))
    }

    pub fn mask(self) -> Key {
        let ones = |at: usize| (1u64 << WIDTHS[at]) - (1u64 << (WIDTHS[at] - 1 - self.0[at]));
        let mut mask = Key {
            recirc_id: u32::MAX,
            in_port: u32::MAX,
            ip_proto: 0xff,
            ..Key::ZERO
        };
        mask.eth_type = 0xffff.into();
        mask.ip_src[..4].copy_from_slice(&(ones(0) as u32).to_be_bytes());
        mask.ip_dst[..2].copy_from_slice(&(ones(1) as u16).to_be_bytes());
        mask.tp_dst = (ones(2) as u16).into();
        mask
    }

    /// A packet of this megaflow, otherwise at random.
    pub fn packet(self, port: u32, random: &mut Random) -> Key {
        let mut field = |at: usize, rule: u32| {
            let rest = WIDTHS[at] - 1 - self.0[at];
            let any = random.next() & ((1u64 << rest) - 1) as u32;
            (rule ^ 1 << rest) & !((1u64 << rest) - 1) as u32 | any
        };
        let (src, dst, tp) = (field(0, 0x0a01_0203), field(1, 0xc0a8), field(2, 0x1f90));
        let mut key = Key {
            in_port: port,
            ip_proto: 6,
            ..Key::ZERO
        };
        key.eth_type = 0x0800.into();
        key.ip_src[..4].copy_from_slice(&src.to_be_bytes());
        key.ip_dst[..2].copy_from_slice(&(dst as u16).to_be_bytes());
        key.tp_dst = (tp as u16).into();
        key.tp_src = (random.next() as u16).into();
        key
    }
}

/// The `n`th flow of a table with `masks` masks.
pub fn new_flow(n: u32, masks: u32, actions: &Arc<ActionList>, random: &mut Random) -> NewFlow {
    let of = Combination::of(n, masks);
    let key = of.packet(n / masks + 1, random);
    let ufid = Ufid::new(&n.wrapping_mul(0x9e37_79b1).to_be_bytes());
    NewFlow::new(ufid, &key, &of.mask(), Arc::clone(actions))
}

pub fn output() -> Arc<ActionList> {
    Arc::new(ActionList {
        program: [Action::Output(2)].into(),
        wire: [].into(),
    })
}

/// A table with that many flows of that many masks.
pub fn filled(
    flows: u32,
    masks: u32,
    reclaimer: &Arc<Reclaimer>,
    handle: &LocalHandle,
) -> Result<FlowTable, Box<dyn std::error::Error>> {
    let table = FlowTable::new(TableConfig::new(0x5eed, 1), reclaimer)?;
    let (actions, mut random) = (output(), Random(7));
    for n in 0..flows {
        let prepared = table.prepare(new_flow(n, masks, &actions, &mut random));
        match table.write(handle).insert(prepared) {
            Ok(_) | Err(InsertError::KeyInUse(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    reclaimer.reap(handle);
    Ok(table)
}

/// Packets of such a table's flows in random order, each with its hash.
pub fn packets(flows: u32, masks: u32, many: u32) -> Vec<(Key, u32)> {
    let mut random = Random(99);
    let mut one = |_| {
        let n = random.next() % flows;
        let of = Combination::of(n, masks);
        (of.packet(n / masks + 1, &mut random), n + 1)
    };
    (0..many).map(&mut one).collect()
}
