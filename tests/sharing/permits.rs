//! Permits of semaphores on a shared session. The server grants a session once more what it has, so that each claim must be given another
//! permit is what most of these look at.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use dsync::{ErrorKind, LockGuard, LockOptions, LossReason};
use support::process::{Signal, signal};
use support::{Database, Server};

use super::*;
use crate::common::{becomes, begin, eventually, hear, kind};
use crate::edges::{by_a_slow_way, none_is_lost};

fn semaphore(manager: &PostgresManager, permits: u32) -> Arc<dyn Lock> {
    manager.semaphore("x", permits).unwrap()
}

/// The permits that these guards have.
fn permits(guards: &[LockGuard]) -> HashSet<u32> {
    guards.iter().map(|guard| guard.term().permit().unwrap()).collect()
}

/// Which sessions have permits, one for each: those that many share, or their own.
fn holders(operator: &mut Client) -> (i64, i64) {
    let query = "SELECT count(*) FILTER (WHERE application_name LIKE '%(many locks)'), count(*) FILTER (WHERE application_name NOT LIKE '%(many locks)')
                 FROM dsync.locks WHERE permit IS NOT NULL AND token IS NOT NULL";
    let row = operator.query_one(query, &[]).unwrap();
    (row.get(0), row.get(1))
}

fn advisory_locks(operator: &mut Client) -> i64 {
    number(
        operator,
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
}

#[test]
fn of_ten_that_want_permits_on_one_session_as_many_as_there_are_have_another_one_each() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = sharing(&database.url(), 1);
    let noted = LockOptions::new().permits(3).valuer(Arc::new(|| b"note".to_vec()));
    let semaphore = manager.lock_with("x", noted).unwrap();
    for _ in 0..20 {
        let mut had: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..10).map(|_| scope.spawn(|| semaphore.try_acquire().unwrap())).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(permits(&had), HashSet::from([1, 2, 3]));
        assert_eq!(had.len(), 3);
        assert_eq!(held(operator), (3, 1), "three permits, one session");
        // And the witness of the session.
        assert_eq!(advisory_locks(operator), 3 + 1);
        let tokens =
            |guards: &[LockGuard]| guards.iter().map(|guard| guard.term().token()).collect::<HashSet<_>>();
        let view = manager.inspect("x").unwrap();
        assert!(view.permits == Some(3) && view.waiters.is_empty(), "{view:?}");
        assert_eq!(view.holders().map(|holder| holder.token).collect::<HashSet<_>>(), tokens(&had));
        assert!(view.holders().all(|holder| holder.annotation.as_deref() == Some(b"note")));
        // The one that is given back is the one that is free, and no other.
        let given = had.pop().unwrap();
        let (permit, token) = (given.term().permit(), given.term().token());
        given.release().unwrap();
        let next = semaphore.try_acquire().unwrap().unwrap();
        assert!(next.term().permit() == permit && next.term().token() > token, "{next:?}");
        had.push(next);
        assert!(semaphore.try_acquire().unwrap().is_none());
        assert!(had.iter().all(|guard| guard.is_held()) && tokens(&had).len() == 3);
        had.into_iter().for_each(|guard| guard.release().unwrap());
        assert_eq!(held(operator).0, 0);
    }
    assert_eq!(sessions(&manager), 1);
    manager.stop().unwrap();
    becomes("the locks", &0, || advisory_locks(operator));
}

#[test]
fn a_claim_and_guards_have_permits_on_one_session_beside_locks() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = sharing(&database.url(), 1);
    let locks = locks(&manager, 5);
    lock_all(&locks);
    let semaphore = semaphore(&manager, 2);
    semaphore.lock(&soon()).unwrap();
    let guard = semaphore.acquire(LONG).unwrap();
    let claimed = semaphore.term().unwrap();
    assert_ne!(claimed.permit(), guard.term().permit());
    assert!(semaphore.try_acquire().unwrap().is_none());
    assert_eq!(held(operator), (7, 1));
    semaphore.release().unwrap();
    let second = semaphore.try_acquire().unwrap().unwrap();
    assert_eq!(second.term().permit(), claimed.permit());
    drop((guard, second));
    assert!(locks.iter().all(is_held));
    assert_eq!(held(operator), (5, 1));
}

