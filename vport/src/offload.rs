//! Offloads that a port must do without: off while it is there.

use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::sys::ethtool::{self, Offload};
use crate::sys::packet_socket::PacketSocket;

/// An offload of a device is off, if that can be had; put on again when dropped.
pub(crate) struct OffloadOff {
    /// Of the device's namespace.
    socket: PacketSocket,
    name: String,
    offload: Offload,
    /// It was on, and we have switched it off.
    switched: bool,
    /// Why it is still on.
    stuck: Option<Errno>,
}

impl OffloadOff {
    /// An error is one of the socket; that the device can't switch it is told by
    /// [`stuck`](Self::stuck).
    pub(crate) fn new(name: &str, offload: Offload) -> Result<Self, Errno> {
        let socket = PacketSocket::new()?;
        let mut off = Self {
            socket,
            name: String::from(name),
            offload,
            switched: false,
            stuck: None,
        };
        // Most devices haven't got it, and say so by an error.
        if ethtool::offload(off.socket.as_fd(), name, offload).unwrap_or(false) {
            match ethtool::set_offload(off.socket.as_fd(), name, offload, false) {
                Ok(()) => off.switched = true,
                Err(errno) => {
                    tracing::warn!("{name}: offload {offload:?} stays on: {errno}");
                    off.stuck = Some(errno);
                }
            }
        }
        Ok(off)
    }

    /// Whether it was on and now isn't.
    pub(crate) fn switched(&self) -> bool {
        self.switched
    }

    /// Why it couldn't be switched off.
    pub(crate) fn stuck(&self) -> Option<Errno> {
        self.stuck
    }
}

impl Drop for OffloadOff {
    fn drop(&mut self) {
        if !self.switched {
            return;
        }
        let restored = ethtool::set_offload(self.socket.as_fd(), &self.name, self.offload, true);
        if let Err(errno) = restored {
            // The device may be gone, or renamed.
            tracing::debug!("{}: {:?} stays off: {errno}", self.name, self.offload);
        }
    }
}
