//! A real pgbouncer in front of a server.

use std::env;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::account::Account;
use crate::error::{Error, Result};
use crate::folder::{Keeps, last_lines};
use crate::port;
use crate::process::{self, Signal};
use crate::program::Workshop;
use crate::server::Server;
use crate::wait::{PAUSE, wait_for};

const LOG: &str = "log";
const PATIENCE: Duration = Duration::from_secs(20);
/// How many ports to try; somebody else has to be quicker than we are each time.
const PORTS: usize = 10;

/// When a server's session goes back to the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// When the client leaves.
    Session,
    /// At the end of each transaction: session-level advisory locks are not the client's own.
    Transaction,
    /// At the end of each statement.
    Statement,
}

impl PoolMode {
    fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Transaction => "transaction",
            Self::Statement => "statement",
        }
    }
}

/// A running pgbouncer; dropping it ends it and removes its files.
#[derive(Debug)]
pub struct PgBouncer {
    port: u16,
    process: Mutex<Child>,
    workshop: Workshop,
}

/// Tells whether there is one on this machine.
///
/// # Errors
/// [Missing](Error::is_missing) if there is none.
pub fn available() -> Result<()> {
    find().map(drop)
}

/// Starts a pgbouncer in front of `server`, for all its databases. It asks nobody a password, and uses the server as
/// `postgres` over the Unix socket.
///
/// # Errors
/// When pgbouncer isn't installed or doesn't start.
pub fn start(server: &Server, mode: PoolMode) -> Result<PgBouncer> {
    start_with(server, mode, &[])
}

/// Like [`start`] with more lines for the section `[pgbouncer]`: `("default_pool_size", "2")` for example.
///
/// # Errors
/// Like [`start`].
pub fn start_with(server: &Server, mode: PoolMode, settings: &[(&str, &str)]) -> Result<PgBouncer> {
    let program = find()?;
    let mut last = None;
    for _ in 0..PORTS {
        match PgBouncer::attempt(&program, server, mode, settings)? {
            Ok(bouncer) => return Ok(bouncer),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| Error::new("pgbouncer finds no free port")))
}

fn find() -> Result<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    folders.extend(["/usr/sbin", "/usr/local/sbin", "/usr/bin", "/opt/homebrew/bin"].map(PathBuf::from));
    folders.into_iter().map(|folder| folder.join("pgbouncer")).find(|program| program.is_file()).ok_or_else(|| {
        Error::missing(
            "no pgbouncer found: `apt-get install pgbouncer`, `dnf install pgbouncer` or `brew install pgbouncer`",
        )
    })
}

impl PgBouncer {
    /// The inner error is a port that was lost to somebody else, which is worth another attempt.
    fn attempt(
        program: &std::path::Path,
        server: &Server,
        mode: PoolMode,
        settings: &[(&str, &str)],
    ) -> Result<std::result::Result<Self, Error>> {
        let workshop = Workshop::open("dsync-pb-", Account::choose()?, Keeps::ForNow)?;
        let port = port::free()?;
        let configuration = configuration(server, mode, port, settings);
        let file = workshop.folder.write("pgbouncer.ini", &configuration, 0o600)?;
        let child = workshop.start(program, &[file.display().to_string()], LOG)?;
        let bouncer = Self { port, process: Mutex::new(child), workshop };
        let started = Instant::now();
        // Its own log says that it's up: a connection alone could be answered by somebody else.
        while !(bouncer.log().contains("process up") && TcpStream::connect(("127.0.0.1", port)).is_ok()) {
            let log = bouncer.log();
            if !bouncer.is_running() || started.elapsed() > PATIENCE {
                let error = Error::new(format!(
                    "pgbouncer doesn't start; the last lines of its log:\n{}",
                    last_lines(&log)
                ));
                return if log.contains("ddress already in use") { Ok(Err(error)) } else { Err(error) };
            }
            thread::sleep(PAUSE);
        }
        Ok(Ok(bouncer))
    }

    /// The TCP port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address of a database by way of pgbouncer; also see [`Database::url_at`](crate::Database::url_at).
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The log up to now.
    #[must_use]
    pub fn log(&self) -> String {
        self.workshop.folder.read(LOG)
    }

    /// The process id, for [signals](crate::process::signal).
    #[must_use]
    pub fn pid(&self) -> i32 {
        process::id_of(&self.process())
    }

    /// Kills it with all the connections through it.
    ///
    /// # Errors
    /// When it doesn't end.
    pub fn stop(&self) -> Result<()> {
        // Signalled under the lock and before it's waited for: the id is its own.
        let mut child = self.process();
        if matches!(child.try_wait(), Ok(None)) {
            process::signal(process::id_of(&child), Signal::Kill)?;
            wait_for("pgbouncer's end", PATIENCE, || child.try_wait().ok().flatten())?;
            self.workshop.has_ended()?;
        }
        Ok(())
    }

    fn is_running(&self) -> bool {
        matches!(self.process().try_wait(), Ok(None))
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Child> {
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        // The watcher does what fails here.
        let _ = self.stop();
        self.workshop.watcher.finish();
    }
}

fn configuration(server: &Server, mode: PoolMode, port: u16, settings: &[(&str, &str)]) -> String {
    let mut text = format!(
        "[databases]\n\
         * = host={socket} port={server_port} user=postgres\n\
         [pgbouncer]\n\
         listen_addr = 127.0.0.1\n\
         listen_port = {port}\n\
         unix_socket_dir =\n\
         auth_type = any\n\
         pool_mode = {mode}\n\
         max_client_conn = 300\n\
         ignore_startup_parameters = extra_float_digits\n",
        socket = server.socket_dir().display(),
        server_port = server.port(),
        mode = mode.name(),
    );
    for (name, value) in settings {
        text.push_str(name);
        text.push_str(" = ");
        text.push_str(value);
        text.push('\n');
    }
    text
}
