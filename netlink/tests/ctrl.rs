//! The recorded conversations of Linux 6.1 with `nlctrl`, and those that generic netlink answers
//! before a family's handler runs, replayed over the real socket.
//!
//! Differs by nature, and is translated here: family ids (32.. there) and group ids (9.. there),
//! which stand outside of what the kernel assigns; the port id of the client (`nlmsg_pid`). The
//! dump of all families lists only ours. Everything else is byte for byte.

// Clippy knows only #[test] functions as tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Fixture, header};
use netlink::message::{Messages, control};
use netlink::transport;

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

fn replace(message: &mut [u8], at: usize, from: std::ops::Range<u16>, base: u16) {
    let Some(field) = message.get_mut(at..at + 2) else {
        return;
    };
    let id = u16::from_ne_bytes([field[0], field[1]]);
    if from.contains(&id) {
        field.copy_from_slice(&(id - from.start + base).to_ne_bytes());
    }
}

/// A recorded message as it would be with our ids. Those stand in the type, in an echoed request's
/// type, in CTRL_ATTR_FAMILY_ID and in CTRL_ATTR_MCAST_GRP_ID.
fn translate(message: &[u8]) -> Vec<u8> {
    const FAMILIES: std::ops::Range<u16> = 32..38;
    let mut message = message.to_vec();
    match header(&message).kind {
        control::ERROR => {
            let inner = translate(&message[20..]);
            message[20..].copy_from_slice(&inner);
        }
        16 => {
            for at in (20..message.len().saturating_sub(7)).step_by(4) {
                match message[at..at + 4] {
                    [6, 0, 1, 0] => {
                        replace(&mut message, at + 4, FAMILIES, transport::family_id(0))
                    }
                    [8, 0, 2, 0]
                        if message[at - 4..at] == [0x20, 0, 1, 0]
                            || message[at - 4..at] == [0x1c, 0, 1, 0] =>
                    {
                        replace(&mut message, at + 4, 9..14, transport::GROUP_BASE as u16);
                    }
                    _ => {}
                }
            }
        }
        _ => replace(&mut message, 4, FAMILIES, transport::family_id(0)),
    }
    message
}

#[test]
fn answers_as_linux_did() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let corpus = include_str!("../../tests/corpus/ctrl.jsonl");
    let mut replayed = 0;
    for line in corpus.lines() {
        let case: serde_json::Value = serde_json::from_str(line).unwrap();
        let Some(name) = case["name"].as_str() else {
            continue;
        };
        if name.starts_with("version-") {
            // These reach the datapath, which isn't there.
            continue;
        }
        let mut expected: Vec<Vec<u8>> = case["replies_hex"]
            .as_array()
            .unwrap()
            .iter()
            .map(|reply| translate(&bytes(reply.as_str().unwrap())))
            .collect();
        if name == "getfamily-dump" {
            expected.retain(|reply| {
                header(reply).kind == control::DONE
                    || reply.windows(6).any(|window| window == b"\x02\0ovs_")
            });
            assert_eq!(expected.len(), 7);
        }
        for reply in &mut expected {
            reply[12..16].copy_from_slice(&client.port_id().to_ne_bytes());
        }
        let request = translate(&bytes(case["request_hex"].as_str().unwrap()));
        // The recording is by message, a dump's datagram holds several. The rest after an unaligned
        // last message is padding.
        let mut padded = request.clone();
        padded.resize(request.len().next_multiple_of(4), 0);
        let answers: Vec<Vec<u8>> = client
            .converse(&[padded])
            .iter()
            .flat_map(|part| {
                Messages::new(part)
                    .map(|message| message.1.to_vec())
                    .collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(answers, expected, "{name}");
        replayed += 1;
    }
    assert_eq!(replayed, 32);
}
