//! `cargo xtask bench [NAME]`.

use anyhow::Result;

use crate::{cargo, packages, say};

/// Builds the programs and runs the benches, or one of them.
///
/// # Errors
/// A bench fails, or there is none of that name.
pub fn bench(name: Option<&str>, arguments: &[String]) -> Result<()> {
    say::step("packages", packages::install_missing)?;
    say::step("the programs", cargo::build_programs)?;
    let directory = cargo::release_directory()?;
    let directory = directory.display().to_string();
    let mut words = vec!["bench", "-p", "benches"];
    if let Some(name) = name {
        words.extend(["--bench", name]);
    }
    if !arguments.is_empty() {
        words.push("--");
        words.extend(arguments.iter().map(String::as_str));
    }
    say::step("benches", || {
        cargo::cargo(&words, &[("OVS_DPD_BIN_DIR", &directory)])
    })
}
