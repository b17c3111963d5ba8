//! Lost before stolen: a holder that is frozen, cut off or dead, or whose server is, knows that it has lost its lock
//! before another can get it, and another gets it within the lease and a second. And nothing hangs meanwhile.
//!
//! Each test has a server of its own. `partition.rs` has the same cuts in real networks. Who waits has a session of its own in either mode, so what
//! befalls a waiter is tried in one of them; and how long the lease is makes no difference to who shares it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use dsync::{
    ErrorKind, Lock, LockGuard, LockOptions, LossReason, PostgresManager, Quorum, SyncManager, TakeoverPolicy,
};
use parking_lot::Mutex;
use postgres::Client;
use support::netns::Direction;
use support::process::{Signal, signal};
use support::{Server, Shutdown};

use crate::common::{
    Lateness, PATIENCE, Process, becomes, begin, eventually, hear, in_both_modes, is_held, is_open, kind,
    lock, process, role, soon, started, wait_in_thread,
};
use crate::cutoff::proxy::Proxy;
use crate::cutoff::witness::{Event, Role, WITNESS, Witness, testify};
use crate::cutoff::{
    GRACE, LEASE, ONE_SLICE, Party, all_queue, config, gets_all_back, granted, holds, last_of, length,
    micros, ms, nothing_is_left, now, queues,
};

in_both_modes! {
    // The server stands still.
    a_holder_of_a_frozen_server_knows_by_its_own_deadline
    who_has_a_grace_is_warned_by_so_much_before_the_end_of_the_term
    a_short_freeze_costs_nobody_a_long_lease
    a_heartbeat_that_is_not_answered_ends_a_term_long_before_the_lease
    releasing_and_stopping_end_in_time_on_a_frozen_server
    // The process stands still, or dies.
    a_frozen_holder_is_replaced_in_time_and_knows_when_it_thaws
    a_killed_holder_is_replaced_at_once
    // The network is cut.
    a_hundred_holders_cut_off_in_both_directions_lose_before_another_gets
    a_hundred_holders_that_hear_nothing_lose_before_another_gets
    a_hundred_holders_that_are_not_heard_lose_before_another_gets
    holders_with_a_long_lease_are_told_of_a_cut_long_before_it_ends
    // Why it was lost.
    the_handle_tells_why_the_lock_was_lost_and_the_log_tells_it_once
}

/// What a machine that is busy may add where a bound is on our own doing.
const SLACK: Duration = Duration::from_millis(500);

/// A long lease, for the tests that do not end before it does.
const MINUTE: Duration = Duration::from_secs(60);

/// Twice the default.
const HALF_A_MINUTE: Duration = Duration::from_secs(30);

/// By when a holder knows, at the latest, if it hears nothing: the lease less a heartbeat, by default a quarter of it, and
/// the margin, by default a fifteenth.
fn own_deadline(lease: Duration) -> Duration {
    lease - lease / 4 - lease / 15
}

// ---------------------------------------------------------------------------------------------------------------------
// The server stands still
// ---------------------------------------------------------------------------------------------------------------------

fn a_holder_of_a_frozen_server_knows_by_its_own_deadline(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let settings = config("holder", &server.url(), 10).shared_sessions(shared_sessions);
    let holder = Party::with("holder", 10, settings);
    let terms = holder.lock_all();
    let late = Lateness::watch();
    let frozen = server.freeze().unwrap();
    let frozen_at = now();
    terms.iter().for_each(hear);
    let losses: Vec<_> = holder.locks.iter().map(|lock| lock.last_loss().unwrap()).collect();
    let last = losses.iter().map(|loss| micros(loss.at)).max().unwrap();
    println!("lost {:.0} ms after the freeze, at the latest; lease {LEASE:?}", ms(frozen_at, last));
    let bound = length(own_deadline(LEASE) + SLACK / 5 + late.of_a_loss());
    assert!(last - frozen_at <= bound, "{:.0} ms of {:.0} ms", ms(frozen_at, last), ms(0, bound));
    for loss in losses {
        let expected = [LossReason::HeartbeatTimedOut, LossReason::LeaseNotRenewed];
        assert!(expected.contains(&loss.reason), "{loss:?}");
    }
    assert_eq!(holder.held(), 0);
    frozen.thaw();
    gets_all_back(operator, &holder);
    nothing_is_left(operator);
}

