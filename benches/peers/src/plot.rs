//! The picture of the figures: an SVG for a README.
//!
//! Nothing but grey and blue of middling brightness on no background, which can be read on white and on black alike. A
//! style for the dark would not do: it follows the system's setting, and not that of the page around the picture.

use std::fmt::Write;
use std::time::Duration;

use crate::report::{Row, Spread, ratio, time};

const WIDTH: f64 = 880.0;
/// Where the bars begin and where the longest possible one ends.
const BARS: (f64, f64) = (262.0, 640.0);
/// The right edges of the columns of figures.
const COLUMNS: [(&str, f64); 3] = [("median", 720.0), ("p99", 795.0), ("to the floor", 874.0)];
const LINE: f64 = 26.0;
const HEAD: f64 = 58.0;
const FOOT: f64 = 40.0;

const TEXT: &str = "#7d8590";
const OURS: &str = "#2f81f7";
const OTHERS: &str = "#8b949e";

/// One panel for the pairs and one for the hand-overs.
pub(crate) fn svg(rows: &[Row]) -> String {
    let panel_height = HEAD + LINE * rows.len() as f64 + FOOT;
    let height = 2.0 * panel_height;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\" font-size=\"13\" \
         fill=\"{TEXT}\" role=\"img\">\n\
         <title>dsync beside its peers: lock and release, and hand-over to a waiter; shorter is better</title>\n"
    );
    panel(&mut svg, 0.0, "Lock + release, nobody else there", rows, |row| row.pair);
    panel(
        &mut svg,
        panel_height,
        "Hand-over: release is called → the waiter’s lock has returned",
        rows,
        |row| row.hand_over,
    );
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, top: f64, title: &str, rows: &[Row], of: fn(&Row) -> Spread) {
    let axis = Axis::over(rows.iter().map(of));
    let bottom = top + HEAD + LINE * rows.len() as f64;
    text(svg, 4.0, top + 22.0, "start", " font-size=\"15\" font-weight=\"600\"", title);
    for (name, right) in COLUMNS {
        text(svg, right, top + HEAD - 10.0, "end", " font-size=\"11\"", name);
    }
    for mark in axis.marks() {
        let x = axis.place(mark);
        line(svg, (x, top + HEAD - 4.0), (x, bottom), " stroke-opacity=\"0.3\"");
        text(svg, x, bottom + 15.0, "middle", " font-size=\"11\"", &label(mark));
    }
    let floor = rows.first().map(of);
    for (row, number) in rows.iter().zip(0_u32..) {
        let spread = of(row);
        let middle = top + HEAD + LINE * (f64::from(number) + 0.5);
        let baseline = middle + 4.5;
        let (colour, weight) = if row.ours { (OURS, " font-weight=\"600\"") } else { (OTHERS, "") };
        text(svg, BARS.0 - 8.0, baseline, "end", weight, &row.name);
        let (median, p99) = (axis.place(spread.median.as_secs_f64()), axis.place(spread.p99.as_secs_f64()));
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" rx=\"2\" fill=\"{colour}\"/>",
            BARS.0,
            middle - 7.0,
            median - BARS.0
        );
        // From the median to the 99th percentile.
        line(svg, (median, middle), (p99, middle), " stroke-width=\"1.5\"");
        line(svg, (p99, middle - 4.0), (p99, middle + 4.0), " stroke-width=\"1.5\"");
        let ratio = floor.map(|floor| ratio(spread.ratio_to(&floor))).unwrap_or_default();
        for ((_, right), figure) in COLUMNS.into_iter().zip([time(spread.median), time(spread.p99), ratio]) {
            text(svg, right, baseline, "end", weight, &figure);
        }
    }
    if let Some(floor) = floor {
        let x = axis.place(floor.median.as_secs_f64());
        line(svg, (x, top + HEAD - 4.0), (x, bottom), " stroke-dasharray=\"3 3\"");
    }
    text(
        svg,
        BARS.0,
        bottom + 30.0,
        "start",
        " font-size=\"11\"",
        "logarithmic; bar: median, whisker: p99, dashed: the floor",
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, more: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{more}>{text}</text>");
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), more: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{TEXT}\"{more}/>",
        from.0, from.1, to.0, to.1
    );
}

/// A round time without the digits that it doesn't need.
fn label(mark: f64) -> String {
    let text = time(Duration::from_secs_f64(mark));
    match text.split_once(' ') {
        Some((number, unit)) if number.contains('.') => {
            format!("{} {unit}", number.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text,
    }
}

/// A logarithmic axis of times in seconds.
struct Axis {
    least: f64,
    most: f64,
}

impl Axis {
    /// From a mark well below the shortest time, since a bar of no length would say nothing, to one above the longest.
    fn over(spreads: impl Iterator<Item = Spread> + Clone) -> Self {
        let shortest =
            spreads.clone().map(|spread| spread.median.as_secs_f64()).fold(f64::INFINITY, f64::min);
        let longest = spreads.map(|spread| spread.p99.as_secs_f64()).fold(0.0, f64::max);
        Self { least: mark_below(shortest / 2.0), most: mark_above(longest) }
    }

    fn place(&self, value: f64) -> f64 {
        let share = (value / self.least).log10() / (self.most / self.least).log10();
        BARS.0 + (BARS.1 - BARS.0) * share.clamp(0.0, 1.0)
    }

    /// 1, 2 and 5 of each power of ten where there is room, else the powers alone.
    fn marks(&self) -> Vec<f64> {
        let steps: &[f64] = if self.most / self.least < 120.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = self.least.log10().floor() as i32..=self.most.log10().ceil() as i32;
        powers
            .flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)))
            // The edges themselves are marks, and computed with rounding.
            .filter(|mark| (self.least * 0.999..=self.most * 1.001).contains(mark))
            .collect()
    }
}

fn mark_below(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    [5.0, 2.0].into_iter().find(|step| step * power <= value).unwrap_or(1.0) * power
}

fn mark_above(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0].into_iter().find(|step| step * power >= value).unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_short() {
        assert_eq!([100e-6, 1e-3, 0.02, 0.1].map(label), ["100 µs", "1 ms", "20 ms", "100 ms"]);
    }

    #[test]
    fn marks_lie_around_what_is_measured() {
        assert!((mark_below(179e-6) - 100e-6).abs() < 1e-9);
        assert!((mark_below(60e-6) - 50e-6).abs() < 1e-9);
        assert!((mark_above(179e-6) - 200e-6).abs() < 1e-9);
        assert!((mark_above(0.6) - 1.0).abs() < 1e-9);
    }
}
