//! A scripted client of the daemon, in ovs-vswitchd's place: makes a datapath and ports, reads upcalls,
//! installs flows, sends packets. Speaks over the daemon's socket as the interposer does.
//!
//! Source of attribute numbers: uapi `linux/openvswitch.h`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use netlink::attr::{Attrs, Writer};
use netlink::family::command;
use netlink::message::{self, ATTRIBUTES, Header, Messages, control, flags};
use netlink::transport::{self, Hello, Netns, Welcome};
use netlink::{Errno, Family};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send,
};

/// One connection: what a netlink socket is.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// Its port id: upcalls are sent to it.
    pub port_id: u32,
    seq: u32,
    room: Vec<u8>,
}

/// A packet that came up.
#[derive(Debug)]
pub struct Upcall<'a> {
    /// The whole frame.
    pub packet: &'a [u8],
    /// The payload of `OVS_PACKET_ATTR_KEY`.
    pub key: &'a [u8],
}

const PACKET: u16 = 1;
const PACKET_KEY: u16 = 2;
const PACKET_ACTIONS: u16 = 3;
const FLOW_KEY: u16 = 1;
const FLOW_ACTIONS: u16 = 2;
const FLOW_MASK: u16 = 7;
const FLOW_UFID: u16 = 9;
const FLOW_UFID_FLAGS: u16 = 10;
const ACTION_OUTPUT: u16 = 1;
const INTERNAL: u32 = 2;
const NETDEV: u32 = 1;

