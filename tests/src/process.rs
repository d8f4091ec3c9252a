//! Programs: run to their end with a limit of time, or left running beside the test.
//!
//! Every program is in a process group of its own (a Ctrl-C on the terminal reaches the test,
//! which then ends its programs in order) and is killed by the kernel when the thread that
//! started it ends.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::sys;

/// How long a program may run that isn't expected to run long.
pub const LIMIT: Duration = Duration::from_secs(60);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes what waits for a program or an event give up; for a handler of SIGINT.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Whether [`interrupt`] was called.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// A command line in pieces: a string is split at white space, with `'...'` kept together.
pub trait Words {
    /// The pieces.
    fn words(self) -> Vec<String>;
}

impl Words for &str {
    fn words(self) -> Vec<String> {
        let mut words = Vec::new();
        let (mut word, mut begun, mut quoted) = (String::new(), false, false);
        for c in self.chars() {
            match c {
                '\'' => (quoted, begun) = (!quoted, true),
                c if c.is_whitespace() && !quoted => {
                    if begun {
                        words.push(std::mem::take(&mut word));
                    }
                    begun = false;
                }
                c => {
                    word.push(c);
                    begun = true;
                }
            }
        }
        if begun {
            words.push(word);
        }
        words
    }
}

impl Words for &String {
    fn words(self) -> Vec<String> {
        self.as_str().words()
    }
}

impl Words for String {
    fn words(self) -> Vec<String> {
        self.as_str().words()
    }
}

impl Words for Vec<String> {
    fn words(self) -> Vec<String> {
        self
    }
}

impl Words for &[&str] {
    fn words(self) -> Vec<String> {
        self.iter().map(ToString::to_string).collect()
    }
}

impl<const N: usize> Words for [&str; N] {
    fn words(self) -> Vec<String> {
        self.iter().map(ToString::to_string).collect()
    }
}

/// What a program that has ended left.
#[derive(Debug)]
pub struct Ran {
    /// The command line, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ran {
    /// Its standard output, if it succeeded.
    ///
    /// # Errors
    /// The command line, how it ended and what it printed.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!(
            "`{}`: {}\n{}{}",
            self.line,
            self.status,
            self.stdout,
            self.stderr
        );
    }
}

/// The command line of `command`, for messages.
pub fn line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

