//! A real Pgpool-II in front of a primary and its standby.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};
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
const PATIENCE: Duration = Duration::from_secs(30);
/// How many ports to try; somebody else has to be quicker than we are each time.
const PORTS: usize = 10;

/// A running Pgpool-II; dropping it ends it and removes its files.
#[derive(Debug)]
pub struct PgPool {
    port: u16,
    process: Mutex<Child>,
    workshop: Workshop,
}

/// Starts a Pgpool-II that sends to `standby` all that it takes for statements which only read, with more lines for its configuration:
/// `("write_function_list", "'nextval'")` for example. It asks nobody a password.
///
/// # Errors
/// When Pgpool-II isn't installed or doesn't start.
pub fn start_with(primary: &Server, standby: &Server, settings: &[(&str, &str)]) -> Result<PgPool> {
    let program = find()?;
    let mut last = None;
    for _ in 0..PORTS {
        match PgPool::attempt(&program, primary, standby, settings)? {
            Ok(pool) => return Ok(pool),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| Error::new("Pgpool-II finds no free port")))
}

/// Tells whether there is one on this machine.
///
/// # Errors
/// [Missing](Error::is_missing) if there is none.
pub fn available() -> Result<()> {
    find().map(drop)
}

fn find() -> Result<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    folders.extend(["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"].map(PathBuf::from));
    folders
        .into_iter()
        .map(|folder| folder.join("pgpool"))
        .find(|program| program.is_file())
        .ok_or_else(|| Error::missing("no pgpool found: `apt-get install pgpool2`"))
}

impl PgPool {
    /// The inner error is a port that was lost to somebody else, which is worth another attempt.
    fn attempt(
        program: &Path,
        primary: &Server,
        standby: &Server,
        settings: &[(&str, &str)],
    ) -> Result<std::result::Result<Self, Error>> {
        let workshop = Workshop::open("dsync-pp-", Account::choose()?, Keeps::ForNow)?;
        let (port, control) = (port::free()?, port::free()?);
        let text = configuration([primary, standby], port, control, workshop.folder.path(), settings);
        let file = workshop.folder.write("pgpool.conf", &text, 0o600)?.display().to_string();
        let arguments = ["-n", "-f", &file, "-F", "/dev/null", "-a", "/dev/null"].map(str::to_owned);
        let child = workshop.start(program, &arguments, LOG)?;
        let pool = Self { port, process: Mutex::new(child), workshop };
        let started = Instant::now();
        // Before it knows which is the primary, it may send anything anywhere.
        while !["successfully started", "primary node is 0"].iter().all(|text| pool.log().contains(text)) {
            let log = pool.log();
            if !pool.is_running() || started.elapsed() > PATIENCE {
                let error = Error::new(format!(
                    "Pgpool-II doesn't start; the last lines of its log:\n{}",
                    last_lines(&log)
                ));
                return if log.contains("ddress already in use") { Ok(Err(error)) } else { Err(error) };
            }
            std::thread::sleep(PAUSE);
        }
        Ok(Ok(pool))
    }

    /// The address of a database by way of Pgpool-II.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The first process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        process::id_of(&self.process())
    }

    /// The log up to now, which has each statement and the server that got it: node 0 is the primary, and node 1 the standby.
    #[must_use]
    pub fn log(&self) -> String {
        self.workshop.folder.read(LOG)
    }

    fn is_running(&self) -> bool {
        matches!(self.process().try_wait(), Ok(None))
    }

    fn process(&self) -> MutexGuard<'_, Child> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PgPool {
    fn drop(&mut self) {
        // The watcher does what fails here. Its processes are a group, and signalled before the first is waited for.
        let mut child = self.process();
        if matches!(child.try_wait(), Ok(None)) {
            let pid = process::id_of(&child);
            // The first one alone, which ends the others. If it is killed, the system keeps its shared memory for good: 130 MB.
            let _ = process::signal(pid, Signal::Interrupt);
            if wait_for("the end of Pgpool-II", PATIENCE, || child.try_wait().ok().flatten()).is_err() {
                let _ = process::signal_group(pid, Signal::Kill);
                let _ = wait_for("the end of Pgpool-II", PATIENCE, || child.try_wait().ok().flatten());
            }
            let _ = self.workshop.has_ended();
        }
        drop(child);
        self.workshop.watcher.finish();
    }
}

fn configuration(
    servers: [&Server; 2],
    port: u16,
    control: u16,
    folder: &Path,
    settings: &[(&str, &str)],
) -> String {
    let mut text = String::from(
        "backend_clustering_mode = 'streaming_replication'\n\
         listen_addresses = '127.0.0.1'\n\
         pcp_listen_addresses = ''\n\
         enable_pool_hba = off\n\
         num_init_children = 16\n\
         load_balance_mode = on\n\
         log_per_node_statement = on\n\
         sr_check_period = 1\n\
         sr_check_user = 'postgres'\n\
         sr_check_database = 'postgres'\n",
    );
    let mut add = |name: &str, value: &str| text.push_str(&format!("{name} = {value}\n"));
    for (node, server) in servers.iter().enumerate() {
        add(&format!("backend_hostname{node}"), &format!("'{}'", server.socket_dir().display()));
        add(&format!("backend_port{node}"), &server.port().to_string());
        add(&format!("backend_weight{node}"), &node.to_string());
        add(&format!("backend_flag{node}"), "'DISALLOW_TO_FAILOVER'");
    }
    add("port", &port.to_string());
    add("pcp_port", &control.to_string());
    for name in ["socket_dir", "pcp_socket_dir", "wd_ipc_socket_dir", "logdir"] {
        add(name, &format!("'{}'", folder.display()));
    }
    add("pid_file_name", &format!("'{}'", folder.join("pgpool.pid").display()));
    for (name, value) in settings {
        add(name, value);
    }
    text
}
