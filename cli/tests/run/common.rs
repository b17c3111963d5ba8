//! Starting the program, and what is seen of it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use support::process::{Signal, signal};
use support::{Server, wait_for};

/// For what takes a moment on a machine that has the time for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A lease as short as a busy machine can renew, and a time to end that fits.
pub(crate) const LEASE: Duration = Duration::from_secs(7);
pub(crate) const SHORT: [&str; 2] = ["--lease=7s", "--kill-after=1s"];

/// The program, which reaches this server and is told nothing else by the environment.
pub(crate) fn pgdsync(url: &str) -> Command {
    clean(heeding(env!("CARGO_BIN_EXE_pgdsync")), url)
}

/// A program that heeds signals. What whoever started the tests has ignored, as `nohup` does, would be ignored by it, too.
pub(crate) fn heeding(program: &str) -> Command {
    if cfg!(target_os = "linux") {
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP,INT,QUIT,TERM", program]);
        command
    } else {
        Command::new(program)
    }
}

/// A command whose environment names this server.
pub(crate) fn clean(mut command: Command, url: &str) -> Command {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if ["PG", "DSYNC_", "RUST_LOG"].iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command.env("DATABASE_URL", url).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `pgdsync` with these arguments, to its end.
pub(crate) fn run<S: AsRef<OsStr>>(url: &str, arguments: impl IntoIterator<Item = S>) -> Output {
    pgdsync(url).args(arguments).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A file that is not there, whose folder is.
pub(crate) fn new_file(name: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("{name}-{}-{number}", support::process::own()));
    let _ = fs::remove_file(&path);
    path
}

/// A line that a process said, and when.
pub(crate) type Line = (Instant, String);

/// A process, killed when dropped. What it says comes line by line.
pub(crate) struct Process {
    pub(crate) child: Child,
    lines: Receiver<Line>,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let (sender, lines) = channel();
        let stderr = child.stderr.take().map(|output| Box::new(output) as Box<dyn Read + Send>);
        let stdout = child.stdout.take().map(|output| Box::new(output) as Box<dyn Read + Send>);
        for output in stdout.into_iter().chain(stderr) {
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let _ = sender.send((Instant::now(), line));
                }
            });
        }
        Self { child, lines }
    }

    pub(crate) fn id(&self) -> i32 {
        support::process::id_of(&self.child)
    }

    /// The process that has the lock.
    pub(crate) fn keeper(&self) -> i32 {
        let is_keeper = |process: &i32| {
            fs::read(format!("/proc/{process}/cmdline")).is_ok_and(|line| text(&line).contains("__keep"))
        };
        let find = || support::process::children(self.id()).into_iter().find(is_keeper);
        wait_for("the keeper", PATIENCE, find).unwrap()
    }

    /// Waits for a line with `part` in it.
    pub(crate) fn says(&self, part: &str) -> Line {
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.1.contains(part) => return line,
                Ok(line) => heard.push(line.1),
                Err(_) => panic!("the process does not say {part:?}, but:\n{}", heard.join("\n")),
            }
        }
    }

    /// What it says until nobody has its outputs open.
    pub(crate) fn rest(&self) -> Vec<String> {
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => heard.push(line.1),
                Err(RecvTimeoutError::Disconnected) => return heard,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("its outputs stay open; it said:\n{}", heard.join("\n"))
                }
            }
        }
    }

    pub(crate) fn ends(&mut self) -> ExitStatus {
        wait_for("the end of the process", PATIENCE, || self.child.try_wait().unwrap()).unwrap()
    }

    pub(crate) fn signal(&self, which: Signal) {
        signal(self.id(), which).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs what follows as the first process of a container. Linux, as root.
pub(crate) fn contained() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]);
    command
}

/// Whether that can be had here; says so if not.
pub(crate) fn can_contain() -> bool {
    let can_contain = contained().arg("true").status().is_ok_and(|status| status.success());
    if !can_contain {
        support::skip("unshare(1) makes no namespace of processes here; run as root, with util-linux");
    }
    can_contain
}

/// How many sessions have or want an advisory lock.
pub(crate) fn sessions(server: &Server, granted: bool) -> i64 {
    let query = "SELECT count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory' AND granted = $1";
    server.client().unwrap().query_one(query, &[&granted]).unwrap().get(0)
}

pub(crate) fn becomes<T: PartialEq + std::fmt::Debug>(what: &str, wanted: &T, get: impl Fn() -> T) {
    wait_for(&format!("{what} to be {wanted:?}"), PATIENCE, || (get() == *wanted).then_some(())).unwrap();
}
