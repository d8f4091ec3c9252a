//! `ovs-dpd purge`: removes what a killed daemon left behind.

use std::path::Path;

use anyhow::{Context, Result, bail};
use netlink::server::{BindError, Config, Server};

use crate::rundir::RunDir;

/// Removes files, nftables tables and veth pairs of a dead daemon; says what it removed.
pub fn purge(path: &Path) -> Result<()> {
    let run_dir = RunDir::new(path);
    if !path.exists() {
        println!("nothing to remove: there is no {}", path.display());
        return Ok(());
    }
    let dead = run_dir.files().iter().any(|file| file.exists());
    // Whoever holds the directory is the only one there; it goes with `server`.
    let server = match Server::bind(Config::new(path)) {
        Ok(server) => server,
        Err(error @ BindError::Occupied { .. }) => {
            bail!("{error}: stop it (SIGTERM), it removes all that it made")
        }
        Err(error) => return Err(error).context("can't take the run directory over"),
    };
    let mut removed = 0;
    for what in vport::cleanup(&run_dir.prefix())
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("can't remove what is left in this network namespace")?
    {
        println!("removed {what}");
        removed += 1;
    }
    for file in run_dir.files() {
        if remove(&file)? {
            println!("removed {}", file.display());
            removed += 1;
        }
    }
    server
        .remove()
        .with_context(|| format!("can't empty {}", path.display()))?;
    if removed == 0 && !dead {
        println!("nothing to remove on {}", path.display());
    }
    Ok(())
}

fn remove(file: &Path) -> Result<bool> {
    match std::fs::remove_file(file) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("can't remove {}", file.display())),
    }
}
