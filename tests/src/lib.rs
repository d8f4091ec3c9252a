//! A laboratory for tests at the outer boundaries: network namespaces, ovs-dpd, and the real
//! Open vSwitch programs.
//!
//! The programs under `tests/tests/` are its users, one a subject; `cargo xtask demo` and the
//! benches are too. Everything a laboratory makes carries the process id of its maker in its
//! name, goes when the laboratory goes, and is swept by the next one if its maker was killed.
//!
//! - [`lab`]: a switch with its namespaces: where a test begins.
//! - [`namespace`]: a network namespace.
//! - [`endpoint`]: a namespace joined to the switch by a veth pair.
//! - [`ovs`]: ovsdb-server, ovs-vswitchd and the tools, on private run directories.
//! - [`daemon`]: ovs-dpd, its run directory and its status.
//! - [`process`]: programs that are run, and programs that run beside.
//! - [`log`]: what a log may say.
//! - [`sandbox`]: the same test once more, as a user without privileges.
//! - [`requirement`]: what the machine must have; never skipped silently.
//! - [`traffic`]: ping, iperf3, TCP, UDP, raw frames, collectors.
//! - [`exposition`]: Prometheus' text format, read strictly.
//! - [`corpus`]: recorded answers of the kernel module, to be replayed.
//! - [`replay`]: those recordings against a running ovs-dpd.
//! - [`wait`]: polls with a deadline, instead of sleeps.

pub mod corpus;
pub mod daemon;
pub mod endpoint;
pub mod exposition;
pub mod lab;
pub mod log;
pub mod namespace;
pub mod ovs;
pub mod process;
pub mod replay;
pub mod requirement;
pub mod sandbox;
mod sys;
pub mod traffic;
pub mod wait;

pub use endpoint::Endpoint;
pub use lab::{Lab, Switch, test, test_ovs_dpd};
pub use namespace::Namespace;
