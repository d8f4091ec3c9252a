//! What the host's kernel knows of the way to an address: its MTU, our address there; and which addresses
//! are ours.
//!
//! Asked by connecting a UDP socket, which sends nothing and takes no lock of the network's
//! configuration. Answers are used for a second: routes that change are followed by the sockets that send
//! at once, and by these answers then.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use frame::tunnel::{TunnelKey, V6, outer};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::sys::inet;

const FRESH: Duration = Duration::from_secs(1);
/// Beyond so many answers all are asked for anew.
const MOST: usize = 4096;

/// The way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Longest IP packet that goes there uncut.
    pub mtu: u32,
    /// The address that packets are sent from.
    pub source: IpAddr,
}

/// An address of a key.
pub(super) fn address(family: u8, place: &[u8; 16]) -> IpAddr {
    match family {
        V6 => IpAddr::V6(Ipv6Addr::from(*place)),
        _ => IpAddr::V4(Ipv4Addr::from(outer::first4(place))),
    }
}

/// The way that a key asks for, for packets of this mark.
pub(super) fn ends(key: &TunnelKey, mark: u32) -> Ends {
    let from = address(key.family, &key.src);
    Ends {
        to: address(key.family, &key.dst),
        from: (!from.is_unspecified()).then_some(from),
        mark,
    }
}

fn domain(address: IpAddr) -> Domain {
    match address {
        IpAddr::V4(_) => Domain::IPV4,
        IpAddr::V6(_) => Domain::IPV6,
    }
}

fn ask(Ends { to, from, mark }: Ends) -> std::io::Result<Path> {
    let socket = Socket::new(domain(to), Type::DGRAM, Some(Protocol::UDP))?;
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    if let Some(from) = from {
        socket.bind(&SockAddr::from(SocketAddr::new(from, 0)))?;
    }
    // Any port: nothing is sent.
    socket.connect(&SockAddr::from(SocketAddr::new(to, 9)))?;
    let mtu = inet::path_mtu(socket.as_fd(), to.is_ipv6())?;
    let source = socket.local_addr()?.as_socket();
    let source = source.ok_or(std::io::ErrorKind::AddrNotAvailable)?.ip();
    Ok(Path { mtu, source })
}

/// Answers about ways, shared by those who send.
#[derive(Debug, Default)]
pub(super) struct Paths {
    known: Mutex<HashMap<Ends, (Instant, Path)>>,
}

/// What a way depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ends {
    /// To where.
    pub(super) to: IpAddr,
    /// From which address, if that is said.
    pub(super) from: Option<IpAddr>,
    /// The packets' mark, which rules may go by.
    pub(super) mark: u32,
}

impl Paths {
    /// The way between two addresses.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn find(&self, ends: Ends) -> std::io::Result<Path> {
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((asked, path)) = known.get(&ends)
            && now.duration_since(*asked) < FRESH
        {
            return Ok(*path);
        }
        let path = ask(ends)?;
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(ends, (now, path));
        Ok(path)
    }

    /// What is known of that way is wrong.
    pub(super) fn forget(&self, ends: Ends) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(&ends);
    }
}

/// Which addresses are the host's own: packets for others only pass by. For one receiver.
#[derive(Debug, Default)]
pub(super) struct Own {
    known: HashMap<IpAddr, (Instant, bool)>,
}

impl Own {
    /// Whether the host receives what is sent to that address.
    pub(super) fn is_own(&mut self, address: IpAddr, now: Instant) -> bool {
        if let IpAddr::V6(address) = address
            && address.is_unicast_link_local()
        {
            // Nobody forwards these.
            return true;
        }
        if let Some((asked, own)) = self.known.get(&address)
            && now.duration_since(*asked) < FRESH
        {
            return *own;
        }
        if self.known.len() >= MOST {
            self.known.clear();
        }
        let own = Socket::new(domain(address), Type::DGRAM, Some(Protocol::UDP))
            .and_then(|socket| socket.bind(&SockAddr::from(SocketAddr::new(address, 0))))
            .is_ok();
        self.known.insert(address, (now, own));
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_ours_and_the_way_to_it_is_wide() {
        let run = || {
            #[expect(deprecated)] // the flag that makes it unsafe isn't used
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            let ip = |line: &str| {
                let mut ip = std::process::Command::new("ip");
                assert!(ip.args(line.split(' ')).status().unwrap().success());
            };
            ip("link set lo up");
            let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let paths = Paths::default();
            let to = |to| Ends {
                to,
                from: None,
                mark: 0,
            };
            let path = paths.find(to(here)).unwrap();
            assert_eq!((path.mtu, path.source), (65_535, here));
            let far = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
            assert!(paths.find(to(far)).is_err());
            let mut own = Own::default();
            assert!(own.is_own(here, Instant::now()));
            assert!(!own.is_own(far, Instant::now()));
            // A way that came is found; one that changed is found when what was known is forgotten.
            ip("link add d0 mtu 1400 type ifb");
            ip("link set d0 up");
            ip("addr add 192.0.2.2/24 dev d0");
            assert_eq!(paths.find(to(far)).unwrap().mtu, 1400);
            ip("link set d0 mtu 1300");
            assert_eq!(paths.find(to(far)).unwrap().mtu, 1400);
            paths.forget(to(far));
            assert_eq!(paths.find(to(far)).unwrap().mtu, 1300);
        };
        std::thread::spawn(run).join().unwrap();
    }
}
