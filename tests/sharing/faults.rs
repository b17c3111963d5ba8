//! The session is lost, the server stands still or is restarted. What befalls a lock then, on whichever session it is, is in `outages`.

use std::sync::Arc;

use crossbeam_channel::RecvTimeoutError;
use dsync::{CatalogMode, Context, ErrorKind, LockOptions, LossReason, Quorum, TakeoverPolicy};
use support::process::{Signal, signal};
use support::{Database, Replication, Server, Shutdown};

use super::*;
use crate::common::{becomes, begin, eventually, hear, kind};

#[test]
fn all_locks_of_a_session_are_lost_together_and_come_back() {
    const COUNT: usize = 600;
    for catalog in [CatalogMode::None, CatalogMode::Automatic] {
        let database = Database::fresh().unwrap();
        let operator = &mut database.client().unwrap();
        let manager = started(config(&database.url(), 1).catalog(catalog));
        let locks = locks(&manager, COUNT);
        lock_all(&locks);
        let guard = lock(&manager, "guarded").acquire(LONG).unwrap();
        let (lost, former) = (
            lost_channels(&locks),
            locks.iter().map(|lock| lock.term().unwrap().token()).collect::<Vec<_>>(),
        );
        let begun = Instant::now();
        operator
            .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'dsync (many%' AND datname = current_database()", &[])
            .unwrap();
        lost.iter().for_each(hear);
        let heard = begun.elapsed();
        all_are_held(&locks);
        println!(
            "{catalog:?}: {COUNT} locks lost within {heard:?}, and held again after {:?}",
            begun.elapsed()
        );
        assert!(locks.iter().all(|lock| lock.last_loss().unwrap().reason == LossReason::Terminated));
        assert!(lost.iter().all(|lost| !common::is_open(lost)), "a closed channel stays closed");
        if catalog != CatalogMode::None {
            assert!(tokens(&locks).iter().zip(former).all(|(new, old)| Some(*new) > old));
        }
        // A guard has one term.
        assert!(!guard.is_held());
        assert_eq!(kind(guard.release()), ErrorKind::Lost);
        assert_eq!(sessions(&manager), 1);
    }
}

#[test]
fn a_former_term_of_a_shared_session_does_not_pass_the_fence() {
    let database = Database::fresh().unwrap();
    let (operator, client) = (&mut database.client().unwrap(), &mut database.client().unwrap());
    let manager = sharing(&database.url(), 1);
    let locks = locks(&manager, 3);
    lock_all(&locks);
    let former = locks[1].term().unwrap();
    let text = former.fence_text().unwrap();
    assert!(passes(client, &former));
    operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = 'k1'", &[]).unwrap();
    hear(former.lost());
    all_are_held(&locks);
    assert!(!passes(client, &former) && passes(client, &locks[1].term().unwrap()));
    let refused = client.execute("SELECT dsync.fence($1)", &[&text]).unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "ZDF01");
}

#[test]
fn a_server_that_stands_still_costs_all_locks_in_time_and_hangs_nobody() {
    const COUNT: usize = 50;
    let lease = Duration::from_secs(4);
    let server = Server::start().unwrap();
    let manager = started(config(&server.url(), 1).lease(lease).release_timeout(Duration::from_secs(2)));
    let locks = locks(&manager, COUNT);
    lock_all(&locks);
    let lost = lost_channels(&locks);
    let frozen = server.freeze().unwrap();
    let (late, begun) = (common::Lateness::watch(), Instant::now());
    // A release ends in time, though nobody can be told; and a cancelled call at once.
    let release = begin({
        let lock = Arc::clone(&locks[0]);
        move || lock.release()
    });
    let outcome = release.get_within(Duration::from_secs(10));
    assert_eq!(kind(outcome), ErrorKind::UnlockFailed);
    let (context, cancel) = soon().with_cancel();
    let cancelled = begin({
        let another = lock(&manager, "another");
        move || another.lock(&context)
    });
    cancel.cancel();
    assert_eq!(kind(cancelled.get_within(Duration::from_secs(5))), ErrorKind::Cancelled);
    lost[1..].iter().for_each(hear);
    within(begun, lease + Duration::from_secs(1) + late.of_a_loss());
    let reason = locks[1].last_loss().unwrap().reason;
    assert!(matches!(reason, LossReason::HeartbeatTimedOut | LossReason::LeaseNotRenewed), "{reason:?}");
    drop(frozen);
    all_are_held(&locks[1..]);
    let stopped = begin(move || manager.stop());
    let _ = stopped.get_within(Duration::from_secs(10));
    let operator = &mut server.client().unwrap();
    becomes("the locks", &0, || advisory_locks(operator));
}

/// A reader has its lock again beside what the server keeps for its lost session, so a grant says nothing of that.
#[test]
fn a_reader_is_told_that_its_lost_session_may_have_the_lock_still() {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    for shares in [true, false] {
        let manager = started(
            config(&server.url(), 2)
                .lease(Duration::from_secs(20))
                .heartbeat(Duration::from_millis(500))
                .heartbeat_timeout(Duration::from_secs(2))
                .release_timeout(Duration::from_secs(4)),
        );
        let options = LockOptions::new().shared().shared_session(shares);
        let reader = manager.lock_with("read", options).unwrap();
        reader.lock(&soon()).unwrap();
        let lost = reader.lost();
        let query = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'";
        let pid: i32 = operator.query_one(query, &[]).unwrap().get(0);
        signal(pid, Signal::Stop).unwrap();
        hear(&lost);
        eventually("the lock again", || reader.is_held());
        assert_eq!(kind(reader.release()), ErrorKind::UnlockFailed, "shared session: {shares}");
        signal(pid, Signal::Continue).unwrap();
        becomes("the lock of the lost session", &0, || {
            number(
                operator,
                "SELECT count(*) FROM pg_locks WHERE mode = 'ShareLock' AND locktype = 'advisory'",
            )
        });
        reader.lock(&soon()).unwrap();
        reader.release().unwrap();
    }
}

