//! ICMP echo by ping(8).

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;
use crate::process::Words;

/// What a ping counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ping {
    /// Requests sent.
    pub sent: u64,
    /// Replies received.
    pub received: u64,
    /// The average round trip in microseconds, if anything was received.
    pub average_us: Option<f64>,
}

impl Ping {
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find(|l| l.contains(" packets transmitted"))?;
        let mut numbers = line
            .split(", ")
            .map(|part| part.split(' ').next()?.parse().ok());
        let (sent, received) = (numbers.next()??, numbers.next()??);
        let average = || {
            let line = text.lines().find(|l| l.starts_with("rtt "))?;
            let millis: f64 = line.split('/').nth(4)?.parse().ok()?;
            Some(millis * 1000.0)
        };
        Some(Self {
            sent,
            received,
            average_us: average(),
        })
    }
}

/// Sends `count` requests, 20 ms apart, and waits up to 2 s for the last reply. `options` are
/// ping's own, such as `-s 8900 -M do`.
///
/// # Errors
/// ping can't be run or understood; loss is no error.
pub fn ping(from: &Namespace, to: &str, count: u32, options: &str) -> Result<Ping> {
    let mut words = vec!["ping".to_owned(), "-n".to_owned(), "-q".to_owned()];
    words.extend(format!("-c {count} -i 0.02 -W 2 {options}").words());
    words.push(to.to_owned());
    let limit = Duration::from_secs(30) + Duration::from_millis(20) * count;
    let ran = from.try_exec(words, limit)?;
    Ping::parse(&ran.stdout)
        .with_context(|| format!("`{}`: {}{}", ran.line, ran.stdout, ran.stderr))
}

/// A ping of 5 of which every one must come back.
///
/// # Errors
/// Any was lost.
pub fn ping_ok(from: &Namespace, to: &str) -> Result<()> {
    let ping = ping(from, to, 5, "")?;
    ensure!(ping.received == 5, "ping {to}: {ping:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_read() {
        let text = "--- 10.0.0.2 ping statistics ---\n\
                    5 packets transmitted, 4 received, 20% packet loss, time 81ms\n\
                    rtt min/avg/max/mdev = 0.021/0.044/0.102/0.029 ms\n";
        let ping = Ping::parse(text).unwrap();
        assert_eq!((ping.sent, ping.received), (5, 4));
        assert!((ping.average_us.unwrap() - 44.0).abs() < 1e-6);
    }

    #[test]
    fn nothing_received_has_no_average() {
        let text = "2 packets transmitted, 0 received, +2 errors, 100% packet loss, time 20ms\n";
        assert_eq!(
            Ping::parse(text),
            Some(Ping {
                sent: 2,
                received: 0,
                average_us: None
            })
        );
    }
}
