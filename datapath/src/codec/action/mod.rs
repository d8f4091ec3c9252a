//! `OVS_ACTION_ATTR_*`: what a flow does.
//!
//! Validation follows the packet through the list: whether it has an Ethernet header, its type, its
//! tag, its depth of labels. That of a nested list begins with the state at its place; what it does
//! isn't seen behind it.
//!
//! - `set`: what `set` and `set_masked` write.
//! - `conntrack`: what `ct` asks for.

mod conntrack;
mod set;

use ::flow::action::{Action, ActionList, Userspace};
use ::flow::key::{Key, PORT_NONE, VLAN_CFI};
use netlink::Errno;
use netlink::attr::{Attr, Attrs, HEADER, Table, Writer};
use zerocopy::IntoBytes;
use zerocopy::network_endian::U32;

use super::key::prerequisites::{eth_type, is_mpls};
use super::key::vlan::is_tag;
use super::{Limits, nsh};

/// `enum ovs_action_attr`.
mod kind {
    pub const OUTPUT: u16 = 1;
    pub const USERSPACE: u16 = 2;
    pub const SET: u16 = 3;
    pub const PUSH_VLAN: u16 = 4;
    pub const POP_VLAN: u16 = 5;
    pub const SAMPLE: u16 = 6;
    pub const RECIRC: u16 = 7;
    pub const HASH: u16 = 8;
    pub const PUSH_MPLS: u16 = 9;
    pub const POP_MPLS: u16 = 10;
    pub const SET_MASKED: u16 = 11;
    pub const CT: u16 = 12;
    pub const TRUNC: u16 = 13;
    pub const PUSH_ETH: u16 = 14;
    pub const POP_ETH: u16 = 15;
    pub const CT_CLEAR: u16 = 16;
    pub const PUSH_NSH: u16 = 17;
    pub const POP_NSH: u16 = 18;
    pub const METER: u16 = 19;
    pub const CLONE: u16 = 20;
    pub const CHECK_PKT_LEN: u16 = 21;
    pub const ADD_MPLS: u16 = 22;
    pub const DEC_TTL: u16 = 23;
    pub const DROP: u16 = 24;
}

/// `enum ovs_userspace_attr`.
mod userspace {
    pub const PID: u16 = 1;
    pub const USERDATA: u16 = 2;
    pub const EGRESS_TUN_PORT: u16 = 3;
    pub const ACTIONS: u16 = 4;
}

/// `enum ovs_sample_attr`.
mod sample {
    pub const PROBABILITY: u16 = 1;
    pub const ACTIONS: u16 = 2;
}

/// `enum ovs_check_pkt_len_attr`.
mod check_pkt_len {
    pub const PKT_LEN: u16 = 1;
    pub const IF_GREATER: u16 = 2;
    pub const IF_LESS_EQUAL: u16 = 3;
}

/// `enum ovs_dec_ttl_attr`.
mod dec_ttl {
    pub const ACTION: u16 = 1;
}

/// Lists may be nested so deep.
const MAX_DEPTH: u8 = 16;
/// `OVS_HASH_ALG_L4`.
const HASH_ALG_L4: u32 = 0;
/// Bytes of an Ethernet header: nothing is truncated below.
const ETHERNET_BYTES: u32 = 14;
/// Set in the flags of `add_mpls`: in front of the L3 header.
const MPLS_L3: u16 = 1;

/// Decodes and validates a list of actions (payload of `OVS_FLOW_ATTR_ACTIONS`) for packets that
/// match `key` under `mask`. For `OVS_PACKET_CMD_EXECUTE` see [`parse_exact`].
///
/// EOVERFLOW when nested deeper than 16 levels, ERANGE for a few short attributes and for a `ct` with
/// two translations, EMSGSIZE for what couldn't be given back in a netlink attribute, EINVAL for
/// everything else.
pub fn parse(attrs: &[u8], key: &Key, mask: &Key, limits: Limits) -> Result<ActionList, Errno> {
    let mut masked = *key;
    masked
        .as_mut_bytes()
        .iter_mut()
        .zip(mask.as_bytes())
        .for_each(|(byte, mask)| *byte &= mask);
    parse_exact(attrs, &masked, limits)
}

