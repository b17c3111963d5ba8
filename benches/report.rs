//! Puts what the last runs of the benches found into BENCHMARKS.md, between its marks. Measures nothing.
//!
//! `cargo bench --bench report`

mod kit;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use kit::results::{Results, Row};
use kit::text;

/// In the order of the document.
const BENCHES: [&str; 10] =
    ["floor", "row", "loss", "recovery", "scale", "sharing", "threads", "contention", "startup", "footprint"];

fn main() -> ExitCode {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("BENCHMARKS.md");
    match write(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("report: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(path: &Path) -> Result<(), String> {
    let before = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut document = before.clone();
    let mut judged = Vec::new();
    let mut complete = true;
    for bench in BENCHES {
        let results = match Results::read(bench) {
            Ok(results) => results,
            Err(reason) => {
                println!("{bench}: what is there stays; nothing new to read ({reason})");
                complete = false;
                continue;
            }
        };
        if results.environment.quick {
            println!("{bench}: what is there stays; the last run was a quick one, whose figures mean little");
            complete = false;
            continue;
        }
        document = replaced(&document, bench, &section(&results), path)?;
        println!("{bench}: {}", text::verdict(&results.rows));
        judged.extend(results.rows.into_iter().filter(|row| row.reached.is_some()));
    }
    // All or nothing: with a bench left out, it would look as if that one had no targets.
    if complete {
        document = replaced(&document, "targets", &summary(&judged), path)?;
    }
    if document != before {
        fs::write(path, document).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

fn section(results: &Results) -> String {
    let table = text::table(&results.rows);
    format!("{}\n\n{table}\n*{}.*\n", text::verdict(&results.rows), results.environment)
}

/// All rows that have a target.
fn summary(judged: &[Row]) -> String {
    format!("{}\n\n{}", text::verdict(judged), text::table(judged))
}

/// The document with other text between the marks of that name.
fn replaced(document: &str, name: &str, text: &str, path: &Path) -> Result<String, String> {
    let (begin, end) = (format!("<!-- {name}: begin -->\n"), format!("<!-- {name}: end -->"));
    let parts = document.split_once(&begin).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&end)?;
        Some((before, after))
    });
    let (before, after) = parts.ok_or_else(|| format!("{} has no marks for {name:?}", path.display()))?;
    Ok(format!("{before}{begin}\n{text}\n{end}{after}"))
}
