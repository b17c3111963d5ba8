//! Standbys: servers that follow another one, and can take its place.

use std::time::Duration;

use super::Server;
use crate::error::Result;
use crate::wait::wait_for;

const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the primary waits for its standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replication {
    /// What is committed on the primary may be missing on the standby when it's promoted.
    Asynchronous,
    /// A commit on the primary waits until this standby has it on disk; for ever, if the standby is gone. Give up on it
    /// by [`Server::reset`] of `synchronous_standby_names`.
    Synchronous,
}

impl Server {
    /// Makes a standby from a copy of this server (`pg_basebackup`), with the same options, password and settings, and
    /// waits until it follows. One standby at most is synchronous: the last that was asked to be.
    ///
    /// # Errors
    /// When this server doesn't run, or the standby doesn't start.
    pub fn standby(&self, replication: Replication) -> Result<Self> {
        let standby = Self::prepare(self.binaries.clone(), self.plan.clone(), self.password.clone())?;
        let name = standby.folder().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let source = format!(
            "host={} port={} user=postgres application_name={name}",
            self.socket_dir().display(),
            self.port
        );
        let arguments = [
            "-D".to_owned(),
            standby.data_dir().display().to_string(),
            "-d".to_owned(),
            source,
            "--write-recovery-conf".to_owned(),
            "--checkpoint=fast".to_owned(),
            // A second process, as with `stream`, might survive the first one's end.
            "--wal-method=fetch".to_owned(),
            "--no-sync".to_owned(),
        ];
        standby.workshop.run(&self.binaries.program("pg_basebackup"), &arguments, "pg_basebackup.log")?;
        standby.configure()?;
        // If it was copied with this setting and then promoted, it would wait for itself.
        standby.append("postgresql.auto.conf", "synchronous_standby_names = ''\n")?;
        let standby = standby.begin()?;
        wait_for("the standby to follow", PATIENCE, || self.is_followed_by(&name).ok()?.then_some(()))?;
        if replication == Replication::Synchronous {
            self.set("synchronous_standby_names", &format!("\"{name}\""))?;
            wait_for("the standby to be synchronous", PATIENCE, || {
                let query = format!(
                    "SELECT count(*) > 0 FROM pg_stat_replication WHERE application_name = '{name}' \
                     AND sync_state = 'sync'"
                );
                self.ask::<bool>(&query).ok()?.then_some(())
            })?;
        }
        Ok(standby)
    }

    /// Makes a primary of a standby, and waits until it is one.
    ///
    /// # Errors
    /// When the server isn't a standby or doesn't answer.
    pub fn promote(&self) -> Result<()> {
        self.execute("SELECT pg_promote(true, 60)")?;
        wait_for("the promotion", PATIENCE, || (!self.is_in_recovery().ok()?).then_some(()))
    }

    /// Whether the server is a standby.
    ///
    /// # Errors
    /// When the server doesn't answer.
    pub fn is_in_recovery(&self) -> Result<bool> {
        self.ask("SELECT pg_is_in_recovery()")
    }

    /// Waits until this standby shows everything that its primary has written up to now.
    ///
    /// # Errors
    /// When it isn't there after a minute, or one of the two doesn't answer.
    pub fn wait_caught_up(&self, primary: &Self) -> Result<()> {
        let goal: String = primary.ask("SELECT pg_current_wal_insert_lsn()::text")?;
        let query = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{goal}'::pg_lsn, false)");
        wait_for("the standby to catch up", PATIENCE, || self.ask::<bool>(&query).ok()?.then_some(()))
    }

    fn is_followed_by(&self, name: &str) -> Result<bool> {
        self.ask(&format!(
            "SELECT count(*) > 0 FROM pg_stat_replication WHERE application_name = '{name}' AND state = 'streaming'"
        ))
    }
}
