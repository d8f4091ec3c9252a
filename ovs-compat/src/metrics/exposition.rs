//! Prometheus' text format: families of samples, each with its help and its type.
//!
//! Source: "Exposition formats" of Prometheus' documentation, version 0.0.4. What is written here is
//! also understood by readers of OpenMetrics that negotiate the older format.

use std::fmt::Write as _;

/// The format's media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never goes down while the daemon lives; its name ends with `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A text that grows family by family.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
    family: &'static str,
}

impl Exposition {
    /// Begins a family. All its samples follow before the next.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) -> &mut Self {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.family = name;
        self.text.push_str("# HELP ");
        self.text.push_str(name);
        self.text.push(' ');
        for letter in help.chars() {
            match letter {
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                _ => self.text.push(letter),
            }
        }
        // Writing to a string doesn't fail.
        let _ = writeln!(self.text, "\n# TYPE {name} {kind}");
        self
    }

    /// A sample of the present family. Names of labels are `[a-z_]+`, values anything.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Into<Value>) -> &mut Self {
        self.text.push_str(self.family);
        for (index, (name, value)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            self.text.push_str(name);
            self.text.push_str("=\"");
            for letter in value.chars() {
                match letter {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    _ => self.text.push(letter),
                }
            }
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = match value.into() {
            Value::Whole(number) => writeln!(self.text, " {number}"),
            Value::Real(number) => writeln!(self.text, " {number}"),
        };
        self
    }

    /// What was written.
    pub fn finish(self) -> String {
        self.text
    }
}

/// A sample's number.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// Written exactly.
    Whole(u64),
    /// Finite.
    Real(f64),
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Whole(number)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_help_type_and_samples() {
        let mut text = Exposition::default();
        text.family("x_total", Kind::Counter, "a \\ b\nc")
            .sample(&[], 7)
            .sample(&[("port", "a\"b\\c\nd"), ("reason", "é")], 0.25);
        assert_eq!(
            text.finish(),
            "# HELP x_total a \\\\ b\\nc\n# TYPE x_total counter\nx_total 7\n\
             x_total{port=\"a\\\"b\\\\c\\nd\",reason=\"é\"} 0.25\n"
        );
    }
}
