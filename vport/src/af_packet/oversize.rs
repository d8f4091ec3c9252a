//! Tagged frames that are longer than a packet socket takes.
//!
//! `sendmsg` on a packet socket refuses (`EMSGSIZE`) a frame longer than MTU + 14, but allows 4 bytes
//! more for an 802.1Q tag; not for an 802.1ad tag, nor for two tags.

use frame::Frame;

use crate::port::TxRefusal;

/// Sends such frames.
#[derive(Debug)]
pub(crate) struct TaggedSender {}

impl TaggedSender {
    pub(crate) fn new(_ifindex: u32, _qdisc_bypass: bool) -> Self {
        Self {}
    }

    pub(crate) fn send(&self, _frame: &Frame) -> Result<(), TxRefusal> {
        Err(TxRefusal::TooLong)
    }
}
