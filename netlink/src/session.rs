//! One client's conversation, as bytes: what netlink and generic netlink do around a family's
//! handler. No sockets; the server drives it, and so does [`Loopback`].
//!
//! What goes back, as Linux does it: an ack when NLM_F_ACK asks for it, nothing on plain success,
//! always an error; a dump's error in its NLMSG_DONE. A message without NLM_F_REQUEST, or of a
//! control type, is only acked.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::attr::{self, Writer};
use crate::connection::{CAP_ACK, EXT_ACK};
use crate::ctrl;
use crate::errno::Errno;
use crate::family::{CTRL_ID, Family};
use crate::handler::{Answer, Dump, DumpPart, Handler, Lane, Outgoing};
use crate::hub::Hub;
use crate::message::{
    ATTRIBUTES, Failure, GENL_HEADER, Header, Messages, NLMSG_HEADER, Request, control, flags,
};
use crate::policy;
use crate::service::{self, Protocol, Served, Service};
use crate::transport;

/// What the protocol has to know of a client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) port_id: u32,
    pub(crate) privileged: bool,
    /// [`EXT_ACK`], [`CAP_ACK`].
    pub(crate) options: u32,
    /// Multicast groups, a bit each.
    pub(crate) groups: u32,
    /// What it speaks.
    pub(crate) protocol: Protocol,
}

/// Who answers.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) handler: &'a dyn Handler,
    pub(crate) hub: &'a Hub,
}

/// What became of a message.
pub(crate) enum Step {
    /// Answered, all of it in `out`.
    Done,
    /// It must run in that lane, which isn't the prompt one; nothing has been done yet.
    Elsewhere(Lane),
    /// It began this dump.
    Dumping(RunningDump),
}

/// Where a message runs now, and what that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// On a prompt thread: refuses to do what sleeps.
    Prompt,
    /// On the thread of its lane.
    Lane,
}

enum Asked<'a> {
    Nothing,
    Ctrl {
        command: u8,
        attrs: &'a [u8],
        dump: bool,
    },
    Family {
        request: Request<'a>,
        dump: bool,
    },
    Service {
        service: &'a dyn Service,
        request: service::Request<'a>,
        dump: bool,
    },
}

/// Answers one message. `busy` tells whether an earlier dump of this client is still unread.
pub(crate) fn step(
    context: Context<'_>,
    peer: &Peer,
    place: Place,
    (header, message): (Header, &[u8]),
    busy: impl Fn() -> bool,
    out: &mut Outgoing,
) -> Step {
    let asked = match peer.protocol {
        Protocol::Generic => interpret(peer, header, message),
        protocol => interpret_plain(context, protocol, peer, header, message),
    };
    let result = match asked {
        Err(failure) => Err(failure),
        Ok(Asked::Nothing) => Ok(()),
        Ok(
            Asked::Ctrl { dump: true, .. }
            | Asked::Family { dump: true, .. }
            | Asked::Service { dump: true, .. },
        ) if busy() => Err(Errno::EBUSY.into()),
        Ok(Asked::Ctrl {
            command,
            attrs,
            dump: false,
        }) => ctrl::answer(command, attrs, header.seq, peer.port_id, out),
        Ok(Asked::Ctrl {
            command,
            attrs,
            dump: true,
        }) => {
            let listing = ctrl::dump(command, attrs, header.seq, peer.port_id);
            return start_dump(peer, header.seq, listing, out);
        }
        Ok(Asked::Family { request, dump }) => {
            if let Some(lane) = elsewhere(place, || context.handler.lane(&request)) {
                return Step::Elsewhere(lane);
            }
            if dump {
                let dump = begin_dump(context, &request);
                return start_dump(peer, header.seq, dump, out);
            }
            handle(context, peer, &request, out)
        }
        Ok(Asked::Service {
            service,
            request,
            dump,
        }) => {
            if let Some(lane) = elsewhere(place, || service.lane(&request)) {
                return Step::Elsewhere(lane);
            }
            if dump {
                let dump = guard(|| service.dump(&request)).unwrap_or(Err(Errno::EIO.into()));
                return start_dump(peer, header.seq, dump, out);
            }
            match serve(service, &request, out) {
                Ok(Served::Done) => Ok(()),
                Ok(Served::NotOurs) => {
                    out.push(&transport::not_ours(header.seq));
                    return Step::Done;
                }
                Err(failure) => Err(failure),
            }
        }
    };
    match result {
        Err(failure) => acknowledge(peer, header, message, Some(&failure), out),
        Ok(()) if header.has(flags::ACK) => acknowledge(peer, header, message, None, out),
        Ok(()) => {}
    }
    Step::Done
}

