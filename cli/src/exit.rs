//! The exit codes, which scripts rely on.

use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::error::{ContextKind, ContextValue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::text::harmless;

/// There is nothing to do it to: nobody has the lock. Or the answer to a question was no.
pub(crate) const NOTHING: u8 = 1;
/// Another has the lock, or the time to wait is over (`EX_TEMPFAIL` of `sysexits.h`). `--conflict-exit-code` sets another, but not for a takeover grace.
pub(crate) const CONFLICT: u8 = 75;
/// The output cannot be written (`EX_IOERR`).
pub(crate) const OUTPUT: u8 = 74;
/// The lock was lost before it was given back.
pub(crate) const LOST: u8 = 79;
/// The server cannot be reached, or refuses the session (`EX_UNAVAILABLE`).
pub(crate) const UNAVAILABLE: u8 = 69;
/// The command is there and cannot be executed, as a shell says it.
pub(crate) const CANNOT_EXECUTE: u8 = 126;
/// What a shell says of a command that is not there.
pub(crate) const NOT_FOUND: u8 = 127;
/// The command line or a setting is wrong (`EX_USAGE`).
pub(crate) const USAGE: u8 = 64;

/// Tells the user something on standard error, which may be closed: nobody is left to tell of that.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "pgdsync: {}", harmless(text));
}

/// As [`say`], for a process that watches over a command, which nothing may hold up: what standard error does not take is not said. A terminal takes
/// nothing once it was stopped (Ctrl-S), and a pipe that nobody reads when it is full.
pub(crate) fn say_in_passing(text: &str) {
    write_in_passing(format!("pgdsync: {}\n", harmless(text)).as_bytes());
}

/// The same for lines that are ready.
pub(crate) fn write_in_passing(lines: &[u8]) {
    /// For a terminal at the other end of a network.
    const PATIENCE: Duration = Duration::from_millis(100);
    /// Less than a pipe has room for where it takes anything.
    const PIECE: usize = 512;
    static IS_STUCK: AtomicBool = AtomicBool::new(false);
    for piece in lines.chunks(PIECE) {
        // Of many messages, only the first has to wait in vain.
        let patience = if IS_STUCK.load(Ordering::Relaxed) { Duration::ZERO } else { PATIENCE };
        let is_stuck = !takes_output(patience);
        IS_STUCK.store(is_stuck, Ordering::Relaxed);
        if is_stuck {
            return;
        }
        let _ = io::stderr().write_all(piece);
    }
}

/// Whether standard error takes within this time what is written to it.
pub(crate) fn takes_output(patience: Duration) -> bool {
    let Ok(patience) = Timespec::try_from(patience) else { return false };
    let stderr = rustix::stdio::stderr();
    poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&patience)).is_ok_and(|ready| ready > 0)
}

/// Tells what is wrong with the command line, in several lines.
pub(crate) fn refused(error: &clap::Error) -> Failure {
    let mut text = error.render().to_string();
    // A connection string in the wrong place may have a password in it.
    for kind in [ContextKind::InvalidArg, ContextKind::InvalidSubcommand, ContextKind::InvalidValue] {
        if let Some(ContextValue::String(said)) = error.get(kind)
            && (said.contains("://") || said.replace(' ', "").contains("password="))
        {
            text = text.replace(said, "(a connection string)");
        }
    }
    let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
    // Behind -- comes the command, where there is one.
    let is_misleading = |line: &&str| text.contains("<CMD>") && line.starts_with("  tip: to pass '-");
    let mut lines: Vec<String> = text.lines().filter(|line| !is_misleading(line)).map(harmless).collect();
    let lacks = |name: &str| match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::Strings(missing)) => missing.iter().any(|argument| argument.contains(name)),
        _ => false,
    };
    if error.kind() == clap::error::ErrorKind::MissingRequiredArgument && lacks("<CMD>") {
        lines.push("\n  tip: the command comes after `--`: KEY -- CMD ARGS".to_owned());
    }
    // Of empty ones, one is enough.
    lines.dedup();
    let _ = writeln!(io::stderr(), "pgdsync: {}", lines.join("\n"));
    Failure::new(USAGE, "")
}

