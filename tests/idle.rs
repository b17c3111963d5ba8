//! Supervisors rest between claims, whatever the keys: none is started where one is free, and none stays that nobody needs.

#![allow(
    clippy::unwrap_used,
    reason = "all of this is test code, in which a panic is the report of a failure"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::{Lateness, PATIENCE, becomes, begin, eventually, lock, soon, started};
use dsync::{CatalogMode, Config, Context, ErrorKind, PostgresManager, SyncManager};
use support::{Database, Server, process};

/// For how long a supervisor rests, and then leaves.
const LINGER: Duration = Duration::from_secs(1);

/// The tests count what their process has, so they take turns.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    becomes("what other tests have left", &0, || supervisors().len());
    turn
}

/// The supervisors of this process, by the number of the thread, and what they are called.
fn supervisors() -> BTreeMap<String, String> {
    let tasks = fs::read_dir("/proc/self/task").expect("this system tells of its processes");
    tasks
        .filter_map(|task| {
            let task = task.ok()?;
            // A thread may end between the two.
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            let thread = task.file_name().into_string().ok()?;
            name.starts_with("dsync:").then(|| (thread, name.trim_end().to_owned()))
        })
        .collect()
}

fn claim_and_release(manager: &PostgresManager, key: &str) {
    let lock = lock(manager, key);
    lock.lock(&soon()).unwrap();
    lock.release().unwrap();
}

#[test]
fn one_supervisor_serves_a_hundred_keys_and_is_called_after_each_and_leaves() {
    let _alone = alone();
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE));
    // What there is of a manager that is not at work. A supervisor that has yet to take its name is not counted, so its end is
    // awaited from when it has.
    let first = lock(&manager, "key");
    first.lock(&soon()).unwrap();
    becomes("the supervisors", &1, || supervisors().len());
    first.release().unwrap();
    becomes("the supervisors", &0, || supervisors().len());
    let descriptors = || process::descriptors(process::own());
    let before = descriptors();

    let (mut one, mut anew) = (None, 0);
    let mut released = Instant::now();
    for number in 0..100 {
        let lock = lock(&manager, &format!("key {number}"));
        lock.lock(&soon()).unwrap();
        if released.elapsed() >= LINGER {
            // The machine was so busy that the one before may have left.
            (one, anew) = (None, anew + 1);
        }
        // One that has just been started has yet to take its name.
        becomes("the supervisors", &1, || supervisors().len());
        becomes("its name", &vec![format!("dsync:key {number}")], || {
            supervisors().into_values().collect::<Vec<_>>()
        });
        let thread = supervisors().into_keys().collect::<Vec<_>>();
        assert_eq!(&thread, one.get_or_insert_with(|| thread.clone()), "key {number}");
        // One session serves them all, with lease and name of the lock that it has.
        let sessions = "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()
                        AND application_name LIKE 'dsync%' AND application_name <> 'dsync-test-support'";
        let names: Vec<String> =
            operator.query(sessions, &[]).unwrap().iter().map(|row| row.get(0)).collect();
        assert_eq!(names, [format!("dsync key {number}")]);
        released = Instant::now();
        lock.release().unwrap();
    }
    let rests = format!("{manager:?}");
    assert!(rests.contains("idle_supervisors: 1,") || released.elapsed() >= LINGER, "{rests}");
    assert!(anew < 50, "{anew} claims came too late for it");

    let begun = Instant::now();
    becomes("the supervisors", &0, || supervisors().len());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    becomes("the descriptors", &before, descriptors);
    assert!(format!("{manager:?}").contains("idle_supervisors: 0,"), "it is remembered: {manager:?}");
    claim_and_release(&manager, "key");
}

/// How often the supervisors of this process have gone to sleep.
fn sleeps() -> usize {
    let asleep = |thread: &String| -> usize {
        let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.expect("this system tells how often a thread slept").trim().parse().unwrap()
    };
    supervisors().keys().map(asleep).sum()
}

