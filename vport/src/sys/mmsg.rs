//! recvmmsg(2) and sendmmsg(2) of frames with virtio-net headers.
//!
//! # Receiving
//! A frame's length isn't known before it is there: 60 bytes or 64 KiB. So each slot offers the
//! space of a small buffer and, behind it, that of a large one from the same offset on: a frame that
//! fits the small buffer is received in place, of a longer one only the first part is copied, into
//! the room left for it in the large one.
//!
//! # Sending
//! An out-of-band tag is written between the addresses and the rest by the iovec: no byte moves.

use std::os::fd::{AsRawFd, BorrowedFd};

use frame::virtio::{self, HEADER_BYTES};
use frame::{Class, Frame, VlanTag};
use rustix::io::Errno;

use super::last;

/// Frames in one call.
pub(crate) const BATCH: usize = 32;
/// Bytes of the two addresses in front of a tag.
const ADDRESSES: usize = 12;
const TAG: usize = 4;

const PACKET_AUXDATA: libc::c_int = 8;
const STATUS_VLAN_VALID: u32 = 1 << 4;
const STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// `struct tpacket_auxdata`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Auxdata {
    status: u32,
    length: u32,
    captured: u32,
    mac: u16,
    net: u16,
    tci: u16,
    tpid: u16,
}

/// Room for one control message with `struct tpacket_auxdata`, aligned as `struct cmsghdr`.
type Control = [u64; 6];

/// Where one frame is received.
#[derive(Debug)]
pub(crate) struct Slot {
    /// For a frame that fits.
    pub(crate) small: Frame,
    /// For one that doesn't; its space must be the larger one.
    pub(crate) large: Frame,
}

/// One frame received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes in the slot, without the virtio-net header.
    pub(crate) length: usize,
    /// It was longer than the slot, or shorter than its virtio-net header.
    pub(crate) damaged: bool,
    /// The tag that the kernel took out.
    pub(crate) vlan: Option<VlanTag>,
    /// Where the network header is, as the device's kind has it.
    pub(crate) network: usize,
    /// `struct virtio_net_hdr`.
    pub(crate) header: [u8; HEADER_BYTES],
}

/// The kernel's structures of one recvmmsg call, kept so as not to be built anew each time.
pub(crate) struct ReceiveBatch {
    messages: Vec<libc::mmsghdr>,
    vectors: Vec<[libc::iovec; 3]>,
    headers: Vec<[u8; HEADER_BYTES]>,
    controls: Vec<Control>,
}

// SAFETY: the pointers inside are written anew in each `receive`, from buffers borrowed for that
// call, and aren't read between calls; so it doesn't matter on which thread the next call runs.
unsafe impl Send for ReceiveBatch {}

impl ReceiveBatch {
    pub(crate) fn new() -> Self {
        // SAFETY: all-zero is valid for mmsghdr and iovec: null pointers and zero lengths.
        let (message, vector) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Self {
            messages: vec![message; BATCH],
            vectors: vec![[vector; 3]; BATCH],
            headers: vec![[0; HEADER_BYTES]; BATCH],
            controls: vec![[0; 6]; BATCH],
        }
    }

    /// Receives into `slots` (at most [`BATCH`] of them are used), without blocking. Gives the number
    /// of frames, which [`received`](Self::received) describes.
    pub(crate) fn receive(
        &mut self,
        fd: BorrowedFd<'_>,
        slots: &mut [Slot],
    ) -> Result<usize, Errno> {
        self.receive_parts(
            fd,
            slots.iter_mut().map(|slot| {
                let small = slot.small.space_mut();
                let rest = slot.large.space_mut().get_mut(small.len()..);
                (small, rest.unwrap_or_default())
            }),
        )
    }

    /// The same into frames, all of them large.
    pub(crate) fn receive_long(
        &mut self,
        fd: BorrowedFd<'_>,
        frames: &mut [Frame],
    ) -> Result<usize, Errno> {
        let spaces = frames.iter_mut().map(Frame::space_mut);
        self.receive_parts(fd, spaces.map(|space| (space, Default::default())))
    }