/// A statement that takes longer than a release may, and then is answered after all.
#[test]
fn a_release_that_was_given_up_is_done_when_the_server_answers_and_costs_no_other_lock() {
    let server = Server::start().unwrap();
    let lease = Duration::from_secs(20);
    let manager = started(config(&server.url(), 2).lease(lease).release_timeout(Duration::from_millis(300)));
    let locks = locks(&manager, 10);
    lock_all(&locks);
    let frozen = server.freeze().unwrap();
    let released = locks[3].release().unwrap_err();
    assert_eq!(released.kind(), ErrorKind::UnlockFailed);
    println!("{released}");
    assert!(released.to_string().contains("goes on"), "{released}");
    let lost = lost_channels(&locks);
    drop(frozen);
    let other = started(dsync::Config::from_url(&server.url()).unwrap());
    lock(&other, "k3").lock(&soon()).unwrap();
    assert!(
        lost.iter().enumerate().all(|(number, lost)| (number == 3) != common::is_open(lost)),
        "no other was lost"
    );
    // It can be claimed again, and is waited for as any.
    let again = common::wait_in_thread(&locks[3]);
    lock(&other, "k3").release().unwrap();
    again.get().unwrap();
}

/// When the first term of all began, in milliseconds.
fn first_began(server: &Server) -> i64 {
    let query = "SELECT (1000 * extract(epoch FROM min(since)))::int8 FROM dsync.locks";
    number(&mut server.client().unwrap(), query)
}

#[test]
fn after_a_restart_all_come_back_and_none_before_the_grace_is_over() {
    const COUNT: usize = 300;
    let lease = Duration::from_secs(2);
    for policy in [TakeoverPolicy::Immediate, TakeoverPolicy::AfterAnyRestart] {
        let server = Server::start().unwrap();
        let manager = started(config(&server.url(), 1).lease(lease).takeover(policy));
        let locks = locks(&manager, COUNT);
        lock_all(&locks);
        let (lost, began) = (lost_channels(&locks), first_began(&server));
        server.restart(Shutdown::Fast).unwrap();
        let begun = Instant::now();
        lost.iter().for_each(hear);
        all_are_held(&locks);
        let took = begun.elapsed();
        println!("{policy:?}: {COUNT} locks held again {took:?} after the restart");
        // Who had a lock last is granted it when the longest lease has passed since it began, by the server's clock.
        if policy == TakeoverPolicy::AfterAnyRestart {
            let waited = first_began(&server) - began;
            assert!(waited >= 2_000, "granted {waited} ms after the terms of before");
        }
        within(begun, Duration::from_secs(30));
    }
}

#[test]
fn the_standbys_confirm_for_all_locks_of_a_session_at_once() {
    const COUNT: usize = 200;
    let lease = Duration::from_secs(8);
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let manager = started(config(&primary.url(), 1).lease(lease).quorum(Quorum::NamedStandbys));
    let locks = locks(&manager, COUNT);
    lock_all(&locks);
    let lost = lost_channels(&locks);
    standby.stop(Shutdown::Fast).unwrap();
    let (late, begun) = (common::Lateness::watch(), Instant::now());
    // No lock is had, no term goes on, and what is to be given back is.
    let another = lock(&manager, "another");
    assert_eq!(kind(another.lock(&Context::timeout(Duration::from_millis(500)))), ErrorKind::TimedOut);
    another.release().unwrap();
    locks[0].release().unwrap();
    lost[1..].iter().for_each(hear);
    within(begun, lease + Duration::from_secs(1) + late.of_a_loss());
    assert!(locks[1..].iter().all(|lock| lock.last_loss().unwrap().reason == LossReason::NotConfirmed));
    standby.start_again().unwrap();
    all_are_held(&locks[1..]);
    another.lock(&soon()).unwrap();
}

/// As `VACUUM FULL` and some forms of `ALTER TABLE` lock it.
#[test]
fn a_table_of_the_catalog_that_is_locked_costs_no_lock_that_is_held() {
    const COUNT: usize = 50;
    let lease = Duration::from_secs(8);
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let manager = started(config(&server.url(), 1).lease(lease));
    let locks = locks(&manager, COUNT);
    lock_all(&locks);
    let lost = lost_channels(&locks);
    let mut transaction = operator.transaction().unwrap();
    transaction.batch_execute("LOCK TABLE dsync.lock").unwrap();
    let another = lock(&manager, "another");
    let waits = common::wait_in_thread(&another);
    assert_eq!(lost[1].recv_timeout(2 * lease), Err(RecvTimeoutError::Timeout), "nobody loses anything");
    // What is held can be given back meanwhile: that writes no row.
    locks[0].release().unwrap();
    assert!(lost[1..].iter().all(common::is_open) && !waits.is_ready());
    transaction.commit().unwrap();
    waits.get().unwrap();
    manager.stop().unwrap();
    let settings = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'dsync (many%'";
    becomes("its session", &0, || number(operator, settings));
}

#[test]
fn a_catalog_that_is_dropped_is_made_again() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = sharing(&database.url(), 1);
    let first = lock(&manager, "first");
    first.lock(&soon()).unwrap();
    operator.batch_execute("DROP SCHEMA dsync CASCADE").unwrap();
    let second = lock(&manager, "second");
    second.lock(&soon()).unwrap();
    assert!(is_held(&first) && is_held(&second));
    first.release().unwrap();
    first.lock(&soon()).unwrap();
}
