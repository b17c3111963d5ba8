//! Rows as a person reads them: on the terminal, and in BENCHMARKS.md.

use super::results::Row;
use super::statistics::Summary;

/// Prints a row: the floor first, since everything else is measured by it.
pub(crate) fn print(row: &Row) {
    println!("\n  {} [{}]", row.what, row.unit);
    println!("    {:42} {:>10} {:>10} {:>23} {:>8}", "", "median", "p99", "spread of medians", "samples");
    for summary in row.floor.iter().chain([&row.ours]) {
        let Summary { name, median, p99, spread: [low, high], samples } = summary;
        let p99 = p99.map_or_else(|| "–".to_owned(), number);
        let spread = format!("{} – {}", number(*low), number(*high));
        println!("    {name:42} {:>10} {p99:>10} {spread:>23} {samples:>8}", number(*median));
    }
    let ratio = ratio(row).map(|ratio| format!("ratio {ratio}"));
    let target = row.target.as_ref().map(|target| format!("target {target}: {}", judgement(row.reached)));
    let line: Vec<String> = ratio.into_iter().chain(target).collect();
    if !line.is_empty() {
        println!("    {}", line.join("; "));
    }
}

/// The rows as a table in Markdown.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut table =
        "| what | unit | floor | ours | ratio | target | |\n|---|---|---|---|---|---|---|\n".to_owned();
    for row in rows {
        let floor = row
            .floor
            .as_ref()
            .map_or_else(|| "–".to_owned(), |floor| format!("{} ({})", cell(floor), floor.name));
        let cells = [
            row.what.clone(),
            row.unit.clone(),
            floor,
            cell(&row.ours),
            ratio(row).unwrap_or_else(|| "–".to_owned()),
            row.target.clone().unwrap_or_else(|| "–".to_owned()),
            row.reached.map_or("", |_| judgement(row.reached)).to_owned(),
        ];
        table.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    table
}

/// How many targets were reached, and which not.
pub(crate) fn verdict(rows: &[Row]) -> String {
    let judged = rows.iter().filter(|row| row.reached.is_some()).count();
    let missed: Vec<&str> =
        rows.iter().filter(|row| row.reached == Some(false)).map(|row| row.what.as_str()).collect();
    match (judged, missed.len()) {
        (0, _) => "These rows have no targets.".to_owned(),
        (_, 0) if judged == 1 => "The one target is reached.".to_owned(),
        (_, 0) => format!("All {judged} targets are reached."),
        (_, count) => {
            format!("{} of {judged} targets are reached. Missed: {}.", judged - count, missed.join("; "))
        }
    }
}

fn judgement(reached: Option<bool>) -> &'static str {
    match reached {
        Some(true) => "reached",
        Some(false) => "**missed**",
        None => "not judged",
    }
}

/// `179 (175 – 184), p99 240`.
fn cell(summary: &Summary) -> String {
    let [low, high] = summary.spread;
    let tail = summary.p99.map_or_else(String::new, |p99| format!(", p99 {}", number(p99)));
    format!("**{}** ({} – {}){tail}", number(summary.median), number(low), number(high))
}

fn ratio(row: &Row) -> Option<String> {
    let [low, high] = row.ratio_spread?;
    Some(format!("{:.2} ({low:.2} – {high:.2})", row.ratio?))
}

/// A number with three digits or all that stand before the point.
fn number(value: impl std::borrow::Borrow<f64>) -> String {
    let value = *value.borrow();
    match value.abs() {
        size if size >= 99.95 => grouped(value),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A whole number with a comma at each thousand.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 { format!("-{text}") } else { text }
}
