//! A daemon without a system: no threads, no sockets, no devices but ours.

use std::sync::Arc;

use crossbeam_epoch::LocalHandle;
use datapath::daemon::{Daemon, Options};
use datapath::datapath::Datapath;
use datapath::executor::{Batch, Executor};
use datapath::families;
use datapath::mailbox::{Mailbox, mailbox};
use datapath::{devices, executor};
use frame::Frame;
use netlink::attr::Writer;
use netlink::message::{self, flags};
use netlink::{Errno, Family, Hub, Loopback, Protocol};
use vport::DriverChoice;

use crate::device::{Devices, Source};

/// The daemon and its one client.
pub struct World {
    /// The daemon.
    pub daemon: Arc<Daemon>,
    /// Its devices.
    pub devices: Arc<Devices>,
    /// Takes part in the epoch.
    pub handle: LocalHandle,
    server: families::Server,
    client: Loopback,
    seq: u32,
    // Nobody reads it, but it is there: notices aren't lost.
    _notices: Mailbox<devices::Notice>,
}

/// The client's port id.
pub const PORT_ID: u32 = 0x4000_0001;

impl World {
    /// Without datapaths. `seed` is the daemon's secret.
    pub fn new(seed: u64) -> Self {
        Self::with_hub(seed, Hub::default())
    }

    /// The same with a hub that has clients.
    pub fn with_hub(seed: u64, hub: Hub) -> Self {
        let devices = Arc::<Devices>::default();
        let (sending, notices) = mailbox().expect("a descriptor");
        let options = Options {
            workers: 0,
            cpus: None,
            busy_poll: std::time::Duration::ZERO,
            rings: datapath::outlet::RingDefaults::default(),
            prompt_threads: 4,
            seed,
            max_connections: datapath::conntrack::MAX_CONNECTIONS,
            driver: DriverChoice::Auto,
            run_prefix: String::from("fuzz"),
            force_veth: false,
            notes: Vec::new(),
        };
        let daemon = Arc::new(Daemon::with_devices(
            options,
            hub.clone(),
            datapath::devices::Devices::new(sending),
            Box::new(Source(Arc::clone(&devices))),
        ));
        let mut client = Loopback::new(hub, PORT_ID);
        client.ext_ack = seed & 1 != 0;
        client.cap_ack = seed & 2 != 0;
        Self {
            handle: daemon.reclaimer.register(),
            server: families::Server::new(Arc::clone(&daemon)),
            client,
            daemon,
            devices,
            seq: 1,
            _notices: notices,
        }
    }

    /// Sends a datagram; gives the datagrams that come back.
    pub fn exchange(&self, datagram: &[u8]) -> Vec<Vec<u8>> {
        self.client.exchange(&self.server, datagram)
    }

    /// The same to another protocol's service.
    pub fn exchange_as(&self, protocol: Protocol, datagram: &[u8]) -> Vec<Vec<u8>> {
        let client = Loopback {
            protocol,
            ..self.client.clone()
        };
        client.exchange(&self.server, datagram)
    }

    /// A well-made request. Gives the messages that came back, or the error.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn request(
        &mut self,
        family: Family,
        command: u8,
        dp_ifindex: i32,
        more: u16,
        build: impl FnOnce(&mut Writer<'_>),
    ) -> Result<Vec<Vec<u8>>, Errno> {
        self.seq += 1;
        let mut bytes = Vec::new();
        let flags = flags::REQUEST | more;
        let begun = message::begin(&mut bytes, family, command, dp_ifindex, flags, self.seq, 0);
        build(&mut Writer::new(&mut bytes));
        message::finish(&mut bytes, begun);
        let mut replies = Vec::new();
        for reply in self
            .exchange(&bytes)
            .iter()
            .flat_map(|datagram| crate::wire::messages(datagram))
        {
            match (reply.kind, reply.error()) {
                (_, Some(0)) => {}
                (_, Some(errno)) => return Err(Errno(errno)),
                _ => replies.push(reply.bytes),
            }
        }
        Ok(replies)
    }

    /// The datapath of that name.
    pub fn datapath(&self, name: &str) -> Option<Arc<Datapath>> {
        self.daemon.by_name(name)
    }

    /// Makes a datapath; its ifindex.
    pub fn add_datapath(&mut self, name: &str) -> i32 {
        self.request(Family::Datapath, 1, 0, 0, |writer| {
            writer.name(1, name).expect("short");
            writer.u32(2, 0);
            writer.u32(5, 0);
        })
        .expect("a datapath");
        self.datapath(name).expect("it was made").ifindex
    }

    /// Adds a port (`v...`: netdev, else internal).
    pub fn add_port(&mut self, dp_ifindex: i32, number: u32, name: &str) {
        let kind = if name.starts_with(['v', 'p']) { 1 } else { 2 };
        self.request(Family::Vport, 1, dp_ifindex, 0, |writer| {
            writer.u32(1, number);
            writer.u32(2, kind);
            writer.name(3, name).expect("short");
            writer.u32(5, 0);
        })
        .expect("a port");
    }

    /// Carries frames that came out of a port.
    pub fn receive(
        &self,
        executor: &mut Executor,
        dp: &Datapath,
        port: u32,
        frames: &mut Vec<Frame>,
    ) {
        let ports = dp.ports.load();
        let guard = self.handle.pin();
        let mut batch: Batch<'_> = executor::Batch::new(dp, &ports, &guard, 1);
        executor.receive(&mut batch, port, frames);
        executor.flush(&batch);
    }

    /// Frees what has been let go. Tells how much couldn't be.
    pub fn reap(&self) -> usize {
        for _ in 0..8 {
            if self.daemon.reclaimer.pending() == 0 {
                break;
            }
            self.daemon.reclaimer.reap(&self.handle);
        }
        self.daemon.reclaimer.pending()
    }
}
