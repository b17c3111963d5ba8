//! What applications do to a shared session that no other test does: code of theirs that fails or takes its time, and many threads that want
//! the same few locks in every way at once.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use crossbeam_channel::Sender;
use dsync::observer::{Acquired, Observer, Sessions, TermLost};
use dsync::{CatalogMode, Context, ErrorKind, LockGuard, LockOptions, LossReason, Lost, Quorum};
use rustix::time::{ClockId, clock_gettime};
use support::process::{Signal, signal};
use support::{Database, Replication, Server};

use super::*;
use crate::common::{
    Bomb, Process, becomes, begin, eventually, kind, library_threads, process, role, wait_in_thread,
};

#[test]
fn a_logger_that_panics_costs_the_claims_of_that_moment_and_no_later_one() {
    Process::start(&mut process("edges::panicking", "panic")).succeeds();
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn panicking() {
    if role().as_deref() != Some("panic") {
        return;
    }
    let bomb = Bomb::set();
    let database = Database::fresh().unwrap();
    let operator = &mut database.client().unwrap();
    let manager = started(config(&database.url(), 1).release_timeout(Duration::from_secs(5)));
    for by_itself in [true, false].into_iter().cycle().take(10) {
        let other = lock(&manager, "other");
        other.lock(&soon()).unwrap();
        let lost = other.lost();
        bomb.arm(true);
        // On this thread if it waits without a limit and nobody else is at work; on the carrier's if it can be cancelled.
        let context = if by_itself { Context::background() } else { soon().with_cancel().0 };
        let outcome = catch_unwind(AssertUnwindSafe(|| lock(&manager, "x").acquire(context)));
        println!("{:?}", outcome.map(|outcome| outcome.map(drop)));
        common::hear(&lost);
        let _ = other.release();
        bomb.arm(false);
        lock(&manager, "x").acquire(soon()).unwrap().release().unwrap();
    }
    becomes("the locks", &0, || held(operator).0);
    manager.stop().unwrap();
}

#[test]
fn who_comes_in_with_another_whose_look_panics_is_not_left_waiting() {
    Process::start(&mut process("edges::panicking_at_the_inbox", "inbox")).succeeds();
}

/// Blocks at the news that the lock `slow` was acquired, and panics at those that the session was lost.
#[derive(Default)]
struct BlocksAndPanics {
    is_blocked: AtomicBool,
    goes_on: AtomicBool,
    has_panicked: AtomicBool,
}

impl log::Log for BlocksAndPanics {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        if text.contains("\"slow\": acquired") && !self.is_blocked.swap(true, SeqCst) {
            eventually("the end of the block", || self.goes_on.load(SeqCst));
        }
        if text.contains("a session was lost with all the locks") && !self.has_panicked.swap(true, SeqCst) {
            panic!("as it is meant to");
        }
    }

    fn flush(&self) {}
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn panicking_at_the_inbox() {
    if role().as_deref() != Some("inbox") {
        return;
    }
    let logger: &BlocksAndPanics = Box::leak(Box::default());
    log::set_logger(logger).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let database = Database::fresh().unwrap();
    let lease = Duration::from_secs(2);
    let manager = started(config(&database.url(), 1).lease(lease).release_timeout(Duration::from_secs(5)));
    let come = |key: &str, context: Context| {
        let (lock, claims) = (lock(&manager, key), manager.snapshot().claims.len());
        let came = begin(move || lock.lock(&context));
        eventually("the claim", || manager.snapshot().claims.len() > claims);
        came
    };
    let slow = lock(&manager, "slow");
    thread::spawn(move || slow.lock(&Context::background()));
    eventually("the block", || logger.is_blocked.load(SeqCst));
    // It wants an attempt at once, at which the engine sees that the lease is over.
    let hurried = lock(&manager, "hurried");
    let hurried = begin(move || hurried.try_lock(&Context::timeout(Duration::ZERO)));
    eventually("its claim", || manager.snapshot().claims.len() == 2);
    let others = ["x", "y", "z"].map(|key| come(key, Context::background()));
    thread::sleep(lease);
    logger.goes_on.store(true, SeqCst);
    // The panic may cost those that the engine had before it, which are told.
    let outcomes = others.map(|other| other.get());
    println!("{outcomes:?}");
    lock(&manager, "w").acquire(LONG).unwrap().release().unwrap();
    assert!(logger.has_panicked.load(SeqCst));
    // It tells of the claim that the panic has cost.
    let _ = (hurried, manager.stop());
}

/// Sees whether all losses are announced when it is told of the first, or that the session is gone.
#[derive(Default)]
struct LostFirst {
    lost: OnceLock<Vec<Lost>>,
    told: AtomicU64,
    early: AtomicU64,
}

impl LostFirst {
    fn look(&self) {
        if let Some(lost) = self.lost.get() {
            self.told.fetch_add(1, SeqCst);
            self.early.fetch_add(u64::from(lost.iter().any(common::is_open)), SeqCst);
        }
    }
}

impl Observer for LostFirst {
    fn sessions(&self, event: &Sessions) {
        if event.in_use == 0 {
            self.look();
        }
    }
    fn lost(&self, _: &TermLost<'_>) {
        self.look();
    }
}

#[test]
fn after_a_panic_all_losses_are_announced_before_the_session_is_closed() {
    Process::start(&mut process("edges::announcing", "announce")).succeeds();
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn announcing() {
    if role().as_deref() != Some("announce") {
        return;
    }
    let bomb = Bomb::set();
    let database = Database::fresh().unwrap();
    for by_itself in [true, false] {
        let observer = Arc::new(LostFirst::default());
        let told: Arc<dyn Observer> = observer.clone();
        let settings = config(&database.url(), 1).release_timeout(Duration::from_secs(5));
        let manager = started(settings.observer(told));
        let held = locks(&manager, 20);
        lock_all(&held);
        observer.lost.set(lost_channels(&held)).unwrap();
        bomb.arm(true);
        let context = if by_itself { Context::background() } else { soon().with_cancel().0 };
        drop(catch_unwind(AssertUnwindSafe(|| lock(&manager, "x").acquire(context))));
        observer.lost.get().unwrap().iter().for_each(common::hear);
        held.iter().for_each(|lock| drop(lock.release()));
        manager.stop().unwrap();
        let [told, early] = [&observer.told, &observer.early].map(|count| count.load(SeqCst));
        assert!(told > 20 && early == 0, "{told} events, {early} early");
    }
}

#[test]
fn a_valuer_and_an_observer_that_panic_cost_no_lock_where_the_logger_panics_at_that() {
    Process::start(&mut process("edges::panicking_twice", "panic twice")).succeeds();
}

/// Panics once.
#[derive(Default)]
struct PanicsOnce {
    acquired: AtomicU64,
}

impl Observer for PanicsOnce {
    fn acquired(&self, _: &Acquired<'_>) {
        assert!(self.acquired.fetch_add(1, SeqCst) > 0, "as it is meant to");
    }
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn panicking_twice() {
    if role().as_deref() != Some("panic twice") {
        return;
    }
    let bomb = Bomb::set_at("panicked");
    let database = Database::fresh().unwrap();
    for shared in [0, 1] {
        let observer = Arc::new(PanicsOnce::default());
        let told: Arc<dyn Observer> = observer.clone();
        let manager = started(config(&database.url(), shared).max_sessions(4).observer(told));
        bomb.arm(true);
        lock(&manager, "x").acquire(LONG).unwrap().release().unwrap();
        eventually("the bomb", || !bomb.is_armed());
        for number in 2..5 {
            lock(&manager, "x").acquire(LONG).unwrap().release().unwrap();
            becomes("what was told", &number, || observer.acquired.load(SeqCst));
        }
        bomb.arm(true);
        let options = LockOptions::new().valuer(Arc::new(|| panic!("as it is meant to")));
        let annotated = manager.lock_with("y", options).unwrap();
        let guard = annotated.acquire(soon().with_cancel().0).unwrap();
        assert!(!bomb.is_armed() && annotated.holder().unwrap().unwrap().annotation.is_none());
        guard.release().unwrap();
        manager.stop().unwrap();
    }
}

#[test]
fn a_logger_that_panics_while_the_session_is_given_back_leaves_the_locks_usable() {
    Process::start(&mut process("edges::giving_back", "give back")).succeeds();
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn giving_back() {
    if role().as_deref() != Some("give back") {
        return;
    }
    let bomb = Bomb::set_at("executing simple query");
    let database = Database::fresh().unwrap();
    let manager = started(config(&database.url(), 1));
    for _ in 0..3 {
        let guard = lock(&manager, "x").acquire(soon()).unwrap();
        guard.release().unwrap();
        bomb.arm(true);
        eventually("the bomb", || !bomb.is_armed());
    }
    lock(&manager, "x").acquire(soon()).unwrap().release().unwrap();
    becomes("the locks", &0, || held(&mut database.client().unwrap()).0);
    manager.stop().unwrap();
}

#[test]
fn a_call_ends_with_its_context_while_the_valuer_takes_its_time() {
    let database = Database::fresh().unwrap();
    let manager = sharing(&database.url(), 1);
    let (hold, held_up) = crossbeam_channel::bounded::<()>(0);
    let valuer = move || {
        let _ = held_up.recv();
        b"slow".to_vec()
    };
    let slow = manager.lock_with("slow", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    let times_out = begin({
        let slow = Arc::clone(&slow);
        move || slow.lock(&Context::timeout(Duration::from_millis(300)))
    });
    assert_eq!(kind(times_out.get_within(Duration::from_secs(10))), ErrorKind::TimedOut);
    let (context, cancel) = soon().with_cancel();
    let cancelled = begin({
        let slow = Arc::clone(&slow);
        move || slow.lock(&context)
    });
    thread::sleep(Duration::from_millis(50));
    cancel.cancel();
    assert_eq!(kind(cancelled.get_within(Duration::from_secs(10))), ErrorKind::Cancelled);
    drop(hold);
    slow.lock(&soon()).unwrap();
}

/// The first call asks the valuer, on its own thread. What the second one needs is not there before that returns.
#[test]
fn who_waits_while_another_call_asks_the_valuer_is_not_busy() {
    let database = Database::fresh().unwrap();
    let manager = sharing(&database.url(), 1);
    // So that there is a session.
    let _other = lock(&manager, "other").acquire(soon()).unwrap();
    let (hold, held_up) = crossbeam_channel::bounded::<()>(0);
    let (ask, is_asked) = crossbeam_channel::bounded(1);
    let valuer = move || {
        let _ = ask.try_send(());
        let _ = held_up.recv();
        b"slow".to_vec()
    };
    let slow = manager.lock_with("slow", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    let first = wait_in_thread(&slow);
    is_asked.recv_timeout(PATIENCE).unwrap();
    let second = begin(move || {
        slow.lock(&Context::background()).unwrap();
        Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap()
    });
    // In which it would be busy.
    thread::sleep(Duration::from_secs(1));
    drop(hold);
    first.get().unwrap();
    let at_work = second.get();
    assert!(at_work < Duration::from_millis(100), "{at_work:?} of 1 s");
}

/// The claim is over by then, and no thread runs that would look at it.
#[test]
fn a_valuer_that_returns_after_the_stop_keeps_nothing_of_the_manager() {
    let database = Database::fresh().unwrap();
    let manager = sharing(&database.url(), 1);
    let (hold, held_up) = crossbeam_channel::bounded::<()>(0);
    let (kept, gone) = crossbeam_channel::bounded::<()>(0);
    let valuer = move || {
        let (_, _) = (&kept, held_up.recv());
        b"slow".to_vec()
    };
    let slow = manager.lock_with("slow", LockOptions::new().valuer(Arc::new(valuer))).unwrap();
    assert_eq!(kind(slow.acquire(Duration::from_millis(200))), ErrorKind::TimedOut);
    manager.stop().unwrap();
    drop((slow, manager));
    drop(hold);
    assert_eq!(gone.recv_timeout(PATIENCE), Err(crossbeam_channel::RecvTimeoutError::Disconnected));
}

#[test]
fn a_session_is_back_in_the_pool_without_lease_name_and_lock() {
    let lease = Duration::from_secs(4);
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let manager = started(config(&server.url(), 1).lease(lease));
    lock(&manager, "x").lock(&soon()).unwrap();
    let pid = number(operator, "SELECT pid::int8 FROM dsync.locks WHERE key = 'x'");
    lock(&manager, "x").release().unwrap();
    eventually("the session's return", || sessions(&manager) == 0);
    becomes("the locks", &0, || advisory_locks(operator));
    let named = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE '%many locks%'";
    assert_eq!(number(operator, named), 0);
    let idle = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND application_name = 'dsync' AND state = 'idle'"
    );
    becomes("its session at rest", &1, || number(operator, &idle));
    thread::sleep(lease + Duration::from_secs(1));
    assert_eq!(number(operator, &idle), 1, "the server does not end it");
}

/// Without faults nothing is lost, whoever wants what.
struct Referee {
    writers: AtomicI64,
    readers: AtomicI64,
}

fn random_use(
    managers: &[PostgresManager],
    keys: &[String],
    referees: &HashMap<String, Referee>,
    end: Instant,
    counts: &[AtomicU64; 8],
) {
    let bounded = || Context::timeout(Duration::from_millis(fastrand::u64(0..2_000)));
    // On a busy machine those that are cut short have few successes, and the first one may take its time.
    let goes_on = || {
        let now = Instant::now();
        now < end || (now < end + PATIENCE && counts.iter().any(|count| count.load(SeqCst) == 0))
    };
    while goes_on() {
        let manager = &managers[fastrand::usize(..managers.len())];
        let key = &keys[fastrand::usize(..keys.len())];
        let referee = &referees[key];
        let hold = || thread::sleep(Duration::from_micros(fastrand::u64(0..3_000)));
        let writes = || {
            assert_eq!(referee.writers.fetch_add(1, SeqCst), 0, "two writers of {key}");
            assert_eq!(referee.readers.load(SeqCst), 0, "a reader beside a writer of {key}");
            hold();
            referee.writers.fetch_sub(1, SeqCst);
        };
        match fastrand::u8(0..8) {
            0 => {
                if let Ok(guard) = lock(manager, key).acquire(bounded()) {
                    writes();
                    assert!(guard.is_held(), "{key}: {:?}", guard.loss());
                    guard.release().unwrap();
                    counts[0].fetch_add(1, SeqCst);
                }
            }
            1 => {
                if let Some(guard) = lock(manager, key).try_acquire().unwrap() {
                    writes();
                    assert!(guard.is_held(), "{key}: {:?}", guard.loss());
                    guard.release().unwrap();
                    counts[1].fetch_add(1, SeqCst);
                }
            }
            2 => {
                let lock = manager.shared_lock(key.as_str()).unwrap();
                if let Ok(guard) = lock.acquire(bounded()) {
                    referee.readers.fetch_add(1, SeqCst);
                    assert_eq!(referee.writers.load(SeqCst), 0, "a writer beside a reader of {key}");
                    hold();
                    referee.readers.fetch_sub(1, SeqCst);
                    assert!(guard.is_held(), "{key}: {:?}", guard.loss());
                    guard.release().unwrap();
                    counts[2].fetch_add(1, SeqCst);
                }
            }
            3 => {
                let (context, cancel) = bounded().with_cancel();
                thread::scope(|scope| {
                    scope.spawn(move || {
                        thread::sleep(Duration::from_micros(fastrand::u64(0..20_000)));
                        cancel.cancel();
                    });
                    if let Ok(guard) = lock(manager, key).acquire(context) {
                        writes();
                        assert!(guard.is_held(), "{key}: {:?}", guard.loss());
                        guard.release().unwrap();
                        counts[3].fetch_add(1, SeqCst);
                    }
                });
            }
            4 => {
                // Many threads share the claim, so what it holds is everybody's.
                let lock = lock(manager, &format!("claim {key}"));
                let _ = lock.lock(&bounded());
                let _ = lock.try_lock(&bounded());
                lock.release().unwrap();
                counts[4].fetch_add(1, SeqCst);
            }
            5 => {
                let both = manager.multi_lock([key.as_str(), &keys[fastrand::usize(..keys.len())]]);
                let Ok(both) = both else { continue };
                if let Ok(guard) = both.acquire(bounded()) {
                    writes();
                    assert!(guard.is_held());
                    guard.release().unwrap();
                    counts[5].fetch_add(1, SeqCst);
                }
            }
            6 => {
                if let Ok(guard) = lock(manager, key).acquire(bounded()) {
                    writes();
                    drop(guard);
                    counts[6].fetch_add(1, SeqCst);
                }
            }
            _ => {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(async {
                    if let Ok(guard) = lock(manager, key).acquire(bounded()) {
                        writes();
                        assert!(guard.is_held(), "{key}: {:?}", guard.loss());
                        guard.release().unwrap();
                        counts[7].fetch_add(1, SeqCst);
                    }
                });
            }
        }
    }
}

fn storm(catalog: CatalogMode, time: Duration) {
    const THREADS: usize = 16;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let url = server.url();
    let managers = [
        started(config(&url, 1).catalog(catalog).lease(LONG)),
        started(config(&url, 3).catalog(catalog).lease(LONG)),
        started(config(&url, 19).shared_sessions(0).catalog(catalog).lease(LONG)),
    ];
    let keys: Vec<_> = (0..6).map(|number| format!("k{number}")).collect();
    let referee = || Referee { writers: AtomicI64::new(0), readers: AtomicI64::new(0) };
    let referees = keys.iter().map(|key| (key.clone(), referee())).collect();
    let counts: [AtomicU64; 8] = Default::default();
    let end = Instant::now() + time;
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| random_use(&managers, &keys, &referees, end, &counts));
        }
    });
    println!("{catalog:?}: {counts:?}");
    for manager in &managers {
        becomes("claims", &0, || manager.snapshot().claims.len());
        becomes("sessions", &0, || sessions(manager));
    }
    becomes("the locks", &0, || advisory_locks(operator));
    managers.iter().for_each(|manager| manager.stop().unwrap());
    assert!(counts.iter().all(|count| count.load(SeqCst) > 0));
}

fn storm_time() -> Duration {
    Duration::from_secs(std::env::var("STORM_SECONDS").map_or(5, |text| text.parse().unwrap()))
}

#[test]
fn whatever_is_wanted_at_once_without_faults_nothing_is_lost_nor_left_behind() {
    storm(CatalogMode::None, storm_time());
    storm(CatalogMode::Automatic, storm_time());
}

#[test]
fn locks_of_a_quorum_are_had_however_many_threads_want_them() {
    many_threads_want_locks_of_a_quorum(false);
}

#[test]
fn a_standby_that_is_late_costs_no_lock_however_many_threads_want_some() {
    many_threads_want_locks_of_a_quorum(true);
}

fn many_threads_want_locks_of_a_quorum(standby_is_late: bool) {
    let primary = Server::start().unwrap();
    let _standby = primary.standby(Replication::Synchronous).unwrap();
    let lease = Duration::from_secs(8);
    let manager = started(config(&primary.url(), 1).lease(lease).quorum(Quorum::NamedStandbys));
    let kept = lock(&manager, "kept");
    kept.lock(&soon()).unwrap();
    let lost = kept.lost();
    let had = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let end = Instant::now() + 2 * lease;
    let sender =
        primary.client().unwrap().query_one("SELECT pid FROM pg_stat_replication", &[]).unwrap().get(0);
    thread::scope(|scope| {
        let users: Vec<_> = (0..16)
            .map(|thread| {
                let (manager, had) = (&manager, &had);
                scope.spawn(move || {
                    let lock = lock(manager, &format!("of {thread}"));
                    while Instant::now() < end {
                        lock.acquire(soon()).unwrap().release().unwrap();
                        had.fetch_add(1, SeqCst);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while standby_is_late && !over.load(SeqCst) {
                signal(sender, Signal::Stop).unwrap();
                thread::sleep(Duration::from_millis(20));
                signal(sender, Signal::Continue).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        });
        users.into_iter().for_each(|user| user.join().unwrap());
        over.store(true, SeqCst);
    });
    println!("{} terms", had.load(SeqCst));
    assert!(common::is_open(&lost), "{:?}", kept.last_loss());
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn managers_that_were_stopped_or_dropped_leave_no_thread_descriptor_or_lock() {
    Process::start(&mut process("edges::leaving_nothing", "leave")).succeeds();
}

#[test]
#[ignore = "the body of a process, which another test starts"]
fn leaving_nothing() {
    if role().as_deref() != Some("leave") {
        return;
    }
    let server = Server::builder().max_connections(50).start().unwrap();
    let operator = &mut server.client().unwrap();
    let other = started(config(&server.url(), 1));
    let theirs: Vec<_> = (0..20).map(|number| lock(&other, &format!("taken {number}"))).collect();
    lock_all(&theirs);
    let theirs_are = library_threads();
    let mut before = 0;
    for round in 0..40 {
        let manager = started(config(&server.url(), 5));
        let mine = locks(&manager, 50);
        lock_all(&mine);
        let waits: Vec<_> = (0..20)
            .map(|number| common::wait_in_thread(&lock(&manager, &format!("taken {number}"))))
            .collect();
        let guard = lock(&manager, "guarded").acquire(LONG).unwrap();
        if round % 2 == 0 {
            eventually("the waits", || {
                in_state(&manager, ClaimState::Queueing) + in_state(&manager, ClaimState::TakingTurns) == 20
            });
        }
        if round % 4 < 2 {
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| manager.stop());
                }
            });
            assert_eq!(manager.stop().map_err(|error| error.kind()), Ok(()));
        }
        drop(manager);
        for wait in waits {
            assert_eq!(kind(wait.get()), ErrorKind::SyncManagerStopped);
        }
        assert!(mine.iter().all(|lock| !is_held(lock)) && !guard.is_held());
        drop((mine, guard));
        becomes("the locks", &(20 + 1), || held_of_all(operator));
        if round == 3 {
            becomes("threads", &theirs_are, library_threads);
            before = descriptors();
        }
    }
    becomes("threads", &theirs_are, library_threads);
    becomes("descriptors", &true, || descriptors() <= before + 2);
    other.stop().unwrap();
    becomes("threads", &0, || library_threads().len());
    becomes("the locks", &0, || advisory_locks(operator));
}

/// Advisory locks; the witness of a session counts once.
fn held_of_all(operator: &mut Client) -> i64 {
    number(operator, "SELECT count(DISTINCT (classid, objid)) FROM pg_locks WHERE locktype = 'advisory'")
}

#[test]
fn sessions_that_end_and_statements_that_are_cancelled_all_the_time_leave_nothing_and_hang_nobody() {
    for catalog in [CatalogMode::None, CatalogMode::Automatic] {
        let server = Server::start().unwrap();
        let url = server.url();
        let settings = |others| config(&url, others).release_timeout(Duration::from_secs(10));
        let of = |others| settings(others).catalog(catalog).lease(Duration::from_secs(4));
        let managers = [started(of(1)), started(of(4)), started(of(1).shared_sessions(2).max_sessions(4))];
        let over = AtomicBool::new(false);
        let end = Instant::now() + storm_time();
        let calls = AtomicU64::new(0);
        thread::scope(|scope| {
            let users: Vec<_> = (0..16)
                .map(|_| {
                    scope.spawn(|| {
                        while Instant::now() < end {
                            use_in_trouble(&managers, &calls)
                        }
                    })
                })
                .collect();
            scope.spawn(|| {
                let mut client = server.client().unwrap();
                while !over.load(SeqCst) {
                    let what = ["pg_terminate_backend", "pg_cancel_backend", "pg_cancel_backend"][fastrand::usize(..3)];
                    let query = format!(
                        "SELECT {what}(pid) FROM pg_stat_activity WHERE application_name LIKE 'dsync%' AND pid <> pg_backend_pid() \
                         ORDER BY random() LIMIT 1"
                    );
                    let _ = client.execute(&query, &[]);
                    thread::sleep(Duration::from_millis(fastrand::u64(1..150)));
                    if fastrand::u8(0..40) == 0 {
                        let frozen = server.freeze().unwrap();
                        thread::sleep(Duration::from_millis(fastrand::u64(1..5_000)));
                        drop(frozen);
                    }
                }
            });
            users.into_iter().for_each(|user| user.join().unwrap());
            over.store(true, SeqCst);
        });
        println!("{catalog:?}: {} calls", calls.load(SeqCst));
        for manager in &managers {
            becomes("claims", &Vec::new(), || {
                manager.snapshot().claims.into_iter().map(|claim| format!("{claim:?}")).collect()
            });
            becomes("sessions", &0, || sessions(manager));
        }
        // Everything works as ever.
        for manager in &managers {
            for number in 0..6 {
                lock(manager, &format!("k{number}")).acquire(soon()).unwrap().release().unwrap();
            }
        }
        managers.iter().for_each(|manager| manager.stop().unwrap());
        let operator = &mut server.client().unwrap();
        becomes("the locks", &0, || advisory_locks(operator));
    }
}

fn use_in_trouble(managers: &[PostgresManager], calls: &AtomicU64) {
    let patience = Duration::from_millis(fastrand::u64(0..1_000));
    let context = match fastrand::bool() {
        true => Context::timeout(patience),
        false => {
            let (context, cancel) = Context::background().with_cancel();
            thread::spawn(move || {
                thread::sleep(patience);
                cancel.cancel();
            });
            context
        }
    };
    let manager = &managers[fastrand::usize(..managers.len())];
    let key = format!("k{}", fastrand::u8(0..6));
    let begun = Instant::now();
    let hold = || thread::sleep(Duration::from_micros(fastrand::u64(0..5_000)));
    let what = fastrand::u8(0..5);
    match what {
        0 => {
            if let Ok(guard) = lock(manager, &key).acquire(context) {
                hold();
                let _ = guard.release();
            }
        }
        1 => {
            if let Ok(Some(guard)) = lock(manager, &key).try_acquire() {
                hold();
                drop(guard);
            }
        }
        2 => {
            if let Ok(guard) = manager.shared_lock(key.as_str()).unwrap().acquire(context) {
                hold();
                let _ = guard.release();
            }
        }
        3 => {
            let lock = lock(manager, &format!("claim {key}"));
            let _ = lock.lock(&context);
            let _ = lock.try_lock(&context);
            hold();
            let _ = lock.release();
        }
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let lock = lock(manager, &format!("claim {key}"));
                let _ = lock.lock(&context);
                let _ = lock.release();
            });
        }
    }
    let took = begun.elapsed();
    // A release takes 10 s at the most, and an attempt the time to connect.
    assert!(took < Duration::from_secs(40), "{what} took {took:?}");
    calls.fetch_add(1, SeqCst);
}

