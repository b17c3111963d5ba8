//! Semaphores at the server: never more holders than permits, who is served when, what a fence says, and what an operator sees.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::{CatalogMode, Config, Context, ErrorKind, Lock, LockOptions, PostgresManager, SyncManager, Term};
use postgres::Client;
use support::pgbouncer::{self, PoolMode};
use support::process::{Signal, signal};
use support::{Database, Server};

use crate::common::{
    self, Lateness, PATIENCE, Process, becomes, begin, eventually, hear, kind, lock, process, role, started,
};

fn config(database: &Database<'_>) -> Config {
    Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE)
}

fn semaphore(manager: &PostgresManager, permits: u32) -> Arc<dyn Lock> {
    manager.semaphore("x", permits).unwrap()
}

fn count(client: &mut Client, query: &str) -> i64 {
    client.query_one(query, &[]).unwrap().get(0)
}

/// All advisory locks of the database that are held.
const LOCKS: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

/// Takes all permits, and gives them back: none is left with anybody.
fn all_are_free(manager: &PostgresManager, permits: u32) {
    let semaphore = semaphore(manager, permits);
    let all: Vec<_> = (0..permits).map(|_| semaphore.acquire(PATIENCE).unwrap()).collect();
    let mut numbers: Vec<_> =
        manager.inspect("x").unwrap().holders().map(|holder| holder.permit.unwrap()).collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(1..=permits));
    all.into_iter().for_each(|guard| guard.release().unwrap());
}

/// Waits until so many wait for a permit.
fn wait_for_waiters(manager: &PostgresManager, waiters: usize) {
    becomes("the waiters", &waiters, || manager.inspect("x").unwrap().waiters.len());
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

// ---------------------------------------------------------------------------------------------------------------------
// Never more than there are permits
// ---------------------------------------------------------------------------------------------------------------------

const PERMITS: u32 = 3;
/// What whoever has a permit shares while it works, on a session of its own that is called after its process.
const WORK: i64 = 4711;

/// A process that works with a permit, for some milliseconds at a time, until it is killed.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn worker() {
    let Some(url) = role() else { return };
    let manager = started(Config::from_url(&url).unwrap().release_timeout(PATIENCE).max_sessions(4));
    let name = std::process::id().to_string();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut settings: postgres::Config = url.parse().unwrap();
                let mut client = settings.application_name(&name).connect(postgres::NoTls).unwrap();
                let semaphore = semaphore(&manager, PERMITS);
                loop {
                    let guard = semaphore.acquire(PATIENCE).unwrap();
                    client.execute("SELECT pg_advisory_lock_shared($1)", &[&WORK]).unwrap();
                    thread::sleep(Duration::from_millis(fastrand::u64(0..30)));
                    client.execute("SELECT pg_advisory_unlock_shared($1)", &[&WORK]).unwrap();
                    guard.release().unwrap();
                    println!("worked");
                }
            });
        }
    });
}

/// They are killed where they stand: with a permit, in the line, at its head. Those that take their places work on.
#[test]
fn processes_that_are_killed_never_leave_more_holders_than_permits_and_no_permit_behind() {
    const KILLS: usize = 24;
    let database = Database::fresh().unwrap();
    let (mut client, url) = (database.client().unwrap(), database.url());
    let start = || Process::start(&mut process("semaphores::worker", &url));
    let mut workers: Vec<Process> = (0..5).map(|_| start()).collect();
    for worker in &workers {
        worker.says("worked");
    }
    let (mut killed, mut most, begun) = (Vec::new(), 0, Instant::now());
    // Whether all permits are seen at work at one time is a matter of luck.
    while killed.len() < KILLS || most < PERMITS as usize && begun.elapsed() < PATIENCE {
        let until = Instant::now() + Duration::from_millis(150);
        while Instant::now() < until {
            let query = "SELECT activity.application_name FROM pg_locks AS locks JOIN pg_stat_activity AS activity USING (pid)
                         WHERE locks.locktype = 'advisory' AND locks.granted AND locks.objid = $1 AND locks.mode = 'ShareLock'";
            let rows = client.query(query, &[&u32::try_from(WORK).unwrap()]).unwrap();
            // The work of one that was killed may outlive its permit, by the time in which the server notices.
            let working = rows.iter().filter(|row| !killed.contains(&row.get::<_, String>(0))).count();
            assert!(working <= PERMITS as usize, "{working} work");
            most = most.max(working);
        }
        let number = fastrand::usize(..workers.len());
        let worker = workers.swap_remove(number);
        killed.push(worker.id().to_string());
        worker.kill();
        workers.push(start());
    }
    assert_eq!(most, PERMITS as usize, "they were there together");
    for worker in &workers {
        // What it said before it waited for its turn.
        while worker.lines.try_recv().is_ok() {}
        worker.says("worked");
    }
    workers.into_iter().for_each(Process::kill);
    let manager = started(config(&database));
    all_are_free(&manager, PERMITS);
    drop(manager);
    becomes("the locks", &0, || count(&mut client, LOCKS));
}

/// Of the processes that keep a permit.
const LEASE: Duration = Duration::from_secs(6);

/// A process that takes a permit and keeps it.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn keeper() {
    let Some(url) = role() else { return };
    let manager = started(Config::from_url(&url).unwrap().lease(LEASE));
    let guard = semaphore(&manager, 1).acquire(PATIENCE).unwrap();
    println!("has it");
    guard.lost().wait();
    println!("lost it");
}

