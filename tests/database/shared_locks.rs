//! Readers and writers at the server: who is served when, what a fence says, and what an operator sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, ErrorKind, Key, Lock, LockOptions, PostgresManager, Term};
use postgres::Client;
use support::Database;
use support::process::{Signal, signal};

use crate::common::{Lateness, PATIENCE, begin, eventually, hear, kind, lock, make_catalog, soon, started};

fn config(database: &Database<'_>) -> Config {
    Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE)
}

fn shared(manager: &PostgresManager, key: &str) -> Arc<dyn Lock> {
    manager.shared_lock(key).unwrap()
}

/// Whether a transaction of its own passes the fence.
fn passes(client: &mut Client, term: &Term) -> bool {
    let mut transaction = client.transaction().unwrap();
    match term.fence(&mut transaction) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::Lost => false,
        Err(error) => panic!("{error}"),
    }
}

fn count(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap().get(0)
}

// ---------------------------------------------------------------------------------------------------------------------
// Who is served when
// ---------------------------------------------------------------------------------------------------------------------

const SLICE: Duration = Duration::from_millis(200);
/// How long each of the many has the lock: longer than a slice.
const HOLD: Duration = Duration::from_millis(300);

/// One that comes once, while many take and give back the lock the other way without end. How long it waited.
fn one_among_many(config: &Config, many: usize, they_share: bool) -> Duration {
    let managers = [(); 4].map(|()| started(config.clone().wait_slice(SLICE).max_sessions(32)));
    /// Ends the others however the test ends.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    let holders = AtomicUsize::new(0);
    thread::scope(|scope| {
        let ends = Over(&over);
        for number in 0..many {
            let (manager, over, holders) = (&managers[number % managers.len()], &over, &holders);
            scope.spawn(move || {
                let lock = if they_share { shared(manager, "x") } else { lock(manager, "x") };
                while !over.load(Ordering::Relaxed) {
                    let guard = lock.acquire(PATIENCE).unwrap();
                    holders.fetch_add(1, Ordering::Relaxed);
                    // Each for another time, so that there is always one that has it.
                    thread::sleep(HOLD + Duration::from_millis(number as u64 * 7));
                    holders.fetch_sub(1, Ordering::Relaxed);
                    guard.release().unwrap();
                }
            });
        }
        let wanted = if they_share { many / 2 } else { 1 };
        eventually("those who have it", || holders.load(Ordering::Relaxed) >= wanted);
        let one = if they_share { lock(&managers[0], "x") } else { shared(&managers[0], "x") };
        let (late, begun) = (Lateness::watch(), Instant::now());
        let guard = one.acquire(PATIENCE).unwrap();
        let waited = begun.elapsed().saturating_sub(late.of_a_take_over());
        drop(ends);
        guard.release().unwrap();
        waited
    })
}

/// In slices alone, a writer does not get the lock at all: at each end of a slice it leaves the queue, and readers behind it get in.
#[test]
fn a_writer_is_served_among_fifty_readers_that_hold_the_lock_for_longer_than_a_slice() {
    let database = Database::fresh().unwrap();
    let waited = one_among_many(&config(&database), 50, true);
    // Those who have it, those who came in the same slice, and what it takes on a busy machine.
    assert!(waited < 6 * (HOLD + Duration::from_millis(350)), "{waited:?}");
}

#[test]
fn a_reader_is_served_among_writers_that_hold_the_lock_for_longer_than_a_slice() {
    const WRITERS: usize = 8;
    let database = Database::fresh().unwrap();
    let waited = one_among_many(&config(&database), WRITERS, false);
    // All of the four managers' turns, and as much again.
    assert!(waited < 2 * 4 * (HOLD + Duration::from_millis(60)) + Duration::from_secs(2), "{waited:?}");
}

/// The same where the server knows no quiet slices, and where there is no catalog.
#[test]
fn the_turnstile_works_without_plpgsql_and_without_catalog() {
    for (catalog, loud) in
        [(CatalogMode::Automatic, true), (CatalogMode::None, false), (CatalogMode::None, true)]
    {
        let database = Database::fresh().unwrap();
        if loud {
            make_catalog(config(&database));
            database.client().unwrap().batch_execute("DROP EXTENSION plpgsql CASCADE").unwrap();
        }
        let config = config(&database).catalog(catalog);
        let waited = one_among_many(&config, 6, true);
        assert!(waited < 6 * (HOLD + Duration::from_millis(50)), "{catalog:?} {loud}: {waited:?}");
        one_among_many(&config, 3, false);
    }
}

