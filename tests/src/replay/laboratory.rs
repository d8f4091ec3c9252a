//! The devices that the recordings were made with: `va`, `vb`, `vc` (and `vd`), veths whose other ends are
//! `pa`, `pb`, `pc`; and frames in and out of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::lab::Lab;
use crate::namespace::ip;
use crate::replay::client::{self, Client};
use crate::replay::session::errno;
use crate::sys::PacketSocket;

/// The end of a name at the recordings' ports, by the port's number; and the device that is captured.
pub const CAPTURED: [(u32, &str); 6] = [
    (1, "pa"),
    (2, "pb"),
    (3, "pc"),
    (6, "int0"),
    (0, "dpa"),
    (UNDERLAY, "pu"),
];

/// Stands for the wire under the tunnels among the ports' numbers.
pub const UNDERLAY: u32 = u32::MAX;

/// How long what is expected may take.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Makes a veth `v<end>`, its peer `p<end>`, both up and without offloads.
///
/// # Errors
/// Those of `ip` and `ethtool`.
pub fn cable(lab: &Lab, end: char, mtu: u32) -> Result<()> {
    let host = lab.host();
    let (near, far) = (format!("v{end}"), format!("p{end}"));
    host.ip(["link", "add", &near, "type", "veth", "peer", "name", &far])?;
    for device in [near, far] {
        offloads(lab, &device, false)?;
        host.ip(["link", "set", &device, "mtu", &mtu.to_string(), "up"])?;
    }
    Ok(())
}

/// The wire under the tunnels: `un` with addresses, and `pu`, whose neighbour is known.
///
/// # Errors
/// Those of `ip` and `ethtool`.
pub fn underlay(lab: &Lab) -> Result<()> {
    let host = lab.host();
    host.ip("link add un type veth peer name pu")?;
    host.inside(|| std::fs::write("/proc/sys/net/ipv6/conf/un/disable_ipv6", "0"))??;
    for (device, address) in [("un", "02:00:00:00:aa:01"), ("pu", "02:00:00:00:aa:02")] {
        offloads(lab, device, false)?;
        host.ip(["link", "set", device, "address", address, "up"])?;
    }
    for words in [
        "addr add 172.16.0.1/24 dev un",
        "addr add fd77::1/64 dev un nodad",
        "neigh replace 172.16.0.2 lladdr 02:00:00:00:aa:02 dev un nud permanent",
        "neigh replace fd77::2 lladdr 02:00:00:00:aa:02 dev un nud permanent",
    ] {
        host.ip(words)?;
    }
    Ok(())
}

/// Turns a device's offloads on or off.
///
/// # Errors
/// Those of `ethtool`.
pub fn offloads(lab: &Lab, device: &str, on: bool) -> Result<()> {
    let state = if on { "on" } else { "off" };
    let mut words = format!("ethtool -K {device}");
    for feature in ["tx", "rx", "gso", "tso", "gro"] {
        let _ = write!(words, " {feature} {state}");
    }
    lab.host().exec(words.as_str())?;
    Ok(())
}

/// Removes the cables.
///
/// # Errors
/// Those of `ip`.
pub fn remove_cables(lab: &Lab) -> Result<()> {
    for end in ["pa", "pb", "pc", "pd", "pu"] {
        if lab.host().links()?.iter().any(|name| name == end) {
            ip(["-n", lab.host().name(), "link", "del", end])?;
        }
    }
    Ok(())
}

/// The index of a device in the laboratory.
///
/// # Errors
/// There is none of that name.
pub fn ifindex(lab: &Lab, device: &str) -> Result<u32> {
    let text = lab.host().ip(["-o", "link", "show", device])?;
    let number = text.split(':').next().context("no number")?;
    Ok(number.trim().parse()?)
}

/// A client of the laboratory's daemon.
///
/// # Errors
/// Those of [`Client::connect`].
pub fn client(lab: &Lab) -> Result<Client> {
    let netns = lab.host().inside(client::netns)??;
    Client::connect(&lab.run_dir(), netns)
}

/// The devices of tunnels that ovs-vswitchd makes by rtnetlink: name, kind, UDP port.
const TUNNELS: [(&str, &str, u16); 3] = [
    ("vxlan_sys_4789", "vxlan", 4789),
    ("genev_sys_6081", "geneve", 6081),
    ("gre_sys", "gretap", 0),
];

