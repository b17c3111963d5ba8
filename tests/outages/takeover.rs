//! The server is taken over: it is restarted, or a standby takes its place, while a holder is cut off. Until all terms of before are over
//! nobody is granted a lock, as the takeover policy has it. On what the managers of a database agree, and by which clock they count, is tried in one
//! mode: no session plays a part in that. So is what happens to those that wait, which have sessions of their own in either.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dsync::crossbeam_channel::{RecvTimeoutError, TryRecvError, bounded};
use dsync::{
    CatalogMode, ClaimState, Config, Context, Error, ErrorKind, Lock, LockOptions, Once, Period,
    PostgresManager, Run, SyncManager as _, TakeoverPolicy, Verdict,
};
use parking_lot::Mutex;
use support::netns::Direction;
use support::pgbouncer::{self, PoolMode};
use support::process::{self as system, Signal};
use support::{Replication, Server, Shutdown};

use crate::common::{
    Lateness, PATIENCE, Process, becomes, begin, eventually, hear, in_both_modes, is_held, kind, lock,
    process, role, soon, started,
};
use crate::cutoff::proxy::Proxy;
use crate::cutoff::{
    Micros, Party, config, granted, holds, key, length, micros, ms, now, queues, releases_are_short,
};

in_both_modes! {
    a_lock_is_confirmed_however_slow_newcomers_are_and_whoever_else_calls
    a_lock_that_the_server_grants_in_its_last_moment_is_nobody_s
    a_newcomer_that_is_lost_on_its_way_is_followed_by_another
    by_default_a_crash_costs_a_lease_and_a_clean_restart_nothing
    only_the_last_holder_is_let_back_at_once
    a_restart_and_a_promotion_are_followed_by_a_wait_for_the_synchronous_standby_that_says_so
    what_waits_says_why_and_for_how_long
}

/// Long enough for a restart of the server within a term, on a busy machine too.
const LEASE: Duration = Duration::from_secs(5);

const SECOND: Duration = Duration::from_secs(1);

/// How many locks the holder has that is cut off: as many runs.
const LOCKS: usize = 5;

/// A way in which all locks vanish.
struct Fault {
    name: &'static str,
    scene: Scene,
    strike: fn(&Server),
    /// Nothing of the unlogged tables is left.
    is_crash: bool,
}

/// What goes before a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scene {
    Calm,
    /// A clean restart: the holder, which is proven, is let back at once and then cut off, and the fault comes in the middle of the grace.
    Grace,
    /// All are in a process whose clock is set by a file: its own clock and the server's.
    OwnClock,
}

const FAULTS: [Fault; 7] = [
    Fault {
        name: "fast restart",
        scene: Scene::Calm,
        strike: |server| server.restart(Shutdown::Fast).unwrap(),
        is_crash: false,
    },
    Fault {
        name: "immediate restart",
        scene: Scene::Calm,
        strike: |server| server.restart(Shutdown::Immediate).unwrap(),
        is_crash: true,
    },
    Fault {
        name: "postmaster killed",
        scene: Scene::Calm,
        strike: |server| {
            server.kill_postmaster().unwrap();
            server.start_again().unwrap();
        },
        is_crash: true,
    },
    Fault { name: "backend killed", scene: Scene::Calm, strike: kill_a_backend, is_crash: true },
    Fault { name: "crash in the grace", scene: Scene::Grace, strike: kill_a_backend, is_crash: true },
    Fault {
        name: "clock ahead in the grace",
        scene: Scene::OwnClock,
        strike: |server| step_in_the_grace(server, 1),
        is_crash: true,
    },
    Fault {
        name: "clock back in the grace",
        scene: Scene::OwnClock,
        strike: |server| step_in_the_grace(server, -1),
        is_crash: true,
    },
];

/// The server ends all its sessions then, and goes on with the start time that it had.
fn kill_a_backend(server: &Server) {
    let accepting = |server: &Server| server.log().matches("ready to accept connections").count();
    let (started, before) = (start_of(server), accepting(server));
    let mut victim = server.client().unwrap();
    let pid: i32 = victim.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    system::signal(pid, Signal::Kill).unwrap();
    eventually("the server", || accepting(server) > before && server.client().is_ok());
    assert_eq!(start_of(server), started, "the server was not started again");
}

/// A crash, and the step of the clock when the first session has seen it; with the policy *immediate*, when it has a lock.
fn step_in_the_grace(server: &Server, hours: i32) {
    server.restart(Shutdown::Immediate).unwrap();
    let operator = &mut server.client().unwrap();
    let mut ask = |query| -> i64 { operator.query_one(query, &[]).unwrap().get(0) };
    // A crash has left nothing in either.
    let seen = "SELECT (SELECT count(*) FROM dsync.takeover) + (SELECT count(*) FROM dsync.lock)";
    eventually("the first look", || ask(seen) > 0);
    let before = now();
    set_clock(hours);
    let stepped = |time: Micros| (time - before).abs() > length(HOUR / 2);
    eventually("the step", || stepped(now()));
    let clock = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8";
    assert!(stepped(ask(clock)), "the server's clock has stepped too");
}

const HOUR: Duration = Duration::from_secs(3600);

/// By the file that is the last word of this process's role.
fn set_clock(hours: i32) {
    let role = role().expect("a process with a clock of its own");
    std::fs::write(role.splitn(4, ' ').last().unwrap(), format!("{hours:+}h")).unwrap();
}

/// A term that is as old as the longest lease has outlived all that were before.
fn grow_old() {
    thread::sleep(LEASE);
}

/// When the server was started.
fn start_of(server: &Server) -> Micros {
    let query = "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::int8";
    server.client().unwrap().query_one(query, &[]).unwrap().get(0)
}

fn settings(name: &str, url: &str, policy: TakeoverPolicy) -> Config {
    config(name, url, LOCKS).lease(LEASE).takeover(policy)
}

/// What came of holders that were cut off.
#[derive(Default)]
struct Found {
    /// The locks that the holder believed to have when the server accepted sessions again.
    believed: usize,
    /// Those that the server granted to another one after the fault, before the holder had lost them.
    overlaps: usize,
    /// Those that the server of before granted in its last moment. With the policy *immediate* only.
    last_moment: usize,
    /// From the loss to the grant, in milliseconds.
    margins: Vec<f64>,
    /// From when the server accepts sessions to when the last competitor has its lock, in milliseconds.
    waited: Vec<f64>,
}

