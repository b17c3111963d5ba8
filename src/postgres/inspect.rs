//! Asks the server who holds and who waits, asks holders to resign or ends their sessions, and keeps the records of successes.

use std::error::Error as _;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use postgres::Row;
use postgres::error::SqlState;
use postgres::types::ToSql;

use crate::error::{Error, ErrorKind, Result};
use crate::key::AdvisoryKey;
use crate::mode::Mode;
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
    let mut view = empty(pool, named.namespace.to_owned(), named.name.to_owned());
    for row in &rows {
        add(&mut view, row)?;
    }
    Ok(view)
}

/// The view of the lock with a key; of the semaphore, whose number is `semaphore`, if there is one and nobody has the lock or waits for it.
pub(crate) fn either(pool: &Pool, named: &Named<'_>, semaphore: AdvisoryKey) -> Result<LockView> {
    let (id, pair, semaphore) = (named.key.id(), named.key.is_pair(), semaphore.id());
    let parameters: [&(dyn ToSql + Sync); 5] = [&id, &pair, &named.namespace, &named.name, &semaphore];
    let rows = pool.ask(&sql::inspect_both(), &parameters)?;
    let mut views = [(); 2].map(|()| empty(pool, named.namespace.to_owned(), named.name.to_owned()));
    let [lock, of_semaphore] = &mut views;
    for row in &rows {
        match get::<Option<i32>>(row, 11)? {
            Some(_) => add_to_semaphore(of_semaphore, row)?,
            None => add(lock, row)?,
        }
    }
    let [lock, of_semaphore] = views;
    let is_lock = lock.holder.is_some() || !lock.waiters.is_empty() || of_semaphore.permits.is_none();
    Ok(if is_lock { lock } else { of_semaphore })
}

/// The view of one semaphore, also where nobody has a permit. Without a number of permits if nobody has said anything of it.
pub(crate) fn semaphore(pool: &Pool, named: &Named<'_>) -> Result<LockView> {
    let (id, pair) = (named.key.id(), named.key.is_pair());
    let statement = sql::inspect_semaphores(Scope::One { catalog: true });
    let rows = pool.ask(&statement, &[&id, &pair, &named.namespace, &named.name])?;
    let mut view = empty(pool, named.namespace.to_owned(), named.name.to_owned());
    for row in &rows {
        add_to_semaphore(&mut view, row)?;
    }
    Ok(view)
}

/// The view of what is had in this way.
pub(crate) fn view(pool: &Pool, named: &Named<'_>, mode: Mode, catalog: bool) -> Result<LockView> {
    if mode == Mode::Permit { semaphore(pool, named) } else { one(pool, named, catalog) }
}

/// To be made after the question, by which a manager may learn of a takeover grace.
fn empty(pool: &Pool, namespace: String, key: String) -> LockView {
    LockView {
        namespace,
        key,
        holder: None,
        sharers: Vec::new(),
        waiters: Vec::new(),
        permits: None,
        grace_left: pool.grace_left(),
    }
}

/// The views of all locks with a name, and of all semaphores, that are held or waited for.
pub(crate) fn all(pool: &Pool) -> Result<Vec<LockView>> {
    let mut views = all_of(pool, &sql::inspect(Scope::All), add)?;
    views.append(&mut all_of(pool, &sql::inspect_semaphores(Scope::All), add_to_semaphore)?);
    Ok(views)
}

fn all_of(
    pool: &Pool,
    statement: &str,
    add: impl Fn(&mut LockView, &Row) -> Result<()>,
) -> Result<Vec<LockView>> {
    let mut views: Vec<LockView> = Vec::new();
    for row in &pool.ask(statement, &[])? {
        let (namespace, key): (String, String) = (get(row, 0)?, get(row, 1)?);
        // The rows of one key come one after another.
        match views.last_mut().filter(|view| view.namespace == namespace && view.key == key) {
            Some(view) => add(view, row)?,
            None => {
                let mut view = empty(pool, namespace, key);
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
    let rows = pool.ask_once(sql::REQUEST_RESIGNATION, &[&id, &pair, &named.namespace, &named.name])?;
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
    mode: Mode,
    catalog: bool,
    at_most: Duration,
) -> Result<Option<Holder>> {
    /// Another one may have the lock by the time of the second statement. More of them release it by themselves.
    const ATTEMPTS: usize = 3;
    let millis = i64::try_from(at_most.as_millis()).unwrap_or(i64::MAX);
    for _ in 0..ATTEMPTS {
        let Some(holder) = view(pool, named, mode, catalog)?.holder else { return Ok(None) };
        let key = holder.permit.map_or(named.key, |permit| named.key.permit(permit));
        if holder.pid == 0 {
            let text = format!(
                "a prepared transaction has the lock {:?}, and no session that could be ended; COMMIT PREPARED or ROLLBACK PREPARED it: \
                 its name is in pg_prepared_xacts",
                named.name
            );
            return Err(Error::new(ErrorKind::SessionRefused, text));
        }
        log::warn!("lock {:?}: ending the session of its holder: {holder:?}", named.name);
        let rows = pool.ask_once(sql::END_HOLDER, &[&key.id(), &key.is_pair(), &holder.pid, &millis]);
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
        "the role may not end the session of {holder}; grant it pg_signal_backend or the holder's role, or break the lock as a role that \
         has one of them (a superuser's session is ended by superusers only)"
    );
    Error::new(ErrorKind::SessionRefused, text).because_of(error)
}

/// Gives a semaphore another number of permits; how many it had, or was `said` to have if nobody has asked for one yet.
pub(crate) fn set_permits(pool: &Pool, named: &Named<'_>, said: u32, permits: u32) -> Result<u32> {
    let (id, permits, said) = (named.key.id(), permits.cast_signed(), said.cast_signed());
    let rows = pool.ask_once(sql::SET_PERMITS, &[&id, &named.namespace, &named.name, &permits, &said])?;
    let former = rows.first().map(|row| get::<i32>(row, 0)).transpose()?;
    former
        .map(i32::cast_unsigned)
        .ok_or_else(|| Refusal::collision(named.name, "another semaphore's key").into_error())
}

/// When the work under the key began that succeeded last, and the server's time.
pub(crate) fn successes(pool: &Pool, named: &Named<'_>) -> Result<Successes> {
    let rows = pool.ask(sql::LAST_SUCCESS, &[&named.namespace, &named.name])?;
    let row = rows.first().ok_or_else(|| Refusal::standby().into_error())?;
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
    Ok(!pool.ask_once(sql::FORGET_SUCCESS, &[&named.namespace, &named.name])?.is_empty())
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
        permit: None,
    };
    match view.holder {
        None => view.holder = Some(holder),
        Some(_) => view.sharers.push(holder),
    }
    Ok(())
}

/// The same of a semaphore, and how many permits it has.
fn add_to_semaphore(view: &mut LockView, row: &Row) -> Result<()> {
    let (permits, permit): (i32, Option<i32>) = (get(row, 11)?, get(row, 12)?);
    view.permits = Some(permits.cast_unsigned());
    if !get::<bool>(row, 13)? {
        return Ok(());
    }
    add(view, row)?;
    if let Some(permit) = permit
        && let Some(holder) = view.sharers.last_mut().or(view.holder.as_mut())
    {
        holder.permit = Some(permit.cast_unsigned());
    }
    Ok(())
}

fn get<'a, T: postgres::types::FromSql<'a>>(row: &'a Row, column: usize) -> Result<T> {
    row.try_get(column).map_err(|error| Refusal::from_failure(Failure::of(error)).into_error())
}
