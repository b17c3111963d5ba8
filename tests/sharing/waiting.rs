//! A lock that is taken is waited for on a session of its own; where there is none left, claims take turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dsync::ErrorKind;
use support::Database;

use super::*;
use crate::common::{Lateness, begin, eventually, kind};

#[test]
fn a_lock_that_is_taken_is_waited_for_and_held_on_a_session_of_its_own() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let holder = started(dsync::Config::from_url(&database.url()).unwrap());
    let theirs = lock(&holder, "k1");
    theirs.lock(&soon()).unwrap();
    let manager = sharing(&database.url(), 2);
    let mine = locks(&manager, 3);
    let waits = common::wait_in_thread(&mine[1]);
    mine[0].lock(&soon()).unwrap();
    mine[2].lock(&soon()).unwrap();
    eventually("a place in the queue", || {
        in_state(&manager, ClaimState::Queueing) == 1 && sessions(&manager) == 2
    });
    assert!(!waits.is_ready());
    theirs.release().unwrap();
    waits.get().unwrap();
    assert_eq!(held(operator), (3, 2), "on two sessions");
    // Its session can be lost without the others, and it goes on by itself.
    let (lost, others) = (mine[1].lost(), [mine[0].lost(), mine[2].lost()]);
    operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = 'k1'", &[]).unwrap();
    common::hear(&lost);
    eventually("the lock again", || is_held(&mine[1]));
    assert!(others.iter().all(common::is_open));
    mine.iter().for_each(|lock| lock.release().unwrap());
    eventually("the sessions", || sessions(&manager) == 0);
}

#[test]
fn who_does_not_wait_takes_no_other_session() {
    let database = Database::fresh().unwrap();
    let holder = started(dsync::Config::from_url(&database.url()).unwrap());
    lock(&holder, "x").lock(&soon()).unwrap();
    let manager = sharing(&database.url(), 2);
    lock(&manager, "y").lock(&soon()).unwrap();
    for _ in 0..20 {
        assert!(lock(&manager, "x").try_acquire().unwrap().is_none());
        assert_eq!(sessions(&manager), 1);
    }
}

#[test]
fn where_there_are_no_sessions_left_claims_take_turns_and_say_so() {
    const COUNT: usize = 6;
    let database = Database::fresh().unwrap();
    let holder = started(dsync::Config::from_url(&database.url()).unwrap());
    let theirs = locks(&holder, COUNT);
    theirs.iter().for_each(|lock| lock.lock(&soon()).unwrap());
    let manager = sharing(&database.url(), 2);
    let mine = locks(&manager, COUNT);
    let waits: Vec<_> = mine.iter().map(common::wait_in_thread).collect();
    eventually("two that queue, and four that take turns", || {
        (in_state(&manager, ClaimState::Queueing), in_state(&manager, ClaimState::TakingTurns))
            == (2, COUNT - 2)
    });
    eventually("their sessions", || sessions(&manager) == 3);
    // What is asked without patience is answered as ever.
    assert_eq!(kind(mine[0].try_lock(&soon())), ErrorKind::LockUnavailable);
    assert_eq!(kind(mine[COUNT - 1].try_lock(&soon())), ErrorKind::LockUnavailable);
    // One that takes turns can be given up at once.
    let last = mine[COUNT - 1].release();
    last.unwrap();
    for (number, lock) in theirs.iter().enumerate() {
        lock.release().unwrap();
        if number + 1 < COUNT {
            eventually("the next lock", || is_held(&mine[number]));
        }
    }
    let mut outcomes: Vec<_> = waits.into_iter().map(|wait| wait.get()).collect();
    assert_eq!(kind(outcomes.pop().unwrap()), ErrorKind::Released);
    outcomes.into_iter().for_each(|outcome| outcome.unwrap());
}

#[test]
fn who_takes_and_gives_back_all_the_time_lets_a_waiter_in_each_time() {
    const TURNS: usize = 1_000;
    let database = Database::fresh().unwrap();
    let (busy, waiter) = (sharing(&database.url(), 1), sharing(&database.url(), 1));
    let over = Arc::new(AtomicBool::new(false));
    let taker = begin({
        let (over, lock) = (Arc::clone(&over), lock(&busy, "x"));
        move || {
            let mut turns = 0_usize;
            while !over.load(Ordering::Relaxed) {
                lock.acquire(LONG).unwrap().release().unwrap();
                turns += 1;
            }
            turns
        }
    });
    let (late, lock) = (Lateness::watch(), lock(&waiter, "x"));
    let mut waits: Vec<_> = (0..TURNS)
        .map(|_| {
            let begun = Instant::now();
            lock.acquire(LONG).unwrap().release().unwrap();
            begun.elapsed()
        })
        .collect();
    over.store(true, Ordering::Relaxed);
    let theirs = taker.get();
    waits.sort();
    let (median, longest) = (waits[TURNS / 2], waits[TURNS - 1]);
    println!(
        "{TURNS} turns beside {theirs} of the other one: waited {median:?} in the median, {longest:?} at the most"
    );
    // It is in the server's queue, so it is next.
    late.allow(longest, Duration::from_secs(5));
}

/// The valuer, the context and the claim's end come from other threads while the lock is waited for.
#[test]
fn waits_on_sessions_of_their_own_end_as_their_callers_say() {
    let database = Database::fresh().unwrap();
    let holder = started(dsync::Config::from_url(&database.url()).unwrap());
    lock(&holder, "x").lock(&soon()).unwrap();
    let manager = sharing(&database.url(), 1);
    for way in 0..3 {
        let begun = Instant::now();
        let (context, cancel) = soon().with_cancel();
        let waits = begin({
            let lock = lock(&manager, "x");
            move || lock.lock(&context)
        });
        eventually("a place in the queue", || in_state(&manager, ClaimState::Queueing) == 1);
        match way {
            0 => {
                cancel.cancel();
                assert_eq!(kind(waits.get()), ErrorKind::Cancelled);
                lock(&manager, "x").release().unwrap();
            }
            1 => {
                lock(&manager, "x").release().unwrap();
                assert_eq!(kind(waits.get()), ErrorKind::Released);
            }
            _ => {
                manager.stop().unwrap();
                assert_eq!(kind(waits.get()), ErrorKind::SyncManagerStopped);
            }
        }
        within(begun, Duration::from_secs(10));
    }
}

/// While the claim moves to another session, its lock comes free.
#[test]
fn a_lock_that_comes_free_while_its_claim_moves_is_had_at_once_and_kept() {
    let database = Database::fresh().unwrap();
    let holder = started(dsync::Config::from_url(&database.url()).unwrap().lease(LONG));
    let manager = started(config(&database.url(), 1).lease(LONG));
    let (theirs, mine) = (lock(&holder, "x"), lock(&manager, "x"));
    for round in 0..100 {
        theirs.lock(&soon()).unwrap();
        let waits = common::wait_in_thread(&mine);
        thread::sleep(Duration::from_micros(round * 50));
        let (late, begun) = (Lateness::watch(), Instant::now());
        theirs.release().unwrap();
        waits.get().unwrap();
        late.allow(begun.elapsed(), Duration::from_secs(5));
        let lost = mine.lost();
        assert!(common::is_open(&lost) && mine.last_loss().is_none());
        mine.release().unwrap();
    }
}
