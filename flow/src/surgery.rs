//! Headers put in and taken out, as the kernel does it.

use frame::{Frame, VlanTag};
use zerocopy::network_endian::U32;

use crate::headers::{ETHERNET, Layers, eth_type, is_mpls, u16_at};
use crate::key::{Key, VLAN_CFI, VlanKey};
use crate::rewrite::{RewriteError, header_mut};

/// Bytes of a tag, of a label stack entry.
const TAG: u16 = 4;
const LABEL: u16 = 4;
/// Where the type stands in an Ethernet header.
const TYPE: usize = 12;
/// Bytes of an NSH base header.
const NSH_BASE: usize = 8;

const NO_TAG: VlanKey = VlanKey {
    tpid: zerocopy::network_endian::U16::ZERO,
    tci: zerocopy::network_endian::U16::ZERO,
};

/// What [`dec_ttl`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ttl {
    /// Decremented (or not an IP packet: nothing to do).
    Alive,
    /// It was 1 or less: run the exception's actions, then drop. The frame isn't changed.
    Exceeded,
}

/// Pushes a tag; the one that was out of band goes among the bytes. `tci` as in the key, with
/// [`VLAN_CFI`] set; the bit doesn't go into the frame.
///
/// # Errors
/// [`RewriteError`].
pub fn push_vlan(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    tpid: u16,
    tci: u16,
) -> Result<(), RewriteError> {
    if key.mac_proto == 0 {
        return Err(RewriteError::NoHeader);
    }
    if let Some(tag) = frame.vlan {
        frame.push_tag_inband()?;
        layers.moved_back(TAG);
        layers.protocol = tag.tpid;
        layers.key_valid = false;
    } else {
        key.vlan = VlanKey {
            tpid: tpid.into(),
            tci: tci.into(),
        };
    }
    frame.vlan = Some(VlanTag {
        tpid,
        tci: tci & !VLAN_CFI,
    });
    Ok(())
}

/// Removes the outermost tag, if there is one; the next one goes out of band.
///
/// # Errors
/// [`RewriteError`].
pub fn pop_vlan(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), RewriteError> {
    if frame.vlan.take().is_none() {
        if !VlanTag::is_tpid(layers.protocol) {
            return Ok(());
        }
        take_tag(frame, layers)?;
        frame.vlan = None;
    }
    if VlanTag::is_tpid(layers.protocol) {
        take_tag(frame, layers)?;
        layers.key_valid = false;
    } else {
        key.vlan = NO_TAG;
    }
    Ok(())
}

/// Moves the tag that is the first thing behind the addresses out of band.
fn take_tag(frame: &mut Frame, layers: &mut Layers) -> Result<(), RewriteError> {
    if !frame.pop_tag_outofband() {
        return Err(RewriteError::NoHeader);
    }
    layers.moved_forward(TAG);
    layers.network = layers.network.max(ETHERNET as u16);
    let protocol = u16_at(frame.bytes(), TYPE).ok_or(RewriteError::NoHeader)?;
    layers.protocol = if protocol >= eth_type::FIRST {
        protocol
    } else if u16_at(frame.bytes(), ETHERNET) == Some(0xffff) {
        // Novell's raw 802.3 (ETH_P_802_3); else 802.2.
        0x0001
    } else {
        crate::key::ETH_P_802_2
    };
    Ok(())
}

/// Pushes a label stack entry in front of the L3 header.
///
/// # Errors
/// [`RewriteError`].
pub fn push_mpls(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    lse: U32,
    ethertype: u16,
) -> Result<(), RewriteError> {
    add_mpls(frame, key, layers, lse, ethertype, true)
}

/// Pushes a label stack entry in front of the L3 header (`l3`) or of the whole frame, which is then an
/// L3 packet.
///
/// # Errors
/// [`RewriteError`].
pub fn add_mpls(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    lse: U32,
    ethertype: u16,
    l3: bool,
) -> Result<(), RewriteError> {
    if !is_mpls(ethertype) {
        return Err(RewriteError::NoHeader);
    }
    let at = if l3 { usize::from(layers.network) } else { 0 };
    frame.insert(at, &lse.to_bytes())?;
    layers.transport = layers
        .transport
        .and_then(|transport| transport.checked_add(LABEL));
    if at >= ETHERNET {
        *header_mut(frame, TYPE)? = ethertype.to_be_bytes();
    } else {
        key.mac_proto = 0;
        layers.network = 0;
    }
    layers.protocol = ethertype;
    layers.key_valid = false;
    Ok(())
}

/// Removes the outermost label; what follows has the type `ethertype`. Nothing happens to a packet that
/// has none.
///
/// # Errors
/// [`RewriteError`].
pub fn pop_mpls(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    ethertype: u16,
) -> Result<(), RewriteError> {
    if is_mpls(layers.protocol) {
        let network = usize::from(layers.network);
        frame.remove(network, usize::from(LABEL))?;
        layers.transport = layers
            .transport
            .and_then(|at| at.checked_sub(LABEL))
            .filter(|at| *at >= layers.network);
        if key.mac_proto != 0 && network >= ETHERNET {
            *header_mut(frame, network - 2)? = ethertype.to_be_bytes();
        }
        layers.protocol = ethertype;
    }
    if ethertype == eth_type::BRIDGED {
        key.mac_proto = 1;
    }
    layers.key_valid = false;
    Ok(())
}

