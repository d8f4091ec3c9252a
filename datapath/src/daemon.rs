//! What all the daemon's threads share: the datapaths, the workers, the clients.
//!
//! # Contexts
//! - *worker* threads receive from ports and forward ([`crate::worker`]);
//! - the netlink server's *prompt* threads answer flow and packet requests and reads;
//! - its *configuration* thread answers DP_* and VPORT_* changes, which may sleep;
//! - the *devices* thread follows what happens to the ports' devices ([`crate::devices`]);
//! - the *reaper* frees what the epoch has let go.
//!
//! # Lock order, outermost first
//! 1. [`Daemon::configuration`]: by the configuration and devices threads only;
//! 2. a flow table's mutex (inside crate `flow`): by prompt threads, under no other lock;
//! 3. [`Datapath::departed`]; a client's queues (inside crate `netlink`). Leaves: nothing is taken under
//!    them.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::vport::stream::Streams;
use ::vport::{DriverChoice, TunnelConfig, TunnelKind};
use arc_swap::ArcSwap;
use crossbeam_epoch::LocalHandle;
use flow::stats::Source;
use flow::table::{FlowTable, Reclaimer, TableConfig};
use netlink::{Errno, Hub};
use rustix::time::{ClockId, clock_gettime};

use crate::capture::Captures;
use crate::conntrack::{self, Tracker};
use crate::counters::Counters;
use crate::datapath::{Datapath, Settings};
use crate::device_source::{DeviceSource, SystemDevices};
use crate::devices::Devices;
use crate::executor::Executor;
use crate::outlet::{Drains, RingDefaults};
use crate::placement::cpus::CpuList;
use crate::tunnel_link::{TunnelLink, TunnelLinks};
use crate::upcall::Upcaller;
use crate::vport::{Vport, VportType};
use crate::worker::Workers;

/// How the daemon was asked to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Worker threads.
    pub workers: usize,
    /// The CPUs that they are kept on; None: anywhere.
    pub cpus: Option<CpuList>,
    /// How long a worker looks for more before it sleeps.
    pub busy_poll: Duration,
    /// Threads of the server that may carry packets (EXECUTE).
    pub prompt_threads: usize,
    /// Secret of this run: seeds hashes and sampling.
    pub seed: u64,
    /// Connections that conntrack holds at most.
    pub max_connections: usize,
    /// Driver for existing devices.
    pub driver: DriverChoice,
    /// Marks what outlives a killed daemon, for the next one or `purge` to find.
    pub run_prefix: String,
    /// Make internal ports from veth pairs even where TAPs can be made.
    pub force_veth: bool,
    /// What new ports' rings are like.
    pub rings: RingDefaults,
    /// For `status`: what can't be had here and what is done instead.
    pub notes: Vec<String>,
}

/// Shared by all threads.
pub struct Daemon {
    /// How it was asked to run.
    pub options: Options,
    /// The clients' sockets.
    pub hub: Hub,
    /// The epoch that flow tables live by.
    pub reclaimer: Arc<Reclaimer>,
    /// Where ports' receive queues are read.
    pub workers: Workers,
    /// The way to the thread that follows the ports' devices.
    pub devices: Devices,
    /// The rings in front of ports, and who sends what waits there.
    pub drains: Drains,
    /// Streams, which may be ports.
    pub streams: Arc<Streams>,
    source: Box<dyn DeviceSource>,
    /// When it started.
    pub started: Instant,
    /// Who looks on.
    pub captures: Arc<Captures>,
    /// Connections, of all datapaths.
    pub conntrack: Arc<Tracker>,
    datapaths: ArcSwap<Vec<Arc<Datapath>>>,
    configuration: Mutex<()>,
    executors: AtomicUsize,
    generations: AtomicU64,
    tunnels: AtomicU32,
    /// Tunnels that were made as links.
    pub tunnel_links: TunnelLinks,
}

/// The right to change datapaths and ports.
pub struct Configuration<'d> {
    daemon: &'d Daemon,
    _lock: MutexGuard<'d, ()>,
}

/// Threads besides the workers and the prompt threads that may carry packets.
const OTHER_THREADS: usize = 3;

/// How many threads close ports when a datapath goes: they wait for the kernel, not for a processor.
const RELEASE_THREADS: usize = 64;

/// How often connections are looked at whose time may have come.
const EXPIRE_INTERVAL: Duration = Duration::from_millis(250);

/// How often flow tables are asked whether they have put something off, and how many steps of that are
/// done in a row.
const MAINTAIN_INTERVAL: Duration = Duration::from_secs(2);
const MAINTAIN_STEPS: usize = 64;

