//! What an observer is told, and that it harms no lock; on each implementation. And what a snapshot shows.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use dsync::observer::{
    Acquired, Attempt, AttemptFailed, Heartbeat, Released, Sessions, TermLost, ThreadWaited, ThreadWaits,
    Trouble,
};
use dsync::{
    ClaimState, Config, Context, ErrorKind, Lock, LockGuard, LossReason, MemoryManager, MemoryServer,
    Observer, PostgresManager, SyncManager,
};
use parking_lot::Mutex;
use support::Database;

use crate::common::{
    Outcome, PATIENCE, becomes, begin, eventually, hear, on_both, soon, started, wait_in_thread,
};

on_both! {
    a_guard_tells_of_its_call_its_term_and_its_release
    a_claim_tells_of_its_call_its_term_and_its_release
    a_wait_is_told_with_its_time
    a_call_without_the_lock_is_told_with_its_reason
    a_lost_claim_tells_of_the_loss_and_of_the_next_term
    a_lost_guard_tells_of_the_loss_and_of_no_release
    threads_that_wait_for_each_other_are_told_and_shown
    a_stop_tells_of_each_term_that_it_ends
    an_observer_that_panics_changes_nothing
    an_observer_may_ask_the_manager_and_use_other_locks
    a_snapshot_shows_claims_as_they_come_and_go
    each_term_has_one_beginning_and_one_end_whatever_happens
}

// ---------------------------------------------------------------------------------------------------------------------
// The two worlds, and who listens
// ---------------------------------------------------------------------------------------------------------------------

trait World: Sync {
    /// A manager that was started, with an observer.
    fn manager(&self, observer: Arc<dyn Observer>) -> Arc<dyn SyncManager>;

    /// Takes this lock from its holder, if there is one.
    fn take_away(&self, key: &str);

    /// Why it was lost then.
    fn reason(&self) -> LossReason;
}

struct Memory(MemoryServer);

impl Memory {
    fn new() -> Self {
        Self(MemoryServer::new())
    }
}

impl World for Memory {
    fn manager(&self, observer: Arc<dyn Observer>) -> Arc<dyn SyncManager> {
        let manager = MemoryManager::on(&self.0).observer(observer);
        manager.start().unwrap();
        Arc::new(manager)
    }

    fn take_away(&self, key: &str) {
        self.0.revoke(key);
    }

    fn reason(&self) -> LossReason {
        LossReason::Revoked
    }
}

struct Postgres {
    operator: Mutex<::postgres::Client>,
    database: support::Database<'static>,
    /// How many sessions the locks of a manager share.
    shared_sessions: u32,
}

impl Postgres {
    fn new(shared_sessions: u32) -> Self {
        let database = support::Database::fresh().unwrap();
        Self { operator: Mutex::new(database.client().unwrap()), database, shared_sessions }
    }

    fn config(&self) -> Config {
        let config = Config::from_url(&self.database.url()).unwrap();
        config
            .wait_slice(Duration::from_secs(1))
            .connect_timeout(PATIENCE)
            .release_timeout(Duration::from_secs(20))
            .shared_sessions(self.shared_sessions)
    }
}

impl World for Postgres {
    fn manager(&self, observer: Arc<dyn Observer>) -> Arc<dyn SyncManager> {
        Arc::new(PostgresManager::connect(self.config().observer(observer)).unwrap())
    }

    fn take_away(&self, key: &str) {
        let holder = "SELECT pg_terminate_backend(pid) FROM dsync.locks WHERE key = $1 AND pid IS NOT NULL";
        self.operator.lock().query(holder, &[&key]).unwrap();
    }

    fn reason(&self) -> LossReason {
        LossReason::Terminated
    }
}

/// What was told, without what all have in common.
#[derive(Clone, Debug, PartialEq)]
enum Event {
    Attempt,
    Failed { kind: ErrorKind, waited: Duration },
    Acquired { waited: Duration, token: Option<i64> },
    Released { held: Duration },
    Lost { held: Duration, reason: LossReason },
    Trouble(ErrorKind),
    Heartbeat(Duration),
    ThreadWaits,
    ThreadWaited(Duration),
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Self::Attempt => "attempt",
            Self::Failed { .. } => "failed",
            Self::Acquired { .. } => "acquired",
            Self::Released { .. } => "released",
            Self::Lost { .. } => "lost",
            Self::Trouble(_) => "trouble",
            Self::Heartbeat(_) => "heartbeat",
            Self::ThreadWaits => "thread waits",
            Self::ThreadWaited(_) => "thread waited",
        }
    }
}

