//! Polls with a deadline. Nothing here waits longer than what it waits for.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything that should happen at once, on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// Calls `probe` until it gives a value; an error of `probe` ends the wait.
///
/// # Errors
/// The error of `probe`, or a message with `what` when `limit` has passed.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if crate::process::interrupted() {
            bail!("interrupted while waiting for {what}");
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Calls `probe` until it is true, for as long as [`SOON`].
///
/// # Errors
/// As [`until`].
pub fn soon(what: &str, mut probe: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, SOON, || Ok(probe()?.then_some(())))
}
