//! Sessions that carry the locks of many claims. What locks promise whichever session they are on is in the modules that have a
//! `shared_session`: of `claims`, `leading`, `outages`, and of `database` the fences.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

#[path = "../common/mod.rs"]
mod common;

mod batches;
mod edges;
mod faults;
mod fleet;
mod permits;
mod waiting;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::{ClaimState, Config, Lock, Lost, PostgresManager, SyncManager, Term};
use postgres::Client;

use common::{PATIENCE, is_held, lock, soon, started};

/// A manager whose locks share one session, beside which it may open `others`.
fn config(url: &str, others: u32) -> Config {
    Config::from_url(url).unwrap().shared_sessions(1).max_sessions(1 + others).release_timeout(PATIENCE)
}

fn sharing(url: &str, others: u32) -> PostgresManager {
    started(config(url, others))
}

fn locks(manager: &PostgresManager, count: usize) -> Vec<Arc<dyn Lock>> {
    (0..count).map(|number| lock(manager, &format!("k{number}"))).collect()
}

/// Locks all at once, each in a thread of its own.
fn lock_all(locks: &[Arc<dyn Lock>]) {
    thread::scope(|scope| {
        for lock in locks {
            scope.spawn(|| lock.lock(&soon()).unwrap());
        }
    });
}

fn lost_channels(locks: &[Arc<dyn Lock>]) -> Vec<Lost> {
    locks.iter().map(|lock| lock.lost()).collect()
}

fn tokens(locks: &[Arc<dyn Lock>]) -> Vec<i64> {
    locks.iter().map(|lock| lock.term().and_then(|term| term.token()).expect("a token")).collect()
}

fn all_are_held(locks: &[Arc<dyn Lock>]) {
    common::eventually("all locks", || locks.iter().all(is_held));
}

fn number(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap().get(0)
}

fn advisory_locks(operator: &mut Client) -> i64 {
    number(operator, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
}

/// How many locks with a row are held, and by how many sessions.
fn held(operator: &mut Client) -> (i64, i64) {
    let query = "SELECT count(*), count(DISTINCT pid) FROM dsync.locks WHERE token IS NOT NULL";
    let row = operator.query_one(query, &[]).unwrap();
    (row.get(0), row.get(1))
}

/// How many claims of the manager are in this state.
fn in_state(manager: &PostgresManager, state: ClaimState) -> usize {
    manager.snapshot().claims.iter().filter(|claim| claim.state == state).count()
}

fn sessions(manager: &PostgresManager) -> u32 {
    manager.snapshot().sessions.unwrap().in_use
}

/// Whether a transaction of its own passes the fence.
fn passes(client: &mut Client, term: &Term) -> bool {
    let mut transaction = client.transaction().unwrap();
    term.fence(&mut transaction).is_ok()
}

fn within(begun: Instant, bound: Duration) {
    let took = begun.elapsed();
    assert!(took <= bound, "{took:?}, the bound is {bound:?}");
}

/// A test that hangs is a failed one.
const LONG: Duration = PATIENCE;
