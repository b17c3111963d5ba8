//! A server's life: made, launched, stopped, launched again, and gone.

use std::process::Child;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use super::{Builder, LOG, Server, locked, template};
use crate::account::Account;
use crate::binaries::Binaries;
use crate::error::{Error, Result};
use crate::folder::{Keeps, last_lines};
use crate::process::{self, Signal};
use crate::program::Workshop;
use crate::wait::{PAUSE, wait_for};
use crate::{port, random};

/// How long a server may take to begin or to end.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// How long a server waits to get its old port and its shared memory back.
const COMEBACK: Duration = Duration::from_secs(15);

/// How many ports to try; somebody else has to be quicker than we are each time.
const PORTS: usize = 10;

/// How to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Waits until all clients have left (SIGTERM).
    Smart,
    /// Ends all sessions and writes everything to disk (SIGINT).
    Fast,
    /// Ends all processes at once; the next start recovers (SIGQUIT).
    Immediate,
}

impl Shutdown {
    fn signal(self) -> Signal {
        match self {
            Self::Smart => Signal::Terminate,
            Self::Fast => Signal::Interrupt,
            Self::Immediate => Signal::Quit,
        }
    }
}

/// Why a server isn't running after all.
enum Failure {
    /// The port belongs to somebody else.
    PortTaken(Error),
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Server {
    pub(super) fn create(plan: Builder) -> Result<Self> {
        let password = if plan.password { Some(random::password()?) } else { None };
        let server = Self::prepare(Binaries::find()?, plan, password)?;
        server.initialise()?;
        server.configure()?;
        server.begin()
    }

    /// A server with a folder and a port, and no data yet.
    pub(super) fn prepare(binaries: Binaries, plan: Builder, password: Option<String>) -> Result<Self> {
        let account = Account::choose()?;
        let netns = plan.inside.as_ref().map(|inside| inside.name.clone());
        let keeps = if plan.durable { Keeps::OnDisk } else { Keeps::ForNow };
        let workshop = Workshop::open("dsync-pg-", account, keeps)?.inside(netns);
        workshop.folder.subfolder("s", 0o755)?;
        Ok(Self {
            binaries,
            plan,
            port: port::free()?,
            password,
            postmaster: Mutex::new(None),
            orphans: Mutex::new(Vec::new()),
            freezes: Mutex::new(0),
            databases: AtomicU64::new(0),
            workshop,
        })
    }

    fn initialise(&self) -> Result<()> {
        match &self.password {
            None => template::fill(&self.workshop, &self.binaries, &self.data_dir()),
            Some(password) => {
                let file = self.workshop.folder.write("password", password, 0o600)?;
                let more = [format!("--pwfile={}", file.display())];
                template::initialise(&self.workshop, &self.binaries, &self.data_dir(), &more)
            }
        }
    }

    /// The first launch, with as many ports as it takes.
    pub(super) fn begin(mut self) -> Result<Self> {
        for _ in 1..PORTS {
            match self.launch() {
                Ok(()) => return Ok(self),
                Err(Failure::Other(error)) => return Err(error),
                Err(Failure::PortTaken(_)) => {
                    self.port = port::free()?;
                    self.append("postgresql.conf", &self.place())?;
                }
            }
        }
        match self.launch() {
            Ok(()) => Ok(self),
            Err(Failure::PortTaken(error) | Failure::Other(error)) => Err(error),
        }
    }

    /// Launches a server that was stopped or killed, on the same port, and waits until it takes connections.
    ///
    /// # Errors
    /// When it's running, or doesn't start: a backend of a killed postmaster may go on for a while, for example.
    pub fn start_again(&self) -> Result<()> {
        if self.is_running() {
            return Err(Error::new("the server is running; stop it first"));
        }
        let lingering = || locked(&self.orphans).iter().copied().find(|&pid| process::is_alive(pid));
        wait_for("the last backends of the killed server", COMEBACK, || lingering().is_none().then_some(()))
            .map_err(Error::because(
                "processes of the killed server still run: thaw them, or use `kill_hard`",
            ))?;
        // Their ids will be others'.
        locked(&self.orphans).clear();
        let started = Instant::now();
        loop {
            match self.launch() {
                Ok(()) => return Ok(()),
                // An outgoing connection of somebody may have got hold of it.
                Err(Failure::PortTaken(_)) if started.elapsed() < COMEBACK => thread::sleep(PAUSE),
                Err(Failure::PortTaken(error) | Failure::Other(error)) => return Err(error),
            }
        }
    }

    /// Stops a server and launches it again.
    ///
    /// # Errors
    /// Like [`stop`](Self::stop) and [`start_again`](Self::start_again).
    pub fn restart(&self, how: Shutdown) -> Result<()> {
        self.stop(how)?;
        self.start_again()
    }

    /// Stops the server and waits until all its processes have ended. If it's stopped already, nothing happens.
    ///
    /// # Errors
    /// When it hasn't ended after a minute: `Smart` waits for clients, and a frozen server takes note of nothing but
    /// `Immediate`, for which it's woken.
    pub fn stop(&self, how: Shutdown) -> Result<()> {
        if how == Shutdown::Immediate {
            self.wake();
        }
        self.signal_postmaster(how.signal())?;
        wait_for("the server's end", PATIENCE, || (!self.is_running()).then_some(())).map_err(Error::because(
            format!(
                "the server ignores the order to stop ({how:?}): are there clients left, or is it frozen?"
            ),
        ))
    }

    /// Whether the postmaster lives. It may be frozen all the same.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let mut postmaster = locked(&self.postmaster);
        let Some(child) = postmaster.as_mut() else { return false };
        if matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        *postmaster = None;
        // Fails if the watcher was killed: nothing to tell anybody then.
        let _ = self.workshop.has_ended();
        false
    }

