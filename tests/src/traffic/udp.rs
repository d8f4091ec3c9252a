//! UDP: a paced stream whose losses are counted, and a collector of datagrams.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::namespace::Namespace;

/// A stream of numbered datagrams at a steady pace, until it is stopped.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// What a stream counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams sent.
    pub sent: u64,
    /// Different datagrams received.
    pub received: u64,
}

impl Counts {
    /// Datagrams sent and not received.
    pub fn lost(self) -> u64 {
        self.sent - self.received
    }
}

impl Stream {
    /// Starts sending from `from` to `address` in `to`, `per_second` datagrams a second.
    ///
    /// # Errors
    /// The sockets can't be made.
    pub fn start(
        from: &Namespace,
        to: &Namespace,
        address: SocketAddr,
        per_second: u32,
    ) -> Result<Self> {
        let receiver = super::bind(to, "receiver", || UdpSocket::bind(address))?;
        let any: SocketAddr = if address.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0_u16; 8], 0).into()
        };
        let sender = from.inside(|| UdpSocket::bind(any))?.context("sender")?;
        sender.connect(address)?;
        receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let pace = Duration::from_secs(1) / per_second;
        let sending = {
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            move || -> Result<()> {
                let begin = Instant::now();
                let mut number = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    let mut datagram = [0x5a_u8; 100];
                    datagram[..8].copy_from_slice(&number.to_be_bytes());
                    sender.send(&datagram).context("sending")?;
                    number += 1;
                    sent.store(number, Ordering::Release);
                    let next = pace.saturating_mul(u32::try_from(number)?);
                    std::thread::sleep(next.saturating_sub(begin.elapsed()));
                }
                Ok(())
            }
        };
        let receiving = {
            let (stop, sent, received) =
                (Arc::clone(&stop), Arc::clone(&sent), Arc::clone(&received));
            move || -> Result<()> {
                let mut seen: Vec<u64> = Vec::new();
                let mut datagram = [0; 200];
                let mut quiet = 0;
                // After the stop: until all are there, or nothing came for a second.
                while !stop.load(Ordering::Relaxed)
                    || (quiet < 20
                        && received.load(Ordering::Relaxed) < sent.load(Ordering::Acquire))
                {
                    let Ok(length) = receiver.recv(&mut datagram) else {
                        quiet += 1;
                        continue;
                    };
                    quiet = 0;
                    let number = datagram[..length]
                        .first_chunk()
                        .map(|b| u64::from_be_bytes(*b));
                    let number = number.context("a short datagram")?;
                    let (word, bit) = ((number / 64) as usize, 1_u64 << (number % 64));
                    if word >= seen.len() {
                        seen.resize(word + 1, 0);
                    }
                    if seen[word] & bit == 0 {
                        seen[word] |= bit;
                        received.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(())
            }
        };
        let threads = vec![std::thread::spawn(sending), std::thread::spawn(receiving)];
        Ok(Self {
            stop,
            sent,
            received,
            threads,
        })
    }

    /// The counts so far; what is under way counts as not received.
    pub fn so_far(&self) -> Counts {
        let received = self.received.load(Ordering::Relaxed);
        Counts {
            sent: self.sent.load(Ordering::Acquire).max(received),
            received,
        }
    }

    /// Waits until `count` more have been received than now.
    ///
    /// # Errors
    /// Not soon.
    pub fn wait_more(&self, count: u64) -> Result<()> {
        let goal = self.so_far().received + count;
        crate::wait::soon("the stream arriving", || Ok(self.so_far().received >= goal))
    }

    /// Stops sending, waits for what is under way, and counts.
    ///
    /// # Errors
    /// Those of the sockets.
    pub fn stop(mut self) -> Result<Counts> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread
                .join()
                .map_err(|_| anyhow!("a thread of a stream panicked"))??;
        }
        Ok(self.so_far())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A UDP socket that collects datagrams, such as sFlow's or IPFIX's.
#[derive(Debug)]
pub struct Collector {
    socket: UdpSocket,
}

impl Collector {
    /// Listens on `address` in a namespace; port 0 takes a free one.
    ///
    /// # Errors
    /// The address can't be bound.
    pub fn bind(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let socket = namespace.inside(|| UdpSocket::bind(address))?;
        Ok(Self {
            socket: socket.with_context(|| format!("collector on {address}"))?,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.socket.local_addr()?)
    }

    /// The first datagram that `wanted` gives something for.
    ///
    /// # Errors
    /// None came within `limit`.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<T> {
        self.socket.set_nonblocking(true)?;
        let mut datagram = vec![0; 65536];
        crate::wait::until(what, limit, || {
            while let Ok(length) = self.socket.recv(&mut datagram) {
                if let Some(found) = wanted(&datagram[..length]) {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        })
    }
}
