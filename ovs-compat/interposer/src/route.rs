//! Links of tunnels. A socket of NETLINK_ROUTE is and stays a real one; a single message that is
//! about a tunnel's link of the daemon's doesn't go to the kernel, but to the daemon on a
//! connection of its own, and the daemon's answers are sent to the caller's socket from another
//! real one. So they stand in its queue in order with the kernel's, before the send returns, and
//! `poll`, `MSG_PEEK` and `recvmmsg` are the kernel's own. Only the sender's address has to be
//! hidden: [`fix_sender`].
//!
//! # What is handed over
//! - RTM_NEWLINK of a kind of tunnel that is told by each packet where to go (COLLECT_METADATA):
//!   the kernel's device would be of no use;
//! - RTM_NEWLINK, RTM_SETLINK, RTM_GETLINK (no dump), RTM_DELLINK of a link that the daemon has marked
//!   (`netlink::Links`): one look into the file system.
//!
//! Whatever the daemon then says is none of its business goes to the kernel after all, as does
//! everything if there is no daemon, or if the caller may not send to sockets of this protocol
//! (without CAP_NET_ADMIN).
//!
//! A socket that is connected to the kernel gets nothing from others, so `connect` only binds:
//! requests go to the kernel without it too. Answers from elsewhere need CAP_NET_ADMIN to send.

pub mod calls;

use core::ffi::c_int;

use transport::{Control, ControlOp, Header, PORT_ID_FIRST, PORT_ID_LAST};

use crate::Outcome;
use crate::send::{self, gather};
use crate::sys::{self, Errno};
use crate::table::{self, Slot};
use crate::{connect, leave, relay};

/// Bytes of a send that are looked at: requests about links are far shorter. Longer sends are the
/// kernel's, unseen.
const INSPECTED: usize = 16 * 1024;
/// The daemon's answers are no longer.
const ANSWER_LEN: usize = 16 * 1024;

/// linux/rtnetlink.h, linux/if_link.h, linux/netlink.h.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const NLM_F_DUMP: u16 = 0x300;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
/// Where the attributes of a link's message begin: behind `nlmsghdr` and `ifinfomsg`.
const ATTRIBUTES: usize = 32;
/// `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;

/// Kinds of tunnels, each with the type of its `..._COLLECT_METADATA`; 0: it has no other mode.
const KINDS: [(&[u8], u16); 9] = [
    (b"vxlan", 25),
    (b"geneve", 6),
    (b"gre", 18),
    (b"gretap", 18),
    (b"ip6gre", 18),
    (b"ip6gretap", 18),
    (b"erspan", 18),
    (b"ip6erspan", 18),
    (b"bareudp", 0),
];

/// Sends a datagram of which some messages may be the daemon's. None: none is, it's the kernel's
/// as it is.
pub fn datagram(fd: c_int, vectors: &[libc::iovec], flags: c_int) -> Option<Outcome> {
    let mut first = [0; transport::NLMSGHDR_LEN];
    let header = Header::parse(gather(vectors, &mut first))?;
    let total = vectors
        .iter()
        .try_fold(0usize, |sum, vector| sum.checked_add(vector.iov_len))?;
    let alone = total <= (header.len as usize).next_multiple_of(4);
    if total > INSPECTED || alone && !is_about_links(header) || table::is_vforked() {
        return None;
    }
    inspect(fd, vectors, flags)
}

fn is_about_links(header: Header) -> bool {
    match header.kind {
        RTM_NEWLINK | RTM_DELLINK | RTM_SETLINK => true,
        RTM_GETLINK => header.flags & NLM_F_DUMP == 0,
        _ => false,
    }
}

#[inline(never)] // Its buffer is on the stack only while it is needed.
fn inspect(fd: c_int, vectors: &[libc::iovec], flags: c_int) -> Option<Outcome> {
    let mut buffer = [0; INSPECTED];
    let bytes = gather(vectors, &mut buffer);
    if !messages(bytes).any(|(_, message)| is_candidate(message)) {
        return None;
    }
    if !sys::is_netlink(fd, libc::NETLINK_ROUTE) {
        // Something else has taken the number behind our back.
        table::set_foreign(fd);
        return None;
    }
    // What comes before and behind is sent apart: the kernel answers each before the next.
    let mut sent = 0;
    for (at, message) in messages(bytes) {
        if !is_candidate(message) {
            continue;
        }
        if let Err(error) = to_kernel(fd, bytes.get(sent..at), flags) {
            return Some(partly(sent, error));
        }
        sent = at;
        match exchange(fd, message) {
            Ok(true) => {
                let end = at.saturating_add(message.len().next_multiple_of(4));
                sent = end.min(bytes.len());
            }
            Ok(false) => {}
            Err(error) => return Some(partly(sent, error)),
        }
    }
    Some(match to_kernel(fd, bytes.get(sent..), flags) {
        Ok(()) => Outcome::Done(bytes.len() as isize),
        Err(error) => partly(sent, error),
    })
}