fn reader(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth showing.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a program to its end.
///
/// # Errors
/// It can't be started, or runs longer than `limit` (it is then killed).
pub fn run(command: Command, limit: Duration) -> Result<Ran> {
    run_while(command, limit, &|| !interrupted())
}

/// Runs a program that tidies up: also after [`interrupt`].
///
/// # Errors
/// As [`run`].
pub fn run_anyway(command: Command) -> Result<Ran> {
    run_while(command, LIMIT, &|| true)
}

fn run_while(mut command: Command, limit: Duration, on: &dyn Fn() -> bool) -> Result<Ran> {
    let line = line(&command);
    sys::die_with_parent(&mut command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("`{line}` can't be started"))?;
    let stdout = child.stdout.take().map(reader);
    let stderr = child.stderr.take().map(reader);
    let ended = wait_child(&mut child, limit, on);
    if !matches!(ended, Ok(Some(_))) {
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = |thread: Option<std::thread::JoinHandle<String>>| {
        thread.and_then(|t| t.join().ok()).unwrap_or_default()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    match ended? {
        Some(status) => Ok(Ran {
            line,
            status,
            stdout,
            stderr,
        }),
        None if !on() => bail!("`{line}`: interrupted"),
        None => bail!("`{line}` still ran after {limit:?}\n{stdout}{stderr}"),
    }
}

/// The exit status, or none if `limit` passed or `on` no longer holds.
fn wait_child(
    child: &mut Child,
    limit: Duration,
    on: &dyn Fn() -> bool,
) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let pid = Pid::from_child(child);
    let handle = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !on() {
            return Ok(None);
        }
        let step = left.min(Duration::from_millis(200));
        let timeout = Timespec::try_from(step).context("timeout")?;
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A program that runs beside the test, its output in a file. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    line: String,
    output: PathBuf,
    /// Where its output begins in the file, which may have been another's before.
    begin: u64,
}

impl Process {
    /// Starts a program with standard output and error appended to the file `output`.
    ///
    /// # Errors
    /// It can't be started, or the file not opened.
    pub fn spawn(mut command: Command, output: &Path) -> Result<Self> {
        let line = line(&command);
        sys::die_with_parent(&mut command);
        let file = File::options()
            .create(true)
            .append(true)
            .open(output)
            .with_context(|| output.display().to_string())?;
        let begin = file.metadata()?.len();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("`{line}` can't be started"))?;
        Ok(Self {
            child,
            line,
            output: output.to_owned(),
            begin,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        let bytes = std::fs::read(&self.output).unwrap_or_default();
        let begin = usize::try_from(self.begin).unwrap_or(usize::MAX);
        String::from_utf8_lossy(bytes.get(begin..).unwrap_or_default()).into_owned()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// Those of waitpid(2).
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        match wait_child(&mut self.child, limit, &|| !interrupted())? {
            Some(status) => Ok(status),
            None => bail!("`{}` still ran after {limit:?}", self.line),
        }
    }

    /// Waits until it has printed `text`.
    ///
    /// # Errors
    /// It ended first, or time ran out; with what it printed.
    pub fn wait_output(&mut self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("`{}` printing {text:?}", self.line);
        let waited = crate::wait::until(&what, limit, || {
            let ended = self.child.try_wait()?;
            let output = self.output();
            if output.contains(text) {
                return Ok(Some(()));
            }
            match ended {
                Some(status) => bail!("`{}` ended, {status}", self.line),
                None => Ok(None),
            }
        });
        waited.with_context(|| format!("its output:\n{}", self.output()))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// Those of kill(2).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Not reaped yet (that takes &mut self), so the id can't be another's.
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("signal to `{}`", self.line))
    }

    /// Sends SIGTERM and waits for the end; kills it if that takes longer than `limit`.
    ///
    /// # Errors
    /// It had to be killed.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        self.signal(Signal::TERM)?;
        self.wait(limit)
    }

    /// Kills it and waits for its end.
    ///
    /// # Errors
    /// Those of kill(2) and waitpid(2).
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// A number of /proc/PID/status in kB, such as `VmRSS`.
    ///
    /// # Errors
    /// The process or the field is not there.
    pub fn status_kb(&self, field: &str) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        text.lines()
            .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))
            .and_then(|v| v.split_whitespace().next()?.parse().ok())
            .with_context(|| format!("no {field} in /proc/{}/status", self.id()))
    }

    /// The processor time that it has used so far, in user and system mode.
    ///
    /// # Errors
    /// The process is not there.
    pub fn cpu_time(&self) -> Result<Duration> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        // Fields 14 and 15; counted behind the name, which may hold anything.
        let behind = text.rsplit_once(')').context("stat")?.1;
        let ticks: u64 = behind
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|f| f.parse::<u64>().ok())
            .sum();
        let per_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended long ago: both are then harmless errors.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file as text; nothing if it isn't there.
pub fn read_lossy(path: &Path) -> String {
    std::fs::read(path)
        .map(|b| String::from_utf8_lossy(&b).into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_split_at_white_space_and_keep_quoted_ones() {
        assert_eq!("a  b 'c d' e='f g'".words(), ["a", "b", "c d", "e=f g"]);
        assert_eq!("''".words(), [""]);
        assert!(" ".words().is_empty());
    }

    #[test]
    fn a_program_that_runs_too_long_is_killed_and_named() {
        let mut command = Command::new("sleep");
        command.arg("100");
        let error = run(command, Duration::from_millis(50))
            .unwrap_err()
            .to_string();
        assert!(error.contains("sleep 100"), "{error}");
    }

    #[test]
    fn failure_shows_what_was_printed() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let error = run(command, LIMIT).unwrap().ok().unwrap_err().to_string();
        assert!(
            error.contains("out") && error.contains("err") && error.contains('3'),
            "{error}"
        );
    }
}
