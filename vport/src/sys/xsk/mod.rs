//! AF_XDP: a socket on one queue of a device, four rings, and the memory that frames lie in.
//!
//! - [`umem`]: that memory, in chunks;
//! - [`ring`]: a ring between us and the kernel, its producing or its consuming end;
//! - [`receiver`]: receive and fill ring: frames in;
//! - [`sender`]: transmit and completion ring: frames out;
//! - [`socket`]: the descriptor: makes all of these, is bound, kicked, asked for statistics.
//!
//! # Who owns a chunk
//! Chunks are divided once between receiver and sender. A receiver's chunk is in the fill ring or
//! the driver (the kernel's), in the receive ring (ours, once seen), or waits for room in the fill
//! ring (ours). A sender's is free (ours), or in the transmit ring, the device, the completion ring
//! (the kernel's, until seen there). None is ever forgotten: what the kernel gives back is taken
//! back at the next call, and everything goes with the socket.
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
