//! Sending through a tunnel: frames into their headers, and those to sockets.
//!
//! A socket has one source port and one opinion of checksums and of cutting, so there is a pool for each
//! pair of these, made when first needed. A connection's frames go by one of its sockets, chosen by the
//! entropy that the datapath left in the key, in order.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::OnceLock;

use frame::segment::Segments;
use frame::tunnel::{TunnelKey, V4, V6, ecn, too_big, tunnel_flags};
use frame::{Frame, Pool, complete_checksum};
use rustix::io::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::path::{Ends, Path, ends};
use super::{Shared, TunnelConfig, TunnelKind, wire};
use crate::port::{TxOutcome, TxRefusal};
use crate::sys::inet::{self, BATCH, Envelope, Message, SEGMENTS};

/// Source ports that a pool has.
const PORTS: usize = 16;
/// Bytes on their way out.
const SEND_BUFFER: usize = 4 << 20;
/// What one message to be cut may have at most, headers aside.
const MOST_BYTES: usize = 65_000;

/// Which socket: the index of a pool and of a port in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Choice {
    v6: bool,
    dont_fragment: bool,
    checksum: bool,
    port: usize,
}

/// The sockets by which a tunnel sends.
#[derive(Default)]
pub(super) struct Senders {
    pools: [[OnceLock<Socket>; PORTS]; 8],
}

impl Senders {
    fn get(&self, choice: Choice, kind: TunnelKind) -> std::io::Result<&Socket> {
        let Choice {
            v6,
            dont_fragment,
            checksum,
            port,
        } = choice;
        let pool = usize::from(v6) << 2 | usize::from(dont_fragment) << 1 | usize::from(checksum);
        let place = self.pools.get(pool).and_then(|pool| pool.get(port));
        let place = place.ok_or(std::io::ErrorKind::InvalidInput)?;
        match place.get() {
            Some(socket) => Ok(socket),
            None => {
                let socket = open(choice, kind)?;
                Ok(place.get_or_init(|| socket))
            }
        }
    }
}

