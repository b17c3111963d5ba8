//! Tests that cannot run for want of a tool.

use std::env;
use std::fmt::Display;
use std::io::{self, Write as _};
use std::thread;

use crate::error::Result;

/// Says in a line on standard error that the test of this thread is left out, and why. The line is there without `--nocapture`, too.
///
/// # Panics
/// Where `CI=true`: nothing may be skipped there.
pub fn skip(reason: impl Display) {
    assert!(env::var("CI").as_deref() != Ok("true"), "nothing may be skipped here: {reason}");
    let thread = thread::current();
    let line = format!("SKIPPED {}: {reason}\n", thread.name().unwrap_or("a test"));
    // The harness keeps to itself what `eprintln` writes in a test that passes. In one piece, since other tests write, too.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Whether what a test needs is missing. Then it has said so, and returns:
///
/// ```
/// if support::skip_without(support::pgbouncer::available()) {
///     return;
/// }
/// ```
///
/// # Panics
/// Like [`skip`].
pub fn skip_without(available: Result<()>) -> bool {
    available.map_err(skip).is_err()
}