fn who_has_a_grace_is_warned_by_so_much_before_the_end_of_the_term(shared_sessions: u32) {
    const GRACE: Duration = Duration::from_secs(2);
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let settings = config("graceful", &server.url(), 3).lease(Duration::from_secs(8));
    let manager = started(settings.shared_sessions(shared_sessions));
    let graceful = manager.lock_with("graceful", LockOptions::new().grace(GRACE)).unwrap();
    let plain = manager.lock("plain").unwrap();
    let [graceful, plain] = [graceful, plain].map(|lock| lock.acquire(PATIENCE).unwrap());
    let (warned, lost) = (graceful.term().warned().clone(), graceful.lost().clone());
    // A heartbeat that is answered is no reason to warn.
    assert_eq!(warned.recv_timeout(Duration::from_secs(3)), Err(RecvTimeoutError::Timeout));
    let late = Lateness::watch();
    let frozen = server.freeze().unwrap();
    // Nor is one warned of less for what another thread asks, be it on the same session.
    let another = manager.lock("another").unwrap();
    let another = begin(move || another.acquire(PATIENCE).map(drop));
    assert_eq!(warned.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
    let warned_at = Instant::now();
    assert!(is_open(&lost) && graceful.is_held());
    hear(&lost);
    let had = warned_at.elapsed();
    println!("lost {had:.0?} after the warning");
    // A thread hears of either end when its turn comes.
    let late = late.of_a_take_over();
    assert!(GRACE < had + SLACK / 5 + late && had < GRACE + SLACK + late, "{had:?}, late by {late:?}");
    hear(plain.lost());
    assert!(plain.term().warned().try_recv().is_err_and(|error| error.is_disconnected()));
    frozen.thaw();
    another.get().unwrap();

    // A renewal that comes after the warning after all does not take it back, and the term goes on.
    drop((graceful, plain));
    let guard = manager.lock_with("graceful", LockOptions::new().grace(GRACE)).unwrap();
    let guard = guard.acquire(PATIENCE).unwrap();
    let frozen = server.freeze().unwrap();
    assert_eq!(guard.term().warned().recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
    frozen.thaw();
    eventually("a renewal", || {
        let left = manager.snapshot().claims.iter().find_map(|claim| claim.time_left);
        left.is_some_and(|left| left > GRACE)
    });
    assert!(guard.is_held());
    assert!(guard.term().warned().try_recv().is_err_and(|error| error.is_disconnected()));
    guard.release().unwrap();

    let refused = manager.lock_with("other", LockOptions::new().grace(Duration::from_secs(6))).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidConfig);
    assert!(refused.to_string().contains("must be shorter than 3.4"), "{refused}");
    nothing_is_left(operator);
}

fn a_short_freeze_costs_nobody_a_long_lease(shared_sessions: u32) {
    const LONG: Duration = Duration::from_secs(60);
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let settings = config("holder", &server.url(), 10).lease(LONG).shared_sessions(shared_sessions);
    let holder = Party::with("holder", 10, settings);
    let terms = holder.lock_all();
    let before = granted(operator, 10);
    let frozen = server.freeze().unwrap();
    // There is no event to wait for: what should happen is nothing.
    thread::sleep(Duration::from_secs(2));
    assert!(terms.iter().all(is_open));
    frozen.thaw();
    assert_eq!(granted(operator, 10), before);
    assert_eq!(holds(operator, "holder"), 10);
    assert!(terms.iter().all(is_open));
    gets_all_back(operator, &holder);
    nothing_is_left(operator);
}

/// With a long lease, the heartbeat's timeout is what tells.
fn a_heartbeat_that_is_not_answered_ends_a_term_long_before_the_lease(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let settings = long_lease("holder", &server.url(), 10).shared_sessions(shared_sessions);
    let holder = Party::with("holder", 10, settings);
    let terms = holder.lock_all();
    let late = Lateness::watch();
    let frozen = server.freeze().unwrap();
    let frozen_at = now();
    terms.iter().for_each(hear);
    let bound = length(BEAT + ANSWERED_WITHIN + SLACK + late.of_a_loss());
    for lock in &holder.locks {
        let loss = lock.last_loss().unwrap();
        assert_eq!(loss.reason, LossReason::HeartbeatTimedOut);
        let known_after = micros(loss.at) - frozen_at;
        assert!(known_after < bound, "{:.0} ms of {:.0} ms", ms(0, known_after), ms(0, bound));
    }
    frozen.thaw();
    gets_all_back(operator, &holder);
}

const BEAT: Duration = Duration::from_millis(200);
const ANSWERED_WITHIN: Duration = Duration::from_millis(1_500);

/// A lease that no test waits for; a holder that is cut off knows after a heartbeat and its time-out all the same.
fn long_lease(name: &str, url: &str, count: usize) -> dsync::Config {
    config(name, url, count).lease(Duration::from_secs(60)).heartbeat(BEAT).heartbeat_timeout(ANSWERED_WITHIN)
}

/// What a claim is at when the server stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Held,
    Lost,
    Waiting,
    Connecting,
}

