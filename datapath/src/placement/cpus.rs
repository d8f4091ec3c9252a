//! Lists of CPUs, as `0-3,8`: written by people, checked against what the system has and allows.

use std::fmt;
use std::str::FromStr;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// CPUs by number, each once, in the order given. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<u32>);

/// Why a list of CPUs is no good.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// Not the form of a list.
    #[error("{0:?} is no CPU or range of CPUs: a list is like 0-3,8")]
    Form(String),
    /// A range that ends before it begins.
    #[error("the range {0} ends before it begins")]
    Backwards(String),
    /// Named twice.
    #[error("CPU {0} is named twice")]
    Twice(u32),
    /// Larger than any CPU's number.
    #[error("there is no CPU {0} anywhere: numbers end at {last}", last = CpuSet::MAX_CPU - 1)]
    TooLarge(u32),
    /// Not of this machine, or offline.
    #[error("this machine has no CPU {cpu} that is online (it has {online})")]
    Absent {
        /// The number.
        cpu: u32,
        /// Those that are.
        online: String,
    },
    /// The process may not run there.
    #[error(
        "this process may not run on CPU {cpu}, only on {allowed}: a cgroup's cpuset, systemd's \
         AllowedCPUs= or taskset says so"
    )]
    Forbidden {
        /// The number.
        cpu: u32,
        /// Where it may.
        allowed: String,
    },
    /// The system didn't tell.
    #[error("can't ask which CPUs there are: {0}")]
    Unknown(std::io::Error),
}

impl CpuList {
    /// The numbers.
    pub fn numbers(&self) -> &[u32] {
        &self.0
    }

    /// The CPU of the worker of that number: workers beyond the list begin with the first again.
    pub fn of_worker(&self, worker: usize) -> Option<u32> {
        self.0.get(worker.checked_rem(self.0.len())?).copied()
    }

    /// Whether the calling thread could run on each of them.
    ///
    /// # Errors
    /// Names the first on which it couldn't, and why.
    pub fn check(&self) -> Result<(), CpuError> {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online");
        let online = online.map_err(CpuError::Unknown)?;
        let online: Self = online.trim().parse()?;
        let allowed = sched_getaffinity(None).map_err(|errno| CpuError::Unknown(errno.into()))?;
        self.check_against(&online, |cpu| allowed.is_set(cpu as usize))
    }

    fn check_against(&self, online: &Self, allowed: impl Fn(u32) -> bool) -> Result<(), CpuError> {
        for cpu in self.0.iter().copied() {
            if !online.0.contains(&cpu) {
                let online = online.to_string();
                return Err(CpuError::Absent { cpu, online });
            }
            if !allowed(cpu) {
                let open = (0..CpuSet::MAX_CPU as u32).filter(|cpu| allowed(*cpu));
                let allowed = Self(open.collect()).to_string();
                return Err(CpuError::Forbidden { cpu, allowed });
            }
        }
        Ok(())
    }
}

/// Keeps the calling thread on that CPU.
///
/// # Errors
/// The system's.
pub fn pin(cpu: u32) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    if cpu as usize >= CpuSet::MAX_CPU {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    set.set(cpu as usize);
    Ok(sched_setaffinity(None, &set)?)
}

impl FromStr for CpuList {
    type Err = CpuError;

    fn from_str(text: &str) -> Result<Self, CpuError> {
        let mut numbers = Vec::new();
        for part in text.split(',') {
            let number = |text: &str| {
                let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
                plain
                    .then(|| text.parse::<u32>().ok())
                    .flatten()
                    .ok_or_else(|| CpuError::Form(part.to_owned()))
            };
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if last < first {
                return Err(CpuError::Backwards(part.to_owned()));
            }
            if last as usize >= CpuSet::MAX_CPU {
                return Err(CpuError::TooLarge(last));
            }
            for cpu in first..=last {
                if numbers.contains(&cpu) {
                    return Err(CpuError::Twice(cpu));
                }
                numbers.push(cpu);
            }
        }
        Ok(Self(numbers))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_slice();
        let mut comma = "";
        while let [first, ..] = rest {
            let run = rest
                .iter()
                .zip(*first..)
                .take_while(|(cpu, expected)| **cpu == *expected)
                .count();
            match run {
                0 | 1 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{}", *first + (run as u32 - 1))?,
            }
            rest = rest.get(run.max(1)..).unwrap_or_default();
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<CpuList, CpuError> {
        text.parse()
    }

    #[test]
    fn lists_are_read_and_written() {
        assert_eq!(list("0-3,8").unwrap().numbers(), [0, 1, 2, 3, 8]);
        assert_eq!(list("8,0-1").unwrap().numbers(), [8, 0, 1]);
        for text in ["0", "0-3,8", "5,1-2", "1023"] {
            assert_eq!(list(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in [
            "",
            ",",
            "a",
            "1-",
            "-1",
            "1,,2",
            "1-2-3",
            "+1",
            " 1",
            "4294967296",
        ] {
            assert!(matches!(list(text), Err(CpuError::Form(_))), "{text:?}");
        }
        assert!(matches!(list("3-1"), Err(CpuError::Backwards(_))));
        assert!(matches!(list("1,0-2"), Err(CpuError::Twice(1))));
        assert!(matches!(list("1024"), Err(CpuError::TooLarge(1024))));
        assert!(matches!(list("0-4000000000"), Err(CpuError::TooLarge(_))));
    }

    #[test]
    fn absent_and_forbidden_cpus_are_told_apart() {
        let online = list("0-1").unwrap();
        let error = list("0,7").unwrap().check_against(&online, |_| true);
        assert_eq!(
            error.unwrap_err().to_string(),
            "this machine has no CPU 7 that is online (it has 0-1)"
        );
        let error = list("0-1").unwrap().check_against(&online, |cpu| cpu == 0);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("may not run on CPU 1, only on 0:"), "{text}");
    }

    #[test]
    fn workers_beyond_the_list_share_its_cpus() {
        let cpus = list("4,6").unwrap();
        let of = |worker| cpus.of_worker(worker);
        assert_eq!([of(0), of(1), of(2)], [Some(4), Some(6), Some(4)]);
    }

    #[test]
    fn a_thread_can_be_pinned_where_it_may_run() {
        let allowed = sched_getaffinity(None).unwrap();
        let cpu = (0..CpuSet::MAX_CPU)
            .find(|cpu| allowed.is_set(*cpu))
            .unwrap() as u32;
        let pinned = std::thread::spawn(move || {
            pin(cpu).unwrap();
            list(&cpu.to_string()).unwrap().check().unwrap();
            let now = sched_getaffinity(None).unwrap();
            (now.count(), now.is_set(cpu as usize))
        });
        assert_eq!(pinned.join().unwrap(), (1, true));
    }
}
