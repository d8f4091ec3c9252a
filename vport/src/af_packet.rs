//! The AF_PACKET driver: packet sockets with virtio-net headers on a device that is there already.
//!
//! Packets that stand for several and unfinished checksums are carried whole, both ways; the
//! kernel finishes them only where a device can't. Frames go out by the device's queueing
//! discipline (tc and tcpdump see them), unless asked otherwise.
//!
//! # What is lost, and where it is counted
//! - Nothing reads in time: `tp_drops` ([`HostCounters::queue_full`]).
//! - A kind of GSO that a virtio-net header can't say: [`RxErrors::unsayable`].
//! - The socket's send buffer or the queueing discipline is full: [`TxRefusal::Full`].
//! - A tag makes a full frame longer than the socket takes (802.1ad, or two tags): it is sent by
//!   a transmit ring ([`oversize`]), whose socket checks no length; what that can't take
//!   is [`TxRefusal::TooLong`].
//!
//! # Priority and mark
//! A packet socket takes both per frame, as control messages of sendmsg(2) at SOL_SOCKET, also in a
//! user namespace: SO_MARK, and from Linux 6.14 on SO_PRIORITY (tried on 6.18: a netdev egress chain
//! matched both; an older kernel answers `EINVAL`, and has SO_PRIORITY per socket only). Where they are
//! refused, frames go without, and [`Port::mode`] says so.

mod oversize;
mod queue;
mod ring;

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use frame::{Frame, Pool};
use rustix::io::Errno;
use rustix::net::sockopt;

use crate::error::Error;
use crate::hide::Hide;
use crate::link::{self, Link, Which};
use crate::offload::OffloadOff;
use crate::open::AttachOptions;
use crate::port::{
    Capabilities, Driver, HostCounters, Offered, Outlet, Port, Room, RxErrors, RxQueue, TxOutcome,
    TxRefusal,
};
use crate::sys::ethtool::Offload;
use crate::sys::mmsg;
use crate::sys::packet_socket::PacketSocket;

/// Bytes that may wait to be received (the kernel doubles it for its own overhead): some hundred
/// packets of 64 KiB, or ten thousand small ones.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Bytes on their way out (doubled likewise): some packets of 64 KiB. More wait in the port's ring.
const SEND_BUFFER: usize = 1 << 19;
/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// The longest packet that stands for several, and its Ethernet header.
const MAX_GSO_FRAME: u32 = 65_535 + ETHERNET;

/// Who the port is, where that isn't simply the device that is captured.
pub(crate) struct Face {
    pub(crate) driver: Driver,
    /// The device that the port stands for.
    pub(crate) link: Link,
    /// Dropped when everything else is closed.
    pub(crate) guard: Option<Box<dyn Any + Send + Sync>>,
    /// Reason for this driver, for `status`.
    pub(crate) note: Option<String>,
}

/// What port and queues share; closed when the last of them goes. Fields are dropped in this order:
/// capture ends first, then the host's stack sees the device again.
pub(crate) struct Shared {
    /// One for each socket of `receive`, which lives as long as its ring is mapped.
    rings: Vec<ring::ReceiveRing>,
    receive: Vec<PacketSocket>,
    send: PacketSocket,
    tagged: oversize::TaggedSender,
    hide: Hide,
    lro: OffloadOff,
    captured: Link,
    driver: Driver,
    face: Link,
    note: Option<String>,
    qdisc_bypass: bool,
    /// The receive buffer is as large as it should be.
    ample: bool,
    uso: bool,
    mtu: AtomicU32,
    opened: AtomicBool,
    /// Priority and mark of frames are told to the kernel.
    classed: AtomicBool,
    queue_full: AtomicU64,
    unsayable: AtomicU64,
    truncated: AtomicU64,
    malformed: AtomicU64,
    runt: AtomicU64,
    _guard: Option<Box<dyn Any + Send + Sync>>,
}

impl Shared {
    fn count(&self, errors: &RxErrors) {
        if errors.total() > 0 {
            self.unsayable.fetch_add(errors.unsayable, Relaxed);
            self.truncated.fetch_add(errors.truncated, Relaxed);
            self.malformed.fetch_add(errors.malformed, Relaxed);
            self.runt.fetch_add(errors.runt, Relaxed);
        }
    }
}

