//! Line charts as SVG: several series over linear or logarithmic axes, with error bars.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use benches::plot::{Axis, Chart};
//! let mut chart = Chart::new("Rings", Axis::log("frames in a batch"), Axis::linear("ns a frame"));
//! chart.point("ours", 1.0, 30.0);
//! chart.point("ours", 32.0, 5.0);
//! chart.write("ring")?; // benches/plots/ring.svg
//! # Ok(())
//! # }
//! ```

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::{
    BLACK, ChartBuilder, Circle, Color, IntoDrawingArea, LineSeries, PathElement, RGBColor,
    SVGBackend, SeriesLabelPosition, WHITE,
};

use crate::report::Spread;

/// Told apart also by who can't tell red from green (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(148, 148, 40),
];
const SIZE: (u32, u32) = (860, 480);

/// What an axis shows.
#[derive(Clone, Debug)]
pub struct Axis {
    label: String,
    log: bool,
}

impl Axis {
    /// From zero.
    pub fn linear(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            log: false,
        }
    }

    /// Logarithmic: all values are greater than zero.
    pub fn log(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            log: true,
        }
    }

    fn scale(&self, values: impl Iterator<Item = f64> + Clone) -> Scale {
        let most = values.clone().fold(f64::MIN, f64::max);
        let least = values.fold(f64::MAX, f64::min);
        let (log, range) = (self.log, least..most);
        match log {
            true => Scale {
                log,
                range: range.start / 1.25..range.end * 1.25,
            },
            false => Scale {
                log,
                range: range.start.min(0.0)..if range.end > 0.0 {
                    range.end * 1.06
                } else {
                    1.0
                },
            },
        }
    }
}

/// A value with its spread.
#[derive(Clone, Copy, Debug)]
struct Point {
    x: f64,
    y: Spread,
}

/// A line chart.
#[derive(Clone, Debug)]
pub struct Chart {
    title: String,
    x: Axis,
    y: Axis,
    series: Vec<(String, Vec<Point>)>,
}

impl Chart {
    /// Without points.
    pub fn new(title: &str, x: Axis, y: Axis) -> Self {
        Self {
            title: title.to_owned(),
            x,
            y,
            series: Vec::new(),
        }
    }

    /// The next point of the series of that label.
    pub fn point(&mut self, series: &str, x: f64, y: f64) {
        let y = Spread {
            median: y,
            least: y,
            greatest: y,
        };
        self.spread(series, x, y);
    }

    /// The next point of the series of that label, with a bar from the least to the greatest.
    pub fn spread(&mut self, series: &str, x: f64, y: Spread) {
        let point = Point { x, y };
        match self.series.iter_mut().find(|(label, _)| label == series) {
            Some((_, points)) => points.push(point),
            None => self.series.push((series.to_owned(), vec![point])),
        }
    }

    /// The picture.
    ///
    /// # Errors
    /// There is no point, or one can't be shown: on a logarithmic axis what isn't above zero.
    pub fn svg(&self) -> Result<String> {
        let points = || self.series.iter().flat_map(|(_, points)| points);
        let ys = points().flat_map(|p| [p.y.least, p.y.greatest]);
        let xs = points().map(|p| p.x);
        ensure!(points().next().is_some(), "{}: nothing to show", self.title);
        let can = |axis: &Axis, value: f64| value.is_finite() && (value > 0.0 || !axis.log);
        ensure!(
            xs.clone().all(|x| can(&self.x, x)) && ys.clone().all(|y| can(&self.y, y)),
            "{}: a point that an axis can't show",
            self.title
        );
        let mut text = String::new();
        self.draw(&mut text, self.x.scale(xs), self.y.scale(ys))
            .map_err(|e| anyhow!("{}: {e}", self.title))?;
        Ok(text)
    }

