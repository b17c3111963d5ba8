//! `pgbench`, which comes with PostgreSQL: runs statements from a small program in C.

use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;

use support::Database;

use super::SEED;

/// How long a session lives.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Session {
    /// As long as the run; each statement is prepared once.
    Warm,
    /// For one run of the script, on a server process that knows nothing yet.
    Fresh,
}

/// A run of it.
pub(crate) struct Run<'a> {
    pub(crate) script: &'a str,
    pub(crate) session: Session,
    pub(crate) clients: usize,
    /// `--time=2`, or `--transactions=1000` for each client.
    pub(crate) length: String,
    /// Settings of the sessions, as `-c name=value`.
    pub(crate) settings: &'a str,
}

impl Run<'_> {
    /// How often a second all clients together run the script; the time for connections counts with fresh sessions only.
    pub(crate) fn on(&self, database: &Database<'_>) -> f64 {
        let jobs = thread::available_parallelism().map_or(1, |cores| cores.get().min(self.clients));
        let program = database.server().binaries().program("pgbench");
        let mut command = Command::new(&program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            command.env_remove(name);
        }
        let mut process = command
            .args(match self.session {
                Session::Warm => &["--protocol=prepared"] as &[_],
                Session::Fresh => &["--protocol=extended", "--connect"],
            })
            .args(["--no-vacuum", "--file=-", "--host=127.0.0.1", "--username=postgres"])
            .arg(format!("--port={}", database.server().port()))
            .arg(format!("--client={}", self.clients))
            .arg(format!("--jobs={jobs}"))
            .arg(&self.length)
            .arg(format!("--random-seed={SEED}"))
            .arg(database.name())
            .env("LC_ALL", "C")
            .env("PGOPTIONS", self.settings)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{}: {error}; install pgbench (postgresql-contrib)", program.display())
            });
        let mut input = process.stdin.take().expect("its input");
        input.write_all(self.script.as_bytes()).expect("its input");
        drop(input);
        let output = process.wait_with_output().expect("its output");
        let said = String::from_utf8_lossy(&output.stdout);
        said.lines()
            .find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok())
            .unwrap_or_else(|| {
                panic!("pgbench failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr))
            })
    }
}
