//! Where and when something was measured.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::SystemTime;

use serde_json::{Value, json};
use support::Binaries;

use super::results::text;

/// What is not known is a question mark.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Environment {
    pub(crate) postgres: String,
    pub(crate) rustc: String,
    pub(crate) cpu: String,
    pub(crate) cores: u64,
    pub(crate) kernel: String,
    pub(crate) date: String,
    pub(crate) commit: String,
    /// Processes that wanted to run in the minute before: on a quiet machine there are hardly any.
    pub(crate) load: String,
    pub(crate) quick: bool,
}

impl Environment {
    pub(crate) fn look(quick: bool) -> Self {
        let known = |text: Option<String>| text.unwrap_or_else(|| "?".to_owned());
        Self {
            postgres: known(postgres()),
            rustc: known(said("rustc", &["--version"])),
            cpu: known(cpu()),
            cores: thread::available_parallelism().map_or(0, |cores| cores.get() as u64),
            kernel: known(said("uname", &["-sr"])),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            commit: known(commit()),
            load: known(load()),
            quick,
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "postgres": self.postgres,
            "rustc": self.rustc,
            "cpu": self.cpu,
            "cores": self.cores,
            "kernel": self.kernel,
            "date": self.date,
            "commit": self.commit,
            "load": self.load,
            "quick": self.quick,
        })
    }

    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        Some(Self {
            postgres: text(value, "postgres")?,
            rustc: text(value, "rustc")?,
            cpu: text(value, "cpu")?,
            cores: value["cores"].as_u64()?,
            kernel: text(value, "kernel")?,
            date: text(value, "date")?,
            commit: text(value, "commit")?,
            load: text(value, "load")?,
            quick: value["quick"].as_bool()?,
        })
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { postgres, rustc, cpu, cores, kernel, date, commit, load, quick: _ } = self;
        write!(
            f,
            "{postgres}, {rustc}, {cpu} × {cores}, {kernel}, commit {commit}, {date}, load before {load}"
        )
    }
}

fn postgres() -> Option<String> {
    let program = Binaries::find().ok()?.program("postgres");
    let version = said(program.to_str()?, &["--version"])?;
    // Without what the distribution adds: `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`.
    Some(format!("PostgreSQL {}", version.split_whitespace().nth(2)?))
}

fn cpu() -> Option<String> {
    let known = fs::read_to_string("/proc/cpuinfo").ok().and_then(|list| {
        let line = list.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    known.or_else(|| said("uname", &["-m"]))
}

fn load() -> Option<String> {
    Some(fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.to_owned())
}

/// With a mark if there is more in the files than in the commit. What benches write does not count.
fn commit() -> Option<String> {
    let root = env!("CARGO_MANIFEST_DIR");
    let commit = said("git", &["-C", root, "rev-parse", "--short=12", "HEAD"])?;
    let peers = ["benches/peers/results.json", "benches/peers/RESULTS.md", "src/guide/comparison.svg"]
        .map(|file| format!(":!{file}"));
    let mut status = vec!["-C", root, "status", "--porcelain", "--", ".", ":!BENCHMARKS.md"];
    status.extend(peers.iter().map(String::as_str));
    let changed = !said("git", &status)?.is_empty();
    Some(if changed { format!("{commit} and changes") } else { commit })
}

/// What a program answers, without the blanks around it.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(Path::new(program)).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