fn open(choice: Choice, kind: TunnelKind) -> std::io::Result<Socket> {
    let v6 = choice.v6;
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let (style, protocol) = match kind.is_udp() {
        true => (Type::DGRAM, Protocol::UDP),
        false => (Type::RAW, Protocol::from(i32::from(wire::GRE))),
    };
    let socket = Socket::new(domain, style, Some(protocol))?;
    let fd = socket.as_fd();
    inet::receive_nothing(fd)?;
    inet::set_dont_fragment(fd, v6, choice.dont_fragment)?;
    inet::set_buffer(fd, SEND_BUFFER, false)?;
    if v6 {
        if kind.is_udp() {
            socket.set_only_v6(true)?;
        }
        inet::set_no_flow_label(fd)?;
    }
    if kind.is_udp() {
        if !choice.checksum {
            inet::set_no_checksum(fd, v6)?;
        }
        let any = match v6 {
            false => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            true => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        socket.bind(&SockAddr::from(SocketAddr::new(any, 0)))?;
    }
    Ok(socket)
}

/// A datagram that is ready.
struct Ready {
    choice: Choice,
    envelope: Envelope,
    /// It may go with others in one message.
    together: bool,
    /// Which of the frames it is (a part) of.
    origin: usize,
}

/// What is to be sent, in order: a frame for each [`Ready`].
#[derive(Default)]
struct Bundle {
    ready: Vec<Ready>,
    frames: Vec<Frame>,
}

/// Sends `frames`, without blocking; leaves the vector empty and its frames in `pool`.
pub(super) fn transmit(
    shared: &Shared,
    frames: &mut Vec<Frame>,
    pool: &mut Pool,
    outcome: &mut TxOutcome,
) {
    let mut bundle = Bundle::default();
    // What became of each frame: its bytes, or why it wasn't sent.
    let mut fates: Vec<Result<usize, TxRefusal>> = Vec::with_capacity(frames.len());
    for (origin, frame) in frames.drain(..).enumerate() {
        let bytes = frame.wire_len();
        let fate = prepare(shared, frame, origin, pool, &mut bundle);
        fates.push(fate.map(|()| bytes));
    }
    send_all(shared, bundle, pool, &mut fates);
    for fate in fates {
        match fate {
            Ok(bytes) => outcome.sent(bytes),
            Err(why) => outcome.refuse(why, 1),
        }
    }
}

/// Fills in what a frame sent by `key` would have; false: it wouldn't be sent.
pub(super) fn complete(shared: &Shared, key: &mut TunnelKey) -> bool {
    let kind = shared.config.kind;
    let Some(choice) = choice(kind, key) else {
        return false;
    };
    let Ok(path) = shared.paths.find(ends(key, 0)) else {
        return false;
    };
    key.src = octets(path.source);
    key.tp_src = 0.into();
    if kind.is_udp() {
        let Ok(socket) = shared.senders.get(choice, kind) else {
            return false;
        };
        let own = socket.local_addr().ok().and_then(|own| own.as_socket());
        key.tp_src = own.map_or(0, |own| own.port()).into();
        key.tp_dst = destination_port(&shared.config, key).into();
    }
    true
}

/// The UDP port that is sent to: as the kernel, VXLAN's is a key's to choose.
fn destination_port(config: &TunnelConfig, key: &TunnelKey) -> u16 {
    match (config.kind, key.tp_dst.get()) {
        (TunnelKind::Vxlan, port) if port != 0 => port,
        _ => config.port,
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(address) => address.octets(),
    }
}

/// The socket for what is sent by `key`; None: this tunnel doesn't go over its IP version.
fn choice(kind: TunnelKind, key: &TunnelKey) -> Option<Choice> {
    let (v4, v6) = kind.families();
    let goes = key.family == V4 && v4 || key.family == V6 && v6;
    goes.then(|| Choice {
        v6: key.family == V6,
        dont_fragment: key.has(tunnel_flags::DONT_FRAGMENT),
        checksum: kind.is_udp() && key.has(tunnel_flags::CSUM),
        port: match kind.is_udp() {
            true => usize::from(key.tp_src.get()) % PORTS,
            false => 0,
        },
    })
}

fn prepare(
    shared: &Shared,
    mut frame: Frame,
    origin: usize,
    pool: &mut Pool,
    bundle: &mut Bundle,
) -> Result<(), TxRefusal> {
    let prepared = prepare_borrowed(shared, &mut frame, origin, pool, bundle);
    pool.put(frame);
    prepared
}

fn prepare_borrowed(
    shared: &Shared,
    frame: &mut Frame,
    origin: usize,
    pool: &mut Pool,
    bundle: &mut Bundle,
) -> Result<(), TxRefusal> {
    let key = frame.tunnel.take().ok_or(TxRefusal::Error)?;
    let config = &shared.config;
    let choice = choice(config.kind, &key).ok_or(TxRefusal::Unreachable)?;
    frame.push_tag_inband().map_err(|_| TxRefusal::TooLong)?;
    let way = ends(&key, frame.class.mark);
    let path = shared.paths.find(way).map_err(|_| TxRefusal::Unreachable)?;
    let room = (path.mtu as usize).saturating_sub(wire::overhead(config, &key));
    let longest = too_big::longest_packet(frame);
    let (longest, network) = match longest {
        0 => (frame.len(), 0),
        longest => (longest, too_big::network(frame)),
    };
    let fits = longest + network <= room;
    if !fits {
        reflect(
            shared,
            frame,
            &key,
            path,
            room.saturating_sub(network),
            pool,
        )?;
    }
    let tos = match config.kind.is_udp() {
        true => ecn::encapsulate(key.tos, ecn::of_frame(frame.bytes())),
        // As the kernel: its GRE devices leave the key's as it is.
        false => key.tos,
    };
    let envelope = Envelope {
        to: way.to,
        port: destination_port(config, &key),
        from: way.from,
        tos,
        ttl: key.ttl,
        mark: way.mark,
    };
    let mut add = |mut datagram: Frame| {
        wire::push(shared, &mut datagram, &key)?;
        bundle.ready.push(Ready {
            choice,
            envelope,
            together: choice.checksum && fits,
            origin,
        });
        bundle.frames.push(datagram);
        Ok(())
    };
    if frame.offload.gso.is_some() {
        let mut segments = Segments::new(frame).map_err(|_| TxRefusal::Error)?;
        while let Some(segment) = segments.next(pool) {
            add(segment)?;
        }
        return Ok(());
    }
    complete_checksum(frame).map_err(|_| TxRefusal::Error)?;
    add(std::mem::take(frame))
}

/// A packet that doesn't fit: its sender is told, if it may not be cut, and it ends here. Otherwise the
/// kernel cuts what goes out, unless that may not be cut either.
fn reflect(
    shared: &Shared,
    frame: &Frame,
    key: &TunnelKey,
    path: Path,
    mtu: usize,
    pool: &mut Pool,
) -> Result<(), TxRefusal> {
    let Some(answer) = too_big::answer(frame, mtu, pool) else {
        return match key.has(tunnel_flags::DONT_FRAGMENT) {
            true => Err(TxRefusal::TooLong),
            false => Ok(()),
        };
    };
    shared.reflection.push(answer, key, octets(path.source));
    Err(TxRefusal::TooLong)
}

fn send_all(
    shared: &Shared,
    bundle: Bundle,
    pool: &mut Pool,
    fates: &mut [Result<usize, TxRefusal>],
) {
    let Bundle { ready, frames } = bundle;
    let mut order: Vec<usize> = (0..ready.len()).collect();
    if !ready.is_sorted_by_key(|ready| ready.choice) {
        // Stable: what goes by one socket stays in order.
        order.sort_by_key(|at| ready.get(*at).map(|ready| ready.choice));
    }
    let mut places: Vec<Option<Frame>> = frames.into_iter().map(Some).collect();
    let frames: Vec<Frame> = order
        .iter()
        .filter_map(|at| places.get_mut(*at)?.take())
        .collect();
    let ready: Vec<&Ready> = order.iter().filter_map(|at| ready.get(*at)).collect();
    let mut start = 0;
    for group in ready.chunk_by(|a, b| a.choice == b.choice) {
        let own = frames.get(start..start + group.len()).unwrap_or_default();
        start += group.len();
        send_group(shared, group, own, fates);
    }
    frames.into_iter().for_each(|frame| pool.put(frame));
}

/// What goes by one socket.
fn send_group(
    shared: &Shared,
    group: &[&Ready],
    frames: &[Frame],
    fates: &mut [Result<usize, TxRefusal>],
) {
    let Some(first) = group.first() else { return };
    let mut refuse = |ready: &[&Ready], why: TxRefusal| {
        for ready in ready {
            if let Some(fate) = fates.get_mut(ready.origin) {
                *fate = Err(why);
            }
        }
    };
    let socket = match shared.senders.get(first.choice, shared.config.kind) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!("{}: no socket to send by: {error}", shared.name);
            return refuse(group, TxRefusal::Error);
        }
    };
    let mut messages = messages(group, frames);
    let (mut at, mut done) = (0, 0);
    while let Some(rest) = messages.get(at..).filter(|rest| !rest.is_empty()) {
        let count = |messages: &[Message<'_>]| -> usize {
            messages.iter().map(|message| message.frames.len()).sum()
        };
        match inet::send(socket.as_fd(), rest.get(..BATCH).unwrap_or(rest)) {
            Ok(sent) if sent > 0 => {
                done += count(rest.get(..sent).unwrap_or_default());
                at += sent;
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) if errno != Errno::AGAIN && rest.first().is_some_and(is_several) => {
                // IPsec, a device that can't make checksums, a route that has changed: one by one.
                let several = messages.get(at).copied();
                let singles = several.into_iter().flat_map(singles);
                messages.splice(at..=at, singles);
            }
            Err(errno) => {
                let (refused, others) = match errno {
                    // Nothing more goes by this socket now.
                    Errno::AGAIN => (rest, TxRefusal::Full),
                    _ => (rest.get(..1).unwrap_or_default(), reason(errno)),
                };
                if others == TxRefusal::TooLong
                    && let Some(message) = refused.first()
                {
                    let Envelope { to, from, mark, .. } = message.envelope;
                    shared.paths.forget(Ends { to, from, mark });
                }
                let until = done + count(refused);
                refuse(group.get(done..until).unwrap_or_default(), others);
                done = until;
                at += refused.len();
            }
        }
    }
}

