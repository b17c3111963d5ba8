//! Locks that a transaction of the application's takes: whom they exclude, and what a failure leaves.

use std::thread;
use std::time::{Duration, Instant};

use dsync::{Config, Context, Error, ErrorKind, Key, PostgresManager, TransactionLock};
use postgres::{Client, GenericClient, IsolationLevel, NoTls, SimpleQueryMessage, Transaction};
use support::pgbouncer::{self, PoolMode};
use support::{Database, Replication, Server};

use crate::common::{Lateness, PATIENCE, becomes, begin, kind, lock, soon, started};

fn manager(database: &Database<'_>) -> PostgresManager {
    started(config(database))
}

pub(crate) fn config(database: &Database<'_>) -> Config {
    Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE)
}

pub(crate) fn advisory_locks(client: &mut impl GenericClient) -> i64 {
    let query = "SELECT count(*) FROM pg_locks JOIN pg_database ON oid = database
                 WHERE locktype = 'advisory' AND datname = current_database()";
    client.query_one(query, &[]).unwrap().get(0)
}

/// Waits until so many sessions wait for an advisory lock.
pub(crate) fn wait_for_waiters(client: &mut impl GenericClient, count: i64) {
    let query = "SELECT count(*) FROM pg_locks JOIN pg_database ON oid = database
                 WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()";
    becomes("the waiters", &count, || client.query_one(query, &[]).unwrap().get::<_, i64>(0));
}

/// Ends what a session that waits for an advisory lock does, by this function of PostgreSQL's.
pub(crate) fn strike_waiter(client: &mut impl GenericClient, function: &str) {
    wait_for_waiters(client, 1);
    let query = format!(
        "SELECT {function}(pid) FROM pg_locks JOIN pg_database ON oid = database
         WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"
    );
    assert_eq!(client.query(&query, &[]).unwrap().len(), 1);
}

pub(crate) fn lock_timeout(client: &mut impl GenericClient) -> String {
    client.query_one("SHOW lock_timeout", &[]).unwrap().get(0)
}