    fn receive_parts<'a>(
        &mut self,
        fd: BorrowedFd<'_>,
        parts: impl Iterator<Item = (&'a mut [u8], &'a mut [u8])>,
    ) -> Result<usize, Errno> {
        let mut count = 0;
        let places = self.messages.iter_mut().zip(&mut self.vectors);
        let places = places.zip(self.headers.iter_mut().zip(&mut self.controls));
        for (((message, vectors), (header, control)), (small, rest)) in places.zip(parts) {
            count += 1;
            *vectors = [
                libc::iovec {
                    iov_base: header.as_mut_ptr().cast(),
                    iov_len: HEADER_BYTES,
                },
                libc::iovec {
                    iov_base: small.as_mut_ptr().cast(),
                    iov_len: small.len(),
                },
                libc::iovec {
                    iov_base: rest.as_mut_ptr().cast(),
                    iov_len: rest.len(),
                },
            ];
            let header = &mut message.msg_hdr;
            header.msg_iov = vectors.as_mut_ptr();
            header.msg_iovlen = 3;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>() as _;
            header.msg_flags = 0;
        }
        // SAFETY: the first `count` messages point at vectors, headers and controls of `self` and at
        // buffers of `parts`, all borrowed mutably until the call returns, each with its own length.
        let received = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.messages.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        usize::try_from(received)
            .map(|n| n.min(count))
            .map_err(|_| last())
    }

    /// The frame in slot `n` of the last call.
    pub(crate) fn received(&self, n: usize) -> Option<Received> {
        let (message, header) = (self.messages.get(n)?, self.headers.get(n)?);
        let length = message.msg_len as usize;
        let flags = message.msg_hdr.msg_flags;
        let aux = auxdata(&message.msg_hdr, self.controls.get(n)?);
        Some(Received {
            length: length.saturating_sub(HEADER_BYTES),
            damaged: flags & libc::MSG_TRUNC != 0 || length < HEADER_BYTES,
            vlan: aux.as_ref().and_then(tag),
            network: aux.map_or(0, |aux| usize::from(aux.net)),
            header: *header,
        })
    }
}

/// What the kernel says beside a frame.
fn auxdata(message: &libc::msghdr, control: &Control) -> Option<Auxdata> {
    let header = size_of::<libc::cmsghdr>();
    if message.msg_controllen < header + size_of::<Auxdata>() {
        return None;
    }
    // SAFETY: `control` is larger than a cmsghdr with an Auxdata behind it, aligned for both, and
    // initialised throughout; both are plain integers.
    let (kind, aux) = unsafe {
        let start = control.as_ptr().cast::<u8>();
        (
            start.cast::<libc::cmsghdr>().read(),
            start.add(header).cast::<Auxdata>().read(),
        )
    };
    (kind.cmsg_level == libc::SOL_PACKET && kind.cmsg_type == PACKET_AUXDATA).then_some(aux)
}

/// The tag that it tells of, if there is one.
fn tag(aux: &Auxdata) -> Option<VlanTag> {
    if aux.status & STATUS_VLAN_VALID == 0 {
        return None;
    }
    let tpid = if aux.status & STATUS_VLAN_TPID_VALID != 0 {
        aux.tpid
    } else {
        0x8100
    };
    Some(VlanTag { tpid, tci: aux.tci })
}

/// Two control messages, each a `struct cmsghdr` with a u32 and its padding.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ClassControl {
    priority: ControlWord,
    mark: ControlWord,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ControlWord {
    len: usize,
    level: libc::c_int,
    kind: libc::c_int,
    value: u32,
    padding: u32,
}

// As CMSG_LEN(4) and CMSG_SPACE(4) have it.
const CONTROL_WORD_LEN: usize = size_of::<libc::cmsghdr>() + 4;
const _: () = assert!(size_of::<ControlWord>() == size_of::<libc::cmsghdr>() + 8);

impl ClassControl {
    fn new(class: Class) -> Self {
        let word = |kind, value| ControlWord {
            len: CONTROL_WORD_LEN,
            level: libc::SOL_SOCKET,
            kind,
            value,
            padding: 0,
        };
        Self {
            priority: word(libc::SO_PRIORITY, class.priority),
            mark: word(libc::SO_MARK, class.mark),
        }
    }
}

