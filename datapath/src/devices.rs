//! Follows what happens to the ports' devices: renamed, changed, deleted, moved to another namespace.
//!
//! As in the module, a port whose device is deleted or moved goes, with a notification that nobody asked
//! for (pid 0, seq 0); an internal port's device may move and stays a port; a renamed device is found by
//! its number only.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use ::vport::{LinkEvent, LinkMonitor};
use crossbeam_epoch::LocalHandle;
use netlink::{Family, Group};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::daemon::Daemon;
use crate::datapath::Datapath;
use crate::families;
use crate::mailbox::{Mailbox, Sending};
use crate::vport::{Vport, VportType};

/// What the devices thread is told.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A worker met the end of a port's device.
    Gone {
        /// The datapath's ifindex.
        datapath: i32,
        /// The port, which may be out already, its number another's.
        port: Weak<Vport>,
    },
    /// Somebody reads what the kernel tells of ports: ask it again.
    Look,
    /// The daemon ends.
    Stop,
}

/// The way to the devices thread.
#[derive(Debug)]
pub struct Devices {
    mail: Mutex<Sending<Notice>>,
}

impl Devices {
    /// Notices go by `mail`.
    pub fn new(mail: Sending<Notice>) -> Self {
        Self {
            mail: Mutex::new(mail),
        }
    }

    /// What the kernel tells of this port is being read: the next reader shall find it newer. Costs the
    /// caller no wait, whatever the kernel's RTNL lock is busy with.
    pub fn look(&self, port: &Vport) {
        if !port.read.swap(true, Ordering::Relaxed) {
            self.notify(Notice::Look);
        }
    }

    /// Tells the devices thread.
    pub fn notify(&self, notice: Notice) {
        self.mail
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(notice);
    }
}

/// How often the ports are looked after, which nobody else may do for a long time.
const CARE: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// The devices thread's life: until [`Notice::Stop`].
pub fn follow(daemon: &Daemon, mail: &Mailbox<Notice>, mut monitor: LinkMonitor) {
    let handle = daemon.reclaimer.register();
    let mut events = Vec::new();
    let mut cared = Instant::now();
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(mail.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN),
        ];
        if let Err(errno) = poll(&mut fds, Some(&CARE))
            && errno != rustix::io::Errno::INTR
        {
            tracing::error!("devices: poll: {errno}: changes of devices go unnoticed from now on");
            return;
        }
        mail.acknowledge();
        let mut look = false;
        while let Some(notice) = mail.next() {
            match notice {
                Notice::Stop => return,
                Notice::Look => look = true,
                Notice::Gone { datapath, port } => {
                    if let Some(datapath) = daemon.by_ifindex(datapath) {
                        remove(daemon, &handle, &datapath, &port);
                    }
                }
            }
        }
        if look {
            observe(daemon);
        }
        if cared.elapsed().as_secs() >= CARE.tv_sec.unsigned_abs() {
            for datapath in daemon.datapaths().iter() {
                let ports = datapath.ports.load_full();
                ports.iter().for_each(|port| port.device.look_after());
            }
            cared = Instant::now();
        }
        if let Err(error) = monitor.receive(&mut events) {
            tracing::warn!("devices: {error}");
        }
        for event in events.drain(..) {
            apply(daemon, &handle, &event);
        }
    }
}

fn apply(daemon: &Daemon, handle: &LocalHandle, event: &LinkEvent) {
    let index = match event {
        LinkEvent::New(link) => link.index,
        LinkEvent::Renamed { link, .. } => link.index,
        LinkEvent::Gone { index, .. } => *index,
    };
    let Some((datapath, port)) = find(daemon, index) else {
        return;
    };
    match event {
        LinkEvent::New(link) => port.device.link_changed(link),
        LinkEvent::Renamed { link, .. } => {
            let name = (*link.name != *port.name).then(|| link.name.clone().into_boxed_str());
            port.renamed.store(Arc::new(name));
            port.device.link_changed(link);
        }
        LinkEvent::Gone { .. } => {
            // An internal device that only moved is still ours; its queue tells when it is gone.
            port.observe();
            if port.kind != VportType::Internal || port.observed.load().netnsid.is_none() {
                let gone = Arc::downgrade(&port);
                // The removal waits until nobody holds the port.
                drop(port);
                remove(daemon, handle, &datapath, &gone);
            }
        }
    }
}

