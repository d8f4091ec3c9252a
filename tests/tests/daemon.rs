//! The programs: what `ovs-dpd run`, `exec`, `status` and `purge` promise.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tests::process::{self, Process};
use tests::traffic::ping_ok;
use tests::{lab, wait};

#[test]
fn it_writes_its_pid_and_refuses_a_second_on_the_same_directory() -> Result<()> {
    lab::test_bare(|lab| {
        let pid = std::fs::read_to_string(lab.run_dir().join("ovs-dpd.pid"))?;
        let alive = format!("/proc/{}/comm", pid.trim());
        ensure!(
            std::fs::read_to_string(alive)?.trim() == "ovs-dpd",
            "pid {pid}"
        );
        let run_dir = lab.run_dir().display().to_string();
        let second = lab.ovs_dpd(["run", "--run-dir", &run_dir])?;
        ensure!(!second.status.success(), "a second daemon ran");
        ensure!(
            second.stderr.contains(pid.trim()),
            "whose is it? {}",
            second.stderr
        );
        // The first isn't disturbed.
        lab.dpctl("add-dp dp1")?;
        lab.dpctl("del-dp dp1")?;
        Ok(())
    })
}

#[test]
fn what_a_killed_daemon_left_is_removed_by_the_next_or_by_purge() -> Result<()> {
    lab::test_bare(|lab| {
        let a = lab.endpoint("a")?;
        let run_dir = lab.run_dir().display().to_string();
        for by_purge in [false, true] {
            lab.dpctl("add-dp dp1")?;
            lab.dpctl(["add-if", "dp1", a.port(), "int0,type=internal"])?;
            lab.with_daemon(|daemon| daemon.process().kill())?;
            if by_purge {
                lab.ovs_dpd(["purge", "--run-dir", &run_dir])?.ok()?;
                lab.nothing_left()?;
                let files: Vec<_> = std::fs::read_dir(lab.run_dir())?.flatten().collect();
                ensure!(files.is_empty(), "purge left {files:?}");
            }
            lab.start_daemon()?;
            lab.nothing_left()?;
            ensure!(lab.dpctl("show")?.trim().is_empty());
        }
        Ok(())
    })
}

#[test]
fn sigint_ends_it_like_sigterm() -> Result<()> {
    lab::test_bare(|lab| {
        lab.dpctl("add-dp dp1")?;
        lab.with_daemon(|daemon| {
            daemon.process().signal(rustix::process::Signal::INT)?;
            let status = daemon.process().wait(tests::daemon::Daemon::END)?;
            ensure!(status.success(), "{status}");
            Ok(())
        })?;
        lab.nothing_left()
    })
}

#[test]
fn systemd_is_told_when_it_is_ready_and_when_it_ends() -> Result<()> {
    lab::test_bare(|lab| {
        let address = lab.directory().join("notify.sock");
        let systemd = UnixDatagram::bind(&address)?;
        systemd.set_read_timeout(Some(wait::SOON))?;
        let heard = || -> Result<String> {
            let mut text = [0; 256];
            let len = systemd.recv(&mut text).context("nothing was told")?;
            Ok(String::from_utf8_lossy(&text[..len]).into_owned())
        };
        let programs = lab.programs()?;
        let run_dir = lab.directory().join("under-systemd").display().to_string();
        let mut command = lab
            .host()
            .command([&programs.ovs_dpd(), "run", "--run-dir", &run_dir]);
        command.env("NOTIFY_SOCKET", &address);
        let mut daemon = Process::spawn(command, &lab.directory().join("under-systemd.out"))?;
        ensure!(heard()?.contains("READY=1"));
        let status = daemon.terminate(tests::daemon::Daemon::END)?;
        ensure!(status.success(), "{status}");
        ensure!(heard()?.contains("STOPPING=1"));
        Ok(())
    })
}

