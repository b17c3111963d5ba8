//! Locks on connections that the application lends: no session of the pool, no supervisor, no term.

mod session;
#[cfg(test)]
mod tests;
mod transaction;

use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::{GenericClient, SimpleQueryMessage};

use crate::context::Context;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::pg::session::refusal::advise;
use crate::pg::sql::{Advisory, Lasting, answer};

pub use session::{SessionGuard, SessionLock};
pub use transaction::TransactionLock;

/// A call that can be cancelled looks at its context this often.
const LOOK: Duration = Duration::from_secs(1);

/// A lock that is wanted on a connection of the application's.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) key: String,
    pub(crate) advisory: Advisory,
    /// The longest time for which one statement waits.
    pub(crate) slice: Duration,
}

impl Wanted {
    /// Takes the lock if it is free. Whether it is had, and the backend.
    fn try_acquire(&self, client: &mut impl GenericClient) -> Result<(bool, i32)> {
        let rows = rows(client, &self.advisory.attempt()).map_err(|error| self.failed(error, false))?;
        let backend = rows.first().and_then(|row| row.get(1)?.as_deref()?.parse().ok());
        let Some(backend) = backend else { return Err(self.not_understood()) };
        let refused = match first(&rows) {
            Some(answer::GRANTED) => return Ok((true, backend)),
            Some(answer::BUSY) => return Ok((false, backend)),
            Some(answer::STANDBY) => {
                "the connection is to a hot standby, whose locks exclude nobody on the primary; connect to the primary"
            }
            Some(answer::OLD_SNAPSHOT) => {
                "the transaction is REPEATABLE READ or SERIALIZABLE, so it would not see what the former holder has committed; begin it \
                 READ COMMITTED, or take a session lock before it begins"
            }
            Some(answer::IN_TRANSACTION) => {
                "a transaction is open on the connection, by a BEGIN that was sent as text, and the lock would not end with it; end the \
                 transaction first, or use a transaction lock"
            }
            _ => return Err(self.not_understood()),
        };
        Err(self.error(ErrorKind::SessionRefused, refused, true))
    }

    /// Waits for the lock until `context` ends. Gives the backend.
    fn acquire(&self, client: &mut impl GenericClient, context: &Context) -> Result<i32> {
        let begun = Instant::now();
        if context.ended() == Some(ErrorKind::Cancelled) {
            return Err(self.gave_up(ErrorKind::Cancelled, begun));
        }
        let (granted, backend) = self.try_acquire(client)?;
        if granted {
            return Ok(backend);
        }
        loop {
            if let Some(kind) = context.ended() {
                return Err(self.gave_up(kind, begun));
            }
            if self.wait(client, self.slice(context))? {
                return Ok(backend);
            }
        }
    }

    fn slice(&self, context: &Context) -> Duration {
        let slice = if context.can_be_cancelled() { self.slice.min(LOOK) } else { self.slice };
        let left = context.expires_at().map(|end| end.saturating_duration_since(Instant::now()));
        left.map_or(slice, |left| slice.min(left))
    }

    /// Waits for a slice; `false` if it is over.
    fn wait(&self, client: &mut impl GenericClient, slice: Duration) -> Result<bool> {
        let begun = Instant::now();
        let Err(error) = client.batch_execute(&self.advisory.wait(slice)) else { return Ok(true) };
        let took = begun.elapsed();
        // Fails too if the connection has ended, or the savepoint is not there. What failed first is what matters.
        let Ok(rows) = rows(client, &self.advisory.take_back()) else {
            return Err(self.failed(error, false));
        };
        match error.code() {
            Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(false),
            Some(&SqlState::QUERY_CANCELED) => {
                // The two have one code, and their texts may be translated. The server's clock started later than ours.
                let limit = rows.last().and_then(|row| row.first()?.as_deref()?.parse().ok());
                let limit = Duration::try_from_secs_f64(limit.unwrap_or(0.0)).unwrap_or_default();
                let (kind, text) = if limit > Duration::ZERO && took >= limit {
                    let text = format!(
                        "statement_timeout of the connection, {limit:?}, ended the wait before its own time was over; raise it, or wait \
                         for a shorter time"
                    );
                    (ErrorKind::TimedOut, text)
                } else {
                    let text = "the statement that waited was cancelled, by an operator or by a cancel request of the application's";
                    (ErrorKind::Cancelled, text.to_owned())
                };
                Err(self.error(kind, &text, true).with_source(error))
            }
            Some(&SqlState::T_R_DEADLOCK_DETECTED) => {
                let text = "its holder waits, directly or not, for something that this session has; take locks in one order everywhere, \
                            and do not ask for a lock that this session shares already";
                Err(self.error(ErrorKind::LockUnavailable, text, true).with_source(error))
            }
            _ => Err(self.failed(error, true)),
        }
    }

    /// The context ended first.
    fn gave_up(&self, kind: ErrorKind, begun: Instant) -> Error {
        let text = match kind {
            ErrorKind::Cancelled => "the context was cancelled".to_owned(),
            _ => format!("another session holds it; waited for {:.1?}", begun.elapsed()),
        };
        self.error(kind, &text, true)
    }

    /// A statement failed for a reason that has nothing to do with the lock. `goes_on`: the connection is as before the call.
    fn failed(&self, error: postgres::Error, goes_on: bool) -> Error {
        let (kind, advice) = match error.code() {
            Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {
                (ErrorKind::SessionUnavailable, "an earlier statement of the transaction has failed")
            }
            _ => advise(&error),
        };
        let text = format!("{}; {advice}", chain(&error));
        self.error(kind, text.trim_end_matches("; "), goes_on).with_source(error)
    }

    fn not_understood(&self) -> Error {
        self.error(
            ErrorKind::SessionRefused,
            "the server does not answer as PostgreSQL does; see what stands in front of it",
            false,
        )
    }

    /// The lock was not taken.
    fn error(&self, kind: ErrorKind, why: &str, goes_on: bool) -> Error {
        let state = match (self.advisory.lasting, goes_on) {
            (Lasting::Transaction, true) => "the transaction can go on without it",
            (Lasting::Transaction, false) => "the transaction must be rolled back",
            (Lasting::Session, true) => "the connection can be used as before",
            (Lasting::Session, false) => {
                "the connection must be closed if it lives, since it may have the lock"
            }
        };
        Error::new(kind, format!("{:?} was not locked, and {state}: {why}", self.key))
    }
}

/// The rows of the answer to a message, in text.
fn rows(
    client: &mut impl GenericClient,
    text: &str,
) -> std::result::Result<Vec<Vec<Option<String>>>, postgres::Error> {
    let answers = client.simple_query(text)?;
    let row = |answer: &SimpleQueryMessage| match answer {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
        }
        _ => None,
    };
    Ok(answers.iter().filter_map(row).collect())
}

/// The first word of the answer.
fn first(rows: &[Vec<Option<String>>]) -> Option<&str> {
    rows.first()?.first()?.as_deref()
}
