//! The catalog: sees that it is there, and is nobody else's, before it is needed.

pub(crate) mod fence;
pub(crate) mod takeover;

use std::time::{Duration, Instant};

use crate::error::{ErrorKind, Result, chain};
use crate::loss::LossReason;
use crate::pg::config::CatalogMode;
use crate::pg::session::open::Session;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql;
use crate::pg::sql::schema::Schema;

/// The version of the catalog that this library works with.
const VERSION: i32 = 7;

/// The SQL that makes the catalog, for an administrator to run where the role of the locks may not.
///
/// Its first lines name the rights that each role which uses locks must be granted. Running it again does no harm, and
/// brings a catalog of an older version up to date. Run it in one transaction: `psql --set ON_ERROR_STOP=1 --single-transaction`. It stops, with
/// an error, where a role that the administrator's does not trust has a hand in the schema: see [`CatalogMode`].
///
/// It is for the schema `dsync`; [`catalog_sql`] gives the same for another one.
///
/// ```no_run
/// # fn example(administrator: &mut postgres::Client) -> Result<(), postgres::Error> {
/// administrator.batch_execute(dsync::CATALOG_SQL)?;
/// administrator.batch_execute(
///     "GRANT USAGE ON SCHEMA dsync TO app;
///      GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO app;
///      GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era, dsync.resignation, dsync.success, dsync.semaphore TO app;
///      GRANT SELECT, INSERT, UPDATE ON dsync.policy, dsync.takeover TO app;
///      GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters, dsync.semaphores TO app;
///      GRANT EXECUTE ON FUNCTION dsync.fence(text) TO app;",
/// )?;
/// # Ok(())
/// # }
/// ```
pub const CATALOG_SQL: &str = sql::CATALOG;

/// [`CATALOG_SQL`] for a schema of another name, which [`Config::schema`](crate::Config::schema) is given too.
///
/// # Errors
/// [`InvalidConfig`](ErrorKind::InvalidConfig) if PostgreSQL does not take the name.
pub fn catalog_sql(schema: &str) -> Result<String> {
    let schema = Schema::new(schema);
    schema.validate()?;
    Ok(schema.apply(sql::CATALOG))
}

/// What a commit may wait for, and what to do then.
const STANDBYS: &str = "waits for the synchronous standbys, as all commits do; start each standby that synchronous_standby_names names (see \
                        pg_stat_replication), or take it out there";

/// What an administrator is to run, for messages.
pub(crate) const SCRIPT: &str = "dsync::CATALOG_SQL (for another schema than dsync: dsync::catalog_sql)";

/// Sees that the catalog is there and can be used; `true` if it had to be made, or brought up to date.
pub(crate) fn ensure(
    session: &mut Session,
    mode: CatalogMode,
    by: Instant,
) -> std::result::Result<bool, Refusal> {
    if mode == CatalogMode::None {
        return Ok(false);
    }
    let (state, is_new) = match look(session, by)? {
        Found::Usable(state) => (state, false),
        _ if mode == CatalogMode::MustExist => return Err(missing()),
        _ => (create(session, by)?, true),
    };
    // Housekeeping; that it fails, for want of a right, say, is no reason to do without locks.
    if state.has_old_rows {
        let cleaning = session.schema().apply(sql::CATALOG_CLEANING);
        if let Err(Failure::Refused(error)) = session.simple_query(&cleaning, by) {
            log::debug!("rows of old locks stay in the catalog: {}", chain(&error));
        }
    }
    Ok(is_new)
}

/// The catalog as it is, if it can be used; `None` if a session that needs it would make it, or bring it up to date.
pub(crate) fn found(
    session: &mut Session,
    mode: CatalogMode,
    by: Instant,
) -> std::result::Result<Option<State>, Refusal> {
    match look(session, by)? {
        Found::Usable(state) => Ok(Some(state)),
        _ if mode == CatalogMode::MustExist => Err(missing()),
        _ => Ok(None),
    }
}

