//! The process that becomes the command: it stands still until the keeper will know of its group.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use rustix::process::{Signal, getpid, getppid, kill_process};

use super::signals;
use crate::exit::say;

/// What a shell says of a command that is there and cannot be executed, and of one that is not there.
const CANNOT_EXECUTE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Becomes the command. The arguments are the number of the process that started this one, the signals to let through, and the
/// command.
pub(super) fn become_command(arguments: &[OsString]) -> ExitCode {
    let [parent, signals, program, rest @ ..] = arguments else { return ExitCode::from(CANNOT_EXECUTE) };
    let is_alone = || {
        let now = getppid().map_or(0, |parent| parent.as_raw_nonzero().get());
        parent.to_str() != Some(now.to_string().as_str())
    };
    // While it stands still nobody else would end it.
    end_with_parent(Some(Signal::KILL));
    if is_alone() || kill_process(getpid(), Signal::STOP).is_err() {
        return ExitCode::from(CANNOT_EXECUTE);
    }
    end_with_parent(None);
    // The system continues those whose parent is gone, and of this one the keeper may not know then.
    if is_alone() {
        return ExitCode::from(CANNOT_EXECUTE);
    }
    signals::let_through(&signals.to_string_lossy());
    let error = Command::new(program).args(rest).exec();
    say(&format!("cannot run {}: {error}", program.display()));
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_EXECUTE })
}

/// Elsewhere than on Linux a parent that is killed in the moment before the stop leaves a process that stands still.
fn end_with_parent(signal: Option<Signal>) {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_parent_process_death_signal(signal);
    #[cfg(not(target_os = "linux"))]
    let _ = signal;
}