/// Two managers share sessions, and one has a session for each permit. Whoever waits has a session of its own, too.
#[test]
fn never_more_have_permits_than_there_are_whichever_sessions_they_are_on() {
    const PERMITS: u32 = 3;
    let database = Database::fresh().unwrap();
    let (operator, url) = (&mut database.client().unwrap(), database.url());
    let managers = [
        started(config(&url, 1).lease(LONG)),
        started(config(&url, 2).lease(LONG)),
        started(Config::from_url(&url).unwrap().lease(LONG).release_timeout(PATIENCE)),
    ];
    let (working, most, over) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let (mut shared, mut own) = (0, 0);
    thread::scope(|scope| {
        for number in 0..8 {
            let (manager, working, most, over) = (&managers[number % 3], &working, &most, &over);
            scope.spawn(move || {
                let semaphore = semaphore(manager, PERMITS);
                while !over.load(SeqCst) {
                    let guard = match fastrand::bool() {
                        true => semaphore.try_acquire().unwrap(),
                        false => Some(semaphore.acquire(LONG).unwrap()),
                    };
                    let Some(guard) = guard else {
                        thread::yield_now();
                        continue;
                    };
                    let now = working.fetch_add(1, SeqCst) + 1;
                    assert!(now <= PERMITS as usize, "{now} work");
                    most.fetch_max(now, SeqCst);
                    thread::sleep(Duration::from_micros(fastrand::u64(0..5_000)));
                    working.fetch_sub(1, SeqCst);
                    assert!(guard.is_held(), "{:?}", guard.loss());
                    guard.release().unwrap();
                }
            });
        }
        let begun = Instant::now();
        let mut saw_all = false;
        // On a busy machine it takes longer until everything has happened once.
        while begun.elapsed() < Duration::from_secs(8) || !saw_all && begun.elapsed() < LONG {
            let (of_many, of_one) = holders(operator);
            assert!(of_many + of_one <= i64::from(PERMITS), "{of_many} and {of_one}");
            (shared, own) = (shared.max(of_many), own.max(of_one));
            saw_all = shared > 1 && own > 0 && most.load(SeqCst) == PERMITS as usize;
        }
        over.store(true, SeqCst);
    });
    assert_eq!(most.into_inner(), PERMITS as usize);
    assert!(shared > 1 && own > 0, "{shared} on shared sessions at once, {own} on others");
    managers.iter().for_each(|manager| manager.stop().unwrap());
    becomes("the locks", &0, || advisory_locks(operator));
}

/// The first in the line is stopped, so that it cannot take the permit that comes free.
#[test]
fn who_asks_on_a_shared_session_overtakes_nobody_who_waits() {
    let database = Database::fresh().unwrap();
    let holder = started(Config::from_url(&database.url()).unwrap());
    let held = semaphore(&holder, 1).acquire(LONG).unwrap();
    let waiter = sharing(&database.url(), 1);
    let waits = begin({
        let semaphore = semaphore(&waiter, 1);
        move || semaphore.acquire(LONG).unwrap()
    });
    becomes("the waiters", &1, || holder.inspect("x").unwrap().waiters.len());
    let pid = holder.inspect("x").unwrap().waiters[0].pid;
    signal(pid, Signal::Stop).unwrap();
    held.release().unwrap();
    let free = "SELECT permits - held FROM dsync.semaphores";
    becomes("a permit that is free", &1, || number(&mut database.client().unwrap(), free));
    let newcomer = sharing(&database.url(), 1);
    for _ in 0..10 {
        assert!(semaphore(&newcomer, 1).try_acquire().unwrap().is_none());
    }
    assert_eq!(kind(semaphore(&newcomer, 1).acquire(Duration::from_millis(300))), ErrorKind::TimedOut);
    assert!(!waits.is_ready());
    signal(pid, Signal::Continue).unwrap();
    waits.get().release().unwrap();
    semaphore(&newcomer, 1).acquire(LONG).unwrap().release().unwrap();
}

