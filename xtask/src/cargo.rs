//! cargo within cargo.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::say;

/// The root of the checkout.
///
/// # Errors
/// The checkout has moved since xtask was built.
pub fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .map(Path::to_owned)
        .context("xtask is not in a workspace")
}

/// Where the release programs are: beside the directory of this very program.
///
/// # Errors
/// This program isn't in a target directory.
pub fn release_directory() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program
        .parent()
        .and_then(Path::parent)
        .context("not in a target directory")?;
    Ok(target.join("release"))
}

/// Runs cargo in the checkout; its output goes where ours goes.
///
/// # Errors
/// It fails.
pub fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    run(arguments, |command| {
        for (key, value) in environment {
            command.env(key, value);
        }
    })
}

/// As [`cargo`], without these variables.
///
/// # Errors
/// It fails.
pub fn cargo_without(arguments: &[&str], unset: &[OsString]) -> Result<()> {
    run(arguments, |command| {
        for name in unset {
            command.env_remove(name);
        }
    })
}

fn run(arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    say::command(&format!("cargo {}", arguments.join(" ")));
    let mut command = Command::new(cargo);
    command
        .args(arguments)
        .current_dir(root()?)
        .stdin(Stdio::null());
    prepare(&mut command);
    let status = command.status().context("cargo can't be started")?;
    if !status.success() {
        bail!("cargo {}: {status}", arguments.join(" "));
    }
    Ok(())
}

/// Builds the programs that people run: `ovs-dpd` and `libovs_compat.so`.
///
/// # Errors
/// They don't build.
pub fn build_programs() -> Result<()> {
    cargo(
        &[
            "build",
            "--release",
            "-p",
            "ovs-dpd",
            "-p",
            "ovs-compat-interposer",
        ],
        &[],
    )
}