/// The lane that a message must change to.
fn elsewhere(place: Place, lane: impl FnOnce() -> Lane) -> Option<Lane> {
    if place == Place::Lane {
        return None;
    }
    guard(lane).filter(|lane| *lane != Lane::Prompt)
}

/// Generic netlink's own checks, in its order.
fn interpret<'a>(peer: &Peer, header: Header, message: &'a [u8]) -> Result<Asked<'a>, Failure> {
    if !header.has(flags::REQUEST) || header.kind < control::MIN_TYPE {
        return Ok(Asked::Nothing);
    }
    let dump = header.has(flags::DUMP);
    let family = Family::from_id(header.kind);
    if family.is_none() && header.kind != CTRL_ID {
        return Err(Errno::ENOENT.into());
    }
    let genl = message
        .get(NLMSG_HEADER..NLMSG_HEADER + GENL_HEADER)
        .ok_or(Errno::EINVAL)?;
    let (command, version) = match genl {
        [command, version, ..] => (*command, *version),
        _ => return Err(Errno::EINVAL.into()),
    };
    let Some(family) = family else {
        if dump && !ctrl::dumps(command) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let attrs = message
            .get(NLMSG_HEADER + GENL_HEADER..)
            .unwrap_or_default();
        return Ok(Asked::Ctrl {
            command,
            attrs,
            dump,
        });
    };
    let attrs = message.get(ATTRIBUTES..).ok_or(Errno::EINVAL)?;
    let dp_ifindex = message
        .get(NLMSG_HEADER + GENL_HEADER..)
        .and_then(|rest| rest.first_chunk())
        .map(|bytes| i32::from_ne_bytes(*bytes))
        .ok_or(Errno::EINVAL)?;
    let op = family.op(command).ok_or(Errno::EOPNOTSUPP)?;
    if op.needs_privilege() && !peer.privileged {
        return Err(Errno::EPERM.into());
    }
    if dump && !op.dumps() {
        return Err(Errno::EOPNOTSUPP.into());
    }
    let request = Request {
        family,
        command,
        version,
        flags: header.flags,
        seq: header.seq,
        dp_ifindex,
        attrs,
        port_id: peer.port_id,
        privileged: peer.privileged,
    };
    if !dump {
        policy::check(family.policy(), attrs, ATTRIBUTES)?;
    }
    Ok(Asked::Family { request, dump })
}

/// The checks that all netlink protocols have in common.
fn interpret_plain<'a>(
    context: Context<'a>,
    protocol: Protocol,
    peer: &Peer,
    header: Header,
    message: &'a [u8],
) -> Result<Asked<'a>, Failure> {
    if !header.has(flags::REQUEST) || header.kind < control::MIN_TYPE {
        return Ok(Asked::Nothing);
    }
    let service = context.handler.service(protocol).ok_or(Errno::EOPNOTSUPP)?;
    let request = service::Request {
        kind: header.kind,
        flags: header.flags,
        seq: header.seq,
        payload: message.get(NLMSG_HEADER..).unwrap_or_default(),
        port_id: peer.port_id,
        privileged: peer.privileged,
    };
    if !peer.privileged && guard(|| service.needs_privilege(&request)).unwrap_or(true) {
        return Err(Errno::EPERM.into());
    }
    let dump = guard(|| service.is_dump(&request)).ok_or(Errno::EIO)?;
    Ok(Asked::Service {
        service,
        request,
        dump,
    })
}

