//! Two endpoints and what forwards between them: ovs-dpd, Open vSwitch's own datapath in user space, or
//! a floor.

use std::sync::Arc;
use std::time::Duration;

use ::tests::endpoint::{DEVICE, Endpoint};
use ::tests::lab::{Lab, Switch};
use ::tests::process::Process;
use anyhow::{Context, Result};
use rustix::process::Pid;

use crate::cpu;
use crate::floor::{Floor, Kind};

/// What forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// ovs-dpd with its default ports on veth.
    OvsDpd,
    /// dpif-netdev with AF_PACKET ports, which its main thread reads.
    Netdev,
    /// dpif-netdev with afxdp ports, in generic mode, which a polling thread reads.
    NetdevXdp,
    /// ovs-dpd with AF_XDP ports on veth.
    OvsDpdXdp,
    /// The bare forwarder with AF_XDP sockets that share memory.
    FloorXdp,
    /// The bare forwarder with receive rings.
    FloorRing,
    /// The bare forwarder with virtio-net headers.
    FloorVirtioNet,
    /// The bare forwarder with receive rings of frames and virtio-net headers.
    FloorFrameRing,
}

impl Subject {
    /// As tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OvsDpd => "ovs-dpd",
            Self::Netdev => "dpif-netdev, AF_PACKET",
            Self::NetdevXdp => "dpif-netdev, afxdp",
            Self::OvsDpdXdp => "ovs-dpd, AF_XDP",
            Self::FloorXdp => "floor: AF_XDP",
            Self::FloorRing => "floor: TPACKET_V3",
            Self::FloorVirtioNet => "floor: recvmmsg, virtio-net headers",
            Self::FloorFrameRing => "floor: TPACKET_V2, virtio-net headers",
        }
    }

    /// Whether it only carries TCP whose sender computes checksums itself.
    pub fn needs_checksums(self) -> bool {
        matches!(
            self,
            Self::Netdev | Self::NetdevXdp | Self::OvsDpdXdp | Self::FloorXdp
        )
    }
}

/// Flow rules for the way from endpoint a to b; the way back is always one rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// One rule for all, so one megaflow.
    Wildcard,
    /// Connections differ in what they are looked at for, so a megaflow each.
    PerConnection,
}

/// Two endpoints, `10.99.0.1` and `10.99.0.2`, on something that forwards.
#[derive(Debug)]
pub struct Bed {
    // In the order in which they must go.
    floor: Option<Floor>,
    /// The sending side.
    pub a: Arc<Endpoint>,
    /// The receiving side.
    pub b: Arc<Endpoint>,
    /// The switch, if the subject has one; else only the namespace and the directory.
    pub lab: Lab,
    subject: Subject,
}

/// The address of endpoint b.
pub const ADDRESS_B: &str = "10.99.0.2";

impl Bed {
    /// Builds one, with offloads as the subject needs them to carry TCP.
    ///
    /// # Errors
    /// Something doesn't start.
    pub fn new(subject: Subject) -> Result<Self> {
        let lab = match subject {
            Subject::OvsDpd => Lab::new(Switch::OvsDpd)?,
            Subject::Netdev | Subject::NetdevXdp => Lab::new(Switch::Netdev)?,
            Subject::OvsDpdXdp => Lab::with(Switch::OvsDpd, &["--driver", "af-xdp"])?,
            Subject::FloorRing
            | Subject::FloorVirtioNet
            | Subject::FloorFrameRing
            | Subject::FloorXdp => Lab::bare(Switch::Netdev)?,
        };
        let endpoint = |label: &str, number| -> Result<Arc<Endpoint>> {
            let endpoint = Endpoint::new(lab.host(), label, number)?;
            endpoint.address(&format!("10.99.0.{number}/24"))?;
            Ok(Arc::new(endpoint))
        };
        let (a, b) = (endpoint("a", 1)?, endpoint("b", 2)?);
        // No ARP in what is measured.
        a.neighbour(ADDRESS_B, &b)?;
        b.neighbour("10.99.0.1", &a)?;
        if subject.needs_checksums() {
            a.offloads_off()?;
            b.offloads_off()?;
        }
        let mut bed = Self {
            floor: None,
            a,
            b,
            lab,
            subject,
        };
        match subject {
            Subject::FloorRing => bed.start_floor(Kind::Ring)?,
            Subject::FloorXdp => bed.start_floor(Kind::Xdp)?,
            Subject::FloorFrameRing => bed.start_floor(Kind::FrameRing)?,
            Subject::FloorVirtioNet => bed.start_floor(Kind::VirtioNet)?,
            _ => bed.start_switch()?,
        }
        // Announcements of new devices are over.
        std::thread::sleep(Duration::from_millis(300));
        Ok(bed)
    }

    fn start_floor(&mut self, kind: Kind) -> Result<()> {
        let devices = [self.a.port(), self.b.port()];
        self.floor = Some(Floor::start(self.lab.host(), kind, devices)?);
        Ok(())
    }