    fn draw(
        &self,
        to: &mut String,
        x: Scale,
        y: Scale,
    ) -> Result<(), Box<dyn std::error::Error + '_>> {
        let area = SVGBackend::with_string(to, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        // Room on the right for the last series' end.
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .x_desc(&self.x.label)
            .y_desc(&self.y.label)
            .label_style(("sans-serif", 13))
            .light_line_style(WHITE)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        for ((label, points), colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let line = points.iter().map(|p| (p.x, p.y.median));
            chart
                .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
                .label(label)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
            let dot = |p: &Point| Circle::new((p.x, p.y.median), 3, colour.filled());
            chart.draw_series(points.iter().map(dot))?;
            let bar =
                |p: &Point| PathElement::new([(p.x, p.y.least), (p.x, p.y.greatest)], *colour);
            chart.draw_series(points.iter().map(bar))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 13))
            .draw()?;
        area.present()?;
        Ok(())
    }

    /// Writes `benches/plots/NAME.svg`, which is committed when its figures are.
    ///
    /// # Errors
    /// As [`Chart::svg`]; the file can't be written.
    pub fn write(&self, name: &str) -> Result<PathBuf> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("plots");
        std::fs::create_dir_all(&directory)?;
        let path = directory.join(format!("{name}.svg"));
        std::fs::write(&path, self.svg()?).with_context(|| path.display().to_string())?;
        println!("{}", path.display());
        Ok(path)
    }
}

/// A range on the screen, linear or not.
struct Scale {
    log: bool,
    range: Range<f64>,
}

impl Scale {
    /// Round values within the range.
    fn marks(&self) -> Vec<f64> {
        let Range { start, end } = self.range;
        let marks: Vec<f64> = if self.log {
            let decades = start.log10().floor() as i32..=end.log10().ceil() as i32;
            let few = end / start < 300.0;
            let steps: &[f64] = if few { &[1.0, 2.0, 5.0] } else { &[1.0] };
            decades
                .flat_map(|d| steps.iter().map(move |step| step * 10f64.powi(d)))
                .collect()
        } else {
            let rough = (end - start) / 8.0;
            let decade = 10f64.powf(rough.log10().floor());
            let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * decade);
            let step = step
                .into_iter()
                .find(|step| *step >= rough)
                .unwrap_or(rough);
            let first = (start / step).ceil() as i64;
            (0..12).map(|n| (first + n) as f64 * step).collect()
        };
        marks
            .into_iter()
            .filter(|mark| (start..=end).contains(mark))
            .collect()
    }
}

impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        let at = |value: f64| if self.log { value.ln() } else { value };
        let (start, end) = (at(self.range.start), at(self.range.end));
        low + (f64::from(high - low) * (at(*value) - start) / (end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Scale {
    fn format_ext(&self, value: &f64) -> String {
        match *value {
            v if v >= 1e6 => format!("{}M", (v / 1e3).round() / 1e3),
            v if v >= 1e4 => format!("{}k", v.round() / 1e3),
            v => format!("{}", (v * 1e6).round() / 1e6),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_its_series_its_marks_and_its_bars() {
        let mut chart = Chart::new("t", Axis::log("flows"), Axis::linear("ns"));
        for (x, y) in [(1.0, 10.0), (1000.0, 20.0), (1e6, 40.0)] {
            let (least, greatest) = (y / 2.0, y * 2.0);
            chart.spread(
                "with",
                x,
                Spread {
                    median: y,
                    least,
                    greatest,
                },
            );
            chart.point("without", x, y);
        }
        let svg = chart.svg().unwrap();
        for text in ["with\n", "without\n", "flows\n", "ns\n", "1M\n", "80\n"] {
            assert!(svg.contains(text), "{text:?} in {svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 6);
    }

    #[test]
    fn what_an_axis_cannot_show_is_an_error() {
        let mut chart = Chart::new("t", Axis::linear("x"), Axis::log("y"));
        assert!(chart.svg().is_err());
        chart.point("s", 0.0, 1.0);
        assert!(chart.svg().is_ok());
        chart.point("s", 0.0, 0.0);
        assert!(chart.svg().is_err());
    }
}
