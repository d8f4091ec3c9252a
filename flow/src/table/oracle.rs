//! The dullest flow table that is right: a row of flows, searched from the first. What the real one is
//! tested against.

use crate::flow::{FlowId, NewFlow};
use crate::key::Key;
use crate::mask::chunks;

/// Flows in the order in which they came.
#[derive(Debug, Default)]
pub struct LinearTable {
    /// Installed flows.
    pub flows: Vec<NewFlow>,
}

/// Does `key` match `flow`, bit by bit?
#[must_use]
pub fn matches(flow: &NewFlow, key: &Key) -> bool {
    let mask = flow.mask.to_key();
    let differs = chunks(&flow.key).iter().zip(chunks(key)).zip(chunks(&mask));
    differs
        .flat_map(|((a, b), m)| a.iter().zip(b).zip(m))
        .all(|((a, b), m)| (a ^ b) & m == 0)
}

impl LinearTable {
    /// Every flow that a packet with this key may be given to.
    pub fn matching<'a>(&'a self, key: &'a Key) -> impl Iterator<Item = &'a NewFlow> {
        self.flows.iter().filter(move |flow| matches(flow, key))
    }

    /// The flow named so.
    #[must_use]
    pub fn find(&self, id: &FlowId) -> Option<&NewFlow> {
        self.flows.iter().find(|flow| flow.id == *id)
    }

    /// Take the flow named so out.
    pub fn remove(&mut self, id: &FlowId) -> Option<NewFlow> {
        let at = self.flows.iter().position(|flow| flow.id == *id)?;
        Some(self.flows.remove(at))
    }
}
