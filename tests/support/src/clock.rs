//! Processes whose clock is wrong.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::error::{Error, Result};

/// Sets the clock of a process that is to be started so many hours ahead, or back. What counts time from some moment on, as timeouts do,
/// is not touched.
///
/// # Errors
/// When libfaketime is missing.
pub fn set_ahead(command: &mut Command, hours: i32) -> Result<()> {
    let library = library().ok_or_else(|| {
        Error::missing("a process can't be given another clock here: on Linux `apt-get install faketime`")
    })?;
    command
        .env("LD_PRELOAD", library)
        .env("FAKETIME", format!("{hours:+}h"))
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    Ok(())
}

fn library() -> Option<PathBuf> {
    const NAME: &str = "faketime/libfaketimeMT.so.1";
    let folders = ["/usr/lib", "/usr/lib64", "/usr/local/lib"];
    // Debian has a folder for each architecture.
    let inner = fs::read_dir("/usr/lib").into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    folders.iter().map(PathBuf::from).chain(inner).map(|folder| folder.join(NAME)).find(|file| file.is_file())
}