    /// The postmaster's process id, while it lives.
    #[must_use]
    pub fn postmaster_pid(&self) -> Option<i32> {
        if self.is_running() { locked(&self.postmaster).as_ref().map(process::id_of) } else { None }
    }

    /// Sends a signal to the postmaster if it lives.
    pub(super) fn signal_postmaster(&self, signal: Signal) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        match locked(&self.postmaster).as_ref() {
            Some(child) => process::signal(process::id_of(child), signal),
            None => Ok(()),
        }
    }

    fn launch(&self) -> std::result::Result<(), Failure> {
        let old_log = self.log().len();
        let mut postmaster = locked(&self.postmaster);
        if postmaster.is_some() {
            return Err(Error::new("the server is being started by another thread").into());
        }
        *postmaster = Some(self.spawn()?);
        drop(postmaster);
        let new_log = || self.log().get(old_log..).unwrap_or_default().to_owned();
        let started = Instant::now();
        // Over the Unix socket, which nobody else has: on the TCP port somebody else's server might answer.
        while let Err(error) = self.client() {
            if !self.is_running() {
                return Err(self.failure("doesn't start", &new_log()));
            }
            if started.elapsed() > PATIENCE {
                return Err(self.failure(&format!("doesn't take connections ({error})"), &new_log()));
            }
            thread::sleep(PAUSE);
        }
        // With several addresses, PostgreSQL contents itself with those that it gets.
        if new_log().contains("could not bind") {
            self.stop(Shutdown::Immediate)?;
            return Err(self.failure("doesn't get all its addresses", &new_log()));
        }
        Ok(())
    }

    fn spawn(&self) -> Result<Child> {
        let arguments = ["-D".to_owned(), self.data_dir().display().to_string()];
        self.workshop.start(&self.binaries.program("postgres"), &arguments, LOG)
    }

    fn failure(&self, what: &str, log: &str) -> Failure {
        let error = Error::new(format!(
            "the PostgreSQL server on port {} {what}; the last lines of its log:\n{}",
            self.port,
            last_lines(log)
        ));
        if log.contains("Address already in use") { Failure::PortTaken(error) } else { Failure::Other(error) }
    }
}

impl Drop for Server {
    /// Ends the server within a bounded time and removes its folder. What fails here is left to the watcher, which
    /// tries it by itself; [`Server::stop`] tells of failures.
    fn drop(&mut self) {
        self.wake();
        let _ = self.signal_postmaster(Signal::Quit);
        // PostgreSQL itself kills what hasn't ended five seconds after the order.
        let _ = wait_for("the server's end", Duration::from_secs(10), || (!self.is_running()).then_some(()));
        self.workshop.watcher.finish();
        // Usually the watcher has brought it to an end by now; a zombie should not stay.
        if let Some(mut child) = locked(&self.postmaster).take() {
            let _ = child.try_wait();
        }
    }
}
