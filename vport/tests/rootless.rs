//! The same without root: as `nobody`, in a user namespace with a network namespace of its own.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

mod common;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use common::{Forwarder, Lab, both_ways, internal};
use vport::{AttachOptions, DriverChoice};

fn as_nobody(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command
        .args(["unshare", "-U", "-r", "-n", "-m", program])
        .args(arguments);
    command.current_dir("/");
    command
}

#[test]
fn ports_work_without_root() {
    if !as_nobody("true", &[])
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("SKIPPED: this host has no user namespaces for unprivileged users");
        return;
    }
    // Where `nobody` may read it.
    let program = std::env::temp_dir().join(format!("vport-rootless-{}", std::process::id()));
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = as_nobody(
        program.to_str().unwrap(),
        &["--exact", "inside", "--ignored", "--nocapture"],
    )
    .output();
    std::fs::remove_file(&program).unwrap();
    let output = output.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    assert!(
        text(&output.stdout).contains("1 passed"),
        "{}",
        text(&output.stdout)
    );
}

#[test]
#[ignore = "run by the other one, in its user namespace"]
fn inside() {
    let lab = Lab::new(1500);
    let refused = lab.switch.run(|| {
        let options = AttachOptions {
            driver: DriverChoice::AfXdp,
            ..AttachOptions::default()
        };
        vport::attach("pa", &options).err().unwrap()
    });
    assert_eq!(refused.errno(), libc::EPERM);
    let text = refused.to_string();
    assert!(
        text.contains("needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace"),
        "{text}"
    );
    let forwarder = lab.forward();
    let mode = forwarder.ports[0].mode();
    assert!(
        mode.contains("hidden by nftables (tcx: Operation not permitted"),
        "{mode}"
    );
    assert!(
        mode.contains("receive buffer limited by net.core.rmem_max"),
        "{mode}"
    );
    both_ways(&lab, &forwarder, 1500);
    drop(forwarder);
    assert_eq!(lab.switch.command("nft list tables"), "");

    lab.a.ip("addr flush dev eth0");
    let port = internal(&lab, &lab.a, "int0", "10.9.0.1", false);
    if std::fs::File::open("/dev/net/tun").is_err() {
        assert_eq!(port.driver().name(), "veth");
        assert!(
            port.mode().contains("no TAP (/dev/net/tun: "),
            "{}",
            port.mode()
        );
    }
    let forwarder = Forwarder::new(port, lab.switch.attach("pb", AttachOptions::default()));
    both_ways(&lab, &forwarder, 1500);
}