/// Makes the device of a tunnel by the request of rtnetlink with which ovs-vswitchd makes it, or deletes it; false
/// if the name isn't that of one.
///
/// # Errors
/// It is refused.
pub fn tunnel(lab: &Lab, device: &str, there: bool) -> Result<bool> {
    /// linux/rtnetlink.h, linux/if_link.h.
    const NEWLINK: u16 = 16;
    const DELLINK: u16 = 17;
    const CREATE_EXCL: u16 = 0x600;
    const IFNAME: u16 = 3;
    const LINKINFO: u16 = 18;
    const INFO_KIND: u16 = 1;
    const INFO_DATA: u16 = 2;
    let Some((name, kind, port)) = TUNNELS.iter().find(|(name, ..)| *name == device) else {
        return Ok(false);
    };
    let attribute = |kind: u16, payload: &[u8]| {
        let mut bytes = (payload.len() as u16 + 4).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    // `struct ifinfomsg`.
    let mut body = vec![0; 16];
    body.extend(attribute(IFNAME, &[name.as_bytes(), &[0]].concat()));
    if there {
        // "Collect metadata": a flag, but for VXLAN, where it is a byte.
        let port = port.to_be_bytes();
        let data = match *kind {
            "vxlan" => [attribute(25, &[1]), attribute(15, &port)].concat(),
            "geneve" => [attribute(6, &[]), attribute(5, &port)].concat(),
            _ => attribute(18, &[]),
        };
        let info = [
            attribute(INFO_KIND, kind.as_bytes()),
            attribute(INFO_DATA, &data),
        ];
        body.extend(attribute(LINKINFO, &info.concat()));
    }
    let header = transport::Header {
        len: (transport::NLMSGHDR_LEN + body.len()) as u32,
        kind: if there { NEWLINK } else { DELLINK },
        flags: transport::NLM_F_REQUEST
            | transport::NLM_F_ACK
            | if there { CREATE_EXCL } else { 0 },
        seq: 1,
        pid: 0,
    };
    let request = [&header.to_bytes()[..], &body].concat();
    let netns = lab.host().inside(client::netns)??;
    let mut client = Client::speaking(transport::NETLINK_ROUTE, &lab.run_dir(), netns)?;
    let answers = client.converse(&request)?;
    let errno = answers.last().and_then(|answer| errno(answer));
    anyhow::ensure!(errno == Some(0), "{name}: {errno:?}");
    Ok(true)
}

/// Lets a frame with a virtio-net header in front come in at `device`.
///
/// # Errors
/// Those of the system calls.
pub fn send_offloaded(lab: &Lab, device: &str, header: [u8; 10], frame: &[u8]) -> Result<()> {
    let socket = lab.host().inside(|| PacketSocket::open(device))??;
    socket.set_offloading()?;
    socket.send(&[&header[..], frame].concat())?;
    Ok(())
}

/// Packet sockets at the far ends of a datapath's ports.
#[derive(Debug)]
pub struct Wires {
    sockets: BTreeMap<u32, PacketSocket>,
}

impl Wires {
    /// On those of [`CAPTURED`] that are in `ports`.
    ///
    /// # Errors
    /// A device isn't there.
    pub fn open(lab: &Lab, ports: &[u32]) -> Result<Self> {
        let captured = CAPTURED.iter().filter(|(port, _)| ports.contains(port));
        Self::at(lab, captured.copied())
    }

    /// On devices, each for a port's number.
    ///
    /// # Errors
    /// A device isn't there.
    pub fn at<'a>(lab: &Lab, devices: impl Iterator<Item = (u32, &'a str)>) -> Result<Self> {
        let mut sockets = BTreeMap::new();
        for (port, device) in devices {
            let socket = lab.host().inside(|| PacketSocket::open(device))?;
            sockets.insert(port, socket.with_context(|| device.to_owned())?);
        }
        Ok(Self { sockets })
    }

    /// Lets a frame come in at a port.
    ///
    /// # Errors
    /// Those of send(2).
    pub fn send(&self, port: u32, frame: &[u8]) -> Result<()> {
        let socket = self.sockets.get(&port).context("not a captured port")?;
        socket.send(frame).context("sending a frame")
    }

    /// What has left the ports, in order at each; waits until `wanted` frames are there, or `limit` has
    /// passed.
    ///
    /// # Errors
    /// Those of the sockets.
    pub fn gather(&self, wanted: usize, limit: Duration) -> Result<BTreeMap<u32, Vec<Vec<u8>>>> {
        let deadline = Instant::now() + limit;
        let mut frames: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
        let mut count = 0;
        loop {
            for (port, socket) in &self.sockets {
                loop {
                    match socket.receive() {
                        Ok(frame) => {
                            count += 1;
                            frames.entry(*port).or_default().push(frame);
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                        // The device went down, or is gone.
                        Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => break,
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if count >= wanted || left.is_zero() {
                return Ok(frames);
            }
            let mut polled: Vec<_> = self
                .sockets
                .values()
                .map(|socket| PollFd::new(socket, PollFlags::IN))
                .collect();
            let time = Timespec::try_from(left.min(Duration::from_millis(20))).context("time")?;
            match poll(&mut polled, Some(&time)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