/// A port on an existing device.
pub struct AfPacket {
    shared: Arc<Shared>,
}

/// Gives whether the buffer is as large as it should be.
fn set_receive_buffer(socket: &PacketSocket) -> Result<bool, Errno> {
    // Beyond the system's limit only with CAP_NET_ADMIN in the initial user namespace.
    if sockopt::set_socket_recv_buffer_size_force(socket.as_fd(), RECEIVE_BUFFER).is_err() {
        sockopt::set_socket_recv_buffer_size(socket.as_fd(), RECEIVE_BUFFER)?;
    }
    Ok(sockopt::socket_recv_buffer_size(socket.as_fd())? >= 2 * RECEIVE_BUFFER)
}

fn set_send_buffer(socket: &PacketSocket) -> Result<(), Errno> {
    if sockopt::set_socket_send_buffer_size_force(socket.as_fd(), SEND_BUFFER).is_err() {
        sockopt::set_socket_send_buffer_size(socket.as_fd(), SEND_BUFFER)?;
    }
    Ok(())
}

/// Whether the kernel takes UDP to be cut into datagrams in a virtio-net header (Linux 6.2).
fn kernel_knows_uso() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (6, 2)
}

impl AfPacket {
    /// Captures `captured`. `face`: the port stands for another device than that.
    pub(crate) fn open(
        captured: Link,
        options: &AttachOptions,
        face: Option<Face>,
    ) -> Result<Self, Error> {
        let name = captured.name.clone();
        let what = |step: &str| format!("{step} for {name}");
        let fail = |step: &'static str| {
            let what = what(step);
            move |errno| Error::os(errno, what)
        };
        // Bound to no protocol yet: nothing is received before the host's stack is shut out.
        let mut ample = true;
        let receive = (0..options.queues.max(1))
            .map(|_| {
                let socket = PacketSocket::new()?;
                socket.set_vnet_header()?;
                socket.set_auxdata()?;
                socket.set_ignore_outgoing()?;
                ample &= set_receive_buffer(&socket)?;
                Ok(socket)
            })
            .collect::<Result<Vec<_>, Errno>>()
            .map_err(fail("packet socket"))?;
        let rings = receive
            .iter()
            .map(|socket| ring::ReceiveRing::new(socket, &captured, options.ring))
            .collect();
        let sender = || Self::sender(captured.index, options.qdisc_bypass);
        let send = sender().map_err(fail("packet socket"))?;
        let tagged = sender()
            .and_then(oversize::TaggedSender::new)
            .map_err(fail("packet socket"))?;
        let lro =
            OffloadOff::new(&captured, Offload::Lro).map_err(fail("large receive offload"))?;
        let hide = Hide::new(options.hide, captured.index, &name, &options.run_prefix);
        let (driver, face, guard, mut note) = match face {
            Some(face) => (face.driver, face.link, face.guard, face.note),
            None => (Driver::AfPacket, captured.clone(), None, None),
        };
        let mut shared = Shared {
            rings,
            receive,
            send,
            tagged,
            hide,
            lro,
            driver,
            mtu: AtomicU32::new(face.mtu),
            face,
            note: None,
            qdisc_bypass: options.qdisc_bypass,
            ample,
            uso: kernel_knows_uso(),
            opened: AtomicBool::new(false),
            classed: AtomicBool::new(true),
            queue_full: AtomicU64::new(0),
            unsayable: AtomicU64::new(0),
            truncated: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            runt: AtomicU64::new(0),
            captured,
            _guard: guard,
        };
        if let Some(first) = shared.receive.first() {
            first
                .add_promiscuous(shared.captured.index)
                .map_err(fail("promiscuous mode"))?;
        }
        for socket in &shared.receive {
            socket
                .bind(shared.captured.index, true)
                .map_err(fail("bind"))?;
        }
        if shared.receive.len() > 1
            && let Err(errno) = Self::spread(&shared.receive)
        {
            // Before Linux 6.7 sockets of a device that is down can't form a group.
            shared.rings.truncate(1);
            shared.receive.truncate(1);
            note = Some(format!("one queue (fanout: {errno})"));
        }
        shared.note = note;
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// A socket that only sends.
    fn sender(ifindex: u32, qdisc_bypass: bool) -> Result<PacketSocket, Errno> {
        let socket = PacketSocket::new()?;
        socket.set_vnet_header()?;
        set_send_buffer(&socket)?;
        if qdisc_bypass {
            socket.set_qdisc_bypass()?;
        }
        socket.bind(ifindex, false)?;
        Ok(socket)
    }

