//! TCP: how a stream meets its peer, and what passes between them. Nothing here blocks.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use frame::{Frame, Pool};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, ipproto,
    sockopt,
};

use super::Endpoint;
use super::framing::Reader;
use crate::error::Error;
use crate::ring::deferred::{FLUSH_BYTES, FLUSH_MESSAGES};
use crate::ring::{Sent, Sink};
use crate::sys::tcp;

/// Bytes that may wait in the socket before they are sent once: enough for a long fast path between two of
/// our turns; the rest waits in the ring, whose length is chosen.
const NOTSENT: u32 = 128 * 1024;
/// A peer that says nothing for that long is asked whether it lives ...
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// ... this often ...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// ... and given up after so many questions.
const KEEPALIVE_COUNT: u32 = 3;

/// Where the peer is met.
pub(super) enum Meeting {
    Listener(TcpListener),
    Address(SocketAddr),
}

impl Meeting {
    pub(super) fn new(endpoint: Endpoint) -> Result<Self, Error> {
        match endpoint {
            Endpoint::Connect(address) => Ok(Self::Address(address)),
            Endpoint::Listen(address) => TcpListener::bind(address)
                .and_then(|listener| {
                    listener.set_nonblocking(true)?;
                    Ok(Self::Listener(listener))
                })
                .map_err(|error| Error::io(&error, format!("listen on {address}"))),
        }
    }
}

/// Who has connected, if somebody has.
pub(super) fn accept(listener: &TcpListener) -> std::io::Result<Option<(TcpStream, SocketAddr)>> {
    match listener.accept() {
        Ok(met) => Ok(Some(met)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        // The peer had gone by then.
        Err(error) if error.kind() == ErrorKind::ConnectionAborted => Ok(None),
        Err(error) => Err(error),
    }
}

/// Begins to connect: writable when it is done, one way or the other ([`finish`]).
pub(super) fn connect(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

/// How connecting ended.
pub(super) fn finish(socket: OwnedFd) -> Result<TcpStream, Errno> {
    sockopt::socket_error(&socket)??;
    Ok(TcpStream::from(socket))
}

/// A peer.
pub(super) struct Connection {
    socket: TcpStream,
    pub(super) reader: Reader,
    /// It takes nothing for now: its writability is awaited.
    pub(super) blocked: bool,
}

/// How a look at what the peer sent ended.
pub(super) enum Read {
    /// There is something.
    Bytes,
    /// Nothing for now.
    Blocked,
    /// The peer has closed, or the connection is broken.
    Ended(String),
}

impl Connection {
    pub(super) fn new(socket: TcpStream) -> Result<Self, Errno> {
        socket
            .set_nonblocking(true)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        // A batch goes in one call; what it leaves over needn't wait for the last one's answer.
        sockopt::set_tcp_nodelay(&socket, true)?;
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_COUNT)?;
        tcp::set_notsent_lowat(socket.as_fd(), NOTSENT)?;
        Ok(Self {
            socket,
            reader: Reader::new(),
            blocked: false,
        })
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Receives what fits.
    pub(super) fn read(&mut self) -> Read {
        let space = self.reader.space();
        match rustix::net::recv(&self.socket, space, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Read::Ended(String::from("the peer closed the connection")),
            Ok((_, bytes)) => {
                self.reader.received(bytes);
                Read::Bytes
            }
            Err(Errno::AGAIN | Errno::INTR) => Read::Blocked,
            Err(errno) => Read::Ended(errno.to_string()),
        }
    }
}

/// Where a flush goes.
pub(super) struct ToPeer<'a> {
    pub(super) socket: &'a TcpStream,
    pub(super) pool: &'a mut Pool,
    /// Why the connection is broken.
    pub(super) error: Option<Errno>,
}

impl Sink<Frame> for ToPeer<'_> {
    fn size(&self, message: &Frame) -> usize {
        message.len()
    }

    fn send(&mut self, messages: &VecDeque<Frame>, offset: usize) -> Sent {
        let mut parts = Vec::with_capacity(messages.len().min(FLUSH_MESSAGES));
        let (mut skip, mut bytes) = (offset, 0);
        for message in messages.iter().take(FLUSH_MESSAGES) {
            let part = message.bytes().get(skip..).unwrap_or_default();
            skip = 0;
            bytes += part.len();
            parts.push(IoSlice::new(part));
            if bytes >= FLUSH_BYTES {
                break;
            }
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let mut control = SendAncillaryBuffer::default();
            match rustix::net::sendmsg(self.socket, &parts, &mut control, flags) {
                Ok(bytes) => return Sent::Bytes(bytes),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return Sent::Blocked,
                Err(errno) => {
                    self.error = Some(errno);
                    return Sent::Broken;
                }
            }
        }
    }

    fn recycle(&mut self, message: Frame) {
        self.pool.put(message);
    }
}