/// Connections looked at under a shard's lock at a time.
const EXPIRE_BUDGET: usize = 64;

/// How long the removal of a port waits for the batches that still use it.
const QUIESCE: Duration = Duration::from_secs(5);

impl Daemon {
    /// No datapaths yet, workers not started.
    pub fn new(options: Options, hub: Hub, devices: Devices) -> Self {
        let streams = Arc::new(Streams::default());
        let source = Box::new(SystemDevices::new(&options, Arc::clone(&streams)));
        Self {
            streams,
            ..Self::with_devices(options, hub, devices, source)
        }
    }

    /// The same with devices from elsewhere than the system.
    pub fn with_devices(
        options: Options,
        hub: Hub,
        devices: Devices,
        source: Box<dyn DeviceSource>,
    ) -> Self {
        Self {
            hub,
            source,
            reclaimer: Arc::new(Reclaimer::new()),
            workers: Workers::default(),
            devices,
            started: Instant::now(),
            drains: Drains::default(),
            streams: Arc::default(),
            captures: Arc::default(),
            conntrack: Arc::new(Tracker::new(
                conntrack::Config {
                    max_connections: options.max_connections,
                    ..conntrack::Config::new(options.seed.rotate_left(17))
                },
                now_ns(),
            )),
            datapaths: ArcSwap::default(),
            configuration: Mutex::new(()),
            executors: AtomicUsize::new(0),
            generations: AtomicU64::new(1),
            tunnels: AtomicU32::new(0),
            tunnel_links: TunnelLinks::default(),
            options,
        }
    }

    /// How many executors there can be: cells of counters, slots of statistics.
    pub fn executors(&self) -> usize {
        self.options.workers + self.options.prompt_threads + OTHER_THREADS
    }

    /// A number for a thread that counts and carries no packets of its own. ENFILE as with
    /// [`Daemon::new_executor`].
    pub fn new_counter(&self) -> Result<usize, Errno> {
        let index = self.executors.fetch_add(1, Ordering::Relaxed);
        let known = index < self.executors();
        known.then_some(index).ok_or(Errno::ENFILE)
    }

    /// Changes how many frames may wait for a port, and what becomes of more. What is None stays.
    ///
    /// # Errors
    /// ENODEV: no such port. As [`Drains::set`].
    pub fn set_ring(
        &self,
        name: &str,
        size: Option<usize>,
        backpressure: Option<bool>,
    ) -> Result<(), Errno> {
        let found = self.datapaths.load().iter().find_map(|datapath| {
            let ports = datapath.ports.load();
            ports.iter().find(|p| p.current_name() == name).cloned()
        });
        let port = found.ok_or(Errno::ENODEV)?;
        self.drains.set(&port, size, backpressure)
    }

    /// The next thread's executor. ENFILE when there are more threads than were planned for.
    pub fn new_executor(&self) -> Result<Executor, Errno> {
        let index = self.executors.fetch_add(1, Ordering::Relaxed);
        let source = u16::try_from(index)
            .ok()
            .zip(u16::try_from(self.executors()).ok())
            .and_then(|(index, of)| Source::new(index, of))
            .ok_or(Errno::ENFILE)?;
        Ok(Executor::new(
            source,
            Upcaller::new(self.hub.clone(), index),
            self.options.seed,
        )
        .seen_by(&self.captures))
    }

    /// What stands for the index of a tunnel's device: above all that the kernel gives, which counts
    /// from 1.
    pub(crate) fn next_tunnel_ifindex(&self) -> u32 {
        const FIRST: u32 = 0x7000_0000;
        FIRST + self.tunnels.fetch_add(1, Ordering::Relaxed) % 0x0fff_ffff
    }

    /// All datapaths, as of now.
    pub fn datapaths(&self) -> Arc<Vec<Arc<Datapath>>> {
        self.datapaths.load_full()
    }

    /// The datapath whose local port's device has that index.
    pub fn by_ifindex(&self, ifindex: i32) -> Option<Arc<Datapath>> {
        self.datapaths
            .load()
            .iter()
            .find(|dp| dp.ifindex == ifindex)
            .cloned()
    }

    /// The datapath of that name. As in the module, it is found by its local port's name, so not after
    /// that was renamed.
    pub fn by_name(&self, name: &str) -> Option<Arc<Datapath>> {
        self.datapaths
            .load()
            .iter()
            .find(|dp| {
                dp.ports
                    .load()
                    .by_name(name)
                    .is_some_and(|port| port.number == 0)
            })
            .cloned()
    }

