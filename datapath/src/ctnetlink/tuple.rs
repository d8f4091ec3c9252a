//! Tuples as attributes: `enum ctattr_tuple`, `ctattr_ip`, `ctattr_l4proto`.

use netlink::Errno;
use netlink::attr::{Attr, Table, Writer};

use super::NESTED;
use crate::conntrack::tuple::{Family, Tuple, narrow, proto, wide};

const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const TUPLE_ZONE: u16 = 3;

const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;

const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
const PROTO_ICMP_ID: u16 = 4;
const PROTO_ICMPV6_ID: u16 = 7;

/// Whether the protocol's tuples have ports, be they zero. (GRE's have keys there, as in nf_conntrack.)
fn shows_ports(protocol: u8) -> bool {
    matches!(protocol, proto::TCP | proto::UDP | proto::SCTP | proto::GRE)
}

/// The type of the first of ID, TYPE, CODE.
fn icmp_id(protocol: u8) -> Option<u16> {
    match protocol {
        proto::ICMP => Some(PROTO_ICMP_ID),
        proto::ICMPV6 => Some(PROTO_ICMPV6_ID),
        _ => None,
    }
}

/// Writes a nested attribute with addresses and protocol; the zone isn't in it.
///
/// # Errors
/// EMSGSIZE: never, by its size.
pub fn write(writer: &mut Writer<'_>, kind: u16, tuple: &Tuple) -> Result<(), Errno> {
    let nest = writer.begin(kind | NESTED);
    let addresses = writer.begin(TUPLE_IP | NESTED);
    match tuple.family {
        Family::V4 => {
            writer.bytes(IP_V4_SRC, &narrow(tuple.src))?;
            writer.bytes(IP_V4_DST, &narrow(tuple.dst))?;
        }
        Family::V6 => {
            writer.bytes(IP_V6_SRC, &tuple.src)?;
            writer.bytes(IP_V6_DST, &tuple.dst)?;
        }
    }
    writer.end(addresses)?;
    let protocol = writer.begin(TUPLE_PROTO | NESTED);
    writer.u8(PROTO_NUM, tuple.proto);
    if let Some(id) = icmp_id(tuple.proto) {
        let [icmp_type, code] = tuple.dst_port.to_be_bytes();
        writer.be16(id, tuple.src_port);
        writer.u8(id + 1, icmp_type);
        writer.u8(id + 2, code);
    } else if shows_ports(tuple.proto) {
        writer.be16(PROTO_SRC_PORT, tuple.src_port);
        writer.be16(PROTO_DST_PORT, tuple.dst_port);
    }
    writer.end(protocol)?;
    writer.end(nest)
}

/// Reads a whole tuple. Its zone is `zone`, or if that is 0 the one that it names itself.
///
/// # Errors
/// EOPNOTSUPP for a family that isn't tracked, EINVAL if something is missing or contradicts, ERANGE for
/// attributes that are too short.
pub fn read(attr: Attr<'_>, family: Option<Family>, zone: u16) -> Result<Tuple, Errno> {
    let family = family.ok_or(Errno::EOPNOTSUPP)?;
    let parts = Parts::read(attr, family)?;
    let zone = match parts.zone {
        Some(_) if zone != 0 => return Err(Errno::EINVAL),
        Some(own) => own,
        None => zone,
    };
    let proto = parts.proto.ok_or(Errno::EINVAL)?;
    let has_ports =
        icmp_id(proto).is_some() || matches!(proto, proto::TCP | proto::UDP | proto::SCTP);
    let port = |port: Option<u16>| match port {
        None if has_ports => Err(Errno::EINVAL),
        // Protocols whose connections are told apart by their addresses alone.
        _ if !has_ports => Ok(0),
        port => Ok(port.unwrap_or(0)),
    };
    let tuple = Tuple {
        src: parts.src.ok_or(Errno::EINVAL)?,
        dst: parts.dst.ok_or(Errno::EINVAL)?,
        src_port: port(parts.src_port)?,
        dst_port: port(parts.dst_port)?,
        zone,
        proto,
        family,
    };
    // Only queries and replies of ICMP make connections.
    tuple
        .inverse()
        .is_some()
        .then_some(tuple)
        .ok_or(Errno::EINVAL)
}

