//! What guards ask of the server; `contract.rs` has what they promise.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use dsync::{CatalogMode, Config, PostgresManager};
use support::{Database, Server};

use crate::common::{PATIENCE, becomes, lock, started};

/// Sessions that the library has opened in this database.
fn sessions(client: &mut postgres::Client) -> i64 {
    let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'
                 AND pid <> pg_backend_pid()";
    client.query_one(query, &[]).unwrap().get(0)
}

#[test]
fn sixty_four_threads_that_want_one_key_use_one_session() {
    const THREADS: usize = 64;
    const TURNS: usize = 5;
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE));
    let wanted = lock(&manager, "wanted");
    drop(wanted.acquire(PATIENCE).unwrap());
    // The start may have had another one, whose backend is a moment later with its end.
    becomes("the sessions", &1, || sessions(operator));
    let (inside, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let barrier = Barrier::new(THREADS + 1);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    for _ in 0..TURNS {
                        let guard = wanted.acquire(PATIENCE).unwrap();
                        assert_eq!(inside.fetch_add(1, SeqCst), 0, "somebody else is inside");
                        thread::sleep(Duration::from_millis(1));
                        inside.fetch_sub(1, SeqCst);
                        guard.release().unwrap();
                    }
                })
            })
            .collect();
        let most = scope.spawn(|| {
            let mut most = 0;
            while !is_over.load(SeqCst) {
                most = most.max(sessions(operator));
            }
            most
        });
        barrier.wait();
        let outcomes: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        is_over.store(true, SeqCst);
        assert_eq!(most.join().unwrap(), 1);
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    });
}

/// A cancel request is a connection of its own. So is each session, of which there is one for all the attempts.
#[test]
fn an_attempt_that_does_not_wait_makes_no_connection() {
    let server = Server::builder().setting("log_connections", "on").start().unwrap();
    let database = server.database().unwrap();
    let connections = || server.log().matches("connection received").count();
    let [holder, others, plain] = [CatalogMode::Automatic, CatalogMode::Automatic, CatalogMode::None]
        .map(|mode| started(Config::from_url(&database.url()).unwrap().catalog(mode)));
    let guard = lock(&holder, "wanted").acquire(PATIENCE).unwrap();
    let tries = |manager: &PostgresManager| {
        let wanted = lock(manager, "wanted");
        assert!(wanted.try_acquire().unwrap().is_none());
        let before = connections();
        for _ in 0..50 {
            assert!(wanted.try_acquire().unwrap().is_none());
        }
        assert_eq!(connections(), before, "it is that of a cancel request, or of another session");
    };
    tries(&others);
    tries(&plain);
    guard.release().unwrap();
    for manager in [&others, &plain] {
        lock(manager, "wanted").try_acquire().unwrap().expect("it is free").release().unwrap();
    }
}

#[test]
fn an_attempt_that_fails_leaves_nothing_on_its_session() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    for mode in [CatalogMode::Automatic, CatalogMode::None] {
        let [holder, other] =
            [(); 2].map(|()| started(Config::from_url(&database.url()).unwrap().catalog(mode)));
        let guard = lock(&holder, "wanted").acquire(PATIENCE).unwrap();
        for _ in 0..10 {
            assert!(lock(&other, "wanted").try_acquire().unwrap().is_none());
        }
        becomes("the locks", &1, || {
            let query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database =
                         (SELECT oid FROM pg_database WHERE datname = current_database())";
            operator.query_one(query, &[]).unwrap().get::<_, i64>(0)
        });
        // The lease and the name of the last attempt are taken off the session that rests.
        becomes("the names", &1, || {
            let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                         AND application_name = 'dsync wanted'";
            operator.query_one(query, &[]).unwrap().get::<_, i64>(0)
        });
        drop(guard);
    }
}
