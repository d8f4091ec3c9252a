//! Follows what happens to the ports' devices: renamed, changed, deleted, moved to another namespace.
//!
//! As in the module, a port whose device is deleted or moved goes, with a notification that nobody asked
//! for (pid 0, seq 0); an internal port's device may move and stays a port; a renamed device is found by
//! its number only.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use ::vport::{LinkEvent, LinkMonitor};
use crossbeam_epoch::LocalHandle;
use netlink::{Family, Group};
use rustix::event::{PollFd, PollFlags, poll};

use crate::daemon::Daemon;
use crate::datapath::Datapath;
use crate::families;
use crate::mailbox::{Mailbox, Sending};
use crate::vport::{Vport, VportType};

/// What the devices thread is told.
#[derive(Clone, Copy, Debug)]
pub enum Notice {
    /// A worker met the end of a port's device.
    Gone {
        /// The datapath's ifindex.
        datapath: i32,
        /// The port's number.
        port: u32,
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

/// The devices thread's life: until [`Notice::Stop`].
pub fn follow(daemon: &Daemon, mail: &Mailbox<Notice>, mut monitor: LinkMonitor) {
    let handle = daemon.reclaimer.register();
    let mut events = Vec::new();
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(mail.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN),
        ];
        if let Err(errno) = poll(&mut fds, None)
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
                        remove(daemon, &handle, &datapath, port);
                    }
                }
            }
        }
        if look {
            observe(daemon);
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
                let number = port.number;
                // The removal waits until nobody holds the port.
                drop(port);
                remove(daemon, handle, &datapath, number);
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

/// Takes out a port whose device is gone, with a notification that nobody asked for.
pub(crate) fn remove(daemon: &Daemon, handle: &LocalHandle, datapath: &Arc<Datapath>, number: u32) {
    let configuration = daemon.configure();
    let Some(port) = datapath.ports.load().get(number).cloned() else {
        return;
    };
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
