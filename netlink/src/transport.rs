//! What the interposer and the daemon say to each other below netlink: the package `transport`,
//! which is apart so that the interposer links nothing else of ours.

pub use ::transport::*;
