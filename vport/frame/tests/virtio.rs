//! The virtio-net header, there and back.

use frame::virtio::{HEADER_BYTES, VirtioError, decode, encode};
use frame::{Gso, GsoKind, Offload, PartialChecksum};
use proptest::prelude::*;

proptest! {
    #[test]
    fn offloads_come_back(
        csum in prop::option::of((0u16..1000, 0u16..100)),
        gso in prop::option::of((0usize..4, any::<bool>(), 1u16.., any::<u16>())),
        csum_valid in any::<bool>(),
    ) {
        use GsoKind::*;
        let kinds = [TcpV4, TcpV6, UdpL4, UdpFragments];
        let offload = Offload {
            csum: csum.map(|(start, offset)| PartialChecksum { start, offset }),
            gso: gso.map(|(kind, ecn, size, header_len)| {
                Gso { kind: kinds[kind], ecn, size, header_len }
            }),
            // The header can't say both.
            csum_valid: csum_valid && csum.is_none(),
        };
        prop_assert_eq!(decode(&encode(&offload), 2000), Ok(offload));
    }

    #[test]
    fn any_header_decodes_or_errs(header in any::<[u8; HEADER_BYTES]>(), len in 0usize..70_000) {
        if let Ok(Offload { csum: Some(csum), .. }) = decode(&header, len) {
            prop_assert!(csum.field() + 2 <= len);
        }
    }
}

#[test]
fn the_layout_is_the_kernels() {
    // flags, gso_type, hdr_len, gso_size, csum_start, csum_offset: a TSO packet over IPv4 with ECN.
    let mut header = [1, 0x81, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&54u16.to_ne_bytes());
    header[4..6].copy_from_slice(&1448u16.to_ne_bytes());
    header[6..8].copy_from_slice(&34u16.to_ne_bytes());
    header[8..10].copy_from_slice(&16u16.to_ne_bytes());
    let offload = decode(&header, 5000).unwrap();
    assert_eq!(
        offload.csum,
        Some(PartialChecksum {
            start: 34,
            offset: 16
        })
    );
    let gso = Gso {
        kind: GsoKind::TcpV4,
        ecn: true,
        size: 1448,
        header_len: 54,
    };
    assert_eq!(offload.gso, Some(gso));
    assert_eq!(encode(&offload), header);
}

#[test]
fn nonsense_is_refused() {
    let end = |start: u16| {
        let [s0, s1] = start.to_ne_bytes();
        [1, 0, 0, 0, 0, 0, s0, s1, 0, 0]
    };
    assert!(decode(&end(98), 100).is_ok());
    assert_eq!(decode(&end(99), 100), Err(VirtioError::Checksum));
    assert_eq!(
        decode(&[0, 2, 0, 0, 1, 1, 0, 0, 0, 0], 100),
        Err(VirtioError::GsoType(2))
    );
    assert_eq!(
        decode(&[0, 1, 0, 0, 0, 0, 0, 0, 0, 0], 100),
        Err(VirtioError::GsoSize)
    );
    assert_eq!(
        decode(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0], 100).map(|o| o.csum_valid),
        Ok(true)
    );
}