fn serve(
    service: &dyn Service,
    request: &service::Request<'_>,
    out: &mut Outgoing,
) -> Result<Served, Failure> {
    let mut answer = service::Answer {
        out,
        seq: request.seq,
        port_id: request.port_id,
    };
    let result = guard(|| service.handle(request, &mut answer));
    // What a panic left half written.
    out.rewind();
    result.unwrap_or(Err(Errno::EIO.into()))
}

fn handle(
    context: Context<'_>,
    peer: &Peer,
    request: &Request<'_>,
    out: &mut Outgoing,
) -> Result<(), Failure> {
    let mut answer = Answer {
        hub: context.hub,
        out,
        family: request.family,
        flags: request.flags,
        seq: request.seq,
        port_id: peer.port_id,
        member_of: peer.groups,
    };
    let result = guard(|| context.handler.handle(request, &mut answer));
    // What a panic left half written.
    out.rewind();
    result.unwrap_or(Err(Errno::EIO.into()))
}

fn begin_dump(context: Context<'_>, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
    // Of the dumps only that of flows looks at its attributes.
    if request.family == Family::Flow {
        policy::check(request.family.policy(), request.attrs, ATTRIBUTES)?;
    }
    guard(|| context.handler.dump(request)).unwrap_or(Err(Errno::EIO.into()))
}

fn start_dump(
    peer: &Peer,
    seq: u32,
    dump: Result<Box<dyn Dump>, Failure>,
    out: &mut Outgoing,
) -> Step {
    match dump {
        Ok(dump) => Step::Dumping(RunningDump {
            dump,
            seq,
            port_id: peer.port_id,
        }),
        Err(failure) => {
            let message = failure.message.filter(|_| peer.options & EXT_ACK != 0);
            done(seq, peer.port_id, Some(failure.errno), message, out);
            Step::Done
        }
    }
}

/// A panic in a handler is a bug, but one request's: it is logged, and the others go on.
fn guard<T>(call: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(value) => Some(value),
        Err(_) => {
            tracing::error!("a request's handler panicked; the client gets EIO");
            None
        }
    }
}

/// A dump and what its messages carry.
pub(crate) struct RunningDump {
    dump: Box<dyn Dump>,
    seq: u32,
    port_id: u32,
}

impl RunningDump {
    /// Appends the dump's next datagrams to `out`: a part, and NLMSG_DONE if it was the last. Tells
    /// whether the dump is over.
    pub(crate) fn advance(&mut self, out: &mut Outgoing) -> bool {
        out.rewind();
        let mut part = DumpPart {
            begin: out.buffer.len(),
            buffer: &mut out.buffer,
            seq: self.seq,
            port_id: self.port_id,
            paused: false,
        };
        let filled = guard(|| self.dump.fill(&mut part)).unwrap_or(Err(Errno::EIO));
        let (empty, paused) = (part.is_empty(), part.paused);
        let over = match filled {
            // No progress: it would never end.
            Ok(false) if empty && !paused => Some(Some(Errno::EMSGSIZE)),
            Ok(false) => None,
            Ok(true) => Some(None),
            Err(errno) => Some(Some(errno)),
        };
        if !empty {
            out.seal();
        }
        if let Some(errno) = over {
            done(self.seq, self.port_id, errno, None, out);
        }
        over.is_some()
    }
}

fn done(seq: u32, pid: u32, errno: Option<Errno>, message: Option<&str>, out: &mut Outgoing) {
    let mut body = Vec::new();
    body.extend_from_slice(&errno.map_or(0, |errno| -errno.0).to_ne_bytes());
    let mut flags = flags::MULTI;
    if let Some(message) = message
        && Writer::new(&mut body).name(EXT_MESSAGE, message).is_ok()
    {
        flags |= flags::ACK_TLVS;
    }
    let len = (NLMSG_HEADER + body.len()) as u32;
    Header {
        len,
        kind: control::DONE,
        flags,
        seq,
        pid,
    }
    .emit(&mut out.buffer);
    out.buffer.extend_from_slice(&body);
    out.seal();
}

