//! `ovs-dpd run`: the daemon's life, from lock to clean-up.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use datapath::conntrack::MAX_CONNECTIONS;
use datapath::daemon::{Daemon, Options};
use datapath::devices::{self, Devices, Notice};
use datapath::families;
use datapath::mailbox::mailbox;
use datapath::outlet::{DEFAULT_RING, RingDefaults};
use datapath::placement::cpus::CpuList;
use netlink::server::{BindError, Config, Server};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vport::{DriverChoice, LinkMonitor};

use crate::DriverArgument;
use crate::answer::{self, Answers, MetricsAddress};
use crate::capture;
use crate::control;
use crate::rundir::RunDir;
use crate::stream::Policy;

/// What `run` can be told.
#[derive(clap::Args)]
pub struct RunArguments {
    #[command(flatten)]
    run_dir: crate::RunDirArgument,
    /// Worker threads: each forwards the packets of the ports given to it.
    ///
    /// Queues move from busy workers to idle ones, one a second at most; `ovs-dpd status` shows who has
    /// what. Default: one a CPU of --cpus, or of the machine, 16 at most.
    #[arg(long, value_name = "N", env = "OVS_DPD_WORKERS",
          value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// CPUs that the workers are kept on, as 0-3,8: the first worker on the first, and so on, from the
    /// beginning again if there are more workers. Default: wherever the system runs them.
    #[arg(long, value_name = "LIST", env = "OVS_DPD_CPUS")]
    cpus: Option<CpuList>,
    /// After a packet a worker looks for more that long, in microseconds, before it sleeps.
    ///
    /// Saves the time to wake up, at the price of CPU time; without packets workers sleep all the same.
    #[arg(long, value_name = "MICROSECONDS", env = "OVS_DPD_BUSY_POLL", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(0..=MAX_BUSY_POLL))]
    busy_poll: u32,
    /// A group, by name or number, whose members may change datapaths as root may.
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    /// Driver of ports on existing devices.
    #[arg(long, value_enum, default_value_t = DriverArgument::Auto)]
    driver: DriverArgument,
    /// Connections that conntrack holds at most. Some 600 bytes each are taken when they come.
    ///
    /// When there are so many, a new one takes the place of one that hasn't proved itself (no packets both
    /// ways yet); if all have, it is refused, and its packet dropped.
    #[arg(long, value_name = "N", default_value_t = MAX_CONNECTIONS as u32,
          value_parser = clap::value_parser!(u32).range(1..=1 << 28))]
    max_connections: u32,
    /// Make internal ports from veth pairs, as where /dev/net/tun is closed, instead of TAPs.
    #[arg(long)]
    internal_veth: bool,
    /// Serve metrics for Prometheus there by HTTP, at /metrics: 127.0.0.1:9475, or the path of a UNIX socket.
    ///
    /// Whoever can connect can read them. `ovs-dpd metrics` prints the same without this.
    #[arg(long, value_name = "ADDR:PORT|PATH", env = "OVS_DPD_METRICS_LISTEN")]
    metrics_listen: Option<MetricsAddress>,
    /// What becomes of frames when as many wait for a port as there is room for in its ring.
    ///
    /// With backpressure what feeds that port, and nothing else, isn't received from until half of them are
    /// sent. `ovs-dpd port set` changes it for one port.
    #[arg(long, value_enum, default_value_t = Policy::TailDrop)]
    default_policy: Policy,
    /// How many frames may wait for a port whose device has no room, or for a stream's peer.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_RING, value_parser = ring_size)]
    default_ring: usize,
    /// What to log, as error, warn, info, debug, or per module (see tracing-subscriber's EnvFilter).
    #[arg(
        long,
        value_name = "FILTER",
        env = "OVS_DPD_LOG",
        default_value = "info"
    )]
    log: String,
}

/// A second: longer than that is no pause between packets.
const MAX_BUSY_POLL: i64 = 1_000_000;

impl RunArguments {
    fn workers(&self) -> usize {
        let cpus = match &self.cpus {
            Some(cpus) => cpus.numbers().len(),
            None => std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        };
        self.workers.map_or(cpus.min(16), usize::from)
    }
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

