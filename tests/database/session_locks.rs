//! Locks that a session of the application's takes: whom they exclude, how they are given back, and what a failure leaves.

use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use dsync::{Context, ErrorKind, Key, PostgresManager};
use postgres::{Client, NoTls};
use support::pgbouncer::{self, PoolMode};
use support::{Database, Server};
use tokio::runtime::Builder;

use crate::common::{Lateness, PATIENCE, becomes, kind, started};
use crate::transaction_locks::{
    advisory_locks, config, lock_timeout, strike_waiter, tells, text, wait_for_waiters,
};

const AS_BEFORE: &str = "the connection can be used as before";

fn manager(database: &Database<'_>) -> PostgresManager {
    started(config(database))
}

#[test]
fn it_excludes_guards_and_transactions_and_is_given_back() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let [mut client, mut other, mut operator] = [(); 3].map(|()| database.client().unwrap());
    let keys: [Key; 4] = ["migrations".into(), (-7_i64).into(), (7, -7).into(), (i32::MIN, -1).into()];
    for key in &keys {
        let lock = manager.session_lock(key.clone()).unwrap();
        let handle = manager.lock(key.clone()).unwrap();
        let in_transaction = manager.transaction_lock(key.clone()).unwrap();

        let mut guard = lock.acquire(&mut client, PATIENCE).unwrap();
        // The connection works on, over transactions.
        let mut transaction = guard.transaction().unwrap();
        transaction.batch_execute("SELECT 1").unwrap();
        transaction.rollback().unwrap();
        guard.batch_execute("CREATE TABLE IF NOT EXISTS t ()").unwrap();
        assert!(!guard.is_closed());
        assert!(handle.try_acquire().unwrap().is_none(), "{key}");
        assert!(lock.try_acquire(&mut other).unwrap().is_none(), "{key}");
        let mut transaction = other.transaction().unwrap();
        assert!(!in_transaction.try_acquire(&mut transaction).unwrap(), "{key}");
        drop(transaction);
        guard.release().unwrap();

        // By a drop too, and then others have it.
        drop(lock.try_acquire(&mut client).unwrap().expect("the lock is free"));
        let held = handle.try_acquire().unwrap().expect("the lock is free");
        assert!(lock.try_acquire(&mut client).unwrap().is_none(), "{key}");
        thread::scope(|scope| {
            let waiting = scope.spawn(|| lock.acquire(&mut client, PATIENCE).unwrap().release());
            wait_for_waiters(&mut operator, 1);
            held.release().unwrap();
            waiting.join().unwrap().unwrap();
        });
    }
    drop(manager);
    becomes("the locks", &0, || advisory_locks(&mut operator));
}

#[test]
fn those_who_share_it_are_together_and_give_it_back_each() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let alone = manager.session_lock("prices").unwrap();
    let shared = alone.clone().shared();
    let [mut a, mut b, mut c] = [(); 3].map(|()| database.client().unwrap());
    let first = shared.acquire(&mut a, PATIENCE).unwrap();
    let second = shared.try_acquire(&mut b).unwrap().expect("it is shared");
    assert!(alone.try_acquire(&mut c).unwrap().is_none());
    first.release().unwrap();
    assert!(alone.try_acquire(&mut c).unwrap().is_none());
    second.release().unwrap();
    let guard = alone.try_acquire(&mut c).unwrap().expect("it is free");
    assert!(shared.try_acquire(&mut a).unwrap().is_none());
    guard.release().unwrap();
}

#[test]
fn a_lock_that_did_not_last_is_told_by_its_release() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let mut operator = database.client().unwrap();
    for (end, why) in [
        ("SELECT pg_advisory_unlock_all()", "DISCARD ALL"),
        ("DISCARD ALL", "DISCARD ALL"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", "the connection has ended"),
    ] {
        for shared in [false, true] {
            let lock = manager.session_lock("x").unwrap();
            let lock = if shared { lock.shared() } else { lock };
            let mut client = database.client().unwrap();
            let mut guard = lock.acquire(&mut client, PATIENCE).unwrap();
            let _ = guard.batch_execute(end);
            becomes("the locks", &0, || advisory_locks(&mut operator));
            let error = guard.release().unwrap_err();
            tells(&error, ErrorKind::Lost, &["\"x\"", why, "another holder may have been at work meanwhile"]);
        }
    }
    // Also where nobody has noticed it before, and whether the driver reads the server's last word or the end first.
    let end = "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_database ON oid = database
               WHERE locktype = 'advisory' AND datname = current_database()";
    for _ in 0..20 {
        let mut client = database.client().unwrap();
        let guard = manager.session_lock("x").unwrap().acquire(&mut client, PATIENCE).unwrap();
        assert_eq!(operator.query(end, &[]).unwrap().len(), 1);
        assert_eq!(kind(guard.release()), ErrorKind::Lost);
        becomes("the locks", &0, || advisory_locks(&mut operator));
    }
}

