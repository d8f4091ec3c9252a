//! The run directory: where a daemon and its clients find each other.

use std::os::unix::ffi::OsStrExt;
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

    /// All of these: what goes with the daemon, whether it ends or was killed.
    pub fn files(&self) -> [PathBuf; 4] {
        [
            self.status_socket(),
            self.control_socket(),
            self.capture_socket(),
            self.pid_file(),
        ]
    }

    /// Marks what a daemon of this directory leaves in the kernel when it is killed. The same for the next
    /// one, by whichever path and of whichever version, so that it finds it; another for another directory.
    pub fn prefix(&self) -> String {
        let path = std::fs::canonicalize(&self.path)
            .or_else(|_| std::path::absolute(&self.path))
            .unwrap_or_else(|_| self.path.clone());
        // FNV-1a: the standard library's hashes may be others in its next version.
        let hash = path
            .as_os_str()
            .as_bytes()
            .iter()
            .fold(0x811c_9dc5_u32, |hash, byte| {
                (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
            });
        format!("dpd{hash:08x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_mark_whatever_it_is_called() {
        assert_eq!(RunDir::new(Path::new("/")).prefix(), "dpd2a0c975e");
        let dir = std::env::temp_dir().join(format!("ovs-dpd-rundir-{}", std::process::id()));
        let (real, link) = (dir.join("real"), dir.join("link"));
        std::fs::create_dir_all(&real).unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        let mark = |path: &Path| RunDir::new(path).prefix();
        assert_eq!(mark(&real), mark(&link));
        assert_eq!(mark(&real), mark(&dir.join("link/../real/.")));
        assert_ne!(mark(&real), mark(&dir));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
