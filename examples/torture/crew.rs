//! The worker processes: started, killed, frozen, thawed, and never left behind.

use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use support::process::{Signal, id_of, signal};

use crate::report::Report;

pub(crate) const WORKERS: usize = 4;

/// Within which a worker ends by itself when it is told to: its calls are cancelled, a release and the stop of the
/// manager take 2 s each at the most, and the threads of r2d2's pool may take 40 s to end.
const PATIENCE: Duration = Duration::from_secs(55);

/// What is heard of the workers.
pub(crate) enum Heard {
    Report {
        worker: usize,
        report: Report,
    },
    /// Its process, the one with this id, has closed its output.
    Left {
        worker: usize,
        pid: u32,
    },
}

/// Makes the command of a worker, from its place.
pub(crate) type Recruiter<'a> = &'a dyn Fn(usize) -> io::Result<Command>;

pub(crate) struct Crew<'a> {
    recruit: Recruiter<'a>,
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
    pub(crate) fn start(recruit: Recruiter<'a>) -> io::Result<Self> {
        let (reports_to, heard) = unbounded();
        let mut crew = Self { recruit, workers: Vec::new(), heard, reports_to };
        for worker in 0..WORKERS {
            crew.workers.push(crew.spawn(worker)?);
        }
        Ok(crew)
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

    /// Stops the process where it is (SIGSTOP).
    pub(crate) fn freeze(&self, worker: usize) -> support::Result<()> {
        signal(id_of(&self.workers[worker].process), Signal::Stop)
    }

    /// Lets it go on (SIGCONT).
    pub(crate) fn thaw(&self, worker: usize) -> support::Result<()> {
        signal(id_of(&self.workers[worker].process), Signal::Continue)
    }

    /// Tells all to end and waits until they have. Says which did not, or not well.
    pub(crate) fn dismiss(&mut self) -> Vec<String> {
        for worker in &mut self.workers {
            worker.lifeline = None;
        }
        let mut faults = Vec::new();
        for (place, worker) in self.workers.iter_mut().enumerate() {
            match support::wait_for("its end", PATIENCE, || worker.process.try_wait().transpose()) {
                Ok(Ok(status)) if status.success() => {}
                Ok(Ok(status)) => faults.push(format!("worker {place} ended with {status}")),
                Ok(Err(error)) => faults.push(format!("worker {place}: {error}")),
                Err(error) => {
                    faults.push(format!("worker {place} was told to end and did not: {error}"));
                }
            }
            if let Err(error) = worker.end() {
                faults.push(format!("worker {place}: {error}"));
            }
        }
        faults
    }

    fn spawn(&self, worker: usize) -> io::Result<Worker> {
        let mut process = (self.recruit)(worker)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            // A group of its own: a Ctrl-C ends us alone, and the worker sees its lifeline cut and ends in order. One
            // that is frozen is ended by the kernel, which wakes the stopped processes of a group that our death
            // leaves alone.
            .process_group(0)
            .spawn()?;
        let pid = process.id();
        let lifeline = process.stdin.take();
        let listener = process.stdout.take().map(|pipe| {
            let tell = self.reports_to.clone();
            thread::spawn(move || listen(worker, pid, pipe, &tell))
        });
        Ok(Worker { process, lifeline, listener })
    }
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
    let mut pipe = BufReader::new(pipe);
    let mut line = String::new();
    while pipe.read_line(&mut line).is_ok_and(|length| length > 0) {
        if let Some(report) = Report::read(&line) {
            let _ = tell.send(Heard::Report { worker, report });
        }
        line.clear();
    }
    let _ = tell.send(Heard::Left { worker, pid });
}
