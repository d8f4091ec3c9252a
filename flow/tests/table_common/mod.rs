//! A small world of keys, masks and actions, so that flows overlap and ids meet again.
#![allow(dead_code)] // each test uses its part
#![allow(clippy::expect_used, clippy::panic)] // a test's helpers may fail as tests do

use std::sync::Arc;

use flow::action::{Action, ActionList};
use flow::flow::{Flow, NewFlow, Ufid};
use flow::key::Key;
use flow::table::{FlowTable, Reclaimer, TableConfig};

/// A key whose fields are taken from `n`, few bits each.
pub fn key(n: u32) -> Key {
    let mut key = Key {
        in_port: n & 3,
        ..Key::ZERO
    };
    key.eth_src[5] = (n >> 2 & 3) as u8;
    key.ip_src[3] = (n >> 4 & 3) as u8;
    key.ip_dst[..4].copy_from_slice(&(n >> 6 & 0xff).to_be_bytes());
    key.tp_dst = ((n >> 14 & 7) as u16).into();
    key
}

/// One of 64 masks.
pub fn mask(n: u32) -> Key {
    let mut mask = Key::ZERO;
    mask.in_port = if n & 1 != 0 { u32::MAX } else { 0 };
    mask.eth_src[5] = if n & 2 != 0 { 0xff } else { 0 };
    mask.ip_src[3] = if n & 4 != 0 { 1 } else { 0 };
    let prefix = [0u32, 0xff, 0xf0, 0xc0][(n >> 3 & 3) as usize];
    mask.ip_dst[..4].copy_from_slice(&prefix.to_be_bytes());
    mask.tp_dst = if n & 32 != 0 { 0xffff } else { 0 }.into();
    mask
}

/// `output:port`.
pub fn output(port: u32) -> Arc<ActionList> {
    Arc::new(ActionList {
        program: [Action::Output(port)].into(),
        wire: [].into(),
    })
}

/// The port of `output:port`.
pub fn port(flow: &Flow) -> u32 {
    match *flow.actions().program {
        [Action::Output(port)] => port,
        ref other => panic!("not what was installed: {other:?}"),
    }
}

pub fn ufid(n: u32) -> Ufid {
    Ufid::new(&n.to_be_bytes()).expect("four bytes")
}

/// A flow named by `ufid(id)` that outputs to port `id`.
pub fn new_flow(id: u32, key: &Key, mask: &Key) -> NewFlow {
    NewFlow::new(Some(ufid(id)), key, mask, output(id))
}

/// The `n` of [`ufid`].
pub fn number(flow: &Flow) -> u32 {
    let bytes = flow.ufid().expect("named by ufid").as_bytes();
    u32::from_be_bytes(bytes.try_into().expect("four bytes"))
}

pub fn table(seed: u64) -> (Arc<Reclaimer>, FlowTable) {
    let reclaimer = Arc::new(Reclaimer::new());
    let table = FlowTable::new(TableConfig::new(seed, 1), &reclaimer).expect("the usual cache");
    (reclaimer, table)
}