/// As [`parse`], with every bit of the key known.
pub fn parse_exact(attrs: &[u8], key: &Key, limits: Limits) -> Result<ActionList, Errno> {
    let labels = if is_mpls(key.eth_type.get()) {
        key.mpls_labels.count_ones()
    } else {
        0
    };
    let packet = Packet {
        eth_type: key.eth_type.get(),
        tagged: is_tagged(key.vlan.tci.get()),
        labels,
    };
    let list = Parser { key, limits }.list(attrs, packet, 0)?;
    // What can't be told in one attribute couldn't be given back.
    if list.wire.len() > usize::from(u16::MAX) - HEADER {
        return Err(Errno::EMSGSIZE);
    }
    Ok(list)
}

/// The packet where an action meets it, as far as it is known.
#[derive(Clone, Copy)]
struct Packet {
    /// Zero: not known.
    eth_type: u16,
    tagged: bool,
    labels: u32,
}

impl Packet {
    /// May a label be pushed right in front of the L3 header?
    fn takes_label(&self) -> bool {
        let known = matches!(
            self.eth_type,
            eth_type::IPV4 | eth_type::IPV6 | eth_type::ARP | eth_type::RARP
        );
        !self.tagged && (known || is_mpls(self.eth_type))
    }
}

fn is_tagged(tci: u16) -> bool {
    tci & VLAN_CFI != 0
}

struct Parser<'k> {
    /// What is known of all packets of the flow.
    key: &'k Key,
    limits: Limits,
}

