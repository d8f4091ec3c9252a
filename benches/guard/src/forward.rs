//! The whole way of a packet, from a port's receive queue to another's transmission: parsing, lookup,
//! actions, queueing. Cases differ by the flow's actions.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use arc_swap::ArcSwap;
use datapath::conntrack::{Config, Tracker};
use datapath::counters::Counters;
use datapath::datapath::{Datapath, Settings};
use datapath::executor::{Batch, Executor};
use datapath::upcall::Upcaller;
use datapath::vport::{Vport, VportSet, VportType};
use flow::action::{
    Action, ActionList, Conntrack, EthernetFields, Ipv4Fields, Masked, PortFields, SetField,
};
use flow::flow::{NewFlow, Ufid};
use flow::key::{Key, VLAN_CFI};
use flow::stats::Source;
use flow::table::{FlowTable, Reclaimer, TableConfig};
use frame::Frame;
use netlink::hub::Hub;

use crate::sink::Sink;
use crate::{Guard, PACKETS, frames};

const BATCH: usize = 32;
/// Where packets come in, and leave.
const PORTS: [u32; 3] = [1, 2, 3];
const NOW: u64 = 1_000_000_000;

fn set(field: SetField) -> Action {
    Action::Set(Box::new(field))
}

/// The cases: a name, the frame, the actions of its flow, and those after recirculation.
fn cases() -> Vec<(&'static str, Frame, Vec<Action>, Vec<Action>)> {
    let to = || Action::Output(2);
    let tcp = frames::tcp4;
    let addresses = set(SetField::Ipv4(Masked {
        value: Ipv4Fields {
            src: [192, 0, 2, 1],
            dst: [192, 0, 2, 2],
            proto: 0,
            tos: 0,
            ttl: 0,
            frag: 0,
        },
        mask: Ipv4Fields {
            src: [255; 4],
            dst: [255; 4],
            proto: 0,
            tos: 0,
            ttl: 0,
            frag: 0,
        },
    }));
    let macs = set(SetField::Ethernet(Masked {
        value: EthernetFields {
            src: [2, 0, 0, 0, 1, 1],
            dst: [2, 0, 0, 0, 1, 2],
        },
        mask: EthernetFields {
            src: [255; 6],
            dst: [255; 6],
        },
    }));
    let ports = set(SetField::Tcp(Masked {
        value: PortFields {
            src: 0.into(),
            dst: 8080.into(),
        },
        mask: PortFields {
            src: 0.into(),
            dst: 0xffff.into(),
        },
    }));
    let push = Action::PushVlan {
        tpid: 0x8100,
        tci: VLAN_CFI | 10,
    };
    let tracked = || {
        Action::Ct(Box::new(Conntrack {
            commit: true,
            ..Conntrack::default()
        }))
    };
    let exceeded = Box::new(ActionList::default());
    vec![
        ("forward", tcp(), vec![to()], vec![]),
        (
            "forward to two ports",
            tcp(),
            vec![to(), Action::Output(3)],
            vec![],
        ),
        ("drop", tcp(), vec![], vec![]),
        ("set(eth), forward", tcp(), vec![macs.clone(), to()], vec![]),
        ("set(ipv4), forward", tcp(), vec![addresses, to()], vec![]),
        ("set(tcp), forward", tcp(), vec![ports, to()], vec![]),
        (
            "route: set(eth), dec_ttl, forward",
            tcp(),
            vec![macs, Action::DecTtl { exceeded }, to()],
            vec![],
        ),
        ("push_vlan, forward", tcp(), vec![push, to()], vec![]),
        (
            "pop_vlan, forward",
            frames::tagged(),
            vec![Action::PopVlan, to()],
            vec![],
        ),
        (
            "push_mpls, forward",
            tcp(),
            vec![
                Action::PushMpls {
                    lse: 0x0006_4140.into(),
                    ethertype: 0x8847,
                },
                to(),
            ],
            vec![],
        ),
        (
            "recirc, forward",
            tcp(),
            vec![Action::Recirc(7)],
            vec![to()],
        ),
        (
            "ct(commit), recirc, forward",
            tcp(),
            vec![tracked(), Action::Recirc(7)],
            vec![to()],
        ),
    ]
}

