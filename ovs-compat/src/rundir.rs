//! The run directory: where a daemon and its clients find each other.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// A run directory and the files in it that aren't the netlink server's.
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// At `path`, which need not be there yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
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

    /// Where it is told what to change.
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Where captures are asked for.
    pub fn capture_socket(&self) -> PathBuf {
        self.path.join("capture.sock")
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