/// What the application then does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Release,
    Stop,
    DropManager,
    /// Drops a guard, or gives up getting one.
    Guard,
}

/// A claim on a number of its own, with a manager of its own.
struct Claimant {
    phase: Phase,
    way: Way,
    manager: PostgresManager,
    lock: Arc<dyn Lock>,
    guard: Option<LockGuard>,
}

impl Claimant {
    fn end(self) -> (Phase, Way, Duration, Result<(), dsync::Error>) {
        let begun = Instant::now();
        let outcome = match self.way {
            Way::Release => self.lock.release(),
            Way::Stop => self.manager.stop(),
            Way::DropManager => {
                drop(self.manager);
                Ok(())
            }
            Way::Guard => {
                match self.guard {
                    Some(guard) => drop(guard),
                    None => {
                        let error = self.lock.acquire(Duration::from_millis(50));
                        assert_eq!(kind(error), ErrorKind::TimedOut);
                    }
                }
                Ok(())
            }
        };
        (self.phase, self.way, begun.elapsed(), outcome)
    }
}

fn releasing_and_stopping_end_in_time_on_a_frozen_server(shared_sessions: u32) {
    const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let blocker = &mut server.client().unwrap();
    let mut claimants = Vec::new();
    for phase in [Phase::Held, Phase::Lost, Phase::Waiting, Phase::Connecting] {
        for way in [Way::Release, Way::Stop, Way::DropManager, Way::Guard] {
            let number = claimants.len() as i64;
            let settings = config(&format!("{phase:?}"), &server.url(), 2).release_timeout(RELEASE_TIMEOUT);
            let manager = started(settings.shared_sessions(shared_sessions));
            let lock = manager.lock(number).unwrap();
            let mut guard = None;
            match phase {
                Phase::Held | Phase::Lost if way == Way::Guard => {
                    guard = Some(lock.acquire(soon()).unwrap());
                }
                Phase::Held | Phase::Lost => lock.lock(&soon()).unwrap(),
                Phase::Waiting => {
                    blocker.execute("SELECT pg_advisory_lock($1)", &[&number]).unwrap();
                    drop(wait_in_thread(&lock));
                }
                Phase::Connecting => {}
            }
            claimants.push(Claimant { phase, way, manager, lock, guard });
        }
    }
    let count = |operator: &mut Client, condition: &str| {
        let query = format!("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND {condition}");
        operator.query_one(&query, &[]).unwrap().get::<_, i64>(0)
    };
    becomes("the queue", &4, || count(operator, "NOT granted"));
    // The ones that connect later must not find a session in their pool.
    let ended =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'Connecting'";
    let sessions = |operator: &mut Client| {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'Connecting'";
        operator.query_one(query, &[]).unwrap().get::<_, i64>(0)
    };
    // Each had a second one for a moment.
    becomes("their sessions", &4, || sessions(operator));
    assert_eq!(operator.query(ended, &[]).unwrap().len(), 4);
    becomes("their sessions", &0, || sessions(operator));

    let terms: Vec<_> = claimants
        .iter()
        .filter(|claimant| claimant.phase == Phase::Lost)
        .map(|claimant| claimant.lock.lost())
        .collect();
    let late = Lateness::watch();
    let frozen = server.freeze().unwrap();
    let (connecting, others): (Vec<_>, Vec<_>) =
        claimants.into_iter().partition(|claimant| claimant.phase == Phase::Connecting);
    connecting.iter().for_each(|claimant| drop(wait_in_thread(&claimant.lock)));
    let (lost, others): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|claimant| claimant.phase == Phase::Lost);
    let end_all = |claimants: Vec<Claimant>| -> Vec<_> {
        let ends: Vec<_> = claimants.into_iter().map(|claimant| begin(|| claimant.end())).collect();
        ends.into_iter().map(|end| end.get()).collect()
    };
    let mut ends = end_all(others);
    terms.iter().for_each(hear);
    ends.extend(end_all(lost));
    // By now they hang in a connect.
    ends.extend(end_all(connecting));
    let bound = RELEASE_TIMEOUT + SLACK + late.of_a_loss();
    for (phase, way, took, outcome) in ends {
        println!("{phase:?} {way:?}: {took:.0?} {:?}", outcome.as_ref().map_err(|error| error.kind()));
        assert!(took <= bound, "{phase:?} {way:?} took {took:?} of {bound:?}");
        match (phase, way, outcome) {
            (Phase::Held | Phase::Waiting, Way::Release | Way::Stop, outcome) => {
                let expected = [ErrorKind::UnlockFailed, ErrorKind::SessionUnavailable];
                let kind = kind(outcome);
                assert!(expected.contains(&kind), "{phase:?} {way:?}: {kind:?}");
            }
            // Whether the server keeps something for a session that was lost is not known.
            (_, _, Err(error)) => assert_eq!(error.kind(), ErrorKind::UnlockFailed),
            (_, _, Ok(())) => {}
        }
    }
    frozen.thaw();
    blocker.batch_execute("SELECT pg_advisory_unlock_all()").unwrap();
    nothing_is_left(operator);
    let manager = started(config("after", &server.url(), 20));
    for number in 0..16 {
        manager.lock(number).unwrap().try_lock(&soon()).unwrap();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The process stands still, or dies
// ---------------------------------------------------------------------------------------------------------------------

/// The body of the processes below; as a test of its own it does nothing.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn a_witness() {
    if let Some(role) = role() {
        testify(&role);
    }
}

