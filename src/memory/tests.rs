//! What is special to this implementation; `tests/claims/contract.rs` has what it shares with the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::{MemoryManager, MemoryServer};
use crate::context::Context;
use crate::error::ErrorKind;
use crate::guard::LockGuard;
use crate::lock::{Lock, LockOptions};
use crate::loss::LossReason;
use crate::manager::SyncManager;

fn started(server: &MemoryServer) -> MemoryManager {
    let manager = MemoryManager::on(server);
    manager.start().unwrap();
    manager
}

/// A handle for `x` in a manager of its own.
fn rival(server: &MemoryServer) -> (MemoryManager, Arc<dyn Lock>) {
    let manager = started(server);
    let lock = manager.lock("x").unwrap();
    (manager, lock)
}

fn soon() -> Context {
    Context::timeout(Duration::from_secs(30))
}

fn is_held(lock: &Arc<dyn Lock>) -> bool {
    lock.lost().try_recv().is_err_and(|error| error.is_empty())
}

fn reason(lock: &Arc<dyn Lock>) -> Option<LossReason> {
    lock.last_loss().map(|loss| loss.reason)
}

fn try_kind(lock: &Arc<dyn Lock>) -> ErrorKind {
    lock.try_lock(&soon()).unwrap_err().kind()
}

/// A valuer that gives `1`, `2`, … and the count of its calls.
fn counting() -> (LockOptions, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let valuer = move || (counted.fetch_add(1, Ordering::SeqCst) + 1).to_string().into_bytes();
    (LockOptions::new().valuer(Arc::new(valuer)), calls)
}

#[test]
fn a_revoked_lock_goes_to_the_next_and_the_claim_to_the_end_of_the_queue() {
    let server = MemoryServer::new();
    let [(_a, first), (_b, second), (_c, third)] = [(); 3].map(|()| rival(&server));
    first.lock(&soon()).unwrap();
    let lost = first.lost();
    assert_eq!([try_kind(&second), try_kind(&third)], [ErrorKind::LockUnavailable; 2]);

    assert!(server.revoke("x"));
    assert!(lost.recv().is_err());
    assert_eq!((reason(&first), is_held(&second)), (Some(LossReason::Revoked), true));
    second.release().unwrap();
    assert!(is_held(&third) && !is_held(&first));
    third.release().unwrap();
    assert!(is_held(&first));
    assert!(lost.try_recv().is_err_and(|error| error.is_disconnected()), "the old term stays over");
}

#[test]
fn who_only_asks_need_not_start_its_manager() {
    let server = MemoryServer::new();
    let (_manager, held) = rival(&server);
    held.lock(&soon()).unwrap();
    let asks = MemoryManager::on(&server);
    let lock = asks.lock("x").unwrap();
    assert!(lock.holder().unwrap().is_some() && lock.last_success().unwrap().is_none());
    assert_eq!(try_kind(&lock), ErrorKind::SyncManagerStopped);
    assert!(lock.break_lock().unwrap().is_some());
    asks.stop().unwrap();
    assert_eq!(lock.holder().unwrap_err().kind(), ErrorKind::SyncManagerStopped);
}

#[test]
fn a_revoked_lock_that_nobody_wants_comes_back_in_a_new_term() {
    let server = MemoryServer::new();
    let (_manager, lock) = rival(&server);
    assert!(!server.revoke("x"), "nobody holds it");
    lock.lock(&soon()).unwrap();
    let lost = lock.lost();
    assert!(server.revoke("x"));
    assert!(lost.recv().is_err());
    assert!(is_held(&lock));
}

#[test]
fn an_outage_ends_all_terms_and_its_end_gives_the_locks_back_in_order() {
    let server = MemoryServer::new();
    let [(_a, first), (_b, second), (_c, third)] = [(); 3].map(|()| rival(&server));
    first.lock(&soon()).unwrap();
    let lost = first.lost();
    assert_eq!(try_kind(&second), ErrorKind::LockUnavailable);

    server.go_down();
    assert!(lost.recv().is_err());
    assert_eq!(reason(&first), Some(LossReason::ConnectionClosed));
    assert_eq!(reason(&second), None, "it had nothing to lose");
    let brief = Context::timeout(Duration::from_millis(10));
    let error = third.try_lock(&brief).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "nobody can tell who holds it");
    assert!(error.to_string().contains("could not be asked"), "{error}");
    assert_eq!(server.waiting("x"), 3);
    assert!(!server.revoke("x"));

    server.come_up();
    assert!(is_held(&first));
    first.release().unwrap();
    assert!(is_held(&second));
    second.release().unwrap();
    assert!(is_held(&third));
}

