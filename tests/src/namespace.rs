//! A network namespace with a name, as `ip netns` keeps them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{self, Process, Ran, Words};

/// Where `ip netns` keeps the names.
const NETNS_DIR: &str = "/run/netns";

/// What names of namespaces and directories of a laboratory begin with; the process id follows.
const PREFIX: &str = "dpd";

/// A name that no other process and no other call gets: `dpd<pid>x<n><label>`.
pub fn unique(label: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}x{number}{label}", std::process::id())
}

/// The process that made a name, if the name is one of [`unique`].
fn maker(name: &str) -> Option<i32> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('x')?;
    pid.parse().ok()
}

/// Names in `directory` that belong to processes that are no longer there.
fn orphans(directory: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
    names
        .filter(|name| name.starts_with(PREFIX) && orphan_of(name).is_some())
        .collect()
}

/// Removes the namespaces and directories of makers that were killed; once a process.
pub fn sweep() {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| {
        // Two sweepers may meet: what one finds gone the other has removed.
        for name in orphans(NETNS_DIR) {
            let _ = ip(["netns", "del", &name]);
        }
        let directory = std::env::temp_dir();
        for name in orphans(&directory.to_string_lossy()) {
            let _ = std::fs::remove_dir_all(directory.join(name));
        }
    });
}

/// The process that a text, such as a path or a command line, names as a laboratory's maker, if
/// that process is dead.
pub fn orphan_of(text: &str) -> Option<i32> {
    let dead = |pid: &i32| {
        let pid = rustix::process::Pid::from_raw(*pid);
        let asked = pid.map(rustix::process::test_kill_process);
        asked == Some(Err(rustix::io::Errno::SRCH))
    };
    text.match_indices(PREFIX)
        .find_map(|(at, _)| maker(&text[at..]).filter(dead))
}

/// Namespaces and directories of laboratories whose makers are dead: nothing, after tests that
/// were not killed.
pub fn left_behind() -> Vec<String> {
    [PathBuf::from(NETNS_DIR), std::env::temp_dir()]
        .iter()
        .flat_map(|directory| {
            let names = orphans(&directory.to_string_lossy());
            names
                .into_iter()
                .map(|name| directory.join(name).display().to_string())
        })
        .collect()
}

/// Runs `ip` in the namespace of the caller.
///
/// # Errors
/// It failed; with what it printed.
pub fn ip(words: impl Words) -> Result<String> {
    let mut command = Command::new("ip");
    command.args(words.words());
    process::run(command, process::LIMIT)?.ok()
}

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new namespace, its loopback device up, without IPv6 on devices to come (router
    /// solicitations and listener reports would be in the way of who counts frames) and without
    /// duplicate address detection where a test turns IPv6 on.
    ///
    /// # Errors
    /// No root, no iproute2.
    pub fn new(label: &str) -> Result<Self> {
        sweep();
        let namespace = Self {
            name: unique(label),
        };
        ip(["netns", "add", &namespace.name])?;
        namespace.ip("link set lo up")?;
        namespace.inside(|| -> Result<()> {
            for (key, value) in [
                ("ipv6/conf/default/disable_ipv6", "1"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv6/conf/default/accept_ra", "0"),
                ("ipv6/conf/default/router_solicitations", "0"),
            ] {
                // A kernel without IPv6 has none of them.
                let path = format!("/proc/sys/net/{key}");
                if std::path::Path::new(&path).exists() {
                    std::fs::write(&path, value).with_context(|| path.clone())?;
                }
            }
            Ok(())
        })??;
        Ok(namespace)
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run inside.
    pub fn command(&self, words: impl Words) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.name])
            .args(words.words());
        command
    }

    /// Runs a program inside and gives its standard output.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn exec(&self, words: impl Words) -> Result<String> {
        self.try_exec(words, process::LIMIT)?.ok()
    }

    /// Runs a program inside that may fail.
    ///
    /// # Errors
    /// It can't be started, or runs longer than `limit`.
    pub fn try_exec(&self, words: impl Words, limit: Duration) -> Result<Ran> {
        process::run(self.command(words), limit)
    }

    /// Starts a program inside, its output in a file.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn(&self, words: impl Words, output: &std::path::Path) -> Result<Process> {
        Process::spawn(self.command(words), output)
    }

    /// Runs `ip` inside.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn ip(&self, words: impl Words) -> Result<String> {
        let mut all = vec!["-n".to_owned(), self.name.clone()];
        all.extend(words.words());
        ip(all)
    }

    /// Runs `work` on a thread inside; the sockets that it makes stay there. /proc/sys/net is
    /// the namespace's, /sys is not.
    ///
    /// # Errors
    /// The namespace can't be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = format!("{NETNS_DIR}/{}", self.name);
        let handle = std::fs::File::open(&path).with_context(|| path.clone())?;
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    use std::os::fd::AsFd;
                    move_into_link_name_space(handle.as_fd(), Some(LinkNameSpaceType::Network))
                        .with_context(|| format!("entering {path}"))?;
                    Ok(work())
                })
                .join()
                .map_err(|_| anyhow!("a thread inside a namespace panicked"))?
        })
    }

    /// Names of its devices.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn links(&self) -> Result<Vec<String>> {
        let text = self.ip("-o link show")?;
        let name = |line: &str| {
            let name = line.split(": ").nth(1)?;
            Some(name.split('@').next()?.to_owned())
        };
        Ok(text.lines().filter_map(name).collect())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let mut command = Command::new("ip");
        command.args(["netns", "del", &self.name]);
        if let Err(error) = process::run_anyway(command).and_then(Ran::ok) {
            eprintln!("namespace {} is left behind: {error:#}", self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_maker() {
        assert_eq!(
            maker(&unique("host")),
            i32::try_from(std::process::id()).ok()
        );
        assert_eq!(maker("dpd12"), None);
        assert_eq!(maker("other"), None);
    }
}
