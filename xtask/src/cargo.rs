//! Calls of cargo, in the folder of the workspace.

use std::env;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the workspace that cargo runs this for. A copy of the tree has a copy of this program, which cargo takes for
/// its own: so the folder of the compilation is only for a call without cargo.
pub(crate) fn root() -> PathBuf {
    let own = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let own = PathBuf::from(own);
    own.parent().map(Path::to_owned).unwrap_or(own)
}

/// Cargo, with variables of the environment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cargo {
    variables: Vec<(&'static str, String)>,
}

impl Cargo {
    pub(crate) fn env(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    /// Says what it runs, and fails as that fails.
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<(), String> {
        let line = line(arguments);
        eprintln!("xtask: {line}");
        let status = self
            .command(arguments)
            .status()
            .map_err(|error| format!("`{line}` cannot be started: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("`{line}` failed ({status})")) }
    }

    /// As [`run`](Self::run), beside others: what it says comes when it is done.
    pub(crate) fn run_apart(&self, arguments: &[&str]) -> Result<(), String> {
        let line = line(arguments);
        let output = self.command(arguments).output();
        let output = output.map_err(|error| format!("`{line}` cannot be started: {error}"))?;
        let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
        let shown = writeln!(err, "xtask: {line}")
            .and_then(|()| err.write_all(&output.stderr))
            .and_then(|()| out.write_all(&output.stdout))
            .and_then(|()| out.flush());
        shown.map_err(|error| format!("what `{line}` says cannot be shown: {error}"))?;
        if output.status.success() { Ok(()) } else { Err(format!("`{line}` failed ({})", output.status)) }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // Cargo tells us of our own package by them. Build scripts that look at them would run anew with each change between
        // `cargo` and `cargo xtask`.
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if ["CARGO_MANIFEST_", "CARGO_PKG_"].iter().any(|start| text.starts_with(start)) {
                command.env_remove(&name);
            }
        }
        command
            .args(arguments)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(root());
        command
    }
}

/// The call as one would type it.
pub(crate) fn line(arguments: &[&str]) -> String {
    arguments.iter().fold("cargo".to_owned(), |line, argument| {
        if argument.contains(' ') { format!("{line} '{argument}'") } else { format!("{line} {argument}") }
    })
}
