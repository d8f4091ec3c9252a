//! `cargo xtask guard`: instructions a packet, counted by callgrind and compared with
//! `benches/guard/baseline.txt`.
//!
//! Counts don't depend on the machine's load, and hardly on the machine; they do depend on the compiler.
//! So the baseline says whose code it counted, and counts of another compiler's are shown beside it but
//! fail nothing.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{cargo, packages, say};

/// More instructions than this, in percent of the baseline's, fail.
const TOLERANCE: f64 = 3.0;
/// What callgrind counts in, and writes a total at the end of.
const MEASURED: &str = "guard::measured";
const HEAD: &str = "\
# Instructions a packet, by case: what `cargo xtask guard` compares with. Written by
# `cargo xtask guard --renew`.
";

/// Counts and compares; or with `renew` counts and writes the baseline.
///
/// # Errors
/// A case takes more instructions than it may, or is in only one of both; something can't be run.
pub fn guard(renew: bool) -> Result<()> {
    say::step("valgrind", || packages::install("valgrind", "valgrind"))?;
    say::step("the guard", build)?;
    let compiler = compiler()?;
    let counted = say::step("counting", count)?;
    let path = cargo::root()?.join("benches/guard/baseline.txt");
    if renew {
        let baseline = Baseline { compiler, counted };
        std::fs::write(&path, baseline.to_text()).with_context(|| path.display().to_string())?;
        print!("{}", baseline.to_text());
        say::good(&format!(
            "{} is renewed: commit it, and say why",
            path.display()
        ));
        return Ok(());
    }
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let baseline = Baseline::parse(&text)?;
    let (table, faults) = baseline.compare(&counted);
    print!("{table}");
    if baseline.compiler != compiler {
        say::failure(&format!(
            "NOT COMPARED: the baseline is of {}, this is {compiler}. The differences above may be the \
             compiler's. `cargo xtask guard --renew` with this compiler, on a commit that is known to be \
             good, makes the guard watch again.",
            baseline.compiler
        ));
        return Ok(());
    }
    if faults.is_empty() {
        let cases = counted.len();
        say::good(&format!(
            "{cases} cases within {TOLERANCE} % of the baseline"
        ));
        return Ok(());
    }
    bail!(
        "{}\nIf that is what the change is for: `cargo xtask guard --renew`, and commit {} with the reason.",
        faults.join("\n"),
        path.display()
    );
}

/// As the programs that people run are built: whatever is set for faster builds would count other code.
fn build() -> Result<()> {
    let changes_code =
        |name: &str| name.starts_with("CARGO_PROFILE_RELEASE_") || name.ends_with("RUSTFLAGS");
    let unset: Vec<OsString> = std::env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| name.to_str().is_some_and(changes_code))
        .collect();
    cargo::cargo_without(&["build", "--release", "-p", "guard"], &unset)
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| name.clone())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name}: {}\n{said}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The compiler, and what it compiles for.
fn compiler() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let text = output(Command::new(rustc).arg("-vV").current_dir(cargo::root()?))?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let version = text.lines().next().context("rustc -vV says nothing")?;
    let host = field("host: ").context("rustc -vV names no host")?;
    Ok(format!("{version} for {host}"))
}

/// Cases in their order, with instructions a packet.
type Counted = Vec<(String, f64)>;

fn count() -> Result<Counted> {
    let release = cargo::release_directory()?;
    let directory = release.with_file_name("guard");
    // What an earlier run left would be taken for this one's.
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    std::fs::create_dir_all(&directory)?;
    let out = directory.join("callgrind");
    let mut command = Command::new("valgrind");
    command
        .arg("--tool=callgrind")
        .arg(format!("--toggle-collect={MEASURED}"))
        .arg(format!("--dump-after={MEASURED}"))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(release.join("guard"));
    // The environment lies on the program's stack, and moves what is there.
    command.env_clear();
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    let cases = output(&mut command)?;
    let mut counted = Counted::new();
    for (nth, line) in (1..).zip(cases.lines()) {
        let (packets, name) = line.split_once('\t').context("the guard's output")?;
        let packets: f64 = packets.parse().context("the guard's output")?;
        counted.push((name.to_owned(), total(&out, nth)? / packets));
    }
    ensure!(!counted.is_empty(), "the guard measured nothing");
    Ok(counted)
}

/// Instructions in the `nth` part that callgrind wrote.
fn total(out: &Path, nth: usize) -> Result<f64> {
    let path = PathBuf::from(format!("{}.{nth}", out.display()));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
    let total = total.with_context(|| format!("no total in {}", path.display()))?;
    Ok(total.trim().parse()?)
}

/// What `baseline.txt` says.
#[derive(Debug, PartialEq)]
struct Baseline {
    compiler: String,
    counted: Counted,
}

impl Baseline {
    fn to_text(&self) -> String {
        let mut text = format!("{HEAD}compiler: {}\n", self.compiler);
        for (name, count) in &self.counted {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{count:9.1}  {name}");
        }
        text
    }

    fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        let compiler = lines
            .next()
            .and_then(|line| line.strip_prefix("compiler: "))
            .context("a baseline begins with its compiler")?;
        let counted = lines.map(|line| {
            let (count, name) = line
                .trim_start()
                .split_once("  ")
                .context("a baseline's line")?;
            Ok((name.to_owned(), count.parse()?))
        });
        Ok(Self {
            compiler: compiler.to_owned(),
            counted: counted.collect::<Result<_>>()?,
        })
    }

    /// A table of all cases, and what is wrong.
    fn compare(&self, counted: &Counted) -> (String, Vec<String>) {
        let (mut table, mut faults) = (String::new(), Vec::new());
        for (name, now) in counted {
            let before = self.counted.iter().find(|(known, _)| known == name);
            let Some((_, before)) = before else {
                faults.push(format!("{name}: isn't in the baseline"));
                continue;
            };
            let percent = (now / before - 1.0) * 100.0;
            let _ = writeln!(table, "{before:9.1} {now:9.1} {percent:+7.2} %  {name}");
            if percent > TOLERANCE {
                faults.push(format!(
                    "{name}: {now:.1} instructions a packet, {percent:.1} % more than {before:.1}"
                ));
            }
        }
        for (name, _) in &self.counted {
            if !counted.iter().any(|(measured, _)| measured == name) {
                faults.push(format!("{name}: is in the baseline, but wasn't measured"));
            }
        }
        (table, faults)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline() -> Baseline {
        let counted = [("parse", 100.0), ("a, b", 2000.5)];
        Baseline {
            compiler: "rustc 1.0 for here".to_owned(),
            counted: counted.map(|(name, n)| (name.to_owned(), n)).into(),
        }
    }

    #[test]
    fn a_baseline_is_read_as_it_was_written() {
        assert_eq!(Baseline::parse(&baseline().to_text()).unwrap(), baseline());
    }

    #[test]
    fn only_what_exceeds_the_tolerance_is_a_fault() {
        let with = |n: f64| vec![("parse".to_owned(), n), ("a, b".to_owned(), 1000.0)];
        assert_eq!(baseline().compare(&with(102.9)).1, [""; 0]);
        let (_, faults) = baseline().compare(&with(103.1));
        assert!(faults[0].contains("3.1 % more than 100.0"), "{faults:?}");
    }

    #[test]
    fn cases_that_came_or_went_are_faults() {
        let (_, faults) = baseline().compare(&vec![("new".to_owned(), 1.0)]);
        assert_eq!(faults.len(), 3);
    }
}
