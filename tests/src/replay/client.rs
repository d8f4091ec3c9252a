//! A netlink socket of the daemon, as the interposer makes one of a program's socket.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use transport::{Control, ControlOp, Hello, Netns, Status, Welcome};

/// The longest that anything may take.
const LIMIT: Duration = Duration::from_secs(10);
/// The longest datagram.
const LONGEST: usize = 1 << 18;
/// Length of `struct nlmsghdr`.
const HEADER: usize = transport::NLMSGHDR_LEN;

/// One connection: one netlink socket.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    port_id: u32,
    cookie: u32,
    buffer: Vec<u8>,
    /// Messages received and not yet taken.
    waiting: VecDeque<Vec<u8>>,
}

/// The network namespace of the calling thread, as a hello names it.
///
/// # Errors
/// No /proc.
pub fn netns() -> Result<Netns> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata("/proc/thread-self/ns/net")?;
    Ok(Netns {
        dev: metadata.dev(),
        ino: metadata.ino(),
    })
}

impl Client {
    /// Connects to the daemon of the run directory `dir`, from the namespace `netns`.
    ///
    /// # Errors
    /// Nobody listens, or it refuses.
    pub fn connect(dir: &Path, netns: Netns) -> Result<Self> {
        Self::speaking(transport::NETLINK_GENERIC, dir, netns)
    }

    /// The same for another protocol of netlink: `NETLINK_ROUTE` and so on.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn speaking(protocol: u32, dir: &Path, netns: Netns) -> Result<Self> {
        let kind = SocketType::SEQPACKET;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        let address = SocketAddrUnix::new(dir.join(transport::SOCKET_NAME))?;
        rustix::net::connect(&socket, &address).context("connecting to the daemon")?;
        let hello = Hello {
            version: transport::VERSION,
            protocol,
            netns,
        };
        rustix::net::send(&socket, &hello.to_bytes(), SendFlags::NOSIGNAL)?;
        let mut client = Self {
            socket,
            port_id: 0,
            cookie: 0,
            buffer: vec![0; LONGEST],
            waiting: VecDeque::new(),
        };
        let bytes = client.datagram(LIMIT)?.context("no welcome")?;
        let welcome = Welcome::parse(&bytes).context("not a welcome")?;
        if welcome.status != Status::Ok {
            bail!("refused: {:?}", welcome.status);
        }
        client.port_id = welcome.port_id;
        Ok(client)
    }

    /// Its address, as `nlmsg_pid` shows it.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Sets an option of `SOL_NETLINK`.
    ///
    /// # Errors
    /// Those of send(2).
    pub fn control(&mut self, op: ControlOp, value: u32) -> Result<()> {
        self.send(&Control { op, value }.to_bytes())
    }

    /// Joins every multicast group.
    ///
    /// # Errors
    /// Those of send(2).
    pub fn join_all(&mut self) -> Result<()> {
        for group in 0..transport::FAMILIES.len() as u32 {
            self.join(group)?;
        }
        self.settle()
    }

    /// Joins the group of the family at `index` of [`transport::FAMILIES`].
    ///
    /// # Errors
    /// Those of send(2).
    pub fn join(&mut self, index: u32) -> Result<()> {
        self.control(ControlOp::AddMembership, transport::GROUP_BASE + index)
    }

    /// Leaves it.
    ///
    /// # Errors
    /// Those of send(2).
    pub fn leave(&mut self, index: u32) -> Result<()> {
        self.control(ControlOp::DropMembership, transport::GROUP_BASE + index)
    }

    /// Sends a request and gives every message that came until it was answered.
    ///
    /// # Errors
    /// Those of the socket; no answer in time.
    pub fn converse(&mut self, request: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.cookie += 1;
        let mut datagram = request.to_vec();
        datagram.resize(datagram.len().next_multiple_of(4), 0);
        datagram.extend_from_slice(&transport::barrier(self.cookie));
        self.send(&datagram)?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let datagram = self.datagram(left)?.context("no answer in time")?;
            match transport::ack_cookie(&datagram) {
                Some(cookie) if cookie == self.cookie => break,
                Some(_) => {}
                None => self.take(&datagram),
            }
        }
        Ok(self.waiting.drain(..).collect())
    }

    /// Waits until the daemon has seen all that was sent, and keeps what comes meanwhile.
    ///
    /// # Errors
    /// Those of the socket; no answer in time.
    pub fn settle(&mut self) -> Result<()> {
        let came = self.converse(&[])?;
        self.waiting.extend(came);
        Ok(())
    }

    /// The messages that have come or come until there are `wanted` or `limit` has passed.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn gather(&mut self, wanted: usize, limit: Duration) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + limit;
        loop {
            let enough = self.waiting.len() >= wanted;
            let left = match enough {
                true => Duration::ZERO,
                false => deadline.saturating_duration_since(Instant::now()),
            };
            match self.datagram(left)? {
                Some(datagram) => self.take(&datagram),
                None if enough || left.is_zero() => break,
                None => {}
            }
        }
        Ok(self.waiting.drain(..).collect())
    }

    /// Splits a datagram into messages.
    fn take(&mut self, datagram: &[u8]) {
        let mut rest = datagram;
        while let Some(header) = transport::Header::parse(rest) {
            let len = (header.len as usize).clamp(HEADER, rest.len());
            let (message, _) = rest.split_at(len);
            self.waiting.push_back(message.to_vec());
            rest = rest
                .get(len.next_multiple_of(4).min(rest.len())..)
                .unwrap_or_default();
        }
    }

    fn send(&self, datagram: &[u8]) -> Result<()> {
        let sent = rustix::net::send(&self.socket, datagram, SendFlags::NOSIGNAL)?;
        anyhow::ensure!(sent == datagram.len(), "{sent} of {} sent", datagram.len());
        Ok(())
    }

    /// None: nothing came in time.
    fn datagram(&mut self, limit: Duration) -> Result<Option<Vec<u8>>> {
        let time = Timespec::try_from(limit).context("time")?;
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut polled, Some(&time)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let (_, len) = rustix::net::recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT)?;
        if len == 0 {
            bail!("the daemon closed the connection");
        }
        Ok(self.buffer.get(..len).map(<[u8]>::to_vec))
    }
}
