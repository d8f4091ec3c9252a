//! Keeps what a port's device receives from the host's own stack, as the module's rx_handler does.
//!
//! Packet sockets are served before either of the two means here, so they still see everything.
//! Neither is a queueing discipline: ovs-vswitchd deletes and sets the `ingress` one of each port.
//!
//! | means | needs | when this process is killed |
//! |---|---|---|
//! | tcx link (bpf) | Linux 6.6, CAP_BPF in the initial user namespace | goes with its descriptor |
//! | nftables netdev chain, policy drop | CAP_NET_ADMIN in the namespace | goes with its socket (table flag `owner`, Linux 5.12), else [`cleanup`](crate::cleanup) |
//!
//! What the host itself transmits on the device isn't seen by the port, as with the module.
//!
//! Source: uapi `linux/netfilter/nf_tables.h`, `linux/netfilter/nfnetlink.h`.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rustix::io::Errno;

use crate::nl::{self, Client, Message};
use crate::open::HideChoice;
use crate::sys::bpf::{self, ProgramLink};

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = (SUBSYSTEM << 8) | 1;
const DEL_TABLE: u16 = (SUBSYSTEM << 8) | 2;
const NEW_CHAIN: u16 = (SUBSYSTEM << 8) | 3;
const FAMILY_NETDEV: u8 = 5;
const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const TABLE_OWNER: u16 = 7;
const TABLE_F_OWNER: u32 = 2;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const HOOK_DEVICE: u16 = 3;
const NETDEV_INGRESS: u32 = 0;
const POLICY_DROP: u32 = 0;
/// In front of whatever else is there.
const PRIORITY: i32 = -10_000;
const PREFIX: &str = "ovs_dpd_";

/// Makes this process's tables differ.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Undone when dropped.
#[derive(Debug)]
pub(crate) enum Hide {
    /// By a tcx link.
    Tcx { _link: ProgramLink },
    /// By an nftables chain; why not by a tcx link.
    Nft {
        _table: NftTable,
        tcx: Option<Errno>,
    },
    /// Not wanted.
    Off,
    /// Not possible: why not by a tcx link, why not by nftables.
    Failed { tcx: Option<Errno>, nft: Errno },
}

impl Hide {
    /// Hides what the device receives from now on, if that can be done.
    pub(crate) fn new(choice: HideChoice, ifindex: u32, name: &str, run_prefix: &str) -> Self {
        let tcx = match choice {
            HideChoice::Off => return Self::Off,
            HideChoice::Nftables => None,
            HideChoice::Auto => match bpf::drop_ingress(ifindex) {
                Ok(link) => return Self::Tcx { _link: link },
                Err(errno) => Some(errno),
            },
        };
        match NftTable::new(ifindex, name, run_prefix) {
            Ok(table) => Self::Nft { _table: table, tcx },
            Err(nft) => {
                let failed = Self::Failed { tcx, nft };
                tracing::warn!("{name}: {}", failed.describe());
                failed
            }
        }
    }

    /// For `status`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Tcx { .. } => String::from("hidden by tcx"),
            Self::Nft { tcx, .. } => format!("hidden by nftables (tcx: {})", why(*tcx)),
            Self::Off => String::from("not hidden from the host's stack (as asked)"),
            Self::Failed { tcx, nft } => {
                format!(
                    "NOT hidden from the host's stack (tcx: {}; nftables: {nft})",
                    why(*tcx)
                )
            }
        }
    }
}

fn why(tcx: Option<Errno>) -> String {
    tcx.map_or_else(|| String::from("not wanted"), |errno| errno.to_string())
}

/// A table with one chain on one device, that drops everything.
#[derive(Debug)]
pub(crate) struct NftTable {
    /// Owns the table: it goes with the socket.
    client: Client,
    name: String,
}

/// Letters, digits and `_` of a prefix: what an nftables name may hold.
fn sanitized(run_prefix: &str) -> String {
    run_prefix
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '_')
        .take(64)
        .collect()
}

/// `struct nfgenmsg`.
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn client() -> Result<Client, Errno> {
    Client::new(libc::NETLINK_NETFILTER as isize)
}

/// All of these changes or none.
fn transaction(client: &mut Client, changes: Vec<Message>) -> Result<(), Errno> {
    let mark = |kind| {
        let mut message = Message::new(kind, 0);
        message.raw(&header(0, SUBSYSTEM));
        message
    };
    let mut batch = vec![mark(BATCH_BEGIN)];
    batch.extend(changes);
    batch.push(mark(BATCH_END));
    client.batch(batch)
}

