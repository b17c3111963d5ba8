//! Nothing is left of claims that have ended, whatever became of them, and nothing of a manager that has stopped.
//!
//! One test only, since it counts what its process has.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

mod common;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::Duration;

use common::{PATIENCE, becomes, eventually, hear, is_held, kind, soon, started};
use dsync::{Config, Context, ErrorKind, Key, Lock, LockOptions, PostgresManager, SyncManager, json_valuer};
use postgres::Client;
use support::{Database, process};

/// Claims at one time, and so sessions.
const THREADS: u8 = 4;

/// Short, so that an idle session that still carried it would not live long.
const LEASE: Duration = Duration::from_secs(2);

/// Claims in which everything comes to the size that it has from then on: the heap above all.
const WARM_UP: i64 = 2_000;

const CLAIMS: i64 = 10_000;

/// By what the memory may grow over all claims: about 200 bytes for each, which is less than what the manager keeps
/// for a lock. It is not zero, since allocators take and keep pages as threads happen to meet.
const GROWTH: u64 = 2 << 20;

#[test]
fn nothing_is_left_of_ten_thousand_claims_on_as_many_keys() {
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let _blocker = blocker(&database);
    let threads_before = own_threads();
    let config = Config::from_url(&database.url()).unwrap().max_sessions(THREADS.into()).lease(LEASE);
    // The server may be busy for a while.
    let manager = started(config.release_timeout(PATIENCE));

    make_claims(&database, &manager, 1..=WARM_UP);
    fill_pool(&manager);
    let before = Usage::now(&mut operator);
    make_claims(&database, &manager, WARM_UP + 1..=WARM_UP + CLAIMS);
    fill_pool(&manager);
    let after = Usage::now(&mut operator);
    println!("before: {before:?}\nafter: {after:?}");
    assert_eq!(after.counted, before.counted, "{:?}", own_threads());
    assert_eq!(after.counted.sessions, i64::from(THREADS));
    assert_eq!(after.counted.locks, 0);
    assert!(after.memory <= before.memory + GROWTH, "{before:?} {after:?}");
    assert!(format!("{manager:?}").contains("locks: 0,"), "keys are remembered: {manager:?}");

    idle_sessions_outlive_the_lease(&mut operator);

    manager.stop().unwrap();
    drop(manager);
    // The threads of r2d2's pool end by themselves.
    becomes("the threads", &threads_before, own_threads);
    becomes("the sessions", &0, || sessions(&mut operator).len());
}

/// No timeout and no lock of a claim before stays with a session in the pool.
fn idle_sessions_outlive_the_lease(operator: &mut Client) {
    let idle = sessions(operator);
    assert_eq!(idle.len(), usize::from(THREADS));
    // There is no event to wait for: the test is that nothing happens.
    thread::sleep(LEASE * 3 / 2);
    assert_eq!(sessions(operator), idle);
    assert_eq!(locks(operator), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Claims of all kinds
// ---------------------------------------------------------------------------------------------------------------------

/// A session like those of other services, which holds the number of each claim.
fn blocker(database: &Database<'_>) -> Client {
    let mut client = database.client().unwrap();
    client.batch_execute("SET application_name = 'blocker'").unwrap();
    let last = WARM_UP + CLAIMS;
    let lock_all = "SELECT count(pg_advisory_lock(number)) FROM generate_series(1, $1::int8) AS number";
    let count: i64 = client.query_one(lock_all, &[&last]).unwrap().get(0);
    assert_eq!(count, last);
    client
}

fn make_claims(database: &Database<'_>, manager: &PostgresManager, numbers: std::ops::RangeInclusive<i64>) {
    let next = AtomicI64::new(*numbers.start());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut operator = database.client().unwrap();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if !numbers.contains(&number) {
                        return;
                    }
                    make_claim(&mut operator, manager, number);
                }
            });
        }
    });
}

