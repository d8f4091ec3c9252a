//! A laboratory: a namespace "host" in which a datapath and Open vSwitch run, and endpoints.
//!
//! A test begins with [`test`] or [`test_ovs_dpd`]; at its end the log of ovs-vswitchd is
//! checked, ovs-dpd is ended in order, and nothing may be left in the host namespace.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::daemon::{self, Daemon, Programs};
use crate::endpoint::Endpoint;
use crate::log::{self, Expected};
use crate::namespace::{self, Namespace};
use crate::ovs::Ovs;
use crate::process::{self, Process, Ran, Words};
use crate::requirement;
use crate::wait;

/// What forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// ovs-dpd, in the place of the kernel's module.
    OvsDpd,
    /// Open vSwitch's own datapath in user space: the peer. Its endpoints have offloads off.
    Netdev,
}

impl Switch {
    /// The one that tests run over: ovs-dpd, unless `OVS_DPD_TESTS_SWITCH=netdev`, which shows
    /// whether a test itself is right.
    pub fn under_test() -> Self {
        match std::env::var("OVS_DPD_TESTS_SWITCH").as_deref() {
            Ok("netdev") => Self::Netdev,
            _ => Self::OvsDpd,
        }
    }

    /// The name of its datapath, as ovs-dpctl takes it.
    pub fn datapath(self) -> &'static str {
        match self {
            Self::OvsDpd => "system@ovs-system",
            Self::Netdev => "netdev@ovs-netdev",
        }
    }
}

/// Runs a test over [`Switch::under_test`].
///
/// # Errors
/// Those of the test, those of the laboratory, and what the check at the end finds.
pub fn test(work: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    test_over(Switch::under_test(), work)
}

/// Runs a test that only makes sense over ovs-dpd; with `OVS_DPD_TESTS_SWITCH=netdev` it says
/// that it was skipped.
///
/// # Errors
/// As [`test`].
pub fn test_ovs_dpd(work: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    if Switch::under_test() != Switch::OvsDpd {
        eprintln!("skipped: not about datapath_type=netdev");
        return Ok(());
    }
    test_over(Switch::OvsDpd, work)
}

/// Runs a test over a given switch.
///
/// # Errors
/// As [`test`].
pub fn test_over(switch: Switch, work: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    run(|| Lab::new(switch), work)
}

/// Runs a test over ovs-dpd alone, without ovs-vswitchd: the datapath belongs to the test.
///
/// # Errors
/// As [`test`].
pub fn test_bare(work: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    if Switch::under_test() != Switch::OvsDpd {
        eprintln!("skipped: not about datapath_type=netdev");
        return Ok(());
    }
    run(|| Lab::bare(Switch::OvsDpd), work)
}

fn run(make: impl FnOnce() -> Result<Lab>, work: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    if requirement::skip() {
        eprintln!("skipped: OVS_DPD_TESTS_SKIP_SYSTEM=1");
        return Ok(());
    }
    let lab = make()?;
    match work(&lab) {
        Ok(()) => lab.finish(),
        Err(error) => {
            lab.report();
            Err(error)
        }
    }
}

/// A switch and its endpoints. Dropping it ends and removes everything, without checks.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they must go.
    vswitchd: Mutex<Option<Process>>,
    database: Mutex<Option<Process>>,
    daemon: Mutex<Option<Daemon>>,
    endpoints: Mutex<Vec<Arc<Endpoint>>>,
    host: Namespace,
    programs: Option<Programs>,
    ovs: Ovs,
    switch: Switch,
    next: AtomicU16,
    expected: Mutex<Vec<Expected>>,
    /// What ovs-vswitchd.log got while ovs-vswitchd ended in order, in bytes.
    exits: Mutex<Vec<Range<usize>>>,
    directory: Directory,
}