#[test]
fn an_open_transaction_is_refused() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let lock = manager.session_lock("x").unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute("BEGIN").unwrap();
    let error = lock.acquire(&mut client, PATIENCE).unwrap_err();
    tells(&error, ErrorKind::SessionRefused, &["a transaction is open", "use a transaction lock", AS_BEFORE]);
    assert_eq!(advisory_locks(&mut client), 0);
    client.batch_execute("SELECT 1 / 0").unwrap_err();
    let error = lock.try_acquire(&mut client).unwrap_err();
    tells(&error, ErrorKind::SessionUnavailable, &["an earlier statement of the transaction has failed"]);
    client.batch_execute("ROLLBACK").unwrap();

    // One that began later does not keep the lock, unless it has failed.
    for statement in ["SELECT 1", "SELECT 1 / 0"] {
        let mut guard = lock.acquire(&mut client, PATIENCE).unwrap();
        guard.batch_execute("BEGIN").unwrap();
        let failed = guard.batch_execute(statement).is_err();
        let outcome = guard.release();
        assert_eq!(advisory_locks(&mut database.client().unwrap()), i64::from(failed));
        assert_eq!(outcome.is_err(), failed);
        if let Err(error) = outcome {
            tells(&error, ErrorKind::UnlockFailed, &["close the connection, which has the lock still"]);
        }
        client.batch_execute("ROLLBACK").unwrap();
    }
}

#[test]
fn a_wait_that_ends_leaves_the_connection_as_it_was() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let lock = manager.session_lock("x").unwrap();
    let [mut client, mut other, mut operator] = [(); 3].map(|()| database.client().unwrap());
    client.batch_execute("SET lock_timeout = '7s'").unwrap();
    let held = lock.acquire(&mut other, PATIENCE).unwrap();

    let (late, begun) = (Lateness::watch(), Instant::now());
    let error = lock.acquire(&mut client, Duration::from_millis(150)).unwrap_err();
    let took = begun.elapsed();
    tells(&error, ErrorKind::TimedOut, &["\"x\"", "another session holds it", AS_BEFORE]);
    assert!(took >= Duration::from_millis(150), "{took:?}");
    // Not for a slice, which is 5 s.
    late.allow(took, Duration::from_secs(3));
    assert_eq!(kind(lock.acquire(&mut client, Duration::ZERO)), ErrorKind::TimedOut);
    assert_eq!(lock_timeout(&mut client), "7s");

    let (context, canceller) = Context::background().with_cancel();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| lock.acquire(&mut client, &context).map(drop));
        wait_for_waiters(&mut operator, 1);
        canceller.cancel();
        let error = waiting.join().unwrap().unwrap_err();
        tells(&error, ErrorKind::Cancelled, &["the context was cancelled", AS_BEFORE]);
    });
    thread::scope(|scope| {
        let waiting = scope.spawn(|| lock.acquire(&mut client, PATIENCE).map(drop));
        strike_waiter(&mut operator, "pg_cancel_backend");
        let error = waiting.join().unwrap().unwrap_err();
        tells(&error, ErrorKind::Cancelled, &["the statement that waited was cancelled", AS_BEFORE]);
    });
    client.batch_execute("SET statement_timeout = '2s'").unwrap();
    let error = lock.acquire(&mut client, PATIENCE).unwrap_err();
    tells(&error, ErrorKind::TimedOut, &["statement_timeout", "2s", AS_BEFORE]);
    assert_eq!(advisory_locks(&mut client), 1);

    client.batch_execute("RESET statement_timeout").unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut guard = lock.acquire(&mut client, PATIENCE).unwrap();
            assert_eq!(lock_timeout(&mut *guard), "7s");
            guard.release().unwrap();
        });
        wait_for_waiters(&mut operator, 1);
        held.release().unwrap();
        waiting.join().unwrap();
    });

    let held = lock.acquire(&mut other, PATIENCE).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| lock.acquire(&mut client, PATIENCE).map(drop));
        strike_waiter(&mut operator, "pg_terminate_backend");
        let error = waiting.join().unwrap().unwrap_err();
        tells(&error, ErrorKind::SessionUnavailable, &["the connection must be closed"]);
    });
    held.release().unwrap();
    assert_eq!(advisory_locks(&mut operator), 0);
}