    /// Sends a frame without its priority and mark; tells whether the kernel took it so.
    fn sends_unclassed(&self, frame: &Frame) -> bool {
        let one = std::slice::from_ref(frame);
        matches!(mmsg::send(self.shared.send.as_fd(), one, false), Ok(1))
    }

    fn spread(sockets: &[PacketSocket]) -> Result<(), Errno> {
        let mut sockets = sockets.iter();
        let Some(first) = sockets.next() else {
            return Ok(());
        };
        let group = first.start_fanout()?;
        sockets.try_for_each(|socket| socket.join_fanout(group))
    }
}

impl Port for AfPacket {
    fn driver(&self) -> Driver {
        self.shared.driver
    }

    fn mode(&self) -> String {
        let shared = &self.shared;
        let mut mode = format!("{}, vnet_hdr, {}", shared.driver, shared.hide.describe());
        if shared.driver == Driver::Veth {
            mode.push_str(&format!(", behind {}", shared.captured.name));
        }
        if shared.receive.len() > 1 {
            mode.push_str(&format!(", {} queues", shared.receive.len()));
        }
        if shared.qdisc_bypass {
            mode.push_str(", past the qdisc (no tc, no tcpdump)");
        }
        if let Some(ring) = shared.rings.first() {
            mode.push_str(", ");
            mode.push_str(&ring.describe());
        }
        if !shared.ample {
            mode.push_str(", receive buffer limited by net.core.rmem_max");
        }
        if shared.lro.switched() {
            mode.push_str(", LRO switched off");
        }
        if !shared.classed.load(Relaxed) {
            mode.push_str(", priority and mark not carried");
        }
        if let Some(note) = &shared.note {
            mode.push_str(", ");
            mode.push_str(note);
        }
        mode
    }

    fn ifindex(&self) -> u32 {
        self.shared.face.index
    }

    fn name(&self) -> &str {
        &self.shared.face.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            csum: true,
            tso4: true,
            tso6: true,
            uso: self.shared.uso,
            ufo: false,
            vlan: true,
            max_frame: self.shared.mtu.load(Relaxed).saturating_add(ETHERNET),
            max_gso_frame: MAX_GSO_FRAME,
        }
    }

    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        if self.shared.opened.swap(true, Relaxed) {
            return Err(Error::new(
                libc::EBUSY,
                format!("queues of {}", self.name()),
            ));
        }
        Ok((0..self.shared.receive.len())
            .map(|n| Box::new(queue::Queue::new(Arc::clone(&self.shared), n)) as Box<dyn RxQueue>)
            .collect())
    }

    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        let offered = self.offer(frames, false, outcome);
        let left = frames.len().saturating_sub(offered.done);
        outcome.refuse(TxRefusal::Full, left as u64);
        frames.drain(..).for_each(|frame| pool.put(frame));
    }

    fn outlet(&self) -> Option<&dyn Outlet> {
        Some(self)
    }

    fn look_after(&self) {
        let shared = &self.shared;
        for (socket, ring) in shared.receive.iter().zip(&shared.rings) {
            // Fails only for a descriptor that isn't a packet socket.
            let Ok(drops) = socket.take_drops() else {
                continue;
            };
            shared.queue_full.fetch_add(u64::from(drops), Relaxed);
            match ring.check(socket, drops) {
                Ok(false) => {}
                Ok(true) => tracing::warn!("{}: {}", self.name(), ring.describe()),
                Err(errno) => tracing::error!("{}: receives no more: {errno}", self.name()),
            }
        }
    }

    fn host_counters(&self) -> HostCounters {
        self.look_after();
        let shared = &self.shared;
        HostCounters {
            queue_full: shared.queue_full.load(Relaxed),
            rx_errors: RxErrors {
                unsayable: shared.unsayable.load(Relaxed),
                truncated: shared.truncated.load(Relaxed),
                malformed: shared.malformed.load(Relaxed),
                runt: shared.runt.load(Relaxed),
                ..RxErrors::default()
            },
        }
    }

    fn link_changed(&self, link: &Link) {
        if link.index == self.shared.face.index {
            self.shared.mtu.store(link.mtu, Relaxed);
        }
    }

    fn link(&self) -> Result<Link, Error> {
        let shared = &self.shared;
        let link = if shared.driver == Driver::Veth {
            // The hidden end knows where the other is.
            let hidden = link::by_index(shared.captured.index)?;
            let index = hidden
                .link
                .ok_or_else(|| Error::new(libc::ENODEV, self.name()))?;
            link::find(Which::Index(index), hidden.link_netnsid)?
        } else {
            link::by_index(shared.face.index)?
        };
        shared.mtu.store(link.mtu, Relaxed);
        Ok(link)
    }

    fn netnsid(&self) -> Option<i32> {
        if self.shared.driver != Driver::Veth {
            return None;
        }
        link::by_index(self.shared.captured.index)
            .ok()?
            .link_netnsid
    }
}

