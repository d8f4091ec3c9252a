//! What the six families mean: requests in, answers out. Implements the netlink room's [`Handler`].
//!
//! - [`datapath`], [`vport`]: the configuration; what changes it runs on the configuration thread.
//! - [`flow`], [`packet`]: prompt; they never take the configuration lock.
//! - [`meter`]: prompt as well; its writers take a lock of their own.
//! - [`ct_limit`]: prompt; limits are the tracker's.

use std::cell::RefCell;
use std::sync::Arc;

use ::flow::table::Reclaimer;
use crossbeam_epoch::LocalHandle;
use netlink::{
    Answer, Dump, Errno, Failure, Family, Handler, Lane, Links, Protocol, Request, Service,
};

use crate::ctnetlink::Ctnetlink;
use crate::daemon::{Daemon, now_ns};
use crate::executor::Executor;
use crate::rtnetlink::Rtnetlink;

pub mod ct_limit;
pub mod datapath;
pub mod flow;
pub mod meter;
pub mod packet;
pub mod vport;

pub use netlink::family::command;

/// The daemon, as the netlink server sees it.
pub struct Server {
    daemon: Arc<Daemon>,
    ctnetlink: Ctnetlink,
    rtnetlink: Rtnetlink,
}

impl Server {
    /// Answers for `daemon`.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        let ctnetlink = Ctnetlink::new(Arc::clone(&daemon.conntrack), now_ns);
        let rtnetlink = Rtnetlink::new(Arc::clone(&daemon), None);
        Self {
            daemon,
            ctnetlink,
            rtnetlink,
        }
    }

    /// The same with links of tunnels marked for interposed programs.
    pub fn with_links(mut self, marks: Links) -> Self {
        self.rtnetlink = Rtnetlink::new(Arc::clone(&self.daemon), Some(marks));
        self
    }
}

impl Handler for Server {
    fn lane(&self, request: &Request<'_>) -> Lane {
        match (request.family, request.command) {
            (Family::Datapath | Family::Vport, command::GET) => Lane::Prompt,
            (Family::Datapath | Family::Vport, _) => Lane::MaySleep,
            _ => Lane::Prompt,
        }
    }

    fn handle(&self, request: &Request<'_>, answer: &mut Answer<'_>) -> Result<(), Failure> {
        match request.family {
            Family::Datapath => datapath::handle(&self.daemon, request, answer),
            Family::Vport => vport::handle(&self.daemon, request, answer),
            Family::Flow => flow::handle(&self.daemon, request, answer),
            Family::Packet => packet::execute(&self.daemon, request),
            Family::Meter => meter::handle(&self.daemon, request, answer),
            Family::CtLimit => ct_limit::handle(&self.daemon, request, answer),
        }
    }

    fn dump(&self, request: &Request<'_>) -> Result<Box<dyn Dump>, Failure> {
        match request.family {
            Family::Datapath => Ok(Box::new(datapath::dump(&self.daemon))),
            Family::Vport => Ok(Box::new(vport::dump(&self.daemon, request)?)),
            Family::Flow => Ok(Box::new(flow::dump(&self.daemon, request)?)),
            Family::Packet | Family::Meter | Family::CtLimit => Err(Errno::EOPNOTSUPP.into()),
        }
    }

    fn gone(&self, _port_id: u32) {
        // Its port id stays among the readers of ports until someone sets others, as in the module;
        // upcalls to it are lost, and counted, from now on.
    }

    fn before_sleep(&self) {}

    fn service(&self, protocol: Protocol) -> Option<&dyn Service> {
        match protocol {
            Protocol::Netfilter => Some(&self.ctnetlink),
            Protocol::Route => Some(&self.rtnetlink),
            Protocol::Generic => None,
        }
    }
}

/// What a thread of the server needs for packets and flows: its executor, its part in the epoch.
pub(crate) struct Context {
    pub(crate) executor: Executor,
    pub(crate) handle: LocalHandle,
}

thread_local! {
    /// Of the daemon that has that reclaimer: tests have several in a process, one after the other at the
    /// same address. Held, so that its own address isn't given to another.
    static CONTEXT: RefCell<Option<(Arc<Reclaimer>, Context)>> = const { RefCell::new(None) };
}

/// Lends the calling thread's context for `daemon`.
pub(crate) fn with_context<R>(
    daemon: &Daemon,
    work: impl FnOnce(&mut Context) -> Result<R, Failure>,
) -> Result<R, Failure> {
    CONTEXT.with_borrow_mut(|slot| {
        let context = match slot {
            Some((owner, context)) if Arc::ptr_eq(owner, &daemon.reclaimer) => context,
            _ => {
                let handle = daemon.reclaimer.register();
                let context = Context {
                    executor: daemon.new_executor()?,
                    handle,
                };
                &mut slot.insert((Arc::clone(&daemon.reclaimer), context)).1
            }
        };
        work(context)
    })
}

/// Whether a device may have that name: as the kernel's `dev_valid_name`, with one `%d` at most.
pub(crate) fn check_device_name(name: &str) -> Result<(), Errno> {
    let plain = name.replacen("%d", "", 1);
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." {
        return Err(Errno::EINVAL);
    }
    if plain.contains(|c: char| c == '/' || c == ':' || c == '%' || c.is_ascii_whitespace()) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// An array of u32 in host order, as lists of port ids are. EINVAL when it is empty or ends within one.
pub(crate) fn port_ids(payload: &[u8]) -> Result<Vec<u32>, Errno> {
    let words = payload.chunks_exact(4);
    if payload.is_empty() || !words.remainder().is_empty() {
        return Err(Errno::EINVAL);
    }
    Ok(words
        .filter_map(|word| word.first_chunk().copied())
        .map(u32::from_ne_bytes)
        .collect())
}

/// The same as attribute payload.
pub(crate) fn port_id_bytes(pids: &[u32]) -> Vec<u8> {
    pids.iter().flat_map(|pid| pid.to_ne_bytes()).collect()
}

/// How many CPUs there can be (`nr_cpu_ids`): what lists of port ids are cut to, or refused beyond.
pub(crate) fn cpu_ids() -> usize {
    std::fs::read_to_string("/sys/devices/system/cpu/possible")
        .ok()
        .and_then(|text| text.trim().rsplit(['-', ',']).next()?.parse::<usize>().ok())
        .map_or_else(
            || std::thread::available_parallelism().map_or(1, usize::from),
            |last| last + 1,
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_those_that_the_kernel_takes() {
        for good in ["br0", "in%d", "a.b", "123456789012345"] {
            assert_eq!(check_device_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a:b",
            "a b",
            "1234567890123456",
            "a%s",
            "%d%d",
        ] {
            assert_eq!(check_device_name(bad), Err(Errno::EINVAL), "{bad}");
        }
    }

    #[test]
    fn a_list_of_port_ids_has_whole_entries() {
        assert_eq!(port_ids(&[]), Err(Errno::EINVAL));
        assert_eq!(port_ids(&[1, 2, 3]), Err(Errno::EINVAL));
        assert_eq!(port_ids(&7_u32.to_ne_bytes()), Ok(vec![7]));
    }
}
