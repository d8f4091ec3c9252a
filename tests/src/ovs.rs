//! The real Open vSwitch: ovsdb-server, ovs-vswitchd and the tools, with every path of theirs in
//! a directory of the laboratory, so that the host's own Open vSwitch isn't touched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::namespace::Namespace;
use crate::process::{self, Process, Ran, Words};
use crate::wait;

/// Where Debian, and others, keep the database's schema.
const SCHEMAS: &[&str] = &[
    "/usr/share/openvswitch/vswitch.ovsschema",
    "/usr/local/share/openvswitch/vswitch.ovsschema",
];

/// The directory and the names in it.
#[derive(Debug, Clone)]
pub struct Ovs {
    directory: PathBuf,
}

impl Ovs {
    /// With everything in `directory`, which exists.
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn database(&self) -> String {
        format!("unix:{}", self.file("db.sock"))
    }

    /// ovs-vswitchd's log.
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("ovs-vswitchd.log")
    }

    /// Points a command at the private directories.
    pub fn environment(&self, command: &mut Command) {
        for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
            command.env(variable, &self.directory);
        }
    }

    fn run(&self, mut command: Command, limit: Duration) -> Result<Ran> {
        self.environment(&mut command);
        process::run(command, limit)
    }

    /// Makes the database and starts its server, in the namespace `host`.
    ///
    /// # Errors
    /// No schema; the server doesn't start.
    pub fn start_database(&self, host: &Namespace) -> Result<Process> {
        let schema = SCHEMAS.iter().find(|s| Path::new(s).exists());
        let schema = schema.context("no vswitch.ovsschema: is openvswitch-switch installed?")?;
        let mut create = Command::new("ovsdb-tool");
        create.args(["create", &self.file("conf.db"), schema]);
        self.run(create, process::LIMIT)?.ok()?;
        let mut command = host.command([
            "ovsdb-server",
            &self.file("conf.db"),
            &format!("--remote=p{}", self.database()),
            &format!("--unixctl={}", self.file("ovsdb-server.ctl")),
            &format!("--log-file={}", self.file("ovsdb-server.log")),
            "-vconsole:off",
            "--no-chdir",
        ]);
        self.environment(&mut command);
        let server = Process::spawn(command, &self.directory.join("ovsdb-server.out"))?;
        wait::soon("ovsdb-server listening", || {
            Ok(self.directory.join("db.sock").exists())
        })?;
        self.vsctl(host, "--no-wait init")
            .context("the database answers")?;
        Ok(server)
    }

    /// The arguments that ovs-vswitchd runs with.
    pub fn vswitchd_words(&self) -> Vec<String> {
        vec![
            "ovs-vswitchd".to_owned(),
            self.database(),
            format!("--pidfile={}", self.file("ovs-vswitchd.pid")),
            format!("--unixctl={}", self.file("ovs-vswitchd.ctl")),
            format!("--log-file={}", self.log_path().display()),
            "-vconsole:off".to_owned(),
            "--no-chdir".to_owned(),
        ]
    }

    /// Starts ovs-vswitchd with a command whose words end in [`Ovs::vswitchd_words`], and waits
    /// until it answers.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn start_vswitchd(&self, mut command: Command, host: &Namespace) -> Result<Process> {
        self.environment(&mut command);
        let mut daemon = Process::spawn(command, &self.directory.join("ovs-vswitchd.out"))?;
        // With a configuration in the database this also waits for its bridges.
        let limit = wait::SOON;
        let started = wait::until("ovs-vswitchd answering", limit, || {
            if let Some(status) = daemon.ended()? {
                anyhow::bail!("ovs-vswitchd ended: {status}\n{}", daemon.output());
            }
            let ran = self.try_appctl(host, "version", Duration::from_secs(5))?;
            Ok(ran.status.success().then_some(()))
        });
        started.with_context(|| process::read_lossy(&self.log_path()))?;
        self.vsctl(host, "set Open_vSwitch . external_ids:started=true")?;
        Ok(daemon)
    }

    /// `ovs-vsctl`.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn vsctl(&self, host: &Namespace, words: impl Words) -> Result<String> {
        let mut all = vec!["ovs-vsctl".to_owned(), format!("--db={}", self.database())];
        all.push("--timeout=30".to_owned());
        all.extend(words.words());
        self.run(host.command(all), process::LIMIT)?.ok()
    }

    /// `ovs-ofctl`; bridges' management sockets are in the private directory.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn ofctl(&self, host: &Namespace, words: impl Words) -> Result<String> {
        let mut all = vec!["ovs-ofctl".to_owned(), "--timeout=30".to_owned()];
        all.extend(words.words());
        self.run(host.command(all), process::LIMIT)?.ok()
    }

    /// `ovs-ofctl` that runs beside the test, such as its `monitor`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn_ofctl(
        &self,
        host: &Namespace,
        words: impl Words,
        output: &Path,
    ) -> Result<Process> {
        let mut all = vec!["ovs-ofctl".to_owned()];
        all.extend(words.words());
        let mut command = host.command(all);
        self.environment(&mut command);
        Process::spawn(command, output)
    }

    /// `ovs-appctl` to ovs-vswitchd.
    ///
    /// # Errors
    /// It can't be run, or not within `limit`.
    pub fn try_appctl(&self, host: &Namespace, words: impl Words, limit: Duration) -> Result<Ran> {
        let mut all = vec![
            "ovs-appctl".to_owned(),
            "-t".to_owned(),
            self.file("ovs-vswitchd.ctl"),
        ];
        all.extend(words.words());
        self.run(host.command(all), limit)
    }
}
