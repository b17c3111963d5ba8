//! Tests again and again, until one fails.

use std::collections::BTreeSet;
use std::hint::spin_loop;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use crate::cargo::{Cargo, line};
use crate::task::{ALL_TESTS, waiting};

/// A compiled program of tests, and the folder in which cargo would run it.
struct Program {
    path: PathBuf,
    folder: PathBuf,
}

pub(crate) fn tests(rounds: u32, tests: &[&str], busy: bool) -> Result<(), String> {
    // The programs themselves, since cargo would start each program of the workspace in each round.
    let mut chosen = Vec::new();
    let mut names = Vec::new();
    for program in programs()? {
        let found = program.list(tests)?;
        if !found.is_empty() {
            chosen.push(program);
            names.extend(found);
        }
    }
    if names.is_empty() {
        return Err(format!("no test has a name with one of these in it: {}", tests.join(" ")));
    }
    eprintln!("xtask: {}", names.join(", "));
    repeat(rounds, busy, || {
        for program in &chosen {
            let mut command = program.command();
            succeeds(command.args(tests))?;
        }
        Ok(())
    })
}

pub(crate) fn suite(rounds: u32, busy: bool) -> Result<(), String> {
    let cargo = waiting(&Cargo::default());
    cargo.run(&[&ALL_TESTS[..], &["--no-run"]].concat())?;
    let all = [&ALL_TESTS[..], &["--no-fail-fast"]].concat();
    repeat(rounds, busy, || succeeds(&mut cargo.command(&all)))
}

fn repeat(rounds: u32, busy: bool, mut round: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    let _spinning = busy.then(Spinning::start);
    for number in 1..=rounds {
        let begun = Instant::now();
        round().map_err(|failure| format!("round {number} of {rounds} failed: {failure}"))?;
        eprintln!("xtask: round {number} of {rounds} took {:.1?}", begun.elapsed());
    }
    Ok(())
}

/// What it says is shown only if it fails.
fn succeeds(command: &mut Command) -> Result<(), String> {
    let Output { status, stdout, stderr: errors } =
        command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    if status.success() {
        return Ok(());
    }
    let mut terminal = stderr().lock();
    // Whoever has closed it does not want to read it.
    let _ = terminal.write_all(&stdout).and_then(|()| terminal.write_all(&errors));
    Err(status.to_string())
}

impl Program {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.current_dir(&self.folder);
        command
    }

    /// The tests whose names contain one of the texts, but for those that are ignored.
    fn list(&self, tests: &[&str]) -> Result<Vec<String>, String> {
        let list = |more: &[&str]| -> Result<BTreeSet<String>, String> {
            let output = self
                .command()
                .args(["--list", "--format", "terse"])
                .args(more)
                .args(tests)
                .output()
                .map_err(|error| format!("{} cannot be started: {error}", self.path.display()))?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
        };
        Ok(list(&[])?.difference(&list(&["--ignored"])?).cloned().collect())
    }
}

/// All programs of tests, compiled.
fn programs() -> Result<Vec<Program>, String> {
    let arguments = [&ALL_TESTS[..], &["--no-run", "--message-format=json-render-diagnostics"]].concat();
    eprintln!("xtask: {}", line(&arguments[..ALL_TESTS.len() + 1]));
    let output = Cargo::default()
        .command(&arguments)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cargo cannot be started: {error}"))?;
    if !output.status.success() {
        return Err("the tests do not compile".to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(program).collect())
}

/// From what cargo says of something that it has compiled.
fn program(message: &str) -> Option<Program> {
    if !message.contains(r#""test":true},"#) {
        return None;
    }
    let path = PathBuf::from(text(message, "executable")?);
    let manifest = PathBuf::from(text(message, "manifest_path")?);
    Some(Program { path, folder: manifest.parent().map(Path::to_owned)? })
}

/// A field of a JSON object whose value is a text. Enough for paths.
fn text(object: &str, field: &str) -> Option<String> {
    let start = format!("\"{field}\":\"");
    let mut letters = object[object.find(&start)? + start.len()..].chars();
    let mut text = String::new();
    loop {
        match letters.next()? {
            '"' => return Some(text),
            '\\' => text.push(letters.next()?),
            letter => text.push(letter),
        }
    }
}

/// A thread for each processor that does nothing, with all its might, until this is dropped.
struct Spinning(Arc<AtomicBool>);

impl Spinning {
    fn start() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            let over = Arc::clone(&over);
            thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    spin_loop();
                }
            });
        }
        Self(over)
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_cargo_tells_of_a_program_of_tests() {
        let message = |test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/a/b/Cargo.toml","target":{{"test":true,"x":1}},"profile":{{"opt_level":"0","test":{test}}},"executable":{executable},"fresh":true}}"#
            )
        };
        let found = program(&message(true, r#""/a/my \"tests\"/x-1""#)).unwrap();
        assert_eq!(found.path, Path::new("/a/my \"tests\"/x-1"));
        assert_eq!(found.folder, Path::new("/a/b"));
        assert!(program(&message(false, r#""/a/x-1""#)).is_none());
        assert!(program(&message(true, "null")).is_none());
    }

    #[test]
    fn a_round_that_fails_is_the_last_one() {
        let mut rounds = 0;
        let outcome = repeat(5, false, || {
            rounds += 1;
            if rounds == 3 { Err("no".to_owned()) } else { Ok(()) }
        });
        assert_eq!(outcome, Err("round 3 of 5 failed: no".to_owned()));
        assert_eq!(rounds, 3);
    }
}
