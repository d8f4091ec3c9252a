//! What packets mean: keys, masks, actions as data, the flow table. No sockets, no threads, no clock.
//!
//! - [`key`]: what is known of a packet; the same layout is the mask.
//! - [`action`]: what a flow does, as data.
//! - [`extract`]: from a frame to a key.
//! - [`headers`]: where its headers are.
//! - [`ipv6`]: the chain of extension headers.
//! - [`hash`]: the packet's hash.
//! - [`rewrite`]: from a set action to changed bytes, checksums kept right.
//! - [`mask`]: which bits of a key are compared.
//! - [`flow`]: one entry: key, mask, actions, and its statistics ([`stats`]).
//! - [`table`]: which flow a packet belongs to, which flows there are; its writers, dumps, garbage.
//! - [`cache`]: what an executor keeps between lookups.

pub mod action;
pub mod cache;
pub mod extract;
pub mod flow;
pub mod hash;
pub mod headers;
pub mod ipv6;
pub mod key;
pub mod mask;
pub mod rewrite;
pub mod stats;
pub mod table;

mod debug;
mod surgery;