#[test]
fn exec_gives_the_programs_status_output_and_signal() -> Result<()> {
    lab::test_bare(|lab| {
        let ran = lab.under_exec(["sh", "-c", "echo out; echo err >&2; exit 7"])?;
        ensure!(ran.status.code() == Some(7), "{}", ran.status);
        ensure!(
            ran.stdout == "out\n" && ran.stderr.contains("err"),
            "{ran:?}"
        );
        let ran = lab.under_exec(["sh", "-c", "kill -TERM $$"])?;
        ensure!(ran.status.signal() == Some(15), "{}", ran.status);
        let ran = lab.under_exec("no-such-program-anywhere")?;
        ensure!(
            !ran.status.success() && ran.stderr.contains("no-such-program"),
            "{ran:?}"
        );
        // A child of a shell inherits it.
        lab.dpctl("add-dp dp1")?;
        let ran = lab.under_exec(["sh", "-c", "sh -c 'ovs-dpctl dump-dps'; true"])?;
        ensure!(ran.stdout.contains("system@dp1"), "{ran:?}");
        Ok(())
    })
}

#[test]
fn exec_leaves_the_kernels_own_families_reachable() -> Result<()> {
    lab::test_bare(|lab| {
        let device = lab.endpoint("a")?;
        let plain = lab.host().exec(["ethtool", "-k", device.port()])?;
        let under = lab.under_exec(["ethtool", "-k", device.port()])?.ok()?;
        ensure!(
            plain == under,
            "ethtool says something else:\n{plain}\n{under}"
        );
        // genl ctrl lists the kernel's families; nothing of ours may hide them.
        let ran = lab
            .under_exec(["ip", "-d", "link", "show", device.port()])?
            .ok()?;
        ensure!(ran.contains("veth"), "{ran}");
        Ok(())
    })
}

#[test]
fn without_a_daemon_a_program_sees_a_host_without_the_module_and_one_line_says_why() -> Result<()> {
    lab::test_bare(|lab| {
        lab.stop_daemon()?;
        let ran = lab.try_dpctl("show system@nothing")?;
        ensure!(!ran.status.success(), "{ran:?}");
        let why: Vec<_> = ran
            .stderr
            .lines()
            .filter(|l| l.contains("ovs-dpd"))
            .collect();
        ensure!(why.len() == 1, "not one line about it: {:?}", ran.stderr);
        Ok(())
    })
}

#[test]
fn preloading_alone_does_what_exec_does() -> Result<()> {
    lab::test_bare(|lab| {
        lab.dpctl("add-dp dp1")?;
        let library = lab.programs()?.interposer();
        let mut command: Command = lab.host().command([
            "env",
            &format!("LD_PRELOAD={}", library.display()),
            &format!("OVS_DPD_RUNDIR={}", lab.run_dir().display()),
            "ovs-dpctl",
            "dump-dps",
        ]);
        command.env_remove("LD_PRELOAD");
        let text = process::run(command, process::LIMIT)?.ok()?;
        ensure!(text.contains("system@dp1"), "{text}");
        Ok(())
    })
}

#[test]
fn a_shell_under_exec_that_outlives_the_daemon_does_not_hang() -> Result<()> {
    lab::test_bare(|lab| {
        lab.dpctl("add-dp dp1")?;
        let output = lab.directory().join("shell.out");
        let run_dir = lab.run_dir();
        let script = "ovs-dpctl show; echo first; while [ ! -e $0.go ]; do :; done; \
                      ovs-dpctl show; echo second";
        let file = lab.directory().join("shell").display().to_string();
        let words = ["sh", "-c", script, &file];
        let command = tests::daemon::under_exec(lab.programs()?, lab.host(), &run_dir, words);
        let mut shell = Process::spawn(command, &output)?;
        shell.wait_output("first", wait::SOON)?;
        lab.with_daemon(|daemon| daemon.process().kill())?;
        std::fs::write(format!("{file}.go"), "")?;
        shell.wait_output("second", wait::SOON)?;
        lab.start_daemon()
    })
}

