//! Joins flow, netlink and vport: workers, actions, upcalls, the semantics of the families.
//!
//! From the outside in:
//! - [`daemon`]: what all threads share; the threads and the order of locks;
//! - [`families`]: what requests mean;
//! - [`ctnetlink`]: the same for the tracker's connections;
//! - [`rtnetlink`], [`tunnel_link`]: tunnels made as links;
//! - [`codec`]: attributes to types of `flow` and back, with the module's validation;
//! - [`datapath`], [`vport`], [`table_ref`]: what is configured; [`device_source`]: of which devices;
//! - [`worker`], [`outlet`], [`feeders`], [`devices`]: the threads at the ports; [`placement`]: which of them serves what, where;
//! - [`executor`], [`packet`], [`meter`], [`transmit`], [`upcall`]: a packet's way;
//! - [`conntrack`]: connections, their states and translations; [`refragment`]: what came in fragments;
//! - [`counters`], [`drop_reason`], [`status`], [`stream_status`]: what became of it; [`capture`]: to look on.

pub mod capture;
pub mod codec;
pub mod conntrack;
pub mod counters;
pub mod ctnetlink;
pub mod daemon;
pub mod datapath;
pub mod device_source;
pub mod devices;
pub mod drop_reason;
pub mod executor;
pub mod families;
pub mod feeders;
pub mod mailbox;
pub mod meter;
pub mod outlet;
pub mod packet;
pub mod placement;
pub mod refragment;
pub mod rtnetlink;
pub mod status;
pub mod stream_status;
mod table_ref;
pub mod transmit;
pub mod tunnel_link;
pub mod upcall;
pub mod vport;
pub mod worker;