/// What was done can't be taken back.
fn partly(sent: usize, error: Errno) -> Outcome {
    if sent > 0 {
        Outcome::Done(sent as isize)
    } else {
        Outcome::Fail(error)
    }
}

fn to_kernel(fd: c_int, bytes: Option<&[u8]>, flags: c_int) -> Result<(), Errno> {
    match bytes {
        Some(bytes) if !bytes.is_empty() => sys::send(fd, bytes, flags).map(|_| ()),
        _ => Ok(()),
    }
}

/// The messages of a datagram, each with its place. As in the kernel, what lies about its length
/// ends it.
fn messages(datagram: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0usize;
    core::iter::from_fn(move || {
        let rest = datagram.get(at..)?;
        let length = Header::parse(rest)?.len as usize;
        if length < transport::NLMSGHDR_LEN {
            return None;
        }
        let message = rest.get(..length)?;
        let here = at;
        at = at.checked_add(length.checked_next_multiple_of(4)?)?;
        Some((here, message))
    })
}

/// The payload of the last attribute of that type.
fn attribute(mut rest: &[u8], kind: u16) -> Option<&[u8]> {
    let mut found = None;
    loop {
        let next = || {
            let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
            let this = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & TYPE_MASK;
            Some((this, rest.get(4..length)?, length.next_multiple_of(4)))
        };
        let Some((this, payload, length)) = next() else {
            return found;
        };
        if this == kind {
            found = Some(payload);
        }
        rest = rest.get(length..).unwrap_or_default();
    }
}

