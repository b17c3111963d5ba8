//! The check of a term's token in the database.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use postgres::Row;
use postgres::error::SqlState;

use crate::error::{Error, ErrorKind, Result, chain};
use crate::key::AdvisoryKey;
use crate::pg::sql::schema::Schema;
use crate::pg::sql::{self, Commit};
use crate::term::{Ask, Fence};

/// Where the catalog keeps the newest token of a key, and for how long a fenced transaction may pause.
#[derive(Debug)]
pub(crate) struct RowFence {
    pub(crate) key: AdvisoryKey,
    pub(crate) longest_pause: Duration,
    pub(crate) schema: Arc<Schema>,
}

impl Fence for RowFence {
    fn hold(&self, ask: &mut Ask<'_>, token: i64) -> Result<bool> {
        let Self { key, schema, .. } = self;
        let (id, pair, pause) = (key.id(), key.is_pair(), self.longest_pause());
        let answer = ask(schema.fence(pair), &[&id, &pair, &token, &pause]);
        self.held(answer, ask)
    }

    fn record(&self, ask: &mut Ask<'_>, token: i64, started: SystemTime) -> Result<bool> {
        let Self { key, schema, .. } = self;
        let (id, pair, pause) = (key.id(), key.is_pair(), self.longest_pause());
        let statement = schema.apply(&sql::record_success(pair, Commit::AsItIs));
        let answer = ask(&statement, &[&id, &pair, &token, &pause, &started]);
        self.held(answer, ask)
    }

    fn is_current(&self, ask: &mut Ask<'_>, token: i64) -> Result<bool> {
        let Self { key, schema, .. } = self;
        let answer = ask(schema.is_current(), &[&key.id(), &key.is_pair(), &token]);
        let answer = answer.map_err(|error| failed(schema, error))?;
        let (found, hidden) = (self.read(answer.as_ref(), 0)?, self.read(answer.as_ref(), 1)?);
        if !found && hidden { Err(row_security(schema)) } else { Ok(found) }
    }

    fn text(&self, token: i64) -> Option<String> {
        // It is read by the function of the catalog. Whoever changes it gives it another number at its beginning.
        let (id, kind) = (self.key.id().cast_unsigned(), if self.key.is_pair() { 'p' } else { 'n' });
        Some(format!("fence1:{id:016x}:{kind}:{token}:{}", self.longest_pause()))
    }
}

impl RowFence {
    /// The same for a permit of the semaphore that has this number.
    pub(crate) fn of_permit(&self, permit: u32) -> Self {
        let Self { key, longest_pause, schema } = self;
        Self { key: key.permit(permit), longest_pause: *longest_pause, schema: Arc::clone(schema) }
    }

    /// In milliseconds, as the statements take it.
    pub(crate) fn longest_pause(&self) -> String {
        self.longest_pause.as_millis().to_string()
    }

    /// Whether a statement that holds the row has found it. If not, it asks whether the row was only hidden.
    fn held(
        &self,
        answer: std::result::Result<Option<Row>, postgres::Error>,
        ask: &mut Ask<'_>,
    ) -> Result<bool> {
        let schema = &self.schema;
        match answer {
            Ok(Some(_)) => Ok(true),
            // Only here, since it takes a round trip of its own.
            Ok(None) => {
                let hidden =
                    ask(&schema.apply(sql::IS_HIDDEN), &[]).map_err(|error| failed(schema, error))?;
                if self.read(hidden.as_ref(), 0)? { Err(row_security(schema)) } else { Ok(false) }
            }
            // In a transaction that sees a snapshot from before the next holder's update.
            Err(error) if error.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE) => Ok(false),
            Err(error) => Err(failed(schema, error)),
        }
    }

    /// A column of the answer to a question that is answered by yes or no; without an answer, no.
    fn read(&self, answer: Option<&Row>, column: usize) -> Result<bool> {
        answer.map_or(Ok(false), |row| row.try_get(column)).map_err(|error| failed(&self.schema, error))
    }
}

/// A row that is not to be seen is not known to be gone.
fn row_security(schema: &Schema) -> Error {
    let message = "row security hides the rows of dsync.lock from the role of this connection, so that nothing can be said \
                   of the term; let an administrator run: ALTER TABLE dsync.lock DISABLE ROW LEVEL SECURITY, or give the \
                   role BYPASSRLS";
    Error::new(ErrorKind::SessionRefused, schema.apply(message))
}

/// What went wrong on the application's connection, whose settings are not ours.
fn failed(schema: &Schema, error: postgres::Error) -> Error {
    let (kind, advice) = match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => (
            ErrorKind::SessionRefused,
            "let an administrator run: GRANT USAGE ON SCHEMA dsync TO role; GRANT SELECT, UPDATE ON dsync.lock TO role; \
             for Run::record also GRANT SELECT, INSERT, UPDATE ON dsync.success TO role; and, if the text is about row security: ALTER TABLE dsync.lock DISABLE ROW LEVEL SECURITY",
        ),
        // The other is what a standby says of an unlogged table.
        Some(&SqlState::READ_ONLY_SQL_TRANSACTION | &SqlState::FEATURE_NOT_SUPPORTED) => (
            ErrorKind::SessionRefused,
            "a fenced transaction must not be read-only, and must be on the primary",
        ),
        Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME) => {
            (ErrorKind::SessionRefused, "the connection must be to the database that the lock is in")
        }
        Some(&SqlState::LOCK_NOT_AVAILABLE) => (
            ErrorKind::SessionUnavailable,
            "another session has locked the table dsync.lock, or the row; see pg_locks. The transaction cannot go on",
        ),
        _ => (ErrorKind::SessionUnavailable, "the transaction cannot go on"),
    };
    let message = format!("the term could not be checked: {}; {}", chain(&error), schema.apply(advice));
    Error::new(kind, message).with_source(error)
}