impl Parser<'_> {
    /// Decodes a list at this depth; 0 is the flow's own.
    fn list(&self, bytes: &[u8], mut packet: Packet, depth: u8) -> Result<ActionList, Errno> {
        if depth > MAX_DEPTH {
            return Err(Errno::EOVERFLOW);
        }
        // As in the module, a nested list begins with the key's answer to whether there is an
        // Ethernet header, not with that at its place.
        let mut ethernet = self.key.mac_proto != 0;
        let mut program = Vec::new();
        let mut wire = Vec::with_capacity(bytes.len());
        let mut attrs = Attrs::new(bytes);
        while let Some(attr) = attrs.next() {
            let mut writer = Writer::new(&mut wire);
            let as_sent = writer.position();
            let action = match attr.kind {
                kind::SAMPLE => self.sample(attr, packet, depth, &mut writer)?,
                kind::CLONE => self.clone(attr, packet, depth, &mut writer)?,
                kind::CHECK_PKT_LEN => self.check_pkt_len(attr, packet, depth, &mut writer)?,
                kind::DEC_TTL => self.dec_ttl(attr, packet, depth, &mut writer)?,
                kind::SET | kind::SET_MASKED => {
                    let masked = attr.kind == kind::SET_MASKED;
                    let known = set::Known {
                        key: self.key,
                        eth_type: packet.eth_type,
                        ethernet,
                    };
                    Action::Set(Box::new(set::parse(attr, masked, known, &mut writer)?))
                }
                kind::CT if self.limits.conntrack => {
                    let ct = conntrack::parse(attr.payload, self.key)?;
                    conntrack::write(&mut writer, kind::CT, &ct)?;
                    Action::Ct(Box::new(ct))
                }
                kind::CT_CLEAR if self.limits.conntrack => {
                    attr_len(attr, 0)?;
                    Action::CtClear
                }
                // Says that nothing follows.
                kind::DROP if attrs.clone().next().is_none() => {
                    attr_len(attr, 4)?;
                    Action::Drop(attr.u32()?)
                }
                kind::METER => {
                    attr_len(attr, 4)?;
                    Action::Meter(attr.u32()?)
                }
                kind::OUTPUT | kind::USERSPACE | kind::RECIRC | kind::HASH | kind::TRUNC => {
                    simple(attr)?
                }
                _ => self.encapsulation(attr, &mut packet, &mut ethernet)?,
            };
            if writer.position() == as_sent {
                writer.bytes(attr.kind, attr.payload)?;
            }
            program.push(action);
        }
        if !attrs.rest().is_empty() {
            return Err(Errno::EINVAL);
        }
        Ok(ActionList {
            program: program.into(),
            wire: wire.into(),
        })
    }

    /// Pushing and popping of headers.
    fn encapsulation(
        &self,
        attr: Attr<'_>,
        packet: &mut Packet,
        ethernet: &mut bool,
    ) -> Result<Action, Errno> {
        match attr.kind {
            kind::PUSH_VLAN => {
                let [tpid, tci] = be16s(attr)?;
                require(*ethernet && is_tag(tpid) && is_tagged(tci))?;
                packet.tagged = true;
                Ok(Action::PushVlan { tpid, tci })
            }
            kind::POP_VLAN => {
                attr_len(attr, 0)?;
                require(*ethernet)?;
                packet.tagged = false;
                Ok(Action::PopVlan)
            }
            kind::PUSH_ETH => {
                attr_len(attr, 12)?;
                require(!std::mem::replace(ethernet, true))?;
                let [src, dst] = zerocopy::transmute!(attr.array::<12>()?);
                Ok(Action::PushEth { src, dst })
            }
            kind::POP_ETH => {
                attr_len(attr, 0)?;
                require(std::mem::replace(ethernet, false) && !packet.tagged)?;
                Ok(Action::PopEth)
            }
            kind::PUSH_MPLS => {
                let (lse, ethertype, _) = label(attr)?;
                require(packet.takes_label())?;
                packet.eth_type = ethertype;
                packet.labels = packet.labels.wrapping_add(1);
                Ok(Action::PushMpls { lse, ethertype })
            }
            kind::ADD_MPLS => {
                let (lse, ethertype, flags) = label(attr)?;
                let l3 = flags & MPLS_L3 != 0;
                require(!l3 || packet.takes_label())?;
                if !l3 && std::mem::replace(ethernet, false) {
                    packet.labels = 1;
                } else {
                    packet.labels = packet.labels.wrapping_add(1);
                }
                packet.eth_type = ethertype;
                Ok(Action::AddMpls { lse, ethertype, l3 })
            }
            kind::POP_MPLS => {
                attr_len(attr, 2)?;
                let ethertype = attr.be16()?;
                require(!packet.tagged && is_mpls(packet.eth_type))?;
                require(ethertype != eth_type::TEB || !*ethernet)?;
                packet.labels = packet.labels.wrapping_sub(1);
                // What is behind the last label isn't known before the packet is looked at anew.
                let known = is_mpls(ethertype) && packet.labels != 0;
                packet.eth_type = if known { ethertype } else { 0 };
                Ok(Action::PopMpls { ethertype })
            }
            kind::PUSH_NSH => {
                // The content is an attribute of its own, whose type isn't looked at.
                let inner = attr.nested().next().ok_or(Errno::EINVAL)?;
                require(std::mem::replace(ethernet, false) || nsh_next(packet.eth_type))?;
                nsh::parse_push(inner.payload).map(Action::PushNsh)
            }
            kind::POP_NSH => {
                attr_len(attr, 0)?;
                let [_, _, _, next, ..] = self.key.nsh_base;
                require(packet.eth_type == eth_type::NSH && (1..=5).contains(&next))?;
                *ethernet = next == NSH_NEXT_ETHERNET;
                Ok(Action::PopNsh)
            }
            _ => Err(Errno::EINVAL),
        }
    }

    fn sample(
        &self,
        attr: Attr<'_>,
        packet: Packet,
        depth: u8,
        writer: &mut Writer<'_>,
    ) -> Result<Action, Errno> {
        let [_, probability, actions] = unique(attr.payload, false)?;
        let probability = probability.ok_or(Errno::EINVAL)?;
        attr_len(probability, 4)?;
        let probability = probability.u32()?;
        let actions = self.list(inside(actions)?, packet, depth + 1)?;
        let nest = writer.begin(kind::SAMPLE);
        writer.u32(sample::PROBABILITY, probability);
        writer.bytes(sample::ACTIONS, &actions.wire)?;
        writer.end(nest)?;
        Ok(Action::Sample {
            probability,
            actions: Box::new(actions),
        })
    }

    fn clone(
        &self,
        attr: Attr<'_>,
        packet: Packet,
        depth: u8,
        writer: &mut Writer<'_>,
    ) -> Result<Action, Errno> {
        let actions = self.list(inside(Some(attr))?, packet, depth + 1)?;
        writer.bytes(kind::CLONE, &actions.wire)?;
        Ok(Action::Clone(Box::new(actions)))
    }

    fn dec_ttl(
        &self,
        attr: Attr<'_>,
        packet: Packet,
        depth: u8,
        writer: &mut Writer<'_>,
    ) -> Result<Action, Errno> {
        let [_, actions] = unique(attr.payload, true)?;
        let exceeded = self.list(inside(actions)?, packet, depth + 1)?;
        let nest = writer.begin(kind::DEC_TTL);
        writer.bytes(dec_ttl::ACTION, &exceeded.wire)?;
        writer.end(nest)?;
        Ok(Action::DecTtl {
            exceeded: Box::new(exceeded),
        })
    }

    fn check_pkt_len(
        &self,
        attr: Attr<'_>,
        packet: Packet,
        depth: u8,
        writer: &mut Writer<'_>,
    ) -> Result<Action, Errno> {
        let mut attrs = attr.nested();
        for attr in &mut attrs {
            match attr.kind {
                check_pkt_len::PKT_LEN => attr.u16().map(|_| ())?,
                check_pkt_len::IF_GREATER | check_pkt_len::IF_LESS_EQUAL => {
                    inside(Some(attr)).map_err(|_| Errno::ERANGE)?;
                }
                _ => return Err(Errno::EINVAL),
            }
        }
        require(attrs.rest().is_empty())?;
        let table = Table::<4>::new(attr.payload);
        let len = table.require(check_pkt_len::PKT_LEN)?.u16()?;
        let greater = table.require(check_pkt_len::IF_GREATER)?;
        let less_equal = table.require(check_pkt_len::IF_LESS_EQUAL)?;
        require(len != 0)?;
        let less_equal = self.list(less_equal.payload, packet, depth + 1)?;
        let greater = self.list(greater.payload, packet, depth + 1)?;
        let nest = writer.begin(kind::CHECK_PKT_LEN);
        writer.u16(check_pkt_len::PKT_LEN, len);
        writer.bytes(check_pkt_len::IF_LESS_EQUAL, &less_equal.wire)?;
        writer.bytes(check_pkt_len::IF_GREATER, &greater.wire)?;
        writer.end(nest)?;
        Ok(Action::CheckPktLen {
            len,
            greater: Box::new(greater),
            less_equal: Box::new(less_equal),
        })
    }
}

