//! Devices that exist in this process only: frames given to them are looked at and kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use datapath::device_source::DeviceSource;
use frame::{Frame, GsoKind, Pool};
use vport::{
    Capabilities, Driver, Error, HostCounters, Link, Port, RxQueue, TunnelConfig, TxOutcome,
    TxRefusal,
};

/// What a device was given, in order: its name, the frame.
pub type Sent = Vec<(String, Frame)>;

/// What all devices of a world share.
#[derive(Debug, Default)]
pub struct Devices {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_ifindex: u32,
    /// By name: whether it lives, its index.
    live: HashMap<String, (Weak<()>, u32)>,
    sent: Sent,
    keep: bool,
    /// By the first letters of a name: what devices of that name can do.
    capabilities: Vec<(String, Capabilities)>,
    /// Every n-th frame is refused, for one reason after the other; 0: none.
    refuse_every: u64,
    given: u64,
}

/// Takes nothing but plain frames.
pub const PLAIN: Capabilities = Capabilities {
    csum: false,
    tso4: false,
    tso6: false,
    uso: false,
    ufo: false,
    vlan: true,
    max_frame: 65_549,
    max_gso_frame: 65_549,
};

/// Takes all offloads.
pub const OFFLOADING: Capabilities = Capabilities {
    csum: true,
    tso4: true,
    tso6: true,
    uso: true,
    ufo: true,
    vlan: true,
    max_frame: 1514,
    max_gso_frame: 65_549,
};

impl Devices {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Devices whose names begin with `prefix` will be able to do that.
    pub fn set_capabilities(&self, prefix: &str, capabilities: Capabilities) {
        self.state()
            .capabilities
            .push((prefix.to_owned(), capabilities));
    }

    /// Refuse every n-th frame; 0: none.
    pub fn refuse_every(&self, n: u64) {
        self.state().refuse_every = n;
    }

    /// Keep the frames that are sent.
    pub fn keep(&self) {
        self.state().keep = true;
    }

    /// What was sent since the last call.
    pub fn take_sent(&self) -> Sent {
        std::mem::take(&mut self.state().sent)
    }

    fn open(self: &Arc<Self>, name: &str, ifindex: Option<u32>) -> Result<Box<dyn Port>, Error> {
        let mut state = self.state();
        state.live.retain(|_, (weak, _)| weak.strong_count() > 0);
        let taken = |state: &State, index| state.live.values().any(|(_, known)| *known == index);
        if state.live.contains_key(name) || ifindex.is_some_and(|index| taken(&state, index)) {
            return Err(Error::new(libc::EEXIST, name));
        }
        let ifindex = match ifindex {
            Some(index) => index,
            None => loop {
                state.last_ifindex += 1;
                if !taken(&state, state.last_ifindex) {
                    break state.last_ifindex;
                }
            },
        };
        let life = Arc::new(());
        state
            .live
            .insert(name.to_owned(), (Arc::downgrade(&life), ifindex));
        let capabilities = state
            .capabilities
            .iter()
            .find(|(prefix, _)| name.starts_with(prefix.as_str()))
            .map_or(OFFLOADING, |(_, capabilities)| *capabilities);
        Ok(Box::new(Device {
            all: Arc::clone(self),
            name: name.to_owned(),
            ifindex,
            capabilities,
            _life: life,
        }))
    }

    fn exists(&self, name: &str) -> bool {
        let state = self.state();
        let known = state.live.get(name);
        known.is_some_and(|(weak, _)| weak.strong_count() > 0)
    }
}

/// The source of a world's devices.
#[derive(Debug)]
pub struct Source(pub Arc<Devices>);

impl DeviceSource for Source {
    /// Devices `v...` and `p...` exist.
    fn attach(&self, name: &str) -> Result<Box<dyn Port>, Error> {
        if self.0.exists(name) {
            return Err(Error::new(libc::EBUSY, name));
        }
        match name.as_bytes().first() {
            Some(b'v' | b'p') => self.0.open(name, None),
            Some(b'l') => Err(Error::new(libc::EINVAL, name)),
            _ => Err(Error::new(libc::ENODEV, name)),
        }
    }

    fn create_internal(&self, name: &str, ifindex: Option<u32>) -> Result<Box<dyn Port>, Error> {
        let name = match name.contains("%d") {
            true => (0..)
                .map(|n: u32| name.replacen("%d", &n.to_string(), 1))
                .find(|name| !self.0.exists(name))
                .unwrap_or_default(),
            false => name.to_owned(),
        };
        self.0.open(&name, ifindex)
    }

    fn create_tunnel(
        &self,
        name: &str,
        _config: TunnelConfig,
        ifindex: u32,
    ) -> Result<Box<dyn Port>, Error> {
        self.0.open(name, Some(ifindex))
    }
}

struct Device {
    all: Arc<Devices>,
    name: String,
    ifindex: u32,
    capabilities: Capabilities,
    _life: Arc<()>,
}

impl Device {
    /// A frame is such that a driver can send it.
    fn check(&self, frame: &Frame) {
        let takes = &self.capabilities;
        let name = &self.name;
        assert!(frame.len() >= 14, "{name}: {} bytes", frame.len());
        if let Some(tag) = frame.vlan {
            assert!(frame::VlanTag::is_tpid(tag.tpid), "{name}: {tag:?}");
        }
        let offload = frame.offload;
        let limit = match offload.gso {
            None => takes.max_frame,
            Some(gso) => {
                let taken = match gso.kind {
                    GsoKind::TcpV4 => takes.tso4,
                    GsoKind::TcpV6 => takes.tso6,
                    GsoKind::UdpL4 => takes.uso,
                    GsoKind::UdpFragments => takes.ufo,
                };
                assert!(taken && takes.csum, "{name}: {gso:?}");
                takes.max_gso_frame
            }
        };
        assert!(
            frame.len() <= limit as usize,
            "{name}: {} bytes of {limit}: {offload:?}",
            frame.len()
        );
        assert!(offload.csum.is_none() || takes.csum, "{name}: {offload:?}");
    }
}

impl Port for Device {
    fn driver(&self) -> Driver {
        Driver::Tap
    }

    fn mode(&self) -> String {
        String::from("in a test")
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn open_queues(&self) -> Result<Vec<Box<dyn RxQueue>>, Error> {
        Ok(Vec::new())
    }

    fn transmit(&self, frames: &mut Vec<Frame>, pool: &mut Pool, outcome: &mut TxOutcome) {
        let mut state = self.all.state();
        for frame in frames.drain(..) {
            self.check(&frame);
            state.given += 1;
            let refused = state.refuse_every != 0 && state.given.is_multiple_of(state.refuse_every);
            if refused {
                let which = (state.given / state.refuse_every) as usize % TxRefusal::ALL.len();
                outcome.refuse(TxRefusal::ALL[which], 1);
            } else {
                outcome.sent(frame.wire_len());
            }
            if state.keep && !refused {
                state.sent.push((self.name.clone(), frame));
            } else {
                pool.put(frame);
            }
        }
    }

    fn host_counters(&self) -> HostCounters {
        HostCounters::default()
    }

    fn link_changed(&self, _link: &Link) {}
}
