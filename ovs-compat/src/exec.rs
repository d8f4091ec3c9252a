//! `ovs-dpd exec`: a program in place of this one, with its Open vSwitch netlink pointed at the
//! daemon.
//!
//! The program is never kept from running by the daemon's absence: then it sees what it sees on a
//! host without the module, and one line on stderr says why.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use netlink::transport::{
    Hello, NETLINK_GENERIC, Netns, RUNDIR_ENV, SOCKET_NAME, Status, VERSION, WELCOME_LEN, Welcome,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, socket_with, sockopt,
};

/// Name of the interposer's file.
const LIBRARY: &str = "libovs_compat.so";
/// Environment variable with the interposer's path, where it isn't beside this program.
const LIBRARY_ENV: &str = "OVS_DPD_INTERPOSER";
/// How long the daemon may take to answer; the interposer waits as long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Replaces this process by `program` (name and arguments, looked up in PATH), with the daemon of
/// `run_dir`. Comes back only with an error; one of the program itself ends the process as
/// env(1) does: 127 if there is no such program, 126 if it can't be run.
///
/// # Errors
/// No program is named, or the interposer isn't found.
pub fn exec(run_dir: &Path, program: &[OsString]) -> Result<Infallible> {
    let Some((name, arguments)) = program.split_first() else {
        bail!("no program to run")
    };
    let library = library()?;
    let run_dir = std::path::absolute(run_dir)
        .with_context(|| format!("can't say where {} is", run_dir.display()))?;
    if let Some(reason) = absence(&run_dir) {
        eprintln!(
            "ovs-dpd exec: no daemon for {}: {reason}; it runs as on a host without the module",
            name.display()
        );
    }
    let error = Command::new(name)
        .args(arguments)
        .env(
            "LD_PRELOAD",
            preload(&library, std::env::var_os("LD_PRELOAD").as_deref()),
        )
        .env(RUNDIR_ENV, &run_dir)
        .exec();
    eprintln!("ovs-dpd exec: {}: {error}", name.display());
    std::process::exit(if error.kind() == ErrorKind::NotFound {
        127
    } else {
        126
    })
}

/// The value of LD_PRELOAD: ours before what is there already.
fn preload(library: &Path, existing: Option<&OsStr>) -> OsString {
    let mut value = library.as_os_str().to_owned();
    if let Some(existing) = existing.filter(|existing| !existing.is_empty()) {
        value.push(":");
        value.push(existing);
    }
    value
}

/// Where the interposer is: as told, beside this program, or where packages put it.
fn library() -> Result<PathBuf> {
    let candidates = match std::env::var_os(LIBRARY_ENV) {
        Some(told) => vec![PathBuf::from(told)],
        None => {
            let own = std::env::current_exe().context("can't say where this program is")?;
            let beside = own.parent().unwrap_or(Path::new("/"));
            vec![
                beside.join(LIBRARY),
                beside.join("../lib/ovs-dpd").join(LIBRARY),
            ]
        }
    };
    let found = candidates
        .iter()
        .find_map(|path| fs::canonicalize(path).ok());
    let Some(library) = found else {
        let tried: Vec<_> = candidates
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        bail!(
            "{LIBRARY} isn't found (tried {}); ${LIBRARY_ENV} can name it",
            tried.join(", ")
        );
    };
    if library
        .as_os_str()
        .as_bytes()
        .iter()
        .any(|byte| b": \t\n".contains(byte))
    {
        bail!(
            "LD_PRELOAD can't hold the path {}: it has a space or a colon",
            library.display()
        );
    }
    Ok(library)
}

/// Why a socket of this process will not reach the daemon; None if it will. The interposer itself
/// asks again for each socket, without a word.
fn absence(run_dir: &Path) -> Option<String> {
    let path = run_dir.join(SOCKET_NAME);
    match greet(run_dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Some(format!("there is no {}", path.display()))
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            Some(format!("nobody listens on {}", path.display()))
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Some(format!("who listens on {} doesn't answer", path.display()))
        }
        Err(error) => Some(format!("{}: {error}", path.display())),
        Ok(None) => Some(format!("who listens on {} isn't ovs-dpd", path.display())),
        Ok(Some(welcome)) => match welcome.status {
            Status::Ok => None,
            Status::OtherVersion => Some(format!(
                "it speaks version {} and this program version {VERSION}",
                welcome.version
            )),
            Status::OtherNetns => Some(format!(
                "it is in another network namespace (net:[{}])",
                welcome.netns.ino
            )),
            Status::OtherProtocol => Some("it doesn't serve generic netlink".to_owned()),
            Status::Full => Some("it has no room for another connection".to_owned()),
        },
    }
}

/// One hello; None if the answer is no welcome.
fn greet(run_dir: &Path) -> io::Result<Option<Welcome>> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // Bounds the connect too, where the daemon's backlog is full.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    connect_to(&socket, run_dir)?;
    let netns =
        fs::metadata("/proc/thread-self/ns/net").map_or(Netns { dev: 0, ino: 0 }, |meta| Netns {
            dev: meta.dev(),
            ino: meta.ino(),
        });
    let hello = Hello {
        version: VERSION,
        protocol: NETLINK_GENERIC,
        netns,
    };
    send(&socket, &hello.to_bytes(), SendFlags::NOSIGNAL)?;
    let mut bytes = [0; WELCOME_LEN];
    let (length, _) = recv(&socket, &mut bytes, RecvFlags::empty())?;
    Ok(bytes.get(..length).and_then(Welcome::parse))
}

fn connect_to(socket: &OwnedFd, run_dir: &Path) -> io::Result<()> {
    match SocketAddrUnix::new(run_dir.join(SOCKET_NAME)) {
        Ok(address) => connect(socket, &address)?,
        // An address holds 107 bytes; a longer path can be reached through a descriptor.
        Err(Errno::NAMETOOLONG) => {
            let directory = File::open(run_dir)?;
            let path = format!("/proc/self/fd/{}/{SOCKET_NAME}", directory.as_raw_fd());
            connect(socket, &SocketAddrUnix::new(path)?)?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_preload_is_kept_behind_ours() {
        let library = Path::new("/x/libovs_compat.so");
        assert_eq!(preload(library, None), "/x/libovs_compat.so");
        assert_eq!(
            preload(library, Some(OsStr::new(""))),
            "/x/libovs_compat.so"
        );
        assert_eq!(
            preload(library, Some(OsStr::new("a.so:b.so"))),
            "/x/libovs_compat.so:a.so:b.so"
        );
    }

    #[test]
    fn an_absent_daemon_is_explained() {
        let reason = absence(Path::new("/nonexistent/run")).unwrap();
        assert_eq!(reason, "there is no /nonexistent/run/ovs-dpd.sock");
    }
}