/// RFC 8300, 2.2: the next protocol is Ethernet.
const NSH_NEXT_ETHERNET: u8 = 3;

/// Has this type a number among NSH's next protocols?
fn nsh_next(eth_type: u16) -> bool {
    matches!(
        eth_type,
        eth_type::IPV4 | eth_type::IPV6 | eth_type::TEB | eth_type::NSH | eth_type::MPLS_UC
    )
}

/// Actions that ask for nothing and change nothing of the packet's headers.
fn simple(attr: Attr<'_>) -> Result<Action, Errno> {
    match attr.kind {
        kind::USERSPACE => parse_userspace(attr),
        kind::HASH => {
            attr_len(attr, 8)?;
            let [algorithm, basis]: [[u8; 4]; 2] = zerocopy::transmute!(attr.array::<8>()?);
            require(u32::from_ne_bytes(algorithm) == HASH_ALG_L4)?;
            Ok(Action::Hash {
                basis: u32::from_ne_bytes(basis),
            })
        }
        _ => {
            attr_len(attr, 4)?;
            let value = attr.u32()?;
            match attr.kind {
                kind::OUTPUT if value < PORT_NONE => Ok(Action::Output(value)),
                kind::TRUNC if value >= ETHERNET_BYTES => Ok(Action::Trunc(value)),
                kind::RECIRC => Ok(Action::Recirc(value)),
                _ => Err(Errno::EINVAL),
            }
        }
    }
}