#[test]
fn the_permit_of_a_frozen_holder_is_free_within_the_lease_and_that_of_a_dead_one_at_once() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let permit = semaphore(&manager, 1);
    for freeze in [true, false] {
        let keeper = Process::start(&mut process("semaphores::keeper", &database.url()));
        keeper.says("has it");
        let waiting = {
            let permit = Arc::clone(&permit);
            begin(move || permit.acquire(PATIENCE).unwrap())
        };
        wait_for_waiters(&manager, 1);
        let (late, begun) = (Lateness::watch(), Instant::now());
        let at_most = if freeze {
            signal(keeper.id(), Signal::Stop).unwrap();
            LEASE + Duration::from_secs(1)
        } else {
            signal(keeper.id(), Signal::Kill).unwrap();
            Duration::from_secs(2)
        };
        let guard = waiting.get();
        late.allow(begun.elapsed(), at_most);
        if freeze {
            signal(keeper.id(), Signal::Continue).unwrap();
            keeper.says("lost it");
        }
        guard.release().unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Who is served when
// ---------------------------------------------------------------------------------------------------------------------

/// The backend of the session that is the next one, which has the turnstile.
fn next_one(manager: &PostgresManager) -> i32 {
    manager.inspect("x").unwrap().waiters[0].pid
}

/// The first in the line is stopped, so that it cannot take the permit that comes free.
#[test]
fn nobody_overtakes_who_waits() {
    let database = Database::fresh().unwrap();
    let managers = [(); 4].map(|()| started(config(&database)));
    let mut held: Vec<_> = (0..2).map(|_| semaphore(&managers[0], 2).acquire(PATIENCE).unwrap()).collect();
    let mut line: Vec<_> = Vec::new();
    for (number, manager) in managers[1..].iter().enumerate() {
        let permit = semaphore(manager, 2);
        line.push(begin(move || permit.acquire(PATIENCE).unwrap()));
        wait_for_waiters(&managers[0], number + 1);
    }
    let newcomer = started(config(&database));
    while let Some(first) = (!line.is_empty()).then(|| line.remove(0)) {
        let pid = next_one(&managers[0]);
        signal(pid, Signal::Stop).unwrap();
        held.remove(0).release().unwrap();
        let free = "SELECT permits - held FROM dsync.semaphores";
        let mut client = database.client().unwrap();
        becomes("a permit that is free", &1, || count(&mut client, free));
        assert!(semaphore(&newcomer, 2).try_acquire().unwrap().is_none());
        assert_eq!(kind(semaphore(&newcomer, 2).acquire(Duration::from_millis(100))), ErrorKind::TimedOut);
        assert!(!first.is_ready() && line.iter().all(|later| !later.is_ready()));
        signal(pid, Signal::Continue).unwrap();
        held.push(first.get());
    }
}

/// A session that had a permit a moment ago asks for that first.
#[test]
fn who_had_a_permit_a_moment_ago_overtakes_nobody_either() {
    let database = Database::fresh().unwrap();
    let managers = [(); 2].map(|()| started(config(&database)));
    let (quick, waiter) = (semaphore(&managers[0], 1), semaphore(&managers[1], 1));
    for round in 0..5 {
        for _ in 0..3 {
            quick.acquire(PATIENCE).unwrap().release().unwrap();
        }
        let held = quick.acquire(PATIENCE).unwrap();
        let waiting = {
            let waiter = Arc::clone(&waiter);
            begin(move || waiter.acquire(PATIENCE).unwrap())
        };
        wait_for_waiters(&managers[0], 1);
        let pid = next_one(&managers[0]);
        signal(pid, Signal::Stop).unwrap();
        held.release().unwrap();
        assert!(quick.try_acquire().unwrap().is_none(), "round {round}");
        signal(pid, Signal::Continue).unwrap();
        drop(waiting.get());
    }
}

/// Who has waited for longer than a slice and is the next one keeps its place, and those that come do not pass it.
#[test]
fn one_is_served_among_many_that_hold_permits_for_longer_than_a_slice() {
    const MANY: usize = 12;
    const HOLD: Duration = Duration::from_millis(300);
    for loud in [false, true] {
        let database = Database::fresh().unwrap();
        let config = config(&database).wait_slice(Duration::from_millis(200)).max_sessions(8);
        let managers = [(); 3].map(|()| started(config.clone()));
        if loud {
            database.client().unwrap().batch_execute("DROP EXTENSION plpgsql CASCADE").unwrap();
        }
        let (late, begun) = (Lateness::watch(), Instant::now());
        thread::scope(|scope| {
            for number in 0..MANY {
                let manager = &managers[number % managers.len()];
                scope.spawn(move || {
                    let guard = semaphore(manager, 3).acquire(PATIENCE).unwrap();
                    thread::sleep(HOLD);
                    guard.release().unwrap();
                });
            }
        });
        // Each of the four rounds, and as much again for what it takes on a busy machine.
        late.allow(begun.elapsed(), 2 * 4 * (HOLD + Duration::from_millis(100)));
        all_are_free(&managers[0], 3);
    }
}

/// Whoever is granted a permit gives the turnstile back, and whoever gives up.
#[test]
fn a_wait_that_ends_leaves_nothing_behind() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 3].map(|()| started(config(&database).wait_slice(Duration::from_millis(100))));
    let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
    for _ in 0..5 {
        let (context, canceller) = Context::background().with_cancel();
        let cancelled = semaphore(&managers[1], 1);
        let cancelled = begin(move || kind(cancelled.acquire(context)));
        wait_for_waiters(&managers[0], 1);
        assert_eq!(kind(semaphore(&managers[2], 1).acquire(Duration::from_millis(300))), ErrorKind::TimedOut);
        canceller.cancel();
        assert_eq!(cancelled.get(), ErrorKind::Cancelled);
        becomes("the locks", &1, || count(&mut client, LOCKS));
    }
    held.release().unwrap();
    // A claim waits on when its caller leaves.
    let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
    let claim = semaphore(&managers[1], 1);
    assert_eq!(kind(claim.lock(&Context::timeout(Duration::from_millis(150)))), ErrorKind::TimedOut);
    wait_for_waiters(&managers[0], 1);
    held.release().unwrap();
    eventually("the claim's turn", || claim.is_held());
    assert_eq!(count(&mut client, LOCKS), 1);
    claim.release().unwrap();
    assert_eq!(count(&mut client, LOCKS), 0);
}