/// Whoever is granted the lock gives the turnstile back, whatever it wanted; and whoever gives up.
#[test]
fn nobody_keeps_the_turnstile() {
    /// All advisory locks of the database, less the two that a term counts as one.
    const LOCKS: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 2].map(|()| started(config(&database).wait_slice(Duration::from_millis(50))));
    for wants_shared in [false, true] {
        let held = lock(&managers[0], "x").acquire(PATIENCE).unwrap();
        let wanted = if wants_shared { shared(&managers[1], "x") } else { lock(&managers[1], "x") };
        let waiting = {
            let wanted = Arc::clone(&wanted);
            begin(move || wanted.acquire(PATIENCE))
        };
        // The holder's, the turnstile, and the wait for the lock.
        eventually("the turnstile to be had", || count(&mut client, LOCKS) == 3);
        // A second one waits for the turnstile.
        let other = started(config(&database).wait_slice(Duration::from_millis(50)));
        let gives_up = shared(&other, "x");
        assert_eq!(kind(gives_up.acquire(Duration::from_millis(400))), ErrorKind::TimedOut);
        held.release().unwrap();
        let guard = waiting.get().unwrap();
        assert_eq!(count(&mut client, LOCKS), 1);
        guard.release().unwrap();
        assert_eq!(count(&mut client, LOCKS), 0);
    }
}

/// The lock of the one row of the catalog, and its turnstile.
fn numbers(client: &mut Client) -> (i64, i64) {
    let query = "SELECT id, id # 1614237451651786676 FROM dsync.lock";
    let row = client.query_one(query, &[]).unwrap();
    (row.get(0), row.get(1))
}

fn takes(client: &mut Client, id: i64) -> bool {
    client.query_one("SELECT pg_try_advisory_lock($1)", &[&id]).unwrap().get(0)
}

/// Its first statement had the lock without the row, and the second finds a writer at the turnstile.
#[test]
fn a_reader_that_polls_leaves_nothing_in_the_writer_s_way() {
    let database = Database::fresh().unwrap();
    let (mut client, mut writer) = (database.client().unwrap(), database.client().unwrap());
    let manager = started(config(&database));
    let reader = shared(&manager, "x");
    // So that the session is kept for the next claim, which asks by the statement for a key that it knows.
    reader.acquire(PATIENCE).unwrap().release().unwrap();
    reader.acquire(PATIENCE).unwrap().release().unwrap();
    let guard = reader.acquire(PATIENCE).unwrap();
    let mut term = client.transaction().unwrap();
    term.execute("UPDATE dsync.lock SET token = nextval('dsync.token')", &[]).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let polling = {
        let over = Arc::clone(&over);
        begin(move || {
            guard.release().unwrap();
            while !over.load(Ordering::Relaxed) {
                assert!(reader.try_acquire().unwrap().is_none());
            }
        })
    };
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'";
    eventually("the reader to wait for the row", || count(&mut writer, waits) == 1);
    let (lock, turnstile) = numbers(&mut writer);
    assert!(takes(&mut writer, turnstile));
    term.commit().unwrap();
    let begun = Instant::now();
    let mut taken = false;
    while !taken && begun.elapsed() < Duration::from_secs(5) {
        taken = takes(&mut writer, lock);
    }
    over.store(true, Ordering::Relaxed);
    polling.get();
    assert!(taken, "the session of the reader has kept the lock");
}

/// The server counts how often a session has a lock of each kind: to be asked by the wrong one would be the end of the term.
#[test]
fn a_session_that_is_kept_for_a_contended_key_serves_it_the_other_way_too() {
    for shares_first in [false, true] {
        let database = Database::fresh().unwrap();
        let mut client = database.client().unwrap();
        let config = config(&database).catalog(CatalogMode::None).heartbeat(Duration::from_millis(50));
        let manager = started(config);
        let (first, second) = match shares_first {
            false => (manager.lock(7).unwrap(), manager.shared_lock(7).unwrap()),
            true => (manager.shared_lock(7).unwrap(), manager.lock(7).unwrap()),
        };
        first.acquire(PATIENCE).unwrap().release().unwrap();
        first.acquire(PATIENCE).unwrap().release().unwrap();
        assert!(takes(&mut client, 7));
        let waiting = begin(move || {
            first.acquire(PATIENCE).unwrap().release().unwrap();
            second.acquire(PATIENCE).unwrap()
        });
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'";
        eventually("the wait", || count(&mut client, waits) == 1);
        client.execute("SELECT pg_advisory_unlock_all()", &[]).unwrap();
        let guard = waiting.get();
        // Some heartbeats.
        let lost = guard.lost().recv_timeout(Duration::from_millis(400));
        assert!(guard.is_held(), "{shares_first}: {lost:?} {:?}", guard.loss());
        guard.release().unwrap();
    }
}

