//! Tagged frames that are longer than a packet socket takes.
//!
//! `sendmsg` on a packet socket refuses (`EMSGSIZE`) a frame longer than MTU + 14 bytes, but allows
//! 4 more for an 802.1Q tag; not for an 802.1ad tag, nor for two tags. A transmit ring with
//! virtio-net headers makes no such check, so these frames take that way. Whether the device carries
//! them is the device's business: a veth takes MTU + 18 bytes.

use std::sync::{Mutex, PoisonError};

use frame::Frame;
use rustix::io::Errno;

use crate::port::TxRefusal;
use crate::sys::packet_socket::PacketSocket;
use crate::sys::tx_ring::TxRing;

/// Sends such frames. The ring itself is made when the first one comes.
#[derive(Debug)]
pub(super) struct TaggedSender {
    // Innermost of all locks, held for one system call that doesn't sleep.
    ring: Mutex<TxRing>,
}

impl TaggedSender {
    /// On a socket that only sends, bound to the device.
    pub(super) fn new(socket: PacketSocket) -> Result<Self, Errno> {
        Ok(Self {
            ring: Mutex::new(TxRing::new(socket)?),
        })
    }

    pub(super) fn send(&self, frame: &Frame) -> Result<(), TxRefusal> {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(errno) = ring.fit(frame.wire_len()) {
            tracing::debug!("transmit ring: {errno}");
            return Err(TxRefusal::TooLong);
        }
        match ring.send(frame) {
            Ok(()) => Ok(()),
            Err(Errno::AGAIN | Errno::NOBUFS) => Err(TxRefusal::Full),
            Err(Errno::NETDOWN) => Err(TxRefusal::Down),
            Err(Errno::NXIO | Errno::NODEV) => Err(TxRefusal::Gone),
            Err(Errno::MSGSIZE) => Err(TxRefusal::TooLong),
            Err(_) => {
                // Where the kernel looks next is in doubt: begin anew with the next frame.
                if let Err(errno) = ring.reset() {
                    tracing::debug!("transmit ring: {errno}");
                }
                Err(TxRefusal::Error)
            }
        }
    }
}
