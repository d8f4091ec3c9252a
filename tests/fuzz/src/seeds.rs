//! Where editing begins: real requests to the module, and real packets, as they were recorded.

use netlink::Family;
use tests::corpus;

/// Groups of recorded requests.
const REQUESTS: [&str; 10] = [
    "ctrl",
    "dp",
    "vport",
    "flow_basic",
    "flow_keys",
    "flow_key_bad",
    "flow_actions",
    "flow_action_bad",
    "packet",
    "meter",
];
/// Groups of recorded packets.
const PACKETS: [&str; 5] = [
    "sem_extract",
    "sem_l2",
    "sem_misc",
    "sem_rewrite",
    "sem_upcall",
];
/// `GENL_ID_CTRL`.
const CTRL: u16 = 16;

/// A recorded request, with our number of its family.
#[derive(Clone, Debug)]
pub struct Seed {
    /// The whole message.
    pub message: Vec<u8>,
    /// Its family's name.
    pub family: String,
    /// The module accepted it.
    pub good: bool,
}

/// All recorded requests.
///
/// # Panics
/// When there is no corpus.
pub fn requests() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for group in REQUESTS {
        for case in corpus::read(group).expect(group) {
            let mut message = case.request();
            if message.len() < 20 {
                continue;
            }
            let id = match case.family() {
                "nlctrl" | "ctrl" => CTRL,
                name => match Family::from_name(name) {
                    Some(family) => family.id(),
                    None => continue,
                },
            };
            message[4..6].copy_from_slice(&id.to_ne_bytes());
            seeds.push(Seed {
                message,
                family: case.family().to_owned(),
                good: case.errno() == Some(""),
            });
        }
    }
    assert!(seeds.len() > 1000, "only {} requests", seeds.len());
    seeds
}

/// All recorded packets, each once.
///
/// # Panics
/// When there is no corpus.
pub fn packets() -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for group in PACKETS {
        for case in corpus::read(group).expect(group) {
            let packet = case.bytes("packet_in_hex");
            if !packet.is_empty() {
                packets.push(packet);
            }
        }
    }
    packets.sort();
    packets.dedup();
    assert!(packets.len() > 50, "only {} packets", packets.len());
    packets
}

/// The action lists of recorded requests: flows' and packets' (`OVS_FLOW_ATTR_ACTIONS`,
/// `OVS_PACKET_ATTR_ACTIONS`).
pub fn action_lists(requests: &[Seed]) -> Vec<Vec<u8>> {
    let mut lists = Vec::new();
    for seed in requests {
        let kind = match seed.family.as_str() {
            "ovs_flow" => 2,
            "ovs_packet" => 3,
            _ => continue,
        };
        let attributes = crate::wire::lenient(seed.message.get(24..).unwrap_or_default());
        if let Some(list) = crate::wire::last(&attributes, kind) {
            lists.push(list.to_vec());
        }
    }
    lists.sort();
    lists.dedup();
    lists
}
