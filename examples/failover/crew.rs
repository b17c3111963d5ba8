//! The worker processes: started, killed, frozen, thawed, and never left behind.

use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use support::process::{Signal, id_of, signal};

use crate::report::Report;

/// The names of the workers. Everywhere else a worker is its place in this list.
pub(crate) const NAMES: [&str; 3] = ["ada", "bob", "cleo"];

/// How long a worker may take to end by itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is heard of the workers.
pub(crate) enum Heard {
    Report {
        worker: usize,
        report: Report,
    },
    /// It said something that makes no sense.
    Nonsense(String),
    /// Its process, the one with this id, has closed its output.
    Left {
        worker: usize,
        pid: u32,
    },
}

/// Makes the command that starts a worker.
type Launch<'a> = Box<dyn Fn(usize) -> io::Result<Command> + 'a>;

pub(crate) struct Crew<'a> {
    launch: Launch<'a>,
    workers: Vec<Worker>,
    heard: Receiver<Heard>,
    reports_to: Sender<Heard>,
}

struct Worker {
    process: Child,
    /// Tells it to end when it is closed, as it is when we die, however we die.
    lifeline: Option<ChildStdin>,
    listener: Option<JoinHandle<()>>,
}

impl<'a> Crew<'a> {
    /// Without a worker yet. `launch` makes the command for each, by [`command`] at the end.
    pub(crate) fn new(launch: impl Fn(usize) -> io::Result<Command> + 'a) -> Self {
        let (reports_to, heard) = unbounded();
        Self { launch: Box::new(launch), workers: Vec::new(), heard, reports_to }
    }

    /// Starts the next `count` of the workers.
    pub(crate) fn start(&mut self, count: usize) -> io::Result<()> {
        for _ in 0..count {
            let worker = self.spawn(self.workers.len())?;
            self.workers.push(worker);
        }
        Ok(())
    }

    pub(crate) fn heard(&self) -> &Receiver<Heard> {
        &self.heard
    }

    /// Whether this is the process of the worker, rather than one that it had before or one that was told to end.
    pub(crate) fn is_missing(&self, worker: usize, pid: u32) -> bool {
        self.workers[worker].process.id() == pid && self.workers[worker].lifeline.is_some()
    }

    /// Kills the process without warning (SIGKILL). All that it reported has been heard when this returns.
    pub(crate) fn kill(&mut self, worker: usize) -> io::Result<()> {
        self.workers[worker].end()
    }

    /// Starts the worker anew, as a service manager would.
    pub(crate) fn revive(&mut self, worker: usize) -> io::Result<()> {
        self.workers[worker] = self.spawn(worker)?;
        Ok(())
    }

    /// Stops the process where it is (SIGSTOP), as a paused virtual machine or a starved one would.
    pub(crate) fn freeze(&self, worker: usize) -> support::Result<()> {
        signal(id_of(&self.workers[worker].process), Signal::Stop)
    }

    /// Lets it go on (SIGCONT).
    pub(crate) fn thaw(&self, worker: usize) -> support::Result<()> {
        signal(id_of(&self.workers[worker].process), Signal::Continue)
    }

    /// Tells all to end and waits until they have. Says which did not, or not well.
    pub(crate) fn dismiss(&mut self) -> Result<(), String> {
        for worker in &mut self.workers {
            worker.lifeline = None;
        }
        for (worker, name) in self.workers.iter_mut().zip(NAMES) {
            let ended = support::wait_for("its end", PATIENCE, || worker.process.try_wait().transpose());
            match ended {
                Ok(Ok(status)) if status.success() => {}
                Ok(Ok(status)) => return Err(format!("{name} ended with {status}")),
                Ok(Err(error)) => return Err(format!("{name}: {error}")),
                Err(error) => return Err(format!("{name} was told to end and did not: {error}")),
            }
            worker.end().map_err(|error| format!("{name}: {error}"))?;
        }
        Ok(())
    }

    fn spawn(&self, worker: usize) -> io::Result<Worker> {
        let mut process = (self.launch)(worker)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A group of its own: a Ctrl-C ends us alone, and then the worker sees its lifeline cut and ends in order. One
            // that is frozen is ended by the kernel, which sends SIGHUP and SIGCONT to the stopped processes of a group
            // that our death leaves alone (POSIX calls it orphaned).
            .process_group(0)
            .spawn()?;
        let pid = process.id();
        let lifeline = process.stdin.take();
        let listener = match process.stdout.take() {
            Some(pipe) => {
                let tell = self.reports_to.clone();
                Some(thread::spawn(move || listen(worker, pid, pipe, &tell)))
            }
            None => None,
        };
        Ok(Worker { process, lifeline, listener })
    }
}

/// The rest of a command that has begun with this very program: arguments that `main` knows.
pub(crate) fn command(mut program: Command, worker: usize, url: &str) -> Command {
    // In the environment rather than an argument: it may hold a password.
    program.args(["worker", NAMES[worker]]).env("DATABASE_URL", url);
    program
}

impl Worker {
    /// Kills the process if it lives, and sees its output to the end.
    fn end(&mut self) -> io::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.lifeline = None;
        if let Some(listener) = self.listener.take() {
            // It cannot have panicked, and there would be nothing to do about it.
            let _ = listener.join();
        }
        Ok(())
    }
}

impl Drop for Worker {
    /// Also after a panic. SIGKILL ends a frozen process as well.
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Passes on what a worker says until its output ends. A send fails only when nobody listens any more.
fn listen(worker: usize, pid: u32, pipe: ChildStdout, tell: &Sender<Heard>) {
    for line in BufReader::new(pipe).lines().map_while(Result::ok) {
        let heard = match line.parse() {
            Ok(report) => Heard::Report { worker, report },
            Err(error) => Heard::Nonsense(error),
        };
        let _ = tell.send(heard);
    }
    let _ = tell.send(Heard::Left { worker, pid });
}