/// Keeps what it is told, by key.
#[derive(Debug, Default)]
struct Listener {
    told: Mutex<Vec<(String, bool, Event)>>,
    sessions: Mutex<Vec<Sessions>>,
}

impl Listener {
    fn note(&self, key: &str, is_guard: bool, event: Event) {
        self.told.lock().push((key.to_owned(), is_guard, event));
    }

    /// What was told of `key`, of guards or of claims; without heartbeats, which come when their time has come.
    fn of(&self, key: &str, is_guard: bool) -> Vec<Event> {
        let told = self.told.lock();
        let those = told.iter().filter(|(of, guard, event)| {
            of == key && *guard == is_guard && !matches!(event, Event::Heartbeat(_) | Event::Trouble(_))
        });
        those.map(|(.., event)| event.clone()).collect()
    }

    /// Their names, when there are as many as there should be.
    fn told(&self, key: &str, is_guard: bool, names: &[&str]) -> Vec<Event> {
        becomes("what is told", &names.to_vec(), || {
            self.of(key, is_guard).iter().map(Event::name).collect::<Vec<_>>()
        });
        self.of(key, is_guard)
    }
}

impl Observer for Listener {
    fn attempt(&self, event: &Attempt<'_>) {
        self.note(event.key, event.is_guard, Event::Attempt);
    }

    fn failed(&self, event: &AttemptFailed<'_>) {
        let (kind, waited) = (event.error.kind(), event.waited);
        self.note(event.key, event.is_guard, Event::Failed { kind, waited });
    }

    fn acquired(&self, event: &Acquired<'_>) {
        let (waited, token) = (event.waited, event.token);
        self.note(event.key, event.is_guard, Event::Acquired { waited, token });
    }

    fn released(&self, event: &Released<'_>) {
        self.note(event.key, event.is_guard, Event::Released { held: event.held });
    }

    fn lost(&self, event: &TermLost<'_>) {
        let (held, reason) = (event.held, event.reason);
        self.note(event.key, event.is_guard, Event::Lost { held, reason });
    }

    fn trouble(&self, event: &Trouble<'_>) {
        self.note(event.key, event.is_guard, Event::Trouble(event.error.kind()));
    }

    fn heartbeat(&self, event: &Heartbeat<'_>) {
        self.note(event.key, event.is_guard, Event::Heartbeat(event.round_trip));
    }

    fn sessions(&self, event: &Sessions) {
        self.sessions.lock().push(*event);
    }

    fn thread_waits(&self, event: &ThreadWaits<'_>) {
        self.note(event.key, true, Event::ThreadWaits);
    }

    fn thread_waited(&self, event: &ThreadWaited<'_>) {
        self.note(event.key, true, Event::ThreadWaited(event.waited));
    }
}

fn listened(world: &dyn World) -> (Arc<Listener>, Arc<dyn SyncManager>) {
    let listener = Arc::new(Listener::default());
    (Arc::clone(&listener), world.manager(listener))
}

/// Who wants the lock too, and is of no interest here.
fn rival(world: &dyn World) -> (Arc<dyn SyncManager>, Arc<dyn Lock>) {
    let (_, manager) = listened(world);
    let lock = manager.lock("x").unwrap();
    (manager, lock)
}

const A_WHILE: Duration = Duration::from_millis(120);

/// Runs `work`, and says how long it took.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let outcome = work();
    (outcome, begun.elapsed())
}

// ---------------------------------------------------------------------------------------------------------------------
// What is told
// ---------------------------------------------------------------------------------------------------------------------

fn a_guard_tells_of_its_call_its_term_and_its_release(world: &dyn World) {
    let (listener, manager) = listened(world);
    let lock = manager.lock("x").unwrap();
    let (token, all) = timed(|| {
        let guard = lock.acquire(soon()).unwrap();
        thread::sleep(A_WHILE);
        let token = guard.term().token();
        guard.release().unwrap();
        token
    });
    let told = listener.told("x", true, &["attempt", "acquired", "released"]);
    let [_, Event::Acquired { waited, token: told_token }, Event::Released { held }] = told[..] else {
        panic!("{told:?}")
    };
    assert!(waited + held <= all, "{waited:?} and {held:?} of {all:?}");
    assert!(waited > Duration::ZERO && held >= A_WHILE, "{waited:?} {held:?}");
    assert!(token.is_some() && told_token == token, "{told_token:?} and not {token:?}");
    // The next one is told of anew, and one that tries.
    drop(lock.try_acquire().unwrap().expect("it is free"));
    let twice = ["attempt", "acquired", "released", "attempt", "acquired", "released"];
    listener.told("x", true, &twice);
    assert!(listener.of("x", false).is_empty());
}