/// What the program says on standard error before it ends, and the code that it ends with. Without a message it says nothing.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// A text of the library's, where it names what only a program that uses the library has at hand, in our words.
pub(crate) fn in_our_words(text: &str) -> String {
    const WORDS: &[(&str, &str)] = &[
        (
            "the server asks for a password: put one into the connection string, or have PGPASSWORD and the password file looked at, by \
             Config::from_env",
            "the server asks for a password, and neither PGPASSWORD nor a password file that could be used has one: set PGPASSWORD, or write a line for this \
             host, port, database and user to ~/.pgpass (or what PGPASSFILE names), which nobody else may read (chmod 0600)",
        ),
        (
            "dsync::CATALOG_SQL (for another schema than dsync: dsync::catalog_sql)",
            "the SQL that `pgdsync catalog --grant ROLE` prints (with the --schema of this call)",
        ),
        ("in this database, or set the catalog to automatic or none", "in this database"),
        (
            "set the catalog to automatic, or takeover to immediate",
            "unset DSYNC_CATALOG, or set DSYNC_TAKEOVER to immediate",
        ),
        ("set the catalog to automatic", "unset DSYNC_CATALOG"),
        ("set takeover to after-promotion", "unset DSYNC_TAKEOVER"),
        ("set the catalog to", "set DSYNC_CATALOG to"),
        ("(Config::schema, DSYNC_SCHEMA)", "(--schema, DSYNC_SCHEMA)"),
        ("the next start makes it", "the first `run` or `lead` makes it"),
        ("the next start brings it", "the next `run` or `lead` brings it"),
        ("(CatalogMode::MustExist)", "(`run` and `lead` make it where DSYNC_CATALOG is not set)"),
        (", or leave LockOptions::without_token out", ""),
        (
            "the manager was told to do without the catalog, or the lock without a token",
            "DSYNC_CATALOG is none",
        ),
        ("the manager was told to do without", "DSYNC_CATALOG is none"),
        ("sync manager failed to start: ", ""),
        ("see Config::from_env", "the README of pgdsync has a table of them"),
        ("or quorum to server", "or leave --quorum and DSYNC_QUORUM out"),
        (
            "give a TLS connector (a feature such as tls-rustls-ring makes one) and set sslmode=require",
            "set sslmode=require",
        ),
        ("set Config::quorum to Quorum::Server", "leave --quorum and DSYNC_QUORUM out"),
        (
            "lower the first, or raise the second:",
            "lower the first; the second is the number of keys and 2 for `run` and `lead`, else DSYNC_MAX_SESSIONS:",
        ),
        ("change it for all with set_permits()", "change it for all with `pgdsync permits KEY N`"),
        ("(Config::takeover)", "(DSYNC_TAKEOVER)"),
        (" (in a program, Config::takeover to TakeoverPolicy::AfterPromotion)", ""),
        (" (in a program, Config::takeover to TakeoverPolicy::AfterAnyRestart)", ""),
        (
            "set Config::quorum to Quorum::NamedStandbys, or DSYNC_QUORUM to named-standbys",
            "give --quorum, or set DSYNC_QUORUM=named-standbys",
        ),
        ("give a TLS connector that is set up so with Config::tls, or unset it", "unset it"),
        ("this build of the library has no TLS", "this pgdsync was built without TLS"),
        (
            "switch on one of the features tls-rustls-ring, tls-rustls-aws-lc-rs and \
             tls-native-tls of the package dsync-postgres, or give a TLS connector with Config::tls or Config::tls_with",
            "build it with its feature tls",
        ),
    ];
    WORDS.iter().fold(text.to_owned(), |text, (theirs, ours)| text.replace(theirs, ours))
}

impl From<dsync::Error> for Failure {
    fn from(error: dsync::Error) -> Self {
        use dsync::ErrorKind as Kind;
        let code = match error.kind() {
            Kind::InvalidKey | Kind::InvalidConfig | Kind::WouldDeadlock => USAGE,
            Kind::LockUnavailable | Kind::Cancelled => CONFLICT,
            Kind::Lost | Kind::UnlockFailed => LOST,
            _ => UNAVAILABLE,
        };
        Self::new(code, in_our_words(&format!("{error:#}")))
    }
}

impl From<io::Error> for Failure {
    /// That standard output is closed is no failure: whoever reads it, such as `head`, has had enough.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::new(0, ""),
            _ => Self::new(OUTPUT, format!("standard output cannot be written: {error}")),
        }
    }
}