/// The holder is cut off, all locks vanish, and a competitor that has waited wants them.
fn cut_off_while(fault: &Fault, policy: TakeoverPolicy, rounds: usize, shared_sessions: u32) -> Found {
    let server = Server::start().unwrap();
    let mut found = Found::default();
    let mut round = 0;
    // On a machine that is so busy that a restart outlasts the terms, a round shows nothing.
    let shows_nothing =
        |found: &Found| found.believed == 0 || policy == TakeoverPolicy::Immediate && found.overlaps == 0;
    while round < rounds || shows_nothing(&found) && round < rounds + 5 {
        round += 1;
        if fault.scene == Scene::OwnClock {
            set_clock(0);
        }
        let proxy = Proxy::to(server.port());
        let through = server.url_at("127.0.0.1", proxy.port());
        let [holder, competitor] =
            [("holder", &through), ("competitor", &server.url())].map(|(name, url)| {
                Party::with(name, LOCKS, settings(name, url, policy).shared_sessions(shared_sessions))
            });
        let before = holder.lock_all();
        let restarted = (fault.scene == Scene::Grace).then(|| {
            grow_old();
            server.restart(Shutdown::Fast).unwrap();
            let at = Instant::now();
            before.iter().for_each(hear);
            becomes("what the proven holder holds", &LOCKS, || holder.held());
            assert!(policy == TakeoverPolicy::Immediate || at.elapsed() < LEASE, "{:?}", at.elapsed());
            at
        });
        // Who has waited for another holder has sessions of its own. The shared one asks for what may be free.
        let waits = shared_sessions == 0 || restarted.is_some();
        let waiting = waits.then(|| {
            let had = competitor.wait_for_all();
            let operator = &mut server.client().unwrap();
            becomes("those that wait", &LOCKS, || queues(operator, "competitor") + in_grace(&competitor));
            if let Some(at) = restarted {
                // Nearly all of the grace, so that it ends before the term of the holder does, unless it begins again.
                thread::sleep((LEASE * 3 / 4).saturating_sub(at.elapsed()));
            }
            assert!(had.is_empty(), "nobody else is granted a lock");
            had
        });

        proxy.cut(Direction::Both);
        let struck_at = now();
        (fault.strike)(&server);
        // The clock may have stepped, by hours.
        let true_time = |time: Micros| {
            let (since, hour) = (time - struck_at, length(HOUR));
            struck_at + (since + hour / 2).rem_euclid(hour) - hour / 2
        };
        let (accepts_at, started_at) = (true_time(now()), true_time(start_of(&server)));
        let had = waiting.unwrap_or_else(|| competitor.wait_for_all());
        found.believed += holder.held();
        becomes("what the competitor holds", &LOCKS, || competitor.held());
        found.last_moment += had.try_iter().filter(|(_, at)| true_time(*at) < started_at).count();
        let operator = &mut server.client().unwrap();
        becomes("what it holds at the server", &LOCKS, || holds(operator, "competitor"));
        let grants = granted(operator, LOCKS).into_iter().map(|(since, _)| true_time(since));
        let mut last = accepts_at;
        for (since, lock) in grants.zip(&holder.locks) {
            hear(&lock.lost());
            let lost_at = true_time(micros(lock.last_loss().unwrap().at));
            found.overlaps += usize::from(since < lost_at);
            found.margins.push(ms(lost_at, since));
            let waited = ms(struck_at, since);
            assert!(
                policy == TakeoverPolicy::Immediate || since - struck_at >= length(LEASE),
                "{}: granted {waited:.0} ms after the fault",
                fault.name
            );
            last = last.max(since);
        }
        found.waited.push(ms(accepts_at, last));
        proxy.restore();
        competitor.release_all();
        proxy.close_all();
    }
    found
}

/// How many locks the party is to be granted at the end of a grace.
fn in_grace(party: &Party) -> usize {
    let claims = party.manager.snapshot().claims;
    claims.iter().filter(|claim| claim.state == ClaimState::InGrace).count()
}

/// Prints what came of it, and judges. With the policy *immediate* the locks have two holders: so the tests of the other one can fail.
fn show(index: usize, policy: TakeoverPolicy, rounds: usize, shared_sessions: u32) {
    let fault = &FAULTS[index];
    if fault.scene == Scene::OwnClock && role().is_none() {
        return show_with_a_clock(index, policy, rounds);
    }
    let mut found = cut_off_while(fault, policy, rounds, shared_sessions);
    found.margins.sort_unstable_by(f64::total_cmp);
    found.waited.sort_unstable_by(f64::total_cmp);
    let Found { believed, overlaps, last_moment, margins, waited } = found;
    let [margin, wait] = [&margins, &waited].map(|times| times[times.len() / 2]);
    println!(
        "{}, {policy:?}, {shared_sessions} shared sessions: {overlaps} overlaps in {}, of which {believed} holders believed; granted {:.0} ms after the loss at the \
         least, {margin:.0} ms in the median; {wait:.0} ms after the server accepts sessions in the median; {last_moment} granted \
         in the last moment of the server",
        fault.name,
        margins.len(),
        margins[0],
    );
    if policy == TakeoverPolicy::Immediate {
        assert!(overlaps > 0, "{}: {believed} holders were put to the test", fault.name);
    } else {
        assert_eq!((overlaps, last_moment), (0, 0), "{}", fault.name);
        assert!(believed > 0, "{}: no holder was put to the test", fault.name);
    }
}

/// In a process of its own.
fn show_with_a_clock(index: usize, policy: TakeoverPolicy, rounds: usize) {
    let file = std::env::temp_dir().join(format!("dsync-clock-{}-{index}-{policy:?}", std::process::id()));
    std::fs::write(&file, "+0h").unwrap();
    let is_immediate = policy == TakeoverPolicy::Immediate;
    let role = format!("{index} {is_immediate} {rounds} {}", file.display());
    let mut command = process("takeover::with_a_clock_of_its_own", &role);
    if !support::skip_without(support::clock::set_by(&mut command, &file)) {
        let patience = PATIENCE * 2 * u32::try_from(rounds).unwrap();
        let said = Process::start(&mut command).succeeds_within(patience);
        said.lines().filter(|line| line.contains("overlaps in")).for_each(|line| println!("{line}"));
    }
    let _ = std::fs::remove_file(&file);
}

