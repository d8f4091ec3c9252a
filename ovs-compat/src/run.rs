//! `ovs-dpd run`: the daemon's life, from lock to clean-up.

use std::fs::Permissions;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use datapath::daemon::{Daemon, Options};
use datapath::devices::{self, Devices, Notice};
use datapath::families;
use datapath::mailbox::mailbox;
use datapath::status::Status;
use netlink::server::{BindError, Config, Server};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vport::{DriverChoice, LinkMonitor};

use crate::DriverArgument;
use crate::rundir::RunDir;

/// What `run` can be told.
#[derive(clap::Args)]
pub struct RunArguments {
    #[command(flatten)]
    run_dir: crate::RunDirArgument,
    /// Worker threads: each forwards the packets of the ports given to it.
    #[arg(long, value_name = "N", default_value_t = default_workers(),
          value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// A group, by name or number, whose members may change datapaths as root may.
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    /// Driver of ports on existing devices.
    #[arg(long, value_enum, default_value_t = DriverArgument::Auto)]
    driver: DriverArgument,
    /// Make internal ports from veth pairs, as where /dev/net/tun is closed, instead of TAPs.
    #[arg(long)]
    internal_veth: bool,
    /// What to log, as error, warn, info, debug, or per module (see tracing-subscriber's EnvFilter).
    #[arg(
        long,
        value_name = "FILTER",
        env = "OVS_DPD_LOG",
        default_value = "info"
    )]
    log: String,
}

fn default_workers() -> u16 {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(16) as u16)
}

/// Runs the daemon until it is told to end.
pub fn run(arguments: &RunArguments) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&arguments.log)
        .with_context(|| format!("can't read the log filter {:?}", arguments.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();

    // From here on the signals wait for us, whatever stage we are in.
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("can't take signals")?;
    let run_dir = RunDir::new(&arguments.run_dir.run_dir);
    let prompt_threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let group = arguments.group.as_deref().map(group_id).transpose()?;
    let server = match Server::bind(Config {
        threads: prompt_threads,
        group,
        ..Config::new(run_dir.path())
    }) {
        Ok(server) => server,
        Err(error @ BindError::Occupied { .. }) => {
            bail!("{error}: stop it, or choose another --run-dir")
        }
        Err(error @ BindError::Insecure { .. }) => {
            bail!(
                "{error}: whoever can write there could put a socket there; choose another --run-dir"
            )
        }
        Err(error @ BindError::Io { .. }) => return Err(error).context("can't serve"),
    };
    let prefix = run_dir.prefix();
    match vport::cleanup(&prefix) {
        Ok(removed) => {
            for what in removed {
                info!("removed what a killed daemon left: {what}");
            }
        }
        Err(error) => warn!("can't look for what a killed daemon left: {error}"),
    }

    let monitor = LinkMonitor::new()
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("can't follow the links of this network namespace")?;
    let (notices, mail) = mailbox().context("no descriptor to be had")?;
    let daemon = Arc::new(Daemon::new(
        Options {
            workers: usize::from(arguments.workers),
            prompt_threads,
            seed: secret(),
            driver: match arguments.driver {
                DriverArgument::Auto => DriverChoice::Auto,
                DriverArgument::AfPacket => DriverChoice::AfPacket,
                DriverArgument::AfXdp => DriverChoice::AfXdp,
            },
            run_prefix: prefix,
            force_veth: arguments.internal_veth,
            notes: Vec::new(),
        },
        server.hub(),
        Devices::new(notices),
    ));
    daemon
        .workers
        .start(&daemon)
        .context("can't start the workers")?;
    let reaper_stop = Arc::new(AtomicBool::new(false));
    let reaper = spawn("reaper", {
        let (daemon, stop) = (Arc::clone(&daemon), Arc::clone(&reaper_stop));
        move || daemon.reap(&|| stop.load(Ordering::Relaxed))
    })?;
    let follower = spawn("devices", {
        let daemon = Arc::clone(&daemon);
        move || devices::follow(&daemon, &mail, monitor)
    })?;
    answer_status(&run_dir, &daemon)?;
    let running = server
        .serve(Arc::new(families::Server::new(Arc::clone(&daemon))))
        .context("can't start the netlink server")?;

    std::fs::write(run_dir.pid_file(), format!("{}\n", std::process::id()))
        .with_context(|| format!("can't write {}", run_dir.pid_file().display()))?;
    println!(
        "ovs-dpd: ready on {} (process {})",
        run_dir.path().display(),
        std::process::id()
    );
    std::io::stdout()
        .flush()
        .context("can't write to standard output")?;
    tell_systemd(&[sd_notify::NotifyState::Ready]);

    let signal = signals.forever().next();
    info!("ending on signal {}", signal.unwrap_or_default());
    tell_systemd(&[sd_notify::NotifyState::Stopping]);

    // Clients go first, so that nothing new is asked for; then what they made.
    running.stop();
    daemon.remove_all();
    daemon.devices.notify(Notice::Stop);
    daemon.workers.stop();
    reaper_stop.store(true, Ordering::Relaxed);
    daemon.wake_reaper();
    for (name, thread) in [("devices", follower), ("reaper", reaper)] {
        if thread.join().is_err() {
            warn!("the {name} thread had ended by a panic");
        }
    }
    remove_file(&run_dir.status_socket());
    remove_file(&run_dir.pid_file());
    Ok(())
}

fn spawn(name: &str, life: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(life)
        .with_context(|| format!("can't start the {name} thread"))
}

/// One answer a connection: the status as JSON. Ends with the process.
fn answer_status(run_dir: &RunDir, daemon: &Arc<Daemon>) -> Result<()> {
    let path = run_dir.status_socket();
    // Left by a daemon that is dead: we hold the directory's lock.
    remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("can't listen on {}", path.display()))?;
    // Reading is open to all, as GET requests are.
    std::fs::set_permissions(&path, Permissions::from_mode(0o666))
        .with_context(|| format!("can't open {} to all", path.display()))?;
    let daemon = Arc::clone(daemon);
    spawn("status", move || {
        for stream in listener.incoming() {
            let answered = stream.map_err(anyhow::Error::from).and_then(|mut stream| {
                // A client that doesn't read is given up, so that it keeps no other waiting.
                stream.set_write_timeout(Some(std::time::Duration::from_secs(2)))?;
                stream.write_all(serde_json::to_string(&Status::of(&daemon))?.as_bytes())?;
                Ok(())
            });
            if let Err(error) = answered {
                info!("status: {error:#}");
            }
        }
    })?;
    Ok(())
}

fn remove_file(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        warn!("can't remove {}: {error}", path.display());
    }
}

fn tell_systemd(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("can't tell systemd: {error}");
    }
}

/// A number that nobody outside knows: the standard library's maps draw it from the system.
fn secret() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn group_id(group: &str) -> Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let groups = std::fs::read_to_string("/etc/group").context("can't read /etc/group")?;
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let number = fields.nth(1)?.parse().ok()?;
            (name == group).then_some(number)
        })
        .next()
        .with_context(|| format!("there is no group {group:?}"))
}