fn observe(daemon: &Daemon) {
    for datapath in daemon.datapaths().iter() {
        let ports = datapath.ports.load_full();
        for port in ports
            .iter()
            .filter(|port| port.read.swap(false, Ordering::Relaxed))
        {
            port.observe();
        }
    }
}

fn find(daemon: &Daemon, index: u32) -> Option<(Arc<Datapath>, Arc<Vport>)> {
    daemon.datapaths().iter().find_map(|datapath| {
        let port = datapath.ports.load().by_ifindex(index).cloned()?;
        Some((Arc::clone(datapath), port))
    })
}

/// Takes out a port whose device is gone, with a notification that nobody asked for. Nothing happens if it
/// is out already: whoever tells of it hasn't got the configuration's lock, and in the meantime a client
/// may have deleted the port and made another of the same number.
pub(crate) fn remove(
    daemon: &Daemon,
    handle: &LocalHandle,
    datapath: &Arc<Datapath>,
    gone: &Weak<Vport>,
) {
    let configuration = daemon.configure();
    let Some(port) = gone.upgrade() else {
        return;
    };
    let number = port.number;
    let is_there = |there: &Arc<Vport>| Arc::ptr_eq(there, &port);
    if !datapath.ports.load().get(number).is_some_and(is_there) {
        return;
    }
    tracing::info!(
        "port {} of {}: its device is gone",
        port.name,
        datapath.name
    );
    let announced = daemon.hub.announce(
        Group::Vport,
        Family::Vport,
        netlink::family::command::DEL,
        datapath.ifindex,
        |writer| families::vport::write(writer, datapath, &port),
    );
    if let Err(errno) = announced {
        tracing::warn!("port {}: its end can't be announced: {errno}", port.name);
    }
    drop(port);
    if number == 0 {
        // Without its local device a datapath can't be named any more.
        configuration.remove_datapath(handle, datapath);
    } else {
        configuration.remove_port(datapath, number);
    }
}

#[cfg(test)]
mod tests {
    use netlink::Hub;

    use super::*;
    use crate::daemon::{Options, PortWish};
    use crate::datapath::Settings;
    use crate::mailbox::mailbox;

    /// The end of a port's device is told while a client deletes the port and makes another of its number.
    #[test]
    fn the_port_that_has_a_gone_ports_number_now_stays() {
        let run = || {
            #[expect(deprecated)] // the flag that makes it unsafe isn't used
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            let options = Options {
                workers: 1,
                cpus: None,
                busy_poll: std::time::Duration::ZERO,
                prompt_threads: 1,
                seed: 1,
                max_connections: 16,
                rings: crate::outlet::RingDefaults::default(),
                driver: ::vport::DriverChoice::AfPacket,
                run_prefix: "test".into(),
                force_veth: false,
                notes: Vec::new(),
            };
            let (notices, _mail) = mailbox().unwrap();
            let daemon = Daemon::new(options, Hub::default(), Devices::new(notices));
            let handle = daemon.reclaimer.register();
            let configuration = daemon.configure();
            let datapath = configuration
                .add_datapath(&handle, "dp1", None, Settings::default(), Vec::new())
                .unwrap();
            let add = |name| {
                let wish = PortWish {
                    name,
                    kind: VportType::Internal,
                    number: Some(1),
                    ifindex: None,
                    tunnel: None,
                    upcall_pids: Vec::new(),
                };
                Arc::downgrade(&configuration.add_port(&datapath, &wish).unwrap())
            };
            let first = add("p1");
            configuration.remove_port(&datapath, 1);
            let second = add("p2");
            drop(configuration);
            remove(&daemon, &handle, &datapath, &first);
            assert!(second.upgrade().is_some(), "another port was taken out");
            remove(&daemon, &handle, &datapath, &second);
            assert!(second.upgrade().is_none());
            assert!(datapath.ports.load().get(1).is_none());
        };
        std::thread::spawn(run).join().unwrap();
    }
}