fn witness(server: &Server, count: usize, shared_sessions: u32) -> Witness {
    let (url, quorum) = (server.url(), Quorum::Server);
    let role = Role { url, count, lease: LEASE, wait_slice: ONE_SLICE, quorum, shared_sessions };
    Witness::start(&role, &mut role.command("lease::a_witness"))
}

fn a_frozen_holder_is_replaced_in_time_and_knows_when_it_thaws(shared_sessions: u32) {
    const COUNT: usize = 20;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let mut witness = witness(&server, COUNT, shared_sessions);
    witness.says_of_all("held", Event::held);
    let competitor = Party::steady("competitor", &server.url(), COUNT);
    let had = competitor.wait_for_all();
    all_queue(operator, &competitor);

    let late = Lateness::watch();
    signal(witness.process.id(), Signal::Stop).unwrap();
    let frozen_at = now();
    let times: Vec<_> = (0..COUNT).map(|_| had.recv_timeout(PATIENCE).unwrap().1).collect();
    let last = *times.iter().max().unwrap();
    println!(
        "replaced after {:.0} to {:.0} ms",
        ms(frozen_at, *times.iter().min().unwrap()),
        ms(frozen_at, last)
    );
    let bound = length(LEASE + GRACE + late.of_a_take_over());
    assert!(last - frozen_at <= bound, "{:.0} ms, the bound is {:.0} ms", ms(frozen_at, last), ms(0, bound));
    let grants = granted(operator, COUNT);

    signal(witness.process.id(), Signal::Continue).unwrap();
    let thawed_at = now();
    let last_held = witness.says_of_all("not held", Event::not_held);
    let heard = witness.says_of_all("heard", Event::heard);
    becomes("the queue of the witness", &COUNT, || queues(operator, WITNESS));
    for (index, (&last_held, (since, _))) in last_held.iter().zip(&grants).enumerate() {
        assert!(
            last_held < *since,
            "lock {index}: said to be held {:.3} ms after it was not",
            ms(*since, last_held)
        );
    }
    println!(
        "a channel that was listened to since before the freeze closes {:.2} ms after the thaw at the latest",
        ms(thawed_at, *heard.iter().max().unwrap())
    );

    let released_at = now();
    competitor.release_all();
    let again = witness.says_of_all("held again", Event::held);
    assert!(again.iter().all(|&by| by > released_at));
    for (index, event, reason) in witness.rest() {
        if let Event::Lost { .. } = event {
            assert!(["LeaseExpired", "LeaseNotRenewed"].contains(&&*reason), "lock {index}: {reason}");
        } else {
            panic!("lock {index}: {event:?}, which should not have happened");
        }
    }
    assert_eq!(holds(operator, WITNESS), COUNT);
    witness.process.kill();
    nothing_is_left(operator);
}

#[test]
fn a_frozen_waiter_that_is_granted_the_lock_loses_it_in_time_and_does_not_believe_in_it() {
    const COUNT: usize = 10;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let holder = Party::steady_in_the_queue("holder", &server.url(), COUNT);
    holder.lock_all();
    let mut witness = witness(&server, COUNT, 0);
    becomes("the queue of the witness", &COUNT, || queues(operator, WITNESS));
    let next = Party::steady_in_the_queue("next", &server.url(), COUNT);
    let had = next.wait_for_all();
    all_queue(operator, &next);

    let late = Lateness::watch();
    signal(witness.process.id(), Signal::Stop).unwrap();
    let released_at = now();
    holder.release_all();
    becomes("what the frozen one holds", &COUNT, || holds(operator, WITNESS));
    let granted_at = now();
    let last = last_of(&had, COUNT);
    println!("the next had it {:.0} ms after the frozen one was granted it", ms(released_at, last));
    let bound = length(LEASE + GRACE + late.of_a_take_over());
    assert!(
        last - granted_at <= bound,
        "{:.0} ms, the bound is {:.0} ms",
        ms(granted_at, last),
        ms(0, bound)
    );

    signal(witness.process.id(), Signal::Continue).unwrap();
    becomes("the queue of the witness", &COUNT, || queues(operator, WITNESS));
    assert_eq!(witness.rest(), [], "it was never told that it held something");
    let released_at = now();
    next.release_all();
    assert!(witness.says_of_all("held", Event::held).iter().all(|&by| by > released_at));
}