/// Puts an Ethernet header in front of an L3 packet.
///
/// # Errors
/// [`RewriteError`].
pub fn push_eth(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    src: [u8; 6],
    dst: [u8; 6],
) -> Result<(), RewriteError> {
    if layers.network != 0 || frame.vlan.is_some() {
        return Err(RewriteError::NoHeader);
    }
    frame.push_front(ETHERNET)?;
    *header_mut(frame, 0)? = dst;
    *header_mut(frame, 6)? = src;
    *header_mut(frame, TYPE)? = layers.protocol.to_be_bytes();
    layers.moved_back(ETHERNET as u16);
    key.mac_proto = 1;
    layers.key_valid = false;
    Ok(())
}

/// Removes the Ethernet header: what remains is an L3 packet of type `layers.protocol`.
///
/// # Errors
/// [`RewriteError`].
pub fn pop_eth(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), RewriteError> {
    if usize::from(layers.network) < ETHERNET {
        return Err(RewriteError::NoHeader);
    }
    frame.pull_front(ETHERNET)?;
    layers.moved_forward(ETHERNET as u16);
    key.mac_proto = 0;
    layers.key_valid = false;
    Ok(())
}

/// Puts an NSH header (base header and context, in whole words) in front of the whole frame, which is
/// then an L3 packet. Its length and "next protocol" are made to fit.
///
/// # Errors
/// [`RewriteError`].
pub fn push_nsh(
    frame: &mut Frame,
    key: &mut Key,
    layers: &mut Layers,
    header: &[u8],
) -> Result<(), RewriteError> {
    // The length field has six bits.
    if header.len() < NSH_BASE || !header.len().is_multiple_of(4) || header.len() / 4 > 0x3f {
        return Err(RewriteError::NoHeader);
    }
    let next = match layers.protocol {
        _ if layers.network != 0 => 3,
        eth_type::IPV4 => 1,
        eth_type::IPV6 => 2,
        eth_type::BRIDGED => 3,
        eth_type::NSH => 4,
        eth_type::MPLS => 5,
        _ => return Err(RewriteError::NoHeader),
    };
    frame.insert(0, header)?;
    let length = (header.len() / 4) as u8;
    let base = header_mut::<4>(frame, 0)?;
    base[1] = base[1] & 0xc0 | length;
    base[3] = next;
    *layers = Layers {
        network: 0,
        transport: None,
        protocol: eth_type::NSH,
        key_valid: false,
    };
    key.mac_proto = 0;
    Ok(())
}

/// Removes the NSH header that a packet begins with.
///
/// # Errors
/// [`RewriteError`], also if an Ethernet header is in front of it: take that away first.
pub fn pop_nsh(frame: &mut Frame, key: &mut Key, layers: &mut Layers) -> Result<(), RewriteError> {
    if layers.network != 0 || layers.protocol != eth_type::NSH {
        return Err(RewriteError::NoHeader);
    }
    let [_, length, _, next] = *header_mut::<4>(frame, 0)?;
    let length = usize::from(length & 0x3f) * 4;
    let protocol = match next {
        1 => eth_type::IPV4,
        2 => eth_type::IPV6,
        3 => eth_type::BRIDGED,
        4 => eth_type::NSH,
        5 => eth_type::MPLS,
        _ => return Err(RewriteError::NoHeader),
    };
    if length < NSH_BASE {
        return Err(RewriteError::NoHeader);
    }
    frame.pull_front(length)?;
    *layers = Layers {
        network: 0,
        transport: None,
        protocol,
        key_valid: false,
    };
    key.mac_proto = u8::from(protocol == eth_type::BRIDGED);
    Ok(())
}

/// Decrements the TTL or hop limit.
///
/// # Errors
/// [`RewriteError`].
pub fn dec_ttl(frame: &mut Frame, key: &mut Key, layers: &Layers) -> Result<Ttl, RewriteError> {
    // Behind a second tag, too, where the kernel does nothing.
    let protocol = match layers.protocol {
        tpid if VlanTag::is_tpid(tpid) => key.eth_type.get(),
        protocol => protocol,
    };
    let network = usize::from(layers.network);
    match protocol {
        eth_type::IPV4 => {
            let ip = header_mut::<20>(frame, network)?;
            if ip[8] <= 1 {
                return Ok(Ttl::Exceeded);
            }
            let old = [ip[8], ip[9]];
            ip[8] -= 1;
            let sum = u16::from_be_bytes([ip[10], ip[11]]);
            let sum = frame::checksum::update(sum, &old, &[ip[8], ip[9]]);
            [ip[10], ip[11]] = sum.to_be_bytes();
            key.ip_ttl = ip[8];
        }
        eth_type::IPV6 => {
            let ip = header_mut::<{ crate::ipv6::HEADER }>(frame, network)?;
            if ip[7] <= 1 {
                return Ok(Ttl::Exceeded);
            }
            ip[7] -= 1;
            key.ip_ttl = ip[7];
        }
        _ => {}
    }
    Ok(Ttl::Alive)
}
