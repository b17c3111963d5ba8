//! A server that stands still: connections stay open, and nothing answers.

use super::{Server, locked};
use crate::error::Result;
use crate::process::{self, PATIENCE, Signal};
use crate::wait::wait_for;

/// Keeps a server frozen; see [`Server::freeze`]. Dropping it thaws the server.
#[derive(Debug)]
#[must_use = "the server thaws when this is dropped; `let _ =` drops it at once"]
pub struct Frozen<'a> {
    server: &'a Server,
    processes: Vec<i32>,
}

impl Frozen<'_> {
    /// The server's processes, all of them standing still.
    #[must_use]
    pub fn processes(&self) -> &[i32] {
        &self.processes
    }

    /// Lets the server go on.
    pub fn thaw(self) {}
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let mut freezes = locked(&self.server.freezes);
        *freezes -= 1;
        // With two guards, the last one thaws.
        if *freezes == 0 {
            wake(&self.processes);
            self.server.wake();
            let _ = self.server.workshop.watcher.tell("frozen", &[]);
        }
    }
}

impl Server {
    /// Stops all processes of the server (SIGSTOP), as a machine that swaps or hangs does: its sockets still take
    /// bytes, and nothing answers.
    ///
    /// # Errors
    /// When the server isn't running.
    pub fn freeze(&self) -> Result<Frozen<'_>> {
        let mut freezes = locked(&self.freezes);
        let processes = self.still_processes()?;
        self.workshop.watcher.tell("frozen", &processes)?;
        *freezes += 1;
        drop(freezes);
        Ok(Frozen { server: self, processes })
    }

    /// Stops the postmaster first, so that there can be no new processes, and then all its children.
    pub(super) fn still_processes(&self) -> Result<Vec<i32>> {
        let postmaster = self.running_postmaster()?;
        self.signal_postmaster(Signal::Stop)?;
        let children = process::children(postmaster);
        for &child in &children {
            // Some end at this very moment.
            let _ = process::send(child, Signal::Stop);
        }
        wait_for("the backends to stand still", PATIENCE, || {
            children.iter().all(|&child| process::is_still(child)).then_some(())
        })?;
        Ok([vec![postmaster], children].concat())
    }

    /// Lets all processes go on that may have been stopped.
    pub(super) fn wake(&self) {
        if let Some(postmaster) = self.postmaster_pid() {
            wake(&process::children(postmaster));
        }
        let _ = self.signal_postmaster(Signal::Continue);
        wake(&locked(&self.orphans));
    }

    /// Whether a guard keeps the server frozen, so that it would answer nothing.
    pub(crate) fn is_frozen(&self) -> bool {
        *locked(&self.freezes) > 0
    }
}

/// A process that is gone needs no waking.
fn wake(processes: &[i32]) {
    for &pid in processes.iter().filter(|&&pid| process::is_alive(pid)) {
        let _ = process::signal(pid, Signal::Continue);
    }
}
