//! What the daemon must hold after the requests that it accepted: told by the requests and by the
//! notifications that they earned (NLM_F_ECHO), kept in maps.

use std::collections::BTreeMap;

use crate::wire::{Attribute, Message, last, u32_at};
use crate::world::World;
use netlink::Family;

/// Flows by the attribute that names them. Several only without a unique id and with a tunnel in the key:
/// there are bits of a tunnel's key that are compared and not shown (empty options), in the module too.
pub type Flows = BTreeMap<Attribute, Vec<Flow>>;

/// What a flow is, apart from its name and its statistics.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// Payload of its key.
    pub key: Vec<u8>,
    /// Payload of its mask.
    pub mask: Vec<u8>,
    /// Payload of its actions.
    pub actions: Vec<u8>,
}

/// A port as a client sees it, apart from its statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// `OVS_VPORT_TYPE_*`
    pub kind: u32,
    /// With its NUL.
    pub name: Vec<u8>,
    /// Its readers, as far as they are shown.
    pub pids: Vec<u8>,
}

/// A datapath as a client sees it, apart from its statistics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datapath {
    /// With its NUL.
    pub name: Vec<u8>,
    /// USER_FEATURES, MASKS_CACHE_SIZE, PER_CPU_PIDS.
    pub settings: [Option<Vec<u8>>; 3],
    /// Its ports by number.
    pub ports: BTreeMap<u32, Port>,
    /// Its flows.
    pub flows: Flows,
}

/// All datapaths by ifindex.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// By ifindex.
    pub datapaths: BTreeMap<i32, Datapath>,
}

const DUMP: u16 = 0x300;

fn has_tunnel(flow: &Flow) -> bool {
    last(&crate::wire::attributes(&flow.key), 16).is_some()
}

fn required(attributes: &[Attribute], kind: u16) -> Vec<u8> {
    last(attributes, kind)
        .unwrap_or_else(|| panic!("no attribute {kind}: {attributes:?}"))
        .to_vec()
}

fn word(attributes: &[Attribute], kind: u16) -> u32 {
    u32_at(&required(attributes, kind), 0)
}

/// A flow of a reply, and its name. None if the request wished parts of it to be left out.
pub fn flow_of(attributes: &[Attribute]) -> Option<(Attribute, Flow)> {
    let part = |kind| last(attributes, kind).map(<[u8]>::to_vec);
    // What is nested is well-formed, too.
    for kind in [1, 2, 7] {
        crate::wire::attributes(last(attributes, kind).unwrap_or_default());
    }
    let flow = Flow {
        key: part(1)?,
        mask: part(7)?,
        actions: part(2)?,
    };
    let name = match part(9) {
        Some(ufid) => (9, ufid),
        None => (1, flow.key.clone()),
    };
    Some((name, flow))
}

fn port_of(attributes: &[Attribute]) -> (u32, Port) {
    let port = Port {
        kind: word(attributes, 2),
        name: required(attributes, 3),
        pids: required(attributes, 5),
    };
    (word(attributes, 1), port)
}

fn datapath_of(attributes: &[Attribute]) -> Datapath {
    Datapath {
        name: required(attributes, 1),
        settings: [5, 7, 8].map(|kind| last(attributes, kind).map(<[u8]>::to_vec)),
        ports: BTreeMap::new(),
        flows: BTreeMap::new(),
    }
}

impl Model {
    /// What the daemon says that it holds, by dumps.
    pub fn dumped(world: &mut World) -> Self {
        let mut dump = |family: Family, ifindex: i32| -> Vec<Message> {
            let messages = world
                .request(family, 3, ifindex, DUMP, |_| {})
                .unwrap_or_else(|errno| panic!("a dump of {family:?}: {errno:?}"));
            messages
                .iter()
                .flat_map(|bytes| crate::wire::messages(bytes))
                .collect()
        };
        let mut model = Self::default();
        for message in dump(Family::Datapath, 0) {
            let clash = model
                .datapaths
                .insert(message.dp_ifindex(), datapath_of(&message.attributes()));
            assert_eq!(clash, None, "a datapath twice in a dump");
        }
        for (ifindex, datapath) in &mut model.datapaths {
            for message in dump(Family::Vport, *ifindex) {
                let (number, port) = port_of(&message.attributes());
                let clash = datapath.ports.insert(number, port);
                assert_eq!(clash, None, "a port twice in a dump");
            }
            for message in dump(Family::Flow, *ifindex) {
                let (name, flow) = flow_of(&message.attributes()).expect("a whole flow");
                let known = datapath.flows.entry(name).or_default();
                let same_name = known.is_empty() || has_tunnel(&flow);
                assert!(same_name, "a flow twice in a dump: {flow:02x?}");
                known.push(flow);
                known.sort();
            }
        }
        model
    }

    /// Applies a request that succeeded: its family's id, its bytes, and what came back besides the
    /// acknowledgement. False: what came back doesn't tell enough (no echo, parts left out).
    ///
    /// # Panics
    /// When what came back can't be.
    pub fn apply(&mut self, request: &[u8], replies: &[Message]) -> bool {
        let id = u16::from_ne_bytes([request[4], request[5]]);
        let Some(family) = Family::from_id(id) else {
            return true;
        };
        let (command, ifindex) = (request[16], u32_at(request, 20) as i32);
        let asked = crate::wire::lenient(&request[24..]);
        let reply = replies.first();
        if command == 3 {
            return true;
        }
        match family {
            Family::Datapath => self.apply_datapath(command, reply),
            Family::Vport => self.apply_port(command, reply),
            Family::Flow => self.apply_flow(command, ifindex, &asked, request, reply),
            Family::Packet | Family::Meter | Family::CtLimit => true,
        }
    }