/// The body of the process; as a test of its own it does nothing.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn with_a_clock_of_its_own() {
    let Some(role) = role() else { return };
    let [index, is_immediate, rounds, _] = role.splitn(4, ' ').collect::<Vec<_>>()[..] else {
        panic!("{role}")
    };
    let policy =
        if is_immediate == "true" { TakeoverPolicy::Immediate } else { TakeoverPolicy::AfterAnyRestart };
    show(index.parse().unwrap(), policy, rounds.parse().unwrap(), 0);
}

/// Makes tests of each fault, which run side by side; of the stricter policy so many rounds.
macro_rules! in_each_fault {
    ($($fault:ident: $index:literal x $rounds:literal$(, $in_shared:ident)?)*) => {
        $(mod $fault {
            use dsync::TakeoverPolicy;

            #[test]
            fn nobody_gets_the_lock_of_a_holder_that_is_cut_off() {
                super::show($index, TakeoverPolicy::AfterAnyRestart, $rounds, 0);
            }

            $(#[test]
            fn $in_shared() {
                super::show($index, TakeoverPolicy::AfterAnyRestart, $rounds, 1);
            })?

            #[test]
            fn with_the_policy_immediate_the_lock_has_two_holders() {
                super::show($index, TakeoverPolicy::Immediate, 1, 0);
            }

            #[test]
            #[ignore = "takes minutes: cargo test --test outages takeover -- --ignored --nocapture"]
            fn nobody_gets_the_lock_of_a_holder_that_is_cut_off_in_fifty_rounds() {
                super::show($index, TakeoverPolicy::Immediate, 10, 0);
                super::show($index, TakeoverPolicy::AfterAnyRestart, 50, 0);
            }
        })*
    };
}

in_each_fault! {
    fast_restart: 0 x 2, nobody_gets_the_lock_of_one_with_a_shared_session
    immediate_restart: 1 x 2, nobody_gets_the_lock_of_one_with_a_shared_session
    postmaster_killed: 2 x 2, nobody_gets_the_lock_of_one_with_a_shared_session
    backend_killed: 3 x 2, nobody_gets_the_lock_of_one_with_a_shared_session
    crash_in_the_grace: 4 x 1, nobody_gets_the_lock_of_one_with_a_shared_session
    clock_ahead_in_the_grace: 5 x 1
    clock_back_in_the_grace: 6 x 1
}

#[test]
#[ignore = "takes minutes: cargo test --test outages takeover -- --ignored --nocapture"]
fn nobody_gets_the_lock_of_a_holder_with_a_shared_session_in_fifty_rounds() {
    (0..FAULTS.len())
        .filter(|index| FAULTS[*index].scene != Scene::OwnClock)
        .for_each(|index| show(index, TakeoverPolicy::AfterAnyRestart, 10, 1));
}

fn by_default_a_crash_costs_a_lease_and_a_clean_restart_nothing(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let manager = started(config("it", &server.url(), 1).lease(LEASE).shared_sessions(shared_sessions));
    let x = lock(&manager, "k0");
    for Fault { name, strike, is_crash, .. } in FAULTS.iter().filter(|fault| fault.scene == Scene::Calm) {
        x.lock(&soon()).unwrap();
        let lost = x.lost();
        strike(&server);
        let accepts = Instant::now();
        hear(&lost);
        eventually("the lock again", || is_held(&x));
        println!("{name}: held again {:.1?} after the server accepts sessions", accepts.elapsed());
        assert_eq!(accepts.elapsed() >= LEASE - Duration::from_millis(1_500), *is_crash, "{name}");
    }
}