fn a_claim_tells_of_its_call_its_term_and_its_release(world: &dyn World) {
    let (listener, manager) = listened(world);
    let lock = manager.lock("x").unwrap();
    lock.lock(&soon()).unwrap();
    let token = lock.term().unwrap().token();
    // Held already: no attempt.
    lock.lock(&soon()).unwrap();
    lock.try_lock(&soon()).unwrap();
    thread::sleep(A_WHILE);
    lock.release().unwrap();
    lock.release().unwrap();
    let told = listener.told("x", false, &["attempt", "acquired", "released"]);
    assert!(matches!(told[1], Event::Acquired { token: told, .. } if told == token), "{told:?}");
    assert!(matches!(told[2], Event::Released { held } if held >= A_WHILE && held < PATIENCE), "{told:?}");
    assert!(listener.of("x", true).is_empty());
}

fn a_wait_is_told_with_its_time(world: &dyn World) {
    let (_rival, taken) = rival(world);
    taken.lock(&soon()).unwrap();
    let (listener, manager) = listened(world);
    let (lock, guarded) = (manager.lock("x").unwrap(), manager.lock("x").unwrap());
    let waiting = wait_in_thread(&lock);
    let waiting_guard = begin(move || guarded.acquire(soon()).map(LockGuard::release));
    eventually("both wait", || {
        manager.snapshot().claims.iter().filter(|claim| claim.state == ClaimState::Queueing).count() == 2
    });
    thread::sleep(A_WHILE);
    taken.release().unwrap();
    // One of them comes first, and the other when it is done.
    eventually("one has it", || waiting.is_ready() || waiting_guard.is_ready());
    eventually("both had it", || {
        if waiting.is_ready() {
            lock.release().unwrap();
        }
        waiting_guard.is_ready()
    });
    waiting_guard.get().unwrap().unwrap();
    waiting.get().unwrap();
    lock.release().unwrap();
    for is_guard in [false, true] {
        let told = listener.told("x", is_guard, &["attempt", "acquired", "released"]);
        let Event::Acquired { waited, .. } = told[1] else { panic!("{told:?}") };
        assert!((A_WHILE..PATIENCE).contains(&waited), "{waited:?}");
    }
}

fn a_call_without_the_lock_is_told_with_its_reason(world: &dyn World) {
    let (_rival, taken) = rival(world);
    taken.lock(&soon()).unwrap();
    let (listener, manager) = listened(world);
    let lock = manager.lock("x").unwrap();
    assert!(lock.try_acquire().unwrap().is_none());
    assert_eq!(lock.acquire(A_WHILE).unwrap_err().kind(), ErrorKind::TimedOut);
    let told = listener.told("x", true, &["attempt", "failed", "attempt", "failed"]);
    assert!(matches!(told[1], Event::Failed { kind: ErrorKind::LockUnavailable, .. }), "{told:?}");
    let Event::Failed { kind: ErrorKind::TimedOut, waited } = told[3] else { panic!("{told:?}") };
    assert!((A_WHILE..PATIENCE).contains(&waited), "{waited:?}");

    assert_eq!(lock.try_lock(&soon()).unwrap_err().kind(), ErrorKind::LockUnavailable);
    let (context, canceller) = Context::background().with_cancel();
    canceller.cancel();
    assert_eq!(lock.lock(&context).unwrap_err().kind(), ErrorKind::Cancelled);
    lock.release().unwrap();
    let told = listener.told("x", false, &["attempt", "failed", "attempt", "failed"]);
    assert!(matches!(told[1], Event::Failed { kind: ErrorKind::LockUnavailable, .. }), "{told:?}");
    assert!(matches!(told[3], Event::Failed { kind: ErrorKind::Cancelled, .. }), "{told:?}");
    // No term, so there is nothing to be released.
    manager.stop().unwrap();
    listener.told("x", false, &["attempt", "failed", "attempt", "failed"]);
}

