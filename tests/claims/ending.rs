//! The end of a claim, while the server cannot be told of it: what is said of it, and who has to wait for it.
use std::sync::Arc;
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, Context, ErrorKind};
use support::{Database, Server};

use crate::common::{SilentHost, becomes, begin, eventually, hear, kind, lock, soon, started};

/// The driver's own connect cannot be interrupted, so the release does not wait for it. But the session before it was lost
/// without a word of the server's, which may keep the lock still.
#[test]
fn a_release_during_a_connect_is_not_confirmed_while_a_lost_session_may_hold_the_lock() {
    let server = Server::start().unwrap();
    let silent = SilentHost::new();
    let url = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname=postgres connect_timeout=2",
        silent.port(),
        server.port()
    );
    let beat = Duration::from_millis(200);
    let config = Config::from_url(&url)
        .unwrap()
        .connect_timeout(Duration::from_secs(20))
        .release_timeout(Duration::from_millis(500))
        .heartbeat(beat)
        .heartbeat_timeout(beat);
    let manager = started(config);
    let lock = lock(&manager, "x");
    lock.lock(&soon()).unwrap();
    let lost = lock.lost();
    let frozen = server.freeze().unwrap();
    hear(&lost);

    assert_eq!(kind(lock.release()), ErrorKind::UnlockFailed);
    lock.release().unwrap();
    frozen.thaw();
}

#[test]
fn a_lock_heeds_its_context_while_another_thread_releases_the_former_claim() {
    let server = Server::start().unwrap();
    let config = Config::from_url(&server.url()).unwrap();
    let manager = started(config.lease(Duration::from_secs(60)).release_timeout(Duration::from_secs(6)));
    let lock = lock(&manager, "x");
    lock.lock(&soon()).unwrap();
    let lost = lock.lost();
    let frozen = server.freeze().unwrap();
    let releasing = Arc::clone(&lock);
    let release = begin(move || releasing.release());
    // The first thing that a release does.
    hear(&lost);

    let (cancelled, canceller) = Context::background().with_cancel();
    canceller.cancel();
    let begun = Instant::now();
    assert_eq!(kind(lock.lock(&Context::timeout(Duration::from_millis(50)))), ErrorKind::TimedOut);
    assert_eq!(kind(lock.try_lock(&cancelled)), ErrorKind::Cancelled);
    assert!(
        !release.is_ready(),
        "the release takes six seconds, and these calls did not: {:?}",
        begun.elapsed()
    );

    assert_eq!(kind(release.get()), ErrorKind::UnlockFailed);
    frozen.thaw();
    lock.lock(&soon()).unwrap();
    lock.release().unwrap();
}

/// The supervisor sleeps until the next heartbeat, which is long after the release must be over.
#[test]
fn a_release_ends_in_time_though_nobody_else_looks_at_its_deadline() {
    let server = Server::start().unwrap();
    let config = Config::from_url(&server.url())
        .unwrap()
        .lease(Duration::from_secs(120))
        .release_timeout(Duration::from_millis(500));
    let manager = started(config);
    let lock = lock(&manager, "x");
    lock.lock(&soon()).unwrap();
    // Until it has gone to sleep, it looks every millisecond for a while. Nothing tells of the one or the other.
    std::thread::sleep(Duration::from_millis(300));
    let frozen = server.freeze().unwrap();
    let begun = Instant::now();
    assert_eq!(kind(lock.release()), ErrorKind::UnlockFailed);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    frozen.thaw();
}

/// PostgreSQL says that it ends a session before it lets go of the session's locks.
#[test]
fn a_release_after_a_terminated_session_is_confirmed_when_the_server_has_let_go() {
    let database = Database::fresh().unwrap();
    let config = Config::from_url(&database.url()).unwrap();
    let manager = started(config.catalog(CatalogMode::None).release_timeout(Duration::from_secs(20)));
    let mut operator = database.client().unwrap();
    let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                     WHERE application_name = 'dsync #7' AND datname = current_database()";
    let lock = manager.lock(7).unwrap();
    for round in 0..300 {
        lock.lock(&soon()).unwrap();
        let lost = lock.lost();
        operator.execute(terminate, &[]).unwrap();
        hear(&lost);
        // It may have come back meanwhile; then this gives it back.
        lock.release().unwrap();
        let free: bool = operator.query_one("SELECT pg_try_advisory_lock(7)", &[]).unwrap().get(0);
        assert!(free, "round {round}: released, and the server has not let go");
        operator.execute("SELECT pg_advisory_unlock(7)", &[]).unwrap();
    }
}

#[test]
fn a_collision_that_is_found_while_waiting_leaves_nothing_to_be_released() {
    let database = Database::fresh().unwrap();
    let config = Config::from_url(&database.url()).unwrap().wait_slice(Duration::from_millis(50));
    let manager = started(config);
    let mut other = database.client().unwrap();
    let lock = manager.lock(4711).unwrap();
    other.execute("SELECT pg_advisory_lock(4711)", &[]).unwrap();
    assert_eq!(kind(lock.try_lock(&soon())), ErrorKind::LockUnavailable);
    let row = "INSERT INTO dsync.lock (id, pair, namespace, key, token, pid, since) \
               VALUES (4711, false, 'somebody', 'else', 1, 0, now())";
    other.execute(row, &[]).unwrap();
    becomes("what is told", &ErrorKind::InvalidKey, || kind(lock.try_lock(&soon())));
    lock.release().unwrap();
    other.execute("DELETE FROM dsync.lock", &[]).unwrap();
    other.execute("SELECT pg_advisory_unlock(4711)", &[]).unwrap();
    lock.lock(&soon()).unwrap();
}

/// On a session that a caller's own release has put into the pool, and nobody has used since.
#[test]
fn inspect_ends_in_time_at_a_frozen_server() {
    let server = Server::start().unwrap();
    let config = Config::from_url(&server.url()).unwrap();
    let manager = started(config.lease(Duration::from_secs(4)).connect_timeout(Duration::from_secs(1)));
    lock(&manager, "k").lock(&soon()).unwrap();
    lock(&manager, "k").release().unwrap();
    eventually("the session in the pool", || format!("{manager:?}").contains("idle_connections: 1"));
    let frozen = server.freeze().unwrap();
    for _ in 0..2 {
        let begun = Instant::now();
        assert_eq!(kind(manager.inspect("k")), ErrorKind::SessionUnavailable);
        assert_eq!(kind(manager.inspect_all()), ErrorKind::SessionUnavailable);
        // A connect and a heartbeat each.
        assert!(begun.elapsed() < Duration::from_secs(2 * 2 + 1), "{:?}", begun.elapsed());
    }
    frozen.thaw();
    eventually("an answer", || manager.inspect("k").is_ok());
}
