//! The run directory: where a daemon and its clients find each other.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A run directory and the files in it.
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// At `path`, which need not be there yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Makes it: everyone may enter, as GET requests are open to all; only its owner may write.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.path)
            .with_context(|| format!("can't make the run directory {}", self.path.display()))?;
        let meta = fs::metadata(&self.path)?;
        if meta.permissions().mode() & 0o022 != 0 {
            anyhow::bail!(
                "the run directory {} can be written by others than its owner: \
                 anyone could put a socket there; choose another, or chmod go-w",
                self.path.display()
            );
        }
        Ok(())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the process id is written.
    pub fn pid_file(&self) -> PathBuf {
        self.path.join("ovs-dpd.pid")
    }

    /// Where `status` is answered.
    pub fn status_socket(&self) -> PathBuf {
        self.path.join("status.sock")
    }

    /// The process id of the daemon that runs or ran here.
    pub fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()
    }

    /// Marks what a daemon of this directory leaves in the kernel when it is killed. The same for the next
    /// one, so that it finds it; another for another directory.
    pub fn prefix(&self) -> String {
        let absolute = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let mut hasher = DefaultHasher::new();
        absolute.hash(&mut hasher);
        format!("dpd{:08x}", hasher.finish() as u32)
    }
}
