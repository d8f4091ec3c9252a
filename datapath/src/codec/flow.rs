//! What names a flow: a unique identifier chosen by the client, or else its key.
//!
//! Source: uapi `linux/openvswitch.h`, `OVS_FLOW_ATTR_UFID` and `OVS_UFID_F_*`.

use netlink::Errno;
use netlink::attr::Attr;
use netlink::quiet::Quiet;

pub use ::flow::flow::Ufid;

/// Reads `OVS_FLOW_ATTR_UFID`. An identifier that is too long is ignored, with a warning in the log:
/// the request then goes by its key, as in the module. ERANGE for an empty one.
pub fn parse_ufid(attr: Option<Attr<'_>>) -> Result<Option<Ufid>, Errno> {
    let Some(attr) = attr else { return Ok(None) };
    if attr.payload.is_empty() {
        return Err(Errno::ERANGE);
    }
    let ufid = Ufid::new(attr.payload);
    if ufid.is_none() {
        // Anybody may ask so, again and again.
        static WARNINGS: Quiet = Quiet::new();
        let bytes = attr.payload.len();
        WARNINGS.say(|| tracing::warn!(bytes, "ufid exceeds the range of 1 to 16 bytes, ignored"));
    }
    Ok(ufid)
}

/// What a reply may leave out (`OVS_UFID_F_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UfidFlags(u32);

impl UfidFlags {
    const OMIT_KEY: u32 = 1 << 0;
    const OMIT_MASK: u32 = 1 << 1;
    const OMIT_ACTIONS: u32 = 1 << 2;

    /// Reads `OVS_FLOW_ATTR_UFID_FLAGS`; unknown bits are ignored. ERANGE if shorter than a u32.
    pub fn parse(attr: Option<Attr<'_>>) -> Result<Self, Errno> {
        attr.map_or(Ok(Self::default()), |attr| attr.u32().map(Self))
    }

    /// Leave out the key: only of a flow that has a UFID, since the key is the name of the others.
    pub fn omit_key(self) -> bool {
        self.0 & Self::OMIT_KEY != 0
    }

    /// Leave out the mask.
    pub fn omit_mask(self) -> bool {
        self.0 & Self::OMIT_MASK != 0
    }

    /// Leave out the actions.
    pub fn omit_actions(self) -> bool {
        self.0 & Self::OMIT_ACTIONS != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ufid(len: usize) -> Result<Option<Ufid>, Errno> {
        parse_ufid(Some(Attr {
            kind: 9,
            payload: &[0; 32][..len],
        }))
    }

    #[test]
    fn one_to_sixteen_bytes_name_a_flow() {
        assert_eq!(ufid(0), Err(Errno::ERANGE));
        assert_eq!(ufid(17), Ok(None));
        assert_eq!(parse_ufid(None), Ok(None));
        let (short, long) = (ufid(1).unwrap().unwrap(), ufid(16).unwrap().unwrap());
        assert_ne!(short, long);
        assert_eq!((short.as_bytes().len(), long.as_bytes().len()), (1, 16));
    }
}
