//! `ovs-dpd purge`: removes what a killed daemon left behind.

use std::path::Path;

use anyhow::{Context, Result, bail};
use netlink::server::Lock;

use crate::rundir::RunDir;

/// Removes files, nftables tables and veth pairs of a dead daemon; says what it removed.
pub fn purge(path: &Path) -> Result<()> {
    let run_dir = RunDir::new(path);
    if !path.exists() {
        println!("nothing to remove: there is no {}", path.display());
        return Ok(());
    }
    let Some(_lock) = Lock::try_take(path)
        .with_context(|| format!("can't lock the run directory {}", path.display()))?
    else {
        bail!(
            "a daemon{} is alive on {}: stop it first (SIGTERM), it removes all it made",
            run_dir.pid().map(|pid| format!(" (process {pid})")).unwrap_or_default(),
            path.display()
        );
    };
    let mut removed = 0;
    for what in vport::cleanup(&run_dir.prefix())
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("can't remove what is left in this network namespace")?
    {
        println!("removed {what}");
        removed += 1;
    }
    for file in ["ovs-dpd.sock", "status.sock", "ovs-dpd.pid", "ovs-dpd.lock"] {
        let file = path.join(file);
        match std::fs::remove_file(&file) {
            Ok(()) => {
                println!("removed {}", file.display());
                removed += 1;
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("can't remove {}", file.display()));
            }
        }
    }
    if removed == 0 {
        println!("nothing to remove on {}", path.display());
    }
    Ok(())
}