fn missing() -> Refusal {
    refused(&format!(
        "the catalog is not there or too old, and is not made here (CatalogMode::MustExist); let an administrator run \
         {SCRIPT} in this database, or set the catalog to automatic or none"
    ))
}

/// What there is to be done for a catalog that can be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    /// Tokens are drawn in this run of the server.
    pub(crate) has_era: bool,
    has_old_rows: bool,
}

/// What a look at the catalog finds.
enum Found {
    /// There is no schema of that name.
    Nothing,
    /// It is of an older version, or not complete.
    Older,
    Usable(State),
}

/// Looks at the catalog. Refuses one that cannot be used.
fn look(session: &mut Session, by: Instant) -> std::result::Result<Found, Refusal> {
    let is_true = |text: &Option<String>| text.as_deref() == Some("t");
    let [has_schema, is_own] = ask(session, sql::CATALOG_IS_OWN, by)?;
    if !is_true(&has_schema) {
        return Ok(Found::Nothing);
    }
    let [problem, about_trust, complete] =
        if is_true(&is_own) { [None, None, is_own] } else { ask(session, sql::CATALOG_CHECK, by)? };
    if let Some(problem) = &problem
        && is_true(&about_trust)
    {
        return Err(refused(problem));
    }
    if problem.is_none() && !is_true(&complete) {
        return Ok(Found::Older);
    }
    // One that has other columns may be of a newer version.
    let version = match ask(session, sql::CATALOG_VERSION, by) {
        Ok([version]) => version.and_then(|text| text.parse().ok()).unwrap_or(0),
        Err(refusal) => return Err(problem.as_deref().map_or(refusal, refused)),
    };
    if version > VERSION {
        return Err(refused(&format!(
            "the catalog in schema {} has version {version}, this library needs {VERSION}; \
             upgrade the library, or use another database, or another schema, for its locks",
            session.schema().identifier()
        )));
    }
    if let Some(problem) = &problem {
        return Err(refused(problem));
    }
    if version < VERSION {
        return Ok(Found::Older);
    }
    let [rights, has_era, has_old_rows] = ask(session, sql::CATALOG_STATE, by)?;
    if !is_true(&rights) {
        return Err(no_rights(&session.schema().apply(
            "SELECT, INSERT and UPDATE on dsync.lock, dsync.era, dsync.policy and dsync.takeover, USAGE and UPDATE on \
             dsync.token are needed",
        )));
    }
    Ok(Found::Usable(State { has_era: is_true(&has_era), has_old_rows: is_true(&has_old_rows) }))
}

/// The columns of the row that a statement on the catalog gives, if it gives one.
fn ask<const COLUMNS: usize>(
    session: &mut Session,
    statement: &str,
    by: Instant,
) -> std::result::Result<[Option<String>; COLUMNS], Refusal> {
    let statement = sql::wait_for_tables(patience(by)) + &session.schema().apply(statement);
    let row = session.simple_query(&statement, by).map_err(failed)?;
    Ok(std::array::from_fn(|index| {
        row.as_ref().and_then(|row| row.try_get(index).ok().flatten()).map(str::to_owned)
    }))
}

/// How long the server may wait for somebody else in a call that ends at `by`: three quarters of the time, so that its word that it has waited comes before
/// the end also over a slow link.
pub(crate) fn patience(by: Instant) -> Duration {
    by.saturating_duration_since(Instant::now()) * 3 / 4
}