/// A look that was granted a permit, and could not write its row, has nothing when the next one begins.
#[test]
fn a_permit_whose_row_is_locked_is_not_kept_without_knowing() {
    let database = Database::fresh().unwrap();
    let (mut client, mut operator) = (database.client().unwrap(), database.client().unwrap());
    let managers = [(); 2].map(|()| started(config(&database).wait_slice(Duration::from_millis(200))));
    for _ in 0..5 {
        let held = [(); 2].map(|()| semaphore(&managers[0], 2).acquire(PATIENCE).unwrap());
        let mut held = Vec::from(held);
        held.sort_by_key(|guard| guard.term().permit());
        let waiting = semaphore(&managers[1], 2);
        let waiting = begin(move || waiting.acquire(PATIENCE).unwrap());
        wait_for_waiters(&managers[0], 1);
        let mut transaction = client.transaction().unwrap();
        transaction.execute("SELECT FROM dsync.lock WHERE id & 1023 = 1 FOR UPDATE", &[]).unwrap();
        held.remove(0).release().unwrap();
        let blocked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'";
        eventually("the wait for the row", || count(&mut operator, blocked) == 1);
        held.remove(0).release().unwrap();
        let guard = waiting.get();
        assert_eq!(guard.term().permit(), Some(2));
        assert_eq!(count(&mut operator, LOCKS), 1);
        transaction.commit().unwrap();
        guard.release().unwrap();
    }
}

/// A permit may be granted in the moment in which the wait is cancelled.
#[test]
fn permits_that_are_granted_to_who_has_just_given_up_are_free() {
    let database = Database::fresh().unwrap();
    let managers = [(); 2].map(|()| started(config(&database)));
    for round in 0..60 {
        let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
        let (context, canceller) = Context::background().with_cancel();
        let waiting = semaphore(&managers[1], 1);
        let waiting = begin(move || waiting.acquire(context));
        wait_for_waiters(&managers[0], 1);
        let canceller = begin(move || {
            thread::sleep(Duration::from_micros(fastrand::u64(0..3_000)));
            canceller.cancel();
        });
        held.release().unwrap();
        canceller.get();
        drop(waiting.get());
        let free = semaphore(&managers[0], 1).acquire(Duration::from_secs(20));
        assert!(free.is_ok(), "round {round}: {free:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// How many permits there are
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn processes_agree_how_many_permits_there_are_and_another_number_is_told() {
    let database = Database::fresh().unwrap();
    let [ours, theirs] = [(); 2].map(|()| started(config(&database)));
    drop(semaphore(&ours, 3).acquire(PATIENCE).unwrap());
    let other = semaphore(&theirs, 4);
    for outcome in [other.acquire(PATIENCE), other.try_acquire().map(|_| unreachable!())] {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        let text = error.to_string();
        assert!(
            text.contains("\"x\" is asked for with 4 permits") && text.contains("the catalog says 3"),
            "{text}"
        );
    }
    assert_eq!(kind(other.lock(&common::soon())), ErrorKind::InvalidConfig);
    other.release().unwrap();
    assert_eq!(
        kind(ours.semaphore("x", 4).map(drop).and(theirs.semaphore("x", 5).map(drop))),
        ErrorKind::InvalidConfig
    );

    // A change is for all. Who says what it was before goes on by the new number, until it is changed again.
    assert_eq!(other.set_permits(4).unwrap(), 3);
    assert_eq!(other.set_permits(4).unwrap(), 4, "once more");
    drop((semaphore(&ours, 3).acquire(PATIENCE).unwrap(), other.acquire(PATIENCE).unwrap()));
    assert_eq!(other.set_permits(5).unwrap(), 4);
    assert_eq!(kind(semaphore(&ours, 3).acquire(PATIENCE)), ErrorKind::InvalidConfig);
    drop(other.acquire(PATIENCE).unwrap());

    for permits in [0, 1024] {
        assert_eq!(kind(ours.semaphore("y", permits)), ErrorKind::InvalidConfig);
        assert_eq!(kind(other.set_permits(permits)), ErrorKind::InvalidConfig);
    }
    let options = LockOptions::new().permits(3).without_token();
    assert_eq!(kind(ours.lock_with("y", options)), ErrorKind::InvalidConfig);
    assert_eq!(kind(lock(&ours, "x").set_permits(3)), ErrorKind::InvalidConfig);
    let without = started(config(&database).catalog(CatalogMode::None));
    assert_eq!(kind(without.semaphore("x", 5)), ErrorKind::InvalidConfig);
    // Before anybody has asked for one.
    let first = ours.semaphore("z", 2).unwrap();
    assert_eq!(first.set_permits(7).unwrap(), 2);
    assert_eq!(ours.inspect("z").unwrap().permits, Some(7));
    drop(first.acquire(PATIENCE).unwrap());
}

#[test]
fn a_raised_number_is_seen_by_those_who_wait_and_a_lowered_one_runs_out() {
    let database = Database::fresh().unwrap();
    let [ours, theirs] = [(); 2].map(|()| started(config(&database)));
    let (permits, waiter) = (semaphore(&ours, 1), semaphore(&theirs, 1));
    let first = permits.acquire(PATIENCE).unwrap();
    let waiting = {
        let waiter = Arc::clone(&waiter);
        begin(move || waiter.acquire(PATIENCE).unwrap())
    };
    wait_for_waiters(&ours, 1);
    let (late, begun) = (Lateness::watch(), Instant::now());
    permits.set_permits(3).unwrap();
    let second = waiting.get();
    late.allow(begun.elapsed(), Duration::from_millis(500 + 2_000));
    let third = permits.acquire(PATIENCE).unwrap();

    permits.set_permits(1).unwrap();
    assert!([&first, &second, &third].iter().all(|guard| guard.is_held()));
    let view = ours.inspect("x").unwrap();
    assert_eq!((view.permits, view.holders().count()), (Some(1), 3));
    let mut guards = [first, second, third];
    assert!(guards.iter().all(|guard| {
        view.holders()
            .any(|holder| (holder.token, holder.permit) == (guard.term().token(), guard.term().permit()))
    }));
    // The one that is left is the last to go.
    guards.sort_by_key(|guard| guard.term().permit() == Some(1));
    let mut guards = Vec::from(guards);
    while guards.len() > 1 {
        guards.remove(0).release().unwrap();
        assert!(waiter.try_acquire().unwrap().is_none(), "{} are left", guards.len());
    }
    guards.remove(0).release().unwrap();
    let only = waiter.acquire(PATIENCE).unwrap();
    assert!(permits.try_acquire().unwrap().is_none());
    drop(only);
}

/// Another process may change it at the same time.
#[test]
fn a_number_that_is_changed_by_two_at_once_is_told_as_the_second_one_found_it() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database));
    let permits = semaphore(&manager, 2);
    drop(permits.acquire(PATIENCE).unwrap());
    let mut first = client.transaction().unwrap();
    first.execute("UPDATE dsync.semaphore SET permits = 3, former = 2", &[]).unwrap();
    let second = begin(move || permits.set_permits(5).unwrap());
    let blocked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'";
    let mut operator = database.client().unwrap();
    eventually("the wait for the first one", || count(&mut operator, blocked) == 1);
    first.commit().unwrap();
    assert_eq!(second.get(), 3);
    drop(semaphore(&manager, 3).acquire(PATIENCE).unwrap());
}