#[test]
fn a_supervisor_sleeps_on_while_a_lock_is_taken_and_given_back_many_times() {
    const PAIRS: usize = 2_000;
    let _alone = alone();
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE));
    (0..10).for_each(|_| claim_and_release(&manager, "key"));
    let (before, begun) = (sleeps(), Instant::now());
    (0..PAIRS).for_each(|_| claim_and_release(&manager, "key"));
    // One that has rested for a second leaves, and the next one has slept less often.
    let sleeps = sleeps().saturating_sub(before);
    let took = begun.elapsed();
    // It looks up once in 20 ms, which is two sleeps.
    let looks = usize::try_from(took.as_millis()).unwrap() / 5;
    assert!(sleeps < PAIRS / 5 + looks, "{sleeps} times in {PAIRS} pairs, which took {took:?}");
}

#[test]
fn claims_at_one_time_have_a_supervisor_each() {
    let _alone = alone();
    let database = Database::fresh().unwrap();
    let manager = started(Config::from_url(&database.url()).unwrap().release_timeout(PATIENCE));
    let names = || supervisors().into_values().collect::<std::collections::BTreeSet<_>>();
    let named = |keys: &[&str]| keys.iter().map(|key| format!("dsync:{key}")).collect();
    let (red, green) = (lock(&manager, "red"), lock(&manager, "green"));
    let (blue, white) = (lock(&manager, "blue"), lock(&manager, "white"));
    // Whether nobody may have left, since it was over before anybody had rested for so long.
    let go_on = || {
        becomes("the supervisors", &0, || supervisors().len());
        red.lock(&soon()).unwrap();
        green.lock(&soon()).unwrap();
        becomes("the names", &named(&["red", "green"]), names);
        let both = supervisors();
        assert_eq!(both.len(), 2);
        let begun = Instant::now();
        red.release().unwrap();
        green.release().unwrap();

        // Both go on, each with the key that it has served, though another one has rested for a shorter time.
        red.lock(&soon()).unwrap();
        green.lock(&soon()).unwrap();
        let again = supervisors();
        red.release().unwrap();
        green.release().unwrap();
        // And with others.
        blue.lock(&soon()).unwrap();
        white.lock(&soon()).unwrap();
        becomes("the names", &named(&["blue", "white"]), names);
        let (others, at_work) = (supervisors(), format!("{manager:?}"));
        let was_quick = begun.elapsed() < LINGER;
        blue.release().unwrap();
        white.release().unwrap();
        if was_quick {
            assert_eq!(again, both);
            assert!(others.into_keys().eq(both.into_keys()));
            assert!(at_work.contains("idle_supervisors: 0,"), "{at_work}");
        }
        was_quick
    };
    assert!((0..20).any(|_| go_on()), "the claims never followed on each other within {LINGER:?}");
}

#[test]
fn a_stop_lets_those_go_that_rest() {
    let _alone = alone();
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let mut sessions = || -> i64 {
        let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                     AND application_name LIKE 'dsync%' AND application_name <> 'dsync-test-support'";
        operator.query_one(query, &[]).unwrap().get(0)
    };
    let manager = started(Config::from_url(&database.url()).unwrap());
    let locks = ["red", "green", "blue"].map(|key| lock(&manager, key));
    let held = lock(&manager, "held");
    // On a busy machine they may have rested for so long that they have left.
    eventually("two that rest beside one at work", || {
        // Twice, so that the sessions stay with the supervisors.
        for _ in 0..2 {
            locks.iter().for_each(|lock| lock.lock(&soon()).unwrap());
            locks.iter().for_each(|lock| lock.release().unwrap());
        }
        held.lock(&soon()).unwrap();
        supervisors().len() == 3 || {
            held.release().unwrap();
            false
        }
    });
    let (late, begun) = (Lateness::watch(), Instant::now());
    manager.stop().unwrap();
    becomes("the supervisors", &0, || supervisors().len());
    late.allow(begun.elapsed(), Duration::from_millis(400));
    becomes("the sessions", &0, &mut sessions);
    late.allow(begun.elapsed(), Duration::from_millis(400));
    assert!(format!("{manager:?}").contains("idle_supervisors: 0,"), "{manager:?}");
    assert_eq!(held.lock(&soon()).unwrap_err().kind(), ErrorKind::SyncManagerStopped);
    assert_eq!(supervisors().len(), 0);
}

