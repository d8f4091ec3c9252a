//! Netlink requests to the kernel, as far as ports need them (rtnetlink, nftables).
//!
//! The kernel handles a request within `sendmsg`, so its answer is there when we read: nothing here
//! waits for anybody. Attributes are parsed by `netlink-packet-core`, bounds-checked; what is
//! malformed is skipped.
//!
//! Source: uapi `linux/netlink.h`.

use netlink_packet_core::{NetlinkBuffer, NlaBuffer, NlasIterator};
use netlink_sys::{Socket, SocketAddr};
use rustix::io::Errno;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// The kernel packs a dump into datagrams of at most 32 KiB; one link alone may be longer.
const RECEIVE_BYTES: usize = 128 * 1024;

pub(crate) const ACK: u16 = libc::NLM_F_ACK as u16;
pub(crate) const CREATE: u16 = libc::NLM_F_CREATE as u16;
pub(crate) const DUMP: u16 = libc::NLM_F_DUMP as u16;
pub(crate) const EXCL: u16 = libc::NLM_F_EXCL as u16;

/// A request being written. Lengths are filled in as it grows.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of this `nlmsg_type`.
    pub(crate) fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; HEADER];
        if let Some(field) = bytes.get_mut(4..6) {
            field.copy_from_slice(&kind.to_ne_bytes());
        }
        if let Some(field) = bytes.get_mut(6..8) {
            field.copy_from_slice(&(flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        }
        Self { bytes }
    }

    /// The family's own header, or anything else that isn't an attribute.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // Our own values: names and numbers, far shorter than 64 KiB.
        let length = u16::try_from(value.len() + 4).unwrap_or(4);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes
            .extend_from_slice(value.get(..usize::from(length) - 4).unwrap_or_default());
        self.pad();
        self
    }

    /// A string, with its NUL.
    pub(crate) fn attr_str(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// An attribute that holds attributes.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let at = self.bytes.len();
        self.attr(kind, &[]);
        fill(self);
        let length = u16::try_from(self.bytes.len() - at).unwrap_or(4);
        if let Some(field) = self.bytes.get_mut(at..at + 2) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(0);
        if let Some(field) = self.bytes.get_mut(0..4) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
        if let Some(field) = self.bytes.get_mut(8..12) {
            field.copy_from_slice(&sequence.to_ne_bytes());
        }
        self.bytes
    }
}

/// One message received: `nlmsg_type`, sequence number, what follows the header.
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram; ends at the first malformed one.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(datagram).ok()?;
        let length = message.length() as usize;
        let received = Received {
            kind: message.message_type(),
            sequence: message.sequence_number(),
            payload: datagram.get(HEADER..length)?,
        };
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some(received)
    })
}

/// The attributes in `bytes`, flags taken off their types; ends at the first malformed one.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes)
        .map_while(Result::ok)
        .map(|attribute: NlaBuffer<&[u8]>| {
            let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
            (
                kind,
                attribute.into_inner().get(4..length).unwrap_or_default(),
            )
        })
}

/// A `u32` in the machine's order.
pub(crate) fn u32_of(value: &[u8]) -> Option<u32> {
    value
        .first_chunk::<4>()
        .map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A string up to its NUL.
pub(crate) fn str_of(value: &[u8]) -> String {
    let end = value
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned()
}

/// What an NLMSG_ERROR says: 0 is an acknowledgement.
fn error_of(payload: &[u8]) -> Result<(), Errno> {
    match payload
        .first_chunk::<4>()
        .map(|bytes| i32::from_ne_bytes(*bytes))
    {
        Some(0) => Ok(()),
        Some(error) if error < 0 => Err(Errno::from_raw_os_error(error.saturating_neg())),
        _ => Err(Errno::PROTO),
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))
}

/// A socket that asks, and reads the answer.
#[derive(Debug)]
pub(crate) struct Client {
    socket: Socket,
    sequence: u32,
}

impl Client {
    /// `protocol` is a `NETLINK_*`; the socket belongs to the calling thread's network namespace.
    pub(crate) fn new(protocol: isize) -> Result<Self, Errno> {
        let mut socket = Socket::new(protocol).map_err(|e| errno_of(&e))?;
        socket
            .bind(&SocketAddr::new(0, 0))
            .map_err(|e| errno_of(&e))?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(|e| errno_of(&e))?;
        socket.set_cap_ack(true).map_err(|e| errno_of(&e))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// A socket for rtnetlink.
    pub(crate) fn route() -> Result<Self, Errno> {
        Self::new(libc::NETLINK_ROUTE as isize)
    }

    /// Sends a request that asks to be acknowledged, and reads that.
    pub(crate) fn change(&mut self, message: Message) -> Result<(), Errno> {
        self.exchange(vec![message], |_, _| {})
    }

    /// Sends a request whose answers go to `each` (type, payload): a dump's many, or one if the
    /// request asks to be acknowledged behind it.
    pub(crate) fn query(
        &mut self,
        message: Message,
        each: impl FnMut(u16, &[u8]),
    ) -> Result<(), Errno> {
        self.exchange(vec![message], each)
    }

    /// Sends messages that belong together in one datagram (an nftables batch: begin, changes, end),
    /// of which one asks to be acknowledged. The first error or acknowledgement is the answer.
    pub(crate) fn batch(&mut self, messages: Vec<Message>) -> Result<(), Errno> {
        self.exchange(messages, |_, _| {})
    }

    fn exchange(
        &mut self,
        messages_out: Vec<Message>,
        mut each: impl FnMut(u16, &[u8]),
    ) -> Result<(), Errno> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let datagram: Vec<u8> = messages_out
            .into_iter()
            .flat_map(|message| message.finish(sequence))
            .collect();
        self.socket.send(&datagram, 0).map_err(|e| errno_of(&e))?;
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            buffer.clear();
            let length = match self.socket.recv(&mut buffer, libc::MSG_TRUNC) {
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(errno_of(&error)),
            };
            if length > buffer.len() {
                return Err(Errno::MSGSIZE);
            }
            for message in messages(&buffer) {
                if message.sequence != sequence {
                    continue; // an answer that an earlier request left unread
                }
                match i32::from(message.kind) {
                    libc::NLMSG_ERROR => return error_of(message.payload),
                    libc::NLMSG_DONE => {
                        // A dump's end carries an errno too.
                        return match message.payload.first_chunk::<4>() {
                            Some(_) => error_of(message.payload),
                            None => Ok(()),
                        };
                    }
                    _ => each(message.kind, message.payload),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut message = Message::new(16, CREATE);
        message.raw(&[0; 16]).attr_str(3, "eth0").nested(18, |m| {
            m.attr_str(1, "veth");
        });
        let bytes = message.finish(7);
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].kind, all[0].sequence), (16, 7));
        let attrs: Vec<_> = attributes(&all[0].payload[16..]).collect();
        assert_eq!(attrs[0], (3, &b"eth0\0"[..]));
        assert_eq!(attributes(attrs[1].1).next(), Some((1, &b"veth\0"[..])));
    }

    #[test]
    fn malformed_bytes_end_the_iteration() {
        let mut seed = 1u32;
        for length in 0..300 {
            let bytes: Vec<u8> = (0..length)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (seed >> 24) as u8 & 0x1f
                })
                .collect();
            assert!(messages(&bytes).count() <= bytes.len() / 16);
            assert!(attributes(&bytes).count() <= bytes.len() / 4);
        }
    }
}
