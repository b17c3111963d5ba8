//! What can befall a server: its processes die.

use std::time::Duration;

use super::{Server, locked};
use crate::error::{Error, Result};
use crate::process::{self, Signal};
use crate::wait::wait_for;

/// SIGKILL takes effect in no time; a machine under load may need some.
const PATIENCE: Duration = Duration::from_secs(10);

impl Server {
    /// Kills the postmaster alone. Its backends notice by themselves and end: at once when they wait, at the end of
    /// their query when they compute.
    ///
    /// # Errors
    /// When the server isn't running.
    pub fn kill_postmaster(&self) -> Result<()> {
        let postmaster = self.running_postmaster()?;
        locked(&self.orphans).extend(process::children(postmaster));
        self.signal_postmaster(Signal::Kill)?;
        self.wait_for_the_end()
    }

    /// Kills the postmaster and all its children at one moment, as a loss of power does. The database's files stay.
    ///
    /// # Errors
    /// When the server isn't running.
    pub fn kill_hard(&self) -> Result<()> {
        // Standing still, they can neither multiply nor clean up.
        let processes = self.still_processes()?;
        for &pid in processes.iter().skip(1) {
            let _ = process::signal(pid, Signal::Kill);
        }
        self.signal_postmaster(Signal::Kill)?;
        self.wait_for_the_end()?;
        wait_for("the killed backends' end", PATIENCE, || {
            processes.iter().all(|&pid| !process::is_alive(pid)).then_some(())
        })
    }

    /// Ends one session (`pg_terminate_backend`), and says whether there was one.
    ///
    /// # Errors
    /// When the server doesn't answer.
    pub fn terminate(&self, backend_pid: i32) -> Result<bool> {
        self.client()?
            .query_one("SELECT pg_terminate_backend($1)", &[&backend_pid])
            .and_then(|row| row.try_get(0))
            .map_err(Error::because(format!("can't end the session of backend {backend_pid}")))
    }

    /// The backends of all clients, but not the one that answers this.
    ///
    /// # Errors
    /// When the server doesn't answer.
    pub fn backend_pids(&self) -> Result<Vec<i32>> {
        self.client()?
            .query(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
                &[],
            )
            .and_then(|rows| rows.iter().map(|row| row.try_get(0)).collect())
            .map_err(Error::because("can't list the backends"))
    }

    /// The postmaster and all its children, the backends among them. Needs no answer from the server.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        self.postmaster_pid().map(|pid| [vec![pid], process::children(pid)].concat()).unwrap_or_default()
    }

    pub(super) fn running_postmaster(&self) -> Result<i32> {
        self.postmaster_pid().ok_or_else(|| Error::new("the server isn't running; start it again first"))
    }

    fn wait_for_the_end(&self) -> Result<()> {
        wait_for("the killed postmaster's end", PATIENCE, || (!self.is_running()).then_some(()))
    }
}