fn a_lost_claim_tells_of_the_loss_and_of_the_next_term(world: &dyn World) {
    let (listener, manager) = listened(world);
    let lock = manager.lock("x").unwrap();
    lock.lock(&soon()).unwrap();
    let lost = lock.lost();
    thread::sleep(A_WHILE);
    let ((), away) = timed(|| {
        world.take_away("x");
        hear(&lost);
        lock.wait(&soon()).unwrap();
    });
    // The second term came without an attempt.
    let told = listener.told("x", false, &["attempt", "acquired", "lost", "acquired"]);
    let [
        _,
        Event::Acquired { token: first, .. },
        Event::Lost { held, reason },
        Event::Acquired { waited, token },
    ] = told[..]
    else {
        panic!("{told:?}")
    };
    assert_eq!(reason, world.reason());
    assert!(held >= A_WHILE && held < PATIENCE, "{held:?}");
    // Not since the claim began.
    assert!(waited <= away && token > first, "{away:?}: {told:?}");
    lock.release().unwrap();
    listener.told("x", false, &["attempt", "acquired", "lost", "acquired", "released"]);
}

fn a_lost_guard_tells_of_the_loss_and_of_no_release(world: &dyn World) {
    let (listener, manager) = listened(world);
    let guard = manager.lock("x").unwrap().acquire(soon()).unwrap();
    world.take_away("x");
    hear(guard.lost());
    assert_eq!(guard.release().unwrap_err().kind(), ErrorKind::Lost);
    let told = listener.told("x", true, &["attempt", "acquired", "lost"]);
    assert!(matches!(told[2], Event::Lost { reason, .. } if reason == world.reason()), "{told:?}");
    manager.stop().unwrap();
    listener.told("x", true, &["attempt", "acquired", "lost"]);
}

fn threads_that_wait_for_each_other_are_told_and_shown(world: &dyn World) {
    let (listener, manager) = listened(world);
    let lock = manager.lock("x").unwrap();
    let guard = lock.acquire(soon()).unwrap();
    let waiting = {
        let lock = Arc::clone(&lock);
        begin(move || lock.acquire(soon()).unwrap().release())
    };
    listener.told("x", true, &["attempt", "acquired", "attempt", "thread waits"]);
    eventually("the snapshot shows it", || {
        manager.snapshot().claim("x").is_some_and(|claim| claim.waiting_threads == 1)
    });
    assert!(lock.try_acquire().unwrap().is_none(), "another thread has it");
    thread::sleep(A_WHILE);
    guard.release().unwrap();
    waiting.get().unwrap();
    let all = [
        "attempt",
        "acquired",
        "attempt",
        "thread waits",
        "attempt",
        "failed",
        "released",
        "thread waited",
        "acquired",
        "released",
    ];
    eventually("all is told", || listener.of("x", true).len() == all.len());
    let told = listener.of("x", true);
    // Two claims tell of themselves; only their own events have an order.
    let mut names: Vec<_> = told.iter().map(Event::name).collect();
    names.sort_unstable();
    let mut wanted = all.to_vec();
    wanted.sort_unstable();
    assert_eq!(names, wanted);
    let thread_waited = told.iter().find_map(|event| match event {
        Event::ThreadWaited(waited) => Some(*waited),
        _ => None,
    });
    assert!(thread_waited.is_some_and(|waited| waited >= A_WHILE && waited < PATIENCE), "{thread_waited:?}");
    // For the guard the lock was wanted since its call began.
    let waited = told.iter().rev().find_map(|event| match event {
        Event::Acquired { waited, .. } => Some(*waited),
        _ => None,
    });
    assert!(waited >= thread_waited, "{waited:?} {thread_waited:?}");
}

fn a_stop_tells_of_each_term_that_it_ends(world: &dyn World) {
    let (listener, manager) = listened(world);
    let guard = manager.lock("a").unwrap().acquire(soon()).unwrap();
    let lock = manager.lock("b").unwrap();
    lock.lock(&soon()).unwrap();
    manager.stop().unwrap();
    listener.told("a", true, &["attempt", "acquired", "released"]);
    listener.told("b", false, &["attempt", "acquired", "released"]);
    drop(guard);
    assert_eq!(lock.lock(&soon()).unwrap_err().kind(), ErrorKind::SyncManagerStopped);
    let told = listener.told("b", false, &["attempt", "acquired", "released", "attempt", "failed"]);
    assert!(matches!(told[4], Event::Failed { kind: ErrorKind::SyncManagerStopped, .. }), "{told:?}");
    listener.told("a", true, &["attempt", "acquired", "released"]);
}

// ---------------------------------------------------------------------------------------------------------------------
// What an observer does to locks: nothing
// ---------------------------------------------------------------------------------------------------------------------

/// Panics whenever it is told something.
#[derive(Debug, Default)]
struct Panicking(AtomicUsize);

impl Panicking {
    fn panic(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        panic!("an observer's panic, which is a part of the test");
    }
}