/// A directory that goes when dropped, unless `OVS_DPD_TESTS_KEEP=1`.
#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        if std::env::var_os("OVS_DPD_TESTS_KEEP").is_some_and(|v| v == "1") {
            eprintln!("kept: {}", self.0.display());
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere in a test must not keep it from tidying up.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lab {
    /// A laboratory with everything running: the datapath, ovsdb-server, ovs-vswitchd.
    ///
    /// # Errors
    /// Something is missing, or doesn't start.
    pub fn new(switch: Switch) -> Result<Self> {
        Self::with(switch, &[])
    }

    /// The same with more arguments of `ovs-dpd run`, if that is the switch.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with(switch: Switch, arguments: &[&str]) -> Result<Self> {
        let lab = Self::bare(switch)?;
        if switch == Switch::OvsDpd && !arguments.is_empty() {
            lab.stop_daemon()?;
            lab.start_daemon_with(arguments)?;
        }
        *lock(&lab.database) = Some(lab.ovs.start_database(&lab.host)?);
        lab.start_vswitchd()?;
        Ok(lab)
    }

    /// A laboratory with the datapath alone, for `ovs-dpctl` by itself: no ovs-vswitchd.
    ///
    /// # Errors
    /// Something is missing, or doesn't start.
    pub fn bare(switch: Switch) -> Result<Self> {
        requirement::check()?;
        let programs = match switch {
            Switch::OvsDpd => Some(Programs::find()?),
            Switch::Netdev => None,
        };
        namespace::sweep();
        // Short: the paths of UNIX sockets in it are limited to 107 bytes.
        let path = std::env::temp_dir().join(namespace::unique(""));
        std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let directory = Directory(path);
        let host = Namespace::new("host")?;
        let lab = Self {
            vswitchd: Mutex::new(None),
            database: Mutex::new(None),
            daemon: Mutex::new(None),
            endpoints: Mutex::new(Vec::new()),
            ovs: Ovs::new(&directory.0),
            host,
            programs,
            switch,
            next: AtomicU16::new(1),
            expected: Mutex::new(Vec::new()),
            exits: Mutex::new(Vec::new()),
            directory,
        };
        if switch == Switch::OvsDpd {
            lab.start_daemon()?;
        }
        Ok(lab)
    }

    /// The namespace of the switch.
    pub fn host(&self) -> &Namespace {
        &self.host
    }

    /// What forwards.
    pub fn switch(&self) -> Switch {
        self.switch
    }

    /// The directory of everything that the laboratory writes.
    pub fn directory(&self) -> &Path {
        &self.directory.0
    }

    /// ovs-dpd's run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.0.join("dpd")
    }

    /// The built programs.
    ///
    /// # Errors
    /// The laboratory is one without ovs-dpd.
    pub fn programs(&self) -> Result<&Programs> {
        self.programs
            .as_ref()
            .context("a laboratory without ovs-dpd")
    }

    /// Says that ovs-vswitchd.log may hold a line, and why.
    pub fn expect_log(&self, text: &'static str, reason: &'static str) {
        lock(&self.expected).push(Expected { text, reason });
    }

    // ---- the programs

    /// Starts ovs-dpd.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn start_daemon(&self) -> Result<()> {
        self.start_daemon_with(&[])
    }

    /// Starts ovs-dpd with more arguments of `run`.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn start_daemon_with(&self, arguments: &[&str]) -> Result<()> {
        let daemon = Daemon::start(self.programs()?, &self.host, &self.run_dir(), arguments)?;
        *lock(&self.daemon) = Some(daemon);
        Ok(())
    }

    /// ovs-dpd while it runs.
    ///
    /// # Errors
    /// Those of `work`; it isn't running.
    pub fn with_daemon<T>(&self, work: impl FnOnce(&mut Daemon) -> Result<T>) -> Result<T> {
        work(
            lock(&self.daemon)
                .as_mut()
                .context("ovs-dpd isn't running")?,
        )
    }

    /// Stops ovs-dpd in order.
    ///
    /// # Errors
    /// It doesn't end as it promises.
    pub fn stop_daemon(&self) -> Result<()> {
        match lock(&self.daemon).take() {
            Some(mut daemon) => daemon.stop(),
            None => Ok(()),
        }
    }

    /// Starts ovs-vswitchd and waits until it has taken up what the database says.
    ///
    /// # Errors
    /// It doesn't start.
    pub fn start_vswitchd(&self) -> Result<()> {
        let words = self.ovs.vswitchd_words();
        let command = match self.switch {
            Switch::OvsDpd => {
                daemon::under_exec(self.programs()?, &self.host, &self.run_dir(), words)
            }
            Switch::Netdev => self.host.command(words),
        };
        *lock(&self.vswitchd) = Some(self.ovs.start_vswitchd(command, &self.host)?);
        Ok(())
    }

    /// ovs-vswitchd while it runs.
    ///
    /// # Errors
    /// Those of `work`; it isn't running.
    pub fn with_vswitchd<T>(&self, work: impl FnOnce(&mut Process) -> Result<T>) -> Result<T> {
        work(
            lock(&self.vswitchd)
                .as_mut()
                .context("ovs-vswitchd isn't running")?,
        )
    }

    /// Ends ovs-vswitchd in order; the datapath stays.
    ///
    /// # Errors
    /// It doesn't end.
    pub fn stop_vswitchd(&self) -> Result<()> {
        let Some(mut vswitchd) = lock(&self.vswitchd).take() else {
            return Ok(());
        };
        let begin = self.log().len();
        self.ovs
            .try_appctl(&self.host, "exit", process::LIMIT)?
            .ok()?;
        vswitchd.wait(wait::SOON)?;
        lock(&self.exits).push(begin..self.log().len());
        Ok(())
    }

    /// Kills ovs-vswitchd.
    ///
    /// # Errors
    /// It isn't running.
    pub fn kill_vswitchd(&self) -> Result<()> {
        lock(&self.vswitchd)
            .take()
            .context("ovs-vswitchd isn't running")?
            .kill()
    }

    /// Ends ovs-vswitchd in order and starts it again.
    ///
    /// # Errors
    /// It doesn't end or start.
    pub fn restart_vswitchd(&self) -> Result<()> {
        self.stop_vswitchd()?;
        self.start_vswitchd()
    }

    // ---- the tools

    /// `ovs-vsctl`.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn vsctl(&self, words: impl Words) -> Result<String> {
        self.ovs.vsctl(&self.host, words)
    }

    /// `ovs-ofctl`.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn ofctl(&self, words: impl Words) -> Result<String> {
        self.ovs.ofctl(&self.host, words)
    }

    /// `ovs-ofctl` that runs beside the test, its output in a file.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn_ofctl(&self, words: impl Words, output: &Path) -> Result<Process> {
        self.ovs.spawn_ofctl(&self.host, words, output)
    }

    /// `ovs-appctl` to ovs-vswitchd.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn appctl(&self, words: impl Words) -> Result<String> {
        self.ovs.try_appctl(&self.host, words, process::LIMIT)?.ok()
    }

    /// `ovs-dpctl`, a program of its own beside ovs-vswitchd; over netdev, whose datapath is a
    /// part of ovs-vswitchd, `ovs-appctl dpctl/...`.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn dpctl(&self, words: impl Words) -> Result<String> {
        self.try_dpctl(words)?.ok()
    }

    /// As [`Lab::dpctl`], for what may fail.
    ///
    /// # Errors
    /// It can't be run.
    pub fn try_dpctl(&self, words: impl Words) -> Result<Ran> {
        let words = words.words();
        match self.switch {
            Switch::OvsDpd => {
                let mut all = vec!["ovs-dpctl".to_owned()];
                all.extend(words);
                self.under_exec(all)
            }
            Switch::Netdev => {
                let command = words.iter().position(|w| !w.starts_with('-'));
                let command = command.context("no command for dpctl")?;
                let mut all = vec![format!("dpctl/{}", words[command])];
                all.extend(
                    words[..command]
                        .iter()
                        .chain(&words[command + 1..])
                        .cloned(),
                );
                self.ovs.try_appctl(&self.host, all, process::LIMIT)
            }
        }
    }

    /// A program under `ovs-dpd exec`.
    ///
    /// # Errors
    /// It can't be run.
    pub fn under_exec(&self, words: impl Words) -> Result<Ran> {
        let mut command = daemon::under_exec(self.programs()?, &self.host, &self.run_dir(), words);
        self.ovs.environment(&mut command);
        process::run(command, process::LIMIT)
    }

    /// ovs-dpd with arguments of your own, in the host namespace.
    ///
    /// # Errors
    /// It can't be run.
    pub fn ovs_dpd(&self, words: impl Words) -> Result<Ran> {
        let mut all = vec![self.programs()?.ovs_dpd()];
        all.extend(words.words());
        self.host.try_exec(all, process::LIMIT)
    }

    /// `ovs-dpd status`.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn status(&self) -> Result<String> {
        let run_dir = self.run_dir().display().to_string();
        self.ovs_dpd(["status", "--run-dir", &run_dir])?.ok()
    }

    /// `ovs-dpd status --json`.
    ///
    /// # Errors
    /// It failed, or isn't JSON.
    pub fn status_json(&self) -> Result<serde_json::Value> {
        let run_dir = self.run_dir().display().to_string();
        let text = self
            .ovs_dpd(["status", "--json", "--run-dir", &run_dir])?
            .ok()?;
        serde_json::from_str(&text).with_context(|| text)
    }

    // ---- the network

    /// Adds a bridge over the switch.
    ///
    /// # Errors
    /// Those of ovs-vsctl.
    pub fn bridge(&self, name: &str) -> Result<()> {
        let datapath_type = match self.switch {
            Switch::OvsDpd => "",
            Switch::Netdev => " datapath_type=netdev",
        };
        let mac = 0x0200_0000_ff00_u64 + u64::from(self.next.fetch_add(1, Ordering::Relaxed));
        // A bridge whose address follows its ports' floods announcements into who counts frames.
        self.vsctl(format!(
            "add-br {name} -- set bridge {name} other_config:hwaddr={} fail_mode=standalone{datapath_type}",
            mac.to_be_bytes()[2..].iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":"),
        ))?;
        Ok(())
    }

    /// A new endpoint, with offloads as they are by default (over netdev: off), not on a bridge.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn endpoint(&self, label: &str) -> Result<Arc<Endpoint>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let endpoint = Arc::new(Endpoint::new(&self.host, label, number)?);
        if self.switch == Switch::Netdev {
            endpoint.offloads_off()?;
        }
        lock(&self.endpoints).push(Arc::clone(&endpoint));
        Ok(endpoint)
    }

    /// A new endpoint on a bridge, with an address.
    ///
    /// # Errors
    /// Those of `ip` and ovs-vsctl.
    pub fn host_on(&self, bridge: &str, label: &str, address: &str) -> Result<Arc<Endpoint>> {
        let endpoint = self.endpoint(label)?;
        endpoint.address(address)?;
        self.port(bridge, &endpoint, "")?;
        Ok(endpoint)
    }

    /// Puts an endpoint on a bridge; `columns` are of the Port, such as `tag=10`.
    ///
    /// # Errors
    /// Those of ovs-vsctl, and the interface's own error.
    pub fn port(&self, bridge: &str, endpoint: &Endpoint, columns: &str) -> Result<()> {
        self.device(bridge, endpoint.port(), columns)
    }

    /// A cable between two bridges: a veth pair, both of whose ends, `t-NAME0` and `t-NAME1`, are
    /// in the switch's namespace. Not on a bridge yet.
    ///
    /// # Errors
    /// Those of `ip`.
    pub fn cable(&self, name: &str) -> Result<(String, String)> {
        let ends = (format!("t-{name}0"), format!("t-{name}1"));
        self.host.ip([
            "link", "add", &ends.0, "up", "type", "veth", "peer", "name", &ends.1,
        ])?;
        self.host.ip(["link", "set", &ends.1, "up"])?;
        Ok(ends)
    }

    /// Puts a device of the switch's namespace on a bridge.
    ///
    /// # Errors
    /// As [`Lab::port`].
    pub fn device(&self, bridge: &str, name: &str, columns: &str) -> Result<()> {
        self.vsctl(format!("add-port {bridge} {name} {columns}"))?;
        self.port_works(name)
    }

    /// Adds an internal port with an address, up.
    ///
    /// # Errors
    /// Those of ovs-vsctl and `ip`.
    pub fn internal(&self, bridge: &str, name: &str, address: &str) -> Result<()> {
        self.vsctl(format!(
            "add-port {bridge} {name} -- set interface {name} type=internal"
        ))?;
        self.port_works(name)?;
        self.host.ip(["addr", "add", address, "dev", name])?;
        self.host.ip(["link", "set", name, "up"])?;
        Ok(())
    }

    /// Checks that an interface has a number and no error.
    ///
    /// # Errors
    /// What ovs-vswitchd says about it.
    pub fn port_works(&self, name: &str) -> Result<()> {
        let number = self.vsctl(format!("get interface {name} ofport"))?;
        if number.trim().parse::<i32>().is_ok_and(|n| n > 0) {
            return Ok(());
        }
        bail!(
            "{name}: {}",
            self.vsctl(format!("get interface {name} error"))?
        );
    }

    /// The OpenFlow port number of an interface.
    ///
    /// # Errors
    /// It has none.
    pub fn ofport(&self, name: &str) -> Result<u32> {
        let text = self.vsctl(format!("get interface {name} ofport"))?;
        text.trim()
            .parse()
            .with_context(|| format!("ofport of {name}: {text}"))
    }

    /// The datapath's port number of a device, from `ovs-dpctl show`.
    ///
    /// # Errors
    /// It isn't on the datapath.
    pub fn dp_port(&self, name: &str) -> Result<u32> {
        let text = self.dpctl(["show", self.switch.datapath()])?;
        let number = |line: &str| {
            let (number, rest) = line.trim().strip_prefix("port ")?.split_once(": ")?;
            (rest.split_whitespace().next()? == name).then(|| number.parse().ok())?
        };
        text.lines()
            .find_map(number)
            .with_context(|| format!("no {name} in\n{text}"))
    }

    /// The datapath's flows, a line each, as `ovs-dpctl dump-flows` prints them.
    ///
    /// # Errors
    /// Those of ovs-dpctl.
    pub fn dp_flows(&self) -> Result<Vec<String>> {
        let text = self.dpctl(["-m", "dump-flows", self.switch.datapath()])?;
        let flows = text.lines().filter(|l| l.contains("actions:"));
        Ok(flows.map(str::to_owned).collect())
    }

    // ---- the end

    /// ovs-vswitchd's log so far.
    pub fn log(&self) -> String {
        process::read_lossy(&self.ovs.log_path())
    }

    /// Lines of ovs-vswitchd.log that nobody expects.
    pub fn complaints(&self) -> Vec<String> {
        let own = lock(&self.expected).clone();
        let peer = if self.switch == Switch::Netdev {
            log::NETDEV
        } else {
            &[]
        };
        let text = self.log();
        let part = |range: Range<usize>| text.get(range).unwrap_or_default();
        let (mut at, mut found) = (0, Vec::new());
        for exit in lock(&self.exits).iter() {
            let running = part(at..exit.start);
            found.extend(log::complaints(running, &[log::ALWAYS, peer, &own]));
            let ending = part(exit.clone());
            let expected = [log::ALWAYS, log::AT_EXIT, peer, &own];
            found.extend(log::complaints(ending, &expected));
            at = exit.end;
        }
        let running = part(at..text.len());
        found.extend(log::complaints(running, &[log::ALWAYS, peer, &own]));
        found
    }

    /// Ends everything in order, and checks: the log has no complaint, ovs-dpd ends as it
    /// promises, nothing of it is left in the host namespace.
    ///
    /// # Errors
    /// What was found.
    pub fn finish(self) -> Result<()> {
        let checked = self.finish_checks();
        if checked.is_err() {
            self.report();
        }
        checked
    }

    fn finish_checks(&self) -> Result<()> {
        self.stop_vswitchd()?;
        let complaints = self.complaints();
        if !complaints.is_empty() {
            bail!(
                "ovs-vswitchd.log has warnings or errors:\n{}",
                complaints.join("\n")
            );
        }
        self.stop_daemon()?;
        // Of every ovs-dpd that ran here, to its end.
        let output = process::read_lossy(&self.run_dir().with_extension("out"));
        if let Some(line) = output
            .lines()
            .find(|l| l.contains("panicked at") || l.contains("ERROR"))
        {
            bail!("ovs-dpd said: {line}");
        }
        if self.switch == Switch::OvsDpd {
            self.nothing_left()?;
        }
        Ok(())
    }

    /// Checks that nothing that ovs-dpd made is left in the host namespace: only the devices of
    /// the endpoints, and what was there before.
    ///
    /// # Errors
    /// What is left.
    pub fn nothing_left(&self) -> Result<()> {
        let endpoints = lock(&self.endpoints);
        // `t-`: devices that a test itself made there.
        let known = |name: &String| {
            name == "lo" || name.starts_with("t-") || endpoints.iter().any(|e| e.port() == name)
        };
        let links: Vec<_> = self
            .host
            .links()?
            .into_iter()
            .filter(|n| !known(n))
            .collect();
        if !links.is_empty() {
            bail!("ovs-dpd left devices behind: {links:?}");
        }
        let rules = self.host.exec("nft list ruleset")?;
        if !rules.trim().is_empty() {
            bail!("ovs-dpd left nftables rules behind:\n{rules}");
        }
        let text = self.host.ip("-d link show")?;
        let promiscuous = |l: &&str| l.contains("promiscuity ") && !l.contains("promiscuity 0");
        if let Some(line) = text.lines().find(promiscuous) {
            bail!("ovs-dpd left a device promiscuous: {line}");
        }
        Ok(())
    }

    /// Prints the ends of the logs: what one wants to see of a test that failed.
    pub fn report(&self) {
        eprintln!("--- ovs-vswitchd.log\n{}", log::tail(&self.log(), 40));
        if let Some(daemon) = lock(&self.daemon).as_ref() {
            eprintln!("--- ovs-dpd\n{}", log::tail(&daemon.output(), 60));
        }
        if self.switch == Switch::OvsDpd {
            let run_dir = self.run_dir().display().to_string();
            let program = self.programs().map(Programs::ovs_dpd).unwrap_or_default();
            let words = [program.as_str(), "status", "--run-dir", &run_dir];
            match self.host.try_exec(words, Duration::from_secs(5)) {
                Ok(ran) => eprintln!("--- ovs-dpd status\n{}{}", ran.stdout, ran.stderr),
                Err(error) => eprintln!("--- ovs-dpd status\n{error:#}"),
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.report();
        }
    }
}
