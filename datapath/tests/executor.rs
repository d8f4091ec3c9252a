//! What executors of one daemon must not have in common.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use datapath::executor::Executor;
use datapath::upcall::Upcaller;
use flow::stats::Source;
use frame::{Frame, Gso, GsoKind, PartialChecksum, Segments};
use netlink::hub::Hub;

/// An IPv6 datagram of 3,000 bytes that is to leave in fragments.
fn datagram() -> Frame {
    let mut bytes = vec![0; 14 + 40 + 8 + 3000];
    bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
    bytes[14] = 0x60;
    bytes[18..20].copy_from_slice(&3008_u16.to_be_bytes());
    (bytes[20], bytes[21]) = (17, 64);
    (bytes[22], bytes[38]) = (0xfd, 0xfd);
    bytes[58..60].copy_from_slice(&3008_u16.to_be_bytes());
    let mut frame = Frame::from_bytes(&bytes);
    frame.offload.gso = Some(Gso {
        kind: GsoKind::UdpFragments,
        size: 1448,
        ecn: false,
        header_len: 0,
    });
    frame.offload.csum = Some(PartialChecksum {
        start: 54,
        offset: 6,
    });
    frame
}

/// Fragments of two workers' packets between the same hosts are told apart by their identification alone.
#[test]
fn each_executor_counts_ipv6_fragments_from_elsewhere() {
    let mut idents = BTreeSet::new();
    for index in 0..16 {
        let upcaller = Upcaller::new(Hub::default(), usize::from(index));
        let mut executor = Executor::new(Source::new(index, 16).unwrap(), upcaller, 42);
        for _ in 0..100 {
            let frame = datagram();
            let mut segments = Segments::new(&frame).unwrap();
            let first = segments.next(&mut executor.pool).unwrap();
            // Behind the IPv6 header: next header, reserved, offset, identification.
            let bytes = first.bytes()[58..62].try_into().unwrap();
            idents.insert(u32::from_be_bytes(bytes));
        }
    }
    assert_eq!(idents.len(), 1600, "an identification was used twice");
}