/// As much of a tuple as a client gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts {
    /// Source address.
    pub src: Option<[u8; 16]>,
    /// Destination address.
    pub dst: Option<[u8; 16]>,
    /// IP protocol.
    pub proto: Option<u8>,
    /// Source port or identifier.
    pub src_port: Option<u16>,
    /// Destination port, or type and code.
    pub dst_port: Option<u16>,
    /// `CTA_TUPLE_ZONE`
    pub zone: Option<u16>,
}

impl Parts {
    /// Reads what is there.
    ///
    /// # Errors
    /// ERANGE for attributes that are too short; EINVAL for half of type and code.
    pub fn read(attr: Attr<'_>, family: Family) -> Result<Self, Errno> {
        let table = Table::<4>::new(attr.payload);
        let mut parts = Self::default();
        if let Some(addresses) = table.get(TUPLE_IP) {
            let inner = Table::<5>::new(addresses.payload);
            let address = |v4: u16, v6: u16| match family {
                Family::V4 => inner.get(v4).map(|a| a.array().map(wide)).transpose(),
                Family::V6 => inner.get(v6).map(|a| a.array()).transpose(),
            };
            parts.src = address(IP_V4_SRC, IP_V6_SRC)?;
            parts.dst = address(IP_V4_DST, IP_V6_DST)?;
        }
        if let Some(protocol) = table.get(TUPLE_PROTO) {
            let inner = Table::<10>::new(protocol.payload);
            parts.proto = inner.get(PROTO_NUM).map(|n| n.u8()).transpose()?;
            let (src, dst) = match parts.proto.and_then(icmp_id) {
                Some(id) => {
                    let icmp_type = inner.get(id + 1).map(|a| a.u8()).transpose()?;
                    let code = inner.get(id + 2).map(|a| a.u8()).transpose()?;
                    let both = match (icmp_type, code) {
                        (Some(icmp_type), Some(code)) => {
                            Some(u16::from_be_bytes([icmp_type, code]))
                        }
                        (None, None) => None,
                        _ => return Err(Errno::EINVAL),
                    };
                    (inner.get(id).map(|a| a.be16()).transpose()?, both)
                }
                None => (
                    inner.get(PROTO_SRC_PORT).map(|a| a.be16()).transpose()?,
                    inner.get(PROTO_DST_PORT).map(|a| a.be16()).transpose()?,
                ),
            };
            (parts.src_port, parts.dst_port) = (src, dst);
        }
        parts.zone = table.get(TUPLE_ZONE).map(|a| a.be16()).transpose()?;
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink::attr::Attrs;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            src: [u8; 16], dst: [u8; 16], src_port: u16, dst_port: u16, v6: bool,
            proto in prop_oneof![Just(proto::TCP), Just(proto::UDP), Just(proto::SCTP), Just(89)],
        ) {
            let ports = proto != 89;
            let tuple = Tuple {
                src: if v6 { src } else { wide(narrow(src)) },
                dst: if v6 { dst } else { wide(narrow(dst)) },
                src_port: if ports { src_port } else { 0 },
                dst_port: if ports { dst_port } else { 0 },
                zone: 0,
                proto,
                family: if v6 { Family::V6 } else { Family::V4 },
            };
            let mut buffer = Vec::new();
            write(&mut Writer::new(&mut buffer), 1, &tuple).unwrap();
            let attr = Attrs::new(&buffer).next().unwrap();
            prop_assert_eq!(read(attr, Some(tuple.family), 0), Ok(tuple));
            prop_assert_eq!(read(attr, Some(tuple.family), 9), Ok(Tuple { zone: 9, ..tuple }));
        }
    }

    #[test]
    fn an_echo_is_known_by_its_identifier_type_and_code() {
        let tuple = Tuple {
            src: wide([10, 0, 0, 1]),
            dst: wide([10, 0, 0, 2]),
            src_port: 77,
            dst_port: 8 << 8,
            zone: 0,
            proto: proto::ICMP,
            family: Family::V4,
        };
        let mut buffer = Vec::new();
        write(&mut Writer::new(&mut buffer), 1, &tuple).unwrap();
        let attr = Attrs::new(&buffer).next().unwrap();
        assert_eq!(read(attr, Some(Family::V4), 0), Ok(tuple));
        assert_eq!(read(attr, Some(Family::V6), 0), Err(Errno::EINVAL));
        assert_eq!(read(attr, None, 0), Err(Errno::EOPNOTSUPP));
    }
}
