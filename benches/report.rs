//! Puts what the last runs of the benches found into BENCHMARKS.md, between its marks. Measures nothing.
//!
//! `cargo bench --bench report`

mod kit;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use kit::results::Results;
use kit::text;

/// In the order of the document.
const BENCHES: [&str; 7] = ["floor", "loss", "recovery", "scale", "contention", "startup", "footprint"];

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
    for bench in BENCHES {
        let results = match Results::read(bench) {
            Ok(results) => results,
            Err(reason) => {
                println!("{bench}: what is there stays; nothing new to read ({reason})");
                continue;
            }
        };
        if results.environment.quick {
            println!("{bench}: what is there stays; the last run was a quick one, whose figures mean little");
            continue;
        }
        document = replaced(&document, bench, &section(&results))
            .ok_or_else(|| format!("{} has no marks for {bench:?}", path.display()))?;
        println!("{bench}: {}", text::verdict(&results.rows));
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

/// The document with other text between the marks of a bench.
fn replaced(document: &str, bench: &str, text: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {bench}: begin -->\n"), format!("<!-- {bench}: end -->"));
    let (before, rest) = document.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{text}\n{end}{after}"))
}
