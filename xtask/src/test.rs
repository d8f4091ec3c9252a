//! `cargo xtask test [FILTER...]`.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tests::{namespace, requirement};

use crate::{cargo, packages, say};

/// Builds the programs, runs the tests, and looks whether anything is left behind.
///
/// The programs under test are release builds. The tests themselves are not optimised: they wait
/// for programs, and building them twice as long would gain nothing; their arithmetic is checked
/// for overflow, as that of the crates' own tests is.
///
/// # Errors
/// A test fails, something is missing, or something is left behind.
pub fn test(filter: &[String]) -> Result<()> {
    let begin = Instant::now();
    if requirement::skip() {
        println!("OVS_DPD_TESTS_SKIP_SYSTEM=1: the tests that need a system are skipped");
    } else {
        say::step("packages", packages::install_missing)?;
        requirement::check()?;
        namespace::sweep();
    }
    say::step("the programs", cargo::build_programs)?;
    let directory = cargo::release_directory()?;
    let directory = directory.display().to_string();
    // Two laboratories at a time: more disturb each other's deadlines on a small machine.
    let environment = [
        ("OVS_DPD_BIN_DIR", directory.as_str()),
        ("RUST_TEST_THREADS", "2"),
        // A test that fails prints logs; where its error value was made says nothing more.
        ("RUST_LIB_BACKTRACE", "0"),
    ];

    let before = Traces::now()?;
    let words = words(filter)?;
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let tested = say::step("tests", || cargo::cargo(&words, &environment));
    let fuzzed = match filter {
        [] => say::step("fuzzing", || fuzz(&environment)),
        _ => Ok(()),
    };
    let left = Traces::now()?.beyond(&before);
    if !left.is_empty() {
        say::failure(&format!("left behind:\n  {}", left.join("\n  ")));
    }
    tested?;
    fuzzed?;
    if !left.is_empty() {
        bail!("the tests left {} things behind", left.len());
    }
    say::good(&format!(
        "all tests pass, nothing is left behind: {}",
        say::seconds(begin.elapsed())
    ));
    Ok(())
}

/// The words of cargo for a filter: names of programs in tests/tests, and parts of tests' names.
fn words(filter: &[String]) -> Result<Vec<String>> {
    let directory = cargo::root()?.join("tests/tests");
    let is_program = |name: &&String| directory.join(format!("{name}.rs")).is_file();
    let (programs, parts): (Vec<_>, Vec<_>) = filter.iter().partition(|f| is_program(f));
    let mut words = vec!["test".to_owned(), "--no-fail-fast".to_owned()];
    if programs.is_empty() {
        words.extend(["--workspace", "--exclude", "fuzz"].map(str::to_owned));
    } else {
        words.extend(["-p".to_owned(), "tests".to_owned()]);
        for program in programs {
            words.extend(["--test".to_owned(), program.clone()]);
        }
    }
    words.push("--".to_owned());
    words.extend(parts.into_iter().cloned());
    Ok(words)
}

/// The fuzzers: a million of each, of the seed that doesn't change, optimised and checked for overflow.
fn fuzz(environment: &[(&str, &str)]) -> Result<()> {
    let words = [
        "test",
        "--profile",
        "fuzz",
        "-p",
        "fuzz",
        "--",
        "--nocapture",
    ];
    let mut environment = environment.to_vec();
    if std::env::var_os("OVS_DPD_FUZZ").is_none() {
        environment.push(("OVS_DPD_FUZZ", "1000000"));
    }
    cargo::cargo(&words, &environment)
}

/// What a test could leave behind on the machine.
struct Traces(BTreeSet<String>);

impl Traces {
    fn now() -> Result<Self> {
        let mut found: BTreeSet<String> = namespace::left_behind().into_iter().collect();
        let links = Command::new("ip").args(["-o", "link"]).output();
        // Without iproute2 there was no laboratory either.
        for line in links.iter().flat_map(|l| l.stdout.split(|b| *b == b'\n')) {
            let line = String::from_utf8_lossy(line);
            if let Some(name) = line.split(": ").nth(1) {
                found.insert(format!("link {}", name.split('@').next().unwrap_or(name)));
            }
        }
        for entry in std::fs::read_dir("/proc").context("/proc")?.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<u32>().ok())
            else {
                continue;
            };
            // A process may end while we look.
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            // Its maker is dead and it isn't: nothing would ever end it.
            if namespace::orphan_of(&line).is_some() {
                found.insert(format!("process {pid}: {line}"));
            }
        }
        Ok(Self(found))
    }

    fn beyond(self, before: &Self) -> Vec<String> {
        self.0
            .into_iter()
            .filter(|t| !before.0.contains(t))
            .collect()
    }
}