/// The URL of the same database with a round trip of 10 ms.
pub(crate) fn by_a_slow_way(url: &str) -> String {
    let host = url.rsplit_once('/').unwrap().0.rsplit_once('@').unwrap().1.to_owned();
    let port = slow_way(host.clone(), Duration::from_millis(5));
    url.replace(&host, &format!("127.0.0.1:{port}"))
}

/// For so long, all of them stay as they are.
pub(crate) fn none_is_lost(locks: &[Arc<dyn Lock>], lost: &[Lost], time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        if let Some(number) = lost.iter().position(|lost| !common::is_open(lost)) {
            panic!("{number} was lost: {:?}", locks[number].last_loss());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A way to the server on which each message takes its time.
fn slow_way(to: String, delay: Duration) -> u16 {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
        let mut bytes = [0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            thread::sleep(delay);
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let server = TcpStream::connect(&to).unwrap();
            server.set_nodelay(true).unwrap();
            client.set_nodelay(true).unwrap();
            let (client2, server2) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || pass(client, server, delay));
            thread::spawn(move || pass(server2, client2, delay));
        }
    });
    port
}

#[test]
fn many_keys_that_the_database_cannot_write_cost_no_lock_on_a_slow_way() {
    const BAD: usize = 300;
    let server = Server::start().unwrap();
    server
        .client()
        .unwrap()
        .batch_execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
        .unwrap();
    let url = server.url();
    let url = by_a_slow_way(&format!("{}/latin", url.rsplit_once('/').unwrap().0));
    let manager = started(config(&url, 1).lease(Duration::from_secs(6)));
    let locks = locks(&manager, 10);
    lock_all(&locks);
    let lost = lost_channels(&locks);
    let (context, cancel) = soon().with_cancel();
    let bad: Vec<_> = (0..BAD)
        .map(|number| {
            let (lock, context) = (lock(&manager, &format!("鍵 {number}")), context.clone());
            begin(move || lock.lock(&context))
        })
        .collect();
    none_is_lost(&locks, &lost, Duration::from_secs(8));
    let begun = Instant::now();
    lock(&manager, "another").acquire(LONG).unwrap().release().unwrap();
    println!("another lock beside {BAD} bad ones after {:?}", begun.elapsed());
    cancel.cancel();
    bad.into_iter().for_each(|outcome| assert!(outcome.get().is_err()));
    assert!(locks.iter().all(is_held));
}

