//! A client with a real socket: upcalls reach it as they reach ovs-vswitchd.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;

use netlink::transport::{self, Hello, Netns, Welcome};
use rustix::fd::OwnedFd;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recv, send,
};

/// Connects to the daemon of that run directory, from the network namespace that `netns` (a file of
/// /proc) names. Gives the socket and its port id.
///
/// # Errors
/// Those of the system, or the daemon refuses.
pub fn connect(run_dir: &Path, netns: &Path) -> std::io::Result<(OwnedFd, u32)> {
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    let path = run_dir.join(transport::SOCKET_NAME);
    rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)?;
    let netns = std::fs::metadata(netns)?;
    let hello = Hello {
        version: transport::VERSION,
        protocol: transport::NETLINK_GENERIC,
        netns: Netns {
            dev: netns.dev(),
            ino: netns.ino(),
        },
    };
    send(&socket, &hello.to_bytes(), SendFlags::NOSIGNAL)?;
    let mut bytes = [0; transport::WELCOME_LEN];
    recv(&socket, &mut bytes, RecvFlags::empty())?;
    match Welcome::parse(&bytes) {
        Some(welcome) if welcome.port_id != 0 => Ok((socket, welcome.port_id)),
        other => Err(std::io::Error::other(format!("no welcome: {other:?}"))),
    }
}

/// Reads all that comes and looks whether it is whole.
pub struct Reader {
    /// Its port id.
    pub port_id: u32,
    read: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Reader {
    /// Reads until the daemon closes.
    pub fn start(socket: OwnedFd, port_id: u32) -> Self {
        let read = Arc::<AtomicU64>::default();
        let counts = Arc::clone(&read);
        let thread = std::thread::spawn(move || {
            let mut room = vec![0; 1 << 18];
            loop {
                match recv(&socket, &mut room, RecvFlags::empty()) {
                    Ok((0, _)) | Err(_) => return,
                    Ok((len, _)) => {
                        for message in crate::wire::messages(&room[..len]) {
                            if message.bytes.len() > 24 {
                                check(&message);
                            }
                            counts.fetch_add(1, Relaxed);
                        }
                    }
                }
            }
        });
        Self {
            port_id,
            read,
            thread,
        }
    }

    /// Waits until the daemon has closed. How many messages came.
    ///
    /// # Panics
    /// When one of them wasn't whole.
    pub fn end(self) -> u64 {
        assert!(
            self.thread.join().is_ok(),
            "the reader met what isn't whole"
        );
        self.read.load(Relaxed)
    }
}

/// An upcall: a packet and its key, nested attributes whole.
fn check(message: &crate::wire::Message) {
    // The last attribute isn't padded where the client said so.
    let attributes = message.attributes();
    let key = crate::wire::last(&attributes, 2).expect("a key");
    assert!(!crate::wire::attributes(key).is_empty());
    assert!(crate::wire::last(&attributes, 1).is_some(), "a packet");
    if let Some(actions) = crate::wire::last(&attributes, 3) {
        crate::wire::attributes(actions);
    }
}
