//! Throughput by iperf3.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::namespace::Namespace;
use crate::process::{self, Words};

/// What iperf3 measured.
#[derive(Debug, Clone, Copy)]
pub struct Throughput {
    /// As the receiver saw it.
    pub bits_per_second: f64,
    /// TCP segments sent again.
    pub retransmits: u64,
}

/// Runs an iperf3 server in `to` and a client in `from` for `seconds`; `options` are the
/// client's, such as `-R`.
///
/// # Errors
/// The connection isn't made, or nothing passes.
pub fn iperf3(
    lab: &Lab,
    from: &Namespace,
    to: &Namespace,
    address: &str,
    seconds: u32,
    options: &str,
) -> Result<Throughput> {
    let output = lab.directory().join("iperf3.out");
    let _ = std::fs::remove_file(&output);
    let mut server = to.spawn(
        ["iperf3", "-s", "-1", "--forceflush", "-B", address],
        &output,
    )?;
    server.wait_output("Server listening", Duration::from_secs(10))?;
    let mut words = vec![
        "iperf3".to_owned(),
        "-J".to_owned(),
        "-c".to_owned(),
        address.to_owned(),
    ];
    words.extend(format!("-t {seconds} --connect-timeout 5000 {options}").words());
    let ran = from.try_exec(
        words,
        Duration::from_secs(u64::from(seconds)) + process::LIMIT,
    )?;
    let report: serde_json::Value = serde_json::from_str(&ran.stdout)
        .with_context(|| format!("`{}`: {}{}", ran.line, ran.stdout, ran.stderr))?;
    if let Some(error) = report["error"].as_str() {
        anyhow::bail!("`{}`: {error}", ran.line);
    }
    let end = &report["end"];
    let received = end["sum_received"]["bits_per_second"].as_f64();
    let bits_per_second = received
        .or_else(|| end["sum"]["bits_per_second"].as_f64())
        .with_context(|| format!("no result in {}", ran.stdout))?;
    let retransmits = end["sum_sent"]["retransmits"].as_u64().unwrap_or(0);
    Ok(Throughput {
        bits_per_second,
        retransmits,
    })
}
