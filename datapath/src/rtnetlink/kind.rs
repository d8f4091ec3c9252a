//! `IFLA_INFO_KIND` and `IFLA_INFO_DATA` of tunnels.

use ::vport::{TunnelConfig, TunnelKind};
use frame::tunnel::vxlan::Extensions;
use netlink::Errno;
use netlink::attr::{Attr, Attrs};

/// `IFLA_VXLAN_*`.
mod vxlan {
    pub const PORT: u16 = 15;
    pub const GBP: u16 = 23;
    pub const COLLECT_METADATA: u16 = 25;
    pub const GPE: u16 = 27;
}

/// `IFLA_GENEVE_*`.
mod geneve {
    pub const PORT: u16 = 5;
    pub const COLLECT_METADATA: u16 = 6;
}

/// `IFLA_GRE_*`.
mod gre {
    pub const COLLECT_METADATA: u16 = 18;
}

/// What the kernel takes where none is named.
const VXLAN_PORT: u16 = 8472;
const GENEVE_PORT: u16 = 6081;

/// What a request for a link asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A tunnel for a datapath.
    Tunnel(TunnelConfig),
    /// One that the daemon hasn't got.
    Missing,
    /// Something that isn't for a datapath: the kernel's.
    Others,
}

/// What the kind and its data ask for.
///
/// # Errors
/// An attribute that is cut short.
pub fn config(kind: &str, data: Attrs<'_>) -> Result<Wanted, Errno> {
    let mut config = TunnelConfig {
        kind: TunnelKind::Vxlan,
        port: 0,
        extensions: Extensions::default(),
    };
    let mut collects = false;
    match kind {
        "vxlan" => {
            config.port = VXLAN_PORT;
            for attr in data {
                match attr.kind {
                    vxlan::PORT => config.port = attr.be16()?,
                    vxlan::COLLECT_METADATA => collects = attr.u8()? != 0,
                    vxlan::GBP => config.extensions.gbp = true,
                    vxlan::GPE => config.extensions.gpe = true,
                    _ => {}
                }
            }
        }
        "geneve" => {
            config.kind = TunnelKind::Geneve;
            config.port = GENEVE_PORT;
            for attr in data {
                match attr.kind {
                    geneve::PORT => config.port = attr.be16()?,
                    geneve::COLLECT_METADATA => collects = true,
                    _ => {}
                }
            }
        }
        "gretap" | "ip6gretap" | "erspan" | "ip6erspan" => {
            config.kind = match kind {
                "gretap" => TunnelKind::Gre,
                "ip6gretap" => TunnelKind::Ip6Gre,
                "erspan" => TunnelKind::Erspan,
                _ => TunnelKind::Ip6Erspan,
            };
            collects = has(&data, gre::COLLECT_METADATA);
        }
        // In the kernel they are of no use to a datapath that isn't in it.
        "gre" | "ip6gre" if has(&data, gre::COLLECT_METADATA) => {
            return Ok(Wanted::Missing);
        }
        // Has no other mode.
        "bareudp" => return Ok(Wanted::Missing),
        _ => {}
    }
    Ok(match collects {
        true => Wanted::Tunnel(config),
        false => Wanted::Others,
    })
}

fn has(data: &Attrs<'_>, kind: u16) -> bool {
    data.clone().any(|attr: Attr<'_>| attr.kind == kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink::attr::Writer;

    fn wanted(kind: &str, build: impl FnOnce(&mut Writer<'_>)) -> Result<Wanted, Errno> {
        let mut bytes = Vec::new();
        build(&mut Writer::new(&mut bytes));
        config(kind, Attrs::new(&bytes))
    }

    #[test]
    fn what_collects_metadata_is_a_tunnel_and_nothing_else() {
        let port = |kind, port| {
            Ok(Wanted::Tunnel(TunnelConfig {
                kind,
                port,
                extensions: Extensions::default(),
            }))
        };
        let vxlan = wanted("vxlan", |data| {
            data.u8(vxlan::COLLECT_METADATA, 1);
            data.be16(vxlan::PORT, 4789);
        });
        assert_eq!(vxlan, port(TunnelKind::Vxlan, 4789));
        let geneve = wanted("geneve", |data| data.flag(geneve::COLLECT_METADATA));
        assert_eq!(geneve, port(TunnelKind::Geneve, 6081));
        let gre = wanted("gretap", |data| data.flag(gre::COLLECT_METADATA));
        assert_eq!(gre, port(TunnelKind::Gre, 0));
        let plain = wanted("vxlan", |data| data.be16(vxlan::PORT, 4789));
        assert_eq!(plain, Ok(Wanted::Others));
        assert_eq!(wanted("veth", |_| {}), Ok(Wanted::Others));
        assert_eq!(wanted("bareudp", |_| {}), Ok(Wanted::Missing));
        let cut = wanted("vxlan", |data| data.flag(vxlan::PORT));
        assert_eq!(cut, Err(Errno::ERANGE));
    }
}
