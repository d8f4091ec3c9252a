//! A frame: its bytes, its VLAN tag, its offloads; checksums and segmentation.
//!
//! The bottom room: what a port hands over, what the datapath changes, what a port sends.
//!
//! - [`buffer`]: the bytes, with room in front.
//! - [`pool`]: buffers to be used again, one pool a worker.
//! - [`storage`]: memory that was lent to a frame.
//! - [`offload`]: what a frame leaves to be done.
//! - [`virtio`]: the same as the header in front of a frame on a TAP or a packet socket.
//! - [`checksum`]: RFC 1071, CRC32c, and finishing a partial checksum.
//! - [`segment`]: cutting a frame that stands for several.
//! - [`merge`]: putting together what was cut.
//! - [`tunnel`]: headers in front of a frame on its way over an IP network.

pub mod buffer;
pub mod checksum;
pub mod class;
pub mod merge;
pub mod offload;
pub mod pool;
pub mod segment;
pub mod storage;
pub mod tunnel;
pub mod virtio;

mod layout;

pub use buffer::{Frame, FrameError, HEADROOM, MAX_LEN, VlanTag};
pub use checksum::complete_checksum;
pub use class::Class;
pub use offload::{Gso, GsoKind, Offload, PartialChecksum};
pub use pool::Pool;
pub use segment::{MAX_SEGMENTS, SegmentError, Segments};
pub use storage::Lender;