/// A session that had a permit a moment ago asks for that first.
#[test]
fn a_permit_that_has_run_out_is_not_taken_again() {
    let database = Database::fresh().unwrap();
    let [ours, theirs] = [(); 2].map(|()| started(config(&database)));
    let (permits, others) = (semaphore(&ours, 2), semaphore(&theirs, 2));
    for _ in 0..10 {
        let [one, other] = [(); 2].map(|()| permits.acquire(PATIENCE).unwrap());
        let (first, second) = if one.term().permit() == Some(1) { (one, other) } else { (other, one) };
        assert_eq!(others.set_permits(1).unwrap(), 2);
        second.release().unwrap();
        assert!(permits.try_acquire().unwrap().is_none());
        others.set_permits(2).unwrap();
        drop(first);
        let known = permits.acquire(PATIENCE).unwrap();
        let (permit, token) = (known.term().permit(), known.term().token());
        known.release().unwrap();
        let again = permits.acquire(PATIENCE).unwrap();
        assert!(again.term().token() > token, "{permit:?} {again:?}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The fence
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_fence_fails_when_a_later_term_of_the_same_permit_has_begun() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 3].map(|()| started(config(&database)));
    let [one, other] = [0, 1].map(|number| semaphore(&managers[number], 2).acquire(PATIENCE).unwrap());
    assert_ne!(one.term().token(), other.term().token());
    assert!(passes(&mut client, one.term()) && passes(&mut client, other.term()));
    let text = one.term().fence_text().unwrap();
    client.query("SELECT dsync.fence($1)", &[&text]).unwrap();
    assert!(one.term().is_current(&mut client).unwrap());

    // The row as a later term leaves it that has begun without this one's knowing.
    let later = "UPDATE dsync.lock SET token = nextval('dsync.token') WHERE token = $1";
    assert_eq!(client.execute(later, &[&one.term().token().unwrap()]).unwrap(), 1);
    assert!(!passes(&mut client, one.term()) && passes(&mut client, other.term()));
    assert!(one.is_held() && !one.term().is_current(&mut client).unwrap());
    let error = client.query("SELECT dsync.fence($1)", &[&text]).unwrap_err();
    assert_eq!(error.code().unwrap().code(), "ZDF01");
}

/// The permit of a term that was lost, whose transaction is open still, is left alone until that has ended.
#[test]
fn a_permit_with_a_fenced_transaction_is_passed_over() {
    let database = Database::fresh().unwrap();
    let (mut client, mut operator) = (database.client().unwrap(), database.client().unwrap());
    let [ours, theirs] = [(); 2].map(|()| started(config(&database)));
    let lost = semaphore(&ours, 2).acquire(PATIENCE).unwrap();
    let mut transaction = client.transaction().unwrap();
    lost.term().fence(&mut transaction).unwrap();
    operator.execute("SELECT pg_terminate_backend(pid) FROM dsync.locks", &[]).unwrap();
    hear(lost.lost());
    let permits = semaphore(&theirs, 2);
    for _ in 0..10 {
        permits.acquire(PATIENCE).unwrap().release().unwrap();
    }
    let other = permits.acquire(PATIENCE).unwrap();
    assert!(permits.try_acquire().unwrap().is_none(), "its transaction is open");
    let waiting = {
        let permits = Arc::clone(&permits);
        begin(move || permits.acquire(PATIENCE).unwrap())
    };
    wait_for_waiters(&ours, 1);
    transaction.commit().unwrap();
    let later = waiting.get();
    assert!(!passes(&mut client, lost.term()));
    assert!(passes(&mut client, later.term()) && passes(&mut client, other.term()));
}

// ---------------------------------------------------------------------------------------------------------------------
// What can be seen, and what else there is
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn holders_and_those_who_wait_can_be_seen() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 4].map(|()| started(config(&database)));
    assert_eq!(managers[0].inspect("x").unwrap().permits, None, "nobody has asked for one");
    let noted = LockOptions::new().permits(2).valuer(Arc::new(|| b"note".to_vec()));
    let first = managers[0].lock_with("x", noted).unwrap().acquire(PATIENCE).unwrap();
    let second = semaphore(&managers[1], 2).acquire(PATIENCE).unwrap();
    let waiting: Vec<_> = (2..4)
        .map(|number| {
            let permit = semaphore(&managers[number], 2);
            let waiting = begin(move || permit.acquire(PATIENCE).unwrap());
            wait_for_waiters(&managers[0], number - 1);
            waiting
        })
        .collect();
    let view = managers[3].inspect("x").unwrap();
    assert_eq!((view.permits, view.holders().count(), view.waiters.len()), (Some(2), 2, 2));
    let ours = view.holders().find(|holder| holder.token == first.term().token()).unwrap();
    assert!(
        ours.is_shared && ours.annotation.as_deref() == Some(b"note") && ours.since.is_some(),
        "{ours:?}"
    );
    assert!(
        view.holders().any(|holder| holder.token == second.term().token() && holder.annotation.is_none())
    );
    assert!(view.holders().map(|holder| holder.permit.unwrap()).eq(1..=2));
    let all = managers[3].inspect_all().unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(all[0].holders().eq(view.holders()) && all[0].permits == view.permits, "{all:?}");
    let pids = |waiters: &[dsync::Waiter]| waiters.iter().map(|waiter| waiter.pid).collect::<Vec<_>>();
    assert_eq!(pids(&all[0].waiters), pids(&view.waiters));
    let seen =
        client.query_one("SELECT permits, held, waiting FROM dsync.semaphores WHERE key = 'x'", &[]).unwrap();
    assert_eq!((seen.get::<_, i32>(0), seen.get::<_, i64>(1), seen.get::<_, i64>(2)), (2, 2, 2));
    let holders = "SELECT count(DISTINCT permit) FROM dsync.locks WHERE key = 'x' AND token IS NOT NULL";
    assert_eq!(count(&mut client, holders), 2);
    drop((first, second));
    waiting.into_iter().for_each(|waiting| drop(waiting.get()));
    let view = managers[3].inspect("x").unwrap();
    assert_eq!((view.permits, view.holders().count(), view.waiters.len()), (Some(2), 0, 0));
    assert!(managers[3].inspect_all().unwrap().is_empty());
}

