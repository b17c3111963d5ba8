//! The check of a term's token in the database.

use postgres::error::SqlState;
use postgres::{GenericClient, Transaction};

use super::pool::Refusal;
use super::session::Failure;
use super::sql;
use crate::error::Result;
use crate::term::Row;

/// Holds the row of the term for the length of the transaction; `false` if the term is over.
pub(crate) fn hold(transaction: &mut Transaction<'_>, row: &Row, token: i64) -> Result<bool> {
    let pause = row.longest_pause.as_millis().to_string();
    match transaction.query_opt(sql::FENCE, &[&row.id, &row.pair, &token, &pause]) {
        Ok(found) => Ok(found.is_some()),
        // In a transaction that sees a snapshot from before the next holder's update.
        Err(error) if error.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE) => Ok(false),
        Err(error) => Err(Refusal::from_failure(Failure::of(error)).into_error()),
    }
}

/// Whether the term is the newest.
pub(crate) fn is_current(client: &mut impl GenericClient, row: &Row, token: i64) -> Result<bool> {
    let answer = client.query_one(sql::IS_CURRENT, &[&row.id, &row.pair, &token]);
    answer
        .and_then(|row| row.try_get(0))
        .map_err(|error| Refusal::from_failure(Failure::of(error)).into_error())
}
