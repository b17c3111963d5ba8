//! The check of a term's token in the database.

use postgres::error::SqlState;
use postgres::{GenericClient, Transaction};

use super::sql;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::term::Row;

/// Holds the row of the term for the length of the transaction; `false` if the term is over.
pub(crate) fn hold(transaction: &mut Transaction<'_>, row: &Row, token: i64) -> Result<bool> {
    let pause = row.longest_pause.as_millis().to_string();
    match transaction.query_opt(&sql::fence(row.pair), &[&row.id, &row.pair, &token, &pause]) {
        Ok(found) => Ok(found.is_some()),
        // In a transaction that sees a snapshot from before the next holder's update.
        Err(error) if error.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE) => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Whether the term is the newest.
pub(crate) fn is_current(client: &mut impl GenericClient, row: &Row, token: i64) -> Result<bool> {
    let answer = client.query_one(sql::IS_CURRENT, &[&row.id, &row.pair, &token]);
    answer.and_then(|row| row.try_get(0)).map_err(failed)
}

/// What went wrong on the application's connection, whose settings are not ours.
fn failed(error: postgres::Error) -> Error {
    let (kind, advice) = match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => (
            ErrorKind::SessionRefused,
            "let an administrator run: GRANT USAGE ON SCHEMA dsync TO role; GRANT SELECT, UPDATE ON dsync.lock TO role",
        ),
        Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => (
            ErrorKind::SessionRefused,
            "a fenced transaction must not be read-only, and must be on the primary",
        ),
        Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME) => {
            (ErrorKind::SessionRefused, "the connection must be to the database that the lock is in")
        }
        _ => (ErrorKind::SessionUnavailable, "the transaction cannot go on"),
    };
    let message = format!("the term could not be checked: {}; {advice}", chain(&error));
    Error::new(kind, message).with_source(error)
}