#[test]
fn behind_a_pooler_that_keeps_sessions_locks_are_shared_and_behind_another_one_none_is_had() {
    use support::pgbouncer::{self, PoolMode};
    if support::skip_without(pgbouncer::available()) {
        return;
    }
    let server = Server::start().unwrap();
    let bouncer = pgbouncer::start(&server, PoolMode::Session).unwrap();
    let manager = started(config(&bouncer.url("postgres"), 1).catalog(CatalogMode::None));
    let locks = locks(&manager, 50);
    lock_all(&locks);
    locks.iter().for_each(|lock| lock.release().unwrap());
    manager.stop().unwrap();
    becomes("the locks", &0, || advisory_locks(&mut server.client().unwrap()));
    let bouncer = pgbouncer::start(&server, PoolMode::Transaction).unwrap();
    let manager = PostgresManager::new(config(&bouncer.url("postgres"), 1)).unwrap();
    assert_eq!(kind(manager.start()), ErrorKind::FailedInitialization);
}

#[test]
fn a_claim_that_waits_for_a_connection_ends_at_once_whichever_thread_ends_it() {
    let host = common::SilentHost::new();
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", host.port());
    let settings =
        config(&url, 1).connect_timeout(Duration::from_secs(30)).release_timeout(Duration::from_secs(20));
    let manager = Arc::new(PostgresManager::new(settings).unwrap());
    let starts = begin({
        let manager = Arc::clone(&manager);
        move || manager.start()
    });
    for is_async in [false, true] {
        let lock = loop {
            let lock = lock(&manager, "x");
            match lock.lock(&Context::timeout(Duration::from_millis(200))) {
                Err(error) if error.kind() == ErrorKind::TimedOut => break lock,
                outcome => println!("{outcome:?}"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        let begun = Instant::now();
        let outcome = match is_async {
            true => tokio::runtime::Builder::new_current_thread()
                .build()
                .unwrap()
                .block_on(async { lock.release() }),
            false => lock.release(),
        };
        println!("async {is_async}: {outcome:?} after {:?}", begun.elapsed());
        outcome.unwrap();
        within(begun, Duration::from_secs(10));
    }
    manager.stop().unwrap();
    let _ = starts.get();
}

#[test]
fn threads_that_ask_all_the_time_for_what_is_taken_keep_no_heartbeat_away() {
    let database = Database::fresh().unwrap();
    let theirs = started(Config::from_url(&database.url()).unwrap().lease(LONG));
    let taken: Vec<_> = (0..16).map(|number| lock(&theirs, &format!("taken {number}"))).collect();
    lock_all(&taken);
    let manager =
        started(config(&database.url(), 1).catalog(CatalogMode::None).lease(Duration::from_secs(8)));
    let kept = lock(&manager, "kept");
    kept.lock(&soon()).unwrap();
    let lost = kept.lost();
    let end = Instant::now() + Duration::from_secs(10);
    let asked = AtomicU64::new(0);
    thread::scope(|scope| {
        for theirs in &taken {
            let (manager, asked) = (&manager, &asked);
            scope.spawn(move || {
                while Instant::now() < end {
                    assert!(lock(manager, theirs.key()).try_acquire().unwrap().is_none());
                    asked.fetch_add(1, SeqCst);
                }
            });
        }
    });
    println!("{} attempts", asked.load(SeqCst));
    assert!(common::is_open(&lost), "{:?}", kept.last_loss());
}

#[test]
fn a_server_that_refuses_rows_costs_no_lock_that_is_held_and_takes_those_back_that_are_released() {
    const COUNT: usize = 100;
    let server = Server::start().unwrap();
    let operator = &mut server.client().unwrap();
    let lease = Duration::from_secs(8);
    let manager = started(config(&server.url(), 1).lease(lease));
    let held = locks(&manager, COUNT);
    lock_all(&held);
    let lost = lost_channels(&held);
    operator
        .batch_execute(
            "ALTER TABLE dsync.lock ADD CONSTRAINT refused CHECK (key NOT LIKE 'wanted%') NOT VALID",
        )
        .unwrap();
    let wanted: Vec<_> = (0..COUNT).map(|number| lock(&manager, &format!("wanted {number}"))).collect();
    let waits: Vec<_> = wanted.iter().map(common::wait_in_thread).collect();
    held[..COUNT / 2].iter().for_each(|lock| lock.release().unwrap());
    thread::sleep(lease + Duration::from_secs(1));
    assert!(lost[COUNT / 2..].iter().all(common::is_open), "{:?}", held[COUNT - 1].last_loss());
    becomes("the locks", &(COUNT as i64 / 2 + 1), || held_of_all(operator));
    operator.batch_execute("ALTER TABLE dsync.lock DROP CONSTRAINT refused").unwrap();
    waits.into_iter().for_each(|wait| wait.get().unwrap());
    assert!(lost[COUNT / 2..].iter().all(common::is_open));
}

/// Uses another lock of the manager when the last session has been given back, and tells of it.
struct UsesALock {
    manager: OnceLock<Weak<PostgresManager>>,
    used: Sender<bool>,
}

impl Observer for UsesALock {
    fn sessions(&self, event: &Sessions) {
        if let Some(manager) = self.manager.get().and_then(Weak::upgrade)
            && event.in_use == 0
        {
            let taken = lock(&manager, "other").try_acquire();
            let _ = self.used.try_send(matches!(taken, Ok(Some(_))));
        }
    }
}

/// The carrier's thread tells of it, which has nothing else to do any more.
#[test]
fn an_observer_may_use_a_lock_when_it_is_told_that_the_session_was_given_back() {
    let database = Database::fresh().unwrap();
    let (used, is_used) = crossbeam_channel::bounded(1);
    let observer = Arc::new(UsesALock { manager: OnceLock::new(), used });
    let told: Arc<dyn Observer> = observer.clone();
    let manager = Arc::new(started(config(&database.url(), 1).observer(told)));
    observer.manager.set(Arc::downgrade(&manager)).unwrap();
    lock(&manager, "x").acquire(soon()).unwrap().release().unwrap();
    assert!(is_used.recv_timeout(common::PATIENCE).expect("the observer waits for itself"));
    begin(move || manager.stop()).get().unwrap();
}

/// Of a writer on the same session no server need be asked, and no session taken.
#[test]
fn a_reader_beside_a_writer_of_its_process_is_told_so_without_a_session() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database.url(), 1));
    let (writer, reader) = (lock(&manager, "x"), manager.shared_lock("x").unwrap());
    let writing = writer.acquire(soon()).unwrap();
    for _ in 0..10 {
        let tried = begin({
            let reader = Arc::clone(&reader);
            move || reader.try_acquire().map(|guard| guard.is_none())
        });
        assert!(tried.get().unwrap());
        assert_eq!(manager.snapshot().sessions.unwrap().in_use, 1);
    }
    writing.release().unwrap();
    // Each further reader of one lock has a session of its own, if there is one left.
    let narrow = started(config(&database.url(), 1).max_sessions(2));
    let reader = narrow.shared_lock("x").unwrap();
    let reading = [(); 2].map(|()| reader.acquire(soon()).unwrap());
    for claim in [false, true] {
        let reader = Arc::clone(&reader);
        let tries = move || if claim { reader.try_lock(&soon()) } else { reader.try_acquire().map(drop) };
        assert_eq!(kind(begin(tries).get()), ErrorKind::PoolExhausted, "a claim: {claim}");
    }
    reader.release().unwrap();
    let [one, other] = reading;
    other.release().unwrap();
    // At once again and again, on the session that rests with the thread of the one before.
    for _ in 0..20 {
        reader.try_acquire().unwrap().unwrap().release().unwrap();
    }
    one.release().unwrap();
}

