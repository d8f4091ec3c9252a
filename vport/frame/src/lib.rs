//! A frame: its bytes, its VLAN tag, its offloads; checksums and segmentation.
//!
//! The bottom room: what a port hands over, what the datapath changes, what a port sends.

pub mod buffer;
pub mod offload;

pub use buffer::Frame;
pub use offload::{Gso, GsoKind, Offload, PartialChecksum};
