//! Samples by subject and metric, ratios with their spread, a table in Markdown, and JSON.
//!
//! A ratio is taken round by round, between neighbours in time, and then the median of these is
//! given with the least and the greatest: so a machine that gets slower during the run doesn't show
//! up as a difference.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::machine;

/// What was measured: for each metric and subject a value a round.
#[derive(Debug)]
pub struct Report {
    name: &'static str,
    machine: Value,
    metrics: Vec<Metric>,
}

#[derive(Debug)]
struct Metric {
    name: String,
    subjects: Vec<(String, Vec<Option<f64>>)>,
}

/// Median, least and greatest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The middle value.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The greatest.
    pub greatest: f64,
}

impl Spread {
    /// Of some values; None if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0,
            _ => *values.get(middle)?,
        };
        Some(Self {
            median,
            least: *values.first()?,
            greatest: *values.last()?,
        })
    }
}

/// Three digits that count.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

impl Report {
    /// For the bench `name`.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            machine: machine::describe(),
            metrics: Vec::new(),
        }
    }

    /// Adds a value of `metric` for `subject`, in the round that has none of it yet; None: it couldn't
    /// be measured there.
    pub fn add(&mut self, metric: &str, subject: &str, value: Option<f64>) {
        let shown = value.map_or_else(|| "-".to_owned(), digits);
        eprintln!("    {subject}: {metric}: {shown}");
        let at = self.metrics.iter().position(|m| m.name == metric);
        let at = at.unwrap_or_else(|| {
            self.metrics.push(Metric {
                name: metric.to_owned(),
                subjects: Vec::new(),
            });
            self.metrics.len() - 1
        });
        let subjects = &mut self.metrics[at].subjects;
        match subjects.iter_mut().find(|(name, _)| name == subject) {
            Some((_, values)) => values.push(value),
            None => subjects.push((subject.to_owned(), vec![value])),
        }
    }

    fn values(&self, metric: &str, subject: &str) -> Option<&[Option<f64>]> {
        let metric = self.metrics.iter().find(|m| m.name == metric)?;
        let (_, values) = metric.subjects.iter().find(|(name, _)| name == subject)?;
        Some(values)
    }

    /// The median, least and greatest of a metric.
    pub fn spread(&self, metric: &str, subject: &str) -> Option<Spread> {
        Spread::of(self.values(metric, subject)?.iter().flatten().copied())
    }

    /// The ratio of a subject's metric to another's, round by round.
    pub fn ratio(&self, metric: &str, subject: &str, to: &str) -> Option<Spread> {
        let pairs = self
            .values(metric, subject)?
            .iter()
            .zip(self.values(metric, to)?);
        let ratios = pairs.filter_map(|(a, b)| Some((*a)? / (*b).filter(|b| *b != 0.0)?));
        Spread::of(ratios)
    }

    fn subjects(&self) -> Vec<&str> {
        let mut all = Vec::new();
        for (name, _) in self.metrics.iter().flat_map(|m| &m.subjects) {
            if !all.contains(&name.as_str()) {
                all.push(name.as_str());
            }
        }
        all
    }

    fn rows(&self, subjects: &[&str], of: impl Fn(&Metric, &str) -> Option<Spread>) -> String {
        let mut text = String::from("| |");
        for subject in subjects {
            text += &format!(" {subject} |");
        }
        text += &format!("\n|---|{}\n", "---|".repeat(subjects.len()));
        for metric in &self.metrics {
            let cells: Vec<_> = subjects.iter().map(|s| of(metric, s)).collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            text += &format!("| {} |", metric.name);
            for cell in cells {
                match cell {
                    Some(s) if s.least == s.greatest => text += &format!(" {} |", digits(s.median)),
                    Some(s) => {
                        let [m, l, g] = [s.median, s.least, s.greatest].map(digits);
                        text += &format!(" {m} ({l} to {g}) |");
                    }
                    None => text += " |",
                }
            }
            text.push('\n');
        }
        text
    }

    /// A line a metric with a column a subject: median, least and greatest of the rounds.
    pub fn table(&self) -> String {
        let spread = |metric: &Metric, subject: &str| self.spread(&metric.name, subject);
        self.rows(&self.subjects(), spread)
    }

    /// A line a metric with a column a subject: what `ours` has in proportion to it.
    pub fn ratios(&self, ours: &str) -> String {
        let mut others = self.subjects();
        others.retain(|subject| *subject != ours);
        self.rows(&others, |metric, other| {
            self.ratio(&metric.name, ours, other)
        })
    }

    /// Prints the table and writes `BENCH.json` and `BENCH.md` to `target/bench`; for subjects that
    /// aren't to be compared with each other.
    ///
    /// # Errors
    /// The files can't be written.
    pub fn finish_table(&self) -> Result<()> {
        self.write(None)
    }

    /// As [`Report::finish_table`], with a table of ratios: `ours` is the subject that is compared with
    /// the others.
    ///
    /// # Errors
    /// The files can't be written.
    pub fn finish(&self, ours: &str) -> Result<()> {
        self.write(Some(ours))
    }

    fn write(&self, ours: Option<&str>) -> Result<()> {
        let mut text = format!(
            "{}\n\nMedian of the rounds (least to greatest):\n\n{}",
            machine::line(&self.machine),
            self.table()
        );
        if let Some(ours) = ours {
            text += &format!("\n{ours} in proportion to each:\n\n{}", self.ratios(ours));
        }
        println!("\n## {}\n\n{text}", self.name);
        let mut metrics = Map::new();
        for metric in &self.metrics {
            let mut subjects = Map::new();
            for (subject, values) in &metric.subjects {
                let mut of = json!({ "rounds": values });
                if let Some(spread) = self.spread(&metric.name, subject) {
                    of["median"] = json!(spread.median);
                }
                if let Some(ours) = ours
                    && let Some(r) = self.ratio(&metric.name, ours, subject)
                    && subject != ours
                {
                    of["ours in proportion"] =
                        json!({ "median": r.median, "min": r.least, "max": r.greatest });
                }
                subjects.insert(subject.clone(), of);
            }
            metrics.insert(metric.name.clone(), Value::Object(subjects));
        }
        let json = json!({ "bench": self.name, "machine": self.machine, "metrics": metrics });
        let directory = directory()?;
        std::fs::create_dir_all(&directory)?;
        for (ending, text) in [("json", serde_json::to_string_pretty(&json)?), ("md", text)] {
            let path = directory.join(format!("{}.{ending}", self.name));
            std::fs::write(&path, text).with_context(|| path.display().to_string())?;
            println!("{}", path.display());
        }
        Ok(())
    }
}

/// `bench` in the target directory, which holds this program in `PROFILE/deps`.
fn directory() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program
        .ancestors()
        .nth(3)
        .context("not in a target directory")?;
    Ok(target.join("bench"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_round_by_round() {
        let mut report = Report::new("test");
        for (ours, peer) in [(2.0, 1.0), (40.0, 10.0), (9.0, 3.0)] {
            report.add("m", "ours", Some(ours));
            report.add("m", "peer", Some(peer));
        }
        let ratio = report.ratio("m", "ours", "peer").unwrap();
        assert_eq!((ratio.least, ratio.median, ratio.greatest), (2.0, 3.0, 4.0));
    }

    #[test]
    fn what_could_not_be_measured_takes_part_in_nothing() {
        let mut report = Report::new("test");
        report.add("m", "ours", Some(2.0));
        report.add("m", "peer", None);
        assert_eq!(report.ratio("m", "ours", "peer"), None);
        assert_eq!(report.spread("m", "peer"), None);
        assert!(report.table().contains("| m | 2.00 | |"));
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(Spread::of([4.0, 1.0, 3.0, 2.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of([]), None);
    }
}