    if let Some(cpus) = &arguments.cpus {
        cpus.check().with_context(|| format!("--cpus {cpus}"))?;
    }
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
    warn_of_missing_privileges();
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
            workers: arguments.workers(),
            cpus: arguments.cpus.clone(),
            busy_poll: Duration::from_micros(arguments.busy_poll.into()),
            prompt_threads,
            seed: secret(),
            max_connections: arguments.max_connections as usize,
            driver: match arguments.driver {
                DriverArgument::Auto => DriverChoice::Auto,
                DriverArgument::AfPacket => DriverChoice::AfPacket,
                DriverArgument::AfXdp => DriverChoice::AfXdp,
            },
            run_prefix: prefix,
            force_veth: arguments.internal_veth,
            rings: RingDefaults {
                size: arguments.default_ring,
                backpressure: arguments.default_policy.is_backpressure(),
            },
            notes: Vec::new(),
        },
        server.hub(),
        Devices::new(notices),
    ));
    let counter = daemon
        .new_counter()
        .map_err(|errno| anyhow::anyhow!("no cell of counters: {errno}"))?;
    daemon
        .drains
        .start(counter)
        .context("can't start the drain")?;
    daemon
        .workers
        .start(&daemon)
        .context("can't start the workers")?;
    let mut answers = Answers::default();
    answers.status_at(&run_dir.status_socket())?;
    if let Some(address) = &arguments.metrics_listen {
        answers.metrics_at(address)?;
    }
    capture::server::start(&run_dir, &daemon, group)?;
    let reaper_stop = Arc::new(AtomicBool::new(false));
    let reaper = spawn("reaper", {
        let (daemon, stop) = (Arc::clone(&daemon), Arc::clone(&reaper_stop));
        move || daemon.reap(&|| stop.load(Ordering::Relaxed))
    })?;
    let follower = spawn("devices", {
        let daemon = Arc::clone(&daemon);
        move || devices::follow(&daemon, &mail, monitor)
    })?;
    answer::start(answers, &daemon)?;
    control::start(&run_dir, &daemon, group)?;
    let answering = families::Server::new(Arc::clone(&daemon)).with_links(server.links());
    let running = server
        .serve(Arc::new(answering))
        .context("can't start the netlink server")?;

    std::fs::write(run_dir.pid_file(), format!("{}\n", std::process::id()))
        .with_context(|| format!("can't write {}", run_dir.pid_file().display()))?;
    // Not println, which panics where nobody reads.
    let ready = format!(
        "ovs-dpd: ready on {} (process {})\n",
        run_dir.path().display(),
        std::process::id()
    );
    let mut stdout = std::io::stdout();
    if let Err(error) = stdout
        .write_all(ready.as_bytes())
        .and_then(|()| stdout.flush())
    {
        warn!("can't say on standard output that it is ready: {error}");
    }
    tell_systemd(&[sd_notify::NotifyState::Ready]);

    let signal = signals.forever().next();
    info!("ending on signal {}", signal.unwrap_or_default());
    tell_systemd(&[sd_notify::NotifyState::Stopping]);

    // Clients go first, so that nothing new is asked for; then what they made.
    running.stop();
    daemon.remove_all();
    daemon.streams.clear();
    daemon.devices.notify(Notice::Stop);
    daemon.workers.stop();
    daemon.drains.stop();
    reaper_stop.store(true, Ordering::Relaxed);
    daemon.wake_reaper();
    for (name, thread) in [("devices", follower), ("reaper", reaper)] {
        if thread.join().is_err() {
            warn!("the {name} thread had ended by a panic");
        }
    }
    if let Some(MetricsAddress::Unix(path)) = &arguments.metrics_listen {
        remove_file(path);
    }
    for file in run_dir.files() {
        remove_file(&file);
    }
    Ok(())
}

/// Without packet sockets no port can be had.
fn warn_of_missing_privileges() {
    let (family, kind) = (AddressFamily::PACKET, SocketType::RAW);
    if let Err(errno @ (Errno::PERM | Errno::ACCESS)) = socket(family, kind, None) {
        warn!(
            "there will be no ports, since packet sockets are refused ({errno}): run as root, or inside \
             `unshare -U -r -n -m`"
        );
    }
}

/// Starts a thread.
pub(crate) fn spawn(name: &str, life: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(life)
        .with_context(|| format!("can't start the {name} thread"))
}

/// Removes a file that may not be there.
pub(crate) fn remove_file(path: &Path) {
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

fn ring_size(text: &str) -> Result<usize, String> {
    let of_that = |size: &usize| (1..=vport::stream::MAX_RING).contains(size);
    let size = text.parse().ok().filter(of_that);
    size.ok_or_else(|| format!("from 1 to {}", vport::stream::MAX_RING))
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