/// The turnstile was granted in the last moment of a slice, without the reader's knowing.
#[test]
fn a_reader_keeps_no_turnstile_of_which_it_does_not_know() {
    let database = Database::fresh().unwrap();
    let (mut client, mut writer) = (database.client().unwrap(), database.client().unwrap());
    let managers = [(); 2].map(|()| started(config(&database)));
    shared(&managers[0], "x").acquire(PATIENCE).unwrap().release().unwrap();
    let (lock, turnstile) = numbers(&mut client);
    assert!(takes(&mut writer, lock) && takes(&mut writer, turnstile));
    let reader = shared(&managers[0], "x");
    let waiting = begin(move || reader.acquire(PATIENCE).unwrap());
    let query = "SELECT pid FROM pg_locks WHERE NOT granted AND mode = 'ExclusiveLock'
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let mut pid: Option<i32> = None;
    eventually("the wait for the turnstile", || {
        pid = client.query_opt(query, &[]).unwrap().map(|row| row.get(0));
        pid.is_some()
    });
    let pid = pid.unwrap();
    signal(pid, Signal::Stop).unwrap();
    writer.execute("SELECT pg_advisory_unlock_all()", &[]).unwrap();
    client.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
    signal(pid, Signal::Continue).unwrap();
    let guard = waiting.get();
    let beside = shared(&managers[1], "x").try_acquire().unwrap();
    assert!(beside.is_some(), "no writer is there");
    guard.release().unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// The fence
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_reader_s_fence_fails_when_a_writer_has_begun_since_and_not_because_of_readers() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let [ours, theirs] = [(); 2].map(|()| started(config(&database)));
    let guard = shared(&ours, "x").acquire(PATIENCE).unwrap();
    let term = guard.term().clone();
    assert!(passes(&mut client, &term));
    let other = shared(&theirs, "x").acquire(PATIENCE).unwrap();
    assert!(passes(&mut client, &term) && passes(&mut client, other.term()));
    other.release().unwrap();
    assert!(passes(&mut client, &term), "another reader has begun and ended");
    let text = term.fence_text().unwrap();
    client.query("SELECT dsync.fence($1)", &[&text]).unwrap();

    // The row as a writer's term leaves it that has begun without this one's knowing.
    client.execute("UPDATE dsync.lock SET token = nextval('dsync.token')", &[]).unwrap();
    assert!(guard.is_held() && !passes(&mut client, &term));
    let error = client.query("SELECT dsync.fence($1)", &[&text]).unwrap_err();
    assert_eq!(error.code().unwrap().code(), "ZDF01");
    guard.release().unwrap();
    // A reader that comes then has a token of its own.
    let next = shared(&theirs, "x").acquire(PATIENCE).unwrap();
    assert!(next.term().token() > term.token() && passes(&mut client, next.term()));
}

/// Each waits for the fenced transactions of those before it that it is to exclude, and for no others.
#[test]
fn writers_wait_for_fenced_readers_and_readers_for_fenced_writers() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let mut operator = database.client().unwrap();
    let [ours, theirs] = [(); 2].map(|()| started(config(&database)));
    let mut lose = |guard: dsync::LockGuard| {
        let lost = guard.lost().clone();
        operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks", &[]).unwrap();
        hear(&lost);
        drop(guard);
    };
    for ours_shares in [true, false] {
        let first = if ours_shares { shared(&ours, "x") } else { lock(&ours, "x") };
        let guard = first.acquire(PATIENCE).unwrap();
        let mut transaction = client.transaction().unwrap();
        guard.term().fence(&mut transaction).unwrap();
        lose(guard);
        if ours_shares {
            // It is not in the way of another reader.
            shared(&theirs, "x").try_acquire().unwrap().unwrap().release().unwrap();
        }
        let second = if ours_shares { lock(&theirs, "x") } else { shared(&theirs, "x") };
        assert!(second.try_acquire().unwrap().is_none(), "the lock is free, but a transaction is open");
        let waiting = begin(move || second.acquire(PATIENCE));
        eventually("the wait for the transaction", || {
            count(&mut operator_of(&database), "SELECT count(*) FROM pg_locks WHERE NOT granted") > 0
        });
        assert!(!waiting.is_ready());
        transaction.commit().unwrap();
        waiting.get().unwrap().release().unwrap();
    }
}