impl Outlet for AfPacket {
    fn offer(&self, frames: &[Frame], patient: bool, outcome: &mut TxOutcome) -> Offered {
        let shared = &self.shared;
        let mut rest: &[Frame] = frames;
        while let [first, others @ ..] = rest {
            let all = rest.len() as u64;
            let classed = shared.classed.load(Relaxed);
            match mmsg::send(shared.send.as_fd(), rest, classed) {
                Ok(0) => {
                    outcome.refuse(TxRefusal::Error, all);
                    break;
                }
                Ok(sent) => {
                    let (sent, unsent) = rest.split_at_checked(sent).unwrap_or((rest, &[]));
                    sent.iter().for_each(|frame| outcome.sent(frame.wire_len()));
                    rest = unsent;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    return Offered {
                        done: frames.len() - rest.len(),
                        room: Room::Awaited,
                    };
                }
                // A queue in the kernel dropped it: the frame is still ours.
                Err(Errno::NOBUFS) if patient => {
                    return Offered {
                        done: frames.len() - rest.len(),
                        room: Room::Later,
                    };
                }
                Err(Errno::NETDOWN) => {
                    outcome.refuse(TxRefusal::Down, all);
                    break;
                }
                Err(Errno::NXIO | Errno::NODEV) => {
                    outcome.refuse(TxRefusal::Gone, all);
                    break;
                }
                Err(Errno::INVAL | Errno::PERM)
                    if classed && !first.class.is_plain() && self.sends_unclassed(first) =>
                {
                    // A priority for a single frame is known since Linux 6.14, and not allowed to all:
                    // better sent without than not sent. (A frame that isn't taken without either is
                    // malformed, which says nothing about the others.)
                    if shared.classed.swap(false, Relaxed) {
                        tracing::warn!("{}: priority and mark can't be carried here", self.name());
                    }
                    outcome.sent(first.wire_len());
                    rest = others;
                }
                Err(errno) => {
                    // About this frame only.
                    let max_frame = self.capabilities().max_frame as usize;
                    let refusal = match errno {
                        Errno::NOBUFS => Err(TxRefusal::Full),
                        Errno::MSGSIZE if first.len() <= max_frame => shared.tagged.send(first),
                        Errno::MSGSIZE => Err(TxRefusal::TooLong),
                        _ => Err(TxRefusal::Error),
                    };
                    match refusal {
                        Ok(()) => outcome.sent(first.wire_len()),
                        Err(why) => outcome.refuse(why, 1),
                    }
                    rest = others;
                }
            }
        }
        Offered {
            done: frames.len(),
            room: Room::Left,
        }
    }

    fn writable(&self) -> BorrowedFd<'_> {
        self.shared.send.as_fd()
    }
}
