//! The picture of the figures: an SVG for a README.
//!
//! Nothing but grey and blue of middling brightness on no background, which can be read on white and on black alike. A
//! style for the dark would not do: it follows the system's setting, and not that of the page around the picture.

use std::fmt::Write;
use std::time::Duration;

use crate::report::{Row, Spread, ratio, time};

const WIDTH: f64 = 880.0;
/// Where the bars begin and where the longest possible one ends.
const BARS: (f64, f64) = (262.0, 556.0);
/// The right edges of the columns beside them.
const COLUMNS: [(&str, f64); 4] =
    [("median", 632.0), ("p99", 700.0), ("× the floor", 778.0), ("tells of a loss", 874.0)];
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
    let axis = Axis::of(rows.iter().map(of));
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
        if axis.cuts(spread.median.as_secs_f64()) {
            for x in [median - 14.0, median - 8.0] {
                line(svg, (x, middle + 10.0), (x + 6.0, middle - 10.0), " stroke-width=\"2\"");
            }
        } else {
            // From the median to the 99th percentile.
            line(svg, (median, middle), (p99, middle), " stroke-width=\"1.5\"");
            line(svg, (p99, middle - 4.0), (p99, middle + 4.0), " stroke-width=\"1.5\"");
        }
        let ratio = floor.map(|floor| ratio(spread.ratio_to(&floor))).unwrap_or_default();
        let figures = [time(spread.median), time(spread.p99), ratio, row.tells().to_owned()];
        for ((_, right), figure) in COLUMNS.into_iter().zip(figures) {
            text(svg, right, baseline, "end", weight, &figure);
        }
    }
    if let Some(floor) = floor {
        let x = axis.place(floor.median.as_secs_f64());
        line(svg, (x, top + HEAD - 4.0), (x, bottom), " stroke-dasharray=\"3 3\"");
    }
    text(
        svg,
        4.0,
        bottom + 30.0,
        "start",
        " font-size=\"11\"",
        "shorter is better; bar: median, whisker: p99; dashed: the floor, which is the driver by hand; a cut bar goes on",
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

/// A linear axis of times in seconds, from 0.
struct Axis {
    most: f64,
}

impl Axis {
    /// To a mark above the 99th percentiles, but for those of contenders that take ten times as long as the first one: one of these would
    /// leave no length to the others, and is cut.
    fn of(spreads: impl Iterator<Item = Spread> + Clone) -> Self {
        let floor = spreads.clone().next().map_or(0.0, |spread| spread.median.as_secs_f64());
        let fits = spreads.filter(|spread| spread.median.as_secs_f64() < 10.0 * floor);
        Self { most: mark_above(fits.map(|spread| spread.p99.as_secs_f64()).fold(0.0, f64::max)) }
    }

    fn place(&self, value: f64) -> f64 {
        BARS.0 + (BARS.1 - BARS.0) * (value / self.most).min(1.0)
    }

    fn cuts(&self, value: f64) -> bool {
        value > self.most
    }

    fn marks(&self) -> impl Iterator<Item = f64> {
        (0..=5_u32).map(|fifth| self.most * f64::from(fifth) / 5.0)
    }
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
    fn marks_lie_above_what_is_measured() {
        assert!((mark_above(179e-6) - 200e-6).abs() < 1e-9);
        assert!((mark_above(0.6) - 1.0).abs() < 1e-9);
    }
}