fn operator_of(database: &Database<'_>) -> Client {
    database.client().unwrap()
}

/// Each of them has the token of the row, whoever has written it.
#[test]
fn readers_that_begin_at_once_after_a_writer_have_one_token() {
    const READERS: usize = 6;
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); READERS].map(|()| started(config(&database)));
    for round in 0..30 {
        lock(&managers[round % READERS], "x").acquire(PATIENCE).unwrap().release().unwrap();
        let guards: Vec<_> = thread::scope(|scope| {
            let acquire = |manager| scope.spawn(move || shared(manager, "x").acquire(PATIENCE).unwrap());
            let threads: Vec<_> = managers.iter().map(acquire).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let tokens: Vec<_> = guards.iter().map(|guard| guard.term().token().unwrap()).collect();
        assert!(tokens.iter().all(|token| *token == tokens[0]), "round {round}: {tokens:?}");
        assert!(guards.iter().all(|guard| passes(&mut client, guard.term())), "round {round}");
        assert_eq!(count(&mut client, "SELECT token FROM dsync.lock"), tokens[0], "round {round}");
    }
}

/// The first one has the fence lock until its row is written, for which it may be late.
#[test]
fn a_reader_looks_for_100_ms_before_it_says_that_a_writer_is_there() {
    const FENCE_LOCK: i64 = 7238262541130950497;
    let database = Database::fresh().unwrap();
    let mut first = operator_of(&database);
    for shared_sessions in [0, 1] {
        let manager = started(config(&database).lease(PATIENCE).shared_sessions(shared_sessions));
        lock(&manager, "x").acquire(PATIENCE).unwrap().release().unwrap();
        let mut transaction = first.transaction().unwrap();
        let locks = "SELECT pg_advisory_xact_lock_shared(id), pg_advisory_xact_lock(id # $1) FROM dsync.lock";
        assert_eq!(transaction.execute(locks, &[&FENCE_LOCK]).unwrap(), 1);

        let second = shared(&manager, "x");
        let begun = Instant::now();
        assert_eq!(kind(second.try_lock(&soon())), ErrorKind::LockUnavailable);
        assert!(begun.elapsed() >= Duration::from_millis(95), "{:?}", begun.elapsed());
        transaction.commit().unwrap();
        second.release().unwrap();

        // It has the lock if the first one is done by one of its looks.
        let mut is_granted_late = || {
            lock(&manager, "x").acquire(PATIENCE).unwrap().release().unwrap();
            let mut transaction = first.transaction().unwrap();
            transaction.execute(locks, &[&FENCE_LOCK]).unwrap();
            thread::scope(|scope| {
                let attempt = scope.spawn(|| {
                    let begun = Instant::now();
                    second.try_lock(&soon()).is_ok() && begun.elapsed() >= Duration::from_millis(10)
                });
                thread::sleep(Duration::from_millis(20));
                transaction.commit().unwrap();
                let is_late = attempt.join().unwrap();
                second.release().unwrap();
                is_late
            })
        };
        assert!((0..20).any(|_| is_granted_late()));
    }
}

/// Two wait for a lock that has no row yet. The one that is granted it a little later finds the other's row, which a fenced transaction keeps;
/// it takes the token of that row in its next slice, and the other's fence goes on meanwhile.
#[test]
fn a_reader_that_begins_is_in_no_other_reader_s_way() {
    let database = Database::fresh().unwrap();
    let (mut client, mut writer) = (database.client().unwrap(), database.client().unwrap());
    let managers = [(); 2].map(|()| started(config(&database).wait_slice(Duration::from_secs(1))));
    assert!(takes(&mut writer, 7));
    let query = "SELECT pid FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY waitstart";
    let mut pids: Vec<i32> = Vec::new();
    let waiting: Vec<_> = managers
        .iter()
        .map(|manager| {
            let reader = manager.shared_lock(7).unwrap();
            let waiting = begin(move || reader.acquire(PATIENCE).unwrap());
            let before = pids.len();
            eventually("the wait", || {
                pids = client.query(query, &[]).unwrap().iter().map(|row| row.get(0)).collect();
                pids.len() > before
            });
            waiting
        })
        .collect();
    signal(pids[1], Signal::Stop).unwrap();
    writer.execute("SELECT pg_advisory_unlock_all()", &[]).unwrap();
    let mut waiting = waiting.into_iter();
    let (first, second) = (waiting.next().unwrap().get(), waiting.next().unwrap());
    let mut transaction = writer.transaction().unwrap();
    first.term().fence(&mut transaction).unwrap();
    signal(pids[1], Signal::Continue).unwrap();
    while !second.is_ready() {
        assert!(passes(&mut client, first.term()), "no writer has begun");
    }
    let second = second.get();
    assert_eq!(second.term().token(), first.term().token());
    assert!(passes(&mut client, first.term()), "no writer has begun");
    transaction.commit().unwrap();
}

/// It began to look at the row while that was readers', and waited for a writer's whole term.
#[test]
fn a_reader_that_has_waited_behind_a_writer_has_a_later_token() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 3].map(|()| started(config(&database)));
    let waiters = || managers[0].inspect("x").unwrap().waiters.len();
    // The sessions have served the key, so that the second round asks by other statements.
    for round in 0..3 {
        let reader = shared(&managers[0], "x").acquire(PATIENCE).unwrap();
        let (writer, later) = (lock(&managers[1], "x"), shared(&managers[2], "x"));
        let writing = begin(move || writer.acquire(PATIENCE));
        eventually("the writer's place", || waiters() == 1);
        let waiting = begin(move || later.acquire(PATIENCE));
        eventually("the later one's place", || waiters() == 2);
        let first = reader.term().token();
        reader.release().unwrap();
        let guard = writing.get().unwrap();
        let written = guard.term().token();
        guard.release().unwrap();
        let later = waiting.get().unwrap();
        assert!(
            first < written && written < later.term().token(),
            "round {round}: {first:?} {written:?} {later:?}"
        );
        assert!(passes(&mut client, later.term()), "round {round}");
        later.release().unwrap();
    }
}