fn a_killed_holder_is_replaced_at_once(shared_sessions: u32) {
    const COUNT: usize = 10;
    let server = Server::start().unwrap();
    let mut witness = witness(&server, COUNT, shared_sessions);
    witness.says_of_all("held", Event::held);
    let next = Party::steady("next", &server.url(), COUNT);
    let had = next.wait_for_all();
    all_queue(&mut server.client().unwrap(), &next);
    let late = Lateness::watch();
    let killed_at = now();
    witness.process.kill();
    let last = last_of(&had, COUNT);
    println!("{COUNT} locks replaced within {:.1} ms of the kill", ms(killed_at, last));
    let bound = length(GRACE + late.of_a_take_over());
    assert!(last - killed_at < bound, "{:.0} ms of {:.0} ms", ms(killed_at, last), ms(0, bound));
}

#[test]
fn a_killed_waiter_leaves_the_queue() {
    const COUNT: usize = 10;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let holder = Party::steady("holder", &server.url(), COUNT);
    holder.lock_all();
    let witness = witness(&server, COUNT, 0);
    becomes("the queue of the witness", &COUNT, || queues(operator, WITNESS));
    witness.process.kill();
    let killed_at = Instant::now();
    becomes("the queue of the witness", &0, || queues(operator, WITNESS));
    println!("out of the queue {:.0?} after the kill", killed_at.elapsed());
    assert!(
        killed_at.elapsed() < Duration::from_secs(5),
        "by its interval of a second, and not by its slice"
    );
}

// ---------------------------------------------------------------------------------------------------------------------
// The network is cut
// ---------------------------------------------------------------------------------------------------------------------

/// Cuts `count` holders off at one moment, and checks each of them. On a machine that is too busy for their heartbeats they may all have lost
/// their locks before: then it begins anew.
fn cut_off(direction: Direction, lease: Duration, count: usize, shared_sessions: u32) {
    let are_put_to_the_test = (0..5).any(|_| are_cut_off(direction, lease, count, shared_sessions));
    assert!(are_put_to_the_test, "no holder was put to the test");
}

/// `false` if no holder believed to have its lock when it was to be cut off.
fn are_cut_off(direction: Direction, lease: Duration, count: usize, shared_sessions: u32) -> bool {
    let connections = u32::try_from(4 * count + 20).unwrap();
    let server = Server::builder().max_connections(connections).start().unwrap();
    let operator = &mut server.client().unwrap();
    let proxy = Proxy::to(server.port());
    // Nobody cuts the competitor off: on a busy machine it must not lose what it has got, which the holder would then take.
    let [holder, competitor] =
        [("holder", server.url_at("127.0.0.1", proxy.port()), lease), ("competitor", server.url(), MINUTE)]
            .map(|(name, url, lease)| {
                let settings = config(name, &url, count).lease(lease).shared_sessions(shared_sessions);
                Party::with(name, count, settings)
            });
    let terms = holder.lock_all();
    let had = competitor.wait_for_all();
    becomes("those that wait", &count, || queues(operator, "competitor") + competitor.held());
    let before = granted(operator, count);
    // Anywhere between two heartbeats.
    thread::sleep(Duration::from_micros(now().unsigned_abs() % 700_000));
    let believed: Vec<_> = (0..count).filter(|index| is_open(&terms[*index])).collect();
    if believed.is_empty() {
        return false;
    }

    let late = Lateness::watch();
    proxy.cut(direction);
    let cut_at = now();
    let mut last = 0;
    for _ in 0..count {
        let (index, at) = had.recv_timeout(lease + PATIENCE).unwrap();
        assert!(!is_open(&terms[index]) && !is_held(&holder.locks[index]), "lock {index}: two hold it");
        last = last.max(at);
    }
    let late = late.of_a_take_over();
    let after = granted(operator, count);
    let mut margins = Vec::new();
    for index in believed {
        let (loss, (since, token)) = (holder.locks[index].last_loss().unwrap(), after[index]);
        assert!(token > before[index].1, "lock {index}: there is a new term");
        let margin = since - micros(loss.at);
        assert!(margin > 0, "lock {index}: stolen {:.3} ms before it was lost ({loss:?})", ms(margin, 0));
        margins.push(margin);
    }
    margins.sort_unstable();
    println!(
        "{direction:?}, lease {lease:?}: {} holders cut off; lost before stolen by {:.3} ms at the least, {:.3} ms in the median; \
         the last competitor had its lock {:.0} ms after the cut",
        margins.len(),
        ms(0, margins[0]),
        ms(0, margins[margins.len() / 2]),
        ms(cut_at, last),
    );
    let bound = length(lease + GRACE + late);
    assert!(last - cut_at <= bound, "{:.0} ms, the bound is {:.0} ms", ms(cut_at, last), ms(0, bound));

    proxy.restore();
    all_queue(operator, &holder);
    assert_eq!(holder.held(), 0);
    competitor.release_all();
    gets_all_back(operator, &holder);
    nothing_is_left(operator);
    true
}