impl Observer for Panicking {
    fn attempt(&self, _: &Attempt<'_>) {
        self.panic();
    }
    fn failed(&self, _: &AttemptFailed<'_>) {
        self.panic();
    }
    fn acquired(&self, _: &Acquired<'_>) {
        self.panic();
    }
    fn released(&self, _: &Released<'_>) {
        self.panic();
    }
    fn lost(&self, _: &TermLost<'_>) {
        self.panic();
    }
    fn trouble(&self, _: &Trouble<'_>) {
        self.panic();
    }
    fn heartbeat(&self, _: &Heartbeat<'_>) {
        self.panic();
    }
    fn sessions(&self, _: &Sessions) {
        self.panic();
    }
    fn thread_waits(&self, _: &ThreadWaits<'_>) {
        self.panic();
    }
    fn thread_waited(&self, _: &ThreadWaited<'_>) {
        self.panic();
    }
}

fn an_observer_that_panics_changes_nothing(world: &dyn World) {
    let panicking = Arc::new(Panicking::default());
    let manager = world.manager(Arc::clone(&panicking) as Arc<dyn Observer>);
    let lock = manager.lock("x").unwrap();
    for _ in 0..3 {
        lock.acquire(soon()).unwrap().release().unwrap();
    }
    lock.lock(&soon()).unwrap();
    let lost = lock.lost();
    world.take_away("x");
    hear(&lost);
    lock.wait(&soon()).unwrap();
    assert!(lock.try_acquire().unwrap().is_none());
    lock.release().unwrap();
    let guard = lock.acquire(soon()).unwrap();
    assert_eq!(lock.acquire(A_WHILE).unwrap_err().kind(), ErrorKind::TimedOut);
    drop(guard);
    manager.stop().unwrap();
    // Three guards, a claim with two terms and a loss, a failed try, and a guard that one waited for.
    let told = panicking.0.load(Ordering::SeqCst);
    assert!(told >= 9 + 5 + 2 + 3 + 4, "{told}");
}

/// Asks the manager and uses another lock whenever it is told of `x`.
#[derive(Debug, Default)]
struct Curious {
    manager: OnceLock<Weak<dyn SyncManager>>,
    asked: AtomicUsize,
}

impl Curious {
    fn ask(&self, key: &str) {
        let Some(manager) = self.manager.get().and_then(Weak::upgrade).filter(|_| key == "x") else { return };
        let snapshot = manager.snapshot();
        assert!(snapshot.claims.len() < 10, "{snapshot:?}");
        if let Ok(lock) = manager.lock("x") {
            assert_eq!(lock.key(), "x");
            let _ = (lock.is_held(), lock.term(), lock.last_loss(), lock.lost(), format!("{lock:?}"));
        }
        if let Ok(other) = manager.lock("other") {
            // Taken where another thread is told of something at this moment.
            let _ = other.try_acquire().map(|guard| guard.map(LockGuard::release));
        }
        self.asked.fetch_add(1, Ordering::SeqCst);
    }
}

impl Observer for Curious {
    fn attempt(&self, event: &Attempt<'_>) {
        self.ask(event.key);
    }
    fn failed(&self, event: &AttemptFailed<'_>) {
        self.ask(event.key);
    }
    fn acquired(&self, event: &Acquired<'_>) {
        self.ask(event.key);
    }
    fn released(&self, event: &Released<'_>) {
        self.ask(event.key);
    }
    fn lost(&self, event: &TermLost<'_>) {
        self.ask(event.key);
    }
    fn sessions(&self, _: &Sessions) {
        if let Some(manager) = self.manager.get().and_then(Weak::upgrade) {
            let _ = manager.snapshot();
        }
    }
    fn thread_waits(&self, event: &ThreadWaits<'_>) {
        self.ask(event.key);
    }
    fn thread_waited(&self, event: &ThreadWaited<'_>) {
        self.ask(event.key);
    }
}

fn an_observer_may_ask_the_manager_and_use_other_locks(world: &dyn World) {
    let curious = Arc::new(Curious::default());
    let manager = world.manager(Arc::clone(&curious) as Arc<dyn Observer>);
    curious.manager.set(Arc::downgrade(&manager)).unwrap();
    let lock = manager.lock("x").unwrap();
    // In threads, so that one that waits for itself is a failed test and not a hung one.
    let guards = [(); 2].map(|()| {
        let lock = Arc::clone(&lock);
        begin(move || (0..5).for_each(|_| lock.acquire(soon()).unwrap().release().unwrap()))
    });
    guards.into_iter().for_each(Outcome::get);
    wait_in_thread(&lock).get().unwrap();
    let lost = lock.lost();
    world.take_away("x");
    hear(&lost);
    wait_in_thread(&lock).get().unwrap();
    let stopping = Arc::clone(&manager);
    begin(move || stopping.stop()).get().unwrap();
    let asked = curious.asked.load(Ordering::SeqCst);
    assert!(asked >= 10 * 3 + 4, "{asked}");
}