/// Makes the catalog, or brings it up to date, unless another process does so at this moment.
fn create(session: &mut Session, by: Instant) -> std::result::Result<State, Refusal> {
    session.simple_query(&sql::begin_creation(patience(by)), by).map_err(failed)?;
    let found = match create_in_transaction(session, by) {
        Ok(found) => found,
        Err(refusal) => {
            // A transaction that failed must not be found open by a claim. A session that is lost has none.
            let _ = session.simple_query("ROLLBACK", by);
            return Err(refusal);
        }
    };
    if let Found::Usable(state) = found {
        session.simple_query("COMMIT", by).map_err(failed)?;
        return Ok(state);
    }
    log::info!(
        "made the catalog of locks, or brought it up to date: schema {}",
        session.schema().identifier()
    );
    if let Found::Nothing = found {
        // The schema is our own, and all that is in it. To look once more takes three round trips.
        return Ok(State { has_era: false, has_old_rows: false });
    }
    match look(session, by)? {
        Found::Usable(state) => Ok(state),
        Found::Nothing => {
            let text = "somebody has dropped the schema of the catalog while it was made; it is made again"
                .to_owned();
            Err(Refusal::new(ErrorKind::SessionUnavailable, text))
        }
        Found::Older => Err(refused(&format!(
            "the catalog in schema {} cannot be made complete; let an administrator drop the schema, or repair it",
            session.schema().identifier()
        ))),
    }
}

/// Ends the transaction if it makes the catalog; gives what was there before.
fn create_in_transaction(session: &mut Session, by: Instant) -> std::result::Result<Found, Refusal> {
    let found = look(session, by)?;
    if let Found::Usable(_) = found {
        return Ok(found);
    }
    let script = session.schema().apply(sql::CATALOG) + sql::END_CREATION;
    match session.simple_query(&script, by) {
        Ok(_) => Ok(found),
        Err(Failure::Refused(error)) if code(&error) == "42501" => {
            let message = format!(
                "the role may not make the catalog, or bring it up to date ({}); let an administrator run {SCRIPT} \
                 in this database and grant what its first lines name, or set the catalog to none",
                chain(&error)
            );
            Err(refused(&message).because(error))
        }
        // The script's own word, on what has come there since we looked. Its code is of no meaning to anybody else.
        Err(Failure::Refused(error)) if code(&error) == "ZDS01" => Err(refused(&chain(&error))),
        Err(Failure::Lost { reason: LossReason::HeartbeatTimedOut, .. }) => Err(Refusal::new(
            ErrorKind::SessionUnavailable,
            format!(
                "the catalog could not be made in time: its commit {STANDBYS}; if none is away, and the link is slow, raise connect_timeout"
            ),
        )),
        Err(failure) => Err(failed(failure)),
    }
}

fn code(error: &postgres::Error) -> &str {
    error.code().map_or("", |code| code.code())
}

/// The statement was not answered in time, or waited too long for another session.
fn is_late(failure: &Failure) -> bool {
    match failure {
        Failure::Lost { reason, .. } => *reason == LossReason::HeartbeatTimedOut,
        Failure::Refused(error) => code(error) == "55P03",
    }
}

/// The new era waits, or somebody's who began it before.
fn no_era() -> Refusal {
    Refusal::new(
        ErrorKind::SessionUnavailable,
        format!(
            "the server was restarted, or another one took its place, or the table era of the catalog was rewritten, and that fencing tokens go on could not \
             be recorded in time: the first commit {STANDBYS}; if none is away, see in pg_locks who has that table locked"
        ),
    )
}

/// Why a statement on the catalog failed, where that means something else than on a session.
pub(crate) fn failed(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(error) if code(&error) == "42501" => no_rights(&chain(&error)).because(error),
        // The end of `lock_timeout` or `statement_timeout`.
        Failure::Refused(error) if matches!(code(&error), "55P03" | "57014") => {
            let message = format!(
                "a table of the catalog is locked by another session, or is being made; see pg_locks, and in pg_stat_replication whether a \
                 standby is away for which a commit there waits ({})",
                chain(&error)
            );
            Refusal::new(ErrorKind::SessionUnavailable, message).because(error)
        }
        failure => Refusal::from_failure(failure),
    }
}

fn no_rights(detail: &str) -> Refusal {
    refused(&format!(
        "the role may not use the catalog ({detail}); let an administrator grant what the first lines of \
         {SCRIPT} name, or set the catalog to none"
    ))
}

fn refused(message: &str) -> Refusal {
    Refusal::new(ErrorKind::SessionRefused, message.to_owned())
}
