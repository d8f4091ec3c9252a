//! `cargo xtask demo | test | bench | guard`: what one does with a checkout.
//!
//! - [`demo`]: shows a bridge over ovs-dpd at work, and removes it again.
//! - [`test`]: every test, and that nothing is left behind.
//! - [`bench`]: the benches.
//! - [`guard`]: that a packet doesn't take more instructions than before.
//! - [`cargo`]: cargo within cargo.
//! - [`packages`]: what is missing on the machine.
//! - [`say`]: what is printed.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod cargo;
mod demo;
mod guard;
mod packages;
mod say;
mod test;

/// What one does with a checkout of ovs-dpd.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show Open vSwitch, unmodified, forwarding through ovs-dpd between network namespaces.
    ///
    /// Needs root. Installs what is missing (apt-get), builds, shows, and removes all of it again,
    /// also on Ctrl-C. The host's own interfaces and its own Open vSwitch are not touched.
    Demo,
    /// Run every test: of the crates, and of the whole in network namespaces (needs root).
    Test {
        /// Only these: programs of tests/tests (such as `vlan`), or parts of tests' names.
        filter: Vec<String>,
    },
    /// Run the benches.
    Bench {
        /// Only this one.
        name: Option<String>,
        /// Arguments for the bench.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Count the instructions that a packet takes (parsing, lookup, actions) and compare with
    /// benches/guard/baseline.txt. Installs valgrind if it is missing.
    Guard {
        /// Write the baseline instead.
        #[arg(long)]
        renew: bool,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Demo => demo::demo(),
        Command::Test { filter } => test::test(&filter),
        Command::Guard { renew } => guard::guard(renew),
        Command::Bench { name, arguments } => bench::bench(name.as_deref(), &arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::failure(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