fn parse_userspace(attr: Attr<'_>) -> Result<Action, Errno> {
    // Unknown attributes and what is left over don't matter here.
    for inner in attr.nested() {
        if matches!(inner.kind, userspace::PID | userspace::EGRESS_TUN_PORT) {
            inner.u32()?;
        }
    }
    let table = Table::<5>::new(attr.payload);
    let pid = table.require(userspace::PID)?.u32()?;
    require(pid != 0)?;
    let egress = table.get(userspace::EGRESS_TUN_PORT);
    Ok(Action::Userspace(Box::new(Userspace {
        pid,
        userdata: table
            .get(userspace::USERDATA)
            .map(|data| data.payload.into()),
        egress_tun_port: egress.map(|port| port.u32()).transpose()?,
        want_actions: table.get(userspace::ACTIONS).is_some(),
    })))
}

/// The attributes of types 1 to `N - 1`, each at most once. EINVAL for others (unless told to skip
/// larger types) and for what is left over.
fn unique<const N: usize>(
    bytes: &[u8],
    skip_unknown: bool,
) -> Result<[Option<Attr<'_>>; N], Errno> {
    let mut found = [None; N];
    let mut attrs = Attrs::new(bytes);
    for attr in &mut attrs {
        match found.get_mut(usize::from(attr.kind)) {
            None if skip_unknown => {}
            Some(slot) if attr.kind != 0 && slot.is_none() => *slot = Some(attr),
            _ => return Err(Errno::EINVAL),
        }
    }
    // Not even padding may be missing at the end.
    require(attrs.rest().is_empty() && bytes.len().is_multiple_of(4))?;
    Ok(found)
}

/// The payload of an attribute that holds a list: nothing, or at least an attribute's header.
fn inside(list: Option<Attr<'_>>) -> Result<&[u8], Errno> {
    let payload = list.ok_or(Errno::EINVAL)?.payload;
    require(payload.is_empty() || payload.len() >= HEADER)?;
    Ok(payload)
}

fn attr_len(attr: Attr<'_>, len: usize) -> Result<(), Errno> {
    require(attr.payload.len() == len)
}

fn require(condition: bool) -> Result<(), Errno> {
    if condition {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

/// `struct ovs_action_push_vlan`.
fn be16s(attr: Attr<'_>) -> Result<[u16; 2], Errno> {
    attr_len(attr, 4)?;
    let words: [[u8; 2]; 2] = zerocopy::transmute!(attr.array::<4>()?);
    Ok(words.map(u16::from_be_bytes))
}

/// `struct ovs_action_push_mpls` and `struct ovs_action_add_mpls`: entry, type, flags.
fn label(attr: Attr<'_>) -> Result<(U32, u16, u16), Errno> {
    attr_len(attr, 8)?;
    let [a, b, c, d, e, f, g, h] = attr.array::<8>()?;
    let ethertype = u16::from_be_bytes([e, f]);
    require(is_mpls(ethertype))?;
    Ok((
        U32::from_bytes([a, b, c, d]),
        ethertype,
        u16::from_ne_bytes([g, h]),
    ))
}
