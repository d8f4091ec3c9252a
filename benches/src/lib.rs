//! What the benches share. Each bench measures ovs-dpd and its peers in the same run, in turns, and
//! gives ratios with their spread: absolute figures drift with the machine, ratios less.
//!
//! - [`report`]: samples, ratios, tables; JSON beside them.
//! - [`plot`]: line charts as SVG, kept in `benches/plots`.
//! - [`latency`]: times and their percentiles.
//! - [`machine`]: what the figures were measured on.
//! - [`bed`]: two endpoints and what forwards between them, ours or a peer.
//! - [`floor`]: the barest forwarders that there can be: what nobody in user space gets below.
//! - [`sender`]: frames, as fast as one thread can or at a steady rate.
//! - [`wire`]: packet sockets as the sender, the floor and the receivers use them.
//! - [`xsk`]: AF_XDP sockets as the floor uses them.
//! - [`client`]: a scripted client of the daemon, in ovs-vswitchd's place.
//! - [`delay`]: a delay line, for round-trip times.
//! - [`cpu`]: who runs where.

pub mod bed;
pub mod client;
pub mod cpu;
pub mod delay;
pub mod floor;
pub mod latency;
pub mod machine;
pub mod plot;
pub mod report;
pub mod sender;
pub mod wire;
pub mod xsk;
