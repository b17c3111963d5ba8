//! A tiny process that outlives us and cleans up: after a drop, an `exit`, a Ctrl-C or a `kill -9` alike.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::wait::wait_for;

/// What it does when we are gone, for whatever lives in a folder.
const FOLDER_SCRIPT: &str = include_str!("watcher.sh");

/// Longer than the script can take: it waits ten seconds for the program and five for the folder.
const PATIENCE: Duration = Duration::from_secs(20);

/// Our end of the pipe whose closing the watcher waits for.
///
/// No process of ours inherits it, since std opens its pipes with close-on-exec. Destructors of statics don't run, and
/// nothing runs after SIGKILL, but the kernel closes a dead process's pipes always: this is why cleaning up is done on
/// the pipe's other side, and *only* there, so that the rare ways to end are exercised by every ordinary drop.
#[derive(Debug)]
pub(crate) struct Watcher {
    process: Mutex<Child>,
    pipe: Mutex<Option<ChildStdin>>,
}

impl Watcher {
    /// Watches over a folder and the program that runs in it.
    pub(crate) fn over_folder(folder: &std::path::Path) -> Result<Self> {
        let mut command = shell(FOLDER_SCRIPT);
        command.arg(folder);
        Self::start(command)
    }

    /// Runs a shell script, which must begin by reading its standard input to the end.
    pub(crate) fn with_script(script: &str, arguments: &[&str]) -> Result<Self> {
        let mut command = shell(script);
        command.args(arguments);
        Self::start(command)
    }

    fn start(mut command: Command) -> Result<Self> {
        let mut process =
            command.spawn().map_err(Error::because("can't start `sh`, which cleans up after servers"))?;
        let pipe = process.stdin.take();
        Ok(Self { process: Mutex::new(process), pipe: Mutex::new(pipe) })
    }

    /// Tells what there is to clean up now; see the script for the lines that it knows.
    pub(crate) fn tell(&self, what: &str, ids: &[i32]) -> Result<()> {
        let mut line = what.to_owned();
        for id in ids {
            line.push_str(&format!(" {id}"));
        }
        line.push('\n');
        match self.pipe.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(pipe) => pipe
                .write_all(line.as_bytes())
                .map_err(Error::because("the process that cleans up after servers has gone; who killed it?")),
            None => Err(Error::new("the server is being dropped")),
        }
    }

    /// Lets it clean up, and waits until it has: a bounded time.
    pub(crate) fn finish(&self) {
        drop(self.pipe.lock().unwrap_or_else(PoisonError::into_inner).take());
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody could be told of a failure here; the watcher goes on by itself.
        let _ = wait_for("the watcher", PATIENCE, || process.try_wait().ok().flatten());
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.finish();
    }
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command
        // Not as an argument, so that a list of processes stays readable.
        .env("DSYNC_WATCHER", script)
        .args(["-c", "eval \"$DSYNC_WATCHER\"", "dsync-test-watcher"])
        // A group of its own: a Ctrl-C at the terminal reaches the group of the tests.
        .process_group(0)
        .current_dir("/")
        .stdin(Stdio::piped())
        // An open output would make `cargo test | tee` wait for us.
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}