/// The error has this kind, and its text tells all of these.
#[track_caller]
pub(crate) fn tells(error: &Error, kind: ErrorKind, texts: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for part in texts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

const GOES_ON: &str = "the transaction can go on without it";
const CANNOT_GO_ON: &str = "the transaction must be rolled back";

fn shortly() -> Duration {
    Duration::from_millis(100)
}

/// The transaction works, and holds no advisory lock.
#[track_caller]
fn goes_on(transaction: &mut Transaction<'_>) {
    let query =
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted";
    assert_eq!(transaction.query_one(query, &[]).unwrap().get::<_, i64>(0), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Whom it excludes
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn it_excludes_guards_and_claims_of_its_key_and_is_excluded_by_them() {
    let database = Database::fresh().unwrap();
    let [manager, elsewhere] = [config(&database), config(&database).namespace("elsewhere")].map(started);
    let (mut client, mut operator) = (database.client().unwrap(), database.client().unwrap());
    let keys: [(Key, bool); 6] = [
        ("invoices".into(), true),
        ("schlüssel/鍵 'x'".into(), true),
        (7_i64.into(), false),
        (i64::MIN.into(), false),
        ((7, -7).into(), false),
        ((i32::MIN, i32::MAX).into(), false),
    ];
    for (key, has_namespace) in &keys {
        let in_transaction = manager.transaction_lock(key.clone()).unwrap();
        let handle = manager.lock(key.clone()).unwrap();

        // Held by a guard, and then by a claim.
        let guard = handle.try_acquire().unwrap().unwrap();
        let mut transaction = client.transaction().unwrap();
        assert!(!in_transaction.try_acquire(&mut transaction).unwrap(), "{key}");
        assert!(!in_transaction.clone().shared().try_acquire(&mut transaction).unwrap(), "{key}");
        let other = elsewhere.transaction_lock(key.clone()).unwrap();
        assert_eq!(other.try_acquire(&mut transaction).unwrap(), *has_namespace, "{key}");
        goes_on_with(&mut transaction, i64::from(*has_namespace));
        guard.release().unwrap();
        handle.lock(&soon()).unwrap();
        assert!(!in_transaction.try_acquire(&mut transaction).unwrap(), "{key}");

        // It waits for the claim, and a guard waits for it.
        thread::scope(|scope| {
            let waiting = scope.spawn(|| in_transaction.acquire(&mut transaction, PATIENCE));
            wait_for_waiters(&mut operator, 1);
            handle.release().unwrap();
            waiting.join().unwrap().unwrap();
        });
        assert!(handle.try_acquire().unwrap().is_none(), "{key}");
        let next = {
            let handle = manager.lock(key.clone()).unwrap();
            begin(move || handle.acquire(PATIENCE).map(drop))
        };
        wait_for_waiters(&mut operator, 1);
        transaction.commit().unwrap();
        next.get().unwrap();
    }
    drop([manager, elsewhere]);
    becomes("the locks", &0, || advisory_locks(&mut operator));
}

/// As `goes_on`, with so many locks of its own.
#[track_caller]
fn goes_on_with(transaction: &mut Transaction<'_>, count: i64) {
    let query =
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted";
    assert_eq!(transaction.query_one(query, &[]).unwrap().get::<_, i64>(0), count);
}

#[test]
fn those_who_share_it_are_together_and_exclude_who_wants_it_alone() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let handle = lock(&manager, "prices");
    let alone = manager.transaction_lock("prices").unwrap();
    let shared = alone.clone().shared();
    let [mut a, mut b, mut c] = [(); 3].map(|()| database.client().unwrap());
    let [mut a, mut b] = [&mut a, &mut b].map(|client| client.transaction().unwrap());
    assert!(shared.try_acquire(&mut a).unwrap());
    shared.acquire(&mut b, PATIENCE).unwrap();
    let mut third = c.transaction().unwrap();
    assert!(!alone.try_acquire(&mut third).unwrap());
    assert!(handle.try_acquire().unwrap().is_none());
    tells(&alone.acquire(&mut third, shortly()).unwrap_err(), ErrorKind::TimedOut, &["prices", GOES_ON]);
    a.commit().unwrap();
    assert!(!alone.try_acquire(&mut third).unwrap());
    b.rollback().unwrap();
    assert!(alone.try_acquire(&mut third).unwrap());
    // A session is granted what it has.
    assert!(shared.try_acquire(&mut third).unwrap());
    third.commit().unwrap();
    assert!(handle.try_acquire().unwrap().is_some());
}

#[test]
fn it_ends_with_the_transaction_or_with_the_nested_one_that_took_it() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let (mut client, mut operator) = (database.client().unwrap(), database.client().unwrap());
    let lock = manager.transaction_lock("x").unwrap();
    for end in ["commit", "rollback", "drop"] {
        let mut transaction = client.transaction().unwrap();
        lock.acquire(&mut transaction, PATIENCE).unwrap();
        assert_eq!(advisory_locks(&mut operator), 1);
        match end {
            "commit" => transaction.commit().unwrap(),
            "rollback" => transaction.rollback().unwrap(),
            _ => drop(transaction),
        }
        assert_eq!(advisory_locks(&mut operator), 0, "{end}");
    }

    let mut transaction = client.transaction().unwrap();
    let mut nested = transaction.transaction().unwrap();
    lock.acquire(&mut nested, PATIENCE).unwrap();
    nested.rollback().unwrap();
    assert_eq!(advisory_locks(&mut operator), 0);
    let mut nested = transaction.transaction().unwrap();
    lock.acquire(&mut nested, PATIENCE).unwrap();
    nested.commit().unwrap();
    assert_eq!(advisory_locks(&mut operator), 1);
    transaction.commit().unwrap();
    assert_eq!(advisory_locks(&mut operator), 0);
}

/// Each adds one to a number that it has read before, by statements that are not prepared.
fn loses_nothing(url: &str, manager: &PostgresManager, operator: &mut Client) {
    const THREADS: i64 = 8;
    const ROUNDS: i64 = 40;
    operator.batch_execute("DROP TABLE IF EXISTS counter; CREATE TABLE counter AS SELECT 0 AS n").unwrap();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut client = Client::connect(url, NoTls).unwrap();
                for _ in 0..ROUNDS {
                    let mut transaction = client.transaction().unwrap();
                    manager.transaction_lock("counter").unwrap().acquire(&mut transaction, PATIENCE).unwrap();
                    let n: i64 = text(&mut transaction, "SELECT n FROM counter").parse().unwrap();
                    transaction.batch_execute(&format!("UPDATE counter SET n = {}", n + 1)).unwrap();
                    transaction.commit().unwrap();
                }
            });
        }
    });
    assert_eq!(text(operator, "SELECT n FROM counter"), (THREADS * ROUNDS).to_string());
    assert_eq!(advisory_locks(operator), 0);
}