#[test]
fn the_status_names_datapaths_and_ports_in_text_and_json() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        ping_ok(a.namespace(), "10.1.1.254")?;
        let text = lab.status()?;
        let json = lab.status_json()?;
        let json_text = json.to_string();
        for name in ["ovs-system", "br0", "v-a", "int0"] {
            ensure!(text.contains(name), "no {name} in\n{text}");
            ensure!(
                json_text.contains(&format!("{name:?}")),
                "no {name} in {json:#}"
            );
        }
        json.as_object().context("the status is no object")?;
        Ok(())
    })
}

#[test]
fn an_idle_daemon_uses_no_processor() -> Result<()> {
    lab::test_ovs_dpd(|lab| {
        lab.bridge("br0")?;
        let a = lab.host_on("br0", "a", "10.1.1.1/24")?;
        lab.internal("br0", "int0", "10.1.1.254/24")?;
        ping_ok(a.namespace(), "10.1.1.254")?;
        let before = lab.with_daemon(|d| d.process().cpu_time())?;
        std::thread::sleep(std::time::Duration::from_secs(2));
        let used = lab.with_daemon(|d| d.process().cpu_time())? - before;
        ensure!(used.as_millis() <= 60, "{used:?} in 2 s without traffic");
        Ok(())
    })
}

#[test]
fn without_descriptors_the_daemon_rests_and_answers_again_when_there_are_some() -> Result<()> {
    lab::test_bare(|lab| {
        let pid = lab.with_daemon(|daemon| Ok(daemon.process().id()))?;
        let daemon = Pid::from_raw(pid.cast_signed()).context("pid")?;
        let before = getrlimit(Resource::Nofile);
        let limit = |soft| Rlimit {
            current: soft,
            ..before
        };
        // Those that it has it keeps.
        prlimit(Some(daemon), Resource::Nofile, limit(Some(3)))?;
        let waiting = UnixStream::connect(lab.run_dir().join("status.sock"))?;
        let start = lab.with_daemon(|daemon| daemon.process().cpu_time())?;
        std::thread::sleep(Duration::from_secs(2));
        let (spent, output) = lab.with_daemon(|daemon| {
            let spent = daemon.process().cpu_time()? - start;
            Ok((spent, daemon.output()))
        })?;
        prlimit(Some(daemon), Resource::Nofile, limit(before.current))?;
        ensure!(spent < Duration::from_millis(200), "{spent:?} in 2 s");
        let lines = output
            .lines()
            .filter(|line| line.contains("status and metrics: "));
        let lines = lines.count();
        ensure!((1..20).contains(&lines), "{lines} lines about it");
        drop(waiting);
        lab.status_json()?;
        Ok(())
    })
}

/// A terminal that was closed, a pipe that nobody reads.
#[test]
fn a_daemon_whose_output_nobody_reads_serves() -> Result<()> {
    lab::test_bare(|lab| {
        lab.stop_daemon()?;
        let run_dir = lab.run_dir().display().to_string();
        let program = lab.programs()?.ovs_dpd();
        let script = "mkfifo $0; sleep 100 < $0 & exec 3> $0; kill $!; wait; \
                      exec \"$1\" run --run-dir \"$2\" 1>&3";
        let fifo = lab.directory().join("fifo").display().to_string();
        let words = ["sh", "-c", script, &fifo, &program, &run_dir];
        let output = lab.directory().join("unread.out");
        let mut daemon = lab.host().spawn(words, &output)?;
        wait::soon("it serves", || match daemon.ended()? {
            Some(status) => bail!("it ended: {status}: {}", daemon.output()),
            None => Ok(lab.run_dir().join("ovs-dpd.pid").exists()),
        })?;
        lab.dpctl("add-dp dp1")?;
        lab.dpctl("del-dp dp1")?;
        ensure!(daemon.terminate(tests::daemon::Daemon::END)?.success());
        Ok(())
    })
}