impl Client {
    /// Connects to the daemon of that run directory. The calling thread is in the daemon's network
    /// namespace.
    ///
    /// # Errors
    /// There is no daemon, or it refuses.
    pub fn connect(run_dir: &Path) -> Result<Self> {
        let kind = SocketType::SEQPACKET;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        let path = run_dir.join(transport::SOCKET_NAME);
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)
            .with_context(|| path.display().to_string())?;
        let netns = std::fs::metadata("/proc/thread-self/ns/net")?;
        let hello = Hello {
            version: transport::VERSION,
            protocol: transport::NETLINK_GENERIC,
            netns: Netns {
                dev: netns.dev(),
                ino: netns.ino(),
            },
        };
        send(&socket, &hello.to_bytes(), SendFlags::empty())?;
        let mut bytes = [0; transport::WELCOME_LEN];
        recv(&socket, &mut bytes, RecvFlags::empty())?;
        let welcome = Welcome::parse(&bytes).context("no welcome")?;
        if welcome.port_id == 0 {
            bail!("the daemon refused: {welcome:?}");
        }
        Ok(Self {
            socket,
            port_id: welcome.port_id,
            seq: 0,
            room: vec![0; 1 << 17],
        })
    }

    /// A request with its barrier, as the interposer sends it; and its sequence number.
    ///
    /// # Errors
    /// An attribute is too long.
    pub fn request(
        &mut self,
        family: Family,
        command: u8,
        dp_ifindex: i32,
        more_flags: u16,
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<(u32, Vec<u8>)> {
        self.seq += 1;
        let mut bytes = Vec::with_capacity(512);
        let begun = message::begin(
            &mut bytes,
            family,
            command,
            dp_ifindex,
            flags::REQUEST | more_flags,
            self.seq,
            0,
        );
        build(&mut Writer::new(&mut bytes)).map_err(|e| anyhow!("building: {e:?}"))?;
        message::finish(&mut bytes, begun);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(&transport::barrier(self.seq));
        Ok((self.seq, bytes))
    }

    /// Sends what [`Client::request`] made, without waiting: false if there is no room.
    ///
    /// # Errors
    /// Those of send(2).
    pub fn try_send(&self, bytes: &[u8]) -> Result<bool> {
        match send(&self.socket, bytes, SendFlags::DONTWAIT) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(error) => Err(error).context("send"),
        }
    }

    /// The next datagram, without waiting.
    ///
    /// # Errors
    /// Those of recv(2); the daemon is gone.
    pub fn try_receive(&mut self) -> Result<Option<&[u8]>> {
        match recv(&self.socket, &mut self.room[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => bail!("the daemon is gone"),
            Ok((length, _)) => Ok(Some(&self.room[..length])),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error).context("recv"),
        }
    }

    /// Asks and waits: the request's own reply, if there is one, once the barrier is acknowledged.
    ///
    /// # Errors
    /// The errno that came back.
    pub fn ask(
        &mut self,
        family: Family,
        command: u8,
        dp_ifindex: i32,
        more_flags: u16,
        build: impl FnOnce(&mut Writer<'_>) -> Result<(), Errno>,
    ) -> Result<Vec<u8>> {
        let more_flags = more_flags | flags::ACK | flags::ECHO;
        let (seq, bytes) = self.request(family, command, dp_ifindex, more_flags, build)?;
        send(&self.socket, &bytes, SendFlags::empty())?;
        let mut reply = Vec::new();
        loop {
            let (length, _) = recv(&self.socket, &mut self.room[..], RecvFlags::empty())?;
            let datagram = &self.room[..length];
            if datagram.is_empty() {
                bail!("the daemon is gone");
            }
            if transport::ack_cookie(datagram) == Some(seq) {
                return Ok(reply);
            }
            for message in Messages::new(datagram) {
                let (header, _) = message;
                if header.seq != seq {
                    continue;
                }
                match header.kind {
                    control::ERROR => {
                        let error = datagram.get(16..20).and_then(|b| b.first_chunk());
                        let error = error.map_or(0, |b| i32::from_ne_bytes(*b));
                        if error != 0 {
                            bail!("{family:?} command {command}: errno {}", -error);
                        }
                    }
                    _ => reply = datagram.to_vec(),
                }
            }
        }
    }

    /// Makes a datapath whose local port is `name`; its dp_ifindex. Upcalls go to the ports' readers.
    ///
    /// # Errors
    /// Those of [`Client::ask`].
    pub fn new_datapath(&mut self, name: &str) -> Result<i32> {
        let pid = self.port_id;
        let reply = self.ask(Family::Datapath, command::NEW, 0, 0, |w| {
            w.name(1, name)?;
            w.u32(2, pid);
            Ok(())
        })?;
        let dp_ifindex = reply.get(20..24).and_then(|b| b.first_chunk());
        dp_ifindex
            .map(|b| i32::from_ne_bytes(*b))
            .context("no datapath in the reply")
    }

    /// Adds a port: an existing device, or an internal one. Its upcalls come here.
    ///
    /// # Errors
    /// Those of [`Client::ask`].
    pub fn new_port(&mut self, dp: i32, name: &str, number: u32, internal: bool) -> Result<()> {
        let pid = self.port_id;
        let kind = if internal { INTERNAL } else { NETDEV };
        self.ask(Family::Vport, command::NEW, dp, 0, |w| {
            w.u32(1, number);
            w.u32(2, kind);
            w.name(3, name)?;
            w.u32(5, pid);
            Ok(())
        })?;
        Ok(())
    }

    /// A FLOW_NEW, with UFID, of a UDP connection that is told by `flow`, output to `port`.
    ///
    /// # Errors
    /// None: the attributes fit.
    pub fn flow_new(&mut self, dp: i32, flow: u32, port: u32) -> Result<(u32, Vec<u8>)> {
        let more = flags::CREATE | flags::ACK;
        self.request(Family::Flow, command::NEW, dp, more, |w| {
            let mut ufid = [0x5a; 16];
            ufid[..4].copy_from_slice(&flow.to_ne_bytes());
            w.bytes(FLOW_UFID, &ufid)?;
            let key = w.begin(FLOW_KEY);
            udp_key(w, flow, None)?;
            w.end(key)?;
            let mask = w.begin(FLOW_MASK);
            udp_key(w, 0, Some(()))?;
            w.end(mask)?;
            let actions = w.begin(FLOW_ACTIONS);
            w.u32(ACTION_OUTPUT, port);
            w.end(actions)
        })
    }

    /// Installs flows 0 to `flows`, as in [`Client::flow_new`]; many are under way at a time.
    ///
    /// # Errors
    /// The errno that came back; answers were lost.
    pub fn install(&mut self, dp: i32, flows: u32) -> Result<()> {
        /// As many answers as fit into the socket.
        const UNDER_WAY: u32 = 64;
        let (mut sent, mut answered) = (0, 0);
        let mut waiting = None;
        while answered < flows {
            while sent < flows && sent - answered < UNDER_WAY {
                let bytes = match waiting.take() {
                    Some(bytes) => bytes,
                    None => self.flow_new(dp, sent, 1)?.1,
                };
                if !self.try_send(&bytes)? {
                    waiting = Some(bytes);
                    break;
                }
                sent += 1;
            }
            let (length, _) = recv(&self.socket, &mut self.room[..], RecvFlags::empty())?;
            let datagram = &self.room[..length];
            if datagram.is_empty() || transport::is_overrun(datagram) {
                bail!("answers were lost after {answered} flows");
            }
            if transport::ack_cookie(datagram).is_some() {
                continue;
            }
            for (header, message) in Messages::new(datagram) {
                if header.kind == control::ERROR && header.pid != transport::BARRIER_PID {
                    refused(message)?;
                    answered += 1;
                }
            }
        }
        Ok(())
    }

    /// Dumps a datapath's flows: the names of those that were shown. `ufid_flags` are `OVS_UFID_F_*`.
    ///
    /// # Errors
    /// The errno that came back; a flow without a unique id.
    pub fn dump_flows(&mut self, dp: i32, ufid_flags: u32) -> Result<Vec<u128>> {
        let (seq, bytes) = self.request(Family::Flow, command::GET, dp, flags::DUMP, |w| {
            w.u32(FLOW_UFID_FLAGS, ufid_flags);
            Ok(())
        })?;
        send(&self.socket, &bytes, SendFlags::empty())?;
        let mut shown = Vec::new();
        loop {
            let (length, _) = recv(&self.socket, &mut self.room[..], RecvFlags::empty())?;
            let datagram = &self.room[..length];
            if datagram.is_empty() {
                bail!("the daemon is gone");
            }
            for (header, message) in Messages::new(datagram) {
                if header.seq != seq || header.pid == transport::BARRIER_PID {
                    continue;
                }
                match header.kind {
                    control::DONE => return Ok(shown),
                    control::ERROR => refused(message)?,
                    _ => {
                        let attributes = message.get(ATTRIBUTES..).context("a short message")?;
                        let ufid = Attrs::new(attributes)
                            .find(|attribute| attribute.kind == FLOW_UFID)
                            .and_then(|ufid| ufid.payload.first_chunk())
                            .context("a flow without a name")?;
                        shown.push(u128::from_ne_bytes(*ufid));
                    }
                }
            }
        }
    }

    /// An EXECUTE of a packet that came up, output to `port`.
    ///
    /// # Errors
    /// The packet is too long for an attribute.
    pub fn execute(
        &mut self,
        dp: i32,
        packet: &[u8],
        key: &[u8],
        port: u32,
    ) -> Result<(u32, Vec<u8>)> {
        self.request(Family::Packet, command::packet::EXECUTE, dp, 0, |w| {
            w.bytes(PACKET, packet)?;
            w.bytes(PACKET_KEY, key)?;
            let actions = w.begin(PACKET_ACTIONS);
            w.u32(ACTION_OUTPUT, port);
            w.end(actions)
        })
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What a NLMSG_ERROR says, unless it acknowledges.
fn refused(message: &[u8]) -> Result<()> {
    let error = message.get(16..20).and_then(|b| b.first_chunk());
    match error.map(|b| i32::from_ne_bytes(*b)) {
        Some(0) => Ok(()),
        Some(error) => bail!("errno {}", -error),
        None => bail!("a short NLMSG_ERROR"),
    }
}

/// The packet in a datagram, if it is an upcall.
pub fn upcall(datagram: &[u8]) -> Option<Upcall<'_>> {
    let header = Header::parse(datagram)?;
    if header.kind != Family::Packet.id() {
        return None;
    }
    let (mut packet, mut key) = (None, None);
    for attribute in Attrs::new(datagram.get(ATTRIBUTES..)?) {
        match attribute.kind {
            PACKET => packet = Some(attribute.payload),
            PACKET_KEY => key = Some(attribute.payload),
            _ => {}
        }
    }
    Some(Upcall {
        packet: packet?,
        key: key?,
    })
}

/// The key of a frame of [`crate::sender`] on port 1, or its mask: all of it.
fn udp_key(w: &mut Writer<'_>, flow: u32, mask: Option<()>) -> Result<(), Errno> {
    let frame = crate::sender::frame(crate::sender::SHORTEST, flow);
    let mut part = |kind: u16, bytes: &[u8]| match mask {
        Some(()) => w.bytes(kind, &vec![0xff; bytes.len()]),
        None => w.bytes(kind, bytes),
    };
    let mut ipv4 = [0; 12];
    ipv4[..8].copy_from_slice(&frame[26..34]);
    ipv4[8..].copy_from_slice(&[17, 0, 64, 0]);
    part(3, &1_u32.to_ne_bytes())?; // IN_PORT
    // ETHERNET: the source first, other than in the frame.
    part(4, &[&frame[6..12], &frame[..6]].concat())?;
    part(6, &[8, 0])?; // ETHERTYPE
    part(7, &ipv4)?; // IPV4
    part(10, &frame[34..38]) // UDP
}
