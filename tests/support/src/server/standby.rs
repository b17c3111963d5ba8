//! Standbys: servers that follow another one, and can take its place.

use std::fs;
use std::time::Duration;

use super::{Server, Shutdown};
use crate::error::{Error, Result};
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
        let (host, port) = self.place_for_standbys();
        self.standby_by_way_of(&host, port, replication)
    }

    /// As [`standby`](Self::standby), for one that reaches this server in another way: by a proxy.
    ///
    /// # Errors
    /// Like [`standby`](Self::standby).
    pub fn standby_by_way_of(&self, host: &str, port: u16, replication: Replication) -> Result<Self> {
        let mut plan = self.plan.clone();
        if let Some(inside) = plan.inside.take() {
            plan.listen = vec![inside.host_address];
        }
        let standby = Self::prepare(self.binaries.clone(), plan, self.password.clone())?;
        standby.copy(host, port)?;
        let standby = standby.begin()?;
        self.take_in(&standby, replication)?;
        Ok(standby)
    }

    /// Makes a standby of `primary` out of this server, whatever it was before: of its data nothing is left. Its port stays the same.
    ///
    /// # Errors
    /// Like [`standby`](Self::standby).
    pub fn follow(&self, primary: &Self, replication: Replication) -> Result<()> {
        self.stop(Shutdown::Immediate)?;
        fs::remove_dir_all(self.data_dir()).map_err(Error::because("can't remove the data of before"))?;
        let (host, port) = primary.place_for_standbys();
        self.copy(&host, port)?;
        self.start_again()?;
        primary.take_in(self, replication)
    }

    /// As [`follow`](Self::follow), for the former primary of one that was promoted, with `pg_rewind`: only what it has written since then
    /// is gone. Both servers have been started with `wal_log_hints` and `full_page_writes`.
    ///
    /// # Errors
    /// Like [`standby`](Self::standby). [Missing](Error::is_missing) if there is no `pg_rewind`; then this server goes on as it was.
    pub fn rewind(&self, primary: &Self, replication: Replication) -> Result<()> {
        let program = self.binaries.program("pg_rewind");
        if !program.is_file() {
            let folder = self.binaries.folder().display();
            return Err(Error::missing(format!(
                "there is no pg_rewind in {folder}: install PostgreSQL's server"
            )));
        }
        self.stop(Shutdown::Fast)?;
        // Some versions know a new timeline by the last checkpoint only.
        primary.execute("CHECKPOINT")?;
        let (host, port) = primary.place_for_standbys();
        let source = self.source(&host, port);
        let arguments = [
            "-D".to_owned(),
            self.data_dir().display().to_string(),
            format!("--source-server={source} dbname=postgres"),
            "--no-sync".to_owned(),
        ];
        self.workshop.run(&program, &arguments, "pg_rewind.log")?;
        // The files of the settings are the other one's.
        self.configure_as_standby(&source)?;
        self.start_again()?;
        primary.take_in(self, replication)
    }

    /// The folder of the Unix socket, or the end of the cable.
    fn place_for_standbys(&self) -> (String, u16) {
        let host = match &self.plan.inside {
            Some(inside) => inside.address.clone(),
            None => self.socket_dir().display().to_string(),
        };
        (host, self.port)
    }

    /// What it is called as a standby.
    fn standby_name(&self) -> String {
        self.folder().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Gets the data of a primary, and will follow it.
    fn copy(&self, host: &str, port: u16) -> Result<()> {
        let source = self.source(host, port);
        let arguments = [
            "-D".to_owned(),
            self.data_dir().display().to_string(),
            "-d".to_owned(),
            source.clone(),
            "--checkpoint=fast".to_owned(),
            // A second process, as with `stream`, might survive the first one's end.
            "--wal-method=fetch".to_owned(),
            "--no-sync".to_owned(),
        ];
        self.workshop.run(&self.binaries.program("pg_basebackup"), &arguments, "pg_basebackup.log")?;
        self.configure_as_standby(&source)
    }

    /// How it reaches its primary.
    fn source(&self, host: &str, port: u16) -> String {
        format!("host={host} port={port} user=postgres application_name={}", self.standby_name())
    }

    /// Has it follow its primary when it is started.
    fn configure_as_standby(&self, source: &str) -> Result<()> {
        self.configure()?;
        // If it was copied with this setting and then promoted, it would wait for itself.
        self.append("postgresql.auto.conf", "synchronous_standby_names = ''\n")?;
        // Not by `pg_basebackup`, which may be newer than the server, and names parameters that an older one refuses.
        self.append("postgresql.auto.conf", &format!("primary_conninfo = '{source}'\n"))?;
        self.workshop.folder.write("data/standby.signal", "", 0o600)?;
        Ok(())
    }

    /// Waits until the standby follows this server.
    fn take_in(&self, standby: &Self, replication: Replication) -> Result<()> {
        let name = standby.standby_name();
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
        Ok(())
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
        // A server lets the end of what it has logged lie for up to 15 s. A commit has it written; and not confirmed here, since a
        // synchronous standby may be the one that is waited for.
        let mut client = primary.client()?;
        client
            .batch_execute("SET synchronous_commit = local")
            .map_err(Error::because("the primary can't be told not to wait for its standby"))?;
        let goal: String = client
            .query_one("SELECT pg_logical_emit_message(true, 'dsync-test-support', '')::text", &[])
            .and_then(|row| row.try_get(0))
            .map_err(Error::because("the primary doesn't write to its log"))?;
        let query = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{goal}'::pg_lsn, false)");
        wait_for("the standby to catch up", PATIENCE, || self.ask::<bool>(&query).ok()?.then_some(()))
    }

    fn is_followed_by(&self, name: &str) -> Result<bool> {
        self.ask(&format!(
            "SELECT count(*) > 0 FROM pg_stat_replication WHERE application_name = '{name}' AND state = 'streaming'"
        ))
    }
}
