//! What the library logs, on standard error.

use std::io::{self, Write};

use crate::exit::{in_our_words, write_in_passing};
use crate::text::harmless;

/// The library's warnings. What we tell ourselves is not told twice.
pub(crate) const WARNINGS: &str = "warn,dsync::pg::registry=error,dsync::pg::inspect=error,dsync::pg::pool=error,dsync::pg::config::validate=error";
/// What a command under a lock may be told beside: what is wrong with the environment. `flock` is silent, too.
pub(crate) const SETTINGS: &str = "off,dsync::pg::config=warn";
/// All that happens to a lock. Of a leader the user is told as it is, and not in the words for closures; and a server that is away at the start is
/// not waited for.
pub(crate) const EVENTS: &str = "info,dsync::leader=off,dsync::pg::registry=error";

/// Begins to log what `RUST_LOG` asks for, or else the usual.
pub(crate) fn start(usual: &str) {
    start_to(usual, env_logger::Target::Stderr);
}

/// The same for a process that watches over a command, which a terminal that was stopped holds up nowhere.
pub(crate) fn start_in_passing(usual: &str) {
    start_to(usual, env_logger::Target::Pipe(Box::new(InPassing)));
}

fn start_to(usual: &str, target: env_logger::Target) {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(usual))
        .format(|line, record| {
            let level = record.level().as_str().to_lowercase();
            writeln!(line, "pgdsync: {level}: {}", harmless(&in_our_words(&record.args().to_string())))
        })
        .target(target)
        .init();
}

/// Standard error, for as long as it takes what is written.
struct InPassing;

impl Write for InPassing {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        write_in_passing(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