/// Takes a lock whose end is told, when the session has been given back, and keeps it.
#[derive(Default)]
struct KeepsALock {
    manager: OnceLock<Weak<PostgresManager>>,
    kept: Mutex<Option<LockGuard>>,
}

impl Observer for KeepsALock {
    fn sessions(&self, event: &Sessions) {
        let Some(manager) = self.manager.get().and_then(Weak::upgrade) else { return };
        if event.in_use == 0 && self.kept.lock().unwrap().is_none() {
            let options = LockOptions::new().grace(Duration::from_secs(2));
            let taken = manager.lock_with("kept", options).and_then(|kept| kept.acquire(soon()));
            *self.kept.lock().unwrap() = taken.ok();
        }
    }
}

/// The watchdog goes on to look at what comes after a session that was given back.
#[test]
fn who_comes_while_the_session_is_given_back_is_warned_of_the_end_of_its_term() {
    let server = Server::start().unwrap();
    let observer = Arc::new(KeepsALock::default());
    let told: Arc<dyn Observer> = observer.clone();
    let manager = Arc::new(started(config(&server.url(), 1).lease(Duration::from_secs(8)).observer(told)));
    observer.manager.set(Arc::downgrade(&manager)).unwrap();
    lock(&manager, "x").acquire(soon()).unwrap().release().unwrap();
    eventually("the lock", || observer.kept.lock().unwrap().is_some());
    let term = observer.kept.lock().unwrap().as_ref().unwrap().term().clone();
    let frozen = server.freeze().unwrap();
    let warned = term.warned().recv_timeout(common::PATIENCE);
    assert!(warned.is_err_and(|error| error.is_disconnected()) && term.is_held(), "the term is over");
    common::hear(term.lost());
    drop(frozen);
    drop(observer.kept.lock().unwrap().take());
    begin(move || manager.stop()).get().unwrap();
}

