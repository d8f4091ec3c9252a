//! The barest forwarders that there can be: two sockets, no look at a frame. What a datapath in
//! user space can reach on such ports at best.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ::tests::Namespace;
use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::gettid;

use crate::wire::{BATCH, FrameRing, Ring, Wire, Wish};
use crate::xsk::XskPair;

/// Which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TPACKET_V3 receive rings and sendmmsg past the queueing discipline; no offloads, and a lone
    /// frame waits until its block is full or a millisecond old.
    Ring,
    /// recvmmsg and sendmmsg with virtio-net headers: GSO packets and partial checksums go as they came.
    VirtioNet,
    /// TPACKET_V2 receive rings with virtio-net headers, longer frames by the socket's queue, and sendmmsg
    /// out of the ring: all that the others can, one system call less a batch, one copy less a frame.
    FrameRing,
    /// AF_XDP sockets in copy mode, in the driver, that share memory: no offloads.
    Xdp,
}

/// A thread that forwards both ways between two devices.
#[derive(Debug)]
pub struct Floor {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
    id: i32,
}

impl Floor {
    /// Starts one between two devices of `host`.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn start(host: &Namespace, kind: Kind, [a, b]: [&str; 2]) -> Result<Self> {
        let forwarder = host.inside(|| {
            Ok::<_, io::Error>(match kind {
                Kind::Xdp => Forwarder::Xdp(Box::new(XskPair::open([a, b])?)),
                _ => Forwarder::Ways(Box::new([Way::open(kind, a, b)?, Way::open(kind, b, a)?])),
            })
        })?;
        let mut forwarder = forwarder.context("the floor's sockets")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, told) = std::sync::mpsc::channel();
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                // If nobody asks any more, nobody needs it.
                let _ = tell.send(gettid().as_raw_nonzero().get());
                while !stop.load(Ordering::Relaxed) {
                    forward(&mut forwarder)?;
                }
                Ok(())
            })
        };
        let id = told.recv().context("the floor's thread")?;
        Ok(Self {
            stop,
            thread: Some(thread),
            id,
        })
    }

    /// Its thread's id.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Ends it.
    ///
    /// # Errors
    /// Those that it met.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the floor panicked"))?,
            None => Ok(()),
        }
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

enum Forwarder {
    Ways(Box<[Way; 2]>),
    Xdp(Box<XskPair>),
}

/// One direction.
struct Way {
    from: Source,
    to: Wire,
}

enum Source {
    Ring(Ring),
    FrameRing(FrameRing),
    Plain {
        wire: Wire,
        buffers: Vec<Vec<u8>>,
        lengths: Vec<usize>,
    },
}

impl Way {
    fn open(kind: Kind, from: &str, to: &str) -> io::Result<Self> {
        let (from, vnet) = match kind {
            Kind::Xdp => return Err(io::ErrorKind::Unsupported.into()),
            Kind::Ring => (Source::Ring(Ring::open(from)?), false),
            Kind::FrameRing => (Source::FrameRing(FrameRing::open(from)?), true),
            Kind::VirtioNet => {
                let wish = Wish {
                    receives: true,
                    vnet: true,
                    ..Wish::default()
                };
                let source = Source::Plain {
                    wire: Wire::open(from, wish)?,
                    buffers: vec![vec![0; 70_000]; BATCH],
                    lengths: vec![0; BATCH],
                };
                (source, true)
            }
        };
        let wish = Wish {
            vnet,
            qdisc_bypass: true,
            ..Wish::default()
        };
        Ok(Self {
            from,
            to: Wire::open(to, wish)?,
        })
    }

    /// That its ring still receives.
    fn check(&mut self) -> Result<()> {
        if let Source::FrameRing(ring) = &mut self.from
            && ring.is_lost().context("the floor's ring")?
        {
            bail!("the floor's ring is lost to a packet that has no virtio-net header");
        }
        Ok(())
    }

    /// Forwards what there is, a batch or block of it. False: there was nothing.
    fn forward(&mut self) -> io::Result<bool> {
        match &mut self.from {
            Source::Ring(ring) => Ok(ring.block(|frames| send(&self.to, frames))),
            Source::FrameRing(ring) => Ok(ring.batch(|frames| send(&self.to, frames))),
            Source::Plain {
                wire,
                buffers,
                lengths,
            } => {
                let count = match wire.receive(buffers, lengths) {
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    Err(error) => return Err(error),
                };
                let mut frames: [&[u8]; BATCH] = [&[]; BATCH];
                for (frame, (buffer, length)) in frames.iter_mut().zip(buffers.iter().zip(lengths))
                {
                    *frame = &buffer[..*length];
                }
                send(&self.to, &frames[..count]);
                Ok(true)
            }
        }
    }
}

impl AsFd for Way {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match &self.from {
            Source::Ring(ring) => ring.as_fd(),
            Source::FrameRing(ring) => ring.as_fd(),
            Source::Plain { wire, .. } => wire.as_fd(),
        }
    }
}

/// Sends all of them; one that is refused is lost.
fn send(to: &Wire, mut frames: &[&[u8]]) {
    while !frames.is_empty() {
        let taken = to.send(frames).unwrap_or(1).max(1);
        frames = frames.get(taken..).unwrap_or_default();
    }
}

fn forward(forwarder: &mut Forwarder) -> Result<()> {
    let idle = match forwarder {
        Forwarder::Xdp(pair) => !pair.forward(),
        Forwarder::Ways(ways) => {
            let mut idle = true;
            for way in ways.iter_mut() {
                idle &= !way.forward().context("the floor")?;
            }
            idle
        }
    };
    if idle {
        let fds = match forwarder {
            Forwarder::Xdp(pair) => pair.fds(),
            Forwarder::Ways(ways) => ways.each_ref().map(AsFd::as_fd),
        };
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        match poll(&mut fds, Some(&limit)) {
            // Quiet for 50 ms: is it that nothing comes, or that nothing can?
            Ok(0) => {
                if let Forwarder::Ways(ways) = forwarder {
                    for way in ways.iter_mut() {
                        way.check()?;
                    }
                }
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
    Ok(())
}
