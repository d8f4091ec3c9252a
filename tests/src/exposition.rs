//! Prometheus' text format, read strictly: what promtool complains of is an error here too.
//!
//! Source: "Exposition formats" and "Metric and label naming" of Prometheus' documentation.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result, bail, ensure};

/// A sample: its labels, its value.
type Sample = (BTreeMap<String, String>, f64);

/// Families by name.
#[derive(Debug, Default)]
pub struct Exposition {
    families: BTreeMap<String, Vec<Sample>>,
}

impl Exposition {
    /// Reads a whole text.
    ///
    /// # Errors
    /// The first line that isn't as it should be.
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(text.ends_with('\n'), "the last line doesn't end");
        let mut all = Self::default();
        let mut present: Option<(String, String)> = None;
        let mut helped = None;
        let mut seen = HashSet::new();
        for line in text.lines() {
            let context = || line.to_owned();
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').with_context(context)?;
                ensure!(!help.trim().is_empty(), "no help: {line}");
                ensure!(is_name(name), "no name: {line}");
                ensure!(!all.families.contains_key(name), "twice: {line}");
                helped = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').with_context(context)?;
                ensure!(helped.as_deref() == Some(name), "type without help: {line}");
                ensure!(matches!(kind, "counter" | "gauge"), "what type? {line}");
                ensure!(
                    name.ends_with("_total") == (kind == "counter"),
                    "counters, and they only, are totals: {line}"
                );
                all.families.insert(name.to_owned(), Vec::new());
                present = Some((name.to_owned(), kind.to_owned()));
            } else {
                ensure!(
                    !line.starts_with('#') && !line.is_empty(),
                    "what is {line:?}?"
                );
                let (name, labels, value) = sample(line).with_context(context)?;
                let (family, kind) = present.as_ref().with_context(context)?;
                ensure!(&name == family, "not of the family {family}: {line}");
                ensure!(value.is_finite(), "{line}");
                ensure!(kind == "gauge" || value >= 0.0, "{line}");
                ensure!(seen.insert((name.clone(), labels.clone())), "twice: {line}");
                let samples = all.families.get_mut(&name).with_context(context)?;
                samples.push((labels, value));
            }
        }
        Ok(all)
    }

    /// Names of the families.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.families.keys().map(String::as_str)
    }

    /// The sum of the samples that have these labels among theirs; none is 0.
    ///
    /// # Errors
    /// There is no such family.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let samples = self
            .families
            .get(name)
            .with_context(|| format!("there is no {name}"))?;
        let matches = |of: &BTreeMap<String, String>| {
            labels
                .iter()
                .all(|(name, value)| of.get(*name).is_some_and(|v| v == value))
        };
        let values = samples.iter().filter(|(of, _)| matches(of));
        Ok(values.map(|(_, value)| value).sum())
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    name.bytes().all(plain) && name.starts_with(|c: char| c.is_ascii_lowercase())
}

fn sample(line: &str) -> Result<(String, BTreeMap<String, String>, f64)> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(end);
    ensure!(is_name(name), "no name");
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, quoted) = rest.split_once("=\"").context("no label")?;
            ensure!(is_name(label), "no label's name: {label}");
            let (value, behind) = unquote(quoted)?;
            let new = labels.insert(label.to_owned(), value).is_none();
            ensure!(new, "label {label} twice");
            if let Some(next) = behind.strip_prefix(',') {
                rest = next;
            } else {
                rest = behind.strip_prefix('}').context("no end of labels")?;
                break;
            }
        }
    }
    let value = rest.strip_prefix(' ').context("no blank")?;
    ensure!(!value.contains(' '), "a timestamp");
    Ok((name.to_owned(), labels, value.parse()?))
}

/// The value, and what is behind its closing quote.
fn unquote(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match letters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, same @ ('\\' | '"'))) => value.push(same),
                _ => bail!("what is escaped?"),
            },
            _ => value.push(letter),
        }
    }
    bail!("no closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_total Some.\n# TYPE a_total counter\na_total{p=\"x\\\"\"} 3\n\
                        a_total{p=\"y\"} 4\n# HELP b Else.\n# TYPE b gauge\nb -0.5\n";

    #[test]
    fn a_good_text_is_read() {
        let read = Exposition::parse(GOOD).unwrap();
        assert_eq!(read.sum("a_total", &[]).unwrap(), 7.0);
        assert_eq!(read.sum("a_total", &[("p", "x\"")]).unwrap(), 3.0);
        assert_eq!(read.sum("b", &[]).unwrap(), -0.5);
        assert!(read.sum("c", &[]).is_err());
    }

    #[test]
    fn every_fault_is_found() {
        for (good, bad) in [
            ("# HELP b Else.\n", ""),
            ("b -0.5", "c -0.5"),
            ("b -0.5\n", "b -0.5"),
            ("b -0.5", "b NaN"),
            ("a_total{p=\"y\"} 4", "a_total{p=\"x\\\"\"} 4"),
            ("a_total{p=\"y\"} 4", "a_total{p=\"y\"} -4"),
            ("a_total{p=\"y\"} 4", "a_total{p=\"y\",p=\"y\"} 4"),
            ("a_total{p=\"y\"} 4", "a_total{p=\"y} 4"),
            ("a_total{p=\"y\"} 4", "a_total{p=\"\\y\"} 4"),
            ("# TYPE b gauge", "# TYPE b counter"),
            ("b gauge", "b widget"),
        ] {
            let text = GOOD.replace(good, bad);
            assert!(text != GOOD && Exposition::parse(&text).is_err(), "{text}");
        }
    }
}