/// One claim on a key of its own, from its beginning to its end.
fn make_claim(operator: &mut Client, manager: &PostgresManager, number: i64) {
    let name = format!("key {number}");
    let options = LockOptions::new().valuer(json_valuer(&name).unwrap());
    let free = || manager.lock_with(&*name, options.clone()).unwrap();
    let blocked = || manager.lock_with(number, options.clone()).unwrap();
    match number % 20 {
        // The session is removed, and the claim ends while the lock is lost or when it is held again.
        0 => {
            let lock = free();
            lock.lock(&soon()).unwrap();
            let lost = lock.lost();
            terminate(operator, &name);
            hear(&lost);
            if number % 40 == 0 {
                eventually("the lock in the background", || is_held(&lock));
            }
            end(manager, lock, &Key::from(&*name), number);
        }
        1..=2 => {
            let lock = blocked();
            let context = Context::timeout(Duration::from_millis(number.cast_unsigned() % 5));
            assert_eq!(kind(lock.lock(&context)), ErrorKind::TimedOut);
            end(manager, lock, &Key::from(number), number);
        }
        3..=4 => {
            let lock = blocked();
            assert_eq!(kind(lock.try_lock(&soon())), ErrorKind::LockUnavailable);
            end(manager, lock, &Key::from(number), number);
        }
        5..=9 => drop(free().try_acquire().unwrap().expect("it is free")),
        _ => {
            let lock = free();
            lock.lock(&soon()).unwrap();
            end(manager, lock, &Key::from(&*name), number);
        }
    }
}

/// Ends the claim and drops the handles, in one order or another.
fn end(manager: &PostgresManager, lock: Arc<dyn Lock>, key: &Key, number: i64) {
    let again = || manager.lock(key.clone()).unwrap();
    match number % 3 {
        0 => {
            lock.release().unwrap();
            drop(lock);
        }
        1 => {
            drop(lock);
            again().release().unwrap();
        }
        _ => {
            let other = again();
            lock.release().unwrap();
            drop(lock);
            other.release().unwrap();
        }
    }
}

fn terminate(operator: &mut Client, key: &str) {
    let query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
    let count: i64 = operator.query_one(query, &[&format!("dsync {key}")]).unwrap().get(0);
    assert_eq!(count, 1);
}

/// Brings the number of sessions to what it can be at the most, so that two moments can be compared.
fn fill_pool(manager: &PostgresManager) {
    let locks: Vec<_> = (0..THREADS).map(|number| manager.lock(i64::from(number) - 100).unwrap()).collect();
    for lock in &locks {
        lock.lock(&soon()).unwrap();
    }
    for lock in locks {
        lock.release().unwrap();
    }
    // The end of a claim is told a moment before its thread ends.
    let of_locks = |name: &&String| name.starts_with("dsync:") || name.starts_with("dsync-carrier");
    becomes("the threads of locks", &0, || own_threads().iter().filter(of_locks).count());
}

// ---------------------------------------------------------------------------------------------------------------------
// What there is
// ---------------------------------------------------------------------------------------------------------------------

#[derive(Debug)]
struct Usage {
    counted: Counted,
    memory: u64,
}

#[derive(Debug, PartialEq)]
struct Counted {
    threads: Option<usize>,
    descriptors: Option<usize>,
    sessions: i64,
    locks: i64,
}

impl Usage {
    fn now(operator: &mut Client) -> Self {
        let counted = Counted {
            threads: process::threads(process::own()),
            descriptors: process::descriptors(process::own()),
            sessions: sessions(operator).len().try_into().unwrap(),
            locks: locks(operator),
        };
        let memory = process::resident_bytes(process::own()).expect("this system tells of its processes");
        Self { counted, memory }
    }
}

/// The backends of the manager's sessions.
fn sessions(operator: &mut Client) -> Vec<i32> {
    let query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name LIKE 'dsync%' AND application_name <> 'dsync-test-support' ORDER BY pid";
    operator.query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// How many advisory locks there are beside the blocker's.
fn locks(operator: &mut Client) -> i64 {
    let query = "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'
                 AND datname = current_database() AND application_name <> 'blocker'";
    operator.query_one(query, &[]).unwrap().get(0)
}

/// The names of this process's threads, in order.
fn own_threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("this system tells of its processes");
    // A thread may end between the two.
    let name = |task: std::io::Result<fs::DirEntry>| fs::read_to_string(task.ok()?.path().join("comm")).ok();
    let mut names: Vec<_> = tasks.filter_map(name).map(|name| name.trim_end().to_owned()).collect();
    names.sort();
    names
}
