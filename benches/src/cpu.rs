//! Who runs where.
//!
//! Where a rate is measured the sender, with the softirq of its veth, has one CPU and the datapath
//! another, so that the scheduler's choice isn't what is measured.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// The sender's CPU.
pub const SENDER: usize = 0;
/// The datapath's CPU.
pub const DATAPATH: usize = 1;

/// Puts this program and all that it starts ahead of other sessions on the machine (scheduler
/// autogroups: `nice` does nothing between sessions), in a session of its own, which ends with who
/// started it. Says so if it can't.
pub fn ahead_of_others() {
    let done = rustix::process::setsid().is_ok()
        && rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
            .is_ok()
        && std::fs::write("/proc/self/autogroup", "-20").is_ok();
    if !done {
        eprintln!("not ahead of other sessions: the figures show what else runs here");
    }
}

/// A set of CPUs.
pub fn set(of: &[usize]) -> CpuSet {
    let mut set = CpuSet::new();
    for cpu in of {
        set.set(*cpu);
    }
    set
}

/// All CPUs.
pub fn all() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// There is no such CPU.
pub fn pin_thread(cpu: usize) -> Result<()> {
    sched_setaffinity(None, &set(&[cpu])).with_context(|| format!("CPU {cpu}"))
}

/// Keeps all threads of a process on one CPU; None: lets them run anywhere again.
///
/// # Errors
/// There is no such process or CPU.
pub fn pin_process(process: u32, cpu: Option<usize>) -> Result<()> {
    let cpus = set(&cpu.map_or_else(all, |cpu| vec![cpu]));
    let tasks = format!("/proc/{process}/task");
    for entry in std::fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        let task = entry?.file_name().to_string_lossy().parse::<i32>().ok();
        match sched_setaffinity(task.and_then(Pid::from_raw), &cpus) {
            // A thread may end at any time.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error).context("sched_setaffinity"),
        }
    }
    Ok(())
}

/// The processor time that a thread of this process has used so far.
///
/// # Errors
/// There is no such thread.
pub fn thread_time(id: i32) -> Result<Duration> {
    // Nanoseconds on a CPU, nanoseconds waiting for one, slices.
    let text = std::fs::read_to_string(format!("/proc/self/task/{id}/schedstat"))?;
    let first = text.split_whitespace().next().context("schedstat")?;
    Ok(Duration::from_nanos(first.parse().context("schedstat")?))
}
