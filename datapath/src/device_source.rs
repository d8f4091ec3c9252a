//! Where the ports' devices come from: the system; in tests, what stands for it.

use std::sync::Arc;

use ::vport::stream::Streams;
use ::vport::{AttachOptions, Error, InternalOptions, Port, Tunnel, TunnelConfig};

use crate::daemon::Options;

/// Opens and makes devices.
///
/// Called under the configuration lock, on a thread that may sleep. A device goes when its port is
/// dropped.
pub trait DeviceSource: Send + Sync {
    /// Opens the existing device of that name.
    ///
    /// # Errors
    /// ENODEV when there is none, or what the system says.
    fn attach(&self, name: &str) -> Result<Box<dyn Port>, Error>;

    /// Makes a device of that name (with a `%d` in it: the first that is free) and, if one is given, of
    /// that index.
    ///
    /// # Errors
    /// EEXIST when there is one, or what the system says.
    fn create_internal(&self, name: &str, ifindex: Option<u32>) -> Result<Box<dyn Port>, Error>;

    /// Opens a tunnel. It has no device; `ifindex` stands for one.
    ///
    /// # Errors
    /// EADDRINUSE when its UDP port is taken, or what the system says.
    fn create_tunnel(
        &self,
        name: &str,
        config: TunnelConfig,
        ifindex: u32,
    ) -> Result<Box<dyn Port>, Error>;
}

/// The devices of the network namespace that the daemon runs in.
pub struct SystemDevices {
    streams: Arc<Streams>,
    attach: AttachOptions,
    internal: InternalOptions,
}

impl SystemDevices {
    /// As the daemon was asked to use them; the devices of `streams` are streams.
    pub fn new(options: &Options, streams: Arc<Streams>) -> Self {
        Self {
            streams,
            attach: AttachOptions {
                driver: options.driver,
                run_prefix: options.run_prefix.clone(),
                ..AttachOptions::default()
            },
            internal: InternalOptions {
                force_veth: options.force_veth,
                run_prefix: options.run_prefix.clone(),
                ..InternalOptions::default()
            },
        }
    }
}

impl DeviceSource for SystemDevices {
    fn attach(&self, name: &str) -> Result<Box<dyn Port>, Error> {
        let stream = self.streams.port_named(name);
        stream.map_or_else(|| ::vport::attach(name, &self.attach), Ok)
    }

    fn create_internal(&self, name: &str, ifindex: Option<u32>) -> Result<Box<dyn Port>, Error> {
        let options = InternalOptions {
            ifindex,
            ..self.internal.clone()
        };
        ::vport::create_internal(name, &options)
    }

    fn create_tunnel(
        &self,
        name: &str,
        config: TunnelConfig,
        ifindex: u32,
    ) -> Result<Box<dyn Port>, Error> {
        Ok(Box::new(Tunnel::create(name, config, ifindex)?))
    }
}
