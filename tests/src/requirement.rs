//! What the machine must have. A test that lacks something fails and says what; only
//! `OVS_DPD_TESTS_SKIP_SYSTEM=1` turns that into a skip, which is printed.

use anyhow::{Result, bail};

/// A program, the Debian package that has it.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("ovs-vswitchd", "openvswitch-switch"),
    ("ovs-vsctl", "openvswitch-switch"),
    ("ovsdb-server", "openvswitch-switch"),
    ("iperf3", "iperf3"),
    ("ip", "iproute2"),
    ("tcpdump", "tcpdump"),
    ("ethtool", "ethtool"),
    ("ping", "iputils-ping"),
    ("nft", "nftables"),
    ("conntrack", "conntrack"),
];

/// Whether a program is installed.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path)
        .chain(usual)
        .any(|d| d.join(program).is_file())
}

/// Packages that are not installed.
pub fn missing_packages() -> Vec<&'static str> {
    let mut missing: Vec<_> = PROGRAMS
        .iter()
        .filter(|(program, _)| !installed(program))
        .map(|p| p.1)
        .collect();
    missing.dedup();
    missing
}

/// Whether we are root, in whatever user namespace.
pub fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether the tests that need a system are to be skipped, by the environment.
pub fn skip() -> bool {
    std::env::var_os("OVS_DPD_TESTS_SKIP_SYSTEM").is_some_and(|v| v == "1")
}

/// Checks that the machine has all that a laboratory needs.
///
/// # Errors
/// What is missing, and how to get it.
pub fn check() -> Result<()> {
    const HINT: &str = "(OVS_DPD_TESTS_SKIP_SYSTEM=1 skips the tests that need a system)";
    if !root() {
        bail!("this test makes network namespaces and needs root {HINT}");
    }
    let missing = missing_packages();
    if !missing.is_empty() {
        bail!(
            "not installed: {0}; `apt-get install {0}` {HINT}",
            missing.join(" ")
        );
    }
    Ok(())
}
