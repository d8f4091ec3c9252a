//! A daemon that is killed leaves nothing that `cleanup` doesn't remove. Needs root.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use common::{Lab, eventually};
use vport::{AttachOptions, HideChoice, InternalOptions, attach, cleanup, create_internal};

const PREFIX: &str = "killed_test";

/// The daemon to be killed: holds ports until then.
#[test]
#[ignore = "run by the other one, as a process of its own"]
fn hold() {
    let attached = |name, hide| {
        let options = AttachOptions {
            hide,
            run_prefix: PREFIX.into(),
            ..AttachOptions::default()
        };
        attach(name, &options).unwrap()
    };
    let made = |name, force_veth| {
        let options = InternalOptions {
            force_veth,
            run_prefix: PREFIX.into(),
            ..Default::default()
        };
        create_internal(name, &options).unwrap()
    };
    let ports = [
        attached("pa", HideChoice::Auto),
        attached("pb", HideChoice::Nftables),
        made("int0", false),
        made("int1", true),
    ];
    for port in &ports {
        // The harness has no newline before this.
        println!("\n{}: {}", port.name(), port.mode());
    }
    println!("holding");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn nothing_is_left_of_a_killed_daemon_after_cleanup() {
    let lab = Lab::new(1500);
    let mut child: Child = lab.switch.run(|| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hold", "--ignored", "--nocapture"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let modes: Vec<String> = lines.take_while(|line| line != "holding").collect();
    let names = || -> Vec<String> {
        let links = lab.switch.run(|| vport::link::all().unwrap());
        links.into_iter().map(|link| link.name).collect()
    };
    let before = (
        names(),
        lab.switch.command("nft list tables"),
        lab.switch.link("pa").promiscuity,
    );
    child.kill().unwrap();
    child.wait().unwrap();

    assert!(
        modes
            .iter()
            .any(|mode| mode.contains("pa: af_packet, vnet_hdr, hidden by tcx"))
    );
    assert!(
        before.0.contains(&"int0".into()) && before.0.contains(&"int1".into()),
        "{before:?}"
    );
    assert!(
        before.1.contains(&format!("ovs_dpd_{PREFIX}_")),
        "{before:?}"
    );
    assert_eq!(before.2, 1);

    // These go with the process.
    assert_eq!(lab.switch.command("nft list tables"), "");
    assert_eq!(lab.switch.link("pa").promiscuity, 0);
    assert!(!names().contains(&"int0".into()), "{:?}", names());
    // A pair of veths doesn't.
    assert!(names().contains(&"int1".into()), "{:?}", names());
    let removed = lab.switch.run(|| cleanup(PREFIX).unwrap());
    assert!(
        matches!(&removed[..], [peer] if peer.starts_with("dpd-")),
        "{removed:?}"
    );
    eventually("only what was there before is there", || {
        let mut names = names();
        names.sort();
        names == ["lo", "pa", "pb"]
    });
    // The next one starts as if nothing had been.
    lab.switch.run(|| {
        let options = AttachOptions {
            run_prefix: PREFIX.into(),
            ..AttachOptions::default()
        };
        attach("pa", &options).unwrap();
        create_internal("int1", &InternalOptions::default()).unwrap();
    });
}
