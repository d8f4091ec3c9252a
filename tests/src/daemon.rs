//! ovs-dpd: where it was built, its run directory, its status.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::namespace::Namespace;
use crate::process::{Process, Words};
use crate::wait;

/// Where the built programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    directory: PathBuf,
}

impl Programs {
    /// The directory that `OVS_DPD_BIN_DIR` names; else `release` beside the directory of the
    /// running program.
    ///
    /// # Errors
    /// ovs-dpd isn't there.
    pub fn find() -> Result<Self> {
        let mut tried = Vec::new();
        if let Some(directory) = std::env::var_os("OVS_DPD_BIN_DIR") {
            tried.push(PathBuf::from(directory));
        } else {
            // target/PROFILE/deps/test-HASH or target/PROFILE/xtask
            let program = std::env::current_exe()?;
            tried.extend(
                program
                    .ancestors()
                    .skip(2)
                    .take(2)
                    .map(|d| d.join("release")),
            );
        }
        match tried.iter().find(|d| d.join("ovs-dpd").is_file()) {
            Some(directory) => Ok(Self {
                directory: directory.clone(),
            }),
            None => bail!("no ovs-dpd in {tried:?}; `cargo build --release` makes it"),
        }
    }

    /// The program ovs-dpd.
    pub fn ovs_dpd(&self) -> String {
        self.directory.join("ovs-dpd").display().to_string()
    }

    /// The interposer.
    pub fn interposer(&self) -> PathBuf {
        self.directory.join("libovs_compat.so")
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// A running ovs-dpd.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
}

/// The words of `ovs-dpd exec` before those of a program.
pub fn exec_words(programs: &Programs, run_dir: &Path) -> Vec<String> {
    let run_dir = run_dir.display().to_string();
    vec![
        programs.ovs_dpd(),
        "exec".into(),
        "--run-dir".into(),
        run_dir,
        "--".into(),
    ]
}

impl Daemon {
    /// How long it may take to end: a promise of its documentation.
    pub const END: Duration = Duration::from_secs(2);

    /// Starts it in the namespace `host` and waits until it is ready.
    ///
    /// # Errors
    /// It ends, or says nothing.
    pub fn start(
        programs: &Programs,
        host: &Namespace,
        run_dir: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let output = run_dir.with_extension("out");
        let run_dir = run_dir.display().to_string();
        let program = programs.ovs_dpd();
        let words = [&[program.as_str(), "run", "--run-dir", &run_dir], arguments].concat();
        let command = host.command(words.as_slice());
        let mut process = Process::spawn(command, &output)?;
        process.wait_output("ready", wait::SOON)?;
        Ok(Self { process })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What it has printed.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// Sends SIGTERM; it must end with status 0 within [`Daemon::END`].
    ///
    /// # Errors
    /// It doesn't.
    pub fn stop(&mut self) -> Result<()> {
        let status = self
            .process
            .terminate(Self::END)
            .context("ovs-dpd after SIGTERM")?;
        if !status.success() {
            bail!("ovs-dpd after SIGTERM: {status}\n{}", self.output());
        }
        Ok(())
    }
}

/// A command of `words`, run under `ovs-dpd exec`.
pub fn under_exec(
    programs: &Programs,
    host: &Namespace,
    run_dir: &Path,
    words: impl Words,
) -> Command {
    let mut all = exec_words(programs, run_dir);
    all.extend(words.words());
    host.command(all)
}
