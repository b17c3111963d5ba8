//! The catalog: sees that it is there before it is needed.

use std::time::Instant;

use postgres::error::SqlState;

use super::pool::Refusal;
use super::session::Session;
use super::sql;
use super::wire::Failure;
use crate::error::{ErrorKind, chain};

/// The version of the catalog that this library works with.
const VERSION: i32 = 1;

/// The SQL that makes the catalog, for an administrator to run where the role of the locks may not.
///
/// Its first lines name the rights that each role which uses locks must be granted. Running it again does no harm, and
/// brings a catalog of an older version up to date. Run it in one transaction: `psql --single-transaction`.
///
/// ```no_run
/// # fn example(administrator: &mut postgres::Client) -> Result<(), postgres::Error> {
/// administrator.batch_execute(dsync::CATALOG_SQL)?;
/// administrator.batch_execute(
///     "GRANT USAGE ON SCHEMA dsync TO app;
///      GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO app;
///      GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era TO app;
///      GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters TO app;",
/// )?;
/// # Ok(())
/// # }
/// ```
pub const CATALOG_SQL: &str = sql::CATALOG;

/// Whether tokens and annotations are kept in the database, in the schema `dsync`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CatalogMode {
    /// The catalog is made at the first use if it is not there. The role must be allowed to create a schema.
    #[default]
    Automatic,
    /// The catalog must be there: an administrator has run [`CATALOG_SQL`].
    MustExist,
    /// There is none, and so neither fencing tokens nor annotations. All else works.
    None,
}

/// Sees that the catalog is there and can be used.
pub(super) fn ensure(session: &mut Session, mode: CatalogMode, by: Instant) -> Result<(), Refusal> {
    if mode == CatalogMode::None {
        return Ok(());
    }
    let mut state = look(session, by)?;
    if state.is_none() {
        if mode == CatalogMode::MustExist {
            return Err(refused(
                "the catalog is not there or too old, and the settings say that it must be there; let an administrator run \
                 dsync::CATALOG_SQL in this database, or set the catalog to automatic or none",
            ));
        }
        state = Some(create(session, by)?);
    }
    let State { has_era, has_old_rows } = state.unwrap_or_default();
    // After a crash. It would be seen to with the first lock as well, which would take longer by that.
    if !has_era {
        session.new_era(by).map_err(Refusal::from_failure)?;
    }
    // Housekeeping; that it fails, for want of a right, say, is no reason to do without locks.
    if has_old_rows && let Err(Failure::Refused(error)) = session.simple_query(sql::CATALOG_CLEANING, by) {
        log::debug!("rows of old locks stay in the catalog: {}", chain(&error));
    }
    Ok(())
}

/// What there is to be done for a catalog that can be used.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    has_era: bool,
    has_old_rows: bool,
}

/// Looks at the catalog; `None` if it is not there. Refuses one that cannot be used.
fn look(session: &mut Session, by: Instant) -> Result<Option<State>, Refusal> {
    let row = match session.simple_query(sql::CATALOG_STATE, by) {
        Ok(row) => row,
        Err(Failure::Refused(error)) => {
            return match error.code().map(|code| code.code()) {
                // Schema, table, or one of its companions is missing.
                Some("3F000" | "42P01") => Ok(None),
                Some("42501") => Err(no_rights(&chain(&error))),
                _ => Err(Refusal::from_failure(Failure::Refused(error))),
            };
        }
        Err(failure) => return Err(Refusal::from_failure(failure)),
    };
    let column = |index| row.as_ref().and_then(|row| row.try_get(index).ok().flatten());
    let version = column(0).and_then(|text| text.parse().ok()).unwrap_or(0);
    if version < VERSION {
        return Ok(None);
    }
    if version > VERSION {
        return Err(refused(&format!(
            "the catalog in schema dsync has version {version}, this library needs {VERSION}; \
             upgrade the library, or use another database for its locks"
        )));
    }
    if column(1) != Some("t") {
        return Err(no_rights(
            "SELECT, INSERT and UPDATE on dsync.lock, SELECT and INSERT on dsync.era, \
             USAGE and UPDATE on dsync.token are needed",
        ));
    }
    Ok(Some(State { has_era: column(2) == Some("t"), has_old_rows: column(3) == Some("t") }))
}

/// Makes the catalog, or brings it up to date, unless another process does so at this moment.
fn create(session: &mut Session, by: Instant) -> Result<State, Refusal> {
    session.simple_query(sql::BEGIN_CREATION, by).map_err(Refusal::from_failure)?;
    let outcome = create_in_transaction(session, by);
    // A transaction that failed must not be found open by a claim.
    let end = if outcome.is_ok() { sql::END_CREATION } else { "ROLLBACK" };
    session.simple_query(end, by).map_err(Refusal::from_failure)?;
    if outcome? {
        log::info!("made the catalog of locks: schema dsync");
    }
    look(session, by)?.ok_or_else(|| {
        refused(
            "the catalog in schema dsync cannot be made complete; let an administrator drop the schema, or repair it",
        )
    })
}

fn create_in_transaction(session: &mut Session, by: Instant) -> Result<bool, Refusal> {
    session.simple_query("SAVEPOINT look", by).map_err(Refusal::from_failure)?;
    if look(session, by)?.is_some() {
        return Ok(false);
    }
    session.simple_query("ROLLBACK TO look", by).map_err(Refusal::from_failure)?;
    match session.simple_query(sql::CATALOG, by) {
        Ok(_) => Ok(true),
        Err(Failure::Refused(error)) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            Err(refused(&format!(
                "the role may not make the catalog ({}); let an administrator run dsync::CATALOG_SQL in this database \
                 and grant what its first lines name, or set the catalog to none",
                chain(&error)
            )))
        }
        Err(failure) => Err(Refusal::from_failure(failure)),
    }
}

fn no_rights(detail: &str) -> Refusal {
    refused(&format!(
        "the role may not use the catalog ({detail}); let an administrator grant what the first lines of \
         dsync::CATALOG_SQL name, or set the catalog to none"
    ))
}

fn refused(message: &str) -> Refusal {
    Refusal::new(ErrorKind::SessionRefused, message.to_owned())
}