/// About 20 ms after a claim that followed close on another one, the supervisor takes the lease off the session that it
/// has kept, in case nobody comes. Whoever comes just then must not be left waiting until it looks again.
#[test]
fn a_claim_is_served_at_once_while_the_supervisor_puts_a_session_away() {
    let _alone = alone();
    let database = Database::fresh().unwrap();
    for catalog in [CatalogMode::None, CatalogMode::Automatic] {
        let manager = started(Config::from_url(&database.url()).unwrap().catalog(catalog));
        let late = Lateness::watch();
        let mut longest = Duration::ZERO;
        for round in 0_u32..150 {
            for key in ["red", "green"] {
                claim_and_release(&manager, key);
            }
            // Not to wait for something, but to hit it: it is a fraction of a millisecond long.
            let pause = Duration::from_micros(18_500 + u64::from(round * 37 % 4_000));
            thread::sleep(pause.saturating_sub(Duration::from_millis(1)));
            let begun = Instant::now();
            claim_and_release(&manager, "blue");
            longest = longest.max(begun.elapsed());
        }
        println!("{catalog:?}: {longest:?} at the most");
        late.allow(longest, Duration::from_millis(500));
    }
}

/// The supervisor looks after a release that takes its time, and may do so for long; but the session that the release leaves
/// behind keeps lease and name for a moment only.
#[test]
fn a_session_is_put_away_soon_after_a_slow_release() {
    let _alone = alone();
    let database = Database::fresh().unwrap();
    let mut operator = database.client().unwrap();
    let url = format!("{}?application_name=keeper", database.url());
    let config = Config::from_url(&url).unwrap().release_timeout(Duration::from_secs(30));
    let manager = started(config.catalog(CatalogMode::None));
    let mut kept = 0;
    // Where the machine is slow, not each claim follows close on the one before.
    for _ in 0..500 {
        if kept == 10 {
            break;
        }
        claim_and_release(&manager, "red");
        let lock = lock(&manager, "red");
        lock.lock(&soon()).unwrap();
        let query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'keeper red'";
        let backend: i32 = operator.query_one(query, &[]).unwrap().get(0);
        process::signal(backend, process::Signal::Stop).unwrap();
        let releasing = thread::spawn(move || lock.release());
        // Not to wait for something: it is what the release takes.
        thread::sleep(Duration::from_millis(10));
        process::signal(backend, process::Signal::Continue).unwrap();
        releasing.join().unwrap().unwrap();
        let name = "SELECT application_name FROM pg_stat_activity WHERE pid = $1";
        let mut name = || operator.query_opt(name, &[&backend]).unwrap().map(|row| row.get::<_, String>(0));
        kept += usize::from(name().as_deref() == Some("keeper red"));
        let begun = Instant::now();
        becomes("the session at rest", &Some("keeper".to_owned()), name);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    assert_eq!(kept, 10, "the claims were never quick enough for their sessions to be kept");
}

const KEYS: [&str; 3] = ["red", "green", "blue"];

/// What is known of the exclusion without the library: whether somebody is inside.
#[derive(Default)]
struct Rooms {
    taken: [AtomicBool; KEYS.len()],
    visits: AtomicUsize,
}

impl Rooms {
    fn visit(&self, index: usize) {
        assert!(!self.taken[index].swap(true, Ordering::SeqCst), "another one is inside {}", KEYS[index]);
        thread::yield_now();
        assert!(self.taken[index].swap(false, Ordering::SeqCst));
        self.visits.fetch_add(1, Ordering::SeqCst);
    }
}

/// A service, with the mutexes by which its threads take turns: one manager's threads share its claims.
struct Service {
    manager: PostgresManager,
    seats: [Mutex<()>; KEYS.len()],
}

impl Service {
    fn start(database: &Database<'_>) -> Arc<Self> {
        let config = Config::from_url(&database.url()).unwrap().wait_slice(Duration::from_millis(20));
        let manager = started(config.max_sessions(8).release_timeout(PATIENCE));
        Arc::new(Self { manager, seats: Default::default() })
    }

    /// One claim, with a handle of its own; `false` if the manager has stopped.
    fn visit(&self, rooms: &Rooms, seed: &mut u64) -> bool {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let lot = usize::try_from(*seed >> 40).unwrap();
        let index = lot % KEYS.len();
        let _seat = self.seats[index].lock().unwrap();
        // Some have no patience, and some can be called off, so that all kinds of threads do the work.
        let context = match lot / KEYS.len() % 8 {
            0 => Context::timeout(Duration::from_millis(2)),
            1 => soon().with_cancel().0,
            _ => soon(),
        };
        let outcome =
            self.manager.lock(KEYS[index]).and_then(|lock| lock.acquire(&context)).and_then(|guard| {
                let lost = guard.term().lost().clone();
                // With a stop the term is over before the visit is, and another service may come in.
                if common::is_open(&lost) {
                    rooms.visit(index);
                }
                guard.release()
            });
        match outcome.map_err(|error| error.kind()) {
            Ok(()) | Err(ErrorKind::TimedOut) => true,
            // The stop came before the call, or before the release.
            Err(ErrorKind::SyncManagerStopped | ErrorKind::Lost) => false,
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn many_threads_share_few_supervisors_and_few_locks() {
    const THREADS: u64 = 6;
    const CLAIMS: usize = 250;
    let _alone = alone();
    let server = Server::builder().max_connections(100).start().unwrap();
    let database = server.database().unwrap();
    let rooms = Arc::new(Rooms::default());
    let services = [(); 2].map(|()| Service::start(&database));
    let workers: Vec<_> = services
        .iter()
        .enumerate()
        .flat_map(|(number, service)| {
            (0..THREADS).map(move |thread| (number as u64 * THREADS + thread, service))
        })
        .map(|(mut seed, service)| {
            let (service, rooms) = (Arc::clone(service), Arc::clone(&rooms));
            begin(move || (0..CLAIMS).all(|_| service.visit(&rooms, &mut seed)))
        })
        .collect();
    for worker in workers {
        assert!(worker.get_within(PATIENCE * 2), "nobody has stopped it");
    }
    println!("{} visits", rooms.visits.load(Ordering::SeqCst));
    services.iter().for_each(|service| service.manager.stop().unwrap());
    drop(services);
    becomes("the supervisors", &0, || supervisors().len());
}

#[test]
fn a_stop_in_the_midst_ends_all_and_leaves_nothing() {
    const THREADS: u64 = 6;
    let _alone = alone();
    let server = Server::builder().max_connections(100).start().unwrap();
    let database = server.database().unwrap();
    let mut operator = database.client().unwrap();
    for round in 0..20 {
        let service = Service::start(&database);
        // Nobody has to be excluded: there is one service only, and its stop frees the locks before the visits are over.
        let visits = Arc::new(AtomicUsize::new(0));
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (service, visits) = (Arc::clone(&service), Arc::clone(&visits));
                let mut seed = round * THREADS + thread;
                begin(move || {
                    let rooms = Rooms::default();
                    while service.visit(&rooms, &mut seed) {
                        visits.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let enough = usize::try_from(round).unwrap() * 7;
        support::wait_for("some claims", PATIENCE, || {
            (visits.load(Ordering::SeqCst) >= enough).then_some(())
        })
        .unwrap();
        service.manager.stop().unwrap();
        for worker in workers {
            worker.get();
        }
        let (late, begun) = (Lateness::watch(), Instant::now());
        becomes("the supervisors", &0, || supervisors().len());
        late.allow(begun.elapsed(), Duration::from_millis(400));
        assert!(format!("{:?}", service.manager).contains("idle_supervisors: 0,"));
        becomes("the sessions", &0, || -> i64 {
            let query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                         AND application_name LIKE 'dsync%' AND application_name <> 'dsync-test-support'";
            operator.query_one(query, &[]).unwrap().get(0)
        });
    }
}
