//! Everyone who is connected: upcalls and notifications to them, from any thread.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use dashmap::{DashMap, Entry};

use crate::attr::{self, Writer};
use crate::connection::Connection;
use crate::errno::Errno;
use crate::family::{Family, Group};
use crate::message;
use crate::transport::{PORT_ID_FIRST, PORT_ID_LAST};

/// Why an upcall didn't reach anyone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpcallError {
    /// No client has this port id: ECONNREFUSED.
    #[error("nobody has that port id")]
    NoPeer,
    /// The client's queue is full, and no other source holds more of it: ENOBUFS.
    #[error("the client's queue is full")]
    Full,
    /// Longer than a datagram can be: EMSGSIZE.
    #[error("too long for a datagram")]
    TooLong,
}

impl From<UpcallError> for Errno {
    fn from(error: UpcallError) -> Self {
        match error {
            UpcallError::NoPeer => Self::ECONNREFUSED,
            UpcallError::Full => Self::ENOBUFS,
            UpcallError::TooLong => Self::EMSGSIZE,
        }
    }
}

/// An upcall that was sent or queued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Upcalls of fuller sources to the same client that made room for it: they are lost, and
    /// belong into the caller's count.
    pub displaced: u32,
}

/// One client, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientInfo {
    /// Port id of its socket.
    pub port_id: u32,
    /// Process that connected; 0 if it isn't visible from here.
    pub pid: i32,
    /// Its user at that time.
    pub uid: u32,
    /// Whether it may change state.
    pub privileged: bool,
    /// Requests received.
    pub requests: u64,
    /// Messages that wait for it in the daemon.
    pub queued: usize,
    /// Their bytes.
    pub queued_bytes: usize,
    /// Messages lost for want of room.
    pub lost: u64,
}

/// Cheap to clone: all clones are the same hub.
///
/// # Thread safety
/// Every method may be called from every thread, and none waits for a client. Registries are copied
/// out of, never held across a send. Members of a group are read without a lock.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

struct Shared {
    clients: DashMap<u32, Arc<Connection>>,
    members: [ArcSwap<Vec<Arc<Connection>>>; Group::ALL.len()],
    /// Held while a group's members change.
    change: Mutex<()>,
    next_port_id: AtomicU32,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("clients", &self.0.clients.len())
            .finish_non_exhaustive()
    }
}

impl Default for Hub {
    fn default() -> Self {
        Self::new(PORT_ID_FIRST)
    }
}

impl Hub {
    /// Without clients; the first gets this port id (or one in the legal range).
    pub(crate) fn new(first_port_id: u32) -> Self {
        Self(Arc::new(Shared {
            clients: DashMap::new(),
            members: Default::default(),
            change: Mutex::new(()),
            next_port_id: AtomicU32::new(first_port_id),
        }))
    }

    /// Notifies the members of `group` of something that no request did: pid and seq 0. `build`
    /// isn't called when there are none.
    ///
    /// # Errors
    /// Those of `build`; nothing is sent then.
    pub fn announce(
        &self,
        group: Group,
        family: Family,
        command: u8,
        dp_ifindex: i32,
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if !self.has_members(group) {
            return Ok(());
        }
        let mut buffer = Vec::new();
        let begun = message::begin(&mut buffer, family, command, dp_ifindex, 0, 0, 0);
        build(&mut Writer::new(&mut buffer))?;
        message::finish(&mut buffer, begun);
        self.multicast(group, &buffer, 0);
        Ok(())
    }

    /// Sends an upcall to the client with this port id. `head` is what
    /// [`message::upcall_head`](crate::message::upcall_head) wrote for `packet`; `source` is the port
    /// of the datapath that it came from, between which the client's queue is fair.
    ///
    /// Never blocks. Upcalls of one source arrive in the order of these calls.
    ///
    /// # Errors
    /// The upcall is lost, see [`UpcallError`].
    pub fn upcall(
        &self,
        port_id: u32,
        source: u32,
        head: &[u8],
        packet: &[u8],
    ) -> Result<Delivery, UpcallError> {
        let client = self.client(port_id).ok_or(UpcallError::NoPeer)?;
        let len = head.len() + packet.len();
        let whole = message::Header::parse(head).map_or(len, |header| header.len as usize);
        let padding = whole.saturating_sub(len).min(attr::align(len) - len);
        client.upcall(source, head, packet, padding)
    }

    /// Whether a client has this port id.
    pub fn is_connected(&self, port_id: u32) -> bool {
        self.0.clients.contains_key(&port_id)
    }

    /// Whether `group` has members.
    pub fn has_members(&self, group: Group) -> bool {
        self.members(group)
            .is_some_and(|members| !members.load().is_empty())
    }

    /// Everyone, in the order of their port ids.
    pub fn clients(&self) -> Vec<ClientInfo> {
        let mut clients: Vec<_> = self.connections();
        clients.sort_unstable_by_key(|client| client.port_id);
        clients
            .iter()
            .map(|client| {
                let waiting = client.waiting();
                ClientInfo {
                    port_id: client.port_id,
                    pid: client.credentials.pid,
                    uid: client.credentials.uid,
                    privileged: client.privileged,
                    requests: client.received.load(Ordering::Relaxed),
                    queued: waiting.messages,
                    queued_bytes: waiting.bytes,
                    lost: client.lost(),
                }
            })
            .collect()
    }

    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        self.0
            .clients
            .iter()
            .map(|entry| Arc::clone(entry.value()))
            .collect()
    }

    pub(crate) fn client(&self, port_id: u32) -> Option<Arc<Connection>> {
        self.0
            .clients
            .get(&port_id)
            .map(|entry| Arc::clone(entry.value()))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.clients.len()
    }

    /// Sends `bytes` to the members of `group` but the one with port id `except`.
    pub(crate) fn multicast(&self, group: Group, bytes: &[u8], except: u32) {
        let Some(members) = self.members(group) else {
            return;
        };
        for member in members
            .load()
            .iter()
            .filter(|member| member.port_id != except)
        {
            member.send_one(bytes);
        }
    }

    /// Adds a client that `make` makes for a port id of its own.
    pub(crate) fn admit(&self, make: impl FnOnce(u32) -> Connection) -> Arc<Connection> {
        loop {
            let drawn = self.0.next_port_id.fetch_add(1, Ordering::Relaxed);
            let port_id = PORT_ID_FIRST + drawn % (PORT_ID_LAST - PORT_ID_FIRST + 1);
            if let Entry::Vacant(entry) = self.0.clients.entry(port_id) {
                let client = Arc::new(make(port_id));
                entry.insert(Arc::clone(&client));
                return client;
            }
        }
    }

    /// Forgets a client.
    pub(crate) fn dismiss(&self, client: &Arc<Connection>) {
        for group in Group::ALL {
            self.set_member(client, group, false);
        }
        self.0.clients.remove(&client.port_id);
    }

    pub(crate) fn set_member(&self, client: &Arc<Connection>, group: Group, member: bool) {
        if !client.set_group(group.index(), member) {
            return;
        }
        let Some(members) = self.members(group) else {
            return;
        };
        let _change = self.0.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = Vec::clone(&members.load());
        now.retain(|other| other.port_id != client.port_id);
        if member {
            now.push(Arc::clone(client));
        }
        members.store(Arc::new(now));
    }

    fn members(&self, group: Group) -> Option<&ArcSwap<Vec<Arc<Connection>>>> {
        self.0.members.get(group.index())
    }
}
