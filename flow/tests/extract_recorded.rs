//! Extraction against what the kernel module extracted from the same frames.
// Helpers outside of the test functions may fail like those.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod oracle;

use flow::extract::{Metadata, extract, update};
use flow::key::Key;
use frame::Frame;
use oracle::{attribute, cases, hex, key_attributes, to_hex};

fn metadata(recorded: &[u8]) -> Metadata {
    let in_port = attribute(recorded, 3).map(|port| u32::from_le_bytes(port.try_into().unwrap()));
    Metadata {
        in_port: in_port.unwrap_or(flow::key::PORT_NONE),
        ..Metadata::default()
    }
}

#[test]
fn keys_are_the_kernels() {
    let (mut keys, mut drops) = (0, 0);
    // One key for all of them, so that what one leaves behind would be seen in the next.
    let mut key = Key::ZERO;
    let mut wrong = Vec::new();
    for group in ["sem_extract", "sem_rewrite", "sem_l2", "sem_misc"] {
        for case in cases(group) {
            let name = case["name"].as_str().unwrap();
            let packet = hex(&case, "packet_in_hex").unwrap();
            let recorded = hex(&case, "miss_key_hex");
            let mut frame = Frame::from_bytes(&packet);
            let meta = metadata(recorded.as_deref().unwrap_or_default());
            let got = extract(&mut frame, &meta, &mut key);
            match (&recorded, got) {
                (Some(recorded), Ok(mut layers)) => {
                    keys += 1;
                    let ours = key_attributes(&key);
                    if ours != *recorded {
                        let (ours, theirs) = (to_hex(&ours), to_hex(recorded));
                        wrong.push(format!("{name}\n  ours   {ours}\n  kernel {theirs}"));
                    }
                    // Once more gives the same.
                    let (before, once) = (key, layers);
                    update(&mut frame, &mut key, &mut layers).unwrap();
                    assert!(
                        key == before && layers == once,
                        "{name}: {key:?}, was {before:?}"
                    );
                }
                (None, Err(_)) => drops += 1,
                (None, Ok(_)) if case.get("steps").is_some() => {} // Nothing was recorded.
                (recorded, got) => {
                    wrong.push(format!("{name}: {got:?}, kernel {:?}", recorded.is_some()));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {keys} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(
        keys > 350 && drops >= 5,
        "only {keys} keys and {drops} drops were recorded"
    );
}

#[test]
fn bytes_but_the_tag_stay() {
    let mut key = Key::ZERO;
    for case in cases("sem_extract") {
        let packet = hex(&case, "packet_in_hex").unwrap();
        let mut frame = Frame::from_bytes(&packet);
        if extract(&mut frame, &Metadata::default(), &mut key).is_ok() {
            frame.push_tag_inband().unwrap();
            assert_eq!(frame.bytes(), packet, "{}", case["name"]);
        }
    }
}
