//! Guards where something ends in the same moment or fails: warnings, cancellations, loggers that panic, managers that stop.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::RecvTimeoutError;
use dsync::{Config, Context, ErrorKind, Lock, LockOptions};
use support::{Database, Server};

use crate::common::{
    Bomb, PATIENCE, Process, becomes, begin, kind, library_threads, lock, process, role, soon, started,
};

const AT_ONCE: Duration = Duration::from_secs(3);

fn becomes_queued(lock: &Arc<dyn Lock>) {
    becomes("a thread in the queue", &true, || format!("{lock:?}").contains("waiting_threads: 1"));
}

#[test]
fn a_term_that_comes_after_a_long_wait_is_not_warned_of() {
    let database = Database::fresh().unwrap();
    let config = Config::from_url(&database.url()).unwrap().heartbeat(Duration::from_secs(1));
    let config = config.wait_slice(PATIENCE / 2).release_timeout(PATIENCE / 2);
    let (holding, waiting) = (started(config.clone()), started(config));
    // A term lasts for 13 s, and the lease is renewed after 1 s.
    let graceful = waiting.lock_with("x", LockOptions::new().grace(Duration::from_secs(8))).unwrap();
    let holder = lock(&holding, "x").acquire(soon()).unwrap();
    let wait = begin(move || graceful.acquire(soon()));
    becomes("the waiter", &1, || holding.inspect("x").unwrap().waiters.len());
    // The wait itself: longer than a heartbeat may be overdue.
    thread::sleep(Duration::from_secs(6));
    holder.release().unwrap();
    let guard = wait.get().unwrap();
    assert_eq!(guard.term().warned().recv_timeout(Duration::from_secs(2)), Err(RecvTimeoutError::Timeout));
    guard.release().unwrap();
}

#[test]
fn a_turn_that_comes_when_the_wait_is_cancelled_is_not_taken() {
    let server = Server::start().unwrap();
    let config = Config::from_url(&server.url()).unwrap();
    let config = config.release_timeout(Duration::from_millis(200)).connect_timeout(PATIENCE / 2);
    let manager = started(config);
    for _ in 0..5 {
        let contended = lock(&manager, "x");
        let guard = contended.acquire(soon()).unwrap();
        let (context, canceller) = Context::background().with_cancel();
        let waiter = Arc::clone(&contended);
        let wait = begin(move || waiter.acquire(context).map(drop));
        becomes_queued(&contended);
        let frozen = server.freeze().unwrap();
        drop(guard);
        canceller.cancel();
        assert_eq!(kind(wait.get_within(AT_ONCE)), ErrorKind::Cancelled);
        frozen.thaw();
    }
}

#[test]
fn a_guard_that_outlives_its_manager_keeps_none_of_its_threads() {
    Process::start(&mut process("guard_edges::outliving", "outlive")).succeeds();
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn outliving() {
    if role().as_deref() != Some("outlive") {
        return;
    }
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap());
    let guard = lock(&manager, "x").acquire(soon()).unwrap();
    assert!(!library_threads().is_empty());
    drop(manager);
    becomes("the threads", &Vec::new(), library_threads);
    assert_eq!(kind(guard.release()), ErrorKind::Lost);
}

#[test]
fn a_logger_that_panics_leaves_no_claim_behind() {
    Process::start(&mut process("guard_edges::panicking", "panic")).succeeds();
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn panicking() {
    if role().as_deref() != Some("panic") {
        return;
    }
    let bomb = Bomb::set();
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap());
    for _ in 0..10 {
        bomb.arm(true);
        // On this thread if it waits without a limit and nobody else is at work.
        let outcome = catch_unwind(AssertUnwindSafe(|| lock(&manager, "x").acquire(Context::background())));
        drop(outcome);
        assert!(format!("{manager:?}").contains("locks: 0"), "{manager:?}");
    }
    bomb.arm(false);
    lock(&manager, "x").acquire(soon()).unwrap().release().unwrap();
}