/// Measures them.
pub fn forward(guard: &Guard) -> Result<()> {
    for (name, frame, actions, after) in cases() {
        let mut bed = Bed::new(actions, after)?;
        let mut both: Vec<_> = [(); 2].map(|()| bed.frames(&frame)).into();
        guard.case(name, PACKETS, || {
            if let Some(mut frames) = both.pop() {
                bed.carry(&mut frames);
            }
        });
        bed.check(name)?;
    }
    Ok(())
}

/// A datapath of three ports and two flows, and an executor.
struct Bed {
    datapath: Datapath,
    handle: crossbeam_epoch::LocalHandle,
    executor: Executor,
}

fn flow(recirc_id: u32, program: Vec<Action>) -> NewFlow {
    let key = Key {
        in_port: PORTS[0],
        recirc_id,
        mac_proto: 1,
        ..Key::ZERO
    };
    let mut mask = Key {
        in_port: u32::MAX,
        recirc_id: u32::MAX,
        mac_proto: 0xff,
        ..Key::ZERO
    };
    mask.vlan.tci = 0.into();
    let actions = Arc::new(ActionList {
        program: program.into(),
        wire: [].into(),
    });
    NewFlow::new(Ufid::new(&recirc_id.to_be_bytes()), &key, &mask, actions)
}

impl Bed {
    fn new(actions: Vec<Action>, after: Vec<Action>) -> Result<Self> {
        let reclaimer = Arc::new(Reclaimer::new());
        let handle = reclaimer.register();
        let table = FlowTable::new(TableConfig::new(0x5eed, 1), &reclaimer)?;
        for (recirc_id, program) in [(0, actions), (7, after)] {
            let prepared = table.prepare(flow(recirc_id, program));
            table
                .write(&handle)
                .insert(prepared)
                .map_err(|error| anyhow!("{error}"))?;
        }
        let mut ports = VportSet::default();
        for number in PORTS {
            ports = ports.with(Arc::new(Vport {
                number,
                kind: VportType::Netdev,
                name: "sink".into(),
                ring: None,
                device: Box::new(Sink),
                tunnel: None,
                renamed: ArcSwap::default(),
                observed: ArcSwap::default(),
                read: false.into(),
                upcall_pids: ArcSwap::default(),
                counters: Counters::new(1),
            }));
        }
        let tracker = Arc::new(Tracker::new(Config::new(0x5eed), NOW));
        let datapath = Datapath::new("guard", 1, Settings::default(), table, 1, &tracker);
        datapath.ports.store(Arc::new(ports));
        let source = Source::new(0, 1).context("one executor")?;
        Ok(Self {
            datapath,
            handle,
            executor: Executor::new(source, Upcaller::new(Hub::default(), 0), 0x5eed),
        })
    }

    /// As they come from a port.
    fn frames(&mut self, frame: &Frame) -> Vec<Vec<Frame>> {
        let batch = |_| (0..BATCH).map(|_| self.executor.pool.copy(frame)).collect();
        (0..PACKETS / BATCH).map(batch).collect()
    }

    fn carry(&mut self, batches: &mut [Vec<Frame>]) {
        for frames in batches {
            let ports = self.datapath.ports.load();
            let pin = self.handle.pin();
            let mut batch = Batch::new(&self.datapath, &ports, &pin, NOW);
            self.executor.receive(&mut batch, PORTS[0], frames);
            self.executor.flush(&batch);
        }
    }

    /// That packets went the way that the case is about.
    fn check(&self, name: &str) -> Result<()> {
        let all = self.datapath.totals();
        let sent = if name == "drop" {
            0
        } else {
            2 * PACKETS as u64
        };
        let copies = if name.contains("two ports") { 2 } else { 1 };
        ensure!(
            all.transmitted == sent * copies && all.missed == 0,
            "{name}: {} packets left, {} missed",
            all.transmitted,
            all.missed
        );
        Ok(())
    }
}
