//! `ovs-dpd stream` and `ovs-dpd port`: what can be changed while the daemon runs.

use std::io::{IsTerminal, Write as _};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;

use anyhow::{Context, Result};
use clap::{ArgGroup, Subcommand, ValueEnum};
use datapath::stream_status::{RingStatus, StreamStatus};

use crate::control::{self, Command};
use crate::{RunDirArgument, status};

/// What becomes of frames for which a port has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// They are dropped.
    TailDrop,
    /// What feeds the port pauses while it feeds nothing else.
    Backpressure,
}

impl Policy {
    /// Whether a full ring stops what feeds it.
    pub fn is_backpressure(self) -> bool {
        self == Self::Backpressure
    }
}

/// `ovs-dpd stream`.
#[derive(Subcommand)]
pub enum StreamCommand {
    /// Make a device whose frames go through a TCP connection, for `ovs-vsctl add-port BRIDGE NAME`.
    ///
    /// Each frame goes behind its length (16 bits, big-endian). One peer at a time; the device has a
    /// carrier while there is one. Nothing is encrypted and nobody authenticated: use it over networks
    /// that are trusted. The stream lasts as long as the daemon, whatever ovs-vswitchd does.
    #[command(
        after_help = "Example:\n  ovs-dpd stream add s0 --connect 192.0.2.1:7000\n  \
                            ovs-vsctl add-port br0 s0",
        group(ArgGroup::new("peer").required(true).args(["listen", "connect"]))
    )]
    Add {
        #[command(flatten)]
        run_dir: RunDirArgument,
        /// Name of the device.
        name: String,
        /// Wait for the peer at this address ([..] around one of IPv6).
        #[arg(long, value_name = "ADDR:PORT")]
        listen: Option<String>,
        /// Connect to the peer at this address, again and again.
        #[arg(long, value_name = "ADDR:PORT")]
        connect: Option<String>,
        /// How many frames may wait for the peer.
        #[arg(long, value_name = "N")]
        ring: Option<usize>,
        /// What becomes of frames when as many wait.
        #[arg(long, value_enum)]
        policy: Option<Policy>,
    },
    /// End a stream; its device goes.
    Del {
        #[command(flatten)]
        run_dir: RunDirArgument,
        /// Name of the device.
        name: String,
    },
    /// Show the streams: peers, frames, losses.
    List {
        #[command(flatten)]
        run_dir: RunDirArgument,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// `ovs-dpd port`.
#[derive(Subcommand)]
pub enum PortCommand {
    /// Change how many frames may wait for a port, and what becomes of more.
    #[command(group(ArgGroup::new("what").required(true).multiple(true).args(["ring", "policy"])))]
    Set {
        #[command(flatten)]
        run_dir: RunDirArgument,
        /// Name of the port.
        name: String,
        /// How many frames may wait for it.
        #[arg(long, value_name = "N")]
        ring: Option<usize>,
        /// What becomes of frames when as many wait.
        #[arg(long, value_enum)]
        policy: Option<Policy>,
    },
}

/// Carries out `ovs-dpd stream`.
///
/// # Errors
/// No daemon, or it says why not.
pub fn stream(command: StreamCommand) -> Result<()> {
    match command {
        StreamCommand::Add {
            run_dir,
            name,
            listen,
            connect,
            ring,
            policy,
        } => {
            let (listen, text) = match (listen, connect) {
                (Some(text), _) => (true, text),
                (None, Some(text)) => (false, text),
                (None, None) => anyhow::bail!("give --listen or --connect"),
            };
            let command = Command::StreamAdd {
                name,
                listen,
                address: address(&text)?,
                ring,
                backpressure: policy.map(Policy::is_backpressure),
            };
            control::tell(&run_dir.run_dir, &command)
        }
        StreamCommand::Del { run_dir, name } => {
            control::tell(&run_dir.run_dir, &Command::StreamDel { name })
        }
        StreamCommand::List { run_dir, json } => list(&run_dir.run_dir, json),
    }
}

/// Carries out `ovs-dpd port`.
///
/// # Errors
/// No daemon, or it says why not.
pub fn port(command: PortCommand) -> Result<()> {
    let PortCommand::Set {
        run_dir,
        name,
        ring,
        policy,
    } = command;
    let command = Command::PortSet {
        name,
        ring,
        backpressure: policy.map(Policy::is_backpressure),
    };
    control::tell(&run_dir.run_dir, &command)
}

fn address(text: &str) -> Result<SocketAddr> {
    let what = || {
        format!(
            "{text:?} is no address with a port, such as 192.0.2.1:7000, [2001:db8::1]:7000, host:7000"
        )
    };
    let mut addresses = text.to_socket_addrs().with_context(what)?;
    addresses.next().with_context(what)
}

fn list(path: &Path, json: bool) -> Result<()> {
    let streams = status::ask(path)?.streams;
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&streams)?)?;
        return Ok(());
    }
    let header = [
        "stream", "endpoint", "state", "port", "sent", "lost", "received", "lost", "ring",
    ];
    let mut table = status::table(std::io::stdout().is_terminal(), &header);
    for stream in &streams {
        table.add_row(row(stream));
    }
    writeln!(out, "{table}")?;
    for stream in streams.iter().filter(|stream| !stream.reason.is_empty()) {
        writeln!(out, "  {}: {}", stream.name, stream.reason)?;
    }
    Ok(())
}

fn row(stream: &StreamStatus) -> [String; 9] {
    let state = match &stream.peer {
        Some(peer) => format!("connected with {peer}"),
        None => stream.state.clone(),
    };
    [
        stream.name.clone(),
        format!("{} {}", stream.role, stream.address),
        state,
        String::from(if stream.attached { "yes" } else { "no" }),
        stream.sent.to_string(),
        (stream.dropped_full + stream.dropped_close).to_string(),
        stream.inbox.produced.to_string(),
        (stream.runt + stream.oversized + stream.unattached).to_string(),
        ring(&stream.ring),
    ]
}

/// A ring in a few words.
pub fn ring(ring: &RingStatus) -> String {
    format!(
        "{}, {} of {} wait, {} in, {} out, {} dropped, {} stops, {} wakes",
        ring.policy,
        ring.len,
        ring.size,
        ring.produced,
        ring.consumed,
        ring.dropped_full,
        ring.stops,
        ring.wakes
    )
}
