//! What ovs-vswitchd.log may say. As Open vSwitch's own tests do it: any line of level WARN,
//! ERR or EMER fails a test, except those that are expected, with a reason.

/// A part of a line that is expected, and why.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// The line contains this.
    pub text: &'static str,
    /// Why it is no fault.
    pub reason: &'static str,
}

/// Lines that come with any datapath.
pub const ALWAYS: &[Expected] = &[
    Expected {
        text: "Unreasonably long",
        reason: "a busy machine delays a thread: no statement about the datapath",
    },
    Expected {
        text: "faults: ",
        reason: "belongs to the report of a long poll interval",
    },
    Expected {
        text: "context switches: ",
        reason: "belongs to the report of a long poll interval",
    },
    Expected {
        text: "|WARN|disk: ",
        reason: "belongs to the report of a long poll interval",
    },
    Expected {
        text: "ms waiting for",
        reason: "a busy machine delays a thread: no statement about the datapath",
    },
];

/// Lines that come while ovs-vswitchd ends as it is told to, and then only.
pub const AT_EXIT: &[Expected] = &[Expected {
    text: "|ofproto_dpif_rid|ERR|recirc_id ",
    reason: "a bridge goes before the cached flows that hold its recirculation ids",
}];

/// Lines of the peer in user space (`datapath_type=netdev`).
pub const NETDEV: &[Expected] = &[
    Expected {
        text: "Network is down",
        reason: "it polls a device also while its link is down",
    },
    Expected {
        text: "failed to enumerate system datapaths",
        reason: "dpctl asks for the module's datapaths too, and there is no module",
    },
];

/// Lines of `log` with level WARN, ERR or EMER that contain none of `expected`.
pub fn complaints(log: &str, expected: &[&[Expected]]) -> Vec<String> {
    log.lines()
        .filter(|line| {
            let level = line.split('|').nth(3).unwrap_or_default();
            matches!(level, "WARN" | "ERR" | "EMER")
        })
        .filter(|line| {
            !expected
                .iter()
                .flat_map(|e| e.iter())
                .any(|e| line.contains(e.text))
        })
        .map(str::to_owned)
        .collect()
}

/// The last lines of a log, for the report of a failed test.
pub fn tail(log: &str, lines: usize) -> String {
    let all: Vec<_> = log.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_lines_of_a_level_that_nobody_expects() {
        let log = "2026-01-01T00:00:00.000Z|00001|vlog|INFO|opened\n\
                   2026-01-01T00:00:00.000Z|00002|dpif(handler1)|WARN|failed to put\n\
                   2026-01-01T00:00:00.000Z|00003|timeval|WARN|Unreasonably long 1234ms poll\n\
                   a line of another kind with WARN\n";
        let found = complaints(log, &[ALWAYS]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("failed to put"));
    }
}
