//! Asks the server who holds and who waits.

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use postgres::Row;
use postgres::types::ToSql;

use super::pool::Pool;
use super::refusal::Refusal;

use super::sql::{self, Scope};
use super::stream::StreamControl;
use super::wire::Failure;
use crate::error::{ErrorKind, Result};
use crate::key::AdvisoryKey;
use crate::loss::LossReason;
use crate::view::{Holder, LockView, Waiter};

/// One key, and how the catalog knows it.
#[derive(Debug)]
pub(super) struct Named<'a> {
    pub(super) key: AdvisoryKey,
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
}

/// The view of one lock. Of a free one, too.
pub(super) fn one(pool: &Pool, named: &Named<'_>, catalog: bool, patience: Duration) -> Result<LockView> {
    let (id, pair) = (named.key.id(), named.key.is_pair());
    let rows = ask(pool, Scope::One { catalog }, &[&id, &pair, &named.namespace, &named.name], patience)?;
    let mut view = LockView {
        namespace: named.namespace.to_owned(),
        key: named.name.to_owned(),
        holder: None,
        waiters: Vec::new(),
    };
    for row in &rows {
        add(&mut view, row)?;
    }
    Ok(view)
}

/// The views of all locks with a name that are held or waited for.
pub(super) fn all(pool: &Pool, patience: Duration) -> Result<Vec<LockView>> {
    let mut views: Vec<LockView> = Vec::new();
    for row in &ask(pool, Scope::All, &[], patience)? {
        let (namespace, key): (String, String) = (get(row, 0)?, get(row, 1)?);
        // The rows of one key come one after another.
        match views.last_mut().filter(|view| view.namespace == namespace && view.key == key) {
            Some(view) => add(view, row)?,
            None => {
                let mut view = LockView { namespace, key, holder: None, waiters: Vec::new() };
                add(&mut view, row)?;
                views.push(view);
            }
        }
    }
    Ok(views)
}

/// Asks on a session of the pool, which goes back there.
fn ask(
    pool: &Pool,
    scope: Scope,
    parameters: &[&(dyn ToSql + Sync)],
    patience: Duration,
) -> Result<Vec<Row>> {
    let mut slot = pool.take().map_err(Refusal::into_error)?;
    pool.open(&mut slot, &StreamControl::new()).map_err(Refusal::into_error)?;
    let Some(session) = slot.session() else { return Err(Refusal::not_postgres().into_error()) };
    let statement = session.schema().apply(&sql::inspect(scope));
    session.query(&statement, parameters, Instant::now() + patience).map_err(|failure| {
        if let Failure::Lost { .. } = failure {
            slot.taint();
        }
        let refusal = match failure {
            // It waits for nothing but a table.
            Failure::Lost { reason: LossReason::HeartbeatTimedOut, .. } => Refusal::new(
                ErrorKind::SessionUnavailable,
                format!(
                    "the server has not answered within {patience:?}; see whether it runs, and in pg_locks whether a table \
                     of the catalog is locked by another session"
                ),
            ),
            failure => Refusal::from_failure(failure),
        };
        if refusal.is_about_catalog() {
            pool.catalog_is_gone();
        }
        refusal.into_error()
    })
}

/// Adds a holder or a waiter. Only a foreign application can hold a lock with several sessions (`pg_advisory_lock_shared`);
/// the first one stands for them.
fn add(view: &mut LockView, row: &Row) -> Result<()> {
    let (granted, pid): (bool, i32) = (get(row, 2)?, get(row, 3)?);
    let client_addr: Option<IpAddr> = get(row, 4)?;
    let application_name: Option<String> = get(row, 5)?;
    if !granted {
        let waiting_for = Duration::try_from_secs_f64(get(row, 9)?).unwrap_or_default();
        view.waiters.push(Waiter { pid, client_addr, application_name, waiting_for });
    } else if view.holder.is_none() {
        view.holder = Some(Holder {
            annotation: get(row, 7)?,
            token: get(row, 6)?,
            pid,
            client_addr,
            application_name,
            since: get::<Option<SystemTime>>(row, 8)?,
        });
    }
    Ok(())
}

fn get<'a, T: postgres::types::FromSql<'a>>(row: &'a Row, column: usize) -> Result<T> {
    row.try_get(column).map_err(|error| Refusal::from_failure(Failure::of(error)).into_error())
}
