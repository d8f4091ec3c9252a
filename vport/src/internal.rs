//! Internal ports: devices of our own, whose other end is the datapath.

use std::hash::{BuildHasher, Hasher};

use crate::af_packet::{AfPacket, Face};
use crate::error::Error;
use crate::link::change::Deleter;
use crate::link::{self, Veth};
use crate::open::AttachOptions;
use crate::port::{Driver, Port};
use crate::tap::{Tap, TapError};

/// The most that a veth takes.
const HIDDEN_MTU: u32 = 65_535;

/// How to make an internal port.
#[derive(Clone, Debug)]
pub struct InternalOptions {
    /// Its hardware address; otherwise a random, locally administered one.
    pub mac: Option<[u8; 6]>,
    /// Bytes; otherwise 1500.
    pub mtu: Option<u32>,
    /// How many packets the host may queue before the datapath reads them; otherwise the kernel's
    /// 1000.
    pub tx_queue_len: Option<u32>,
    /// Its index; otherwise the kernel chooses.
    pub ifindex: Option<u32>,
    /// Use a veth pair even where a TAP would do.
    pub force_veth: bool,
    /// As in [`AttachOptions`](crate::AttachOptions).
    pub run_prefix: String,
}

impl Default for InternalOptions {
    fn default() -> Self {
        Self {
            mac: None,
            mtu: None,
            tx_queue_len: None,
            ifindex: None,
            force_veth: false,
            run_prefix: String::from("dpd"),
        }
    }
}

/// Makes the device `name` (a template such as `br%d` gets a number) in the calling thread's network
/// namespace and opens a port on it. The device is there, and down, when this returns; it goes when
/// the port and its queues have been dropped.
///
/// # Errors
/// `EEXIST`: there is a device of that name or index. `EINVAL`: a bad name. `EPERM`: not allowed to make one.
pub fn create_internal(name: &str, options: &InternalOptions) -> Result<Box<dyn Port>, Error> {
    let why = if options.force_veth {
        String::from("as asked")
    } else {
        match Tap::create(name, options) {
            Ok(tap) => return Ok(Box::new(tap)),
            Err(TapError::Refused(error)) => return Err(error),
            Err(TapError::Closed(errno)) => format!("/dev/net/tun: {errno}"),
        }
    };
    create_pair(name, options, why).map(|port| Box::new(port) as Box<dyn Port>)
}

/// How the hidden end of a pair is marked for [`cleanup`].
fn alias(run_prefix: &str) -> String {
    format!("ovs-dpd:{run_prefix}")
}

/// Deletes the pair, wherever its other end has gone.
struct Pair {
    hidden: Deleter,
}

impl Drop for Pair {
    fn drop(&mut self) {
        match self.hidden.delete() {
            Err(error) if !error.is_gone() => tracing::warn!("{error}"),
            _ => {}
        }
    }
}

fn create_pair(name: &str, options: &InternalOptions, why: String) -> Result<AfPacket, Error> {
    if !link::is_valid_name(name) {
        return Err(Error::new(libc::EINVAL, format!("device {name}")));
    }
    // Names only have to differ; a clash is tried again.
    let mut hidden_name = String::new();
    for attempt in 0.. {
        if link::by_name(name).is_ok() {
            return Err(Error::new(libc::EEXIST, format!("device {name}")));
        }
        let random = std::hash::RandomState::new().build_hasher().finish() as u32;
        hidden_name = format!("dpd-{random:08x}");
        let veth = Veth {
            name,
            peer: &hidden_name,
            ifindex: options.ifindex,
            mac: options.mac,
            mtu: options.mtu,
            // What the named end may send, whatever its MTU becomes, the hidden one must take.
            peer_mtu: Some(HIDDEN_MTU),
            peer_silent: true,
        };
        match link::create_veth(&veth) {
            Ok(()) => break,
            Err(error) if error.errno() == libc::EEXIST && attempt < 8 => {}
            Err(error) => return Err(error),
        }
    }
    let hidden = link::by_name(&hidden_name)?;
    let pair = Pair {
        hidden: Deleter::new(hidden.index)?,
    };
    link::set_alias(hidden.index, &alias(&options.run_prefix))?;
    let face = link::by_index(
        hidden
            .link
            .ok_or_else(|| Error::new(libc::ENODEV, format!("peer of {hidden_name}")))?,
    )?;
    if let Some(packets) = options.tx_queue_len {
        link::set_tx_queue_len(face.index, packets)?;
    }
    link::set_up(hidden.index, true)?;
    let attach = AttachOptions {
        run_prefix: options.run_prefix.clone(),
        ..Default::default()
    };
    let face = Face {
        driver: Driver::Veth,
        link: face,
        guard: Some(Box::new(pair)),
        note: Some(format!("no TAP ({why})")),
    };
    AfPacket::open(hidden, &attach, Some(face))
}

/// Deletes the pairs that a killed daemon of this prefix left behind; gives their names.
pub(crate) fn cleanup(run_prefix: &str) -> Result<Vec<String>, Error> {
    let mark = alias(run_prefix);
    let mut removed = Vec::new();
    for link in link::all()? {
        if link.kind.as_deref() == Some("veth") && link.alias.as_ref() == Some(&mark) {
            match link::delete(link.index) {
                Err(error) if !error.is_gone() => return Err(error),
                _ => removed.push(link.name),
            }
        }
    }
    Ok(removed)
}
