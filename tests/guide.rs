//! What the guide says is true: its lines of the log, its queries, its commands.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use dsync::{Config, PostgresManager};
use support::Server;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join("src/guide").join(name)).unwrap()
}

fn rust_files(path: PathBuf) -> Vec<PathBuf> {
    if path.is_dir() {
        return fs::read_dir(path).unwrap().flat_map(|entry| rust_files(entry.unwrap().path())).collect();
    }
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    if is_rust { vec![path] } else { Vec::new() }
}

/// Lines of the log, and their levels.
type Lines = BTreeMap<String, BTreeSet<String>>;

#[test]
fn the_table_of_log_lines_is_complete() {
    let mut written = Lines::new();
    for file in rust_files(root().join("src")) {
        log_lines(&fs::read_to_string(file).unwrap(), &mut written);
    }
    let mut told = Lines::new();
    for row in page("log_lines.md").lines().filter_map(|line| line.strip_prefix("| ")) {
        let cells: Vec<_> = row.split(" | ").collect();
        if let [levels, line, _] = cells[..]
            && let Some(line) = line.strip_prefix('`')
        {
            let levels = levels.split(" or ").map(str::to_owned);
            told.entry(line.trim_end_matches('`').to_owned()).or_default().extend(levels);
        }
    }
    assert!(written.len() > 30, "{written:#?}");
    let differs = |some: &Lines, others: &Lines| -> Vec<_> {
        some.iter()
            .filter(|(line, levels)| others.get(*line) != Some(levels))
            .map(|line| format!("{line:?}"))
            .collect()
    };
    let (missing, gone) = (differs(&written, &told), differs(&told, &written));
    assert!(
        missing.is_empty() && gone.is_empty(),
        "src/guide/log_lines.md does not have, as it is written: {missing:#?}; it has, and nothing writes it so: {gone:#?}"
    );
}

/// The texts of the calls of `log` in a source file, with `…` for each value.
fn log_lines(source: &str, lines: &mut Lines) {
    let code =
        source.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    for call in code.split("log::").skip(1) {
        let Some((level, rest)) = call.split_once("!(") else { continue };
        let levels: &[&str] = match level {
            // By a variable: once as a warning, and then for details.
            "log" => &["warn", "debug"],
            "error" | "warn" | "info" | "debug" | "trace" => &[level],
            _ => continue,
        };
        let rest = rest.trim_start().trim_start_matches("level, ");
        let text = rest.strip_prefix('"').unwrap_or_else(|| panic!("no text at the beginning of {rest:.80}"));
        let mut line = String::new();
        let mut letters = text.chars().peekable();
        loop {
            match letters.next().expect("the end of a text") {
                '"' => break,
                // A line that goes on.
                '\\' => while letters.next_if(|letter| letter.is_whitespace()).is_some() {},
                '{' => {
                    letters.by_ref().take_while(|letter| *letter != '}').for_each(drop);
                    line.push('…');
                }
                letter => line.push(letter),
            }
        }
        lines.entry(line).or_default().extend(levels.iter().map(|level| (*level).to_owned()));
    }
}

#[test]
fn the_queries_for_monitoring_run_on_a_server() {
    let server = Server::start().unwrap();
    let _manager = PostgresManager::connect(Config::from_url(&server.url()).unwrap()).unwrap();
    let page = page("operations.md");
    let (_, queries) = page.split_once("```sql\n").unwrap();
    let (queries, _) = queries.split_once("```").unwrap();
    let mut client = server.client().unwrap();
    let queries: Vec<_> = queries.split_inclusive(";\n").collect();
    assert!(queries.len() >= 5);
    for query in queries {
        client.batch_execute(query).unwrap_or_else(|error| panic!("{query}: {error:?}"));
    }
}

#[test]
fn the_commands_name_tests_and_examples_that_are_there() {
    let pages = ["incidents.md", "comparison.md"].map(page).concat();
    let commands: Vec<_> = pages.split('`').filter(|text| text.starts_with("cargo ")).collect();
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        let words: Vec<_> = command.split_whitespace().collect();
        let after = |flag: &str| words.iter().position(|word| *word == flag).map(|place| words[place + 1]);
        if let Some(example) = after("--example") {
            let examples = root().join("examples");
            assert!(
                examples.join(format!("{example}.rs")).exists()
                    || examples.join(example).join("main.rs").exists(),
                "{command}"
            );
            continue;
        }
        let program = after("--test").unwrap_or_else(|| panic!("{command}"));
        let Some(filter) = words.get(4) else {
            assert!(root().join(format!("tests/{program}.rs")).exists(), "{command}");
            continue;
        };
        // Between the two there may be which of a test's ways it is.
        let (module, name) = (filter.split("::").next().unwrap(), filter.rsplit("::").next().unwrap());
        let source = fs::read_to_string(root().join(format!("tests/{program}/{module}.rs"))).unwrap();
        assert!(source.contains(&format!("\nfn {name}")), "{command}: no test begins so");
    }
}
