//! The same test once more, as a user without privileges, in namespaces of its own.
//!
//! The test program starts itself anew: `setpriv` to an unprivileged user, `unshare -U -r -n -m`,
//! a fresh `/run` and `/tmp`, and there only the test of the given name. Inside, the user is root
//! of the user namespace, so the laboratory works as it does elsewhere.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::daemon::Programs;
use crate::namespace;
use crate::process;
use crate::requirement;

const INSIDE: &str = "OVS_DPD_TESTS_INSIDE";

/// Nobody, on Debian and most others.
const USER: &str = "65534";

/// Whether this is the program that was started anew.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs `work` inside a sandbox: outside, starts this program anew for the test `name` (its full
/// name, as the test harness prints it), and gives its result.
///
/// # Errors
/// Those of the inner test, with what it printed.
pub fn rootless(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    if inside() {
        return work();
    }
    if requirement::skip() {
        eprintln!("skipped: OVS_DPD_TESTS_SKIP_SYSTEM=1");
        return Ok(());
    }
    requirement::check()?;
    let programs = Programs::find()?;
    // The checkout may lie where the user can't go.
    let directory = std::env::temp_dir().join(namespace::unique("user"));
    std::fs::create_dir(&directory)?;
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755))?;
    let result = start(name, &directory, &programs);
    std::fs::remove_dir_all(&directory)?;
    result
}

fn start(name: &str, directory: &std::path::Path, programs: &Programs) -> Result<()> {
    let test = directory.join("test");
    std::fs::copy(std::env::current_exe()?, &test)?;
    for file in ["ovs-dpd", "libovs_compat.so"] {
        let from = programs.directory().join(file);
        std::fs::copy(&from, directory.join(file)).with_context(|| from.display().to_string())?;
    }
    // /tmp is replaced only after the program has been moved out of its way.
    let script = format!(
        "set -e; mount -t tmpfs tmpfs /run; mkdir /run/bin /run/tmp; cp {0}/* /run/bin/; \
         exec env TMPDIR=/run/tmp OVS_DPD_BIN_DIR=/run/bin {INSIDE}=1 \
         /run/bin/test --exact {name} --nocapture --test-threads=1",
        directory.display()
    );
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", USER, "--regid", USER, "--clear-groups", "--"])
        .args(["unshare", "-U", "-r", "-n", "-m", "sh", "-c", &script])
        .current_dir("/");
    let ran = process::run(command, Duration::from_secs(120))?;
    eprintln!("{}", ran.stderr);
    let stdout = ran.ok().context("inside, as an unprivileged user")?;
    // A name that no longer fits must not pass as a test of nothing.
    anyhow::ensure!(
        stdout.contains("1 passed"),
        "no test {name} inside:\n{stdout}"
    );
    Ok(())
}