/// Its statement is over after half a second, however long the slices are.
#[test]
fn who_looks_for_a_permit_holds_up_neither_vacuum_nor_an_index() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    client.batch_execute("CREATE TABLE ours (id int)").unwrap();
    let config = config(&database).wait_slice(Duration::from_secs(600));
    let managers = [(); 2].map(|()| started(config.clone()));
    let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
    let waiting = {
        let permit = semaphore(&managers[1], 1);
        begin(move || permit.acquire(PATIENCE).unwrap())
    };
    wait_for_waiters(&managers[0], 1);
    let pid = next_one(&managers[0]);
    for _ in 0..3 {
        let (transaction, begun) =
            (count(&mut client, "SELECT pg_current_xact_id()::text::int8"), Instant::now());
        let horizon = format!(
            "SELECT coalesce(max(backend_xmin::text::int8), {transaction} + 1) FROM pg_stat_activity WHERE pid = {pid}"
        );
        eventually("the horizon to move on", || count(&mut client, &horizon) > transaction);
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }
    let begun = Instant::now();
    client.batch_execute("CREATE INDEX CONCURRENTLY ON ours (id)").unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    held.release().unwrap();
    drop(waiting.get());
}

/// The server counts how often a session has a lock: to prove another one would be the end of the term.
#[test]
fn a_permit_outlives_heartbeats_and_a_lost_lock_is_noticed() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database).heartbeat(Duration::from_millis(200)));
    let guard = semaphore(&manager, 5).acquire(PATIENCE).unwrap();
    assert!(!guard.lost().wait_timeout(Duration::from_secs(3)), "{:?}", guard.loss());
    let holder = semaphore(&manager, 5).break_lock().unwrap().unwrap();
    assert_eq!(holder.token, guard.term().token());
    hear(guard.lost());
    becomes("the locks", &0, || count(&mut client, LOCKS));
}