/// Where there is no session to wait on, the claim asks again and again.
#[test]
fn a_permit_is_waited_for_without_a_session_too() {
    let database = Database::fresh().unwrap();
    let holder = started(Config::from_url(&database.url()).unwrap());
    lock(&holder, "busy").lock(&soon()).unwrap();
    let managers = [(); 2].map(|()| sharing(&database.url(), 1));
    for manager in &managers {
        drop(common::wait_in_thread(&lock(manager, "busy")));
        eventually("the only session to wait on", || in_state(manager, ClaimState::Queueing) == 1);
    }
    for round in 0..10 {
        let (ours, theirs) = (&managers[round % 2], &managers[1 - round % 2]);
        let held = [(); 2].map(|()| semaphore(ours, 2).acquire(LONG).unwrap());
        let waits = common::wait_in_thread(&semaphore(theirs, 2));
        eventually("its turns", || in_state(theirs, ClaimState::TakingTurns) == 1);
        let [first, second] = held;
        let free = first.term().permit();
        first.release().unwrap();
        waits.get().unwrap();
        assert_eq!(semaphore(theirs, 2).term().unwrap().permit(), free);
        semaphore(theirs, 2).release().unwrap();
        second.release().unwrap();
    }
}

#[test]
fn all_permits_of_a_session_are_lost_together_and_come_back() {
    const COUNT: usize = 300;
    let database = Database::fresh().unwrap();
    let (operator, client) = (&mut database.client().unwrap(), &mut database.client().unwrap());
    let manager = sharing(&database.url(), 1);
    let semaphores: Vec<_> =
        (0..COUNT).map(|number| manager.semaphore(format!("s{number}"), 1).unwrap()).collect();
    lock_all(&semaphores);
    assert_eq!(held(operator), (COUNT as i64, 1));
    let guards = [(); 3].map(|()| semaphore(&manager, 3).acquire(LONG).unwrap());
    let (lost, former) = (lost_channels(&semaphores), tokens(&semaphores));
    let first = semaphores[0].term().unwrap();
    let text = first.fence_text().unwrap();
    assert!(passes(client, &first) && guards.iter().all(|guard| passes(client, guard.term())));
    client.query("SELECT dsync.fence($1)", &[&text]).unwrap();
    operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = 's0'", &[]).unwrap();
    lost.iter().for_each(hear);
    guards.iter().for_each(|guard| hear(guard.lost()));
    all_are_held(&semaphores);
    assert!(semaphores.iter().all(|lock| lock.last_loss().unwrap().reason == LossReason::Terminated));
    assert!(tokens(&semaphores).iter().zip(former).all(|(new, old)| *new > old));
    // Each has the only permit of its semaphore again, so the former term is over for the fence.
    assert!(!passes(client, &first) && passes(client, &semaphores[0].term().unwrap()));
    let refused = client.query("SELECT dsync.fence($1)", &[&text]).unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "ZDF01");
    assert!(guards.into_iter().all(|guard| kind(guard.release()) == ErrorKind::Lost));
    let again = [(); 3].map(|()| semaphore(&manager, 3).acquire(LONG).unwrap());
    assert_eq!(permits(&again), HashSet::from([1, 2, 3]));
    assert_eq!((held(operator), sessions(&manager)), ((COUNT as i64 + 3, 1), 1));
    drop(again);
    manager.stop().unwrap();
    becomes("the locks", &0, || advisory_locks(operator));
}