/// What the documentation warns of is at least told.
#[test]
fn a_pooler_that_has_exchanged_the_session_is_told() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let settings = [("default_pool_size", "2")];
    let bouncer = pgbouncer::start_with(Server::shared(), PoolMode::Transaction, &settings).unwrap();
    let connect = || Client::connect(&bouncer.url(database.name()), NoTls).unwrap();
    let (mut client, mut stranger) = (connect(), connect());
    let guard = manager.session_lock("x").unwrap().acquire(&mut client, PATIENCE).unwrap();
    // It is given the session that has the lock.
    stranger.batch_execute("BEGIN").unwrap();
    let own = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
    assert_eq!(text(&mut stranger, own), "1");
    let error = guard.release().unwrap_err();
    tells(&error, ErrorKind::Lost, &["a pooler in transaction or statement mode", "use a transaction lock"]);
}

#[test]
fn a_server_that_does_not_answer_holds_up_no_release() {
    let server = Server::start().unwrap();
    let release_timeout = Duration::from_millis(500);
    let config = dsync::Config::from_url(&server.url()).unwrap().release_timeout(release_timeout);
    let manager = PostgresManager::new(config).unwrap();
    let lock = manager.session_lock("x").unwrap();
    for dropped in [false, true] {
        let mut client = server.client().unwrap();
        let guard = lock.acquire(&mut client, PATIENCE).unwrap();
        let frozen = server.freeze().unwrap();
        let (late, begun) = (Lateness::watch(), Instant::now());
        if dropped {
            drop(guard);
        } else {
            tells(
                &guard.release().unwrap_err(),
                ErrorKind::UnlockFailed,
                &["timeout", "close the connection, which has the lock still"],
            );
        }
        let took = begun.elapsed();
        frozen.thaw();
        assert!(took >= release_timeout, "{took:?}");
        // Half a second, and one for a machine that has others to serve.
        late.allow(took, release_timeout * 3);
        drop(client);
        let mut operator = server.client().unwrap();
        becomes("the locks", &0, || advisory_locks(&mut operator));
    }
}

#[test]
fn a_guard_that_is_dropped_in_async_code_gives_the_lock_back() {
    let database = Database::fresh().unwrap();
    let manager = manager(&database);
    let lock = manager.session_lock("x").unwrap();
    let (mut client, mut operator) = (database.client().unwrap(), database.client().unwrap());
    let runtime = Builder::new_current_thread().build().unwrap();
    let guard = lock.acquire(&mut client, PATIENCE).unwrap();
    runtime.block_on(async { drop(guard) });
    assert_eq!(advisory_locks(&mut operator), 0);
    let guard = lock.acquire(&mut client, PATIENCE).unwrap();
    runtime.block_on(async { guard.release() }).unwrap();
    assert_eq!(advisory_locks(&mut operator), 0);
}

/// A cancel request that was meant for something else may strike the release. Whatever it says then, the lock is free.
#[test]
fn a_release_that_is_struck_by_cancel_requests_leaves_no_lock() {
    let database = Database::fresh().unwrap();
    let lock = manager(&database).session_lock("struck").unwrap();
    let [mut client, mut operator] = [(); 2].map(|()| database.client().unwrap());
    let backend: i32 = client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    // One for each round at the most. It disconnects at the end of the test, also of one that fails.
    let (strike, strikes) = bounded::<()>(1);
    thread::spawn(move || {
        for () in strikes {
            thread::sleep(Duration::from_micros(fastrand::u64(..1_000)));
            operator.execute("SELECT pg_cancel_backend($1)", &[&backend]).unwrap();
        }
    });
    let mut other = database.client().unwrap();
    for round in 0..500 {
        let _ = strike.try_send(());
        let Ok(Some(guard)) = lock.try_acquire(&mut client) else {
            // It may have the lock, as the error says.
            while client.batch_execute("SELECT pg_advisory_unlock_all()").is_err() {}
            continue;
        };
        match guard.release() {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::Lost, "round {round}: {error:#}"),
        }
        assert!(lock.try_acquire(&mut other).unwrap().is_some(), "round {round}: the lock stayed behind");
    }
}