/// Takes another lock when a supervisor tells it of its session: once, and tells what came of it.
struct Taking {
    manager: OnceLock<Weak<PostgresManager>>,
    has_taken: AtomicBool,
    tell: Sender<dsync::Result<()>>,
}

impl Observer for Taking {
    fn sessions(&self, _: &Sessions) {
        let is_supervisor = thread::current().name().is_some_and(|name| name.starts_with("dsync:"));
        let Some(manager) = self.manager.get().and_then(Weak::upgrade).filter(|_| is_supervisor) else {
            return;
        };
        if !self.has_taken.swap(true, Ordering::SeqCst) {
            // A caller with so little time leaves to the supervisor what it cannot end by itself.
            let guard = manager.lock("other").and_then(|lock| lock.acquire(Duration::from_secs(2)));
            let _ = self.tell.send(guard.and_then(LockGuard::release));
        }
    }
}

/// A supervisor that has given its session back is free for the next claim, also for one that comes from its own thread.
#[test]
fn an_observer_that_is_told_of_a_session_that_was_given_back_may_take_another_lock() {
    let database = Database::fresh().unwrap();
    let (tell, told) = bounded(1);
    let taking = Arc::new(Taking { manager: OnceLock::new(), has_taken: AtomicBool::new(false), tell });
    let config = Config::from_url(&database.url()).unwrap().observer(Arc::clone(&taking));
    let manager = Arc::new(started(config));
    taking.manager.set(Arc::downgrade(&manager)).unwrap();
    let lock = manager.lock("x").unwrap();
    let begun = Instant::now();
    // Where the machine is slow, not each claim follows close on the one before, and keeps its session.
    let outcome = loop {
        (0..5).for_each(|_| lock.acquire(soon()).unwrap().release().unwrap());
        if let Ok(outcome) = told.recv_timeout(Duration::from_millis(200)) {
            break outcome;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "no supervisor has told of its session, and taken the other lock"
        );
    };
    outcome.unwrap();
}