    fn apply_datapath(&mut self, command: u8, reply: Option<&Message>) -> bool {
        let Some(reply) = reply else { return false };
        let ifindex = reply.dp_ifindex();
        let mut told = datapath_of(&reply.attributes());
        match command {
            1 => {
                told.ports.insert(
                    0,
                    Port {
                        kind: 2,
                        name: told.name.clone(),
                        pids: Vec::new(),
                    },
                );
                let clash = self.datapaths.insert(ifindex, told);
                assert!(clash.is_none(), "an ifindex given twice");
            }
            2 => {
                self.datapaths
                    .remove(&ifindex)
                    .expect("deleted what there was");
            }
            _ => {
                let known = self
                    .datapaths
                    .get_mut(&ifindex)
                    .expect("changed what there was");
                assert_eq!(known.name, told.name);
                known.settings = told.settings;
            }
        }
        true
    }

    fn apply_port(&mut self, command: u8, reply: Option<&Message>) -> bool {
        let Some(reply) = reply else { return false };
        let (number, port) = port_of(&reply.attributes());
        let datapath = self
            .datapaths
            .get_mut(&reply.dp_ifindex())
            .expect("its datapath");
        match command {
            1 => assert_eq!(datapath.ports.insert(number, port), None, "a number twice"),
            2 => assert!(
                datapath.ports.remove(&number).is_some(),
                "deleted what wasn't"
            ),
            _ => {
                let known = datapath
                    .ports
                    .get_mut(&number)
                    .expect("changed what there was");
                assert_eq!((known.kind, &known.name), (port.kind, &port.name));
                *known = port;
            }
        }
        true
    }

    fn apply_flow(
        &mut self,
        command: u8,
        ifindex: i32,
        asked: &[Attribute],
        request: &[u8],
        reply: Option<&Message>,
    ) -> bool {
        let datapath = self.datapaths.get_mut(&ifindex).expect("a flow's datapath");
        let flows = &mut datapath.flows;
        // A unique id of more than 16 bytes is none, as in the module.
        let named = last(asked, 9).is_some_and(|ufid| (1..=16).contains(&ufid.len()));
        if command == 2 && last(asked, 1).is_none() && !named {
            flows.clear();
            return true;
        }
        let Some(reply) = reply else { return false };
        let Some((name, flow)) = flow_of(&reply.attributes()) else {
            return false;
        };
        match command {
            1 => {
                let exclusive = u16::from_ne_bytes([request[6], request[7]]) & 0x600 != 0;
                let known = flows.entry(name).or_default();
                if known.is_empty() {
                    known.push(flow);
                    return true;
                }
                if has_tunnel(&flow) {
                    return false;
                }
                assert!(
                    !exclusive,
                    "changed what was there, though told not to: {request:02x?}\nknown {known:02x?}\ntold {flow:02x?}"
                );
                assert_eq!((&known[0].key, &known[0].mask), (&flow.key, &flow.mask));
                known[0] = flow;
            }
            _ => {
                let known = flows
                    .get_mut(&name)
                    .expect("changed or deleted what there was");
                if known.len() > 1 {
                    return false;
                }
                assert_eq!((&known[0].key, &known[0].mask), (&flow.key, &flow.mask));
                if command == 2 || last(asked, 2).is_none() {
                    assert_eq!(known[0].actions, flow.actions, "changed without being told");
                }
                known[0] = flow;
                if command == 2 {
                    flows.remove(&name);
                }
            }
        }
        true
    }

    /// A refused DP_NEW that does change something, as in the module: a client too old to know features
    /// finds a datapath, whose features are then off.
    pub fn met_by_an_old_client(&mut self, request: &[u8]) {
        let asked = crate::wire::lenient(&request[24..]);
        let name = last(&asked, 1).unwrap_or_default();
        let text = |name: &[u8]| name.split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
        for datapath in self.datapaths.values_mut() {
            if text(&datapath.name) == text(name) {
                let [features, _, pids] = &mut datapath.settings;
                (*features, *pids) = (Some(vec![0; 4]), None);
            }
        }
    }

    /// Whether the daemon holds what it must.
    ///
    /// # Errors
    /// The first difference.
    pub fn compare(&self, dumped: &Self) -> Result<(), String> {
        let ids = |model: &Self| model.datapaths.keys().copied().collect::<Vec<_>>();
        same("datapaths", &ids(self), &ids(dumped))?;
        for (ifindex, known) in &self.datapaths {
            let found = &dumped.datapaths[ifindex];
            same("name", &known.name, &found.name)?;
            same("settings", &known.settings, &found.settings)?;
            let shape = |dp: &Datapath| {
                let ports = dp.ports.iter();
                ports
                    .map(|(n, port)| (*n, port.kind, port.name.clone()))
                    .collect::<Vec<_>>()
            };
            same("ports", &shape(known), &shape(found))?;
            for (name, flow) in &known.flows {
                let what = format!("flow {name:02x?} of {ifindex}");
                same(&what, &Some(flow), &found.flows.get(name))?;
            }
            same("flows", &known.flows.len(), &found.flows.len())?;
        }
        Ok(())
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, known: &T, found: &T) -> Result<(), String> {
    match known == found {
        true => Ok(()),
        false => Err(format!(
            "{what}:\nthe model has {known:02x?}\nthe daemon    {found:02x?}"
        )),
    }
}