    fn start_switch(&self) -> Result<()> {
        let lab = &self.lab;
        if self.subject == Subject::NetdevXdp {
            let mask = 1 << cpu::DATAPATH;
            lab.vsctl(format!(
                "set Open_vSwitch . other_config:pmd-cpu-mask={mask:#x}"
            ))?;
        }
        lab.bridge("br0")?;
        for endpoint in [&self.a, &self.b] {
            let port = endpoint.port();
            let columns = match self.subject {
                Subject::NetdevXdp => format!(
                    "-- set interface {port} type=afxdp options:n_rxq=1 options:xdp-mode=generic"
                ),
                _ => String::new(),
            };
            lab.port("br0", endpoint, &columns)?;
        }
        self.rules(Rules::Wildcard)
    }

    /// Sets the flow rules; what was installed for others goes.
    ///
    /// # Errors
    /// Those of ovs-ofctl.
    pub fn rules(&self, rules: Rules) -> Result<()> {
        if self.floor.is_some() {
            return Ok(());
        }
        let (a, b) = (
            self.lab.ofport(self.a.port())?,
            self.lab.ofport(self.b.port())?,
        );
        // multipath looks at addresses and ports, and leaves the packet as it is.
        let look = match rules {
            Rules::Wildcard => "",
            Rules::PerConnection => "multipath(symmetric_l3l4+udp,0,modulo_n,2,0,NXM_NX_REG0[]),",
        };
        self.lab.ofctl("del-flows br0")?;
        self.lab.ofctl([
            "add-flow",
            "br0",
            &format!("in_port={a},actions={look}output:{b}"),
        ])?;
        self.lab.ofctl([
            "add-flow",
            "br0",
            &format!("in_port={b},actions=output:{a}"),
        ])?;
        Ok(())
    }

    /// Raises what limits the number of flows, and lets none idle out.
    ///
    /// # Errors
    /// Those of ovs-vsctl.
    pub fn many_flows(&self) -> Result<()> {
        if self.floor.is_none() {
            self.lab.vsctl(
                "set Open_vSwitch . other_config:flow-limit=2000000 other_config:max-idle=600000",
            )?;
            // The limit in force begins far below and rises slowly.
            self.lab.appctl("upcall/set-flow-limit 2000000")?;
        }
        Ok(())
    }

    /// Whether there are flows at all: a floor has none.
    pub fn has_flows(&self) -> bool {
        self.floor.is_none()
    }

    /// How many flows the datapath has.
    ///
    /// # Errors
    /// Those of ovs-dpctl.
    pub fn flow_count(&self) -> Result<u64> {
        let text = self.lab.dpctl("show")?;
        text.lines()
            .find_map(|l| l.trim().strip_prefix("flows: ")?.parse().ok())
            .with_context(|| format!("no number of flows in\n{text}"))
    }

    /// Deletes all flows of the datapath.
    ///
    /// # Errors
    /// Those of ovs-dpctl.
    pub fn forget_flows(&self) -> Result<()> {
        if self.floor.is_none() {
            self.lab.appctl("revalidator/purge")?;
        }
        Ok(())
    }

    /// Keeps the datapath on [`cpu::DATAPATH`], or lets it run anywhere.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn pin(&self, pinned: bool) -> Result<()> {
        let cpu = pinned.then_some(cpu::DATAPATH);
        match (&self.floor, self.subject) {
            (Some(floor), _) => {
                let cpus = cpu::set(&cpu.map_or_else(cpu::all, |cpu| vec![cpu]));
                rustix::thread::sched_setaffinity(Pid::from_raw(floor.id()), &cpus)
                    .context("sched_setaffinity")
            }
            (None, Subject::OvsDpd | Subject::OvsDpdXdp) => self
                .lab
                .with_daemon(|daemon| cpu::pin_process(daemon.process().id(), cpu)),
            // Its polling thread has its CPU already.
            (None, Subject::NetdevXdp) => Ok(()),
            (None, _) => self
                .lab
                .with_vswitchd(|vswitchd| cpu::pin_process(vswitchd.id(), cpu)),
        }
    }

    /// The processor time of what forwards packets, so far.
    ///
    /// # Errors
    /// It isn't running.
    pub fn cpu_time(&self) -> Result<Duration> {
        match (&self.floor, self.subject) {
            (Some(floor), _) => cpu::thread_time(floor.id()),
            (None, Subject::OvsDpd | Subject::OvsDpdXdp) => {
                self.lab.with_daemon(|d| d.process().cpu_time())
            }
            (None, _) => self.lab.with_vswitchd(|v: &mut Process| v.cpu_time()),
        }
    }

    /// How many packets endpoint b's device has received.
    ///
    /// # Errors
    /// Those of reading /proc.
    pub fn received(&self) -> Result<u64> {
        let text = self
            .b
            .namespace()
            .inside(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        text.lines()
            .find_map(|l| l.trim().strip_prefix(DEVICE)?.strip_prefix(':'))
            .and_then(|numbers| numbers.split_whitespace().nth(1)?.parse().ok())
            .context("no statistics of eth0")
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// What doesn't end as it should.
    pub fn stop(mut self) -> Result<()> {
        if let Some(floor) = self.floor.take() {
            floor.stop()?;
        }
        self.lab.stop_vswitchd()?;
        self.lab.stop_daemon()
    }
}
