//! What the figures were measured on.

use std::process::Command;

use serde_json::{Value, json};

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let text = text.unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| Some(text.split_whitespace().next()?.to_owned()))
        .unwrap_or_default()
}

/// The machine, as JSON.
pub fn describe() -> Value {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, model)| model)
        .to_owned();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let commit = first_line(
        "git",
        &[
            "-C",
            env!("CARGO_MANIFEST_DIR"),
            "describe",
            "--always",
            "--dirty",
        ],
    );
    json!({
        "cpu": model,
        "cpus": cpus,
        "kernel": first_line("uname", &["-r"]),
        "open_vswitch": first_line("ovs-vswitchd", &["--version"]),
        "commit": commit,
        "date": first_line("date", &["-u", "+%F %H:%M"]),
        "load_at_start": load(),
    })
}

/// The machine in one line.
pub fn line(machine: &Value) -> String {
    let text = |key: &str| machine[key].as_str().unwrap_or("?").to_owned();
    format!(
        "{} x {}, Linux {}, {}; commit {}, {} UTC; load average {} at the start, {} at the end",
        machine["cpus"],
        text("cpu"),
        text("kernel"),
        text("open_vswitch"),
        text("commit"),
        text("date"),
        text("load_at_start"),
        load(),
    )
}