/// The columns of version 4 are all that its processes write.
#[test]
fn a_writer_of_an_older_version_ends_the_readers_token() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database));
    let readers = shared(&manager, "x");
    let first = readers.acquire(PATIENCE).unwrap().term().token().unwrap();
    let written =
        "UPDATE dsync.lock SET token = nextval('dsync.token'), annotation = NULL, pid = 0, since = now()";
    client.execute(written, &[]).unwrap();
    let theirs = count(&mut client, "SELECT token FROM dsync.lock");
    assert!(theirs > first);
    assert!(readers.acquire(PATIENCE).unwrap().term().token().unwrap() > theirs);
}

// ---------------------------------------------------------------------------------------------------------------------
// What can be seen, and what else there is
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn readers_and_those_who_wait_can_be_seen() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 4].map(|()| started(config(&database).wait_slice(Duration::from_millis(100))));
    let readers = [&managers[0], &managers[1]].map(|manager| shared(manager, "x").acquire(PATIENCE).unwrap());
    let writer = lock(&managers[2], "x");
    assert_eq!(kind(writer.try_lock(&crate::common::soon())), ErrorKind::LockUnavailable);
    let late = shared(&managers[3], "x");
    // Who comes before that would overtake the writer at the end of its first slice.
    eventually("the writer to have the turnstile", || {
        count(
            &mut client,
            "SELECT count(*) FROM pg_locks WHERE mode = 'ExclusiveLock' AND granted AND locktype = 'advisory'
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        ) == 1
    });
    eventually("the writer's place", || {
        managers[0]
            .inspect("x")
            .unwrap()
            .waiters
            .first()
            .is_some_and(|waiter| waiter.is_shared == Some(false))
    });
    assert_eq!(kind(late.try_lock(&crate::common::soon())), ErrorKind::LockUnavailable);
    // Also at the turnstile, where a wait leads that lasts.
    for _ in 0..20 {
        eventually("both waiters", || managers[0].inspect("x").unwrap().waiters.len() == 2);
        thread::sleep(Duration::from_millis(20));
    }
    let view = managers[0].inspect("x").unwrap();
    let token = readers[0].term().token();
    let holders: Vec<_> = view.holder.iter().chain(&view.sharers).collect();
    assert_eq!(holders.len(), 2);
    for holder in holders {
        assert!(holder.is_shared && holder.token == token && holder.since.is_none(), "{holder:?}");
    }
    let all = managers[0].inspect_all().unwrap();
    assert_eq!((all.len(), all[0].sharers.len()), (1, 1));
    let query = "SELECT count(*) FROM dsync.locks WHERE shared AND token = (SELECT token FROM dsync.lock)";
    assert_eq!(count(&mut client, query), 2);
    eventually("both in the view", || count(&mut client, "SELECT count(*) FROM dsync.waiters") == 2);
    readers.into_iter().for_each(|reader| reader.release().unwrap());
    eventually("the writer's turn", || writer.is_held());
    assert_eq!(count(&mut client, "SELECT count(*) FROM dsync.locks WHERE NOT shared"), 1);
    writer.release().unwrap();
    eventually("the late reader's turn", || late.is_held());
}

