//! A server that tells each client as whom it sees it, over UDP and TCP: what became of a source on its
//! way, and whether a connection passes at all.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::namespace::Namespace;

/// How long a thread sleeps before it looks whether it is to end.
const TURN: Duration = Duration::from_millis(100);

/// A running server. It ends when dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Serves `address` in a namespace.
    ///
    /// # Errors
    /// The address can't be bound.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let udp = super::bind(namespace, "whoami", || UdpSocket::bind(address))?;
        let tcp = super::bind(namespace, "whoami", || TcpListener::bind(address))?;
        udp.set_read_timeout(Some(TURN))?;
        tcp.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (ends, also) = (Arc::clone(&stop), Arc::clone(&stop));
        let threads = vec![
            std::thread::spawn(move || {
                let mut datagram = vec![0; 1 << 16];
                while !ends.load(Ordering::Relaxed) {
                    if let Ok((_, peer)) = udp.recv_from(&mut datagram) {
                        // Who doesn't hear it says so.
                        let _ = udp.send_to(peer.to_string().as_bytes(), peer);
                    }
                }
            }),
            std::thread::spawn(move || {
                // Clients decide how long a connection lasts.
                let mut open = Vec::new();
                while !also.load(Ordering::Relaxed) {
                    match tcp.accept() {
                        Ok((mut stream, peer)) => {
                            let _ = stream.write_all(format!("{peer}\n").as_bytes());
                            open.push(stream);
                        }
                        Err(_) => std::thread::sleep(TURN / 20),
                    }
                }
            }),
        ];
        Ok(Self { stop, threads })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It ends in any case.
            let _ = thread.join();
        }
    }
}

/// Asks over UDP from `source` (port 0: any): as whom the server sees that socket, which is given too, so
/// that its port stays its own. None: no answer within `limit`.
///
/// # Errors
/// The source can't be bound, or an ICMP error came.
pub fn udp(
    from: &Namespace,
    source: SocketAddr,
    server: SocketAddr,
    limit: Duration,
) -> Result<(UdpSocket, Option<SocketAddr>)> {
    let socket = super::bind(from, "a client", || UdpSocket::bind(source))?;
    socket.connect(server)?;
    let answer = again(&socket, limit)?;
    Ok((socket, answer))
}

/// Asks once more over a socket that [`udp`] gave.
///
/// # Errors
/// An ICMP error came.
pub fn again(socket: &UdpSocket, limit: Duration) -> Result<Option<SocketAddr>> {
    socket.set_read_timeout(Some(limit))?;
    socket.send(b"who am I?")?;
    let mut text = [0; 80];
    match socket.recv(&mut text) {
        Ok(length) => parse(&text[..length]).map(Some),
        Err(error) if silent(&error) => Ok(None),
        Err(error) => Err(error).context("asking over UDP"),
    }
}

/// The same over TCP, over a source port that may be in use by another connection of ours.
///
/// # Errors
/// The source can't be bound, the connection is refused or reset.
pub fn tcp(
    from: &Namespace,
    source: SocketAddr,
    server: SocketAddr,
    limit: Duration,
) -> Result<Option<(TcpStream, SocketAddr)>> {
    let connected = from.inside(|| connect(source, server, limit))?;
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) if silent(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("{source} to {server}")),
    };
    stream.set_read_timeout(Some(limit))?;
    let (mut text, mut byte) = (Vec::new(), [0]);
    while byte != *b"\n" {
        match stream.read(&mut byte) {
            Ok(1) => text.push(byte[0]),
            Ok(_) => break,
            Err(error) if silent(&error) => return Ok(None),
            Err(error) => return Err(error).context("asking over TCP"),
        }
    }
    let seen = parse(&text)?;
    Ok(Some((stream, seen)))
}

fn connect(source: SocketAddr, server: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let family = match source {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket: OwnedFd =
        rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(limit))?;
    rustix::net::bind(&socket, &source)?;
    rustix::net::connect(&socket, &server)?;
    Ok(TcpStream::from(socket))
}

fn silent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
        || error.raw_os_error() == Some(libc::EINPROGRESS)
}

fn parse(text: &[u8]) -> Result<SocketAddr> {
    let text = String::from_utf8_lossy(text);
    text.trim()
        .parse()
        .with_context(|| format!("not an address: {text}"))
}
