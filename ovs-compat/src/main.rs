//! `ovs-dpd`: an Open vSwitch datapath in user space, in the place of the kernel module.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

mod answer;
mod capture;
mod control;
mod exec;
mod metrics;
mod purge;
mod run;
mod rundir;
mod status;
mod stream;

/// An Open vSwitch datapath in user space, in the place of the kernel module openvswitch.ko.
///
/// Start the daemon with `ovs-dpd run`, then start Open vSwitch's own programs, unmodified, through
/// `ovs-dpd exec -- PROGRAM`: their "system" datapath is this daemon.
#[derive(Parser)]
#[command(
    name = "ovs-dpd",
    version,
    arg_required_else_help = true,
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct RunDirArgument {
    /// Where the daemon keeps its socket and its pid file.
    #[arg(
        long,
        value_name = "DIR",
        env = "OVS_DPD_RUNDIR",
        default_value = "/run/ovs-dpd"
    )]
    run_dir: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground, in the present network namespace.
    ///
    /// Prints a line with "ready" once it serves. SIGTERM and SIGINT end it: all that it made is
    /// removed, as unloading the module would.
    Run(run::RunArguments),
    /// Run a program with its Open vSwitch netlink pointed at the daemon.
    ///
    /// The program replaces ovs-dpd: its exit status and signals are its own, and its children inherit
    /// the redirection. Without a daemon the program sees what it sees on a host without the module.
    #[command(after_help = "Example:\n  ovs-dpd exec -- ovs-vswitchd --pidfile --detach")]
    Exec {
        #[command(flatten)]
        run_dir: RunDirArgument,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        program: Vec<OsString>,
    },
    /// Show workers, datapaths, ports, flows, meters, connections, upcalls, losses and drops by reason.
    Status {
        #[command(flatten)]
        run_dir: RunDirArgument,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the status as metrics, in Prometheus' text format.
    ///
    /// Datapaths, ports, drops by port and reason, upcalls, workers, conntrack, the process. To have them
    /// scraped, give `ovs-dpd run` a --metrics-listen.
    Metrics {
        #[command(flatten)]
        run_dir: RunDirArgument,
    },
    /// Ports whose frames go through TCP connections.
    #[command(subcommand)]
    Stream(stream::StreamCommand),
    /// Settings of single ports.
    #[command(subcommand)]
    Port(stream::PortCommand),
    /// Show or write the packets of a port, or those that are dropped.
    ///
    /// Works on every port, whichever its driver, and in both directions: packets as they come out of the
    /// port and as they are given to it. Each line, and each packet's comment in a file, names the port and
    /// says why the packet was dropped, if it was. A packet that stands for several (GSO) is captured whole,
    /// as it is forwarded. Forwarding never waits for a capture: what can't be read fast enough is lost, and
    /// counted at the end. Ends with Ctrl-C. For those who may change datapaths (root, or --group of
    /// `ovs-dpd run`).
    #[command(after_help = capture::EXAMPLES)]
    Capture(capture::CaptureArguments),
    /// Remove what a killed daemon left behind.
    ///
    /// Refuses while the daemon is alive. The next `run` on the same directory does the same by itself.
    Purge {
        #[command(flatten)]
        run_dir: RunDirArgument,
    },
}

/// Which driver existing devices get.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum DriverArgument {
    /// What works best on each device.
    Auto,
    /// Packet sockets.
    AfPacket,
    /// AF_XDP, or the port is refused.
    AfXdp,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Exec { run_dir, program } => {
            exec::exec(&run_dir.run_dir, &program).map(|never| match never {})
        }
        Command::Status { run_dir, json } => status::status(&run_dir.run_dir, json),
        Command::Metrics { run_dir } => metrics::metrics(&run_dir.run_dir),
        Command::Stream(command) => stream::stream(command),
        Command::Port(command) => stream::port(command),
        Command::Capture(arguments) => capture::capture(&arguments),
        Command::Purge { run_dir } => purge::purge(&run_dir.run_dir),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ovs-dpd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
