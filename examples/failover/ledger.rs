//! The work, and the proof that no two leaders did it at once: a table to which each leader adds a row for each unit.

use std::error::Error;
use std::time::Duration;

use dsync::postgres::{Client, NoTls};
use dsync::{ErrorKind, Term};

use crate::outcome::one_line;
use crate::worker::Outcome;

/// Writes what a leader does. It has a connection of its own: the sessions of the locks are the library's.
pub(crate) struct Writer {
    worker: String,
    url: String,
    client: Option<Client>,
}

impl Writer {
    pub(crate) fn new(worker: &str, url: &str) -> Self {
        Self { worker: worker.to_owned(), url: url.to_owned(), client: None }
    }

    /// Does one unit of work for `term`.
    pub(crate) fn work(&mut self, term: &Term) -> Outcome {
        match self.unit(term) {
            Ok(()) => Outcome::Done,
            Err(error) if is_lost(&*error) => Outcome::Refused,
            Err(error) => {
                log::warn!("{}: {}", self.worker, one_line(&*error));
                self.client = None;
                Outcome::Failed
            }
        }
    }

    /// One transaction behind the fence: it cannot commit once a later leader has begun, not even if this process is
    /// frozen between two of its lines.
    fn unit(&mut self, term: &Term) -> Result<(), Box<dyn Error>> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(connect(&self.url)?),
        };
        let mut transaction = client.transaction()?;
        term.fence(&mut transaction)?;
        transaction.execute(
            "INSERT INTO dsync_failover_demo (worker, token) VALUES ($1, $2)",
            &[&self.worker, &term.token()],
        )?;
        transaction.commit()?;
        Ok(())
    }
}

fn is_lost(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<dsync::Error>().is_some_and(|error| error.kind() == ErrorKind::Lost)
}

pub(crate) fn connect(url: &str) -> Result<Client, postgres::Error> {
    url.parse::<postgres::Config>()?.connect_timeout(Duration::from_secs(2)).connect(NoTls)
}

/// The table in which the leaders work. It goes when this is dropped.
pub(crate) struct Ledger {
    url: String,
}

/// What the table says.
pub(crate) struct Findings {
    pub(crate) units: i64,
    pub(crate) terms: i64,
    /// Units that come after one of a later term. There must be none.
    pub(crate) out_of_order: i64,
    /// Terms in which more than one worker did something. There must be none.
    pub(crate) shared: i64,
}

impl Ledger {
    pub(crate) fn create(url: &str) -> Result<Self, postgres::Error> {
        connect(url)?.batch_execute(
            "DROP TABLE IF EXISTS dsync_failover_demo;
             CREATE TABLE dsync_failover_demo (id bigserial PRIMARY KEY, worker text NOT NULL, token int8 NOT NULL)",
        )?;
        Ok(Self { url: url.to_owned() })
    }

    /// The table numbers its rows by itself, so what it finds rests neither on the word of a worker nor on a clock.
    pub(crate) fn inspect(&self) -> Result<Findings, postgres::Error> {
        let row = connect(&self.url)?.query_one(
            "SELECT count(*), count(DISTINCT token), count(*) FILTER (WHERE token < newest),
                    count(DISTINCT token) FILTER (WHERE worker <> first_worker)
             FROM (SELECT *, max(token) OVER (ORDER BY id) AS newest,
                          first_value(worker) OVER (PARTITION BY token ORDER BY id) AS first_worker
                   FROM dsync_failover_demo) AS work",
            &[],
        )?;
        Ok(Findings {
            units: row.try_get(0)?,
            terms: row.try_get(1)?,
            out_of_order: row.try_get(2)?,
            shared: row.try_get(3)?,
        })
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // A private server is gone or goes with all its tables; elsewhere the next run drops what stays.
        let _ = connect(&self.url).and_then(|mut client| {
            client.batch_execute("SET lock_timeout = '2s'; DROP TABLE dsync_failover_demo")
        });
    }
}