#[test]
fn another_number_of_permits_is_told_and_a_changed_one_runs_in_on_a_shared_session() {
    let database = Database::fresh().unwrap();
    let [ours, theirs] = [(); 2].map(|()| sharing(&database.url(), 1));
    let (semaphore, other) = (semaphore(&ours, 2), semaphore(&theirs, 4));
    let mut guards = Vec::from([(); 2].map(|()| semaphore.acquire(LONG).unwrap()));
    let error = other.try_acquire().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("the catalog says 2"), "{error}");
    assert_eq!(kind(other.lock(&soon())), ErrorKind::InvalidConfig);
    other.release().unwrap();

    assert_eq!(other.set_permits(4).unwrap(), 2);
    guards.extend([&semaphore, &other].map(|lock| lock.acquire(LONG).unwrap()));
    assert_eq!(permits(&guards), HashSet::from([1, 2, 3, 4]));
    assert_eq!(other.set_permits(1).unwrap(), 4);
    assert!(guards.iter().all(|guard| guard.is_held()), "nobody has one taken away");
    guards.sort_by_key(|guard| guard.term().permit() == Some(1));
    let first = guards.pop().unwrap();
    for guard in guards {
        guard.release().unwrap();
        assert!(other.try_acquire().unwrap().is_none());
    }
    first.release().unwrap();
    let only = other.acquire(LONG).unwrap();
    assert_eq!(only.term().permit(), Some(1));
    assert_eq!(kind(semaphore.try_acquire()), ErrorKind::InvalidConfig, "it says two, which is neither");
}

/// The row of a permit that is free may be locked by others for long. It is not waited for, nor asked for again and again.
#[test]
fn a_permit_whose_row_is_locked_is_passed_over() {
    let database = Database::fresh().unwrap();
    let (operator, client) = (&mut database.client().unwrap(), &mut database.client().unwrap());
    let manager = sharing(&database.url(), 1);
    let semaphore = semaphore(&manager, 2);
    drop([(); 2].map(|()| semaphore.acquire(LONG).unwrap()));
    let mut transaction = client.transaction().unwrap();
    transaction.execute("SELECT FROM dsync.lock WHERE id & 1023 = 1 FOR UPDATE", &[]).unwrap();
    for _ in 0..20 {
        let guard = semaphore.try_acquire().unwrap().unwrap();
        assert_eq!(guard.term().permit(), Some(2));
        guard.release().unwrap();
    }
    let guard = semaphore.acquire(LONG).unwrap();
    assert!(semaphore.try_acquire().unwrap().is_none());
    assert_eq!(advisory_locks(operator), 1 + 1, "and the witness");
    let waits = common::wait_in_thread(&semaphore);
    eventually("a session of its own", || in_state(&manager, ClaimState::Queueing) == 1);
    transaction.commit().unwrap();
    waits.get().unwrap();
    assert!(guard.is_held() && semaphore.term().unwrap().permit() == Some(1));
}

/// The transaction of a former holder is open still.
#[test]
fn a_permit_with_a_fenced_transaction_is_passed_over_on_a_shared_session() {
    let database = Database::fresh().unwrap();
    let client = &mut database.client().unwrap();
    let manager = sharing(&database.url(), 1);
    let semaphore = semaphore(&manager, 2);
    let former = semaphore.acquire(LONG).unwrap();
    let (term, permit) = (former.term().clone(), former.term().permit());
    let mut transaction = client.transaction().unwrap();
    term.fence(&mut transaction).unwrap();
    former.release().unwrap();
    for _ in 0..20 {
        let guard = semaphore.try_acquire().unwrap().unwrap();
        assert_ne!(guard.term().permit(), permit);
        guard.release().unwrap();
    }
    let guard = semaphore.acquire(LONG).unwrap();
    assert!(semaphore.try_acquire().unwrap().is_none());
    transaction.commit().unwrap();
    let later = semaphore.acquire(LONG).unwrap();
    assert!(guard.is_held() && later.term().permit() == permit);
}