fn a_hundred_holders_cut_off_in_both_directions_lose_before_another_gets(shared_sessions: u32) {
    cut_off(Direction::Both, LEASE, 100, shared_sessions);
}

fn a_hundred_holders_that_hear_nothing_lose_before_another_gets(shared_sessions: u32) {
    cut_off(Direction::Inward, LEASE, 100, shared_sessions);
}

fn a_hundred_holders_that_are_not_heard_lose_before_another_gets(shared_sessions: u32) {
    cut_off(Direction::Outward, LEASE, 100, shared_sessions);
}

#[test]
fn with_a_lease_of_half_a_minute_it_is_the_same_in_both_directions() {
    cut_off(Direction::Both, HALF_A_MINUTE, 5, 0);
}

#[test]
fn with_a_lease_of_half_a_minute_it_is_the_same_for_those_that_hear_nothing() {
    cut_off(Direction::Inward, HALF_A_MINUTE, 5, 0);
}

#[test]
fn with_a_lease_of_half_a_minute_it_is_the_same_for_those_that_are_not_heard() {
    cut_off(Direction::Outward, HALF_A_MINUTE, 5, 0);
}

fn holders_with_a_long_lease_are_told_of_a_cut_long_before_it_ends(shared_sessions: u32) {
    const COUNT: usize = 10;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    for direction in [Direction::Both, Direction::Inward, Direction::Outward] {
        let proxy = Proxy::to(server.port());
        let url = server.url_at("127.0.0.1", proxy.port());
        let settings = long_lease("holder", &url, COUNT).shared_sessions(shared_sessions);
        let holder = Party::with("holder", COUNT, settings);
        // Between two slices of another the holder, which wants its locks back, could be faster, and would keep them.
        let competitor = Party::steady_in_the_queue("competitor", &server.url(), COUNT);
        let terms = holder.lock_all();
        let had = competitor.wait_for_all();
        all_queue(operator, &competitor);
        let late = Lateness::watch();
        proxy.cut(direction);
        let cut_at = now();
        terms.iter().for_each(hear);
        let losses: Vec<_> = holder.locks.iter().map(|lock| micros(lock.last_loss().unwrap().at)).collect();
        let last = *losses.iter().max().unwrap();
        println!("{direction:?}: lost {:.0} ms after the cut", ms(cut_at, last));
        let bound = length(BEAT + ANSWERED_WITHIN + SLACK + late.of_a_loss());
        assert!(last - cut_at < bound, "{:.0} ms of {:.0} ms", ms(cut_at, last), ms(0, bound));
        // Where the server hears of the closed sockets it frees the locks, else it would keep them for the lease.
        if direction != Direction::Inward {
            assert!(had.is_empty());
            proxy.restore();
        }
        last_of(&had, COUNT);
        for (lost, (since, _)) in losses.iter().zip(granted(operator, COUNT)) {
            assert!(*lost < since, "stolen {:.3} ms before it was lost", ms(since, *lost));
        }
        proxy.restore();
        competitor.release_all();
        gets_all_back(operator, &holder);
        nothing_is_left(operator);
    }
}

