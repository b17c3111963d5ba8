//! The examples of the README, as far as they run without cron, systemd and Kubernetes.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use support::Server;
use support::process::Signal;

use crate::common::{Process, clean, new_file, pgdsync};

const README: &str = include_str!("../../README.md");

/// The blocks of this language.
fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    README.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

/// A folder with the programs of the examples in it.
fn programs() -> PathBuf {
    let folder = new_file("programs");
    fs::create_dir(&folder).unwrap();
    symlink(env!("CARGO_BIN_EXE_pgdsync"), folder.join("pgdsync")).unwrap();
    for (name, script) in [("report", "echo reported"), ("billing", "echo bills; exec sleep 1000")] {
        let path = folder.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    folder
}

/// The words of a command of the examples, whose programs are in this folder.
fn command(words: &[String], folder: &Path, url: &str) -> Command {
    let here = |word: &String| word.replace("/usr/local/bin", folder.to_str().unwrap());
    let mut command = clean(Command::new(here(&words[0])), url);
    command.args(words[1..].iter().map(here));
    command
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn the_examples_do_what_they_say() {
    let folder = programs();
    // Before the line, the variables of the block.
    let lines =
        blocks("cron").into_iter().flat_map(str::lines).filter(|line| line.starts_with(char::is_numeric));
    let cron: Vec<_> = lines.map(|line| words(line).split_off(6)).collect();
    let units = blocks("ini");
    let started =
        units.iter().flat_map(|unit| unit.lines()).filter_map(|line| line.strip_prefix("ExecStart="));
    let of_yaml = blocks("yaml").into_iter().flat_map(str::lines);
    let commands = of_yaml.filter_map(|line| line.trim().strip_prefix("command: "));
    let commands = commands.map(|list| serde_json::from_str(list).expect("it is JSON, too"));
    let all: Vec<Vec<String>> = cron.into_iter().chain(started.map(words)).chain(commands).collect();
    assert_eq!(all.len(), 5, "{all:?}");
    for words in all {
        let database = Server::shared().database().unwrap();
        let start = || Process::start(&mut command(&words, &folder, &database.url()));
        let mut first = start();
        if words[1] == "lead" {
            first.says("bills");
            first.signal(Signal::Terminate);
            assert_eq!(first.ends().code(), Some(143), "{words:?}");
        } else {
            first.says("reported");
            assert_eq!(first.ends().code(), Some(0), "{words:?}");
            // It has been done.
            let mut second = start();
            assert_eq!(second.ends().code(), Some(0), "{words:?}");
            assert_eq!(second.rest(), Vec::<String>::new(), "{words:?}");
        }
    }
}

#[test]
fn the_fence_of_a_shell_script_works() {
    let database = Server::shared().database().unwrap();
    let (url, mut client) = (database.url(), database.client().unwrap());
    client.batch_execute("CREATE TABLE ledger AS SELECT 1 AS id, 100 AS balance").unwrap();
    let script = blocks("sh").into_iter().find(|block| block.contains("dsync.fence")).unwrap();
    let script = script.replace("psql ", "psql \"$DATABASE_URL\" ");
    let mut process = Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", &script]));
    process.says("COMMIT");
    assert!(process.ends().success());
    assert_eq!(client.query_one("SELECT balance FROM ledger", &[]).unwrap().get::<_, i32>(0), 90);
    // That of a term before the last one.
    let stale = format!("PGDSYNC_FENCE=$(printenv PGDSYNC_FENCE | sed 's/:[0-9]*:/:1:/'); {script}");
    let mut process = Process::start(pgdsync(&url).args(["run", "k", "--", "sh", "-c", &stale]));
    assert!(!process.ends().success());
    assert_eq!(client.query_one("SELECT balance FROM ledger", &[]).unwrap().get::<_, i32>(0), 90);
}
