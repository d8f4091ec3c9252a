//! Offloads that a port must do without: off while it is there.

use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::link::Link;
use crate::sys::ethtool::{self, Offload};
use crate::sys::packet_socket::PacketSocket;

/// An offload of a device is off, if that can be had; put on again when dropped.
pub(crate) struct OffloadOff {
    /// Of the device's namespace.
    socket: PacketSocket,
    ifindex: u32,
    offload: Offload,
    /// It was on, and we have switched it off.
    switched: bool,
    /// Why it is still on.
    stuck: Option<Errno>,
}

impl OffloadOff {
    /// An error is one of the socket; that the device can't switch it is told by
    /// [`stuck`](Self::stuck).
    pub(crate) fn new(link: &Link, offload: Offload) -> Result<Self, Errno> {
        let socket = PacketSocket::new()?;
        let name = &link.name;
        let mut off = Self {
            socket,
            ifindex: link.index,
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
        // By its present name: the one it had may be another's.
        let socket = self.socket.as_fd();
        let restored = ethtool::current_name(socket, self.ifindex)
            .and_then(|name| ethtool::set_offload(socket, &name, self.offload, true));
        if let Err(errno) = restored {
            // It may be gone, or in another namespace.
            tracing::debug!(
                "device {}: {:?} stays off: {errno}",
                self.ifindex,
                self.offload
            );
        }
    }
}
