//! Asks the server who holds and who waits, asks holders to resign or ends their sessions, and keeps the records of successes.

use std::error::Error as _;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use postgres::Row;
use postgres::error::SqlState;

use crate::error::{Error, ErrorKind, Result};
use crate::key::AdvisoryKey;
use crate::once::Successes;
use crate::pg::catalog::fence::RowFence;
use crate::pg::pool::Pool;
use crate::pg::session::refusal::Refusal;
use crate::pg::session::wire::Failure;
use crate::pg::sql::{self, Commit, Scope};
use crate::view::{Holder, LockView, Waiter};

/// One key, and how the catalog knows it.
#[derive(Debug)]
pub(crate) struct Named<'a> {
    pub(crate) key: AdvisoryKey,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
}

/// The view of one lock. Of a free one, too.
pub(crate) fn one(pool: &Pool, named: &Named<'_>, catalog: bool) -> Result<LockView> {
    let (id, pair) = (named.key.id(), named.key.is_pair());
    let statement = sql::inspect(Scope::One { catalog });
    let rows = pool.ask(&statement, &[&id, &pair, &named.namespace, &named.name])?;
    let mut view = LockView {
        namespace: named.namespace.to_owned(),
        key: named.name.to_owned(),
        holder: None,
        sharers: Vec::new(),
        waiters: Vec::new(),
    };
    for row in &rows {
        add(&mut view, row)?;
    }
    Ok(view)
}

/// The views of all locks with a name that are held or waited for.
pub(crate) fn all(pool: &Pool) -> Result<Vec<LockView>> {
    let mut views: Vec<LockView> = Vec::new();
    for row in &pool.ask(&sql::inspect(Scope::All), &[])? {
        let (namespace, key): (String, String) = (get(row, 0)?, get(row, 1)?);
        // The rows of one key come one after another.
        match views.last_mut().filter(|view| view.namespace == namespace && view.key == key) {
            Some(view) => add(view, row)?,
            None => {
                let mut view =
                    LockView { namespace, key, holder: None, sharers: Vec::new(), waiters: Vec::new() };
                add(&mut view, row)?;
                views.push(view);
            }
        }
    }
    Ok(views)
}

/// Asks the holder to resign; `false` if there is none whose term has a token.
pub(crate) fn request_resignation(pool: &Pool, named: &Named<'_>) -> Result<bool> {
    let (id, pair) = (named.key.id(), named.key.is_pair());
    let rows = pool.ask(sql::REQUEST_RESIGNATION, &[&id, &pair, &named.namespace, &named.name])?;
    Ok(!rows.is_empty())
}

/// Whether the holder of the term with this token was asked to resign.
pub(crate) fn is_asked_to_resign(pool: &Pool, key: AdvisoryKey, token: i64) -> Result<bool> {
    let rows = pool.ask(sql::IS_ASKED_TO_RESIGN, &[&key.id(), &key.is_pair(), &token])?;
    rows.first().map_or(Ok(false), |row| get(row, 0))
}

/// Ends the session of the holder, for whose end it waits `at_most`, and tells who that was; `None` if there is none.
pub(crate) fn break_lock(
    pool: &Pool,
    named: &Named<'_>,
    catalog: bool,
    at_most: Duration,
) -> Result<Option<Holder>> {
    /// Another one may have the lock by the time of the second statement. More of them release it by themselves.
    const ATTEMPTS: usize = 3;
    let (id, pair) = (named.key.id(), named.key.is_pair());
    let millis = i64::try_from(at_most.as_millis()).unwrap_or(i64::MAX);
    for _ in 0..ATTEMPTS {
        let Some(holder) = one(pool, named, catalog)?.holder else { return Ok(None) };
        if holder.pid == 0 {
            let text = format!(
                "a prepared transaction has the lock {:?}, and no session that could be ended; COMMIT PREPARED or ROLLBACK PREPARED it: \
                 its name is in pg_prepared_xacts",
                named.name
            );
            return Err(Error::new(ErrorKind::SessionRefused, text));
        }
        log::warn!("lock {:?}: ending the session of its holder: {holder:?}", named.name);
        let rows = pool.ask(sql::END_HOLDER, &[&id, &pair, &holder.pid, &millis]);
        match rows.map_err(|error| not_ended(error, &holder))?.first().map(|row| get(row, 0)).transpose()? {
            Some(true) => return Ok(Some(holder)),
            Some(false) => {
                let text = format!(
                    "the server has told backend {} to end, which holds {:?}, and it has not ended within {at_most:?}; see what it \
                     does in pg_stat_activity",
                    holder.pid, named.name
                );
                return Err(Error::new(ErrorKind::TimedOut, text));
            }
            // Released in between.
            None => {}
        }
    }
    Ok(None)
}

/// Why the holder's session was not ended.
fn not_ended(error: Error, holder: &Holder) -> Error {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<postgres::Error>());
    if cause.and_then(postgres::Error::code) != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        return error;
    }
    let text = format!(
        "the role may not end the session of {holder:?}; grant it pg_signal_backend or the holder's role, or break the lock as a role that \
         has one of them (a superuser's session is ended by superusers only)"
    );
    Error::new(ErrorKind::SessionRefused, text).with_source(error)
}

/// When the work under the key began that succeeded last, and the server's time.
pub(crate) fn successes(pool: &Pool, named: &Named<'_>) -> Result<Successes> {
    let rows = pool.ask(sql::LAST_SUCCESS, &[&named.namespace, &named.name])?;
    let row = rows.first().ok_or_else(|| Refusal::not_postgres().into_error())?;
    Ok(Successes { last: get(row, 0)?, now: get(row, 1)? })
}

/// Records that the work which began at `started` has succeeded; `false` if the term with this token is over.
pub(crate) fn record_success(pool: &Pool, fence: &RowFence, token: i64, started: SystemTime) -> Result<bool> {
    let (id, pair, pause) = (fence.key.id(), fence.key.is_pair(), fence.longest_pause());
    let statement = sql::record_success(pair, Commit::Synchronous);
    let rows = pool.ask(&statement, &[&id, &pair, &token, &pause, &started])?;
    Ok(!rows.is_empty())
}

/// Forgets the last success; `false` if there was none.
pub(crate) fn forget_success(pool: &Pool, named: &Named<'_>) -> Result<bool> {
    Ok(!pool.ask(sql::FORGET_SUCCESS, &[&named.namespace, &named.name])?.is_empty())
}

/// Adds a holder or a waiter.
fn add(view: &mut LockView, row: &Row) -> Result<()> {
    let (granted, pid): (bool, i32) = (get(row, 2)?, get(row, 3)?);
    let client_addr: Option<IpAddr> = get(row, 4)?;
    let application_name: Option<String> = get(row, 5)?;
    let is_shared: Option<bool> = get(row, 10)?;
    if !granted {
        let waiting_for = Duration::try_from_secs_f64(get(row, 9)?).unwrap_or_default();
        view.waiters.push(Waiter { pid, client_addr, application_name, waiting_for, is_shared });
        return Ok(());
    }
    let holder = Holder {
        annotation: get(row, 7)?,
        token: get(row, 6)?,
        pid,
        client_addr,
        application_name,
        since: get(row, 8)?,
        is_shared: is_shared == Some(true),
    };
    match view.holder {
        None => view.holder = Some(holder),
        Some(_) => view.sharers.push(holder),
    }
    Ok(())
}

fn get<'a, T: postgres::types::FromSql<'a>>(row: &'a Row, column: usize) -> Result<T> {
    row.try_get(column).map_err(|error| Refusal::from_failure(Failure::of(error)).into_error())
}