/// As `VACUUM FULL` locks it.
#[test]
fn a_table_of_semaphores_that_is_locked_is_in_the_way_of_permits_only() {
    let lease = Duration::from_secs(8);
    let database = Database::fresh().unwrap();
    let client = &mut database.client().unwrap();
    let manager = started(config(&database.url(), 1).lease(lease));
    let locks = locks(&manager, 10);
    lock_all(&locks);
    let guard = semaphore(&manager, 2).acquire(LONG).unwrap();
    let lost = lost_channels(&locks);
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute("LOCK TABLE dsync.semaphore").unwrap();
    let waits = common::wait_in_thread(&semaphore(&manager, 2));
    let end = Instant::now() + lease + Duration::from_secs(2);
    while Instant::now() < end {
        lock(&manager, "another").acquire(LONG).unwrap().release().unwrap();
    }
    assert!(lost.iter().all(common::is_open) && guard.is_held() && !waits.is_ready());
    guard.release().unwrap();
    transaction.commit().unwrap();
    waits.get().unwrap();
}

/// They come together while the server stands still.
#[test]
fn a_permit_that_is_refused_is_in_the_way_of_no_lock_that_is_asked_for_at_once() {
    const COUNT: usize = 10;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let manager = started(config(&server.url(), 1).lease(LONG));
    semaphore(&manager, 2).acquire(LONG).unwrap().release().unwrap();
    let mut transaction = operator.transaction().unwrap();
    transaction.batch_execute("LOCK TABLE dsync.semaphore").unwrap();
    let frozen = server.freeze().unwrap();
    let first = common::wait_in_thread(&lock(&manager, "first"));
    eventually("a statement", || manager.snapshot().claims.len() == 1);
    let permit = common::wait_in_thread(&semaphore(&manager, 2));
    eventually("the claim of a permit", || manager.snapshot().claims.len() == 2);
    let tried: Vec<_> =
        locks(&manager, COUNT).into_iter().map(|lock| begin(move || lock.try_acquire())).collect();
    eventually("claims of all", || manager.snapshot().claims.len() == 2 + COUNT);
    drop(frozen);
    first.get().unwrap();
    tried.into_iter().for_each(|tried| drop(tried.get().unwrap().expect("it is free")));
    assert!(!permit.is_ready());
    transaction.commit().unwrap();
    permit.get().unwrap();
}

#[test]
fn a_full_table_of_locks_costs_no_permit_that_is_held() {
    let server =
        Server::builder().max_connections(10).setting("max_locks_per_transaction", "10").start().unwrap();
    let manager = started(config(&server.url(), 1).lease(LONG));
    let semaphore = semaphore(&manager, 1023);
    let mut permits_had = Vec::new();
    let mut fillers = Vec::new();
    permits_had.extend((0..20).map(|_| semaphore.acquire(LONG).unwrap()));
    // Whoever fills the table is not this session.
    let filler = &mut server.client().unwrap();
    while filler.query_one("SELECT pg_advisory_lock($1)", &[&(fillers.len() as i64)]).is_ok() {
        fillers.push(fillers.len());
        assert!(fillers.len() < 100_000, "the table has no end");
    }
    let error = semaphore.try_acquire().unwrap_err();
    println!("{} other locks, and then: {error}", fillers.len());
    assert!(permits_had.iter().all(|guard| guard.is_held()));
    let error = semaphore.lock(&common::briefly()).unwrap_err();
    println!("{error}");
    filler.execute("SELECT pg_advisory_unlock_all()", &[]).unwrap();
    semaphore.lock(&soon()).unwrap();
    permits_had.push(semaphore.acquire(LONG).unwrap());
    assert!(permits_had.iter().all(|guard| guard.is_held()));
    assert_eq!(permits(&permits_had).len(), 21);
    assert!(!permits(&permits_had).contains(&semaphore.term().unwrap().permit().unwrap()));
    drop(permits_had);
    manager.stop().unwrap();
    becomes("the locks", &0, || advisory_locks(&mut server.client().unwrap()));
}