/// The one value of the answer, by a simple query.
pub(crate) fn text(client: &mut impl GenericClient, query: &str) -> String {
    let answers = client.simple_query(query).unwrap();
    let value = answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    value.expect("a row")
}

#[test]
fn what_threads_count_under_it_is_counted_once_each() {
    let database = Database::fresh().unwrap();
    loses_nothing(&database.url(), &manager(&database), &mut database.client().unwrap());
}

#[test]
fn it_works_through_a_pooler_in_transaction_mode() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let (mut holder, mut operator) = (database.client().unwrap(), database.client().unwrap());
    let settings = [("default_pool_size", "3")];
    let bouncer = pgbouncer::start_with(Server::shared(), PoolMode::Transaction, &settings).unwrap();
    let url = bouncer.url(database.name());
    loses_nothing(&url, &manager, &mut operator);

    let lock = manager.transaction_lock("x").unwrap();
    let mut held = holder.transaction().unwrap();
    lock.acquire(&mut held, PATIENCE).unwrap();
    let mut client = Client::connect(&url, NoTls).unwrap();
    let mut transaction = client.transaction().unwrap();
    assert_eq!(kind(lock.acquire(&mut transaction, shortly())), ErrorKind::TimedOut);
    assert_eq!(text(&mut transaction, "SHOW lock_timeout"), "0");
    held.commit().unwrap();
    lock.acquire(&mut transaction, PATIENCE).unwrap();
    assert_eq!(text(&mut transaction, "SELECT count(*) FROM pg_prepared_statements"), "0");
    transaction.commit().unwrap();
    assert_eq!(advisory_locks(&mut operator), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// What a failure leaves
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_timeout_leaves_the_transaction_as_it_was() {
    let database = Database::fresh().unwrap();
    // So that the waits are cut.
    let manager = started(config(&database).wait_slice(Duration::from_millis(40)));
    let lock = manager.transaction_lock("x").unwrap();
    let (mut client, mut other) = (database.client().unwrap(), database.client().unwrap());
    for (of_session, of_transaction, expected) in [
        ("", "", "0"),
        ("SET lock_timeout = '7s'", "", "7s"),
        ("SET lock_timeout = '7s'", "SET LOCAL lock_timeout = '90min'", "90min"),
        ("RESET lock_timeout", "SET lock_timeout = 20", "20ms"),
        ("RESET lock_timeout", "SET LOCAL lock_timeout = 1", "1ms"),
    ] {
        client.batch_execute(of_session).unwrap();
        let after = lock_timeout(&mut client);
        let mut holder = other.transaction().unwrap();
        assert!(lock.try_acquire(&mut holder).unwrap());
        let mut transaction = client.transaction().unwrap();
        transaction.batch_execute(of_transaction).unwrap();
        // The name of the library's.
        let mut nested = transaction.savepoint("dsync_lock").unwrap();
        nested.batch_execute("CREATE TABLE made ()").unwrap();

        let begun = Instant::now();
        let error = lock.acquire(&mut nested, Duration::from_millis(150)).unwrap_err();
        tells(&error, ErrorKind::TimedOut, &["\"x\"", "another session holds it", GOES_ON]);
        assert!(begun.elapsed() >= Duration::from_millis(150));
        goes_on(&mut nested);
        assert_eq!(lock_timeout(&mut nested), expected);
        assert_eq!(kind(lock.acquire(&mut nested, Duration::ZERO)), ErrorKind::TimedOut);
        assert_eq!(kind(lock.acquire(&mut nested, Duration::from_nanos(1))), ErrorKind::TimedOut);

        thread::scope(|scope| {
            let waiting = scope.spawn(|| lock.acquire(&mut nested, PATIENCE));
            wait_for_waiters(&mut holder, 1);
            holder.commit().unwrap();
            waiting.join().unwrap().unwrap();
        });
        assert_eq!(lock_timeout(&mut nested), expected);
        goes_on_with(&mut nested, 1);
        // Had the library's savepoint been left, this would be the end of that.
        nested.rollback().unwrap();
        let made = "SELECT count(*) FROM pg_class WHERE relname = 'made'";
        assert_eq!(transaction.query_one(made, &[]).unwrap().get::<_, i64>(0), 0);
        goes_on(&mut transaction);
        assert_eq!(lock_timeout(&mut transaction), expected);
        transaction.rollback().unwrap();
        assert_eq!(lock_timeout(&mut client), after);
    }
}

#[test]
fn a_cancelled_call_returns_within_a_second_and_leaves_the_transaction_as_it_was() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let lock = manager.transaction_lock("x").unwrap();
    let [mut client, mut other, mut operator] = [(); 3].map(|()| database.client().unwrap());
    let mut holder = other.transaction().unwrap();
    lock.acquire(&mut holder, PATIENCE).unwrap();
    let mut transaction = client.transaction().unwrap();
    let (context, canceller) = Context::background().with_cancel();
    let late = Lateness::watch();
    let took = thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let error = lock.acquire(&mut transaction, &context).unwrap_err();
            (error, Instant::now())
        });
        wait_for_waiters(&mut operator, 1);
        let cancelled = Instant::now();
        canceller.cancel();
        let (error, returned) = waiting.join().unwrap();
        tells(&error, ErrorKind::Cancelled, &["the context was cancelled", GOES_ON]);
        returned - cancelled
    });
    // A second, and some for a machine that has others to serve.
    late.allow(took, Duration::from_secs(4));
    goes_on(&mut transaction);
    holder.commit().unwrap();
    assert_eq!(kind(lock.acquire(&mut transaction, &context)), ErrorKind::Cancelled);
    goes_on(&mut transaction);
    lock.acquire(&mut transaction, PATIENCE).unwrap();
}

