//! What happens to links.
//!
//! # Contract
//! Events come in the kernel's order. If the kernel had to drop some (`ENOBUFS`), the monitor asks
//! for all links again and reports the differences: intermediate states are lost then, the last one
//! never is. A link that was deleted and made again under the same index within such a gap is seen
//! as a change.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_sys::{Socket, SocketAddr};

use super::{Link, all_from, link_index};
use crate::error::Error;
use crate::nl::{self, Client};

/// RTNLGRP_LINK.
const GROUP_LINK: u32 = 1;
/// Bytes of notifications that may wait: some thousand links changing at once.
const RECEIVE_BUFFER: u32 = 4 << 20;

/// What happened to a device of our namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// There is one, or one has changed.
    New(Link),
    /// One has another name now.
    Renamed {
        /// The name it had.
        old_name: String,
        /// As it is now.
        link: Link,
    },
    /// One was deleted, or moved to another namespace.
    Gone {
        /// Which it was.
        index: u32,
        /// The name it had.
        name: String,
    },
}

/// Follows the links of the namespace in which it was made. Its descriptor is readable when there
/// are events.
#[derive(Debug)]
pub struct LinkMonitor {
    socket: Socket,
    client: Client,
    known: HashMap<u32, Link>,
    buffer: Vec<u8>,
    /// Events were lost, or none were asked for yet: empty the queue, then compare with a dump.
    stale: bool,
}

impl LinkMonitor {
    /// The first [`receive`](Self::receive) tells of each link that is there.
    ///
    /// # Errors
    /// That of the socket.
    pub fn new() -> Result<Self, Error> {
        let open = || -> std::io::Result<Socket> {
            let mut socket = Socket::new(libc::NETLINK_ROUTE as isize)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            // Best effort: the system's limit applies.
            socket.set_rx_buf_sz(RECEIVE_BUFFER)?;
            socket.add_membership(GROUP_LINK)?;
            Ok(socket)
        };
        let socket = open().map_err(|error| Error::io(&error, "link monitor"))?;
        let client = Client::route().map_err(|errno| Error::os(errno, "link monitor"))?;
        Ok(Self {
            socket,
            client,
            known: HashMap::new(),
            buffer: Vec::new(),
            stale: true,
        })
    }

    /// Appends what has happened since the last call. Doesn't block.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn receive(&mut self, events: &mut Vec<LinkEvent>) -> Result<(), Error> {
        loop {
            self.buffer.clear();
            self.buffer.reserve(64 * 1024);
            match self.socket.recv(&mut self.buffer, libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => self.stale = true,
                // From before the gap: it might bring back what was deleted in the gap.
                Ok(_) if self.stale => {}
                Ok(_) => self.read(events),
                Err(error) => match error.raw_os_error() {
                    // The queue is empty, so nothing older than the dump can come behind it.
                    Some(libc::EAGAIN) if self.stale => self.resync(events)?,
                    Some(libc::EAGAIN) => return Ok(()),
                    Some(libc::EINTR) => {}
                    Some(libc::ENOBUFS) => self.stale = true,
                    _ => return Err(Error::io(&error, "link monitor")),
                },
            }
        }
    }

    /// The messages in the buffer.
    fn read(&mut self, events: &mut Vec<LinkEvent>) {
        let buffer = std::mem::take(&mut self.buffer);
        for message in nl::messages(&buffer) {
            match message.kind {
                libc::RTM_NEWLINK => {
                    if let Some(link) = Link::parse(message.payload) {
                        self.seen(link, events);
                    }
                }
                libc::RTM_DELLINK => {
                    if let Some(index) = link_index(message.payload) {
                        self.gone(index, events);
                    }
                }
                _ => {}
            }
        }
        self.buffer = buffer;
    }

    fn seen(&mut self, link: Link, events: &mut Vec<LinkEvent>) {
        match self.known.insert(link.index, link.clone()) {
            Some(old) if old == link => {}
            Some(old) if old.name != link.name => {
                events.push(LinkEvent::Renamed {
                    old_name: old.name,
                    link,
                });
            }
            _ => events.push(LinkEvent::New(link)),
        }
    }

    fn gone(&mut self, index: u32, events: &mut Vec<LinkEvent>) {
        if let Some(old) = self.known.remove(&index) {
            events.push(LinkEvent::Gone {
                index,
                name: old.name,
            });
        }
    }

    fn resync(&mut self, events: &mut Vec<LinkEvent>) -> Result<(), Error> {
        let links = all_from(&mut self.client)?;
        let now: std::collections::HashSet<u32> = links.iter().map(|link| link.index).collect();
        let missing: Vec<u32> = self
            .known
            .keys()
            .copied()
            .filter(|index| !now.contains(index))
            .collect();
        for index in missing {
            self.gone(index, events);
        }
        for link in links {
            self.seen(link, events);
        }
        self.stale = false;
        Ok(())
    }
}

impl AsFd for LinkMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for LinkMonitor {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}