fn each_term_has_one_beginning_and_one_end_whatever_happens(world: &dyn World) {
    const AT_LEAST: Duration = Duration::from_secs(2);
    const TERMS: usize = 6;
    let both = [listened(world), listened(world)];
    let had = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let begun = Instant::now();
    let goes_on = || {
        let lacks = || had.iter().any(|terms| terms.load(Ordering::SeqCst) < TERMS);
        begun.elapsed() < AT_LEAST || begun.elapsed() < PATIENCE && lacks()
    };
    thread::scope(|scope| {
        for (number, (_, manager)) in both.iter().enumerate() {
            for guards in [true, false] {
                let (goes_on, had) = (&goes_on, &had[number]);
                scope.spawn(move || {
                    let lock = manager.lock("x").unwrap();
                    while goes_on() {
                        let patience = Duration::from_millis(fastrand::u64(0..30));
                        if guards {
                            let _ = lock.acquire(patience).map(|guard| {
                                had.fetch_add(1, Ordering::SeqCst);
                                thread::sleep(Duration::from_millis(fastrand::u64(0..3)));
                                guard.release()
                            });
                        } else {
                            if lock.lock(&Context::timeout(patience)).is_ok() {
                                had.fetch_add(1, Ordering::SeqCst);
                            }
                            thread::sleep(Duration::from_millis(fastrand::u64(0..3)));
                            let _ = lock.release();
                        }
                    }
                });
            }
            if number == 0 {
                scope.spawn(|| {
                    while goes_on() {
                        world.take_away("x");
                        thread::sleep(Duration::from_millis(fastrand::u64(0..40)));
                    }
                });
            }
        }
    });
    for (listener, manager) in &both {
        let _ = manager.stop();
        let (mut terms, mut losses) = (0, 0);
        for is_guard in [true, false] {
            let told = listener.of("x", is_guard);
            let mut is_held = false;
            for (at, event) in told.iter().enumerate() {
                match event {
                    Event::Acquired { .. } => {
                        assert!(!is_held, "two beginnings: {:?}", &told[..=at]);
                        (is_held, terms) = (true, terms + 1);
                    }
                    Event::Released { held } | Event::Lost { held, .. } => {
                        assert!(is_held && *held <= 2 * PATIENCE, "an end of nothing: {:?}", &told[..=at]);
                        (is_held, losses) = (false, losses + usize::from(event.name() == "lost"));
                    }
                    _ => {}
                }
            }
            assert!(!is_held, "a term without an end: {told:?}");
        }
        println!("{terms} terms, {losses} of them lost");
        assert!(terms >= TERMS, "{terms}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a snapshot shows
// ---------------------------------------------------------------------------------------------------------------------

fn a_snapshot_shows_claims_as_they_come_and_go(world: &dyn World) {
    let (_, manager) = listened(world);
    let snapshot = manager.snapshot();
    assert!(snapshot.is_running && snapshot.claims.is_empty(), "{snapshot:?}");
    let (_rival, taken) = rival(world);
    taken.lock(&soon()).unwrap();
    let held = manager.lock("held").unwrap().acquire(soon()).unwrap();
    let queueing = manager.lock("x").unwrap();
    assert_eq!(queueing.try_lock(&soon()).unwrap_err().kind(), ErrorKind::LockUnavailable);

    let snapshot = manager.snapshot();
    assert_eq!(snapshot.claims.iter().map(|claim| &*claim.key).collect::<Vec<_>>(), ["held", "x"]);
    let [of_guard, of_claim] = &snapshot.claims[..] else { panic!("{snapshot:?}") };
    assert_eq!((of_guard.state, of_guard.is_guard), (ClaimState::Held, true));
    assert!(of_guard.token.is_some() && of_guard.token == held.term().token(), "{snapshot:?}");
    assert_eq!((of_claim.state, of_claim.is_guard), (ClaimState::Queueing, false));
    assert_eq!((of_claim.token, of_claim.time_left), (None, None));
    let text = format!("{snapshot:?}");
    assert!(text.contains("Held, token: ") && !text.contains("last_loss"), "{text}");

    taken.release().unwrap();
    queueing.lock(&soon()).unwrap();
    let lost = queueing.lost();
    world.take_away("x");
    hear(&lost);
    queueing.wait(&soon()).unwrap();
    let snapshot = manager.snapshot();
    let claim = snapshot.claim("x").unwrap();
    assert_eq!(claim.last_loss.as_ref().map(|loss| loss.reason), Some(world.reason()), "{snapshot:?}");
    queueing.release().unwrap();
    held.release().unwrap();
    assert!(manager.snapshot().claims.is_empty(), "{:?}", manager.snapshot());
    manager.stop().unwrap();
    assert!(!manager.snapshot().is_running && manager.snapshot().sessions.is_none());
}

// ---------------------------------------------------------------------------------------------------------------------
// What only a server has
// ---------------------------------------------------------------------------------------------------------------------

#[test]
fn heartbeats_are_told_with_their_round_trip() {
    let (world, listener) = (Postgres::new(0), Arc::new(Listener::default()));
    let config = world.config().heartbeat(Duration::from_millis(50));
    let manager = PostgresManager::connect(config.observer(Arc::clone(&listener))).unwrap();
    let guard = manager.lock("x").unwrap().acquire(soon()).unwrap();
    let heartbeats = || {
        let told = listener.told.lock();
        let round_trips = told.iter().filter_map(|(key, is_guard, event)| match event {
            Event::Heartbeat(round_trip) if key == "x" && *is_guard => Some(*round_trip),
            _ => None,
        });
        round_trips.collect::<Vec<_>>()
    };
    eventually("three heartbeats", || heartbeats().len() >= 3);
    let left = manager.snapshot().claims[0].time_left.expect("it is held");
    assert!(left > Duration::from_secs(5) && left < Duration::from_secs(15), "{left:?}");
    guard.release().unwrap();
    for round_trip in heartbeats() {
        assert!(
            round_trip > Duration::from_micros(5) && round_trip < Duration::from_secs(4),
            "{round_trip:?}"
        );
    }
    let after = heartbeats().len();
    thread::sleep(A_WHILE);
    assert_eq!(heartbeats().len(), after, "no term, no heartbeat");
}

#[test]
fn sessions_are_told_whenever_their_number_changes() {
    let (world, listener) = (Postgres::new(0), Arc::new(Listener::default()));
    let config = world.config().max_sessions(3).observer(Arc::clone(&listener));
    let manager = PostgresManager::connect(config).unwrap();
    let in_use = || listener.sessions.lock().last().map(|sessions| (sessions.in_use, sessions.limit));
    // The session of claims that follow close on each other is kept for the next one for a moment.
    let lock = manager.lock("x").unwrap();
    (0..5).for_each(|_| lock.acquire(soon()).unwrap().release().unwrap());
    becomes("sessions in use", &Some((0, 3)), in_use);
    let guards: Vec<_> = (0..3).map(|key: i64| manager.lock(key).unwrap().acquire(soon()).unwrap()).collect();
    assert_eq!(in_use(), Some((3, 3)));
    assert_eq!(manager.snapshot().sessions.map(|sessions| sessions.in_use), Some(3));
    // A fourth one finds none.
    let refusal = manager.lock(4).unwrap().try_acquire().unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::PoolExhausted);
    let told = listener.told.lock().clone();
    assert!(told.contains(&("#4".to_owned(), true, Event::Trouble(ErrorKind::PoolExhausted))), "{told:?}");
    drop(guards);
    becomes("sessions in use", &Some((0, 3)), in_use);
    assert_eq!(manager.snapshot().sessions.map(|sessions| sessions.in_use), Some(0));
    let told = listener.sessions.lock().clone();
    assert!(told.windows(2).all(|two| two[0] != two[1]), "no number twice: {told:?}");
    // A look at the server takes one for a moment.
    manager.inspect("x").unwrap();
    becomes("sessions in use", &Some((0, 3)), in_use);
}

#[test]
fn a_server_that_is_away_is_told_of_at_each_attempt() {
    let server = support::Server::start().unwrap();
    let listener = Arc::new(Listener::default());
    let config = Config::from_url(&server.url()).unwrap().observer(Arc::clone(&listener));
    let manager = PostgresManager::connect(config).unwrap();
    let lock = manager.lock("x").unwrap();
    lock.lock(&soon()).unwrap();
    server.stop(support::Shutdown::Fast).unwrap();
    let troubles = || {
        let told = listener.told.lock();
        told.iter().filter(|(.., event)| *event == Event::Trouble(ErrorKind::SessionUnavailable)).count()
    };
    eventually("several attempts", || troubles() >= 3);
    let claim = manager.snapshot().claims[0].clone();
    assert_eq!(claim.state, ClaimState::Connecting);
    assert!(format!("{claim:?}").contains("last_error: \"session unavailable"), "{claim:?}");
    listener.told("x", false, &["attempt", "acquired", "lost"]);
    server.start_again().unwrap();
    lock.wait(&soon()).unwrap();
    assert!(manager.snapshot().claims[0].last_error.is_none());
    listener.told("x", false, &["attempt", "acquired", "lost", "acquired"]);
}

#[test]
fn a_holder_that_hears_nothing_tells_of_its_loss_while_the_server_stands_still() {
    let server = support::Server::start().unwrap();
    let listener = Arc::new(Listener::default());
    let config = Config::from_url(&server.url()).unwrap().lease(Duration::from_secs(2));
    let manager = PostgresManager::connect(config.observer(Arc::clone(&listener))).unwrap();
    let guard = manager.lock("x").unwrap().acquire(soon()).unwrap();
    let frozen = server.freeze().unwrap();
    hear(guard.lost());
    let told = listener.told("x", true, &["attempt", "acquired", "lost"]);
    let Event::Lost { held, reason: LossReason::HeartbeatTimedOut | LossReason::LeaseNotRenewed } = told[2]
    else {
        panic!("{told:?}")
    };
    assert!(held < Duration::from_secs(10), "{held:?}");
    // It takes no session and waits for none, which would be for the five seconds of a connect.
    let (snapshot, taken) = timed(|| manager.snapshot());
    assert!(taken < Duration::from_secs(3), "{taken:?}: {snapshot:?}");
    frozen.thaw();
}

#[test]
fn a_release_that_nobody_confirms_is_told_and_so_is_that() {
    let server = support::Server::start().unwrap();
    let listener = Arc::new(Listener::default());
    let config = Config::from_url(&server.url()).unwrap().release_timeout(Duration::from_millis(300));
    let manager = PostgresManager::connect(config.observer(Arc::clone(&listener))).unwrap();
    let guard = manager.lock("x").unwrap().acquire(soon()).unwrap();
    let frozen = server.freeze().unwrap();
    assert_eq!(guard.release().unwrap_err().kind(), ErrorKind::UnlockFailed);
    // When it returns, not when the server answers.
    let told: Vec<_> = listener.of("x", true).iter().map(Event::name).collect();
    assert_eq!(told, ["attempt", "acquired", "released"]);
    eventually("it is told that nobody confirmed it", || {
        listener.told.lock().iter().any(|(.., event)| *event == Event::Trouble(ErrorKind::UnlockFailed))
    });
    frozen.thaw();
}