#[test]
fn statement_timeout_a_cancel_request_and_a_deadlock_are_told_apart_from_a_timeout() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let [lock, second] = ["x", "y"].map(|key| manager.transaction_lock(key).unwrap());
    let [mut client, mut other, mut operator] = [(); 3].map(|()| database.client().unwrap());
    let mut holder = other.transaction().unwrap();
    lock.acquire(&mut holder, PATIENCE).unwrap();

    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute("SET LOCAL statement_timeout = '2s'").unwrap();
    let error = lock.acquire(&mut transaction, PATIENCE).unwrap_err();
    tells(&error, ErrorKind::TimedOut, &["statement_timeout", "2s", "raise it", GOES_ON]);
    assert_eq!(error.sqlstate(), Some("57014"));
    goes_on(&mut transaction);

    for limit in ["'1h'", "0"] {
        transaction.batch_execute(&format!("SET LOCAL statement_timeout = {limit}")).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| lock.acquire(&mut transaction, PATIENCE));
            strike_waiter(&mut operator, "pg_cancel_backend");
            let error = waiting.join().unwrap().unwrap_err();
            tells(&error, ErrorKind::Cancelled, &["the statement that waited was cancelled", GOES_ON]);
            assert_eq!(error.sqlstate(), Some("57014"));
        });
        goes_on(&mut transaction);
        assert_eq!(lock_timeout(&mut transaction), "0");
    }

    // The server ends the one wait or the other.
    second.acquire(&mut transaction, PATIENCE).unwrap();
    let ends = |lock: &TransactionLock, mut transaction: Transaction<'_>| match lock
        .acquire(&mut transaction, PATIENCE)
    {
        Ok(()) => 0,
        Err(error) => {
            tells(&error, ErrorKind::LockUnavailable, &["in one order", GOES_ON]);
            assert_eq!(error.sqlstate(), Some("40P01"));
            transaction.batch_execute("SELECT 1").unwrap();
            // The other one has its lock now.
            transaction.rollback().unwrap();
            1
        }
    };
    let found: i32 = thread::scope(|scope| {
        let one = scope.spawn(|| ends(&lock, transaction));
        let other = scope.spawn(|| ends(&second, holder));
        [one, other].map(|thread| thread.join().unwrap()).iter().sum()
    });
    assert_eq!(found, 1);
}