#[test]
fn a_semaphore_and_a_lock_of_one_key_are_two_things() {
    let database = Database::fresh().unwrap();
    let managers = [(); 2].map(|()| started(config(&database)));
    for key in ["x".into(), dsync::Key::from(7), dsync::Key::from((7, -7))] {
        let alone = managers[0].lock(key.clone()).unwrap().acquire(PATIENCE).unwrap();
        let permit = managers[0].semaphore(key.clone(), 1).unwrap().acquire(PATIENCE).unwrap();
        assert!(managers[1].semaphore(key.clone(), 1).unwrap().try_acquire().unwrap().is_none());
        assert!(managers[1].lock(key.clone()).unwrap().try_acquire().unwrap().is_none());
        assert_eq!(managers[1].inspect_all().unwrap().len(), 2);
        let view = managers[1].inspect(key.clone()).unwrap();
        assert_eq!(view.holder.map(|holder| holder.token), Some(alone.term().token()));
        alone.release().unwrap();
        let view = managers[1].inspect(key).unwrap();
        assert_eq!(view.holder.map(|holder| holder.token), Some(permit.term().token()));
        permit.release().unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What is in the way
// ---------------------------------------------------------------------------------------------------------------------

/// The number of the semaphore `x` of the namespace.
fn number(client: &mut Client) -> i64 {
    count(client, "SELECT id FROM dsync.semaphore WHERE key = 'x' AND namespace = 'dsync'")
}

/// The first and the last of the most permits that there can be.
#[test]
fn the_last_of_1023_permits_is_had_and_none_beyond() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database));
    let permits = semaphore(&manager, 1023);
    drop(permits.acquire(PATIENCE).unwrap());
    let mut others = database.client().unwrap();
    let id = number(&mut others);
    for left in [1023, 1] {
        let taken = format!(
            "SELECT count(pg_advisory_lock({id} | permit)) FROM generate_series(1, 1023) AS permit WHERE permit <> {left}"
        );
        count(&mut others, &taken);
        let guard = permits.acquire(PATIENCE).unwrap();
        assert_eq!(guard.term().permit(), Some(left));
        assert!(permits.try_acquire().unwrap().is_none());
        assert_eq!(kind(permits.acquire(Duration::from_millis(700))), ErrorKind::TimedOut);
        let again = guard.term().clone();
        guard.release().unwrap();
        let guard = permits.try_acquire().unwrap().unwrap();
        assert!(guard.term().permit() == Some(left) && guard.term().token() > again.token());
        guard.release().unwrap();
        others.batch_execute("SELECT pg_advisory_unlock_all()").unwrap();
    }
    becomes("the locks", &0, || count(&mut others, LOCKS));
}

/// Its session is ended, or its process cannot run: whoever comes behind it goes on.
#[test]
fn who_looks_for_a_permit_and_dies_or_freezes_does_not_stop_the_others() {
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let managers = [(); 3].map(|()| started(config(&database)));
    for dies in [true, false] {
        let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
        let keeper = Process::start(&mut process("semaphores::keeper", &database.url()));
        wait_for_waiters(&managers[0], 1);
        let behind = semaphore(&managers[1], 1);
        let behind = begin(move || behind.acquire(PATIENCE).map(drop));
        wait_for_waiters(&managers[0], 2);
        if dies {
            signal(keeper.id(), Signal::Kill).unwrap();
        } else {
            signal(keeper.id(), Signal::Stop).unwrap();
        }
        let (late, begun) = (Lateness::watch(), Instant::now());
        held.release().unwrap();
        behind.get().unwrap();
        let of_the_lease = if dies { Duration::ZERO } else { LEASE };
        late.allow(begun.elapsed(), of_the_lease + Duration::from_secs(2));
        keeper.kill();
        becomes("the locks", &0, || count(&mut operator, LOCKS));
    }
    // A backend that is ended: the claim comes again by itself, behind the others.
    let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
    let waiting = [1, 2].map(|number| {
        let permit = semaphore(&managers[number], 1);
        let waiting = begin(move || permit.acquire(PATIENCE).map(drop));
        wait_for_waiters(&managers[0], number);
        waiting
    });
    for _ in 0..4 {
        let pid = next_one(&managers[0]);
        operator.execute("SELECT pg_terminate_backend($1, 5000)", &[&pid]).unwrap();
        wait_for_waiters(&managers[0], 2);
    }
    held.release().unwrap();
    waiting.into_iter().for_each(|waiting| waiting.get().unwrap());
    becomes("the locks", &0, || count(&mut operator, LOCKS));
}

/// Changed twice while they wait: those that say what it was before that are told, wherever they stand in the line.
#[test]
fn who_waits_is_told_of_another_number_and_keeps_nobody_else_waiting() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 4].map(|()| started(config(&database)));
    let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
    let waiting = [1, 2].map(|number| {
        let permit = semaphore(&managers[number], 1);
        let waiting = begin(move || permit.acquire(PATIENCE).map(drop));
        wait_for_waiters(&managers[0], number);
        waiting
    });
    // The held one is above the new number, or not, as the lot had it: a permit of another number is free anyway.
    let later = managers[3].semaphore("x", 2).unwrap();
    client.batch_execute("UPDATE dsync.semaphore SET permits = 2, former = 3").unwrap();
    for waiting in waiting {
        let error = waiting.get().unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("says 2"), "{error}");
    }
    drop(later.acquire(PATIENCE).unwrap());
    held.release().unwrap();
    becomes("the locks", &0, || count(&mut client, LOCKS));
}