/// In the encoding LATIN1 there is no place for the name of this key.
#[test]
fn a_semaphore_that_the_database_cannot_write_hits_no_other_one() {
    const COUNT: usize = 60;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    operator.batch_execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'").unwrap();
    let url = format!("{}/latin", server.url().rsplit_once('/').unwrap().0);
    let manager = started(config(&url, 1).lease(LONG));
    let locks = locks(&manager, 10);
    lock_all(&locks);
    let semaphores: Vec<_> =
        (0..COUNT).map(|number| manager.semaphore(format!("s{number}"), 2).unwrap()).collect();
    let bad = manager.semaphore("鍵", 2).unwrap();
    // All come while the server stands still, so they are looked for by few statements, and the bad one with others.
    let frozen = server.freeze().unwrap();
    let refused = begin({
        let bad = Arc::clone(&bad);
        move || bad.try_lock(&soon())
    });
    let waiting: Vec<_> = semaphores.iter().map(common::wait_in_thread).collect();
    eventually("claims of all", || manager.snapshot().claims.len() == locks.len() + COUNT + 1);
    drop(frozen);
    waiting.into_iter().for_each(|outcome| outcome.get().unwrap());
    println!("{}", refused.get().unwrap_err());
    assert!(!is_held(&bad) && semaphores.iter().chain(&locks).all(is_held));
    bad.release().unwrap();
    semaphores.iter().for_each(|semaphore| semaphore.release().unwrap());
    let operator = &mut Client::connect(&url, postgres::NoTls).unwrap();
    assert_eq!(held(operator), (10, 1));
}

/// All semaphores of a program end with ten zeros, which is not to put all of them on one session.
#[test]
fn semaphores_are_spread_over_the_sessions() {
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = started(config(&database.url(), 4).shared_sessions(4));
    let semaphores: Vec<_> =
        (0..64).map(|number| manager.semaphore(format!("s{number}"), 2).unwrap()).collect();
    lock_all(&semaphores);
    assert_eq!(held(operator), (64, 4));
}

/// Each look finds a permit whose row another transaction has, so that many follow each other without anything that renews the lease.
#[test]
fn permits_that_are_looked_for_in_vain_cost_no_lock_on_a_slow_way() {
    const PERMITS: u32 = 250;
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    // Each permit has a row.
    let fast = sharing(&database.url(), 1);
    let all = semaphore(&fast, PERMITS);
    let guards: Vec<_> = (0..PERMITS).map(|_| all.acquire(LONG).unwrap()).collect();
    drop(guards);
    let manager = started(config(&by_a_slow_way(&database.url()), 1).lease(Duration::from_secs(6)));
    let locks = locks(&manager, 3);
    lock_all(&locks);
    let lost = lost_channels(&locks);
    let mut transaction = operator.transaction().unwrap();
    transaction.execute("SELECT FROM dsync.lock WHERE key = 'x' FOR UPDATE", &[]).unwrap();
    let waiting = begin({
        let slow = semaphore(&manager, PERMITS);
        move || slow.acquire(LONG).map(drop)
    });
    none_is_lost(&locks, &lost, Duration::from_secs(8));
    transaction.commit().unwrap();
    waiting.get().unwrap();
}

/// What the server has of the lost session is asked for those that share their locks, and for permits.
#[test]
fn many_that_settle_at_once_cost_no_lock_on_a_slow_way() {
    const COUNT: usize = 225;
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = started(config(&by_a_slow_way(&database.url()), 1).lease(Duration::from_secs(6)));
    let settling: Vec<_> = (0..COUNT)
        .map(|number| match number % 2 {
            0 => manager.shared_lock(format!("shared {number}")).unwrap(),
            _ => manager.semaphore(format!("permit {number}"), 2).unwrap(),
        })
        .collect();
    let locks = locks(&manager, 3);
    lock_all(&locks);
    lock_all(&settling);
    let former = lost_channels(&locks);
    operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = 'k0'", &[]).unwrap();
    former.iter().for_each(hear);
    all_are_held(&locks);
    all_are_held(&settling);
    let lost = lost_channels(&locks);
    let released: Vec<_> = settling.into_iter().map(|lock| begin(move || lock.release())).collect();
    none_is_lost(&locks, &lost, Duration::from_secs(6));
    released.into_iter().for_each(|released| released.get().unwrap());
}
