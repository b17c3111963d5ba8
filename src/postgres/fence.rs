//! The check of a term's token in the database.

use postgres::error::SqlState;
use postgres::{GenericClient, Transaction};

use super::schema::Schema;
use super::sql;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::term::Row;

/// Holds the row of the term for the length of the transaction; `false` if the term is over.
pub(crate) fn hold(transaction: &mut Transaction<'_>, row: &Row, token: i64) -> Result<bool> {
    let pause = row.longest_pause.as_millis().to_string();
    let schema = &row.schema;
    match transaction.query_opt(schema.fence(row.pair), &[&row.id, &row.pair, &token, &pause]) {
        Ok(Some(_)) => Ok(true),
        // Only here, since it takes a round trip of its own.
        Ok(None) => {
            let answer = transaction.query_one(&schema.apply(sql::IS_HIDDEN), &[]);
            let hidden: bool =
                answer.and_then(|row| row.try_get(0)).map_err(|error| failed(schema, error))?;
            if hidden { Err(row_security(schema)) } else { Ok(false) }
        }
        // In a transaction that sees a snapshot from before the next holder's update.
        Err(error) if error.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE) => Ok(false),
        Err(error) => Err(failed(schema, error)),
    }
}

/// Whether the term is the newest.
pub(crate) fn is_current(client: &mut impl GenericClient, row: &Row, token: i64) -> Result<bool> {
    let schema = &row.schema;
    let answer = client.query_one(schema.is_current(), &[&row.id, &row.pair, &token]);
    let (found, hidden): (bool, bool) = answer
        .and_then(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
        .map_err(|error| failed(schema, error))?;
    if !found && hidden { Err(row_security(schema)) } else { Ok(found) }
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
             and, if the text is about row security: ALTER TABLE dsync.lock DISABLE ROW LEVEL SECURITY",
        ),
        Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => (
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