    /// The right to change datapaths and ports. Waits for whoever has it.
    pub fn configure(&self) -> Configuration<'_> {
        let lock = self
            .configuration
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Configuration {
            daemon: self,
            _lock: lock,
        }
    }

    /// Deletes all datapaths, as unloading the module would.
    pub fn remove_all(&self) {
        let handle = self.reclaimer.register();
        let configuration = self.configure();
        for datapath in self.datapaths().iter() {
            configuration.remove_datapath(&handle, datapath);
        }
    }

    /// Wakes the reaper, so that it sees that it is to stop.
    pub fn wake_reaper(&self) {
        let handle = self.reclaimer.register();
        self.reclaimer.retire(&handle.pin(), Box::new(()));
    }

    /// Frees retired memory until `stop` says so, and does what flow tables and connections have put off,
    /// and looks after the workers' balance.
    /// The reaper thread's life.
    pub fn reap(&self, stop: &dyn Fn() -> bool) {
        let handle = self.reclaimer.register();
        let mut next_look = Instant::now();
        let mut next_maintenance = next_look + MAINTAIN_INTERVAL;
        while !stop() {
            self.workers.balance(now_ns());
            if Instant::now() >= next_look {
                let now = now_ns();
                while !self.conntrack.expire(now, EXPIRE_BUDGET) && !stop() {}
                next_look = Instant::now() + EXPIRE_INTERVAL;
            }
            let mut tables_done = true;
            if Instant::now() >= next_maintenance {
                for datapath in self.datapaths().iter() {
                    if let Some(table) = datapath.table.acquire(&handle) {
                        tables_done &=
                            !table.maintain(&handle, MAINTAIN_STEPS, std::thread::yield_now);
                    }
                }
                if tables_done {
                    next_maintenance = Instant::now() + MAINTAIN_INTERVAL;
                }
            }
            if self.reclaimer.pending() == 0 {
                let until = if tables_done { 500 } else { 1 };
                self.reclaimer.wait(Duration::from_millis(until));
            } else if self.reclaimer.reap(&handle) == 0 {
                // Somebody is still pinned: a batch lasts well under this.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl Configuration<'_> {
    /// Makes a datapath with its local port.
    ///
    /// # Errors
    /// EEXIST when there is a device of that name, EINVAL for a bad name, or what the system says.
    pub fn add_datapath(
        &self,
        handle: &LocalHandle,
        name: &str,
        ifindex: Option<u32>,
        settings: Settings,
        upcall_pids: Vec<u32>,
    ) -> Result<Arc<Datapath>, Errno> {
        let daemon = self.daemon;
        let device = self.make_internal(name, ifindex)?;
        let local_ifindex = i32::try_from(device.ifindex()).map_err(|_| Errno::EINVAL)?;
        let generation = daemon.generations.fetch_add(1, Ordering::Relaxed);
        let config = TableConfig {
            seed: daemon.options.seed ^ generation,
            generation,
            masks_cache_size: settings.masks_cache_size,
        };
        let table = FlowTable::new(config, &daemon.reclaimer).map_err(|_bad_size| Errno::ERANGE)?;
        let datapath = Arc::new(Datapath::new(
            device.name(),
            local_ifindex,
            settings,
            table,
            daemon.executors(),
            &daemon.conntrack,
        ));
        self.publish(&datapath, 0, VportType::Internal, device, upcall_pids)
            .inspect_err(|_| {
                datapath.table.orphan(handle);
            })?;
        let mut all = Vec::clone(&daemon.datapaths.load());
        all.push(Arc::clone(&datapath));
        daemon.datapaths.store(Arc::new(all));
        Ok(datapath)
    }

    /// Deletes a datapath, its flows and its ports.
    pub fn remove_datapath(&self, handle: &LocalHandle, datapath: &Arc<Datapath>) {
        let daemon = self.daemon;
        let mut all = Vec::clone(&daemon.datapaths.load());
        all.retain(|other| !Arc::ptr_eq(other, datapath));
        daemon.datapaths.store(Arc::new(all));
        datapath.table.orphan(handle);
        let ports = datapath.ports.swap(Arc::default());
        let all: Vec<Arc<Vport>> = ports.iter().cloned().collect();
        drop(ports);
        self.release(datapath, all);
    }

    /// Makes an internal device, or opens an existing one, and makes it a port.
    ///
    /// # Errors
    /// EBUSY when the number is taken, EFBIG when all are, ENODEV when there is no such device, EEXIST
    /// when it is a port of this datapath already or the name is taken, or what the system says.
    pub fn add_port(
        &self,
        datapath: &Arc<Datapath>,
        wish: &PortWish<'_>,
    ) -> Result<Arc<Vport>, Errno> {
        let ports = datapath.ports.load_full();
        let number = match wish.number {
            Some(number) if ports.get(number).is_some() => return Err(Errno::EBUSY),
            Some(number) => number,
            None => ports.free_number().ok_or(Errno::EFBIG)?,
        };
        let device = match wish.kind {
            VportType::Internal => {
                if self.find_port(wish.name).is_some() {
                    return Err(Errno::EEXIST);
                }
                self.make_internal(wish.name, wish.ifindex)?
            }
            VportType::Netdev => match self.daemon.tunnel_links.by_name(wish.name) {
                Some(link) => self.open_link(datapath, &link)?,
                None => {
                    if let Some((other, port)) = self.find_port_by_device(wish.name) {
                        return Err(match port.kind {
                            VportType::Internal => Errno::EINVAL,
                            _ if Arc::ptr_eq(&other, datapath) => Errno::EEXIST,
                            _ => Errno::EBUSY,
                        });
                    }
                    self.daemon.source.attach(wish.name).map_err(|error| {
                        tracing::info!("port {}: {error}", wish.name);
                        Errno(error.errno())
                    })?
                }
            },
            VportType::Gre | VportType::Vxlan | VportType::Geneve => {
                let taken = ::vport::link::by_name(wish.name).is_ok();
                let link = self.daemon.tunnel_links.by_name(wish.name);
                if taken || link.is_some() || self.find_port(wish.name).is_some() {
                    return Err(Errno::EEXIST);
                }
                let config = wish.tunnel.ok_or(Errno::EINVAL)?;
                self.tunnel_is_free(config, None)?;
                let ifindex = wish.ifindex;
                let ifindex = ifindex.unwrap_or_else(|| self.daemon.next_tunnel_ifindex());
                self.make_tunnel(wish.name, config, ifindex)?
            }
        };
        self.publish(
            datapath,
            number,
            wish.kind,
            device,
            wish.upcall_pids.clone(),
        )
    }

    /// Takes a port out of the datapath. When this returns its device is released, or gone.
    pub fn remove_port(&self, datapath: &Arc<Datapath>, number: u32) {
        let before = datapath.ports.load_full();
        let Some(port) = before.get(number).cloned() else {
            return;
        };
        datapath.ports.store(Arc::new(before.without(number)));
        drop(before);
        self.release(datapath, vec![port]);
    }

    /// Closes ports that are out of the set already.
    fn release(&self, datapath: &Datapath, ports: Vec<Arc<Vport>>) {
        self.daemon.workers.remove(&ports);
        self.daemon.drains.close(&ports);
        for port in &ports {
            wait_until_unused(port);
            let totals = port.counters.totals();
            datapath
                .departed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .add(&totals);
        }
        // The kernel waits for its readers at each device: many at once wait together.
        let own: Vec<u32> = ports.iter().filter_map(|p| p.device.own_device()).collect();
        if own.len() > 1
            && let Err(error) = ::vport::link::delete_together(&own)
        {
            // Each goes when its port is dropped.
            tracing::debug!("{error}; one by one");
        }
        let share = ports.len().div_ceil(RELEASE_THREADS).max(1);
        let mut shares = Vec::new();
        let mut rest = ports;
        while rest.len() > share {
            shares.push(rest.split_off(rest.len() - share));
        }
        std::thread::scope(|scope| {
            for share in shares {
                scope.spawn(move || drop(share));
            }
            drop(rest);
        });
    }

    fn make_internal(
        &self,
        name: &str,
        ifindex: Option<u32>,
    ) -> Result<Box<dyn ::vport::Port>, Errno> {
        let made = self.daemon.source.create_internal(name, ifindex);
        made.map_err(|error| {
            tracing::info!("internal port {name}: {error}");
            Errno(error.errno())
        })
    }

    /// Opens the tunnel that a link stands for.
    fn open_link(
        &self,
        datapath: &Arc<Datapath>,
        link: &TunnelLink,
    ) -> Result<Box<dyn ::vport::Port>, Errno> {
        if let Some((other, _)) = self.find_port(&link.name) {
            return Err(match Arc::ptr_eq(&other, datapath) {
                true => Errno::EEXIST,
                false => Errno::EBUSY,
            });
        }
        self.tunnel_is_free(link.config, Some(link.ifindex))?;
        self.make_tunnel(&link.name, link.config, link.ifindex)
    }

    /// Whether a tunnel may be made so: there is one of a kind for a UDP port. `link`: made of the link with
    /// that index.
    pub(crate) fn tunnel_is_free(
        &self,
        config: TunnelConfig,
        link: Option<u32>,
    ) -> Result<(), Errno> {
        let same = |other: &TunnelConfig| other.kind == config.kind && other.port == config.port;
        let by_port = |port: &Arc<Vport>| port.tunnel.as_ref().is_some_and(same);
        let datapaths = self.daemon.datapaths();
        let is_port = datapaths
            .iter()
            .any(|dp| dp.ports.load().iter().any(by_port));
        let is_link = self
            .daemon
            .tunnel_links
            .find(|other| same(&other.config) && link.is_none_or(|link| link != other.ifindex));
        match (is_port || is_link.is_some(), config.kind) {
            (false, _) => Ok(()),
            (true, TunnelKind::Geneve) => Err(Errno::EBUSY),
            (true, _) => Err(Errno::EEXIST),
        }
    }

    /// Opens a tunnel.
    pub(crate) fn make_tunnel(
        &self,
        name: &str,
        config: TunnelConfig,
        ifindex: u32,
    ) -> Result<Box<dyn ::vport::Port>, Errno> {
        let made = self.daemon.source.create_tunnel(name, config, ifindex);
        made.map_err(|error| {
            tracing::info!("tunnel {name}: {error}");
            Errno(error.errno())
        })
    }

    fn publish(
        &self,
        datapath: &Arc<Datapath>,
        number: u32,
        kind: VportType,
        device: Box<dyn ::vport::Port>,
        upcall_pids: Vec<u32>,
    ) -> Result<Arc<Vport>, Errno> {
        let queues = device.open_queues().map_err(|error| {
            tracing::warn!("port {}: {error}", device.name());
            Errno(error.errno())
        })?;
        let drains = &self.daemon.drains;
        let feeders = Arc::clone(&drains.feeders);
        if device.own_ring().is_some() {
            feeders.use_them();
        }
        device.on_resume(Arc::new(move || feeders.resume()));
        let port = Arc::new(Vport {
            ring: drains.ring(&*device, self.daemon.options.rings),
            number,
            kind,
            name: device.name().into(),
            tunnel: device.tunnel(),
            device,
            renamed: ArcSwap::default(),
            observed: ArcSwap::default(),
            read: AtomicBool::new(false),
            upcall_pids: ArcSwap::from_pointee(upcall_pids),
            counters: Counters::new(self.daemon.executors()),
        });
        drains.open(&port);
        let with = datapath.ports.load().with(Arc::clone(&port));
        datapath.ports.store(Arc::new(with));
        self.daemon.workers.add(datapath, &port, queues);
        Ok(port)
    }

    fn find_port(&self, name: &str) -> Option<(Arc<Datapath>, Arc<Vport>)> {
        self.daemon.find_port(name)
    }

    fn find_port_by_device(&self, name: &str) -> Option<(Arc<Datapath>, Arc<Vport>)> {
        let index = ::vport::link::by_name(name).ok()?.index;
        self.daemon.datapaths.load().iter().find_map(|dp| {
            let port = dp.ports.load().by_ifindex(index).cloned()?;
            // A TAP that moved to another namespace keeps its number there, not here.
            port.device
                .netnsid()
                .is_none()
                .then(|| (Arc::clone(dp), port))
        })
    }
}

impl Daemon {
    /// The port that was added by that name, in whichever datapath.
    pub fn find_port(&self, name: &str) -> Option<(Arc<Datapath>, Arc<Vport>)> {
        self.datapaths
            .load()
            .iter()
            .find_map(|dp| Some((Arc::clone(dp), dp.ports.load().by_name(name).cloned()?)))
    }
}

/// What a new port is to be.
#[derive(Debug)]
pub struct PortWish<'a> {
    /// The device's name.
    pub name: &'a str,
    /// Existing or to be made.
    pub kind: VportType,
    /// Its number; None: the lowest that is free.
    pub number: Option<u32>,
    /// The index that its device shall have, if it is to be made.
    pub ifindex: Option<u32>,
    /// How the tunnel is to be, if it is one.
    pub tunnel: Option<TunnelConfig>,
    /// Who reads its upcalls.
    pub upcall_pids: Vec<u32>,
}

/// Nanoseconds of the monotonic clock.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Batches that began before the port was taken out hold it through their look at the ports. They end
/// within a millisecond or so; then the caller's reference is the last.
fn wait_until_unused(port: &Arc<Vport>) {
    let deadline = Instant::now() + QUIESCE;
    while Arc::strong_count(port) > 1 {
        if Instant::now() > deadline {
            tracing::error!("port {} is still in use after {QUIESCE:?}", port.name);
            return;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}
