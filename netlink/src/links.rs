//! Marks in the run directory of the links that are the daemon's: what a program asks NETLINK_ROUTE about
//! a marked link, by its name or its index, the interposer hands over.
//!
//! # Contract
//! A mark is a hint that saves the others a way to the daemon; the [`Service`](crate::service::Service)
//! decides. So a mark must be there before a client learns of the link, and one too many does no harm.
//! Marks of a daemon that died are removed by the next one's [`Server::bind`](crate::server::Server::bind).

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::transport;

/// The marks of one daemon.
#[derive(Clone, Debug)]
pub struct Links {
    directory: PathBuf,
}

impl Links {
    /// In this run directory, which is the daemon's alone: an empty set.
    pub(crate) fn prepare(run_dir: &Path) -> io::Result<Self> {
        let directory = run_dir.join(transport::LINKS_NAME);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        DirBuilder::new().mode(0o755).create(&directory)?;
        Ok(Self { directory })
    }

    /// Marks a link.
    ///
    /// # Errors
    /// EINVAL-like for what can't be a link's name; those of making a file.
    pub fn add(&self, name: &str, ifindex: i32) -> io::Result<()> {
        for mark in self.marks(name, ifindex)? {
            File::create(mark)?;
        }
        Ok(())
    }

    /// The link is no longer the daemon's. One that isn't marked does no harm.
    ///
    /// # Errors
    /// EINVAL-like for what can't be a link's name; those of removing a file.
    pub fn remove(&self, name: &str, ifindex: i32) -> io::Result<()> {
        for mark in self.marks(name, ifindex)? {
            match fs::remove_file(mark) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The files `NAME` and `:INDEX`: no link's name has a colon in it.
    fn marks(&self, name: &str, ifindex: i32) -> io::Result<[PathBuf; 2]> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', ':', '\0']) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let by_index = self.directory.join(format!(":{ifindex}"));
        Ok([self.directory.join(name), by_index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_come_and_go_and_those_of_a_dead_daemon_go() {
        let run_dir = std::env::temp_dir().join(format!("ovs-dpd-links-{}", std::process::id()));
        fs::create_dir(&run_dir).unwrap();
        let links = Links::prepare(&run_dir).unwrap();
        links.add("vxlan_sys_4789", 17).unwrap();
        let dir = run_dir.join(transport::LINKS_NAME);
        assert!(dir.join("vxlan_sys_4789").exists() && dir.join(":17").exists());
        links.remove("vxlan_sys_4789", 17).unwrap();
        links.remove("vxlan_sys_4789", 17).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        links.add("gre_sys", 18).unwrap();
        Links::prepare(&run_dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        for bad in ["", "..", "../x", ":5"] {
            assert!(links.add(bad, 1).is_err(), "{bad}");
        }
        fs::remove_dir_all(&run_dir).unwrap();
    }
}