/// That tokens go on is a commit, which waits for the standby as all do.
fn a_restart_and_a_promotion_are_followed_by_a_wait_for_the_synchronous_standby_that_says_so(
    shared_sessions: u32,
) {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let other = primary.database().unwrap();
    let settings = |url: &str, policy| {
        let settings = config("it", url, 4).lease(LEASE).shared_sessions(shared_sessions).takeover(policy);
        started(settings.connect_timeout(2 * SECOND))
    };
    let manager = settings(&primary.url(), TakeoverPolicy::AfterPromotion);
    let immediate = settings(&other.url(), TakeoverPolicy::Immediate);
    for manager in [&manager, &immediate] {
        lock(manager, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    }
    standby.promote().unwrap();
    let waits = |manager: &PostgresManager| {
        let error = lock(manager, "k0").acquire(5 * SECOND).unwrap_err().to_string();
        assert!(error.contains("waits for the synchronous standbys"), "{error}");
    };
    let gets_it =
        |manager: &PostgresManager| lock(manager, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    primary.restart(Shutdown::Fast).unwrap();
    for manager in [&manager, &immediate] {
        waits(manager);
        waits(manager);
    }
    // The lock is another's, who needs no token. A wait that is given up does not end the commit's wait for the standby.
    let tokenless = started(config("tokenless", &other.url(), 1).catalog(CatalogMode::None));
    let held = lock(&tokenless, "k0").acquire(PATIENCE).unwrap();
    let wanted = lock(&immediate, "k0");
    for time in 1..20 {
        wanted.acquire(time * SECOND / 50).unwrap_err();
    }
    held.release().unwrap();
    waits(&immediate);
    assert!(!primary.log().contains("canceling wait for synchronous replication"), "{}", primary.log());
    // Nothing keeps others from looking.
    for manager in [&manager, &immediate, &PostgresManager::new(config("looks", &primary.url(), 1)).unwrap()]
    {
        assert!(manager.inspect("k0").unwrap().holder.is_none());
    }
    let report = manager.check();
    let catalog = report.lines.iter().find(|line| line.topic == "catalog").unwrap();
    assert_eq!(catalog.verdict, Verdict::Wrong, "{catalog:?}");
    assert!(catalog.text.contains("no lock is granted"), "{catalog:?}");
    primary.reset("synchronous_standby_names").unwrap();
    gets_it(&manager);
    gets_it(&immediate);
    // As where each of two servers names the other one.
    standby.set("synchronous_standby_names", "gone").unwrap();
    let manager = settings(&standby.url(), TakeoverPolicy::AfterPromotion);
    waits(&manager);
    standby.reset("synchronous_standby_names").unwrap();
    gets_it(&manager);
}

/// A standby that is not synchronous may not have heard what the managers have agreed on.
#[test]
fn a_longer_lease_is_agreed_on_again_with_a_server_that_did_not_know_of_it() {
    let primary = Server::start().unwrap();
    let proxy = Proxy::to(primary.port());
    let standby = primary.standby_by_way_of("127.0.0.1", proxy.port(), Replication::Asynchronous).unwrap();
    let settings = |name: &str, url: &str, lease: Duration| started(config(name, url, 2).lease(lease));
    let first = settings("first", &primary.url(), LEASE);
    lock(&first, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    first.stop().unwrap();
    standby.wait_caught_up(&primary).unwrap();
    proxy.cut(Direction::Both);
    let either =
        format!("postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres", primary.port(), standby.port());
    // No whole number of milliseconds, either.
    let longer = settings("longer", &either, 3 * LEASE + Duration::from_micros(1));
    lock(&longer, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    primary.stop(Shutdown::Immediate).unwrap();
    standby.promote().unwrap();
    let millis = |lease: Duration| i64::try_from(lease.as_millis()).unwrap();
    let agreed = || -> i64 {
        standby.client().unwrap().query_one("SELECT lease FROM dsync.policy", &[]).unwrap().get(0)
    };
    lock(&settings("shorter", &standby.url(), LEASE), "k1").acquire(PATIENCE).unwrap().release().unwrap();
    assert_eq!(agreed(), millis(LEASE));
    lock(&longer, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    assert_eq!(agreed(), millis(3 * LEASE) + 1);
}

/// Who was the last one to have the lock, and knows that its term is over, is let back at once, by a guard too; another one is not.
fn only_the_last_holder_is_let_back_at_once(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let [first, second] = ["first", "second"].map(|name| {
        let settings = settings(name, &server.url(), TakeoverPolicy::AfterAnyRestart);
        started(settings.shared_sessions(shared_sessions))
    });
    let [former, last, other, last_of_other] =
        [lock(&first, "k0"), lock(&second, "k0"), lock(&second, "k1"), lock(&first, "k1")];
    for lock in [&former, &last, &other, &last_of_other] {
        lock.acquire(PATIENCE).unwrap().release().unwrap();
    }
    // This one's term is not as old as a lease: the holder before it might have been cut off.
    grow_old();
    let [k2, young] = [lock(&second, "k2"), lock(&first, "k2")];
    k2.acquire(PATIENCE).unwrap().release().unwrap();
    young.acquire(PATIENCE).unwrap().release().unwrap();
    server.restart(Shutdown::Fast).unwrap();
    let begun = Instant::now();
    let mut guard = None;
    eventually("the lock of the last holder", || {
        guard = last.try_acquire().ok().flatten();
        guard.is_some()
    });
    assert!(begun.elapsed() < LEASE / 2, "{:?}", begun.elapsed());
    // What it has is not nobody's.
    let no_work = |_: &Run<'_>| -> dsync::Result<()> { unreachable!("nobody is to do it") };
    let outcome = former.once(Period::every(LEASE), Duration::ZERO, no_work).unwrap();
    assert!(matches!(outcome, Once::Busy), "{outcome:?}");
    let error = other.once(Period::every(LEASE), Duration::ZERO, no_work).unwrap_err();
    assert!(error.grace_left().is_some(), "{error}");
    guard.unwrap().release().unwrap();
    for lock in [&former, &other, &young] {
        assert!(lock.try_acquire().unwrap().is_none(), "{}", lock.key());
        assert_eq!(kind(lock.try_lock(&soon())), ErrorKind::LockUnavailable);
        lock.release().unwrap();
    }
    other.acquire(PATIENCE).unwrap().release().unwrap();
    assert!(begun.elapsed() >= LEASE, "{:?}", begun.elapsed());
}

/// What a fast shutdown does, at a slow pace: the server ends the holder's session, grants the lock to the next in line, and ends that one's
/// session, too. The holder, which is cut off, believes in its lock all the time.
fn a_lock_that_the_server_grants_in_its_last_moment_is_nobody_s(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let proxy = Proxy::to(server.port());
    let through = server.url_at("127.0.0.1", proxy.port());
    let [holder, competitor] = [("holder", &through), ("competitor", &server.url())].map(|(name, url)| {
        started(
            settings(name, url, TakeoverPolicy::AfterAnyRestart)
                .shared_sessions(shared_sessions)
                .lease(PATIENCE / 4),
        )
    });
    let held = lock(&holder, "k0").acquire(PATIENCE).unwrap();
    let wanted = lock(&competitor, "k0");
    let waiting = begin({
        let wanted = Arc::clone(&wanted);
        move || {
            let guard = wanted.acquire(PATIENCE).unwrap();
            (now(), guard)
        }
    });
    becomes("the waiter", &1, || competitor.inspect("k0").unwrap().waiters.len());
    let other = lock(&competitor, "k1");
    other.acquire(PATIENCE).unwrap().release().unwrap();

    proxy.cut(Direction::Both);
    let postmaster = server.postmaster_pid().unwrap();
    system::signal(postmaster, Signal::Stop).unwrap();
    let mut holds = || -> i32 {
        let query = "SELECT pid FROM dsync.lock WHERE key = 'k0'";
        operator.query_one(query, &[]).unwrap().get(0)
    };
    let former = holds();
    system::signal(former, Signal::Terminate).unwrap();
    eventually("the grant to the next in line", || holds() != former);
    // Nor is one that was free.
    let soon = Context::timeout(Duration::from_millis(300));
    assert_eq!(kind(other.lock(&soon)), ErrorKind::TimedOut);
    assert!(!waiting.is_ready() && !is_held(&other) && held.is_held());
    system::signal(postmaster, Signal::Interrupt).unwrap();
    system::signal(postmaster, Signal::Continue).unwrap();
    server.stop(Shutdown::Fast).unwrap();
    assert!(held.is_held(), "the holder was put to the test");
    server.start_again().unwrap();
    let (since, guard) = waiting.get();
    hear(held.lost());
    let lost_at = micros(held.loss().unwrap().at);
    assert!(lost_at < since, "lost at {lost_at}, granted at {since}");
    guard.release().unwrap();
    eventually("the other lock", || is_held(&other));
    other.release().unwrap();
}

/// A smart shutdown takes no new sessions, and waits for those that there are.
#[test]
fn a_lock_that_cannot_be_confirmed_costs_none_that_is_held_on_its_session() {
    let server = Server::start().unwrap();
    let manager = started(settings("it", &server.url(), TakeoverPolicy::AfterAnyRestart).shared_sessions(1));
    let (held, wanted) = (lock(&manager, "k0"), lock(&manager, "k1"));
    held.lock(&soon()).unwrap();
    let lost = held.lost();
    system::signal(server.postmaster_pid().unwrap(), Signal::Terminate).unwrap();
    eventually("no new sessions", || server.client().is_err());
    let failure = wanted.lock(&Context::timeout(LEASE)).unwrap_err();
    assert!(failure.to_string().contains("shutting down"), "{failure}");
    let (late, begun) = (Lateness::watch(), Instant::now());
    wanted.release().unwrap();
    late.allow(begun.elapsed(), Duration::from_secs(2));
    // Newcomers come less and less often, and none for a lock that nobody wants any more.
    let refused = || server.log().matches("the database system is shutting down").count();
    let newcomers = refused();
    assert!(newcomers < 40, "{newcomers} in {LEASE:?}");
    assert!(!lost.wait_timeout(LEASE), "{:?}", held.last_loss());
    assert!(refused() <= newcomers + 1, "{} after {newcomers}", refused());
    manager.stop().unwrap();
}

/// A role that has as many sessions as it may have, or a pooler that gives it one, is no server that stops.
#[test]
fn a_lock_is_confirmed_where_there_may_be_no_other_session() {
    let server = Server::start().unwrap();
    let policy = TakeoverPolicy::AfterAnyRestart;
    lock(&started(settings("first", &server.url(), policy)), "k0")
        .acquire(PATIENCE)
        .unwrap()
        .release()
        .unwrap();
    let operator = &mut server.client().unwrap();
    operator.batch_execute("CREATE ROLE single LOGIN CONNECTION LIMIT 1; GRANT postgres TO single").unwrap();
    let mut urls = vec![
        format!("postgres://single@127.0.0.1:{},127.0.0.1:1/postgres", server.port()),
        format!("hostaddr=127.0.0.1 port={} user=single dbname=postgres", server.port()),
    ];
    let pooler = (!support::skip_without(pgbouncer::available()))
        .then(|| pgbouncer::start_with(&server, PoolMode::Session, &[("default_pool_size", "1")]).unwrap());
    urls.extend(pooler.as_ref().map(|pooler| pooler.url("postgres")));
    for url in urls {
        // A newcomer that is let in asks nothing.
        let url =
            format!("{url}{}target_session_attrs=read-write", if url.contains("://") { "?" } else { " " });
        let manager = started(Config::from_url(&url).unwrap().lease(LEASE).takeover(policy).max_sessions(1));
        lock(&manager, "k0").acquire(PATIENCE).unwrap().release().unwrap();
        manager.stop().unwrap();
    }
}

/// A server that looks up names, or is far away, takes longer to answer a newcomer than a heartbeat may take; and on a shared session others call all
/// the time.
fn a_lock_is_confirmed_however_slow_newcomers_are_and_whoever_else_calls(shared_sessions: u32) {
    const CALLERS: usize = 3;
    let server = Server::builder().setting("pre_auth_delay", "2").start().unwrap();
    let policy = TakeoverPolicy::AfterAnyRestart;
    let [other, manager] = [("other", PATIENCE / 4), ("it", LEASE)].map(|(name, lease)| {
        let settings = settings(name, &server.url(), policy).lease(lease);
        started(settings.shared_sessions(shared_sessions))
    });
    let taken: Vec<_> = (0..CALLERS).map(key).collect();
    let held: Vec<_> = taken.iter().map(|key| lock(&other, key).acquire(PATIENCE).unwrap()).collect();
    thread::scope(|scope| {
        let (over, is_over) = bounded::<()>(0);
        for key in &taken {
            let (wanted, is_over) = (lock(&manager, key), is_over.clone());
            scope.spawn(move || {
                while is_over.recv_timeout(Duration::from_millis(1)) == Err(RecvTimeoutError::Timeout) {
                    assert!(wanted.try_acquire().unwrap().is_none());
                }
            });
        }
        for number in 0..3 {
            lock(&manager, &format!("free {number}")).acquire(PATIENCE).unwrap().release().unwrap();
        }
        drop(over);
    });
    drop(held);
}

/// Those that are granted locks all the time on the same session do not put off the confirmation of another's, nor do they wait for ever; and a
/// release waits for no newcomer.
#[test]
fn a_lock_is_confirmed_though_newcomers_are_slow_and_others_are_granted_locks_all_the_time() {
    const CALLERS: usize = 4;
    let server = Server::builder().setting("pre_auth_delay", "1").start().unwrap();
    let settings = settings("it", &server.url(), TakeoverPolicy::AfterAnyRestart);
    // A heartbeat has time for several newcomers.
    let settings = settings.heartbeat(Duration::from_millis(500)).heartbeat_timeout(LEASE / 2);
    let manager = started(settings.shared_sessions(1));
    let held = lock(&manager, "held").acquire(PATIENCE).unwrap();
    thread::scope(|scope| {
        let (over, is_over) = bounded::<()>(0);
        for caller in 0..CALLERS {
            let (manager, is_over) = (&manager, is_over.clone());
            scope.spawn(move || {
                // One of them is granted a lock in each quarter of a newcomer's time.
                let _ = is_over.recv_timeout(Duration::from_millis(250) * caller as u32);
                for number in 0.. {
                    if is_over.try_recv() == Err(TryRecvError::Disconnected) {
                        return;
                    }
                    let wanted = lock(manager, &format!("{caller} {number}"));
                    let Ok(guard) = wanted.acquire(Duration::from_secs(2)) else { continue };
                    guard.release().unwrap();
                }
            });
        }
        for number in 0..4 {
            // An annotation is made by a thread of its own, which somebody has to start.
            let note = || LockOptions::new().valuer(Arc::new(|| b"note".to_vec()));
            let options = if number % 2 == 0 { LockOptions::new() } else { note() };
            let free = manager.lock_with(format!("free {number}").as_str(), options).unwrap();
            let begun = Instant::now();
            free.acquire(PATIENCE).unwrap().release().unwrap();
            println!("a lock that is free had after {:.1?}", begun.elapsed());
            // A newcomer may be under way when it is granted, and the next one counts.
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        }
        let (late, begun) = (Lateness::watch(), Instant::now());
        held.release().unwrap();
        late.allow(begun.elapsed(), Duration::from_millis(1_500));
        drop(over);
    });
}

#[test]
fn releases_are_short_beside_a_lock_for_which_no_newcomer_is_answered() {
    /// The server takes nobody until this is dropped.
    struct Silent(i32);
    impl Drop for Silent {
        fn drop(&mut self) {
            system::signal(self.0, Signal::Continue).unwrap();
        }
    }
    let server = Server::start().unwrap();
    let policy = TakeoverPolicy::AfterAnyRestart;
    let manager = started(settings("it", &server.url(), policy).lease(PATIENCE / 4).shared_sessions(1));
    releases_are_short(&mut server.client().unwrap(), &manager, || {
        let postmaster = server.postmaster_pid().unwrap();
        system::signal(postmaster, Signal::Stop).unwrap();
        Silent(postmaster)
    });
}

fn a_newcomer_that_is_lost_on_its_way_is_followed_by_another(shared_sessions: u32) {
    let server = Server::start().unwrap();
    let proxy = Proxy::to(server.port());
    let url = server.url_at("127.0.0.1", proxy.port());
    let policy = TakeoverPolicy::AfterAnyRestart;
    let manager = started(settings("it", &url, policy).shared_sessions(shared_sessions));
    let wanted = lock(&manager, "k0");
    wanted.acquire(PATIENCE).unwrap().release().unwrap();
    proxy.swallow_next();
    let begun = Instant::now();
    let guard = wanted.acquire(PATIENCE).unwrap();
    let time = begun.elapsed();
    assert!(proxy.has_swallowed() && time < Duration::from_secs(4), "{time:?}");
    guard.release().unwrap();
}

/// The question for a password is answer enough, and is not answered.
#[test]
fn a_lock_is_confirmed_where_a_password_is_asked_for() {
    let server = Server::builder().password_auth().start().unwrap();
    let config = Config::from_url(&server.url()).unwrap().lease(LEASE);
    let manager = started(config.takeover(TakeoverPolicy::AfterAnyRestart));
    lock(&manager, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    assert!(!server.log().contains("password authentication failed"), "{}", server.log());
}

/// Whoever had one of the other permits a moment ago, or shared the lock too, is not let back before those that are cut off have lost theirs.
#[test]
fn nobody_is_granted_a_permit_or_has_readers_for_company_as_a_writer_before_the_end_of_the_grace() {
    let server = Server::start().unwrap();
    let proxy = Proxy::to(server.port());
    let policy = TakeoverPolicy::AfterAnyRestart;
    let holder = started(settings("holder", &server.url_at("127.0.0.1", proxy.port()), policy));
    let competitor = started(settings("competitor", &server.url(), policy));
    let mut believed = 0;
    for fault in [&FAULTS[0], &FAULTS[1]] {
        let semaphores = [&holder, &competitor].map(|manager| manager.semaphore("s", 2).unwrap());
        let readers = [&holder, &competitor].map(|manager| manager.shared_lock("k0").unwrap());
        let held = [&semaphores[0], &semaphores[0], &readers[0]].map(|lock| lock.acquire(PATIENCE).unwrap());
        readers[1].acquire(PATIENCE).unwrap().release().unwrap();
        let wanted = [Arc::clone(&semaphores[1]), lock(&competitor, "k0")];
        let acquire = |lock: Arc<dyn Lock>| {
            let guard = lock.acquire(PATIENCE).unwrap();
            (now(), guard)
        };
        let waiting = wanted.clone().map(|lock| begin(move || acquire(lock)));
        becomes("the waiters", &2, || {
            ["s", "k0"].iter().map(|key| competitor.inspect(*key).unwrap().waiters.len()).sum::<usize>()
        });
        proxy.cut(Direction::Both);
        (fault.strike)(&server);
        believed += held.iter().filter(|guard| guard.is_held()).count();
        eventually("the grace", || {
            competitor.snapshot().claim("s").is_some_and(|claim| claim.state == ClaimState::InGrace)
        });
        assert!(wanted.iter().all(|lock| lock.try_acquire().unwrap().is_none()), "{}", fault.name);
        for waiting in waiting {
            let (since, guard) = waiting.get();
            for held in &held {
                hear(held.lost());
                assert!(micros(held.loss().unwrap().at) < since, "{}: {:?}", fault.name, guard.term());
            }
            guard.release().unwrap();
        }
        drop(held);
        proxy.restore();
        proxy.close_all();
    }
    assert!(believed > 0, "nobody was put to the test");
}

pub(crate) static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

pub(crate) struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LOGGED.lock().push(record.args().to_string());
    }

    fn flush(&self) {}
}

fn what_waits_says_why_and_for_how_long(shared_sessions: u32) {
    Process::start(&mut process("takeover::saying_why", &shared_sessions.to_string())).succeeds();
}

/// The body of [`what_waits_says_why_and_for_how_long`], in a process of its own, for its logger.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn saying_why() {
    let Some(shared_sessions) = role() else { return };
    log::set_logger(&Logger).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    let server = Server::start().unwrap();
    let config = config("it", &server.url(), 8).lease(LEASE);
    let manager = started(config.shared_sessions(shared_sessions.parse().unwrap()));
    let locks: Vec<_> = (0..4).map(|number| lock(&manager, &key(number))).collect();
    locks.iter().for_each(|lock| lock.lock(&soon()).unwrap());
    let lost: Vec<_> = locks.iter().map(|lock| lock.lost()).collect();
    server.restart(Shutdown::Immediate).unwrap();
    lost.iter().for_each(hear);
    let x = &locks[0];
    eventually("the grace", || {
        manager.snapshot().claim("k0").is_some_and(|claim| claim.state == ClaimState::InGrace)
    });
    let claim = manager.snapshot().claim("k0").cloned().unwrap();
    assert!(claim.grace_left.is_some_and(|left| left > Duration::ZERO && left <= LEASE), "{claim:?}");
    assert!(format!("{claim:?}").contains("InGrace, grace_left: "), "{claim:?}");
    let view = manager.inspect("k0").unwrap();
    assert!(view.holder.is_none() && view.grace_left.is_some_and(|left| left <= LEASE), "{view:?}");
    let error = x.try_lock(&soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockUnavailable);
    let text = error.to_string();
    assert!(
        text.contains("the server was restarted, or another one took its place")
            && text.contains("for another "),
        "{text}"
    );
    assert!(x.try_acquire().unwrap().is_none());
    let says_so = |error: &Error| error.grace_left().is_some_and(|left| left <= LEASE);
    assert!(says_so(&error), "{error}");
    let error = x.acquire(Duration::ZERO).unwrap_err();
    assert!(error.kind() == ErrorKind::TimedOut && error.to_string().contains("for another "), "{error}");
    assert!(says_so(&error), "{error}");
    let error = x.lock(&Context::timeout(Duration::from_millis(50))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("no lock is granted for another ") && says_so(&error), "{error}");
    // Work that nobody does is no work that another one does.
    for wait in [0, 50].map(Duration::from_millis) {
        let outcome = manager.once("nightly", 24 * LEASE, wait, |_| Ok::<_, Error>(()));
        let error = outcome.unwrap_err();
        assert!(error.kind() == ErrorKind::LockUnavailable && says_so(&error), "{wait:?}: {error}");
    }
    // A claim may end in the midst of it. What its lost session had is known to be gone only where the server's last word has come.
    let (late, begun) = (Lateness::watch(), Instant::now());
    let released = locks[3].release();
    assert!(
        released.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::UnlockFailed),
        "{released:?}"
    );
    late.allow(begun.elapsed(), Duration::from_secs(2));
    locks[..3].iter().for_each(|lock| lock.lock(&soon()).unwrap());
    assert_eq!(manager.inspect("k0").unwrap().grace_left, None);
    assert_eq!(manager.snapshot().claim("k0").unwrap().grace_left, None);
    let said = |texts: [&str; 2]| {
        LOGGED.lock().iter().filter(|line| texts.iter().all(|text| line.contains(text))).count()
    };
    // For a lease, and on a busy machine some of them have passed before it looks.
    let begins = said(["another one took its place: locks are granted in ", "s, since"]);
    assert_eq!((begins, said(["locks are granted again"; 2])), (1, 1), "{:?}", LOGGED.lock());
}

/// Whoever is promoted has to know of a longer lease, so that waits for the synchronous standbys: for a time, and it says so.
#[test]
fn what_is_agreed_on_waits_for_the_synchronous_standby_and_says_so() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Synchronous).unwrap();
    let settings = |lease| config("it", &primary.url(), 2).lease(lease).connect_timeout(2 * SECOND);
    let former = started(settings(LEASE));
    standby.promote().unwrap();
    let longer = started(settings(2 * LEASE));
    let says_so = |longer: &PostgresManager| {
        let begun = Instant::now();
        let error = lock(longer, "k1").acquire(5 * SECOND).unwrap_err().to_string();
        assert!(error.contains("waits for the synchronous standbys"), "{error}");
        assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
        let report = longer.check();
        let line = report.lines.iter().find(|line| line.topic == "takeover").unwrap();
        assert_eq!(line.verdict, Verdict::Wrong);
        assert!(line.text.contains("longer lease"), "{line:?}");
    };
    says_so(&longer);
    // The first one's session has the row, for as long as it waits.
    says_so(&started(settings(3 * LEASE)));
    lock(&former, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    primary.reset("synchronous_standby_names").unwrap();
    lock(&longer, "k1").acquire(PATIENCE).unwrap().release().unwrap();
}

#[test]
fn a_weaker_policy_is_refused_and_stronger_settings_count_from_then_on() {
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let agreed = |operator: &mut postgres::Client| -> (String, i64) {
        let row = operator.query_one("SELECT takeover, lease FROM dsync.policy", &[]).unwrap();
        (row.get(0), row.get(1))
    };
    let millis = |lease: Duration| i64::try_from(lease.as_millis()).unwrap();
    let settings = |policy, lease| config("it", &server.url(), 2).lease(lease).takeover(policy);
    let strict = started(settings(TakeoverPolicy::AfterAnyRestart, LEASE));
    assert_eq!(agreed(operator), ("after any restart".to_owned(), millis(LEASE)));
    for weaker in [TakeoverPolicy::Immediate, TakeoverPolicy::AfterPromotion] {
        let error = PostgresManager::connect(settings(weaker, LEASE)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedInitialization);
        assert!(error.to_string().contains("UPDATE dsync.policy SET takeover = "), "{error}");
    }
    // A longer lease counts for all, a shorter one does not. A start ends well without a session too, and then agrees on nothing: so they have a lock.
    let joins = |settings| lock(&started(settings), "k2").acquire(PATIENCE).unwrap().release().unwrap();
    let longer = 3 * LEASE / 2;
    joins(settings(TakeoverPolicy::AfterAnyRestart, longer));
    joins(settings(TakeoverPolicy::AfterAnyRestart, Duration::from_secs(1)));
    assert_eq!(agreed(operator), ("after any restart".to_owned(), millis(longer)));
    server.restart(Shutdown::Immediate).unwrap();
    let begun = Instant::now();
    lock(&strict, "k0").acquire(PATIENCE).unwrap().release().unwrap();
    assert!(begun.elapsed() >= longer, "{:?}", begun.elapsed());

    // Who runs on with a weaker one is refused at the next takeover.
    let operator = &mut server.client().unwrap();
    operator.batch_execute("UPDATE dsync.policy SET takeover = 'immediate', lease = 1000").unwrap();
    let weak = started(settings(TakeoverPolicy::Immediate, LEASE));
    lock(&weak, "k1").acquire(PATIENCE).unwrap().release().unwrap();
    joins(settings(TakeoverPolicy::AfterPromotion, LEASE));
    assert_eq!(agreed(operator), ("after promotion".to_owned(), millis(LEASE)));
    server.restart(Shutdown::Immediate).unwrap();
    let k1 = lock(&weak, "k1");
    eventually("the refusal", || {
        k1.try_acquire().is_err_and(|error| {
            error.kind() == ErrorKind::SessionRefused && error.to_string().contains("is weaker")
        })
    });
}

/// As jobs of cron do.
#[test]
fn those_that_do_not_wait_get_the_lock_when_their_machine_has_seen_the_grace_for_long_enough() {
    let server = Server::start().unwrap();
    let url = server.url();
    let tries = || {
        let manager = started(settings("job", &url, TakeoverPolicy::AfterPromotion));
        lock(&manager, "job").try_acquire().unwrap().map(|guard| guard.release().unwrap()).is_some()
    };
    assert!(tries(), "there was no takeover");
    server.restart(Shutdown::Immediate).unwrap();
    let begun = Instant::now();
    eventually("the lock of a job that does not wait", tries);
    println!("had {:.1?} after the restart, lease {LEASE:?}", begun.elapsed());
    assert!(begun.elapsed() >= LEASE, "{:?}", begun.elapsed());
    assert!(tries(), "it is over for all");
    // A crash begins it again.
    server.restart(Shutdown::Immediate).unwrap();
    assert!(!tries());
}

#[test]
fn who_only_looks_agrees_on_nothing_and_is_not_refused_for_a_weaker_policy() {
    let server = Server::start().unwrap();
    let url = server.url();
    let operator = &mut server.client().unwrap();
    let agreed = |operator: &mut postgres::Client| -> String {
        operator.query_one("SELECT takeover FROM dsync.policy", &[]).unwrap().get(0)
    };
    let holder = started(settings("holder", &url, TakeoverPolicy::Immediate));
    let held = lock(&holder, "x").acquire(PATIENCE).unwrap();
    let strict = PostgresManager::new(settings("strict", &url, TakeoverPolicy::AfterAnyRestart)).unwrap();
    assert!(strict.inspect("x").unwrap().holder.is_some() && strict.inspect_all().unwrap().len() == 1);
    assert_eq!(agreed(operator), "immediate");
    // What counts is that it begins to take locks.
    strict.start().unwrap();
    lock(&strict, "y").acquire(PATIENCE).unwrap().release().unwrap();
    assert_eq!(agreed(operator), "after any restart");
    let weak = PostgresManager::new(settings("weak", &url, TakeoverPolicy::Immediate)).unwrap();
    assert!(weak.inspect("x").unwrap().holder.is_some());
    let error = weak.start().unwrap_err();
    assert!(error.to_string().contains("is weaker"), "{error}");
    assert!(weak.inspect("x").unwrap().holder.is_some(), "it may look still");
    held.release().unwrap();
}

/// Each process of a service has a lock of its own.
const FLEET: usize = 20;

/// The body of a process of the fleet, until it is killed; as a test of its own it does nothing.
#[test]
#[ignore = "the body of a process, which another test starts"]
fn one_of_the_fleet() {
    let Some(role) = role() else { return };
    let [number, policy, url] = role.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{role}") };
    let config = Config::from_url(url).unwrap().lease(LEASE).max_sessions(2);
    let config = if policy == "strict" { config.takeover(TakeoverPolicy::AfterAnyRestart) } else { config };
    let manager = started(config);
    let lock = lock(&manager, &key(number.parse().unwrap()));
    lock.lock(&soon()).unwrap();
    loop {
        // Without a call, from the second time on.
        eventually("the lock", || is_held(&lock));
        let term = lock.term().unwrap();
        println!("\nholds {}", term.token().unwrap());
        // A parent that is no more kills nobody.
        assert!(term.lost().wait_timeout(2 * PATIENCE), "the parent strikes");
        println!("\nhas lost it");
    }
}

/// Its processes.
struct Fleet(Vec<Process>);

impl Fleet {
    fn new(policy: &str, url: &str) -> Self {
        let start = |number| {
            let role = format!("{number} {policy} {url}");
            Process::start(&mut process("takeover::one_of_the_fleet", &role))
        };
        let fleet = Self((0..FLEET).map(start).collect());
        fleet.all_hold();
        fleet
    }

    /// Waits until all say that they have their locks: the tokens.
    fn all_hold(&self) -> Vec<i64> {
        let said = self.0.iter().map(|process| process.says("holds "));
        said.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
    }

    /// The server is taken over, and accepts sessions at the time that this gives. All have their locks back, without a call.
    fn is_taken_over(&self, what: &str, server: &Server, taken_over: impl FnOnce() -> Micros) -> Vec<Micros> {
        let accepts_at = taken_over();
        self.0.iter().for_each(|process| drop(process.says("has lost it")));
        let tokens = self.all_hold();
        let (grants, granted): (Vec<_>, Vec<_>) =
            granted(&mut server.client().unwrap(), FLEET).into_iter().unzip();
        assert_eq!(tokens, granted, "each has its own lock, by its own word and by the server's");
        let (first, last) = (grants.iter().min().unwrap(), grants.iter().max().unwrap());
        println!(
            "{what}, lease {LEASE:?}: the first of {FLEET} processes has its lock back {:.0} ms after the server accepts sessions, the last {:.0} ms",
            ms(accepts_at, *first),
            ms(accepts_at, *last)
        );
        grants
    }
}

#[test]
fn a_fleet_has_its_locks_back_after_a_restart_and_none_before_the_grace() {
    let server = Server::start().unwrap();
    let fleet = Fleet::new("strict", &server.url());
    let restart = |how| {
        move |server: &Server| {
            server.restart(how).unwrap();
            now()
        }
    };
    // All are proven.
    grow_old();
    let begun = now();
    let grants = fleet.is_taken_over("fast restart", &server, || restart(Shutdown::Fast)(&server));
    assert!(grants.iter().all(|since| *since - begun < length(LEASE)), "{grants:?}");
    let grants = fleet.is_taken_over("immediate restart", &server, || restart(Shutdown::Immediate)(&server));
    let started = start_of(&server);
    assert!(grants.iter().all(|since| *since - started >= length(LEASE)), "{grants:?}");
}

#[test]
fn a_fleet_has_its_locks_back_after_a_promotion_and_none_before_the_grace() {
    let primary = Server::start().unwrap();
    let standby = primary.standby(Replication::Asynchronous).unwrap();
    let url = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
        primary.port(),
        standby.port()
    );
    let fleet = Fleet::new("default", &url);
    standby.wait_caught_up(&primary).unwrap();
    let mut promoted = 0;
    let grants = fleet.is_taken_over("promotion", &standby, || {
        primary.kill_hard().unwrap();
        promoted = now();
        standby.promote().unwrap();
        now()
    });
    assert!(grants.iter().all(|since| *since - promoted >= length(LEASE)), "{grants:?}");
}