fn text(payload: &[u8]) -> &[u8] {
    payload.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Whether the daemon is to be asked about it.
fn is_candidate(message: &[u8]) -> bool {
    let Some(header) = Header::parse(message).filter(|header| is_about_links(*header)) else {
        return false;
    };
    let Some(attributes) = message.get(ATTRIBUTES..) else {
        return false;
    };
    if header.kind == RTM_NEWLINK && makes_tunnel(attributes).unwrap_or(false) {
        return true;
    }
    let index = message
        .get(20..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    if index > 0 {
        return connect::is_marked_index(index as u32);
    }
    attribute(attributes, IFLA_IFNAME).is_some_and(|name| connect::is_marked(text(name)))
}

fn makes_tunnel(attributes: &[u8]) -> Option<bool> {
    let info = attribute(attributes, IFLA_LINKINFO)?;
    let kind = text(attribute(info, IFLA_INFO_KIND)?);
    let (_, collects) = KINDS.iter().find(|(name, _)| *name == kind)?;
    if *collects == 0 {
        return Some(true);
    }
    let data = attribute(info, IFLA_INFO_DATA)?;
    Some(attribute(data, *collects).is_some())
}

/// Puts a message to the daemon, and its answers into the caller's queue. False: it's the
/// kernel's.
#[inline(never)] // Its buffer is on the stack only while it is needed.
fn exchange(fd: c_int, message: &[u8]) -> Result<bool, Errno> {
    let Some((side, welcome)) = connect::side(libc::NETLINK_ROUTE) else {
        return Ok(false);
    };
    let result = match Messenger::new(fd, welcome.port_id) {
        Some(messenger) => {
            let result = converse(fd, side, &messenger, message);
            messenger.close();
            result
        }
        None => Ok(false),
    };
    sys::close(side);
    result
}

fn converse(fd: c_int, side: c_int, messenger: &Messenger, message: &[u8]) -> Result<bool, Errno> {
    for (number, op) in [
        (libc::NETLINK_EXT_ACK, ControlOp::ExtAck),
        (libc::NETLINK_CAP_ACK, ControlOp::CapAck),
    ] {
        let on = sys::getsockopt(fd, libc::SOL_NETLINK, number, 0i32);
        if on.is_ok_and(|on| on != 0) {
            send::bytes(side, &Control { op, value: 1 }.to_bytes())?;
        }
    }
    send::bytes(side, message)?;
    let cookie = Slot::next_cookie();
    send::bytes(side, &transport::barrier(cookie))?;
    let mut answer = [0u8; ANSWER_LEN];
    let mut ours = true;
    loop {
        let length = match sys::recv(side, &mut answer, libc::MSG_DONTWAIT | libc::MSG_TRUNC) {
            // The daemon has ended, and perhaps done what was asked.
            Ok(0) => return Err(libc::ECONNRESET),
            Ok(length) => length,
            Err(libc::EAGAIN | libc::EINTR) => {
                sys::wait(side, libc::POLLIN, 1000);
                continue;
            }
            Err(error) => return Err(error),
        };
        let bytes = answer.get_mut(..length).ok_or(libc::EMSGSIZE)?;
        if transport::ack_cookie(bytes) == Some(cookie) {
            return Ok(ours);
        }
        if transport::is_not_ours(bytes) {
            ours = false;
            continue;
        }
        relay::address(bytes, messenger.to);
        messenger.deliver(bytes)?;
    }
}

/// A real socket that sends to the caller's.
struct Messenger {
    fd: c_int,
    /// The caller's port id.
    to: u32,
}

impl Messenger {
    /// With a port id that shows a receive who sent. None: it may not send, so the daemon can't
    /// be asked.
    fn new(caller: c_int, port_id: u32) -> Option<Self> {
        let mut to = sys::netlink_port(caller)?;
        if to == 0 {
            // It hasn't one yet: the kernel chooses, as at the first send.
            leave::bind(caller, 0, 0).ok()?;
            to = sys::netlink_port(caller)?;
        }
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = sys::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE).ok()?;
        let messenger = Self { fd, to };
        // To itself: may it?
        let probe = transport::barrier(0);
        let may = leave::bind(fd, port_id, 0).is_ok()
            && sys::send_to_port(fd, &probe, port_id, libc::MSG_DONTWAIT).is_ok();
        if may {
            Some(messenger)
        } else {
            messenger.close();
            None
        }
    }

    /// # Errors
    /// ENOBUFS: the caller's queue is full.
    fn deliver(&self, bytes: &[u8]) -> Result<(), Errno> {
        match sys::send_to_port(self.fd, bytes, self.to, libc::MSG_DONTWAIT) {
            Ok(_) => Ok(()),
            Err(libc::EAGAIN) => Err(libc::ENOBUFS),
            Err(error) => Err(error),
        }
    }

    fn close(&self) {
        sys::close(self.fd);
    }
}

/// `connect(2)` to the kernel, which is where requests go anyway. None: to somebody else, or of
/// something else.
///
/// # Safety
/// As `connect(2)`.
pub unsafe fn connect_to_kernel(
    fd: c_int,
    address: *const libc::sockaddr,
    length: libc::socklen_t,
) -> Option<Outcome> {
    if address.is_null() || (length as usize) < size_of::<libc::sockaddr_nl>() {
        return None;
    }
    // SAFETY: as many bytes as are read are there; alignment isn't asked for.
    let address = unsafe { address.cast::<libc::sockaddr_nl>().read_unaligned() };
    let kernel = c_int::from(address.nl_family) == libc::AF_NETLINK
        && address.nl_pid == 0
        && address.nl_groups == 0;
    if !kernel || table::is_vforked() || !sys::is_netlink(fd, libc::NETLINK_ROUTE) {
        return None;
    }
    // It gets a port id by that, if it has none; with one it would be EINVAL.
    if sys::netlink_port(fd) == Some(0)
        && let Err(error) = leave::bind(fd, 0, 0)
    {
        return Some(Outcome::Fail(error));
    }
    Some(Outcome::Done(0))
}

/// Hides that an answer didn't come from the kernel.
///
/// # Safety
/// `address` has room for `length` bytes, which a receive has just filled, or is null.
pub unsafe fn fix_sender(address: *mut libc::sockaddr, length: usize) {
    if address.is_null() || length < size_of::<libc::sockaddr_nl>() {
        return;
    }
    let address = address.cast::<libc::sockaddr_nl>();
    // SAFETY: the caller's contract; alignment isn't asked for.
    unsafe {
        let mut own = address.read_unaligned();
        let ours = (PORT_ID_FIRST..=PORT_ID_LAST).contains(&own.nl_pid);
        if c_int::from(own.nl_family) == libc::AF_NETLINK && ours {
            own.nl_pid = 0;
            address.write_unaligned(own);
        }
    }
}