fn is_several(message: &Message<'_>) -> bool {
    message.frames.len() > 1
}

/// A message's datagrams, each as a message.
fn singles(message: Message<'_>) -> impl Iterator<Item = Message<'_>> {
    message.frames.chunks(1).map(move |frames| Message {
        envelope: message.envelope,
        frames,
    })
}

fn reason(errno: Errno) -> TxRefusal {
    match errno {
        Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM => TxRefusal::Full,
        Errno::MSGSIZE => TxRefusal::TooLong,
        Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ADDRNOTAVAIL | Errno::INVAL => {
            TxRefusal::Unreachable
        }
        Errno::NETDOWN => TxRefusal::Down,
        _ => TxRefusal::Error,
    }
}

/// Datagrams that can go together do: all of one length, but for a shorter one at the end.
fn messages<'a>(group: &[&Ready], frames: &'a [Frame]) -> Vec<Message<'a>> {
    let mut messages = Vec::with_capacity(group.len());
    let mut rest = frames;
    let mut ready = group.iter();
    let mut left = group;
    while let (Some(first), Some(frame)) = (ready.next(), rest.first()) {
        let size = frame.len();
        let mut count = 1;
        let mut bytes = size;
        if first.together {
            for (next, frame) in left.iter().zip(rest).skip(1) {
                let fits = next.together
                    && next.envelope == first.envelope
                    && frame.len() <= size
                    && count < SEGMENTS
                    && bytes + frame.len() <= MOST_BYTES;
                if !fits {
                    break;
                }
                count += 1;
                bytes += frame.len();
                if frame.len() < size {
                    break;
                }
            }
        }
        let (own, others) = rest.split_at(count);
        messages.push(Message {
            envelope: first.envelope,
            frames: own,
        });
        rest = others;
        left = left.get(count..).unwrap_or_default();
        ready = left.iter();
    }
    messages
}