fn delete_table(client: &mut Client, name: &str) -> Result<(), Errno> {
    let mut message = Message::new(DEL_TABLE, nl::ACK);
    message
        .raw(&header(FAMILY_NETDEV, 0))
        .attr_str(TABLE_NAME, name);
    transaction(client, vec![message])
}

impl NftTable {
    fn new(ifindex: u32, device: &str, run_prefix: &str) -> Result<Self, Errno> {
        let mut client = client()?;
        let mut owner = TABLE_F_OWNER;
        for _ in 0..64 {
            // The same device may be a port again before the queues of the last one are closed.
            let number = NUMBER.fetch_add(1, Relaxed);
            let name = format!("{PREFIX}{}_{ifindex}_{number}", sanitized(run_prefix));
            match Self::create(&mut client, &name, device, owner) {
                Ok(()) => return Ok(Self { client, name }),
                // Left behind by a dead daemon.
                Err(Errno::EXIST) => {}
                // A kernel that doesn't know the flag.
                Err(Errno::OPNOTSUPP | Errno::INVAL) if owner != 0 => owner = 0,
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::EXIST)
    }

    fn create(client: &mut Client, name: &str, device: &str, flags: u32) -> Result<(), Errno> {
        let mut table = Message::new(NEW_TABLE, nl::CREATE | nl::EXCL);
        table
            .raw(&header(FAMILY_NETDEV, 0))
            .attr_str(TABLE_NAME, name)
            .attr(TABLE_FLAGS, &flags.to_be_bytes());
        let mut chain = Message::new(NEW_CHAIN, nl::CREATE | nl::ACK);
        chain
            .raw(&header(FAMILY_NETDEV, 0))
            .attr_str(CHAIN_TABLE, name)
            .attr_str(CHAIN_NAME, "ingress")
            .nested(CHAIN_HOOK, |hook| {
                hook.attr(HOOK_NUMBER, &NETDEV_INGRESS.to_be_bytes())
                    .attr(HOOK_PRIORITY, &PRIORITY.to_be_bytes())
                    .attr_str(HOOK_DEVICE, device);
            })
            .attr(CHAIN_POLICY, &POLICY_DROP.to_be_bytes())
            .attr_str(CHAIN_TYPE, "filter");
        transaction(client, vec![table, chain])
    }
}

impl Drop for NftTable {
    fn drop(&mut self) {
        match delete_table(&mut self.client, &self.name) {
            // ENOENT: it went with its device, or with the namespace.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => tracing::warn!("nftables table {}: {errno}", self.name),
        }
    }
}

/// Whether this is what follows the prefix in a table's name: ifindex, `_`, number. (A longer one
/// belongs to a prefix that begins as ours does.)
fn is_numbering(rest: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    rest.split_once('_')
        .is_some_and(|(index, number)| digits(index) && digits(number))
}

/// Deletes the tables that a killed daemon of this prefix left behind; gives their names. Those that
/// a living process owns aren't touched.
pub(crate) fn cleanup(run_prefix: &str) -> Result<Vec<String>, Errno> {
    let prefix = format!("{PREFIX}{}_", sanitized(run_prefix));
    let mut client = match client() {
        // A kernel without netfilter has none of its tables.
        Err(Errno::PROTONOSUPPORT) => return Ok(Vec::new()),
        client => client?,
    };
    let mut names = Vec::new();
    let mut message = Message::new(GET_TABLE, nl::DUMP);
    message.raw(&header(FAMILY_NETDEV, 0));
    let dumped = client.query(message, |kind, payload| {
        if kind != NEW_TABLE {
            return;
        }
        let (mut name, mut owned) = (String::new(), false);
        for (kind, value) in nl::attributes(payload.get(4..).unwrap_or_default()) {
            match kind {
                TABLE_NAME => name = nl::str_of(value),
                TABLE_OWNER => owned = true,
                _ => {}
            }
        }
        let ours = name.strip_prefix(&prefix).is_some_and(is_numbering);
        if ours && !owned {
            names.push(name);
        }
    });
    match dumped {
        Err(Errno::OPNOTSUPP | Errno::INVAL) => return Ok(Vec::new()),
        result => result?,
    }
    for name in &names {
        delete_table(&mut client, name)?;
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_holds_only_what_a_name_may() {
        assert_eq!(sanitized("/run/ovs-dpd x_1"), "runovsdpdx_1");
    }

    #[test]
    fn tables_of_a_longer_prefix_are_not_ours() {
        assert!(is_numbering("5_0"));
        for other in ["5", "5_", "_0", "5_0_1", "a_5_0", "5_0a"] {
            assert!(!is_numbering(other), "{other}");
        }
    }
}
