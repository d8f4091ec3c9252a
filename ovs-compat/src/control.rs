//! Commands to a running daemon: one line of JSON each way, on a UNIX socket.
//!
//! # Contract
//! Who may change datapaths may give commands: root, the daemon's own user, members of its `--group`. All
//! others get an answer that says so. One command at a time, on a thread of its own, which may sleep;
//! forwarding knows nothing of it. What is read is open to all and elsewhere ([`status`](crate::status)).

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use datapath::daemon::Daemon;
use netlink::Errno;
use netlink::quiet::Quiet;
use serde::{Deserialize, Serialize};
use tracing::info;
use vport::stream::{Endpoint, MAX_RING, StreamOptions};

use crate::rundir::RunDir;

/// How long a client may take to say what it wants, or to take the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a command.
const LONGEST: u64 = 4096;

/// What can be asked for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// `stream add`.
    StreamAdd {
        /// The device's name.
        name: String,
        /// Listen there; else connect to there.
        listen: bool,
        /// Where.
        address: SocketAddr,
        /// Frames that may wait for the peer.
        ring: Option<usize>,
        /// Whether a full ring stops what feeds it.
        backpressure: Option<bool>,
    },
    /// `stream del`.
    StreamDel {
        /// The device's name.
        name: String,
    },
    /// `port set`.
    PortSet {
        /// The port's name.
        name: String,
        /// Frames that may wait for the device.
        ring: Option<usize>,
        /// Whether a full ring stops what feeds it.
        backpressure: Option<bool>,
    },
}

/// Takes commands until the process ends.
///
/// # Errors
/// It can't be listened in the run directory; no thread to be had.
pub fn start(run_dir: &RunDir, daemon: &Arc<Daemon>, group: Option<u32>) -> Result<()> {
    let path = run_dir.control_socket();
    // Left by a daemon that is dead: we hold the directory's lock.
    crate::run::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("can't listen on {}", path.display()))?;
    // Each client is looked at: who may not is told so.
    std::fs::set_permissions(&path, Permissions::from_mode(0o666))
        .with_context(|| format!("can't open {} to all", path.display()))?;
    let daemon = Arc::clone(daemon);
    crate::run::spawn("control", move || {
        let errors = Quiet::default();
        for stream in listener.incoming() {
            let served = stream
                .map_err(anyhow::Error::from)
                .and_then(|stream| serve(&stream, &daemon, group));
            if let Err(error) = served {
                errors.say(|| info!("control: {error:#}"));
                // No descriptors, perhaps.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    })?;
    Ok(())
}

fn serve(mut stream: &UnixStream, daemon: &Daemon, group: Option<u32>) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let done = if netlink::server::peer_may_change(stream.as_fd(), group)? {
        let mut line = Vec::new();
        BufReader::new(stream.take(LONGEST)).read_until(b'\n', &mut line)?;
        serde_json::from_slice(&line)
            .context("the command can't be read: is ovs-dpd of another version than the daemon?")
            .and_then(|command| carry_out(daemon, command))
    } else {
        Err(anyhow::anyhow!(
            "not permitted: be root, the daemon's user, or a member of its --group"
        ))
    };
    let answer: Result<(), String> = done.map_err(|error| format!("{error:#}"));
    let mut bytes = serde_json::to_vec(&answer)?;
    bytes.push(b'\n');
    stream.write_all(&bytes)?;
    Ok(())
}

fn carry_out(daemon: &Daemon, command: Command) -> Result<()> {
    match command {
        Command::StreamAdd {
            name,
            listen,
            address,
            ring,
            backpressure,
        } => {
            let endpoint = if listen {
                Endpoint::Listen(address)
            } else {
                Endpoint::Connect(address)
            };
            let options = StreamOptions {
                endpoint,
                ring: ring.unwrap_or(daemon.options.rings.size),
                backpressure: backpressure.unwrap_or(daemon.options.rings.backpressure),
            };
            daemon.streams.add(&name, &options)?;
        }
        Command::StreamDel { name } => {
            daemon.streams.remove(&name).map_err(|error| {
                let known: Vec<_> = daemon.streams.list().into_iter().map(|s| s.name).collect();
                anyhow::anyhow!("{error} (streams: {})", known.join(", "))
            })?;
        }
        Command::PortSet {
            name,
            ring,
            backpressure,
        } => {
            let done = match daemon.set_ring(&name, ring, backpressure) {
                // A stream needn't be a port.
                Err(Errno::ENODEV) => {
                    return daemon
                        .streams
                        .set(&name, ring, backpressure)
                        .map_err(|_none| anyhow::anyhow!("there is no port or stream {name}"));
                }
                done => done,
            };
            done.map_err(|errno| match errno {
                Errno::EINVAL => anyhow::anyhow!("--ring: from 1 to {MAX_RING} frames"),
                Errno::EOPNOTSUPP => {
                    anyhow::anyhow!("{name} has no ring: its driver takes frames at once, or never")
                }
                errno => anyhow::anyhow!("{name}: {errno}"),
            })?;
        }
    }
    Ok(())
}

/// Gives the daemon of a run directory a command.
///
/// # Errors
/// There is none, or it says why not.
pub fn tell(path: &Path, command: &Command) -> Result<()> {
    let run_dir = RunDir::new(path);
    let mut stream = UnixStream::connect(run_dir.control_socket()).with_context(|| {
        format!(
            "no daemon listens on {}: start one with `ovs-dpd run --run-dir {}`",
            path.display(),
            path.display()
        )
    })?;
    let mut bytes = serde_json::to_vec(command)?;
    bytes.push(b'\n');
    // Whoever isn't permitted is told so without being heard.
    let sent = stream.write_all(&bytes);
    let mut answer = String::new();
    BufReader::new(&stream)
        .read_line(&mut answer)
        .context("the daemon broke off in the middle of its answer")?;
    if answer.is_empty() {
        sent.context("can't reach the daemon")?;
        bail!("the daemon doesn't answer");
    }
    let answer: Result<(), String> = serde_json::from_str(&answer)
        .context("the daemon's answer can't be read: is it of another version?")?;
    answer.map_err(|why| anyhow::anyhow!(why))
}