#[test]
fn a_transaction_above_read_committed_is_refused_and_can_go_on() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let lock = manager.transaction_lock("x").unwrap();
    let (mut client, mut operator) = (database.client().unwrap(), database.client().unwrap());
    for (level, works) in [
        (IsolationLevel::ReadUncommitted, true),
        (IsolationLevel::ReadCommitted, true),
        (IsolationLevel::RepeatableRead, false),
        (IsolationLevel::Serializable, false),
    ] {
        // As it is stated, and as the connection's default.
        for stated in [true, false] {
            let builder = client.build_transaction();
            let builder = if stated { builder.isolation_level(level) } else { builder };
            let mut transaction = builder.read_only(true).start().unwrap();
            if !stated {
                transaction.rollback().unwrap();
                let name = match level {
                    IsolationLevel::ReadUncommitted => "read uncommitted",
                    IsolationLevel::ReadCommitted => "read committed",
                    IsolationLevel::RepeatableRead => "repeatable read",
                    _ => "serializable",
                };
                client.batch_execute(&format!("SET default_transaction_isolation = '{name}'")).unwrap();
                transaction = client.transaction().unwrap();
            }
            if works {
                lock.acquire(&mut transaction, PATIENCE).unwrap();
                goes_on_with(&mut transaction, 1);
            } else {
                for error in [
                    lock.acquire(&mut transaction, PATIENCE).unwrap_err(),
                    lock.try_acquire(&mut transaction).unwrap_err(),
                ] {
                    tells(&error, ErrorKind::SessionRefused, &["READ COMMITTED", "session lock", GOES_ON]);
                }
                goes_on(&mut transaction);
            }
            transaction.commit().unwrap();
            client.batch_execute("RESET default_transaction_isolation").unwrap();
        }
    }
    assert_eq!(advisory_locks(&mut operator), 0);
}

#[test]
fn a_hot_standby_is_refused() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    let manager = PostgresManager::new(Config::from_url(&primary.url()).unwrap()).unwrap();
    let mut client = standby.client().unwrap();
    let error = {
        let mut transaction = client.transaction().unwrap();
        let error = manager.transaction_lock("x").unwrap().try_acquire(&mut transaction).unwrap_err();
        goes_on(&mut transaction);
        error
    };
    tells(&error, ErrorKind::SessionRefused, &["hot standby", "connect to the primary", GOES_ON]);
    let error = manager.session_lock("x").unwrap().try_acquire(&mut client).unwrap_err();
    tells(&error, ErrorKind::SessionRefused, &["hot standby", "connect to the primary"]);
    assert_eq!(advisory_locks(&mut client), 0);
}

#[test]
fn a_transaction_that_cannot_go_on_is_told() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let lock = manager.transaction_lock("x").unwrap();
    let [mut client, mut other, mut operator] = [(); 3].map(|()| database.client().unwrap());

    // An earlier statement has failed.
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute("SELECT 1 / 0").unwrap_err();
    for error in [
        lock.acquire(&mut transaction, PATIENCE).unwrap_err(),
        lock.try_acquire(&mut transaction).unwrap_err(),
    ] {
        let texts = ["\"x\"", "an earlier statement of the transaction has failed", CANNOT_GO_ON];
        tells(&error, ErrorKind::SessionUnavailable, &texts);
        assert_eq!(error.sqlstate(), Some("25P02"));
    }
    transaction.rollback().unwrap();

    // The session is ended during the wait, and has ended before the call.
    let mut holder = other.transaction().unwrap();
    lock.acquire(&mut holder, PATIENCE).unwrap();
    let mut transaction = client.transaction().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| lock.acquire(&mut transaction, PATIENCE));
        strike_waiter(&mut operator, "pg_terminate_backend");
        let error = waiting.join().unwrap().unwrap_err();
        tells(&error, ErrorKind::SessionUnavailable, &[CANNOT_GO_ON]);
        // The driver may see the end of the connection before it has read the server's last word.
        assert!(matches!(error.sqlstate(), Some("57P01") | None), "{error}");
    });
    let error = lock.try_acquire(&mut transaction).unwrap_err();
    tells(&error, ErrorKind::SessionUnavailable, &[CANNOT_GO_ON]);
    drop(transaction);
    holder.commit().unwrap();
    becomes("the locks", &0, || advisory_locks(&mut operator));
}

/// It needs the key's number and nothing else.
#[test]
fn it_needs_no_manager_that_runs() {
    let database = Database::fresh().unwrap();
    let manager = PostgresManager::new(config(&database)).unwrap();
    let lock = manager.transaction_lock("x").unwrap();
    for name in ["", "a\0b"] {
        assert_eq!(kind(manager.transaction_lock(name)), ErrorKind::InvalidKey);
        assert_eq!(kind(manager.session_lock(name)), ErrorKind::InvalidKey);
    }
    drop(manager);
    let mut client = database.client().unwrap();
    let mut transaction = client.transaction().unwrap();
    assert!(lock.try_acquire(&mut transaction).unwrap());
    goes_on_with(&mut transaction, 1);
}
