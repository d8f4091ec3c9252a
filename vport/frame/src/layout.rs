//! Just enough of the headers to cut a frame or to find an SCTP checksum: where the IP header is, where
//! the L4 header. Everything is looked at anew; nobody's hint is trusted.

/// TCP.
pub(crate) const TCP: u8 = 6;
/// UDP.
pub(crate) const UDP: u8 = 17;
/// SCTP.
pub(crate) const SCTP: u8 = 132;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
const IPV6_HEADER: usize = 40;

/// Where an IP packet's headers are. All offsets lie within the frame that was looked at, and there is
/// an L3 header of full length at `network`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The IP header.
    pub network: usize,
    /// IPv6, else IPv4.
    pub v6: bool,
    /// Of the L4 header.
    pub proto: u8,
    /// The L4 header; at most the frame's length.
    pub transport: usize,
    /// IPv6: the byte that names the header at `fragmentable`.
    pub next_header_at: usize,
    /// IPv6: where a fragment header would go (RFC 8200, 4.5); at most `transport`.
    pub fragmentable: usize,
}

/// Why there is no layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoLayout {
    /// Cut short.
    Short,
    /// Not IP, a fragment, or a header that says nothing sensible.
    Protocol,
}

/// What follows.
enum Next {
    Ethernet,
    Type(u16),
    /// IP, the version is in its first bits.
    Ip,
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, NoLayout> {
    let word = bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .ok_or(NoLayout::Short)?;
    Ok(u16::from_be_bytes(*word))
}

fn u8_at(bytes: &[u8], at: usize) -> Result<u8, NoLayout> {
    bytes.get(at).copied().ok_or(NoLayout::Short)
}

impl Layout {
    /// Of a frame that begins with an Ethernet header: behind tags, MPLS labels and NSH.
    pub fn of_ethernet(bytes: &[u8]) -> Result<Self, NoLayout> {
        Self::of(bytes, Next::Ethernet)
    }

    /// Of a frame that begins with an IP header.
    pub fn of_ip(bytes: &[u8]) -> Result<Self, NoLayout> {
        Self::of(bytes, Next::Ip)
    }

    fn of(bytes: &[u8], mut next: Next) -> Result<Self, NoLayout> {
        let mut at = 0;
        // Each turn goes forward, so that this ends at the end of the bytes at the latest.
        loop {
            next = match next {
                Next::Ethernet => {
                    at += 14;
                    Next::Type(u16_at(bytes, at - 2)?)
                }
                Next::Type(0x8100 | 0x88a8) => {
                    at += 4;
                    Next::Type(u16_at(bytes, at - 2)?)
                }
                Next::Type(0x0800 | 0x86dd) => Next::Ip,
                Next::Type(0x8847 | 0x8848) => {
                    at += 4;
                    let bottom = u8_at(bytes, at - 2)? & 1 != 0;
                    if bottom { Next::Ip } else { Next::Type(0x8847) }
                }
                Next::Type(0x894f) => {
                    let length = usize::from(u16_at(bytes, at)? & 0x3f) * 4;
                    let inner = u8_at(bytes, at + 3)?;
                    if length < 8 {
                        return Err(NoLayout::Protocol);
                    }
                    at += length;
                    match inner {
                        1 | 2 => Next::Ip,
                        3 => Next::Ethernet,
                        4 => Next::Type(0x894f),
                        5 => Next::Type(0x8847),
                        _ => return Err(NoLayout::Protocol),
                    }
                }
                Next::Type(_) => return Err(NoLayout::Protocol),
                Next::Ip => {
                    return match u8_at(bytes, at)? >> 4 {
                        4 => Self::of_v4(bytes, at),
                        6 => Self::of_v6(bytes, at),
                        _ => Err(NoLayout::Protocol),
                    };
                }
            }
        }
    }

    fn of_v4(bytes: &[u8], network: usize) -> Result<Self, NoLayout> {
        let header = bytes
            .get(network..)
            .and_then(|rest| rest.first_chunk::<20>());
        let header = header.ok_or(NoLayout::Short)?;
        let length = usize::from(header[0] & 0xf) * 4;
        // A fragment can't be cut again: its L4 header isn't (all) here.
        if length < 20 || u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
            return Err(NoLayout::Protocol);
        }
        let transport = network + length;
        if transport > bytes.len() {
            return Err(NoLayout::Short);
        }
        let (next_header_at, fragmentable) = (network + 9, transport);
        let proto = header[9];
        Ok(Self {
            network,
            v6: false,
            proto,
            transport,
            next_header_at,
            fragmentable,
        })
    }

    fn of_v6(bytes: &[u8], network: usize) -> Result<Self, NoLayout> {
        let mut at = network + IPV6_HEADER;
        if at > bytes.len() {
            return Err(NoLayout::Short);
        }
        let mut named_at = network + 6;
        let (mut next_header_at, mut fragmentable) = (named_at, at);
        loop {
            let proto = u8_at(bytes, named_at)?;
            if !matches!(proto, HOP_BY_HOP | ROUTING | DESTINATION) {
                let transport = at;
                return Ok(Self {
                    network,
                    v6: true,
                    proto,
                    transport,
                    next_header_at,
                    fragmentable,
                });
            }
            named_at = at;
            at += 8 * (usize::from(u8_at(bytes, at + 1)?) + 1);
            if at > bytes.len() {
                return Err(NoLayout::Short);
            }
            if proto != DESTINATION {
                // Destination options belong to each fragment only in front of a routing header.
                (next_header_at, fragmentable) = (named_at, at);
            }
        }
    }
}