/// A grant shows that its own lock is held, and nothing of the others.
#[test]
fn a_lock_that_something_else_unlocked_is_lost_though_others_are_granted_all_the_time() {
    let database = Database::fresh().unwrap();
    let manager = started(config(&database.url(), 1).heartbeat(Duration::from_millis(500)));
    let kept = lock(&manager, "kept");
    kept.lock(&soon()).unwrap();
    let lost = kept.lost();
    database
        .client()
        .unwrap()
        .batch_execute(
            "CREATE FUNCTION public.unlock() RETURNS trigger LANGUAGE plpgsql
                 AS 'BEGIN PERFORM pg_advisory_unlock_all(); RETURN NULL; END';
             CREATE TRIGGER unlocks AFTER INSERT OR UPDATE ON dsync.lock
                 FOR EACH ROW WHEN (NEW.key = 'unlocks') EXECUTE FUNCTION public.unlock()",
        )
        .unwrap();
    let is_over = AtomicBool::new(false);
    let grants = || {
        let mut granted = 0;
        while !is_over.load(SeqCst) {
            // Not one that is held while all are unlocked.
            granted += u32::from(lock(&manager, "busy").acquire(soon()).is_ok_and(|it| it.release().is_ok()));
        }
        granted
    };
    let (heard, granted) = thread::scope(|scope| {
        let granted = scope.spawn(grants);
        println!("{:?}", lock(&manager, "unlocks").acquire(soon()).and_then(LockGuard::release));
        let heard = lost.recv_timeout(common::PATIENCE);
        is_over.store(true, SeqCst);
        (heard, granted.join().unwrap())
    });
    println!("{granted} grants");
    assert!(granted > 0 && heard.is_err_and(|error| error.is_disconnected()), "the lost channel closes");
    assert_eq!(kept.last_loss().unwrap().reason, LossReason::Unlocked);
}