#[test]
fn calls_that_wait_in_an_outage_are_answered_at_its_end() {
    let server = MemoryServer::new();
    let [(_a, first), (_b, second)] = [(); 2].map(|()| rival(&server));
    server.go_down();
    thread::scope(|scope| {
        let holder = scope.spawn(|| first.lock(&soon()));
        while server.waiting("x") < 1 {
            thread::yield_now();
        }
        let refused = scope.spawn(|| try_kind(&second));
        while server.waiting("x") < 2 {
            thread::yield_now();
        }
        server.come_up();
        holder.join().unwrap().unwrap();
        assert_eq!(refused.join().unwrap(), ErrorKind::LockUnavailable);
    });
}

#[test]
fn a_claim_released_in_an_outage_does_not_come_back() {
    let server = MemoryServer::new();
    let (_manager, lock) = rival(&server);
    lock.lock(&soon()).unwrap();
    server.go_down();
    lock.release().unwrap();
    server.come_up();
    assert!(!is_held(&lock));
    assert_eq!(server.server.see(|state| state.known_keys()), 1, "the handle alone");
}

#[test]
fn a_holder_with_a_grace_is_warned_once_a_term() {
    let server = MemoryServer::new();
    let manager = started(&server);
    let graceful = manager.lock_with("x", LockOptions::new().grace(Duration::from_secs(1))).unwrap();
    assert!(!server.warn("x"), "nobody holds it");
    for _ in 0..2 {
        let guard = graceful.acquire(Duration::ZERO).unwrap();
        let is_warned = || guard.term().warned().try_recv().is_err_and(|error| error.is_disconnected());
        assert!(!is_warned());
        assert!(server.warn("x") && server.warn("x"));
        assert!(is_warned() && guard.is_held());
    }
    let (_other, plain) = rival(&server);
    let guard = plain.acquire(Duration::ZERO).unwrap();
    assert!(!server.warn("x"), "it gave no grace");
    assert!(guard.is_held());
}

#[test]
fn first_come_first_served() {
    let server = MemoryServer::new();
    let rivals = [(); 20].map(|()| rival(&server));
    rivals[0].1.lock(&soon()).unwrap();
    for (count, (_, waiter)) in rivals[1..].iter().enumerate() {
        assert_eq!(server.waiting("x"), count);
        assert_eq!(try_kind(waiter), ErrorKind::LockUnavailable);
    }
    rivals[7].1.release().unwrap(); // gives up its place
    for (index, (_, holder)) in rivals.iter().enumerate().filter(|(index, _)| *index != 7) {
        assert!(is_held(holder), "{index} is next");
        holder.release().unwrap();
    }
    assert!(rivals.iter().all(|(_, lock)| !is_held(lock)));
}

#[test]
fn the_annotation_is_made_anew_for_each_term() {
    let server = MemoryServer::new();
    let manager = started(&server);
    let (options, calls) = counting();
    let lock = manager.lock_with("x", options).unwrap();
    assert_eq!((server.annotation("x"), calls.load(Ordering::SeqCst)), (None, 0));
    lock.lock(&soon()).unwrap();
    lock.lock(&soon()).unwrap();
    assert_eq!(server.annotation("x").unwrap(), b"1");
    server.revoke("x");
    assert_eq!(server.annotation("x").unwrap(), b"2");
    server.go_down();
    assert_eq!(server.annotation("x"), None, "nobody holds it");
    server.come_up();
    assert_eq!(server.annotation("x").unwrap(), b"3");

    let (_other, next) = rival(&server);
    assert_eq!(try_kind(&next), ErrorKind::LockUnavailable);
    lock.release().unwrap();
    assert!(is_held(&next));
    assert_eq!(server.annotation("x"), None, "the holder gave no valuer");
    assert_eq!(calls.load(Ordering::SeqCst), 3);
}

#[test]
fn a_panicking_valuer_costs_the_annotation_only() {
    let server = MemoryServer::new();
    let (_manager, first) = rival(&server);
    let other = started(&server);
    let second = other.lock_with("x", LockOptions::new().valuer(Arc::new(|| panic!("no value")))).unwrap();
    first.lock(&soon()).unwrap();
    assert_eq!(try_kind(&second), ErrorKind::LockUnavailable);
    first.release().unwrap();
    assert!(is_held(&second));
    assert_eq!(server.annotation("x"), None);
}