/// An administrator drops the catalog under those that have permits, and those that wait.
#[test]
fn a_catalog_that_is_dropped_costs_no_permit_and_adds_none() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let managers = [(); 4].map(|()| started(config(&database)));
    for _ in 0..3 {
        let mut held =
            Vec::from([0, 0].map(|number: usize| semaphore(&managers[number], 2).acquire(PATIENCE).unwrap()));
        let waiting: Vec<_> = (1..3)
            .map(|number| {
                let permit = semaphore(&managers[number], 2);
                let waiting = begin(move || permit.acquire(PATIENCE).unwrap());
                wait_for_waiters(&managers[0], number);
                waiting
            })
            .collect();
        // It wants tables that those who look for a permit use, in another order, and may be told of a deadlock.
        eventually("the drop", || client.batch_execute("DROP SCHEMA dsync CASCADE").is_ok());
        let newcomer = semaphore(&managers[3], 2);
        eventually("the catalog", || {
            newcomer.try_acquire().is_ok_and(|guard| {
                assert!(guard.is_none());
                true
            })
        });
        assert!(waiting.iter().all(|waiting| !waiting.is_ready()));
        let tokens: Vec<_> = held.iter().map(|guard| guard.term().token().unwrap()).collect();
        held.remove(0).release().unwrap();
        eventually("the first of those who wait", || waiting.iter().any(|waiting| waiting.is_ready()));
        assert!(
            waiting.iter().any(|waiting| !waiting.is_ready()) && newcomer.try_acquire().unwrap().is_none()
        );
        held.remove(0).release().unwrap();
        for waiting in waiting {
            let guard = waiting.get();
            assert!(tokens.iter().all(|token| *token < guard.term().token().unwrap()));
            guard.release().unwrap();
        }
    }
    all_are_free(&managers[0], 2);
    becomes("the locks", &0, || count(&mut client, LOCKS));
}

/// A role with poor rights, and with settings that would end a wait.
#[test]
fn a_role_that_may_not_say_how_many_permits_there_are_is_told_and_goes_by_what_others_say() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let manager = started(config(&database));
    let role = format!("app_{}", database.name());
    client
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA dsync TO {role};
             GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO {role};
             GRANT SELECT, INSERT, UPDATE ON dsync.lock, dsync.era, dsync.policy, dsync.takeover TO {role};
             GRANT SELECT ON dsync.version, dsync.semaphore TO {role};
             ALTER ROLE {role} SET lock_timeout = '1ms'; ALTER ROLE {role} SET statement_timeout = '2s';
             ALTER ROLE {role} SET idle_session_timeout = '2s'; ALTER ROLE {role} SET IntervalStyle = sql_standard;
             ALTER ROLE {role} SET default_transaction_isolation = serializable"
        ))
        .unwrap();
    let url = database.url().replace("postgres@", &format!("{role}@"));
    let modest = started(Config::from_url(&url).unwrap().catalog(CatalogMode::MustExist));
    let theirs = semaphore(&modest, 1);
    let error = theirs.try_acquire().unwrap_err();
    assert!(error.kind() == ErrorKind::SessionRefused && error.to_string().contains("semaphore"), "{error}");
    assert_eq!(kind(theirs.set_permits(1)), ErrorKind::SessionRefused);
    let ours = semaphore(&manager, 1).acquire(PATIENCE).unwrap();
    assert!(theirs.try_acquire().unwrap().is_none());
    let waiting = {
        let theirs = Arc::clone(&theirs);
        begin(move || theirs.acquire(PATIENCE).unwrap())
    };
    wait_for_waiters(&manager, 1);
    // The wait itself: longer than the time-outs that the role has for its statements.
    thread::sleep(Duration::from_secs(3));
    assert!(!waiting.is_ready());
    ours.release().unwrap();
    waiting.get().release().unwrap();
    becomes("the locks", &0, || count(&mut client, LOCKS));
}

/// It lends each client a session for as long as it is connected, and passes the requests that end a wait on.
#[test]
fn a_pooler_in_session_mode_is_in_nobody_s_way() {
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let bouncer = pgbouncer::start(Server::shared(), PoolMode::Session).unwrap();
    let through = || {
        let config = Config::from_url(&bouncer.url(database.name())).unwrap();
        started(config.release_timeout(PATIENCE))
    };
    let managers = [through(), through(), started(config(&database))];
    for _ in 0..3 {
        let held = semaphore(&managers[0], 1).acquire(PATIENCE).unwrap();
        let (context, canceller) = Context::background().with_cancel();
        let cancelled = semaphore(&managers[1], 1);
        let cancelled = begin(move || kind(cancelled.acquire(context)));
        wait_for_waiters(&managers[2], 1);
        let behind = semaphore(&managers[2], 1);
        let behind = begin(move || behind.acquire(PATIENCE).unwrap());
        wait_for_waiters(&managers[2], 2);
        canceller.cancel();
        assert_eq!(cancelled.get(), ErrorKind::Cancelled);
        held.release().unwrap();
        behind.get().release().unwrap();
        becomes("the locks", &0, || count(&mut client, LOCKS));
    }
    let mut keeper = process("semaphores::keeper", &bouncer.url(database.name()));
    let keeper = Process::start(&mut keeper);
    keeper.says("has it");
    keeper.kill();
    drop(semaphore(&managers[0], 1).acquire(PATIENCE).unwrap());
}

