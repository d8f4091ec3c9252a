//! What is printed: headings, commands and results; in colour only on a terminal.

use std::io::{IsTerminal, stderr, stdout};
use std::time::{Duration, Instant};

use anyhow::Result;

fn paint(code: &str, text: &str, terminal: bool) -> String {
    if terminal && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// A heading.
pub fn heading(text: &str) {
    println!(
        "\n{}",
        paint("1;36", &format!("== {text}"), stdout().is_terminal())
    );
}

/// A command, before it is run.
pub fn command(line: &str) {
    println!(
        "{}",
        paint("1", &format!("$ {line}"), stdout().is_terminal())
    );
}

/// What a command printed.
pub fn output(text: &str) {
    for line in text.trim_end().lines() {
        println!("  {line}");
    }
}

/// Something that went right.
pub fn good(text: &str) {
    println!("{}", paint("32", text, stdout().is_terminal()));
}

/// Why it ends.
pub fn failure(text: &str) {
    eprintln!(
        "{}",
        paint("1;31", &format!("failed: {text}"), stderr().is_terminal())
    );
}

/// Runs a step under a heading and prints how long it took.
///
/// # Errors
/// Those of the step.
pub fn step<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    heading(text);
    let begin = Instant::now();
    let done = work()?;
    good(&format!("{text}: {}", seconds(begin.elapsed())));
    Ok(done)
}

/// A duration as one reads it.
pub fn seconds(duration: Duration) -> String {
    match duration.as_secs() {
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        s => format!("{} min {} s", s / 60, s % 60),
    }
}