#[test]
fn a_valuer_may_use_the_server_and_the_locks() {
    let server = MemoryServer::new();
    let manager = started(&server);
    let (inner, mine) = (server.clone(), manager.lock("y").unwrap());
    let valuer = move || {
        mine.lock(&soon()).unwrap();
        inner.waiting("x").to_string().into_bytes()
    };
    let lock = manager.lock_with("x", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    lock.lock(&soon()).unwrap();
    assert_eq!(server.annotation("x").unwrap(), b"0");
}

#[test]
fn whoever_comes_while_a_valuer_runs_is_not_held_up() {
    let server = MemoryServer::new();
    let (_other, rival) = rival(&server);
    let manager = started(&server);
    let meanwhile = Arc::clone(&rival);
    let valuer = move || {
        meanwhile.try_lock(&soon()).unwrap();
        Vec::new()
    };
    let lock = manager.lock_with("x", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    assert_eq!(try_kind(&lock), ErrorKind::LockUnavailable);
    assert!(is_held(&rival) && !is_held(&lock));
    assert_eq!(lock.last_loss(), None, "no term had begun");
}

#[test]
fn nothing_is_kept_for_keys_that_are_done_with() {
    let server = MemoryServer::new();
    let manager = started(&server);
    let (_other, blocker) = rival(&server);
    blocker.lock(&soon()).unwrap();
    for number in 0..10_000 {
        let lock = manager.lock(format!("job/{number}")).unwrap();
        lock.lock(&soon()).unwrap();
        // The claim ends before the handle in one case, and after it in the other.
        if number % 2 == 0 {
            lock.release().unwrap();
        } else {
            drop(lock);
            manager.lock(format!("job/{number}")).unwrap().release().unwrap();
        }
        drop(manager.lock(format!("never locked/{number}")).unwrap());
    }
    assert_eq!(
        server.server.see(|state| state.known_keys()),
        2,
        "the handle and the claim of the other manager"
    );
}

#[test]
fn stopping_and_dropping_a_manager_end_its_claims_and_free_what_they_keep() {
    let server = MemoryServer::new();
    let (manager, lock) = rival(&server);
    let (_other, next) = rival(&server);
    let (options, _calls) = counting();
    let valuer = Arc::downgrade(options.valuer.as_ref().unwrap());
    manager.lock_with("y", options).unwrap().lock(&soon()).unwrap();
    lock.lock(&soon()).unwrap();
    assert_eq!(try_kind(&next), ErrorKind::LockUnavailable);

    drop(manager);
    assert!(is_held(&next) && !is_held(&lock));
    assert_eq!(valuer.strong_count(), 0, "claims do not keep the server and each other alive");
    assert_eq!(try_kind(&lock), ErrorKind::SyncManagerStopped);
    lock.release().unwrap();
}

#[test]
fn errors_name_the_lock_and_what_is_in_the_way() {
    let server = MemoryServer::new();
    let manager = MemoryManager::on(&server);
    let lock = manager.lock("x").unwrap();
    let text = |context: &Context| lock.lock(context).unwrap_err().to_string();
    assert!(text(&soon()).contains("call start()"));
    manager.start().unwrap();
    let (_other, holder) = rival(&server);
    holder.lock(&soon()).unwrap();
    let error = text(&Context::timeout(Duration::from_millis(10)));
    assert!(
        error.starts_with("timed out: waited ")
            && error.ends_with("s for lock \"x\", which another session holds"),
        "{error}"
    );
    manager.stop().unwrap();
    assert!(text(&soon()).contains("start a new one"));
}

#[test]
fn a_guard_that_is_lost_before_it_is_had_says_so() {
    let server = MemoryServer::new();
    let [(_a, holder), (_b, waiter)] = [(); 2].map(|()| rival(&server));
    for _ in 0..300 {
        let guard = holder.acquire(Duration::ZERO).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| waiter.acquire(Duration::from_secs(60)));
            while server.waiting("x") == 0 {
                thread::yield_now();
            }
            guard.release().unwrap();
            assert!(server.revoke("x"));
            // The thread has seldom had the time to see that it had the lock.
            let error = waiting.join().unwrap().and_then(LockGuard::release).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Lost, "{error}");
            assert!(error.to_string().contains("revoked"), "{error}");
        });
    }
}

#[test]
fn a_guard_knows_its_own_loss_and_no_other() {
    let server = MemoryServer::new();
    let (manager, lock) = rival(&server);
    let revoked = lock.acquire(Duration::ZERO).unwrap();
    server.revoke("x");
    let cut_off = lock.acquire(Duration::ZERO).unwrap();
    server.go_down();
    server.come_up();
    let stopped = lock.acquire(Duration::ZERO).unwrap();
    manager.stop().unwrap();
    assert_eq!(revoked.loss().map(|loss| loss.reason), Some(LossReason::Revoked));
    assert_eq!(cut_off.loss().map(|loss| loss.reason), Some(LossReason::ConnectionClosed));
    assert_eq!(stopped.loss(), None);
    for (guard, why) in [(revoked, "revoked"), (cut_off, "closed"), (stopped, "stopped")] {
        let error = guard.release().unwrap_err();
        assert!(error.kind() == ErrorKind::Lost && error.to_string().contains(why), "{error}");
    }
}

#[test]
fn a_wait_that_is_cancelled_when_its_turn_comes_makes_no_attempt() {
    for _ in 0..300 {
        let server = MemoryServer::new();
        let (_manager, lock) = rival(&server);
        let guard = lock.acquire(Duration::ZERO).unwrap();
        let (context, canceller) = Context::background().with_cancel();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| lock.acquire(&context).map(drop));
            while !format!("{lock:?}").contains("waiting_threads: 1") {
                thread::yield_now();
            }
            server.go_down();
            canceller.cancel();
            let error = waiting.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        });
        drop(guard);
    }
}