#[test]
fn a_shared_lock_excludes_locks_of_an_application_s_own_and_shares_with_shared_ones() {
    let database = Database::fresh().unwrap();
    let (mut client, mut other) = (database.client().unwrap(), database.client().unwrap());
    let manager = started(config(&database));
    let reading = shared(&manager, "x").acquire(PATIENCE).unwrap();
    assert!(!manager.transaction_lock("x").unwrap().try_acquire(&mut client.transaction().unwrap()).unwrap());
    let sharing = manager.session_lock("x").unwrap().shared();
    let theirs = sharing.try_acquire(&mut other).unwrap().unwrap();
    reading.release().unwrap();
    assert!(lock(&manager, "x").try_acquire().unwrap().is_none());
    assert!(shared(&manager, "x").try_acquire().unwrap().is_some());
    drop(theirs);
}

#[test]
fn a_shared_lock_has_options_of_its_own() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let plain = lock(&manager, "x");
    let options = LockOptions::new().shared().without_token().valuer(Arc::new(|| unreachable!()));
    let without = manager.lock_with("x", options).unwrap();
    assert_eq!(without.acquire(PATIENCE).unwrap().term().token(), None);
    assert!(plain.acquire(PATIENCE).unwrap().term().token().is_some());
    let noted = LockOptions::new().shared().valuer(Arc::new(|| unreachable!("it is not called")));
    let reader = manager.lock_with("y", noted).unwrap().acquire(PATIENCE).unwrap();
    assert_eq!(manager.inspect("y").unwrap().holder.unwrap().annotation, None);
    assert_eq!(reader.key(), "y");
}

/// What is asked quietly names settings, and statements of its own, beside the schema.
#[test]
fn a_wait_goes_on_over_slices_for_any_key_and_in_any_schema() {
    let database = Database::fresh().unwrap();
    for schema in ["dsync", "of \"dsync\" and 'others'"] {
        let config = config(&database).schema(schema).wait_slice(Duration::from_millis(60));
        let managers = [(); 3].map(|()| started(config.clone()));
        let keys: [Key; 4] = [(1, 2).into(), (-1, i32::MIN).into(), i64::MIN.into(), r"a'b\".into()];
        for key in keys {
            let waiters = |count: usize| {
                // Each waits for the lock first and then, a slice later, at the turnstile; and nobody overtakes at the end of a slice.
                for _ in 0..20 {
                    eventually("the wait", || {
                        managers[0].inspect(key.clone()).unwrap().waiters.len() == count
                    });
                    thread::sleep(Duration::from_millis(20));
                }
            };
            let reader = managers[0].shared_lock(key.clone()).unwrap().acquire(PATIENCE).unwrap();
            let wanted = managers[1].lock(key.clone()).unwrap();
            let writing = begin(move || wanted.acquire(PATIENCE).unwrap());
            waiters(1);
            let wanted = managers[2].shared_lock(key.clone()).unwrap();
            let late = begin(move || wanted.acquire(PATIENCE).unwrap());
            waiters(2);
            let first = reader.term().token();
            reader.release().unwrap();
            let writer = writing.get();
            assert!(!late.is_ready());
            let written = writer.term().token();
            writer.release().unwrap();
            let late = late.get();
            assert!(first < written && written < late.term().token(), "{key:?}");
            late.release().unwrap();
        }
    }
}