/// Sends up to [`BATCH`] frames of the front of `frames` without blocking, with their classes if
/// `classed`. Gives how many the kernel took; an error is about the first.
pub(crate) fn send(fd: BorrowedFd<'_>, frames: &[Frame], classed: bool) -> Result<usize, Errno> {
    let count = frames.len().min(BATCH);
    // SAFETY: all-zero is valid for mmsghdr and iovec: null pointers and zero lengths.
    let (mut messages, mut vectors) = unsafe {
        (
            std::mem::zeroed::<[libc::mmsghdr; BATCH]>(),
            std::mem::zeroed::<[[libc::iovec; 4]; BATCH]>(),
        )
    };
    let mut headers = [[0u8; HEADER_BYTES]; BATCH];
    let mut tags = [[0u8; TAG]; BATCH];
    let mut classes = [ClassControl::default(); BATCH];
    let places = messages
        .iter_mut()
        .zip(&mut vectors)
        .zip(headers.iter_mut().zip(&mut tags));
    for (frame, ((message, vectors), (header, tag))) in frames.iter().zip(places) {
        let parts = parts(frame, header, tag);
        // Without a tag two of the four are empty: the kernel would walk them for nothing.
        for (vector, part) in vectors
            .iter_mut()
            .zip(parts.iter().filter(|p| !p.is_empty()))
        {
            *vector = libc::iovec {
                iov_base: part.as_ptr().cast_mut().cast(),
                iov_len: part.len(),
            };
            message.msg_hdr.msg_iovlen += 1;
        }
        message.msg_hdr.msg_iov = vectors.as_mut_ptr();
    }
    if classed {
        for ((frame, control), message) in frames.iter().zip(&mut classes).zip(&mut messages) {
            if !frame.class.is_plain() {
                *control = ClassControl::new(frame.class);
                message.msg_hdr.msg_control = std::ptr::from_mut(control).cast();
                message.msg_hdr.msg_controllen = size_of::<ClassControl>() as _;
            }
        }
    }
    // SAFETY: the first `count` messages point at vectors, headers, tags, classes (locals) and at the bytes
    // of `frames`, borrowed until the call returns; the kernel only reads them.
    let sent = unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            messages.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(sent)
        .map(|n| n.min(count))
        .map_err(|_| last())
}

/// The frame as it goes to the kernel: virtio-net header, then the bytes with the tag in band.
/// `header` and `tag` are filled.
pub(crate) fn parts<'a>(
    frame: &'a Frame,
    header: &'a mut [u8; HEADER_BYTES],
    tag: &'a mut [u8; TAG],
) -> [&'a [u8]; 4] {
    let bytes = frame.bytes();
    let mut offload = frame.offload;
    let split = if frame.vlan.is_some() {
        ADDRESSES.min(bytes.len())
    } else {
        0
    };
    let shift = if frame.vlan.is_some() { TAG as u16 } else { 0 };
    if let Some(csum) = &mut offload.csum {
        csum.start = csum.start.saturating_add(shift);
    }
    if let Some(gso) = &mut offload.gso {
        // Only a hint, but the kernel refuses one beyond the frame.
        let hint = usize::from(gso.header_len.saturating_add(shift));
        gso.header_len = hint.min(bytes.len()) as u16;
    }
    *header = virtio::encode(&offload);
    let mut tag_bytes: &[u8] = &[];
    if let Some(vlan) = frame.vlan {
        *tag = vlan.to_bytes();
        tag_bytes = tag;
    }
    let (front, rest) = bytes.split_at_checked(split).unwrap_or((bytes, &[]));
    [header, front, tag_bytes, rest]
}

#[cfg(test)]
mod tests {
    use super::*;
    use frame::PartialChecksum;

    #[test]
    fn a_tag_goes_behind_the_addresses_and_moves_the_checksum() {
        let mut frame = Frame::from_bytes(&[7; 60]);
        frame.vlan = Some(VlanTag {
            tpid: 0x88a8,
            tci: 5,
        });
        frame.offload.csum = Some(PartialChecksum {
            start: 34,
            offset: 6,
        });
        let (mut header, mut tag) = ([0; HEADER_BYTES], [0; TAG]);
        let parts = parts(&frame, &mut header, &mut tag);
        assert_eq!(parts[1].len(), 12);
        assert_eq!(parts[2], [0x88, 0xa8, 0, 5]);
        assert_eq!(parts[3].len(), 48);
        let offload = virtio::decode(parts[0].try_into().unwrap(), 64).unwrap();
        assert_eq!(
            offload.csum,
            Some(PartialChecksum {
                start: 38,
                offset: 6
            })
        );
    }

    #[test]
    fn a_frame_shorter_than_its_addresses_is_sent_as_it_is() {
        let mut frame = Frame::from_bytes(&[7; 5]);
        frame.vlan = Some(VlanTag {
            tpid: 0x8100,
            tci: 5,
        });
        let (mut header, mut tag) = ([0; HEADER_BYTES], [0; TAG]);
        assert_eq!(
            parts(&frame, &mut header, &mut tag).map(<[u8]>::len),
            [10, 5, 4, 0]
        );
    }
}
