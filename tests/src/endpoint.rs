//! A host on the network under test: a namespace joined to the switch's by a veth pair.

use anyhow::Result;

use crate::namespace::Namespace;

/// The endpoint's own device.
pub const DEVICE: &str = "eth0";

/// A namespace whose `eth0` has its other end in the switch's namespace.
#[derive(Debug)]
pub struct Endpoint {
    namespace: Namespace,
    port: String,
    mac: [u8; 6],
}

impl Endpoint {
    /// A new endpoint; its other end is `port`, in `host`, not yet on any bridge. `number` makes
    /// its address, 02:00:00:00:hi:lo.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn new(host: &Namespace, label: &str, number: u16) -> Result<Self> {
        let namespace = Namespace::new(label)?;
        let port = format!("v-{label}");
        let [hi, lo] = number.to_be_bytes();
        let mac = [2, 0, 0, 0, hi, lo];
        let endpoint = Self {
            namespace,
            port,
            mac,
        };
        host.ip([
            "link",
            "add",
            &endpoint.port,
            "up",
            "type",
            "veth",
            "peer",
            "name",
            DEVICE,
            "address",
            &endpoint.mac_text(),
            "netns",
            endpoint.namespace.name(),
        ])?;
        endpoint.namespace.ip(["link", "set", DEVICE, "up"])?;
        Ok(endpoint)
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The device in the switch's namespace.
    pub fn port(&self) -> &str {
        &self.port
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Its Ethernet address, with colons.
    pub fn mac_text(&self) -> String {
        self.mac.map(|b| format!("{b:02x}")).join(":")
    }

    /// Gives `eth0` an address with prefix length; an IPv6 one turns IPv6 on.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn address(&self, address: &str) -> Result<()> {
        if address.contains(':') {
            self.namespace.inside(|| {
                std::fs::write(
                    format!("/proc/sys/net/ipv6/conf/{DEVICE}/disable_ipv6"),
                    "0",
                )
            })??;
            self.namespace
                .ip(["addr", "add", address, "dev", DEVICE, "nodad"])?;
        } else {
            self.namespace.ip(["addr", "add", address, "dev", DEVICE])?;
        }
        Ok(())
    }

    /// A permanent neighbour, so that traffic needs no ARP.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn neighbour(&self, address: &str, of: &Endpoint) -> Result<()> {
        let mac = of.mac_text();
        self.namespace.ip([
            "neigh",
            "replace",
            address,
            "lladdr",
            &mac,
            "dev",
            DEVICE,
            "nud",
            "permanent",
        ])?;
        Ok(())
    }

    /// Turns the offload of checksums off (and with it segmentation): what dpif-netdev needs for
    /// TCP to pass at all.
    ///
    /// # Errors
    /// Those of ethtool.
    pub fn offloads_off(&self) -> Result<()> {
        self.namespace
            .exec(["ethtool", "-K", DEVICE, "tx", "off"])?;
        Ok(())
    }
}