#[test]
fn a_waiter_that_is_cut_off_is_passed_over_and_queues_again_when_the_cut_ends() {
    const COUNT: usize = 10;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    // How many were told that they have the lock.
    let mut told = |direction| {
        let proxy = Proxy::to(server.port());
        let url = server.url_at("127.0.0.1", proxy.port());
        let holder = Party::steady("holder", &server.url(), COUNT);
        holder.lock_all();
        let slice = Duration::from_secs(2);
        let waiter = Party::with("waiter", COUNT, config("waiter", &url, COUNT).wait_slice(slice));
        let waiting = waiter.wait_for_all();
        all_queue(operator, &waiter);
        let next = Party::steady_in_the_queue("next", &server.url(), COUNT);
        let had = next.wait_for_all();
        all_queue(operator, &next);

        let late = Lateness::watch();
        proxy.cut(direction);
        let released_at = now();
        holder.release_all();
        let last = last_of(&had, COUNT);
        println!("{direction:?}: passed over within {:.0} ms", ms(released_at, last));
        let bound = length(LEASE + GRACE + late.of_a_take_over());
        assert!(last - released_at <= bound, "{:.0} ms of {:.0} ms", ms(released_at, last), ms(0, bound));
        assert_eq!(waiter.held(), 0);
        let lost = |lock: &Arc<dyn Lock>| lock.last_loss().map(|loss| micros(loss.at));
        let losses: Vec<_> = waiter.locks.iter().map(lost).collect();
        for (lost, (since, _)) in losses.iter().zip(granted(operator, COUNT)) {
            assert!(lost.is_none_or(|lost| lost < since), "stolen before it was lost");
        }

        // All its sessions are over, by its own word: there is nothing to find in the queue when the cut ends.
        becomes("the sessions of the waiter", &0, || queues(operator, "waiter") + holds(operator, "waiter"));
        proxy.restore();
        let restored_at = Instant::now();
        all_queue(operator, &waiter);
        println!("{direction:?}: in the queue {:.0?} after the end of the cut", restored_at.elapsed());
        assert_eq!(waiter.held(), 0);
        next.release_all();
        last_of(&waiting, COUNT);
        gets_all_back(operator, &waiter);
        nothing_is_left(operator);
        losses.iter().flatten().count()
    };
    assert_eq!(told(Direction::Both), 0);
    assert_eq!(told(Direction::Inward), 0);
    // One that hears but is not heard has the lock until it gets no answer: unless its slice ended before, or had begun so long ago that it first
    // asks once more. On a busy machine that may be so of all.
    eventually("a waiter that was told", || told(Direction::Outward) > 0);
}

/// A fenced transaction of the term before makes the first statement of the next one fail, after the lock was granted.
#[test]
fn a_lock_that_was_had_after_a_fenced_transaction_is_under_the_lease_too() {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let proxy = Proxy::to(server.port());
    let before = Party::new("before", &server.url(), 1);
    before.lock_all();
    let mut writer = server.client().unwrap();
    let mut transaction = writer.transaction().unwrap();
    before.locks[0].term().unwrap().fence(&mut transaction).unwrap();
    before.release_all();

    let url = server.url_at("127.0.0.1", proxy.port());
    let slice = Duration::from_millis(300);
    let holder = Party::with("holder", 1, config("holder", &url, 1).wait_slice(slice));
    let waiting = holder.wait_for_all();
    let mut slice_began = || -> Option<String> {
        let query = "SELECT query_start::text FROM pg_stat_activity WHERE application_name LIKE 'holder%'
                     AND wait_event_type = 'Lock' AND wait_event = 'advisory'";
        operator.query_opt(query, &[]).unwrap().map(|row| row.get(0))
    };
    let mut first = None;
    eventually("the end of a slice", || match (&first, slice_began()) {
        (Some(first), Some(now)) => *first != now,
        (None, now) => {
            first = now;
            false
        }
        (Some(_), None) => false,
    });
    transaction.commit().unwrap();
    last_of(&waiting, 1);
    let competitor = Party::new("competitor", &server.url(), 1);
    let had = competitor.wait_for_all();
    all_queue(operator, &competitor);
    let late = Lateness::watch();
    proxy.cut(Direction::Both);
    let cut_at = now();
    let (_, at) = had.recv_timeout(PATIENCE).expect("the lease ends");
    let bound = length(LEASE + GRACE + late.of_a_take_over());
    assert!(at - cut_at <= bound, "{:.0} ms of {:.0} ms", ms(cut_at, at), ms(0, bound));
}

// ---------------------------------------------------------------------------------------------------------------------
// The lease is a holder's
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn a_session_in_the_pool_outlives_the_lease() {
    let lease = Duration::from_secs(3);
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let [holder, waiter] =
        ["holder", "waiter"].map(|name| Party::with(name, 3, config(name, &server.url(), 3).lease(lease)));
    let mut sessions = || {
        let query = "SELECT pid, clock_timestamp() - state_change > interval '5s' FROM pg_stat_activity
                     WHERE application_name ~ '^(holder|waiter)' ORDER BY pid";
        let rows = operator.query(query, &[]).unwrap();
        rows.iter().map(|row| (row.get::<_, i32>(0), row.get::<_, bool>(1))).unzip::<_, _, Vec<_>, Vec<_>>()
    };
    holder.lock_all();
    drop(waiter.wait_for_all());
    eventually("the queue", || queues(&mut server.client().unwrap(), "waiter") == 3);
    waiter.release_all();
    holder.release_all();
    let (pids, _) = sessions();
    assert_eq!(pids.len(), 6);
    eventually("a long rest", || sessions().1.iter().all(|&rested| rested));
    assert_eq!(sessions().0, pids, "no session has ended");
    for party in [&holder, &waiter] {
        for lock in &party.locks {
            lock.try_lock(&soon()).unwrap();
        }
        party.release_all();
    }
    assert_eq!(sessions().0, pids, "and they serve again");
}

