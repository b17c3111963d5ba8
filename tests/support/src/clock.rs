//! Processes whose clock is wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::process;

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
    tidy_up();
    Ok(())
}

/// The library has shared memory for each process, named after its id. What a killed process of another user has left keeps one that gets the
/// same id from starting.
fn tidy_up() {
    for file in fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        let name = file.file_name();
        let of = name
            .to_str()
            .and_then(|name| name.strip_prefix("faketime_shm_").or(name.strip_prefix("sem.faketime_sem_")));
        if of.and_then(|id| id.parse().ok()).is_some_and(|id| !process::is_alive(id)) {
            // It may be another user's.
            let _ = fs::remove_file(file.path());
        }
    }
}

/// Has the clock of a process, and of those that it starts, be as a file says, as often as that changes: `+1h`, say. What counts time
/// from some moment on is not touched.
///
/// # Errors
/// When libfaketime is missing.
pub fn set_by(command: &mut Command, file: &Path) -> Result<()> {
    set_ahead(command, 0)?;
    command.env_remove("FAKETIME").env("FAKETIME_TIMESTAMP_FILE", file).env("FAKETIME_NO_CACHE", "1");
    Ok(())
}

fn library() -> Option<PathBuf> {
    const NAME: &str = "faketime/libfaketimeMT.so.1";
    let folders = ["/usr/lib", "/usr/lib64", "/usr/local/lib"];
    // Debian has a folder for each architecture.
    let inner = fs::read_dir("/usr/lib").into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    folders.iter().map(PathBuf::from).chain(inner).map(|folder| folder.join(NAME)).find(|file| file.is_file())
}
