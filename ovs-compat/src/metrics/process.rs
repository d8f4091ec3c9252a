//! The process itself, under the names that Prometheus' client libraries agree on.
//!
//! Source: proc(5): `/proc/PID/stat`, `/proc/stat`, `/proc/PID/limits`.

use super::exposition::{Exposition, Kind::Counter, Kind::Gauge};

/// Adds what the system tells of the process; what it doesn't tell is left out.
pub fn describe(out: &mut Exposition, pid: u32) {
    let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
    if let Some(stat) = file("stat").as_deref().and_then(Stat::parse) {
        let per_second = rustix::param::clock_ticks_per_second().max(1) as f64;
        let help = "Seconds of CPU time, of user and system.";
        out.family("process_cpu_seconds_total", Counter, help)
            .sample(&[], stat.cpu_ticks as f64 / per_second);
        let help = "Threads.";
        out.family("process_threads", Gauge, help)
            .sample(&[], stat.threads);
        let help = "Resident memory.";
        out.family("process_resident_memory_bytes", Gauge, help)
            .sample(&[], stat.pages * rustix::param::page_size() as u64);
        let help = "Virtual memory.";
        out.family("process_virtual_memory_bytes", Gauge, help)
            .sample(&[], stat.virtual_bytes);
        let boot = std::fs::read_to_string("/proc/stat").ok();
        if let Some(boot) = boot.as_deref().and_then(boot_time) {
            let help = "When the process started, in seconds since 1970.";
            out.family("process_start_time_seconds", Gauge, help)
                .sample(&[], boot as f64 + stat.start_ticks as f64 / per_second);
        }
    }
    if let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) {
        out.family("process_open_fds", Gauge, "Open descriptors.")
            .sample(&[], descriptors.count() as u64);
    }
    if let Some(most) = file("limits").as_deref().and_then(open_files) {
        out.family("process_max_fds", Gauge, "How many there can be.")
            .sample(&[], most);
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    threads: u64,
    start_ticks: u64,
    virtual_bytes: u64,
    pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name, in parentheses, may hold anything.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // By proc(5)'s numbers, which count from 1 and the name as 2.
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_ticks: number(14)? + number(15)?,
            threads: number(20)?,
            start_ticks: number(22)?,
            virtual_bytes: number(23)?,
            pages: number(24)?,
        })
    }
}

fn boot_time(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.trim().parse().ok()
}

fn open_files(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "7 (a) b) S 1 7 7 0 -1 4194304 10 0 0 0 30 12 0 0 20 0 9 0 1234 5678 90 184467";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                cpu_ticks: 42,
                threads: 9,
                start_ticks: 1234,
                virtual_bytes: 5678,
                pages: 90,
            })
        );
        assert_eq!(Stat::parse("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_has_descriptors_memory_and_a_start() {
        let mut out = Exposition::default();
        describe(&mut out, std::process::id());
        let text = out.finish();
        for name in [
            "process_cpu_seconds_total ",
            "process_resident_memory_bytes ",
            "process_start_time_seconds ",
            "process_open_fds ",
            "process_max_fds ",
        ] {
            assert!(
                text.lines().any(|line| line.starts_with(name)),
                "{name}: {text}"
            );
        }
    }
}