// ---------------------------------------------------------------------------------------------------------------------
// Why it was lost
// ---------------------------------------------------------------------------------------------------------------------

static LOGGED: Mutex<Vec<(log::Level, String)>> = Mutex::new(Vec::new());

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LOGGED.lock().push((record.level(), record.args().to_string()));
    }

    fn flush(&self) {}
}

fn the_handle_tells_why_the_lock_was_lost_and_the_log_tells_it_once(shared_sessions: u32) {
    Process::start(&mut process("lease::telling_why", &shared_sessions.to_string())).succeeds();
}

/// The body of [`the_handle_tells_why_the_lock_was_lost_and_the_log_tells_it_once`], in a process of its own, for its logger.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn telling_why() {
    let Some(shared_sessions) = role().map(|role| role.parse().unwrap()) else { return };
    log::set_logger(&Logger).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    // Of many locks on one session, one warning tells.
    let start = if shared_sessions == 0 {
        "lock \"x\": lost: "
    } else {
        "a session was lost with all the locks that it carried: "
    };
    let warnings = || -> Vec<String> {
        let logged = LOGGED.lock();
        let warnings = logged.iter().filter(|(level, _)| *level == log::Level::Warn);
        warnings.filter_map(|(_, text)| text.strip_prefix(start)).map(str::to_owned).collect()
    };
    type Strike<'a> = &'a dyn Fn(&Server, &Proxy, &mut Client);
    let terminate: Strike<'_> = &|_, _, operator| {
        let query = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' GROUP BY pid";
        assert_eq!(operator.query(query, &[]).unwrap().len(), 1);
    };
    let table: [(&str, Strike<'_>, &[LossReason], &str); 5] = [
        ("terminated", terminate, &[LossReason::Terminated], "terminated by an operator"),
        (
            "shut-down",
            &|server, _, _| server.stop(Shutdown::Fast).unwrap(),
            &[LossReason::Terminated],
            "shutdown of the server",
        ),
        (
            "crashed",
            &|server, _, _| server.kill_hard().unwrap(),
            &[LossReason::ConnectionClosed],
            "connection was closed",
        ),
        (
            "closed",
            &|_, proxy, _| proxy.close_all(),
            &[LossReason::ConnectionClosed],
            "connection was closed",
        ),
        (
            "cut",
            &|_, proxy, _| proxy.cut(Direction::Both),
            &[LossReason::HeartbeatTimedOut, LossReason::LeaseNotRenewed],
            "in time",
        ),
    ];
    for (name, strike, reasons, words) in table {
        let server = Server::start().unwrap();
        let mut operator = server.client().unwrap();
        let proxy = Proxy::to(server.port());
        let config = config("it", &server.url_at("127.0.0.1", proxy.port()), 2);
        let config = config.takeover(TakeoverPolicy::Immediate).shared_sessions(shared_sessions);
        let manager = started(config.lease(5 * LEASE));
        let lock = lock(&manager, "x");
        assert_eq!(lock.last_loss(), None);
        lock.lock(&soon()).unwrap();
        let (lost, before) = (lock.lost(), now());
        strike(&server, &proxy, &mut operator);
        hear(&lost);
        eventually("the warning", || !warnings().is_empty());
        let loss = lock.last_loss().unwrap();
        println!("{name}: {loss:?}: {}", warnings()[0]);
        assert!(reasons.contains(&loss.reason), "{name}: {loss:?}");
        assert!(loss.to_string().contains(words), "{name}: {loss}");
        assert!((before..=now()).contains(&micros(loss.at)));
        if server.start_again().is_ok() {
            operator = server.client().unwrap();
        }
        proxy.restore();
        eventually("the lock again", || is_held(&lock));
        lock.release().unwrap();
        assert_eq!(lock.last_loss(), Some(loss), "a release is no loss");
        let said = warnings();
        assert!(said.len() == 1 && said[0].contains(words), "{said:?}");
        LOGGED.lock().clear();
        nothing_is_left(&mut operator);
    }
}
