//! VXLAN (RFC 7348), with Group Based Policy (draft-smith-vxlan-group-policy) and the Generic Protocol
//! Extension (draft-ietf-nvo3-vxlan-gpe).
//!
//! ```text
//! |G|R|R|R|I|P|R|O| |D|R|R|A|R|R|R| ...|  group policy id, or GPE's next protocol in the last byte
//! |              VNI                  |    zero   |
//! ```

use super::{Inner, Payload, Refused, TunnelKey, tunnel_flags};
use crate::buffer::{Frame, FrameError};

/// Bytes of the header.
pub const HEADER: usize = 8;

const HAS_VNI: u8 = 0x08;
const HAS_POLICY: u8 = 0x80;
const DONT_LEARN: u8 = 0x40;
const POLICY_APPLIED: u8 = 0x08;
const GPE_VERSION: u8 = 0x30;
const GPE_PROTOCOL: u8 = 0x04;
const GPE_OAM: u8 = 0x01;

/// `VXLAN_GBP_DONT_LEARN`, `VXLAN_GBP_POLICY_APPLIED` in the word of [`TunnelKey::opts`].
const KEY_DONT_LEARN: u32 = 1 << 22;
const KEY_POLICY_APPLIED: u32 = 1 << 19;

/// What the port is told to speak beyond RFC 7348.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Group Based Policy.
    pub gbp: bool,
    /// The Generic Protocol Extension.
    pub gpe: bool,
}

/// Reads the header that `bytes` begin with.
///
/// # Errors
/// [`Refused`]: also for bits that RFC 7348 tells to ignore, as in the kernel: they belong to
/// extensions that this port doesn't speak.
pub fn parse(bytes: &[u8], speaks: Extensions, key: &mut TunnelKey) -> Result<Inner, Refused> {
    let header = bytes.first_chunk::<HEADER>().ok_or(Refused::Short)?;
    let [flags, policy_flags, id0, id1, v0, v1, v2, zero] = *header;
    if flags & HAS_VNI == 0 || zero != 0 {
        return Err(Refused::Header);
    }
    let mut payload = Payload::Ethernet;
    let mut unknown = u32::from_be_bytes([flags & !HAS_VNI, policy_flags, id0, id1]);
    if speaks.gpe {
        if flags & GPE_PROTOCOL == 0 || flags & (GPE_VERSION | GPE_OAM) != 0 {
            return Err(Refused::Header);
        }
        payload = from_next_protocol(id1).ok_or(Refused::Protocol)?;
        unknown &= !u32::from_be_bytes([GPE_PROTOCOL, 0, 0, 0xff]);
    }
    if speaks.gbp {
        unknown &= !u32::from_be_bytes([HAS_POLICY, 0xff, 0xff, 0xff]);
    }
    if unknown != 0 {
        return Err(Refused::Header);
    }
    key.id = u64::from(u32::from_be_bytes([0, v0, v1, v2])).into();
    key.flags |= tunnel_flags::KEY;
    if speaks.gbp && flags & HAS_POLICY != 0 {
        let mut word = u32::from(u16::from_be_bytes([id0, id1]));
        if policy_flags & DONT_LEARN != 0 {
            word |= KEY_DONT_LEARN;
        }
        if policy_flags & POLICY_APPLIED != 0 {
            word |= KEY_POLICY_APPLIED;
        }
        key.set_options(tunnel_flags::VXLAN_OPT, &word.to_ne_bytes());
    }
    Ok(Inner {
        header: HEADER,
        payload,
    })
}

/// Puts the header in front of a frame.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn push(
    frame: &mut Frame,
    speaks: Extensions,
    key: &TunnelKey,
    payload: Payload,
) -> Result<(), FrameError> {
    let [.., v0, v1, v2] = key.id.to_bytes();
    let mut header = [HAS_VNI, 0, 0, 0, v0, v1, v2, 0];
    let word = key.options().first_chunk().copied().unwrap_or_default();
    let word = u32::from_ne_bytes(word);
    if speaks.gbp && key.has(tunnel_flags::VXLAN_OPT) && word != 0 {
        let [id0, id1] = (word as u16).to_be_bytes();
        (header[2], header[3]) = (id0, id1);
        header[0] |= HAS_POLICY;
        if word & KEY_DONT_LEARN != 0 {
            header[1] |= DONT_LEARN;
        }
        if word & KEY_POLICY_APPLIED != 0 {
            header[1] |= POLICY_APPLIED;
        }
    }
    if speaks.gpe {
        header[0] |= GPE_PROTOCOL;
        header[3] = next_protocol(payload);
    }
    frame.push_front(HEADER)?.copy_from_slice(&header);
    Ok(())
}

fn from_next_protocol(number: u8) -> Option<Payload> {
    Some(match number {
        1 => Payload::L3(0x0800),
        2 => Payload::L3(0x86dd),
        3 => Payload::Ethernet,
        4 => Payload::L3(0x894f),
        5 => Payload::L3(0x8847),
        _ => return None,
    })
}

fn next_protocol(payload: Payload) -> u8 {
    match payload {
        Payload::L3(0x0800) => 1,
        Payload::L3(0x86dd) => 2,
        Payload::Ethernet => 3,
        Payload::L3(0x894f) => 4,
        Payload::L3(0x8847) => 5,
        Payload::L3(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Extensions = Extensions {
        gbp: false,
        gpe: false,
    };
    const GBP: Extensions = Extensions {
        gbp: true,
        gpe: false,
    };
    const GPE: Extensions = Extensions {
        gbp: false,
        gpe: true,
    };

    fn parsed(bytes: &[u8], speaks: Extensions) -> Result<(TunnelKey, Inner), Refused> {
        let mut key = TunnelKey::none();
        parse(bytes, speaks, &mut key).map(|inner| (key, inner))
    }

    #[test]
    fn a_header_is_read_and_written_again() {
        for (bytes, speaks) in [
            ([0x08, 0, 0, 0, 0, 1, 0x23, 0], PLAIN),
            ([0x88, 0x48, 1, 0x23, 0xff, 1, 0x23, 0], GBP),
            ([0x08, 0, 0, 0, 0, 1, 0x23, 0], GBP),
            ([0x0c, 0, 0, 3, 0, 1, 0x23, 0], GPE),
            ([0x0c, 0, 0, 1, 0, 1, 0x23, 0], GPE),
        ] {
            let (key, inner) = parsed(&bytes, speaks).unwrap();
            let mut frame = Frame::from_bytes(&[7; 20]);
            push(&mut frame, speaks, &key, inner.payload).unwrap();
            assert_eq!(&frame.bytes()[..HEADER], &bytes);
        }
    }

    #[test]
    fn what_belongs_to_others_is_refused() {
        for (bytes, speaks) in [
            // No VNI.
            ([0x00, 0, 0, 0, 0, 1, 0x23, 0], PLAIN),
            // A policy that this port doesn't speak.
            ([0x88, 0x08, 1, 0x23, 0, 1, 0x23, 0], PLAIN),
            // Something behind the VNI.
            ([0x08, 0, 0, 0, 0, 1, 0x23, 1], GBP),
            // No next protocol, another version, OAM.
            ([0x08, 0, 0, 3, 0, 1, 0x23, 0], GPE),
            ([0x1c, 0, 0, 3, 0, 1, 0x23, 0], GPE),
            ([0x0d, 0, 0, 3, 0, 1, 0x23, 0], GPE),
        ] {
            assert_eq!(parsed(&bytes, speaks), Err(Refused::Header), "{bytes:x?}");
        }
        assert_eq!(parsed(&[8, 0, 0], PLAIN), Err(Refused::Short));
    }
}