/// `NLMSGERR_ATTR_*`
const EXT_MESSAGE: u16 = 1;
const EXT_OFFSET: u16 = 2;
/// Nested, and marked so.
const EXT_POLICY: u16 = 4 | 0x8000;

/// NLMSG_ERROR: `struct nlmsgerr`, with the request's payload when it failed and CAP_ACK isn't set,
/// and attributes when EXT_ACK is and there are any.
fn acknowledge(
    peer: &Peer,
    header: Header,
    message: &[u8],
    failure: Option<&Failure>,
    out: &mut Outgoing,
) {
    let mut attributes = Vec::new();
    if let Some(failure) = failure
        && peer.options & EXT_ACK != 0
    {
        let mut writer = Writer::new(&mut attributes);
        if let Some(message) = failure.message {
            // Of bounded length: it is a text of ours.
            let _ = writer.name(EXT_MESSAGE, message);
        }
        if let Some(offset) = failure.offset {
            writer.u32(EXT_OFFSET, offset);
        }
        if let Some(rule) = failure.rule.filter(|rule| rule.form.is_shown()) {
            let nest = writer.begin(EXT_POLICY);
            rule.form.describe(&mut writer);
            let _ = writer.end(nest);
        }
    }
    let capped = failure.is_none() || peer.options & CAP_ACK != 0;
    let echo = message
        .get(NLMSG_HEADER..)
        .filter(|_| !capped)
        .unwrap_or_default();
    let mut flags = if capped { flags::CAPPED } else { 0 };
    if !attributes.is_empty() {
        flags |= flags::ACK_TLVS;
    }
    let len = NLMSG_HEADER + 4 + NLMSG_HEADER + attr::align(echo.len()) + attributes.len();
    let buffer = &mut out.buffer;
    Header {
        len: len as u32,
        kind: control::ERROR,
        flags,
        seq: header.seq,
        pid: peer.port_id,
    }
    .emit(buffer);
    let error = failure.map_or(0, |failure| -failure.errno.0);
    buffer.extend_from_slice(&error.to_ne_bytes());
    header.emit(buffer);
    buffer.extend_from_slice(echo);
    buffer.resize(buffer.len() + attr::align(echo.len()) - echo.len(), 0);
    buffer.extend_from_slice(&attributes);
    out.seal();
}

/// A client without a socket, for tests of a [`Handler`] and for fuzzing: the same protocol, each
/// answer at once.
#[derive(Clone, Debug)]
pub struct Loopback {
    /// Where the handler's notifications and upcalls go.
    pub hub: Hub,
    /// The client's port id.
    pub port_id: u32,
    /// Whether it may change state.
    pub privileged: bool,
    /// `NETLINK_EXT_ACK`
    pub ext_ack: bool,
    /// `NETLINK_CAP_ACK`
    pub cap_ack: bool,
    /// What it speaks.
    pub protocol: Protocol,
}

impl Loopback {
    /// A privileged client of the families.
    pub fn new(hub: Hub, port_id: u32) -> Self {
        Self {
            hub,
            port_id,
            privileged: true,
            ext_ack: false,
            cap_ack: false,
            protocol: Protocol::Generic,
        }
    }

    /// Hands a datagram to `handler`; returns the datagrams that go back, dumps to their end.
    pub fn exchange(&self, handler: &dyn Handler, datagram: &[u8]) -> Vec<Vec<u8>> {
        let mut options = 0;
        if self.ext_ack {
            options |= EXT_ACK;
        }
        if self.cap_ack {
            options |= CAP_ACK;
        }
        let peer = Peer {
            port_id: self.port_id,
            privileged: self.privileged,
            options,
            groups: 0,
            protocol: self.protocol,
        };
        let context = Context {
            handler,
            hub: &self.hub,
        };
        let mut out = Outgoing::default();
        for message in Messages::new(datagram) {
            let place = Place::Lane;
            let step = step(context, &peer, place, message, || false, &mut out);
            if let Step::Dumping(mut dump) = step {
                while !dump.advance(&mut out) {}
            }
        }
        out.datagrams().map(<[u8]>::to_vec).collect()
    }
}
