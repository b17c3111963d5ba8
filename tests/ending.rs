//! The end of a claim, while the server cannot be told of it: what is said of it, and who has to wait for it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{SilentHost, begin, hear, kind, lock, soon, started};
use dsync::{Config, Context, ErrorKind};
use support::Server;

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
    let manager = started(Config::from_url(&server.url()).unwrap());
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
        "the release takes two seconds, and these calls did not: {:?}",
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
