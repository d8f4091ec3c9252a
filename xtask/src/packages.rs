//! Debian's packages that the demo and the tests need.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use tests::requirement;

use crate::say;

/// Installs what is missing, by apt-get, and says what.
///
/// # Errors
/// Something is missing and can't be installed: no root, no apt-get, no network.
pub fn install_missing() -> Result<()> {
    install_packages(requirement::missing_packages)
}

/// Installs the package that has a program, unless that is there.
///
/// # Errors
/// As [`install_missing`].
pub fn install(program: &str, package: &'static str) -> Result<()> {
    install_packages(|| {
        let there = requirement::installed(program);
        (!there).then_some(package).into_iter().collect()
    })
}

fn install_packages(missing_packages: impl Fn() -> Vec<&'static str>) -> Result<()> {
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    println!("not installed: {names}");
    if !requirement::installed("apt-get") {
        bail!("install {names} with your package manager (there is no apt-get here)");
    }
    if !requirement::root() {
        bail!("as root: apt-get install {names}");
    }
    apt_get(&["update", "-q"])?;
    // Installing openvswitch-switch starts the host's own Open vSwitch; it is left alone.
    let mut install = vec!["install", "-q", "-y", "--no-install-recommends"];
    install.extend(&missing);
    apt_get(&install)?;
    let still = missing_packages();
    if !still.is_empty() {
        bail!(
            "apt-get installed {names}, but {} are still missing",
            still.join(" ")
        );
    }
    Ok(())
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    say::command(&format!("apt-get {}", arguments.join(" ")));
    let mut command = Command::new("apt-get");
    // Another apt-get may be at work on a machine that has just started.
    command
        .args(["-o", "DPkg::Lock::Timeout=300"])
        .args(arguments);
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    let status = command.status().context("apt-get")?;
    if !status.success() {
        bail!("apt-get {}: {status}", arguments.join(" "));
    }
    Ok(())
}