/// What one namespace has is nothing to another; a number of which another key has made use is refused.
#[test]
fn semaphores_of_other_namespaces_and_other_keys_are_other_semaphores() {
    let database = Database::fresh().unwrap();
    let mut client = database.client().unwrap();
    let ours = started(config(&database));
    let theirs = started(config(&database).namespace("theirs"));
    let one = semaphore(&ours, 1).acquire(PATIENCE).unwrap();
    let other = semaphore(&theirs, 2).acquire(PATIENCE).unwrap();
    assert!(semaphore(&ours, 1).try_acquire().unwrap().is_none());
    drop(semaphore(&theirs, 2).try_acquire().unwrap().unwrap());
    // A number is the same in all.
    let seven = ours.semaphore(7, 1).unwrap().acquire(PATIENCE).unwrap();
    assert!(theirs.semaphore(7, 1).unwrap().try_acquire().unwrap().is_none());
    drop((one, other, seven));

    client
        .batch_execute("UPDATE dsync.semaphore SET key = 'y' WHERE key = 'x' AND namespace = 'dsync'")
        .unwrap();
    let started_anew = started(config(&database));
    let collides = semaphore(&started_anew, 1);
    assert_eq!(kind(collides.try_acquire()), ErrorKind::InvalidKey);
    assert_eq!(kind(collides.set_permits(2)), ErrorKind::InvalidKey);
    client
        .batch_execute("UPDATE dsync.semaphore SET key = 'x' WHERE key = 'y' AND namespace = 'dsync'")
        .unwrap();

    // The lock of a number that is a permit's.
    let id = number(&mut client) | 1;
    client.batch_execute("DELETE FROM dsync.lock").unwrap();
    let number = ours.lock(id).unwrap().acquire(PATIENCE).unwrap();
    assert!(semaphore(&started_anew, 1).try_acquire().unwrap().is_none());
    let waiting = semaphore(&started_anew, 1);
    let waiting = begin(move || kind(waiting.acquire(Duration::from_secs(5))));
    wait_for_waiters(&ours, 1);
    number.release().unwrap();
    assert_eq!(waiting.get(), ErrorKind::TimedOut);
    assert_eq!(kind(semaphore(&started_anew, 1).try_acquire()), ErrorKind::InvalidKey);
    becomes("the locks", &0, || count(&mut client, LOCKS));
}

/// All that are in the line at once, from both sides, with a number that goes up and down.
#[test]
fn a_number_that_goes_up_and_down_is_never_exceeded_by_more_than_ran_out() {
    const MOST: u32 = 4;
    let database = Database::fresh().unwrap();
    let managers = [(); 3].map(|()| started(config(&database).max_sessions(6)));
    let changer = semaphore(&managers[0], 2);
    drop(changer.acquire(PATIENCE).unwrap());
    let ends = Instant::now() + Duration::from_secs(4);
    thread::scope(|scope| {
        for number in 0..9 {
            let manager = &managers[number % 3];
            scope.spawn(move || {
                while Instant::now() < ends {
                    let guard = match manager.semaphore("x", 2).and_then(|permit| permit.acquire(PATIENCE)) {
                        Ok(guard) => guard,
                        Err(error) => panic!("{error}"),
                    };
                    assert!(guard.term().permit().unwrap() <= MOST);
                    thread::sleep(Duration::from_millis(fastrand::u64(0..10)));
                    guard.release().unwrap();
                }
            });
        }
        let mut client = database.client().unwrap();
        while Instant::now() < ends {
            let permits = fastrand::u32(1..=MOST).cast_signed();
            client.execute("UPDATE dsync.semaphore SET permits = $1, former = 2", &[&permits]).unwrap();
            thread::sleep(Duration::from_millis(fastrand::u64(0..300)));
        }
    });
    let mut client = database.client().unwrap();
    client.batch_execute("UPDATE dsync.semaphore SET permits = 2, former = NULL").unwrap();
    all_are_free(&managers[0], 2);
    becomes("the locks", &0, || count(&mut client, LOCKS));
}

/// As version 5 made it.
const VERSION_5: &str = include_str!("fixtures/catalog-version-5.sql");

/// Each brings the catalog up to date, or makes it, and says how many permits there are.
#[test]
fn processes_that_come_at_once_make_one_semaphore() {
    for before in ["", VERSION_5] {
        let database = Database::fresh().unwrap();
        let mut client = database.client().unwrap();
        client.batch_execute(before).unwrap();
        let managers = [(); 4].map(|()| PostgresManager::new(config(&database)).unwrap());
        let at_once = std::sync::Barrier::new(managers.len());
        let said: Vec<Option<u32>> = thread::scope(|scope| {
            let threads: Vec<_> = (1..)
                .zip(&managers)
                .map(|(permits, manager)| {
                    let at_once = &at_once;
                    scope.spawn(move || {
                        at_once.wait();
                        manager.start().unwrap();
                        let semaphore = manager.semaphore("x", permits).unwrap();
                        match semaphore.acquire(PATIENCE) {
                            Ok(guard) => guard.release().map(|()| Some(permits)).unwrap(),
                            Err(error) if error.kind() == ErrorKind::InvalidConfig => None,
                            Err(error) => panic!("{error}"),
                        }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let said: Vec<u32> = said.into_iter().flatten().collect();
        assert_eq!(said.len(), 1, "{said:?}");
        all_are_free(&managers[usize::try_from(said[0] - 1).unwrap()], said[0]);
        becomes("the locks", &0, || count(&mut client, LOCKS));
    }
}
