//! Runs the program, and holds locks for it to look at.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dsync::crossbeam_channel::{Receiver, unbounded};
use dsync::{Config, Context, ErrorKind, Key, Lock, LockGuard, PostgresManager};
use support::process::Signal;

/// What should happen has this long, so that a fault is a failed test and not a hung one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The program, with an environment that is of no influence.
pub(crate) fn pgdsync(arguments: &[&str]) -> Command {
    let program = env!("CARGO_BIN_EXE_pgdsync");
    let mut command = if cfg!(target_os = "linux") {
        // It heeds signals that whoever started the tests has ignored, as a shell does for what runs in the background.
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP,INT,QUIT,TERM", program]);
        command
    } else {
        Command::new(program)
    };
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let is_known = ["DATABASE_URL", "RUST_LOG", "COLUMNS", "NO_COLOR"].contains(&&*text);
        if text.starts_with("PG") || text.starts_with("DSYNC_") || is_known {
            command.env_remove(&name);
        }
    }
    command.env("HOME", "/nonexistent").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What became of a run.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// The output of a run that must have succeeded in silence.
    #[track_caller]
    pub(crate) fn well(self) -> String {
        assert!(self.code == Some(0) && self.err.is_empty(), "{self:#?}");
        self.out
    }

    /// A failure with this exit code, whose text has all of these, on a line of its own.
    #[track_caller]
    pub(crate) fn badly(self, code: i32, told: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for text in told {
            assert!(self.err.contains(text), "{text:?} is missing: {self:#?}");
        }
    }
}

pub(crate) fn run(command: &mut Command) -> Ran {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: status.code(), out: text(stdout), err: text(stderr) }
}

/// A run of the program against this database.
pub(crate) fn at(url: &str, arguments: &[&str]) -> Ran {
    run(pgdsync(arguments).env("DATABASE_URL", url))
}

/// A program that runs, killed when dropped.
pub(crate) struct Running {
    child: Child,
    pub(crate) out: Receiver<String>,
    pub(crate) err: Receiver<String>,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let (out, err) = (lines(child.stdout.take().unwrap()), lines(child.stderr.take().unwrap()));
        Self { child, out, err }
    }

    pub(crate) fn id(&self) -> i32 {
        support::process::id_of(&self.child)
    }

    /// Ends it by a signal, and gives its exit code: none if the signal itself ended it.
    pub(crate) fn end(mut self, signal: Signal) -> Option<i32> {
        support::process::signal(self.id(), signal).unwrap();
        let ended = support::wait_for("the program's end", PATIENCE, || self.child.try_wait().ok().flatten());
        ended.unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = unbounded();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

/// The next line, which must have all of these.
#[track_caller]
pub(crate) fn next(lines: &Receiver<String>, texts: &[&str]) -> String {
    let line = lines.recv_timeout(PATIENCE).expect("a line");
    for text in texts {
        assert!(line.contains(text), "{text:?} is missing: {line}");
    }
    line
}

pub(crate) fn started(url: &str) -> PostgresManager {
    // Slices longer than a test, so that nobody changes places.
    PostgresManager::connect(Config::from_url(url).unwrap().wait_slice(Duration::from_secs(60))).unwrap()
}

pub(crate) fn hold(manager: &PostgresManager, key: impl Into<Key>) -> LockGuard {
    manager.lock(key).unwrap().acquire(PATIENCE).unwrap()
}

/// Begins to wait for a lock, and has its place in the queue when this returns.
pub(crate) fn queue(manager: &PostgresManager, key: &Key) -> Arc<dyn Lock> {
    let before = manager.inspect(key.clone()).unwrap().waiters.len();
    let lock = manager.lock(key.clone()).unwrap();
    assert_eq!(lock.try_lock(&Context::background()).unwrap_err().kind(), ErrorKind::LockUnavailable);
    let has_place = || (manager.inspect(key.clone()).unwrap().waiters.len() > before).then_some(());
    support::wait_for("a place in the queue", PATIENCE, has_place).unwrap();
    lock
}
