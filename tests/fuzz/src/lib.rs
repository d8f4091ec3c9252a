//! Fuzzers that run the whole daemon in this process: real requests and packets, edited at random, beside
//! oracles that say what must hold all the same.
//!
//! - [`campaign`]: episodes, each with a seed of its own; what is printed when one fails.
//! - [`world`]: a daemon without a system: its requests by [`netlink::Loopback`], its devices [`device`]s.
//! - [`seeds`]: good requests and good packets to begin with.
//! - [`edit`]: random edits of requests, as attributes and as bytes.
//! - [`model`]: what the daemon must hold after the requests that it accepted.
//! - [`wire`]: replies read strictly, by code that shares nothing with the daemon's.
//! - [`actions`]: random valid action lists.
//! - [`packet`]: random well-formed packets, checksums made from scratch.
//! - [`reader`]: a client with a real socket.
//! - [`slow`]: what actions do to a packet, said as simply as can be; [`layers`]: to the headers around it.
//!
//! `OVS_DPD_FUZZ` is the number of messages or packets of each fuzzer, `OVS_DPD_FUZZ_SEED` the seed,
//! `OVS_DPD_FUZZ_EPISODE` a single episode to run again. The tests under `tests/` are the fuzzers; what
//! they found stays in `tests/regressions.rs`.

// A fuzzer that can't go on has found something, or is wrong itself: it says so and ends.
#![allow(clippy::expect_used, clippy::panic)]

pub mod actions;
pub mod campaign;
pub mod device;
pub mod edit;
pub mod layers;
pub mod model;
pub mod packet;
pub mod reader;
pub mod seeds;
pub mod slow;
pub mod wire;
pub mod world;
