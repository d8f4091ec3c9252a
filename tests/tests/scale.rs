//! Many flows.

use std::collections::HashSet;
use std::fmt::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use tests::lab;

const FLOWS: u32 = 100_000;

#[test]
fn a_hundred_thousand_flows_are_all_there_and_each_is_shown_once() -> Result<()> {
    lab::test_bare(|lab| {
        let (a, b) = (lab.endpoint("a")?, lab.endpoint("b")?);
        lab.dpctl("add-dp dp1")?;
        lab.dpctl(["add-if", "dp1", a.port(), b.port()])?;
        let before = lab.with_daemon(|d| d.process().status_kb("VmRSS"))?;
        let mut text = String::new();
        for n in 0..FLOWS {
            let [_, x, y, z] = n.to_be_bytes();
            writeln!(
                text,
                "in_port(1),eth(),eth_type(0x0800),ipv4(src=10.{x}.{y}.{z},proto=17,frag=no),udp(dst=53) 2"
            )?;
        }
        let file = lab.directory().join("flows");
        std::fs::write(&file, text)?;
        let begin = Instant::now();
        lab.dpctl(["add-flows", "dp1", &file.display().to_string()])?;
        let added = begin.elapsed();
        let after = lab.with_daemon(|d| d.process().status_kb("VmRSS"))?;

        let begin = Instant::now();
        let text = lab.dpctl("dump-flows dp1")?;
        let dumped = begin.elapsed();
        let source = |line: &str| {
            line.split("src=")
                .nth(1)
                .and_then(|s| s.split([',', ')']).next())
                .map(str::to_owned)
        };
        let shown: Vec<_> = text.lines().filter_map(source).collect();
        let different: HashSet<_> = shown.iter().collect();
        ensure!(
            different.len() == FLOWS as usize,
            "{} of {FLOWS} are shown",
            different.len()
        );
        ensure!(
            shown.len() == different.len(),
            "some are shown twice: {}",
            shown.len()
        );
        ensure!(lab.dpctl("show dp1")?.contains(&format!("flows: {FLOWS}")));
        println!(
            "{FLOWS} flows: added in {added:.1?}, dumped in {dumped:.1?}, {} B of RSS each",
            (after - before) * 1024 / u64::from(FLOWS)
        );
        lab.dpctl("del-flows dp1")?;
        ensure!(lab.dpctl("dump-flows dp1")?.trim().is_empty());
        Ok(())
    })
}
