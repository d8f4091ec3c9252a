//! `ovs-dpd exec`: whose status the caller sees, and what it is told when there is no daemon.
#![allow(clippy::unwrap_used)] // in helpers of tests

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use netlink::transport::{
    HELLO_LEN, NETLINK_GENERIC, Netns, SOCKET_NAME, Status, VERSION, Welcome,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
    listen, recv, send, socket_with,
};

/// A run directory, removed at the end.
struct RunDir(PathBuf);

impl RunDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("exec-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        // What the loader is given only has to be there: a program without hooks will do.
        fs::write(path.join("none.so"), b"").unwrap();
        Self(path)
    }

    /// `ovs-dpd exec -- program`, with a library that the loader says it can't load, and goes on.
    fn exec(&self, program: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ovs-dpd"))
            .args(["exec", "--run-dir"])
            .arg(&self.0)
            .arg("--")
            .args(program)
            .env("OVS_DPD_INTERPOSER", self.0.join("none.so"))
            .env_remove("LD_PRELOAD")
            .output()
            .unwrap()
    }

    /// The line on stderr that is ovs-dpd's own.
    fn said(&self) -> String {
        let output = self.exec(&["true"]);
        assert!(output.status.success());
        let text = String::from_utf8(output.stderr).unwrap();
        let own: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("ovs-dpd exec: "))
            .collect();
        assert!(own.len() <= 1, "{text}");
        own.join("")
    }

    fn bound(&self) -> OwnedFd {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        bind(
            &socket,
            &SocketAddrUnix::new(self.0.join(SOCKET_NAME)).unwrap(),
        )
        .unwrap();
        socket
    }

    /// A daemon for one client, which it receives so.
    fn daemon(&self, status: Status, version: u32) -> thread::JoinHandle<()> {
        let listener = self.bound();
        listen(&listener, 1).unwrap();
        thread::spawn(move || {
            let client = accept(&listener).unwrap();
            let mut hello = [0; HELLO_LEN];
            recv(&client, &mut hello, RecvFlags::empty()).unwrap();
            assert_eq!(hello[8..12], NETLINK_GENERIC.to_ne_bytes());
            let netns = Netns { dev: 4, ino: 77 };
            let welcome = Welcome {
                version,
                status,
                port_id: 0,
                netns,
                instance: 1,
            };
            send(&client, &welcome.to_bytes(), SendFlags::NOSIGNAL).unwrap();
        })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What can't be removed is in the temporary directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn status_and_signal_are_the_programs() {
    let run_dir = RunDir::new("status");
    assert_eq!(run_dir.exec(&["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(
        run_dir.exec(&["sh", "-c", "kill -TERM $$"]).status.signal(),
        Some(15)
    );
}

#[test]
fn a_program_that_cant_be_run_gives_the_status_of_env() {
    let run_dir = RunDir::new("absent");
    for (program, code) in [("no-such-program", 127), ("/etc/passwd", 126)] {
        let output = run_dir.exec(&[program]);
        assert_eq!(output.status.code(), Some(code));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains(&format!("ovs-dpd exec: {program}: ")),
            "{text}"
        );
    }
}

#[test]
fn children_inherit_library_and_run_directory() {
    let run_dir = RunDir::new("inherit");
    let output = run_dir.exec(&["sh", "-c", "sh -c 'echo $LD_PRELOAD $OVS_DPD_RUNDIR'"]);
    let path = run_dir.0.display();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("{path}/none.so {path}\n")
    );
}

#[test]
fn one_line_says_why_there_is_no_daemon() {
    let run_dir = RunDir::new("why");
    let socket = run_dir.0.join(SOCKET_NAME);
    assert!(
        run_dir
            .said()
            .contains(&format!("there is no {}", socket.display()))
    );

    drop(run_dir.bound());
    assert!(
        run_dir
            .said()
            .contains(&format!("nobody listens on {}", socket.display()))
    );

    let line = |status, version| {
        fs::remove_file(&socket).unwrap();
        let daemon = run_dir.daemon(status, version);
        let line = run_dir.said();
        daemon.join().unwrap();
        line
    };
    assert!(line(Status::OtherNetns, VERSION).contains("another network namespace (net:[77])"));
    let other = VERSION + 1;
    assert!(line(Status::Ok, other).contains(&format!("it speaks version {other}")));
    assert_eq!(line(Status::Ok, VERSION), "");
}

#[test]
fn a_missing_library_is_said_and_nothing_runs() {
    let run_dir = RunDir::new("library");
    let none = Path::new("none.so");
    fs::remove_file(run_dir.0.join(none)).unwrap();
    let output = run_dir.exec(&["echo", "ran"]);
    assert_eq!(output.stdout, b"");
    assert!(!output.status.success());
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("OVS_DPD_INTERPOSER")
    );
}
