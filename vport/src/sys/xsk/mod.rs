//! AF_XDP: a socket on one queue of a device, four rings, and the memory that frames lie in.
//!
//! - [`umem`]: that memory, in chunks;
//! - [`ring`]: a ring between us and the kernel, its producing or its consuming end;
//! - [`receiver`]: receive and fill ring: frames in;
//! - [`sender`]: transmit and completion ring: frames out;
//! - [`socket`]: the descriptor: makes all of these, is bound, kicked, asked for statistics.
//!
//! # Who owns a chunk
//! A receiver has as many as in the beginning: in the fill ring or the driver (the kernel's), in the
//! receive ring (ours, once seen), or waiting for room in the fill ring (ours). A frame may keep the chunk
//! that it came in: another takes its place. A sender has those in the transmit ring, the device, the
//! completion ring (the kernel's, until seen there), and a few free ones. The rest is the memory's. None is
//! ever forgotten: what the kernel gives back is taken back at the next call, and what is left when the
//! socket closes goes back then.
//!
//! # Synchronization
//! Each ring has one producer and one consumer, of which one is the kernel; our end is used through
//! `&mut`. The producer writes entries, then stores its index with Release; the consumer loads that
//! with Acquire, reads, then stores its own with Release, which the producer loads with Acquire before
//! it writes there again. Frames' bytes are passed by the same four.
//!
//! Source: uapi `linux/if_xdp.h`; Documentation/networking/af_xdp.rst.

pub(crate) mod receiver;
pub(crate) mod ring;
pub(crate) mod sender;
pub(crate) mod socket;
pub(crate) mod umem;
